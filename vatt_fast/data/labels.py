"""Media with classes: whatever names them, as a source for the loaders and as targets.

``label_files.py`` reads the files; here files are found, classes checked, splits made.

Shapes: B clips, C classes.
"""

import difflib
import hashlib
import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .captions import composed
from .columns import ColumnSource
from .folder import media_below
from .index import hold
from .label_files import TRAIN, UNNAMED, Entry, Written, read_entries
from .listing import Listing, Row
from .media import MEDIA_SUFFIXES, MediaError, MediaReader
from .source import WHOLE_FILE, Modalities

# a whole video ends at most so much before the segment of it
_TRIMMED_SECONDS = 1.5
_NAMED = 3  # in an error
_MARKED_BYTES, _MARKED_TOGETHER, _MARKING_THREADS = 4096, 4096, 8


@dataclass(frozen=True)
class Example:
    """A media file or a segment of one, and its classes."""

    path: str  # relative to the root
    classes: tuple[str, ...]
    split: str  # train, val or test, or what the file calls it
    where: str  # file and line that say so
    segment: tuple[float, float] = WHOLE_FILE


@dataclass(frozen=True)
class LabelledData:
    """What a folder or a file of labels names.

    Args:
        root: a folder that the paths are relative to.
        classes: in the order of a model's outputs.
        names_splits: whether anything says which split an example is of; else all are train.
        missing: what is named and not there, where that was allowed.
    """

    label: str
    root: str
    examples: tuple[Example, ...]
    classes: tuple[str, ...]
    names_splits: bool = True
    missing: tuple[str, ...] = ()

    @property
    def splits(self) -> dict[str, int]:
        """Examples of each split."""
        return dict(sorted(Counter(example.split for example in self.examples).items()))

    @property
    def has_several(self) -> bool:
        """Whether some example has more than one class, or none."""
        return any(len(example.classes) != 1 for example in self.examples)

    def held_out(self, share: float) -> "LabelledData":
        """The same with this share of each class as split test, where nothing names a split.

        Of examples with several classes it is the share of all. Which ones depends on the files'
        names alone; a class keeps at least one for training.

        Raises:
            ValueError: a share out of range.
        """
        if not 0 <= share < 1:
            raise ValueError(f"hold_out is {share}; it is a share of the examples, in [0, 1)")
        if self.names_splits:
            return self
        out = self._of_all(share) if self.has_several else self._of_each_class(share)
        examples = (replace(e, split="test" if e in out else TRAIN) for e in self.examples)
        return replace(self, examples=tuple(examples), names_splits=True)

    def _of_each_class(self, share: float) -> set[Example]:
        of_class: dict[tuple[str, ...], list[Example]] = {}
        for example in self.examples:
            of_class.setdefault(example.classes, []).append(example)
        out: set[Example] = set()
        for those in of_class.values():
            count = min(round(share * len(those)), len(those) - 1)
            out.update(sorted(those, key=_draw)[:count])
        return out

    def _of_all(self, share: float) -> set[Example]:
        left = Counter(name for example in self.examples for name in example.classes)
        wanted = round(share * len(self.examples))
        out: set[Example] = set()
        for example in sorted(self.examples, key=_draw):
            if len(out) < wanted and all(left[name] > 1 for name in example.classes):
                out.add(example)
                left.subtract(example.classes)
        return out

    def marks(self, split: str) -> set[str]:
        """A short digest of the segment, the size and parts of each example of a split.

        Wherever the file lies. Files that cannot be read have none.
        """
        return {mark for mark in self._marked(split).values() if mark is not None}

    def trained_on(self, split: str, marks: Collection[str]) -> list[Example]:
        """The examples of a split that have one of these marks."""
        return [example for example, mark in self._marked(split).items() if mark in marks]

    def without(self, examples: Collection[Example]) -> "LabelledData":
        """The same but for these examples."""
        gone = set(examples)
        return replace(self, examples=tuple(e for e in self.examples if e not in gone))

    def _marked(self, split: str) -> dict[Example, str | None]:
        chosen = [example for example in self.examples if example.split == split]
        found: dict[Example, str | None] = {}
        with ThreadPoolExecutor(_MARKING_THREADS) as pool:  # disks elsewhere answer late
            for first in range(0, len(chosen), _MARKED_TOGETHER):
                part = chosen[first : first + _MARKED_TOGETHER]
                found |= zip(part, pool.map(self._mark, part), strict=True)
        return found

    def _mark(self, example: Example) -> str | None:
        try:
            with open(os.path.join(self.root, example.path), "rb") as file:
                size = os.fstat(file.fileno()).st_size
                parts = []
                for place in (0, size // 2, max(0, size - _MARKED_BYTES)):
                    file.seek(place)
                    parts.append(file.read(_MARKED_BYTES).hex())
        except OSError:
            return None  # nothing can be trained on it
        return _digest(f"{example.segment}\0{size}\0{parts}").hex()[:16]

    def source(
        self, split: str, modality: str, classes: Sequence[str] | None = None
    ) -> "LabelledSource":
        """The examples of a split, for ``ClipDataset`` and others.

        Args:
            modality: "video" (pictures too) or "audio", all that is decoded of a file.
            classes: a model's instead of these.

        Raises:
            ValueError: no such split; an example of another class, named.
        """
        chosen = [example for example in self.examples if example.split == split]
        if not chosen:
            told = ", ".join(f"{name} ({count})" for name, count in self.splits.items())
            raise ValueError(f"{self.label} has no examples of split {split!r}; it has {told}")
        names = tuple(self.classes if classes is None else classes)
        _check_classes(chosen, names, "the model's" if classes is not None else self.label)
        return LabelledSource(self, chosen, names, modality)

    def classes_without_training(self) -> list[str]:
        """Those of which no example is for training."""
        trained = {name for e in self.examples if e.split == TRAIN for name in e.classes}
        return [name for name in self.classes if name not in trained]

    def check_training(self) -> None:
        """Raises ValueError where a class has no training example, naming it."""
        if TRAIN not in self.splits:
            raise ValueError(
                f"{self.label} has no examples of split train; it has {', '.join(self.splits)}"
            )
        if without := self.classes_without_training():
            raise ValueError(
                f"{self.label}: {_some(without)} without a training example; add one for each, or "
                "take the class out"
            )


class LabelledSource(ColumnSource):
    """A ``Source`` in memory whose examples have classes."""

    def __init__(
        self,
        data: LabelledData,
        examples: Sequence[Example],
        classes: tuple[str, ...],
        modality: str,
    ) -> None:
        counts = Counter(example.path for example in examples)
        rows, self.classes, self.modality = [], classes, modality
        number = {name: place for place, name in enumerate(classes)}
        self._classes_of: dict[str, tuple[int, ...]] = {}
        for example in sorted(examples, key=lambda each: (each.path, each.segment)):
            start, end = example.segment
            name = (
                example.path if counts[example.path] == 1 else f"{example.path}@{start:g}-{end:g}"
            )
            if name in self._classes_of:
                raise ValueError(f"{example.where} names {name} a second time; join the two")
            self._classes_of[name] = tuple(number[each] for each in example.classes)
            rows.append(Row(name, example.path, example.segment))
        held = hold(Listing(data.label, data.root, None, rows))
        super().__init__(held.label, held.root, held.columns, problems=held.problems)

    @property
    def has(self) -> Modalities:
        return Modalities(self.modality == "video", self.modality == "audio", False)

    def classes_of(self, name: str) -> tuple[int, ...]:
        """Numbers of an example's classes."""
        return self._classes_of[name]

    def targets(self, names: Iterable[str]) -> Tensor:
        """(B, C) float32 of 0 and 1, for the examples with these names."""
        each = [self._classes_of[name] for name in names]
        found = torch.zeros(len(each), len(self.classes))
        for row, numbers in enumerate(each):
            found[row, list(numbers)] = 1.0
        return found

    @property
    def label_digest(self) -> str:
        """Of all names with their classes."""
        digest = hashlib.sha256()
        for name, numbers in self._classes_of.items():
            digest.update(f"{name}\0{numbers}\n".encode(errors="surrogateescape"))
        return digest.hexdigest()

    def counts(self) -> np.ndarray:
        """(C,) examples of each class."""
        flat = [number for numbers in self._classes_of.values() for number in numbers]
        return np.bincount(np.array(flat, np.int64), minlength=len(self.classes))


def open_labels(
    data: str | os.PathLike,
    *,
    media: str | os.PathLike | None = None,
    fold: int = 1,
    skip_missing: bool = False,
) -> LabelledData:
    """Media and their classes of a folder, or of a file of labels.

    Args:
        data: a folder with a folder for each class, below train, val and test or not; a folder
            with labels.csv or labels.json, or such a file; a Kinetics, Moments, ESC-50 or AudioSet
            CSV, or the folder of them; a folder of UCF101's or HMDB51's split lists.
        media: the folder with the media, at any depth; None: the file's own.
        fold: of UCF101 and HMDB51, the split (1 to 3); of ESC-50, the fold that is the test.
        skip_missing: leave out what is named and not there.

    Raises:
        ValueError: nothing there that can be read; files that are missing or twice; a class that
            is none of a list that lies beside.
    """
    written = read_entries(Path(data), fold)
    root = Path(media) if media is not None else Path(written.root)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; name the one with the media of {data}")
    places = _Places(root) if written.by_name else None
    found: dict[tuple[str, tuple[float, float]], Example] = {}
    missing: list[str] = []
    located: list[_At] = []
    for entry in written.entries:
        at = _At(entry, entry.names[0], entry.segment)
        if places is not None:
            place = places.find(entry)
            if place is None:
                missing.append(f"{entry.names[0]} ({entry.where})")
                continue
            at = place
        located.append(at)
    if missing and not skip_missing:
        raise ValueError(
            f"{_some(missing)} not there below {root}; name the folder with the media, or leave "
            "missing ones out (skip_missing)"
        )
    cut = _are_cut_out(root, located)
    for entry, path, segment in located:
        segment = WHOLE_FILE if cut and entry.is_whole_by_name is False else segment
        key, split = (path, segment), entry.split or TRAIN
        if key in found and found[key].split != split:
            raise ValueError(
                f"{entry.where} puts {path} into {split}, {found[key].where} into "
                f"{found[key].split}; an example has one split"
            )
        before = found[key].classes if key in found else ()
        classes = tuple(dict.fromkeys((*before, *entry.classes)))
        found[key] = Example(path, classes, split, entry.where, segment)
    examples = tuple(found[key] for key in sorted(found))
    if not examples:
        raise ValueError(f"{data} names no media that are there; name another folder of media")
    named = any(entry.split != UNNAMED for entry in written.entries)
    classes = _classes(written, examples)
    return LabelledData(str(data), str(root), examples, classes, named, tuple(missing))


def evaluation_split(data: LabelledData) -> str:
    """test, else val, else the only one. Raises ValueError where that does not say which."""
    for split in ("test", "val"):
        if split in data.splits:
            return split
    if len(data.splits) == 1:
        return next(iter(data.splits))
    raise ValueError(f"{data.label} has the splits {', '.join(data.splits)}; name one")


# -- classes ---------------------------------------------------------------------------------------


def _classes(written: Written, examples: Sequence[Example]) -> tuple[str, ...]:
    if written.classes is None:
        return tuple(sorted({name for example in examples for name in example.classes}))
    _check_classes(examples, written.classes, written.classes_from)
    return tuple(written.classes)


def _check_classes(examples: Sequence[Example], classes: Sequence[str], of: str) -> None:
    known = set(classes)
    for example in examples:
        for name in example.classes:
            if name not in known:
                near = difflib.get_close_matches(name, classes, 1)
                hint = f"; is it {near[0]!r}?" if near else ""
                raise ValueError(
                    f"{example.where} has the class {name!r}, which is none of {of} "
                    f"{len(classes)} classes{hint}"
                )


# -- files -----------------------------------------------------------------------------------------


class _At(NamedTuple):
    entry: Entry
    path: str
    segment: tuple[float, float]


class _Places:
    """Media below a folder by path, path without suffix, name, and name without suffix."""

    def __init__(self, root: Path) -> None:
        self.root = root
        files, _ = media_below(root)
        self._known: list[Mapping[str, list[str]]] = []
        for key in (_path, _stem_of_path, _name, _stem):
            known: dict[str, list[str]] = {}
            for path in files:
                known.setdefault(composed(key(path)), []).append(path)
            self._known.append(known)

    def _below(self, name: str) -> str:
        """Relative to the root, where it lies there."""
        if os.path.isabs(name):
            root = os.path.abspath(self.root)
            return name.removeprefix(root).lstrip("/") if name.startswith(f"{root}/") else name
        return name.removeprefix("./")

    def find(self, entry: Entry) -> _At | None:
        for place, name in enumerate(entry.names):
            name = composed(self._below(name))
            for known, key in zip(self._known, (_path, _path, _name, _name), strict=True):
                paths = known.get(key(name), [])
                if len(paths) > 1:  # of other folders
                    below = f"/{_stem_of_path(name)}"
                    paths = [p for p in paths if _stem_of_path(f"/{p}").endswith(below)] or paths
                if len(paths) > 1:
                    raise ValueError(
                        f"{entry.where} names {name}, and there are {paths[0]} and {paths[1]}; "
                        "write the path below the folder of media"
                    )
                if paths:
                    whole = entry.whole_names is not None and place < entry.whole_names
                    segment = WHOLE_FILE if whole else entry.segment
                    return _At(replace(entry, is_whole_by_name=whole), paths[0], segment)
        return None


def _path(path: str) -> str:
    return path


def _name(path: str) -> str:
    return path.rpartition("/")[2]


def _stem_of_path(path: str) -> str:
    return os.path.splitext(path)[0] if path.lower().endswith(MEDIA_SUFFIXES) else path


def _stem(path: str) -> str:
    return _stem_of_path(_name(path))


def _are_cut_out(root: Path, located: Sequence[_At]) -> bool:
    """Whether files named by a video's id are its segments cut out.

    The one whose segment begins last tells; where it cannot be read, the next.
    """
    by_id = [
        at for at in located if at.entry.whole_names is not None and not at.entry.is_whole_by_name
    ]
    for _, path, (start, end) in sorted(by_id, key=lambda at: -at.segment[0]):
        if start == 0:
            return False
        if end == math.inf:
            continue
        try:
            with MediaReader(root / path) as reader:
                return reader.info.duration_seconds < end - _TRIMMED_SECONDS
        except (MediaError, OSError):
            continue  # it will be skipped and listed
    return False


def _draw(example: Example) -> bytes:
    return _digest(f"{example.path} {example.segment}")


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogateescape")).digest()


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED} more are" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + (more or (" are" if len(names) > 1 else " is"))
