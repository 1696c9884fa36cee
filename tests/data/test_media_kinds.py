"""Media files that lie, lack or hide something: what is read is right, or it is a MediaError."""

import os
import struct

import numpy as np
import pytest

av = pytest.importorskip("av")

from media_files import SIDE, encode, noise, numbered, read_numbers  # noqa: E402
from tried import tried  # noqa: E402

from vatt_fast.data import media_file  # noqa: E402
from vatt_fast.data.media import (  # noqa: E402
    MediaError,
    MediaReader,
    probe,
    read_audio,
    read_clip,
    read_video,
)
from vatt_fast.data.media_writer import write_clip  # noqa: E402

RATE = 16000
PICTURE = dict(frames_per_second=10, height=SIDE, width=SIDE)
WINDOW = dict(**PICTURE, num_frames=16, num_samples=25600, sample_rate_hz=RATE)
STREAMS = "a stream nobody can decode"
NUMBERS = "numbers that are no sound"
LYING = "containers whose seeks or stamps lie"
GUESSED = "durations that are guesses"
UNEQUAL = "sound longer than picture, or shorter"
TAGS = "tags written by hand"
BOMBS = "files that take for ever"


def sound(path, start, seconds=1.0):
    return read_audio(path, start=start, num_samples=round(seconds * RATE), sample_rate_hz=RATE)


def replace(path, **changes):
    content = path.read_bytes()
    for old, new in changes.items():
        assert old.encode() in content
        content = content.replace(old.encode(), new)
    path.write_bytes(content)


@pytest.fixture
def clip(tmp_path):
    write_clip(tmp_path / "clip.mp4", numbered(20), noise(2.0, RATE))
    return tmp_path / "clip.mp4"


@tried(STREAMS, "MP4 whose sound has an unknown codec", "the picture is read; the codec is named")
def test_sound_without_a_decoder(clip):
    replace(clip, mp4a=b"apac", esds=b"free")
    info = probe(clip)
    assert (info.has_video, info.has_audio) == (True, False)
    found = read_clip(clip, start=0, **WINDOW)
    assert found.audio is None and read_numbers(found.video) == list(range(16))
    with pytest.raises(MediaError, match=r"clip\.mp4 has audio that cannot be decoded here.*apac"):
        sound(clip, 0)


@tried(STREAMS, "MP4 whose picture has an unknown codec", "the sound is read; the codec is named")
def test_picture_without_a_decoder(clip):
    replace(clip, avc1=b"xyz1")
    assert probe(clip).has_audio and not probe(clip).has_video
    assert np.abs(sound(clip, 0.2)).max() > 0.05
    with pytest.raises(MediaError, match=r"clip\.mp4 has video that cannot be decoded here.*xyz1"):
        read_video(clip, start=0, num_frames=1, **PICTURE)


@tried(STREAMS, "neither stream has a decoder", "MediaError with both codecs")
def test_no_stream_with_a_decoder(clip):
    replace(clip, mp4a=b"apac", esds=b"free", avc1=b"xyz1")
    with pytest.raises(MediaError, match=r"clip\.mp4.*xyz1.*apac"):
        probe(clip)


