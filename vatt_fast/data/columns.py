"""Examples and their captions as columns: NumPy arrays in memory, or mapped from .npy files.

N examples, F files that hold them, C captions, T words of captions, L different words, S blocks.
Strings are one array of bytes and (n + 1,) offsets. A part is a dict of such arrays for some of a
source's examples; ``join`` puts parts one behind the other without holding them all.
"""

import hashlib
import itertools
import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from .captions import has_no_spaces
from .source import CONTENT, WHOLE_FILE, Captions, Identity, Modalities, Place
from .text import UNKNOWN_ID, Caption, Vocabulary, split_words

Part = Mapping[str, np.ndarray]

VIDEO, AUDIO, IMAGE, MEASURED = 1, 2, 4, 8  # bits of ``streams``
# dtype of each column, and how many values a row has
_EXAMPLES = {
    "in_file": (np.int32, ()),
    "offset": (np.int64, ()),
    "size": (np.int64, ()),
    "segment": (np.float64, (2,)),
    "duration": (np.float64, ()),  # seconds, nan where not measured
    "streams": (np.uint8, ()),
    "width": (np.int32, ()),
    "height": (np.int32, ()),
    "frames_per_second": (np.float32, ()),
    "sample_rate": (np.int32, ()),
    "key_frames": (np.int32, ()),  # 0: the container does not list them
    "key_seconds": (np.float32, ()),  # the longest time between two of them
    "caption_first": (np.int64, ()),
    "caption_count": (np.int32, ()),
}
_FILES = {"file_bytes": (np.int64, ()), "file_time": (np.int64, ())}  # time: nanoseconds
_CAPTIONS = {"caption_times": (np.float64, (2,))}
_STRINGS = ("name", "path", "text", "word")


@dataclass(frozen=True)
class Measured:
    """What an index knows of a media file. Zeros where there is no such stream, or nobody says."""

    duration: float = math.nan
    streams: int = 0
    width: int = 0
    height: int = 0
    frames_per_second: float = 0.0
    sample_rate: int = 0
    key_frames: int = 0
    key_seconds: float = 0.0


class Strings(Sequence[str]):
    """Strings in one array of bytes, decoded when asked for."""

    def __init__(self, offsets: np.ndarray, data: np.ndarray, first: int = 0, count: int = -1):
        self.offsets, self.data, self.first = offsets, data, first
        self.number = len(offsets) - 1 if count < 0 else count

    def __len__(self) -> int:
        return self.number

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> "Strings": ...
    def __getitem__(self, index: int | slice) -> "str | Strings":
        if isinstance(index, slice):
            start, stop, step = index.indices(self.number)
            if step != 1:
                raise ValueError("strings are cut in steps of 1")
            return Strings(self.offsets, self.data, self.first + start, max(0, stop - start))
        if not -self.number <= index < self.number:
            raise IndexError(f"string {index} of {self.number}")
        place = self.first + index % self.number
        start, end = self.offsets[place : place + 2].tolist()
        return self.data[start:end].tobytes().decode(errors="surrogateescape")

    @classmethod
    def of(cls, arrays: Mapping[str, np.ndarray], name: str) -> "Strings":
        return cls(arrays[f"{name}_offsets"], arrays[f"{name}_data"])


