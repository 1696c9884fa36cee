"""Classifying labelled media by several views each, and what that measures.

A view is a window in time and, of pictures, a square along the longer side (paper section 4.2: 4
windows of 3 crops). A file's scores are the mean of its views' logits.

Shapes: N files, V views, C classes.
"""

import collections
import csv
import hashlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..classifier import Classifier
from ..data.clips import ClipSpec, spread
from ..data.label_files import TRAIN
from ..data.labels import LabelledSource, evaluation_split, open_labels
from ..data.media import MediaError, MediaReader
from ..devices import pick_device
from ..files import check_folder, replacing, write_text
from ..finetuning.settings import MODALITY, Record, clip_spec, input_sizes, read_trained
from ..training.distributed import Ranks
from ..training.step import autocast
from ..weights import WEIGHTS
from .embed import computed_with
from .scores import class_table, confusion, one_class_scores, several_classes_scores

RESULT, TABLE, MATRIX, PICTURE, SCORES = (
    "result.json",
    "classes.csv",
    "confusion.csv",
    "confusion.png",
    "scores.npz",
)
# of a task: windows and crops of each
VIEWS = {"video": (4, 3), "audio": (4, 1), "image": (1, 1)}
_MOST_NAMED = 40  # classes whose names stand beside the picture
T = TypeVar("T")
R = TypeVar("R")


# -- views -----------------------------------------------------------------------------------------


def read_views(
    source: LabelledSource, index: int, spec: ClipSpec, windows: int, crops: int
) -> np.ndarray:
    """The views of one example, a window's crops one behind the other.

    The picture is scaled so that it just covers the clip's size; crops are spread evenly along the
    side that is longer than that. Windows are spread evenly over the file, or the segment, and
    those in which there is nothing are left out.

    Returns:
        (V, T, H, W, 3) uint8, or (V, S) float32 of sound.

    Raises:
        MediaError: a file that cannot be read, or without the stream asked for.
    """
    place, (begins, ends) = source.place(index), source.segment(index)
    first = math.ceil(begins * spec.frames_per_second - 1e-6)
    wanted: dict[str, Any] = spec.reader_arguments()
    try:
        with MediaReader(Path(place.path)) as reader:
            upto = min(ends, reader.info.duration_seconds)
            places = spec.places(upto - first / spec.frames_per_second)
            starts = [
                (first + chosen) / spec.frames_per_second for chosen in spread(places, windows)
            ]
            if source.modality == "audio":
                if not reader.info.has_audio:
                    raise MediaError(reader.missing("audio"))
                sounds = reader.clips(starts, only="audio", until=ends, **wanted)
                views = [c.audio for c in sounds if c.audio_valid and c.audio is not None]
            else:
                rows, columns = covering_size(*reader.displayed_size, spec.height, spec.width)
                wanted |= dict(height=rows, width=columns, box=(0.0, 0.0, 1.0, 1.0))
                clips = reader.clips(starts, only="video", until=ends, **wanted)
                views = [
                    clip.video[:, top : top + spec.height, left : left + spec.width]
                    for clip in clips
                    if clip.video_valid and clip.video is not None
                    for top, left in crop_corners(rows, columns, spec.height, spec.width, crops)
                ]
    except OSError as error:
        raise MediaError(f"{place.path} cannot be opened ({error.strerror})") from error
    if not views:
        raise MediaError(f"{place.path} has no {source.modality} in the windows that are looked at")
    return np.stack(views)


