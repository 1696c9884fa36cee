"""From the words for a source to what is to be read: which files, which shards, which captions.

clips                a folder: the media in it, captions.json, captions beside the media
clips/**             the same and all folders below
list.csv             a manifest (.csv, .tsv, .parquet): path, start, end, text
shards               a folder of tar shards; also shards/*.tar, shards/{000..099}.tar, and
                     shards/**/*.tar, with all folders below
s3://b/{000..9}.tar  shards that fsspec reads
a,b:0.3              several, with weights
mix.toml             several, with weights and where their captions lie
"""

import dataclasses
import glob
import hashlib
import itertools
import os
import re
import tomllib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .captions import (
    SIDECARS,
    chosen,
    decode_text,
    from_entries,
    read_sidecar,
    seconds_of,
    stream_entries,
    table_rows,
)
from .folder import (
    INDEX,
    TAR,
    caption_file,
    folder_captions,
    in_another_form,
    media_below,
    sidecars_of,
    warn_of_other_media,
)
from .media import MEDIA_SUFFIXES
from .remote import file_system, is_url
from .shards import expand_braces
from .source import WHOLE_FILE
from .text import Caption, composed, writable

MANIFESTS = (".csv", ".tsv", ".parquet", ".pq")
MIXES = (".toml",)
INDEX_FILE = "index.json"
_COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
# a captions file beyond this is read piece by piece, into an index
LARGE_CAPTIONS_BYTES = 1 << 26


@dataclass(frozen=True)
class Wanted:
    """One source as it was asked for.

    Args:
        text: folder, manifest, tars or index.
        weight: its share of the clips; None: by its size.
        captions: a JSON file, or a folder of caption files, by the media's names or their stems.
        media: the folder that a manifest's paths are relative to; None: the manifest's.
    """

    text: str
    weight: float | None = None
    captions: str | None = None
    media: str | None = None


@dataclass(frozen=True)
class Row:
    """An example that is a file, or a segment of one."""

    name: str
    path: str  # relative to the listing's root
    segment: tuple[float, float] = WHOLE_FILE
    captions: tuple[Caption, ...] = ()
    # caption files beside it, relative to the root too, as ``chosen`` takes them
    sidecars: tuple[tuple[str, ...], ...] = ()


@dataclass
class Listing:
    """What a source holds, before any of it is opened: rows of files, or shards.

    Args:
        home: where its index lies if nobody says otherwise; None for remote ones.
        stamped: local files and folders whose change means that the listing is another one.
        captions: a file or folder of captions that is read apart.
    """

    label: str
    root: str
    home: Path | None
    rows: list[Row] = field(default_factory=list)
    shards: list[str] = field(default_factory=list)
    stamped: list[str] = field(default_factory=list)
    captions: Path | None = None
    problems: dict[str, str] = field(default_factory=dict)
    text: str = ""  # Wanted's; so
    asked: dict[str, str | None] = field(default_factory=dict)  # its captions and media


# -- words -----------------------------------------------------------------------------------------


def parse(data: str) -> list[Wanted]:
    """The sources that ``--data`` names. Raises ValueError for words that name none."""
    if not data:
        raise ValueError("no source is named; give a folder, a manifest or tar shards")
    if os.path.exists(data):
        return _mix(Path(data)) if data.lower().endswith(MIXES) else [Wanted(data)]
    wanted = []
    for word in _split(data):
        text, colon, weight = word.rpartition(":")
        share = None
        if colon and text and re.fullmatch(r"[0-9.eE+-]+", weight) and not os.path.exists(word):
            try:
                share = float(weight)
            except ValueError:
                raise ValueError(
                    f"{word!r} has the weight {weight!r}; weights are numbers"
                ) from None
        else:
            text = word
        if text.lower().endswith(MIXES):
            raise ValueError(
                f"{text} is a list of sources, which stands alone; name it without others"
                if os.path.exists(text)
                else f"{text} is no file; name a list of sources that is there"
            )
        wanted.append(Wanted(text, share))
    return wanted


