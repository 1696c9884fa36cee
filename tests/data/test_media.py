"""Files of real encoders come back at the right time, rate and size; damaged ones say so."""

import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

from vatt_fast.data import media  # noqa: E402
from vatt_fast.data.media import (  # noqa: E402
    MediaError,
    MediaReader,
    probe,
    read_audio,
    read_clip,
    read_video,
)
from vatt_fast.data.media_writer import write_clip  # noqa: E402

SIDE = 64
FRAMES = 32
BEEP = (1.0, 1.1)  # seconds
WINDOW = dict(
    num_frames=16,
    frames_per_second=10.0,
    height=SIDE,
    width=SIDE,
    num_samples=25600,
    sample_rate_hz=16000,
)


def numbered_frames(count=FRAMES, height=SIDE, width=SIDE):
    """Pictures that carry their own number.

    Bit b is a white or a black bar in the b-th sixth of the width. Bit 5 is always white.
    """
    frames = np.zeros((count, height, width, 3), np.uint8)
    for number in range(count):
        for bit in range(6):
            if bit == 5 or number >> bit & 1:
                frames[number, :, bit * width // 6 : (bit + 1) * width // 6] = 255
    return frames


def numbers(frames):
    """The numbers of ``numbered_frames``; None for a black picture."""
    found = []
    for frame in frames:
        middles = [(2 * bit + 1) * frame.shape[1] // 12 for bit in range(6)]
        bits = [int(frame[frame.shape[0] // 2, middle].mean() > 128) for middle in middles]
        found.append(sum(bit << place for place, bit in enumerate(bits[:5])) if bits[5] else None)
    return found


def beep(sample_rate_hz=16000, seconds=3.2, channels=1):
    time = np.arange(round(seconds * sample_rate_hz)) / sample_rate_hz
    sound = 0.6 * np.sin(2 * np.pi * 1000 * time) * ((time >= BEEP[0]) & (time < BEEP[1]))
    return np.repeat(sound[:, None], channels, 1).astype(np.float32)


def sounding(audio, sample_rate_hz, start=0.0):
    """First and last time at which the sound is loud."""
    loud = np.flatnonzero(np.abs(audio) > 0.2) / sample_rate_hz + start
    return loud[0], loud[-1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def clip_file(folder):
    write_clip(folder / "clip.mp4", numbered_frames(), beep())
    return folder / "clip.mp4"


def rewrite(path, target, *, stamps=None, rate=10, time_base=None):
    """Encode the numbered frames and the beep with plain PyAV: any container, any time stamps."""
    time_base = time_base or Fraction(1, rate)
    with av.open(str(target), "w") as container:
        video = container.add_stream("mpeg4", rate=rate)
        video.width = video.height = SIDE
        video.pix_fmt, video.options = "yuv420p", {"qscale": "2"}
        video.codec_context.time_base = time_base
        audio = container.add_stream("aac", rate=16000, layout="mono")
        for number, values in enumerate(numbered_frames()):
            picture = av.VideoFrame.from_ndarray(values, format="rgb24")
            picture.pts, picture.time_base = (
                (number if stamps is None else stamps[number]),
                time_base,
            )
            container.mux(video.encode(picture))
        container.mux(video.encode(None))
        sound = beep()[:, 0]
        for first in range(0, len(sound), 1024):
            frame = av.AudioFrame.from_ndarray(
                sound[None, first : first + 1024], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 16000, first
            container.mux(audio.encode(frame))
        container.mux(audio.encode(None))


def test_probe_and_codecs(clip_file):
    info = probe(clip_file)
    assert (info.has_video, info.has_audio, info.is_image) == (True, True, False)
    assert info.duration_seconds == pytest.approx(3.2, abs=0.1)
    with av.open(str(clip_file)) as container:
        assert container.streams.video[0].codec_context.name in ("h264", "mpeg4")
        assert container.streams.audio[0].codec_context.name == "aac"
        assert container.streams.audio[0].rate == 16000


def test_whole_clip_comes_back(clip_file):
    clip = read_clip(clip_file, start=0.0, **{**WINDOW, "num_frames": FRAMES, "num_samples": 51200})
    assert clip.video.shape == (FRAMES, SIDE, SIDE, 3) and clip.video.dtype == np.uint8
    assert clip.audio.shape == (51200,) and clip.audio.dtype == np.float32
    assert numbers(clip.video) == list(range(FRAMES))
    assert np.abs(clip.video.astype(int) - numbered_frames()).mean() < 8
    assert np.sqrt(np.mean((clip.audio - beep()[:, 0]) ** 2)) < 0.02


@pytest.mark.parametrize("start", [0.0, 0.1, 0.3, 0.75, 0.95, 1.6])
def test_window_is_in_sync(clip_file, start):
    """The beep and the picture of its beginning lie at the same time, to a frame and 10 ms."""
    clip = read_clip(clip_file, start=start, **WINDOW)
    assert numbers(clip.video) == [
        int(number) for number in np.floor(start * 10 + 1e-6 + np.arange(16))
    ]
    if start <= BEEP[0]:
        first, last = sounding(clip.audio, 16000, start)
        assert first == pytest.approx(BEEP[0], abs=0.010) and last == pytest.approx(
            BEEP[1], abs=0.010
        )
    elif start > BEEP[1]:
        assert np.abs(clip.audio).max() < 0.1


@pytest.mark.parametrize(
    ("frames_per_second", "expected"),
    [(5.0, [7, 9, 11, 13]), (20.0, [7, 7, 8, 8]), (25.0, [7, 7, 7, 8]), (4.0, [7, 9, 12, 14])],
)
def test_frames_at_other_rates_are_the_latest_shown(clip_file, frames_per_second, expected):
    frames = read_video(
        clip_file,
        start=0.7,
        num_frames=4,
        frames_per_second=frames_per_second,
        height=SIDE,
        width=SIDE,
    )
    assert numbers(frames) == expected


@pytest.mark.parametrize("sample_rate_hz", [8000, 11025, 22050, 24000, 44100, 48000])
@pytest.mark.parametrize("start", [0.0, 0.43])
def test_sound_at_other_rates(clip_file, start, sample_rate_hz):
    audio = read_audio(
        clip_file,
        start=start,
        num_samples=round(1.6 * sample_rate_hz),
        sample_rate_hz=sample_rate_hz,
    )
    assert len(audio) == round(1.6 * sample_rate_hz) and np.abs(audio).max() <= 1
    first, last = sounding(audio, sample_rate_hz, start)
    assert first == pytest.approx(BEEP[0], abs=0.002) and last == pytest.approx(BEEP[1], abs=0.002)
    inside = audio[round((1.02 - start) * sample_rate_hz) : round((1.08 - start) * sample_rate_hz)]
    spectrum = np.abs(np.fft.rfft(inside * np.hanning(len(inside))))
    assert np.argmax(spectrum) * sample_rate_hz / len(inside) == pytest.approx(1000, abs=20)


@pytest.mark.parametrize(
    ("rate", "sample_rate_hz"),
    [(44100, 16000), (48000, 16000), (8000, 48000), (11025, 44100), (44101, 16000)],
)
def test_resampling_keeps_every_sample_in_place(folder, rate, sample_rate_hz):
    """Beside the sine itself, from an uncompressed file: no delay and no edge.

    At the odd rate rounding may shift it by up to half a sample.
    """
    seconds = np.arange(2 * rate) / rate
    write_clip(
        folder / "tone.wav", None, 0.5 * np.sin(2 * np.pi * 440 * seconds), sample_rate_hz=rate
    )
    start = 0.4
    audio = read_audio(
        folder / "tone.wav", start=start, num_samples=sample_rate_hz, sample_rate_hz=sample_rate_hz
    )
    expected = 0.5 * np.sin(2 * np.pi * 440 * (start + np.arange(sample_rate_hz) / sample_rate_hz))
    assert np.abs(audio - expected).max() < (0.02 if rate == 44101 else 2e-3)


def test_channels_are_averaged(folder):
    left = np.linspace(-0.5, 0.5, 16000, dtype=np.float32)
    write_clip(folder / "stereo.wav", None, np.stack([left, np.full_like(left, 0.25)], 1))
    audio = read_audio(folder / "stereo.wav", start=0.0, num_samples=16000, sample_rate_hz=16000)
    np.testing.assert_allclose(audio, (left + 0.25) / 2, atol=1e-4)


def test_stereo_aac(folder):
    write_clip(
        folder / "stereo.mp4", numbered_frames(), beep(48000, channels=2), sample_rate_hz=48000
    )
    audio = read_audio(folder / "stereo.mp4", start=0.5, num_samples=16000, sample_rate_hz=16000)
    assert sounding(audio, 16000, 0.5) == pytest.approx(BEEP, abs=0.010)


def test_a_missing_stream_is_none(folder, clip_file):
    write_clip(folder / "silent.mp4", numbered_frames(), None)
    write_clip(folder / "sound.m4a", None, beep())
    silent, sound = (
        read_clip(folder / "silent.mp4", start=0.0, **WINDOW),
        read_clip(folder / "sound.m4a", start=0.0, **WINDOW),
    )
    assert silent.audio is None and numbers(silent.video) == list(range(16))
    assert sound.video is None and sounding(sound.audio, 16000) == pytest.approx(BEEP, abs=0.010)
    with pytest.raises(MediaError, match=r"silent\.mp4 has no audio"):
        read_audio(folder / "silent.mp4", start=0.0, num_samples=10, sample_rate_hz=16000)
    with pytest.raises(MediaError, match=r"sound\.m4a has no video"):
        read_video(
            folder / "sound.m4a", start=0.0, num_frames=1, frames_per_second=1, height=8, width=8
        )


def test_past_the_end_is_black_and_silent(clip_file):
    clip = read_clip(clip_file, start=2.7, **WINDOW)
    assert numbers(clip.video[:5]) == list(range(27, 32))
    assert not clip.video[5:].any()
    assert not clip.audio[round(0.6 * 16000) :].any()
    beyond = read_clip(clip_file, start=50.0, **WINDOW)
    assert not beyond.video.any() and not beyond.audio.any()


@pytest.mark.parametrize("suffix", [".ts", ".mkv", ".mov", ".avi"])
@pytest.mark.parametrize("start", [0.0, 1.4, 2.6])
def test_other_containers(folder, clip_file, suffix, start):
    """Other clocks: a transport stream begins at 1.4 s, Matroska rounds to milliseconds.

    AVI does not mark the priming of its sound.
    """
    path = folder / f"other{suffix}"
    rewrite(clip_file, path)
    clip = read_clip(path, start=start, **WINDOW)
    inside = min(16, FRAMES - round(start * 10) - 1)
    expected = np.arange(inside) + round(start * 10)
    found = [-9 if number is None else number for number in numbers(clip.video[:inside])]
    assert (
        np.abs(np.array(found) - expected).max() <= 1
    )  # to one frame: some muxers delay the video by one
    if suffix in (".mov", ".mkv"):
        np.testing.assert_array_equal(found, expected)
    if start == 0:
        # what AAC's warm-up adds in AVI and transport streams, which cannot mark it, is heard
        assert sounding(clip.audio, 16000)[0] == pytest.approx(
            BEEP[0], abs=0.010 if suffix in (".mov", ".mkv") else 0.14
        )


@pytest.mark.parametrize("num_samples", [2000, 2040, 4000])
def test_the_codecs_last_frame_is_cut_where_the_sound_ends(folder, num_samples):
    """1600 samples take two AAC frames of 1024; what the encoder adds must never be heard."""
    write_clip(
        folder / "brief.m4a",
        None,
        np.full(1600, 0.5, np.float32) * np.sin(np.arange(1600)).astype(np.float32),
    )
    audio = read_audio(
        folder / "brief.m4a", start=0.0, num_samples=num_samples, sample_rate_hz=16000
    )
    assert np.abs(audio[1500:1600]).max() > 0.1 and not audio[1600:].any()


def test_variable_frame_rate(folder, clip_file):
    """Each picture is on screen until the next one's stamp, however uneven."""
    milliseconds = np.cumsum([0] + [40, 200, 60] * 10 + [40])[:FRAMES]
    rewrite(
        clip_file,
        folder / "uneven.mp4",
        stamps=[int(stamp) for stamp in milliseconds],
        rate=1000,
        time_base=Fraction(1, 1000),
    )
    times = 0.3 + np.arange(40) / 20
    expected = [
        int(np.searchsorted(milliseconds, time * 1000 + 0.5, side="right")) - 1 for time in times
    ]
    frames = read_video(
        folder / "uneven.mp4",
        start=0.3,
        num_frames=40,
        frames_per_second=20,
        height=SIDE,
        width=SIDE,
    )
    assert numbers(frames) == expected


def test_raw_stream_without_index_or_stamps(folder):
    with av.open(str(folder / "raw.h264"), "w") as container:
        stream = container.add_stream(
            "libx264" if "libx264" in av.codecs_available else "h264", rate=25
        )
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", {"bf": "0"}
        for number, values in enumerate(numbered_frames()):
            picture = av.VideoFrame.from_ndarray(values, format="rgb24")
            picture.pts = number
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    frames = read_video(
        folder / "raw.h264", start=0.4, num_frames=4, frames_per_second=25, height=SIDE, width=SIDE
    )
    assert numbers(frames) == [10, 11, 12, 13]


def test_seek_decodes_only_what_is_needed(folder, monkeypatch):
    """Far into a long file with key frames, a window decodes about one group of pictures."""
    frames = np.concatenate([numbered_frames()] * 20)
    write_clip(folder / "long.mp4", frames, None)
    decoded = []
    original = MediaReader._timed_frames

    def counting(self, kind, **options):
        for item in original(self, kind, **options):
            decoded.append(item[1])
            yield item

    monkeypatch.setattr(MediaReader, "_timed_frames", counting)
    found = read_video(
        folder / "long.mp4", start=60.0, num_frames=4, frames_per_second=10, height=SIDE, width=SIDE
    )
    assert numbers(found) == [600 % 32, 601 % 32, 602 % 32, 603 % 32]
    assert len(decoded) <= 55  # write_clip's longest group is 50


def test_reader_reads_repeatedly_and_backwards(clip_file):
    with MediaReader(clip_file) as reader:
        for start in (1.5, 0.2, 3.0, 0.0):
            clip = reader.clip(start=start, **WINDOW)
            assert numbers(clip.video)[0] == round(start * 10)
            again = read_clip(clip_file, start=start, **WINDOW)
            np.testing.assert_array_equal(clip.audio, again.audio)
            np.testing.assert_array_equal(clip.video, again.video)


def test_cover_and_centre_crop(folder):
    """A wide picture keeps its middle: columns 32..96 of 128."""
    frames = np.zeros((4, 64, 128, 3), np.uint8)
    frames[:, :, 32:96] = (200, 40, 40)
    frames[:, 16:48, 48:80] = (40, 40, 200)
    write_clip(folder / "wide.mp4", frames, None)
    half = read_video(
        folder / "wide.mp4", start=0.0, num_frames=1, frames_per_second=10, height=32, width=32
    )[0].astype(int)
    assert half.shape == (32, 32, 3)
    assert (
        half[2, 2, 0] > 150 and half[-3, -3, 0] > 150
    )  # red up to the corners: the black sides are gone
    assert half[16, 16, 2] > 150 and half[10, 10, 2] > 150 and half[5, 5, 0] > 150
    tall = read_video(
        folder / "wide.mp4", start=0.0, num_frames=1, frames_per_second=10, height=64, width=16
    )[0].astype(int)
    assert tall[32, :, 2].min() > 150 and tall[4, :, 0].min() > 150


@pytest.mark.parametrize("name", ["still.png", "still.jpg"])
def test_a_still_image_is_one_repeated_frame(folder, name):
    image = numbered_frames(8)[5]
    picture = av.VideoFrame.from_ndarray(image, format="rgb24")
    picture.to_image().save(folder / name)
    assert probe(folder / name) == media.MediaInfo(0.0, True, False, True)
    clip = read_clip(folder / name, start=7.0, **WINDOW)
    assert clip.audio is None and numbers(clip.video) == [5] * 16
    with MediaReader(folder / name) as reader:  # and again from the same reader
        assert numbers(reader.clip(start=0.0, **WINDOW).video) == numbers(
            reader.clip(start=0.0, **WINDOW).video
        )


def test_rotation_mark_is_applied(folder):
    """A phone stores portrait video lying, with a display matrix of 90 degrees clockwise."""
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, :16] = (220, 30, 30)  # the left edge becomes the top
    write_clip(folder / "lying.mp4", frames, None)
    content = bytearray((folder / "lying.mp4").read_bytes())
    matrix = content.index(b"tkhd") + 44
    quarter = [0, 1 << 16, 0, -(1 << 16), 0, 0, 32 << 16, 0, 1 << 30]
    content[matrix : matrix + 36] = b"".join(
        value.to_bytes(4, "big", signed=True) for value in quarter
    )
    (folder / "turned.mp4").write_bytes(content)
    upright = read_video(
        folder / "turned.mp4", start=0.0, num_frames=1, frames_per_second=10, height=64, width=32
    )[0].astype(int)
    assert upright[2:14, :, 0].min() > 150
    assert upright[20:, :, 0].max() < 80


def damaged(path, folder, how):
    content = path.read_bytes()
    target = folder / f"{how}.mp4"
    if how == "headless":  # the index lies at the end
        content = content[: len(content) // 2]
    elif how == "empty":
        content = b""
    elif how == "text":
        content = b"this is no video\n" * 50
    else:
        scrambled = bytearray(content)
        media_data = content.index(b"mdat") + 8
        for place in np.random.default_rng(0).integers(media_data, content.index(b"moov") - 8, 300):
            scrambled[place] ^= 0x5A
        content = bytes(scrambled)
    target.write_bytes(content)
    return target


@pytest.mark.parametrize("how", ["headless", "empty", "text", "scrambled"])
def test_damaged_files_raise_and_name_the_file(folder, clip_file, how):
    path = damaged(clip_file, folder, how)
    with pytest.raises(MediaError, match=f"{how}.mp4.*replace or remove"):
        read_clip(path, start=0.0, **WINDOW)
    assert issubclass(MediaError, ValueError)


def test_cut_short_behind_its_index(folder):
    """With its index in front, a cut file still opens; only windows after the cut raise."""
    frames = np.concatenate([numbered_frames()] * 4)
    with av.open(str(folder / "front.mp4"), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt, stream.options = "yuv420p", {"qscale": "2"}
        for number, values in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(values, format="rgb24")
            picture.pts, picture.time_base = number, Fraction(1, 10)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    content = (folder / "front.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    window = dict(num_frames=8, frames_per_second=10.0, height=SIDE, width=SIDE)
    assert numbers(read_video(folder / "cut.mp4", start=0.0, **window)) == list(range(8))
    with pytest.raises(MediaError, match=r"cut\.mp4"):
        read_video(folder / "cut.mp4", start=10.0, **window)


def test_missing_file_and_bad_arguments(folder, clip_file):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        probe(folder / "nowhere.mp4")
    with pytest.raises(ValueError, match="start is -1"):
        read_clip(clip_file, start=-1.0, **WINDOW)
    with pytest.raises(ValueError, match="num_frames is 0"):
        read_clip(clip_file, start=0.0, **{**WINDOW, "num_frames": 0})
    with pytest.raises(ValueError, match="sample_rate_hz is 0"):
        read_audio(clip_file, start=0.0, num_samples=5, sample_rate_hz=0)


@pytest.mark.parametrize(
    ("frames", "audio", "message"),
    [
        (None, None, "nothing to write"),
        (np.zeros((4, 64, 64, 3)), None, "must be uint8"),
        (np.zeros((4, 63, 64, 3), np.uint8), None, "even sizes"),
        (None, np.zeros(100, np.int16), "must be float"),
        (None, np.full(100, np.nan, np.float32), "not finite"),
    ],
)
def test_write_refuses_what_it_cannot_encode(folder, frames, audio, message):
    with pytest.raises(ValueError, match=message):
        write_clip(folder / "never.mp4", frames, audio)
    assert not list(folder.glob("*never*"))


def test_writing_is_repeatable_and_leaves_no_parts(folder, clip_file):
    write_clip(folder / "again.mp4", numbered_frames(), beep())
    assert (folder / "again.mp4").read_bytes() == clip_file.read_bytes()
    assert not list(folder.glob(".*part*"))


def test_a_name_with_a_colon_is_a_name(folder, clip_file):
    path = folder / "http:clip.mp4"
    path.write_bytes(clip_file.read_bytes())
    assert probe(path).has_video


def test_the_package_needs_pyav_only_for_media():
    """Without PyAV the modules import; the first file says what to install."""
    code = (
        "import sys; sys.modules['av'] = None\n"
        "import vatt_fast.data.text, vatt_fast.data.dataset, vatt_fast.data.media_writer\n"
        "from vatt_fast.data import media\n"
        "try: media.probe(__file__ if '__file__' in globals() else sys.executable)\n"
        "except ImportError as error: assert 'pip install vatt_fast[data]' in str(error), error\n"
        "else: raise SystemExit('no error')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
