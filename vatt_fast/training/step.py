"""One training step of the torch model, and the trainer that runs it."""

import contextlib
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from .. import collectives
from ..config import VATTConfig
from ..data.clips import Batch
from ..data.text import PADDING, UNKNOWN, Vocabulary
from ..devices import pick_device
from ..kernels.dispatch import native_bf16
from ..large_batch import backward_in_micro_batches
from ..losses import VATTLoss, vatt_loss
from ..model import VATT, VATTOutput
from ..sharding import shard
from ..weights import load_weights
from . import running
from .checkpoint import Standing, is_sharded, load_checkpoint, save_checkpoint, whole
from .distributed import Ranks
from .metrics import mean_cosines
from .settings import BETAS, PretrainConfig, resolved
from .shards import ShardedSaves

_KEEPS = ("video_keep", "audio_keep")
# buffers are alike; torch 2.13 renamed the argument
_NAMES = inspect.signature(DistributedDataParallel).parameters
_WITHOUT_BUFFERS: dict[str, Any] = {
    "forward_sync_buffers" if "forward_sync_buffers" in _NAMES else "broadcast_buffers": False
}


class Update(NamedTuple):
    """What one step found; the values may still be on their way."""

    loss: VATTLoss
    gradient_norm: Any  # a scalar array: the norm of all gradients together, of the whole batch
    cosines: dict[str, Any]  # ``mean_cosines``, at steps that are logged


class Trainer(running.Trainer, Protocol):
    """What a framework brings to ``pretrain``: a model from the run's seed, and what it does."""

    devices: int  # that share this process's batch

    def step(self, batch: Batch, step: int, rate: float) -> Update:
        """One update."""

    def temperature(self) -> float: ...

    def model(self) -> VATT:
        """As it stands; all ranks call."""


