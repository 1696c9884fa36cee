"""Result lines as the report shows them.

Which line speaks for a measurement, the command that measures it again, and tables with both.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from bench import lines
from bench.lines import Line, number, times
from bench.setting import AUTO

NONE, STALE = "\N{EN DASH}", "\N{DAGGER}"


class Shown(NamedTuple):
    """A line, and why it no longer speaks of this code, where it does not."""

    line: Line
    stale: str | None = None

    def mark(self, text: str) -> str:
        return f"{text} {STALE}" if self.stale else text


def current(found_lines: Iterable[Line]) -> list[Shown]:
    """One line a measurement: the last that is not stale; where all are, the last."""
    found: dict[tuple, Shown] = {}
    for line in found_lines:
        key = (line.op, line.case, line.dtype, line.mode, line.backend, line.machine)
        new = Shown(line, lines.stale(line))
        if key not in found or new.stale is None or found[key].stale is not None:
            found[key] = new
    return list(found.values())


def of_one_ceiling(measured: Iterable[Line]) -> list[Line]:
    """Shares of the highest ceiling that any process measured on the machine.

    Each process measured its own, in faster or slower moments: by those, the shares of two lines
    could not be compared.
    """
    measured = list(measured)
    highest: dict[tuple, float] = {}
    for line in measured:
        if ceiling := _ceiling(line):
            highest[_kind(line)] = max(ceiling, highest.get(_kind(line), 0.0))
    return [
        replace(line, share_of_ceiling=_speed(line) / highest[_kind(line)])
        if _ceiling(line)
        else line
        for line in measured
    ]


def _speed(line: Line) -> float:
    return line.tflops or line.gb_per_s or 0.0


def _ceiling(line: Line) -> float | None:
    return _speed(line) / line.share_of_ceiling if line.share_of_ceiling else None


def _kind(line: Line) -> tuple:
    # a copy's bytes have no dtype
    return (line.machine, line.dtype) if line.tflops else (line.machine,)


def title_of(machine: tuple[str, str]) -> str:
    """Processor and instruction level."""
    device, instructions = machine
    return f"{device} ({instructions})" if instructions else device


def grouped(shown: Iterable[Shown], key: Callable[[Line], Any]) -> dict[Any, list[Shown]]:
    """Lines by a key, keys in the order of the lines."""
    groups: dict[Any, list[Shown]] = {}
    for each in shown:
        groups.setdefault(key(each.line), []).append(each)
    return groups


# -- what a case's name says ------------------------------------------------------------------


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
            f"a step's case is {line.case!r}; it must be <configuration>_drop<percent>_b<batch>, "
            "or that with _features"
        )
    return Step(found[1], int(found[2]), int(found[3]), bool(found[4]))


def command(line: Line) -> str:
    """What measures the line again, on a machine like its own."""
    shared = f"--dtype {line.dtype} --mode {line.mode}{' --device cuda' if line.cuda else ''}"
    if at := step(line):
        rate = f"{at.percent / 100 if line.drop_rate is None else line.drop_rate:g}"
        features = " --features yes" if at.features else ""
        return (
            f"python -m bench steps --configuration {at.configuration} --drop-rate {rate} "
            f"--batch {at.batch} {shared}{features}"
        )
    if size := scaled(line):
        return f"python -m bench scaling --op {line.op} --size {size.size} {shared}"
    return f"python -m bench ops --op {line.op} --case {line.case} {shared}"


# -- tables ------------------------------------------------------------------------------------


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
        commands = dict.fromkeys(command(each.line) for each in shown)
        return cls(title, headings, filled, tuple(stale), tuple(commands))

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


_BACKEND = lines.HEADINGS.index("backend")


def _line_table(
    title: str, lead: dict[str, Callable[[Line], str]], shown: Sequence[Shown]
) -> Table:
    """A row a line, faster first where ``lead``, the columns before the figures, is the same."""
    groups = grouped(shown, lambda line: tuple(value(line) for value in lead.values()))
    rows = []
    for first, group in groups.items():
        for each in sorted(group, key=lambda each: each.line.ms_p50):
            backend, ms, *others = lines.cells(each.line)[_BACKEND:]
            rows.append([*first, backend, each.mark(ms), *others])
    return Table.of(title, [*lead, *lines.HEADINGS[_BACKEND:]], rows, shown)


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


_GLANCE = ["op", "case", "dtype", "mode", "ours", "ms", "best peer", "its ms"]
_GLANCE += ["over best peer", "share of ceiling"]


def glance(shown: Iterable[Shown]) -> Table:
    """A row a case, dtype and mode: ours beside the best peer of the same process."""
    rows: list[list[str]] = []
    told: list[Shown] = []
    groups = grouped(shown, lambda line: (line.op, line.case, line.dtype, line.mode))
    for names, group in groups.items():
        ours = chosen(group)
        if ours is None:
            continue
        told.append(ours)
        line = ours.line
        peer_ms = "" if line.best_peer_ms_p50 is None else number(line.best_peer_ms_p50)
        share = "" if line.share_of_ceiling is None else f"{line.share_of_ceiling:.0%}"
        mine = [f"**{line.backend}**", ours.mark(number(line.ms_p50))]
        peer = [line.best_peer or "", peer_ms, times(line.speedup_over_best_peer)]
        rows.append([*names, *mine, *peer, share])
    # the commands stand with each case
    return replace(Table.of("Ours beside the best peer", _GLANCE, rows, told), commands=())


def chosen(group: Iterable[Shown]) -> Shown | None:
    """What dispatch chooses; without a line of it the fastest of ours."""
    ours = [each for each in group if each.line.ours]
    return min(ours, key=lambda e: (e.line.backend != AUTO, e.line.ms_p50), default=None)


# -- the README's table -----------------------------------------------------------------------

# what a row says, and the line it is: (op, cases of which the first with a fresh line counts, mode)
_ROWS: tuple[tuple[str, str, tuple[str, ...], str], ...] = (
    ("attention, 785 tokens, forward", "attention", ("video_bbs_drop50_b1",), "fwd"),
    ("attention, 785 tokens, with backward", "attention", ("video_bbs_drop50_b1",), "fwd+bwd"),
    ("attention, 1569 tokens, forward", "attention", ("video_bbs_drop0_b1",), "fwd"),
    ("attention, 1569 tokens, with backward", "attention", ("video_bbs_drop0_b1",), "fwd+bwd"),
    (
        "contrastive loss, 8192 clips, with backward",
        "contrastive_lse",
        ("va_bbs_one_device_b8192",),
        "fwd+bwd",
    ),
    (
        "patch projection, half of a clip, with backward",
        "patch_embed",
        ("video_mbs_drop50_b2_rows", "video_mbs_drop50_b2"),
        "fwd+bwd",
    ),
    ("whole training step, MBS, half dropped", "step", ("mbs_32x224x224_drop50_b1",), "fwd+bwd"),
    ("whole inference, MBS, nothing dropped", "step", ("mbs_32x224x224_drop0_b1",), "fwd"),
)
_LEVELS = ("amx_bf16", "avx512_bf16", "avx512", "avx2")
_NOISE = (
    "How many times as fast is the median over the rounds, each a ratio of neighbours in time. "
    "A difference below 10 % is noise on these shared machines."
)


def readme(shown: Sequence[Shown]) -> str:
    """At most eight fresh rows, of the machine with the widest instructions that has one."""
    headings = ("case", "dtype", "processor", "ours, ms", "best peer, ms", "times as fast")
    rows, commands = [], []
    for title, op, cases, mode in _ROWS:
        line = _fresh(shown, op, cases, mode)
        if line is None or line.best_peer is None or line.best_peer_ms_p50 is None:
            continue
        peer = f"{number(line.best_peer_ms_p50)} ({line.best_peer})"
        where = title_of(line.machine).replace("(R)", "")
        ratio = times(line.speedup_over_best_peer).removesuffix("x")
        rows.append([title, line.dtype, where, number(line.ms_p50), peer, ratio])
        commands.append(command(line))
    if not rows:
        return "No fresh lines exist yet."
    table = Table("", headings, rows).markdown()
    listed = "\n".join(f"    {each}" for each in dict.fromkeys(commands))
    return f"{table}\n\n{textwrap.fill(f'{_NOISE} Each row again:', 100)}\n\n{listed}"


def _fresh(shown: Sequence[Shown], op: str, cases: Sequence[str], mode: str) -> Line | None:
    for case in cases:
        here = [
            each
            for each in shown
            if (each.line.op, each.line.case, each.line.mode) == (op, case, mode) and not each.stale
        ]
        by_machine = grouped(here, lambda line: (_rank(line), line.machine, line.dtype))
        for key in sorted(by_machine):
            if (found := chosen(by_machine[key])) is not None:
                return found.line
    return None


def _rank(line: Line) -> int:
    """GPUs first, then wider instructions before narrower ones."""
    level = line.machine[1]
    if line.cuda:
        return -1
    return _LEVELS.index(level) if level in _LEVELS else len(_LEVELS)
