"""Everything that the committed result lines say: a page, figures, the marked tables of the docs.

Nothing is measured here. Between ``<!-- table: NAME -->`` and ``<!-- end -->`` a Markdown page's
text is replaced. Which lines are stale depends on the sources and the torch of this environment
(``lines.stale``), everything else on the lines alone.
"""

import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import lines, sweeps
from bench.lines import Line, number

from . import figures, tables
from .page import page
from .tables import STALE, Shown, grouped, scaled, title_of

_NO_LINES = "no result lines in {}: `python -m bench ops` makes the first"


@dataclass(frozen=True)
class Report:
    """What the lines of a folder say, sorted by what they measure."""

    folder: Path
    ops: Sequence[Shown]
    scaling: Sequence[Shown]
    steps: Sequence[Shown]
    runs: Sequence[sweeps.Run]

    @classmethod
    def read(cls, folder: Path) -> "Report":
        found = [line for path in lines.files(folder) for line in lines.read(path)]
        shown = tables.current(tables.of_one_ceiling(found))
        whole = [each for each in shown if each.line.op == "step"]
        sized = [each for each in shown if scaled(each.line)]
        ops = [each for each in shown if each.line.op != "step" and not scaled(each.line)]
        return cls(folder, ops, sized, whole, sweeps.read_runs(folder / sweeps.ACCURACY.name))

    @property
    def lines(self) -> list[Shown]:
        return [*self.ops, *self.scaling, *self.steps]


# -- tables of the docs -----------------------------------------------------------------------


def _by_machine(
    shown: Sequence[Shown], subject: Callable[[Line], str], table: Callable[[list[Shown]], str]
) -> str:
    """A table a machine; without those that have only stale lines of what another has fresh."""
    fresh = {(subject(each.line), each.line.machine) for each in shown if not each.stale}
    told = {about for about, _ in fresh}
    kept = [
        each
        for each in shown
        if subject(each.line) not in told or (subject(each.line), each.line.machine) in fresh
    ]
    groups = grouped(kept, lambda line: line.machine)
    made = [f"{title_of(machine)}:\n\n{table(group)}" for machine, group in groups.items()]
    return "\n\n".join(made) or "No lines exist yet."


def _steps(report: Report) -> str:
    def table(shown: list[Shown]) -> str:
        return tables.by_drop_rate(tables.step_groups(shown))

    return _by_machine(report.steps, lambda line: tables.step(line).configuration, table)


def _ops(report: Report) -> str:
    return _by_machine(report.ops, lambda line: line.op, tables.glance)


def _accuracy(report: Report) -> str:
    return sweeps.accuracy_table(report.runs) if report.runs else "No runs exist yet."


# name of a marked table -> (text from the lines, the command that makes lines and text)
MARKED: dict[str, tuple[Callable[[Report], str], str]] = {
    "readme": (lambda report: tables.readme([*report.ops, *report.steps]), ""),
    "steps": (_steps, "python -m bench steps && make report"),
    "ops": (_ops, "python -m bench ops && make report"),
    "accuracy": (_accuracy, "python -m bench accuracy && make report"),
}


def fill(text: str, report: Report) -> str:
    """A page with what stands between its markers made anew.

    Raises:
        ValueError: an unknown table, or a marker without its end.
    """

    def made(found: re.Match) -> str:
        name, old = found[1], found[2]
        if name not in MARKED:
            raise ValueError(f"a marker of table {name!r}; there are {', '.join(MARKED)}")
        if old is None or "<!-- table:" in old:
            raise ValueError(f"the marker of table {name!r} has no <!-- end -->")
        table, command = MARKED[name]
        tail = f"\n\n    {command}" if command else ""
        return f"<!-- table: {name} -->\n\n{table(report)}{tail}\n\n<!-- end -->"

    return re.sub(r"<!-- table: *(.*?) *-->(?:(.*?)<!-- end -->)?", made, text, flags=re.DOTALL)


# -- the page ---------------------------------------------------------------------------------

_INTRODUCTION = (
    "Made by `make report` from committed result lines alone. **Bold** and the thick blue line are "
    "ours, all else are peers, timed in the same process in turn. Times are p50 with p20 to p80. "
    f"{STALE} and hollow markers are stale lines: measured on other code or another torch than "
    "this, or while other machines took more than a twentieth of the processors. Over best peer is "
    "the median over the rounds of both times' ratio. The share is that of the fastest matmul or "
    "copy that any process saw on the machine. TFLOP/s counts, for everybody, a backward that "
    "computes the scores again, as kernels with little memory do: who keeps all scores does less. "
    "Peak MiB is what torch allocates: of an op beyond its inputs, of a step beyond weights and "
    "optimizer state on a CPU and everything on a GPU."
)


