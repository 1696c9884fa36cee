"""Shapes and dtypes that patch_embed takes, for torch tensors and JAX arrays alike."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..checks import is_float, shown
from ..drop_token.checks import check_keep_shape

# B batch, N patches, K kept, k values a patch


def check(
    patches: Any,
    weight: Any,
    bias: Any,
    position: Any,
    keep: Any,
    agg: Any,
    scale: float,
    shift: float,
    patch: Sequence[int] | None,
    gathered: bool,
) -> None:
    """Raise ValueError unless patch_embed can take these."""
    count, values = _check_patches(patches, patch, gathered)
    if weight.ndim != 2 or weight.shape[1] != values or not is_float(weight):
        raise ValueError(f"weight is {shown(weight)}; it must be float (dim, k) with k = {values}")
    dim = weight.shape[0]
    if bias is None:
        raise ValueError(f"bias is None; it must be float ({dim},), zeros for none")
    for name, vector in (("bias", bias), ("agg", agg)):
        if vector is not None and (tuple(vector.shape) != (dim,) or not is_float(vector)):
            raise ValueError(f"{name} is {shown(vector)}; it must be float ({dim},)")
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(shift):
        raise ValueError(
            f"scale is {scale} and shift {shift}; both must be finite and scale not 0:"
            " the shift is folded as shift / scale"
        )
    if keep is not None:
        check_keep_shape(keep, patches.shape[0])
        if gathered and keep.shape[-1] != count:
            raise ValueError(
                f"gathered patches have {count} rows, keep has {keep.shape[-1]} indices;"
                " they must agree"
            )
    if position is not None:
        known = not gathered or keep is None  # N is the number of patches
        alike = position.ndim == 2 and position.shape[1] == dim and is_float(position)
        if not alike or (known and position.shape[0] != count):
            raise ValueError(
                f"position is {shown(position)};"
                f" it must be float (N, dim) = ({count if known else 'N'}, {dim})"
            )


def _check_patches(patches: Any, patch: Sequence[int] | None, gathered: bool) -> tuple[int, int]:
    """Rows a clip has, and values in each."""
    if patch is not None:
        if gathered:
            raise ValueError(
                "gathered says that patches are rows, patch that they are a clip;"
                " give one of the two"
            )
        if patches.ndim != {3: 5, 1: 2}.get(len(patch)) or min(patch) < 1:
            raise ValueError(
                "a clip (B, T, H, W, C) takes a patch of 3 positive sizes, a waveform (B, S) of 1,"
                f" got {tuple(patches.shape)} and {patch}"
            )
        count, values = grid_size(patches.shape, patch)
    elif patches.ndim != 3:
        raise ValueError(
            f"patches is {tuple(patches.shape)}; patch_embed takes rows (B, N, k),"
            " or a clip together with patch="
        )
    else:
        count, values = patches.shape[1:]
    if 0 in patches.shape:
        raise ValueError(
            f"patches is {tuple(patches.shape)}; every axis needs at least one element"
        )
    raw = patches.dtype == (torch.uint8 if isinstance(patches, torch.Tensor) else "uint8")
    if not raw and not is_float(patches):
        raise ValueError(f"patches is {patches.dtype}; it must be uint8 or floating point")
    return count, values


def grid_size(shape: Sequence[int], patch: Sequence[int]) -> tuple[int, int]:
    """Number of patches of clips of ``shape``, and values in each."""
    # a list: dynamo traces no generator here
    count = math.prod([-(-size // p) for size, p in zip(shape[1:], patch, strict=False)])
    return count, math.prod(patch) * math.prod(shape[1 + len(patch) :])