class PartBuilder:
    """Collects examples into a part, in a few bytes for each."""

    def __init__(self) -> None:
        self._columns = {
            name: array(np.dtype(kind).char) for name, (kind, _) in _all_columns().items()
        }
        self._offsets = {name: array("q", [0]) for name in (*_STRINGS, "token")}
        self._data = {name: bytearray() for name in _STRINGS}
        self._tokens, self._blocks = array("i"), array("q", [0])
        self._words: dict[str, int] = {}
        self._counts: list[int] = []
        self._files: dict[str, int] = {}
        self.problems: dict[str, str] = {}
        self.without_spaces = 0

    def __len__(self) -> int:
        return len(self._columns["in_file"])

    def add(
        self,
        name: str,
        path: str,
        *,
        file_bytes: int,
        file_time: int,
        offset: int = 0,
        size: int | None = None,
        segment: tuple[float, float] = WHOLE_FILE,
        measured: Measured = Measured(),
        captions: Iterable[Caption] = (),
    ) -> None:
        """Add an example.

        Args:
            path: the file that holds it, relative to the source's root.
            size: None: the file is the media file.
        """
        if path not in self._files:
            self._files[path] = len(self._files)
            self._string("path", path)
            self._columns["file_bytes"].append(file_bytes)
            self._columns["file_time"].append(file_time)
        self._string("name", name)
        first, count = self.add_captions(captions)
        row = {
            "in_file": self._files[path],
            "offset": offset,
            "size": file_bytes if size is None else size,
            "caption_first": first,
            "caption_count": count,
            **vars(measured),
        }
        for column, value in row.items():
            self._columns[column].append(value)
        self._columns["segment"].extend(segment)

    def add_captions(self, captions: Iterable[Caption]) -> tuple[int, int]:
        """Add captions alone. Returns where they begin, and how many they are."""
        first = len(self._offsets["text"]) - 1
        for caption in captions:
            self._columns["caption_times"].extend((caption.start, caption.end))
            self._string("text", caption.text)
            self.without_spaces += has_no_spaces(caption.text)
            for word in split_words(caption.text):
                number = self._words.setdefault(word, len(self._words))
                if number == len(self._counts):
                    self._counts.append(0)
                    self._string("word", word)
                self._counts[number] += 1
                self._tokens.append(number)
            self._offsets["token"].append(len(self._tokens))
        return first, len(self._offsets["text"]) - 1 - first

    def end_block(self) -> None:
        """The examples since the last call are a block."""
        if len(self) > self._blocks[-1]:
            self._blocks.append(len(self))

    def _string(self, column: str, text: str) -> None:
        data = self._data[column]
        data += text.encode(errors="surrogateescape")
        self._offsets[column].append(len(data))

    def finish(self) -> dict[str, np.ndarray]:
        """The part."""
        self.end_block()
        part = {
            name: np.array(self._columns[name], kind).reshape(-1, *shape)
            for name, (kind, shape) in _all_columns().items()
        }
        for name in _STRINGS:
            part[f"{name}_data"] = np.frombuffer(bytes(self._data[name]), np.uint8)
        for name, offsets in self._offsets.items():
            part[f"{name}_offsets"] = np.array(offsets, np.int64)
        part["token_data"] = np.array(self._tokens, np.int32)
        part["word_counts"] = np.array(self._counts, np.int64)
        part["blocks"] = np.array(self._blocks, np.int64)
        return part


def _all_columns() -> dict[str, tuple[Any, tuple[int, ...]]]:
    return {**_EXAMPLES, **_FILES, **_CAPTIONS}


# -- joining ---------------------------------------------------------------------------------------


def join(
    parts: Sequence[Part],
    write: Callable[[str, Iterator[np.ndarray], int, Any, tuple[int, ...]], None],
    captions: Sequence[Part] = (),
    captions_of: Callable[[str], tuple[int, int] | None] | None = None,
) -> None:
    """Put parts one behind the other, a column at a time.

    Args:
        write: ``write(column, arrays, rows, dtype, row_shape)`` takes the arrays of one column in
            order.
        captions: parts of captions alone; they come first.
        captions_of: where in ``captions`` those of an example lie, by its file's name; None where
            it has none there, and keeps its own.
    """
    spoken = [*captions, *parts]
    words, renumbered = _one_lexicon(spoken)
    counts = {name: [_rows(part, name) for part in parts] for name in ("in_file", "file_bytes")}
    texts = [_rows(part, "caption_times") for part in spoken]
    firsts = np.cumsum([0, *texts])[len(captions) :]

    def put(name: str, of: Sequence[Part], arrays: Iterator[np.ndarray]) -> None:
        kind, shape = _all_columns()[name]
        write(name, arrays, sum(_rows(part, name) for part in of), kind, shape)

    for name in (*_EXAMPLES, *_FILES):
        if name == "in_file":
            bases = np.cumsum([0, *counts["file_bytes"]])
            put(name, parts, (p["in_file"] + b for p, b in zip(parts, bases, strict=False)))
        elif name in ("caption_first", "caption_count"):
            column = ("caption_first", "caption_count").index(name)
            located = (
                _located(part, first, captions_of)[column].astype(_EXAMPLES[name][0])
                for part, first in zip(parts, firsts, strict=False)
            )
            put(name, parts, located)
        else:
            put(name, parts, (part[name] for part in parts))
    put("caption_times", spoken, (part["caption_times"] for part in spoken))
    for name, of in (("name", parts), ("path", parts), ("text", spoken)):
        sizes = [_rows(part, f"{name}_data") for part in of]
        write(f"{name}_data", (p[f"{name}_data"] for p in of), sum(sizes), np.uint8, ())
        _write_offsets(write, name, of, sizes)
    sizes = [_rows(part, "token_data") for part in spoken]
    tokens = (table[p["token_data"]] for p, table in zip(spoken, renumbered, strict=True))
    write("token_data", tokens, sum(sizes), np.int32, ())
    _write_offsets(write, "token", spoken, sizes)
    encoded = [word.encode() for word, _ in words]
    data = np.frombuffer(b"".join(encoded), np.uint8)
    write("word_data", iter([data]), len(data), np.uint8, ())
    offsets = np.cumsum([0, *map(len, encoded)])
    write("word_offsets", iter([offsets]), len(offsets), np.int64, ())
    frequencies = np.array([count for _, count in words], np.int64)
    write("word_counts", iter([frequencies]), len(frequencies), np.int64, ())
    bases = np.cumsum([0, *counts["in_file"]])
    ends = (p["blocks"][1:] + base for p, base in zip(parts, bases, strict=False))
    number = 1 + sum(_rows(part, "blocks") - 1 for part in parts)
    write("blocks", _after_zero(ends), number, np.int64, ())


