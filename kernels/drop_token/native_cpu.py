"""DropToken's gather and scatter on a CPU: whole rows, by all threads (csrc/drop_token.cpp).

Backward writes every row of the gradient once, a kept token's or zeros.
"""

import torch

from .. import native

# B batch, N tokens, K kept


def forward(tokens, keep):
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    kept = tokens.new_empty((tokens.shape[0], keep.shape[-1], tokens.shape[2]))
    keep = keep.long().contiguous()
    stride_b, stride_n = (stride * tokens.element_size() for stride in tokens.stride()[:2])
    native.extension.drop_token_take(
        tokens.data_ptr(), stride_b, stride_n, kept.data_ptr(), *_rows(kept, keep, tokens.shape[1])
    )
    return kept


def backward(d_kept, keep, num_tokens):
    d_kept, keep = d_kept.contiguous(), keep.long().contiguous()
    d_tokens = d_kept.new_empty((d_kept.shape[0], num_tokens, d_kept.shape[2]))
    inverse = keep.new_empty(
        (d_kept.shape[0] if keep.ndim == 2 else 1, num_tokens), dtype=torch.int32
    )
    native.extension.drop_token_put(
        d_kept.data_ptr(), d_tokens.data_ptr(), inverse.data_ptr(), *_rows(d_kept, keep, num_tokens)
    )
    return d_tokens


def _rows(kept, keep, num_tokens: int) -> tuple[int, ...]:
    """KeptRows in csrc/drop_token.h."""
    B, K, dim = kept.shape
    keep_stride = K if keep.ndim == 2 else 0
    return (
        keep.data_ptr(),
        keep_stride,
        B,
        num_tokens,
        K,
        dim * kept.element_size(),
        torch.get_num_threads(),
    )


def unsupported(tokens, keep) -> str | None:
    if native.extension is None:
        return native.explain()
    if tokens.device.type != "cpu":
        return f"tensors are on {tokens.device.type}, not on the CPU"
    return None
