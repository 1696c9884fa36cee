"""An index of a source: everything about its examples but their pictures and sound, on disk.

It is a folder of .npy columns that processes map or read, and index.json, written last. Building
goes in parts, a shard or some files each, which stay where a build is killed; the next one goes on
from there. A later build opens again only what has changed.
"""

import functools
import hashlib
import itertools
import json
import os
import shutil
import warnings
import zipfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..files import only_writer, remove_litter, replacing, write_text
from .captions import chosen, from_entries, key_of, read_sidecar, stream_entries
from .columns import (
    AUDIO,
    IMAGE,
    VIDEO,
    ColumnSource,
    Measured,
    Part,
    PartBuilder,
    Strings,
    cut,
    in_memory,
    join,
    map_files,
    of_file,
    to_files,
)
from .index_file import (
    FORMAT,
    VERSION,
    digest_of_listing,
    portable,
    portable_text,
    read_about,
    size_and_time_or_none,
    stamp_of_captions,
    stamps_of,
    unportable,
)
from .listing import INDEX_FILE, Listing, Row, read_captions
from .media import MediaError
from .probe import guessed, measure
from .remote import join_path, size_and_time
from .shards import read_shard
from .source import Identity, Place
from .tasks import do_all
from .text import Caption, composed

PARTS = "parts"
_ROWS_A_PART = 256
_NAMES_A_PART = 2000
_ABOUT = "about"


@dataclass(frozen=True)
class _Task:
    """A part to be built, by any process.

    Args:
        fingerprint: tells whether a part that is there is of this input.
        old: an earlier index, and the block in it that is still right (-1: none is).
    """

    target: str
    fingerprint: str
    root: str
    label: str = ""  # of a shard
    shard: str = ""
    rows: tuple[Row, ...] = ()
    captions: tuple[tuple[str, Any], ...] = ()
    where: str = ""
    old: tuple[str, int] = ("", -1)


