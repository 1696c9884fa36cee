"""The contrastive log-sums in Triton: a tile of scores is computed once, feeds row, col and pos.

The matrix of scores is never stored. Forward: one pass. With a bound that keeps exp(S) and its
sums inside fp32, no maximum is subtracted and a score costs one exp. Without it, rows, columns and
own texts each keep a running maximum. Backward: the weights d loss / d S of a chunk of bounded
size go to memory; two plain matrix products follow, by the vendor's library: 6 E D FLOP, no
atomics. Our kernels give the same bits every run, and so does the library on one stream; under
torch.use_deterministic_algorithms it asks for CUBLAS_WORKSPACE_CONFIG.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..tiles import Tiles
from ..triton_common import LN2, LOG2E, arch, dot_precision, interpreted, unsupported_operands
from .bound import needs_running_max

# M clips of x, N clips in all, P texts a clip, T = N * P texts, D dimensions, R row splits,
# C column splits, E = M * T scores

_MAX_SPLITS = 32  # scratch is 4 bytes * splits a clip and text, beside a vector's 2 D bytes
# where there are few row (column) tiles, the other axis is split further, up to so many programs
_PROGRAMS = 2048
_WEIGHTS_BYTES = 256 << 20  # of a chunk's weights: the whole matrix up to 11585 x 11585 in bf16
_MAX_CHUNK_CLIPS = 8192
_MAX_ROWS = 256  # of a tile
_TEXT_ALIGNMENT = 64  # of the weights' rows: what matrix products like


@triton.jit
def _products(
    x,
    y,
    stride_x,
    stride_y,
    M,
    T,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Dot products x[m] . y[n] (BLOCK_M, BLOCK_N) fp32 of the tile that starts at x and y.

    M and T rows are left; past the last one, that row is repeated.
    """
    d = tl.arange(0, BLOCK_D)
    # repeated rows instead of masks: a predicate per load and stage costs so many registers that
    # no second tile fits the core
    x_at = x + (tl.minimum(tl.arange(0, BLOCK_M), M - 1)[:, None] * stride_x + d[None, :])
    y_at = y + (tl.minimum(tl.arange(0, BLOCK_N), T - 1)[None, :] * stride_y + d[:, None])
    products = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D, BLOCK_D):
        if D % BLOCK_D == 0:
            x_part = tl.load(x_at + start)
            y_part = tl.load(y_at + start)
        else:
            x_part = tl.load(x_at + start, mask=(d < D - start)[None, :], other=0.0)
            y_part = tl.load(y_at + start, mask=(d < D - start)[:, None], other=0.0)
        products = tl.dot(x_part, y_part, products, input_precision=PRECISION)
    return products


@triton.jit
def _valid(valid, index, inside):
    """Which of ``index`` exist and are valid; valid None: all."""
    if valid is not None:
        inside = inside & (tl.load(valid + index, mask=inside, other=0) != 0)
    return inside


@triton.jit
def _own(clips, texts, P):
    """(BLOCK_M, BLOCK_N): text belongs to clip."""
    first = (clips * P)[:, None]
    return (texts[None, :] >= first) & (texts[None, :] < first + P)


@triton.jit
def _exp(scores, BASE2: tl.constexpr):
    """exp of scores; of scores times log2(e), if they are kept so, which takes a quarter of the
    instructions."""
    return tl.exp2(scores) if BASE2 else tl.exp(scores)


@triton.jit
def _add_scores(m, l, scores, AXIS: tl.constexpr, BASE2: tl.constexpr):
    """Add a tile of scores to a running log-sum m + log(l), m the maximum so far; -inf adds 0."""
    new_m = tl.maximum(m, tl.max(scores, AXIS))
    # nothing seen yet: -inf less -inf would be nan
    finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
    terms = _exp(scores - tl.expand_dims(finite_m, AXIS), BASE2)
    return new_m, l * _exp(m - finite_m, BASE2) + tl.sum(terms, AXIS)


# -- forward -----------------------------------------------------------------------------------


