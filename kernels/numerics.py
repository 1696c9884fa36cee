"""The few functions in which torch and jax.numpy differ, so that each reference is written once."""

import math

import torch


def cast(x, dtype):
    return x.to(dtype) if isinstance(x, torch.Tensor) else x.astype(dtype)


def on_cpu(x) -> bool:
    """A torch tensor whose values can be asked for without a wait."""
    return isinstance(x, torch.Tensor) and x.device.type == "cpu"


def wide(xp, x):
    """x in the dtype of statistics: fp32, or fp64 for fp64 inputs."""
    return cast(x, xp.promote_types(x.dtype, xp.float32))


def heads_first(xp, x):
    """(B, T, H, D) -> (B, H, T, D).

    For torch a copy in that layout: its batched products would copy at every use.
    """
    x = xp.swapaxes(x, 1, 2)
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def softmax(xp, scores, *, may_be_empty: bool):
    """softmax over the last axis, and its log-sum-exp: the maximum less the log of its probability.

    ``may_be_empty``: scores may be -inf; a row of nothing else is 0, with log-sum-exp -inf.
    """
    row_max = xp.amax(scores, axis=-1, keepdims=True)
    if xp is torch:
        p = torch.softmax(scores, -1)  # one pass
    else:
        p = xp.exp(scores - row_max)
        p = p / p.sum(-1, keepdims=True)
    top = xp.amax(p, axis=-1, keepdims=True)
    if may_be_empty:
        empty = row_max == -math.inf
        if not on_cpu(p) or empty.any():  # such a row is nan so far
            p, top = xp.where(empty, 0.0, p), xp.where(empty, 1.0, top)
    return p, (row_max - xp.log(top))[..., 0]


def take_rows(xp, x, keep):
    """x (B, N, ...) -> (B, K, ...) for keep (K,) or (B, K); x (1, N, ...) stands for every clip."""
    if isinstance(keep, torch.Tensor):
        if keep.ndim == 1:
            return x.index_select(1, keep)
        keep = keep.long()
    return x[:, keep] if keep.ndim == 1 else x[xp.arange(x.shape[0], **_like(x))[:, None], keep]


def put_rows(xp, rows, keep, count: int):
    """Inverse of ``take_rows``: rows (B, K, D) -> (B, count, D), zeros elsewhere.

    Indices are distinct, so it gives the same bits every time.
    """
    B, K, D = rows.shape
    if xp is torch:
        # whole rows: a scatter of elements is 20 times slower
        index = keep.long() + count * torch.arange(B, device=keep.device)[:, None]
        result = rows.new_zeros(B * count, D)
        result.index_copy_(0, index.view(-1), rows.reshape(-1, D))
        return result.view(B, count, D)
    index = xp.arange(B)[:, None], xp.broadcast_to(keep, (B, K))
    return xp.zeros((B, count, D), rows.dtype).at[index].set(rows)


def _like(x) -> dict:
    return {"device": x.device} if isinstance(x, torch.Tensor) else {}
