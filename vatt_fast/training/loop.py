"""Pre-training: folder of clips in, run folder out; may be killed at any time and continued."""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import VATTConfig, preset
from ..data.augment import ClipAugment, Frames, Key, augmentation, name_of
from ..data.clips import Batch, ClipSpec, DropToken
from ..data.dataset import ClipDataset
from ..data.order import VERSION as ORDER_VERSION
from ..data.source import Source, shares_of
from ..data.sources import open_source, vocabulary_from
from ..data.text import Vocabulary
from ..data.word_vectors import read_word_vectors
from ..devices import importing_jax
from ..model import VATT
from ..on_jax.hosts import announce_hosts
from ..weights import CONFIG, VOCABULARY, WEIGHTS, read_folder, resampled, save_model
from .checkpoint import BEST, CHECKPOINT, Data, Standing, check_same_run, read_standing
from .distributed import Ranks, agreed, check_settings, joined
from .evaluate import BEST_BY, evaluate
from .metrics import METRICS
from .report import REPORT, Report
from .running import Job, Step, continued, run_folder, train, warn_of_warmup
from .settings import PretrainConfig, describe, differences, rate_of, resolved, sizes
from .shards import newest
from .step import TorchTrainer, Trainer

INDEX, EVAL_INDEX = "index", "eval_index"
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
    if run.framework == "jax":
        announce_hosts(run)
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
    if ranks.first:
        warn_of_warmup(run)
    with run_folder(out, ranks) as make_folder:
        held_out = None
        with ranks.together():
            if ranks.first and run.eval_data is not None:
                held_out = open_source(
                    run.eval_data, index_folder=out / EVAL_INDEX, workers=run.workers
                )
        for turn in (True, False):  # the first rank writes an index that the others read
            with ranks.together():
                if ranks.first == turn:
                    path = newest(out)
                    standing = read_standing(path) if path.exists() else None
                    # before a framework that must not be forked
                    source = open_source(run.data, index_folder=out / INDEX, workers=run.workers)
                    found = _beginning(run, model_config, out, standing, source)
            if ranks.world == 1:
                break
        config, vocabulary, weights = found
        augment, named = _augmentation(run, config, augment)
        settings = describe(run, config) | {"augment": named}
        if standing is not None:
            check_same_run(path, differences(standing.run, settings))
        data = Data(*source.identity, shares_of(source))
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
            windows_per_decode=run.windows_per_decode,
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
        now = continued(path, standing, now, trainer, ranks, run.keep_last)
        make_folder()
        report = Report(run, settings, config, vocabulary, source, augment)
        train(Pretraining(run, trainer, dataset, held_out, report), ranks, now, progress)
    return trainer.model().eval()


@dataclasses.dataclass
class Pretraining(Job):
    run: PretrainConfig
    trainer: Trainer
    dataset: ClipDataset
    held_out: Source | None
    report: Report
    name = "pretrain"
    files = (WEIGHTS, CONFIG, VOCABULARY)

    def teaches(self, batch: Batch) -> bool:
        return has_a_pair(batch)

    def unteachable(self, steps: int) -> str | None:
        if steps < min(_STEPS_TO_FIND_A_PAIR, self.dataset.steps_per_epoch):
            return None
        return (
            f"none of the first {steps * self.run.batch_size} clips of {self.run.data} has "
            "video with sound, or video with a caption: there is nothing to learn from"
        )

    def rate(self, step: int) -> float:
        return rate_of(self.run, step)

    def step(self, batch: Batch, step: int, rate: float) -> Step:
        loss, norm, cosines = self.trainer.step(batch, step, rate)

        def more() -> dict[str, float]:
            values = {"loss_va": loss.va, "loss_vt": loss.vt, **cosines}
            told = {name: float(value) for name, value in values.items() if value is not None}
            return told | {"temperature": self.trainer.temperature()}

        return Step(loss.total, norm, more)

    def shown(self, values: dict[str, float]) -> dict[str, str]:
        alike = [value for name, value in values.items() if name.startswith("cosine_")]
        shown = {
            "loss": f"{values['loss']:.3f}",
            "clips/s": f"{values['clips_per_second']:.1f}",
            "data wait": f"{values['data_wait_seconds'] / values['step_seconds']:.0%}",
            "gradient": f"{values['gradient_norm']:.2g}",
        }
        return shown | ({"cosine": f"{max(alike):.2f}"} if alike else {})

    def measure(self, model: VATT, ranks: Ranks) -> tuple[dict[str, float], float | None]:
        found: dict[str, float] = {}
        with ranks.together():
            if ranks.first:
                found = evaluate(model, resolved(self.run.eval_data), self.held_out)
        found = ranks.firsts(found)
        return found, found.get(BEST_BY.get(self.run.best_by, ""))

    def write_model(self, model: VATT, out: Path) -> None:
        save_model(model, out)

    def write_report(self) -> None:
        self.report.write()


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


def has_a_pair(batch: Batch) -> bool:
    """Whether some clip has video and sound, or video and a caption."""
    other = batch.audio_valid | batch.text_valid.any(1)
    return bool((batch.video_valid & other).any())


def _trainer(
    run: PretrainConfig,
    config: VATTConfig,
    vocabulary: Vocabulary,
    weights: dict[str, Tensor] | None,
    ranks: Ranks,
) -> Trainer:
    if run.framework == "jax":
        with importing_jax():
            from ..on_jax.training import JaxTrainer
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
        with torch.device("meta"):
            wanted = VATT(config).state_dict()
        return config, vocabulary, None if standing else resampled(weights, wanted)
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


def vocabulary_of(data: str | Path, max_words: int) -> Vocabulary:
    """The most frequent words of the captions of what ``pretrain`` takes as data.

    Only padding and the unknown word where there are none.
    """
    return vocabulary_from(open_source(data), max_words)
