"""Size a TPU before renting it: compile the sharded training step for a topology.

libtpu compiles on a machine without a TPU. Nothing runs: the compiler, its memory plan and its
kernels are the real ones, but no time is measured.
"""

import dataclasses
import importlib.metadata
import json
import time
from pathlib import Path
from typing import Any, Literal

from ..config import Recipe, VATTConfig, preset
from ..devices import without_a_tpu
from ..inputs import DropPer
from ..kernels.settings import lowering_for
from .hlo import Program

# memory of one of JAX's devices, in GB as the makers count it; a tpu7x chip is two devices with
# 192 GB
HBM_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}


@dataclasses.dataclass(frozen=True)
class CompileTPUConfig:
    """A training step and the TPU slice it is for."""

    preset: str = "medium_base_small"  # short: mbs; or bbs, lbs, ma (modality-agnostic), tiny
    recipe: Recipe = "paper"  # the paper's choices, or the released code's
    topology: str = "v5e:2x2"  # chip and slice: v4:2x2x1, v5e:4x4, v5p:2x2x2, tpu7x:2x2x1, ...
    batch: int = 64  # clips of a step, all devices together
    drop_rate: float = 0.5  # of DropToken
    drop_per: DropPer = "batch"  # whether clips share a draw of DropToken
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the towers' arithmetic
    shard_weights: bool = False  # weights and Adam's state lie in shards over the devices
    recompute: bool = False  # keep only the blocks' inputs for the backward pass
    hbm_gb: float | None = None  # memory of one device; None: what the chip has
    json: bool = False  # print JSON
    out: str | None = None  # append report, settings and versions to this file, a line of JSON

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if self.hbm_gb is None and self.chip not in HBM_GB:
            raise ValueError(
                f"topology is {self.topology!r}; its chip is one of {', '.join(HBM_GB)}, "
                "or give hbm_gb"
            )
        if ":" not in self.topology:
            raise ValueError(
                f"topology is {self.topology!r}; it takes chip and shape, such as v5e:2x2"
            )

    @property
    def chip(self) -> str:
        return self.topology.partition(":")[0]


def compile_step(
    run: CompileTPUConfig, *, model_config: VATTConfig | None = None
) -> dict[str, Any]:
    """Compile the step and read the compiler's plan.

    Returns:
        fits, peak_hbm_gb (of one device), hbm_gb, state_gb (weights, statistics and Adam's state of
        one device), batch_gb, temporary_gb, code_mb, kernels ({name: calls}), kernel_copies (layout
        changes of what a kernel reads or wrote), copies and copies_gb (all layout changes),
        collectives ({kind: number}), devices, seconds. Where the compiler itself refuses for want
        of memory: fits False, and reason. The program is counted as it is written: what stands in
        the loop over an encoder's blocks counts once.

    Raises:
        ValueError: jax or libtpu is not installed, an unknown topology, a batch that the devices
            cannot share, or a kernel that does not compile.
    """
    # first: it prepares the environment that JAX reads when it is imported
    devices = topology_devices(run.topology)
    import jax

    if run.batch % len(devices):
        raise ValueError(
            f"batch is {run.batch}; the {len(devices)} devices of {run.topology} share it evenly: "
            "take a multiple"
        )
    report: dict[str, Any] = {
        "topology": run.topology,
        "devices": len(devices),
        "batch": run.batch,
        "hbm_gb": HBM_GB[run.chip] if run.hbm_gb is None else run.hbm_gb,
    }
    began = time.perf_counter()
    lowered, state, batch = _lower(run, model_config or preset(run.preset, run.recipe), devices)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            reason = " ".join(str(error).split())[:500]
            raise ValueError(
                f"libtpu does not compile this: {reason}; "
                "VATT_FAST_BACKEND=<op>=reference leaves a kernel out"
            ) from error
        reason = str(error).splitlines()[0][:300]
        seconds = time.perf_counter() - began
        return {"fits": False, "reason": reason, **report, "seconds": seconds}
    seconds = time.perf_counter() - began
    peak = compiled.memory_analysis().peak_memory_in_bytes
    return {
        "fits": peak <= report["hbm_gb"] * 1e9,
        "peak_hbm_gb": peak / 1e9,
        **report,
        "state_gb": _bytes_of_one_device(jax.tree.leaves(state)) / 1e9,
        "batch_gb": _bytes_of_one_device(jax.tree.leaves(batch)) / 1e9,
        **_plan(compiled),
        "seconds": seconds,
    }