def _split(data: str) -> list[str]:
    """At commas outside of braces."""
    words, depth = [""], 0
    for letter in data:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and depth == 0:
            words.append("")
        else:
            words[-1] += letter
    if not all(words):
        raise ValueError(f"{data!r} has an empty name between commas; name a source there")
    return words


def _mix(path: Path) -> list[Wanted]:
    """A TOML file of [[source]] tables: path, weight, captions, media; relative to the file."""
    try:
        content = tomllib.loads(decode_text(path.read_bytes(), str(path)))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path} cannot be read as TOML ({error}); correct it") from error
    tables = content.get("source")
    if not isinstance(tables, list) or not tables:
        raise ValueError(f"{path} has no [[source]]; write one for each source, with its path")
    wanted = []
    for number, table in enumerate(tables, 1):
        where = f"{path}: source {number}"
        for name, value in table.items():
            kinds: dict[str, Any] = dict(path=str, captions=str, media=str, weight=(int, float))
            if name not in kinds:
                raise ValueError(f"{where} has {name!r}; it may have {', '.join(kinds)}")
            if not isinstance(value, kinds[name]) or isinstance(value, bool):
                kind = "number" if name == "weight" else "string"
                raise ValueError(f"{where} has {name} {value!r}; it is a {kind}")
        if "path" not in table:
            raise ValueError(f"{where} has no path; name a folder, a manifest or tar shards")
        places = {
            key: _beside(path.parent, table[key])
            for key in ("path", "captions", "media")
            if key in table
        }
        weight = table.get("weight")
        wanted.append(
            Wanted(
                places["path"],
                None if weight is None else float(weight),
                places.get("captions"),
                places.get("media"),
            )
        )
    return wanted


def _beside(folder: Path, place: str) -> str:
    return place if is_url(place) or os.path.isabs(place) else os.path.join(folder, place)


# -- listing ---------------------------------------------------------------------------------------


def index_home(wanted: Wanted) -> Path | None:
    """Where the index of a source lies unless another place is named; None for a remote one."""
    text = wanted.text
    if is_url(text):
        return None
    if text.endswith("/**"):
        return Path(text[:-3] or ".") / f"{INDEX}_below"
    if os.path.isdir(text):
        return Path(text) / INDEX
    if text.lower().endswith(MANIFESTS):
        return Path(f"{text}.{INDEX}")
    # of a pattern: one folder may have several
    folder = os.path.dirname(text.partition("{")[0].partition("*")[0].partition("?")[0])
    name = hashlib.sha256(os.path.basename(text).encode(errors="surrogateescape")).hexdigest()[:8]
    return Path(folder or ".") / f"{INDEX}_{name}"


def list_source(wanted: Wanted) -> Listing:
    """What is there under a source's words.

    Raises:
        ValueError: nothing that can be read, with what to name instead.
    """
    text = wanted.text
    if text.endswith("/**"):
        listing = _list_tree(Path(text[:-3] or "."))
    elif not is_url(text) and os.path.isdir(text):
        listing = _list_folder(Path(text))
    elif text.lower().endswith(MANIFESTS) and not is_url(text):
        listing = _list_manifest(Path(text), wanted.media)
    elif ".tar" in text.lower() or text.lower().endswith(".tgz"):
        listing = _list_shards(text)
    elif os.path.exists(text):
        raise ValueError(
            f"{text} is no source; name a folder, a manifest ({' '.join(MANIFESTS)}), tar shards, "
            "or a .toml of several"
        )
    else:
        raise ValueError(f"{text} is no folder, and there is no such file; name one that is there")
    listing = dataclasses.replace(
        listing, home=index_home(wanted), text=text, asked=asked_for(wanted)
    )
    if wanted.captions is not None:
        captions = Path(wanted.captions)
        if not captions.exists():
            raise ValueError(f"{captions} is not there; name a file or folder of captions")
        listing.captions = captions
        if not captions.is_dir():  # else all its files count, not its own time
            listing.stamped.append(str(captions))
    return listing


def asked_for(wanted: Wanted) -> dict[str, str | None]:
    """Where a source's captions and media were said to be, as an index notes it."""
    return {
        name: place if place is None or is_url(place) else os.path.abspath(place)
        for name, place in (("captions", wanted.captions), ("media", wanted.media))
    }


