"""Pre-training: folder of clips in, run folder out; may be killed at any time and continued."""

import contextlib
import dataclasses
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..config import VATTConfig, preset
from ..data.augment import ClipAugment, Frames, Key, augmentation, name_of
from ..data.clips import Batch, ClipSpec, DropToken
from ..data.dataset import ClipDataset
from ..data.loader import ClipLoader, loader
from ..data.order import VERSION as ORDER_VERSION
from ..data.source import Source
from ..data.sources import open_source, vocabulary_from
from ..data.text import Vocabulary
from ..data.word_vectors import read_word_vectors
from ..devices import has_a_tpu, without_a_tpu
from ..files import check_folder, link
from ..losses import VATTLoss
from ..model import VATT
from ..positions import resample_matrix
from ..weights import CONFIG, VOCABULARY, WEIGHTS, read_folder, save_model
from .checkpoint import (
    CHECKPOINT,
    Data,
    Standing,
    check_same_run,
    keep_earlier,
    read_standing,
    say_what_changed,
)
from .distributed import Ranks, agreed, check_settings, joined, own_folder
from .evaluate import BEST_BY, evaluate
from .loggers import make_loggers
from .metrics import METRICS, FiniteWatch, Mean, MetricsLog, NonFiniteError, Timer
from .report import REPORT, Report
from .settings import PretrainConfig, describe, rate_of, resolved, sizes
from .step import TorchTrainer, Trainer
from .stopping import StopRequests, kept_from_children, obey_the_parent_alone, stopped

BEST, INDEX, EVAL_INDEX = "best", "index", "eval_index"
_STEPS_TO_FIND_A_PAIR = 20

__all__ = [
    "BEST",
    "CHECKPOINT",
    "METRICS",
    "REPORT",
    "PretrainConfig",
    "pretrain",
    "vocabulary_of",
]


def pretrain(
    run: PretrainConfig,
    *,
    model_config: VATTConfig | None = None,
    augment: ClipAugment | Callable[[Key, np.ndarray], np.ndarray] | None = None,
    progress: bool = True,
) -> VATT:
    """Run or continue a pre-training; returns the trained model.

    Writes a checkpoint every ``checkpoint_every`` steps, at the end, and on SIGINT, SIGTERM or
    SIGUSR1 (then raises KeyboardInterrupt). Called again with the same settings it continues there,
    with the same batches and the same DropToken draws as an uninterrupted run. The run's vocabulary
    is its own: it is built at the first start, and read back afterwards.

    Args:
        model_config: instead of ``run.preset`` and ``run.recipe``; vocab_size is replaced by the
            captions' vocabulary.
        augment: instead of ``run.augment``: a ``ClipAugment``, or a function (key, frames
            (T, H, W, 3) uint8) -> frames. The run records its name, which must stay.

    Raises:
        ValueError: settings out of range, unreadable data, an output folder of another run, one
            that another process writes to, or one that cannot be.
        NonFiniteError: a loss or gradient is nan or infinite; the last checkpoint stays.
        OSError: a file could not be written, or another rank is gone or silent; the last checkpoint
            stays.
    """
    with joined(run.device, run.patience, run.framework) as ranks:
        check_settings(ranks, run)
        return _pretrain(run, ranks, model_config, augment, progress and ranks.first)