def in_memory(
    parts: Sequence[Part], captions: Sequence[Part] = (), captions_of: Any = None
) -> dict[str, np.ndarray]:
    """``join`` to arrays in memory."""
    columns: dict[str, np.ndarray] = {}

    def keep(name: str, arrays: Iterator[np.ndarray], rows: int, kind: Any, shape: Any) -> None:
        found = list(arrays)
        joined = np.concatenate(found) if found else np.empty((0, *shape))
        columns[name] = joined.astype(kind, copy=False)
        assert len(columns[name]) == rows

    join(parts, keep, captions, captions_of)
    return columns


def to_files(folder: Path) -> Callable[[str, Iterator[np.ndarray], int, Any, tuple], None]:
    """``join``'s writer of .npy files."""

    def write(name: str, arrays: Iterator[np.ndarray], rows: int, kind: Any, shape: tuple) -> None:
        header = {
            "descr": np.lib.format.dtype_to_descr(np.dtype(kind)),
            "fortran_order": False,
            "shape": (rows, *shape),
        }
        with open(folder / f"{name}.npy", "wb") as file:
            np.lib.format.write_array_header_2_0(file, header)
            for values in arrays:
                np.ascontiguousarray(values, kind).tofile(file)
            file.flush()
            os.fsync(file.fileno())

    return write


class FileRows:
    """The rows of a .npy file, read anew each time. Processes may share it.

    Mapped, the captions read by a process that reads them all over would count as its memory.
    """

    def __init__(self, path: Path) -> None:
        mapped = np.load(path, mmap_mode="r")  # checks header and size
        self.dtype, self.shape, self._offset = mapped.dtype, mapped.shape, mapped.offset
        self._row_bytes = self.dtype.itemsize * math.prod(self.shape[1:])
        self._file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(self._file, 0, 0, os.POSIX_FADV_RANDOM)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            os.close(self._file)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> np.ndarray:
        start, stop, step = rows.indices(len(self))
        wanted = max(0, stop - start) * self._row_bytes
        data = os.pread(self._file, wanted, self._offset + start * self._row_bytes)
        if step != 1 or len(data) != wanted:
            raise OSError(f"{len(data)} of {wanted} bytes of an index could be read; index again")
        return np.frombuffer(data, self.dtype).reshape(-1, *self.shape[1:])


def map_files(folder: Path) -> dict[str, Any]:
    """The columns in a folder, mapped; those of captions as ``FileRows``.

    Raises:
        ValueError: one is missing or cut short.
    """
    names = [*_all_columns(), "token_data", "token_offsets", "word_counts", "blocks"]
    names += [f"{name}_{kind}" for name in _STRINGS for kind in ("offsets", "data")]
    columns: dict[str, Any] = {}
    for name in names:
        path = folder / f"{name}.npy"
        try:
            if name.startswith(("caption_times", "text_", "token_")):
                columns[name] = FileRows(path)
            else:
                # a plain array over the map: slices of np.memmap cost 10 us each
                columns[name] = np.load(path, mmap_mode="r").view(np.ndarray)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{path} is missing or damaged ({error}); delete {folder} and index again"
            ) from error
    return columns


def _one_lexicon(parts: Sequence[Part]) -> tuple[list[tuple[str, int]], list[np.ndarray]]:
    """All words with their counts, most frequent first, and each part's numbers in that list."""
    totals: Counter[str] = Counter()
    for part in parts:
        for word, count in zip(_words(part), part["word_counts"].tolist(), strict=True):
            totals[word] += count
    ranked = sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))
    number = {word: place for place, (word, _) in enumerate(ranked)}
    # read again: the words of all parts would take gigabytes
    return ranked, [np.array([number[word] for word in _words(p)], np.int32) for p in parts]


