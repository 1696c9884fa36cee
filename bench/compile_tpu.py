"""Pallas kernels at the presets' own cases through the real TPU compiler, libtpu, without a TPU.

The public functions of ``kernels.jax_ops`` are lowered for a chip, forward and backward in one
program. Attention stands between the per-head projections it has in the model, where a layout that
the kernels do not share with them would show as copies; ``alone`` leaves them out, and most of the
time with them. How arrays lie outside is the compiler's choice. A row is one case for one chip:
size of the code, temporaries in HBM, VMEM of the hungriest kernel, copies and transposes that
change a layout, seconds of processor time. With a schedule also each kernel's instruction bundles
and spilled registers, a loop's body counted once, its loops, and the cycles that a whole call takes
at least (``tpu_schedule.py``).

``peers`` are what others' kernels make of attention's cases (``tpu_peers.py``).

A fault is what does not compile, or layout copies around an attention that the dispatch table
prefers. Needs ``pip install libtpu``.
"""

import contextlib
import functools
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vatt_fast.devices import without_a_tpu

if "jax" not in sys.modules:
    without_a_tpu()

import jax
import jax.numpy as jnp
import torch
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from vatt_fast.kernels import settings
from vatt_fast.kernels.cases import CASES, AttentionCase, make
from vatt_fast.kernels.ops import OPS
from vatt_fast.on_jax import hlo

from . import machine, tpu_peers, tpu_schedule
from .machine import DTYPES, TPUS

# where libtpu writes schedules
_DUMP = re.search(r"xla_jf_dump_to=(\S+)", os.environ.get("LIBTPU_INIT_ARGS", ""))
KIB, MIB = 1 << 10, 1 << 20


@dataclass
class Row:
    """One case as compiled for one chip; ``faults`` is what breaks a rule.

    Sizes are 0 where it did not compile.
    """

    op: str
    case: str
    dtype: str
    topology: str
    alone: bool  # attention without its projections
    peer: str = ""  # whose kernels; ours unless given
    kernels: list[str] = field(default_factory=list)
    code_bytes: int = 0
    temp_bytes: int = 0
    vmem_bytes: int = 0
    copies: int = 0
    seconds: float = 0.0
    bundles: dict[str, int] = field(default_factory=dict)
    spills: dict[str, int] = field(default_factory=dict)
    loops: dict[str, str] = field(default_factory=dict)  # bundles by loop
    cycles: dict[str, int] = field(default_factory=dict)  # of a whole call, at least
    faults: list[str] = field(default_factory=list)
    versions: dict[str, str | None] = field(
        default_factory=lambda: {name: machine.version_of(name) for name in ("jax", "libtpu")}
    )
    commit: str = field(default_factory=functools.cache(machine.commit))
    date: str = field(default_factory=machine.today)

    @property
    def title(self) -> str:
        return f"{self.topology} {self.op} {self.peer} {self.case} {self.dtype}".replace("  ", " ")


# -- what is compiled -------------------------------------------------------------------------


def usual_dtypes(op: str, case: str) -> tuple[str, ...]:
    return "bf16", "fp32"


def reached(op: str, case: str, dtype: str) -> bool:
    """Whether ``model`` takes the case in: all are worth a look, whatever dispatch prefers."""
    return True


