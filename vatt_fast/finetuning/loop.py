"""Fine-tuning: labelled media in, run folder out; may be killed at any time and continued."""

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoints.bundle import is_checkpoint
from ..checkpoints.released import read_released
from ..classifier import LABELS, Classifier, ClassifierConfig, read_classifier
from ..config import VATTConfig, preset, video_grid
from ..data.augment import ClipAugment, augmentation
from ..data.clips import Batch, ClipSpec, DropToken
from ..data.dataset import ClipDataset
from ..data.labels import LabelledData, LabelledSource, open_labels
from ..data.order import VERSION as ORDER_VERSION
from ..devices import importing_jax
from ..evaluation.classify import predict, scores_of
from ..evaluation.scores import confusion
from ..files import write_text
from ..on_jax.hosts import announce_hosts
from ..training.checkpoint import (
    BEST,
    CHECKPOINT,
    Data,
    Standing,
    check_same_run,
    read_standing,
)
from ..training.distributed import Ranks, check_settings, joined
from ..training.running import Job, Step, continued, run_folder, train, warn_of_warmup
from ..training.settings import told_differences
from ..weights import CONFIG, WEIGHTS, is_classifier, read_folder, resampled
from .report import Report
from .settings import (
    FROM_SCRATCH,
    MODALITY,
    RECORD,
    TRAINED,
    FineTuneConfig,
    Record,
    clip_spec,
    describe,
    input_sizes,
    rate_of,
    read_trained,
    sizes,
)
from .step import FineTuner, Trainer

__all__ = ["BEST", "finetune"]


def finetune(
    run: FineTuneConfig,
    *,
    model_config: VATTConfig | None = None,
    augment: ClipAugment | None = None,
    progress: bool = True,
) -> Classifier:
    """Run or continue a fine-tuning; returns the trained classifier, in evaluation mode.

    Writes a checkpoint every ``checkpoint_every`` steps, at the end, and on SIGINT, SIGTERM or
    SIGUSR1 (then raises KeyboardInterrupt). Called again with the same settings it continues there
    and ends, bit for bit, as an uninterrupted run.

    Args:
        model_config: instead of ``run.preset``, with init none.
        augment: instead of ``run.augment``.

    Raises:
        ValueError: settings out of range, labels or media that cannot be used, an output folder of
            another run, one that another process writes to, or one that cannot be.
        NonFiniteError: a loss or gradient is nan or infinite; the last checkpoint stays.
        OSError: a file could not be written; the last checkpoint stays.
    """
    if run.framework == "jax":
        announce_hosts(run)
    with joined(run.device, run.patience, run.framework) as ranks:
        check_settings(ranks, run)
        return _finetune(run, ranks, model_config, augment, progress and ranks.first)


def _finetune(
    run: FineTuneConfig,
    ranks: Ranks,
    model_config: VATTConfig | None,
    augment: ClipAugment | None,
    progress: bool,
) -> Classifier:
    out, modality = Path(run.out), MODALITY[run.task]
    path = out / CHECKPOINT
    with run_folder(out, ranks) as make_folder:
        with ranks.together():
            standing = read_standing(path) if path.exists() else None
            labelled = _labelled(run, ranks.first)
            source = labelled.source("train", modality)
            held = None
            if run.eval_split is not None:
                held = labelled.source(run.eval_split, modality)
            run = run.with_steps(len(source), standing.run if standing is not None else None)
            if ranks.first:
                warn_of_warmup(run)
            config, weights, spec = _beginning(run, model_config, source.classes)
            settings = describe(run, config.model, source.classes)
            if standing is not None:
                check_same_run(path, told_differences(standing.run, settings))
            dataset = _dataset(run, ranks, config, source, spec, augment)
        data = Data(*source.identity)
        labels = source.label_digest[:12]
        ranks.require_alike(
            {
                "settings": settings,
                "data": data._asdict(),
                "labels": labels,
                "checkpoint of step": None if standing is None else standing.step,
            }
        )
        grid = None
        if modality == "video" and run.drop_rate:
            read = dict(frames=spec.frames, height=spec.height, width=spec.width)
            grid = video_grid(**read, patch=config.model.video_patch)
        if standing is not None:
            weights = None
        trainer = _trainer(run, config, weights, grid, ranks, source.classes)
        arithmetic = {
            "precision": trainer.precision,
            "micro_batch": run.micro_batch,
            "ranks": ranks.world,
            "order of clips": ORDER_VERSION,
            "labels": labels,
        }
        now = continued(path, standing, Standing(0, settings, data, arithmetic), trainer, ranks)
        make_folder()
        marked = standing is not None and standing.data == data and (out / TRAINED).exists()
        with ranks.together():
            if ranks.first and not marked:
                marks = labelled.marks("train") | read_trained(out)  # of a run continued
                write_text(out / TRAINED, "\n".join(sorted(marks)) + "\n")
        report = Report(run, settings, config.model, source.classes)
        record = Record(run.task, run.loss or "softmax", input_sizes(run.task, spec),
                        str(run.recipe))  # fmt: skip
        job = FineTuning(run, trainer, dataset, source, held, spec, record, report)
        train(job, ranks, now, progress)
    return trainer.model().eval()


