"""Every accepted suffix with the codecs people have: a window equals that slice of the whole."""

import numpy as np
import pytest

av = pytest.importorskip("av")

from media_files import SIDE, encode, noise, read_numbers  # noqa: E402
from tried import tried  # noqa: E402

from vatt_fast.data.media import (  # noqa: E402
    AUDIO_SUFFIXES,
    IMAGE_SUFFIXES,
    VIDEO_SUFFIXES,
    probe,
    read_audio,
    read_video,
)

RATE = 16000
FPS = 10
GROUPS = {"g": "24", "bf": "2"}
X265 = {"x265-params": "keyint=24:bframes=2:log-level=none"}
VPX = {"g": "24", "deadline": "realtime", "cpu-used": "8", "lag-in-frames": "0"}
VIDEO_OPTIONS = {
    "libx264": GROUPS,
    "mpeg4": GROUPS,
    "mpeg2video": GROUPS,
    "mpeg1video": GROUPS,
    "libx265": X265,
    "libvpx": VPX,
    "libvpx-vp9": VPX,
    "libsvtav1": {"preset": "12"},
}
PIXELS = {
    "mjpeg": "yuvj420p",
    "prores_ks": "yuv422p10le",
    "qtrle": "rgb24",
    "huffyuv": "yuv422p",
}
# without the noise that decoders make up, a window is its slice to the last bits
AUDIO_OPTIONS = {"aac": {"aac_pns": "0"}, "vorbis": {"strict": "experimental"}}

MATRIX = [
    (".mp4", "libx264", "aac"),
    (".mp4", "libx265", "aac"),
    (".mp4", "mpeg4", "libmp3lame"),
    (".mp4", "libsvtav1", "libopus"),
    (".mp4", "libvpx-vp9", "flac"),
    (".mp4", "libx264", "ac3"),
    (".m4v", "mpeg4", "aac"),
    (".mov", "libx264", "pcm_s16le"),
    (".mov", "mjpeg", "pcm_s16le"),
    (".mov", "prores_ks", "aac"),
    (".mov", "qtrle", "aac"),
    (".mkv", "libx264", "aac"),
    (".mkv", "libx264", "libmp3lame"),
    (".mkv", "libx265", "libopus"),
    (".mkv", "mpeg2video", "mp2"),
    (".mkv", "mpeg4", "ac3"),
    (".mkv", "ffv1", "flac"),
    (".mkv", "libvpx-vp9", "vorbis"),
    (".mkv", "libx264", "pcm_s16le"),
    (".webm", "libvpx", "vorbis"),
    (".webm", "libvpx-vp9", "libopus"),
    (".webm", "libsvtav1", "libopus"),
    (".avi", "mpeg4", "libmp3lame"),
    (".avi", "mpeg4", "ac3"),
    (".avi", "libx264", "libmp3lame"),
    (".avi", "libx264", "aac"),
    (".avi", "mjpeg", "pcm_s16le"),
    (".avi", "huffyuv", "pcm_s16le"),
    (".avi", "ffv1", "pcm_s16le"),
    (".mpg", "mpeg1video", "mp2"),
    (".mpg", "mpeg2video", "mp2"),
    (".mpeg", "mpeg2video", "ac3"),
    (".ts", "libx264", "aac"),
    (".ts", "libx265", "ac3"),
    (".ts", "mpeg2video", "mp2"),
    (".ts", "libx264", "libmp3lame"),
    (".ts", "libx264", "libopus"),
    (".wav", None, "pcm_s16le"),
    (".wav", None, "pcm_u8"),
    (".wav", None, "pcm_f32le"),
    (".wav", None, "pcm_s24le"),
    (".wav", None, "pcm_mulaw"),
    (".wav", None, "adpcm_ima_wav"),
    (".wav", None, "libmp3lame"),
    (".flac", None, "flac"),
    (".mp3", None, "libmp3lame"),
    (".m4a", None, "aac"),
    (".m4a", None, "alac"),
    (".aac", None, "aac"),
    (".ogg", None, "vorbis"),
    (".ogg", None, "libopus"),
    (".ogg", None, "flac"),
    (".opus", None, "libopus"),
]
# containers that do not mark the warm-up of their sound play it first, in seconds
WARM_UP = 0.03
# the decoder of ac3 adds noise of its own
TOLERANCE = {"ac3": 0.02, "mp2": 2e-3, "libmp3lame": 2e-3}


