"""The report's figures: ops by size, whole steps and accuracy by drop rate."""

import statistics
from collections.abc import Sequence
from pathlib import Path

from bench import lines, sweeps

from .plots import Curve, Kind, Panel, Point, save
from .step_tables import MODES, Flops, Group, gflops
from .tables import Shown, grouped, scaled

_PIXELS = "pixels of a clip, T x H x W"
_X_LABELS = {
    "tokens": "tokens T",
    "clips": "clips B",
    "pixels": f"{_PIXELS}, half of them kept",
    "clip_pixels": _PIXELS,
}
_MIB = 2**20
_TICKS = (0.0, 25.0, 50.0, 75.0)


def slug(machine: tuple[str, str]) -> str:
    """A machine's name as file names have it."""
    return lines.slug(*machine)


# -- ops by size ------------------------------------------------------------------------------


def scaling(shown: Sequence[Shown], folder: Path) -> dict[Path, str]:
    """{file without its ending: caption} of one machine, one an op, dtype and variable.

    Time above memory, modes side by side.
    """
    made = {}
    for (op, dtype, variable), group in grouped(
        shown, lambda line: (line.op, line.dtype, _at(line).variable)
    ).items():
        x_label = _X_LABELS.get(variable, variable)
        modes = grouped(group, lambda line: line.mode)
        panels = [
            Panel(f"{op}, {dtype}, {mode}", x_label, label, curves(each), log=True)
            for label, curves in (("time (ms)", _times), ("peak memory (MiB)", _peaks))
            for mode, each in modes.items()
        ]
        stem = folder / f"{slug(group[0].line.machine)}_scaling_{op}_{variable}_{dtype}"
        if save(panels, len(modes), stem):
            made[stem] = (
                f"{op} in {dtype} by {variable.replace('_', ' ')}: time above, peak memory beyond "
                "the inputs below. Bars are p20 to p80. The floor counts a backward that computes "
                "scores again."
            )
    return made


def _at(line):
    found = scaled(line)
    assert found
    return found


def _times(shown: Sequence[Shown]) -> list[Curve]:
    def point(each: Shown) -> Point:
        line = each.line
        return Point(_at(line).size, line.ms_p50, line.ms_p20, line.ms_p80, bool(each.stale))

    return [
        *_curves(shown, point),
        Curve("floor: the counted work at the ceiling", _floor(shown), "bound"),
    ]


def _floor(shown: Sequence[Shown]) -> list[Point]:
    """What the measured ceiling allows for the work that ``floors`` counts."""
    # all lines of a size give the same
    found = {
        _at(each.line).size: each.line.ms_p50 * each.line.share_of_ceiling
        for each in shown
        if each.line.share_of_ceiling
    }
    return [Point(size, floor) for size, floor in found.items()]


def _peaks(shown: Sequence[Shown]) -> list[Curve]:
    told = [each for each in shown if each.line.peak_bytes]  # a logarithm has no zero
    return _curves(
        told,
        lambda each: Point(
            _at(each.line).size, (each.line.peak_bytes or 0) / _MIB, stale=bool(each.stale)
        ),
    )


def _curves(shown: Sequence[Shown], point) -> list[Curve]:
    """A curve a backend, ours first."""
    groups = grouped(sorted(shown, key=lambda each: not each.line.ours), lambda line: line.backend)
    return [
        Curve(name, [point(each) for each in group], "ours" if group[0].line.ours else "peer")
        for name, group in groups.items()
    ]


# -- whole steps by drop rate -----------------------------------------------------------------


def drop_rate(group: Group, flops: Flops, folder: Path) -> dict[Path, str]:
    """{file without its ending: caption}: work and time of ours, time and memory of all."""
    stem = f"{slug(group.machine)}_{group.stem}"
    modes = [mode for mode in MODES if group.backends(mode)]
    made = {}
    for name, panels, caption in (
        (
            "work",
            _work(group, flops),
            "what a drop rate saves: the work of a clip, our time, and both as shares of those of "
            "drop rate 0",
        ),
        (
            "time",
            [_by_mode(group, mode, "time (ms)", _time) for mode in modes],
            "time by drop rate, ours against the peers. Bars are p20 to p80",
        ),
        (
            "memory",
            [_by_mode(group, mode, "peak memory (MiB)", _peak) for mode in modes],
            "peak memory by drop rate, ours against the peers",
        ),
    ):
        path = folder / f"{stem}_{name}"
        if save(panels, len(panels), path):
            made[path] = f"{group.title}: {caption}."
    return made