def covering_size(rows: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """The size of a picture scaled so that it just covers height x width."""
    scale = max(height / rows, width / columns)
    return max(height, round(rows * scale)), max(width, round(columns * scale))


def crop_corners(
    rows: int, columns: int, height: int, width: int, crops: int
) -> list[tuple[int, int]]:
    """(top, left) of ``crops`` parts of a picture, from its one end to the other; 1: its middle."""
    ends = (rows - height, columns - width)
    tops, lefts = (spread(end + 1, crops) for end in ends)
    return list(zip(tops, lefts, strict=True))


# -- scores of files -------------------------------------------------------------------------------


class Predictions(NamedTuple):
    """What a model says of a source's examples: files (N,), logits (N, C), and what was skipped."""

    files: list[str]
    logits: np.ndarray
    skipped: dict[str, str]


@torch.no_grad()
def predict(
    model: Classifier,
    source: LabelledSource,
    spec: ClipSpec,
    *,
    windows: int,
    crops: int,
    batch_size: int = 4,
    precision: str = "fp32",
    workers: int = 2,
    ranks: Ranks | None = None,
) -> Predictions:
    """The mean logits of each example's views, in the source's order. The model stays as it is.

    Args:
        batch_size: examples whose views go through the model together.
        workers: threads that read ahead; the results do not depend on them.
        ranks: processes that divide the batches; all call, and get the whole. A batch is the same
            whoever computes it, and so are its logits.

    Raises:
        ValueError: no view, or no batch. MediaError: no example can be read.
    """
    for name, value in (("windows", windows), ("crops", crops), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    ranks = ranks or Ranks()
    batches = -(-len(source) // batch_size)
    ends = (batches * (ranks.rank + i) // ranks.world for i in (0, 1))
    own = range(len(source))[slice(*(batch_size * end for end in ends))]
    device = model.classifier.weight.device
    cast = autocast(precision, device)
    files: list[str] = []
    found: list[Tensor] = []
    skipped = dict(source.problems)

    def read(index: int) -> np.ndarray | MediaError:
        try:
            return read_views(source, index, spec, windows, crops)
        except MediaError as error:
            return error

    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        reads = zip(own, ahead(read, own, workers), strict=True)
        while part := list(itertools.islice(reads, batch_size)):
            views = []
            for index, got in part:
                if isinstance(got, MediaError):
                    skipped[source.name(index)] = str(got)
                else:
                    files.append(source.name(index))
                    views.append(torch.from_numpy(got))
            if views:
                with cast:
                    logits = model(torch.cat(views).to(device))
                each = logits.float().cpu().split([len(one) for one in views])
                found += [one.mean(0) for one in each]
    finally:
        for module, mode in modes.items():
            module.training = mode
    shares = ranks.all((files, [one.numpy() for one in found], skipped))
    files = [name for share in shares for name in share[0]]
    means = [one for share in shares for one in share[1]]
    skipped = {name: why for share in shares for name, why in share[2].items()}
    if not means:
        reason = next(iter(skipped.values()), "there are none")
        raise MediaError(f"no example of {source.label} can be read; the first one: {reason}")
    return Predictions(files, np.stack(means), skipped)


def ahead(read: Callable[[T], R], items: Iterable[T], workers: int) -> Iterator[R]:
    """``read`` of each item in order, by threads that are at most two items each ahead."""
    if workers < 1:
        yield from map(read, items)
        return
    waiting: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def scores_of(
    logits: np.ndarray, targets: np.ndarray, several: bool
) -> dict[str, float | int | None]:
    """top1, top5 where each example has one class; mAP, AUC, d_prime where ``several`` is asked."""
    found: dict[str, Any] = {}
    if (targets.sum(1) == 1).all():
        found |= one_class_scores(logits, targets.argmax(1))
    else:
        several = True
    return found | (several_classes_scores(logits, targets) if several else {})


# -- the whole evaluation --------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """What ``evaluate`` measured: ``result`` is what result.json holds."""

    result: dict[str, Any]
    table: list[dict[str, Any]]
    predictions: Predictions
    targets: np.ndarray
    labels: list[str]


def evaluate(
    model: str | os.PathLike,
    data: str | os.PathLike,
    *,
    media: str | os.PathLike | None = None,
    split: str | None = None,
    fold: int = 1,
    skip_missing: bool = False,
    windows: int | None = None,
    crops: int | None = None,
    batch_size: int = 4,
    precision: str = "fp32",
    device: str = "auto",
    workers: int = 2,
    ranks: Ranks | None = None,
    **sizes: int | float | None,
) -> Evaluation:
    """Measure a saved classifier on labelled media.

    Args:
        model: a folder that ``finetune``, ``convert`` or ``Classifier.save_pretrained`` wrote.
        data, media, fold, skip_missing: see ``data.labels.open_labels``.
        split: None: test, else val, else the only one. Of train, and where the data name no
            splits, those that the model was trained on are left out then; else they are counted.
        windows, crops: views of each file; None: 4 x 3 of video, 4 of sound, 1 of a picture.
        ranks: processes that divide the files; all call, and get the whole.
        sizes: frames, height, width, frames_per_second, samples, sample_rate_hz, where they are not
            the model's.

    Raises:
        ValueError: a model without classes' names, classes it does not know, and as
            ``open_labels``. MediaError: nothing can be read.
    """
    ranks = ranks or Ranks()
    folder = Path(model)
    net = Classifier.from_pretrained(folder)
    labels = net.labels
    if labels is None:
        raise ValueError(
            f"{folder} has no labels.txt; write its classes' names there, one a line in the order "
            "of its outputs (convert --labels)"
        )
    record = Record.read(folder)
    task = record.task if record else net.settings.modality
    labelled = open_labels(data, media=media, fold=fold, skip_missing=skip_missing)
    named = split is not None or labelled.names_splits
    chosen = split or evaluation_split(labelled)
    marks = read_trained(folder)
    trained = labelled.trained_on(chosen, marks) if marks else []
    left_out = len(trained) if split is None and chosen == TRAIN else 0
    if left_out:
        labelled = labelled.without(trained)
        if not labelled.examples:
            raise ValueError(
                f"the model was trained on all of {data}; name other media, or measure on these "
                "with split train"
            )
    source = labelled.source(chosen, MODALITY[task], labels)
    default = record.input if record else {}
    given = {name: value for name, value in sizes.items() if value is not None}
    spec = clip_spec(task, default | given, net.config)
    views = VIEWS[task]
    windows, crops = windows or views[0], crops or views[1]
    if crops > 1 and task == "audio":
        raise ValueError(f"crops is {crops}, and sound has none; leave it out")
    net = net.to(pick_device(device))
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    ranks.require_alike({"model_sha256": digest, "labels_sha256": source.label_digest})
    predictions = predict(
        net, source, spec, windows=windows, crops=crops, batch_size=batch_size,
        precision=precision, workers=workers, ranks=ranks,
    )  # fmt: skip
    targets = source.targets(predictions.files).numpy()
    several = task == "audio" or bool(record and record.loss != "softmax")
    measured = scores_of(predictions.logits, targets, several)
    result: dict[str, Any] = {
        **measured,
        "examples": len(predictions.files),
        "classes": len(labels),
        "settings": {
            "model": str(folder),
            "model_sha256": digest,
            "task": task,
            "data": str(data),
            "media": None if media is None else str(media),
            "split": chosen if named else None,
            "fold": fold,
            "left_out_as_trained": left_out,
            "trained_on": len(trained) - left_out,
            "labels_sha256": source.label_digest,
            "windows": windows,
            "crops": crops,
            "input": input_sizes(task, spec),
            "batch_size": batch_size,
            "precision": "bf16" if autocast(precision, next(net.parameters()).device)._enabled
            else "fp32",
            **computed_with(net),
        },
        "skipped": predictions.skipped,
    }  # fmt: skip
    if labelled.missing:
        result["missing"] = len(labelled.missing)
    table = class_table(predictions.logits, targets, labels)
    return Evaluation(result, table, predictions, targets, labels)


def write_evaluation(found: Evaluation, out: str | os.PathLike) -> list[str]:
    """Write result.json, classes.csv, scores.npz and, of one class an example, the confusion.

    Returns:
        what could not be written, and why: the picture, without matplotlib.

    Raises:
        ValueError: a folder in which nothing can be written.
    """
    out, left_out = Path(out), []
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    rows = [list(found.table[0]), *(list(row.values()) for row in found.table)]
    write_text(out / TABLE, _csv(rows))
    with replacing(out / SCORES) as part:
        np.savez(
            part, allow_pickle=False, files=np.array(found.predictions.files),
            logits=found.predictions.logits, targets=found.targets,
        )  # fmt: skip
    for name in (MATRIX, PICTURE):  # of an earlier result
        (out / name).unlink(missing_ok=True)
    if (found.targets.sum(1) == 1).all():
        matrix = confusion(found.predictions.logits, found.targets.argmax(1))
        counts = [[name, *row.tolist()] for name, row in zip(found.labels, matrix, strict=True)]
        write_text(out / MATRIX, _csv([["class", *found.labels], *counts]))
        try:
            figure = confusion_figure(matrix, found.labels)
        except ImportError as error:
            left_out.append(f"{PICTURE}: {error}")
        else:
            with replacing(out / PICTURE) as part:
                figure.savefig(part, dpi=120)
    write_text(out / RESULT, json.dumps(found.result, indent=2) + "\n")
    return left_out


def _csv(rows: Iterable[Sequence[Any]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()


def confusion_figure(matrix: np.ndarray, labels: Sequence[str]) -> Any:
    """matplotlib's Figure of a confusion matrix (C, C): rows' shares in shades of one colour.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a picture needs matplotlib: pip install 'vatt_fast[eval]'") from error
    count = len(matrix)
    totals = matrix.sum(1, keepdims=True)
    shares = np.divide(matrix, totals, out=np.zeros(matrix.shape), where=totals > 0)
    side = min(16.0, 3.2 + 0.34 * min(count, _MOST_NAMED))
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    image = axes.imshow(100 * shares, cmap="Blues", vmin=0, vmax=100, interpolation="nearest")
    figure.colorbar(image, ax=axes, shrink=0.8, label="% of the class's examples")
    axes.set(xlabel="classified as", ylabel="class")
    if count <= _MOST_NAMED:
        axes.set_xticks(range(count), labels, rotation=90 if count > 6 else 30)
        axes.set_yticks(range(count), labels)
    if count <= 20:
        for row, column in zip(*np.nonzero(matrix), strict=True):
            colour = "white" if shares[row, column] > 0.6 else "black"
            axes.text(
                column, row, matrix[row, column], ha="center", va="center", color=colour, size=8
            )
    return figure
