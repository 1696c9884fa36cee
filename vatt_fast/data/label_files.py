"""Files of labels as people own them: which media, which classes, which split.

A folder for each class (ImageFolder, Kinetics), labels.csv and labels.json, the CSV files of
Kinetics, Moments in Time, ESC-50 and AudioSet, the split lists of UCF101 and HMDB51. Media are not
looked for here: each entry has the names that its file may have.
"""

import csv
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .captions import decode_text, seconds_of
from .folder import OTHER_SUFFIXES, media_below
from .media import MEDIA_SUFFIXES
from .source import WHOLE_FILE

TRAIN, VAL, TEST = "train", "val", "test"
UNNAMED = ""  # nothing says which split
_SPLITS = {
    **dict.fromkeys(("train", "training", "trainingset"), TRAIN),
    **dict.fromkeys(("val", "valid", "validate", "validation", "validationset", "dev"), VAL),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), TEST),
}
LABEL_FILES = ("labels.csv", "labels.json")
# one class a line, in the order of a model's outputs
_CLASS_LISTS = ("classes.txt", "labels.txt", "classInd.txt", "moments_categories.txt")
_AUDIOSET_CLASSES = "class_labels_indices.csv"
# columns of labels.csv and of others' CSV files
_FILE = ("file", "path", "filename", "file_name", "filepath", "file_path", "video", "audio",
         "image", "name", "video_id", "id")  # fmt: skip
_YOUTUBE = ("youtube_id", "ytid")
_CLASS = ("class", "classes", "label", "labels", "category", "positive_labels")
_START = ("start", "time_start", "start_seconds", "start_time", "segment_start")
_END = ("end", "time_end", "end_seconds", "end_time", "segment_end")
_SEPARATORS = re.compile(r"[;|]")


@dataclass(frozen=True)
class Entry:
    """One line of a file of labels.

    Args:
        names: what the media file may be called, with or without folders and suffix, best first.
        where: file and line, for messages.
        whole_names: so many of the names are those of the segment cut out, so all of the file
            counts; None: the names say nothing of that.
        is_whole_by_name: whether such a name was found.
    """

    names: tuple[str, ...]
    classes: tuple[str, ...]
    split: str
    where: str
    segment: tuple[float, float] = WHOLE_FILE
    whole_names: int | None = None
    is_whole_by_name: bool | None = None


@dataclass
class Written:
    """What a file or folder of labels says; ``by_name``: media are still to be found."""

    entries: list[Entry]
    root: Path
    classes: list[str] | None = None
    classes_from: str = ""
    by_name: bool = True


def read_entries(data: Path, fold: int) -> Written:
    """The entries of a folder or file; see ``labels.open_labels``. Raises ValueError."""
    if not data.exists():
        raise ValueError(f"{data} is not there; name a folder or a file of labels")
    if data.is_file():
        return _read_files([data], data.parent, fold)
    for name in (*LABEL_FILES, "esc50.csv", "meta/esc50.csv"):
        if (data / name).is_file():
            return _read_files([data / name], data, fold)
    lists = sorted(data.glob("trainlist*.txt")) + sorted(data.glob("*_test_split?.txt"))
    if lists:
        return _read_lists(data, fold)
    for suffix in ("csv", "json"):  # Kinetics has both, of one content
        tables = sorted(data.glob(f"*.{suffix}"))
        if tables := [path for path in tables if _split_of_name(path.stem) is not None]:
            return _read_files(tables, data, fold)
    return _read_folders(data)


# -- folders ---------------------------------------------------------------------------------------


