"""What the Pallas kernels of two or more ops share.

How they are called, where they run, and a few lines of arithmetic. The source is compatible with
jax 0.7.1 (the last one torch_xla knows) and 0.10.2.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from . import settings

LANES = 128  # the last axis of a register; the one before it has 8 rows of 4 bytes

# ``flags`` of a call: libtpu's scheduler by linear programming in place of its list scheduler. One
# that does not know the flag refuses the kernel. Those of jax 0.10 do (0.0.42.1 to 0.0.52);
# torch_xla's is older.
LP_SCHEDULER = (
    {"XLA_TPU_FORCE_LP_LLO_SCHEDULER": True} if jax.__version_info__[:2] == (0, 10) else {}
)

# -- where kernels run -------------------------------------------------------------------------


def interpreted() -> Any:
    """``interpret`` of a pallas_call traced now.

    False for a TPU; elsewhere True, or what ``settings.interpreting_with`` says.
    """
    if settings.jax_platform() == "tpu":
        return False
    chosen = settings.interpreter()
    return True if chosen is None else chosen


def unsupported_operands(*operands: Any) -> str | None:
    """The reason why no kernel here takes these operands; shapes are not looked at.

    Operands are arrays, numbers or None.
    """
    for operand in operands:
        if getattr(operand, "dtype", None) in (jnp.float64, jnp.float16):
            return f"{operand.dtype} is for the reference; the kernels take float32 and bfloat16"
    return None


# -- calling one -------------------------------------------------------------------------------


def call(
    kernel: Callable,
    *operands: jax.Array,
    name: str,
    grid: tuple[int, ...],
    semantics: Sequence[Any],
    in_specs: Sequence[Any],
    out_specs: Any,
    out_shape: Any,
    flops: float,
    exps: float = 0,
    prefetched: int = 0,
    scratch: Sequence[Any] = (),
    bytes_accessed: float | None = None,
    **compiler: Any,
):
    """Run ``kernel`` over ``grid``: a pl.pallas_call with everything that ours always carry.

    Args:
        name: "vatt_<op>_<part>", the custom call's name in HLO and profiles.
        semantics: "parallel" or "arbitrary" for every axis of the grid; what accumulates across
            steps does so along an "arbitrary" one.
        flops, exps, bytes_accessed: for the cost estimate; unless given, bytes_accessed counts
            operands and results once.
        prefetched: so many leading operands go to scalar memory before the grid starts; index
            maps receive them after the grid's indices.
        compiler: more fields of pltpu.CompilerParams.
    """
    results = out_shape if isinstance(out_shape, tuple | list) else [out_shape]
    moved = sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in (*operands, *results))
    run = pl.pallas_call(
        kernel,
        name=name,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=prefetched,
            grid=grid,
            in_specs=in_specs,
            out_specs=out_specs,
            scratch_shapes=scratch,
        ),
        out_shape=out_shape,
        compiler_params=pltpu.CompilerParams(dimension_semantics=tuple(semantics), **compiler),
        cost_estimate=pl.CostEstimate(
            flops=int(flops),
            transcendentals=int(exps),
            bytes_accessed=int(moved if bytes_accessed is None else bytes_accessed),
        ),
        interpret=interpreted(),
    )
    return run(*operands)


# -- shapes ------------------------------------------------------------------------------------


def sublanes(dtype: Any) -> int:
    """Rows of a dtype's smallest tile, (this, 128): 8 for fp32, 16 for bf16, 32 for uint8."""
    return 32 // jnp.dtype(dtype).itemsize


def round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def pad(x: jax.Array, axis: int, size: int, value: Any = 0) -> jax.Array:
    """``x`` with ``axis`` filled up to ``size``; itself where nothing is missing."""
    missing = size - x.shape[axis]
    if not missing:
        return x
    widths = [(0, missing if i == axis % x.ndim else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


# -- inside a kernel ---------------------------------------------------------------------------


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int] = (1, 0)) -> jax.Array:
    """a @ b in fp32 of two matrices, over axis contract[0] of a and contract[1] of b.

    (1, 1) is a @ b^T, (0, 0) is a^T @ b. fp32 operands are multiplied as such; a TPU would
    otherwise round them to bf16.
    """
    # Mosaic multiplies a vector outside the matrix unit, and fails there on bf16
    if 1 in (*a.shape, *b.shape):
        a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else jax.lax.Precision.DEFAULT
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def divide(n: Any, by: int) -> tuple[Any, Any]:
    """n // by and n % by of an index, which is never negative.

    ``//`` on traced integers handles signs, and lowering that needs a TPU.
    """
    if isinstance(n, int):
        return divmod(n, by)
    return jax.lax.div(n, jnp.int32(by)), jax.lax.rem(n, jnp.int32(by))
