"""Row, column and positive log-sums of a contrastive batch from one score matrix that is never asked for (paper section 3.4)."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import one_device
from ..dispatch import autocast_dtype, choose
from ..registration import operator
from ..settings import PLAIN, requested
from . import plain

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
) -> tuple[Tensor, Tensor, Tensor]:
    """The three log-sums from which every published NCE form is a few lines.

        S      = scale * x @ y^T                                       # (M, N * P)
        row_i  = logsumexp of S[i, j] over all valid texts j
        col_j  = logsumexp of S[i, j] over the given valid clips i     # partial: devices join theirs by a logsumexp
        pos_i  = logsumexp of S[i, j] over clip i's own valid texts

    Args:
        x: (M, D) float: clips first .. first + M - 1 of N. y: (N * P, D): all texts, clip-major. Cast to the autocast dtype under autocast;
            products are summed in fp32 (fp64 for fp64).
        scale: 1 / temperature, a float or a scalar tensor (with gradient).
        texts_per_clip: P.
        first: index of x's first clip among the N.
        x_valid: (M,) bool; False takes a clip out of col.
        y_valid: (N * P,) bool; False takes a text out of row, col and pos.
        bound: a promise that abs(S) <= bound (unit vectors: the scale's cap), which spares kernels the running maximum.

    Returns:
        row (M,), col (N * P,), pos (M,) fp32 (fp64 for fp64), differentiable in x, y and scale. An empty set is -inf with zero
        gradient, whatever gradient it receives.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit; or the backend asked for cannot run them.
    """
    if dtype := autocast_dtype(x.device):
        x, y = x.to(dtype), y.to(dtype)
    _check(x, y, texts_per_clip, first, x_valid, y_valid)
    wide = torch.promote_types(x.dtype, torch.float32)
    scale = (
        scale.to(wide)
        if isinstance(scale, Tensor)
        else torch.full((), scale, dtype=wide, device=x.device)
    )
    if scale.ndim:
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; it must be a float or a scalar tensor"
        )
    one_device(x=x, y=y, scale=scale, x_valid=x_valid, y_valid=y_valid)
    if requested("contrastive_lse") == PLAIN:
        return plain.contrastive_lse(
            x, y, scale=scale, texts_per_clip=texts_per_clip, first=first, x_valid=x_valid, y_valid=y_valid
        )
    bound = math.inf if bound is None else float(bound)
    return _contrastive_lse(
        x, y, scale, x_valid, y_valid, texts_per_clip, first, bound, requested("contrastive_lse")
    )


def _check(x, y, texts_per_clip, first, x_valid, y_valid):
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            f"contrastive_lse takes x (M, D) and y (N * P, D), none empty, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not x.is_floating_point() or x.dtype != y.dtype:
        raise ValueError(
            f"x is {x.dtype} and y {y.dtype}; they must share one floating point dtype"
        )
    if texts_per_clip < 1 or y.shape[0] % texts_per_clip:
        raise ValueError(
            f"y has {y.shape[0]} rows; they must be a multiple of texts_per_clip = {texts_per_clip}"
        )
    if first < 0 or first + x.shape[0] > y.shape[0] // texts_per_clip:
        raise ValueError(
            f"x holds clips {first} .. {first + x.shape[0] - 1}, but y has texts of {y.shape[0] // texts_per_clip} clips; check first and texts_per_clip"
        )
    for name, valid, count in (("x_valid", x_valid, x.shape[0]), ("y_valid", y_valid, y.shape[0])):
        if valid is not None and (valid.shape != (count,) or valid.dtype != torch.bool):
            raise ValueError(
                f"{name} is {tuple(valid.shape)} {valid.dtype}; it must be bool ({count},)"
            )


def _forward(
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    texts_per_clip: int,
    first: int,
    bound: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = dict(
        scale=scale,
        texts_per_clip=texts_per_clip,
        first=first,
        x_valid=x_valid,
        y_valid=y_valid,
        bound=bound,
    )
    row, col, pos = choose("contrastive_lse", "fwd", backend, x, y, **options).forward(
        x, y, **options
    )
    return row, col, pos


def _fake_forward(x, y, scale, x_valid, y_valid, texts_per_clip, first, bound, backend):
    return scale.new_empty(x.shape[0]), scale.new_empty(y.shape[0]), scale.new_empty(x.shape[0])


def _backward(
    d_row: Tensor,
    d_col: Tensor,
    d_pos: Tensor,
    x: Tensor,
    y: Tensor,
    scale: Tensor,
    x_valid: Tensor | None,
    y_valid: Tensor | None,
    row: Tensor,
    col: Tensor,
    pos: Tensor,
    texts_per_clip: int,
    first: int,
    bound: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    options = dict(
        scale=scale,
        texts_per_clip=texts_per_clip,
        first=first,
        x_valid=x_valid,
        y_valid=y_valid,
        bound=bound,
    )
    module = choose("contrastive_lse", "bwd", backend, x, y, **options)
    d_x, d_y, d_scale = module.backward(d_row, d_col, d_pos, x, y, row, col, pos, **options)
    return d_x.to(x.dtype), d_y.to(y.dtype), d_scale


def _fake_backward(
    d_row,
    d_col,
    d_pos,
    x,
    y,
    scale,
    x_valid,
    y_valid,
    row,
    col,
    pos,
    texts_per_clip,
    first,
    bound,
    backend,
):
    return x.new_empty(x.shape), y.new_empty(y.shape), scale.new_empty(())


def _save(ctx, inputs, output):
    x, y, scale, x_valid, y_valid, ctx.texts_per_clip, ctx.first, ctx.bound, ctx.backend = inputs
    ctx.save_for_backward(x, y, scale, x_valid, y_valid, *output)


def _differentiate(ctx, d_row, d_col, d_pos):
    grads = _contrastive_lse_backward(
        d_row,
        d_col,
        d_pos,
        *ctx.saved_tensors,
        ctx.texts_per_clip,
        ctx.first,
        ctx.bound,
        ctx.backend,
    )
    return *grads, None, None, None, None, None, None


def _refuse(ctx, *_):
    raise NotImplementedError(
        "contrastive_lse has no second derivative; for one, write it with torch.logsumexp"
    )


_contrastive_lse = operator("contrastive_lse", _forward, _fake_forward, _differentiate, _save)
_contrastive_lse_backward = operator("contrastive_lse_backward", _backward, _fake_backward, _refuse)


@register_flop_formula(torch.ops.vatt_fast.contrastive_lse)
def _flops(x_shape, y_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * x_shape[0] * y_shape[0] * x_shape[1]


@register_flop_formula(torch.ops.vatt_fast.contrastive_lse_backward)
def _backward_flops(
    d_row_shape, d_col_shape, d_pos_shape, x_shape, y_shape, *args, out_shape=None, **kwargs
) -> int:
    return 6 * x_shape[0] * y_shape[0] * x_shape[1]  # the scores again, d_x, d_y