def _pretrain(
    run: PretrainConfig,
    ranks: Ranks,
    model_config: VATTConfig | None,
    augment: ClipAugment | Callable[[Key, np.ndarray], np.ndarray] | None,
    progress: bool,
) -> VATT:
    out = Path(run.out)
    if ranks.first and resolved(run.warmup_steps) >= run.steps:
        warnings.warn(
            f"warmup_steps {run.warmup_steps} >= steps {run.steps}: "
            f"the learning rate never reaches {run.learning_rate:g}",
            stacklevel=3,
        )
    with contextlib.ExitStack() as stack:
        owned, held_out = False, None
        with ranks.together():
            if ranks.first:
                check_folder(out)
                if out.is_dir():
                    owned = stack.enter_context(own_folder(out, ranks))
                if run.eval_data is not None:
                    held_out = open_source(
                        run.eval_data, index_folder=out / EVAL_INDEX, workers=run.workers
                    )
        for turn in (True, False):  # the first rank writes an index that the others read
            with ranks.together():
                if ranks.first == turn:
                    standing = None
                    if (out / CHECKPOINT).exists():
                        standing = read_standing(out / CHECKPOINT)
                    # before a framework that must not be forked
                    source = open_source(run.data, index_folder=out / INDEX, workers=run.workers)
                    found = _beginning(run, model_config, out, standing, source)
            if ranks.world == 1:
                break
        config, vocabulary, weights = found
        augment, named = _augmentation(run, config, augment)
        settings = describe(run, config) | {"augment": named}
        if standing is not None:
            check_same_run(out / CHECKPOINT, standing, settings)
        data = Data(*source.identity)
        ranks.require_alike(
            {
                "settings": settings,
                "data": data._asdict(),
                "words": hashlib.sha256("\n".join(vocabulary.words).encode()).hexdigest()[:12],
                "checkpoint of step": None if standing is None else standing.step,
            }
        )
        trainer = _trainer(run, config, vocabulary, weights, ranks)
        # a continued run keeps the draws that it began with, on whatever devices
        began = (standing.arithmetic if standing is not None else None) or {}
        shards = run.drop_draws or trainer.devices * ranks.world
        shards = began.get("devices that draw", shards)
        dataset = ClipDataset(
            source,
            ClipSpec.from_config(config),
            vocabulary=vocabulary,
            batch_size=run.batch_size // ranks.world,
            rank=ranks.rank,
            world=ranks.world,
            seed=run.seed,
            shuffle_captions=run.shuffle_captions,
            cache_dir=run.cache,
            drop_token=DropToken(config, run.drop_rate, run.drop_per, shards=shards),
            augment=augment,
            decoder=run.decoder,
        )
        if len(dataset.source) < run.batch_size:
            if ranks.world > 1:
                error = ValueError(
                    f"{run.data} has {len(dataset.source)} files, fewer than the batch of "
                    f"{run.batch_size} clips on {ranks.world} ranks: take a smaller batch_size"
                )
                raise agreed(error, ranks)
            warnings.warn(
                f"{run.data} has {len(dataset.source)} files, fewer than batch_size "
                f"{run.batch_size}: a batch holds files several times, each its own negative",
                stacklevel=3,
            )
        arithmetic = {"precision": trainer.precision, "devices that draw": shards}
        arithmetic["order of clips"] = ORDER_VERSION
        now = Standing(0, settings, data, arithmetic)
        if standing is not None:
            if ranks.first:
                say_what_changed(out / CHECKPOINT, standing, data, arithmetic)
            with ranks.together():
                trainer.restore(out / CHECKPOINT, standing.step)
            now = now._replace(
                step=standing.step,
                best_loss=standing.best_loss,
                best_retrieval=standing.best_retrieval,
            )
        with ranks.together():
            if ranks.first and not owned:
                out.mkdir(parents=True, exist_ok=True)
                stack.enter_context(own_folder(out, ranks))
        report = Report(run, settings, config, vocabulary, source, augment)
        _train(run, ranks, trainer, dataset, held_out, now, report, progress)
    skipped: dict[str, str] = {}
    for one in ranks.all(dict(dataset.skipped)):
        skipped |= one
    if skipped and ranks.first:
        reasons = "\n  ".join(list(skipped.values())[:5])
        count = len(skipped)
        print(f"{count} media files could not be read, others stood in for them:\n  {reasons}")
    return trainer.model().eval()


def _augmentation(
    run: PretrainConfig,
    config: VATTConfig,
    given: ClipAugment | Callable[[Key, np.ndarray], np.ndarray] | None,
) -> tuple[ClipAugment | None, str]:
    """What changes the clips, and how the run records it."""
    if given is None:
        return augmentation(run.augment, config.height, config.width), run.augment
    whole: Any = given if hasattr(given, "crop") else Frames(given)
    return whole, name_of(whole)


