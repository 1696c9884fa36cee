"""Attention by the flash-attn package (version 2.7 and later; Dao 2023), an optional extra.

No mask, no bias.
"""

import torch
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_forward

from . import reference

_MAX_HEAD_DIM = 256
# no dropout, no window, no cap, no slopes
_PLAIN = dict(
    dropout_p=0.0,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
)

# B batch, T queries, S keys, H heads: flash-attn's own layout


def forward(q, k, v, *, scale, bias=None, key_mask=None, causal=False, deterministic=False):
    out, lse, *_ = _flash_attn_forward(
        q, k, v, softmax_scale=scale, causal=causal, return_softmax=False, **_PLAIN
    )
    return out, lse


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
):
    if d_lse is not None:  # its backward knows no gradient of lse
        return reference.backward(d_out, d_lse, q, k, v, out, lse, scale=scale, causal=causal)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    tensors = (d_out.contiguous(), q, k, v, out, lse, d_q, d_k, d_v)
    options = dict(softmax_scale=scale, causal=causal, deterministic=deterministic)
    _flash_attn_backward(*tensors, **options, **_PLAIN)
    return d_q, d_k, d_v, None


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
    if q.device.type != "cuda":
        return f"tensors are on {q.device.type}; flash-attn runs on GPUs"
    if bias is not None or key_mask is not None:
        return "flash-attn is reached without bias and key_mask only"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is no multiple of 8 up to {_MAX_HEAD_DIM}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    return None
