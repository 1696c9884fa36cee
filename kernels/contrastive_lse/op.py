"""Row, column and positive log-sums of a contrastive batch (VATT, section 3.4).

They come from one score matrix, which is never stored.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import one_device
from ..dispatch import autocast_dtype
from ..registration import Operator
from ..settings import PLAIN, requested
from . import others, plain
from .checks import check, check_scale
from .flops import flops

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
    """The three log-sums from which every published NCE form is a few lines.

        S      = scale * x @ y^T                                       # (M, N * P [+ extra])
        row_i  = logsumexp of S[i, j] over all valid texts j
        col_j  = logsumexp of S[i, j] over the given valid clips i     # devices join theirs
        pos_i  = logsumexp of S[i, j] over clip i's own valid texts

    ``col`` is partial where x holds some of the clips: devices join theirs by a logsumexp.

    Args:
        x: (M, D) float: clips first .. first + M - 1 of N. y: (N * P, D): all texts, clip-major,
            and then ``extra_texts`` more. Cast to the autocast dtype under autocast; products are
            summed in fp32 (fp64 for fp64).
        scale: 1 / temperature, a float or a tensor () or (1,) (with gradient).
        texts_per_clip: P.
        first: index of x's first clip among the N.
        x_valid: (M,) bool; False takes a clip out of col.
        y_valid: bool, one a row of y; False takes a text out of row, col and pos.
        bound: a promise that abs(S) <= bound (unit vectors: the scale's cap), which spares kernels
            the running maximum.
        exclude_own: leave a clip's own texts out of its row, and it out of their col; pos stays.
            So the negatives stand alone: with y = x, NT-Xent's (Chen et al. 2020).
        extra_texts: so many last rows of y belong to no clip: negatives of all (hard negatives).

    Returns:
        row (M,), col (a row of y each), pos (M,) fp32 (fp64 for fp64), differentiable in x, y
            and scale. An empty set is -inf with zero gradient, whatever gradient it receives.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit; or the backend asked for cannot run
            them.
    """
    if dtype := autocast_dtype(x.device):
        x, y = x.to(dtype), y.to(dtype)
    check(x, y, texts_per_clip, first, x_valid, y_valid, extra_texts)
    wide = torch.promote_types(x.dtype, torch.float32)
    if isinstance(scale, Tensor):
        scale = scale.to(wide)
    else:
        scale = torch.full((), scale, dtype=wide, device=x.device)
    check_scale(scale)
    scale = scale.reshape(())
    one_device(x=x, y=y, scale=scale, x_valid=x_valid, y_valid=y_valid)
    bound = math.inf if bound is None else float(bound)
    backend = requested("contrastive_lse")
    if backend == PLAIN:
        sets = dict(texts_per_clip=texts_per_clip, first=first, x_valid=x_valid, y_valid=y_valid)
        sets["exclude_own"] = exclude_own
        return plain.contrastive_lse(x, y, scale=scale, **sets)  # type: ignore[arg-type]
    if exclude_own:

        def lse(x, x_valid, y_valid, at):
            return _contrastive_lse(
                x, y, scale, x_valid, y_valid, texts_per_clip, at, bound, backend
            )

        return others.contrastive_lse(lse, x, y, scale, x_valid, y_valid, texts_per_clip, first)
    return _contrastive_lse(x, y, scale, x_valid, y_valid, texts_per_clip, first, bound, backend)


class _Arguments(NamedTuple):
    x: Tensor
    y: Tensor
    scale: Tensor
    x_valid: Tensor | None
    y_valid: Tensor | None
    texts_per_clip: int
    first: int
    bound: float


def _fake(given: _Arguments) -> tuple[Tensor, Tensor, Tensor]:
    M, texts = given.x.shape[0], given.y.shape[0]
    new = given.scale.new_empty
    return new(M), new(texts), new(M)


def _flops(mode: str, shapes: Any) -> int:
    return flops(mode, shapes.x[0], shapes.y[0], shapes.x[1])


_contrastive_lse = Operator(
    "contrastive_lse",
    _Arguments,
    _fake,
    _flops,
    tensors=2,
    outputs=("row", "col", "pos"),
    gradients=("x", "y", "scale"),
    saved=("row", "col", "pos"),
    instead="write it with torch.logsumexp",
).call
