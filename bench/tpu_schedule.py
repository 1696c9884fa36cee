"""Read libtpu's final schedule of a kernel: instruction bundles, matrix rows, and their loops.

A bundle takes at least a cycle. A ``vmatmul`` streams 16 rows past a weight that stays put (8 of
fp32 and with ``.8``), one
cycle a row on four units of 128 x 128, two rows a cycle on two of 256 x 256: 4 (2)
cycles with all units busy. A schedule may place them closer than that, and the hardware then waits.
So cycles are at least max(bundles, row cycles). Waits for memory are in neither.
"""

import re
from dataclasses import dataclass, field
from typing import NamedTuple

_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:[LPC][A-Z])? *: *[> ]*\{", re.M)
_BRANCH = re.compile(r"sbr\.rel \(!?%(\w+)\) target = \$region(\d+)")
_DELAY_SLOTS = 4
_EXIT = re.compile(r"%(\w+) = scmp\.ge\.s32\.totalorder (?:\(!?%\w+\), )?%\w+, (\d+) ")
_EIGHT = re.compile(r"\.(8|f32)\.")  # a register holds 8 rows of fp32, 16 of bf16
_ROWS = re.compile(r"\bvmatmul\.[\w.]+")


class Cycles(NamedTuple):
    """Of a kernel's whole call."""

    bundles: int
    rows: int

    @property
    def floor(self) -> int:
        return max(self)


@dataclass
class Loop:
    """A loop of a schedule; every branch inside counts as taken.

    ``trips`` is 1 and ``counted`` False where the count is known at run time only.
    """

    first: int
    last: int
    trips: int = 1
    counted: bool = True
    bundles: int = 0  # of its own, outside the loops within
    rows: int = 0
    inside: list["Loop"] = field(default_factory=list)

    def cycles(self) -> Cycles:
        parts = [Cycles(self.bundles, self.rows), *(loop.cycles() for loop in self.inside)]
        return Cycles(*(self.trips * sum(each) for each in zip(*parts, strict=True)))

    def once(self) -> int:
        """Bundles in all, a loop's body counted once."""
        return self.bundles + sum(loop.once() for loop in self.inside)

    def __str__(self) -> str:
        """Bundles, for example "64 x (74 + 2 x 3106)"."""
        own = [str(self.bundles)] if self.bundles or not self.inside else []
        text = " + ".join([*own, *map(str, self.inside)])
        if self.trips == 1 and self.counted:
            return text
        return f"{self.trips if self.counted else '?'} x {f'({text})' if self.inside else text}"


def read(text: str) -> Loop:
    """The whole of a ``final_bundles.txt``, as a loop of one trip."""
    starts = [found.start() for found in _BUNDLE.finditer(text)]
    bundles = [text[a:b] for a, b in zip(starts, [*starts[1:], len(text)], strict=True)]
    whole = Loop(0, len(bundles) - 1)
    open_loops = [whole]
    for loop in sorted(_loops(bundles), key=lambda loop: (loop.first, -loop.last)):
        while loop.first > open_loops[-1].last:
            open_loops.pop()
        open_loops[-1].inside.append(loop)
        open_loops.append(loop)
    for at, bundle in enumerate(bundles):
        here = whole
        while deeper := [loop for loop in here.inside if loop.first <= at <= loop.last]:
            (here,) = deeper
        here.bundles += 1
        here.rows += sum(2 if _EIGHT.search(each) else 4 for each in _ROWS.findall(bundle))
    return whole


def _loops(bundles: list[str]) -> list[Loop]:
    """Every branch back to a region's start; it ends with the region."""
    regions: dict[str, list[int]] = {}
    for at, bundle in enumerate(bundles):
        for mark in re.findall(r"region (\d+)", bundle):
            regions.setdefault(mark, []).append(at)
    exits = {name: int(count) for name, count in _EXIT.findall("".join(bundles))}
    loops = []
    for at, bundle in enumerate(bundles):
        for predicate, target in _BRANCH.findall(bundle):
            first, last = regions[target][0], regions[target][-1]
            if first > at:
                continue
            last = min(max(last, at + _DELAY_SLOTS), len(bundles) - 1)
            trips = exits.get(predicate, 1)
            if "iteration index, stage" in bundles[first] and trips > 2:
                trips -= 2  # the grid's: its pipeline fills and drains around the steps
            loops.append(Loop(first, last, trips, predicate in exits))
    return loops
