"""What the references need to be written once: the few words in which torch and jax.numpy differ."""

import torch


def cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) else x.astype(dtype)


def wide(xp, x):
    """x in the dtype of statistics: fp32, or fp64 for fp64 inputs."""
    return cast(x, xp.promote_types(x.dtype, xp.float32))


def take_rows(xp, x, keep):
    """x (B, N, ...) -> (B, K, ...) for keep (K,) or (B, K)."""
    keep = keep.long() if isinstance(keep, torch.Tensor) else keep
    return x[:, keep] if keep.ndim == 1 else x[xp.arange(x.shape[0], **_like(x))[:, None], keep]


def put_rows(xp, rows, keep, count: int):
    """Inverse of ``take_rows``: rows (B, K, D) -> (B, count, D), zeros elsewhere. Indices are distinct: the same bits every time."""
    B, K, D = rows.shape
    if xp is torch:
        index = keep.long().expand(B, K)[..., None].expand(B, K, D)
        return rows.new_zeros(B, count, D).scatter_(1, index, rows)
    return xp.zeros((B, count, D), rows.dtype).at[xp.arange(B)[:, None], xp.broadcast_to(keep, (B, K))].set(rows)


def _like(x) -> dict:
    return {"device": x.device} if isinstance(x, torch.Tensor) else {}
