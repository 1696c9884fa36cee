"""Raw patches to tokens in one op: DropToken gather, normalisation, projection, position and AGG (paper sections 3.1 and 3.3)."""

import math

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from ..checks import one_device
from ..dispatch import autocast_dtype, choose
from ..drop_token import check_keep_shape
from ..registration import operator
from ..settings import PLAIN, requested
from . import plain
from .patchify import patchify, unpatchify

__all__ = ["patch_embed", "patchify", "unpatchify"]

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
    """Project the kept patches only; dropped ones are neither read nor projected.

        row_n    = patches[keep[n]]                                          # already rows keep[n] when gathered
        tokens_n = (row_n * scale + shift) @ weight.T + bias + position[keep[n]]
        tokens_0 = agg, when given; patches follow from index 1

    The compute dtype is the autocast dtype under autocast, else the weight's. uint8 is exact in bf16; scale and shift are folded:
    W' = scale * W rounded to the compute dtype, b' = b + (shift / scale) * sum(W' as rounded), and the fold is differentiated. uint8 rows
    enter the product as row - 128, as exact, with 128 * sum(W' as rounded) more in b': it costs nothing and grey clips lose nothing.
    A backend may round W alone and put the scale on the product, if b' sums that weight.

    Args:
        patches: (B, N, k) uint8 or float rows, (B, K, k) when gathered; or with ``patch`` a clip (B, T, H, W, C) or waveform (B, S).
        weight: (dim, k) float; bias: (dim,). They stay in their dtype until after the fold.
        position: (N, dim) float, the ready table, after its LayerNorm; or None.
        keep: (K,) or (B, K) int32 or int64, distinct and in range (``drop_token.check_keep``); None keeps all.
        scale, shift: normalise raw values, e.g. 2 / 255 and -1 for uint8 to [-1, 1]. scale is not 0.
        agg: (dim,) float, prepended to every clip; or None.
        patch: patch sizes, (frames, rows, columns) or (samples,); the clip's far end is padded with raw zeros.
        gathered: patches already hold only the rows keep[n].

    Returns:
        tokens (B, [1 +] K, dim) in the compute dtype. Gradients for weight, bias, position, agg, and for float patches.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    _check(patches, weight, bias, position, keep, scale, shift, agg, patch, gathered)
    one_device(
        patches=patches, weight=weight, bias=bias, position=position, keep=keep, agg=agg
    )
    dtype = autocast_dtype(patches.device) or weight.dtype
    name = requested("patch_embed")
    if name == PLAIN:
        return plain.patch_embed(
            patches,
            weight.to(dtype),
            bias.to(dtype),
            None if position is None else position.to(dtype),
            keep,
            scale=scale,
            shift=shift,
            agg=None if agg is None else agg.to(dtype),
            patch=patch,
            gathered=gathered,
        )
    return _patch_embed(
        patches,
        weight,
        bias,
        position,
        keep,
        agg,
        float(scale),
        float(shift),
        list(patch) if patch else None,
        gathered,
        dtype,
        name,
    )


def _check(patches, weight, bias, position, keep, scale, shift, agg, patch, gathered):
    if patch is not None:
        if gathered:
            raise ValueError(
                "gathered says that patches are rows, patch that they are a clip; give one of the two"
            )
        if patches.ndim != {3: 5, 1: 2}.get(len(patch)) or min(patch) < 1:
            raise ValueError(
                f"a clip (B, T, H, W, C) takes a patch of 3 positive sizes, a waveform (B, S) of 1, got {tuple(patches.shape)} and {patch}"
            )
        count, values = _grid_size(patches.shape, patch)
    elif patches.ndim != 3:
        raise ValueError(
            f"patches is {tuple(patches.shape)}; patch_embed takes rows (B, N, k), or a clip together with patch="
        )
    else:
        count, values = patches.shape[1:]
    if 0 in patches.shape:
        raise ValueError(
            f"patches is {tuple(patches.shape)}; every axis needs at least one element"
        )
    if patches.dtype != torch.uint8 and not patches.is_floating_point():
        raise ValueError(f"patches is {patches.dtype}; it must be uint8 or floating point")
    if weight.ndim != 2 or weight.shape[1] != values or not weight.is_floating_point():
        raise ValueError(
            f"weight is {tuple(weight.shape)} {weight.dtype}; it must be float (dim, k) with k = {values}"
        )
    dim = weight.shape[0]
    for name, vector in (("bias", bias), ("agg", agg)):
        if vector is not None and (vector.shape != (dim,) or not vector.is_floating_point()):
            raise ValueError(
                f"{name} is {tuple(vector.shape)} {vector.dtype}; it must be float ({dim},)"
            )
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(shift):
        raise ValueError(
            f"scale is {scale} and shift {shift}; both must be finite and scale not 0: the shift is folded as shift / scale"
        )
    if keep is not None:
        check_keep_shape(keep, patches.shape[0])
        if gathered and keep.shape[-1] != count:
            raise ValueError(
                f"gathered patches have {count} rows, keep has {keep.shape[-1]} indices; they must agree"
            )
    if position is not None:
        rows_known = not gathered or keep is None
        if (
            position.ndim != 2
            or position.shape[1] != dim
            or (rows_known and position.shape[0] != count)
            or not position.is_floating_point()
        ):
            N = count if rows_known else "N"
            raise ValueError(
                f"position is {tuple(position.shape)} {position.dtype}; it must be float (N, dim) = ({N}, {dim})"
            )


def _grid_size(shape, patch) -> tuple[int, int]:
    """Number of patches of clips of ``shape``, and values in each."""
    count = math.prod(
        [-(-size // p) for size, p in zip(shape[1:], patch, strict=False)]
    )  # a list: dynamo traces no generator here
    return count, math.prod(patch) * math.prod(shape[1 + len(patch) :])


def _forward(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    keep: Tensor | None,
    agg: Tensor | None,
    scale: float,
    shift: float,
    patch: list[int] | None,
    gathered: bool,
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    options = dict(
        position=position,
        keep=keep,
        agg=agg,
        scale=scale,
        shift=shift,
        patch=patch,
        gathered=gathered,
        dtype=dtype,
    )
    return (
        choose("patch_embed", "fwd", backend, patches, weight, bias, **options)
        .forward(patches, weight, bias, **options)
        .contiguous()
    )


def _num_tokens(patches_shape, keep_shape, agg, patch) -> int:
    count = patches_shape[1] if patch is None else _grid_size(patches_shape, patch)[0]
    return (count if keep_shape is None else keep_shape[-1]) + (agg is not None)


def _fake_forward(
    patches, weight, bias, position, keep, agg, scale, shift, patch, gathered, dtype, backend
):
    tokens = _num_tokens(patches.shape, None if keep is None else keep.shape, agg, patch)
    return weight.new_empty((patches.shape[0], tokens, weight.shape[0]), dtype=dtype)


def _backward(
    d_tokens: Tensor,
    patches: Tensor,
    weight: Tensor,
    bias: Tensor,
    position: Tensor | None,
    keep: Tensor | None,
    agg: Tensor | None,
    scale: float,
    shift: float,
    patch: list[int] | None,
    gathered: bool,
    d_patches: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    options = dict(
        position=position,
        keep=keep,
        agg=agg,
        scale=scale,
        shift=shift,
        patch=patch,
        gathered=gathered,
        dtype=d_tokens.dtype,
    )
    module = choose("patch_embed", "bwd", backend, patches, weight, bias, **options)
    grads = module.backward(d_tokens, patches, weight, bias, **options, d_patches=d_patches)
    like = (patches, weight, bias, position, agg)
    # absent gradients travel as empty tensors
    return tuple(
        weight.new_empty(0) if g is None or x is None else g.to(x.dtype).contiguous()
        for g, x in zip(grads, like, strict=True)
    )  # type: ignore[return-value]


def _fake_backward(
    d_tokens,
    patches,
    weight,
    bias,
    position,
    keep,
    agg,
    scale,
    shift,
    patch,
    gathered,
    d_patches,
    backend,
):
    like = (patches if d_patches else None, weight, bias, position, agg)
    return tuple(weight.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


def _save(ctx, inputs, output):
    patches, weight, bias, position, keep, agg, *ctx.options, _, ctx.backend = inputs
    ctx.save_for_backward(
        patches, weight, bias, position, keep, agg
    )  # raw patches, never float copies
    ctx.d_patches = patches.is_floating_point() and patches.requires_grad


def _differentiate(ctx, d_tokens):
    patches, weight, bias, position, keep, agg = ctx.saved_tensors
    d_patches, d_weight, d_bias, d_position, d_agg = _patch_embed_backward(
        d_tokens,
        patches,
        weight,
        bias,
        position,
        keep,
        agg,
        *ctx.options,
        ctx.d_patches,
        ctx.backend,
    )
    return (
        d_patches if ctx.d_patches else None,
        d_weight,
        d_bias,
        None if position is None else d_position,
        None,
        None if agg is None else d_agg,
        *[None] * 6,
    )


def _refuse(ctx, *_):
    raise NotImplementedError(
        "patch_embed has no second derivative; for one, write it with torch.nn.functional.linear"
    )


_patch_embed = operator("patch_embed", _forward, _fake_forward, _differentiate, _save)
_patch_embed_backward = operator("patch_embed_backward", _backward, _fake_backward, _refuse)


def _products(patches_shape, weight_shape, keep_shape, patch) -> int:
    return (
        patches_shape[0]
        * _num_tokens(patches_shape, keep_shape, None, patch)
        * weight_shape[0]
        * weight_shape[1]
    )


@register_flop_formula(torch.ops.vatt_fast.patch_embed)
def _flops(
    patches_shape,
    weight_shape,
    bias_shape,
    position_shape,
    keep_shape,
    agg_shape,
    scale,
    shift,
    patch,
    *args,
    out_shape=None,
    **kw,
) -> int:
    return 2 * _products(patches_shape, weight_shape, keep_shape, patch)


@register_flop_formula(torch.ops.vatt_fast.patch_embed_backward)
def _backward_flops(
    d_tokens_shape, patches_shape, weight_shape, bias_shape, position_shape, keep_shape, agg_shape, scale, shift, patch, gathered, d_patches,
    *args, out_shape=None, **kw,
) -> int:  # fmt: skip
    return (4 if d_patches else 2) * _products(patches_shape, weight_shape, keep_shape, patch)
