"""The contrastive log-sums as one would write them today on torch's own ops: backend ``plain``."""

import math

import torch
from torch import Tensor

# M clips of x, N clips in all, P texts a clip, D dimensions


def contrastive_lse(
    x: Tensor,
    y: Tensor,
    *,
    scale: Tensor | float,
    texts_per_clip: int = 1,
    first: int = 0,
    x_valid: Tensor | None = None,
    y_valid: Tensor | None = None,
    bound: float | None = None,
    exclude_own: bool = False,
    extra_texts: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """row, col and pos of the op; scores in fp32 after a product in the inputs' dtype."""
    scores = (x @ y.T).to(torch.promote_types(x.dtype, torch.float32)) * scale
    if y_valid is not None:
        scores = scores.masked_fill(~y_valid, -math.inf)
    of_valid = scores if x_valid is None else scores.masked_fill(~x_valid[:, None], -math.inf)
    own = torch.arange(x.shape[0] * texts_per_clip, device=x.device).view(-1, texts_per_clip)
    places = first * texts_per_clip + own
    own = scores.gather(1, places)
    if exclude_own:
        scores, of_valid = (s.scatter(1, places, -math.inf) for s in (scores, of_valid))
    return torch.logsumexp(scores, 1), torch.logsumexp(of_valid, 0), torch.logsumexp(own, 1)


def contrastive_lse_in_one_dtype(
    x: Tensor,
    y: Tensor,
    *,
    scale: Tensor | float,
    texts_per_clip: int = 1,
    first: int = 0,
    x_valid: Tensor | None = None,
    y_valid: Tensor | None = None,
    bound: float | None = None,
    exclude_own: bool = False,
    extra_texts: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Three masked log-sums with everything in the inputs' dtype: the yardstick.

    An empty set is -inf and passes no gradient, which torch's logsumexp alone does not promise.
    """
    scores = (x @ y.T) * scale
    M, texts = scores.shape
    in_row = torch.ones_like(scores, dtype=torch.bool) if y_valid is None else y_valid
    in_row = in_row.expand_as(scores)
    in_col = in_row if x_valid is None else in_row & x_valid[:, None]
    clip_of_x = first + torch.arange(M, device=scores.device)
    clip_of_y = torch.arange(texts, device=scores.device) // texts_per_clip
    is_own = clip_of_x[:, None] == clip_of_y
    own = in_row & is_own
    if exclude_own:
        in_row, in_col = in_row & ~is_own, in_col & ~is_own
    return _logsumexp(scores, in_row, 1), _logsumexp(scores, in_col, 0), _logsumexp(scores, own, 1)


def _logsumexp(scores: Tensor, inside: Tensor, axis: int) -> Tensor:
    """Over the scores inside; -inf without gradient where there are none."""
    empty = ~inside.any(axis)
    lse = torch.logsumexp(scores.masked_fill(~(inside | empty.unsqueeze(axis)), -math.inf), axis)
    return lse.masked_fill(empty, -math.inf)
