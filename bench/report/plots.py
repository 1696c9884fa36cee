"""Panels of curves as PNG and SVG, the same bytes from the same numbers.

What is ours is always the thick blue line.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from bench.lines import number

# Okabe and Ito's palette without its yellow: distinct for the colour-blind. Markers and dashes tell
# curves apart in grey
_OURS = "#0072B2"
_PEERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_OUR_MARKERS, _PEER_MARKERS = "oph8", "s^DvPX<"
# in widths of a thick line
_OUR_DASHES: tuple[Any, ...] = ("-", (0, (2.2, 1)), (0, (1, 0.6)), (0, (3, 0.8, 1, 0.8)))
_PEER_DASHES: tuple[Any, ...] = ((0, (5, 1.5)), (0, (1.5, 1.2)), (0, (6, 1.5, 1.5, 1.5)), "-")
_BOUND = "#000000"


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
    log: bool = False  # both axes
    ticks: tuple[float, ...] | None = None  # of x


def save(panels: Sequence[Panel], columns: int, stem: Path) -> bool:
    """Write ``stem``.png and ``stem``.svg: panels row by row, one legend below all.

    False where there is nothing to draw.
    """
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
    # a fixed salt, and no date or version in the file: rebuilding gives the same bytes
    with matplotlib.rc_context({"svg.hashsalt": "vatt_fast", "font.size": 9, "axes.titlesize": 10}):
        styles = _styles(panels)
        handles = [Line2D([], [], label=name, **style) for name, style in styles.items()]
        if any(point.stale for panel in panels for curve in panel.curves for point in curve.points):
            hollow: dict[str, Any] = dict(
                color="grey", marker="o", linestyle="", markerfacecolor="white"
            )
            handles.append(Line2D([], [], label="hollow: stale", **hollow))
        width = min(4.6 * columns, 11.0)
        longest = max(len(str(handle.get_label())) for handle in handles)
        # inches: a handle, and a letter
        legend_columns = min(len(handles), max(1, int(width / (0.9 + 0.075 * longest))))
        legend_rows = -(-len(handles) // legend_columns)
        height = 3.3 * rows + 0.22 * legend_rows + 0.15
        figure = Figure(figsize=(width, height), layout="constrained")
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
        stem.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(f"{stem}.png", dpi=120, metadata={"Software": None})
        figure.savefig(f"{stem}.svg", metadata={"Date": None, "Creator": None})
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


def _draw(panel: Panel, axis: Any, styles: dict[str, dict[str, Any]]) -> None:
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
    width = every_x[-1] / every_x[0] if every_x else 1.0
    ticks: list[float] = []
    for x in every_x:
        if not ticks or x / ticks[-1] >= width**0.12:
            ticks.append(x)
    axis.set_xticks(ticks, [short(x) for x in ticks])
    low, high = axis.get_ylim()
    digits: tuple[float, ...] = (1.0,) if high > 300 * low else (1.0, 2.0, 5.0)
    if high <= 8 * low:
        digits = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axis.yaxis.set_major_locator(LogLocator(subs=digits))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda y, _: number(y)))
    for each in (axis.xaxis, axis.yaxis):
        each.set_minor_locator(NullLocator())


def short(value: float) -> str:
    """785, 50.2k, 1.6M."""
    for least, unit, name in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= least:
            return f"{value / unit:.3g}{name}"
    return f"{value:g}"
