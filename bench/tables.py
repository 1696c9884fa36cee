"""Result lines as the report shows them: which line speaks for a measurement, the command that measures it again, and tables with both."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from vatt_fast.config import PRESETS, SHORT_NAMES

from . import results
from .results import Line, number
from .selection import select
from .setting import AUTO

NONE, STALE = "\N{EN DASH}", "\N{DAGGER}"


class Shown(NamedTuple):
    """A line, and why it no longer speaks of this code, where it does not."""

    line: Line
    stale: str | None = None

    def mark(self, text: str) -> str:
        return f"{text} {STALE}" if self.stale else text


def current(lines: Iterable[Line]) -> list[Shown]:
    """One line a measurement: the last that is not stale; where all are, the last."""
    found: dict[tuple, Shown] = {}
    for line in lines:
        key = (line.op, line.case, line.dtype, line.mode, line.backend, line.device)
        new = Shown(line, results.stale(line))
        if key not in found or new.stale is None or found[key].stale is not None:
            found[key] = new
    return list(found.values())


def of_one_ceiling(lines: Iterable[Line]) -> list[Line]:
    """Shares of the highest ceiling that any process measured on the device. Each measured its own, in moments faster or slower: by those, the
    shares of two lines could not be compared."""
    lines = list(lines)
    highest: dict[tuple, float] = {}
    for line in lines:
        if ceiling := _ceiling(line):
            highest[_kind(line)] = max(ceiling, highest.get(_kind(line), 0.0))
    return [
        replace(line, share_of_ceiling=_speed(line) / highest[_kind(line)])
        if _ceiling(line)
        else line
        for line in lines
    ]


def _speed(line: Line) -> float:
    return line.tflops or line.gb_per_s or 0.0


def _ceiling(line: Line) -> float | None:
    return _speed(line) / line.share_of_ceiling if line.share_of_ceiling else None


def _kind(line: Line) -> tuple:
    return (
        (line.device, line.dtype) if line.tflops else (line.device,)
    )  # a copy's bytes have no dtype


def grouped(shown: Iterable[Shown], key: Callable[[Line], Any]) -> dict[Any, list[Shown]]:
    """Lines by a key, keys in the order of the lines."""
    groups: dict[Any, list[Shown]] = {}
    for each in shown:
        groups.setdefault(key(each.line), []).append(each)
    return groups


# -- what a case's name says -------------------------------------------------------------------------------------------


class Scaled(NamedTuple):
    """An op at one size of a sweep: tokens, clips or pixels."""

    variable: str
    size: int


class Step(NamedTuple):
    """A whole step: what runs, and at which drop rate."""

    configuration: str
    percent: int
    batch: int
    features: bool


def scaled(line: Line) -> Scaled | None:
    found = re.fullmatch(r"scaling_(\w+)_(\d+)", line.case)
    return Scaled(found[1], int(found[2])) if found else None


def step(line: Line) -> Step | None:
    if line.op != "step":
        return None
    found = re.fullmatch(r"(.+)_drop(\d+)_b(\d+)(_features)?", line.case)
    if not found:
        raise ValueError(
            f"a step's case is {line.case!r}; it must be <configuration>_drop<percent>_b<batch>, or that with _features"
        )
    return Step(found[1], int(found[2]), int(found[3]), bool(found[4]))


def command(line: Line) -> str:
    """What measures the line again, on a machine like its own."""
    shared = f"--dtype {line.dtype} --mode {line.mode} --device {'cuda' if 'cuda' in line.versions else 'cpu'}"
    if at := step(line):
        drop_rate = f"{at.percent / 100 if line.drop_rate is None else line.drop_rate:g}"
        if at.configuration in (*PRESETS, *SHORT_NAMES) and (
            at.features or at.configuration != "tiny"
        ):  # bench.drop_rate has a tiny too
            options = shared.replace(
                f" --mode {line.mode}", " --features yes" if at.features else ""
            )
            return f"python -m bench.step --preset {at.configuration} --drop-rate {drop_rate} --batch {at.batch} {options}"
        return f"python -m bench.drop_rate --configuration {at.configuration} --drop-rate {drop_rate} --batch {at.batch} {shared}"
    if size := scaled(line):
        return f"python -m bench.scaling --op {line.op} --size {size.size} {shared}"
    return f"python -m bench.run --op {line.op} --case {_case(line)} {shared}"


def _case(line: Line) -> str:
    """A case as bench.run takes it: by its name, or another case's at a batch of its own."""
    try:
        select(line.op, [line.case])
    except ValueError:
        if at_batch := re.fullmatch(r"(.+)_b(\d+)", line.case):
            return f"{at_batch[1]} --batch {at_batch[2]}"
    return line.case


