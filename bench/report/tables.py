"""Result lines as the report shows them.

Which line speaks for a measurement, the command that measures it again, and tables of them.
"""

import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from bench import lines, steps
from bench.lines import Line, markdown_table, number, times
from bench.setting import AUTO

NONE, STALE = "\N{EN DASH}", "\N{DAGGER}"
MODES = {"fwd+bwd": "training step", "fwd": "inference"}  # of whole steps
_PERCENTS = (75, 50, 25, 0)  # the paper's drop rates, and its order


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


def ceiling(line: Line) -> float | None:
    """What the line's share is of, in TFLOP/s or GB/s."""
    speed = line.tflops or line.gb_per_s or 0.0
    return speed / line.share_of_ceiling if line.share_of_ceiling else None


def of_one_ceiling(measured: Iterable[Line]) -> list[Line]:
    """Shares of the highest ceiling that any process measured on the machine.

    Each process measured its own, in faster or slower moments: by those, the shares of two lines
    could not be compared.
    """
    measured = list(measured)
    highest: dict[tuple, float] = {}

    def kind(line: Line) -> tuple:
        # a copy's bytes have no dtype
        return (line.machine, line.dtype) if line.tflops else (line.machine,)

    for line in measured:
        highest[kind(line)] = max(ceiling(line) or 0.0, highest.get(kind(line), 0.0))
    return [
        replace(line, share_of_ceiling=line.share_of_ceiling * own / highest[kind(line)])
        if line.share_of_ceiling and (own := ceiling(line))
        else line
        for line in measured
    ]


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


def scaled(line: Line) -> Scaled | None:
    found = re.fullmatch(r"scaling_(\w+)_(\d+)", line.case)
    return Scaled(found[1], int(found[2])) if found else None


def step(line: Line) -> Step:
    """Of a line of a whole step.

    Raises:
        ValueError: the case has another form.
    """
    found = re.fullmatch(r"(.+)_drop(\d+)_b(\d+)", line.case)
    if not found:
        form = "<configuration>_drop<percent>_b<batch>"
        raise ValueError(f"a step's case is {line.case!r}; it must be {form}")
    return Step(found[1], int(found[2]), int(found[3]))


def command(line: Line) -> str:
    """What measures a line of an op or of a step again, on a machine like its own."""
    what = f"ops --op {line.op} --case {line.case}"
    if line.op == "step":
        at = step(line)
        rate, clips = f"{at.percent / 100:g}", at.batch
        what = f"steps --configuration {at.configuration} --drop-rate {rate} --batch {clips}"
    device = " --device cuda" if line.cuda else ""
    return f"python -m bench {what} --dtype {line.dtype} --mode {line.mode}{device}"


# -- tables ------------------------------------------------------------------------------------


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]], shown: Iterable[Shown]) -> str:
    """Markdown with a footnote on the stale lines among ``shown``; an empty cell is a dash."""
    made = markdown_table(headings, [[cell or NONE for cell in row] for row in rows])
    reasons = dict.fromkeys(each.stale for each in shown if each.stale)
    if not reasons:
        return made
    footnote = f"{STALE} stale: {'; '.join(map(str, reasons))}."
    return f"{made}\n\n{textwrap.fill(footnote, 100)}"


def every_line(shown: Sequence[Shown]) -> str:
    """A row a line, faster first within a case, dtype and mode."""
    rows = []
    for group in grouped(shown, lambda line: (line.op, line.case, line.dtype, line.mode)).values():
        for each in sorted(group, key=lambda each: each.line.ms_p50):
            cells = lines.cells(each.line)
            at = lines.HEADINGS.index("ms_p50")
            rows.append([*cells[:at], each.mark(cells[at]), *cells[at + 1 :]])
    return _table(lines.HEADINGS, rows, shown)


_GLANCE = ["op", "case", "dtype", "mode", "ours", "ms", "best peer", "its ms"]
_GLANCE += ["over best peer", "share of ceiling"]


def glance(shown: Iterable[Shown]) -> str:
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
    return _table(_GLANCE, rows, told)


def chosen(group: Iterable[Shown]) -> Shown | None:
    """What dispatch chooses; without a line of it the fastest of ours."""
    ours = [each for each in group if each.line.ours]
    return min(ours, key=lambda e: (e.line.backend != AUTO, e.line.ms_p50), default=None)


def fastest(group: Iterable[Shown]) -> Shown | None:
    """The fastest of ours, eager or compiled."""
    ours = [each for each in group if each.line.ours]
    return min(ours, key=lambda each: each.line.ms_p50, default=None)


# -- whole steps, drop rates as columns as in the paper's Tables 5 and 6 ----------------------


class Group(NamedTuple):
    """What can be compared: one configuration on one machine, at one batch and in one dtype."""

    configuration: str
    machine: tuple[str, str]
    dtype: str
    batch: int
    shown: Sequence[Shown]

    @property
    def title(self) -> str:
        return f"{self.configuration}, {self.dtype}, batch {self.batch}"


def step_groups(shown: Iterable[Shown]) -> list[Group]:
    def key(line: Line) -> Group:
        at = step(line)
        return Group(at.configuration, line.machine, line.dtype, at.batch, shown=())

    return [group._replace(shown=members) for group, members in grouped(shown, key).items()]