def build_index(
    listing: Listing,
    folder: str | os.PathLike,
    *,
    workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> ColumnSource:
    """Write, finish or bring up to date the index of what was listed.

    Args:
        folder: of the index; it is made.
        progress: told how many parts are done, and of how many.

    Raises:
        ValueError: nothing in it can be read; a manifest or captions that are none.
        OSError: something could not be written. Finished parts stay.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_writer(folder):
        remove_litter(folder)
        for remembered in (_old, _rows_by_path):  # of the last build in this process
            remembered.cache_clear()
        stamps = stamps_of(listing)
        parts = folder / PARTS
        parts.mkdir(exist_ok=True)
        old = _opened_or_none(folder)
        spoken, keys = _build_captions(listing, parts, workers)
        tasks = list(_tasks(listing, parts, old))
        _run(tasks, workers, progress)
        built = [_load_part(Path(task.target)) for task in tasks]
        columns = folder / f"columns-{hashlib.sha256(os.urandom(16)).hexdigest()[:8]}"
        columns.mkdir()
        with _removed_unless_done(columns):
            join(
                [part for part, _ in built],
                to_files(columns),
                [part for part, _ in spoken],
                None if not keys else functools.partial(_captions_of, keys),
            )
            problems = dict(listing.problems)
            for _, about in built:
                problems |= about["problems"]
            source = ColumnSource(
                listing.label,
                listing.root,
                map_files(columns),
                problems=problems,
                without_spaces=sum(about["without_spaces"] for _, about in [*spoken, *built]),
            )
            if not len(source):
                told = "; ".join(list(problems.values())[:2])
                raise ValueError(f"nothing in {listing.label} can be read: {told}")
            write_text(columns / "problems.json", json.dumps(problems))
            about = {
                "format": FORMAT,
                "version": VERSION,
                "label": source.label,
                "root": portable(listing.root, folder),
                "columns": columns.name,
                "examples": len(source),
                "left_out": len(problems),
                "without_spaces": source.without_spaces,
                "unmatched": _unmatched(keys, source, listing.captions),
                "captions_apart": sum(len(part["caption_times"]) for part, _ in spoken),
                "identity": source.identity._asdict(),
                "content": source.content,
                "asked": listing.asked,
                "text": portable_text(listing.text, listing.root),
                "listing": digest_of_listing(listing),
                "stamps": stamps,
            }
            write_text(folder / INDEX_FILE, json.dumps(about, indent=1))
        for left in folder.glob("columns-*"):
            if left != columns:
                shutil.rmtree(left)
        shutil.rmtree(parts)
    return open_index(folder)


class _removed_unless_done:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *rest: object) -> None:
        if kind is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def open_index(folder: str | os.PathLike) -> ColumnSource:
    """The source that an index describes, without looking at its media.

    Raises:
        ValueError: no index, one of a later version, or a damaged one.
    """
    folder = Path(folder)
    about = read_about(folder)
    columns = folder / about["columns"]
    return ColumnSource(
        about["label"],
        unportable(about["root"], folder),
        map_files(columns),
        problems=columns / "problems.json" if about["left_out"] else {},
        identity=Identity(**about["identity"]),
        content=about.get("content"),
        without_spaces=about["without_spaces"],
        unmatched=about.get("unmatched", ()),
        folder=folder,
        reopen=open_index,
    )


def _opened_or_none(folder: Path) -> ColumnSource | None:
    try:
        return open_index(folder)
    except (ValueError, OSError):  # none yet, or one to be replaced
        return None


# -- parts -----------------------------------------------------------------------------------------


def _tasks(listing: Listing, parts: Path, old: ColumnSource | None) -> Iterator[_Task]:
    apart = None if old is None else _apart(old)
    known = {} if old is None or apart is None else _blocks_by_file(old)
    for number, shard in enumerate(listing.shards):
        size, time = size_and_time(join_path(listing.root, shard))
        yield _Task(
            str(parts / f"shard-{number:06d}.npz"),
            f"{VERSION} {shard} {size} {time}",
            listing.root,
            label=shard,
            shard=shard,
            old=known.get((shard, size, time), ("", -1)),
        )
    earlier = ("" if old is None or listing.shards else str(old.folder), -1)
    for number, first in enumerate(range(0, len(listing.rows), _ROWS_A_PART)):
        rows = tuple(listing.rows[first : first + _ROWS_A_PART])
        digest = hashlib.sha256(repr(rows).encode(errors="surrogateescape"))
        for row in rows:
            for path in (row.path, *itertools.chain(*row.sidecars)):
                digest.update(f"{size_and_time_or_none(join_path(listing.root, path))}".encode())
        yield _Task(
            str(parts / f"files-{number:06d}.npz"),
            f"{VERSION} {digest.hexdigest()}",
            listing.root,
            rows=rows,
            old=earlier,
        )


def _apart(old: ColumnSource) -> int | None:
    """How many of an index's captions were read apart; they come first. None: it does not say."""
    assert old.folder is not None
    about = read_about(old.folder)
    apart = about.get("captions_apart")
    return 0 if apart is None and not about["asked"].get("captions") else apart


def _blocks_by_file(old: ColumnSource) -> dict[tuple[str, int, int], tuple[str, int]]:
    """The blocks of an index's shards, by path, size and time of the shard."""
    paths, columns = Strings.of(old.columns, "path"), old.columns
    found = {}
    for block, first in enumerate(old.blocks[:-1].tolist()):
        file = int(columns["in_file"][first])
        key = (paths[file], int(columns["file_bytes"][file]), int(columns["file_time"][file]))
        found[key] = (str(old.folder), block)
    return found


def _run(tasks: Sequence[_Task], workers: int, progress: Callable[[int, int], None] | None) -> None:
    """Build the parts that are not there."""
    do_all(_build, tasks, workers, is_done=_is_built, name=_name, progress=progress)


def _name(task: _Task) -> str:
    return task.shard or (task.rows[0].path if task.rows else task.where)


def _is_built(task: _Task) -> bool:
    try:
        with np.load(task.target) as part:
            return json.loads(part[_ABOUT].tobytes())["fingerprint"] == task.fingerprint
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):  # absent, or torn
        return False


def _build(task: _Task) -> None:
    builder = PartBuilder()
    part: Mapping[str, np.ndarray] | None = None
    problems: dict[str, str] = builder.problems
    if task.captions:
        keys, firsts = [], []
        for name, value in task.captions:
            entries = value
            if not (isinstance(value, list) and all(isinstance(e, Caption) for e in value)):
                entries = from_entries(value, f"{task.where}: {name!r}")
            keys.append(name)
            firsts.append(builder.add_captions(entries))
        part = builder.finish() | {
            "keys": np.frombuffer(json.dumps(keys).encode(), np.uint8),
            "firsts": np.array(firsts, np.int64).reshape(-1, 2),
        }
    elif task.shard and task.old[1] >= 0:
        old = _old(task.old[0])
        part = cut(old.columns, task.old[1], _apart(old) or 0)
        problems = {
            name: reason
            for name, reason in old.problems.items()
            if name == task.label or name.startswith((f"{task.label}/", f"{task.label} "))
        }
    elif task.shard:
        try:
            read_shard(join_path(task.root, task.shard), task.label, task.shard, builder)
        except ValueError as error:  # one that is no tar does not end the others
            problems[task.label] = str(error)
    else:
        read_files(task.root, task.rows, builder, _remembered(task.old[0]))
    about = {
        "fingerprint": task.fingerprint,
        "problems": problems,
        "without_spaces": builder.without_spaces,
    }
    arrays = dict(builder.finish() if part is None else part)
    arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with replacing(task.target) as path:
        np.savez(path, **arrays)  # type: ignore[arg-type]


