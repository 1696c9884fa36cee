"""Pre-training in JAX: one jitted step on a mesh of devices, and its part in ``pretrain``.

The devices share the batch. The whole step runs inside ``shard_map``, so every kernel sees one
device's arrays (Mosaic kernels are not partitioned automatically) and each exchange between devices
is written down: embeddings gathered and column sums exchanged by the losses, batch statistics and
gradients summed. With ``shard_weights`` weights are joined right before use and their gradients
summed into shards (fully sharded data parallelism).
"""

import dataclasses
import functools
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..config import VATTConfig
from ..data.clips import Batch
from ..data.text import Vocabulary
from ..inputs import DropPer, sample_keeps
from ..kernels.settings import lowering_for
from ..losses import VATTLoss
from ..model import VATT
from ..training.checkpoint import Standing, read_state, write_state
from ..training.distributed import Ranks
from ..training.metrics import mean_cosines
from ..training.settings import BETAS, PretrainConfig, resolved
from ..training.step import Update, has_words, initial_model
from ..weights import load_weights
from . import model as jax_model
from . import weights as jax_weights
from .losses import vatt_loss
from .weights import Arrays

AXIS = "data"  # the mesh's one axis: its devices share the batch and, if so asked, the weights
_SHARD_FROM = 2**16  # a smaller weight is cheaper to hold everywhere than to gather


class TrainState(NamedTuple):
    """Everything a step changes. ``optimizer`` is Adam's state of the trainable weights."""

    params: Arrays
    statistics: Arrays
    optimizer: optax.ScaleByAdamState


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """How a step runs; none of them changes what it computes, beyond rounding."""

    dtype: Any = jnp.float32  # of the towers' arithmetic; weights, statistics and losses are fp32
    adam_eps: float = 1e-8
    shard_weights: bool = False
    recompute: bool = False
    smallest_shard: int = _SHARD_FROM  # elements of the smallest weight that is split


# -- where things lie ------------------------------------------------------------------------------


def make_mesh(devices) -> Mesh:
    """All ``devices`` (such as ``jax.devices()``) on one axis.

    They share the batch and, if asked for, the weights.
    """
    return Mesh(np.array(devices), (AXIS,))


def sharded_axis(
    name: str, shape: tuple[int, ...], devices: int, options: StepOptions
) -> int | None:
    """Which axis of a weight is split over the devices: the first one that divides evenly.

    None: every device holds the whole. Only matrices are split: vectors, position tables and
    relative biases are small. The axis of stacked blocks is not: a loop takes them one by one.
    """
    stacked = int(jax_weights.is_stacked(name))
    large = len(shape) > 1 + stacked and int(np.prod(shape[stacked:])) >= options.smallest_shard
    if devices == 1 or not options.shard_weights or not large or not name.endswith(".weight"):
        return None
    return next(
        (axis for axis, size in enumerate(shape) if size % devices == 0 and axis >= stacked), None
    )


def state_specs(state: TrainState, devices: int, options: StepOptions) -> TrainState:
    """PartitionSpecs of a TrainState of arrays or of their shapes."""

    def specs(arrays: dict) -> dict:
        axes = {
            name: sharded_axis(name, value.shape, devices, options)
            for name, value in arrays.items()
        }
        return {
            name: PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS)
            for name, axis in axes.items()
        }

    adam = optax.ScaleByAdamState(
        PartitionSpec(), specs(state.optimizer.mu), specs(state.optimizer.nu)
    )
    statistics: Any = {name: PartitionSpec() for name in state.statistics}
    return TrainState(specs(state.params), statistics, adam)


def place(mesh: Mesh, specs, tree):
    """The tree's arrays on the mesh's devices. Of NumPy's, a device gets its own shard only."""

    def put(spec, x):
        sharding = NamedSharding(mesh, spec)
        if not isinstance(x, np.ndarray):
            return jax.device_put(x, sharding)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: np.array(x[index]))

    return jax.tree.map(put, specs, tree, is_leaf=lambda x: isinstance(x, PartitionSpec))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _join(shard, axis: int, dtype):
    """A device's shard -> the whole weight in ``dtype``, exchanged in that dtype.

    Gradients are summed over devices in the shard's own dtype.
    """
    return jax.lax.all_gather(shard.astype(dtype), AXIS, axis=axis, tiled=True)


