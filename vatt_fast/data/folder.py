"""What a folder holds: its media, and their captions."""

import os
import unicodedata
import warnings
from collections import Counter
from collections.abc import Container, Mapping
from pathlib import Path, PurePosixPath

from .media import MEDIA_SUFFIXES
from .text import Caption, load_captions

CAPTIONS = "captions.json"
# Media that other programs play and that are not read here.
# fmt: off
OTHER_SUFFIXES = (
    ".3g2", ".3gp", ".asf", ".divx", ".f4v", ".flv", ".m2ts", ".m2v", ".mts", ".mxf", ".ogv", ".rm",
    ".rmvb", ".vob", ".wmv", ".y4m",
    ".aif", ".aiff", ".amr", ".ape", ".au", ".caf", ".dts", ".m4b", ".mka", ".mp2", ".oga", ".wma",
    ".wv", ".ac3",
    ".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".svg", ".tga", ".tif", ".tiff",
)
# fmt: on


def folder_captions(folder: str | os.PathLike) -> dict[str, tuple[Caption, ...]]:
    """The captions of each media file of a folder, by its name.

    A file that captions.json leaves out has none. Media lie in the folder itself; those named with
    a path ("talks/one.mp4") may lie deeper. Raises ValueError as ``ClipFolder``.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(
            f"{folder} is no folder; name one with media files and, for text, a {CAPTIONS}"
        )
    captions = load_captions(folder / CAPTIONS) if (folder / CAPTIONS).exists() else {}
    with os.scandir(folder) as entries:
        # folders and broken links too: who named them like media will want to hear of them
        present = {
            e.name
            for e in entries
            if not e.name.startswith(".") and e.name.lower().endswith(MEDIA_SUFFIXES)
        }
    captions = {
        name: captions[said] for said, name in names_on_disk(folder, captions, present).items()
    }
    if not (present or captions):
        inside = sorted(path.name for path in folder.iterdir() if path.is_dir())
        hint = f"; it has the folders {', '.join(inside[:5])}: name one of them" if inside else ""
        raise ValueError(
            f"{folder} has no media files ({' '.join(MEDIA_SUFFIXES)})"
            f"{hint or '; put some there or name another folder'}"
        )
    return {name: captions.get(name, ()) for name in {*present, *captions}}


def names_on_disk(
    folder: Path, names: Mapping[str, object], present: Container[str]
) -> dict[str, str]:
    """The names of captions.json, each with the name under which the file lies in the folder.

    They differ where an accented letter is composed in another way.

    Raises:
        ValueError: a name outside the folder, of no file, or two names of one file.
    """
    found: dict[str, str] = {}
    taken: set[str] = set()
    listings: dict[Path, dict[str, str]] = {}
    for name in names:
        parts = PurePosixPath(name).parts
        if name.startswith("/") or ".." in parts or "\\" in name:
            raise ValueError(
                f"{folder / CAPTIONS} names {name!r}; "
                "media lie inside the folder: name them relative to it"
            )
        other = name
        if name not in present and not _is_file(folder / name):
            other = _in_another_form(folder, name, listings)
        if not _is_file(folder / other):
            raise ValueError(
                f"{folder / CAPTIONS} has captions of {name!r}, which is not in {folder}; "
                "add the file or remove its captions"
            )
        if other in taken:
            raise ValueError(
                f"{folder / CAPTIONS} names {other!r} twice, its letters composed in two ways; "
                "join its captions"
            )
        taken.add(other)
        found[name] = other
    return found


def composed(name: str) -> str:
    """A name with its accented letters in one form."""
    return unicodedata.normalize("NFC", name)


def _in_another_form(folder: Path, name: str, listings: dict[Path, dict[str, str]]) -> str:
    """The name of a file whose letters are composed in another way; ``name`` where none is."""
    place = folder
    for part in PurePosixPath(name).parts:
        if place not in listings:
            inside = os.listdir(place) if place.is_dir() else []
            listings[place] = {composed(one): one for one in inside}
        place = place / listings[place].get(composed(part), part)
    return place.relative_to(folder).as_posix()


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (ValueError, OSError):  # a name with a zero byte, or one that is too long
        return False


def warn_of_other_media(folder: Path, files: Container[str]) -> None:
    """Warn of media that are left out because of their suffixes."""
    with os.scandir(folder) as entries:
        left_out = Counter(
            os.path.splitext(e.name)[1].lower()
            for e in entries
            if e.name.lower().endswith(OTHER_SUFFIXES) and e.name not in files
        )
    if left_out:
        counted = ", ".join(f"{count} {suffix}" for suffix, count in sorted(left_out.items()))
        warnings.warn(
            f"{folder} holds media of suffixes that are not read ({counted}); convert them to be "
            f"used: {' '.join(MEDIA_SUFFIXES)}",
            stacklevel=3,
        )
