"""A program for a process with 8 virtual CPU devices: the step on all of them against one.

Prints one JSON line; with the word ``attention`` of ``integrations.jax.sharded_attention`` alone.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python tests/support/jax_sharded.py
"""

import dataclasses
import functools
import json
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vatt_fast.classifier import ClassifierConfig
from vatt_fast.config import TowerConfig, VATTConfig
from vatt_fast.data.clips import Batch, DropToken, copy_kept_rows
from vatt_fast.data.text import PADDING, UNKNOWN, Vocabulary
from vatt_fast.finetuning.settings import FineTuneConfig
from vatt_fast.integrations.jax import contrastive_loss, dot_product_attention, sharded_attention
from vatt_fast.model import VATT
from vatt_fast.on_jax import training
from vatt_fast.on_jax import weights as jax_weights
from vatt_fast.on_jax.finetuning import JaxFineTuner
from vatt_fast.on_jax.training import (
    AXIS,
    JaxTrainer,
    StepOptions,
    host_batch,
    initial_state,
    make_mesh,
    make_step,
    place,
    state_specs,
)
from vatt_fast.training.checkpoint import Standing
from vatt_fast.training.settings import BETAS, PretrainConfig

TOWER = TowerConfig(depth=3, dim=16, mlp_dim=32, num_heads=2, head_dim=8)
ONE_BLOCK = dataclasses.replace(TOWER, depth=1)
CONFIG = VATTConfig(
    video=TOWER,
    audio=ONE_BLOCK,
    text=ONE_BLOCK,
    frames=4,
    height=16,
    width=16,
    video_patch=(2, 8, 8),
    samples=512,
    audio_patch=64,
    words=5,
    texts_per_clip=3,
    vocab_size=32,
    d_va=16,
    d_vt=8,
    learn_temperature=True,
)
CLIPS = 16


def batch_of(config: VATTConfig, clips: int, drop: DropToken) -> Batch:
    """Random clips, some of them lacking a part; the first device's have no text at all."""
    draw = np.random.default_rng(0)
    text_valid = draw.random((clips, config.texts_per_clip)) > 0.3
    text_valid[:2] = False
    arrays = dict(
        video=draw.integers(
            0, 256, (clips, config.frames, config.height, config.width, 3), dtype=np.uint8
        ),
        audio=draw.uniform(-1, 1, (clips, config.samples)).astype(np.float32),
        text=draw.integers(
            0, config.vocab_size, (clips, config.texts_per_clip, config.words), dtype=np.int32
        ),
        video_valid=draw.random(clips) > 0.2,
        audio_valid=draw.random(clips) > 0.2,
        text_valid=text_valid,
        start_seconds=np.zeros(clips),
    )
    keeps = drop.draw(clips, seed=0, step=0)
    for name, patch in drop.patches.items():
        keep = np.broadcast_to(keeps[f"{name}_keep"], (clips, keeps[f"{name}_keep"].shape[-1]))
        rows = np.empty((*keep.shape, k_of(config, name)), arrays[name].dtype)
        for i in range(clips):
            copy_kept_rows(arrays[name][i], patch, keep[i], rows[i])
        arrays[name] = rows
    tensors = {name: torch.from_numpy(value) for name, value in (arrays | keeps).items()}
    return Batch(**tensors, files=("",) * clips)


def k_of(config: VATTConfig, modality: str) -> int:
    return config.video_patch_values if modality == "video" else config.audio_patch


