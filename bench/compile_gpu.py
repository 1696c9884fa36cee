"""Compile every Triton kernel at the presets' own cases with the real compilers, no device needed, and read what they made of it.

    python -m bench.compile_gpu                                   # every op, case and target but attention in fp32: about half an hour on two cores
    python -m bench.compile_gpu --target sm_90 --op attention     # a part of it

The ops' own host code runs on meta tensors while every launch is replaced by the compilation it would have needed, so that exactly the
specialisations of real use are seen. A row is one kernel for one target: registers, stack, spills, shared memory, matrix instructions.

Fails on a spill in a forward kernel in bf16 or fp16, on shared memory beyond the target's limit, and on a bf16 or fp16 matmul without
the target's matrix instruction. *Compiled for*, never run: this says nothing of speed.
"""

import argparse
import contextlib
import functools
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vatt_fast.kernels import dispatch
from vatt_fast.kernels.cases import CASES, make, tag

KIB = 1024
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Target:
    """A GPU architecture: what the compiler is told, how much shared memory a block may have, which instructions multiply matrices."""

    gpu: GPUTarget
    shared_bytes: int
    small: str  # on tiles of fewer than 64 rows
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


# -- compiling in the place of launching -------------------------------------------------------------------------------


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
    """Within, launching a kernel compiles it for ``target`` and appends (kernel's function, its arguments, what was compiled)."""
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
    """(mode, call) of everything an op's Triton backend launches for these inputs; forward first."""
    module = importlib.import_module(f"vatt_fast.kernels.{op}.triton_gpu")
    inputs = dict(inputs)
    if op == "attention":
        q, k, v = (inputs.pop(name) for name in "qkv")
        wide = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        bias_grad = inputs["bias"] is not None
        yield "fwd", lambda: module.forward(q, k, v, **inputs, deterministic=False)
        for deterministic in (True, False):
            yield (
                "bwd",
                lambda deterministic=deterministic: module.backward(
                    out,
                    None,
                    q,
                    k,
                    v,
                    out,
                    wide,
                    **inputs,
                    deterministic=deterministic,
                    bias_grad=bias_grad,
                ),
            )
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


# -- reading what was compiled -----------------------------------------------------------------------------------------


def _row(op, case, dtype, mode, target, function, arguments, kernel) -> Row:
    used = _read_hip(kernel) if TARGETS[target].gpu.backend == "hip" else _read_cuda(kernel)
    tiles = {
        name: value
        for name, value in arguments.items()
        if name.isupper() and isinstance(value, int)
    }
    warps = f"num_warps={kernel.metadata.num_warps} num_stages={kernel.metadata.num_stages}"
    row = Row(
        op=op, case=case, dtype=dtype, mode=mode, kernel=function.fn.__name__, target=target,
        tiles=" ".join([*(f"{name}={int(value)}" for name, value in tiles.items()), warps]),
        shared_bytes=kernel.metadata.shared, faults=[], **used,
    )  # fmt: skip
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


# -- the command -------------------------------------------------------------------------------------------------------


def distinct(rows: list[Row]) -> list[Row]:
    """One row a kernel, target and outcome: cases that meet the same specialisation are one."""
    seen: dict[tuple, Row] = {}
    for row in rows:
        what = (
            row.kernel,
            row.mode,
            row.dtype,
            row.target,
            row.tiles,
            row.registers,
            row.spills,
            row.shared_bytes,
            tuple(row.faults),
        )
        seen.setdefault(what, row)
    return list(seen.values())


def markdown(rows: list[Row]) -> str:
    """Per kernel, dtype and target: the heaviest of its specialisations."""
    lines = [
        "| kernel | mode | dtype | target | specialisations | registers | stack B | spills | shared KiB | matrix |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((f"{row.op}.{row.kernel}", row.mode, row.dtype, row.target), []).append(
            row
        )
    for name, group in groups.items():
        most = [
            max(getattr(row, field) for row in group)
            for field in ("registers", "stack_bytes", "spills", "shared_bytes")
        ]
        matrix = " / ".join(sorted({row.matrix or "none" for row in group}))
        cells = (*name, len(group), *most[:3], f"{most[3] / KIB:.0f}", matrix)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--op", nargs="+", choices=dispatch.OPS, default=list(dispatch.OPS))
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=DTYPES,
        help="bf16 and fp32 otherwise; attention bf16 alone, whose fp32 takes hours",
    )
    parser.add_argument("--case", nargs="+", help="names of cases; all primary ones otherwise")
    parser.add_argument("--out", type=Path, help="a file for the rows as JSON lines")
    options = parser.parse_args(argv)
    if triton.knobs.runtime.interpret:
        parser.error(
            "TRITON_INTERPRET is set; kernels are then interpreted, not compiled: unset it"
        )
    rows = []
    for op in options.op:
        for case in CASES[op].values():
            if (options.case is None and tag(case) != "primary") or (
                options.case and case.name not in options.case
            ):
                continue
            for dtype in options.dtype or (("bf16",) if op == "attention" else ("bf16", "fp32")):
                for target in options.target:
                    rows += compile_case(op, case.name, dtype, target)
            print(
                f"{op} {case.name}: {len(distinct(rows))} distinct kernels so far",
                file=sys.stderr,
                flush=True,
            )
    if not rows:
        parser.error("no such case; see kernels/cases.py")
    rows = distinct(rows)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text("".join(json.dumps(asdict(row)) + "\n" for row in rows))
    print(markdown(rows))
    bad = [row for row in rows if row.faults]
    for row in bad:
        print(
            f"{row.target} {row.op}.{row.kernel} {row.mode} {row.dtype} at {row.case} ({row.tiles}): {'; '.join(row.faults)}"
        )
    print(f"{len(rows)} kernels compiled for {', '.join(options.target)}; {len(bad)} with faults")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
