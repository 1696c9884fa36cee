"""Raw patches to tokens in Triton: the product gathers the kept rows itself.

Position and AGG are added as the tokens are written. There are two ways, and the tile table's
PACKED chooses. Fused (0): one kernel multiplies the raw rows. Packed (1): kept rows are written
out once in the compute dtype, torch.mm (cuBLAS) multiplies them, and a last kernel adds in place.
Neither reads dropped patches. Tile sizes: triton_tiles.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .. import tiles
from ..numerics import put_rows
from ..tiles import Tiles
from ..triton_common import BF16_INTERPRETED, arch, dot_precision, interpreted, unsupported_operands
from . import triton_tiles
from .dtypes import unsupported_dtypes
from .patchify import unpatchify
from .triton_tiles import TUNING  # noqa: F401 (read by the tuner)

# B batch, N patches, K kept, k values a patch; A 1 with AGG, else 0; R = B K rows of all clips,
# row r is row r % K of clip r // K. A clip's axes are frames T, lines H, columns W, channels; a
# waveform is columns alone; rows (B, N, k) have stride_t between them.

# Sizes vary from batch to batch, and keep may be a slice of others': kernels have no code of their
# own for K = 1 or keep at an address of 16 bytes. Strides keep it, since wide loads rest on them.


@triton.jit
def _corners(
    b,
    n,
    stride_b,
    stride_t,
    stride_h,
    stride_w,
    H,
    W,
    CLIP: tl.constexpr,
    FRAMES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Offset of the first value of patches n of clips b, and its frame, line and column."""
    offset = b.to(tl.int64) * stride_b
    t, y, x = n, n, n
    if CLIP:
        across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, LINES)
        t = n // (across * down) * FRAMES
        y = n // across % down * LINES
        x = n % across * COLUMNS
        offset += y.to(tl.int64) * stride_h + x.to(tl.int64) * stride_w
    return offset + t.to(tl.int64) * stride_t, t, y, x


# Two uint8 u to bf16 u - 128, in half the instructions of the compiler's conversion. In bf16 0x4300
# is 128, and its last bit is worth 1: with the low bits of u it is a = 128 + u % 128. What is left
# to subtract is b: 128 where u has its high bit, else 256, which is 0x4380. All is exact.
CENTRED_BF16 = tl.constexpr("""{
    .reg .b32 pair, a, b, minus;
    cvt.u32.u16 pair, $1;
    mov.b32 minus, 0xbf80bf80;
    prmt.b32 pair, pair, 0x43, 0x4140;
    and.b32 a, pair, 0xff7fff7f;
    lop3.b32 b, pair, 0x00800080, 0xff80ff80, 0x28;
    fma.rn.bf16x2 $0, b, minus, a;
}""")


@triton.jit
def _load_rows(
    patches,
    corner,  # of _corners, and t0, y0, x0
    t0,
    y0,
    x0,
    v,
    k,
    stride_t,
    stride_h,
    stride_w,
    stride_c,
    T,
    H,
    W,
    CLIP: tl.constexpr,
    DENSE: tl.constexpr,
    PADDED: tl.constexpr,
    EVEN: tl.constexpr,
    FRAMES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHANNELS: tl.constexpr,
    DTYPE: tl.constexpr,
    BY_HAND: tl.constexpr = False,
):
    """Values v of the patches at ``corner``, (rows, values) in DTYPE, less the centre.

    So uint8 0 .. 255 becomes -128 .. 127. CLIP: values run over frames, lines, columns, channels
    of a clip. DENSE: columns and channels lie in one run. PADDED: the grid passes the clip's far
    end, where raw values are 0. EVEN: no v passes k. BY_HAND: convert by
    CENTRED_BF16.
    """
    inside = (v < k)[None, :]
    if CLIP:
        t = v // (LINES * COLUMNS * CHANNELS)
        y = v // (COLUMNS * CHANNELS) % LINES
        across = v % (COLUMNS * CHANNELS)
        x = across // CHANNELS
        offset = t.to(tl.int64) * stride_t + y.to(tl.int64) * stride_h
        if DENSE:
            offset += across
        else:
            offset += x.to(tl.int64) * stride_w + (across % CHANNELS).to(tl.int64) * stride_c
        pointer = patches + corner[:, None] + offset[None, :]
        if PADDED:
            inside &= t0[:, None] + t[None, :] < T
            inside &= y0[:, None] + y[None, :] < H
            inside &= x0[:, None] + x[None, :] < W
    else:
        pointer = patches + corner[:, None] + v[None, :]
    if EVEN and not PADDED:
        raw = tl.load(pointer)
    else:
        raw = tl.load(pointer, mask=inside, other=0)
    if BY_HAND:
        values = tl.inline_asm_elementwise(
            CENTRED_BF16, "=r,h", [raw], tl.bfloat16, is_pure=True, pack=2
        )
    elif patches.dtype.element_ty == tl.uint8:
        # raw - 128 in one operation; four values convert at a time
        values = (raw ^ 128).to(tl.int8, bitcast=True).to(DTYPE)
    else:
        values = raw.to(DTYPE)
    return values


