"""Files that are whole or absent whenever a process dies, and folders that one process writes."""

import contextlib
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

_PART, _LOCK = ".part", ".lock"


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A path to write to, which takes the place of ``path`` once it is on disk.

    It lies in a folder of its own beside ``path``, so that what the writer leaves there goes with
    it (safetensors has temporary files of its own). ``path`` stays as it was where the block raises
    or the process dies, and gets the mode that an ordinary new file gets.

    Raises:
        OSError: ``path`` could not be written; the disk is full, for instance.
    """
    path = Path(path)
    part = None
    try:
        part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent))
        (probe := part / "mode").touch()
        yield (written := part / path.name)
        written.chmod(probe.stat().st_mode)
        _sync(written)
        written.replace(path)
        _sync(path.parent)
    except OSError as error:
        reason = error.strerror or error
        raise OSError(f"{path} could not be written and is as it was: {reason}") from error
    finally:
        if part is not None:
            shutil.rmtree(part, ignore_errors=True)


def write_text(path: str | os.PathLike, text: str) -> None:
    """``Path.write_text`` in UTF-8, whole or not at all."""
    with replacing(path) as part:
        part.write_text(text, encoding="utf-8")


def link(source: Path, target: Path) -> None:
    """A second name of a file that is only ever replaced; a copy where the disk knows no links."""
    with replacing(target) as part:
        try:
            os.link(source, part)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EXDEV, errno.EMLINK):
                raise
            shutil.copyfile(source, part)


def _sync(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def part_of(folder: Path) -> Path:
    """A folder to write to, which ``place`` gives the name of ``folder``; litter until then."""
    return folder.parent / f".{folder.name}{_PART}"


def place(folder: Path) -> None:
    """Make what was written to ``part_of(folder)``, files on disk, the folder. Raises OSError."""
    _sync(part_of(folder))
    part_of(folder).replace(folder)
    _sync(folder.parent)


def remove(folder: Path) -> None:
    """Remove a folder: it is there as it was, or gone, whenever the process dies."""
    folder.replace(part := part_of(folder))
    shutil.rmtree(part)


def remove_litter(folder: Path) -> None:
    """Remove what killed writers have left in and below a folder that nobody else writes now."""
    for part in list(folder.rglob(f".*{_PART}")):
        if part.exists():  # it may have lain in another
            shutil.rmtree(part)
    for part in folder.glob(f"*{_PART}"):  # of earlier versions
        part.unlink()


def check_folder(folder: Path) -> None:
    """Raise ValueError unless files can be made in ``folder``, which need not be there yet."""
    above = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not above.is_dir():
        raise ValueError(f"{folder} cannot be a folder: {above} is a file; name another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to {above}; name another place than {folder}")


class InUseError(ValueError):
    """Another process writes to a folder."""


@contextlib.contextmanager
def only_writer(folder: Path) -> Iterator[None]:
    """Within, other processes that ask for the same folder are refused. It goes with the process.

    Raises:
        InUseError: another process has the folder.
    """
    with open(folder / _LOCK, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            owner = file.read().strip() or "another one"
            raise InUseError(
                f"process {owner} is writing to {folder}; wait for it, or name another folder"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
