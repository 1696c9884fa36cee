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
from bench.steps import gflops

from . import figures, step_tables, tables
from .page import Page
from .step_tables import Flops
from .tables import STALE, Shown, Table, grouped, scaled, title_of

# files of the results folder with other records than lines.Line
_COMPILED, _ACCURACY = "compile_", "accuracy.jsonl"
_NO_LINES = "no result lines in {}: `python -m bench ops` makes the first"


@dataclass(frozen=True)
class Report:
    """What the lines of a folder say, sorted by what they measure."""

    folder: Path
    ops: Sequence[Shown]
    scaling: Sequence[Shown]
    steps: Sequence[Shown]
    runs: Sequence[sweeps.Run]
    flops: Flops

    @classmethod
    def read(cls, folder: Path, flops: Flops = gflops) -> "Report":
        found = [
            line
            for path in sorted(folder.glob("*.jsonl"))
            if not path.name.startswith(_COMPILED) and path.name != _ACCURACY
            for line in lines.read(path)
        ]
        shown = tables.current(tables.of_one_ceiling(found))
        whole = [each for each in shown if each.line.op == "step"]
        sized = [each for each in shown if scaled(each.line)]
        ops = [each for each in shown if each.line.op != "step" and not scaled(each.line)]
        return cls(folder, ops, sized, whole, sweeps.read_runs(folder / _ACCURACY), flops)

    @property
    def lines(self) -> list[Shown]:
        return [*self.ops, *self.scaling, *self.steps]


# -- tables of the docs -----------------------------------------------------------------------


def _by_machine(
    shown: Sequence[Shown], subject: Callable[[Line], str]
) -> dict[tuple[str, str], list[Shown]]:
    """By machine; without those that have only stale lines of what another has fresh ones of."""
    fresh = {(subject(each.line), each.line.machine) for each in shown if not each.stale}
    told = {about for about, _ in fresh}
    kept = [
        each
        for each in shown
        if subject(each.line) not in told or (subject(each.line), each.line.machine) in fresh
    ]
    return grouped(kept, lambda line: line.machine)


def _configuration(line: Line) -> str:
    at = tables.step(line)
    assert at
    return at.configuration


def _steps(report: Report) -> str:
    if not report.steps:
        return "No lines of whole steps exist yet."
    parts = []
    for machine, shown in _by_machine(report.steps, _configuration).items():
        table = step_tables.summary(step_tables.groups(shown), report.flops)
        parts += [f"{title_of(machine)}:", table.markdown()]
    return "\n\n".join(parts)


def _ops(report: Report) -> str:
    if not report.ops:
        return "No lines of ops exist yet."
    return "\n\n".join(
        f"{title_of(machine)}:\n\n{tables.glance(shown).markdown()}"
        for machine, shown in _by_machine(report.ops, lambda line: line.op).items()
    )


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
    "Made by `make report` from committed result lines alone. **Bold** and the thick blue "
    "line are ours, all else are peers, timed in the same process in turn. Times are p50 with"
    f" p20 to p80. {STALE} and hollow markers are stale lines: measured on other code or "
    "another torch than this, or while other machines took more than a twentieth of the "
    "processors. Over best peer is the median over the rounds of both times' ratio; on a "
    "noisy machine it is not the ratio of the medians. The share is that of the fastest "
    "matmul or copy that any process saw on the machine. TFLOP/s counts, for everybody, a "
    "backward that computes the scores again, as kernels with little memory do: who keeps all"
    " scores does less. Peak MiB is what torch allocates: of an op beyond its inputs, of a "
    "step beyond weights and optimizer state on a CPU and everything on a GPU. Process MiB is"
    " all that the process held when its first contender ran for the first time, compilers "
    "included. Under each table stand the commands that measure it again, on a machine like "
    "its own."
)


