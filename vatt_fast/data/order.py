"""Which example each row of each step holds: a pure function of seed, step and global batch.

Nothing is kept between steps, so a run goes on from any step, on any number of processes. A step
costs its rows: no list of all examples is made, however many there are.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

# Of the rules in this file. A run that began under other rules goes on with other clips.
VERSION = 2
# One stream of random numbers for each decision: a new decision must not change the old ones.
_EXAMPLES, WINDOWS, _UNUSED, OTHER_CAPTIONS, _BLOCKS = range(5)
_ROUNDS = 90
# Blocks are shuffled; then examples are, within groups of at least so many blocks and batches.
_OPEN_BLOCKS = 8
_OPEN_BATCHES = 8
# Weights are rounded to so many parts: after so many rows each source has given its exact share.
_PARTS = 10_000


def random_bits(count: int, *key: int) -> np.ndarray:
    """(count,) uint64, the same for the same key on every platform and with every NumPy.

    NumPy guarantees the streams of both parts; those of Generator may change.
    """
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(count)


def uniform(count: int, *key: int) -> np.ndarray:
    """(count,) float64 in [0, 1)."""
    return (random_bits(count, *key) >> np.uint64(11)) * 2.0**-53


class Shuffle:
    """A random permutation of ``range(count)`` that is computed element by element.

    The swap-or-not shuffle (Hoang, Morris and Rogaway, CRYPTO 2012): in each round x and turn - x
    change places, or not, by one bit of a hash of the larger of them.
    """

    def __init__(self, count: int, *key: int):
        bits = random_bits(2 * _ROUNDS, *key)
        self.count = count
        self._turns = (bits[:_ROUNDS] % np.uint64(count)).astype(np.int64)
        self._salts = bits[_ROUNDS:]

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """Where ``places``, int64 below ``count``, go."""
        return self._run(places, range(_ROUNDS))

    def inverse(self, places: np.ndarray) -> np.ndarray:
        """What went to ``places``."""
        return self._run(places, reversed(range(_ROUNDS)))

    def _run(self, places: np.ndarray, rounds: Sequence[int] | Iterator[int]) -> np.ndarray:
        x = np.asarray(places, np.int64)
        for number in rounds:
            other = self._turns[number] - x
            other += self.count * (other < 0)
            larger = np.maximum(x, other).astype(np.uint64)
            swap = _mix(larger ^ self._salts[number]) >> np.uint64(63)
            x = np.where(swap.astype(bool), other, x)
        return x


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Blocks:
    """A source's examples in the order of one epoch.

    Examples of one block lie one behind the other in one file. The blocks are shuffled and opened
    group by group; the examples of a group are shuffled. Where a group holds every block, or every
    block one example, that is a shuffle of everything.

    Args:
        blocks: (S + 1,) int64, the first example of each block, and last the number of examples.
        together: the fewest examples that a group should hold.
    """

    def __init__(self, blocks: np.ndarray, together: int, seed: int, epoch: int, source: int):
        self._key = (seed, _EXAMPLES, epoch, source)
        count, size = len(blocks) - 1, int(blocks[-1])
        open_blocks = max(_OPEN_BLOCKS, -(-together * count // size))
        groups = 1 if count == size else max(1, count // open_blocks)
        if groups == 1:
            self._all: Shuffle | None = Shuffle(size, *self._key)
            return
        self._all = None
        order = np.argsort(random_bits(count, seed, _BLOCKS, epoch, source), kind="stable")
        self._first = np.asarray(blocks[:-1])[order]  # example of each block, as they come
        self._begins = np.concatenate([[0], np.cumsum(np.diff(blocks)[order])])  # their places
        self._ends = self._begins[np.arange(1, groups + 1) * count // groups]
        self._group = functools.lru_cache(4)(self._shuffle)

    def _shuffle(self, group: int) -> Shuffle:
        begin = int(self._ends[group - 1]) if group else 0
        return Shuffle(int(self._ends[group]) - begin, *self._key, group)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        """The examples at these places of the epoch, int64."""
        if self._all is not None:
            return self._all(places)
        groups = np.searchsorted(self._ends, places, side="right")
        shuffled = np.empty(len(places), np.int64)
        for group in np.unique(groups):
            here = groups == group
            begin = self._ends[group - 1] if group else 0
            shuffled[here] = begin + self._group(int(group))(places[here] - begin)
        block = np.searchsorted(self._begins, shuffled, side="right") - 1
        return self._first[block] + shuffled - self._begins[block]


class _Span(NamedTuple):
    """The rows that one source gives to a step."""

    epoch: int
    begin: int  # place of the first one in the epoch
    rows: np.ndarray  # which rows of the batch they are


class Order:
    """The examples of every step.

    Every source runs through its own epochs: each example comes once in one, in a new order. The
    examples that do not fill an epoch's last batch sit that epoch out. A batch holds no example
    twice, unless it takes more of a source than there are.

    Args:
        blocks: of each source, as ``Source.blocks``.
        weights: each source's share of the rows; their sum is 1.
        rows: of a batch, over all ranks.

    Raises:
        ValueError: a share that is too small to give a row in 10000.
    """

    def __init__(
        self, blocks: Sequence[np.ndarray], weights: Sequence[float], rows: int, seed: int
    ):
        self.rows, self.seed = rows, seed
        self.counts = [int(one[-1]) for one in blocks]
        self.starts = np.cumsum([0, *self.counts])
        # a source of single files needs its length only
        self._blocks = [
            np.array([0, one[-1]]) if len(one) - 1 == one[-1] else np.asarray(one) for one in blocks
        ]
        self._source_of, self._before = _interleaved(weights)
        self.epoch_steps = [self._steps_of(source) for source in range(len(blocks))]
        self._epoch = functools.lru_cache(2 * len(blocks) + 2)(self._new_epoch)
        self._span = functools.lru_cache(4 * len(blocks))(self._new_span)
        self._step = functools.lru_cache(2)(self._new_step)

    def __reduce__(self):  # without what is remembered
        weights = np.diff(self._before[:, [0, -1]])[:, 0] / self._before[:, -1].sum()
        return Order, (self._blocks, weights, self.rows, self.seed)

    @property
    def steps_per_epoch(self) -> int:
        """Of the source whose epochs are longest."""
        return max(1, *self.epoch_steps)

    def __call__(self, step: int) -> np.ndarray:
        """(rows,) int64, the examples of all ranks' batch; sources are numbered one after another.

        Rank r of W has rows ``r * rows // W`` and on.
        """
        return self._step(step)

    def _new_step(self, step: int) -> np.ndarray:
        examples = np.empty(self.rows, np.int64)
        for source in range(len(self.counts)):
            span = self._span(source, step)
            if len(span.rows):
                examples[span.rows] = self._examples(source, span, np.arange(len(span.rows)))
        return examples

    def source_of(self, step: int, row: int) -> int:
        return int(self._source_of[(step * self.rows + row) % len(self._source_of)])

    def rows_of(self, step: int, source: int) -> np.ndarray:
        """The rows of a step that a source gives."""
        return self._span(source, step).rows

    def stand_ins(self, step: int, row: int) -> Iterator[int]:
        """Examples of the same source that may take a row's place, in order.

        They are those that come next in the epoch, dealt out to the rows: no other row of any rank
        is given one of them, and the batch holds none. Where a batch takes all of a source, every
        example may.
        """
        source = self.source_of(step, row)
        span, count = self._span(source, step), self.counts[source]
        place, rows = int(np.searchsorted(span.rows, row)), len(span.rows)
        if not self.epoch_steps[source]:
            epochs, begin = divmod(span.begin + place, count)
            span, place, rows = span._replace(epoch=span.epoch + epochs, begin=begin), 0, 1
        return self._from(source, span, range(place + rows, count, rows))

    def others(self, step: int, source: int) -> Iterator[int]:
        """All examples of a source that a step does not hold, in the epoch's order."""
        span = self._span(source, step)
        return self._from(source, span, range(len(span.rows), self.counts[source]))

    def all(self, step: int, source: int) -> Iterator[int]:
        """All examples of a source, from a step's first one on."""
        return self._from(source, self._span(source, step), range(self.counts[source]))

    def _from(self, source: int, span: _Span, offsets: range) -> Iterator[int]:
        """The examples so far behind a span's first place, round the end of its epoch."""
        epoch = self._epoch(source, span.epoch)
        for first in range(0, len(offsets), 16):  # many at once cost what one does
            places = (span.begin + np.array(offsets[first : first + 16])) % self.counts[source]
            yield from (self.starts[source] + epoch(places)).tolist()

    def _examples(self, source: int, span: _Span, offsets: np.ndarray) -> np.ndarray:
        count = self.counts[source]
        places = span.begin + offsets
        found = np.empty(len(places), np.int64)
        # a batch that takes more than there is holds several epochs
        for epoch in np.unique(places // count):
            here = places // count == epoch
            found[here] = self._epoch(source, span.epoch + int(epoch))(places[here] % count)
        return self.starts[source] + found

    def _new_span(self, source: int, step: int) -> _Span:
        first, past = self._given(source, step), self._given(source, step + 1)
        numbers = (step * self.rows + np.arange(self.rows)) % len(self._source_of)
        rows = np.flatnonzero(self._source_of[numbers] == source)
        assert len(rows) == past - first
        if steps := self.epoch_steps[source]:
            epoch = step // steps
            return _Span(epoch, first - self._given(source, epoch * steps), rows)
        return _Span(*divmod(first, self.counts[source]), rows)

    def _given(self, source: int, step: int) -> int:
        """How many rows a source gives before a step."""
        before = self._before[source]
        periods, rest = divmod(step * self.rows, len(before) - 1)
        return periods * int(before[-1]) + int(before[rest])

    def _steps_of(self, source: int) -> int:
        """How many steps every epoch has room for, wherever it begins; 0: not one."""
        before, count = self._before[source], self.counts[source]
        period, share = len(before) - 1, int(before[-1])
        steps = count * period // (share * self.rows)
        while steps:
            periods, rest = divmod(steps * self.rows, period)
            around = np.concatenate([before, share + before[1 : rest + 1]])
            if periods * share + int((around[rest:] - before[: len(around) - rest]).max()) <= count:
                break
            steps -= 1
        return steps

    def _new_epoch(self, source: int, epoch: int) -> Blocks:
        rows = self.rows * int(self._before[source, -1]) // len(self._source_of)
        together = _OPEN_BATCHES * max(1, rows)
        return Blocks(self._blocks[source], together, self.seed, epoch, source)


def _interleaved(weights: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Which source gives each of a period of rows, and how many each gave before (K, period + 1).

    Each row goes to the source that lags most behind its share.
    """
    if len(weights) == 1:
        return np.zeros(1, np.int64), np.array([[0, 1]])
    shares = np.asarray(weights, np.float64) * _PARTS
    parts = np.floor(shares).astype(np.int64)
    parts[np.argsort(parts - shares, kind="stable")[: _PARTS - parts.sum()]] += 1
    if not parts.all():
        number = int(np.argmin(parts))
        raise ValueError(
            f"source {number + 1} has a share of {weights[number]:.2g} of the clips; it gets at "
            f"least 1 in {_PARTS}: raise its weight or leave it out"
        )
    parts //= np.gcd.reduce(parts)
    period = int(parts.sum())
    given = np.zeros(len(parts), np.int64)
    before = np.zeros((len(parts), period + 1), np.int64)
    source_of = np.zeros(period, np.int64)
    for row in range(period):
        chosen = int(np.argmax(parts * (row + 1) - given * period))
        source_of[row] = chosen
        given[chosen] += 1
        before[:, row + 1] = given
    return source_of, before