def _read_folders(data: Path) -> Written:
    """CLASS/... or SPLIT/CLASS/...; the class is the first folder, whatever lies below it."""
    files, folders = media_below(data)
    if not files:
        raise ValueError(
            f"{data} has no media and no file of labels; name a folder with a folder for each "
            f"class, or with {' or '.join(LABEL_FILES)}"
        )
    loose = [path for path in files if "/" not in path]
    tops = {path.partition("/")[0] for path in files if "/" in path}
    splits = {top: _SPLITS[top.lower()] for top in tops if top.lower() in _SPLITS}
    if splits and len(splits) < len(tops):
        other = min(tops - splits.keys())
        raise ValueError(
            f"{data} has {min(splits)}, a split, beside {other}; put either splits there or classes"
        )
    entries = []
    for path in files:
        parts = path.split("/")
        depth = 1 if splits else 0
        if len(parts) < depth + 2:
            if not splits and path in loose:
                raise ValueError(
                    f"{data / path} lies in no class's folder, and there is no "
                    f"{' or '.join(LABEL_FILES)}; put it into one"
                )
            raise ValueError(f"{data / path} lies in no class's folder; put it into one")
        split = splits[parts[0]] if splits else UNNAMED
        entries.append(Entry((path,), (parts[depth],), split, str(data / path)))
    classes, said = _class_list(data)
    if classes is None:
        inside = [Path(each).relative_to(data) for each in folders]
        of_classes = [each for each in inside if len(each.parts) == depth + 1]
        if splits:
            of_classes = [each for each in of_classes if each.parts[0] in splits]
        bare = {each.name for each in of_classes if _lacks_media(data / each)}
        classes = sorted(bare.union(entry.classes[0] for entry in entries))
    return Written(entries, data, classes, said, by_name=False)


def _lacks_media(folder: Path) -> bool:
    """Whether a folder is a class's without media: nothing lies there, or media of other kinds."""
    files = (path.name.lower() for path in folder.rglob("*") if not path.is_dir())
    return all(name.startswith(".") or name.endswith(OTHER_SUFFIXES) for name in files)


# -- tables and JSON -------------------------------------------------------------------------------


def _read_files(paths: Sequence[Path], root: Path, fold: int) -> Written:
    entries: list[Entry] = []
    classes, said = None, ""
    names: dict[str, str] = {}
    for path in paths:
        if path.suffix.lower() == ".json":
            entries += _json_entries(path)
        elif path.suffix.lower() in (".csv", ".tsv"):
            beside = path.parent / _AUDIOSET_CLASSES
            if beside.is_file() and not names:
                names = _audioset_names(beside)
                classes, said = list(names.values()), f"{beside}'s"
            entries += _table_entries(path, fold, names)
        elif path.suffix.lower() == ".txt":
            return _read_lists(path.parent, fold)
        else:
            raise ValueError(f"{path} is no file of labels; write {' or '.join(LABEL_FILES)}")
        if classes is None:
            classes, said = _class_list(path.parent)
    if not entries:
        raise ValueError(f"{', '.join(map(str, paths))} has no rows; write one for each file")
    if paths[0].parent.name == "meta" and paths[0].name == "esc50.csv":
        root = paths[0].parent.parent
    return Written(entries, root, classes, said)


def _table_entries(path: Path, fold: int, names: dict[str, str]) -> Iterator[Entry]:
    text = decode_text(path.read_bytes(), str(path))
    lines = text.splitlines(keepends=True)
    comments = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    options: dict[str, Any] = dict(delimiter=separator, skipinitialspace=True, strict=True)
    header: list[str] | None = None
    if comments:  # AudioSet's header is the last of its comments
        header = [each.strip().lower() for each in lines[comments - 1].lstrip("# ").split(",")]
    reader = csv.reader(lines[comments:], **options)
    split = _split_of_name(path.stem) or UNNAMED
    read: Callable[[list[str], str], Entry] | None = None
    try:
        for row in reader:
            where = f"{path} line {comments + reader.line_num}"
            if not row or not any(row):
                continue
            if header is None:
                header = [each.strip().lower() for each in row]
                if header[0].endswith(MEDIA_SUFFIXES):  # Moments in Time: file, class, votes
                    header = ["file", "class", *(f"_{i}" for i in range(len(row) - 2))]
                else:
                    continue
            if read is None:
                read = _row_reader(header, path, split, fold, names)
            if len(row) != len(header):
                raise ValueError(
                    f"{where} has {len(row)} values under {len(header)} columns; quote texts that "
                    "hold the separator"
                )
            yield read(row, where)
    except csv.Error as error:
        raise ValueError(f"{path} line {reader.line_num} is no row of a table ({error})") from error