def write(report: Report, out: Path) -> Path:
    """The page and its figures below ``out``."""
    page = Page("vatt_fast: what was measured")
    page.paragraph(_INTRODUCTION)
    for sentence in absent(report):
        page.paragraph(sentence)
    for machine, shown in grouped(report.lines, lambda line: line.machine).items():
        _machine(page, report, machine, shown, out / "figures")
    if report.runs:
        page.heading(2, "Accuracy by drop rate")
        where, commits = (
            _join(getattr(run, field) for run in report.runs) for field in ("device", "commit")
        )
        page.paragraph(
            f"The demo's world on {where}, {_span(run.date for run in report.runs)}, at {commits}. "
            "Whether the code has changed since is not told here."
        )
        _figures(page, figures.accuracies(report.runs, out / "figures"))
        title = "Mean and standard deviation over the seeds, in percent"
        text = sweeps.accuracy_table(report.runs)
        page.table(Table.read(title, text, ("python -m bench accuracy",)))
    page.heading(2, "Beside this page")
    folder = os.path.relpath(report.folder, out)
    compiled = sorted(report.folder.glob(f"{_COMPILED}*.md"))
    told = [
        f"[{path.name}]({folder}/{path.name}): what was only compiled, and for what"
        for path in compiled
    ]
    page.items([*told, f"[the result lines]({folder}/), one file a machine"])
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page.html())
    return path


def absent(report: Report) -> list[str]:
    """What no line speaks of, a sentence each."""
    found = [each.line for each in report.lines]
    if not found:
        return [f"There are {_NO_LINES.format(report.folder.name)}."]
    told = []
    if not any(line.cuda for line in found):
        told.append(
            "No line was measured on a GPU: nothing here says how fast the GPU kernels are."
        )
    if not any(line.machine[1] == "amx_bf16" for line in found):
        told.append(
            "No line was measured on a CPU with AMX: nothing here says how fast the C++ kernels "
            "are on one."
        )
    return told


def _machine(
    page: Page, report: Report, machine: tuple[str, str], shown: Sequence[Shown], folder: Path
) -> None:
    page.heading(2, title_of(machine))
    page.items(facts([each.line for each in shown]))
    whole, ops, sized = (
        [each for each in part if each.line.machine == machine]
        for part in (report.steps, report.ops, report.scaling)
    )
    if whole:
        page.heading(3, "Whole steps by drop rate")
        for group in step_tables.groups(whole):
            page.table(step_tables.table(group, report.flops))
            _figures(page, figures.drop_rate(group, report.flops, folder))
    if ops:
        page.heading(3, "Ops")
        page.table(tables.glance(ops))
        for table in tables.ops(ops):
            page.table(table)
    if sized:
        page.heading(3, "Ops by size")
        _figures(page, figures.scaling(sized, folder))
        for table in tables.scaling(sized):
            page.table(table)


def _figures(page: Page, made: dict[Path, str]) -> None:
    for stem, caption in made.items():
        page.figure(stem, caption)


def facts(measured: Sequence[Line]) -> list[str]:
    """Dates, versions and measured ceilings of a machine, as far as its lines tell."""
    versions: dict[str, list[str]] = {}
    ceilings: dict[str, float] = {}
    for line in measured:  # whose shares are of one ceiling by now
        for name, version in line.versions.items():
            versions.setdefault(name, []).append(version)
        for speed, name in (
            (line.tflops, f"TFLOP/s in a {line.dtype} matmul"),
            (line.gb_per_s, "GB/s in a copy"),
        ):
            if speed and line.share_of_ceiling:
                ceilings[name] = speed / line.share_of_ceiling
    dates, commits = _span(line.date for line in measured), _join(line.commit for line in measured)
    found = [
        f"{len(measured)} lines, {dates}, at {commits}",
        ", ".join(f"{name} {_join(each)}" for name, each in versions.items()),
    ]
    told = ", ".join(f"{number(ceiling)} {name}" for name, ceiling in ceilings.items())
    return [*found, f"the fastest seen, which shares are of: {told}"] if told else found


def _span(dates: Iterable[str]) -> str:
    first, *others = sorted(set(dates))
    return f"{first} to {others[-1]}" if others else first


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