def _list_folder(folder: Path) -> Listing:
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not entry.name.startswith(".")]
    has_media = any(name.lower().endswith(MEDIA_SUFFIXES) for name in names)
    tars = sorted(name for name in names if name.lower().endswith(TAR))
    if tars and has_media:
        media = min(name for name in names if name.lower().endswith(MEDIA_SUFFIXES))
        raise ValueError(
            f"{folder} has tars ({tars[0]}) beside media files ({media}); name '{folder}/*{TAR}' "
            f"for the tars, or '{folder}/**' for the media, of the folders in it too"
        )
    if tars:
        return Listing(str(folder), str(folder), None, shards=tars)
    packed = [name for name in names if name.lower().endswith(_COMPRESSED_TARS)]
    if packed and not has_media:
        raise ValueError(
            f"{folder} has compressed tars ({packed[0]}), whose members cannot be read at random: "
            "unpack them to .tar; media are compressed already"
        )
    stamped = [str(folder)]
    said, captions = caption_file(folder), None
    if said is not None:
        stamped.append(str(said))
        if said.stat().st_size > LARGE_CAPTIONS_BYTES:
            captions = said
    if captions is None:
        found = folder_captions(folder)
        rows = [Row(name, name, captions=found[name]) for name in sorted(found)]
    else:
        rows = _rows_of(folder, sorted(n for n in names if n.lower().endswith(MEDIA_SUFFIXES)))
    warn_of_other_media(folder, {row.name for row in rows})
    return Listing(str(folder), str(folder), None, rows, stamped=stamped, captions=captions)


def _list_tree(folder: Path) -> Listing:
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder; name one with media files")
    found, folders = media_below(folder, (*MEDIA_SUFFIXES, TAR))
    files = [path for path in found if not path.lower().endswith(TAR)]
    tars = len(found) - len(files)
    if not files:
        remedy = f"'{folder}/**/*{TAR}' for the tars there" if tars else "another folder"
        raise ValueError(f"{folder} has no media files below it; name {remedy}")
    if tars:
        warnings.warn(
            f"{folder}/** leaves out {tars} tars beside its media; name '{folder}/**/*{TAR}' for "
            "them",
            stacklevel=3,
        )
    rows = _rows_of(folder, files)
    said = caption_file(folder)
    stamped = [*folders, *([] if said is None else [str(said)])]
    return Listing(f"{folder}/**", str(folder), None, rows, stamped=stamped, captions=said)


def _rows_of(folder: Path, names: Sequence[str]) -> list[Row]:
    beside = sidecars_of(folder, names)
    return [Row(name, name, sidecars=beside.get(name, ())) for name in names]


def _list_shards(text: str) -> Listing:
    patterns = expand_braces(text)
    if is_url(text):
        paths: list[str] = []
        for pattern in patterns:
            if "*" in pattern or "?" in pattern:
                system, inside = file_system(pattern)
                protocol = pattern.partition("://")[0]
                paths += [
                    f"{protocol}://{found.lstrip('/')}" if protocol != "file" else f"file://{found}"
                    for found in sorted(system.glob(inside))
                ]
            else:
                paths.append(pattern)
        if not paths:
            raise ValueError(f"{text} matches no tar; name shards that are there")
        shared = itertools.takewhile(
            lambda parts: len({*parts}) == 1, zip(*(p.split("/")[:-1] for p in paths), strict=False)
        )
        root = "/".join(parts[0] for parts in shared)
        return Listing(text, root, None, shards=[path[len(root) + 1 :] for path in paths])
    paths, missing = [], []
    for pattern in patterns:
        found = sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else [pattern]
        paths += [path for path in found if os.path.isfile(path)]
        missing += [path for path in found or [pattern] if not os.path.isfile(path)]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{', '.join(missing[:3])}{more} of {text} {'are' if missing[1:] else 'is'} not there; "
            "name shards that are"
        )
    packed = [path for path in paths if path.lower().endswith(_COMPRESSED_TARS)]
    if packed:
        raise ValueError(
            f"{packed[0]} is compressed, so its members cannot be read at random: unpack it to "
            ".tar; media are compressed already"
        )
    if len({*paths}) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{text} names {twice} twice; name each shard once")
    root = os.path.commonpath([os.path.dirname(path) or "." for path in paths])
    return Listing(text, root, None, shards=[os.path.relpath(path, root) for path in paths])