def by_drop_rate(found: Sequence[Group]) -> str:
    """Three rows a configuration, for groups of one machine: GFLOPs, training and inference."""
    shown = [each for group in found for each in group.shown]
    percents = sorted({*_PERCENTS, *(step(each.line).percent for each in shown)}, reverse=True)
    rows = []
    for group in found:
        block: dict[str, list[str]] = {}
        if group.configuration in steps.OF_THE_PAPER:
            counted = (steps.gflops(group.configuration, p / 100) for p in percents)
            block["GFLOPs of a clip, forward, as timed (published)"] = [
                number(timed) + (f" ({published:.1f})" if published else "")
                for timed, published in counted
            ]
        at = grouped(group.shown, lambda line: (line.mode, step(line).percent))
        for mode, name in MODES.items():
            if any(mode == key[0] for key in at):
                block[f"{name}, ms"] = [_duel(at.get((mode, p), [])) for p in percents]
        for i, (what, cells) in enumerate(block.items()):
            rows.append([group.title if i == 0 else " ", what, *cells])
    headings = ["configuration", "drop rate", *(f"{percent} %" for percent in percents)]
    return _table(headings, rows, shown)


def _duel(here: Sequence[Shown]) -> str:
    """The fastest of ours in bold, the best peer and how they compare."""
    ours = fastest(here)
    theirs = (each for each in here if not each.line.ours)
    peer = min(theirs, key=lambda each: each.line.ms_p50, default=None)
    texts = []
    if ours:
        texts.append(ours.mark(f"**{ours.line.backend} {number(ours.line.ms_p50)}**"))
    if ours and ours.line.best_peer and ours.line.best_peer_ms_p50:  # of the same process
        texts.append(f"{ours.line.best_peer} {number(ours.line.best_peer_ms_p50)}")
    elif peer:
        texts.append(peer.mark(f"{peer.line.backend} {number(peer.line.ms_p50)}"))
    if ours and ours.line.speedup_over_best_peer is not None:
        texts.append(times(ours.line.speedup_over_best_peer))
    return ", ".join(texts)


# -- the README's table -----------------------------------------------------------------------

# what a row says, and the line it is: op, case, mode; of one title the first with a fresh line
_ROWS: tuple[tuple[str, str, str, str], ...] = (
    ("attention, 2 x 785 tokens", "attention", "video_mbs_drop50_b2", "fwd"),
    ("attention, 2 x 785 tokens", "attention", "video_mbs_drop50_b2", "fwd+bwd"),
    ("attention, 1569 tokens", "attention", "video_bbs_drop0_b1", "fwd"),
    ("attention, 1569 tokens", "attention", "video_bbs_drop0_b1", "fwd+bwd"),
    ("contrastive loss, 8192 clips", "contrastive_lse", "va_bbs_one_device_b8192", "fwd+bwd"),
    ("half of two clips' patches", "patch_embed", "video_mbs_drop50_b2_rows", "fwd+bwd"),
    ("half of two clips' patches", "patch_embed", "video_mbs_drop50_b2", "fwd+bwd"),
    ("whole training step, MBS, half dropped", "step", "mbs_32x224x224_drop50_b1", "fwd+bwd"),
    ("whole inference, MBS, nothing dropped", "step", "mbs_32x224x224_drop0_b1", "fwd"),
)
# widest first: the C++ kernels' instruction levels, as processors' makers call them
_LEVELS = dict(amx_bf16="AMX", avx512_bf16="AVX-512 BF16", avx512="AVX-512", avx2="AVX2")


def readme(shown: Sequence[Shown]) -> str:
    """At most eight fresh rows, of the machine with the widest instructions that has one."""
    headings = ("case", "dtype", "processor", "ours, ms", "best peer, ms", "times as fast")
    rows: list[list[str]] = []
    again = ""  # what measures the first row
    for title, *wanted in _ROWS:
        if wanted[0] != "step":
            title += ", forward" if wanted[-1] == "fwd" else ", with backward"
        fresh = [
            each
            for each in shown
            if [each.line.op, each.line.case, each.line.mode] == wanted and not each.stale
        ]
        by_machine = grouped(fresh, lambda line: (_rank(line), line.machine, line.dtype))
        pick = fastest if wanted[0] == "step" else chosen
        lead = (pick(by_machine[key]) for key in sorted(by_machine))
        line = next((each.line for each in lead if each is not None), None)
        told = any(row[0] == title for row in rows)
        if line is None or line.best_peer is None or line.best_peer_ms_p50 is None or told:
            continue
        peer = f"{number(line.best_peer_ms_p50)} ({line.best_peer})"
        ratio = times(line.speedup_over_best_peer).removesuffix("x")
        ours = number(line.ms_p50) + (", compiled" if line.backend.endswith("_compiled") else "")
        rows.append([title, line.dtype, _processor(line), ours, peer, ratio])
        again = again or command(line)
    if not rows:
        return "No fresh lines exist yet."
    return f"{markdown_table(headings, rows)}\n\nThe first row again:\n\n    {again}"


def _processor(line: Line) -> str:
    """ "Intel Xeon, AMX" of "Intel(R) Xeon(R) Processor, 2 threads" and amx_bf16."""
    name, level = line.device.partition(",")[0], line.machine[1]
    name = " ".join(name.replace("(R)", "").replace("Processor", "").split())
    return f"{name}, {_LEVELS[level]}" if level in _LEVELS else name


def _rank(line: Line) -> int:
    """GPUs first, then wider instructions before narrower ones."""
    order = ["cuda", *_LEVELS]
    level = "cuda" if line.cuda else line.machine[1]
    return order.index(level) if level in order else len(order)
