"""Where the bytes of media come from: local files, parts of them as in a tar, and URLs."""

import contextlib
import functools
import io
import os
import stat
from collections.abc import Callable
from typing import Any, BinaryIO, cast

from . import remote
from .media_scan import import_av
from .source import Place

# Files up to here are fetched whole. Of larger ones a window is a part that only their containers
# know.
MOST_AHEAD_BYTES = 1 << 24


class MediaError(ValueError):
    """A media file that cannot be decoded; the message names it."""


class OutdatedError(ValueError):
    """A file of many media that has changed since it was indexed; the message names it.

    It is no MediaError: other clips must not stand in for all that are in the file.
    """


def place_of(path: str | os.PathLike | Place) -> Place:
    """A place as it is; a path or URL as the place of a whole file."""
    if isinstance(path, Place):
        return path
    text = os.fspath(path)
    return Place(text, text)


def identity(place: Place) -> str:
    """A text that is another one once the file has changed.

    Raises:
        OSError: no such file, or one that may not be read. MediaError: no regular file.
        OutdatedError: the file has changed since the place was noted.
        ValueError: a URL for which something is not installed.
    """
    if place.is_remote:
        known = remote.size_and_time(place.path)
        _check_stamp(place, known)
        return _text(place, *known)
    status = os.stat(place.path)
    if not stat.S_ISREG(status.st_mode):
        kind = "a folder" if stat.S_ISDIR(status.st_mode) else "no regular file"
        raise MediaError(f"{place.name} is {kind}; name a media file")
    if not os.access(place.path, os.R_OK):
        with open(place.path, "rb"):  # says why not
            pass
    _check_stamp(place, (status.st_size, status.st_mtime_ns))
    if place.offset + (place.size or 0) > status.st_size:
        raise MediaError(
            f"{place.name} lies past the end of {place.path}, which has been cut or written anew; "
            "index it again"
        )
    return _text(place, status.st_size, status.st_mtime_ns)


def _check_stamp(place: Place, now: tuple[int, int]) -> None:
    if place.stamp not in (None, now):
        raise OutdatedError(
            f"{place.path} was written anew since it was indexed, so {place.name} may be another "
            "clip; start again, or run vatt-fast index on its source"
        )


def _text(place: Place, *rest: object) -> str:
    path = place.path if place.is_remote else os.path.abspath(place.path)
    return " ".join(map(str, (path, place.offset, place.size, *rest)))


def url_of(place: Place) -> str | None:
    """What FFmpeg opens by itself; None for a place that needs ``open_bytes``."""
    if place.is_remote:
        return None
    if not place.is_part:
        return f"file:{place.path}"  # so that a name that holds a colon stays a name
    if not _reads_parts():
        return None
    size = place.size
    end = os.stat(place.path).st_size if size is None else place.offset + size
    return f"subfile,,start,{place.offset},end,{end},,:file:{place.path}"


@functools.cache
def _reads_parts() -> bool:
    """Whether this FFmpeg has the protocol for parts of files."""
    av = import_av()
    try:
        with av.open(f"subfile,,start,0,end,1,,:file:{os.devnull}"):
            return True
    except av.error.ProtocolNotFoundError:
        return False
    except (av.error.FFmpegError, OSError, ValueError):
        return True  # it was opened, and holds no media


def open_bytes(place: Place) -> BinaryIO:
    """The bytes of a place as a seekable file of its own, to be closed by the caller.

    Raises:
        OSError: it cannot be opened.
    """
    return opener(place)()


def opener(place: Place) -> Callable[[], BinaryIO]:
    """``open_bytes`` of a place that is opened several times: what one request fetches is kept."""
    size = place.size
    if not place.is_remote or size is None or size > MOST_AHEAD_BYTES:
        return functools.partial(_open, place)
    fetched = functools.cache(lambda: remote.read_part(place.path, place.offset, size))
    return lambda: io.BytesIO(fetched())


def _open(place: Place) -> BinaryIO:
    if place.is_remote:
        file: Any = remote.open_bytes(place.path)
    else:
        # FFmpeg and Pillow read in pieces of their own
        file = open(place.path, "rb", buffering=0 if place.is_part else -1)  # noqa: SIM115
    if not place.is_part:
        return file
    return cast(BinaryIO, io.BufferedReader(_Part(file, place.offset, place.size)))


def read_ahead(place: Place) -> None:
    """Let the system fetch a local place's bytes, if they are few, for whoever opens it soon.

    What is wrong with a file is said when it is opened.
    """
    if place.is_remote or not hasattr(os, "posix_fadvise"):
        return
    with contextlib.suppress(OSError):
        descriptor = os.open(place.path, os.O_RDONLY | os.O_NONBLOCK)  # a pipe has no writer
        try:
            size = place.size
            if size is None:
                size = os.fstat(descriptor).st_size - place.offset
            if 0 < size <= MOST_AHEAD_BYTES:
                os.posix_fadvise(descriptor, place.offset, size, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(descriptor)


def read_bytes(place: Place) -> bytes:
    with open_bytes(place) as file:
        return file.read()


class _Part(io.RawIOBase):
    """A part of a seekable file as a file of its own, which is closed with it."""

    def __init__(self, file: Any, offset: int, size: int | None) -> None:
        self._file, self._offset = file, offset
        self._size = file.seek(0, os.SEEK_END) - offset if size is None else size
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        count = min(len(view), max(self._size - self._at, 0))
        self._file.seek(self._offset + self._at)
        data = self._file.read(count) if count else b""
        view[: len(data)] = data
        self._at += len(data)
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