@dataclasses.dataclass
class FineTuning(Job):
    run: FineTuneConfig
    trainer: Trainer
    dataset: ClipDataset
    source: LabelledSource
    held: LabelledSource | None
    spec: ClipSpec
    record: Record
    report: Report
    name = "finetune"
    files = (WEIGHTS, CONFIG, LABELS, RECORD, TRAINED)

    def teaches(self, batch: Batch) -> bool:
        return bool(getattr(batch, f"{MODALITY[self.run.task]}_valid").any())

    def unteachable(self, steps: int) -> str | None:
        what = "sound" if self.run.task == "audio" else "picture"
        return (
            f"none of the first {self.run.batch_size} clips of {self.source.label} has a {what}; "
            "take another task, or other media"
        )

    def rate(self, step: int) -> float:
        return rate_of(self.run, step)

    def step(self, batch: Batch, step: int, rate: float) -> Step:
        loss, norm, right = self.trainer.step(batch, self.source.targets(batch.files), step, rate)

        def more() -> dict[str, float]:
            clips = int(self.run.batch_size or 0)
            return {} if right is None else {"train_top1": 100 * float(right) / clips}

        return Step(loss, norm, more)

    def shown(self, values: dict[str, float]) -> dict[str, str]:
        return {"loss": f"{values['loss']:.3f}", "rate": f"{values['learning_rate']:.2g}"}

    def measure(self, model: Classifier, ranks: Ranks) -> tuple[dict[str, float], float | None]:
        """eval_top1 and others of held-out examples, one view in the middle of each."""
        assert self.held is not None
        found = predict(
            model, self.held, self.spec, windows=1, crops=1, batch_size=32,
            precision=self.run.precision, workers=max(1, self.run.workers), ranks=ranks,
        )  # fmt: skip
        targets = self.held.targets(found.files).numpy()
        scores = scores_of(found.logits, targets, self.run.loss != "softmax")
        if (targets.sum(1) == 1).all():
            self.report.confusion = confusion(found.logits, targets.argmax(1))
        told = {f"eval_{name}": float(v) for name, v in scores.items() if v is not None}
        best = told.get("eval_top1", told.get("eval_mAP"))
        told["eval_examples"] = float(len(found.files))
        return told, best if self.run.best_by == "score" else None

    def write_model(self, model: Classifier, out: Path) -> None:
        model.save_pretrained(out)
        self.record.write(out)

    def write_report(self) -> None:
        self.report.write()


def _labelled(run: FineTuneConfig, says: bool) -> LabelledData:
    """The data in splits, each class with a training example."""
    labelled = open_labels(run.data, media=run.media, fold=run.fold, skip_missing=run.skip_missing)
    if labelled.missing and says:
        print(f"{len(labelled.missing)} media of {run.data} are missing and left out")
    labelled = labelled.held_out(run.hold_out)
    if labelled.missing:  # whole classes may be
        without = labelled.classes_without_training()
        if without and says:
            print(f"without a training example, and never learned: {', '.join(without[:5])}")
    else:
        labelled.check_training()
    if run.loss == "softmax" and labelled.has_several:
        several = next(e for e in labelled.examples if len(e.classes) != 1)
        raise ValueError(
            f"{several.where} has {len(several.classes)} classes, and loss softmax takes one each; "
            "take loss balanced or sigmoid"
        )
    if len(labelled.classes) < 2:
        raise ValueError(f"{run.data} has one class, {labelled.classes[0]!r}; add another one")
    return labelled


def _trainer(run: FineTuneConfig, *more: Any) -> Trainer:
    if run.framework == "jax":
        with importing_jax():
            from ..on_jax.finetuning import JaxFineTuner
        return JaxFineTuner(run, *more)
    return FineTuner(run, *more)


# -- beginnings ------------------------------------------------------------------------------------


