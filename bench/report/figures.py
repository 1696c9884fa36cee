"""The report's figures as PNG: ops by size, whole steps and accuracy by drop rate.

The same numbers give the same bytes. What is ours is always the thick blue line.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench import lines, sweeps
from bench.lines import number

from .tables import MODES, Group, Scaled, Shown, grouped, scaled

_PIXELS = "pixels of a clip, T x H x W"
_X_LABELS = {
    "tokens": "tokens T",
    "clips": "clips B",
    "pixels": f"{_PIXELS}, half of them kept",
    "clip_pixels": _PIXELS,
}
_MIB = 2**20
_TICKS = (0.0, 25.0, 50.0, 75.0)

# Okabe and Ito's palette without its yellow: distinct for the colour-blind. Markers and dashes tell
# curves apart in grey
_OURS, _BOUND = "#0072B2", "#000000"
_PEERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OUR_MARKERS, _PEER_MARKERS = "oph8", "s^DvPX<"
# in widths of a thick line
_OUR_DASHES: tuple[Any, ...] = ("-", (0, (2.2, 1)), (0, (1, 0.6)), (0, (3, 0.8, 1, 0.8)))
_PEER_DASHES: tuple[Any, ...] = ((0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-")


class Point(NamedTuple):
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    stale: bool = False  # drawn hollow
    label: str = ""


Kind = Literal["ours", "peer", "bound", "marks", "dots"]


@dataclass(frozen=True)
class Curve:
    """A bound is a dashed line without markers, marks have no line, dots are faint values."""

    name: str
    points: Sequence[Point]
    kind: Kind = "peer"


@dataclass(frozen=True)
class Panel:
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log: bool = False  # both axes, whose x are sizes; else x are drop rates in percent
    ticks: tuple[float, ...] | None = None  # of x


# -- what is drawn: {file: caption} -----------------------------------------------------------


def scaling(shown: Sequence[Shown], folder: Path) -> dict[Path, str]:
    """Of one machine, a figure an op, dtype and variable: time above memory, modes side by side."""
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
        path = folder / f"{lines.slug(*group[0].line.machine)}_scaling_{op}_{variable}_{dtype}.png"
        if save(panels, len(modes), path):
            made[path] = (
                f"{op} in {dtype} by {variable.replace('_', ' ')}: time above, peak memory beyond "
                "the inputs below. Bars are p20 to p80. The floor counts a backward that computes "
                "scores again."
            )
    return made


def _at(line: lines.Line) -> Scaled:
    found = scaled(line)
    assert found
    return found


def _time(x: float, each: Shown) -> Point:
    return Point(x, each.line.ms_p50, each.line.ms_p20, each.line.ms_p80, bool(each.stale))


def _times(shown: Sequence[Shown]) -> list[Curve]:
    # what the measured ceiling allows for the counted work: all lines of a size give the same
    floor = {
        _at(each.line).size: each.line.ms_p50 * each.line.share_of_ceiling
        for each in shown
        if each.line.share_of_ceiling
    }
    points = [Point(size, ms) for size, ms in floor.items()]
    bound = Curve("floor: the counted work at the ceiling", points, "bound")
    return [*_curves(shown, lambda each: _time(_at(each.line).size, each)), bound]


def _peaks(shown: Sequence[Shown]) -> list[Curve]:
    def point(each: Shown) -> Point:
        size = (each.line.peak_bytes or 0) / _MIB
        return Point(_at(each.line).size, size, stale=bool(each.stale))

    return _curves([each for each in shown if each.line.peak_bytes], point)  # no logarithm of zero


def _curves(shown: Sequence[Shown], point: Callable[[Shown], Point]) -> list[Curve]:
    """A curve a backend, ours first."""
    groups = grouped(sorted(shown, key=lambda each: not each.line.ours), lambda line: line.backend)
    return [
        Curve(name, [point(each) for each in group], "ours" if group[0].line.ours else "peer")
        for name, group in groups.items()
    ]


def drop_rate(group: Group, folder: Path) -> dict[Path, str]:
    """Work and time of ours, and time of all."""
    tail = "_features" if group.features else ""
    stem = f"{lines.slug(*group.machine)}_{group.configuration}_{group.dtype}_b{group.batch}{tail}"
    work = "what a drop rate saves: the work of a clip, our time, and both as shares of those of "
    work += "drop rate 0"
    time = "time by drop rate, ours against the peers. Bars are p20 to p80"
    made = {}
    for name, panels, caption in (
        ("work", _work(group), work),
        ("time", [_panel(MODES[m], "time (ms)", _steps(group, m)) for m in MODES], time),
    ):
        path = folder / f"{stem}_{name}.png"
        if save(panels, len(panels), path):
            made[path] = f"{group.title}: {caption}."
    return made


def _panel(title: str, y_label: str, curves: Sequence[Curve]) -> Panel:
    return Panel(title, "drop rate (%)", y_label, curves, ticks=_TICKS)


def _steps(group: Group, mode: str) -> list[Curve]:
    return [
        Curve(
            backend,
            [_time(percent, each) for percent, each in by.items()],
            "ours" if any(each.line.ours for each in by.values()) else "peer",
        )
        for backend, by in group.by_backend(mode).items()
    ]


def _work(group: Group) -> list[Panel]:
    counted = group.gflops()
    ours = [
        Curve(f"{curve.name}, {name}", [p._replace(low=None) for p in curve.points], "ours")
        for mode, name in MODES.items()
        for curve in _steps(group, mode)[:1]
        if curve.kind == "ours"
    ]

    def count(name: str, field: str, kind: Kind = "peer") -> Curve:
        values = {p: getattr(each, field) for p, each in counted.items()}
        return Curve(name, [Point(p, value) for p, value in values.items() if value], kind)

    panels = [_panel("time of ours", "time (ms)", ours)]
    if counted:
        gflop_curves = [
            count("GFLOPs, the paper's convention", "convention"),
            count("GFLOPs, true", "true"),
            count("GFLOPs, published", "published", "marks"),
        ]
        panels.insert(0, _panel("forward pass of a clip", "GFLOPs", gflop_curves))
        shares = [_relative(curve) for curve in (count("GFLOPs, as timed", "timed"), *ours)]
        panels.append(_panel("relative to drop rate 0", "share of drop rate 0 (%)", shares))
    return panels


def _relative(curve: Curve) -> Curve:
    """In percent of the value at drop rate 0; nothing where that is not known."""
    whole = {point.x: point.y for point in curve.points}.get(0)
    points = [p._replace(y=100 * p.y / whole) for p in curve.points] if whole else []
    return replace(curve, points=points)


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
    path = folder / "accuracy.png"
    save(panels, 2, path)
    what = "Accuracy against the work of training, points labelled by drop rate. "
    what += "Bars are one standard deviation over the seeds"
    return {path: f"{what}. Untrained: {', '.join(untrained)}."}


def _means(runs: Sequence[sweeps.Run], measure: str) -> list[Point]:
    points = []
    for rate in sorted({run.drop_rate for run in runs}):
        group = [run for run in runs if run.drop_rate == rate]
        mean, deviation = sweeps.spread(group, measure)
        low, high = (None, None) if deviation is None else (mean - deviation, mean + deviation)
        points.append(Point(group[0].train_gflops, mean, low, high, label=f"{rate:.0%}"))
    return points


# -- drawing ----------------------------------------------------------------------------------


def save(panels: Sequence[Panel], columns: int, path: Path) -> bool:
    """Write panels row by row, one legend below all; False where there is nothing to draw."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'vatt_fast[eval]'") from error
    panels = [
        replace(panel, curves=[curve for curve in panel.curves if curve.points]) for panel in panels
    ]
    panels = [panel for panel in panels if panel.curves]
    if not panels:
        return False
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 10}):
        styles = _styles(panels)
        handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
        if any(point.stale for panel in panels for curve in panel.curves for point in curve.points):
            hollow = Line2D([], [], color="grey", marker="o", linestyle="", markerfacecolor="white")
            hollow.set_label("hollow: stale")
            handles.append(hollow)
        width = min(4.6 * columns, 11.0)
        longest = max(len(str(handle.get_label())) for handle in handles)
        # inches: a handle, and a letter
        legend_columns = min(len(handles), max(1, int(width / (0.9 + 0.075 * longest))))
        legend_rows = -(-len(handles) // legend_columns)
        size = (width, 3.3 * rows + 0.22 * legend_rows + 0.15)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for panel, axis in zip(panels, axes, strict=False):
            _draw(panel, axis, styles)
        figure.legend(
            handles=handles,
            loc="outside lower center",
            ncols=legend_columns,
            frameon=False,
            handlelength=4.4,
            borderaxespad=0.8,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})  # a version would change bytes
    return True


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Of each curve's name, ours first; the same in all panels."""
    kinds = {curve.name: curve.kind for panel in panels for curve in panel.curves}
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(name for name, kind in kinds.items() if kind == "ours"):
        shape = dict(marker=_OUR_MARKERS[i % 4], linestyle=_OUR_DASHES[i % 4], markersize=6)
        found[name] = dict(color=_OURS, linewidth=2.8, zorder=4, **shape)
    for i, name in enumerate(name for name, kind in kinds.items() if kind == "peer"):
        # later ones lie on top: where curves coincide, the earlier look out below
        size = max(4.0, 8 - 0.7 * i)
        shape = dict(marker=_PEER_MARKERS[i % 7], linestyle=_PEER_DASHES[i % 4], markersize=size)
        found[name] = dict(color=_PEERS[i % 5], linewidth=1.3, zorder=3, **shape)
    others: dict[str, dict[str, Any]] = {
        "bound": dict(color=_BOUND, linestyle="--", linewidth=1.1, zorder=2),
        "marks": dict(color=_BOUND, marker="x", linestyle="", markersize=8, zorder=5),
        "dots": dict(color="#555555", marker=".", linestyle="", markersize=6, alpha=0.4, zorder=1),
    }
    found |= {name: others[kind] for name, kind in kinds.items() if kind in others}
    return found