def test_the_matrix_holds_every_suffix():
    assert {suffix for suffix, _, _ in MATRIX} == {*VIDEO_SUFFIXES, *AUDIO_SUFFIXES}
    assert IMAGE_SUFFIXES == (".png", ".jpg", ".jpeg", ".bmp", ".webp")  # in test_pictures.py


@tried(
    "containers whose seeks or stamps lie",
    f"{len(MATRIX)} pairs of suffix and codecs, windows at four times",
    "each window is its slice of the whole",
)
@pytest.mark.parametrize(("suffix", "video", "audio"), MATRIX)
def test_a_window_is_a_slice_of_the_whole(tmp_path, suffix, video, audio):
    missing = {video, audio} - {None} - av.codecs_available
    if missing:
        pytest.skip(f"this PyAV has no encoder {missing}")
    path = tmp_path / f"clip{suffix}"
    mpeg = suffix in (".mpg", ".mpeg")  # with the rates that the standard allows
    fps = 25 if mpeg else FPS
    seconds = 9.6 if mpeg else 16.0
    rate = 48000 if audio in ("libopus", "ac3", "vorbis") else 44100
    encode(
        path,
        video=video,
        audio=audio,
        seconds=seconds,
        fps=fps,
        rate=rate,
        pixels=PIXELS.get(video, "yuv420p"),
        video_options=VIDEO_OPTIONS.get(video),
        audio_options=AUDIO_OPTIONS.get(audio),
        layout="stereo" if audio == "vorbis" else "mono",
        muxer="vob" if suffix == ".mpeg" else None,
    )
    assert probe(path).duration_seconds == pytest.approx(seconds, abs=0.06)
    picture = dict(frames_per_second=fps, height=SIDE, width=SIDE)
    count = round(seconds * fps)
    whole = read_audio(path, start=0, num_samples=round(seconds * RATE), sample_rate_hz=RATE)
    _assert_same_sound(whole, noise(seconds, rate), rate)
    if video:
        numbers = read_numbers(read_video(path, start=0, num_frames=count, **picture))
        # its clock may be that of the sound's warm-up: then each picture comes a little later
        late = suffix in (".ts", ".mpg", ".mpeg")
        assert numbers == ([0, *range(count - 1)] if late else list(range(count)))
    for start in (0.0, 2.4, 0.46 * seconds, seconds - 1.72):
        first = round(start * fps)
        sound = read_audio(path, start=first / fps, num_samples=RATE, sample_rate_hz=RATE)
        expected = whole[round(first / fps * RATE) :][: len(sound)]
        assert np.abs(sound - expected).max() < TOLERANCE.get(audio, 1e-3), start
        if video:
            frames = read_video(path, start=first / fps, num_frames=12, **picture)
            assert read_numbers(frames) == numbers[first : first + 12], start


def _assert_same_sound(found, sent, rate):
    """``found`` is ``sent``, at another rate, up to what codecs lose and their warm-up."""
    length = 2 * len(found)
    middle = np.interp(np.arange(len(found)) / RATE, np.arange(len(sent)) / rate, sent)
    spectrum = np.fft.rfft(found, length) * np.conj(np.fft.rfft(middle, length))
    correlation = np.fft.irfft(spectrum)
    delay = int(np.argmax(correlation[: len(found)]))
    assert delay / RATE < WARM_UP
    assert correlation[delay] > 0.8 * np.linalg.norm(found) * np.linalg.norm(middle)