def _work(group: Group, flops: Flops) -> list[Panel]:
    counted = gflops(group, flops)
    ours = []
    for mode, name in MODES.items():
        backend = next(iter(group.backends(mode)), None)  # ours first
        if backend and any(each.line.ours for each in group.at(mode, backend).values()):
            points = [
                Point(p, each.line.ms_p50, stale=bool(each.stale))
                for p, each in group.at(mode, backend).items()
            ]
            ours.append(Curve(f"{backend}, {name}", points, "ours"))

    def panel(title: str, y_label: str, curves: Sequence[Curve]) -> Panel:
        return Panel(title, "drop rate (%)", y_label, curves, ticks=_TICKS)

    def count(name: str, field: str, kind: Kind = "peer") -> Curve:
        values = {p: getattr(each, field) for p, each in counted.items()}
        return Curve(name, [Point(p, value) for p, value in values.items() if value], kind)

    panels = [panel("time of ours", "time (ms)", ours)]
    if counted:
        gflop_curves = [
            count("GFLOPs, the paper's convention", "convention"),
            count("GFLOPs, true", "true"),
            count("GFLOPs, published", "published", "marks"),
        ]
        panels.insert(0, panel("forward pass of a clip", "GFLOPs", gflop_curves))
        relative = [_relative(curve) for curve in (count("GFLOPs, as timed", "timed"), *ours)]
        panels.append(panel("relative to drop rate 0", "share of drop rate 0 (%)", relative))
    return panels


def _relative(curve: Curve) -> Curve:
    """In percent of the value at drop rate 0; nothing where that is not known."""
    whole = {point.x: point.y for point in curve.points}.get(0)
    return Curve(
        curve.name,
        [point._replace(y=100 * point.y / whole) for point in curve.points] if whole else [],
        curve.kind,
    )


def _by_mode(group: Group, mode: str, y_label: str, point) -> Panel:
    curves = []
    for backend in group.backends(mode):
        by_percent = group.at(mode, backend)
        ours = any(each.line.ours for each in by_percent.values())
        points = [
            found
            for percent, each in by_percent.items()
            if (found := point(percent, each)) is not None
        ]
        curves.append(Curve(backend, points, "ours" if ours else "peer"))
    return Panel(MODES[mode], "drop rate (%)", y_label, curves, ticks=_TICKS)


def _time(percent: int, each: Shown) -> Point:
    return Point(percent, each.line.ms_p50, each.line.ms_p20, each.line.ms_p80, bool(each.stale))


def _peak(percent: int, each: Shown) -> Point | None:
    return (
        None
        if each.line.peak_bytes is None
        else Point(percent, each.line.peak_bytes / _MIB, stale=bool(each.stale))
    )


# -- accuracy ---------------------------------------------------------------------------------


def accuracies(runs: Sequence[sweeps.Run], folder: Path) -> dict[Path, str]:
    """Mean and spread of retrieval and linear probe against what a training step costs."""
    panels, untrained = [], []
    for measure, title in sweeps.MEASURES.items():
        if hasattr(runs[0], before := f"{measure}_before"):
            mean = statistics.mean(getattr(run, before) for run in runs)
            untrained.append(f"{title} {mean:.1f} %")
        curves = []
        for steps in sorted({run.steps for run in runs}):
            means = _means([run for run in runs if run.steps == steps], measure)
            curves.append(Curve(f"mean of the seeds, {steps} steps", means, "ours"))
        dots = [Point(run.train_gflops, getattr(run, measure)) for run in runs]
        curves.append(Curve("one seed", dots, "dots"))
        panels.append(Panel(title, "training GFLOPs of a clip", "correct (%)", curves))
    stem = folder / "accuracy"
    save(panels, 2, stem)
    what = "Accuracy against the work of training, points labelled by drop rate. "
    what += "Bars are one standard deviation over the seeds"
    return {stem: f"{what}. Untrained: {', '.join(untrained)}."}


def _means(runs: Sequence[sweeps.Run], measure: str) -> list[Point]:
    points = []
    for drop_rate in sorted({run.drop_rate for run in runs}):
        group = [run for run in runs if run.drop_rate == drop_rate]
        mean, deviation = sweeps.spread(group, measure)
        low, high = (None, None) if deviation is None else (mean - deviation, mean + deviation)
        points.append(Point(group[0].train_gflops, mean, low, high, label=f"{drop_rate:.0%}"))
    return points
