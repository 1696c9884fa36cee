"""Attention by torch's own fused kernels, through the aten functions that return lse and accept it back.

CPU: flash attention for CPU. CUDA: flash attention, or the memory-efficient kernel where there is a mask, a bias or fp32.
"""

import math

import torch
import torch.nn.functional as F

from . import reference

aten = torch.ops.aten
_LSE_ALIGNMENT = 32  # the memory-efficient kernel pads lse's last axis

# B batch, T queries, S keys, H heads


def forward(q, k, v, *, scale, bias=None, key_mask=None, deterministic=False):
    T = q.shape[1]
    mask, some_key = _mask(q, k, bias, key_mask)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, False, attn_mask=mask, scale=scale)
    elif _flash(q, mask):
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True, 0.0, False, scale=scale)[:2]
        lse = lse[..., :T]
    out = out.transpose(1, 2)
    if some_key is not None:
        out = torch.where(some_key[:, None, None, None], out, 0.0)
        lse = torch.where(some_key[:, None, None], lse, -math.inf)
    return out, lse


def backward(d_out, d_lse, q, k, v, out, lse, *, scale, bias=None, key_mask=None, deterministic=False, bias_grad=False):
    if d_lse is not None:  # aten's backward knows no gradient of lse
        options = dict(scale=scale, bias=bias, key_mask=key_mask, deterministic=deterministic, bias_grad=bias_grad)
        return reference.backward(d_out, d_lse, q, k, v, out, lse, **options)
    T = q.shape[1]
    mask, some_key = _mask(q, k, bias, key_mask)
    if some_key is not None:  # no gradient in, none out; a huge lse makes those rows' probabilities 0
        d_out = torch.where(some_key[:, None, None, None], d_out, 0.0)
        lse = torch.where(some_key[:, None, None], lse, 1e4)
    d_out, q, k, v, out = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(d_out, q, k, v, out, lse, 0.0, False, attn_mask=mask, scale=scale)
    else:
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)  # only dropout would read it
        if _flash(q, mask):
            grads = aten._scaled_dot_product_flash_attention_backward(
                d_out, q, k, v, out, lse, None, None, T, k.shape[2], 0.0, False, no_seed, no_seed, scale=scale
            )
        else:
            lse = F.pad(lse, (0, -T % _LSE_ALIGNMENT), value=math.inf)
            grads = aten._scaled_dot_product_efficient_attention_backward(
                d_out, q, k, v, mask, out, lse, no_seed, no_seed, 0.0, [True, True, True, False], False, scale=scale
            )
    d_q, d_k, d_v = grads[:3]
    return d_q.transpose(1, 2), d_k.transpose(1, 2), d_v.transpose(1, 2), None


def _flash(q, mask) -> bool:
    return mask is None and q.dtype in (torch.float16, torch.bfloat16)


def _mask(q, k, bias, key_mask):
    """Additive (B, H, T, S) mask in q's dtype, and which clips have a key at all; those without attend everything and are blanked later."""
    B, T, H, _ = q.shape
    if bias is None and key_mask is None:
        return None, None
    mask = torch.zeros((1, 1, 1, 1), dtype=q.dtype, device=q.device) if bias is None else bias[None].to(q.dtype)
    some_key = None
    if key_mask is not None:
        some_key = key_mask.any(1)
        allowed = key_mask | ~some_key[:, None]
        mask = mask.masked_fill(~allowed[:, None, None, :], -math.inf)
    mask = mask.expand(B, H, T, k.shape[1])
    return (mask if q.device.type == "cpu" else _aligned(mask)), some_key


def _aligned(mask):
    """The memory-efficient kernel wants rows that start on multiples of 8 elements."""
    padded = F.pad(mask, (0, -mask.shape[-1] % 8))
    return padded[..., : mask.shape[-1]]


def unsupported(q, k, v, *, scale, bias=None, key_mask=None, deterministic=False, bias_grad=False) -> str | None:
    if q.device.type not in ("cpu", "cuda"):
        return f"tensors are on {q.device.type}; torch's fused kernels are reached on cpu and cuda"
    if bias_grad:
        return "a trainable bias has no gradient here"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if q.device.type == "cuda":
        if q.dtype == torch.float64:
            return "float64 is for the reference"
        if q.shape[-1] % 8:
            return f"head_dim {q.shape[-1]} is no multiple of 8"
        if deterministic and not _flash(q, None if bias is None and key_mask is None else q):
            return "the memory-efficient backward is not deterministic"
    return None