def _join_forward(shard, axis, dtype):
    return _join(shard, axis, dtype), jnp.zeros((0,), shard.dtype)


def _join_backward(axis, dtype, like, d_whole):
    return (
        jax.lax.psum_scatter(d_whole.astype(like.dtype), AXIS, scatter_dimension=axis, tiled=True),
    )


_join.defvjp(_join_forward, _join_backward)


# -- the step --------------------------------------------------------------------------------------


def initial_state(params: Arrays, statistics: Arrays, config: VATTConfig) -> TrainState:
    """What the first step takes, on no mesh yet (``place``).

    Weights, batch-norm statistics, and Adam's zeros for the trainable weights.

    Args:
        params, statistics: as ``model.forward`` takes them.
    """
    trained = {name: value for name, value in params.items() if jax_weights.trainable(name, config)}
    return TrainState(params, statistics, _adam(StepOptions()).init(trained))


def state_shapes(config: VATTConfig) -> TrainState:
    """The shapes of a model's TrainState, without allocating it."""
    return jax.eval_shape(
        functools.partial(initial_state, config=config), *jax_weights.shapes(config)
    )


def batch_shapes(
    config: VATTConfig,
    batch_size: int,
    drop_rate: float,
    devices: int,
    drop_per: DropPer = "batch",
) -> dict[str, Any]:
    """The shapes of what ``host_batch`` makes."""
    c, P = config, config.texts_per_clip
    keeps = sample_keeps(config, drop_rate, seed=0, step=0)
    kept = {name: keeps[f"{name}_keep"].shape[0] for name in ("video", "audio")}
    draws = batch_size if drop_per == "clip" else devices
    arrays = {
        "video": ((batch_size, kept["video"], c.video_patch_values), jnp.uint8),
        "audio": ((batch_size, *c.loaded_audio(kept["audio"])), jnp.float32),
        "text": ((batch_size, P, c.words), jnp.int32),
        "video_keep": ((draws, kept["video"]), jnp.int32),
        "audio_keep": ((draws, kept["audio"]), jnp.int32),
        "video_valid": ((batch_size,), jnp.bool_),
        "audio_valid": ((batch_size,), jnp.bool_),
        "text_valid": ((batch_size, P), jnp.bool_),
    }
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, (shape, dtype) in arrays.items()}


def make_step(
    config: VATTConfig,
    mesh: Mesh,
    state: TrainState,
    options: StepOptions,
    drop_per: DropPer = "batch",
):
    """A jitted ``step(state, batch, rate, key) -> (state, Update)`` on all devices of the mesh.

    Forward, losses, backward, Adam. ``batch`` is ``host_batch``'s; ``rate`` the learning rate;
    ``key`` the random key of dropout, used when the config asks for it.

    Args:
        state: arrays or shapes, for where things lie. The step takes its state over: the arrays
            given to it are gone afterwards.
        drop_per: whether clips share a draw of DropToken, as in the batch.
    """
    specs = state_specs(state, mesh.size, options)
    everywhere: Any = PartitionSpec()
    update_specs: Any = Update(VATTLoss(everywhere, everywhere, everywhere), everywhere, everywhere)
    one_device = functools.partial(_device_step, config, mesh.size, options, drop_per)
    in_specs = (specs, PartitionSpec(AXIS), PartitionSpec(), PartitionSpec())
    # check_vma off: kernels do not say how their outputs vary over the mesh. Sums over devices are
    # all written out
    step = jax.shard_map(
        one_device, mesh=mesh, in_specs=in_specs, out_specs=(specs, update_specs), check_vma=False
    )
    return jax.jit(step, donate_argnums=0)