def _beginning(
    run: FineTuneConfig, model_config: VATTConfig | None, classes: tuple[str, ...]
) -> tuple[ClassifierConfig, dict[str, Tensor] | None, ClipSpec]:
    """The classifier's config, the weights it starts from, and what it reads."""
    modality = MODALITY[run.task]
    tensors: dict[str, Tensor] | None = None
    if run.init == FROM_SCRATCH:
        config = model_config or preset(str(run.preset))
    else:
        config, tensors = _saved(run.init, modality, classes)
        tensors = None if run.from_scratch else tensors
    wanted = sizes(run, config)
    spec = clip_spec(run.task, wanted, config)
    if run.dropout is not None:
        config = dataclasses.replace(config, dropout=run.dropout)
    if run.positions == "resampled":
        config = dataclasses.replace(config, **wanted)
    else:
        if run.drop_rate and modality == "audio":
            raise ValueError(
                "positions on_the_fly and drop_rate together need the model's own length of sound; "
                "take positions resampled"
            )
        rates = ("frames_per_second", "sample_rate_hz")
        config = dataclasses.replace(config, **{k: v for k, v in wanted.items() if k in rates})
    whole = ClassifierConfig(config, modality, len(classes))
    return whole, None if tensors is None else _tower(tensors, whole, run.init), spec


def _saved(
    init: str, modality: str, classes: tuple[str, ...]
) -> tuple[VATTConfig, dict[str, Tensor]]:
    """Config and tensors of a saved model, a classifier or a released checkpoint.

    Of a classifier the last layer is taken too where the classes are the same.
    """
    folder = Path(init)
    if not folder.is_dir() and is_checkpoint(init):
        released = read_released(init)
        for note in released.notes:
            warnings.warn(note, stacklevel=2)
        if released.modality not in (None, modality):
            raise ValueError(f"{init} is a tower of {released.modality}; the task needs {modality}")
        tensors = {k: v for k, v in released.tensors.items() if not k.startswith("classifier.")}
        return released.config, tensors
    if not folder.is_dir():
        raise ValueError(
            f"{init!r} is no folder and no released checkpoint; name a saved model, or none and a "
            "preset"
        )
    if (folder / CONFIG).is_file() and is_classifier((folder / CONFIG).read_text()):
        settings, tensors, labels = read_classifier(folder)
        if settings.modality != modality:
            raise ValueError(f"{init} is a tower of {settings.modality}; the task needs {modality}")
        if labels != list(classes):
            tensors = {k: v for k, v in tensors.items() if not k.startswith("classifier.")}
        return settings.model, tensors
    config, tensors, _ = read_folder(folder)
    return config, tensors


def _tower(
    tensors: Mapping[str, Tensor], config: ClassifierConfig, source: str
) -> dict[str, Tensor]:
    """The tower's own tensors, with position tables of the lengths that ``config`` has."""
    with torch.device("meta"):
        wanted = Classifier(config).state_dict()
    found = {name: value for name, value in tensors.items() if name in wanted}
    if lacking := [n for n in wanted if n not in found and not n.startswith("classifier.")]:
        raise ValueError(f"{source} has no {lacking[0]}; it holds no {config.modality} tower")
    return resampled(found, wanted)


def _dataset(
    run: FineTuneConfig,
    ranks: Ranks,
    config: ClassifierConfig,
    source: LabelledSource,
    spec: ClipSpec,
    augment: ClipAugment | None,
) -> ClipDataset:
    drop = None
    if run.drop_rate:
        c, few = config.model, int(1 / (1 - run.drop_rate)) + 1
        read: dict[str, Any] = dict(frames=spec.frames, height=spec.height, width=spec.width)
        read["samples"] = spec.samples
        # the other modality is not read: so few patches that one of them is kept
        if config.modality == "video":
            read |= dict(samples=few * c.audio_patch, audio_input="waveform")
        else:
            frames, height, width = c.video_patch
            read |= dict(frames=frames, height=height, width=width * few)
        model = dataclasses.replace(c, **read)
        drop = DropToken(model, run.drop_rate, run.drop_per, shards=1)
    size = int(run.batch_size or 0)
    if len(source) < size and ranks.world > 1:
        raise ValueError(
            f"{source.label} has {len(source)} training examples, fewer than the batch of {size} "
            f"on {ranks.world} ranks: take a smaller batch_size"
        )
    if len(source) < size:
        warnings.warn(
            f"{source.label} has {len(source)} training examples, fewer than batch_size {size}: a "
            "batch holds some several times",
            stacklevel=4,
        )
    return ClipDataset(
        source,
        spec,
        vocabulary=None,
        batch_size=size // ranks.world,
        rank=ranks.rank,
        world=ranks.world,
        seed=run.seed,
        cache_dir=run.cache,
        drop_token=drop,
        augment=augment or augmentation(str(run.augment), spec.height, spec.width),
    )
