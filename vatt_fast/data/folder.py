"""What a folder holds: its media, and their captions."""

import os
import warnings
from collections import Counter
from collections.abc import Container, Iterable, Mapping
from pathlib import Path, PurePosixPath

from .captions import SIDECARS, from_entries, load_captions, read_sidecar, stream_entries
from .media import MEDIA_SUFFIXES
from .text import Caption, composed

INDEX = "vatt_index"  # in the names of folders that hold an index
TAR = ".tar"
CAPTIONS = "captions.json"
# HowTo100M's: captions by the stems of the files' names
HOWTO_CAPTIONS = ("caption.json", "raw_caption.json")
# "talk.en.vtt": captions in a language, as download programs call them
_MOST_LANGUAGE_LETTERS = 10
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
        for stem, entries in stream_entries(said):
            if (named := stems.get(composed(stem))) is not None:
                found[named] = tuple(from_entries(entries, f"{said}: {stem!r}"))
    bare = [name for name in found if not found[name] and name not in captions]
    for name, beside in sidecars_of(folder, bare).items():
        path = folder / beside
        found[name] = tuple(read_sidecar(beside, path.read_bytes(), str(path)))
    return found


def caption_file(folder: Path) -> Path | None:
    """The file with the captions of a whole folder."""
    paths = (folder / name for name in (CAPTIONS, *HOWTO_CAPTIONS))
    return next((path for path in paths if path.exists()), None)


def sidecars_of(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Which media files have a caption file beside them, "talk.srt" or "talk.en.srt" for talk.mp4.

    Of several the first kind of ``SIDECARS`` counts, and of several languages the first.
    """
    listings: dict[str, dict[str, list[str]]] = {}
    found = {}
    for name in names:
        inside, _, base = name.rpartition("/")
        if inside not in listings:
            listings[inside] = _sidecars_in(folder / inside)
        beside = listings[inside].get(composed(os.path.splitext(base)[0]))
        if beside:
            found[name] = f"{inside}/{beside[0]}" if inside else beside[0]
    return found


def _sidecars_in(folder: Path) -> dict[str, list[str]]:
    """Caption files by the stem of the media they belong to, the best first."""
    ranked: dict[str, list[tuple[int, bool, str]]] = {}
    for name in os.listdir(folder) if folder.is_dir() else ():
        stem, suffix = os.path.splitext(name)
        if suffix.lower() not in SIDECARS or name in (CAPTIONS, *HOWTO_CAPTIONS):
            continue
        rank = SIDECARS.index(suffix.lower())
        ranked.setdefault(composed(stem), []).append((rank, False, name))
        bare, dot, language = stem.rpartition(".")
        if dot and 2 <= len(language) <= _MOST_LANGUAGE_LETTERS and suffix.lower() in SIDECARS[:2]:
            ranked.setdefault(composed(bare), []).append((rank, True, name))
    return {stem: [name for _, _, name in sorted(each)] for stem, each in ranked.items()}


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
