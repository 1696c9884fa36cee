"""Which backends each op has, where each is the faster choice, and how its module is loaded.

A backend is a module ``kernels/<op>/<backend>.py`` with ``forward``, ``backward`` and
``unsupported(*tensors, **options) -> str | None``, a pure function of shapes, dtypes, device and
installed parts. Adding one is that file and its rows in PREFERENCE.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from . import native

OP_NAMES = ("attention", "drop_token", "contrastive_lse", "patch_embed")

# Tokens up to which native_cpu's fp32 attention is ahead. On avx512_bf16 it is 512, because Zen 5
# was measured there and torch's fp32 is slower on it.
_FEW_TOKENS = {"avx2": 48, "avx512": 256, "avx512_bf16": 512, "amx_bf16": 256}


class Row(NamedTuple):
    """A backend of an op, and where it is the faster choice.

    ``when(mode, *tensors, lse_grad, **options)`` with mode "fwd" or "bwd" says so; None:
    everywhere. ``lse_grad``: a backward has a gradient of attention's lse to take.
    """

    op: str
    backend: str
    when: Callable[..., bool] | None = None


def _short_on_matrix_units(mode, q, k, v, bias_grad=False, **options) -> bool:
    """Up to the lengths at which the tail of a tile weighs more than its inside.

    Beyond them the libraries' kernels are ahead (docs/notes/gpu.md). So they are in fp32, whose
    products ours unroll without a matrix unit; but a trainable bias has a gradient only here.
    """
    return k.shape[1] <= 2048 and (q.dtype.itemsize == 2 or bias_grad)


def _no_lse_gradient(mode, *tensors, lse_grad=False, **options) -> bool:
    """torch's backward knows no gradient of lse: with one it is the reference, in O(T S) memory."""
    return not lse_grad


def _backward(mode, *tensors, **options) -> bool:
    """Backward, one pass writes gradients and zeros alike.

    Forward, every gather of rows costs the same (predicted, docs/notes/gpu.md).
    """
    return mode == "bwd"


def _not_yet_measured(mode, *tensors, **options) -> bool:
    """No measurement has shown it to be the faster choice: it runs when asked for."""
    return False


def _bf16_or_few_tokens(mode, q, k, v, **options) -> bool:
    """bf16: always with AVX-512 BF16. On AMX not for a query or two, where packing all keys would
    be most of the work (predicted).

    fp32: up to the length where the libraries gain less by splitting products among the threads
    than the splitting costs them (measured on two
    threads, docs/notes/attention.md).
    """
    if q.dtype == torch.bfloat16:
        return q.shape[1] >= 16 or native.level() == "avx512_bf16"
    return max(q.shape[1], k.shape[1]) <= _FEW_TOKENS.get(native.level(), 0)


def _vectorised(mode, *tensors, **options) -> bool:
    """Its passes are written for wide registers; without them it runs when asked for."""
    return native.level() != "base"


def _queries_fill_lanes(mode, q, k, v, **options) -> bool:
    """A TPU's register has 128 lanes of queries.

    The scores of a sentence, or of AGG alone, are few: XLA fuses them with what surrounds them,
    and the kernel's order of axes would cost copies (predicted, docs/notes/jax_tpu.md).
    """
    return (q.shape[1] if isinstance(q, torch.Tensor) else q.shape[2]) >= 64


def torch_xla_has_a_tpu() -> bool:
    """Whether torch_xla runs on a TPU. Elsewhere it lowers to plain XLA, and the Pallas kernels
    are only interpreted."""
    import torch_xla.runtime

    return torch_xla.runtime.device_type() == "TPU"


def _on_torch_xla(row: Row) -> Row:
    """The row, where torch_xla runs on a TPU."""

    def when(mode, *args, **options) -> bool:
        return torch_xla_has_a_tpu() and (row.when is None or row.when(mode, *args, **options))

    return row._replace(when=when)


_PALLAS = tuple(
    Row(op, "pallas_tpu", _queries_fill_lanes if op == "attention" else None) for op in OP_NAMES
)
REFERENCES = tuple(Row(op, "reference") for op in OP_NAMES)

# (framework, device): best first. What is not listed here still runs when asked for by name.
PREFERENCE: dict[tuple[str, str], tuple[Row, ...]] = {
    ("torch", "cpu"): (
        Row("attention", "native_cpu", _bf16_or_few_tokens),
        Row("attention", "torch_sdpa", _no_lse_gradient),
        Row("drop_token", "native_cpu"),
        Row("contrastive_lse", "native_cpu"),
        Row("patch_embed", "native_cpu", _vectorised),
        *REFERENCES,
    ),
    ("torch", "cuda"): (
        Row("attention", "triton_gpu", _short_on_matrix_units),
        Row("attention", "torch_sdpa", _no_lse_gradient),
        Row("attention", "triton_gpu"),
        Row("attention", "torch_cudnn", _not_yet_measured),
        Row("attention", "flash_attn", _not_yet_measured),
        Row("drop_token", "triton_gpu", _backward),
        Row("contrastive_lse", "triton_gpu"),
        Row("patch_embed", "triton_gpu"),
        *REFERENCES,
    ),
    ("torch", "xla"): (*map(_on_torch_xla, _PALLAS), *REFERENCES),
    ("torch", "tpu"): (*_PALLAS, *REFERENCES),
    ("jax", "tpu"): (*_PALLAS, *REFERENCES),
}


def _names(framework: str) -> dict[str, tuple[str, ...]]:
    rows = [row for (each, _), rows in PREFERENCE.items() if each == framework for row in rows]
    return {
        op: tuple(dict.fromkeys(row.backend for row in rows if row.op == op)) for op in OP_NAMES
    }


BACKENDS = _names("torch")
JAX_BACKENDS = _names("jax")

# A module whose ``adapter(op)`` gives one framework's tensors the kernels of another.
_ADAPTERS = {("torch", "pallas_tpu"): "xla"}


@functools.cache
def load(op: str, backend: str, framework: str = "torch") -> Any:
    """The backend's module, or an adapter with the same three functions.

    Raises:
        ModuleNotFoundError: a part that it needs is not installed.
    """
    if adapter := _ADAPTERS.get((framework, backend)):
        return importlib.import_module(f"{__package__}.{adapter}").adapter(op)
    return importlib.import_module(f"{__package__}.{op}.{backend}")
