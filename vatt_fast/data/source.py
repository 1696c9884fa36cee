"""What a source of clips is: names, places of bytes, segments, captions. Nothing is decoded here.

An example is one media file or a segment of one, with its captions. ``sources.open_source`` makes a
``Source`` of a folder, a manifest, tar shards, an index of them, or several of these.
"""

import bisect
import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np

from .text import Vocabulary

WHOLE_FILE = (0.0, math.inf)
CONTENT = "content:"  # how the digest of captions begins, wherever they were read from


@dataclass(frozen=True)
class Place:
    """Where the bytes of one media file lie: in a file of its own, or in a part of one.

    Args:
        path: a local path, or a URL that fsspec opens ("s3://bucket/00012.tar").
        name: how messages call the media file; its suffix tells its kind.
        offset: the first byte.
        size: how many bytes; None: up to the end of the file.
        stamp: bytes of the whole file, and when it was changed in nanoseconds, as an index noted
            them; None: not noted.
    """

    path: str
    name: str
    offset: int = 0
    size: int | None = None
    stamp: tuple[int, int] | None = None

    @property
    def is_remote(self) -> bool:
        return "://" in self.path

    @property
    def is_part(self) -> bool:
        """Whether other bytes lie around, as in a tar."""
        return self.offset > 0 or self.size is not None


class Captions(NamedTuple):
    """The captions of one example, in the order of their source.

    Args:
        times: (n, 2) float64, start and end of each in seconds of the media file; the end is inf
            where a caption has no times of its own and belongs to the whole file.
        texts: n sentences; they may be read only when asked for.
    """

    times: np.ndarray
    texts: Sequence[str]


class Modalities(NamedTuple):
    """What the examples of a source may have. False: none of them has any."""

    video: bool
    audio: bool
    text: bool


class Identity(NamedTuple):
    """What a source holds, for telling later whether it is still the same."""

    files: int  # examples
    bytes: int  # of their media
    digest: str  # of names, sizes and segments
    captions: str  # of all captions; "" without


@runtime_checkable
class Source(Protocol):
    """Examples numbered from 0, in an order that is the same wherever the source is opened.

    Sources are immutable once open, take little memory a process, and can be pickled.
    """

    label: str  # how messages call it

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """As shown to users, unique within the source: "talk.wav", "00012.tar/000012345.mp4"."""
        ...

    def place(self, index: int) -> Place: ...

    def segment(self, index: int) -> tuple[float, float]:
        """Start and end in seconds of the media file; the end may be inf. Windows lie within."""
        ...

    def duration(self, index: int) -> float:
        """Seconds of the whole media file; nan where no index has measured it."""
        ...

    def captions(self, index: int) -> Captions: ...

    def encode(self, vocabulary: Vocabulary, words: int) -> Callable[[int], np.ndarray]:
        """A function of an example's number that gives (n, words) int32, as Vocabulary.encode.

        Rows are in the order of ``captions``. The function can be pickled.
        """
        ...

    def word_counts(self) -> Iterator[tuple[str, int]]:
        """Every word of the captions once, with how often it occurs."""
        ...

    @property
    def has(self) -> Modalities: ...

    @property
    def blocks(self) -> np.ndarray:
        """(S + 1,) int64: the first example of each block, and last the number of examples.

        The examples of a block lie one behind the other in one file, a shard. In a folder every
        file is a block.
        """
        ...

    @property
    def problems(self) -> Mapping[str, str]:
        """Files and members that were left out, by name, each with the reason."""
        ...

    @property
    def identity(self) -> Identity: ...