def write(report: Report, out: Path) -> Path:
    """The page and its figures below ``out``."""

    def drawn(made: dict[Path, str]) -> list[str]:
        return [f"![{caption}]({path.relative_to(out)})" for path, caption in made.items()]

    folder = out / "figures"
    blocks = [_INTRODUCTION, *absent(report)]
    for machine, shown in grouped(report.lines, lambda line: line.machine).items():
        blocks += [f"## {title_of(machine)}", facts([each.line for each in shown])]
        whole, ops, sized = (
            [each for each in part if each.line.machine == machine]
            for part in (report.steps, report.ops, report.scaling)
        )
        if whole:
            groups = tables.step_groups(whole)
            blocks += ["### Whole steps by drop rate", tables.by_drop_rate(groups)]
            for group in groups:
                blocks += drawn(figures.drop_rate(group, folder))
            blocks.append(tables.every_line(whole))
        if ops:
            blocks += ["### Ops", tables.glance(ops), tables.every_line(ops)]
        if sized:
            blocks += ["### Ops by size", *drawn(figures.scaling(sized, folder))]
            blocks.append(tables.every_line(sized))
    if report.runs:
        blocks += ["## Accuracy by drop rate", *drawn(figures.accuracies(report.runs, folder))]
        blocks.append(_accuracy(report))
    there = os.path.relpath(report.folder, out)
    blocks.append(f"## Beside this page\n\n- [the result lines]({there}/), one file a machine")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page("vatt_fast: what was measured", blocks))
    return path


def absent(report: Report) -> list[str]:
    """What no line speaks of, a sentence each."""
    found = [each.line for each in report.lines]
    if not found:
        return [f"There are {_NO_LINES.format(report.folder.name)}."]
    nothing = "nothing here says how fast its kernels are."
    told = []
    if not any(line.cuda for line in found):
        told.append(f"No line was measured on a GPU: {nothing}")
    if not any(line.machine[1] == "amx_bf16" for line in found):
        told.append(f"No line was measured on a CPU with AMX: {nothing}")
    return told


def facts(measured: Sequence[Line]) -> str:
    """Dates, versions and measured ceilings of a machine, as far as its lines tell."""
    versions: dict[str, list[str]] = {}
    ceilings: dict[str, float] = {}
    for line in measured:  # whose shares are of one ceiling by now
        for name, version in line.versions.items():
            versions.setdefault(name, []).append(version)
        unit = f"TFLOP/s in a {line.dtype} matmul" if line.tflops else "GB/s in a copy"
        if found := tables.ceiling(line):
            ceilings[unit] = found
    first, *_, last = sorted(line.date for line in [measured[0], *measured])
    dates = first if first == last else f"{first} to {last}"
    told = [f"{len(measured)} lines, {dates}, at {_join(line.commit for line in measured)}"]
    told.append(", ".join(f"{name} {_join(each)}" for name, each in versions.items()))
    if ceilings:
        fastest = ", ".join(f"{number(each)} {unit}" for unit, each in ceilings.items())
        told.append(f"the fastest seen, which shares are of: {fastest}")
    return "\n".join(f"- {each}" for each in told)


def _join(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


# -- the command ------------------------------------------------------------------------------


def build(results: Path, out: Path, pages: Sequence[Path], *, check: bool) -> int:
    """Write page, figures and the marked tables of ``pages``.

    Args:
        check: write nothing; print how the marked tables would change, and return 1 if they would.

    Raises:
        ValueError: a page has a marker of an unknown table or without its end.
    """
    report = Report.read(results)
    status = 0
    for path in pages:
        before = path.read_text() if path.exists() else ""
        after = fill(before, report)
        if check:
            for line in difflib.unified_diff(
                before.splitlines(), after.splitlines(), path.name, "from the lines", lineterm=""
            ):
                print(line)
            status |= before != after
        elif before != after:
            path.write_text(after)
    if check:
        return int(status)
    if not report.lines:
        print(_NO_LINES.format(results))
    print(write(report, out))
    return 0
