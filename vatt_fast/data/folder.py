"""What a folder holds: its media, and their captions."""

import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path, PurePosixPath

from .captions import (
    Sidecars,
    chosen,
    from_entries,
    load_captions,
    read_sidecar,
    stream_entries,
)
from .media import MEDIA_SUFFIXES
from .text import Caption, composed

INDEX = "vatt_index"  # in the names of folders that hold an index
TAR = ".tar"
CAPTIONS = "captions.json"
# HowTo100M's: captions by the stems of the files' names
HOWTO_CAPTIONS = ("caption.json", "raw_caption.json")
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

    They are those of captions.json, else of HowTo100M's caption.json, else of a caption file beside
    the media file; a file without any has none. Media lie in the folder itself; those named with a
    path ("talks/one.mp4") may lie deeper. Raises ValueError as ``ClipFolder``, and for a caption
    file that cannot be read.
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
        folders = ", ".join(inside[:5])
        hint = f"; it has the folders {folders}: name one of them, or {folder}/**" if inside else ""
        if media_below(folder, (TAR,))[0]:
            hint = f"; tars lie in its folders: name '{folder}/**/*{TAR}'"
        raise ValueError(
            f"{folder} has no media files ({' '.join(MEDIA_SUFFIXES)})"
            f"{hint or '; put some there or name another folder'}"
        )
    found = {name: captions.get(name, ()) for name in {*present, *captions}}
    said = caption_file(folder)
    if said is not None and said.name != CAPTIONS:
        stems = {composed(os.path.splitext(name)[0]): name for name in found}
        unused = []
        for stem, entries in stream_entries(said):
            if (named := stems.get(composed(stem))) is not None:
                found[named] = tuple(from_entries(entries, f"{said}: {stem!r}"))
            else:
                unused.append(stem)
        if unused:
            warnings.warn(
                f"{len(unused)} of the names in {said} are of no file in {folder} "
                f"({', '.join(map(repr, unused[:3]))}): their captions are not used",
                stacklevel=3,
            )
    bare = [name for name in found if not found[name] and name not in captions]

    def read(beside: str) -> list[Caption]:
        return read_sidecar(beside, (folder / beside).read_bytes(), str(folder / beside))

    for name, files in sidecars_of(folder, bare).items():
        found[name] = tuple(chosen(files, read))
    return found


def caption_file(folder: Path) -> Path | None:
    """The file with the captions of a whole folder."""
    paths = (folder / name for name in (CAPTIONS, *HOWTO_CAPTIONS))
    return next((path for path in paths if path.exists()), None)


def sidecars_of(folder: Path, names: Iterable[str]) -> dict[str, tuple[tuple[str, ...], ...]]:
    """The caption files beside those media files that have some, as ``chosen`` takes them."""
    listings: dict[str, Sidecars] = {}
    found = {}
    for name in names:
        inside, _, base = name.rpartition("/")
        if inside not in listings:
            place = folder / inside
            listings[inside] = Sidecars(
                each
                for each in (os.listdir(place) if place.is_dir() else ())
                if each not in (CAPTIONS, *HOWTO_CAPTIONS)
            )
        if files := listings[inside].of(base):
            prefix = f"{inside}/" if inside else ""
            found[name] = tuple(tuple(prefix + each for each in group) for group in files)
    return found


def media_below(
    folder: Path, suffixes: tuple[str, ...] = MEDIA_SUFFIXES
) -> tuple[list[str], list[str]]:
    """Media files in a folder and all below it, by their paths within, and all these folders.

    Hidden ones are left out, and indexes; a linked folder is entered once.
    """
    files: list[str] = []
    folders: list[str] = []
    seen: set[tuple[int, int]] = set()
    waiting = [""]
    while waiting:
        inside = waiting.pop()
        status = os.stat(folder / inside)
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.append(str(folder / inside))
        with os.scandir(folder / inside) as entries:
            for entry in entries:
                if entry.name.startswith(".") or INDEX in entry.name:
                    continue
                path = f"{inside}/{entry.name}" if inside else entry.name
                if entry.is_dir():
                    waiting.append(path)
                elif entry.name.lower().endswith(suffixes):
                    files.append(path)
    return sorted(files), sorted(folders)


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
            other = in_another_form(folder, name, listings)
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


def in_another_form(folder: Path, name: str, listings: dict[Path, dict[str, str]]) -> str:
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