class MixedSource:
    """Several sources one behind the other, each with its share of the clips.

    Example ``i`` of source ``k`` has the number ``starts[k] + i``. Names begin with their source's
    label, which is unique.

    Args:
        parts: sources and weights. None: a weight in proportion to the source's length.

    Attributes:
        sources: the sources, in order.
        starts: (K + 1,) int64, each source's first number, and last the number of examples.
        weights: (K,) float64, shares of the clips; their sum is 1.

    Raises:
        ValueError: no source, an empty one, or weights that are no shares.
    """

    def __init__(self, parts: Sequence[tuple[Source, float | None]]) -> None:
        if not parts:
            raise ValueError("no source to mix; name at least one")
        for source, weight in parts:
            if not len(source):
                raise ValueError(f"{source.label} has no media; leave it out")
            if weight is not None and not (weight > 0 and math.isfinite(weight)):
                raise ValueError(f"{source.label} has weight {weight:g}; weights are above 0")
        given = [weight is not None for _, weight in parts]
        if any(given) and not all(given):
            bare = parts[given.index(False)][0].label
            raise ValueError(f"{bare} has no weight and others do; give every source one, or none")
        self.sources = tuple(source for source, _ in parts)
        self.starts = np.cumsum([0, *map(len, self.sources)], dtype=np.int64)
        shares = np.array(
            [len(source) if weight is None else weight for source, weight in parts], np.float64
        )
        self.weights = shares / shares.sum()
        self.label = ",".join(source.label for source in self.sources)
        self._labels = _unique([source.label for source in self.sources])
        self._starts = self.starts.tolist()

    def locate(self, index: int) -> tuple[int, int]:
        """The number of an example's source, and its number there."""
        if not 0 <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        number = bisect.bisect_right(self._starts, index) - 1
        return number, index - self._starts[number]

    def _of(self, index: int) -> tuple[Source, int]:
        number, within = self.locate(index)
        return self.sources[number], within

    def __len__(self) -> int:
        return self._starts[-1]

    def name(self, index: int) -> str:
        number, within = self.locate(index)
        return f"{self._labels[number]}/{self.sources[number].name(within)}"

    def place(self, index: int) -> Place:
        source, within = self._of(index)
        return source.place(within)

    def segment(self, index: int) -> tuple[float, float]:
        source, within = self._of(index)
        return source.segment(within)

    def duration(self, index: int) -> float:
        source, within = self._of(index)
        return source.duration(within)

    def captions(self, index: int) -> Captions:
        source, within = self._of(index)
        return source.captions(within)

    def encode(self, vocabulary: Vocabulary, words: int) -> Callable[[int], np.ndarray]:
        return _MixedWords(self, [each.encode(vocabulary, words) for each in self.sources])

    def word_counts(self) -> Iterator[tuple[str, int]]:
        counts: Counter[str] = Counter()
        for source in self.sources:
            for word, count in source.word_counts():
                counts[word] += count
        return iter(counts.items())

    @property
    def has(self) -> Modalities:
        return Modalities(*map(any, zip(*(each.has for each in self.sources), strict=True)))

    @property
    def blocks(self) -> np.ndarray:
        firsts = [
            each.blocks[:-1] + start
            for each, start in zip(self.sources, self._starts, strict=False)
        ]
        return np.concatenate([*firsts, self.starts[-1:]])

    @property
    def problems(self) -> Mapping[str, str]:
        return {
            f"{label}/{name}": reason
            for label, source in zip(self._labels, self.sources, strict=True)
            for name, reason in source.problems.items()
        }

    @property
    def identity(self) -> Identity:
        each = [source.identity for source in self.sources]
        captions = [one.captions for one in each]
        return Identity(
            sum(one.files for one in each),
            sum(one.bytes for one in each),
            digest_of(one.digest for one in each),
            CONTENT + digest_of(captions) if any(captions) else "",
        )

    @property
    def content(self) -> str:
        return digest_of(content_of(source) for source in self.sources)


def content_of(source: Source) -> str:
    """A digest of what a source's examples are, the same wherever they lie, in a folder or tars.

    For a source of another kind it is its ``identity``'s.
    """
    return getattr(source, "content", None) or source.identity.digest


def shares_of(source: Source) -> str:
    """The weights of several sources in six digits: "0.7 0.3"; "" of one source."""
    return " ".join(f"{weight:.6g}" for weight in getattr(source, "weights", ()))


class _MixedWords:
    def __init__(self, mixed: MixedSource, each: list[Callable[[int], np.ndarray]]) -> None:
        self.mixed, self.each = mixed, each

    def __call__(self, index: int) -> np.ndarray:
        number, within = self.mixed.locate(index)
        return self.each[number](within)


def digest_of(parts: Iterator[str] | Sequence[str]) -> str:
    """One SHA-256 of several texts, in order."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(f"{part}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _unique(labels: Sequence[str]) -> list[str]:
    """The labels, numbered where several are the same."""
    counts = Counter(labels)
    seen: Counter[str] = Counter()
    numbered = []
    for label in labels:
        seen[label] += 1
        numbered.append(f"{label}#{seen[label]}" if counts[label] > 1 else label)
    return numbered