def loss_and_gradients(
    config: VATTConfig,
    devices: int,
    options: StepOptions,
    drop_per: str,
    params: Arrays,
    statistics: Arrays,
    batch,
    key,
):
    """On one device of the mesh: loss of all devices' batch, new statistics, gradients, cosines.

    Gradients are those of the trainable weights; a split weight's is this device's shard of it.
    Cosines are ``mean_cosines`` of all devices' batch.
    """
    batch = dict(batch)
    if drop_per == "batch":  # each device has its own draw: the given (1, K) of it
        batch |= {name: batch[name][0] for name in ("video_keep", "audio_keep")}
    valid = {name: batch[name] for name in ("video_valid", "audio_valid", "text_valid")}
    if not has_words(config):
        batch["text"] = None
    trained = {name: value for name, value in params.items() if jax_weights.trainable(name, config)}
    shapes = _whole_shapes(config)
    axes = {name: sharded_axis(name, shape, devices, options) for name, shape in shapes.items()}
    if config.dropout:
        key = jax.random.fold_in(key, jax.lax.axis_index(AXIS))

    def fetch(module: str, arrays: Arrays) -> Arrays:
        whole = dict(arrays)
        for name, value in arrays.items():
            if (axis := axes[f"{module}.{name}"]) is not None:
                axis -= len(shapes[f"{module}.{name}"]) - value.ndim  # in one of the stacked blocks
                # the projection's weight is scaled before it is rounded
                rounded = name != "project.weight"
                dtype = jnp.dtype(options.dtype) if rounded else value.dtype
                whole[name] = _join(value, axis, dtype)
        return whole

    def loss_of(trained: Arrays):
        weights = params | trained
        output, after = jax_model.forward(
            weights,
            statistics,
            config=config,
            training=True,
            key=key if config.dropout else None,
            dtype=options.dtype,
            axis=AXIS,
            fetch=fetch,
            recompute=options.recompute,
            **batch,
        )
        loss = vatt_loss(output, config, scale=jax_model.scale(weights, config), axis=AXIS, **valid)
        cosines = mean_cosines(
            output, valid, xp=jnp, over_devices=functools.partial(jax.lax.psum, axis_name=AXIS)
        )
        return loss.total, (loss, after, cosines)

    gradients, (loss, statistics, cosines) = jax.grad(loss_of, has_aux=True)(trained)
    gradients = {
        name: jax.lax.psum(value, AXIS) if axes[name] is None else value
        for name, value in gradients.items()
    }
    return jax.lax.psum(loss, AXIS), statistics, gradients, cosines


def _device_step(
    config, devices, options, drop_per, state: TrainState, batch, rate, key
) -> tuple[TrainState, Update]:
    params, optimizer = state.params, state.optimizer
    loss, statistics, gradients, cosines = loss_and_gradients(
        config, devices, options, drop_per, params, state.statistics, batch, key
    )
    norm = _total_norm(gradients, config, devices, options)
    updates, optimizer = _adam(options).update(gradients, optimizer)
    params = params | {name: params[name] - rate * update for name, update in updates.items()}
    state = TrainState(jax_model.clamp_temperature(params), statistics, optimizer)
    return state, Update(loss, norm, cosines)


def _total_norm(gradients: Arrays, config: VATTConfig, devices: int, options: StepOptions):
    """The norm of all gradients together, where some are this device's shard of theirs."""
    shapes = _whole_shapes(config)
    squares: dict[bool, list] = {True: [], False: []}
    for name, value in gradients.items():
        split = sharded_axis(name, shapes[name], devices, options) is not None
        squares[split].append(jnp.square(value.astype(jnp.float32)).sum())
    total = sum(squares[False])
    if squares[True]:
        total += jax.lax.psum(sum(squares[True]), AXIS)
    return jnp.sqrt(total)


def _adam(options: StepOptions) -> optax.GradientTransformation:
    return optax.scale_by_adam(*BETAS, eps=options.adam_eps)


@functools.lru_cache(8)
def _whole_shapes(config: VATTConfig) -> dict[str, tuple[int, ...]]:
    return {name: value.shape for name, value in jax_weights.shapes(config)[0].items()}


# -- the run ---------------------------------------------------------------------------------------


