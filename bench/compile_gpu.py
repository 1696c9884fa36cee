"""Triton kernels at the presets' own cases through the real compilers, no device needed.

The ops' own host code runs on meta tensors, and every launch is replaced by the compilation it
would have needed: so exactly the specialisations of real use are seen. A row is one kernel for one
target: registers, stack, spills, shared memory, matrix instructions and, for CUDA, counts of its
main loop (``sass.py``). They say what the code is, not what time it takes.

A fault is shared memory beyond the target's limit, a spill in a main loop and, but for fp32 without
tf32, which no matrix unit multiplies: a spill in a forward, a matmul without the target's matrix
instruction, products that ptxas lets wait for one another, no copy in flight where three or more
stages were asked for, a main loop that loads most bytes by less than 16 at a time, fewer warps a
multiprocessor than planned.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vatt_fast.kernels import settings
from vatt_fast.kernels.backends import PREFERENCE
from vatt_fast.kernels.cases import CASES, Case, make
from vatt_fast.kernels.tiles import Tiles

from . import peer_kernels, sass
from .lines import markdown_table
from .machine import DTYPES
from .timer import first_line

KIB = 1024
# tf32: fp32 whose products torch may round, as set_float32_matmul_precision("high") has it
COMPILED = DTYPES | {"tf32": torch.float32}


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
    # of CUDA alone, see ``sass.Code``
    instructions: int = 0
    serialised: str = ""
    programs: int = 0
    loop: dict[str, Any] | None = None
    versions: str = ""

    @property
    def title(self) -> str:
        kernel = f"{self.target} {self.op}.{self.kernel} {self.mode} {self.dtype}"
        return f"{kernel} at {self.case} ({self.tiles})"


# Warps that a multiprocessor of sm_90 should hold at the primary cases, so that the softmax or the
# loads of one program overlap with the products of another
PLANNED_WARPS = {
    ("attention", "_forward_kernel"): 16,
    ("attention", "_backward_keys_kernel"): 8,
    ("attention", "_backward_queries_kernel"): 12,
    ("contrastive_lse", "_forward_kernel"): 8,
    ("contrastive_lse", "_weights_kernel"): 8,
    ("patch_embed", "_forward_kernel"): 8,
}

# -- what is compiled -------------------------------------------------------------------------


class Variant(NamedTuple):
    """A primary case with what training or the op's own arguments add to it."""

    case: Case
    fp32_parameters: bool = False  # as under autocast
    d_lse: bool = False  # of attention: its log-sums have a gradient
    dtypes: tuple[str, ...] = ("bf16",)


_CAUSAL = dict(causal=True, num_keys=(785, 300))
_MASKS = dict(x_invalid=(3,), y_invalid=(0, 7))
_CLIP = dict(clip=(32, 224, 224, 3), patch=(4, 16, 16))
_FP32, _FP16 = dict(fp32_parameters=True), dict(dtypes=("fp16",))
# op, primary case, name and what is added, as fields of the case or of ``Variant``
_ADDED: tuple[tuple[str, str, str, dict[str, Any]], ...] = (
    ("attention", "video_mbs_drop50", "bias", dict(bias=True)),
    ("attention", "video_mbs_drop50", "mask", dict(num_keys=(785, 300))),
    ("attention", "video_mbs_drop50", "bias_mask", dict(bias=True, num_keys=(785, 300))),
    ("attention", "video_mbs_drop50", "causal", dict(causal=True)),
    ("attention", "video_mbs_drop50", "causal_bias_mask", _CAUSAL | dict(bias=True)),
    ("attention", "video_mbs_drop50", "d_lse", dict(d_lse=True)),
    ("attention", "text_bbs", "d_lse", dict(d_lse=True)),
    *(
        ("attention", "video_mbs_drop50", f"head_dim_{d}", dict(head_dim=d))
        for d in (16, 32, 80, 128)
    ),
    ("attention", "video_mbs_drop50", "fp16", _FP16),
    ("attention", "text_bbs", "fp16", _FP16),
    ("drop_token", "video_mbs_drop50", "fp16", _FP16),
    # no bound: a learned temperature, or a low one
    ("contrastive_lse", "va_bbs", "no_bound", dict(bound=False)),
    ("contrastive_lse", "vt_bbs_one_device", "no_bound", dict(bound=False)),
    ("contrastive_lse", "vt_bbs", "masks", _MASKS),
    ("contrastive_lse", "vt_bbs", "no_bound_masks", dict(bound=False) | _MASKS),
    ("contrastive_lse", "va_bbs_one_device", "fp16", _FP16),
    *(
        ("patch_embed", f"{tower}_drop50", "fp32_parameters", _FP32)
        for tower in ("video_mbs", "video_tiny", "audio_bbs")
    ),
    ("patch_embed", "audio_bbs_drop50", "shifted", _FP32 | dict(scale=0.5, shift=0.25)),
    ("patch_embed", "video_mbs_drop50", "gathered", _FP32 | dict(gathered=True)),
    ("patch_embed", "audio_bbs_drop50", "gathered", _FP32 | dict(gathered=True)),
    ("patch_embed", "video_mbs_drop50", "per_clip", _FP32 | dict(per="clip")),
    # the agnostic order: position and AGG are added later
    (*("patch_embed", "video_mbs_drop0", "only_projected"), dict(position=False, agg=False)),
    ("patch_embed", "video_mbs_drop50", "no_agg", _FP32 | dict(agg=False)),
    ("patch_embed", "video_mbs_drop50", "clip", _FP32 | _CLIP),
    ("patch_embed", "video_mbs_drop50", "padded", _CLIP | dict(clip=(31, 220, 222, 3))),
    ("patch_embed", "audio_bbs_drop50", "waveform", dict(clip=(153600,), patch=(128,))),
    ("patch_embed", "video_mbs_drop50", "fp16", _FP16),
)