def run(devices: int, drop_per: str, **changes) -> dict[str, np.ndarray]:
    """Loss, gradients and statistics of one step, and the loss of a second on the same batch."""
    options = StepOptions(smallest_shard=1, **changes)
    torch.manual_seed(0)
    state = initial_state(*jax_weights.from_torch(VATT(CONFIG)), CONFIG)
    mesh, specs = make_mesh(jax.devices()[:devices]), state_specs(state, devices, options)
    # one draw for all, whatever the number of devices
    arrays = host_batch(batch_of(CONFIG, CLIPS, DropToken(CONFIG, 0.5, drop_per)))
    if drop_per == "batch":
        arrays |= {
            name: np.repeat(arrays[name], devices, 0) for name in ("video_keep", "audio_keep")
        }
    arrays = {
        name: jax.device_put(value, NamedSharding(mesh, PartitionSpec(AXIS)))
        for name, value in arrays.items()
    }
    step, key = make_step(CONFIG, mesh, state, options, drop_per), jax.random.key(0)
    state, (loss, norm, *_) = step(place(mesh, specs, state), arrays, 1e-3, key)
    split = sum(not value.sharding.is_fully_replicated for value in state.params.values())
    found = {f"loss/{name}": value for name, value in vars(loss).items()}
    found["gradient_norm"] = norm
    found |= {f"statistics/{name}": value for name, value in state.statistics.items()}
    # Adam's first moment after one step
    found |= {
        f"gradient/{name}": value / (1 - BETAS[0]) for name, value in state.optimizer.mu.items()
    }
    found = {name: np.asarray(value) for name, value in jax.device_get(found).items()}
    _, (loss, *_) = step(state, arrays, 1e-3, key)
    return found | {"loss/after": np.asarray(loss.total), "split": np.array(split)}


def whole_on_a_device(restored: bool) -> list[str]:
    """Split arrays of a trainer's state that some device held whole while the state was made."""
    found, original = [], training.place

    def watched(mesh, specs, tree):
        placed = original(mesh, specs, tree)
        shapes: dict[bool, set] = {True: set(), False: set()}
        for x in jax.tree.leaves(placed):
            shapes[x.sharding.is_fully_replicated].add(x.shape)
        split = shapes[False] - shapes[True]  # a shape tells which arrays are meant
        assert len(split) > 5
        whole = [x for x in jax.live_arrays() if x.sharding.is_fully_replicated]
        found.extend(str(x.shape) for x in whole if x.shape in split)
        return placed

    training.place = watched
    training.StepOptions = functools.partial(StepOptions, smallest_shard=1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = PretrainConfig(
                data=folder, out=folder, framework="jax", batch_size=CLIPS, shard_weights=True
            )
            trainer = JaxTrainer(run, CONFIG, Vocabulary([PADDING, UNKNOWN]))
            if restored:
                trainer.save(Path(folder) / "state", trainer.model(), Standing(3, {}))
                trainer.restore(Path(folder) / "state", 3)
                assert int(trainer.state.optimizer.count) == 3
    finally:
        training.place, training.StepOptions = original, StepOptions
    return found


def fine_tuned(devices: int) -> dict[str, np.ndarray]:
    """Loss, norm and velocities of two steps of fine-tuning; weights of examples are the batch's.

    The whole batch shares a draw of DropToken.
    """
    run = FineTuneConfig(
        data="", out="", init="none", preset="tiny", recipe="small", batch_size=CLIPS, steps=2,
        loss="balanced", clip=0.1, framework="jax",
    ).with_steps(CLIPS)  # fmt: skip
    original = training.pick_devices
    training.pick_devices = lambda name, hosts: jax.devices()[:devices]
    try:
        trainer = JaxFineTuner(run, ClassifierConfig(CONFIG, "video", 4), None)
    finally:
        training.pick_devices = original
    batch = batch_of(CONFIG, CLIPS, DropToken(CONFIG, 0.5, "batch"))
    targets = (torch.rand(CLIPS, 4, generator=torch.Generator().manual_seed(0)) > 0.7).float()
    updates = [trainer.step(batch, targets, step, 0.1) for step in range(2)]
    found = {f"loss/{i}": each.loss for i, each in enumerate(updates)}
    found["gradient_norm"] = updates[1].gradient_norm
    found |= {f"gradient/{name}": value for name, value in trainer.state.velocity.items()}
    return {n: np.asarray(v) for n, v in jax.device_get(found).items()} | {"split": np.array(0)}


def loss_of_a_batch(devices: int) -> dict[str, np.ndarray]:
    """``integrations.jax.contrastive_loss`` and its gradients, of both kinds of scale."""
    draw = np.random.default_rng(0)
    x, y = (jnp.asarray(draw.standard_normal(size), jnp.float32) for size in ((16, 8), (16, 3, 8)))
    valid = jnp.asarray(draw.random(16) > 0.3), jnp.asarray(draw.random((16, 3)) > 0.3)
    mesh = make_mesh(jax.devices()[:devices])
    loss = contrastive_loss(mesh, AXIS, form="paper")
    value, gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, y, jnp.float32(9), *valid)
    fixed = contrastive_loss(mesh, AXIS)(x, y[:, 0], 9.0)
    found = {f"gradient/{n}": np.asarray(g) for n, g in zip("xys", gradients, strict=True)}
    return {"loss/learned": np.asarray(value), "loss/fixed": np.asarray(fixed)} | found