# -- manifests -------------------------------------------------------------------------------------

# The columns' names in the lists of HowTo100M, AudioSet, Kinetics, WebVid and others.
_COLUMNS = {
    "path": ("path", "file", "filename", "file_name", "filepath", "file_path", "video_path",
             "audio_path", "media", "video", "audio", "name", "video_id", "youtube_id", "ytid",
             "videoid", "id"),
    "start": ("start", "start_seconds", "time_start", "start_time", "begin"),
    "end": ("end", "end_seconds", "time_end", "end_time"),
    "text": ("text", "caption", "sentence", "description", "title"),
}  # fmt: skip
# WebVid's: its "name" is a sentence, and its downloader writes page_dir/videoid.mp4.
_WEBVID = {"folder": "page_dir", "path": "videoid", "text": "name"}


def _list_manifest(path: Path, media: str | None) -> Listing:
    if not path.is_file():
        raise ValueError(f"{path} is no file; name a manifest that is there")
    root = Path(media) if media is not None else path.parent
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name the one with the media of {path}")
    columns: dict[str, str] | None = None
    spoken: dict[tuple[str, tuple[float, float]], list[Caption]] = {}
    stems = _Stems(root)
    for line, row in _manifest_rows(path):
        where = f"{path} line {line}"
        if columns is None:
            columns = _columns_of(row, path)
        written = _path_in(row, columns)
        if not isinstance(written, str) or not written.strip():
            raise ValueError(f"{where} has no path; name a media file relative to {root}")
        name = stems.found(written.strip())
        start, end = (
            _time(row.get(columns[key]) if key in columns else None, key, where, otherwise)
            for key, otherwise in (("start", 0.0), ("end", WHOLE_FILE[1]))
        )
        if start < 0 or end <= start:
            raise ValueError(
                f"{where} has a segment from {start:g} to {end:g} s; it begins at 0 or later and "
                "ends after its start"
            )
        captions = spoken.setdefault((name, (start, end)), [])
        text = row.get(columns["text"]) if "text" in columns else None
        if text is not None and not isinstance(text, str):
            raise ValueError(f"{where} has the text {text!r:.60}; texts are strings")
        if text and (said := " ".join(composed(writable(text)).split())):
            captions.append(Caption(start, end, said))
    if not spoken:
        raise ValueError(f"{path} lists no media; write a header and a row for each file")
    segments: dict[str, int] = {}
    for name, _ in spoken:
        segments[name] = segments.get(name, 0) + 1
    rows = [
        Row(
            name if segments[name] == 1 else f"{name}@{segment[0]:g}-{segment[1]:g}",
            name,
            segment,
            tuple(captions),
        )
        for (name, segment), captions in spoken.items()
    ]
    rows.sort(key=lambda row: (row.path, row.segment))
    if twice := _first_twice([row.name for row in rows]):
        raise ValueError(f"{path} has two segments that are both called {twice}; join them")
    return Listing(str(path), str(root), None, rows, stamped=[str(path)])