class _LazyPart(dict[str, np.ndarray]):
    """A part's arrays, each read from its file when asked for, and not kept."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path

    def __missing__(self, name: str) -> np.ndarray:
        with np.load(self.path) as part:
            return part[name]


def _load_part(path: Path) -> tuple[Part, dict[str, Any]]:
    part = _LazyPart(path)
    return part, json.loads(part[_ABOUT].tobytes())


@functools.lru_cache(maxsize=1)
def _old(folder: str) -> ColumnSource:
    return open_index(folder)


@functools.lru_cache(maxsize=1)
def _rows_by_path(folder: str) -> dict[str, int]:
    old = _old(folder)
    return {
        Strings.of(old.columns, "path")[int(f)]: i for i, f in enumerate(old.columns["in_file"])
    }


def _remembered(folder: str) -> Callable[[Place, int, int, str], Measured]:
    """Measure a file, unless an earlier index has done so and it has not changed."""

    def of(place: Place, size: int, time: int, path: str) -> Measured:
        if folder and (row := _rows_by_path(folder).get(path)) is not None:
            columns = _old(folder).columns
            file = int(columns["in_file"][row])
            if (int(columns["file_bytes"][file]), int(columns["file_time"][file])) == (size, time):
                return _old(folder).measured(row)
        return measure(place)

    return of


def read_files(
    root: str,
    rows: Sequence[Row],
    builder: PartBuilder,
    measured: Callable[[Place, int, int, str], Measured],
) -> None:
    """Add files, or segments of them, to a part; the segments of a file are one block."""

    def read(beside: str) -> list[Caption]:
        path = join_path(root, beside)
        try:
            return read_sidecar(beside, Path(path).read_bytes(), path)
        except (ValueError, OSError) as error:
            builder.problems[beside] = str(error)
            return []

    previous = ""
    for row in rows:
        if row.path != previous:
            builder.end_block()
        previous = row.path
        path = join_path(root, row.path)
        try:
            size, time = size_and_time(path)
            if not os.path.isfile(path):
                raise MediaError(f"{path} is no file")
            known = measured(Place(path, row.name), size, time, row.path)
        except MediaError as error:
            builder.problems[row.name] = str(error)
            continue
        except OSError as error:
            builder.problems[row.name] = f"{path} cannot be opened ({error.strerror})"
            continue
        if row.segment[0] and row.segment[0] >= known.duration:
            builder.problems[row.name] = (
                f"its segment begins at {row.segment[0]:g} s and the file ends at "
                f"{known.duration:g} s; a file that was cut already has no start"
            )
            continue
        builder.add(
            row.name,
            row.path,
            file_bytes=size,
            file_time=time,
            segment=row.segment,
            measured=known,
            captions=(*row.captions, *chosen(row.sidecars, read)),
        )
    builder.end_block()


# -- captions that lie apart -----------------------------------------------------------------------


def _build_captions(
    listing: Listing, parts: Path, workers: int
) -> tuple[list[tuple[Part, dict[str, Any]]], dict[str, tuple[int, int]]]:
    """The parts of a captions file, and where in them each name's captions lie."""
    if listing.captions is None:
        return [], {}
    size, time = stamp_of_captions(str(listing.captions))
    tasks: list[_Task] = []
    # a chunk of tasks at a time, so that the file is never held whole
    for chunk in _chunks(_raw_captions(listing.captions), _NAMES_A_PART * max(workers, 1)):
        fresh: list[_Task] = []
        for entries in _chunks(iter(chunk), _NAMES_A_PART):
            number = len(tasks) + len(fresh)
            fresh.append(
                _Task(
                    str(parts / f"captions-{number:06d}.npz"),
                    f"{VERSION} {number} {size} {time} {entries[0][0]} {entries[-1][0]}",
                    listing.root,
                    captions=tuple(entries),
                    where=str(listing.captions),
                )
            )
        _run(fresh, workers, None)
        tasks += [_Task(task.target, task.fingerprint, task.root) for task in fresh]
    built = [_load_part(Path(task.target)) for task in tasks]
    keys: dict[str, tuple[int, int]] = {}
    base = 0
    for part, _ in built:
        names = json.loads(part["keys"].tobytes())
        for name, (first, count) in zip(names, part["firsts"].tolist(), strict=True):
            name = composed(name)
            if name in keys:
                raise ValueError(f"{listing.captions} has {name!r} twice; join its captions")
            keys[name] = (first + base, count)
        base += len(part["caption_times"])
    return built, keys


def _raw_captions(path: Path) -> Iterator[tuple[str, Any]]:
    return read_captions(path) if path.is_dir() else stream_entries(path)