# -- forward -----------------------------------------------------------------------------------


@triton.jit
def _fold_kernel(
    weight,
    bias,
    folded,
    folded_bias,
    scale,
    factor,
    dim,
    k,
    weight_stride,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """One program: BLOCK_DIM rows of the weight (dim, k).

    folded = scale * weight, rounded; folded_bias = bias + factor * the row sums of folded.
    """
    d = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM, BLOCK_VALUES], tl.float32)
    for v0 in range(0, k, BLOCK_VALUES):
        v = v0 + tl.arange(0, BLOCK_VALUES)
        inside = (d < dim)[:, None] & (v < k)[None, :]
        pointers = weight + d.to(tl.int64)[:, None] * weight_stride + v[None, :]
        w = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        rounded = (w * scale).to(folded.dtype.element_ty)
        tl.store(folded + d.to(tl.int64)[:, None] * k + v[None, :], rounded, mask=inside)
        total += rounded.to(tl.float32)
    start = tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(folded_bias + d, start + factor * tl.sum(total, 1), mask=d < dim)


@triton.jit(
    do_not_specialize=["R", "K", "keep_stride", "T", "H", "W"],
    do_not_specialize_on_alignment=["keep"],
)
def _forward_kernel(
    patches, keep, weight, bias, position, agg, tokens, scale, factor,
    R, K, k, dim, keep_stride, weight_stride, position_stride,
    stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W,  # of patches
    KEPT: tl.constexpr, GATHERED: tl.constexpr, POSITION: tl.constexpr, AGG: tl.constexpr,
    CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr, FOLD: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr,
    BY_HAND: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS kept rows, of any clips, by BLOCK_DIM columns of tokens.

    tokens is (B, A + K, dim). The program that holds a clip's first row also writes AGG. FOLD: the
    weight comes as it is and is scaled and rounded here, which spares a launch where k is small.
    SUM: the bias is folded here too. BY_HAND: as ``_load_rows`` says.
    """
    tiles_across = tl.cdiv(dim, BLOCK_DIM)
    r = tl.program_id(0) // tiles_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(0) % tiles_across * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    DTYPE: tl.constexpr = tokens.dtype.element_ty
    # the last tile repeats the edge instead of masking its loads
    row, column = tl.minimum(r, R - 1), tl.minimum(d, dim - 1)
    b, n = row // K, row % K
    patch = n
    if KEPT:
        patch = tl.load(keep + b.to(tl.int64) * keep_stride + n).to(tl.int32)
    source = n if GATHERED else patch
    corner, t0, y0, x0 = _corners(
        b, source, stride_b, stride_t, stride_h, stride_w, H, W, CLIP, FRAMES, LINES, COLUMNS
    )
    inside = (r < R)[:, None] & (d < dim)[None, :]
    start = tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)
    acc = tl.broadcast_to(start[None, :], [BLOCK_ROWS, BLOCK_DIM])
    if POSITION:  # first: added after the product, it would need twice the registers
        pointers = position + patch.to(tl.int64)[:, None] * position_stride + d[None, :]
        acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    for v0 in range(0, k, BLOCK_VALUES):
        v = v0 + tl.arange(0, BLOCK_VALUES)
        x = _load_rows(
            *(patches, corner, t0, y0, x0, v, k),
            *(stride_t, stride_h, stride_w, stride_c, T, H, W),
            *(CLIP, DENSE, PADDED, EVEN),
            *(FRAMES, LINES, COLUMNS, CHANNELS, DTYPE, BY_HAND),
        )
        pointer = weight + column.to(tl.int64)[None, :] * weight_stride + v[:, None]
        w = tl.load(pointer) if EVEN else tl.load(pointer, mask=(v < k)[:, None], other=0.0)
        if FOLD:
            w = (w.to(tl.float32) * scale).to(DTYPE)
        if SUM:
            total += tl.sum(w.to(tl.float32), 0)
        acc = tl.dot(x, w, acc, input_precision=PRECISION)
    if SUM:
        acc += (factor * total)[None, :]
    out = tokens + (b.to(tl.int64) * (K + AGG) + AGG + n)[:, None] * dim + d[None, :]
    tl.store(out, acc.to(DTYPE), mask=inside)
    if AGG:
        first = tl.load(agg + d, mask=d < dim, other=0.0).to(tl.float32).to(DTYPE)
        first = tl.broadcast_to(first[None, :], [BLOCK_ROWS, BLOCK_DIM])
        tl.store(out - dim, first, mask=inside & (n == 0)[:, None])


@triton.jit(
    do_not_specialize=["slots", "K", "keep_stride", "T", "H", "W"],
    do_not_specialize_on_alignment=["keep"],
)
def _pack_kernel(
    patches, keep, packed, slots, K, k, keep_stride,
    stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W,  # of patches
    GATHER: tl.constexpr, AGG: tl.constexpr,
    CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows of packed (B, A + K, k) by BLOCK_VALUES values.

    They are kept rows less the centre, and zeros in AGG's place.
    """
    slot = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    v = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    place = tl.minimum(slot, slots - 1)
    b, n = place // (K + AGG), place % (K + AGG) - AGG
    source = tl.maximum(n, 0)
    if GATHER:
        source = tl.load(keep + b.to(tl.int64) * keep_stride + source).to(tl.int32)
    corner, t0, y0, x0 = _corners(
        b, source, stride_b, stride_t, stride_h, stride_w, H, W, CLIP, FRAMES, LINES, COLUMNS
    )
    values = _load_rows(
        *(patches, corner, t0, y0, x0, v, k),
        *(stride_t, stride_h, stride_w, stride_c, T, H, W),
        *(CLIP, DENSE, PADDED, EVEN),
        *(FRAMES, LINES, COLUMNS, CHANNELS, packed.dtype.element_ty),
    )
    if AGG:
        values = tl.where((n >= 0)[:, None], values, 0.0)
    inside = (slot < slots)[:, None] & (v < k)[None, :]
    tl.store(packed + slot.to(tl.int64)[:, None] * k + v[None, :], values, mask=inside)


@triton.jit(
    do_not_specialize=["slots", "K", "keep_stride"],
    do_not_specialize_on_alignment=["keep"],
)
def _add_kernel(
    keep,
    bias,
    position,
    agg,
    tokens,
    slots,
    K,
    dim,
    keep_stride,
    position_stride,
    KEPT: tl.constexpr,
    POSITION: tl.constexpr,
    AGG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of tokens (B, A + K, dim) by BLOCK_DIM columns.

    Adds bias and position in place, and writes AGG.
    """
    slot = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = (slot < slots)[:, None] & (d < dim)[None, :]
    b, n = slot // (K + AGG), slot % (K + AGG) - AGG
    out = tokens + slot.to(tl.int64)[:, None] * dim + d[None, :]
    values = tl.load(out, mask=inside, other=0.0).to(tl.float32)
    values += tl.load(bias + d, mask=d < dim, other=0.0)[None, :]
    is_patch = (slot < slots) & (n >= 0)
    if POSITION:
        patch = n
        if KEPT:
            pointers = keep + b.to(tl.int64) * keep_stride + n
            patch = tl.load(pointers, mask=is_patch, other=0).to(tl.int32)
        pointers = position + patch.to(tl.int64)[:, None] * position_stride + d[None, :]
        inside_patch = is_patch[:, None] & (d < dim)[None, :]
        values += tl.load(pointers, mask=inside_patch, other=0.0).to(tl.float32)
    if AGG:
        first = tl.load(agg + d, mask=d < dim, other=0.0).to(tl.float32)
        values = tl.where((n >= 0)[:, None], values, first[None, :])
    tl.store(out, values.to(tokens.dtype.element_ty), mask=inside)


def forward(
    patches,
    weight,
    bias,
    *,
    position=None,
    keep=None,
    agg=None,
    scale,
    shift,
    patch=None,
    gathered=False,
    dtype,
):
    rows = _rows(patches, patch, keep, gathered, agg)
    dim, k = weight.shape
    weight, position = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (weight, position)
    )
    bias, agg = (None if x is None else x.contiguous() for x in (bias, agg))
    factor = shift / scale + rows.centre
    placed = position is not None
    choice = triton_tiles.ForwardChoice.of(_choose("forward", rows, dtype, dim, k, placed))
    if choice.packed:
        return _forward_packed(rows, weight, bias, position, agg, scale, factor, dtype)

    # float patches that arrive normalised need no fold
    trivial = scale == 1 and factor == 0 and weight.dtype == dtype
    fold_in_kernel = choice.fold and not trivial
    if not choice.fold and not trivial:
        weight, bias = _fold(weight, bias, scale, factor, dtype)
    tokens = torch.empty((rows.B, rows.A + rows.K, dim), dtype=dtype, device=rows.patches.device)
    blocks = choice.blocks
    constants = dict(
        **rows.flags,
        FOLD=fold_in_kernel,
        SUM=fold_in_kernel and factor != 0,
        KEPT=rows.keep is not None,
        GATHERED=gathered,
        POSITION=position is not None,
        AGG=rows.A,
        EVEN=k % blocks["BLOCK_VALUES"] == 0,
        PRECISION=dot_precision(dtype),
        BY_HAND=_by_hand(rows.patches.dtype, dtype),
    )
    R = rows.B * rows.K
    programs = triton.cdiv(R, blocks["BLOCK_ROWS"]) * triton.cdiv(dim, blocks["BLOCK_DIM"])
    inputs = (rows.patches, rows.keep, weight, bias, position, agg)
    row_strides = (rows.keep_stride, weight.stride(0), _row_stride(position))
    sizes = (R, rows.K, k, dim, *row_strides, *rows.arguments)
    _forward_kernel[(programs,)](*inputs, tokens, scale, factor, *sizes, **constants, **blocks)
    return tokens


def _by_hand(raw: torch.dtype, dtype: torch.dtype) -> bool:
    """Where the conversion by hand takes fewer instructions than the compiler's: a quarter of the
    fused loop on sm_90, and there alone (docs/notes/patch_embed.md)."""
    bf16 = raw == torch.uint8 and dtype == torch.bfloat16
    return bf16 and arch() == "sm_90" and not interpreted()


def _forward_packed(rows, weight, bias, position, agg, scale, factor, dtype):
    dim, k = weight.shape
    packed = _pack(rows, k, dtype)
    folded, folded_bias = _fold(weight, bias, scale, factor, dtype)
    tokens = torch.mm(packed, folded.T).view(rows.B, rows.A + rows.K, dim)
    blocks = _choose("add", rows, dtype, dim, k)
    slots = rows.B * (rows.A + rows.K)
    grid = (triton.cdiv(slots, blocks["BLOCK_ROWS"]), triton.cdiv(dim, blocks["BLOCK_DIM"]))
    flags = dict(KEPT=rows.keep is not None, POSITION=position is not None, AGG=rows.A)
    inputs = (rows.keep, folded_bias, position, agg, tokens)
    sizes = (slots, rows.K, dim, rows.keep_stride, _row_stride(position))
    _add_kernel[grid](*inputs, *sizes, **flags, **blocks)
    return tokens


def _fold(weight, bias, scale, factor, dtype):
    """(row * scale + shift) @ weight.T + bias as (row - centre) @ folded.T + folded_bias.

    One pass over the weight.
    """
    dim, k = weight.shape
    folded = torch.empty((dim, k), dtype=dtype, device=weight.device)
    folded_bias = torch.empty(dim, dtype=torch.float32, device=weight.device)
    heuristic = triton_tiles.fold_tiles(k)
    blocks = tiles.choose("patch_embed_fold", arch(), dtype, heuristic, dim=dim, values=k)
    _fold_kernel[(triton.cdiv(dim, blocks["BLOCK_DIM"]),)](
        weight, bias, folded, folded_bias, scale, factor, dim, k, weight.stride(0), **blocks
    )
    return folded, folded_bias


def _pack(rows, k, dtype):
    """Kept rows less the centre, (B (A + K), k) in the compute dtype, zeros where tokens have AGG.

    So tokens and rows match as matrices, without a copy of either. The price: an infinite gradient
    of AGG makes d_weight nan.
    """
    slots = rows.B * (rows.A + rows.K)
    packed = torch.empty((slots, k), dtype=dtype, device=rows.patches.device)
    shape = dict(rows=rows.B * rows.K, values=k, raw=rows.patches.element_size())
    heuristic = triton_tiles.pack_tiles(k)
    blocks = tiles.choose("patch_embed_pack", arch(), dtype, heuristic, **shape)
    constants = dict(
        **rows.flags,
        GATHER=rows.gather,
        AGG=rows.A,
        EVEN=k % blocks["BLOCK_VALUES"] == 0,
    )
    grid = (triton.cdiv(slots, blocks["BLOCK_ROWS"]), triton.cdiv(k, blocks["BLOCK_VALUES"]))
    sizes = (slots, rows.K, k, rows.keep_stride, *rows.arguments)
    _pack_kernel[grid](rows.patches, rows.keep, packed, *sizes, **constants, **blocks)
    return packed


# -- backward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["B", "K", "rows", "inverse_stride"])
def _sums_kernel(
    d_tokens,
    inverse,
    d_position,
    d_bias_parts,
    d_agg,
    B,
    K,
    rows,
    dim,
    inverse_stride,
    INVERSE: tl.constexpr,
    POSITION: tl.constexpr,
    AGG: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
):
    """One program: BLOCK_ROWS rows of d_position (rows, dim) by BLOCK_DIM columns.

    Sums d_tokens (B, A + K, dim) over clips, in order. The sum of its rows is its part of d_bias;
    the one program past the rows sums d_agg. INVERSE: row p is token inverse[b, p] of clip b, -1
    none.
    """
    tile = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    clip_stride = tl.cast(K + AGG, tl.int64) * dim
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    if tile * BLOCK_ROWS < rows:
        p = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        for b in range(0, B):
            if INVERSE:
                line = inverse + tl.cast(b, tl.int64) * inverse_stride
                n = tl.load(line + p, mask=p < rows, other=-1)
            else:
                n = tl.where(p < rows, p, -1)
            token = (tl.maximum(n, 0) + AGG).to(tl.int64)
            pointers = d_tokens + b * clip_stride + token[:, None] * dim + d[None, :]
            inside = (n >= 0)[:, None] & (d < dim)[None, :]
            acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if POSITION:
            values = acc.to(d_position.dtype.element_ty)
            pointers = d_position + p.to(tl.int64)[:, None] * dim + d[None, :]
            tl.store(pointers, values, mask=(p < rows)[:, None] & (d < dim)[None, :])
        tl.store(d_bias_parts + tl.cast(tile, tl.int64) * dim + d, tl.sum(acc, 0), mask=d < dim)
    elif AGG:
        for b0 in range(0, B, BLOCK_ROWS):
            b = b0 + tl.arange(0, BLOCK_ROWS)
            pointers = d_tokens + b[:, None] * clip_stride + d[None, :]
            inside = (b < B)[:, None] & (d < dim)[None, :]
            acc += tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_agg + d, tl.sum(acc, 0).to(d_agg.dtype.element_ty), mask=d < dim)


@triton.jit(
    do_not_specialize=["K", "N", "keep_stride"],
    do_not_specialize_on_alignment=["keep"],
)
def _inverse_kernel(keep, inverse, K, N, keep_stride, BLOCK: tl.constexpr):
    """One program: BLOCK indices of one line of keep.

    inverse (lines, N), full of -1 before, then holds the token of every patch.
    """
    line = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    patch = tl.load(keep + line * keep_stride + n, mask=n < K, other=0).to(tl.int64)
    tl.store(inverse + line * N + patch, n, mask=n < K)


@triton.jit(
    do_not_specialize=["R", "K", "chunk", "keep_stride", "T", "H", "W"],
    do_not_specialize_on_alignment=["keep"],
)
def _weight_kernel(
    d_tokens, patches, keep, d_bias, d_weight, scale, factor,
    R, K, k, dim, chunk, keep_stride,
    stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W,  # of patches
    GATHER: tl.constexpr, AGG: tl.constexpr,
    CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    PRECISION: tl.constexpr, FINISH: tl.constexpr, EVEN: tl.constexpr,
    BLOCK_DIM: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_DIM by BLOCK_VALUES of d_weight.

    Sums over ``chunk`` rows of d_tokens (B, A + K, dim) and the raw patches. FINISH: there is one
    chunk, and d_weight (dim, k) is written as it should be; otherwise the bare sum is, into
    (chunks, dim, k).
    """
    tiles_across = tl.cdiv(k, BLOCK_VALUES)
    d = tl.program_id(0) // tiles_across * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    v = tl.program_id(0) % tiles_across * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    part = tl.program_id(1)
    DTYPE: tl.constexpr = d_tokens.dtype.element_ty
    acc = tl.zeros([BLOCK_DIM, BLOCK_VALUES], tl.float32)
    for r0 in range(part * chunk, tl.minimum(part * chunk + chunk, R), BLOCK_ROWS):
        r = r0 + tl.arange(0, BLOCK_ROWS)
        row = tl.minimum(r, R - 1)
        b, n = row // K, row % K
        source = n
        if GATHER:
            source = tl.load(keep + b.to(tl.int64) * keep_stride + n).to(tl.int32)
        corner, t0, y0, x0 = _corners(
            b, source, stride_b, stride_t, stride_h, stride_w, H, W, CLIP, FRAMES, LINES, COLUMNS
        )
        x = _load_rows(
            *(patches, corner, t0, y0, x0, v, k),
            *(stride_t, stride_h, stride_w, stride_c, T, H, W),
            *(CLIP, DENSE, PADDED, EVEN),
            *(FRAMES, LINES, COLUMNS, CHANNELS, DTYPE),
        )
        pointer = d_tokens + (b.to(tl.int64) * (K + AGG) + AGG + n)[:, None] * dim + d[None, :]
        g = tl.load(pointer, mask=(r < R)[:, None] & (d < dim)[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
    inside = (d < dim)[:, None] & (v < k)[None, :]
    if FINISH:
        acc = scale * acc + factor * tl.load(d_bias + d, mask=d < dim, other=0.0)[:, None]
    out = d_weight + (tl.cast(part, tl.int64) * dim + d)[:, None] * k + v[None, :]
    tl.store(out, acc.to(d_weight.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["chunks"])
def _finish_kernel(
    parts,
    d_bias,
    d_weight,
    scale,
    factor,
    chunks,
    dim,
    k,
    BLOCK_DIM: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    """One program: BLOCK_DIM by BLOCK_VALUES of d_weight (dim, k).

    d_weight = scale * sum of parts (chunks, dim, k), in order, + factor * d_bias.
    """
    d = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    v = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    inside = (d < dim)[:, None] & (v < k)[None, :]
    place = d.to(tl.int64)[:, None] * k + v[None, :]
    acc = tl.zeros([BLOCK_DIM, BLOCK_VALUES], tl.float32)
    for part in range(0, chunks):
        acc += tl.load(parts + tl.cast(part, tl.int64) * dim * k + place, mask=inside, other=0.0)
    acc = scale * acc + factor * tl.load(d_bias + d, mask=d < dim, other=0.0)[:, None]
    tl.store(d_weight + place, acc.to(d_weight.dtype.element_ty), mask=inside)


def backward(
    d_tokens,
    patches,
    weight,
    bias,
    *,
    position=None,
    keep=None,
    agg=None,
    scale,
    shift,
    patch=None,
    gathered=False,
    dtype,
    d_patches=False,
):
    """d_patches (None unless asked for), d_weight, d_bias, d_position, d_agg (None if absent)."""
    rows = _rows(patches, patch, keep, gathered, agg)
    d_tokens = d_tokens.contiguous()
    d_bias, d_position, d_agg = _sums(d_tokens, position, rows, agg)
    d_weight = _d_weight(d_tokens, d_bias, weight, rows, scale, shift + rows.centre * scale)
    d_input = None
    if d_patches:  # rare: patches are data
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        factor = shift / scale + rows.centre
        folded, _ = _fold(weight, bias.contiguous(), scale, factor, dtype)
        d_input = d_tokens[:, rows.A :] @ folded
        if rows.gather:
            d_input = put_rows(torch, d_input, keep, rows.N)
        if patch is not None:
            d_input = unpatchify(d_input, patch, tuple(patches.shape[1:]))
    return d_input, d_weight, d_bias, d_position, d_agg


def _sums(d_tokens, position, rows, agg):
    """d_bias (dim,) fp32, d_position and d_agg in their own dtypes: all from one pass."""
    (B, _, dim), K, device = d_tokens.shape, rows.K, d_tokens.device
    inverse, inverse_stride, count = None, 0, K
    if position is not None and rows.keep is not None:
        count = position.shape[0]
        lines = 1 if rows.keep.ndim == 1 else B
        inverse = torch.full((lines, count), -1, dtype=torch.int32, device=device)
        inverse_stride = count if rows.keep.ndim == 2 else 0
        # lines, as many as clips, on the axis without a bound of 65535
        _inverse_kernel[(lines, triton.cdiv(K, 256))](
            rows.keep, inverse, K, count, rows.keep_stride, BLOCK=256, num_warps=4
        )
    heuristic = triton_tiles.sums_tiles(count, dim)
    shape = dict(batch=B, rows=count, dim=dim)
    blocks = tiles.choose("patch_embed_sums", arch(), d_tokens.dtype, heuristic, **shape)
    programs = triton.cdiv(count, blocks["BLOCK_ROWS"])
    d_position = d_agg = None
    if position is not None:
        d_position = torch.empty((count, dim), dtype=position.dtype, device=device)
    if agg is not None:
        d_agg = torch.empty(dim, dtype=agg.dtype, device=device)
    parts = torch.empty((programs, dim), dtype=torch.float32, device=device)
    grid = (programs + rows.A, triton.cdiv(dim, blocks["BLOCK_DIM"]))
    flags = dict(INVERSE=inverse is not None, POSITION=position is not None, AGG=rows.A)
    sizes = (B, K, count, dim, inverse_stride)
    _sums_kernel[grid](d_tokens, inverse, d_position, parts, d_agg, *sizes, **flags, **blocks)
    return parts.sum(0), d_position, d_agg


def _d_weight(d_tokens, d_bias, weight, rows, scale, factor):
    """scale * d_tokens^T @ (rows - centre) + factor * d_bias, in the weight's dtype.

    The sum is kept in fp32, since raw values overflow fp16.
    """
    dim, k = weight.shape
    dtype = d_tokens.dtype
    d_weight = torch.empty((dim, k), dtype=weight.dtype, device=weight.device)
    choice = triton_tiles.WeightChoice.of(_choose("weight", rows, dtype, dim, k))
    if choice.packed:
        parts = _product(d_tokens.view(-1, dim).T, _pack(rows, k, dtype))[None]
    else:
        parts = _weight_parts(d_tokens, d_bias, d_weight, rows, choice, scale, factor)
        if parts is d_weight:
            return d_weight
    shape = dict(dim=dim, values=k, chunks=parts.shape[0])
    heuristic = triton_tiles.finish_tiles(k)
    blocks = tiles.choose("patch_embed_finish", arch(), dtype, heuristic, **shape)
    grid = (triton.cdiv(dim, blocks["BLOCK_DIM"]), triton.cdiv(k, blocks["BLOCK_VALUES"]))
    _finish_kernel[grid](parts, d_bias, d_weight, scale, factor, parts.shape[0], dim, k, **blocks)
    return d_weight


def _weight_parts(d_tokens, d_bias, d_weight, rows, choice, scale, factor):
    """The bare sums of all chunks, (chunks, dim, k) fp32; of a single one, d_weight, finished."""
    dim, k = d_weight.shape
    R, blocks = rows.B * rows.K, choice.blocks
    steps = triton.cdiv(R, blocks["BLOCK_ROWS"])
    chunk = triton.cdiv(steps, choice.chunks) * blocks["BLOCK_ROWS"]
    chunks = triton.cdiv(R, chunk)
    parts = d_weight
    if chunks > 1:
        parts = torch.empty((chunks, dim, k), dtype=torch.float32, device=d_weight.device)
    constants = dict(
        **rows.flags,
        GATHER=rows.gather,
        AGG=rows.A,
        FINISH=chunks == 1,
        EVEN=k % blocks["BLOCK_VALUES"] == 0,
        PRECISION=dot_precision(d_tokens.dtype),
    )
    across = triton.cdiv(dim, blocks["BLOCK_DIM"]) * triton.cdiv(k, blocks["BLOCK_VALUES"])
    inputs = (d_tokens, rows.patches, rows.keep, d_bias, parts, scale, factor)
    sizes = (R, rows.K, k, dim, chunk, rows.keep_stride, *rows.arguments)
    _weight_kernel[(across, chunks)](*inputs, *sizes, **constants, **blocks)
    return parts


def _product(a, b):
    """a @ b with an fp32 result."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda" and torch.version.hip is None:
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return torch.mm(a.float(), b.float())


# -- what the kernels are given ----------------------------------------------------------------


class _Rows(NamedTuple):
    """A call's rows as the kernels take them."""

    patches: torch.Tensor
    keep: torch.Tensor | None
    keep_stride: int  # from a clip's indices to the next clip's; 0 where all clips share a line
    gather: bool  # the kept rows still have to be picked
    B: int
    N: int
    K: int
    A: int
    arguments: tuple[int, ...]  # strides (b, t, h, w, c) and sizes (T, H, W) of the patches
    flags: dict[str, bool | int]  # how values lie within a patch

    @property
    def centre(self) -> float:
        return 128.0 if self.patches.dtype == torch.uint8 else 0.0


def _rows(patches, patch, keep, gathered: bool, agg) -> _Rows:
    if patch is None:
        patches = patches if patches.stride(-1) == 1 else patches.contiguous()
        N = patches.shape[1]
        arguments = (patches.stride(0), patches.stride(1), 0, 0, 1, N, 1, 1)
        dense, padded = True, False
        frames = lines = columns = channels = 1
    else:  # a waveform is one frame of one line
        clip = patches[:, None, None, :, None] if len(patch) == 1 else patches
        frames, lines, columns = (1, 1, patch[0]) if len(patch) == 1 else patch
        T, H, W, channels = clip.shape[1:]
        arguments = (*clip.stride(), T, H, W)
        stride_w, stride_c = clip.stride()[3:]
        dense = stride_w == channels and (channels == 1 or stride_c == 1)
        padded = bool(T % frames or H % lines or W % columns)
        N = triton.cdiv(T, frames) * triton.cdiv(H, lines) * triton.cdiv(W, columns)
    flags = dict(
        CLIP=patch is not None,
        DENSE=dense,
        PADDED=padded,
        FRAMES=frames,
        LINES=lines,
        COLUMNS=columns,
        CHANNELS=channels,
    )
    return _Rows(
        patches=patches,
        keep=None if keep is None else keep.contiguous(),
        keep_stride=keep.shape[1] if keep is not None and keep.ndim == 2 else 0,
        gather=keep is not None and not gathered,
        B=patches.shape[0],
        N=N,
        K=N if keep is None else keep.shape[-1],
        A=int(agg is not None),
        arguments=arguments,
        flags=flags,
    )


def _row_stride(position) -> int:
    return 0 if position is None else position.stride(0)


def _choose(kernel: str, rows: _Rows, dtype, dim: int, k: int, position: bool = True) -> Tiles:
    shape = (rows.B * rows.K, dim, k, rows.patches.element_size())
    flags = (rows.flags["PADDED"], rows.gather, position)
    return _planned(f"patch_embed_{kernel}", arch(), dtype, *shape, *flags)


@tiles.memoised
def _planned(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    rows: int,
    dim: int,
    k: int,
    raw: int,
    padded: bool,
    gather: bool,
    position: bool,
) -> Tiles:
    shape = (rows, dim, k, raw, padded, gather, position)
    heuristic = triton_tiles.HEURISTICS[kernel](arch, dtype.itemsize, *shape)
    return tiles.choose(kernel, arch, dtype, heuristic, rows=rows, dim=dim, values=k, raw=raw)


def unsupported(
    patches,
    weight,
    bias,
    position=None,
    keep=None,
    *,
    scale,
    shift,
    agg=None,
    patch=None,
    gathered=False,
    dtype=None,
) -> str | None:
    if reason := unsupported_operands(patches, weight, bias, position, keep, agg):
        return reason
    if dtype == torch.bfloat16 and interpreted():
        return BF16_INTERPRETED
    return unsupported_dtypes(patches, weight, bias, position, agg)
