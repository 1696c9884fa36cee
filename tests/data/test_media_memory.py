"""What reading media leaves behind, as the C library counts it."""

import ctypes
import gc
import platform

import pytest

pytest.importorskip("av")

from media_files import encode

from vatt_fast.data.media import MediaError, read_clip

if platform.libc_ver()[0] != "glibc":
    pytest.skip("only glibc counts what is in use (mallinfo2)", allow_module_level=True)

SECONDS = 2.0
WINDOW = dict(start=0.5, num_frames=4, frames_per_second=10, height=32, width=32)
SOUND = dict(num_samples=8000, sample_rate_hz=16000)
READS = 100
# 100 reads may move a table that grows; a demuxer that is not closed loses 150 bytes a read
LEFT_BYTES = 5000


# struct mallinfo2 of malloc.h: ten sizes, of which this one is what is in use
_FIELDS = [(f"size_{number}", ctypes.c_size_t) for number in range(10)]
_IN_USE = 7


def _bytes_in_use() -> int:
    gc.collect()  # PyAV's containers and their streams hold each other
    library = ctypes.CDLL(None)
    library.mallinfo2.restype = type("Mallinfo2", (ctypes.Structure,), {"_fields_": _FIELDS})
    return getattr(library.mallinfo2(), _FIELDS[_IN_USE][0])


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "cut"])
@pytest.mark.parametrize(
    ("suffix", "video", "audio"),
    [(".mkv", "libx264", "libopus"), (".mp4", "libx264", "aac"), (".avi", "mpeg4", "mp3")],
)
def test_a_window_in_the_middle_leaves_nothing_behind(tmp_path, suffix, video, audio, whole):
    path = tmp_path / f"clip{suffix}"
    encode(path, video=video, audio=audio, seconds=SECONDS, fps=10, rate=48000)
    if not whole:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def read():
        try:
            read_clip(path, **WINDOW, **SOUND)
        except MediaError:
            return

    for _ in range(READS):  # what is remembered between reads
        read()
    before = _bytes_in_use()
    for _ in range(READS):
        read()
    assert _bytes_in_use() - before < LEFT_BYTES
