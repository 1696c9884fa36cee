"""A run's page: one HTML file that needs nothing else. Curves are SVG, pictures are inside.

It is drawn from metrics.jsonl, so a continued run loses nothing.
"""

import base64
import html
import importlib.metadata
import io
import json
import math
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

REPORT = "report.html"
Lines = Sequence[Mapping[str, Any]]  # of metrics.jsonl
# title -> {metric: name in the legend}; curves of what a run did not log are left out
SHARED_CURVES: dict[str, dict[str, str]] = {
    "Gradient norm": {"gradient_norm": ""},
    "Learning rate": {"learning_rate": ""},
    "Temperature": {"temperature": ""},
    "Clips a second": {"clips_per_second": ""},
    "Seconds a step": {"step_seconds": "all", "data_wait_seconds": "waiting for data"},
}
_ROWS = 12  # of measurements shown
_POINTS = 400  # of a curve
# Okabe and Ito's palette: distinct for the colour-blind and in print
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_PACKAGES = ("vatt_fast", "torch", "numpy", "av", "jax", "triton")
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem; border-bottom: 1px solid #8884 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(24rem, 1fr)); gap: 1rem }
svg { width: 100%; height: auto } svg text { font-size: 11px; fill: currentColor }
figure { margin: 0 } figcaption { font-size: 13px }
img { max-width: 100%; height: auto; display: block; margin-bottom: 2px }
.clips { display: grid; gap: 1.5rem }
table { border-collapse: collapse } td, th { padding: .15rem .8rem .15rem 0; text-align: left }
td.number { text-align: right; font-variant-numeric: tabular-nums }
@media (prefers-color-scheme: dark) { body { background: #181818; color: #ddd } }
"""


def run_page(
    name: str,
    intro: str,
    lines: Lines,
    curves: Mapping[str, Mapping[str, str]],
    sections: Mapping[str, str],
    settings: Mapping[str, Any],
    model: str,
) -> str:
    """The whole page.

    Args:
        name, intro: the run's name and a sentence about it, plain text.
        curves: title -> {metric: name in the legend}, before those that all runs have.
        sections: title -> HTML, between the curves and the settings.
        model: its config as JSON.
    """
    name = html.escape(name)
    drawn = [curve(title, named, lines) for title, named in ({**curves, **SHARED_CURVES}).items()]
    parts = [
        f"<h1>{name}</h1>",
        f"<p>{html.escape(intro)}</p>",
        _latest(lines),
        "<h2>Curves</h2>",
        f'<div class="curves">{"".join(filter(None, drawn))}</div>',
        *(f"<h2>{title}</h2>\n{body}" for title, body in sections.items()),
        "<h2>Settings</h2>",
        _table(settings.items()),
        f"<details><summary>Model</summary><pre>{html.escape(model)}</pre></details>",
        "<h2>Versions</h2>",
        _table(_versions().items()),
    ]
    body = "\n".join(parts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n"
        "</body>\n</html>\n"
    )


def steps_done(lines: Lines) -> int:
    return lines[-1]["step"] if lines else 0


def measured(lines: Lines, names: Mapping[str, str]) -> str:
    """A table of the steps that were measured, metric -> heading; "" where none was."""
    found = [line for line in lines if any(line.get(name) is not None for name in names)]
    names = {n: told for n, told in names.items() if any(line.get(n) is not None for line in found)}
    if not found:
        return ""
    heads = "".join(f"<th>{told}</th>" for told in names.values())
    rows = "".join(_row(line, names) for line in spread_over(found, _ROWS))
    return f"<table><tr><th>step</th>{heads}</tr>{rows}</table>"


def _row(line: Mapping[str, Any], names: Mapping[str, str]) -> str:
    values = [line.get(name) for name in names]
    told = [str(line["step"]), *("" if value is None else f"{value:.1f}" for value in values)]
    return "<tr>" + "".join(f'<td class="number">{each}</td>' for each in told) + "</tr>"


def spread_over(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of them, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


# -- curves ----------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 10, 24


def curve(title: str, named: Mapping[str, str], lines: Lines) -> str:
    """One panel; "" where nothing of it was logged."""
    curves = {
        metric: [(line["step"], line[metric]) for line in lines if line.get(metric) is not None]
        for metric in named
    }
    curves = {metric: _thinned(points) for metric, points in curves.items() if points}
    if not curves:
        return ""
    steps = [step for points in curves.values() for step, _ in points]
    values = [value for points in curves.values() for _, value in points]
    first, last = min(steps), max(steps)
    ticks = ticks_over(min(0.0, *values), max(values))

    def x(step: float) -> float:
        share = (step - first) / (last - first) if last > first else 0.5
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(value: float) -> float:
        share = (value - ticks[0]) / (ticks[-1] - ticks[0])
        return _HEIGHT - _BOTTOM - share * (_HEIGHT - _TOP - _BOTTOM)

    drawn = []
    for tick in ticks:
        drawn.append(
            f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" '
            'stroke="currentColor" stroke-opacity="0.15"/>'
            f'<text x="{_LEFT - 6}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:.4g}</text>'
        )
    for step, anchor in ((first, "start"), (last, "end")):
        drawn.append(
            f'<text x="{x(step):.1f}" y="{_HEIGHT - 6}" text-anchor="{anchor}">'
            f"step {step:.0f}</text>"
        )
    legend = []
    for colour, (metric, points) in zip(_COLOURS, curves.items(), strict=False):
        line = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        drawn.append(
            f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
            if len(points) > 1
            else f'<circle cx="{x(points[0][0]):.1f}" cy="{y(points[0][1]):.1f}" r="3" '
            f'fill="{colour}"/>'
        )
        if named[metric]:
            legend.append(f'<span style="color:{colour}">&#9644;</span> {named[metric]}')
    head = html.escape(title)
    key = f"<br>{' &nbsp; '.join(legend)}" if legend else ""
    return (
        f'<figure><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{head}">'
        f"{''.join(drawn)}</svg><figcaption><b>{head}</b>{key}</figcaption></figure>"
    )


def _thinned(points: list[tuple[int, float]]) -> list[tuple[float, float]]:
    """At most ``_POINTS`` of them; each is the mean of a run of points."""
    run = -(-len(points) // _POINTS)
    parts = [np.array(points[i : i + run], float) for i in range(0, len(points), run)]
    return [(float(part[-1, 0]), float(part[:, 1].mean())) for part in parts]


def ticks_over(low: float, high: float) -> list[float]:
    """Three to six round numbers whose first and last span ``low`` to ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(size for size in (1, 2, 2.5, 5, 10) if size * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


# -- pictures and tables ---------------------------------------------------------------------------


def photo(pixels: np.ndarray, what: str) -> str:
    """Pixels (H, W, 3) uint8 as a JPEG inside the page. Raises ImportError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("report.html needs Pillow: pip install 'vatt_fast[data]'") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    height, width = pixels.shape[:2]
    return picture(file.getvalue(), "jpeg", what, f'width="{width}" height="{height}" ')


def picture(data: bytes, kind: str, what: str, size: str = "") -> str:
    """An image file, inside the page."""
    return (
        f'<img {size}alt="{html.escape(what)}" '
        f'src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
    )


def _latest(lines: Lines) -> str:
    """The last value of every metric."""
    last: dict[str, Any] = {}
    for line in lines:
        last |= {name: value for name, value in line.items() if name != "step"}
    rows = {name: "not finite" if value is None else f"{value:.5g}" for name, value in last.items()}
    return f"<details><summary>Latest values</summary>{_table(rows.items())}</details>"


def _table(rows: Any) -> str:
    cells = "".join(
        f"<tr><th>{html.escape(str(name))}</th><td>{html.escape(_told(value))}</td></tr>"
        for name, value in rows
    )
    return f"<table>{cells}</table>"


def _told(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "machine": platform.machine()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
    return found
