"""The settings of a pre-training run, which both frameworks read."""

import dataclasses
import json
from typing import Any, Literal

from ..config import VATTConfig
from .schedule import Schedule, learning_rate

BETAS = (0.9, 0.999)  # Adam's
# a run may continue with other values of these; everything else must be as it was
_FREE = (
    "out",
    "workers",
    "framework",
    "shard_weights",
    "recompute",
    "device",
    "log_every",
    "checkpoint_every",
    "cache",
)


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    """One pre-training run.

    All defaults but the preset follow the paper (section 4.1 and appendix). A laptop wants smaller
    batches, fewer steps and a higher learning rate (``vatt-fast demo`` has 32 clips, 1000 steps,
    1.5e-3).
    """

    # The comments are the options' help. One above a field holds until the next empty line.

    data: str  # folder of media files; with captions.json, or video and audio alone are trained

    # run folder: config.json, model.safetensors, vocabulary.txt, checkpoint.safetensors,
    # metrics.jsonl, TensorBoard events
    out: str

    # base_base_small (bbs), medium_base_small (mbs), large_base_small (lbs), agnostic_medium (ma)
    # or tiny
    preset: str = "tiny"

    recipe: Literal["paper", "released"] = "paper"  # the paper's choices, or the released code's
    steps: int = 500_000
    batch_size: int = 2048  # clips of a step
    drop_rate: float = 0.5  # fraction of video and audio patches removed by DropToken
    drop_per: Literal["batch", "clip"] = "batch"  # whether the clips of a batch share a draw
    learning_rate: float = 1e-4  # after the warm-up
    final_learning_rate: float = 5e-5
    warmup_steps: int = 10_000
    schedule: Schedule = "quarter_cosine"
    adam_eps: float = 1e-8
    max_words: int = 65536  # size of the vocabulary built from the captions
    seed: int = 0
    shuffle_captions: bool = False  # captions of other clips: retrieval must stay near chance
    precision: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where the device computes it
    framework: Literal["torch", "jax"] = "torch"  # jax: all devices of this host share the batch
    shard_weights: bool = False  # jax: weights and Adam's state lie in shards over the devices
    recompute: bool = False  # jax: keep only the blocks' inputs for the backward pass
    device: str = "auto"
    workers: int = 2  # processes that read clips; 0: none
    cache: str | None = None  # keep decoded clips here; for small data sets that fit the disk
    log_every: int = 10  # steps
    checkpoint_every: int = 500  # steps

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("warmup_steps", "workers", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; it must not be negative")
        if not 0 <= self.drop_rate < 1:
            raise ValueError(
                f"drop_rate is {self.drop_rate}; it is the fraction removed and lies in [0, 1)"
            )
        if self.framework not in ("torch", "jax"):
            raise ValueError(f"framework is {self.framework!r}; it is torch or jax")
        if self.framework == "torch" and (self.shard_weights or self.recompute):
            raise ValueError(
                "shard_weights and recompute belong to framework 'jax'; leave them out"
            )


def describe(run: PretrainConfig, config: VATTConfig) -> dict[str, Any]:
    """What a continued run must share with the one that wrote the checkpoint."""
    settings = {name: value for name, value in dataclasses.asdict(run).items() if name not in _FREE}
    return json.loads(json.dumps(settings | {"model": dataclasses.asdict(config)}))


def rate_of(run: PretrainConfig, step: int) -> float:
    """Learning rate of a step, from 0."""
    # the paper counts from 0; from 1 spares the first step a rate of 0
    return learning_rate(
        step + 1,
        peak=run.learning_rate,
        final=run.final_learning_rate,
        warmup_steps=run.warmup_steps,
        total_steps=run.steps,
        schedule=run.schedule,
    )
