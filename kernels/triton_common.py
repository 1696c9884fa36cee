"""What the Triton kernels of two or more ops share.

Where they run, for which architecture, and a few device functions.
"""

import functools
import os
import shutil
import sysconfig
from pathlib import Path

import torch
import triton
import triton.language as tl

_OLDEST_TRITON = (3, 5)  # that the kernels were compiled with
_LEAST_CAPABILITY = (8, 0)  # of NVIDIA's: what Triton supports, and bf16 needs
LOG2E = tl.constexpr(1.4426950408889634)  # exp(x) = exp2(x * LOG2E)
LN2 = tl.constexpr(0.6931471805599453)


def interpreted() -> bool:
    """Kernels run in Triton's interpreter, on host tensors.

    It is so if TRITON_INTERPRET=1 was set in the environment when the kernels were imported.
    """
    return triton.knobs.runtime.interpret


def unsupported_operands(*operands: torch.Tensor | float | None) -> str | None:
    """The reason why Triton cannot take these operands here; shapes are not looked at."""
    given = [tensor for tensor in operands if isinstance(tensor, torch.Tensor)]
    device = given[0].device
    if not interpreted():
        if device.type != "cuda":
            return f"tensors are on {device.type}; Triton runs there only with TRITON_INTERPRET=1"
        if reason := unsupported_machine() or _unsupported_gpu(device.index):
            return reason
    for tensor in given:
        if tensor.dtype == torch.float64:
            return "float64 is for the reference"
        if tensor.dtype == torch.bfloat16 and interpreted():
            return BF16_INTERPRETED
    return None


BF16_INTERPRETED = "Triton's interpreter multiplies the raw bits of bfloat16"


@functools.cache
def unsupported_machine() -> str | None:
    """The reason why Triton cannot compile and launch kernels here, whatever the GPU.

    It builds its launcher in C at first use.
    """
    if tuple(map(int, triton.__version__.split(".")[:2])) < _OLDEST_TRITON:
        oldest = ".".join(map(str, _OLDEST_TRITON))
        return f"triton {triton.__version__} is older than {oldest}, the oldest that was tried"
    if triton.knobs.build.impl is not None:
        return None  # the user's own way to build
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler and finds no {' or '.join(compilers)}; install one"
    folders = [sysconfig.get_paths()["include"]]
    for variable in ("CPATH", "C_INCLUDE_PATH"):
        folders += filter(None, os.environ.get(variable, "").split(os.pathsep))
    if not any(Path(folder, "Python.h").exists() for folder in folders):
        return f"Triton needs Python's headers and finds no {folders[0]}/Python.h; install them"
    return None


@functools.cache
def _unsupported_gpu(index: int | None) -> str | None:
    if torch.version.hip or not torch.cuda.is_available():
        return None
    found = torch.cuda.get_device_capability(index)
    if found >= _LEAST_CAPABILITY:
        return None
    return f"the GPU has compute capability {found[0]}.{found[1]}; Triton needs 8.0"


def arch() -> str:
    """Architecture the kernels are compiled for: "sm_90", "gfx942".

    In the interpreter it is sm_90, whose tile choices then apply.
    """
    return "sm_90" if interpreted() else _arch(triton.runtime.driver.active.get_current_device())


@functools.cache  # the driver is asked several times a call of an op
def _arch(device: int) -> str:
    target = triton.runtime.driver.active.get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of a kernel's tl.dot.

    fp32 operands are rounded to tf32 only where torch's own products are, and on architectures
    that have it. The interpreter rounds nothing.
    """
    # fp32_precision follows the older switches; allow_tf32 raises once this one was set
    rounded = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if rounded and not interpreted() and _has_tf32(arch()) else "ieee"


def _has_tf32(arch: str) -> bool:
    return arch == "gfx942" or arch.startswith("sm_")


@triton.jit
def offset(index, stride):
    """index * stride in 64 bits: a stride may be long, and 128 times it beyond 2^31."""
    return index.to(tl.int64) * stride


@triton.jit
def load_rows(x, stride, row, column, count, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """Rows ``row`` of x (count, HEAD_DIM), 0 beyond its last column.

    RAGGED: some rows lie beyond ``count``, and are 0.
    """
    pointers = x + offset(row[:, None], stride) + column[None, :]
    if RAGGED:
        if column.shape[0] > HEAD_DIM:
            inside = (row[:, None] < count) & (column[None, :] < HEAD_DIM)
            tile = tl.load(pointers, mask=inside, other=0.0)
        else:
            tile = tl.load(pointers, mask=row[:, None] < count, other=0.0)
    elif column.shape[0] > HEAD_DIM:
        tile = tl.load(pointers, mask=column[None, :] < HEAD_DIM, other=0.0)
    else:
        tile = tl.load(pointers)
    return tile


@triton.jit
def store_rows(x, tile, stride, row, column, count, HEAD_DIM: tl.constexpr, RAGGED: tl.constexpr):
    """The counterpart of ``load_rows``, in x's dtype."""
    pointers = x + offset(row[:, None], stride) + column[None, :]
    tile = tile.to(x.dtype.element_ty)
    if RAGGED:
        tl.store(pointers, tile, mask=(row[:, None] < count) & (column[None, :] < HEAD_DIM))
    elif column.shape[0] > HEAD_DIM:
        tl.store(pointers, tile, mask=column[None, :] < HEAD_DIM)
    else:
        tl.store(pointers, tile)