def _made(op: str, of: str, name: str, added: dict[str, Any]) -> Variant:
    ours = {key: value for key, value in added.items() if key in Variant._fields}
    changes = {key: value for key, value in added.items() if key not in Variant._fields}
    return Variant(replace(CASES[op][of], name=f"{of}_{name}", **changes), **ours)


VARIANTS: dict[str, list[Variant]] = {
    op: [_made(*each) for each in _ADDED if each[0] == op] for op in CASES
}


def variant(op: str, case: str) -> Variant:
    """A case by name, of the table of cases or of VARIANTS."""
    known = {each.case.name: each for each in VARIANTS[op]}
    usual = ("bf16",) if op == "attention" else ("bf16", "fp32")  # its fp32 takes hours
    return known.get(case) or Variant(CASES[op][case], dtypes=usual)


def usual_dtypes(op: str, case: str) -> tuple[str, ...]:
    return variant(op, case).dtypes


def reached(op: str, case: str, dtype: str) -> bool:
    """Whether dispatch gives a training step's call to Triton, forward or backward, on CUDA."""
    inputs = meta_inputs(op, case, dtype)
    if op == "attention":
        inputs = inputs | dict(bias_grad=inputs["bias"] is not None)
    rows = [row for row in PREFERENCE["torch", "cuda"] if row.op == op]
    for mode in ("fwd", "bwd"):
        preferred = next(row for row in rows if row.when is None or row.when(mode, **inputs))
        if preferred.backend == "triton_gpu":
            return True
    return False


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


@contextlib.contextmanager
def _rounding(dtype: str) -> Iterator[None]:
    """Within, torch rounds the operands of fp32 products if, and only if, ``dtype`` is tf32."""
    products = torch.backends.cuda.matmul
    before = products.fp32_precision
    products.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
    try:
        yield
    finally:
        products.fp32_precision = before


@functools.lru_cache(maxsize=4)
def meta_inputs(op: str, case: str, dtype: str) -> dict[str, Any]:
    chosen = variant(op, case)
    inputs = make(chosen.case, COMPILED[dtype], "meta")
    if chosen.fp32_parameters:
        inputs |= {
            name: inputs[name].float()
            for name in ("weight", "bias", "position", "agg")
            if inputs[name] is not None
        }
    return inputs


def launches(
    op: str, inputs: dict[str, Any], dtype: torch.dtype, *, d_lse: bool = False
) -> Iterator[tuple[str, Any]]:
    """(mode, call) of all that an op's Triton backend launches for these inputs; forward first."""
    module = importlib.import_module(f"vatt_fast.kernels.{op}.triton_gpu")
    inputs = dict(inputs)
    if op == "attention":
        q, k, v = (inputs.pop(name) for name in "qkv")
        wide = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        bias_grad = inputs["bias"] is not None
        yield "fwd", lambda: module.forward(q, k, v, **inputs, deterministic=False)
        saved = (out, wide if d_lse else None, q, k, v, out, wide)
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
        rows = patches.shape[1]
        if inputs["keep"] is not None:
            rows = inputs["keep"].shape[-1]
        elif inputs["patch"] is not None:
            rows = inputs["position"].shape[0]
        tokens = weight.new_empty(
            (patches.shape[0], rows + (inputs["agg"] is not None), weight.shape[0]), dtype=dtype
        )
        yield "fwd", lambda: module.forward(patches, weight, bias, **inputs, dtype=dtype)
        yield "bwd", lambda: module.backward(tokens, patches, weight, bias, **inputs, dtype=dtype)