def attention_of_a_mesh(sizes: dict[str, int] | None, dtype) -> dict[str, np.ndarray]:
    """``integrations.jax.sharded_attention`` on axes of such sizes, or none, and its gradients."""
    draw = np.random.default_rng(0)
    shapes = ((8, 6, 4, 8), (8, 5, 4, 8), (8, 5, 4, 8), (4, 6, 5), (8, 6, 4, 8))
    q, k, v, bias, weights = (jnp.asarray(draw.standard_normal(s), dtype) for s in shapes)
    mask = jnp.arange(5) < jnp.asarray(draw.integers(1, 6, (8, 1, 1, 1)))
    attend = dot_product_attention
    if sizes is not None:
        devices = np.array(jax.devices()).reshape(tuple(sizes.values()))
        mesh = Mesh(devices, tuple(sizes))
        axes = {"batch": "data", "heads": "model"}
        attend = sharded_attention(mesh, **{k: axis for k, axis in axes.items() if axis in sizes})

    def total(q, k, v, bias):
        return (attend(q, k, v, bias, mask) * weights).astype(jnp.float32).sum()

    gradients = jax.jit(jax.grad(total, (0, 1, 2, 3)))(q, k, v, bias)
    found = {
        f"gradient/{n}": np.asarray(g, np.float32) for n, g in zip("qkvb", gradients, strict=True)
    }
    return {"out": np.asarray(attend(q, k, v, bias, mask), np.float32)} | found


def attention_of_meshes() -> dict[str, dict[str, float]]:
    """Of 8 devices against none of a mesh."""
    results = {}
    for name, dtype in {"fp32": jnp.float32, "bf16": jnp.bfloat16}.items():
        alone = attention_of_a_mesh(None, dtype)
        for sizes in (dict(data=4, model=2), dict(data=8), dict(other=2, model=4)):
            found = errors(attention_of_a_mesh(sizes, dtype), alone)
            results[f"{name} {sizes}"] = found
    return results


def errors(found: dict, expected: dict) -> dict[str, float]:
    """Greatest difference by kind, relative to the tensor's largest value.

    Where that is rounding noise: relative to the largest gradient.
    """
    largest = max(
        abs(value).max() for name, value in expected.items() if name.startswith("gradient")
    )
    worst: dict[str, float] = {}
    for name, value in expected.items():
        kind = name.partition("/")[0]
        floor = 1e-2 * largest if kind == "gradient" else 1e-3
        worst[kind] = max(
            worst.get(kind, 0.0),
            float(abs(found[name] - value).max() / max(abs(value).max(), floor)),
        )
    return worst | {"split": int(found.get("split", 0))}


if __name__ == "__main__":
    if sys.argv[1:] == ["attention"]:
        print(json.dumps(attention_of_meshes()))
        sys.exit()
    results = {
        # first: later ones leave arrays behind
        "whole": whole_on_a_device(restored=False) + whole_on_a_device(restored=True),
        "everywhere": errors(run(8, "batch"), run(1, "batch")),
        "fine-tuning": errors(fine_tuned(8), fine_tuned(1)),
        "shards": errors(run(8, "clip", shard_weights=True, recompute=True), run(1, "clip")),
    }
    results["contrastive_loss"] = errors(loss_of_a_batch(8), loss_of_a_batch(1))
    print(json.dumps(results))