def _train(
    run: PretrainConfig,
    ranks: Ranks,
    trainer: Trainer,
    dataset: ClipDataset,
    held_out: Source | None,
    standing: Standing,
    report: Report,
    progress: bool,
) -> None:
    """The steps from ``standing`` on, and all that is written meanwhile."""
    out, start = Path(run.out), standing.step
    stop, watch, losses = StopRequests(ranks.world > 1), FiniteWatch(), Mean()
    shown = None if progress else True  # None: on a terminal
    bar = tqdm(total=run.steps, initial=start, desc="pretrain", unit="step", disable=shown)
    saved, paired, new_best = start, False, False

    def save(done: int) -> None:
        nonlocal standing, saved, new_best
        watch.check()
        loss = losses.take()
        lower = standing.best_loss is None or loss < standing.best_loss
        standing = standing._replace(step=done, best_loss=loss if lower else standing.best_loss)
        try:
            best, new_best = lower if run.best_by == "loss" else new_best, False
            _save(out, trainer, standing, best, run.keep_last, ranks)
            saved = done
            with ranks.together():
                if ranks.first:
                    report.write()
        except OSError as error:
            intact = f"the checkpoint of step {saved} is intact" if saved else "no checkpoint yet"
            told = OSError(
                f"{error}; {intact}: make room, and the same command continues from there"
            )
            raise (agreed(told, ranks) if hasattr(error, "agreed") else told) from error
        if progress and bar.disable:  # a log file has no bar
            print(f"step {done} of {run.steps} saved, mean loss {loss:.4g}", flush=True)

    with contextlib.ExitStack() as stack:
        with ranks.together():
            if ranks.first:
                loggers = make_loggers(run.loggers, out, start, standing.run)
                logger = stack.enter_context(contextlib.closing(MetricsLog(out, start, loggers)))
        stack.enter_context(bar)
        stack.enter_context(stop)
        loaded = _loader(run, trainer, dataset, start)
        stack.callback(loaded.close)
        with ranks.together(), kept_from_children():
            batches = iter(loaded)
        timer = Timer(lambda: loaded.waited_seconds)
        for done in range(start + 1, run.steps + 1):
            batch, error = None, None
            try:
                with stop.waiting():
                    batch = next(batches)
            except KeyboardInterrupt:
                pass
            except (ValueError, OSError) as met:
                error = met
            # ranks stop at one step, and fail together
            stopping, failed, paired = ranks.any(
                batch is None and error is None,
                error is not None,
                paired or (batch is not None and has_a_pair(batch)),
            )
            if failed:
                ranks.fail(error)
            if stopping:
                if done - 1 > saved:
                    save(done - 1)
                raise agreed(stopped(done - 1), ranks)
            assert batch is not None
            if not paired and done - start >= min(_STEPS_TO_FIND_A_PAIR, dataset.steps_per_epoch):
                error = ValueError(
                    f"none of the first {(done - start) * run.batch_size} clips of {run.data} has "
                    "video with sound, or video with a caption: there is nothing to learn from"
                )
                raise agreed(error, ranks)
            rate = rate_of(run, done - 1)
            with ranks.answering():
                loss, norm, cosines = trainer.step(batch, done - 1, rate)
            try:
                watch.add(done, batch.files, {"loss": loss.total, "gradient norm": norm})
                losses.add(loss.total)
                timer.step(run.batch_size)
                bar.update()
                values: dict[str, float] = {}
                if done % run.log_every == 0 or done == run.steps:
                    watch.check()
                    values = _values(loss, rate) | {
                        "gradient_norm": float(norm),
                        **{name: float(value) for name, value in cosines.items()},
                        "temperature": trainer.temperature(),
                        "skipped_files": ranks.total(len(dataset.skipped)),
                        **timer.take(ranks.largest),
                    }
                    bar.set_postfix(_shown(values))
                if run.eval_every is not None and (done % run.eval_every == 0 or done == run.steps):
                    watch.check()
                    model, found = trainer.model(), {}
                    with ranks.together():
                        if ranks.first:
                            found = evaluate(model, resolved(run.eval_data), held_out)
                    found = ranks.firsts(found)
                    values |= found
                    score = found.get(BEST_BY.get(run.best_by, ""))
                    new_best = score is not None and (
                        standing.best_retrieval is None or score > standing.best_retrieval
                    )
                    if new_best:
                        standing = standing._replace(best_retrieval=score)
                    timer.reset()
                if values and ranks.first:
                    logger.write(done, values)
                if done % run.checkpoint_every == 0 or done == run.steps or new_best:
                    save(done)
            except NonFiniteError as error:
                intact = (
                    f"{out / CHECKPOINT} of step {saved} stays" if saved else "nothing is saved"
                )
                told = NonFiniteError(
                    f"{error}; {intact}: lower the learning rate, or look at these files"
                )
                ranks.fail(told)


def has_a_pair(batch: Batch) -> bool:
    """Whether some clip has video and sound, or video and a caption."""
    other = batch.audio_valid | batch.text_valid.any(1)
    return bool((batch.video_valid & other).any())


def _loader(run: PretrainConfig, trainer: Trainer, dataset: ClipDataset, start: int) -> ClipLoader:
    options: dict[str, Any] = dict(pin_memory=trainer.pin_memory, start_method=trainer.start_method)
    options["worker_init"] = obey_the_parent_alone
    return loader(dataset, start, run.steps, run.workers, **options)


