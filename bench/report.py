"""``python -m bench.report``: everything that the committed result lines say, as a page, figures and tables of the README.

    make report                                  # bench/report.html, bench/figures/, the marked tables of README.md
    python -m bench.report --check               # exits 1 where the README's tables are not what the lines give

Nothing is measured here. Between ``<!-- table: NAME -->`` and ``<!-- end -->`` the README's text is replaced. Which lines are marked as
stale depends on the sources, the history and the torch of this environment (``results.stale``), all else on the lines alone.
"""

import argparse
import difflib
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import accuracy, drop_rate, figures, results, step_tables, tables
from .machine import ROOT
from .page import Page
from .results import Line, number
from .step_tables import Flops
from .tables import STALE, Shown, Table, grouped, scaled

# files of the results folder with other records than results.Line
_COMPILED, _ACCURACY = "compile_", "accuracy.jsonl"
_NO_LINES = "no result lines in {}: `python -m bench.run --device cpu` makes the first"


@dataclass(frozen=True)
class Report:
    """What the lines of a folder say, sorted by what they measure."""

    folder: Path
    ops: Sequence[Shown]
    scaling: Sequence[Shown]
    steps: Sequence[Shown]
    runs: Sequence[accuracy.Run]
    flops: Flops

    @classmethod
    def read(cls, folder: Path, flops: Flops) -> "Report":
        files = sorted(
            path
            for path in folder.glob("*.jsonl")
            if not path.name.startswith(_COMPILED) and path.name != _ACCURACY
        )
        shown = tables.current(
            tables.of_one_ceiling(line for path in files for line in results.read(path))
        )
        steps = [each for each in shown if each.line.op == "step"]
        sweeps = [each for each in shown if scaled(each.line)]
        ops = [each for each in shown if each.line.op != "step" and not scaled(each.line)]
        return cls(folder, ops, sweeps, steps, accuracy.read(folder / _ACCURACY), flops)

    @property
    def lines(self) -> list[Shown]:
        return [*self.ops, *self.scaling, *self.steps]


def counted_flops(configuration: str, rate: float) -> drop_rate.GFLOPs | None:
    """None for what is not a configuration of the paper's tables."""
    return (
        drop_rate.gflops(configuration, rate) if configuration in drop_rate.CONFIGURATIONS else None
    )


# -- tables of the README ----------------------------------------------------------------------------------------------


def _by_device(shown: Sequence[Shown], subject: Callable[[Line], str]) -> dict[str, list[Shown]]:
    """Of a subject for which some device has a fresh line, without the devices that have none of it; the page has them all."""
    fresh = {(subject(each.line), each.line.device) for each in shown if not each.stale}
    told = {about for about, _ in fresh}
    kept = [
        each
        for each in shown
        if subject(each.line) not in told or (subject(each.line), each.line.device) in fresh
    ]
    return grouped(kept, lambda line: line.device)


def _configuration(line: Line) -> str:
    at = tables.step(line)
    assert at
    return at.configuration


def _drop_rate(report: Report) -> str:
    if not report.steps:
        return "No lines of whole steps by drop rate exist yet."
    parts = []
    for device, shown in _by_device(report.steps, _configuration).items():
        parts += [
            f"{device}:",
            step_tables.summary(step_tables.groups(shown), report.flops).markdown(),
        ]
    return "\n\n".join(parts)


def _ops(report: Report) -> str:
    if not report.ops:
        return "No lines of ops exist yet."
    return "\n\n".join(
        f"{device}:\n\n{tables.glance(shown).markdown()}"
        for device, shown in _by_device(report.ops, lambda line: line.op).items()
    )


def _accuracy(report: Report) -> str:
    return accuracy.markdown(report.runs) if report.runs else "No runs exist yet."


# name in the README -> (text from the lines, the command that makes the lines and the text)
README_TABLES: dict[str, tuple[Callable[[Report], str], str]] = {
    "drop-rate": (_drop_rate, "python -m bench.drop_rate && make report"),
    "ops": (_ops, "python -m bench.run --device cpu && make report"),
    "accuracy": (_accuracy, "python -m bench.accuracy && make report"),
}


def fill(text: str, report: Report) -> str:
    """A README with what stands between its markers made anew.

    Raises:
        ValueError: an unknown table, or a marker without its end.
    """

    def made(found: re.Match) -> str:
        name, old = found[1], found[2]
        if name not in README_TABLES:
            raise ValueError(
                f"the README has a marker of table {name!r}; there are {', '.join(README_TABLES)}"
            )
        if old is None or "<!-- table:" in old:
            raise ValueError(f"the README's marker of table {name!r} has no <!-- end -->")
        table, command = README_TABLES[name]
        return f"<!-- table: {name} -->\n{table(report)}\n\n    {command}\n<!-- end -->"

    return re.sub(r"<!-- table: *(.*?) *-->(?:(.*?)<!-- end -->)?", made, text, flags=re.DOTALL)


# -- the page ----------------------------------------------------------------------------------------------------------


