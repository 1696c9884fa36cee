"""Patch projection as one would write it today on torch's own ops: backend ``plain``, yardstick."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..drop_token.plain import drop_token

# B batch, N patches, K kept, k values a patch


def patch_embed(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None = None,
    keep: Tensor | None = None,
    *,
    scale: float,
    shift: float,
    agg: Tensor | None = None,
    patch: tuple[int, ...] | None = None,
    gathered: bool = False,
) -> Tensor:
    """Gather the kept rows, normalise, project, add the position; in the weight's dtype."""
    if patch is not None:
        patches = _cut(patches, patch)
    if keep is not None and not gathered:
        patches = drop_token(patches, keep)
    tokens = F.linear(patches.to(weight.dtype) * scale + shift, weight, bias)
    if position is not None:
        tokens = tokens + (position if keep is None else position[keep.long()])
    if agg is None:
        return tokens
    return torch.cat([agg.expand(tokens.shape[0], 1, -1), tokens], 1)


def _cut(clip: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Clips (B, T, H, W, C) or (B, S) as rows (B, N, k), the far end padded with zeros."""
    axes = len(patch)
    padding = [0, 0] * (clip.ndim - 1 - axes)
    for size, p in reversed(list(zip(clip.shape[1:], patch, strict=False))):
        padding += [0, -size % p]
    clip = F.pad(clip, padding)
    for axis, p in enumerate(patch, start=1):
        clip = clip.unfold(axis, p, p)  # the axis counts patches, a new last one their values
    if clip.ndim > 1 + 2 * axes:
        clip = clip.movedim(1 + axes, -1)  # channels vary fastest inside a row
    return clip.flatten(1 + axes).flatten(1, axes)
