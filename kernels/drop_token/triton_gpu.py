"""DropToken on tokens in Triton: a gather, and its scatter.

The scatter writes the zeros of dropped tokens in the same pass. Elements are moved as integers of
their size: exact in every dtype, NaN payloads included, and one kernel for all dtypes of a size.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..tiles import Tiles
from ..triton_common import arch, unsupported_operands

# B batch, N tokens, K kept


@triton.jit(
    do_not_specialize=["N", "K", "keep_stride"],
    do_not_specialize_on_alignment=["keep"],
)
def _forward_kernel(
    tokens,
    keep,
    kept,
    N,
    K,
    dim,
    keep_stride,
    stride_b,
    stride_n,
    stride_d,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program: BLOCK_ROWS kept rows of one clip by BLOCK_DIM columns.

    tokens (B, N, dim) strided, keep (K,) or (B, K), kept (B, K, dim).
    """
    b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    row = tl.load(keep + b * keep_stride + n, mask=n < K, other=0).to(tl.int64)
    inside = (n < K)[:, None] & (d < dim)[None, :]
    columns = d.to(tl.int64)[None, :]
    source = tokens + b * stride_b + row[:, None] * stride_n + columns * stride_d
    values = tl.load(source, mask=inside)
    tl.store(kept + (b * K + n)[:, None] * dim + d[None, :], values, mask=inside)


def forward(tokens, keep):
    B, N, dim = tokens.shape
    K, dtype = keep.shape[-1], tokens.dtype
    tokens, keep = _as_integers(tokens), keep.contiguous()
    kept = torch.empty((B, K, dim), dtype=tokens.dtype, device=tokens.device)
    blocks = _choose("forward", tokens.element_size(), K, dim)
    grid = (triton.cdiv(K, blocks["BLOCK_ROWS"]), triton.cdiv(dim, blocks["BLOCK_DIM"]), B)
    keep_stride = K if keep.ndim == 2 else 0
    _forward_kernel[grid](tokens, keep, kept, N, K, dim, keep_stride, *tokens.stride(), **blocks)
    return kept.view(dtype)


@triton.jit(
    do_not_specialize=["N", "K", "keep_stride"],
    do_not_specialize_on_alignment=["keep"],
)
def _backward_kernel(
    d_kept,
    keep,
    d_tokens,
    N,
    K,
    dim,
    keep_stride,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_KEEP: tl.constexpr,
):
    """One program: BLOCK_ROWS tokens of one clip, all columns.

    d_kept (B, K, dim), keep (K,) or (B, K), d_tokens (B, N, dim). Each token is looked up in the
    whole of keep: that costs little beside the traffic of a row, needs no table, and keep need not
    be sorted.
    """
    b = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    found = tl.full([BLOCK_ROWS, BLOCK_KEEP], -1, tl.int32)
    for n0 in range(0, K, BLOCK_KEEP):
        n = n0 + tl.arange(0, BLOCK_KEEP)
        index = tl.load(keep + b * keep_stride + n, mask=n < K, other=-1).to(tl.int32)
        found = tl.where(index[None, :] == token[:, None], n[None, :], found)
    row = tl.max(found, 1)  # -1: dropped
    source = d_kept + (b * K + tl.maximum(row, 0))[:, None] * dim
    target = d_tokens + (b * N + token)[:, None] * dim
    for d0 in range(0, dim, BLOCK_DIM):
        d = d0 + tl.arange(0, BLOCK_DIM)
        inside = (token < N)[:, None] & (d < dim)[None, :]
        values = tl.load(source + d[None, :], mask=inside & (row >= 0)[:, None], other=0)
        tl.store(target + d[None, :], values, mask=inside)


def backward(d_kept, keep, num_tokens):
    (B, K, dim), dtype = d_kept.shape, d_kept.dtype
    d_kept, keep = _as_integers(d_kept.contiguous()), keep.contiguous()
    d_tokens = torch.empty((B, num_tokens, dim), dtype=d_kept.dtype, device=d_kept.device)
    blocks = _choose("backward", d_kept.element_size(), num_tokens, dim)
    grid = (triton.cdiv(num_tokens, blocks["BLOCK_ROWS"]), B)
    keep_stride = K if keep.ndim == 2 else 0
    _backward_kernel[grid](d_kept, keep, d_tokens, num_tokens, K, dim, keep_stride, **blocks)
    return d_tokens.view(dtype)


_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _as_integers(x):
    return x.view(_INTEGERS[x.element_size()])


def _choose(kernel: str, itemsize: int, rows: int, dim: int) -> Tiles:
    # tables know only the floats; row_bytes tells the element sizes apart
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    heuristic = _heuristic(kernel, itemsize, dim)
    shape = dict(rows=rows, row_bytes=dim * itemsize)
    return tiles.choose(f"drop_token_{kernel}", arch(), dtype, heuristic, **shape)


def _heuristic(kernel: str, itemsize: int, dim: int) -> Tiles:
    """Whole rows where they fit 2 KiB, and 8 KiB a tile.

    So 4 warps have four 16-byte accesses a thread in flight.
    """
    columns = min(triton.next_power_of_2(dim), 2048 // itemsize)
    rows = max(1, 8192 // (columns * itemsize))
    if kernel == "forward":
        return {"BLOCK_ROWS": min(rows, 32), "BLOCK_DIM": columns, "num_warps": 4}
    return {"BLOCK_ROWS": min(rows, 16), "BLOCK_DIM": columns, "BLOCK_KEEP": 128, "num_warps": 4}


TUNING: dict[str, list[Tiles]] = {
    "drop_token_forward": [
        {"BLOCK_ROWS": rows, "BLOCK_DIM": columns, "num_warps": warps}
        for rows, columns in (
            *((1, 1024), (2, 1024), (4, 1024), (8, 1024)),
            *((4, 512), (8, 512), (16, 512), (16, 256)),
        )
        for warps in (2, 4, 8)
    ],
    "drop_token_backward": [
        {"BLOCK_ROWS": rows, "BLOCK_DIM": columns, "BLOCK_KEEP": keep, "num_warps": warps}
        for rows, columns in ((4, 1024), (8, 1024), (16, 512))
        for keep in (128, 256)
        for warps in (2, 4, 8)
    ],
}


def unsupported(tokens, keep) -> str | None:
    size = tokens.element_size()
    if size not in _INTEGERS:
        return (
            f"tokens is {tokens.dtype}, {size} bytes an element; it moves elements of up to 8 bytes"
        )
    if tokens.shape[0] > 65535:
        return f"{tokens.shape[0]} clips; a grid has room for 65535"
    return unsupported_operands(_as_integers(tokens), keep)
