"""report.html of a run: curves, retrieval, clips as they are trained on, settings, versions.

One file that needs nothing else: curves are SVG, pictures are inside. It is drawn from
metrics.jsonl, so a continued run loses nothing.
"""

import base64
import html
import importlib.metadata
import io
import itertools
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..config import VATTConfig
from ..data.augment import Box, ClipAugment, Key, crop_frames
from ..data.clips import Batch, ClipSpec, spread, to_batch
from ..data.dataset import ClipFolder
from ..data.media import MediaError
from ..data.source import Source
from ..data.text import Vocabulary
from ..files import write_text
from .metrics import METRICS, read_metrics
from .settings import PretrainConfig

REPORT = "report.html"
_CLIPS = 6  # on the contact sheet
_TRIED = 50  # clips, until so many are found that can be read
_FRAMES = 4  # shown of each
_HIGHEST = 128  # pixels of a shown frame
_POINTS = 400  # of a curve
# Okabe and Ito's palette: distinct for the colour-blind and in print
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
# title -> {metric: name in the legend}; curves of what a run did not log are left out
_CURVES: dict[str, dict[str, str]] = {
    "Loss": {"loss": "all", "loss_va": "video-audio", "loss_vt": "video-text"},
    "Retrieval on held-out clips, R@10 (%)": {
        "text_to_video_r10": "text to video",
        "audio_to_video_r10": "audio to video",
    },
    "Mean cosine of a batch's embeddings (1: collapsed)": {
        "cosine_video_va": "video, with audio",
        "cosine_audio_va": "audio",
        "cosine_video_vt": "video, with text",
        "cosine_text_vt": "text",
    },
    "Gradient norm": {"gradient_norm": ""},
    "Learning rate": {"learning_rate": ""},
    "Temperature": {"temperature": ""},
    "Clips a second": {"clips_per_second": ""},
    "Seconds a step": {"step_seconds": "all", "data_wait_seconds": "waiting for data"},
}
_RETRIEVAL = {"r1": "R@1 (%)", "r5": "R@5 (%)", "r10": "R@10 (%)", "median_rank": "median rank"}
_KINDS = {"text_to_video": "Text to video", "audio_to_video": "Audio to video"}
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