def compile_case(
    op: str,
    case: str,
    dtype: str,
    target: str,
    *,
    peers: bool = False,
    modes: tuple[str, ...] = ("fwd", "bwd"),
) -> list[Row]:
    """Every kernel that the case's forward and backward would launch on ``target``.

    Args:
        peers: those of ``peer_kernels`` too, where they can run the case.
    """
    rows = []
    inputs = meta_inputs(op, case, dtype)
    every = launches(op, inputs, COMPILED[dtype], d_lse=variant(op, case).d_lse)
    calls = [(mode, call) for mode, call in every if mode in modes]
    if peers and peer_kernels.can_run(op, inputs):
        calls.append(("peer", functools.partial(peer_kernels.FORWARD[op], **inputs)))
    for mode, call in calls:
        with compiling_for(target) as compiled, _rounding(dtype):
            call()
        for function, arguments, kernel in compiled:
            rows.append(_row(op, case, dtype, mode, target, function, arguments, kernel))
    return rows


def refusal(
    op: str, case: str, dtype: str, target: str, mode: str, choices: dict[str, Tiles]
) -> str | None:
    """Why a tuner need not time a case under these tiles, by kernel.

    A kernel does not compile, spills, or its products wait for one another. What is compiled so
    under the case's own tiles does not count: something has to run.
    """
    usual = {str(row) for row in compile_case(op, case, dtype, target, modes=(mode,))}
    try:
        with settings.force_tiles(**choices):
            rows = compile_case(op, case, dtype, target, modes=(mode,))
    except Exception as error:
        return first_line(error)
    for row in rows:
        if str(row) not in usual and (row.serialised or row.spills):
            waiting = f", products wait for one another ({row.serialised})" * bool(row.serialised)
            return f"{row.kernel}: {row.spills} spills{waiting}"
    return None


# -- reading what was compiled ----------------------------------------------------------------


def _row(op, case, dtype, mode, target, function, arguments, kernel) -> Row:
    used = _read_hip(kernel) if TARGETS[target].gpu.backend == "hip" else _read_cuda(kernel)
    constants = {n: int(x) for n, x in arguments.items() if n.isupper() and isinstance(x, int)}
    constants |= {name: getattr(kernel.metadata, name) for name in ("num_warps", "num_stages")}
    row = Row(
        op=op,
        case=case,
        dtype=dtype,
        mode=mode,
        kernel=function.fn.__name__,
        target=target,
        tiles=" ".join(f"{name}={value}" for name, value in constants.items()),
        shared_bytes=kernel.metadata.shared,
        faults=[],
        **used,
    )
    row.faults = _faults(row, kernel)
    return row


def _faults(row: Row, kernel) -> list[str]:
    if row.mode == "peer":
        return []
    target, faults = TARGETS[row.target], []
    if row.shared_bytes > target.shared_bytes:
        limit = target.shared_bytes
        faults.append(f"{row.shared_bytes} bytes of shared memory, the limit is {limit}")
    if row.loop and row.loop["looped"] and row.loop["spills"]:
        faults.append(f"{row.loop['spills']} spills in the loop")
    if row.dtype == "fp32":
        return faults
    if row.spills and row.mode == "fwd":
        faults.append(f"{row.spills} spills")
    rows_of_tiles = [int(m) for m in re.findall(r"tt\.dot\b.*-> tensor<(\d+)x", kernel.asm["ttir"])]
    if rows_of_tiles:
        large = min(rows_of_tiles) >= 64 and kernel.metadata.num_warps >= 4
        needed = target.large if large else target.small
        if needed not in row.matrix:
            faults.append(f"no {needed} for matmul tiles of {rows_of_tiles} rows")
    return faults + _loop_faults(row, kernel.metadata)


