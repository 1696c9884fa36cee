"""What the references need to be written once: the few words in which torch and jax.numpy differ."""

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
    """(B, T, H, D) -> (B, H, T, D), laid out so for torch: its batched products would copy at every use."""
    x = xp.swapaxes(x, 1, 2)
    return x.contiguous() if isinstance(x, torch.Tensor) else x


def softmax(xp, scores, *, holes: bool):
    """softmax over the last axis and its log-sum-exp, the peak less the log of the peak's probability.

    ``holes``: scores may be -inf; a row of nothing else is 0, with -inf.
    """
    peak = xp.amax(scores, axis=-1, keepdims=True)
    if xp is torch:
        p = torch.softmax(scores, -1)  # one pass
    else:
        p = xp.exp(scores - peak)
        p = p / p.sum(-1, keepdims=True)
    top = xp.amax(p, axis=-1, keepdims=True)
    if holes:
        empty = peak == -math.inf
        if not on_cpu(p) or empty.any():  # such a row is nan so far
            p, top = xp.where(empty, 0.0, p), xp.where(empty, 1.0, top)
    return p, (peak - xp.log(top))[..., 0]


def take_rows(xp, x, keep):
    """x (B, N, ...) -> (B, K, ...) for keep (K,) or (B, K); x (1, N, ...) stands for every clip."""
    if isinstance(keep, torch.Tensor):
        if keep.ndim == 1:
            return x.index_select(1, keep)
        keep = keep.long()
    return x[:, keep] if keep.ndim == 1 else x[xp.arange(x.shape[0], **_like(x))[:, None], keep]


def put_rows(xp, rows, keep, count: int):
    """Inverse of ``take_rows``: rows (B, K, D) -> (B, count, D), zeros elsewhere. Indices are distinct: the same bits every time."""
    B, K, D = rows.shape
    if xp is torch:
        index = (
            keep.long() + count * torch.arange(B, device=keep.device)[:, None]
        )  # whole rows: a scatter of elements is 20 times slower
        return (
            rows.new_zeros(B * count, D)
            .index_copy_(0, index.view(-1), rows.reshape(-1, D))
            .view(B, count, D)
        )
    return (
        xp.zeros((B, count, D), rows.dtype)
        .at[xp.arange(B)[:, None], xp.broadcast_to(keep, (B, K))]
        .set(rows)
    )


def _like(x) -> dict:
    return {"device": x.device} if isinstance(x, torch.Tensor) else {}
