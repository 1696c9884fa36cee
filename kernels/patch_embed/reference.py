"""Patch projection as one reads it: gather, one matmul with the folded weight, add.

For torch and jax.numpy, any float type.
"""

import torch

from ..numerics import cast, put_rows, take_rows, wide
from .patchify import patchify, unpatchify

# B batch, N patches, K kept, k values a patch


def fold(xp, weight, bias, scale, shift, dtype, centre):
    """(row * scale + shift) @ weight.T + bias as (row - centre) @ folded.T + folded_bias.

    folded_bias sums the folded weight after its rounding.
    """
    folded = cast(scale * wide(xp, weight), dtype)
    return folded, wide(xp, bias) + (shift / scale + centre) * wide(xp, folded).sum(1)


def forward(
    patches,
    weight,
    bias,
    *,
    position=None,
    keep=None,
    agg=None,
    scale,
    shift,
    patch=None,
    gathered=False,
    dtype,
    xp=torch,
):
    centre = _centre(xp, patches)
    rows = cast(_rows(xp, patches, keep, patch, gathered), dtype) - centre  # (B, K, k)
    folded, folded_bias = fold(xp, weight, bias, scale, shift, dtype, centre)
    tokens = wide(xp, rows @ folded.T) + folded_bias
    if position is not None:
        tokens = tokens + (position if keep is None else take_rows(xp, position[None], keep))
    if agg is not None:
        agg = xp.broadcast_to(cast(agg, tokens.dtype), (tokens.shape[0], 1, tokens.shape[2]))
        tokens = xp.concatenate([agg, tokens], axis=1)
    return cast(tokens, dtype)


def backward(
    d_tokens,
    patches,
    weight,
    bias,
    *,
    position=None,
    keep=None,
    agg=None,
    scale,
    shift,
    patch=None,
    gathered=False,
    dtype,
    d_patches=False,
    xp=torch,
):
    """d_patches (None unless asked for), d_weight, d_bias, d_position, d_agg (None if absent)."""
    d_agg = None
    if agg is not None:
        d_agg, d_tokens = wide(xp, d_tokens[:, 0]).sum(0), d_tokens[:, 1:]
    centre = _centre(xp, patches)
    rows = cast(_rows(xp, patches, keep, patch, gathered), dtype) - centre
    d_bias = wide(xp, d_tokens).sum((0, 1))
    # wide: sums of raw values overflow fp16
    d_folded = xp.einsum("bkd,bkv->dv", wide(xp, d_tokens), wide(xp, rows))
    d_weight = scale * d_folded + (shift + centre * scale) * d_bias[:, None]
    d_position = None if position is None else _d_position(xp, d_tokens, keep, position.shape[0])
    d_input = None
    if d_patches:
        d_input = d_tokens @ fold(xp, weight, bias, scale, shift, dtype, centre)[0]
        if keep is not None and not gathered:
            count = patches.shape[1] if patch is None else _num_patches(patches, patch)
            d_input = put_rows(xp, d_input, keep, count)
        if patch is not None:
            d_input = unpatchify(d_input, patch, tuple(patches.shape[1:]))
    return d_input, d_weight, d_bias, d_position, d_agg


def _centre(xp, patches) -> float:
    """Subtracted from raw values before the product: 0 .. 255 becomes -128 .. 127, exact in bf16.

    Without a centre, product and folded shift nearly cancel on grey clips, and their roundings
    stay.
    """
    return 128.0 if patches.dtype == xp.uint8 else 0.0


def _rows(xp, patches, keep, patch, gathered):
    if patch is not None:
        patches = patchify(patches, patch)
    return patches if keep is None or gathered else take_rows(xp, patches, keep)


def _num_patches(clip, patch) -> int:
    count = 1
    for size, p in zip(clip.shape[1:], patch, strict=False):
        count *= -(-size // p)
    return count


def _d_position(xp, d_tokens, keep, count: int):
    """Sums over clips, in the same order whatever keep is."""
    d_tokens = wide(xp, d_tokens)
    if keep is None:
        return d_tokens.sum(0)
    if keep.ndim == 1:
        return put_rows(xp, d_tokens.sum(0)[None], keep, count)[0]
    return put_rows(xp, d_tokens, keep, count).sum(0)


def unsupported(
    patches,
    weight,
    bias,
    position=None,
    keep=None,
    *,
    scale,
    shift,
    agg=None,
    patch=None,
    gathered=False,
    dtype=None,
) -> str | None:
    return None