# Sizes vary from batch to batch, masks are slices of others: no code of its own for T = 1 or
# addresses of 16 bytes. Strides keep it, since wide loads rest on them.
@triton.jit(
    do_not_specialize=["M", "T", "first", "P", "row_splits", "col_splits"],
    do_not_specialize_on_alignment=["x_valid", "y_valid"],
)
def _forward_kernel(
    x, y, scale, x_valid, y_valid, sums, maxima,
    stride_x, stride_y, M, T, first, P, row_splits, col_splits,
    D: tl.constexpr, RUNNING: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: every row_splits-th tile of clips by every col_splits-th tile of texts.

    Each score is computed once. Writes the log-sums of what it saw as sums and, if RUNNING,
    maxima; both are row (C, M), pos (C, M) and col (R, T) behind one another. Its line of col
    grows from one row tile to the next; no other program writes there.
    """
    row_split = tl.program_id(0) % row_splits  # neighbours share their texts in the cache
    col_split = tl.program_id(0) // row_splits
    # _splits leaves every program a tile; to test for none costs a register, spilled on sm_120
    tl.assume(col_split < tl.cdiv(T, BLOCK_N))
    own_at = tl.cast(col_splits, tl.int64) * M
    row_line, own_line = tl.cast(col_split, tl.int64) * M, own_at + tl.cast(col_split, tl.int64) * M
    col_line = 2 * own_at + tl.cast(row_split, tl.int64) * T
    factor = tl.load(scale).to(tl.float32)
    if BASE2:
        factor *= LOG2E
    for i in range(row_split, tl.cdiv(M, BLOCK_M), row_splits):
        rows = i * BLOCK_M + tl.arange(0, BLOCK_M)
        x_inside = rows < M
        x_counts = _valid(x_valid, rows, x_inside)
        first_clip = first + i * BLOCK_M
        x_tile = x + tl.cast(i * BLOCK_M, tl.int64) * stride_x
        row_l = tl.zeros([BLOCK_M], tl.float32)
        own_l = tl.zeros([BLOCK_M], tl.float32)
        row_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        own_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for j in range(col_split, tl.cdiv(T, BLOCK_N), col_splits):
            texts = j * BLOCK_N + tl.arange(0, BLOCK_N)
            y_inside = texts < T
            y_counts = _valid(y_valid, texts, y_inside)
            y_tile = y + tl.cast(j * BLOCK_N, tl.int64) * stride_y
            products = _products(
                *(x_tile, y_tile, stride_x, stride_y),
                *(M - i * BLOCK_M, T - j * BLOCK_N, D, PRECISION),
                *(BLOCK_M, BLOCK_N, BLOCK_D),
            )
            # own texts first, and their exp is taken anew: to keep a tile of scores through this
            # branch costs registers, and few tiles enter it
            if (j * BLOCK_N < (first_clip + BLOCK_M) * P) & ((j + 1) * BLOCK_N > first_clip * P):
                is_own = _own(first + rows, texts, P) & y_counts[None, :]
                own = tl.where(is_own, products * factor, float("-inf"))
                if RUNNING:
                    own_m, own_l = _add_scores(own_m, own_l, own, 1, BASE2)
                else:
                    own_l += tl.sum(_exp(own, BASE2), 1)
            scores = tl.where(y_counts[None, :], products * factor, float("-inf"))
            seen = y_inside & (i != row_split)  # this program's earlier row tiles
            if RUNNING:
                row_m, row_l = _add_scores(row_m, row_l, scores, 1, BASE2)
                col_m = tl.load(maxima + col_line + texts, mask=seen, other=float("-inf"))
                col_l = tl.load(sums + col_line + texts, mask=seen, other=0.0)
                counted = tl.where(x_counts[:, None], scores, float("-inf"))
                col_m, col_l = _add_scores(col_m, col_l, counted, 0, BASE2)
                tl.store(maxima + col_line + texts, col_m, mask=y_inside)
            else:
                terms = _exp(scores, BASE2)
                row_l += tl.sum(terms, 1)
                col_l = tl.sum(tl.where(x_counts[:, None], terms, 0.0), 0)
                col_l += tl.load(sums + col_line + texts, mask=seen, other=0.0)
            tl.store(sums + col_line + texts, col_l, mask=y_inside)
        tl.store(sums + row_line + rows, row_l, mask=x_inside)
        tl.store(sums + own_line + rows, own_l, mask=x_inside)
        if RUNNING:
            tl.store(maxima + row_line + rows, row_m, mask=x_inside)
            tl.store(maxima + own_line + rows, own_m, mask=x_inside)
        # The next row tile reads this one's columns, maybe by other threads: the barrier has to
        # order a block's stores and loads of global memory. CUDA's does. AMD's waits for none, but
        # CDNA's blocks have one compute unit, whose cache serves them in order (LLVM's memory model
        # for gfx90a and gfx942). RDNA's may have two: see ``unsupported``.
        tl.debug_barrier()


@triton.jit
def _join(
    sums, maxima, joined, size, splits,
    RUNNING: tl.constexpr, BASE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The log-sums of one block of row, pos or col, its splits taken in order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    l = tl.zeros([BLOCK], tl.float32)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * size + index
        part_l = tl.load(sums + at, mask=inside, other=0.0)
        if RUNNING:
            part_m = tl.load(maxima + at, mask=inside, other=float("-inf"))
            new_m = tl.maximum(m, part_m)
            finite_m = tl.where(new_m == float("-inf"), 0.0, new_m)
            l = l * _exp(m - finite_m, BASE2) + part_l * _exp(part_m - finite_m, BASE2)
            m = new_m
        else:
            l += part_l
    empty = l == 0.0
    # few values, so in fp64: rounded once, when stored
    lse = tl.log(tl.where(empty, 1.0, l).to(tl.float64))
    if RUNNING:
        lse += m.to(tl.float64) * LN2 if BASE2 else m
    tl.store(joined + index, tl.where(empty, float("-inf"), lse).to(tl.float32), mask=inside)


@triton.jit(do_not_specialize=["M", "T", "row_splits", "col_splits"])
def _join_kernel(
    sums,
    maxima,
    row,
    pos,
    col,
    M,
    T,
    row_splits,
    col_splits,
    RUNNING: tl.constexpr,
    BASE2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK values of row, pos or col (axis 1 says which), joined from all splits."""
    own_at = tl.cast(col_splits, tl.int64) * M
    if tl.program_id(1) == 0:
        _join(sums, maxima, row, M, col_splits, RUNNING, BASE2, BLOCK)
    elif tl.program_id(1) == 1:
        _join(sums + own_at, maxima + own_at, pos, M, col_splits, RUNNING, BASE2, BLOCK)
    else:
        _join(sums + 2 * own_at, maxima + 2 * own_at, col, T, row_splits, RUNNING, BASE2, BLOCK)


def forward(x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None):
    x, y = _rows(x), _rows(y)
    x_valid, y_valid = _mask(x_valid), _mask(y_valid)
    (M, D), T = x.shape, y.shape[0]
    running, precision = needs_running_max(bound), dot_precision(x.dtype)
    sizes = (M, T, D, precision, running)
    blocks = _choose("contrastive_lse_forward", arch(), x.dtype, *sizes)
    R, C = _splits(M, T, blocks)
    scratch = _lines((2 * C * M + R * T,) * (2 if running else 1), x.device)
    sums, maxima = scratch[0], scratch[-1]
    inputs = (x, y, scale, x_valid, y_valid)
    places = (x.stride(0), y.stride(0), M, T, first, texts_per_clip, R, C)
    how = _how(x, running)
    _forward_kernel[(R * C,)](
        *inputs, sums, maxima, *places, D=D, PRECISION=precision, **how, **blocks
    )
    row, pos, col = (torch.empty(size, dtype=torch.float32, device=x.device) for size in (M, M, T))
    _join_kernel[(triton.cdiv(max(M, T), 128), 3)](
        sums, maxima, row, pos, col, M, T, R, C, **how, BLOCK=128, num_warps=4
    )
    return row, col, pos


# -- backward ----------------------------------------------------------------------------------


@triton.jit
def _prepare_gradients(
    d_lse, lse, gradients, lses, size,
    RUNNING: tl.constexpr, BASE2: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of row, pos or col, as ``_prepare_gradients_kernel`` says."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(lse + index, mask=inside, other=0.0)
    gradient = tl.load(d_lse + index, mask=inside, other=0.0)
    empty = value == float("-inf")
    if RUNNING:
        like_scores = value * LOG2E if BASE2 else value
        tl.store(lses + index, tl.where(empty, float("inf"), like_scores), mask=inside)
    else:  # few values, so in fp64: rounded once
        gradient = (gradient * tl.exp(-value.to(tl.float64))).to(tl.float32)
    tl.store(gradients + index, tl.where(empty, 0.0, gradient), mask=inside)


@triton.jit(
    do_not_specialize=["M", "T"],
    do_not_specialize_on_alignment=["d_row", "d_pos", "d_col", "row", "pos", "col"],
)
def _prepare_gradients_kernel(
    d_row,
    d_pos,
    d_col,
    row,
    pos,
    col,
    row_gradients,
    pos_gradients,
    col_gradients,
    row_lses,
    pos_lses,
    col_lses,
    M,
    T,
    RUNNING: tl.constexpr,
    BASE2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK values of row, pos or col (axis 1 says which).

    Writes gradient g and, if RUNNING, lse l (as scores are kept), such that a score's weight is
    g exp(S - l), or g exp(S) unless RUNNING. An empty set has g = 0 and l = inf, whatever gradient
    comes in.
    """
    if tl.program_id(1) == 0:
        _prepare_gradients(d_row, row, row_gradients, row_lses, M, RUNNING, BASE2, BLOCK)
    elif tl.program_id(1) == 1:
        _prepare_gradients(d_pos, pos, pos_gradients, pos_lses, M, RUNNING, BASE2, BLOCK)
    else:
        _prepare_gradients(d_col, col, col_gradients, col_lses, T, RUNNING, BASE2, BLOCK)


@triton.jit
def _store_weights(
    products,
    factor,
    x_inside,
    y_inside,
    x_counts,
    y_counts,
    rows,
    texts,
    first,
    first_text,
    P,
    row_gradients,
    pos_gradients,
    col_gradients,
    row_lses,
    pos_lses,
    col_lses,
    weights,
    d_scales,
    stride_w,
    i,
    j,
    OWN: tl.constexpr,
    RUNNING: tl.constexpr,
    BASE2: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the weights of tile (i, j) and its part of d_scale.

    OWN: some texts may be their clips' own.
    """
    row_gradient = tl.load(row_gradients + rows, mask=x_inside, other=0.0)[:, None]
    col_gradient = tl.load(col_gradients + texts, mask=y_inside, other=0.0)[None, :]
    to_scores = factor * LOG2E if BASE2 else factor
    scores = tl.where(y_counts[None, :], products * to_scores, float("-inf"))
    if OWN:
        own = _own(first + rows, first_text + texts, P)
        own_gradient = tl.load(pos_gradients + rows, mask=x_inside, other=0.0)[:, None]
    if RUNNING:
        row_lse = tl.load(row_lses + rows, mask=x_inside, other=float("inf"))[:, None]
        values = _exp(scores - row_lse, BASE2) * row_gradient
        col_lse = tl.load(col_lses + texts, mask=y_inside, other=float("inf"))[None, :]
        col_values = _exp(scores - col_lse, BASE2) * col_gradient
        values += tl.where(x_counts[:, None], col_values, 0.0)
        if OWN:
            own_lse = tl.load(pos_lses + rows, mask=x_inside, other=float("inf"))[:, None]
            own_values = _exp(scores - own_lse, BASE2) * own_gradient
            values += tl.where(own, own_values, 0.0)
    else:
        gradients = row_gradient + tl.where(x_counts[:, None], col_gradient, 0.0)
        if OWN:
            gradients += tl.where(own, own_gradient, 0.0)
        values = _exp(scores, BASE2) * gradients
    tl.store(d_scales + tl.program_id(0), tl.sum(values * products))
    at = weights + (tl.cast(i * BLOCK_M, tl.int64) * stride_w + j * BLOCK_N)
    at += tl.arange(0, BLOCK_M)[:, None] * stride_w + tl.arange(0, BLOCK_N)[None, :]
    # up to the line's end, which is a multiple of 64: a bound of T would take 2 bytes a store
    on_line = j * BLOCK_N + tl.arange(0, BLOCK_N) < stride_w
    inside = x_inside[:, None] & on_line[None, :]
    if weights.dtype.element_ty != tl.float16:  # its range is the host's business
        values *= factor
    tl.store(at, values.to(weights.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=["M", "T", "first", "first_text", "P"],
    do_not_specialize_on_alignment=["x_valid", "y_valid"],
)
def _weights_kernel(
    x, y, scale, x_valid, y_valid,
    row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses,
    weights, d_scales,
    stride_x, stride_y, stride_w, M, T, first, first_text, P,
    D: tl.constexpr, RUNNING: tl.constexpr, BASE2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile of the weights of a chunk (M, T), and the tile's part of d_scale.

    weights = scale * d loss / d scores, in x's dtype; in fp16 they are not scaled. first and
    first_text place the chunk: its first clip, its first text.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(T, BLOCK_N)
    # GROUP_M row tiles share a column tile before the next one: programs that run at the same
    # time read few different clips and texts
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * tiles_n)
    i, j = band * GROUP_M + place % height, place // height

    rows, texts = i * BLOCK_M + tl.arange(0, BLOCK_M), j * BLOCK_N + tl.arange(0, BLOCK_N)
    x_inside, y_inside = rows < M, texts < T
    x_counts, y_counts = _valid(x_valid, rows, x_inside), _valid(y_valid, texts, y_inside)
    x_tile = x + tl.cast(i * BLOCK_M, tl.int64) * stride_x
    y_tile = y + tl.cast(j * BLOCK_N, tl.int64) * stride_y
    products = _products(
        *(x_tile, y_tile, stride_x, stride_y),
        *(M - i * BLOCK_M, T - j * BLOCK_N, D, PRECISION),
        *(BLOCK_M, BLOCK_N, BLOCK_D),
    )
    factor = tl.load(scale).to(tl.float32)
    first_clip, first_column = first + i * BLOCK_M, first_text + j * BLOCK_N
    scores = (products, factor, x_inside, y_inside, x_counts, y_counts)
    where = (rows, texts, first, first_text, P)
    gradients = (row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses)
    target = (weights, d_scales, stride_w, i, j)
    # few tiles hold clips' own texts. A branch of their own spares the others the time, and the
    # registers that one common end would hold for both.
    if (first_column < (first_clip + BLOCK_M) * P) & (first_column + BLOCK_N > first_clip * P):
        _store_weights(
            *scores, *where, *gradients, *target, *(True, RUNNING, BASE2, BLOCK_M, BLOCK_N)
        )
    else:
        _store_weights(
            *scores, *where, *gradients, *target, *(False, RUNNING, BASE2, BLOCK_M, BLOCK_N)
        )


def backward(
    d_row,
    d_col,
    d_pos,
    x,
    y,
    row,
    col,
    pos,
    *,
    scale,
    texts_per_clip,
    first,
    x_valid=None,
    y_valid=None,
    bound=None,
):
    x, y = _rows(x), _rows(y)
    x_valid, y_valid = _mask(x_valid), _mask(y_valid)
    d_row, d_col, d_pos, row, col, pos = (
        vector.contiguous() for vector in (d_row, d_col, d_pos, row, col, pos)
    )
    (M, D), T = x.shape, y.shape[0]
    running, precision = needs_running_max(bound), dot_precision(x.dtype)
    clips, texts = _chunk(M, T, x.element_size())
    sizes = (clips, texts, D, precision, running)
    blocks = {"GROUP_M": 8} | _choose("contrastive_lse_weights", arch(), x.dtype, *sizes)

    how = _how(x, running)
    gradients = _lines((M, M, T), x.device)  # of row, pos, col
    prepared = [*gradients, *(_lines((M, M, T), x.device) if running else gradients)]
    log_sums = (d_row, d_pos, d_col, row, pos, col)
    _prepare_gradients_kernel[(triton.cdiv(max(M, T), 128), 3)](
        *log_sums, *prepared, M, T, **how, BLOCK=128, num_warps=4
    )
    weights = x.new_empty((clips, triton.cdiv(texts, _TEXT_ALIGNMENT) * _TEXT_ALIGNMENT))
    strides = (x.stride(0), y.stride(0), weights.stride(0))
    d_scale = torch.zeros((), dtype=torch.float32, device=x.device)
    d_x, d_y = _Sum(x, parts=triton.cdiv(T, texts)), _Sum(y, parts=triton.cdiv(M, clips))
    for i in range(0, M, clips):
        for j in range(0, T, texts):
            these, those = slice(i, min(i + clips, M)), slice(j, min(j + texts, T))
            x_part, y_part = x[these], y[those]
            m, t = x_part.shape[0], y_part.shape[0]
            programs = triton.cdiv(m, blocks["BLOCK_M"]) * triton.cdiv(t, blocks["BLOCK_N"])
            d_scales = torch.empty(programs, dtype=torch.float32, device=x.device)
            inputs = (
                *(x_part, y_part, scale),
                None if x_valid is None else x_valid[these],
                None if y_valid is None else y_valid[those],
                *(x[at] for x, at in zip(prepared, (these, these, those) * 2, strict=True)),
            )
            places = (*strides, m, t, first + i, j, texts_per_clip)
            _weights_kernel[(programs,)](
                *inputs, weights, d_scales, *places, D=D, PRECISION=precision, **how, **blocks
            )
            part = weights[:m, :t]
            d_scale += d_scales.sum()
            d_x.add(these, part, y_part)
            d_y.add(those, part.t(), x_part)
    if x.dtype == torch.float16:
        # weights scaled by 14 and by a GradScaler's 65536 would pass 65504, or be lost in products
        return d_x.total * scale, d_y.total * scale, d_scale
    return d_x.total, d_y.total, d_scale


class _Sum:
    """Sums of matrix products into rows of a gradient like ``inputs``.

    They are kept in the dtype of ``inputs`` if there is one product a row, else in fp32, and so is
    fp16, whose sums are still to be scaled.
    """

    def __init__(self, inputs, parts):
        self.once = parts == 1 and inputs.dtype != torch.float16
        make = inputs.new_empty if self.once else inputs.new_zeros
        self.total = make(inputs.shape, dtype=inputs.dtype if self.once else torch.float32)

    def add(self, rows, a, b):
        if self.once:
            torch.mm(a, b, out=self.total[rows])
        elif a.is_cuda and not torch.version.hip and a.dtype != torch.float32:
            self.total[rows] += torch.mm(a, b, out_dtype=torch.float32)
        else:  # ROCm before torch 2.10 and CPU have no 16-bit product with an fp32 result
            self.total[rows] += a @ b


def _rows(vectors):
    """Kernels and matrix products read rows whose elements are contiguous.

    The rows of a tile lie in 31 bits: 64 would cost 10 registers a thread.
    """
    near = vectors.stride(0) * _MAX_ROWS < 2**31
    return vectors if near and vectors.stride(-1) == 1 else vectors.contiguous()


def _how(x, running: bool) -> dict[str, bool]:
    """Scores of 16-bit vectors are kept times log2(e), where exp is exp2. Of fp32 they are not:
    the factor's rounding would show in the log-sums."""
    return dict(RUNNING=running, BASE2=x.dtype.itemsize == 2)


def _lines(lengths, device) -> list[torch.Tensor]:
    """fp32 vectors in one allocation, each from a multiple of 16 bytes on.

    Kernels are compiled anew for pointers of another alignment, which odd lengths would bring.
    """
    padded = [triton.cdiv(length, 4) * 4 for length in lengths]
    parts = torch.empty(sum(padded), dtype=torch.float32, device=device).split(padded)
    return [part[:length] for part, length in zip(parts, lengths, strict=True)]


def _mask(valid):
    """Kernels read masks as contiguous; a column of one or an expanded value is not."""
    return None if valid is None else valid.contiguous()


# -- tiles -------------------------------------------------------------------------------------


@tiles.memoised
def _choose(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    clips: int,
    texts: int,
    dim: int,
    precision: str,
    running: bool,
) -> Tiles:
    heuristic = _heuristic(tiles.family(arch), dtype, clips, texts, dim, precision, running)
    shape = dict(clips=clips, texts=texts, dim=dim)
    return tiles.choose(kernel, arch, dtype, heuristic, **shape)


def _splits(M: int, T: int, blocks: Tiles) -> tuple[int, int]:
    """(R, C): how many programs share the row tiles, the column tiles.

    Enough programs for any GPU; scratch stays O(M + T).
    """
    tiles_m, tiles_n = triton.cdiv(M, blocks["BLOCK_M"]), triton.cdiv(T, blocks["BLOCK_N"])
    R, C = min(tiles_m, _MAX_SPLITS), min(tiles_n, _MAX_SPLITS)
    if R < _MAX_SPLITS:
        C = min(tiles_n, triton.cdiv(_PROGRAMS, R))
    elif C < _MAX_SPLITS:
        R = min(tiles_m, triton.cdiv(_PROGRAMS, C))
    return R, C


def _chunk(M: int, T: int, element_size: int) -> tuple[int, int]:
    """(clips, texts) of a chunk of weights.

    All of both where that fits the budget, else few enough clips for many texts.
    """
    budget = _WEIGHTS_BYTES // element_size
    aligned = triton.cdiv(T, _TEXT_ALIGNMENT) * _TEXT_ALIGNMENT
    if M * aligned <= budget:
        return M, T
    clips = min(M, _MAX_CHUNK_CLIPS)
    return clips, min(T, max(budget // clips // _TEXT_ALIGNMENT, 1) * _TEXT_ALIGNMENT)


def _heuristic(
    arch: str,
    dtype: torch.dtype,
    clips: int,
    texts: int,
    dim: int,
    precision: str,
    running: bool,
) -> Tiles:
    """Tiles of both kernels: large ones for the matrix unit, if every core still gets one.

    running: with maxima; then, and in tf32, registers hold half of a large tile.
    """

    def count(block_m, block_n):
        return triton.cdiv(clips, block_m) * triton.cdiv(texts, block_n)

    # one step of 64 is unrolled with all its loads ahead, and spills on sm_120 (triton 3.7.1): so
    # two of 32
    largest = 64 if dtype.itemsize == 2 and dim > 64 else 32
    block_d = min(largest, max(16, triton.next_power_of_2(dim)))
    stages = 2 if arch.startswith("gfx") else 3
    if dtype.itemsize == 4 and precision == "ieee":  # no matrix unit
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=block_d, num_warps=4, num_stages=2)
    if running and arch == "sm_100":  # larger ones spill in their loop (triton 3.7.1)
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=block_d, num_warps=8, num_stages=stages)
    if count(128, 128) >= 256:
        width = 64 if running or dtype.itemsize == 4 else 128
        return dict(BLOCK_M=128, BLOCK_N=width, BLOCK_D=block_d, num_warps=8, num_stages=stages)
    if running:
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=block_d, num_warps=4, num_stages=stages)
    if count(64, 128) >= 128 or arch == "sm_100":  # there 64 x 64 spills (triton 3.7.1)
        return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_D=block_d, num_warps=4, num_stages=stages)
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=block_d, num_warps=4, num_stages=stages)


_SHAPES = ((64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 128, 4), (128, 128, 8), (128, 256, 8))
_CANDIDATES: list[Tiles] = [
    *(
        dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d, num_warps=warps, num_stages=stages)
        for m, n, warps in _SHAPES
        for d, stages in ((64, 3), (64, 4), (32, 4))
    ),
    *(  # few registers, for two or three tiles on a core
        dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d, num_warps=warps, num_stages=3, maxnreg=most)
        for m, n, warps, most in ((64, 128, 4, 168), (128, 128, 8, 128))
        for d in (64, 32)
        if torch.version.hip is None  # whose compiler has no such option
    ),
]
TUNING: dict[str, list[Tiles]] = {
    "contrastive_lse_forward": _CANDIDATES,
    "contrastive_lse_weights": _CANDIDATES,
}


def unsupported(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> str | None:
    if reason := unsupported_operands(x, y, scale, x_valid, y_valid):
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype} is for the reference"
    if torch.version.hip and not interpreted() and arch().startswith("gfx1"):
        return "on RDNA no barrier orders global memory, on which its column sums rest"
    if max(y.shape[0], x.shape[0] + first) * texts_per_clip >= 2**31:
        return "it counts texts in 32 bits"
    return None