def _first_twice(names: Sequence[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None


def _manifest_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, {column: value}) of each row; lines of a Parquet file are its rows, from 1."""
    if path.suffix.lower() in (".parquet", ".pq"):
        yield from _parquet_rows(path)
        return
    text = decode_text(path.read_bytes(), str(path))
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    # AudioSet's header is the last of its comments; spaces follow its commas
    lines = text.splitlines(keepends=True)
    comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    if comments:
        header = lines[comments - 1].lstrip("# ")
        lines = [*["\n"] * (comments - 1), header, *lines[comments:]]
        lines = [re.sub(r", +", ",", line) for line in lines]
    for line, row in table_rows("".join(lines).lstrip("\n"), str(path), separator):
        yield line + max(comments - 1, 0), row


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ValueError(f"{path} needs pyarrow: pip install pyarrow, or write a .csv") from error
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            named = file.schema_arrow.names
            wanted = [name for name in named if _meaning(name) or name in _WEBVID.values()]
            line = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    line += 1
                    yield line, row
            if not wanted and file.metadata.num_rows:
                yield 1, dict.fromkeys(named)
    except (pyarrow.ArrowException, OSError) as error:
        told = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} cannot be read as Parquet ({told}); write it again") from error


def _meaning(column: str) -> str | None:
    return next((key for key, names in _COLUMNS.items() if column.strip().lower() in names), None)


def _columns_of(row: dict[str, Any], path: Path) -> dict[str, str]:
    """Which column holds what. Raises ValueError where none names media."""
    found = {}
    lowered = {column.strip().lower(): column for column in row}
    if {*_WEBVID.values()} <= lowered.keys():
        return {key: lowered[name] for key, name in _WEBVID.items()}
    for key, names in _COLUMNS.items():
        if column := next((lowered[name] for name in names if name in lowered), None):
            found[key] = column
    if "path" not in found:
        raise ValueError(
            f"{path} has the columns {', '.join(list(row)[:8])}; one must be called path, and "
            "start, end and text may be there"
        )
    return found


def _path_in(row: dict[str, Any], columns: dict[str, str]) -> Any:
    written = row[columns["path"]]
    if "folder" not in columns or written in (None, ""):
        return written
    return f"{row[columns['folder']]}/{written}.mp4"


def _time(value: Any, key: str, where: str, otherwise: float) -> float:
    if value is None or value == "":
        return otherwise
    try:
        return seconds_of(value)
    except ValueError as error:
        raise ValueError(f"{where} has the {key} {value!r:.40}: {error}") from None


class _Stems:
    """Media files as a manifest names them: maybe without suffix, as YouTube's ids.

    Letters may be composed in another way than on disk.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._folders: dict[str, dict[str, str]] = {}
        self._listings: dict[Path, dict[str, str]] = {}

    def found(self, name: str) -> str:
        if name.lower().endswith(MEDIA_SUFFIXES):
            return self._on_disk(name)
        folder, _, stem = name.rpartition("/")
        folder = self._on_disk(folder)
        if folder not in self._folders:
            inside = self.root / folder
            names = sorted(os.listdir(inside)) if inside.is_dir() else []
            self._folders[folder] = {
                composed(os.path.splitext(each)[0]): each
                for each in reversed(names)
                if each.lower().endswith(MEDIA_SUFFIXES)
            }
        found = self._folders[folder].get(composed(stem), stem)
        return os.path.join(folder, found)

    def _on_disk(self, name: str) -> str:
        if name.isascii() or os.path.isabs(name) or os.path.lexists(self.root / name):
            return name
        return in_another_form(self.root, name, self._listings)


# -- captions that are read apart ------------------------------------------------------------------


def caption_files(folder: Path) -> list[str]:
    """The names of a folder's caption files, in order."""
    return sorted(
        name
        for name in os.listdir(folder)
        if name.lower().endswith(SIDECARS) and not name.startswith(".")
    )


def read_captions(path: Path) -> Iterator[tuple[str, list[Caption]]]:
    """(name or stem of a media file, its captions) of a JSON file or a folder of caption files.

    Raises:
        ValueError: captions that are none, with the file and the name.
    """
    if path.is_dir():

        def read(name: str) -> list[Caption]:
            return read_sidecar(name, (path / name).read_bytes(), str(path / name))

        by_stem: dict[str, list[str]] = {}
        for name in caption_files(path):
            by_stem.setdefault(composed(os.path.splitext(name)[0]), []).append(name)
        for stem, names in by_stem.items():
            names.sort(key=lambda name: SIDECARS.index(os.path.splitext(name)[1].lower()))
            yield stem, chosen([names], read)
        return
    for name, value in stream_entries(path):
        yield name, from_entries(value, f"{path}: {name!r}")