# -- tables ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Cells are markdown: bold, code and links; "" is a dash, " " stays empty."""

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    stale: tuple[str, ...] = ()  # reasons, for the footnote
    commands: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        title: str,
        headings: Sequence[str],
        rows: Iterable[Sequence[str]],
        shown: Sequence[Shown],
    ) -> "Table":
        """With the reasons and the commands of the lines in it."""
        filled = [[cell or NONE for cell in row] for row in rows]
        stale = dict.fromkeys(each.stale for each in shown if each.stale)
        return cls(
            title,
            headings,
            filled,
            tuple(stale),
            tuple(dict.fromkeys(command(each.line) for each in shown)),
        )

    @classmethod
    def read(cls, title: str, markdown: str, commands: tuple[str, ...]) -> "Table":
        headings, _, *rows = (
            [cell.strip() for cell in row.strip("|").split("|")] for row in markdown.splitlines()
        )
        return cls(title, headings, rows, commands=commands)

    def markdown(self) -> str:
        rows = (self.headings, ["---"] * len(self.headings), *self.rows)
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        return f"{table}\n\n{self.footnote()}" if self.stale else table

    def footnote(self) -> str:
        return f"{STALE} stale: {'; '.join(self.stale)}." if self.stale else ""


_BACKEND = results.HEADINGS.index("backend")


def _line_table(
    title: str, lead: dict[str, Callable[[Line], str]], shown: Sequence[Shown]
) -> Table:
    """A row a line, faster first where ``lead``, the columns before the figures, is the same."""
    groups = grouped(shown, lambda line: tuple(value(line) for value in lead.values()))
    rows = []
    for first, group in groups.items():
        for each in sorted(group, key=lambda each: each.line.ms_p50):
            backend, ms, *others = results.cells(each.line)[_BACKEND:]
            rows.append([*first, backend, each.mark(ms), *others])
    return Table.of(title, [*lead, *results.HEADINGS[_BACKEND:]], rows, shown)


def ops(shown: Iterable[Shown]) -> list[Table]:
    """A table a case of an op, its dtypes and modes below each other."""
    groups = grouped(shown, lambda line: (line.op, line.case))
    lead: dict[str, Callable[[Line], str]] = {
        "dtype": lambda line: line.dtype,
        "mode": lambda line: line.mode,
    }
    return [_line_table(f"{op}, {case}", lead, group) for (op, case), group in groups.items()]


def scaling(shown: Iterable[Shown]) -> list[Table]:
    """A table an op, dtype and mode, smaller sizes first."""
    tables = []
    for (op, dtype, mode, variable), group in grouped(shown, _sweep).items():
        lead: dict[str, Callable[[Line], str]] = {variable: lambda line: str(_size(line))}
        tables.append(
            _line_table(
                f"{op} by {variable}, {dtype}, {mode}",
                lead,
                sorted(group, key=lambda each: _size(each.line)),
            )
        )
    return tables


def _sweep(line: Line) -> tuple[str, str, str, str]:
    at = scaled(line)
    assert at
    return line.op, line.dtype, line.mode, at.variable


def _size(line: Line) -> int:
    at = scaled(line)
    assert at
    return at.size


_GLANCE = [
    "op",
    "case",
    "dtype",
    "mode",
    "ours",
    "ms",
    "best peer",
    "its ms",
    "over best peer",
    "share of ceiling",
]


def glance(shown: Iterable[Shown]) -> Table:
    """A row a case, dtype and mode: what dispatch chooses beside the best peer of the same process; without a line of it the fastest of ours."""
    rows: list[list[str]] = []
    told: list[Shown] = []
    for (op, *names), group in grouped(
        shown, lambda line: (line.op, line.case, line.dtype, line.mode)
    ).items():
        mine = [each for each in group if each.line.ours]
        if not mine:
            continue
        ours = min(mine, key=lambda each: (each.line.backend != AUTO, each.line.ms_p50))
        told.append(ours)
        line = ours.line
        speedup = (
            "" if line.speedup_over_best_peer is None else f"{line.speedup_over_best_peer:.2f}x"
        )
        peer_ms = "" if line.best_peer_ms_p50 is None else number(line.best_peer_ms_p50)
        share = "" if line.share_of_ceiling is None else f"{line.share_of_ceiling:.0%}"
        rows.append(
            [
                op,
                *names,
                f"**{line.backend}**",
                ours.mark(number(line.ms_p50)),
                line.best_peer or "",
                peer_ms,
                speedup,
                share,
            ]
        )
    return replace(
        Table.of("Ours beside the best peer", _GLANCE, rows, told), commands=()
    )  # they stand with each case