def two_sounds(path, first, second):
    """Two sound streams of 2 s: the first is zeros, to be broken; the second is noise."""
    with av.open(str(path), "w") as out:
        streams = [out.add_stream(name, rate=RATE, layout="mono") for name in (first, second)]
        for stream, values in zip(streams, (np.zeros(2 * RATE), noise(2.0, RATE)), strict=True):
            formats = stream.codec_context.format.name
            resampler = av.AudioResampler(
                format=formats,
                layout="mono",
                rate=RATE,
                frame_size=stream.codec_context.frame_size or 1024,
            )
            frame = av.AudioFrame.from_ndarray(
                values[None].astype(np.float32), format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = RATE, 0
            for part in (*resampler.resample(frame), *resampler.resample(None)):
                out.mux(stream.encode(part))
            out.mux(stream.encode(None))


@tried(STREAMS, "two sound streams, the first of an unknown codec", "the second is read")
def test_first_decodable_stream(tmp_path):
    path = tmp_path / "two.mov"
    two_sounds(path, "alac", "aac")
    content = path.read_bytes()
    path.write_bytes(content.replace(b"alac", b"apac", 1).replace(b"alac", b"apac"))
    assert np.abs(sound(path, 0.5)).max() > 0.05


@tried(STREAMS, "two sound streams, the packets of the first damaged", "the second is read")
def test_first_stream_that_decodes(tmp_path):
    path = tmp_path / "two.mkv"
    two_sounds(path, "flac", "pcm_s16le")
    with av.open(str(path)) as container:
        packets = [bytes(p) for p in container.demux(container.streams[0]) if p.size]
    content = path.read_bytes()
    for packet in packets:
        content = content.replace(packet, b"\xff" * len(packet))
    path.write_bytes(content)
    for start in (0.0, 0.9):
        expected = noise(2.0, RATE)[round(start * RATE) :][:RATE]
        assert np.abs(sound(path, start) - expected).max() < 1e-3


def wav(path, values, rate=RATE, channels=1):
    """A WAV file of 32-bit floats."""
    data = np.asarray(values, "<f4").tobytes()
    form = struct.pack("<IHHIIHH", 16, 3, channels, rate, rate * 4 * channels, 4 * channels, 32)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + form
    path.write_bytes(head + b"data" + struct.pack("<I", len(data)) + data)
    return path


@tried(NUMBERS, "one nan, inf, 1e30 or -40000 among the samples of a WAV", "MediaError")
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -40000.0])
@pytest.mark.parametrize("channels", [1, 2])
def test_samples_that_are_no_sound(tmp_path, value, channels):
    values = np.zeros(2 * RATE)
    values[RATE] = value
    path = wav(tmp_path / "bad.wav", values, channels=channels)
    with pytest.raises(MediaError, match=r"bad\.wav has samples at .* not finite or far beyond"):
        sound(path, 0, 2.0 / channels)


@tried(NUMBERS, "samples a little beyond full scale", "cut to [-1, 1]")
def test_loud_sound_is_cut(tmp_path):
    path = wav(tmp_path / "loud.wav", 3 * np.sin(np.arange(RATE) / 9))
    assert np.abs(sound(path, 0)).max() == 1


@tried(NUMBERS, "sample rates of 1 Hz and of 0.5 GHz", "MediaError")
@pytest.mark.parametrize("rate", [1, 2**29])
def test_absurd_sample_rates(tmp_path, rate):
    path = wav(tmp_path / "rate.wav", np.zeros(4000), rate=rate)
    with pytest.raises(MediaError, match=r"rate\.wav"):
        sound(path, 0)


@tried(LYING, "H.264 with B-frames in AVI, at times off the grid", "pictures in their order")
def test_b_frames_in_avi(tmp_path):
    path = tmp_path / "b.avi"
    options = {"bf": "3", "g": "12"}
    encode(path, video="libx264", seconds=2.5, fps=25, video_options=options)
    frames = read_video(
        path, start=0.02, num_frames=40, frames_per_second=25, height=SIDE, width=SIDE
    )
    assert read_numbers(frames) == list(range(40))


@tried(LYING, "sound in an MPEG program stream, in the middle", "read as in the whole")
def test_sound_of_a_program_stream(tmp_path):
    path = tmp_path / "a.mpg"
    options = {"bf": "2"}
    encode(
        path, video="mpeg2video", audio="mp2", seconds=8, fps=25, rate=44100, muxer="vob",
        video_options=options,
    )  # fmt: skip
    assert np.abs(sound(path, 5.0) - sound(path, 0.0, 8.0)[5 * RATE : 6 * RATE]).max() < 2e-3


@tried(LYING, "two transport streams or program streams put one behind the other", "MediaError")
@pytest.mark.parametrize(("suffix", "codec"), [(".ts", "libx264"), (".mpg", "mpeg2video")])
def test_streams_one_behind_the_other(tmp_path, suffix, codec):
    path = tmp_path / f"twice{suffix}"
    encode(path, video=codec, audio="mp2", seconds=4, fps=25)
    path.write_bytes(path.read_bytes() * 2)
    with pytest.raises(MediaError, match=r"twice.*time stamps begin anew after"):
        probe(path)


@tried(LYING, "MP4 of fragments, WebM written live", "any window is its slice; duration measured")
@pytest.mark.parametrize(
    ("name", "codec", "audio", "options"),
    [
        ("fragments.mp4", "libx264", "aac", {"movflags": "frag_keyframe+empty_moov"}),
        ("fragments.mov", "libx264", "aac", {"movflags": "frag_keyframe+empty_moov+skip_sidx"}),
        ("live.webm", "libvpx", "libopus", {"live": "1"}),
        ("live.mkv", "libx264", "pcm_s16le", {"live": "1"}),
    ],
)
def test_files_without_a_duration(tmp_path, name, codec, audio, options):
    path = tmp_path / name
    encode(
        path,
        video=codec,
        audio=audio,
        seconds=14,
        rate=48000,
        container=options,
        video_options={"bf": "0"},
    )
    assert probe(path).duration_seconds == pytest.approx(14, abs=0.06)
    whole = read_numbers(read_video(path, start=0, num_frames=140, **PICTURE))
    # the sound's warm-up may come first
    assert whole in (list(range(140)), [0, *range(139)])
    for start in (0.0, 6.4, 12.5):
        frames = read_video(path, start=start, num_frames=12, **PICTURE)
        assert read_numbers(frames) == whole[round(start * 10) :][:12]


