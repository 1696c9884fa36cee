"""Attention as one reads it: the whole score matrix, for torch and jax.numpy, any float type."""

import math

import torch

from ..numerics import cast, wide

# B batch, T queries, S keys, H heads, D head_dim


def unsupported(q, k, v, *, scale, bias=None, key_mask=None, deterministic=False, bias_grad=False) -> str | None:
    return None


def forward(q, k, v, *, scale, bias=None, key_mask=None, deterministic=False, xp=torch):
    scores = _scores(xp, q, k, scale, bias, key_mask)  # (B, H, T, S)
    peak = xp.amax(scores, axis=-1, keepdims=True)
    p = xp.exp(scores - xp.where(peak == -math.inf, 0.0, peak))  # zero peak: a row without a key would give nan
    total = xp.sum(p, axis=-1, keepdims=True)
    out = xp.einsum("bhts,bshd->bthd", cast(p / xp.where(total == 0, 1.0, total), q.dtype), v)
    return out, (xp.log(total) + peak)[..., 0]


def backward(d_out, d_lse, q, k, v, out, lse, *, scale, bias=None, key_mask=None, deterministic=False, bias_grad=False, xp=torch):
    dtype = q.dtype
    scores = _scores(xp, q, k, scale, bias, key_mask)
    p = xp.exp(scores - xp.where(lse == -math.inf, math.inf, lse)[..., None])  # all 0 in a row without a key
    delta = xp.einsum("bthd,bthd->bht", wide(xp, d_out), wide(xp, out))
    if d_lse is not None:
        delta = delta - d_lse
    d_p = xp.einsum("bthd,bshd->bhts", d_out, v)
    d_scores = p * (wide(xp, d_p) - delta[..., None])
    d_bias = d_scores.sum(0) if bias_grad else None
    p, d_s = cast(p, dtype), cast(d_scores * scale, dtype)
    d_q = xp.einsum("bhts,bshd->bthd", d_s, k)
    d_k = xp.einsum("bhts,bthd->bshd", d_s, q)
    d_v = xp.einsum("bhts,bthd->bshd", p, d_out)
    return d_q, d_k, d_v, d_bias


def _scores(xp, q, k, scale, bias, key_mask):
    scores = wide(xp, xp.einsum("bthd,bshd->bhts", q, k)) * scale
    if bias is not None:
        scores = scores + bias
    return scores if key_mask is None else xp.where(key_mask[:, None, None, :], scores, -math.inf)