def _words(part: Part) -> list[str]:
    offsets, data = part["word_offsets"].tolist(), part["word_data"].tobytes()
    return [data[a:b].decode() for a, b in itertools.pairwise(offsets)]


def of_file(name: str, segment: Iterable[float]) -> str:
    """The name of an example without the segment's times, which those of a file's segments have."""
    start, end = segment
    return name.removesuffix(f"@{start:g}-{end:g}")


def _located(
    part: Part, first: int, captions_of: Callable[[str], tuple[int, int] | None] | None
) -> tuple[np.ndarray, np.ndarray]:
    firsts, counts = part["caption_first"] + first, part["caption_count"].copy()
    if captions_of is not None:
        names = Strings.of(part, "name")
        for row in range(len(counts)):
            if (found := captions_of(of_file(names[row], part["segment"][row]))) is not None:
                firsts[row], counts[row] = found
    return firsts, counts


def _write_offsets(write: Any, name: str, parts: Sequence[Part], sizes: Sequence[int]) -> None:
    bases = np.cumsum([0, *sizes])
    ends = (p[f"{name}_offsets"][1:] + base for p, base in zip(parts, bases, strict=False))
    rows = 1 + sum(_rows(part, f"{name}_offsets") - 1 for part in parts)
    write(f"{name}_offsets", _after_zero(ends), rows, np.int64, ())


