"""The contrastive log-sums over the texts of other clips, made of those over all of them.

One may not take exp(own) away from exp(row): where own texts dominate, nothing is left. So each
block of clips runs twice: against the texts of clips beyond the block, by any backend, and against
the block's own texts, with a matrix of scores of bounded size. The two are joined. For torch and
jax.numpy alike.
"""

import math

import torch
import torch.nn.functional as F

from ..numerics import wide

# M clips of x, N clips in all, P texts a clip, T texts, b clips of a block

BLOCK_TEXTS = 512  # of a block: one number a clip and text of it is kept for the backward


def contrastive_lse(lse, x, y, scale, x_valid, y_valid, texts_per_clip, first, xp=torch):
    """row (M,), col (T,), pos (M,), as the op has them with ``exclude_own``.

    Args:
        lse: (clips of x, their x_valid, y_valid (T,), the first clip) -> row, col, pos.
        first: an int; in JAX perhaps a traced scalar.
    """
    M, T, P = x.shape[0], y.shape[0], texts_per_clip
    text = xp.arange(T, **({"device": x.device} if xp is torch else {}))
    clip_of_text = text // P
    y_valid = clip_of_text >= 0 if y_valid is None else y_valid
    x_valid = xp.ones_like(x[:, 0], dtype=bool) if x_valid is None else x_valid
    step = max(1, BLOCK_TEXTS // P)
    rows, near_cols, far_cols, own = [], [], [], []
    for at in range(0, M, step):
        block, counts = x[at : at + step], x_valid[at : at + step]
        b = block.shape[0]
        start, texts = (first + at) * P, text[: b * P]
        row, col, pos = _within(
            *(xp, block, _part(y, start, texts), scale),
            *(counts, _part(y_valid, start, texts), P, text),
        )
        if b * P < T:
            beyond = (clip_of_text < first + at) | (clip_of_text >= first + at + b)
            far_row, far_col, _ = lse(block, counts, y_valid & beyond, first + at)
            row = _logsumexp(xp, xp.stack((row, far_row)), 0)
            far_cols.append(far_col)
        rows.append(row)
        near_cols.append(col)
        own.append(pos)
    near = _placed(xp, xp.concatenate(near_cols), first * P, T)
    col = _logsumexp(xp, xp.stack((near, *far_cols)), 0) if far_cols else near
    return xp.concatenate(rows), col, xp.concatenate(own)


def _within(xp, x, y, scale, x_valid, y_valid, P, text):
    """row (b,), col (b * P,), pos (b,) of b clips against their own texts y (b * P, D)."""
    scores = scale * (wide(xp, x) @ wide(xp, y).T)
    b, texts = scores.shape
    own = text[:b, None] == text[None, :texts] // P
    valid = xp.broadcast_to(y_valid[None], (b, texts))
    in_row = valid & ~own
    return (
        _logsumexp(xp, scores, 1, in_row),
        _logsumexp(xp, scores, 0, in_row & x_valid[:, None]),
        _logsumexp(xp, scores, 1, valid & own),
    )


def _logsumexp(xp, scores, axis, inside=None):
    """Over the scores inside, and above -inf; of none it is -inf, and passes no gradient."""
    inside = scores > -math.inf if inside is None else inside
    empty = ~inside.any(axis)
    shown = xp.expand_dims(empty, axis) if xp is not torch else empty.unsqueeze(axis)
    kept = xp.where(inside, scores, -math.inf)
    kept = xp.where(shown, 0.0, kept)
    top = xp.amax(kept, axis=axis, keepdims=True)
    top = top.detach() if xp is torch else _constant(top)
    lse = xp.log(xp.exp(kept - top).sum(axis)) + xp.squeeze(top, axis)
    return xp.where(empty, -math.inf, lse)


def _constant(x):
    import jax

    return jax.lax.stop_gradient(x)


def _part(x, start, texts):
    """As many rows as ``texts`` has, from ``start`` on."""
    if isinstance(x, torch.Tensor):
        return x[start : start + texts.shape[0]]
    return x[start + texts]


def _placed(xp, col, start, T: int):
    """(T,) with col from ``start`` on, and -inf elsewhere."""
    if xp is torch:
        return F.pad(col, (start, T - start - col.shape[0]), value=-math.inf)
    return xp.full((T,), -math.inf, col.dtype).at[start + xp.arange(col.shape[0])].set(col)