class Report:
    """The page of one run, written anew at each checkpoint.

    Args:
        settings: what the run records of itself (``settings.describe``).
        augment: what changes its clips.
    """

    def __init__(
        self,
        run: PretrainConfig,
        settings: Mapping[str, Any],
        config: VATTConfig,
        vocabulary: Vocabulary,
        source: Source,
        augment: ClipAugment | None,
    ):
        self.run, self.settings, self.config = run, settings, config
        self.vocabulary, self.source, self.augment = vocabulary, source, augment
        self._sheet: str | None = None

    def write(self) -> None:
        """Raises OSError; then the old page is intact."""
        out = Path(self.run.out)
        if self._sheet is None:  # decoded once
            self._sheet = self._contact_sheet()
        lines = read_metrics(out / METRICS)
        write_text(out / REPORT, self._page(lines))

    def _page(self, lines: Sequence[Mapping[str, Any]]) -> str:
        name = html.escape(Path(self.run.out).absolute().name)
        done = lines[-1]["step"] if lines else 0
        curves = [_curve(title, named, lines) for title, named in _CURVES.items()]
        parts = [
            f"<h1>{name}</h1>",
            f"<p>Step {done} of {self.run.steps}, {html.escape(self.run.preset)}, trained on "
            f"{html.escape(self.run.data)}.</p>",
            _latest(lines),
            "<h2>Curves</h2>",
            f'<div class="curves">{"".join(filter(None, curves))}</div>',
            "<h2>Retrieval</h2>",
            self._retrieval(lines),
            "<h2>Clips</h2>",
            self._sheet or "",
            "<h2>Settings</h2>",
            _table(
                (name, value) for name, value in self._all_settings().items() if name != "model"
            ),
            "<details><summary>Model</summary>"
            f"<pre>{html.escape(self.config.to_json())}</pre></details>",
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

    def _all_settings(self) -> dict[str, Any]:
        free = {name: getattr(self.run, name) for name in ("data", "framework", "device")}
        return free | dict(self.settings)

    def _retrieval(self, lines: Sequence[Mapping[str, Any]]) -> str:
        found = []
        for kind, title in _KINDS.items():
            measured = [line for line in lines if line.get(f"{kind}_r1") is not None]
            if not measured:
                continue
            heads = "".join(f"<th>{name}</th>" for name in _RETRIEVAL.values())
            rows = "".join(_row(line, kind) for line in _spread(measured, 12))
            found.append(f"<h3>{title}</h3><table><tr><th>step</th>{heads}</tr>{rows}</table>")
        if found:
            return f"<p>On {html.escape(str(self.run.eval_data))}.</p>" + "".join(found)
        return "<p>Not measured; --eval-data names held-out clips.</p>"

    def _contact_sheet(self) -> str:
        """The first clips of each source: frames of the file, and of what a step sees."""
        try:
            batch = self._first_clips()
        except MediaError as error:
            return f"<p>None can be shown: {html.escape(str(error))}</p>"
        figures = []
        for row, file in enumerate(batch.files):
            ids = batch.text[row][batch.text_valid[row]]
            sentences = [" ".join(self.vocabulary.words[i] for i in one if i) for one in ids]
            shown = "<p>no picture</p>"
            if batch.video_valid[row]:
                shown = _image(_strip(batch.video[row]), f"frames of {file}")
                if self.augment is not None:
                    changed = self._augmented(batch.video[row], row)
                    shown += _image(_strip(changed), f"frames of {file}, augmented")
            told = "; ".join(map(html.escape, sentences)) or "no caption"
            name = html.escape(file)
            figures.append(
                f"<figure>{shown}<figcaption><b>{name}</b>: {told}</figcaption></figure>"
            )
        below = ", below it augmented" if self.augment is not None else ""
        return (
            f"<p>The middle of the first clips{below}; captions in the model's words.</p>"
            f'<div class="clips">{"".join(figures)}</div>'
        )

    def _first_clips(self) -> Batch:
        """Raises MediaError where none of the first ones can be read."""
        clips = ClipFolder(
            self.source, ClipSpec.from_config(self.config), vocabulary=self.vocabulary
        )
        arrays, names = clips.empty_batch(_CLIPS), list[str]()
        error: MediaError | None = None
        for example in itertools.islice(_in_turn(list(map(len, clips.parts))), _TRIED):
            try:
                clips.read_into(arrays, [len(names)], example, lambda count: spread(count, 1))
            except MediaError as found:
                error = error or found
                continue
            names.append(self.source.name(example))
            if len(names) == _CLIPS:
                break
        if not names:
            raise error or MediaError(f"{self.source.label} has no clips")
        return to_batch({name: values[: len(names)] for name, values in arrays.items()}, names, ())

    def _augmented(self, video: torch.Tensor, row: int) -> torch.Tensor:
        assert self.augment is not None
        key, (height, width) = Key(self.run.seed, 0, row), video.shape[1:3]
        box = self.augment.crop(key, height, width)
        video = video.clone() if box is None else crop_frames(video, box, height, width)
        return torch.from_numpy(self.augment.frames(key, video.contiguous().numpy()))


def _in_turn(counts: Sequence[int]) -> Iterator[int]:
    """The examples of several sources, the first of each, then the second of each, and so on."""
    starts = [0, *itertools.accumulate(counts)]
    for place in range(max(counts)):
        yield from (
            start + place for start, count in zip(starts, counts, strict=False) if place < count
        )


def _row(line: Mapping[str, Any], kind: str) -> str:
    """A step's retrieval."""
    told = [str(line["step"]), *(f"{line[f'{kind}_{key}']:.1f}" for key in _RETRIEVAL)]
    return "<tr>" + "".join(f'<td class="number">{each}</td>' for each in told) + "</tr>"


def _spread(values: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of them, with the first and the last."""
    if len(values) <= count:
        return list(values)
    return [values[round(i * (len(values) - 1) / (count - 1))] for i in range(count)]


# -- curves ----------------------------------------------------------------------------------------

_WIDTH, _HEIGHT = 420, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 8, 10, 24


def _curve(title: str, named: Mapping[str, str], lines: Sequence[Mapping[str, Any]]) -> str:
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
    ticks = _ticks(min(0.0, *values), max(values))

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


def _ticks(low: float, high: float) -> list[float]:
    """Three to six round numbers whose first and last span ``low`` to ``high``."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = unit * next(size for size in (1, 2, 2.5, 5, 10) if size * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


# -- pictures and tables ---------------------------------------------------------------------------


def _strip(video: torch.Tensor) -> np.ndarray:
    """A few frames of a clip (T, H, W, 3) side by side."""
    height, width = video.shape[1:3]
    rows = min(height, _HIGHEST)
    columns = max(1, round(width * rows / height))
    chosen = torch.stack(_spread(list(video), _FRAMES))
    chosen = crop_frames(chosen, Box(0.0, 0.0, 1.0, 1.0), rows, columns)
    return np.concatenate(list(chosen.numpy()), axis=1)


def _image(pixels: np.ndarray, what: str) -> str:
    try:
        from PIL import Image
    except ImportError as error:
        raise ImportError("report.html needs Pillow: pip install 'vatt_fast[data]'") from error
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    height, width = pixels.shape[:2]
    return (
        f'<img width="{width}" height="{height}" alt="{html.escape(what)}" '
        f'src="data:image/jpeg;base64,{data}">'
    )


def _latest(lines: Sequence[Mapping[str, Any]]) -> str:
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
