"""Size a TPU before renting it: the sharded training step, compiled for a topology by libtpu on a machine without one.

Nothing runs: the compiler is the real one and so are its memory plan and its kernels, but no time is measured.
"""

import dataclasses
import importlib.metadata
import json
import os
import time
from pathlib import Path
from typing import Any, Literal

from ..config import Recipe, VATTConfig, preset
from .hlo import Program

# memory of one of JAX's devices, in GB as the makers count it; a tpu7x chip is two devices with 192 GB
HBM_GB = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32, "tpu7x": 96}

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class CompileTPUConfig:
    """A training step and the TPU slice it is for."""

    preset: str = "medium_base_small"  # short: mbs; or bbs, lbs, ma (modality-agnostic), tiny
    recipe: Recipe = "paper"  # the bundle of choices of the paper's text, or of the released code
    topology: str = (
        "v5e:2x2"  # chip and slice: v4:2x2x1, v5e:4x4, v5p:2x2x2, v6e:2x2, tpu7x:2x2x1, ...
    )
    batch: int = 64  # clips of a step, all devices together
    drop_rate: float = 0.5  # of DropToken
    drop_per: Literal["batch", "clip"] = "batch"  # whether clips share a draw of DropToken
    dtype: Literal["bf16", "fp32"] = "bf16"  # of the towers' arithmetic
    shard_weights: bool = False  # weights and Adam's state lie in shards over the devices
    recompute: bool = False  # keep only the blocks' inputs for the backward pass
    hbm_gb: float | None = None  # memory of one device; None: what the chip has
    json: bool = False  # print JSON
    out: str | None = (
        None  # append the report, with settings and versions, to this file as a line of JSON
    )

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch is {self.batch}; it must be at least 1")
        if self.hbm_gb is None and self.chip not in HBM_GB:
            raise ValueError(
                f"topology is {self.topology!r}; its chip is one of {', '.join(HBM_GB)}, or give hbm_gb"
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
        fits, peak_hbm_gb (of one device), hbm_gb, state_gb (weights, statistics and Adam's state of one device), batch_gb, temporary_gb,
        code_mb, kernels ({name: calls}), kernel_copies (layout changes of what a kernel reads or wrote), copies and copies_gb (all layout
        changes), collectives ({kind: number}), devices, seconds; where the compiler itself refuses for want of memory, fits False and reason.
        The program is counted as it is written: what stands in the loop over an encoder's blocks counts once.

    Raises:
        ValueError: jax or libtpu is not installed, an unknown topology, a batch that the devices cannot share, or a kernel that does not compile.
    """
    devices = topology_devices(
        run.topology
    )  # first: it prepares the environment that JAX reads when it is imported

    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from ..kernels.settings import lowering_for
    from . import training as jax_loop

    if run.batch % len(devices):
        raise ValueError(
            f"batch is {run.batch}; the {len(devices)} devices of {run.topology} share it evenly: take a multiple"
        )
    config = model_config or preset(run.preset, run.recipe)
    options = jax_loop.StepOptions(
        jnp.bfloat16 if run.dtype == "bf16" else jnp.float32,
        shard_weights=run.shard_weights,
        recompute=run.recompute,
    )
    mesh, state = jax_loop.make_mesh(devices), jax_loop.state_shapes(config)

    def on_mesh(spec, shape):
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=NamedSharding(mesh, spec))

    specs = jax_loop.state_specs(state, mesh.size, options)
    state_in = jax.tree.map(on_mesh, specs, state, is_leaf=lambda x: isinstance(x, PartitionSpec))
    batch = jax_loop.batch_shapes(config, run.batch, run.drop_rate, mesh.size, run.drop_per)
    batch_in = {name: on_mesh(PartitionSpec(jax_loop.AXIS), shape) for name, shape in batch.items()}
    rate, key = (
        on_mesh(PartitionSpec(), x)
        for x in (jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0)))
    )
    hbm_gb = HBM_GB[run.chip] if run.hbm_gb is None else run.hbm_gb
    report: dict[str, Any] = {
        "topology": run.topology,
        "devices": len(devices),
        "batch": run.batch,
        "hbm_gb": hbm_gb,
    }
    began = time.perf_counter()
    with lowering_for("tpu"):
        lowered = jax_loop.make_step(config, mesh, state, options, run.drop_per).lower(
            state_in, batch_in, rate, key
        )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            reason = " ".join(str(error).split())[:500]
            raise ValueError(
                f"libtpu does not compile this: {reason}; VATT_FAST_BACKEND=<op>=reference leaves a kernel out"
            ) from error
        return {
            "fits": False,
            "reason": str(error).splitlines()[0][:300],
            **report,
            "seconds": time.perf_counter() - began,
        }
    seconds = time.perf_counter() - began
    memory, made = compiled.memory_analysis(), Program(compiled.as_text())
    changes = made.layout_changes()
    peak = memory.peak_memory_in_bytes
    state_bytes = sum(x.size * x.dtype.itemsize // _parts(x) for x in jax.tree.leaves(state_in))
    batch_bytes = sum(x.size * x.dtype.itemsize // len(devices) for x in batch_in.values())
    return {
        "fits": peak <= hbm_gb * 1e9,
        "peak_hbm_gb": peak / 1e9,
        **report,
        "state_gb": state_bytes / 1e9,
        "batch_gb": batch_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "code_mb": memory.generated_code_size_in_bytes / 1e6,
        "kernels": made.kernels(),
        "kernel_copies": len(made.layout_changes_at_kernels()),
        "copies": len(changes),
        "copies_gb": sum(changes.values()) / 1e9,
        "collectives": made.collectives(),
        "seconds": seconds,
    }


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


def has_a_tpu() -> bool:
    """Whether a TPU is plugged into this machine, by Google's number on the PCI bus."""
    return any(
        path.read_text().strip() == "0x1ae0"
        for path in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def without_a_tpu(*, jax_on_cpu: bool = True) -> None:
    """Prepare the environment for libtpu and JAX, which read it when they are loaded: no metadata server to ask, no device to look for, and
    JAX's own work on the CPU (or else on its default platform)."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if jax_on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


def topology_devices(name: str) -> list:
    """The devices of a TPU slice that is not there, such as v5e:2x2. Raises ValueError for an unknown one, and without jax or libtpu."""
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