def _row_reader(
    header: Sequence[str], path: Path, split: str, fold: int, names: dict[str, str]
) -> Callable[[list[str], str], Entry]:
    def column(known: Sequence[str]) -> int | None:
        return next((header.index(name) for name in known if name in header), None)

    youtube, file = column(_YOUTUBE), column(_FILE)
    classes, start, end = column(_CLASS), column(_START), column(_END)
    split_at, fold_at = column(("split", "subset", "set")), column(("fold",))
    if (youtube is None and file is None) or classes is None:
        raise ValueError(
            f"{path} has the columns {', '.join(header[:8])}; it needs file and class, and may "
            "have split, start and end"
        )
    commas = header[classes] == "positive_labels"  # AudioSet's

    def read(row: list[str], where: str) -> Entry:
        written = row[classes].strip()
        found = written.split(",") if commas else _SEPARATORS.split(written)
        said = tuple(names.get(each.strip(), each.strip()) for each in found if each.strip())
        if not said:
            raise ValueError(f"{where} has no class; write one, or several parted by ;")
        own = split if split_at is None else _split_of(row[split_at], where)
        if fold_at is not None and split_at is None:
            own = TEST if row[fold_at].strip() == str(fold) else TRAIN
        segment = _segment(
            None if start is None else row[start], None if end is None else row[end], where
        )
        if youtube is None or segment == WHOLE_FILE:
            name = row[file if youtube is None and file is not None else youtube or 0].strip()
            if not name:
                raise ValueError(f"{where} has no file; name one")
            return Entry((name,), said, own, where, segment)
        whole, others = _youtube_names(row[youtube].strip(), *segment)
        return Entry((*whole, *others), said, own, where, segment, len(whole))

    return read


def _youtube_names(name: str, start: float, end: float) -> tuple[list[str], list[str]]:
    """What download programs call a segment cut out, and the whole video."""
    cut = []
    if end < math.inf:
        cut.append(f"{name}_{int(start):06d}_{int(end):06d}")  # Kinetics
        times = [f"{start:.3f}_{end:.3f}", f"{start * 1000:.0f}_{end * 1000:.0f}"]
        times += [f"{start:.0f}_{end:.0f}", f"{start:.0f}"]
        cut += [f"{letter}{name}_{each}" for each in times for letter in ("", "Y")]
    return [*cut, f"Y{name}"], [name]


def _json_entries(path: Path) -> Iterator[Entry]:
    try:
        content = json.loads(decode_text(path.read_bytes(), str(path)))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error}); correct it") from error
    split = _split_of_name(path.stem) or UNNAMED
    if isinstance(content, list):
        rows = [(f"{path} entry {number}", None, each) for number, each in enumerate(content, 1)]
    elif isinstance(content, dict):
        rows = [(f"{path}: {name!r}", name, each) for name, each in content.items()]
    else:
        raise ValueError(f"{path} is a JSON {type(content).__name__}; write {{file: class}}")
    for where, name, each in rows:
        if name is not None and isinstance(each, str | list):
            each = {"class": each}
        if not isinstance(each, dict):
            raise ValueError(f"{where} is {each!r:.60}; write a class, several, or an object")
        each = {key.lower(): value for key, value in each.items()}
        if name is not None and isinstance(each.get("annotations"), dict):  # Kinetics
            segment = each["annotations"].get("segment") or (None, None)
            span = _segment(*segment, where)
            own = _split_of(each.get("subset", split), where)
            if "label" not in each["annotations"]:
                raise ValueError(f"{where} has no label; write one")
            whole, others = _youtube_names(name, *span)
            label = (str(each["annotations"]["label"]),)
            yield Entry((*whole, *others), label, own, where, span, len(whole))
            continue
        file = name or next((each[key] for key in _FILE if key in each), None)
        said = next((each[key] for key in _CLASS if key in each), None)
        listed = said if isinstance(said, list) else [said]
        if not isinstance(file, str) or not file:
            raise ValueError(f"{where} has no file; name one")
        if said is None or not listed or not all(isinstance(one, str | int) for one in listed):
            raise ValueError(f"{where} has the class {said!r:.60}; give one, or a list of several")
        times = [next((each[key] for key in keys if key in each), None) for keys in (_START, _END)]
        own = _split_of(each["split"], where) if "split" in each else split
        classes = tuple(str(one) for one in listed)
        yield Entry((file,), classes, own, where, _segment(times[0], times[1], where))