def _save(
    out: Path, trainer: Trainer, standing: Standing, best: bool, keep_last: int, ranks: Ranks
) -> None:
    """The model's files first, the checkpoint last.

    Whoever continues after a kill in between comes by here again.
    """
    model = trainer.model()
    with ranks.together():
        if ranks.first:
            save_model(model, out)
            if best:
                (out / BEST).mkdir(exist_ok=True)
                for name in (WEIGHTS, CONFIG, VOCABULARY):
                    link(out / name, out / BEST / name)
            keep_earlier(out / CHECKPOINT, keep_last)
    with ranks.together():
        trainer.save(out / CHECKPOINT, model, standing)


def _shown(values: dict[str, float]) -> dict[str, str]:
    """What the progress bar shows of a step's values."""
    alike = [value for name, value in values.items() if name.startswith("cosine_")]
    shown = {
        "loss": f"{values['loss']:.3f}",
        "clips/s": f"{values['clips_per_second']:.1f}",
        "data wait": f"{values['data_wait_seconds'] / values['step_seconds']:.0%}",
        "gradient": f"{values['gradient_norm']:.2g}",
    }
    return shown | ({"cosine": f"{max(alike):.2f}"} if alike else {})


def _values(loss: VATTLoss, rate: float) -> dict[str, float]:
    parts = {"loss": loss.total, "loss_va": loss.va, "loss_vt": loss.vt}
    values = {name: float(value) for name, value in parts.items() if value is not None}
    return {"loss": values.pop("loss"), "learning_rate": rate, **values}


def _trainer(
    run: PretrainConfig,
    config: VATTConfig,
    vocabulary: Vocabulary,
    weights: dict[str, Tensor] | None,
    ranks: Ranks,
) -> Trainer:
    if run.framework == "jax":
        if not has_a_tpu():
            # where libtpu is installed to compile with, JAX would look for a TPU, and say so at
            # length
            without_a_tpu(jax_on_cpu=False)
        try:
            from ..on_jax.training import JaxTrainer
        except ModuleNotFoundError as error:
            raise ValueError(
                f"framework 'jax' needs {error.name}: pip install 'vatt_fast[jax]'"
            ) from error
        return JaxTrainer(run, config, vocabulary, weights, ranks)
    return TorchTrainer(run, config, vocabulary, weights, ranks)


def _beginning(
    run: PretrainConfig,
    model_config: VATTConfig | None,
    out: Path,
    standing: Standing | None,
    source: Source,
) -> tuple[VATTConfig, Vocabulary, dict[str, Tensor] | None]:
    """The model's config, its vocabulary, and the weights it starts from instead of random ones.

    A continued run has its own vocabulary: word ids mean what they meant when it began.
    """
    config, weights = model_config or preset(run.preset, run.recipe), None
    own = out / VOCABULARY
    if run.init is not None:
        config, weights, vocabulary = read_folder(run.init)
        if vocabulary is None:
            raise ValueError(f"{run.init} has no {VOCABULARY}; start from a folder that has one")
        config = dataclasses.replace(config, **sizes(run))
        return config, vocabulary, None if standing else _resampled(weights, config)
    config = dataclasses.replace(config, **sizes(run))
    if standing is not None and own.is_file():
        vocabulary = Vocabulary.load(own)
        if run.words is not None:
            config = dataclasses.replace(config, word_dim=standing.run["model"]["word_dim"])
    elif run.words is not None:
        vocabulary, vectors = read_word_vectors(run.words, run.max_words)
        config = dataclasses.replace(config, word_dim=vectors.shape[1])
        weights = {"text_tokens.table.weight": torch.from_numpy(vectors)}
    elif not config.train_words:
        raise ValueError(
            "this model freezes its word table (recipe 'released' does), which would stay "
            "random: give word vectors with --words FILE, or take recipe 'paper'"
        )
    else:
        vocabulary = vocabulary_from(source, run.max_words)
    return dataclasses.replace(config, vocab_size=len(vocabulary)), vocabulary, weights


def _resampled(weights: dict[str, Tensor], config: VATTConfig) -> dict[str, Tensor]:
    """``weights`` with position tables of the lengths that ``config`` has."""
    with torch.device("meta"):
        wanted = {name: value.shape for name, value in VATT(config).state_dict().items()}
    found = dict(weights)
    for name, table in weights.items():
        if ".position.tables." in name and table.shape[0] != wanted[name][0]:
            matrix = torch.from_numpy(resample_matrix(table.shape[0], wanted[name][0]))
            found[name] = (matrix @ table.double()).to(table.dtype)
    return found


def vocabulary_of(data: str | Path, max_words: int) -> Vocabulary:
    """The most frequent words of the captions of what ``pretrain`` takes as data.

    Only padding and the unknown word where there are none.
    """
    return vocabulary_from(open_source(data), max_words)
