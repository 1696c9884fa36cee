"""``vatt-fast figures``: the paper's Figures 2 to 4 of a model of one's own, and a page of them."""

import base64
import html
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import MODALITIES
from ..data.clips import ClipSpec
from ..data.labels import open_labels
from ..data.loader import evaluation_clips
from ..devices import pick_device
from ..files import check_folder, replacing, write_text
from ..model import create_model
from .features import window_features
from .figure_data import SPACES, Collected, collect, flat, separation, similarities, together

PAGE, NUMBERS = "figures.html", "figures.json"
# Okabe and Ito's palette without its yellow, which white swallows: distinct for the colour-blind
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
MARKERS = ("o", "^", "s", "X", "D", "v", "P")
_OF_MODALITY = {"video": 0, "audio": 1, "text": 2}
MOST_CLASSES = len(COLOURS) * len(MARKERS)
_ALL = (
    "features_by_class.png",
    *(f"similarity_{space}.png" for space in SPACES),
    *(f"space_{space}.png" for space in ("input", *SPACES)),
    "activations.png",
)
_NODES = 256  # columns of a heat map; more are averaged


@dataclass(frozen=True)
class FiguresConfig:
    """What is shown.

    Args:
        model: saved model or run folder, released checkpoint, or a preset with random weights.
        data: clips with captions and sound, as pretrain's --data.
        out: folder of the pictures, figures.html and figures.json.
        labels: labelled media, whose features are shown by class too.
        media: folder of the media that a file of labels names.
        fold: of UCF101 and HMDB51 the split, of ESC-50 the fold that is shown.
        skip_missing: leave out media that the labels name and that are not there.
        modality: of these features: video or audio.
        clips: at most so many of the data, and of the labelled media.
        seed: of t-SNE.
    """

    model: str
    data: str
    out: str
    labels: str | None = None
    media: str | None = None
    fold: int = 1
    skip_missing: bool = False
    modality: str = "video"
    clips: int = 300
    batch_size: int = 16
    device: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.modality not in ("video", "audio"):
            raise ValueError(f"modality is {self.modality!r}; it is video or audio")
        for name, least in (("clips", 4), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Drawn:
    """A picture of the page."""

    file: str
    title: str
    said: str


def figures(config: FiguresConfig) -> list[Drawn]:
    """Draw all figures that the data allow, write them and the page, and return what was drawn.

    Raises:
        ValueError: too few clips; a model without words. ImportError: matplotlib or scikit-learn
            is not installed.
    """
    _canvas()  # before the work
    out = Path(config.out)
    check_folder(out)
    model = create_model(config.model).to(pick_device(config.device)).eval()
    spec = ClipSpec.from_config(model.config)
    batches = evaluation_clips(
        config.data, spec, vocabulary=model.vocabulary, batch_size=config.batch_size
    )
    found = collect(model, batches, config.clips)
    out.mkdir(parents=True, exist_ok=True)
    drawn: list[Drawn] = []
    numbers: dict[str, Any] = {"clips": len(found.files)}
    if config.labels is not None:
        drawn.append(_draw_classes(config, model, out))
    for space in SPACES:
        positive, negative = similarities(found, space)
        if len(positive) < 2:
            continue
        share = separation(positive, negative)
        means = float(positive.mean()), float(negative.mean())
        numbers[space] = dict(positive=means[0], negative=means[1], separation=share)
        name = f"similarity_{space}.png"
        draw_similarity(positive, negative, out / name)
        drawn.append(
            Drawn(
                name,
                f"Similarity in {space} of {' and '.join(SPACES[space])} of one clip, and of two",
                f"Means {means[0]:.3f} and {means[1]:.3f}; of a pair of each, the one of one clip "
                f"is the more similar in {share:.1f} % (chance: 50).",
            )
        )
    drawn += _draw_spaces(found, out, config.seed)
    if found.activations:
        draw_activations(found.activations, out / "activations.png")
        kind = "one trunk for all" if model.config.agnostic else "each modality's own encoder"
        drawn.append(
            Drawn(
                "activations.png",
                "Mean activation of the nodes, by block and modality",
                f"After GELU in each block's MLP, {kind}. In a row, nodes are in their own order"
                + ("" if _width(found) <= _NODES else f"; {_NODES} columns are means of several")
                + ".",
            )
        )
        numbers["activations"] = {
            name: [round(float(x), 5) for x in values.mean(1)]
            for name, values in found.activations.items()
        }
    for name in {*_ALL} - {one.file for one in drawn}:  # of an earlier call
        (out / name).unlink(missing_ok=True)
    write_text(out / NUMBERS, json.dumps(numbers, indent=2) + "\n")
    write_page(out, drawn, f"{config.model} on {len(found.files)} clips of {config.data}.")
    return drawn


def _width(found: Collected) -> int:
    return max(values.shape[1] for values in found.activations.values())


def _draw_classes(config: FiguresConfig, model: Any, out: Path) -> Drawn:
    """Figure 2: features of labelled media, by class."""
    data = open_labels(
        str(config.labels), media=config.media, fold=config.fold, skip_missing=config.skip_missing
    )
    split = "test" if "test" in data.splits else next(iter(data.splits))
    source = data.source(split, config.modality)
    features = window_features(
        model, source, windows=1, batch_size=config.batch_size, cache=out / "features"
    )
    there = np.isfinite(features.values[:, 0]).all(-1)
    classes = [source.classes_of(name) for name in features.names]
    chosen = [i for i in np.flatnonzero(there) if len(classes[i]) == 1]
    chosen = [chosen[i] for i in _spread(len(chosen), config.clips)]
    names = [data.classes[classes[i][0]] for i in chosen]
    left_out = max(0, len(set(names)) - MOST_CLASSES)
    if left_out:
        kept = set(sorted(set(names))[:MOST_CLASSES])
        pairs = [(i, name) for i, name in zip(chosen, names, strict=True) if name in kept]
        chosen, names = [i for i, _ in pairs], [name for _, name in pairs]
    points = flat(features.values[chosen, 0], config.seed)
    file = "features_by_class.png"
    draw_points(points, names, out / file, sorted(set(names)))
    title = f"{config.modality.capitalize()} features by class, t-SNE"
    said = f"{len(chosen)} examples of split {split}, {len(set(names))} classes; pooled output."
    if left_out:
        said += f" Left out: {left_out} of the classes; colours and shapes are for {MOST_CLASSES}."
    return Drawn(file, title, said)


def _spread(count: int, most: int) -> list[int]:
    return np.unique(np.linspace(0, count - 1, min(most, count)).round().astype(int)).tolist()


def _draw_spaces(found: Collected, out: Path, seed: int) -> list[Drawn]:
    """Figure 3: where the modalities lie before the encoders and in the common spaces."""
    parts = {"input": found.inputs} | {
        space: {m: found.outputs[name] for m, name in names.items()}
        for space, names in SPACES.items()
    }
    told = {
        "input": "Tokens that enter the encoders, a clip's mean, t-SNE",
        "S_va": "Video and audio in the common space S_va, t-SNE",
        "S_vt": "Video and text in the common space S_vt, t-SNE",
    }
    drawn = []
    for name, modalities in parts.items():
        there = {m: x for m, x in modalities.items() if np.isfinite(x).all(1).any()}
        joined = together(there) if len(there) > 1 else None
        if joined is None or len(joined[0]) < 4:
            continue
        file = f"space_{name}.png"
        draw_points(
            flat(joined[0], seed), joined[1], out / file, [m for m in MODALITIES if m in there]
        )
        drawn.append(Drawn(file, told[name], f"{len(joined[0])} points."))
    return drawn


# -- drawing ---------------------------------------------------------------------------------------


def draw_points(points: np.ndarray, names: Sequence[str], path: Path, order: Sequence[str]) -> None:
    """Points (n, 2) by name, each with a colour and a shape of its own."""

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        labels = np.array(names)
        for place, name in enumerate(order):
            number = _OF_MODALITY.get(name, place)
            marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
            mine = points[labels == name]
            axis.scatter(
                *mine.T, s=26, c=COLOURS[number % len(COLOURS)], marker=marker, label=name,
                alpha=0.75, linewidths=0.3, edgecolors="white",
            )  # fmt: skip
        axis.set(xticks=[], yticks=[])
        axis.set_aspect("equal", adjustable="datalim")
        for spine in axis.spines.values():
            spine.set_color("#bbbbbb")
        axis.legend(
            frameon=False, loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0,
            fontsize=9, ncols=1 + (len(order) - 1) // 16,
        )  # fmt: skip

    _save(draw, path, (7.2, 5.2))


def draw_similarity(positive: np.ndarray, negative: np.ndarray, path: Path) -> None:
    """Densities of the two kinds of cosines."""

    def draw(figure: Any) -> None:
        axis = figure.add_subplot()
        low, high = min(positive.min(), negative.min()), max(positive.max(), negative.max())
        bins = int(np.clip(2 * len(positive) ** 0.5, 8, 40))
        edges = np.linspace(low, max(high, low + 1e-6), bins + 1)
        for values, name, colour, hatch in (
            (negative, "two clips", COLOURS[1], ""),
            (positive, "one clip", COLOURS[0], "//"),
        ):
            axis.hist(
                values, edges, density=True, histtype="stepfilled", color=colour, alpha=0.35,
                hatch=hatch, edgecolor=colour, linewidth=1.4, label=name,
            )  # fmt: skip
            axis.axvline(values.mean(), color=colour, linestyle="--", linewidth=1)
        axis.set(xlabel="cosine (dashed: mean)", ylabel="density")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)

    _save(draw, path, (6.4, 3.6))


