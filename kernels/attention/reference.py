"""Attention as one reads it, with the whole score matrix: torch and jax.numpy, any float type."""

import math

import torch

from ..numerics import cast, heads_first, softmax, wide

# B batch, T queries, S keys, H heads, D head_dim


def forward(
    q, k, v, *, scale, bias=None, key_mask=None, causal=False, deterministic=False, xp=torch
):
    q, k, v = (heads_first(xp, x) for x in (q, k, v))  # (B, H, T or S, D)
    p, lse = _probabilities(xp, q, k, scale, bias, key_mask, causal)
    return xp.swapaxes(cast(p, q.dtype) @ v, 1, 2), lse


def backward(
    d_out,
    d_lse,
    q,
    k,
    v,
    out,
    lse,
    *,
    scale,
    bias=None,
    key_mask=None,
    causal=False,
    deterministic=False,
    bias_grad=False,
    xp=torch,
):
    d_out, q, k, v, out = (heads_first(xp, x) for x in (d_out, q, k, v, out))
    p, _ = _probabilities(xp, q, k, scale, bias, key_mask, causal)
    d_v = xp.swapaxes(cast(p, q.dtype), 2, 3) @ d_out
    delta = (wide(xp, d_out) * wide(xp, out)).sum(-1)  # (B, H, T)
    if d_lse is not None:
        # a row without a key has no gradient, whatever comes in
        delta -= xp.where(lse == -math.inf, 0.0, d_lse)
    # at first d_p; then *= and -= spare torch a score matrix each
    d_scores = wide(xp, d_out @ xp.swapaxes(v, 2, 3))
    d_scores -= delta[..., None]
    d_scores *= p
    d_bias = d_scores.sum(0) if bias_grad else None
    d_scores *= scale
    d_scores = cast(d_scores, q.dtype)
    d_q, d_k = d_scores @ k, xp.swapaxes(d_scores, 2, 3) @ q
    return xp.swapaxes(d_q, 1, 2), xp.swapaxes(d_k, 1, 2), xp.swapaxes(d_v, 1, 2), d_bias


def _probabilities(xp, q, k, scale, bias, key_mask, causal):
    """softmax(scores) (B, H, T, S), 0 in a row without a key, and lse (B, H, T)."""
    # rounded to half precision, lse would not fit another backend's backward
    scores = wide(xp, q) @ xp.swapaxes(wide(xp, k), 2, 3)
    scores *= scale
    if bias is not None:
        scores += bias
    if key_mask is not None:
        scores = xp.where(key_mask[:, None, None, :], scores, -math.inf)
    if causal:
        place = xp.arange(k.shape[2], **({"device": k.device} if xp is torch else {}))
        scores = xp.where(place[:, None] >= place, scores, -math.inf)
    return softmax(xp, scores, may_be_empty=bias is not None or key_mask is not None)


def unsupported(
    q,
    k,
    v,
    *,
    scale,
    bias=None,
    key_mask=None,
    causal=False,
    deterministic=False,
    bias_grad=False,
) -> str | None:
    return None
