"""Attention by cuDNN's fused kernels, through the aten functions that return and take lse.

NVIDIA only, no mask, no bias.
"""

import torch

from . import reference

aten = torch.ops.aten
_MAX_HEAD_DIM = 128

# B batch, T queries, S keys, H heads


def forward(q, k, v, *, scale, bias=None, key_mask=None, causal=False, deterministic=False):
    B, T, H, _ = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )[:2]
    return out.transpose(1, 2), lse.reshape(B, H, T)  # cuDNN's statistics end in an axis of 1


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
    if d_lse is not None:  # aten's backward knows no gradient of lse
        return reference.backward(d_out, d_lse, q, k, v, out, lse, scale=scale, causal=causal)
    T, S = q.shape[1], k.shape[1]
    d_out, q, k, v, out = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    no_seed = torch.zeros((), dtype=torch.int64, device=q.device)  # only dropout would read it
    grads = aten._scaled_dot_product_cudnn_attention_backward(
        *(d_out, q, k, v, out, lse.unsqueeze(-1)),
        *(no_seed, no_seed, None),  # and no bias
        *(None, None, T, S),  # no ragged batches; the longest lengths
        *(0.0, causal),  # no dropout
        scale=scale,
    )
    return *(grad.transpose(1, 2) for grad in grads), None


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
    if q.device.type != "cuda" or torch.version.hip:
        device = "an AMD GPU" if q.device.type == "cuda" else q.device.type
        return f"tensors are on {device}; cuDNN is reached on NVIDIA GPUs"
    if bias is not None or key_mask is not None:
        return "it is reached without bias and key_mask only"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"cuDNN's fused attention takes fp16 and bf16, not {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is no multiple of 8 up to {_MAX_HEAD_DIM}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if deterministic:
        return "cuDNN's backward promises no fixed order of sums"
    if torch.cuda.is_available() and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "cuDNN's fused attention needs compute capability 8.0"
    return None
