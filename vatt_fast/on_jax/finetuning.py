"""Fine-tuning in JAX: one jitted step on a mesh of devices, and its part in ``finetune``.

The twin of ``vatt_fast/finetuning/step.py``. All devices hold all weights and share the batch, see
``training``; draws of dropout are JAX's own.
"""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.sharding import PartitionSpec

from ..classifier import Classifier, ClassifierConfig
from ..data.clips import Batch
from ..finetuning.losses import mixed, mixup_draw, weights_of
from ..finetuning.settings import MODALITY, FineTuneConfig
from ..finetuning.step import Update, initial_classifier
from ..kernels.settings import lowering_for
from ..training.checkpoint import Standing, read_state, write_state
from ..training.distributed import Ranks
from ..weights import load_weights
from . import classifier
from .training import AXIS, OnMesh, host_keep, on_mesh, place
from .weights import Arrays, as_tensors, rearrange, restore

_HEAD, _MOMENTUM = "classifier.", "momentum_buffer"


class TrainState(NamedTuple):
    """Everything a step changes: weights, and SGD's velocities of those that are trained."""

    params: Arrays
    velocity: Arrays


class Options(NamedTuple):
    """What a step does, of a run's settings."""

    loss: str
    smoothing: float
    clip: float
    momentum: float
    classifier_dropout: float
    frozen: bool
    recompute: bool
    dtype: Any
    grid: tuple[int, int, int] | None


def make_step(config: ClassifierConfig, mesh: Any, options: Options):
    """A jitted ``step(state, batch, rate, key) -> (state, Update)`` on all devices of the mesh.

    ``batch`` has x, valid (B,), targets (B, C) and, with DropToken, keep: (devices, K), or (B, K)
    of clips with their own draws. The step takes its state over.
    """
    everywhere, shared = PartitionSpec(), PartitionSpec(AXIS)
    step = jax.shard_map(
        functools.partial(_device_step, config, options),
        mesh=mesh,
        in_specs=(everywhere, shared, everywhere, everywhere),
        out_specs=everywhere,
        check_vma=False,  # as in ``training.make_step``
    )
    return jax.jit(step, donate_argnums=0)


def _device_step(
    config: ClassifierConfig, options: Options, state: TrainState, batch: Arrays, rate: Any, key
) -> tuple[TrainState, Update]:
    x, valid, keep = batch["x"], batch["valid"], batch.get("keep")
    if keep is not None and len(keep) != len(x):  # a draw for each device
        keep = keep[0]
    targets = batch["targets"]
    everyone, all_valid = (jax.lax.all_gather(each, AXIS, tiled=True) for each in (targets, valid))
    weights = weights_of(options.loss, everyone, all_valid, jnp)
    weights = jax.lax.dynamic_slice_in_dim(weights, jax.lax.axis_index(AXIS) * len(x), len(x))
    of_tower, of_head = jax.random.split(jax.random.fold_in(key, jax.lax.axis_index(AXIS)))
    drops = config.model.dropout and not options.frozen

    def loss_of(trained: Arrays):
        logits = classifier.forward(
            state.params | trained,
            x,
            config=config,
            keep=keep,
            grid=options.grid,
            dtype=options.dtype,
            keys=(of_tower if drops else None, of_head),
            classifier_dropout=options.classifier_dropout,
            recompute=options.recompute,
        ).astype(jnp.float32)
        return (weights * _terms(options, logits, targets)).sum(), logits

    trained = {name: state.params[name] for name in state.velocity}
    (loss, logits), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
    gradients = jax.lax.psum(gradients, AXIS)
    norm = optax.tree.norm(gradients)
    tower_rate = rate
    tower = {name: g for name, g in gradients.items() if not name.startswith(_HEAD)}
    if options.clip and tower:
        tower_rate = rate * options.clip / jnp.maximum(optax.tree.norm(tower), options.clip)
    # the rate is in the gradients, and so in the velocity, as in Keras
    gradients = {name: g * (tower_rate if name in tower else rate) for name, g in gradients.items()}
    velocity = {name: options.momentum * state.velocity[name] + g for name, g in gradients.items()}
    params = state.params | {name: trained[name] - v for name, v in velocity.items()}
    right = None
    if options.loss == "softmax":
        right = jax.lax.psum(((logits.argmax(-1) == targets.argmax(-1)) & valid).sum(), AXIS)
    return TrainState(params, velocity), Update(jax.lax.psum(loss, AXIS), norm, right)


