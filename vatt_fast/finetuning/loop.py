"""Fine-tuning: labelled media in, run folder out; may be killed at any time and continued."""

import contextlib
import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..checkpoints.bundle import is_checkpoint
from ..checkpoints.released import read_released
from ..classifier import LABELS, Classifier, ClassifierConfig, read_classifier
from ..config import VATTConfig, preset, video_grid
from ..data.augment import ClipAugment, augmentation
from ..data.clips import ClipSpec, DropToken
from ..data.dataset import ClipDataset
from ..data.labels import LabelledData, LabelledSource, open_labels
from ..data.loader import loader
from ..data.order import VERSION as ORDER_VERSION
from ..evaluation.classify import predict, scores_of
from ..files import check_folder, link, write_text
from ..positions import resample_matrix
from ..training.checkpoint import (
    CHECKPOINT,
    Data,
    Standing,
    keep_earlier,
    read_standing,
    say_what_changed,
)
from ..training.distributed import Ranks, agreed, check_settings, joined, own_folder
from ..training.loggers import make_loggers
from ..training.metrics import FiniteWatch, Mean, MetricsLog, NonFiniteError, Timer
from ..training.settings import told_differences
from ..training.stopping import StopRequests, kept_from_children, obey_the_parent_alone, stopped
from ..weights import CONFIG, WEIGHTS, is_classifier, read_folder
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
from .step import FineTuner, Update

BEST = "best"


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
    with joined(run.device, run.patience) as ranks:
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
    with contextlib.ExitStack() as stack:
        owned = False
        with ranks.together():
            if ranks.first:
                check_folder(out)
                if out.is_dir():
                    owned = stack.enter_context(own_folder(out, ranks))
        with ranks.together():
            standing = read_standing(path) if path.exists() else None
            labelled, named = _labelled(run, ranks.first)
            source = labelled.source("train", modality)
            held = None
            if run.eval_split is not None:
                held = labelled.source(run.eval_split, modality)
            run = run.with_steps(len(source), standing.run if standing is not None else None)
            if ranks.first and run.warmup_steps and run.warmup_steps >= (run.steps or 0):
                warnings.warn(
                    f"warmup_steps {run.warmup_steps} >= steps {run.steps}: "
                    f"the learning rate never reaches {run.learning_rate:g}",
                    stacklevel=3,
                )
            config, weights, spec = _beginning(run, model_config, source.classes)
            settings = describe(run, config.model, source.classes)
            if standing is not None:
                _check_same_run(path, standing, settings)
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
        trainer = FineTuner(run, config, None if standing is not None else weights, grid, ranks)
        trainer.model().labels = list(source.classes)
        arithmetic = {
            "precision": trainer.precision,
            "micro_batch": run.micro_batch,
            "ranks": ranks.world,
            "order of clips": ORDER_VERSION,
            "labels": labels,
        }
        now = Standing(0, settings, data, arithmetic)
        if standing is not None:
            if ranks.first:
                say_what_changed(path, standing, data, arithmetic)
            with ranks.together():
                trainer.restore(path)
            now = now._replace(
                step=standing.step, best_loss=standing.best_loss, best_score=standing.best_score
            )
        with ranks.together():
            if ranks.first:
                if not owned:
                    out.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(own_folder(out, ranks))
                if not named:
                    marks = labelled.marks("train") | read_trained(out)  # of a run continued
                    write_text(out / TRAINED, "\n".join(sorted(marks)) + "\n")
        record = Record(run.task, run.loss or "softmax", input_sizes(run.task, spec),
                        str(run.recipe))  # fmt: skip
        _train(run, ranks, trainer, dataset, source, held, spec, now, record, progress)
    skipped: dict[str, str] = {}
    for one in ranks.all(dict(dataset.skipped)):
        skipped |= one
    if skipped and ranks.first:
        reasons = "\n  ".join(list(skipped.values())[:5])
        print(
            f"{len(skipped)} media files could not be read, others stood in for them:\n  {reasons}"
        )
    return trainer.model().eval()


def _labelled(run: FineTuneConfig, says: bool) -> tuple[LabelledData, bool]:
    """The data in splits, each class with a training example; whether the data name the splits."""
    labelled = open_labels(run.data, media=run.media, fold=run.fold, skip_missing=run.skip_missing)
    if labelled.missing and says:
        print(f"{len(labelled.missing)} media of {run.data} are missing and left out")
    named = labelled.names_splits
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
    return labelled, named


