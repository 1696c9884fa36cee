"""DropToken as one would write it today on torch's own ops: backend ``plain`` and yardstick."""

from torch import Tensor

# B batch, N tokens, K kept


def drop_token(tokens: Tensor, keep: Tensor) -> Tensor:
    """tokens (B, N, ...) and keep (K,) or (B, K) -> (B, K, ...)."""
    if keep.ndim == 1:
        return tokens.index_select(1, keep)
    index = keep.long()[..., None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index)