def write(report: Report, out: Path) -> Path:
    """The page and its figures below ``out``."""
    page = Page("vatt_fast: what was measured")
    page.paragraph(
        "Made by `make report` from committed result lines alone. **Bold** and the thick blue line are ours, all else are peers, timed in "
        f"the same process by turns; times are p50 with p20 to p80; {STALE} and hollow markers are stale lines, measured on other code or "
        "another torch than this, or while other machines took more than a twentieth of the processors. Over best peer is the median over rounds of "
        "both times' ratio; on a noisy machine it is not the ratio of the medians. The share is that of the fastest matmul or copy that any process "
        "saw on the device. TFLOP/s counts a backward that computes scores again, as kernels with little memory do, for everybody: who keeps all "
        "scores does less. Peak MiB is what torch allocates: of an op beyond its inputs, of a step beyond weights and optimizer state on a "
        "CPU and everything on a GPU; process MiB is all that the process held when its first contender ran for the first time, compilers included. "
        "Under each table stand the commands that measure it again, on a machine like its own."
    )
    for sentence in absent(report):
        page.paragraph(sentence)
    for device, shown in grouped(report.lines, lambda line: line.device).items():
        _device(page, report, device, shown, out / "figures")
    if report.runs:
        page.heading(2, "Accuracy by drop rate")
        where, commits = (
            _join(run.device for run in report.runs),
            _join(run.commit for run in report.runs),
        )
        when = _span(run.date for run in report.runs)
        page.paragraph(
            f"The demo's world on {where}, {when}, at {commits}. Whether the code has changed since is not told here."
        )
        _figures(page, figures.accuracies(report.runs, out / "figures"))
        markdown = accuracy.markdown(report.runs)
        page.table(
            Table.read(
                "Mean and standard deviation over the seeds, in percent",
                markdown,
                ("python -m bench.accuracy",),
            )
        )
    page.heading(2, "Beside this page")
    folder = os.path.relpath(report.folder, out)
    compiled = sorted(report.folder.glob(f"{_COMPILED}*.md"))
    page.items(
        [
            *(
                f"[{path.name}]({folder}/{path.name}): what was only compiled, and for what"
                for path in compiled
            ),
            f"[the result lines]({folder}/), one file a machine",
        ]
    )
    out.mkdir(parents=True, exist_ok=True)
    path = out / "report.html"
    path.write_text(page.html())
    return path


def absent(report: Report) -> list[str]:
    """What no line speaks of, a sentence each."""
    lines = [each.line for each in report.lines]
    if not lines:
        return [f"There are {_NO_LINES.format(report.folder.name)}."]
    found = []
    if not any("cuda" in line.versions for line in lines):
        found.append(
            "No line was measured on a GPU: nothing here says how fast the GPU kernels are."
        )
    if not any(line.versions.get("instructions") == "amx_bf16" for line in lines):
        found.append(
            "No line was measured on a CPU with AMX: nothing here says how fast the C++ kernels are on one."
        )
    return found


def _device(page: Page, report: Report, device: str, shown: Sequence[Shown], folder: Path) -> None:
    page.heading(2, device)
    page.items(facts([each.line for each in shown]))
    parts = [
        [each for each in part if each.line.device == device]
        for part in (report.steps, report.ops, report.scaling)
    ]
    steps, ops, sweeps = parts
    if steps:
        page.heading(3, "Whole steps by drop rate")
        for group in step_tables.groups(steps):
            page.table(step_tables.table(group, report.flops))
            _figures(page, figures.drop_rate(group, report.flops, folder))
    if ops:
        page.heading(3, "Ops")
        page.table(tables.glance(ops))
        for table in tables.ops(ops):
            page.table(table)
    if sweeps:
        page.heading(3, "Ops by size")
        _figures(page, figures.scaling(sweeps, folder))
        for table in tables.scaling(sweeps):
            page.table(table)


def _figures(page: Page, made: dict[Path, str]) -> None:
    for stem, caption in made.items():
        page.figure(stem, caption)


def facts(lines: Sequence[Line]) -> list[str]:
    """Dates, versions and measured ceilings of a device, as far as its lines tell."""
    versions: dict[str, list[str]] = {}
    for line in lines:
        for name, version in line.versions.items():
            versions.setdefault(name, []).append(version)
    found = [
        f"{len(lines)} lines, {_span(line.date for line in lines)}, at {_join(line.commit for line in lines)}",
        ", ".join(f"{name} {_join(each)}" for name, each in versions.items()),
    ]
    ceilings = {}
    for line in lines:  # whose shares are of one ceiling by now
        for speed, name in (
            (line.tflops, f"TFLOP/s in a {line.dtype} matmul"),
            (line.gb_per_s, "GB/s in a copy"),
        ):
            if speed and line.share_of_ceiling:
                ceilings[name] = speed / line.share_of_ceiling
    told = [f"{number(ceiling)} {name}" for name, ceiling in ceilings.items()]
    return [*found, f"the fastest seen, which shares are of: {', '.join(told)}"] if told else found


def _span(dates: Iterable[str]) -> str:
    first, *others = sorted(set(dates))
    return f"{first} to {others[-1]}" if others else first


def _join(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


# -- command -----------------------------------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        description="build report, figures and README tables from committed result lines"
    )
    made.add_argument(
        "--results", type=Path, default=ROOT / "bench" / "results", help="folder of result lines"
    )
    made.add_argument(
        "--out", type=Path, default=ROOT / "bench", help="folder of report.html and figures/"
    )
    made.add_argument(
        "--readme", type=Path, default=ROOT / "README.md", help="its marked tables are made anew"
    )
    made.add_argument(
        "--check",
        action="store_true",
        help="write nothing; exit 1 where the README's tables would change",
    )
    return made


def main() -> int:
    given = parser().parse_args()
    report = Report.read(given.results, counted_flops)
    before = given.readme.read_text() if given.readme.exists() else ""
    try:
        after = fill(before, report)
    except ValueError as error:
        parser().error(str(error))
    if given.check:
        for line in difflib.unified_diff(
            before.splitlines(),
            after.splitlines(),
            "README.md",
            "README.md from the lines",
            lineterm="",
        ):
            print(line)
        return int(before != after)
    if not report.lines:
        print(_NO_LINES.format(given.results))
    if before != after:
        given.readme.write_text(after)
    print(write(report, given.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