class TorchTrainer:
    """The torch model on this rank's device, alike on all ranks or in shards over them."""

    devices = 1
    start_method: str | None = None
    shards: ShardedSaves | None = None

    def __init__(
        self,
        run: PretrainConfig,
        config: VATTConfig,
        vocabulary: Vocabulary,
        weights: Mapping[str, Tensor] | None = None,
        ranks: Ranks | None = None,
    ):
        self.ranks = ranks = ranks or Ranks(device=run.device)
        self.run, self.device = run, pick_device(ranks.device)
        self.pin_memory = self.device.type == "cuda"
        self.autocast = autocast(run.precision, self.device)
        self.precision = "bf16" if self.autocast._enabled else "fp32"
        model = initial_model(config, vocabulary, run.seed, weights)
        model.set_execution(recompute=run.recompute, compile=run.compile)
        self._model = model.to(self.device).train()
        self._vocabulary = vocabulary
        self._replicas: Any = self._model  # what is called
        if ranks.world > 1 and _strategy(run, self._model) == "fsdp2":
            self._replicas = shard(self._model)
        elif ranks.world > 1:
            self._replicas = DistributedDataParallel(
                self._model,
                device_ids=[self.device] if self.device.type == "cuda" else None,
                **_WITHOUT_BUFFERS,
                gradient_as_bucket_view=True,
                find_unused_parameters=not has_words(config),
            )
        trainable = [p for p in self._model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(
            trainable, lr=0.0, betas=BETAS, eps=resolved(run.adam_eps), fused=True
        )
        if is_sharded(trainable[0]):
            where = (Path(run.out), run.keep_last)
            self.shards = ShardedSaves(*where, self._model, self.optimizer, ranks)

    def restore(self, path: Path, step: int) -> None:
        if self.shards is not None and path.is_dir():
            self.shards.restore(path)
        else:
            load_checkpoint(path, self._model, self.optimizer)

    def step(self, batch: Batch, step: int, rate: float) -> Update:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # the copy out of pageable memory would wait for the last step's end
        batch = batch.to(self.device, non_blocking=self.pin_memory)
        copied = None
        if self.device.type == "cuda":
            copied = torch.cuda.current_stream(self.device).record_event()
        cosines: dict[str, Tensor] | None = {} if self._logs(step + 1) else None
        loss = train_step(
            self._replicas, self.optimizer, batch, self.run, step, self.autocast, cosines
        )
        loss = self._of_all(loss)
        gradients = [p.grad for p in self._model.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        norm = whole(norm)
        if copied is not None:
            copied.synchronize()  # the loader fills its memory anew; this step is under way by now
        return Update(loss, norm, cosines or {})

    def _of_all(self, loss: VATTLoss) -> VATTLoss:
        """The whole batch's loss, of which ranks have W times their share each."""
        parts: list[Any] = [
            None if x is None else x.detach() for x in (loss.total, loss.va, loss.vt)
        ]
        if self.ranks.world > 1:
            there = torch.stack([part for part in parts if part is not None])
            means = iter(collectives.total(there) / self.ranks.world)
            parts = [None if part is None else next(means) for part in parts]
        return VATTLoss(*parts)

    def _logs(self, done: int) -> bool:
        return done % self.run.log_every == 0 or done == self.run.steps

    def temperature(self) -> float:
        return 1 / float(whole(torch.as_tensor(self._model.scale()).detach()))

    def save(self, path: Path, model: VATT, standing: Standing) -> None:
        if self.ranks.first:
            save_checkpoint(path, self._model, self.optimizer, standing)

    def model(self) -> VATT:
        tensors = self._model.state_dict()
        if not any(is_sharded(value) for value in tensors.values()):
            return self._model
        with torch.device("meta"):
            model = VATT(self._model.config)
        model.load_state_dict({n: whole(value) for n, value in tensors.items()}, assign=True)
        for name, parameter in self._model.named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        model.vocabulary = self._vocabulary
        return model.to(self.device)


def _strategy(run: PretrainConfig, model: VATT) -> str:
    """Where weights, gradients and Adam's state fill a quarter of the device, they are split."""
    device = next(model.parameters()).device
    if run.strategy != "auto" or device.type != "cuda":
        return "ddp" if run.strategy == "auto" else run.strategy
    state = 16 * sum(p.numel() for p in model.parameters())
    memory = torch.cuda.get_device_properties(device).total_memory
    return "fsdp2" if state > memory / 4 else "ddp"


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    run: PretrainConfig,
    step: int,
    autocast: contextlib.AbstractContextManager,
    cosines: dict[str, Tensor] | None = None,
) -> VATTLoss:
    """One update on one batch of kept patch rows: forward, loss, backward, Adam.

    With ``run.micro_batch`` the encoders see so many clips at once. ``cosines``, where given, is
    filled with ``mean_cosines`` of the embeddings of all processes. ``model`` is a VATT, also in
    DistributedDataParallel or in shards.
    """
    whole_model: VATT = getattr(model, "module", model)
    config = whole_model.config
    if config.dropout:  # a continued run draws the same, each rank its own
        torch.manual_seed(run.seed * 1_000_003 + step + (collectives.rank() << 40))
    keeps = {name: _of_clips(getattr(batch, name), len(batch)) for name in _KEEPS}
    valid: dict[str, Any] = dict(
        video_valid=batch.video_valid, audio_valid=batch.audio_valid, text_valid=batch.text_valid
    )
    # first: the last step's gradients would lie beside this one's activations
    optimizer.zero_grad(set_to_none=True)
    text = batch.text if has_words(config) else None
    inputs = dict(video=batch.video, audio=batch.audio, text=text, **keeps, **valid)

    def loss_of(output: VATTOutput) -> VATTLoss:
        if cosines is not None:
            with torch.no_grad():
                cosines.update(
                    mean_cosines(output, valid, xp=torch, over_devices=collectives.total)
                )
        most = len(batch)  # every rank has as many
        scale = whole_model.scale()
        return vatt_loss(output, config, scale=scale, most_clips=most, **valid)

    if run.micro_batch is not None and run.micro_batch < len(batch):
        loss = backward_in_micro_batches(model, inputs, loss_of, run.micro_batch, autocast=autocast)
    else:
        with autocast:
            loss = loss_of(model(**inputs))
        loss.total.backward()
    optimizer.step()
    whole_model.clamp_temperature()
    return loss


def _of_clips(keep: Tensor | None, clips: int) -> Tensor | None:
    """Kept indices of all clips (K,), or of each (B, K), of draws that parts of a batch share."""
    if keep is None or keep.ndim == 1 or len(keep) == clips:
        return keep
    return keep.repeat_interleave(clips // len(keep), 0)


def has_words(config: VATTConfig) -> bool:
    """False of a folder without captions, whose text is not computed."""
    return config.vocab_size > len((PADDING, UNKNOWN))


def initial_model(
    config: VATTConfig,
    vocabulary: Vocabulary,
    seed: int,
    weights: Mapping[str, Tensor] | None = None,
) -> VATT:
    """The model a run with this seed starts from; leaves the caller's random state alone.

    ``weights`` by name take the place of random ones.

    Raises:
        ValueError: some are of no such name or shape.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = VATT(config)
    model.vocabulary = vocabulary
    if weights is not None:
        load_weights(model, {**model.state_dict(), **weights}, source="what the run starts from")
    return model


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """bf16 where the run asks for it, or the device computes it natively."""
    enabled = precision == "bf16" or (precision == "auto" and native_bf16(device))
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)
