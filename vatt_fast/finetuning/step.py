"""One step of fine-tuning: clip or waveform, tower, classifier, loss, SGD."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import collectives
from ..classifier import Classifier, ClassifierConfig
from ..data.clips import Batch
from ..devices import pick_device
from ..model import Block
from ..training import running
from ..training.checkpoint import Standing, load_checkpoint, save_checkpoint
from ..training.distributed import Ranks
from ..training.step import autocast
from ..weights import load_weights
from .losses import mixed, mixup_draw, terms_of, weights_of
from .settings import MODALITY, FineTuneConfig

_HEAD = "classifier."


class Update(NamedTuple):
    """What one step found; the values may still be on their way."""

    loss: Tensor
    gradient_norm: Tensor  # of all that is trained, before it is clipped
    right: Tensor | None  # examples whose class has the highest logit; None where they have several


def initial_classifier(
    config: ClassifierConfig, run: FineTuneConfig, weights: Mapping[str, Tensor] | None
) -> Classifier:
    """The classifier a run starts from; leaves the caller's random state alone.

    A new last layer is drawn as in the released code: normal for softmax, uniform and with a bias
    of -log(C - 1), the odds of one class in C, for sigmoids.

    Args:
        weights: of the tower, and maybe of the last layer, by name; None: all are random.

    Raises:
        ValueError: weights of no such name or shape, or some that lack.
    """
    with torch.random.fork_rng():
        torch.manual_seed(run.seed)
        model = Classifier(config)
        torch.manual_seed(run.seed)  # whatever was drawn for the tower
        layer = model.classifier
        nn.init.zeros_(layer.bias)
        if run.loss == "softmax":
            nn.init.xavier_normal_(layer.weight)
        else:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.constant_(layer.bias, -math.log(max(config.num_classes - 1, 1)))
    if weights is not None:
        own = {name: value for name, value in model.state_dict().items() if name.startswith(_HEAD)}
        load_weights(model, own | dict(weights), source="what the run starts from")
    return model


class Trainer(running.Trainer, Protocol):
    """What a framework brings to ``finetune``: a classifier to start from, and what it does."""

    def step(self, batch: Batch, targets: Tensor, step: int, rate: float) -> Update:
        """One update.

        Args:
            targets: (B, C) of 0 and 1.
        """

    def model(self) -> Classifier:
        """As it stands; all ranks call."""


class FineTuner:
    """The torch model on this rank's device, alike on all ranks; optimizer, and state on disk."""

    start_method: str | None = None
    shards: None = None

    def __init__(
        self,
        run: FineTuneConfig,
        config: ClassifierConfig,
        weights: Mapping[str, Tensor] | None,
        grid: tuple[int, int, int] | None = None,
        ranks: Ranks | None = None,
        labels: Sequence[str] | None = None,
    ):
        self.ranks = ranks = ranks or Ranks(device=run.device)
        self.run, self.device, self.grid = run, pick_device(ranks.device), grid
        self.modality = MODALITY[run.task]
        self.pin_memory = self.device.type == "cuda"
        self.autocast = autocast(run.precision, self.device)
        self.precision = "bf16" if self.autocast._enabled else "fp32"
        model = initial_classifier(config, run, weights)
        model.classifier_dropout = run.classifier_dropout or 0.0
        model.labels = None if labels is None else list(labels)
        for module in model.modules():
            if isinstance(module, Block):
                module.recompute, module.compile_mode = run.recompute, run.compile
        if run.frozen:
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name.startswith(_HEAD))
        self._model = model.to(self.device)
        self.train()
        named = [(n, p) for n, p in self._model.named_parameters() if p.requires_grad]
        self.tower = [p for n, p in named if not n.startswith(_HEAD)]
        self.head = [p for n, p in named if n.startswith(_HEAD)]
        # the rate is in the gradients, and so in the velocity, as in Keras
        self.optimizer = torch.optim.SGD(
            self.tower + self.head, lr=1.0, momentum=run.momentum or 0.0, fused=True
        )

    def train(self) -> None:
        """In training mode, but for a frozen tower."""
        self._model.train(not self.run.frozen)
        self._model.training = True

    def restore(self, path: Path, step: int) -> None:
        load_checkpoint(path, self._model, self.optimizer)

    def save(self, path: Path, model: Classifier, standing: Standing) -> None:
        if self.ranks.first:
            save_checkpoint(path, model, self.optimizer, standing)

    def model(self) -> Classifier:
        return self._model

    def step(self, batch: Batch, targets: Tensor, step: int, rate: float) -> Update:
        run, modality = self.run, self.modality
        if self._model.classifier_dropout or self._model.config.dropout:
            # a continued run draws the same, each rank its own
            number = run.seed * 1_000_003 + step
            torch.manual_seed(number * self.ranks.world + self.ranks.rank)
        x, valid = getattr(batch, modality), getattr(batch, f"{modality}_valid")
        keep = getattr(batch, f"{modality}_keep")
        x, valid, targets = (self._send(each) for each in (x, valid, targets))
        keep = None if keep is None else self._send(keep)
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.current_stream(self.device).record_event()
        targets = targets * valid[:, None]
        if run.mixup:
            share, partner = mixup_draw(
                len(batch), run.mixup, seed=run.seed, step=step, rank=self.ranks.rank
            )
            x, targets = mixed(x, share, partner), mixed(targets, share, partner)
            valid = valid | valid[partner.to(self.device)]
        loss, logits = self._backward(x, targets, valid, keep)
        norm = self._update(rate)
        right = None
        if run.loss == "softmax":
            right = ((logits.argmax(-1) == targets.argmax(-1)) & valid).sum()
            right = collectives.total(right)
        if copied is not None:
            copied.synchronize()  # the loader fills its memory anew; this step is under way by now
        return Update(loss, norm, right)

    def _send(self, value: Tensor) -> Tensor:
        return value.to(self.device, non_blocking=self.pin_memory)

    def _backward(
        self, x: Tensor, targets: Tensor, valid: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss of all ranks' batch and this one's logits; gradients are left on the parameters.

        Weights of examples are those of the whole batch, so its parts add up to it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        loss_kind = str(self.run.loss)
        everyone = collectives.gather(targets).flatten(0, 1)
        weights = weights_of(loss_kind, everyone, collectives.gather(valid).flatten())
        weights = weights[self.ranks.rank * len(x) : (self.ranks.rank + 1) * len(x)]
        size = self.run.micro_batch or len(x)
        total, found = torch.zeros((), device=self.device), []
        for first in range(0, len(x), size):
            part = slice(first, first + size)
            kept = keep[part] if keep is not None and keep.ndim == 2 else keep
            with self.autocast:
                logits = self._model(x[part], keep=kept, grid=self.grid).float()
            terms = terms_of(loss_kind, logits, targets[part], self.run.label_smoothing or 0.0)
            loss = (weights[part] * terms).sum()
            loss.backward()
            total = total + loss.detach()
            found.append(logits.detach())
        if self.ranks.world > 1:
            gradients = [p.grad for p in self.tower + self.head if p.grad is not None]
            exchanges = [dist.all_reduce(gradient, async_op=True) for gradient in gradients]
            for exchange in exchanges:
                exchange.wait()
        return collectives.total(total), torch.cat(found)

    @torch.no_grad()
    def _update(self, rate: float) -> Tensor:
        """Clip the tower's gradient by its norm, then SGD. Returns the norm of all before that."""
        tower, head = (
            [p.grad for p in group if p.grad is not None] for group in (self.tower, self.head)
        )
        norm = torch.nn.utils.get_total_norm(tower + head)
        if tower:
            factor: Any = rate
            if self.run.clip:
                of_tower = torch.nn.utils.get_total_norm(tower)
                factor = rate * self.run.clip / of_tower.clamp(min=self.run.clip)
            torch._foreach_mul_(tower, factor)
        torch._foreach_mul_(head, rate)
        self.optimizer.step()
        return norm
