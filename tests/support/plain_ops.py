"""The four ops as a reader of the paper would first write them, in plain torch with torch's own autograd.

In fp64 they are the ground truth of the op tests, in a kernel's dtype the yardstick of what that dtype can do. They share nothing with the
references. Arguments are the ops' own.
"""

import math

import torch
import torch.nn.functional as F


def attention(q, k, v, *, scale, bias=None, key_mask=None):
    """out in q's dtype, lse. A row without a key is 0, -inf, and passes no gradient."""
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if bias is not None:
        scores = scores + bias
    if key_mask is None:
        key_mask = torch.ones(q.shape[0], k.shape[1], dtype=torch.bool)
    keyless = ~key_mask.any(1)[:, None, None]
    visible = key_mask[:, None, None, :] | keyless[..., None]
    scores = scores.masked_fill(~visible, -math.inf)
    p = torch.softmax(scores, -1).masked_fill(keyless[..., None], 0)
    lse = torch.logsumexp(scores, -1).masked_fill(keyless, -math.inf)
    return torch.einsum("bhts,bshd->bthd", p, v), lse


def drop_token(tokens, keep):
    return torch.stack(
        [clip[rows.long()] for clip, rows in zip(tokens, keep.expand(len(tokens), -1), strict=True)]
    )


def contrastive_lse(x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None):
    """row, col, pos; an empty set is -inf and passes no gradient."""
    S = (x @ y.T) * scale
    x_valid = torch.ones(x.shape[0], dtype=torch.bool) if x_valid is None else x_valid
    y_valid = torch.ones(y.shape[0], dtype=torch.bool) if y_valid is None else y_valid
    clip = torch.arange(y.shape[0]).unflatten(0, (-1, texts_per_clip))  # the texts of each clip
    own = torch.zeros_like(S, dtype=torch.bool)
    for i in range(x.shape[0]):
        own[i, clip[first + i]] = True
    sets = {
        "row": (y_valid.expand_as(S), 1),
        "col": (x_valid[:, None] & y_valid, 0),
        "pos": (own & y_valid, 1),
    }
    return tuple(_logsumexp_of(S, inside, axis) for inside, axis in sets.values())


def _logsumexp_of(S, inside, axis):
    empty = ~inside.any(axis)
    lse = torch.logsumexp(S.masked_fill(~(inside | empty.unsqueeze(axis)), -math.inf), axis)
    return lse.masked_fill(empty, -math.inf)


def patch_embed(
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
):
    dtype = weight.dtype
    if patch is not None:
        patches = _cut(patches, patch)
    if keep is not None and not gathered:
        patches = drop_token(patches, keep)
    tokens = F.linear(patches.to(dtype) * scale + shift, weight, bias)
    if position is not None:
        tokens = tokens + (position if keep is None else position[keep.long()])
    if agg is None:
        return tokens
    return torch.cat([agg.expand(tokens.shape[0], 1, -1), tokens], 1)


def _cut(clip, patch):
    """Patch rows by loops over the grid, the far end padded with zeros."""
    axes = len(patch)
    short = [-size % p for size, p in zip(clip.shape[1:], patch, strict=False)]
    clip = F.pad(
        clip,
        [0, 0] * (clip.ndim - 1 - axes) + [n for amount in reversed(short) for n in (0, amount)],
    )
    starts = [range(0, size, p) for size, p in zip(clip.shape[1:], patch, strict=False)]
    corners = (
        torch.cartesian_prod(*(torch.tensor(s) for s in starts)).view(-1, axes).tolist()
    )  # row-major
    return torch.stack(
        [
            clip[
                (slice(None), *(slice(c, c + p) for c, p in zip(corner, patch, strict=True)))
            ].flatten(1)
            for corner in corners
        ],
        1,
    )
