"""Raw patches to tokens in one op (VATT, sections 3.1 and 3.3).

DropToken gather, normalisation, projection, position and AGG.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import one_device
from ..dispatch import autocast_dtype
from ..registration import Operator
from ..settings import PLAIN, requested
from . import plain
from .checks import check, grid_size
from .flops import flops

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

        row_n    = patches[keep[n]]                            # already rows keep[n] when gathered
        tokens_n = (row_n * scale + shift) @ weight.T + bias + position[keep[n]]
        tokens_0 = agg, when given; patches follow from index 1

    The compute dtype is the autocast dtype under autocast, else the weight's. uint8 is exact in
    bf16. Scale and shift are folded: W' = scale * W rounded to the compute dtype, b' = b + (shift /
    scale) * sum(W' as rounded), and the fold is differentiated. uint8 rows enter the product as row
    - 128, as exact, with 128 * sum(W' as rounded) more in b': it costs nothing and grey clips lose
    nothing. A backend may round W alone and put the scale on the product, if b' sums that weight.

    Args:
        patches: (B, N, k) uint8 or float rows, (B, K, k) when gathered; or with ``patch`` a clip
            (B, T, H, W, C) or waveform (B, S).
        weight: (dim, k) float; bias: (dim,). They stay in their dtype until after the fold.
        position: (N, dim) float, the ready table, after its LayerNorm; or None.
        keep: (K,) or (B, K) int32 or int64, distinct and in range (``drop_token.check_keep``); None
            keeps all.
        scale, shift: normalise raw values, e.g. 2 / 255 and -1 for uint8 to [-1, 1]. scale is not
            0.
        agg: (dim,) float, prepended to every clip; or None.
        patch: patch sizes, (frames, rows, columns) or (samples,); the clip's far end is padded with
            raw zeros.
        gathered: patches already hold only the rows keep[n].

    Returns:
        tokens (B, [1 +] K, dim) in the compute dtype. Gradients for weight, bias, position, agg,
        and for float patches.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    check(patches, weight, bias, position, keep, agg, scale, shift, patch, gathered)
    one_device(patches=patches, weight=weight, bias=bias, position=position, keep=keep, agg=agg)
    dtype = autocast_dtype(patches.device) or weight.dtype
    backend = requested("patch_embed")
    if backend == PLAIN:
        position = None if position is None else position.to(dtype)
        options: dict[str, Any] = dict(scale=scale, shift=shift, patch=patch, gathered=gathered)
        options["agg"] = None if agg is None else agg.to(dtype)
        weight, bias = weight.to(dtype), bias.to(dtype)
        return plain.patch_embed(patches, weight, bias, position, keep, **options)
    d_patches = patches.is_floating_point() and patches.requires_grad and torch.is_grad_enabled()
    sizes = list(patch) if patch else None
    tensors = (patches, weight, bias, position, keep, agg)
    normal = (float(scale), float(shift))
    return _patch_embed(*tensors, *normal, sizes, gathered, dtype, d_patches, backend)


class _Arguments(NamedTuple):
    patches: Tensor
    weight: Tensor
    bias: Tensor
    position: Tensor | None
    keep: Tensor | None
    agg: Tensor | None
    scale: float
    shift: float
    patch: list[int] | None
    gathered: bool
    dtype: torch.dtype
    d_patches: bool


def _rows(patches_shape, keep_shape, patch) -> int:
    """Projected a clip."""
    if keep_shape is not None:
        return keep_shape[-1]
    return patches_shape[1] if patch is None else grid_size(patches_shape, patch)[0]


def _fake(given: _Arguments) -> Tensor:
    keep_shape = None if given.keep is None else given.keep.shape
    tokens = _rows(given.patches.shape, keep_shape, given.patch) + (given.agg is not None)
    shape = (given.patches.shape[0], tokens, given.weight.shape[0])
    return given.weight.new_empty(shape, dtype=given.dtype)


def _flops(mode: str, shapes: Any) -> int:
    rows, (dim, values) = _rows(shapes.patches, shapes.keep, shapes.patch), shapes.weight
    return flops(mode, shapes.patches[0], rows, values, dim, d_patches=shapes.d_patches)


_patch_embed = Operator(
    "patch_embed",
    _Arguments,
    _fake,
    _flops,
    tensors=3,
    outputs=("tokens",),
    gradients=("patches", "weight", "bias", "position", "agg"),
    wanted={"patches": "d_patches"},
    instead="write it with torch.nn.functional.linear",
).call