def _check_same_run(path: Path, was: Standing, now: dict[str, Any]) -> None:
    """Raise ValueError where the checkpoint belongs to a run with other settings, named."""
    if told := told_differences(was.run, now):
        more = f"; and {len(told) - 3} more" if len(told) > 3 else ""
        raise ValueError(
            f"{path} belongs to another run ({'; '.join(told[:3])}{more}); "
            "choose another output folder, or delete this one"
        )


# -- beginnings ------------------------------------------------------------------------------------


def _beginning(
    run: FineTuneConfig, model_config: VATTConfig | None, classes: tuple[str, ...]
) -> tuple[ClassifierConfig, dict[str, Tensor] | None, ClipSpec]:
    """The classifier's config, the weights it starts from, and what it reads."""
    modality = MODALITY[run.task]
    if run.init == FROM_SCRATCH:
        config, tensors = model_config or preset(str(run.preset)), None
    else:
        config, tensors = _saved(run.init, modality, classes)
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
    return whole, None if tensors is None else _resampled(tensors, whole, run.init), spec


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


def _resampled(
    tensors: Mapping[str, Tensor], config: ClassifierConfig, source: str
) -> dict[str, Tensor]:
    """The tower's own tensors, with position tables of the lengths that ``config`` has."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in Classifier(config).state_dict().items()}
    found = {name: value for name, value in tensors.items() if name in wanted}
    if lacking := [n for n in wanted if n not in found and not n.startswith("classifier.")]:
        raise ValueError(f"{source} has no {lacking[0]}; it holds no {config.modality} tower")
    for name, table in found.items():
        if ".position.tables." in name and table.shape[0] != wanted[name][0]:
            matrix = torch.from_numpy(resample_matrix(table.shape[0], wanted[name][0]))
            found[name] = (matrix @ table.double()).to(table.dtype)
    return found


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


# -- the steps -------------------------------------------------------------------------------------


def _train(
    run: FineTuneConfig,
    ranks: Ranks,
    trainer: FineTuner,
    dataset: ClipDataset,
    source: LabelledSource,
    held: LabelledSource | None,
    spec: ClipSpec,
    standing: Standing,
    record: Record,
    progress: bool,
) -> None:
    """The steps from ``standing`` on, and all that is written meanwhile.

    As pre-training's, with labels beside each batch.
    """
    out, start, steps = Path(run.out), standing.step, int(run.steps or 0)
    stop, watch, losses = StopRequests(ranks.world > 1), FiniteWatch(), Mean()
    bar = tqdm(
        total=steps, initial=start, desc="finetune", unit="step", disable=None if progress else True
    )
    saved, new_best, seen = start, False, False

    def save(done: int) -> None:
        nonlocal standing, saved, new_best
        watch.check()
        loss = losses.take()
        lower = standing.best_loss is None or loss < standing.best_loss
        standing = standing._replace(step=done, best_loss=loss if lower else standing.best_loss)
        try:
            best, new_best = lower if run.best_by == "loss" else new_best, False
            with ranks.together():
                if ranks.first:
                    _save(out, trainer, standing, record, best, run.keep_last)
            saved = done
        except OSError as error:
            intact = f"the checkpoint of step {saved} is intact" if saved else "no checkpoint yet"
            told = OSError(
                f"{error}; {intact}: make room, and the same command continues from there"
            )
            raise (agreed(told, ranks) if hasattr(error, "agreed") else told) from error
        if progress and bar.disable:  # a log file has no bar
            print(f"step {done} of {steps} saved, mean loss {loss:.4g}", flush=True)

    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                loggers = make_loggers(run.loggers, out, start, standing.run)
                logger = stack.enter_context(contextlib.closing(MetricsLog(out, start, loggers)))
        stack.enter_context(bar)
        stack.enter_context(stop)
        options: dict[str, Any] = dict(
            pin_memory=trainer.pin_memory, start_method=trainer.start_method
        )
        options["worker_init"] = obey_the_parent_alone
        loaded = loader(dataset, start, steps, run.workers, **options)
        stack.callback(loaded.close)
        with ranks.together(), kept_from_children():
            batches = iter(loaded)
        timer = Timer(lambda: loaded.waited_seconds)
        for done in range(start + 1, steps + 1):
            batch, error = None, None
            try:
                with stop.waiting():
                    batch = next(batches)
            except KeyboardInterrupt:
                pass
            except (ValueError, OSError) as met:
                error = met
            # ranks stop at one step, and fail together
            there = batch is not None and bool(getattr(batch, f"{trainer.modality}_valid").any())
            stopping, failed, seen = ranks.any(
                batch is None and error is None, error is not None, seen or there
            )
            if failed:
                ranks.fail(error)
            if stopping:
                if done - 1 > saved:
                    save(done - 1)
                raise agreed(stopped(done - 1), ranks)
            assert batch is not None
            if not seen:
                what = "picture" if trainer.modality == "video" else "sound"
                error = ValueError(
                    f"none of the first {run.batch_size} clips of {source.label} has a {what}; "
                    "take another task, or other media"
                )
                raise agreed(error, ranks)
            rate = rate_of(run, done - 1)
            with ranks.answering():
                update = trainer.step(batch, source.targets(batch.files), done - 1, rate)
            try:
                found = {"loss": update.loss, "gradient norm": update.gradient_norm}
                watch.add(done, batch.files, found)
                losses.add(update.loss)
                timer.step(int(run.batch_size or 0))
                bar.update()
                values: dict[str, float] = {}
                if done % run.log_every == 0 or done == steps:
                    watch.check()
                    values = _values(update, rate, int(run.batch_size or 0)) | {
                        "skipped_files": ranks.total(len(dataset.skipped)),
                        **timer.take(ranks.largest),
                    }  # fmt: skip
                    bar.set_postfix(loss=f"{values['loss']:.3f}", rate=f"{rate:.2g}")
                if (
                    held is not None
                    and run.eval_every is not None
                    and (done % run.eval_every == 0 or done == steps)
                ):
                    watch.check()
                    measured: dict[str, float] = {}
                    with ranks.together():
                        if ranks.first:
                            measured = measure(run, trainer.model(), held, spec)
                    measured = ranks.firsts(measured)
                    values |= measured
                    score = measured.get("eval_top1", measured.get("eval_mAP"))
                    if score is not None and (
                        standing.best_score is None or score > standing.best_score
                    ):
                        standing = standing._replace(best_score=score)
                        new_best = run.best_by == "score"
                    timer.reset()
                if values and ranks.first:
                    logger.write(done, values)
                if done % run.checkpoint_every == 0 or done == steps or new_best:
                    save(done)
            except NonFiniteError as error:
                intact = (
                    f"{out / CHECKPOINT} of step {saved} stays" if saved else "nothing is saved"
                )
                told = NonFiniteError(
                    f"{error}; {intact}: lower the learning rate, or look at these files"
                )
                ranks.fail(told)


def measure(
    run: FineTuneConfig, model: Classifier, held: LabelledSource, spec: ClipSpec
) -> dict[str, float]:
    """eval_top1 and others of held-out examples, one view in the middle of each."""
    found = predict(
        model, held, spec, windows=1, crops=1, batch_size=32, precision=run.precision,
        workers=max(1, run.workers),
    )  # fmt: skip
    targets = held.targets(found.files).numpy()
    scores = scores_of(found.logits, targets, run.loss != "softmax")
    return {f"eval_{name}": float(value) for name, value in scores.items() if value is not None} | {
        "eval_examples": float(len(found.files))
    }


def _save(
    out: Path, trainer: FineTuner, standing: Standing, record: Record, best: bool, keep_last: int
) -> None:
    """The model's files first, the checkpoint last.

    Whoever continues after a kill in between comes by here again.
    """
    trainer.model().save_pretrained(out)
    record.write(out)
    if best:
        (out / BEST).mkdir(exist_ok=True)
        for name in (WEIGHTS, CONFIG, LABELS, RECORD, TRAINED):
            if (out / name).exists():
                link(out / name, out / BEST / name)
    keep_earlier(out / CHECKPOINT, keep_last)
    trainer.save(out / CHECKPOINT, standing)


def _values(update: Update, rate: float, clips: int) -> dict[str, float]:
    found = {"loss": float(update.loss), "learning_rate": rate}
    found["gradient_norm"] = float(update.gradient_norm)
    if update.right is not None:
        found["train_top1"] = 100 * float(update.right) / clips
    return found
