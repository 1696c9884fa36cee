"""Attention on JAX arrays."""

from typing import Any

import jax
import jax.numpy as jnp

from ..registration_jax import Operator, Reference
from .checks import check, check_one_dtype

# B batch, T queries, S keys, H heads

# The results' name for policies of jax.checkpoint: where they are kept, the backward pass does not
# attend again.
ATTENTION_RESULTS = "vatt_attention"


def attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    scale: float,
    bias: jax.Array | None = None,
    key_mask: jax.Array | None = None,
    causal: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Attend; the contract of ``vatt_fast.kernels.attention`` in JAX's layout.

        scores = scale * q @ k^T + bias            # masked keys excluded
        out    = softmax(scores) @ v
        lse    = logsumexp(scores)

    Args:
        q: (B, H, T, head_dim) float; k, v: (B, H, S, head_dim), same dtype.
        scale: factor of the logits.
        bias: (H, T, S) float added to the scores, with gradient; -inf excludes a key too.
        key_mask: (B, S) bool, True = attend.
        causal: a query attends its own position's key and earlier ones; T == S.

    Returns:
        out (B, H, T, head_dim) in q's dtype and lse (B, H, T) in fp32 (fp64 for fp64), both
        differentiable. A row without any key gives out 0, lse -inf and zero gradients, whatever
        gradient its lse receives.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    check(q, k, v, bias, key_mask, heads=1, causal=causal)
    check_one_dtype(q, k, v)
    arrays = dict(q=q, k=k, v=v, bias=bias, key_mask=key_mask)
    return _attention.call(arrays, scale=float(scale), causal=causal)


class _TokensFirst(Reference):
    """The reference, which takes (B, T, H, head_dim)."""

    def forward(self, *tensors: Any, **options: Any) -> Any:
        out, lse = super().forward(*map(_swap, tensors), **options)
        return _swap(out), lse

    def backward(self, d_out, d_lse, q, k, v, out, lse, **options: Any) -> Any:
        d_out, q, k, v, out = map(_swap, (d_out, q, k, v, out))
        *gradients, d_bias = super().backward(d_out, d_lse, q, k, v, out, lse, **options)
        return *map(_swap, gradients), d_bias


def _swap(x: jax.Array) -> jax.Array:
    """(B, H, T, D) <-> (B, T, H, D)."""
    return jnp.swapaxes(x, 1, 2)


_attention = Operator(
    "attention",
    tensors=("q", "k", "v"),
    gradients=("q", "k", "v", "bias"),
    saves_outputs=True,
    wanted={"bias": "bias_grad"},
    checkpoint=ATTENTION_RESULTS,
    reference=_TokensFirst("attention"),
)
