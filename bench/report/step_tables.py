"""Whole steps by drop rate in the layout of the paper's Tables 5 and 6: drop rates as columns."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bench.lines import Line, number, times

from .tables import Shown, Table, grouped, step

# (configuration, drop rate) -> forward GFLOPs of a clip, ``steps.GFLOPs``; None: unknown
Flops = Callable[[str, float], Any]

MODES = {"fwd+bwd": "training step", "fwd": "inference"}
_COLUMNS = (75, 50, 25, 0)  # the paper's drop rates, and its order


class Group(NamedTuple):
    """What can be compared: one configuration on one machine, at one batch and in one dtype."""

    configuration: str
    machine: tuple[str, str]
    dtype: str
    batch: int
    features: bool
    shown: Sequence[Shown]

    @property
    def title(self) -> str:
        tail = ", features of all tokens" if self.features else ""
        return f"{self.configuration}, {self.dtype}, batch {self.batch}{tail}"

    @property
    def stem(self) -> str:
        tail = "_features" if self.features else ""
        return f"{self.configuration}_{self.dtype}_b{self.batch}{tail}"

    @property
    def percents(self) -> list[int]:
        found = {_percent(each.line) for each in self.shown}
        return [*_COLUMNS, *sorted(found - set(_COLUMNS), reverse=True)]

    def backends(self, mode: str) -> list[str]:
        """Ours first."""
        here = [each.line for each in self.shown if each.line.mode == mode]
        return list(
            dict.fromkeys(line.backend for line in sorted(here, key=lambda line: not line.ours))
        )

    def at(self, mode: str, backend: str) -> dict[int, Shown]:
        """By drop rate in percent."""
        return {
            _percent(each.line): each
            for each in self.shown
            if (each.line.mode, each.line.backend) == (mode, backend)
        }


def _percent(line: Line) -> int:
    at = step(line)
    assert at
    return at.percent


def groups(shown: Iterable[Shown]) -> list[Group]:
    def key(line: Line) -> Group:
        at = step(line)
        assert at
        return Group(at.configuration, line.machine, line.dtype, at.batch, at.features, shown=())

    return [group._replace(shown=members) for group, members in grouped(shown, key).items()]


def gflops(group: Group, flops: Flops) -> dict[int, Any]:
    """By drop rate in percent, where they are known."""
    found = {percent: flops(group.configuration, percent / 100) for percent in group.percents}
    return {percent: each for percent, each in found.items() if each is not None}


def _heading(group: Group) -> list[str]:
    return [f"{percent} %" for percent in group.percents]


# -- one configuration, everything ------------------------------------------------------------


def table(group: Group, flops: Flops) -> Table:
    """GFLOPs, then for training and inference time, speed and memory of every contender."""

    def row(first: str, second: str, cells: Mapping[int, str]) -> list[str]:
        return [first, second, *(cells.get(percent, "") for percent in group.percents)]

    counted = gflops(group, flops)
    published = {p: f"{each.published:.1f}" for p, each in counted.items() if each.published}
    rows = [row("GFLOPs of a clip, forward", "published", published)]
    for field, name in _COUNTS.items():
        rows.append(row(" ", name, {p: number(getattr(e, field)) for p, e in counted.items()}))
    for mode, name in MODES.items():
        block = _block(group, mode)
        rows += [row(name if i == 0 else " ", what, cells) for i, (what, cells) in enumerate(block)]
    return Table.of(group.title, [" ", "drop rate", *_heading(group)], rows, group.shown)


_COUNTS = {
    "convention": "by the paper's convention",
    "true": "true, features of all tokens",
    "timed": "true, as timed: AGG alone at the end",
}


def _block(group: Group, mode: str) -> list[tuple[str, dict[int, str]]]:
    """(what, by drop rate): times of all, speeds of ours, memory of all."""
    found = {backend: group.at(mode, backend) for backend in group.backends(mode)}
    ours = {b for b, by in found.items() if any(each.line.ours for each in by.values())}
    titles = {backend: f"**{backend}**" if backend in ours else backend for backend in found}
    block = []
    for b, by in found.items():
        marked = {p: each.mark(number(each.line.ms_p50)) for p, each in by.items()}
        block.append((f"{titles[b]}, ms", marked))
    for b in (each for each in found if each in ours):
        block += [(f"{titles[b]} {what}", _cells(found[b], cell)) for what, cell in _OURS.items()]
    for b in found:
        sizes = _cells(found[b], lambda line: _mebibytes(line.peak_bytes))
        block.append((f"{titles[b]}, peak MiB", sizes))
    for b in list(found)[:1]:  # later ones inherit what those before them leave in the process
        resident = _cells(found[b], lambda line: _mebibytes(line.peak_resident))
        if any(resident.values()):
            block.append((f"{titles[b]}, process MiB", resident))
    return block


def _cells(by_percent: Mapping[int, Shown], cell: Callable[[Line], str]) -> dict[int, str]:
    return {percent: cell(each.line) for percent, each in by_percent.items()}


def _mebibytes(size: int | None) -> str:
    return "" if size is None else number(size / 2**20)


def _speedup(line: Line) -> str:
    who = f" ({line.best_peer})" if line.best_peer else ""
    ratio = times(line.speedup_over_best_peer)
    return f"{ratio}{who}" if ratio else ""


_OURS: dict[str, Callable[[Line], str]] = {
    "over best peer": _speedup,
    "clips/s": lambda line: "" if line.clips_per_second is None else number(line.clips_per_second),
    "TFLOP/s": lambda line: "" if line.tflops is None else number(line.tflops),
}


# -- all configurations, in short -------------------------------------------------------------


def summary(found: Sequence[Group], flops: Flops) -> Table:
    """Three rows a configuration, for groups of one machine: GFLOPs, training and inference."""
    percents = sorted({percent for group in found for percent in group.percents}, reverse=True)
    rows = []
    for group in found:
        block: dict[str, Mapping[int, str]] = {}
        if counted := gflops(group, flops):
            block["GFLOPs of a clip, forward, as timed (published)"] = {
                p: f"{number(each.timed)}{f' ({each.published:.1f})' if each.published else ''}"
                for p, each in counted.items()
            }
        for mode, name in MODES.items():
            if group.backends(mode):
                block[f"{name}, ms"] = {p: _duel(group, mode, p) for p in percents}
        for i, (what, cells) in enumerate(block.items()):
            title = group.title if i == 0 else " "
            rows.append([title, what, *(cells.get(percent, "") for percent in percents)])
    headings = ["configuration", "drop rate", *(f"{percent} %" for percent in percents)]
    shown = [each for group in found for each in group.shown]
    return replace(Table.of("Drop rate", headings, rows, shown), commands=())


def _duel(group: Group, mode: str, percent: int) -> str:
    """The fastest of ours in bold, the best peer and how they compare."""
    here = [
        by[percent]
        for backend in group.backends(mode)
        if percent in (by := group.at(mode, backend))
    ]
    ours, theirs = (
        sorted((e for e in here if e.line.ours is mine), key=lambda e: e.line.ms_p50)
        for mine in (True, False)
    )
    texts = (
        [ours[0].mark(f"**{ours[0].line.backend} {number(ours[0].line.ms_p50)}**")] if ours else []
    )
    if ours and ours[0].line.best_peer and ours[0].line.best_peer_ms_p50:  # of the same process
        texts.append(f"{ours[0].line.best_peer} {number(ours[0].line.best_peer_ms_p50)}")
    elif theirs:
        texts.append(theirs[0].mark(f"{theirs[0].line.backend} {number(theirs[0].line.ms_p50)}"))
    ratio = ours[0].line.speedup_over_best_peer if ours else None
    return ", ".join(texts if ratio is None else [*texts, f"{ratio:.2f}x"])
