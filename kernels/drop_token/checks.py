"""Shapes and dtypes that drop_token takes, for torch tensors and JAX arrays alike."""

from typing import Any

from ..checks import is_index, shown

# B batch, K kept


def check(tokens: Any, keep: Any) -> None:
    """Raise ValueError unless drop_token can take these."""
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(
            f"tokens is {tuple(tokens.shape)}; drop_token takes (B, N, dim), no axis empty"
        )
    check_keep_shape(keep, tokens.shape[0])


def check_keep_shape(keep: Any, batch: int) -> None:
    """Raise ValueError unless keep can be indices of ``batch`` clips. Values are not looked at."""
    fits = (
        keep.ndim in (1, 2) and 0 not in keep.shape and (keep.ndim == 1 or keep.shape[0] == batch)
    )
    if not is_index(keep) or not fits:
        raise ValueError(
            f"keep is {shown(keep)}; it must be int32 or int64, (K,) or (B, K) with B = {batch}"
            " and at least one index"
        )
