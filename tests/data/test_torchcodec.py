"""Pictures decoded by torchcodec: those that PyAV shows at the same times."""

import sys

import numpy as np
import pytest

av = pytest.importorskip("av")

from media_files import SIDE, encode, read_numbers  # noqa: E402
from test_media_kinds import mirrored  # noqa: E402

from vatt_fast.data import torchcodec_reader  # noqa: E402
from vatt_fast.data.clips import ClipSpec  # noqa: E402
from vatt_fast.data.dataset import ClipFolder  # noqa: E402
from vatt_fast.data.media import MediaError, MediaReader  # noqa: E402
from vatt_fast.data.torchcodec_reader import TorchcodecReader, reader_class  # noqa: E402

WINDOW = dict(num_frames=10, frames_per_second=10.0, height=SIDE, width=SIDE)
SOUND = dict(num_samples=16000, sample_rate_hz=16000)
SPEC = ClipSpec(10, SIDE, SIDE, 10.0, 16000, 16000, 4, 1)


@pytest.fixture
def torchcodec():
    try:
        reader_class("torchcodec")
    except ValueError as error:
        pytest.skip(str(error))


def test_a_decoder_that_is_not_there_is_named(tmp_path, monkeypatch):
    torchcodec_reader._video_decoder.cache_clear()
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.raises(ValueError, match=r"torchcodec' does not load.*leave the decoder at 'pyav'"):
        reader_class("torchcodec")
    with pytest.raises(ValueError, match="decoder is 'decord'; it is one of pyav, torchcodec"):
        reader_class("decord")
    with pytest.raises(ValueError, match="PyAV fills a cache"):
        ClipFolder(tmp_path, SPEC, vocabulary=None, cache_dir=tmp_path, decoder="torchcodec")


@pytest.mark.usefixtures("torchcodec")
@pytest.mark.parametrize("start", [0.0, 0.97, 1.34, 2.6, 5.0])
@pytest.mark.parametrize(
    ("suffix", "video", "audio"),
    [
        (".mp4", "libx264", "aac"),
        (".mkv", "libx264", "libopus"),
        (".webm", "libvpx", "libopus"),
        (".avi", "mpeg4", "mp3"),
        (".ts", "libx264", "aac"),
    ],
)
def test_a_clip_is_pyavs(tmp_path, suffix, video, audio, start):
    path = tmp_path / f"clip{suffix}"
    encode(path, video=video, audio=audio, seconds=3.0, fps=10, rate=48000)
    clips = []
    for opened in (MediaReader, TorchcodecReader):
        with opened(path) as reader:
            clips.append(reader.clip(start=start, **WINDOW, **SOUND))
    pyav, found = clips
    assert found.shown == pyav.shown and found.heard == pyav.heard
    np.testing.assert_array_equal(found.audio, pyav.audio)
    first, end = found.shown
    assert read_numbers(found.video[first:end]) == read_numbers(pyav.video[first:end])
    assert np.abs(found.video.astype(int) - pyav.video).max() <= 6  # the rounding of two scalers


@pytest.mark.usefixtures("torchcodec")
@pytest.mark.parametrize("matrix", [(-1, 0, 0, 1), (0, 1, -1, 0)], ids=["mirrored", "turned"])
def test_what_it_shows_otherwise_is_left_to_pyav(tmp_path, matrix):
    path = tmp_path / "clip.mp4"
    encode(path, video="libx264", seconds=1.0, fps=10)
    mirrored(path, matrix)
    found = []
    for opened in (MediaReader, TorchcodecReader):
        with opened(path) as reader:
            found.append(reader.video(start=0.2, **WINDOW))
    np.testing.assert_array_equal(*found)


@pytest.mark.usefixtures("torchcodec")
def test_a_file_that_ends_early_is_named(tmp_path):
    path = tmp_path / "clip.mkv"
    encode(path, video="libx264", seconds=3.0, fps=10)
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 7 // 10])
    for opened in (MediaReader, TorchcodecReader):
        with (
            pytest.raises(MediaError, match=r"clip\.mkv: the video ends at"),
            opened(path) as reader,
        ):
            reader.video(start=1.9, **WINDOW)