def program(
    op: str, case: str, dtype: str, alone: bool = False
) -> tuple[Callable, dict[str, Any], dict[str, Any]]:
    """A function of (differentiable arrays, the other arrays), and the shapes of both.

    Fresh at every call: jax keeps traces by identity.
    """
    inputs = make(CASES[op][case], DTYPES[dtype], "meta")
    if op == "patch_embed" and inputs.pop("patch") is not None:
        rows = CASES[op][case]
        inputs["patches"] = inputs["patches"].new_empty((rows.batch, rows.patches, rows.values))
    shapes = {
        name: _shape(value) for name, value in inputs.items() if isinstance(value, torch.Tensor)
    }
    static = {name: value for name, value in inputs.items() if not isinstance(value, torch.Tensor)}
    call: Callable = functools.partial(OPS[op].jax_function, **static)
    differentiable = set(OPS[op].differentiable)
    if op == "attention":
        shapes |= {
            name: jax.ShapeDtypeStruct(
                tuple(shapes[name].shape[i] for i in (0, 2, 1, 3)), shapes[name].dtype
            )
            for name in "qkv"
        }
    if op == "attention" and not alone:
        call, shapes, differentiable = _between_projections(call, CASES[op][case], shapes)
    leaves = {
        name: x
        for name, x in shapes.items()
        if name in differentiable and jnp.issubdtype(x.dtype, jnp.floating)
    }
    fixed = {name: x for name, x in shapes.items() if name not in leaves}

    def both(leaves, fixed):
        outputs, backward = jax.vjp(lambda leaves: call(**leaves, **fixed), leaves)
        # a gradient that is no constant
        return outputs, backward(jax.tree.map(lambda x: x * 0.5, outputs))

    return both, leaves, fixed


def _between_projections(
    attend: Callable, case: AttentionCase, shapes: dict
) -> tuple[Callable, dict, set]:
    """Attention as the model calls it: of tokens (B, T, dim), between its projections."""
    H, D, dtype = case.heads, case.head_dim, shapes["q"].dtype
    same = case.queries == case.keys

    def layer(tokens, w_q, w_k, w_v, w_out, **extra):
        q, k, v = (
            jnp.einsum("btd,dhe->bhte", x, w)
            for x, w in (
                (tokens if same else tokens[:, : case.queries], w_q),
                (tokens, w_k),
                (tokens, w_v),
            )
        )
        out, lse = attend(q, k, v, **extra)
        return jnp.einsum("bhte,hed->btd", out, w_out), lse

    weight = jax.ShapeDtypeStruct((H * D, H, D), dtype)
    inputs = dict(
        tokens=jax.ShapeDtypeStruct((case.batch, case.keys, H * D), dtype),
        w_q=weight,
        w_k=weight,
        w_v=weight,
        w_out=jax.ShapeDtypeStruct((H, D, H * D), dtype),
    )
    extra = {name: shapes[name] for name in ("bias", "key_mask") if name in shapes}
    return layer, inputs | extra, {*inputs, "bias"}


def _shape(tensor: torch.Tensor) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
        tuple(tensor.shape), jnp.dtype(str(tensor.dtype).removeprefix("torch."))
    )


@functools.cache
def device(topology: str) -> SingleDeviceSharding:
    described = topologies.get_topology_desc(platform="tpu", topology_name=TPUS[topology])
    return SingleDeviceSharding(described.devices[0])


def compile_case(
    op: str, case: str, dtype: str, topology: str, *, alone: bool = False, peer: str = ""
) -> list[Row]:
    """The case's one row, of our kernels or of a peer's."""
    row = Row(op, case, dtype, topology, alone and op == "attention", peer)
    began = time.process_time()
    try:
        if peer:
            row.alone = True
            compiled = _compiled(*tpu_peers.program(peer, CASES[op][case], dtype), topology)
        else:
            with settings.use_backend(**{op: "pallas_tpu"}):
                compiled = _compiled(*program(op, case, dtype, row.alone), topology)
    except Exception as error:  # whatever libtpu raises is the row's result
        row.faults.append(" ".join(f"{type(error).__name__}: {error}".split())[:600])
        return [row]
    row.seconds = round(time.process_time() - began, 1)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None and text is not None  # libtpu has both
    made = hlo.Program(text)
    row.code_bytes, row.temp_bytes = memory.generated_code_size_in_bytes, memory.temp_size_in_bytes
    row.kernels, row.vmem_bytes, row.copies = (
        list(made.kernels()),
        made.vmem_bytes(),
        len(made.layout_changes_at_kernels()),
    )
    if _DUMP:
        _add_schedules(row, Path(_DUMP[1]))
    if not row.kernels:  # XLA alone, which puts its own estimate beside each fusion
        estimates = re.findall(r'"estimated_cycles":"(\d+)"', text)
        row.cycles = {"xla": sum(map(int, estimates))}
    shape = CASES[op][case]
    if row.copies and op == "attention" and not peer and min(shape.queries, shape.keys) >= 64:
        row.faults.append(f"{row.copies} layout copies around attention")
    return [row]