def _segment(start: Any, end: Any, where: str) -> tuple[float, float]:
    def seconds(value: Any, otherwise: float) -> float:
        if value is None or value == "":
            return otherwise
        try:
            return seconds_of(value)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None

    first, last = seconds(start, WHOLE_FILE[0]), seconds(end, WHOLE_FILE[1])
    if first < 0 or last <= first:
        raise ValueError(
            f"{where} has a segment from {first:g} to {last:g} s; it begins at 0 or later and "
            "ends after its start"
        )
    return first, last


# -- split lists of UCF101 and HMDB51 --------------------------------------------------------------


def _read_lists(data: Path, fold: int) -> Written:
    if not 1 <= fold <= 3:
        raise ValueError(f"fold is {fold}; the lists in {data} are 1, 2 and 3")
    ucf = [(data / f"{name}list{fold:02d}.txt", split) for name, split in _UCF]
    entries = []
    if all(path.is_file() for path, _ in ucf):
        for path, split in ucf:
            for where, words in _lines(path):
                folder, slash, _ = words[0].partition("/")
                if not slash:
                    raise ValueError(f"{where} has {words[0]!r}; it is CLASS/FILE")
                entries.append(Entry(_transcoded(words[0]), (folder,), split, where))
        classes, said = _class_list(data)
        return Written(entries, data, classes, said)
    for path in sorted(data.glob(f"*_test_split{fold}.txt")):
        label = path.name.removesuffix(f"_test_split{fold}.txt")
        for where, words in _lines(path):
            if len(words) != 2 or words[1] not in _HMDB:
                raise ValueError(f"{where} is {' '.join(words)!r:.60}; it is a file and 0, 1 or 2")
            if own := _HMDB[words[1]]:
                names = (*_transcoded(f"{label}/{words[0]}"), *_transcoded(words[0]))
                entries.append(Entry(names, (label,), own, where))
    if not entries:
        raise ValueError(
            f"{data} has no trainlist{fold:02d}.txt with testlist{fold:02d}.txt, and no "
            f"CLASS_test_split{fold}.txt; name the folder of UCF101's or HMDB51's lists"
        )
    return Written(entries, data)


def _transcoded(name: str) -> tuple[str, str]:
    """A file's name, and that of one with another suffix."""
    return name, os.path.splitext(name)[0]


_UCF = (("train", TRAIN), ("test", TEST))
_HMDB: dict[str, str | None] = {"0": None, "1": TRAIN, "2": TEST}


def _lines(path: Path) -> Iterator[tuple[str, list[str]]]:
    text = decode_text(path.read_bytes(), str(path))
    for number, line in enumerate(text.splitlines(), 1):
        if words := line.split():
            yield f"{path} line {number}", words


# -- splits and lists of classes -------------------------------------------------------------------


def _split_of(value: Any, where: str) -> str:
    name = str(value).strip()
    if not name:
        raise ValueError(f"{where} has no split; write train, val or test")
    return _SPLITS.get(name.lower(), name)


def _split_of_name(stem: str) -> str | None:
    """ "kinetics_400_validate" -> val; None where no word of it is a split's."""
    words = re.split(r"[^a-z]+", stem.lower())
    return next((_SPLITS[word] for word in words if word in _SPLITS), None)


def _class_list(folder: Path) -> tuple[list[str] | None, str]:
    """The classes in a list that lies in the folder, and how messages call their owner."""
    for name in _CLASS_LISTS:
        path = folder / name
        if not path.is_file():
            continue
        lines = decode_text(path.read_bytes(), str(path)).splitlines()
        classes = [line.strip() for line in lines if line.strip()]
        if name == "classInd.txt":  # "1 ApplyEyeMakeup"
            classes = [line.split(maxsplit=1)[-1] for line in classes]
        elif name == "moments_categories.txt":  # "airlifting,0"
            classes = [line.rpartition(",")[0] or line for line in classes]
        if twice := [each for each in classes if classes.count(each) > 1]:
            raise ValueError(f"{path} names {twice[0]!r} twice; each class has its own name")
        return classes, f"{path}'s"
    return None, ""


def _audioset_names(path: Path) -> dict[str, str]:
    """AudioSet's mid -> its name, in the order of the list: index, mid, display_name."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        rows = list(csv.DictReader(file))
    if not rows or not {"mid", "display_name"} <= rows[0].keys():
        raise ValueError(f"{path} has no columns mid and display_name; take AudioSet's own")
    return {row["mid"]: row["display_name"] for row in rows}