def draw_activations(activations: dict[str, np.ndarray], path: Path) -> None:
    """A heat map for each modality, (L, F) each, on one scale of colours."""

    def draw(figure: Any) -> None:
        shown = {name: _fewer_columns(values) for name, values in activations.items()}
        all_values = np.concatenate([values.ravel() for values in shown.values()])
        limits = np.quantile(all_values, [0.01, 0.99])
        axes = figure.subplots(len(shown), 1, sharex=False, squeeze=False)[:, 0]
        for axis, (name, values) in zip(axes, shown.items(), strict=True):
            image = axis.imshow(
                values, aspect="auto", cmap="cividis", vmin=limits[0], vmax=limits[1],
                interpolation="nearest", extent=(0, activations[name].shape[1], len(values), 0),
            )  # fmt: skip
            step = -(-len(values) // 8)
            ticks = np.arange(0, len(values), step)
            axis.set_yticks(ticks + 0.5, ticks + 1)
            axis.set(ylabel=f"{name}\nblock")
        axes[-1].set_xlabel("node")
        figure.colorbar(image, ax=list(axes), label="mean activation", extend="both", shrink=0.8)

    deepest = max(len(values) for values in activations.values())
    _save(draw, path, (8.4, 0.6 + len(activations) * (0.9 + 0.11 * deepest)))


def _fewer_columns(values: np.ndarray) -> np.ndarray:
    """(L, F) as means of neighbouring nodes, at most ``_NODES`` columns."""
    run = -(-values.shape[1] // _NODES)
    starts = np.arange(0, values.shape[1], run)
    counts = np.minimum(run, values.shape[1] - starts)
    return np.add.reduceat(values, starts, axis=1) / counts


def _canvas() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'vatt_fast[eval]'") from error
    return Figure, FigureCanvasAgg


def _save(draw: Callable[[Any], None], path: Path, size: tuple[float, float]) -> None:
    figure_class, canvas = _canvas()
    figure = figure_class(figsize=size, layout="constrained")
    canvas(figure)
    draw(figure)
    with replacing(path) as part:
        figure.savefig(part, dpi=130, format="png")


# -- page ------------------------------------------------------------------------------------------


def write_page(folder: str | os.PathLike, drawn: Sequence[Drawn], about: str) -> None:
    """Write figures.html, which holds the pictures itself."""
    folder = Path(folder)
    parts = []
    for one in drawn:
        data = base64.b64encode((folder / one.file).read_bytes()).decode()
        title = html.escape(one.title)
        parts.append(
            f'<figure><h2>{title}</h2><img alt="{title}" src="data:image/png;base64,{data}">'
            f"<figcaption>{html.escape(one.said)}</figcaption></figure>\n"
        )
    style = (
        "body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; "
        "padding: 0 1rem; color: #1a1a1a; background: #fff } figure { margin: 2rem 0 } "
        "h2 { font-size: 1.1rem; margin: 0 0 .4rem } img { max-width: 100% }"
    )
    write_text(
        folder / PAGE,
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<title>Figures</title>\n"
        f"<style>{style}</style>\n</head>\n<body>\n<h1>Figures</h1>\n"
        f"<p>{html.escape(about)}</p>\n{''.join(parts)}</body>\n</html>\n",
    )
