"""Raw patches to tokens in Triton: kept rows are gathered straight into the product, position and AGG are added as it is written.

Two ways, chosen by the tile table's PACKED. Fused (0): one product kernel reads the raw rows. Packed (1): kept rows are written out once in the
compute dtype, torch.mm (cuBLAS) multiplies them, a last kernel adds in place. Both read nothing of dropped patches.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..numerics import put_rows
from ..triton_common import arch, dot_precision, interpreted, objection
from .dtypes import refused
from .patchify import unpatchify

# B batch, N patches, K kept, k values a patch; A 1 with AGG, else 0; R = B K rows of all clips, row r is row r % K of clip r // K
# a clip's axes are frames T, lines H, columns W, channels; a waveform is columns alone; rows (B, N, k) have stride_t between them


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
    FRAMES: tl.constexpr,
    LINES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Offset of the first value of patches n of clips b, and its frame, line and column."""
    across, down = tl.cdiv(W, COLUMNS), tl.cdiv(H, LINES)
    t = n // (across * down) * FRAMES
    y = n // across % down * LINES
    x = n % across * COLUMNS
    return (
        b.to(tl.int64) * stride_b
        + t.to(tl.int64) * stride_t
        + y.to(tl.int64) * stride_h
        + x.to(tl.int64) * stride_w,
        t,
        y,
        x,
    )


