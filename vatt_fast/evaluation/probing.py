"""``vatt-fast probe``: linear classifiers on a model's frozen features of labelled media."""

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from ..data.labels import evaluation_split, open_labels
from ..devices import pick_device
from ..files import check_folder, write_text
from ..model import create_model
from .embed import computed_with, model_digest
from .features import Features, window_features
from .linear import Kind, LowRankSettings, linear_scores
from .scores import one_class_scores

Modality = Literal["video", "audio"]
RESULT = "probe.json"


@dataclass(frozen=True)
class ProbeConfig:
    """What is probed, and how.

    Args:
        model: saved model or run folder, released checkpoint, or a preset with random weights.
        data: labelled media, as of ``data.labels.open_labels``; each example has one class.
        out: folder of probe.json, and of the features.
        modality: the tower: video (pictures too) or audio.
        classifier: lrc (the paper's), svm, logistic; several are measured on the same features.
        media: folder of the media that a file of labels names.
        split: that is scored; by default test, else val.
        fold: of UCF101 and HMDB51 the split, of ESC-50 the fold that is the test.
        skip_missing: leave out media that are named and not there.
        hold_out: share of each class to be scored, where the data name no split.
        windows: of an example that is scored, spread evenly; training takes the middle one.
        features: folder of cached features, which several runs may share; by default in out.
        seed: of presets' weights; the classifier's own is among its settings.
    """

    model: str
    data: str
    out: str
    modality: Modality = "video"
    classifier: tuple[Kind, ...] = ("lrc", "svm")
    media: str | None = None
    split: str | None = None
    fold: int = 1
    skip_missing: bool = False
    hold_out: float = 0.2
    windows: int = 4
    features: str | None = None
    batch_size: int = 16
    workers: int = 0
    device: str = "auto"
    seed: int = 0
    lrc: LowRankSettings = field(default_factory=LowRankSettings)

    def __post_init__(self) -> None:
        if not self.classifier or not set(self.classifier) <= set(get_args(Kind)):
            raise ValueError(
                f"classifier is {self.classifier}; it takes some of {', '.join(get_args(Kind))}"
            )
        if self.modality not in get_args(Modality):
            raise ValueError(f"modality is {self.modality!r}; it is video or audio")
        for name in ("windows", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")


def probe(config: ProbeConfig) -> dict[str, Any]:
    """Compute the features, or read them, fit the classifiers, write probe.json, and return it.

    Returns:
        by classifier top1, top5 (of more than five classes) and mean_class in percent; and the
        settings with which the numbers can be repeated.

    Raises:
        ValueError: data that do not fit, named; examples with several classes.
    """
    out = Path(config.out)
    check_folder(out)
    data = open_labels(
        config.data, media=config.media, fold=config.fold, skip_missing=config.skip_missing
    ).held_out(config.hold_out)
    if data.has_several:
        raise ValueError(
            f"{data.label} has examples with several classes, or none; a probe takes one each"
        )
    split = config.split or evaluation_split(data)
    if split == "train":
        raise ValueError(f"{data.label} has only split train; set --hold-out, or name --split")
    data.check_training()
    torch.manual_seed(config.seed)
    device = pick_device(config.device)
    model = create_model(config.model).to(device).eval()
    cache = config.features or out / "features"
    options: dict[str, Any] = dict(
        batch_size=config.batch_size, workers=config.workers, cache=cache
    )
    sets, classes, digests = {}, {}, {}
    for name, windows in (("train", 1), (split, config.windows)):
        source = data.source(name, config.modality)
        found = window_features(model, source, windows=windows, **options)
        found = _with_a_window(found, config.modality)
        sets[name], digests[name] = found, source.label_digest
        classes[name] = np.array([source.classes_of(each)[0] for each in found.names])
    train, test = sets["train"], sets[split]
    results = {}
    for kind in config.classifier:
        scores, chosen = linear_scores(
            kind,
            train.values[:, 0],
            classes["train"],
            test.values,
            len(data.classes),
            settings=config.lrc,
            device=device,
        )
        results[kind] = one_class_scores(scores, classes[split]) | chosen
    report = results | {
        "classes": len(data.classes),
        "examples": {"train": len(train.names), split: len(test.names)},
        "features_cached": {name: found.cached for name, found in sets.items()},
        "skipped": train.skipped | test.skipped,
        "settings": {
            **dataclasses.asdict(config),
            "split": split,
            "model_sha256": model_digest(model),
            "labels_sha256": digests,
            **computed_with(model),
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / RESULT, json.dumps(report, indent=2) + "\n")
    return report


def _with_a_window(found: Features, modality: str) -> Features:
    """Without the examples that have nothing of the modality in any window."""
    there = np.isfinite(found.values).all(-1).any(1)
    if not there.any():
        raise ValueError(f"no example has {modality} in its windows")
    reason = f"no {modality} in its windows"
    gone = {name: reason for name, is_there in zip(found.names, there, strict=True) if not is_there}
    names = [name for name, is_there in zip(found.names, there, strict=True) if is_there]
    return Features(names, found.values[there], found.skipped | gone, found.cached)
