"""The report's figures as PNG: ops by size, whole steps by drop rate.

The same numbers give the same bytes. What is ours is always the thick blue line; bars are p20 to
p80, hollow markers are stale lines.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench import lines
from bench.lines import number

from . import tables
from .tables import MODES, Scaled, Shown, grouped, scaled

_PIXELS = "pixels of a clip, T x H x W"
_X_LABELS = {
    "tokens": "tokens T",
    "clips": "clips B",
    "pixels": f"{_PIXELS}, half of them kept",
    "clip_pixels": _PIXELS,
}
_MIB = 2**20
_PERCENTS = (0.0, 25.0, 50.0, 75.0)  # the paper's drop rates

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


class Curve(NamedTuple):
    name: str
    points: Sequence[Point]
    kind: Literal["ours", "peer", "bound"]  # a bound is a dashed line without markers


class Panel(NamedTuple):
    title: str
    x_label: str
    y_label: str
    curves: Sequence[Curve]
    log: bool = False  # both axes, whose x are sizes; else x are drop rates in percent


# -- what is drawn ----------------------------------------------------------------------------


def scaling(shown: Sequence[Shown], folder: Path) -> Iterator[Path]:
    """A figure a machine, op, dtype and variable: time above memory, modes side by side.

    Memory is the peak beyond the inputs. The floor counts a backward that computes scores again.
    """
    kinds = grouped(shown, lambda line: (line.machine, line.op, line.dtype, _at(line).variable))
    for (machine, op, dtype, variable), group in kinds.items():
        modes = grouped(group, lambda line: line.mode)
        panels = [
            Panel(f"{op}, {dtype}, {mode}", _X_LABELS[variable], label, curves(each), log=True)
            for label, curves in (("time (ms)", _times), ("peak memory (MiB)", _peaks))
            for mode, each in modes.items()
        ]
        path = folder / f"{lines.slug(*machine)}_scaling_{op}_{variable}_{dtype}.png"
        save(panels, len(modes), path)
        yield path


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


def steps(shown: Sequence[Shown], folder: Path) -> Iterator[Path]:
    """A figure a configuration of a machine: time by drop rate, training beside inference."""

    def point(each: Shown) -> Point:
        return _time(tables.step(each.line).percent, each)

    for group in tables.step_groups(shown):
        modes = grouped(group.shown, lambda line: line.mode)
        panels = [
            Panel(title, "drop rate (%)", "time (ms)", _curves(modes.get(mode, ()), point))
            for mode, title in MODES.items()
        ]
        parts = (lines.slug(*group.machine), group.configuration, group.dtype, f"b{group.batch}")
        path = folder / f"{'_'.join(parts)}_time.png"
        save(panels, len(panels), path)
        yield path


# -- drawing ----------------------------------------------------------------------------------


def save(panels: Sequence[Panel], columns: int, path: Path) -> None:
    """Write panels row by row, one legend below all; what has no points is left out."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'vatt_fast[eval]'") from error
    drawn = [[curve for curve in panel.curves if curve.points] for panel in panels]
    panels = [p._replace(curves=each) for p, each in zip(panels, drawn, strict=True) if each]
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
        shape: dict[str, Any] = dict(ncols=legend_columns, handlelength=4.4, borderaxespad=0.8)
        figure.legend(handles=handles, loc="outside lower center", frameon=False, **shape)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120, metadata={"Software": None})  # a version would change bytes


def _styles(panels: Sequence[Panel]) -> dict[str, dict[str, Any]]:
    """Of each curve's name, ours first; the same in all panels."""
    kinds = {curve.name: curve.kind for panel in panels for curve in panel.curves}
    ours, peers, bounds = (
        [name for name, each in kinds.items() if each == kind] for kind in ("ours", "peer", "bound")
    )
    found: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(ours):
        shape = dict(marker=_OUR_MARKERS[i % 4], linestyle=_OUR_DASHES[i % 4], markersize=6)
        found[name] = dict(color=_OURS, linewidth=2.8, zorder=4, **shape)
    for i, name in enumerate(peers):
        # later ones lie on top: where curves coincide, the earlier look out below
        size = max(4.0, 8 - 0.7 * i)
        shape = dict(marker=_PEER_MARKERS[i % 7], linestyle=_PEER_DASHES[i % 4], markersize=size)
        found[name] = dict(color=_PEERS[i % 5], linewidth=1.3, zorder=3, **shape)
    bound = dict(color=_BOUND, linestyle="--", linewidth=1.1, zorder=2)
    return found | dict.fromkeys(bounds, bound)


def _draw(panel: Panel, axis: Any, styles: Mapping[str, dict[str, Any]]) -> None:
    every_x = sorted({point.x for curve in panel.curves for point in curve.points})
    for curve in panel.curves:
        style = styles[curve.name]
        at = {point.x: point.y for point in curve.points}
        # what was not measured leaves a gap
        axis.plot(every_x, [at.get(x, float("nan")) for x in every_x], **style)
        for point in curve.points:
            if point.stale:
                axis.plot(point.x, point.y, **style | dict(linestyle="", markerfacecolor="white"))
            if point.low is not None and point.high is not None:
                bar = dict(color=style["color"], linewidth=1, zorder=style["zorder"])
                axis.vlines(point.x, point.low, point.high, **bar)
    axis.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axis.grid(alpha=0.3)
    if panel.log:
        _log_axes(axis, every_x)
        return
    axis.margins(x=0.11)
    axis.set_ylim(0, 1.02 * axis.get_ylim()[1])
    margin = 0.06 * (_PERCENTS[-1] - _PERCENTS[0])
    axis.set(xticks=_PERCENTS, xlim=(_PERCENTS[0] - margin, _PERCENTS[-1] + margin))


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