def _lower(run: CompileTPUConfig, config: VATTConfig, devices: list) -> tuple[Any, Any, Any]:
    """The lowered step, and the shapes of its state and batch, placed on the devices' mesh."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from . import training

    options = training.StepOptions(
        jnp.bfloat16 if run.dtype == "bf16" else jnp.float32,
        shard_weights=run.shard_weights,
        recompute=run.recompute,
    )
    mesh, shapes = training.make_mesh(devices), training.state_shapes(config)

    def on_mesh(spec, shape):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    specs = training.state_specs(shapes, mesh.size, options)
    state = jax.tree.map(on_mesh, specs, shapes, is_leaf=lambda x: isinstance(x, PartitionSpec))
    arrays = training.batch_shapes(config, run.batch, run.drop_rate, mesh.size, run.drop_per)
    batch = {name: on_mesh(PartitionSpec(training.AXIS), x) for name, x in arrays.items()}
    rate = on_mesh(PartitionSpec(), jax.ShapeDtypeStruct((), jnp.float32))
    key = on_mesh(PartitionSpec(), jax.eval_shape(lambda: jax.random.key(0)))
    with lowering_for("tpu"):
        step = training.make_step(config, mesh, shapes, options, run.drop_per)
        return step.lower(state, batch, rate, key), state, batch


def _plan(compiled: Any) -> dict[str, Any]:
    """What the compiler made: memory, kernels, layout changes and exchanges."""
    memory, program = compiled.memory_analysis(), Program(compiled.as_text())
    changes = program.layout_changes()
    return {
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "code_mb": memory.generated_code_size_in_bytes / 1e6,
        "kernels": program.kernels(),
        "kernel_copies": len(program.layout_changes_at_kernels()),
        "copies": len(changes),
        "copies_gb": sum(changes.values()) / 1e9,
        "collectives": program.collectives(),
    }


def _bytes_of_one_device(arrays: list) -> int:
    return sum(x.size * x.dtype.itemsize // _parts(x) for x in arrays)


def write_report(run: CompileTPUConfig, report: dict[str, Any], path: Path) -> None:
    """Append a report, its settings and the compiler's versions as a line of JSON."""
    settings = {
        name: value
        for name, value in dataclasses.asdict(run).items()
        if name not in ("json", "out")
    }
    versions = {name: importlib.metadata.version(name) for name in ("jax", "libtpu")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(settings | report | {"versions": versions}) + "\n")


def topology_devices(name: str) -> list:
    """The devices of a TPU slice that is not there, such as v5e:2x2.

    Raises ValueError for an unknown one, and without jax or libtpu.
    """
    without_a_tpu()
    try:
        import libtpu  # noqa: F401
        from jax.experimental import topologies
    except ModuleNotFoundError as error:
        raise ValueError(
            f"compiling for a TPU needs {error.name}: pip install 'vatt_fast[tpu]'"
        ) from error
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except Exception as error:  # libtpu's own types
        reason = str(error).splitlines()[0][:200]
        raise ValueError(
            f"topology is {name!r}, which libtpu refuses ({reason}); try v5e:2x2"
        ) from error


def _parts(shape) -> int:
    """Into how many different shards an array is split."""
    spec = shape.sharding.spec
    return shape.sharding.mesh.size if any(part is not None for part in spec) else 1