def _loop_faults(row: Row, metadata) -> list[str]:
    faults, loop = [], row.loop
    if row.serialised:
        faults.append(f"its products wait for one another ({row.serialised})")
    if loop is None:
        return faults
    if loop["copies_ahead"] == 0 and metadata.num_stages > 2:
        faults.append(f"no copy in flight in spite of {metadata.num_stages} stages")
    if row.case not in CASES[row.op]:
        return faults  # a bias has odd rows, a mask single bytes, a small head little to load
    if 2 * loop["narrow_bytes"] > loop["loaded_bytes"]:
        narrow = f"{loop['narrow_bytes']} of {loop['loaded_bytes']} bytes"
        faults.append(f"loads {narrow} by less than 16 at a time")
    planned = PLANNED_WARPS.get((row.op, row.kernel), 0)
    warps = row.programs * metadata.num_warps
    if row.target == "sm_90" and "HGMMA" in row.matrix and warps < planned:
        faults.append(f"{warps} warps a multiprocessor, {planned} are planned")
    return faults


def _read_cuda(kernel) -> dict[str, Any]:
    code = asdict(sass.read(kernel))
    return code | dict(versions=sass.versions(kernel.metadata.target.arch))


def _read_hip(kernel) -> dict[str, Any]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s*(\d+)", text)[1])  # type: ignore[index]

    scratch = number("private_segment_fixed_size")
    spills = number("vgpr_spill_count") + number("sgpr_spill_count")
    return dict(
        registers=number("vgpr_count"),
        stack_bytes=scratch,
        spills=spills if scratch else 0,  # scalars that move to vector registers cost no memory
        matrix="v_mfma" if "v_mfma" in text else "",
    )


# -- table ------------------------------------------------------------------------------------


def distinct(rows: list[Row], known: list[Row]) -> list[Row]:
    """Those that are not ``known``: cases and dtypes that meet the same code are one row."""

    def what(row: Row) -> str:
        return str(replace(row, case="", dtype=""))

    seen = {what(row) for row in known}
    return [row for key, row in {what(row): row for row in rows}.items() if key not in seen]


def overview(rows: list[Row]) -> str:
    """Markdown: how many kernels every target got, then those that spill or have a fault."""
    targets = [each for each in TARGETS if any(row.target == each for row in rows)]
    counted: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        counted.setdefault((row.op, row.dtype), []).append(row)
    lines = [
        (*name, *(_number_of([row for row in group if row.target == each]) for each in targets))
        for name, group in counted.items()
    ]
    tables = [markdown_table(["op", "dtype", *targets], lines)]
    if wrong := [row for row in rows if row.spills or row.faults]:
        tables.append(markdown_table(WRONG.split(", "), map(_what_is_wrong, wrong)))
    return "\n\n".join(tables)


def _number_of(group: list[Row]) -> str:
    spilling = sum(row.spills > 0 for row in group)
    return f"{len(group)}, {spilling} spill" if spilling else str(len(group))


WRONG = "kernel, case, dtype, target, registers, spills, of them in the loop, faults"


def _what_is_wrong(row: Row) -> tuple:
    in_loop = row.loop["spills"] if row.loop and row.loop["looped"] else ""
    of_kernel = (f"{row.op}.{row.kernel}", row.case, row.dtype, row.target)
    return *of_kernel, row.registers, row.spills, in_loop, "; ".join(row.faults)


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


SCHEDULE = "kernel, mode, case, target, tile, warps / stages, registers, programs, serialised, "
SCHEDULE += "instructions, products, waits, barriers, copies ahead, narrow bytes, exponentials, "
SCHEDULE += "spills, shared clk, tensor clk"


def schedule(rows: list[Row]) -> str:
    """Markdown: main loops, a row a specialisation, as ``sass.Loop`` names their counts."""
    told = []
    for row in rows:
        if row.loop is None:
            continue
        tiles = dict(re.findall(r"(\w+)=(\w+)", row.tiles))
        tile = "x".join(tiles[name] for name in _TILE if name in tiles)
        loop = row.loop | {"narrow": f"{row.loop['narrow_bytes']}/{row.loop['loaded_bytes']}"}
        loop["instructions"] = f"{loop['instructions']}{'' if loop['looped'] else ' (no loop)'}"
        names = "instructions products waits barriers copies_ahead narrow exponentials spills "
        names += "shared_clocks tensor_clocks"
        counts = ["" if loop[name] is None else loop[name] for name in names.split()]
        of_kernel = (f"{row.op}.{row.kernel}", row.mode, row.case, row.target, tile)
        warps = f"{tiles['num_warps']} / {tiles['num_stages']}"
        told.append((*of_kernel, warps, row.registers, row.programs, row.serialised, *counts))
    return markdown_table(SCHEDULE.split(", "), told) if told else ""


_TILE = ("BLOCK_T", "BLOCK_S", "BLOCK_M", "BLOCK_N", "BLOCK_ROWS", "BLOCK_DIM", "BLOCK_VALUES")
