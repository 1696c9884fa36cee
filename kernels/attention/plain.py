"""Attention as one would write it today on torch's own ops: the backend ``plain``."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# B batch, T queries, S keys, H heads, D head_dim


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, None]:
    """out (B, T, H, D), and None in place of lse, which torch's attention does not give."""
    mask = None if bias is None else bias[None].to(q.dtype)  # SDPA's kernels take 4 axes
    if key_mask is not None:
        visible = key_mask[:, None, None, :]
        if mask is None:
            mask = visible
        else:
            mask = mask.masked_fill(~visible, -math.inf)
    if causal and mask is not None:  # SDPA takes the one or the other
        seen = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        mask = mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, -math.inf)
        causal = False
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return out.transpose(1, 2), None


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """The softmax written out: out (B, T, H, D) and lse (B, H, T) in q's dtype. The yardstick.

    A row without a key is 0 with lse -inf, and passes no gradient.
    """
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if bias is not None:
        scores = scores + bias
    if key_mask is None:
        key_mask = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool, device=q.device)
    seen = key_mask[:, None, None, :]
    if causal:
        seen = seen & torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
    keyless = ~seen.any(-1)
    visible = seen | keyless[..., None]
    scores = scores.masked_fill(~visible, -math.inf)
    p = torch.softmax(scores, -1).masked_fill(keyless[..., None], 0)
    lse = torch.logsumexp(scores, -1).masked_fill(keyless, -math.inf)
    return torch.einsum("bhts,bshd->bthd", p, v), lse