def _terms(options: Options, logits, targets):
    """(B,) as ``finetuning.losses.terms_of``."""
    if options.loss == "softmax":
        return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, options.smoothing))
    return optax.sigmoid_binary_cross_entropy(logits, targets).sum(-1)


class JaxFineTuner(OnMesh):
    """The JAX classifier that ``finetune`` trains."""

    def __init__(
        self,
        run: FineTuneConfig,
        config: ClassifierConfig,
        weights: Mapping[str, torch.Tensor] | None,
        grid: tuple[int, int, int] | None = None,
        ranks: Ranks | None = None,
        labels: Sequence[str] | None = None,
    ):
        super().__init__(run, ranks)
        self.config, self.labels, self.modality = config, labels, MODALITY[run.task]
        options = Options(
            str(run.loss),
            run.label_smoothing or 0.0,
            run.clip or 0.0,
            run.momentum or 0.0,
            run.classifier_dropout or 0.0,
            run.frozen,
            run.recompute == "blocks",
            self.dtype,
            grid,
        )
        self._step = make_step(config, self.mesh, options)
        self.state = self._placed(initial_classifier(config, run, weights), {})

    def _placed(self, model: Classifier, velocity: Mapping[str, torch.Tensor]) -> TrainState:
        """A model and velocities on the devices; those that lack are 0."""
        weights = model.state_dict()
        trained = {n: p for n, p in weights.items() if not self.run.frozen or n.startswith(_HEAD)}
        none = {name: torch.zeros_like(p) for name, p in trained.items()}

        def ours(tensors: dict[str, torch.Tensor]) -> Any:
            arrays = rearrange(tensors, self.config.model)
            return {name: value.numpy(force=True) for name, value in arrays.items()}

        state = TrainState(ours(weights), ours(none | dict(velocity)))
        return place(self.mesh, jax.tree.map(lambda _: PartitionSpec(), state), state)

    def restore(self, path: Path, step: int) -> None:
        weights, moments = read_state(path)
        with torch.device("meta"):
            model = Classifier(self.config)
        load_weights(model.to_empty(device="cpu"), weights, source=str(path))
        self.state = self._placed(model, moments.get(_MOMENTUM, {}))

    def save(self, path: Path, model: Classifier, standing: Standing) -> None:
        if not self.ranks.first:
            return
        velocity = restore(as_tensors(self.state.velocity), self.config.model)
        moments = {_MOMENTUM: velocity} if self.run.momentum else {}
        write_state(path, model.state_dict(), moments, standing)

    def model(self) -> Classifier:
        model = classifier.to_torch(self.config, self.state.params)
        model.labels = None if self.labels is None else list(self.labels)
        return model

    def step(self, batch: Batch, targets: torch.Tensor, step: int, rate: float) -> Update:
        modality, run = self.modality, self.run
        x, valid = getattr(batch, modality), getattr(batch, f"{modality}_valid")
        keep = getattr(batch, f"{modality}_keep")
        targets = targets * valid[:, None]
        if run.mixup:  # of one host's clips, on the host
            share, partner = mixup_draw(
                len(batch), run.mixup, seed=run.seed, step=step, rank=self.ranks.rank
            )
            x, targets = mixed(x, share, partner), mixed(targets, share, partner)
            valid = valid | valid[partner]
        arrays = {"x": x.numpy(), "valid": valid.numpy(), "targets": targets.numpy()}
        if keep is not None:
            arrays["keep"] = host_keep(keep, len(batch), self.devices)
        placed = on_mesh(arrays, self.mesh)
        with lowering_for(self.platform):  # which need not be JAX's default
            self.state, update = self._step(self.state, placed, np.float32(rate), self.key(step))
        jax.block_until_ready(placed)  # copied, so the loader may fill its memory anew
        return update
