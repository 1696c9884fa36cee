"""Attention of transformers 5: ``attn_implementation="vatt_fast"``.

    from vatt_fast.integrations.transformers import NAME, register   # NAME is "vatt_fast"

    register()
    model = AutoModel.from_pretrained("google/vit-base-patch16-224", attn_implementation=NAME)

Queries, keys and values arrive as views of (B, T, H, head_dim), which is our layout: nothing is
copied. Padding stays a mask of keys (B, S). What the op does not take (dropout while training,
grouped heads, masks of four axes, soft-capping) goes to transformers' ``sdpa``, and is said once.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    sdpa_mask,
)

from ..kernels import attention
from .fallback import say

NAME = "vatt_fast"

# what another function of attention would add to the scores, or take from them
_CHANGES_SCORES = ("softcap", "position_bias", "s_aux", "sliding_window")

# B batch, T queries, S keys, H heads


def register() -> None:
    """Make ``attn_implementation="vatt_fast"`` known to every model of transformers."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, mask)


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function.

    Args:
        query: (B, H, T, head_dim); key, value: (B, H, S, head_dim).
        attention_mask: what ``mask`` returned, or a user's own.

    Returns:
        out (B, T, H, head_dim), and None in place of the probabilities.
    """
    causal = _is_causal(module, query, attention_mask, is_causal)
    reason = _unsupported(module, query, key, value, attention_mask, dropout, causal, options)
    if reason is not None:
        say(f"{NAME} in {type(module).__name__}", "transformers' sdpa", reason)
        return sdpa_attention_forward(
            *(module, query, key, value, _four_axes(attention_mask, query.shape[2])),
            dropout=dropout,
            scaling=scaling,
            is_causal=is_causal,
            **options,
        )
    key_mask = None if attention_mask is None else attention_mask.flatten(1)
    out, _ = attention(
        *(x.transpose(1, 2) for x in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        key_mask=key_mask,
        causal=causal,
    )
    return out, None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> Tensor | None:
    """transformers' mask function: which keys may be attended, bool, True = attend.

    Returns:
        (B, S) for attention in both directions, (B, 1, S) for causal attention, None where there is
        nothing to say; and sdpa's (B, 1, T, S) for every other pattern.
    """
    causal = mask_function is causal_mask_function
    plain = causal or mask_function is bidirectional_mask_function
    aligned = not causal or (q_length == kv_length and q_offset == kv_offset)
    skip = allow_is_causal_skip if causal else allow_is_bidirectional_skip
    whole = attention_mask is None or tuple(attention_mask.shape) == (batch_size, kv_length)
    if plain and aligned and not use_vmap and whole and (causal or skip):
        if attention_mask is not None:
            keys = attention_mask.to(device=device, dtype=torch.bool)
            return keys[:, None] if causal else keys
        if skip:
            return None
        return torch.ones(batch_size, 1, kv_length, dtype=torch.bool, device=device)
    return sdpa_mask(
        *(batch_size, q_length, kv_length, q_offset, kv_offset),
        mask_function=mask_function,
        attention_mask=attention_mask,
        allow_is_causal_skip=allow_is_causal_skip,
        allow_is_bidirectional_skip=allow_is_bidirectional_skip,
        use_vmap=use_vmap,
        device=device,
        **options,
    )


def _is_causal(module, query, attention_mask, is_causal) -> bool:
    """As sdpa decides it: a mask says it itself, else the keyword, else the module."""
    if attention_mask is not None:
        return attention_mask.ndim == 3
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    return bool(is_causal) and query.shape[2] > 1


def _unsupported(module, query, key, value, attention_mask, dropout, causal, options):
    """Why the op does not take this call, or None."""
    if dropout:
        return f"it has no dropout of probabilities ({dropout}); set attention dropout to 0"
    if query.shape[1] != key.shape[1] or getattr(module, "num_key_value_groups", 1) > 1:
        return "it has no grouped heads"
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        return "keys and values, or queries and keys, differ in size"
    if not query.dtype == key.dtype == value.dtype:
        return f"dtypes differ: {query.dtype}, {key.dtype}, {value.dtype}"
    if attention_mask is not None and attention_mask.ndim > 3:
        return f"the mask has {attention_mask.ndim} axes; it takes one of keys (B, S)"
    if causal and query.shape[2] != key.shape[2]:
        return "causal attention has as many queries as keys"
    if options.get("cache") is not None:
        return "it has no paged cache"
    for name in _CHANGES_SCORES:
        if options.get(name) is not None:
            return f"it has no {name}"
    if options.get("output_attentions"):
        return "it returns no probabilities"
    return None


def _four_axes(attention_mask: Tensor | None, queries: int) -> Tensor | None:
    """Our mask of keys as sdpa takes it: (B, 1, 1 or T, S)."""
    if attention_mask is None or attention_mask.ndim > 3:
        return attention_mask
    keys = attention_mask.flatten(1)[:, None, None]
    if attention_mask.ndim == 2:
        return keys
    return keys & keys.new_ones(queries, keys.shape[-1]).tril()
