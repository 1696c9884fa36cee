"""Figures, and the marked tables of the docs, from the committed result lines.

Nothing is measured here. Between ``<!-- table: NAME -->`` and ``<!-- end -->`` a Markdown page's
text is replaced. Which lines are stale depends on the sources and the torch of this environment
(``lines.stale``), everything else on the lines alone.
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import data, lines, miniature, ranks, sweeps
from bench.lines import Line

from . import figures, tables
from .tables import Shown, grouped, scaled, title_of


@dataclass(frozen=True)
class Report:
    """What lines say, sorted by what they measure, and the rows of other measurements."""

    ops: Sequence[Shown]
    scaling: Sequence[Shown]
    steps: Sequence[Shown]
    runs: Sequence[sweeps.Run]
    of_ranks: Sequence[ranks.Row] = ()
    decoding: Sequence[data.Row] = ()
    scores: Sequence[miniature.Score] = ()

    @classmethod
    def of(cls, measured: Sequence[Line], runs: Sequence[sweeps.Run], **others: Any) -> "Report":
        shown = tables.current(tables.of_one_ceiling(measured))
        whole = [each for each in shown if each.line.op == "step"]
        sized = [each for each in shown if scaled(each.line)]
        ops = [each for each in shown if each.line.op != "step" and not scaled(each.line)]
        return cls(ops, sized, whole, runs, **others)

    @classmethod
    def read(cls, folder: Path) -> "Report":
        measured = [line for path in lines.files(folder) for line in lines.read(path)]
        runs = sweeps.read_runs(folder / sweeps.ACCURACY.name)
        return cls.of(
            measured,
            runs,
            of_ranks=ranks.read(folder / ranks.FILE.name),
            decoding=data.read(folder / data.FILE.name),
            scores=miniature.read(folder / miniature.TABLES.name),
        )


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
    "ranks": (lambda report: ranks.tables(report.of_ranks), "python -m bench ranks && make report"),
    "decoding": (
        lambda report: data.tables(report.decoding),
        "python -m bench data && make report",
    ),
    "miniature": (
        lambda report: miniature.by_length(report.scores),
        "python -m bench accuracy --tables && make report",
    ),
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


# -- the command ------------------------------------------------------------------------------


def build(results: Path, out: Path, pages: Sequence[Path], *, check: bool) -> int:
    """Draw the figures into ``out`` and make the marked tables of ``pages`` anew.

    Args:
        check: write nothing; print how the marked tables would change, and return 1 if they would.

    Raises:
        ValueError: a page has a marker of an unknown table or without its end.
    """
    report = Report.read(results)
    status = 0
    for path in pages:
        before = path.read_text()
        after = fill(before, report)
        if check:
            old, new = before.splitlines(), after.splitlines()
            diff = difflib.unified_diff(old, new, path.name, "from the lines", lineterm="")
            print("".join(f"{line}\n" for line in diff), end="")
            status |= before != after
        elif before != after:
            path.write_text(after)
    if not check:
        for drawn in (*figures.scaling(report.scaling, out), *figures.steps(report.steps, out)):
            print(drawn)
    return int(status)
