"""Triton kernels at the presets' own cases through the real compilers, no device needed.

The ops' own host code runs on meta tensors, and every launch is replaced by the compilation it
would have needed: so exactly the specialisations of real use are seen. A row is one kernel for one
target: registers, stack, spills, shared memory, matrix instructions.

A fault is a spill in a forward kernel in bf16 or fp16, shared memory beyond the target's limit, or
a bf16 or fp16 matmul without the target's matrix instruction.
"""

import contextlib
import functools
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vatt_fast.kernels.cases import CASES, make

from .machine import DTYPES

KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU architecture."""

    gpu: GPUTarget  # what the compiler is told
    shared_bytes: int  # that a block may have
    small: str  # the matrix instruction on tiles of fewer than 64 rows
    large: str


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * KIB, "HMMA", "HMMA"),
    "sm_89": Target(GPUTarget("cuda", 89, 32), 99 * KIB, "HMMA", "HMMA"),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * KIB, "HMMA", "HGMMA"),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * KIB, "HMMA", "UTCHMMA"),
    "sm_120": Target(GPUTarget("cuda", 120, 32), 99 * KIB, "HMMA", "HMMA"),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * KIB, "v_mfma", "v_mfma"),
}


@dataclass
class Row:
    """One kernel as compiled for one target; ``faults`` is what breaks a rule."""

    op: str
    case: str
    dtype: str
    mode: str
    kernel: str
    target: str
    tiles: str
    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    matrix: str
    faults: list[str]

    @property
    def title(self) -> str:
        kernel = f"{self.target} {self.op}.{self.kernel} {self.mode} {self.dtype}"
        return f"{kernel} at {self.case} ({self.tiles})"


# -- compiling in the place of launching ------------------------------------------------------


class _Driver:
    """What Triton asks of a driver before it compiles, answered for a device that is not there."""

    def __init__(self, name: str):
        self.name = name

    def get_current_target(self) -> GPUTarget:
        return TARGETS[self.name].gpu

    def get_current_device(self) -> str:  # the key of a kernel's cache
        return self.name

    def get_current_stream(self, device) -> int:
        return 0


@contextlib.contextmanager
def compiling_for(target: str) -> Iterator[list]:
    """Within, launching a kernel only compiles it for ``target``.

    The list takes (the kernel's function, its arguments, what was compiled).
    """
    compiled: list = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled.append((self, kwargs, run(self, *args, grid=grid, warmup=True, **kwargs)))

    before = triton.runtime.driver._active
    triton.runtime.driver.set_active(_Driver(target))
    JITFunction.run = compile_only
    try:
        yield compiled
    finally:
        JITFunction.run = run
        triton.runtime.driver.set_active(before)


@functools.lru_cache(maxsize=4)
def meta_inputs(op: str, case: str, dtype: str) -> dict[str, Any]:
    return make(CASES[op][case], DTYPES[dtype], "meta")


def launches(op: str, inputs: dict[str, Any], dtype: torch.dtype) -> Iterator[tuple[str, Any]]:
    """(mode, call) of all that an op's Triton backend launches for these inputs; forward first."""
    module = importlib.import_module(f"vatt_fast.kernels.{op}.triton_gpu")
    inputs = dict(inputs)
    if op == "attention":
        q, k, v = (inputs.pop(name) for name in "qkv")
        wide = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        bias_grad = inputs["bias"] is not None
        yield "fwd", lambda: module.forward(q, k, v, **inputs, deterministic=False)
        saved = (out, None, q, k, v, out, wide)
        for deterministic in (True, False):
            options = inputs | dict(deterministic=deterministic, bias_grad=bias_grad)
            yield "bwd", functools.partial(module.backward, *saved, **options)
    elif op == "drop_token":
        tokens, keep = inputs["tokens"], inputs["keep"]
        kept = tokens.new_empty((tokens.shape[0], keep.shape[-1], tokens.shape[2]))
        yield "fwd", lambda: module.forward(tokens, keep)
        yield "bwd", lambda: module.backward(kept, keep, tokens.shape[1])
    elif op == "contrastive_lse":
        x, y = inputs.pop("x"), inputs.pop("y")
        row, col = (x.new_empty(len(side), dtype=torch.float32) for side in (x, y))
        yield "fwd", lambda: module.forward(x, y, **inputs)
        yield "bwd", lambda: module.backward(row, col, row, x, y, row, col, row, **inputs)
    else:
        patches, weight, bias = (inputs.pop(name) for name in ("patches", "weight", "bias"))
        rows = patches.shape[1] if inputs["keep"] is None else inputs["keep"].shape[-1]
        tokens = weight.new_empty((patches.shape[0], rows + 1, weight.shape[0]))
        yield "fwd", lambda: module.forward(patches, weight, bias, **inputs, dtype=dtype)
        yield "bwd", lambda: module.backward(tokens, patches, weight, bias, **inputs, dtype=dtype)


def compile_case(op: str, case: str, dtype: str, target: str) -> list[Row]:
    """Every kernel that the case's forward and backward would launch on ``target``."""
    rows = []
    for mode, call in launches(op, meta_inputs(op, case, dtype), DTYPES[dtype]):
        with compiling_for(target) as compiled:
            call()
        for function, arguments, kernel in compiled:
            rows.append(_row(op, case, dtype, mode, target, function, arguments, kernel))
    return rows


# -- reading what was compiled ----------------------------------------------------------------


def _row(op, case, dtype, mode, target, function, arguments, kernel) -> Row:
    used = _read_hip(kernel) if TARGETS[target].gpu.backend == "hip" else _read_cuda(kernel)
    tiles = {
        name: value
        for name, value in arguments.items()
        if name.isupper() and isinstance(value, int)
    }
    warps = f"num_warps={kernel.metadata.num_warps} num_stages={kernel.metadata.num_stages}"
    row = Row(
        op=op,
        case=case,
        dtype=dtype,
        mode=mode,
        kernel=function.fn.__name__,
        target=target,
        tiles=" ".join([*(f"{name}={int(value)}" for name, value in tiles.items()), warps]),
        shared_bytes=kernel.metadata.shared,
        faults=[],
        **used,
    )
    row.faults = _faults(row, kernel)
    return row


def _faults(row: Row, kernel) -> list[str]:
    target, faults = TARGETS[row.target], []
    if row.shared_bytes > target.shared_bytes:
        faults.append(
            f"{row.shared_bytes} bytes of shared memory, the limit is {target.shared_bytes}"
        )
    if row.dtype == "fp32":
        return faults
    if row.spills and row.mode == "fwd":
        faults.append(f"{row.spills} spills")
    rows_of_tiles = [int(m) for m in re.findall(r"tt\.dot\b.*-> tensor<(\d+)x", kernel.asm["ttir"])]
    needed = (
        target.large
        if rows_of_tiles and min(rows_of_tiles) >= 64 and kernel.metadata.num_warps >= 4
        else target.small
    )
    if rows_of_tiles and needed not in row.matrix:
        faults.append(f"no {needed} for matmul tiles of {rows_of_tiles} rows")
    return faults


@functools.cache  # the disassembler takes as long as the compiler, and cases meet the same kernel
def _read_cuda(kernel) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage, code = (_cuobjdump(option, file.name) for option in ("-res-usage", "-sass"))
    found = {name: int(number) for name, number in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    matrix = {name for name in ("UTCHMMA", "HGMMA", "HMMA") if re.search(rf"\b{name}\b", code)}
    return dict(
        registers=found["REG"],
        stack_bytes=found["STACK"],
        spills=len(re.findall(r"\b(?:STL|LDL)\b", code)),  # stores to and loads from local memory
        matrix=" ".join(sorted(matrix)),
    )


def _read_hip(kernel) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]

    scratch, spills = (
        number("private_segment_fixed_size"),
        number("vgpr_spill_count") + number("sgpr_spill_count"),
    )
    return dict(
        registers=number("vgpr_count"),
        stack_bytes=scratch,
        spills=spills if scratch else 0,  # scalars that move to vector registers cost no memory
        matrix="v_mfma" if "v_mfma" in text else "",
    )


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], check=True, capture_output=True, text=True).stdout


# -- table ------------------------------------------------------------------------------------


def distinct(rows: list[Row], known: list[Row]) -> list[Row]:
    """Those that are not ``known``: cases that meet the same specialisation are one row."""
    fields = ("kernel", "mode", "dtype", "target", "tiles", "registers", "spills", "shared_bytes")

    def what(row: Row) -> tuple:
        return (*(getattr(row, field) for field in fields), *row.faults)

    seen = {what(row) for row in known}
    return [row for key, row in {what(row): row for row in rows}.items() if key not in seen]


HEADINGS = "kernel, mode, dtype, target, specialisations, registers, stack B, spills, shared KiB, "
HEADINGS += "matrix"


def key(row: Row) -> tuple:
    return f"{row.op}.{row.kernel}", row.mode, row.dtype, row.target


def cells(group: list[Row]) -> tuple:
    """The heaviest of a kernel's specialisations."""
    fields = ("registers", "stack_bytes", "spills", "shared_bytes")
    *most, shared = (max(getattr(row, field) for row in group) for field in fields)
    matrix = " / ".join(sorted({row.matrix or "none" for row in group}))
    return len(group), *most, f"{shared / KIB:.0f}", matrix
