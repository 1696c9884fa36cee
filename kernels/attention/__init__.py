"""Non-causal multi-head attention that also returns its log-sum-exp (Vaswani et al. 2017, section 3.2; paper section 3.2)."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import one_device
from ..dispatch import autocast_dtype, choose
from ..registration import operator
from ..settings import PLAIN, requested
from . import plain

# B batch, T query tokens, S key tokens, H heads


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    deterministic: bool | None = None,
) -> tuple[Tensor, Tensor]:
    """Attend; replaces ``F.scaled_dot_product_attention`` on (B, T, H, head_dim) tensors, without transposes.

        scores = scale * q @ k^T + bias            # masked keys excluded
        out    = softmax(scores) @ v
        lse    = logsumexp(scores)

    Args:
        q: (B, T, H, head_dim) float; k, v: (B, S, H, head_dim), same dtype. Any strides with a contiguous last axis: the three slices of a
            packed qkv need no copy. Cast to the autocast dtype under autocast.
        scale: factor of the logits, usually head_dim ** -0.5.
        bias: (H, T, S) float added to the scores, with gradient; -inf excludes a key too.
        key_mask: (B, S) bool, True = attend.
        deterministic: same bits every run; None follows ``torch.use_deterministic_algorithms``.

    Returns:
        out (B, T, H, head_dim) in the compute dtype and lse (B, H, T) in fp32 (fp64 for fp64), both differentiable. A row without any key
        gives out 0, lse -inf and zero gradients, whatever gradient its lse receives.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    _check(q, k, v, bias, key_mask)
    if dtype := autocast_dtype(q.device):
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one dtype: cast them, or use autocast"
        )
    if requested("attention") == PLAIN:
        return plain.attention(q, k, v, scale=float(scale), bias=bias, key_mask=key_mask)  # type: ignore[return-value]
    if deterministic is None:
        deterministic = torch.are_deterministic_algorithms_enabled()
    bias_grad = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    return _attention(
        q, k, v, bias, key_mask, float(scale), deterministic, bias_grad, requested("attention")
    )


def _check(q, k, v, bias, key_mask):
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.ndim != 4
        or q.shape[0] != k.shape[0]
        or q.shape[2:] != k.shape[2:]
    ):
        raise ValueError(
            f"attention takes q (B, T, H, head_dim), k and v (B, S, H, head_dim), got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"q {tuple(q.shape)} or k {tuple(k.shape)} is empty; every axis needs at least one element"
        )
    one_device(q=q, k=k, v=v, bias=bias, key_mask=key_mask)
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}; attention takes floating point")
    if bias is not None and (
        bias.shape != (q.shape[2], q.shape[1], k.shape[1]) or not bias.is_floating_point()
    ):
        raise ValueError(
            f"bias is {tuple(bias.shape)} {bias.dtype}; it must be float (H, T, S) = {(q.shape[2], q.shape[1], k.shape[1])}"
        )
    if key_mask is not None and (
        key_mask.shape != (q.shape[0], k.shape[1]) or key_mask.dtype != torch.bool
    ):
        raise ValueError(
            f"key_mask is {tuple(key_mask.shape)} {key_mask.dtype}; it must be bool (B, S) = {(q.shape[0], k.shape[1])}, True = attend"
        )


# Op and backward are opaque to the compiler; the backend is chosen inside, by a name that travels with the call.


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    deterministic: bool,
    bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    options = dict(scale=scale, bias=bias, key_mask=key_mask, deterministic=deterministic)
    out, lse = choose("attention", "fwd", backend, q, k, v, **options, bias_grad=bias_grad).forward(
        q, k, v, **options
    )
    return out.contiguous(), lse.contiguous()


def _fake_forward(q, k, v, bias, key_mask, scale, deterministic, bias_grad, backend):
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty(
        (B, H, T), dtype=torch.promote_types(q.dtype, torch.float32)
    )


def _backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    scale: float,
    deterministic: bool,
    bias_grad: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    options = dict(
        scale=scale, bias=bias, key_mask=key_mask, deterministic=deterministic, bias_grad=bias_grad
    )
    module = choose("attention", "bwd", backend, q, k, v, **options)
    d_q, d_k, d_v, d_bias = module.backward(d_out, d_lse, q, k, v, out, lse, **options)
    d_bias = (
        q.new_empty(0) if d_bias is None or bias is None else d_bias.to(bias.dtype).contiguous()
    )
    return d_q.contiguous(), d_k.contiguous(), d_v.contiguous(), d_bias


def _fake_backward(
    d_out, d_lse, q, k, v, bias, key_mask, out, lse, scale, deterministic, bias_grad, backend
):
    d_bias = bias.new_empty(bias.shape) if bias_grad else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), d_bias


def _save(ctx, inputs, output):
    q, k, v, bias, key_mask, ctx.scale, ctx.deterministic, ctx.bias_grad, ctx.backend = inputs
    ctx.save_for_backward(q, k, v, bias, key_mask, *output)
    ctx.set_materialize_grads(False)  # whether lse has a gradient at all decides the backend


def _differentiate(ctx, d_out, d_lse):
    q, k, v, bias, key_mask, out, lse = ctx.saved_tensors
    if d_out is None:
        d_out = torch.zeros_like(out)
    d_q, d_k, d_v, d_bias = _attention_backward(
        d_out,
        d_lse,
        q,
        k,
        v,
        bias,
        key_mask,
        out,
        lse,
        ctx.scale,
        ctx.deterministic,
        ctx.bias_grad,
        ctx.backend,
    )
    return d_q, d_k, d_v, d_bias if ctx.bias_grad else None, None, None, None, None, None


def _refuse(ctx, *_):
    raise NotImplementedError(
        "attention has no second derivative; for one, write it with torch.softmax"
    )


_attention = operator("attention", _forward, _fake_forward, _differentiate, _save)
_attention_backward = operator("attention_backward", _backward, _fake_backward, _refuse)


@register_flop_formula(torch.ops.vatt_fast.attention)
def _flops(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    B, T, H, head_dim = q_shape
    return 4 * B * H * T * k_shape[1] * head_dim


@register_flop_formula(torch.ops.vatt_fast.attention_backward)
def _backward_flops(
    d_out_shape, d_lse_shape, q_shape, k_shape, *args, out_shape=None, **kwargs
) -> int:
    B, T, H, head_dim = q_shape
    return (
        10 * B * H * T * k_shape[1] * head_dim
    )  # five products, the scores' recomputation one of them
