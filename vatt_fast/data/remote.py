"""Files here and elsewhere: local ones by their path, others by an fsspec URL."""

import contextlib
import os
from collections.abc import Iterator
from typing import IO, Any


def is_url(path: str) -> bool:
    return "://" in path


def file_system(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and the path in it.

    Raises:
        ValueError: fsspec, or what it needs for this protocol, is not installed.
    """
    protocol = url.partition("://")[0]
    try:
        import fsspec
    except ImportError as error:
        raise ValueError(f"{url} is remote, which needs fsspec: pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise ValueError(
            f"{url} cannot be reached by fsspec ({error}); for {protocol}:// "
            f"pip install 'fsspec[{protocol}]'"
        ) from error


def open_bytes(path: str) -> IO[bytes]:
    """A file to read from any place on. Raises OSError where it cannot be opened."""
    if not is_url(path):
        return open(path, "rb")
    with _as_os_errors(path):
        system, inside = file_system(path)
        return system.open(inside, "rb")


def read_part(url: str, offset: int, size: int) -> bytes:
    """A part of a remote file in one request. Raises OSError where it cannot be read."""
    with _as_os_errors(url):
        system, inside = file_system(url)
        return system.cat_file(inside, start=offset, end=offset + size)


def size_and_time(path: str) -> tuple[int, int]:
    """Bytes, and when the file was changed in nanoseconds, 0 where nobody says. Raises OSError."""
    if not is_url(path):
        status = os.stat(path)
        return status.st_size, status.st_mtime_ns
    with _as_os_errors(path):
        system, inside = file_system(path)
        known = system.info(inside)
    changed = known.get("mtime") or known.get("created") or known.get("LastModified") or 0
    if hasattr(changed, "timestamp"):
        changed = changed.timestamp()
    seconds = float(changed) if isinstance(changed, int | float) else 0.0
    return int(known["size"]), round(seconds * 1e9)


@contextlib.contextmanager
def _as_os_errors(url: str) -> Iterator[None]:
    """What the many libraries behind fsspec raise becomes OSError."""
    try:
        yield
    except (OSError, ValueError):
        raise
    except Exception as error:
        reason = str(error) or type(error).__name__
        raise OSError(f"{url} cannot be opened ({reason})") from error


def join_path(root: str, path: str) -> str:
    if is_url(path) or not root:
        return path
    return f"{root.rstrip('/')}/{path}" if is_url(root) else os.path.join(root, path)