def _chunks(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _captions_of(keys: Mapping[str, tuple[int, int]], name: str) -> tuple[int, int] | None:
    found = _key_for(keys, name)
    return None if found is None else keys[found]


def _key_for(keys: Container[str], name: str) -> str | None:
    """By a file's whole name, then without folders, then without the suffix."""
    whole = composed(name)
    base = whole.rpartition("/")[2]
    stems = (whole, os.path.splitext(whole)[0], base, os.path.splitext(base)[0], key_of(base))
    return next((each for each in stems if each in keys), None)


def _unmatched(
    keys: Mapping[str, tuple[int, int]], source: ColumnSource, path: Path | None
) -> list[str]:
    """What is to be said of captions at ``path`` that belong to no file, or to several."""
    owners: dict[str, str] = {}
    shared: dict[str, str] = {}
    for index in range(len(source) if keys else 0):
        name = of_file(source.name(index), source.segment(index))
        if (key := _key_for(keys, name)) is not None and owners.setdefault(key, name) != name:
            shared.setdefault(key, name)
    told = []
    if unused := len(keys) - len(owners):
        some = itertools.islice((repr(key) for key in keys if key not in owners), 3)
        told.append(
            f"{unused} of the {len(keys)} names in {path} are of no file in {source.label} "
            f"({', '.join(some)}): their captions are not used"
        )
    if shared:
        key, name = next(iter(shared.items()))
        told.append(
            f"{len(shared)} of the {len(keys)} names in {path} are of several files in "
            f"{source.label} ({key!r} of {owners[key]} and {name}), which all get their captions; "
            "name files by their paths"
        )
    return told


# -- without an index ------------------------------------------------------------------------------


def hold(listing: Listing) -> ColumnSource:
    """The source in memory, its media unopened: durations are not known.

    Raises:
        ValueError: nothing is there, or captions that are none.
    """
    builder = PartBuilder()
    read_files(listing.root, listing.rows, builder, _guessed)
    spoken = PartBuilder()
    keys = {}
    if listing.captions is not None:
        for name, captions in read_captions(listing.captions):
            keys[composed(name)] = spoken.add_captions(captions)
    problems = {**listing.problems, **builder.problems}
    if not len(builder):
        told = "; ".join(list(problems.values())[:2])
        raise ValueError(f"nothing in {listing.label} can be read: {told}")
    columns = in_memory(
        [builder.finish()],
        [spoken.finish()] if keys else [],
        functools.partial(_captions_of, keys) if keys else None,
    )
    source = ColumnSource(
        listing.label,
        listing.root,
        columns,
        problems=problems,
        without_spaces=builder.without_spaces + spoken.without_spaces,
    )
    source.unmatched = tuple(_unmatched(keys, source, listing.captions))
    return source


def _guessed(place: Place, size: int, time: int, path: str) -> Measured:
    return guessed(place.name)


def summary_of(source: ColumnSource) -> dict[str, Any]:
    """How much a source holds; ``line`` says it in words."""
    columns = source.columns
    streams = columns["streams"]
    hours = float(np.nansum(np.minimum(columns["duration"], np.diff(columns["segment"])[:, 0])))
    found = {
        "examples": len(source),
        "blocks": len(source.blocks) - 1,
        "bytes": source.identity.bytes,
        "hours": round(hours / 3600, 3),
        "with_video": int(np.count_nonzero(streams & (VIDEO | IMAGE))),
        "with_audio": int(np.count_nonzero(streams & AUDIO)),
        "with_captions": int(np.count_nonzero(columns["caption_count"])),
        "captions": int(columns["caption_count"].sum()),
        "words": len(columns["word_counts"]),
        "left_out": len(source.problems),
    }
    line = (
        f"{found['examples']} clips in {found['blocks']} files, {found['bytes'] / 1e9:.3g} GB, "
        f"{found['hours']:.3g} h; {found['with_video']} with video, {found['with_audio']} with "
        f"sound, {found['with_captions']} with captions ({found['captions']} of "
        f"{found['words']} words); {found['left_out']} left out"
    )
    return found | {"line": line}


def warn_of_captions(source: ColumnSource) -> None:
    """Warn of captions that belong to no file or to several, and as ``warn_of_scripts``."""
    for told in source.unmatched:
        warnings.warn(told, stacklevel=3)
    warn_of_scripts(source)


def warn_of_scripts(source: ColumnSource) -> None:
    """Warn where many captions are in scripts whose words are not parted by spaces."""
    captions = len(source.columns["caption_times"])
    if source.without_spaces * 100 > captions:
        warnings.warn(
            f"{source.without_spaces} of the {captions} captions of {source.label} are in scripts "
            "that put no spaces between words (Chinese, Japanese, Thai and others): each run of "
            "letters becomes one word; part the words by spaces first",
            stacklevel=3,
        )
