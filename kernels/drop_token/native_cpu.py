"""DropToken's gather and scatter on a CPU: whole rows, by all threads (csrc/drop_token.cpp).

Backward writes every row of the gradient once, a kept token's or zeros.
"""

import torch

from .. import native
from ..native import address

# B batch, N tokens, K kept


def forward(tokens, keep):
    tokens = tokens if tokens.stride(2) == 1 else tokens.contiguous()
    kept = tokens.new_empty((tokens.shape[0], keep.shape[-1], tokens.shape[2]))
    keep = keep.long().contiguous()
    stride_b, stride_n = (stride * tokens.element_size() for stride in tokens.stride()[:2])
    native.extension.drop_token_take(
        tokens=address(tokens),
        stride_b=stride_b,
        stride_n=stride_n,
        kept=address(kept),
        **_rows(kept, keep, tokens.shape[1]),
    )
    return kept


def backward(d_kept, keep, num_tokens):
    d_kept, keep = d_kept.contiguous(), keep.long().contiguous()
    d_tokens = d_kept.new_empty((d_kept.shape[0], num_tokens, d_kept.shape[2]))
    lines = d_kept.shape[0] if keep.ndim == 2 else 1
    inverse = keep.new_empty((lines, num_tokens), dtype=torch.int32)
    native.extension.drop_token_put(
        kept=address(d_kept),
        tokens=address(d_tokens),
        inverse=address(inverse),
        **_rows(d_kept, keep, num_tokens),
    )
    return d_tokens


def _rows(kept, keep, num_tokens: int) -> dict[str, int]:
    """KeptRows in csrc/drop_token.h."""
    B, K, dim = kept.shape
    return dict(
        keep=address(keep),
        keep_stride=K if keep.ndim == 2 else 0,
        B=B,
        N=num_tokens,
        K=K,
        row_bytes=dim * kept.element_size(),
        threads=torch.get_num_threads(),
    )


def unsupported(tokens, keep) -> str | None:
    if native.extension is None:
        return native.explain()
    if tokens.device.type != "cpu":
        return f"tensors are on {tokens.device.type}, not on the CPU"
    return None