def _compiled(function: Callable, leaves: Any, fixed: Any, topology: str) -> Any:
    """The function for a chip; how arrays lie outside is the compiler's choice."""
    free = Format(Layout.AUTO, device(topology))
    with settings.lowering_for("tpu"), _quiet():
        jitted = jax.jit(
            function, in_shardings=jax.tree.map(lambda _: free, (leaves, fixed)), out_shardings=free
        )
        return jitted.lower(leaves, fixed).compile()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """libtpu's own lines on stderr are about a machine without a TPU."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _add_schedules(row: Row, folder: Path) -> None:
    """Fill in, kernel by kernel, what libtpu dumped since the last call, and delete the dump.

    Calls of one name are added up.
    """
    names = row.kernels
    for file in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in file.name or not any(name in file.name for name in names):
            continue
        kernel = hlo.KERNEL.search(file.name)
        name = kernel[0] if kernel else next(name for name in names if name in file.name)
        loop = tpu_schedule.read(file.read_text())
        row.bundles[name] = row.bundles.get(name, 0) + loop.once()
        row.cycles[name] = row.cycles.get(name, 0) + loop.cycles().floor
        row.loops[name] = "; ".join(filter(None, [row.loops.get(name), str(loop)]))
        row.spills[name] = row.spills.get(name, 0) + _spilled(folder, file.name)
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _spilled(folder: Path, bundles: str) -> int:
    """Registers spilled by the kernel that a file of bundles belongs to."""
    call = bundles.rsplit("-", 2)[0]
    (file,) = folder.glob(f"{call}-*final_hlo-static-per-bundle-utilization.txt")
    _, names, *lines = (
        line
        for line in file.read_text().splitlines()
        if "CAPA" in line or "," in line or line[:1].isdigit()
    )
    at = [name.strip() for name in names.split(",")].index("VSTORE:SPILL")
    # the first line is what each unit can do
    return sum(int(line.split()[at]) for line in lines[1:])


# -- table ------------------------------------------------------------------------------------


def is_of(
    row: Row, op: str, case: str, dtype: str, topology: str, alone: bool = False, peer: str = ""
) -> bool:
    """Whether ``compile_case`` of these makes this row."""
    alone = bool(peer) or (alone and op == "attention")
    return _identity(row) == (op, case, dtype, topology, alone, peer)


def _identity(row: Row) -> tuple:
    return row.op, row.case, row.dtype, row.topology, row.alone, row.peer


def distinct(rows: list[Row], known: list[Row]) -> list[Row]:
    """The last of each: a case is a program of its own."""
    return list({_identity(row): row for row in rows}.values())


HEADINGS = "op, dtype, chip, compiled, kernels, code KiB, HBM temporaries MiB, VMEM MiB, "
HEADINGS += "layout copies, seconds, cycles of a call"


def key(row: Row) -> tuple:
    op = f"{row.op} by {row.peer}" if row.peer else row.op + " alone" * row.alone
    return op, row.dtype, row.topology


def cells(group: list[Row]) -> tuple:
    """How many cases compiled, and the heaviest of each number."""
    good = [row for row in group if row.code_bytes]
    names = {name.removeprefix("vatt_") for row in good for name in row.kernels}
    code, temporary, memory, copies, seconds = (
        max((getattr(row, name) for row in good), default=0)
        for name in ("code_bytes", "temp_bytes", "vmem_bytes", "copies", "seconds")
    )
    sizes = (f"{code / KIB:.0f}", f"{temporary / MIB:.1f}", f"{memory / MIB:.1f}")
    cycles = max((sum(row.cycles.values()) for row in good), default=0)
    counts = copies, seconds, f"{cycles / 1e6:.3f} M" if cycles else ""
    return f"{len(good)}/{len(group)}", " ".join(sorted(names)), *sizes, *counts