def host_batch(batch: Batch, devices: int = 1) -> dict[str, np.ndarray]:
    """A batch of kept patch rows as the step takes it, without a copy of the rows."""
    names = ("video", "audio", "text", "video_valid", "audio_valid", "text_valid")
    arrays = {name: getattr(batch, name).numpy() for name in names}
    for name in ("video_keep", "audio_keep"):
        arrays[name] = host_keep(getattr(batch, name), len(batch), devices)
    return arrays


def host_keep(keep: torch.Tensor, clips: int, devices: int) -> np.ndarray:
    """DropToken's kept indices (K,), or (n, K) of n parts of a batch, with a row for each device.

    Or for each clip, where a device has several draws.
    """
    rows = np.atleast_2d(keep.numpy())
    parts = devices if devices % len(rows) == 0 else clips
    return np.repeat(rows, max(1, parts // len(rows)), 0)


def on_mesh(arrays: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A host batch on the mesh's devices. Once its arrays are ready, it may change on the host.

    Of several hosts each gives the rows of its own devices.
    """
    shared = NamedSharding(mesh, PartitionSpec(AXIS))
    if mesh.devices.flat[0].platform == "cpu":  # arrays there lie where the host's do (jax 0.10)
        arrays = {name: value.copy() for name, value in arrays.items()}
    if mesh.is_multi_process:
        put = functools.partial(jax.make_array_from_process_local_data, shared)
        return {name: put(value) for name, value in arrays.items()}
    return {name: jax.device_put(value, shared) for name, value in arrays.items()}


def join_hosts(ranks: Ranks) -> None:
    """Make one JAX of all ranks' hosts, at an address that they agree on; before JAX is used.

    Raises:
        ValueError: they do not find each other.
    """
    if ranks.world == 1 or jax.distributed.is_initialized():
        return
    host = os.environ.get("MASTER_ADDR", "localhost")
    with socket.socket() as free:
        free.bind(("", 0))
        port = ranks.firsts(free.getsockname()[1])
    try:
        # torchrun's ranks take the devices that their environment shows them, also within SLURM
        alone = "deactivate" if "TORCHELASTIC_RUN_ID" in os.environ else None
        where = (f"{host}:{port}", ranks.world, ranks.rank)
        how: dict[str, Any] = dict(cluster_detection_method=alone)
        if ranks.patience is not None:  # JAX's own is 100 s, which a busy host may be silent for
            how["heartbeat_timeout_seconds"] = int(ranks.patience.total_seconds())
        jax.distributed.initialize(*where, **how)
    except RuntimeError as error:
        raise ValueError(
            f"JAX's {ranks.world} processes do not join at {host}:{port}: {error}"
        ) from error


class OnMesh:
    """What trainers in JAX have: all devices of this host, or of all hosts that share a run.

    Attributes:
        devices: of this host.

    Raises:
        ValueError: no such devices, or a batch that they cannot share.
    """

    start_method: str | None = "spawn"  # JAX's threads do not survive a fork
    pin_memory = False
    shards: None = None

    def __init__(self, run: Any, ranks: Ranks | None):
        self.run, self.ranks = run, ranks or Ranks()
        join_hosts(self.ranks)
        devices = pick_devices(run.device, self.ranks.world)
        self.platform, self.devices = devices[0].platform, len(devices) // self.ranks.world
        if run.batch_size % len(devices):
            raise ValueError(
                f"batch_size is {run.batch_size}; the {len(devices)} devices share it evenly: "
                "take a multiple"
            )
        self.mesh = make_mesh(devices)
        bf16 = run.precision == "bf16" or (run.precision == "auto" and self.platform != "cpu")
        self.precision, self.dtype = ("bf16", jnp.bfloat16) if bf16 else ("fp32", jnp.float32)

    def key(self, step: int) -> jax.Array:
        """Of a step's dropout; a continued run draws the same."""
        return jax.random.fold_in(jax.random.key(self.run.seed), step)

    def whole(self, tree: Any) -> Any:
        """Arrays that this host can read: joined, where they lie in shards over hosts."""
        if self.ranks.world == 1:
            return tree
        return multihost_utils.process_allgather(tree, tiled=True)


class JaxTrainer(OnMesh):
    """The JAX model that ``pretrain`` trains."""

    def __init__(
        self,
        run: PretrainConfig,
        config: VATTConfig,
        vocabulary: Vocabulary,
        weights: Mapping[str, torch.Tensor] | None = None,
        ranks: Ranks | None = None,
    ):
        super().__init__(run, ranks)
        self.config, self.vocabulary = config, vocabulary
        self.options = StepOptions(
            self.dtype,
            resolved(run.adam_eps),
            run.shard_weights,
            run.recompute == "blocks",
        )
        shapes = state_shapes(config)
        self.specs = state_specs(shapes, self.mesh.size, self.options)
        self.state = self._placed(initial_model(config, vocabulary, run.seed, weights))
        draws: tuple[DropPer, ...] = ("batch", "clip")
        self._steps = {
            per: make_step(config, self.mesh, shapes, self.options, per) for per in draws
        }

    def restore(self, path: Path, step: int) -> None:
        weights, moments = read_state(path)
        with torch.device("meta"):
            model = VATT(self.config)
        load_weights(model.to_empty(device="cpu"), weights, source=str(path))
        del self.state  # or there would be two for a while
        self.state = self._placed(model, step, moments)

    def _placed(
        self, model: VATT, step: int = 0, moments: Mapping[str, Mapping[str, Any]] | None = None
    ) -> TrainState:
        """A model and Adam's moments on the devices, straight from the host, each in its shards."""
        # torch has no moments of what got no gradient
        none = {n: torch.zeros_like(p) for n, p in model.named_parameters() if p.requires_grad}

        def ours(key: str) -> dict[str, np.ndarray]:
            tensors = none | dict(moments[key]) if moments else none
            arrays = jax_weights.rearrange(tensors, self.config)
            return {name: value.numpy(force=True) for name, value in arrays.items()}

        count: Any = np.asarray(step, np.int32)
        adam = optax.ScaleByAdamState(count, ours("exp_avg"), ours("exp_avg_sq"))
        params, statistics = jax_weights.on_host(model)
        state = TrainState(cast(Arrays, params), cast(Arrays, statistics), adam)
        return place(self.mesh, self.specs, state)

    def step(self, batch: Batch, step: int, rate: float) -> Update:
        arrays = on_mesh(host_batch(batch, self.devices), self.mesh)
        per: DropPer = "batch" if len(arrays["video_keep"]) == self.mesh.size else "clip"
        with lowering_for(self.platform):  # which need not be JAX's default
            self.state, update = self._steps[per](self.state, arrays, rate, self.key(step))
        jax.block_until_ready(arrays)  # copied, so the loader may fill its memory anew
        return update

    def temperature(self) -> float:
        return 1 / float(jax_model.scale(self.state.params, self.config))

    def save(self, path: Path, model: VATT, standing: Standing) -> None:
        adam = self.state.optimizer
        moments = {"exp_avg": self.whole(adam.mu), "exp_avg_sq": self.whole(adam.nu)}
        if not self.ranks.first:
            return
        tensors = {
            key: jax_weights.restore(jax_weights.as_tensors(value), self.config)
            for key, value in moments.items()
        }
        done = float(standing.step)
        tensors["step"] = {name: torch.tensor(done) for name in tensors["exp_avg"]}
        write_state(path, model.state_dict(), tensors, standing)

    def model(self) -> VATT:
        params = self.whole(self.state.params)
        return jax_weights.to_torch(self.config, params, self.state.statistics, self.vocabulary)


def pick_devices(name: str, hosts: int = 1) -> list:
    """All of JAX's devices of that platform ("auto": its default one), of so many hosts.

    Raises:
        ValueError: no such devices, or JAX has joined other processes than the run.
    """
    if jax.process_count() != hosts:
        raise ValueError(
            f"JAX has joined {jax.process_count()} processes, and this run {hosts}: start pretrain "
            "on every host with torchrun --nproc-per-node 1, which joins both"
        )
    try:
        return jax.devices(None if name == "auto" else name)
    except RuntimeError as error:
        raise ValueError(
            f"device is {name!r}, but this JAX sees none: {error}; use 'cpu' or 'auto'"
        ) from error