def _draw(panel: Panel, axis: Any, styles: Mapping[str, dict[str, Any]]) -> None:
    every_x = sorted({point.x for curve in panel.curves for point in curve.points})
    for curve in panel.curves:
        style = styles[curve.name]
        at = {point.x: point.y for point in curve.points}
        if curve.kind == "dots":
            axis.plot([p.x for p in curve.points], [p.y for p in curve.points], **style)
            continue
        # what was not measured leaves a gap
        axis.plot(every_x, [at.get(x, float("nan")) for x in every_x], **style)
        for point in curve.points:
            if point.stale:
                axis.plot(point.x, point.y, **style | dict(linestyle="", markerfacecolor="white"))
            if point.low is not None and point.high is not None:
                bar = dict(color=style["color"], linewidth=1, zorder=style["zorder"])
                axis.vlines(point.x, point.low, point.high, **bar)
            if point.label:
                place = dict(xytext=(7, -11), textcoords="offset points", fontsize=8)
                axis.annotate(point.label, (point.x, point.y), **place)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axis.grid(alpha=0.3)
    if panel.log:
        _log_axes(axis, every_x)
        return
    axis.margins(x=0.11)
    axis.set_ylim(0, 1.02 * axis.get_ylim()[1])
    if panel.ticks:
        margin = 0.06 * (panel.ticks[-1] - panel.ticks[0])
        axis.set(xticks=panel.ticks, xlim=(panel.ticks[0] - margin, panel.ticks[-1] + margin))


def _log_axes(axis: Any, every_x: Sequence[float]) -> None:
    """Sizes themselves as ticks of x, as far as they fit; plain numbers on y."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set(xscale="log", yscale="log")
    width = every_x[-1] / every_x[0]
    ticks: list[float] = []
    for x in every_x:
        if not ticks or x / ticks[-1] >= width**0.12:
            ticks.append(x)
    axis.set_xticks(ticks, [_short(x) for x in ticks])
    low, high = axis.get_ylim()
    digits: tuple[float, ...] = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    if high <= 8 * low:
        digits = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.yaxis.set_major_locator(LogLocator(subs=digits))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(NullLocator())


def _short(value: float) -> str:
    """785, 50.2k, 1.6M."""
    for least, unit, name in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"
