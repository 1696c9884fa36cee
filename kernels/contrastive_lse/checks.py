"""Shapes and dtypes that contrastive_lse takes, for torch tensors and JAX arrays alike."""

from typing import Any

from ..checks import is_bool, is_float, shown

# M clips of x, N clips in all, P texts a clip, D dimensions


def check(
    x: Any,
    y: Any,
    texts_per_clip: int,
    first: int | None,
    x_valid: Any,
    y_valid: Any,
    extra_texts: int = 0,
) -> None:
    """Raise ValueError unless contrastive_lse can take these. A ``first`` of None is not known."""
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            "contrastive_lse takes x (M, D) and y (N * P + extra_texts, D), none empty,"
            f" got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if not is_float(x) or x.dtype != y.dtype:
        raise ValueError(
            f"x is {x.dtype} and y {y.dtype}; they must share one floating point dtype"
        )
    owned = y.shape[0] - extra_texts
    if texts_per_clip < 1 or extra_texts < 0 or owned < 0 or owned % texts_per_clip:
        beside = f" beside extra_texts = {extra_texts}" if extra_texts else ""
        raise ValueError(
            f"y has {y.shape[0]} rows; they must be a multiple of"
            f" texts_per_clip = {texts_per_clip}{beside}"
        )
    M, clips = x.shape[0], owned // texts_per_clip
    if first is not None and (first < 0 or first + M > clips):
        raise ValueError(
            f"x holds clips {first} .. {first + M - 1}, but y has texts of {clips} clips;"
            " check first and texts_per_clip"
        )
    for name, valid, count in (("x_valid", x_valid, M), ("y_valid", y_valid, y.shape[0])):
        if valid is not None and (tuple(valid.shape) != (count,) or not is_bool(valid)):
            raise ValueError(f"{name} is {shown(valid)}; it must be bool ({count},)")


def check_scale(scale: Any) -> None:
    """Raise ValueError unless scale, a tensor or an array, is one number: () or (1,)."""
    if tuple(scale.shape) not in ((), (1,)):
        raise ValueError(
            f"scale has shape {tuple(scale.shape)}; it must be a float or a tensor () or (1,)"
        )
