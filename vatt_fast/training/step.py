"""One training step of the torch model, and the trainer that runs it."""

import contextlib
from pathlib import Path
from typing import Any, Protocol

import torch

from ..config import VATTConfig
from ..data.clips import Batch
from ..data.text import Vocabulary
from ..devices import pick_device
from ..kernels.dispatch import native_bf16
from ..losses import VATTLoss, vatt_loss
from ..model import VATT
from .checkpoint import load_checkpoint, save_checkpoint
from .settings import BETAS, PretrainConfig


class Trainer(Protocol):
    """What a framework brings to ``pretrain``.

    A model from the run's seed, its optimizer, and their state on disk.
    """

    devices: int  # that share this process's batch
    start_method: str | None  # of the loader's worker processes; None: Python's default
    pin_memory: bool  # batches are wanted in page-locked memory

    def restore(self, path: Path, identity: dict[str, Any]) -> int:
        """Continue from a checkpoint; returns the number of steps done."""

    def step(self, batch: Batch, step: int, rate: float) -> VATTLoss:
        """One update; the loss, whose values may still be on their way."""

    def temperature(self) -> float: ...

    def save(self, path: Path, step: int, identity: dict[str, Any]) -> VATT:
        """Write a checkpoint; returns the model as it stands."""

    def model(self) -> VATT: ...


class TorchTrainer:
    """The torch model on one device."""

    devices = 1
    start_method: str | None = None

    def __init__(self, run: PretrainConfig, config: VATTConfig, vocabulary: Vocabulary):
        self.run, self.device = run, pick_device(run.device)
        self.pin_memory = self.device.type == "cuda"
        self.autocast = autocast(run.precision, self.device)
        self._model = initial_model(config, vocabulary, run.seed).to(self.device).train()
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            trainable, lr=0.0, betas=BETAS, eps=run.adam_eps, fused=True
        )

    def restore(self, path: Path, identity: dict[str, Any]) -> int:
        return load_checkpoint(path, self._model, self.optimizer, run=identity)

    def step(self, batch: Batch, step: int, rate: float) -> VATTLoss:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # the copy out of pageable memory would wait for the last step's end
        batch = batch.to(self.device, non_blocking=self.pin_memory)
        loss = train_step(self._model, self.optimizer, batch, self.run, step, self.autocast)
        va, vt = (None if part is None else part.detach() for part in (loss.va, loss.vt))
        return VATTLoss(loss.total.detach(), va, vt)

    def temperature(self) -> float:
        return 1 / float(torch.as_tensor(self._model.scale()).detach())

    def save(self, path: Path, step: int, identity: dict[str, Any]) -> VATT:
        save_checkpoint(path, self._model, self.optimizer, step=step, run=identity)
        return self._model

    def model(self) -> VATT:
        return self._model


def train_step(
    model: VATT,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    run: PretrainConfig,
    step: int,
    autocast: contextlib.AbstractContextManager,
) -> VATTLoss:
    """One update on one batch of kept patch rows: forward, loss, backward, Adam."""
    if model.config.dropout:
        torch.manual_seed(run.seed * 1_000_003 + step)  # a continued run draws the same dropout
    keeps = dict(video_keep=batch.video_keep, audio_keep=batch.audio_keep)
    valid = dict(
        video_valid=batch.video_valid, audio_valid=batch.audio_valid, text_valid=batch.text_valid
    )
    # first: the last step's gradients would lie beside this one's activations
    optimizer.zero_grad(set_to_none=True)
    with autocast:
        output = model(batch.video, batch.audio, batch.text, **keeps, **valid)
        loss = vatt_loss(output, model.config, scale=model.scale(), **valid)
    loss.total.backward()
    optimizer.step()
    model.clamp_temperature()
    return loss


def initial_model(config: VATTConfig, vocabulary: Vocabulary, seed: int) -> VATT:
    """The model a run with this seed starts from; leaves the caller's random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VATT(config)
    model.vocabulary = vocabulary
    return model


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 where the run asks for it, or the device computes it natively."""
    enabled = precision == "bf16" or (precision == "auto" and native_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
