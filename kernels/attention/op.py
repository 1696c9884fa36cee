"""Multi-head attention that also returns its log-sum-exp.

Vaswani et al. 2017, section 3.2; VATT, section 3.2.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import one_device
from ..dispatch import autocast_dtype
from ..registration import Operator
from ..settings import PLAIN, requested
from . import plain
from .checks import check, check_one_dtype
from .flops import flops

# B batch, T query tokens, S key tokens, H heads


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend. Replaces ``F.scaled_dot_product_attention`` on (B, T, H, head_dim) tensors, without
    transposes.

        scores = scale * q @ k^T + bias            # masked keys excluded
        out    = softmax(scores) @ v
        lse    = logsumexp(scores)

    Args:
        q: (B, T, H, head_dim) float; k, v: (B, S, H, head_dim), same dtype. Any strides with a
            contiguous last axis: the three slices of a packed qkv need no copy. Cast to the
            autocast dtype under autocast.
        scale: factor of the logits, usually head_dim ** -0.5.
        bias: (H, T, S) float added to the scores, with gradient; -inf excludes a key too.
        key_mask: (B, S) bool, True = attend.
        causal: a query attends its own position's key and earlier ones; T == S.
        deterministic: same bits every run; None follows ``torch.use_deterministic_algorithms``.

    Returns:
        out (B, T, H, head_dim) in the compute dtype and lse (B, H, T) in fp32 (fp64 for fp64), both
        differentiable. A row without any key gives out 0, lse -inf and zero gradients, whatever
        gradient its lse receives. Under ``use_backend("plain")`` lse is None.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    check(q, k, v, bias, key_mask, heads=2, causal=causal)
    one_device(q=q, k=k, v=v, bias=bias, key_mask=key_mask)
    if dtype := autocast_dtype(q.device):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    check_one_dtype(q, k, v)
    backend = requested("attention")
    if backend == PLAIN:
        out, lse = plain.attention(
            q, k, v, scale=float(scale), bias=bias, key_mask=key_mask, causal=causal
        )
        return out, lse  # type: ignore[return-value]
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    bias_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    options = (float(scale), causal, deterministic, bias_grad)
    return _attention(q, k, v, bias, key_mask, *options, backend)


class _Arguments(NamedTuple):
    q: Tensor
    k: Tensor
    v: Tensor
    bias: Tensor | None
    key_mask: Tensor | None
    scale: float
    causal: bool
    deterministic: bool
    bias_grad: bool


def _fake(given: _Arguments) -> tuple[Tensor, Tensor]:
    B, T, H, _ = given.q.shape
    dtype = torch.promote_types(given.q.dtype, torch.float32)
    return given.q.new_empty(given.q.shape), given.q.new_empty((B, H, T), dtype=dtype)


def _flops(mode: str, shapes: Any) -> int:
    B, T, H, D = shapes.q
    return flops(mode, B, H, T, shapes.k[1], D)


_attention = Operator(
    "attention",
    _Arguments,
    _fake,
    _flops,
    tensors=3,
    outputs=("out", "lse"),
    gradients=("q", "k", "v", "bias"),
    saved=("out", "lse"),
    wanted={"bias": "bias_grad"},
    weighed=("bias_grad",),
    optional=("lse",),  # whether it has a gradient at all decides which backends can run
    instead="write it with torch.softmax",
).call
