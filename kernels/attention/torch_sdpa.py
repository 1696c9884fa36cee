"""Attention by torch's own fused kernels, through the aten functions that return and take lse.

CPU: flash attention for CPU. CUDA: flash attention, or the memory-efficient kernel where there is
a mask, a bias or fp32.
"""

import math

import torch
import torch.nn.functional as F

from ..numerics import on_cpu, wide
from . import reference

aten = torch.ops.aten
_LSE_ALIGNMENT = 32  # the memory-efficient kernel pads lse's last axis
_MASK_ALIGNMENT = 8  # and wants a mask whose rows start on multiples of 8 elements
_MAX_FLASH_HEAD_DIM = 256

# B batch, T queries, S keys, H heads


def forward(q, k, v, *, scale, bias=None, key_mask=None, causal=False, deterministic=False):
    T = q.shape[1]
    mask, empty = _mask(q, k, bias, key_mask, causal)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    elif _flash(q, mask):
        out, lse = aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, causal, False, scale=scale
        )[:2]
    else:
        out, lse = aten._scaled_dot_product_efficient_attention(
            q, k, v, mask, True, 0.0, causal, scale=scale
        )[:2]
        lse = lse.narrow(-1, 0, T)
    out = out.transpose(1, 2)
    if empty is not None:
        out = torch.where(empty.transpose(1, 2).unsqueeze(-1), 0.0, out)
        lse = torch.where(empty, -math.inf, lse)
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
    if d_lse is not None:  # aten's backward knows no gradient of lse
        options = dict(
            scale=scale,
            bias=bias,
            key_mask=key_mask,
            causal=causal,
            deterministic=deterministic,
            bias_grad=bias_grad,
        )
        return reference.backward(d_out, d_lse, q, k, v, out, lse, **options)
    T, dtype = q.shape[1], q.dtype
    if q.device.type == "cpu":
        # the CPU's half-precision backward is 3 to 20 times slower than the fp32 one
        d_out, q, k, v, out = (wide(torch, x) for x in (d_out, q, k, v, out))
    mask, empty = _mask(q, k, bias, key_mask, causal)
    if empty is not None:  # no gradient in, none out; a huge lse makes those rows' probabilities 0
        d_out = torch.where(empty.transpose(1, 2).unsqueeze(-1), 0.0, d_out)
        lse = torch.where(empty, 1e4, lse)
    d_out, q, k, v, out = (x.transpose(1, 2) for x in (d_out, q, k, v, out))
    if q.device.type == "cpu":
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    else:
        no_seed = torch.zeros((), dtype=torch.int64, device=q.device)  # only dropout would read it
        if _flash(q, mask):
            grads = aten._scaled_dot_product_flash_attention_backward(
                *(d_out, q, k, v, out, lse),
                *(None, None, T, k.shape[2]),  # no ragged batches; the longest lengths
                *(0.0, causal, no_seed, no_seed),  # no dropout
                scale=scale,
            )
        else:
            lse = F.pad(lse, (0, -T % _LSE_ALIGNMENT), value=math.inf)
            grads = aten._scaled_dot_product_efficient_attention_backward(
                *(d_out, q, k, v, mask, out, lse),
                *(no_seed, no_seed, 0.0),  # no dropout
                [True, True, True, False],  # gradients of q, k and v, not of the mask
                causal,
                scale=scale,
            )
    d_q, d_k, d_v = (grad.transpose(1, 2).to(dtype) for grad in grads[:3])
    return d_q, d_k, d_v, None


def _empty_so_far(mask, T: int, S: int):
    """Which rows (B or 1, H or 1, T) attend no key up to their own."""
    visible = (mask != -math.inf).expand(-1, -1, T, S)
    return (visible & visible.new_ones(T, S).tril()).any(-1).logical_not()


def _flash(q, mask) -> bool:
    return mask is None and q.dtype in (torch.float16, torch.bfloat16)


def _mask(q, k, bias, key_mask, causal):
    """Additive mask (B, H, T, S) in q's dtype, and which rows (B or 1, H or 1, T or 1) have no key.

    Rows without a key attend everything here, and are set to 0 later. The mask is None where there
    is none. The rows are None if there are no such rows and the tensors are on the CPU: only there
    can one look without a wait.
    """
    B, T, H, _ = q.shape
    if bias is None and key_mask is None:
        return None, None
    if bias is None:
        mask = torch.zeros((1, 1, 1, 1), dtype=q.dtype, device=q.device)
    else:
        mask = bias.unsqueeze(0).to(q.dtype)
    # if so, a row is empty only with its whole clip
    only_keys = key_mask is not None and on_cpu(mask) and not (mask == -math.inf).any()
    if key_mask is not None:
        mask = mask.masked_fill(key_mask.logical_not().unsqueeze(1).unsqueeze(1), -math.inf)
    if causal:  # the kernels leave later keys out themselves
        empty = _empty_so_far(mask, T, k.shape[1])
    elif only_keys:
        empty = key_mask.any(-1).logical_not()[:, None, None]
    else:
        empty = (mask == -math.inf).all(-1)
    if on_cpu(mask) and not empty.any():
        return mask.expand(B, H, T, k.shape[1]), None
    mask = mask.masked_fill(empty.unsqueeze(-1), 0.0)
    if q.device.type != "cpu":
        S = mask.shape[-1]
        mask = F.pad(mask, (0, -S % _MASK_ALIGNMENT)).narrow(-1, 0, S)
    return mask.expand(B, H, T, k.shape[1]), empty


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
    if q.device.type not in ("cpu", "cuda"):
        return f"tensors are on {q.device.type}; torch's fused kernels are reached on cpu and cuda"
    if bias_grad:
        return "a trainable bias has no gradient here"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if q.device.type == "cuda":
        return _unsupported_on_cuda(q, bias is None and key_mask is None, deterministic)
    return None


def _unsupported_on_cuda(q, unmasked: bool, deterministic: bool) -> str | None:
    half = q.dtype in (torch.float16, torch.bfloat16)
    if q.dtype == torch.float64:
        return "float64 is for the reference"
    if q.shape[-1] % 8:
        return f"head_dim {q.shape[-1]} is no multiple of 8"
    if half and unmasked and q.shape[-1] > _MAX_FLASH_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is beyond flash attention's {_MAX_FLASH_HEAD_DIM}"
    if half and torch.cuda.is_available() and torch.cuda.get_device_capability(q.device) < (8, 0):
        return "flash attention and bf16 need compute capability 8.0"
    if deterministic and not (half and unmasked):
        return "the memory-efficient backward is not deterministic"
    if deterministic and not torch.are_deterministic_algorithms_enabled():
        return (
            "flash attention is deterministic only under torch.use_deterministic_algorithms(True)"
        )
    return None