def _after_zero(arrays: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    yield np.zeros(1, np.int64)
    yield from arrays


def _rows(part: Part, name: str) -> int:
    return len(part[name])


def cut(columns: Mapping[str, np.ndarray], block: int, apart: int = 0) -> dict[str, np.ndarray]:
    """One block of joined columns as a part, without the first ``apart`` of all captions."""
    builder = PartBuilder()
    source = ColumnSource("", "", columns)
    for index in range(*columns["blocks"][block : block + 2].tolist()):
        file = int(columns["in_file"][index])
        times, texts = source.captions(index)
        builder.add(
            source.name(index),
            Strings.of(columns, "path")[file],
            file_bytes=int(columns["file_bytes"][file]),
            file_time=int(columns["file_time"][file]),
            offset=int(columns["offset"][index]),
            size=int(columns["size"][index]),
            segment=source.segment(index),
            measured=source.measured(index),
            captions=[
                Caption(start, end, text)
                for (start, end), text in zip(times.tolist(), texts, strict=True)
                if int(columns["caption_first"][index]) >= apart
            ],
        )
    return builder.finish()


# -- the source ------------------------------------------------------------------------------------


class ColumnSource:
    """A ``Source`` over columns.

    Args:
        label: how messages call it.
        root: a folder or URL that the files' paths are relative to.
        problems: what was left out, or a file that lists it.
        content: see the property; None: it is computed where it is asked for.
        without_spaces: captions in scripts that put no spaces between words.
        unmatched: what is to be said of captions that belong to no file, or to several.
        folder: of the index that they are mapped from.
        reopen: opens that index; so another process gets the source.
    """

    def __init__(
        self,
        label: str,
        root: str,
        columns: Mapping[str, np.ndarray],
        *,
        problems: Mapping[str, str] | Path | None = None,
        identity: Identity | None = None,
        content: str | None = None,
        without_spaces: int = 0,
        unmatched: Sequence[str] = (),
        folder: Path | None = None,
        reopen: Callable[[Path], "ColumnSource"] | None = None,
    ) -> None:
        self.label, self.root, self.columns = label, root, columns
        self.folder, self._reopen = folder, reopen
        self.without_spaces, self.unmatched = without_spaces, tuple(unmatched)
        self._problems: Mapping[str, str] | Path = problems or {}
        self._identity, self._content = identity, content
        self._names, self._paths = Strings.of(columns, "name"), Strings.of(columns, "path")
        self._texts = Strings.of(columns, "text")
        self._has: Modalities | None = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._reopen is None:
            return super().__reduce_ex__(protocol)
        return self._reopen, (self.folder,)

    def __len__(self) -> int:
        return len(self.columns["in_file"])

    def name(self, index: int) -> str:
        return self._names[index]

    def place(self, index: int) -> Place:
        file = int(self.columns["in_file"][index])
        path = self._paths[file]
        if "://" not in path:
            path = f"{self.root}/{path}" if "://" in self.root else os.path.join(self.root, path)
        offset, size = int(self.columns["offset"][index]), int(self.columns["size"][index])
        stamp = int(self.columns["file_bytes"][file]), int(self.columns["file_time"][file])
        if offset == 0 and size == stamp[0]:
            return Place(path, self.name(index))
        return Place(path, self.name(index), offset, size, stamp)

    def segment(self, index: int) -> tuple[float, float]:
        start, end = self.columns["segment"][index].tolist()
        return start, end

    def duration(self, index: int) -> float:
        return float(self.columns["duration"][index])

    def measured(self, index: int) -> Measured:
        return Measured(
            **{name: self.columns[name][index].item() for name in Measured.__dataclass_fields__}
        )

    def captions(self, index: int) -> Captions:
        first, count = self._captions_at(index)
        times = self.columns["caption_times"][first : first + count]
        return Captions(times, self._texts[first : first + count])

    def _captions_at(self, index: int) -> tuple[int, int]:
        columns = self.columns
        return int(columns["caption_first"][index]), int(columns["caption_count"][index])

    def encode(self, vocabulary: Vocabulary, words: int) -> Callable[[int], np.ndarray]:
        if words < 1:
            raise ValueError(f"words is {words}; a text has room for at least 1 word")
        numbers = [vocabulary.number_of.get(word, UNKNOWN_ID) for word in _words(self.columns)]
        return _Words(self, np.array(numbers, np.int32), words)

    def word_counts(self) -> Iterator[tuple[str, int]]:
        counts = self.columns["word_counts"].tolist()
        return zip(_words(self.columns), counts, strict=True)

    @property
    def has(self) -> Modalities:
        if self._has is None:
            streams = np.bitwise_or.reduce(self.columns["streams"], initial=0)
            text = bool(self.columns["caption_count"].any())
            self._has = Modalities(bool(streams & (VIDEO | IMAGE)), bool(streams & AUDIO), text)
        return self._has

    @property
    def blocks(self) -> np.ndarray:
        return self.columns["blocks"]

    @property
    def problems(self) -> Mapping[str, str]:
        if isinstance(self._problems, Path):
            self._problems = dict(json.loads(self._problems.read_text(encoding="utf-8")))
        return self._problems

    @property
    def identity(self) -> Identity:
        if self._identity is None:
            self._identity = self._identify()
        return self._identity

    @property
    def content(self) -> str:
        """A digest of the last parts of names, of sizes and segments: not of where files lie."""
        if self._content is None:
            self._content = self._digest(lambda name: name.rpartition("/")[2])
        return self._content

    def _digest(self, shown: Callable[[str], str]) -> str:
        """Of the examples' names, of which ``shown`` makes what counts, sizes and segments."""
        digest = hashlib.sha256()
        for index, size in enumerate(self.columns["size"].tolist()):
            segment = self.segment(index)
            part = "" if segment == WHOLE_FILE else f"\0{segment[0]}\0{segment[1]}"
            line = f"{shown(self.name(index))}\0{size}{part}\n"
            digest.update(line.encode(errors="surrogateescape"))
        return digest.hexdigest()

    def _identify(self) -> Identity:
        columns, texts = self.columns, hashlib.sha256()
        said = columns["caption_count"].any()
        for index in range(len(self) if said else 0):
            first, count = self._captions_at(index)
            offsets = columns["text_offsets"][first : first + count + 1]
            texts.update(columns["caption_times"][first : first + count].tobytes())
            texts.update(np.diff(offsets).tobytes())
            texts.update(columns["text_data"][offsets[0] : offsets[-1]].tobytes())
        captions = CONTENT + texts.hexdigest() if said else ""
        total = int(columns["size"].sum())
        return Identity(len(self), total, self._digest(str), captions)


class _Words:
    """Rows of word numbers, looked up in the words of a source."""

    def __init__(self, source: ColumnSource, numbers: np.ndarray, words: int) -> None:
        self.source, self.numbers, self.words = source, numbers, words

    def __call__(self, index: int) -> np.ndarray:
        columns = self.source.columns
        first, count = self.source._captions_at(index)
        rows = np.zeros((count, self.words), np.int32)
        if count:
            offsets = np.array(columns["token_offsets"][first : first + count + 1])
            tokens = columns["token_data"][offsets[0] : offsets[-1]]
            places = np.arange(self.words)
            kept = places < np.diff(offsets)[:, None]
            rows[kept] = self.numbers[tokens[(offsets[:-1, None] - offsets[0] + places)[kept]]]
        return rows
