"""The contrastive log-sums as one reads them: with the whole score matrix.

For torch and jax.numpy, any float type.
"""

import math

import torch

from ..numerics import wide

# M clips of x, N clips in all, P texts a clip, D dimensions


def forward(
    x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None, xp=torch
):
    rows, cols, own = _scores(xp, x, y, scale, texts_per_clip, first, x_valid, y_valid)[1:]
    return _logsumexp(xp, rows, 1), _logsumexp(xp, cols, 0), _logsumexp(xp, own, 1)


def backward(
    d_row,
    d_col,
    d_pos,
    x,
    y,
    row,
    col,
    pos,
    *,
    scale,
    texts_per_clip,
    first,
    x_valid=None,
    y_valid=None,
    bound=None,
    xp=torch,
):
    cosines, rows, cols, own = _scores(xp, x, y, scale, texts_per_clip, first, x_valid, y_valid)
    # an empty set's weights are 0, whatever gradient comes in
    d_row, d_col, d_pos = (
        xp.where(lse == -math.inf, 0.0, d_lse)
        for lse, d_lse in ((row, d_row), (col, d_col), (pos, d_pos))
    )
    row, col, pos = (xp.where(lse == -math.inf, math.inf, lse) for lse in (row, col, pos))
    weights = xp.exp(rows - row[:, None]) * d_row[:, None]
    weights += xp.exp(cols - col[None]) * d_col[None]
    weights += xp.exp(own - pos[:, None]) * d_pos[:, None]  # d loss / d scores, (M, N * P)
    d_scale = (weights * cosines).sum()
    return scale * (weights @ wide(xp, y)), scale * (weights.T @ wide(xp, x)), d_scale


def _scores(xp, x, y, scale, texts_per_clip, first, x_valid, y_valid):
    """Products (M, N * P), then three times the scores: for row, col and pos.

    Scores outside a row's, a column's and the own texts' set are -inf.
    """
    cosines = wide(xp, x) @ wide(xp, y).T
    place = {"device": x.device} if xp is torch else {}
    scores = scale * cosines
    rows = scores if y_valid is None else xp.where(y_valid[None], scores, -math.inf)
    cols = rows if x_valid is None else xp.where(x_valid[:, None], rows, -math.inf)
    clip_of_x = first + xp.arange(x.shape[0], **place)
    clip_of_y = xp.arange(y.shape[0], **place) // texts_per_clip
    own = xp.where(clip_of_x[:, None] == clip_of_y[None], rows, -math.inf)
    return cosines, rows, cols, own


def _logsumexp(xp, scores, axis):
    m = xp.amax(scores, axis=axis, keepdims=True)
    l = xp.exp(scores - xp.where(m == -math.inf, 0.0, m)).sum(axis)
    return xp.log(l) + xp.squeeze(m, axis)


def unsupported(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> str | None:
    return None