def mixed_rate_sound(path, codec):
    """20 s of silence, then 20 s of noise: the first bit rate promises hundreds of seconds."""
    with av.open(str(path), "w", options={"write_xing": "0"} if codec == "libmp3lame" else {}) as o:
        stream = o.add_stream(codec, rate=44100, layout="mono")
        stream.options = {"q": "4"} if codec == "libmp3lame" else {}
        loud = np.random.default_rng(0).normal(0, 0.2, 20 * 44100)
        values = np.concatenate([np.zeros(20 * 44100), loud]).astype(np.float32)
        resampler = av.AudioResampler(
            format=stream.codec_context.format.name, layout="mono", rate=44100,
            frame_size=stream.frame_size or 1024,
        )  # fmt: skip
        for first in range(0, len(values), 44100):
            frame = av.AudioFrame.from_ndarray(
                values[None, first : first + 44100], format="fltp", layout="mono"
            )
            frame.sample_rate, frame.pts = 44100, first
            for part in resampler.resample(frame):
                o.mux(stream.encode(part))
        for part in resampler.resample(None):
            o.mux(stream.encode(part))
        o.mux(stream.encode(None))


@tried(LYING, "transport and program streams cut amid a group of pictures", "from the next key on")
@pytest.mark.parametrize(
    ("suffix", "codec", "unit"), [(".ts", "libx264", 188), (".mpg", "mpeg2video", 2048)]
)
def test_recordings_that_begin_anywhere(tmp_path, suffix, codec, unit):
    path = tmp_path / f"cut{suffix}"
    encode(
        path, video=codec, audio="mp2", seconds=6, fps=25, muxer=None if unit == 188 else "vob",
        video_options={"g": "24", "bf": "0", "x264-params": "scenecut=0"},
    )  # fmt: skip
    content = path.read_bytes()
    path.write_bytes(content[len(content) // 3 // unit * unit :])
    with MediaReader(path) as reader:
        window = dict(frames_per_second=25, height=SIDE, width=SIDE)
        whole = reader.video(start=0, num_frames=90, **window)
        lit = [number for number in read_numbers(whole) if number is not None]
        assert len(lit) > 50
        steps = np.diff(lit)
        assert set(steps.tolist()) <= {0, 1}
        later = reader.video(start=2.0, num_frames=20, **window)
        assert read_numbers(later) == read_numbers(whole)[50:70]


@tried(
    LYING, "a playlist of another file, named .mp4", "MediaError: the file named is the one read"
)
def test_playlists(clip):
    path = clip.with_name("list.mp4")
    path.write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    with pytest.raises(MediaError, match=r"list\.mp4"):
        probe(path)


@tried(GUESSED, "AAC and MP3 of a changing bit rate, without a header", "duration measured")
@pytest.mark.parametrize(("name", "codec"), [("a.aac", "aac"), ("a.mp3", "libmp3lame")])
def test_durations_are_measured(tmp_path, name, codec):
    path = tmp_path / name
    mixed_rate_sound(path, codec)
    assert probe(path).duration_seconds == pytest.approx(40, abs=0.1)
    assert np.abs(sound(path, 38.0)).max() > 0.2
    beyond = read_clip(path, start=100, **WINDOW)
    assert not beyond.audio.any() and not beyond.audio_valid


@tried(GUESSED, "an MP3 cut in the middle, its header says twice as much", "duration measured")
def test_header_of_an_mp3_that_was_cut(tmp_path):
    path = tmp_path / "cut.mp3"
    encode(path, audio="libmp3lame", seconds=20)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert probe(path).duration_seconds == pytest.approx(10, abs=0.3)


@tried(GUESSED, "an MP4 whose sound declares more than it has", "MediaError where it ends")
def test_declared_longer_than_it_is(clip):
    content = bytearray(clip.read_bytes())
    with av.open(str(clip)) as container:
        samples = [int(p.pos) for p in container.demux(container.streams.audio[0]) if p.size]
    end = samples[len(samples) // 2]
    content[end : samples[-1]] = b"\0" * (samples[-1] - end)
    clip.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip\.mp4"):
        sound(clip, 0.5, 1.5)


@tried(UNEQUAL, "3 s of picture, 10 s of sound", "no valid picture after the last one")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_windows_without_a_picture(tmp_path, suffix):
    path = tmp_path / f"sound{suffix}"
    encode(path, video="mpeg4", audio="aac", seconds=3.0, sounds=10.0)
    with MediaReader(path) as reader:
        assert reader.info.duration_seconds == pytest.approx(10, abs=0.1)
        late = reader.clip(start=5.0, **WINDOW)
        assert not late.video_valid and not late.video.any() and late.audio_valid
        across = reader.clip(start=2.5, **WINDOW)
        assert across.video_valid and across.shown[0] == 0 and across.shown[1] in (5, 6)
        # the last picture for one interval, then black
        lit = across.video.reshape(16, -1).any(1)
        assert lit[: across.shown[1]].all() and not lit[across.shown[1] :].any()


@tried(UNEQUAL, "a picture without an end: its last one declares 8 s", "held for one interval")
def test_the_last_picture_is_held_for_one_interval(tmp_path):
    path = tmp_path / "held.mkv"
    encode(path, video="mpeg4", audio="aac", seconds=2.0, sounds=10.0)
    with av.open(str(path)) as source, av.open(str(tmp_path / "long.mp4"), "w") as target:
        copies = {s.index: target.add_stream_from_template(s) for s in source.streams}
        for packet in source.demux():
            if packet.dts is None and packet.pts is None:
                continue
            if packet.stream.type == "video" and packet.pts * packet.time_base >= 1.85:
                packet.duration = round(8 / packet.time_base)
            packet.stream = copies[packet.stream.index]
            target.mux(packet)
    found = read_clip(tmp_path / "long.mp4", start=4.0, **WINDOW)
    assert not found.video_valid and found.audio_valid


@tried(UNEQUAL, "10 s of picture, 3 s of sound", "no valid sound after the last one")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi", ".ts"])
def test_windows_without_a_sound(tmp_path, suffix):
    path = tmp_path / f"picture{suffix}"
    encode(path, video="mpeg4", audio="aac", seconds=10.0, sounds=3.0)
    late = read_clip(path, start=5.0, **WINDOW)
    assert late.video_valid and not late.audio_valid and not late.audio.any()
    early = read_clip(path, start=0.0, **WINDOW)
    assert early.heard == (0, 25600) and early.shown[1] == 16


@tried(UNEQUAL, "a video that is black, sound that is silent", "valid")
def test_black_and_silence_are_valid(tmp_path):
    write_clip(tmp_path / "black.mp4", np.zeros((20, 64, 64, 3), np.uint8), np.zeros(2 * RATE))
    found = read_clip(tmp_path / "black.mp4", start=0, **WINDOW)
    assert found.video_valid and found.audio_valid


@tried(LYING, "the same window twice from one reader, AAC whose decoder fills in noise", "the same")
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".ts", ".aac"])
def test_a_reader_reads_the_same_again(tmp_path, suffix):
    path = tmp_path / f"again{suffix}"
    video = None if suffix == ".aac" else "mpeg4"
    encode(path, video=video, audio="aac", seconds=4.0)
    with MediaReader(path) as reader:
        first, second, other = (reader.clip(start=s, **WINDOW) for s in (0.0, 0.0, 1.3))
        np.testing.assert_array_equal(first.audio, second.audio)
    np.testing.assert_array_equal(read_clip(path, start=1.3, **WINDOW).audio, other.audio)


@tried(TAGS, "a Matroska DURATION of `3.0`, of `soon`, of `-1:00:00`", "the tag is not believed")
@pytest.mark.parametrize("tag", [b"3.0", b"soon", b"-1:00:00", b"1:2:3:4", b"", b"nan:00:00"])
def test_odd_durations(tmp_path, tag):
    path = tmp_path / "a.mkv"
    encode(path, video="mpeg4", audio="aac", seconds=3.0)
    content = path.read_bytes()
    place = content.find(b"00:00:03.")
    assert place > 0
    content = content[:place] + tag.ljust(18, b"\0") + content[place + 18 :]
    path.write_bytes(content)
    frames = read_video(path, start=1.8, num_frames=10, **PICTURE)
    assert read_numbers(frames) == list(range(18, 28))
    assert read_clip(path, start=2.0, **WINDOW).video_valid


def mirrored(path, matrix):
    """Write a display matrix (a, b, c, d) into the header of an MP4 file's first track."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 44
    a, b, c, d = (value << 16 for value in matrix)
    values = [a, b, 0, c, d, 0, 0, 0, 1 << 30]
    content[place : place + 36] = b"".join(v.to_bytes(4, "big", signed=True) for v in values)
    path.write_bytes(content)


@tried(
    "orientation of a video", "the eight matrices of quarter turns and mirrors", "as players show"
)
@pytest.mark.parametrize(
    "matrix",
    [
        *((1, 0, 0, 1), (-1, 0, 0, 1), (-1, 0, 0, -1), (1, 0, 0, -1)),
        *((0, 1, 1, 0), (0, 1, -1, 0), (0, -1, -1, 0), (0, -1, 1, 0)),
    ],
)
def test_orientation_of_videos(tmp_path, matrix):
    """The matrix maps a stored point (x, y) to where it is shown, (a x + c y, b x + d y)."""
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:32, :32], picture[:32, 32:], picture[32:, :32] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    path = tmp_path / "turned.mp4"
    write_clip(path, np.stack([picture] * 3), None, crf=1)
    mirrored(path, matrix)
    found = read_video(path, start=0, num_frames=1, **PICTURE)[0]
    a, b, c, d = matrix
    for x, y in ((-16, -16), (16, -16), (-16, 16), (16, 16)):  # from the centre
        shown = found[32 + b * x + d * y, 32 + a * x + c * y].astype(int)
        assert np.abs(shown - picture[32 + y, 32 + x]).max() < 60, (x, y)


@tried("orientation of a video", "a video with transparent parts", "they are white")
def test_transparent_video(tmp_path):
    frames = np.zeros((3, SIDE, SIDE, 4), np.uint8)
    frames[..., 0] = 255
    frames[:, :, :32, 3] = 255
    path = tmp_path / "alpha.mov"
    with av.open(str(path), "w") as out:
        stream = out.add_stream("qtrle", rate=10)
        stream.width, stream.height, stream.pix_fmt = SIDE, SIDE, "argb"
        for values in frames:
            frame = av.VideoFrame.from_ndarray(values, format="rgba").reformat(format="argb")
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    found = read_video(path, start=0, num_frames=1, **PICTURE)[0]
    assert found[32, 8].tolist() == [255, 0, 0] and found[32, 56].tolist() == [255, 255, 255]


@tried(BOMBS, "a file whose decoding takes longer than the deadline", "MediaError")
def test_a_deadline(clip, monkeypatch):
    with MediaReader(clip) as reader:
        monkeypatch.setattr(media_file, "DEADLINE_SECONDS", 0.0)
        with pytest.raises(MediaError, match=r"clip\.mp4 took more than 0 s to decode"):
            reader.video(start=0, num_frames=1, **PICTURE)


@tried(BOMBS, "a video of 30000 x 30000 pictures of one colour", "MediaError before it is decoded")
def test_pictures_of_a_video_that_are_too_large(clip):
    path = clip.with_name("large.mov")
    with av.open(str(path), "w") as out:
        stream = out.add_stream("png", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "rgb24"
        out.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")))
        out.mux(stream.encode(None))
    content = path.read_bytes()
    head = content.index(b"IHDR") + 4
    size = struct.pack(">II", 30000, 30000)
    content = content[:head] + size + content[head + 8 :]
    path.write_bytes(content)
    with pytest.raises(MediaError, match=r"large\.mov"):
        read_video(path, start=0, num_frames=1, **PICTURE)


@tried(BOMBS, "a folder, a pipe named like media", "MediaError, at once")
def test_things_that_are_no_files(tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    os.mkfifo(tmp_path / "pipe.mp4")
    for name, kind in (("folder.mp4", "a folder"), ("pipe.mp4", "no regular file")):
        with pytest.raises(MediaError, match=f"{name} is {kind}"):
            probe(tmp_path / name)


def test_no_thread_is_started(tmp_path):
    """Decoders and scalers may not use more cores than the process that called them."""
    encode(tmp_path / "t.mp4", video="libx264", audio="aac", seconds=2.0)
    before = len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else None
    seen = []
    with MediaReader(tmp_path / "t.mp4") as reader:
        original = reader._picture

        def counting(*arguments):
            picture = original(*arguments)
            seen.append(len(os.listdir("/proc/self/task")) if before else None)
            return picture

        reader._picture = counting
        reader.clip(start=0.0, **WINDOW)
    assert seen and set(seen) == {before}