@triton.jit
def _load_rows(
    patches, corner, t0, y0, x0, v, k, stride_t, stride_h, stride_w, stride_c, T, H, W,
    CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr, EVEN: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Values v of the patches at ``corner``, (rows, values) in DTYPE, less the centre: uint8 0 .. 255 becomes -128 .. 127.

    CLIP: values run over frames, lines, columns, channels of a clip. DENSE: columns and channels lie in one run. PADDED: the grid passes the
    clip's far end, where raw values are 0. EVEN: no v passes k.
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
    if patches.dtype.element_ty == tl.uint8:
        raw = (raw ^ 128).to(
            tl.int8, bitcast=True
        )  # raw - 128 in one operation; four values convert at a time
    return raw.to(DTYPE)


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
    """One program: BLOCK_DIM rows of the weight (dim, k). folded = scale * weight as rounded; folded_bias = bias + factor * its row sums."""
    d = tl.program_id(0) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    total = tl.zeros([BLOCK_DIM, BLOCK_VALUES], tl.float32)
    for v0 in range(0, k, BLOCK_VALUES):
        v = v0 + tl.arange(0, BLOCK_VALUES)
        inside = (d < dim)[:, None] & (v < k)[None, :]
        w = tl.load(
            weight + d.to(tl.int64)[:, None] * weight_stride + v[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        rounded = (w * scale).to(folded.dtype.element_ty)
        tl.store(folded + d.to(tl.int64)[:, None] * k + v[None, :], rounded, mask=inside)
        total += rounded.to(tl.float32)
    start = tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)
    tl.store(folded_bias + d, start + factor * tl.sum(total, 1), mask=d < dim)


@triton.jit
def _forward_kernel(
    patches, keep, weight, bias, position, agg, tokens, scale, factor,
    R, K, k, dim, keep_stride, weight_stride, position_stride,
    stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W,
    KEPT: tl.constexpr, GATHERED: tl.constexpr, POSITION: tl.constexpr, AGG: tl.constexpr,
    CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    FOLD: tl.constexpr, SUM: tl.constexpr, EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS kept rows, of any clips, by BLOCK_DIM columns of tokens (B, A + K, dim); who holds a clip's first row writes AGG.

    FOLD: the weight comes as it is and is scaled and rounded here, which spares a launch where k is small; SUM: the bias is folded here too.
    """
    tiles_across = tl.cdiv(dim, BLOCK_DIM)
    r = tl.program_id(0) // tiles_across * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(0) % tiles_across * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    DTYPE: tl.constexpr = tokens.dtype.element_ty
    row, column = (
        tl.minimum(r, R - 1),
        tl.minimum(d, dim - 1),
    )  # the last tile repeats the edge instead of masking its loads
    b, n = row // K, row % K
    patch = n
    if KEPT:
        patch = tl.load(keep + b.to(tl.int64) * keep_stride + n).to(tl.int32)
    source = n if GATHERED else patch
    corner, t0, y0, x0 = _corners(
        b, source, stride_b, stride_t, stride_h, stride_w, H, W, FRAMES, LINES, COLUMNS
    )
    inside = (r < R)[:, None] & (d < dim)[None, :]
    start = tl.load(bias + d, mask=d < dim, other=0.0).to(tl.float32)
    acc = tl.broadcast_to(start[None, :], [BLOCK_ROWS, BLOCK_DIM])
    if POSITION:  # the product is added to it: at the end the two would need twice the registers
        acc += tl.load(
            position + patch.to(tl.int64)[:, None] * position_stride + d[None, :],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
    total = tl.zeros([BLOCK_DIM], tl.float32)
    for v0 in range(0, k, BLOCK_VALUES):
        v = v0 + tl.arange(0, BLOCK_VALUES)
        x = _load_rows(
            patches, corner, t0, y0, x0, v, k, stride_t, stride_h, stride_w, stride_c, T, H, W,
            CLIP, DENSE, PADDED, EVEN, FRAMES, LINES, COLUMNS, CHANNELS, DTYPE,
        )  # fmt: skip
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
        tl.store(
            out - dim,
            tl.broadcast_to(first[None, :], [BLOCK_ROWS, BLOCK_DIM]),
            mask=inside & (n == 0)[:, None],
        )


@triton.jit
def _pack_kernel(
    patches, keep, packed, slots, K, k, keep_stride, stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W,
    GATHER: tl.constexpr, AGG: tl.constexpr, CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr,
    EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_VALUES: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows of packed (B, A + K, k), BLOCK_VALUES values: kept rows less the centre, and zeros in AGG's place."""
    slot = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    v = tl.program_id(1) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    place = tl.minimum(slot, slots - 1)
    b, n = place // (K + AGG), place % (K + AGG) - AGG
    source = tl.maximum(n, 0)
    if GATHER:
        source = tl.load(keep + b.to(tl.int64) * keep_stride + source).to(tl.int32)
    corner, t0, y0, x0 = _corners(
        b, source, stride_b, stride_t, stride_h, stride_w, H, W, FRAMES, LINES, COLUMNS
    )
    values = _load_rows(
        patches, corner, t0, y0, x0, v, k, stride_t, stride_h, stride_w, stride_c, T, H, W,
        CLIP, DENSE, PADDED, EVEN, FRAMES, LINES, COLUMNS, CHANNELS, packed.dtype.element_ty,
    )  # fmt: skip
    if AGG:
        values = tl.where((n >= 0)[:, None], values, 0.0)
    tl.store(
        packed + slot.to(tl.int64)[:, None] * k + v[None, :],
        values,
        mask=(slot < slots)[:, None] & (v < k)[None, :],
    )


@triton.jit
def _add_kernel(
    keep, bias, position, agg, tokens, slots, K, dim, keep_stride, position_stride,
    KEPT: tl.constexpr, POSITION: tl.constexpr, AGG: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows of tokens (B, A + K, dim) by BLOCK_DIM columns; adds bias and position in place, writes AGG."""
    slot = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    inside = (slot < slots)[:, None] & (d < dim)[None, :]
    b, n = slot // (K + AGG), slot % (K + AGG) - AGG
    out = tokens + slot.to(tl.int64)[:, None] * dim + d[None, :]
    values = (
        tl.load(out, mask=inside, other=0.0).to(tl.float32)
        + tl.load(bias + d, mask=d < dim, other=0.0)[None, :]
    )
    live = (slot < slots) & (n >= 0)
    if POSITION:
        patch = n
        if KEPT:
            patch = tl.load(keep + b.to(tl.int64) * keep_stride + n, mask=live, other=0).to(
                tl.int32
            )
        pointer = position + patch.to(tl.int64)[:, None] * position_stride + d[None, :]
        values += tl.load(pointer, mask=live[:, None] & (d < dim)[None, :], other=0.0).to(
            tl.float32
        )
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
    patches, source = _source(patches, patch)
    dim, k = weight.shape
    B, K = patches.shape[0], source["N"] if keep is None else keep.shape[-1]
    A = int(agg is not None)
    keep, keep_stride = _keep(keep)
    weight, position = (
        x if x is None or x.stride(-1) == 1 else x.contiguous() for x in (weight, position)
    )
    bias, agg = (None if x is None else x.contiguous() for x in (bias, agg))
    position_stride = 0 if position is None else position.stride(0)
    factor = shift / scale + _centre(patches)
    tile = dict(_choose("forward", patches, dtype, B * K, dim, k))
    if tile.pop("PACKED", 0):
        packed = _pack(patches, keep, keep_stride, source, B, K, k, A, gathered, dtype)
        folded, folded_bias = _fold(weight, bias, scale, factor, dtype)
        tokens = torch.mm(packed, folded.T).view(B, A + K, dim)
        add = _choose("add", patches, dtype, B * K, dim, k)
        grid = (triton.cdiv(B * (A + K), add["BLOCK_ROWS"]), triton.cdiv(dim, add["BLOCK_DIM"]))
        flags = dict(KEPT=keep is not None, POSITION=position is not None, AGG=A)
        _add_kernel[grid](
            keep,
            folded_bias,
            position,
            agg,
            tokens,
            B * (A + K),
            K,
            dim,
            keep_stride,
            position_stride,
            **flags,
            **add,
        )
        return tokens
    trivial = (
        scale == 1 and factor == 0 and weight.dtype == dtype
    )  # float patches that arrive normalised
    fold = bool(tile.pop("FOLD")) and not trivial
    flags = dict(FOLD=fold, SUM=fold and factor != 0)
    if not fold and not trivial:
        weight, bias = _fold(weight, bias, scale, factor, dtype)
    tokens = torch.empty((B, A + K, dim), dtype=dtype, device=patches.device)
    programs = triton.cdiv(B * K, tile["BLOCK_ROWS"]) * triton.cdiv(dim, tile["BLOCK_DIM"])
    flags |= dict(
        KEPT=keep is not None,
        GATHERED=gathered,
        POSITION=position is not None,
        AGG=A,
        EVEN=k % tile["BLOCK_VALUES"] == 0,
    )
    _forward_kernel[(programs,)](
        patches, keep, weight, bias, position, agg, tokens, scale, factor, B * K, K, k, dim, keep_stride, weight.stride(0), position_stride,
        *source["arguments"], **source["flags"], **flags, PRECISION=dot_precision(dtype), **tile,
    )  # fmt: skip
    return tokens


def _fold(weight, bias, scale, factor, dtype):
    """(row * scale + shift) @ weight.T + bias as (row - centre) @ folded.T + folded_bias, in one pass over the weight."""
    dim, k = weight.shape
    folded = torch.empty((dim, k), dtype=dtype, device=weight.device)
    folded_bias = torch.empty(dim, dtype=torch.float32, device=weight.device)
    tile = tiles.choose("patch_embed_fold", arch(), dtype, _fold_heuristic(k), dim=dim, values=k)
    _fold_kernel[(triton.cdiv(dim, tile["BLOCK_DIM"]),)](
        weight, bias, folded, folded_bias, scale, factor, dim, k, weight.stride(0), **tile
    )
    return folded, folded_bias


def _pack(patches, keep, keep_stride, source, B, K, k, A, gathered, dtype):
    """Kept rows less the centre, (B (A + K), k) in the compute dtype, zeros where tokens have AGG.

    So tokens and rows match as matrices, without a copy of either; only an infinite gradient of AGG would be felt in d_weight, as nan.
    """
    packed = torch.empty((B * (A + K), k), dtype=dtype, device=patches.device)
    tile = tiles.choose(
        "patch_embed_pack",
        arch(),
        dtype,
        _pack_heuristic(k),
        rows=B * K,
        values=k,
        raw=patches.element_size(),
    )
    grid = (triton.cdiv(B * (A + K), tile["BLOCK_ROWS"]), triton.cdiv(k, tile["BLOCK_VALUES"]))
    flags = dict(
        GATHER=keep is not None and not gathered, AGG=A, EVEN=k % tile["BLOCK_VALUES"] == 0
    )
    _pack_kernel[grid](
        patches,
        keep,
        packed,
        B * (A + K),
        K,
        k,
        keep_stride,
        *source["arguments"],
        **source["flags"],
        **flags,
        **tile,
    )
    return packed


@triton.jit
def _sums_kernel(
    d_tokens, inverse, d_position, d_bias_parts, d_agg, B, K, rows, dim, inverse_stride,
    INVERSE: tl.constexpr, POSITION: tl.constexpr, AGG: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_ROWS rows of d_position (rows, dim) by BLOCK_DIM columns: sums d_tokens (B, A + K, dim) over clips, in order.

    The sum of its rows is its part of d_bias; the one program past the rows sums d_agg. INVERSE: row p is token inverse[b, p] of clip b, -1 none.
    """
    tile = tl.program_id(0)
    d = tl.program_id(1) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    clip_stride = tl.cast(K + AGG, tl.int64) * dim
    acc = tl.zeros([BLOCK_ROWS, BLOCK_DIM], tl.float32)
    if tile * BLOCK_ROWS < rows:
        p = tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        for b in range(0, B):
            if INVERSE:
                n = tl.load(
                    inverse + tl.cast(b, tl.int64) * inverse_stride + p, mask=p < rows, other=-1
                )
            else:
                n = tl.where(p < rows, p, -1)
            pointer = (
                d_tokens
                + b * clip_stride
                + (tl.maximum(n, 0) + AGG).to(tl.int64)[:, None] * dim
                + d[None, :]
            )
            acc += tl.load(pointer, mask=(n >= 0)[:, None] & (d < dim)[None, :], other=0.0).to(
                tl.float32
            )
        if POSITION:
            values = acc.to(d_position.dtype.element_ty)
            tl.store(
                d_position + p.to(tl.int64)[:, None] * dim + d[None, :],
                values,
                mask=(p < rows)[:, None] & (d < dim)[None, :],
            )
        tl.store(d_bias_parts + tl.cast(tile, tl.int64) * dim + d, tl.sum(acc, 0), mask=d < dim)
    elif AGG:
        for b0 in range(0, B, BLOCK_ROWS):
            b = b0 + tl.arange(0, BLOCK_ROWS)
            pointer = d_tokens + b[:, None] * clip_stride + d[None, :]
            acc += tl.load(pointer, mask=(b < B)[:, None] & (d < dim)[None, :], other=0.0).to(
                tl.float32
            )
        tl.store(d_agg + d, tl.sum(acc, 0).to(d_agg.dtype.element_ty), mask=d < dim)


@triton.jit
def _inverse_kernel(keep, inverse, K, N, keep_stride, BLOCK: tl.constexpr):
    """One program: BLOCK indices of one line of keep. inverse (lines, N), full of -1 before, learns which token holds a patch."""
    line = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    patch = tl.load(keep + line * keep_stride + n, mask=n < K, other=0).to(tl.int64)
    tl.store(inverse + line * N + patch, n, mask=n < K)


@triton.jit
def _weight_kernel(
    d_tokens, patches, keep, d_bias, d_weight, scale, factor,
    R, K, k, dim, chunk, keep_stride, stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W,
    GATHER: tl.constexpr, AGG: tl.constexpr, CLIP: tl.constexpr, DENSE: tl.constexpr, PADDED: tl.constexpr,
    FRAMES: tl.constexpr, LINES: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, PRECISION: tl.constexpr,
    FINISH: tl.constexpr, EVEN: tl.constexpr, BLOCK_DIM: tl.constexpr, BLOCK_VALUES: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_DIM by BLOCK_VALUES of d_weight, summed over ``chunk`` rows of d_tokens (B, A + K, dim) and the raw patches.

    FINISH: there is one chunk, d_weight (dim, k) is written as it should be; otherwise the bare sum, into (chunks, dim, k).
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
            b, source, stride_b, stride_t, stride_h, stride_w, H, W, FRAMES, LINES, COLUMNS
        )
        x = _load_rows(
            patches, corner, t0, y0, x0, v, k, stride_t, stride_h, stride_w, stride_c, T, H, W,
            CLIP, DENSE, PADDED, EVEN, FRAMES, LINES, COLUMNS, CHANNELS, DTYPE,
        )  # fmt: skip
        pointer = d_tokens + (b.to(tl.int64) * (K + AGG) + AGG + n)[:, None] * dim + d[None, :]
        g = tl.load(pointer, mask=(r < R)[:, None] & (d < dim)[None, :], other=0.0)
        acc = tl.dot(tl.trans(g), x, acc, input_precision=PRECISION)
    inside = (d < dim)[:, None] & (v < k)[None, :]
    if FINISH:
        acc = scale * acc + factor * tl.load(d_bias + d, mask=d < dim, other=0.0)[:, None]
    out = d_weight + (tl.cast(part, tl.int64) * dim + d)[:, None] * k + v[None, :]
    tl.store(out, acc.to(d_weight.dtype.element_ty), mask=inside)


@triton.jit
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
    """One program: BLOCK_DIM by BLOCK_VALUES of d_weight (dim, k) = scale * sum of parts (chunks, dim, k), in order, + factor * d_bias."""
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
    """d_patches (None unless asked for), d_weight, d_bias, d_position, d_agg (None where absent)."""
    shape = tuple(patches.shape[1:])
    patches, source = _source(patches, patch)
    dim = weight.shape[0]
    B, N = patches.shape[0], source["N"]
    K, A = N if keep is None else keep.shape[-1], int(agg is not None)
    kept, keep_stride = _keep(keep)
    d_tokens = d_tokens.contiguous()
    centre = _centre(patches)
    d_bias, d_position, d_agg = _sums(d_tokens, position, kept, keep_stride, agg, B, K, dim)

    d_weight = _d_weight(
        d_tokens,
        d_bias,
        patches,
        weight,
        kept,
        keep_stride,
        source,
        A,
        gathered,
        scale,
        shift + centre * scale,
    )
    d_input = None
    if d_patches:  # rare: patches are data
        weight = weight if weight.stride(-1) == 1 else weight.contiguous()
        d_input = (
            d_tokens[:, A:]
            @ _fold(weight, bias.contiguous(), scale, shift / scale + centre, dtype)[0]
        )
        if keep is not None and not gathered:
            d_input = put_rows(torch, d_input, keep, N)
        if patch is not None:
            d_input = unpatchify(d_input, patch, shape)
    return d_input, d_weight, d_bias, d_position, d_agg


def _sums(d_tokens, position, keep, keep_stride, agg, B, K, dim):
    """d_bias (dim,) fp32, d_position and d_agg in their own dtypes: all from one pass over d_tokens."""
    device, A = d_tokens.device, int(agg is not None)
    inverse, inverse_stride, rows = None, 0, K
    if position is not None and keep is not None:
        rows = position.shape[0]
        lines = 1 if keep.ndim == 1 else B
        inverse, inverse_stride = (
            torch.full((lines, rows), -1, dtype=torch.int32, device=device),
            rows if keep.ndim == 2 else 0,
        )
        _inverse_kernel[(triton.cdiv(K, 256), lines)](
            keep, inverse, K, rows, keep_stride, BLOCK=256, num_warps=4
        )
    tile = tiles.choose(
        "patch_embed_sums",
        arch(),
        d_tokens.dtype,
        _sums_heuristic(rows, dim),
        batch=B,
        rows=rows,
        dim=dim,
    )
    programs = triton.cdiv(rows, tile["BLOCK_ROWS"])
    d_position = (
        None if position is None else torch.empty((rows, dim), dtype=position.dtype, device=device)
    )
    d_agg = None if agg is None else torch.empty(dim, dtype=agg.dtype, device=device)
    parts = torch.empty((programs, dim), dtype=torch.float32, device=device)
    grid = (programs + A, triton.cdiv(dim, tile["BLOCK_DIM"]))
    flags = dict(INVERSE=inverse is not None, POSITION=position is not None, AGG=A)
    _sums_kernel[grid](
        d_tokens,
        inverse,
        d_position,
        parts,
        d_agg,
        B,
        K,
        rows,
        dim,
        inverse_stride,
        **flags,
        **tile,
    )
    return parts.sum(0), d_position, d_agg


def _d_weight(
    d_tokens, d_bias, patches, weight, keep, keep_stride, source, A, gathered, scale, factor
):
    """scale * d_tokens^T @ (rows - centre) + factor * d_bias, in the weight's dtype; summed in fp32, since raw values overflow fp16."""
    (B, tokens, dim), k, dtype, device = (
        d_tokens.shape,
        weight.shape[1],
        d_tokens.dtype,
        weight.device,
    )
    K = tokens - A
    tile = dict(_choose("weight", patches, dtype, B * K, dim, k))
    d_weight = torch.empty((dim, k), dtype=weight.dtype, device=device)
    if tile.pop("PACKED", 0):
        packed = _pack(patches, keep, keep_stride, source, B, K, k, A, gathered, dtype)
        parts = _product(d_tokens.view(-1, dim).T, packed)[None]
    else:
        chunk = (
            triton.cdiv(triton.cdiv(B * K, tile["BLOCK_ROWS"]), tile.pop("CHUNKS"))
            * tile["BLOCK_ROWS"]
        )
        chunks = triton.cdiv(B * K, chunk)
        parts = (
            d_weight
            if chunks == 1
            else torch.empty((chunks, dim, k), dtype=torch.float32, device=device)
        )
        grid = (triton.cdiv(dim, tile["BLOCK_DIM"]) * triton.cdiv(k, tile["BLOCK_VALUES"]), chunks)
        flags = dict(
            GATHER=keep is not None and not gathered,
            AGG=A,
            FINISH=chunks == 1,
            EVEN=k % tile["BLOCK_VALUES"] == 0,
        )
        _weight_kernel[grid](
            d_tokens, patches, keep, d_bias, parts, scale, factor, B * K, K, k, dim, chunk, keep_stride,
            *source["arguments"], **source["flags"], **flags, PRECISION=dot_precision(dtype), **tile,
        )  # fmt: skip
        if chunks == 1:
            return d_weight
    tile = tiles.choose(
        "patch_embed_finish",
        arch(),
        dtype,
        _finish_heuristic(k),
        dim=dim,
        values=k,
        chunks=parts.shape[0],
    )
    grid = (triton.cdiv(dim, tile["BLOCK_DIM"]), triton.cdiv(k, tile["BLOCK_VALUES"]))
    _finish_kernel[grid](parts, d_bias, d_weight, scale, factor, parts.shape[0], dim, k, **tile)
    return d_weight


def _product(a, b):
    """a @ b with an fp32 result."""
    if a.dtype == torch.float32:
        return torch.mm(a, b)
    if a.device.type == "cuda" and torch.version.hip is None:
        return torch.ops.aten.mm.dtype(a, b, torch.float32)
    return torch.mm(a.float(), b.float())


def _source(patches, patch):
    """The patches as the kernels take them, their number N, and the kernels' arguments that describe where values lie."""
    flags = dict(
        CLIP=patch is not None, DENSE=True, PADDED=False, FRAMES=1, LINES=1, COLUMNS=1, CHANNELS=1
    )
    if patch is None:
        if patches.stride(-1) != 1:
            patches = patches.contiguous()
        N = patches.shape[1]
        return patches, dict(
            N=N, flags=flags, arguments=(patches.stride(0), patches.stride(1), 0, 0, 1, N, 1, 1)
        )
    clip = (
        patches[:, None, None, :, None] if len(patch) == 1 else patches
    )  # a waveform is one frame of one line
    frames, lines, columns = (1, 1, patch[0]) if len(patch) == 1 else patch
    stride_b, stride_t, stride_h, stride_w, stride_c = clip.stride()
    T, H, W, C = clip.shape[1:]
    flags |= dict(
        DENSE=stride_w == C and (C == 1 or stride_c == 1),
        PADDED=bool(T % frames or H % lines or W % columns),
    )
    flags |= dict(FRAMES=frames, LINES=lines, COLUMNS=columns, CHANNELS=C)
    N = triton.cdiv(T, frames) * triton.cdiv(H, lines) * triton.cdiv(W, columns)
    return patches, dict(
        N=N, flags=flags, arguments=(stride_b, stride_t, stride_h, stride_w, stride_c, T, H, W)
    )


def _keep(keep):
    """keep and the step from a clip's indices to the next clip's: 0 where all clips share one line."""
    return (
        (None, 0) if keep is None else (keep.contiguous(), keep.shape[1] if keep.ndim == 2 else 0)
    )


def _centre(patches) -> float:
    return 128.0 if patches.dtype == torch.uint8 else 0.0


# -- tiles -------------------------------------------------------------------------------------------------------------

_MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
_SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


def _choose(kernel: str, patches, dtype, rows: int, dim: int, k: int) -> tiles.Tiles:
    raw = patches.element_size()
    heuristic = {"forward": _forward_heuristic, "weight": _weight_heuristic, "add": _add_heuristic}[
        kernel
    ](arch(), dtype.itemsize, rows, dim, k, raw)
    return tiles.choose(
        f"patch_embed_{kernel}", arch(), dtype, heuristic, rows=rows, dim=dim, values=k, raw=raw
    )


def _stages(device: str, bytes_a_stage: int, most: int) -> int:
    """As many stages as shared memory holds, with a margin; AMD keeps one stage fewer than it counts."""
    if device.startswith("gfx"):
        return 2
    return max(2, min(most, _SHARED_KIB.get(device, 99) * 1024 * 9 // 10 // bytes_a_stage))


def _cheapest(
    shapes: dict[tuple[int, int], float], device: str, rows: int, columns: int
) -> tuple[int, int]:
    """The tile whose waves over the device take least; ``shapes`` gives each one's throughput once the device is full."""
    multiprocessors = _MULTIPROCESSORS.get(device, 128)

    def cost(shape):
        height, width = shape
        programs = triton.cdiv(rows, height) * triton.cdiv(columns, width)
        return triton.cdiv(programs, multiprocessors) * height * width / shapes[shape]

    return min(shapes, key=cost)


def _forward_heuristic(
    device: str, itemsize: int, rows: int, dim: int, k: int, raw: int
) -> tiles.Tiles:
    """Fused wherever Triton's product comes near cuBLAS's: packing moves 3 bytes a uint8 value, and the tokens twice more.

    At k 3072 and dim 1024 on an H200 that is about a third of the product's time (predicted), which is what a gather with conversion inside
    the product loses there: a draw, and fused needs no memory. Packed where Triton has no match for the library: fp32 without tensor
    cores, and Blackwell's.
    """
    if (itemsize == 4 and dim * k >= 2**16) or (device == "sm_100" and k >= 1024 and dim >= 512):
        return {"PACKED": 1}
    fold = int(k <= 256)  # every program folds its part again: cheaper than a launch
    if itemsize == 4:
        return {
            "PACKED": 0,
            "FOLD": fold,
            "BLOCK_ROWS": 64,
            "BLOCK_DIM": 64,
            "BLOCK_VALUES": 32,
            "num_warps": 4,
            "num_stages": 2,
        }
    if k <= 256:  # bound by memory
        tile = {
            "BLOCK_ROWS": 64,
            "BLOCK_DIM": 64 if dim <= 64 else 128,
            "BLOCK_VALUES": 32,
            "num_warps": 4,
            "num_stages": 3,
        }
        return {"PACKED": 0, "FOLD": fold} | tile
    height, width = _cheapest({(128, 128): 0.9, (64, 128): 0.7, (64, 64): 0.45}, device, rows, dim)
    values = (
        64 if device in ("sm_90", "sm_100") else 32
    )  # operands that live in registers spill at 64
    stages = _stages(device, height * values * raw + width * values * 2, 4)
    warps = (
        8 if height * width >= (64 * 128 if device == "sm_120" else 128 * 128) else 4
    )  # four spill there (triton 3.7.1)
    tile = {
        "BLOCK_ROWS": height,
        "BLOCK_DIM": width,
        "BLOCK_VALUES": values,
        "num_warps": warps,
        "num_stages": stages,
    }
    return {"PACKED": 0, "FOLD": fold} | tile


def _weight_heuristic(
    device: str, itemsize: int, rows: int, dim: int, k: int, raw: int
) -> tiles.Tiles:
    """Packed at large k and dim: here the converted rows pass through shared memory at every step, where a product cannot overlap them.

    Otherwise chunks fill the device: each costs a write and a read of (dim, k) in fp32.
    """
    if (itemsize == 4 and dim * k >= 2**16) or (
        device.startswith("sm") and k >= 1024 and dim >= 512
    ):
        return {"PACKED": 1}
    if itemsize == 4:
        tile = {
            "BLOCK_DIM": 64,
            "BLOCK_VALUES": 64,
            "BLOCK_ROWS": 32,
            "num_warps": 4,
            "num_stages": 2,
        }
    elif dim <= 64 or k <= 64 or device == "gfx942":
        tile = {
            "BLOCK_DIM": 64,
            "BLOCK_VALUES": 64,
            "BLOCK_ROWS": 32 if device == "gfx942" else 64,
            "num_warps": 4,
            "num_stages": 2,
        }
    else:
        stages = _stages(device, 64 * 128 * (raw + 2) + 32 * 1024, 3)
        tile = {
            "BLOCK_DIM": 128,
            "BLOCK_VALUES": 128,
            "BLOCK_ROWS": 64,
            "num_warps": 8,
            "num_stages": stages,
        }
    programs = triton.cdiv(dim, tile["BLOCK_DIM"]) * triton.cdiv(k, tile["BLOCK_VALUES"])
    chunks = max(
        1,
        min(
            _MULTIPROCESSORS.get(device, 128) // programs,
            triton.cdiv(rows, 4 * tile["BLOCK_ROWS"]),
            32,
        ),
    )
    return {"PACKED": 0, "CHUNKS": chunks} | tile


def _add_heuristic(
    device: str, itemsize: int, rows: int, dim: int, k: int, raw: int
) -> tiles.Tiles:
    return {"BLOCK_ROWS": 8, "BLOCK_DIM": min(triton.next_power_of_2(dim), 512), "num_warps": 4}


def _fold_heuristic(k: int) -> tiles.Tiles:
    values = min(triton.next_power_of_2(k), 1024)
    return {"BLOCK_DIM": max(1, 1024 // values), "BLOCK_VALUES": values, "num_warps": 4}


def _pack_heuristic(k: int) -> tiles.Tiles:
    """About 4 Ki values a program: at 16 bytes a load 2 of uint8 a thread, and rows long enough to stay in whole sectors."""
    values = min(triton.next_power_of_2(k), 1024)
    return {"BLOCK_ROWS": max(1, 4096 // values), "BLOCK_VALUES": values, "num_warps": 4}


def _sums_heuristic(rows: int, dim: int) -> tiles.Tiles:
    return {
        "BLOCK_ROWS": 16 if rows > 512 else 4,
        "BLOCK_DIM": min(triton.next_power_of_2(dim), 128),
        "num_warps": 4,
    }


def _finish_heuristic(k: int) -> tiles.Tiles:
    values = min(triton.next_power_of_2(k), 1024)
    return {"BLOCK_DIM": max(1, 2048 // values), "BLOCK_VALUES": values, "num_warps": 4}


TUNING: dict[str, list[tiles.Tiles]] = {
    "patch_embed_forward": [
        {"PACKED": 1},
        *(
            {"PACKED": 0, "FOLD": 0, "BLOCK_ROWS": rows, "BLOCK_DIM": dim, "BLOCK_VALUES": values, "num_warps": warps, "num_stages": stages}
            for rows, dim, warps in ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 256, 8), (64, 128, 4), (64, 64, 4))
            for values, stages in ((64, 3), (64, 4), (32, 4))
        ),
        *(
            {"PACKED": 0, "FOLD": 1, "BLOCK_ROWS": rows, "BLOCK_DIM": dim, "BLOCK_VALUES": 64, "num_warps": 4, "num_stages": 2}
            for rows, dim in ((64, 128), (64, 64), (32, 128), (128, 64))
        ),
    ],
    "patch_embed_weight": [
        {"PACKED": 1},
        *(
            {"PACKED": 0, "CHUNKS": chunks, "BLOCK_DIM": dim, "BLOCK_VALUES": values, "BLOCK_ROWS": 64, "num_warps": warps, "num_stages": 3}
            for dim, values, warps in ((128, 128, 8), (128, 128, 4), (64, 128, 4), (128, 64, 4))
            for chunks in (1, 2, 4, 8, 16)
        ),
    ],
    "patch_embed_add": [
        {"BLOCK_ROWS": rows, "BLOCK_DIM": dim, "num_warps": warps} for rows, dim in ((4, 512), (8, 512), (16, 256), (4, 1024)) for warps in (4, 8)
    ],
    "patch_embed_fold": [
        {"BLOCK_DIM": dim, "BLOCK_VALUES": values, "num_warps": 4} for dim in (1, 2, 4) for values in (512, 1024, 2048)
    ],
    "patch_embed_pack": [
        {"BLOCK_ROWS": rows, "BLOCK_VALUES": values, "num_warps": warps}
        for rows, values in ((4, 1024), (8, 512), (16, 256), (2, 1024))
        for warps in (4, 8)
    ],
    "patch_embed_sums": [
        {"BLOCK_ROWS": rows, "BLOCK_DIM": dim, "num_warps": 4} for rows in (4, 8, 16, 32) for dim in (64, 128, 256)
    ],
    "patch_embed_finish": [
        {"BLOCK_DIM": rows, "BLOCK_VALUES": values, "num_warps": 4} for rows in (1, 2, 4) for values in (512, 1024)
    ],
}  # fmt: skip


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
    if reason := objection(patches, weight, bias, position, keep, agg):
        return reason
    if dtype == torch.bfloat16 and interpreted():
        return "Triton's interpreter multiplies the raw bits of bfloat16"
    return refused(patches, weight, bias, position, agg)
