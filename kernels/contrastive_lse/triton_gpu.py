"""The contrastive log-sums in Triton: a tile of scores is computed once, feeds row, col and pos, and is gone.

Forward: one pass. With a promised bound that keeps exp(S) and its sums inside fp32 no maximum is subtracted and a score costs one exp;
without, rows, columns and own texts each keep a running maximum. Backward: the weights d loss / d S of a chunk of bounded size go to memory,
then two plain matrix products, which are the vendor library's: 6 E D FLOP, no atomics, the same bits every run.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..tiles import Tiles
from ..triton_common import arch, interpreted, objection
from .bound import needs_running_max

# M clips of x, N clips in all, P texts a clip, T = N * P texts, D dimensions, R row splits, C column splits, E = M * T scores

_MAX_SPLITS = (
    32  # scratch is 4 bytes * splits a clip and text, beside 2 D bytes for the vector itself
)
_PROGRAMS = 2048  # where there are few row (column) tiles, the other axis is split further, up to so many programs
_WEIGHTS_BYTES = 256 << 20  # of a chunk's weights: the whole matrix up to 11585 x 11585 in bf16
_MAX_CHUNK_CLIPS = 8192
_TEXT_ALIGNMENT = 64  # of the weights' rows: what matrix products like


@triton.jit
def _products(
    x, y, stride_x, stride_y, M, T, D: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """x[m] . y[n] (BLOCK_M, BLOCK_N) fp32 of the tile that starts at x and y; past the last of M (T) rows left, that row is repeated."""
    d = tl.arange(0, BLOCK_D)
    # repeated rows instead of masks: a predicate per load and stage costs the registers of a second tile on the core
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
def _fold(peak, total, scores, AXIS: tl.constexpr):
    """A running log-sum, peak + log(total), takes in a tile of scores; -inf counts as absent."""
    higher = tl.maximum(peak, tl.max(scores, AXIS))
    safe = tl.where(
        higher == float("-inf"), 0.0, higher
    )  # nothing seen yet: -inf less -inf would be nan
    total = total * tl.exp(peak - safe) + tl.sum(tl.exp(scores - tl.expand_dims(safe, AXIS)), AXIS)
    return higher, total


@triton.jit
def _forward_kernel(
    x, y, scale, x_valid, y_valid, totals, peaks, stride_x, stride_y, M, T, first, P, row_splits, col_splits,
    D: tl.constexpr, RUNNING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: every row_splits-th tile of clips against every col_splits-th tile of texts, each score computed once.

    Leaves log-sums over what it saw as total and, if RUNNING, peak; both are row (C, M), pos (C, M) and col (R, T) behind one another. Its
    line of col grows from one row tile to the next; nobody else writes there.
    """
    row_split = tl.program_id(0) % row_splits  # neighbours share their texts in the cache
    col_split = tl.program_id(0) // row_splits
    own_at = tl.cast(col_splits, tl.int64) * M
    row_line, own_line = tl.cast(col_split, tl.int64) * M, own_at + tl.cast(col_split, tl.int64) * M
    col_line = 2 * own_at + tl.cast(row_split, tl.int64) * T
    factor = tl.load(scale).to(tl.float32)
    for m in range(row_split, tl.cdiv(M, BLOCK_M), row_splits):
        rows = m * BLOCK_M + tl.arange(0, BLOCK_M)
        x_inside = rows < M
        x_counts = _valid(x_valid, rows, x_inside)
        first_clip = first + m * BLOCK_M
        x_tile = x + tl.cast(m * BLOCK_M, tl.int64) * stride_x
        row_total = tl.zeros([BLOCK_M], tl.float32)
        own_total = tl.zeros([BLOCK_M], tl.float32)
        row_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        own_peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for n in range(col_split, tl.cdiv(T, BLOCK_N), col_splits):
            texts = n * BLOCK_N + tl.arange(0, BLOCK_N)
            y_inside = texts < T
            y_counts = _valid(y_valid, texts, y_inside)
            y_tile = y + tl.cast(n * BLOCK_N, tl.int64) * stride_y
            products = _products(
                x_tile,
                y_tile,
                stride_x,
                stride_y,
                M - m * BLOCK_M,
                T - n * BLOCK_N,
                D,
                PRECISION,
                BLOCK_M,
                BLOCK_N,
                BLOCK_D,
            )
            # own texts first, their exp taken anew: to keep a tile of scores through this branch costs registers, and few tiles enter it
            if (n * BLOCK_N < (first_clip + BLOCK_M) * P) & ((n + 1) * BLOCK_N > first_clip * P):
                own = tl.where(
                    _own(first + rows, texts, P) & y_counts[None, :],
                    products * factor,
                    float("-inf"),
                )
                if RUNNING:
                    own_peak, own_total = _fold(own_peak, own_total, own, 1)
                else:
                    own_total += tl.sum(tl.exp(own), 1)
            scores = tl.where(y_counts[None, :], products * factor, float("-inf"))
            seen = y_inside & (m != row_split)  # this program's earlier row tiles
            if RUNNING:
                row_peak, row_total = _fold(row_peak, row_total, scores, 1)
                col_peak = tl.load(peaks + col_line + texts, mask=seen, other=float("-inf"))
                col_total = tl.load(totals + col_line + texts, mask=seen, other=0.0)
                col_peak, col_total = _fold(
                    col_peak, col_total, tl.where(x_counts[:, None], scores, float("-inf")), 0
                )
                tl.store(peaks + col_line + texts, col_peak, mask=y_inside)
            else:
                terms = tl.exp(scores)
                row_total += tl.sum(terms, 1)
                col_total = tl.sum(tl.where(x_counts[:, None], terms, 0.0), 0)
                col_total += tl.load(totals + col_line + texts, mask=seen, other=0.0)
            tl.store(totals + col_line + texts, col_total, mask=y_inside)
        tl.store(totals + row_line + rows, row_total, mask=x_inside)
        tl.store(totals + own_line + rows, own_total, mask=x_inside)
        if RUNNING:
            tl.store(peaks + row_line + rows, row_peak, mask=x_inside)
            tl.store(peaks + own_line + rows, own_peak, mask=x_inside)
        tl.debug_barrier()  # the next row tile reads this one's columns, maybe by other threads


@triton.jit
def _join(totals, peaks, joined, size, splits, RUNNING: tl.constexpr, BLOCK: tl.constexpr):
    """The log-sums of one block of one of the three, its splits taken in order."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    total = tl.zeros([BLOCK], tl.float32)
    peak = tl.full([BLOCK], float("-inf"), tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * size + index
        part = tl.load(totals + at, mask=inside, other=0.0)
        if RUNNING:
            part_peak = tl.load(peaks + at, mask=inside, other=float("-inf"))
            higher = tl.maximum(peak, part_peak)
            safe = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(peak - safe) + part * tl.exp(part_peak - safe)
            peak = higher
        else:
            total += part
    empty = total == 0.0
    lse = tl.log(
        tl.where(empty, 1.0, total).to(tl.float64)
    )  # few values: rounded once, when stored
    if RUNNING:
        lse += peak
    tl.store(joined + index, tl.where(empty, float("-inf"), lse).to(tl.float32), mask=inside)


@triton.jit
def _join_kernel(
    totals,
    peaks,
    row,
    pos,
    col,
    M,
    T,
    row_splits,
    col_splits,
    RUNNING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK values of row, pos or col (axis 1 says which), from what all splits left of them."""
    own_at = tl.cast(col_splits, tl.int64) * M
    if tl.program_id(1) == 0:
        _join(totals, peaks, row, M, col_splits, RUNNING, BLOCK)
    elif tl.program_id(1) == 1:
        _join(totals + own_at, peaks + own_at, pos, M, col_splits, RUNNING, BLOCK)
    else:
        _join(totals + 2 * own_at, peaks + 2 * own_at, col, T, row_splits, RUNNING, BLOCK)


def forward(x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None):
    x, y = _rows(x), _rows(y)
    (M, D), T = x.shape, y.shape[0]
    running, precision = needs_running_max(bound), _precision(x)
    tile = tiles.choose(
        "contrastive_lse_forward",
        arch(),
        x.dtype,
        _tile(arch(), x.dtype, M, T, D, precision),
        clips=M,
        texts=T,
        dim=D,
    )
    R, C = _splits(M, T, tile)
    scratch = torch.empty(
        (2 if running else 1, 2 * C * M + R * T), dtype=torch.float32, device=x.device
    )
    totals, peaks = scratch[0], scratch[-1]
    _forward_kernel[(R * C,)](
        x, y, scale, x_valid, y_valid, totals, peaks, x.stride(0), y.stride(0), M, T, first, texts_per_clip, R, C,
        D=D, RUNNING=running, PRECISION=precision, **tile,
    )  # fmt: skip
    row, pos, col = (torch.empty(size, dtype=torch.float32, device=x.device) for size in (M, M, T))
    _join_kernel[(triton.cdiv(max(M, T), 128), 3)](
        totals, peaks, row, pos, col, M, T, R, C, RUNNING=running, BLOCK=128, num_warps=4
    )
    return row, col, pos


@triton.jit
def _share(d_lse, lse, gradients, lses, size, RUNNING: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = index < size
    value = tl.load(lse + index, mask=inside, other=0.0)
    gradient = tl.load(d_lse + index, mask=inside, other=0.0)
    empty = value == float("-inf")
    if RUNNING:
        tl.store(lses + index, tl.where(empty, float("inf"), value), mask=inside)
    else:
        gradient = (gradient * tl.exp(-value.to(tl.float64))).to(
            tl.float32
        )  # few values: rounded once
    tl.store(gradients + index, tl.where(empty, 0.0, gradient), mask=inside)


@triton.jit
def _share_kernel(
    d_row, d_pos, d_col, row, pos, col, row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses, M, T,
    RUNNING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK values of row, pos or col (axis 1 says which): gradient g and lse l such that a score's weight is g exp(S - l), or
    g exp(S) unless RUNNING. An empty set has g = 0 and l = inf, whatever gradient comes in."""
    if tl.program_id(1) == 0:
        _share(d_row, row, row_gradients, row_lses, M, RUNNING, BLOCK)
    elif tl.program_id(1) == 1:
        _share(d_pos, pos, pos_gradients, pos_lses, M, RUNNING, BLOCK)
    else:
        _share(d_col, col, col_gradients, col_lses, T, RUNNING, BLOCK)


@triton.jit
def _leave(
    products, factor, x_inside, y_inside, x_counts, y_counts, rows, texts, first, first_text, P,
    row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses, weights, d_scales, stride_w, m, n,
    OWN: tl.constexpr, RUNNING: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Weigh the scores of tile (m, n), store the weights and their part of d_scale. OWN: some texts may be their clips' own."""
    row_gradient = tl.load(row_gradients + rows, mask=x_inside, other=0.0)[:, None]
    col_gradient = tl.load(col_gradients + texts, mask=y_inside, other=0.0)[None, :]
    scores = tl.where(y_counts[None, :], products * factor, float("-inf"))
    if OWN:
        own = _own(first + rows, first_text + texts, P)
        own_gradient = tl.load(pos_gradients + rows, mask=x_inside, other=0.0)[:, None]
    if RUNNING:
        values = (
            tl.exp(scores - tl.load(row_lses + rows, mask=x_inside, other=float("inf"))[:, None])
            * row_gradient
        )
        col_values = (
            tl.exp(scores - tl.load(col_lses + texts, mask=y_inside, other=float("inf"))[None, :])
            * col_gradient
        )
        values += tl.where(x_counts[:, None], col_values, 0.0)
        if OWN:
            own_values = (
                tl.exp(
                    scores - tl.load(pos_lses + rows, mask=x_inside, other=float("inf"))[:, None]
                )
                * own_gradient
            )
            values += tl.where(own, own_values, 0.0)
    else:
        gradients = row_gradient + tl.where(x_counts[:, None], col_gradient, 0.0)
        if OWN:
            gradients += tl.where(own, own_gradient, 0.0)
        values = tl.exp(scores) * gradients
    tl.store(d_scales + tl.program_id(0), tl.sum(values * products))
    at = weights + (tl.cast(m * BLOCK_M, tl.int64) * stride_w + n * BLOCK_N)
    at += tl.arange(0, BLOCK_M)[:, None] * stride_w + tl.arange(0, BLOCK_N)[None, :]
    tl.store(
        at,
        (values * factor).to(weights.dtype.element_ty),
        mask=x_inside[:, None] & y_inside[None, :],
    )


@triton.jit
def _weights_kernel(
    x, y, scale, x_valid, y_valid, row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses, weights, d_scales,
    stride_x, stride_y, stride_w, M, T, first, first_text, P,
    D: tl.constexpr, RUNNING: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """One program: one tile of weights = scale * d loss / d scores of a chunk (M, T) in x's dtype, and the tile's part of d_scale.

    first and first_text place the chunk: its first clip, its first text.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(T, BLOCK_N)
    # GROUP_M row tiles share a column tile before the next: what runs at one time reads few different clips and texts
    band = tl.program_id(0) // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - band * GROUP_M, GROUP_M)
    place = tl.program_id(0) % (GROUP_M * tiles_n)
    m, n = band * GROUP_M + place % height, place // height

    rows, texts = m * BLOCK_M + tl.arange(0, BLOCK_M), n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_inside, y_inside = rows < M, texts < T
    x_counts, y_counts = _valid(x_valid, rows, x_inside), _valid(y_valid, texts, y_inside)
    x_tile = x + tl.cast(m * BLOCK_M, tl.int64) * stride_x
    y_tile = y + tl.cast(n * BLOCK_N, tl.int64) * stride_y
    products = _products(
        x_tile,
        y_tile,
        stride_x,
        stride_y,
        M - m * BLOCK_M,
        T - n * BLOCK_N,
        D,
        PRECISION,
        BLOCK_M,
        BLOCK_N,
        BLOCK_D,
    )
    factor = tl.load(scale).to(tl.float32)
    first_clip, first_column = first + m * BLOCK_M, first_text + n * BLOCK_N
    # few tiles hold clips' own texts; a way of their own spares the others the time, and both the registers of a joint end
    if (first_column < (first_clip + BLOCK_M) * P) & (first_column + BLOCK_N > first_clip * P):
        _leave(
            products, factor, x_inside, y_inside, x_counts, y_counts, rows, texts, first, first_text, P,
            row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses, weights, d_scales, stride_w, m, n,
            True, RUNNING, BLOCK_M, BLOCK_N,
        )  # fmt: skip
    else:
        _leave(
            products, factor, x_inside, y_inside, x_counts, y_counts, rows, texts, first, first_text, P,
            row_gradients, pos_gradients, col_gradients, row_lses, pos_lses, col_lses, weights, d_scales, stride_w, m, n,
            False, RUNNING, BLOCK_M, BLOCK_N,
        )  # fmt: skip


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
    d_row, d_col, d_pos, row, col, pos = (
        vector.contiguous() for vector in (d_row, d_col, d_pos, row, col, pos)
    )
    (M, D), T = x.shape, y.shape[0]
    running, precision = needs_running_max(bound), _precision(x)
    clips, texts = _chunk(M, T, x.element_size())
    tile = tiles.choose(
        "contrastive_lse_weights",
        arch(),
        x.dtype,
        _tile(arch(), x.dtype, clips, texts, D, precision),
        clips=clips,
        texts=texts,
        dim=D,
    )
    tile = {"GROUP_M": 8} | tile

    # gradients, then lses: row (M,), pos (M,), col (T,) behind one another
    lines = torch.empty((2 if running else 1, 2 * M + T), dtype=torch.float32, device=x.device)
    shares = [*lines[0].split((M, M, T)), *lines[-1].split((M, M, T))]
    _share_kernel[(triton.cdiv(max(M, T), 128), 3)](
        d_row, d_pos, d_col, row, pos, col, *shares, M, T, RUNNING=running, BLOCK=128, num_warps=4
    )
    weights = x.new_empty((clips, triton.cdiv(texts, _TEXT_ALIGNMENT) * _TEXT_ALIGNMENT))
    d_scale = torch.zeros((), dtype=torch.float32, device=x.device)
    d_x, d_y = _Sum(x, parts=triton.cdiv(T, texts)), _Sum(y, parts=triton.cdiv(M, clips))
    for i in range(0, M, clips):
        for j in range(0, T, texts):
            these, those = slice(i, min(i + clips, M)), slice(j, min(j + texts, T))
            x_part, y_part = x[these], y[those]
            m, t = x_part.shape[0], y_part.shape[0]
            programs = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(t, tile["BLOCK_N"])
            d_scales = torch.empty(programs, dtype=torch.float32, device=x.device)
            _weights_kernel[(programs,)](
                x_part, y_part, scale, None if x_valid is None else x_valid[these], None if y_valid is None else y_valid[those],
                *(share[where] for share, where in zip(shares, (these, these, those) * 2, strict=True)), weights, d_scales,
                x.stride(0), y.stride(0), weights.stride(0), m, t, first + i, j, texts_per_clip,
                D=D, RUNNING=running, PRECISION=precision, **tile,
            )  # fmt: skip
            part = weights[:m, :t]
            d_scale += d_scales.sum()
            d_x.add(these, part, y_part)
            d_y.add(those, part.t(), x_part)
    return d_x.total, d_y.total, d_scale


class _Sum:
    """Sums of matrix products into rows of a gradient like ``inputs``: in its dtype if there is one product a row, else in fp32."""

    def __init__(self, inputs, parts):
        self.once = parts == 1
        make = inputs.new_empty if self.once else inputs.new_zeros
        self.total = make(inputs.shape, dtype=inputs.dtype if self.once else torch.float32)

    def add(self, rows, a, b):
        if self.once:
            torch.mm(a, b, out=self.total[rows])
        elif a.is_cuda and not torch.version.hip and a.dtype != torch.float32:
            self.total[rows] += torch.mm(a, b, out_dtype=torch.float32)
        else:  # no 16-bit product with an fp32 result everywhere: ROCm before torch 2.10, CPU
            self.total[rows] += a @ b


def _rows(vectors):
    """Kernels and matrix products read rows of any stride whose elements are contiguous."""
    return vectors if vectors.stride(-1) == 1 else vectors.contiguous()


def _precision(x) -> str:
    return (
        "tf32"
        if x.dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32 and not interpreted()
        else "ieee"
    )


def _splits(M: int, T: int, tile: Tiles) -> tuple[int, int]:
    """(R, C): how many programs share the row tiles, the column tiles. Many enough for any GPU, and scratch stays O(M + T)."""
    tiles_m, tiles_n = triton.cdiv(M, tile["BLOCK_M"]), triton.cdiv(T, tile["BLOCK_N"])
    R, C = min(tiles_m, _MAX_SPLITS), min(tiles_n, _MAX_SPLITS)
    if R < _MAX_SPLITS:
        C = min(tiles_n, triton.cdiv(_PROGRAMS, R))
    elif C < _MAX_SPLITS:
        R = min(tiles_m, triton.cdiv(_PROGRAMS, C))
    return R, C


def _chunk(M: int, T: int, element_size: int) -> tuple[int, int]:
    """(clips, texts) of a chunk of weights: all of both where that fits the budget, else clips few enough for many texts."""
    budget = _WEIGHTS_BYTES // element_size
    aligned = triton.cdiv(T, _TEXT_ALIGNMENT) * _TEXT_ALIGNMENT
    if M * aligned <= budget:
        return M, T
    clips = min(M, _MAX_CHUNK_CLIPS)
    return clips, min(T, max(budget // clips // _TEXT_ALIGNMENT, 1) * _TEXT_ALIGNMENT)


def _tile(arch: str, dtype: torch.dtype, clips: int, texts: int, dim: int, precision: str) -> Tiles:
    """Tiles of both kernels: large ones for the matrix unit where they still give every core one, else smaller."""

    def count(block_m, block_n):
        return triton.cdiv(clips, block_m) * triton.cdiv(texts, block_n)

    # one step of 64 is unrolled with all its loads ahead, and spills on sm_120 (triton 3.7.1): two of 32
    block_d = min(
        64 if dtype.itemsize == 2 and dim > 64 else 32, max(16, triton.next_power_of_2(dim))
    )
    stages = 2 if arch.startswith("gfx") else 3
    if dtype.itemsize == 4 and precision == "ieee":  # no matrix unit
        return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=block_d, num_warps=4, num_stages=2)
    if count(128, 128) >= 256:
        return dict(BLOCK_M=128, BLOCK_N=128, BLOCK_D=block_d, num_warps=8, num_stages=stages)
    if count(64, 128) >= 128 or arch == "sm_100":  # there 64 x 64 spills (triton 3.7.1)
        return dict(BLOCK_M=64, BLOCK_N=128, BLOCK_D=block_d, num_warps=4, num_stages=stages)
    return dict(BLOCK_M=64, BLOCK_N=64, BLOCK_D=block_d, num_warps=4, num_stages=stages)


_CANDIDATES: list[Tiles] = [
    dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d, num_warps=warps, num_stages=stages)
    for m, n, warps in (
        (64, 64, 4),
        (64, 128, 4),
        (128, 64, 4),
        (128, 128, 4),
        (128, 128, 8),
        (128, 256, 8),
    )
    for d, stages in ((64, 3), (64, 4), (32, 4))
] + [  # registers held down, for two or three tiles on a core
    dict(BLOCK_M=m, BLOCK_N=n, BLOCK_D=d, num_warps=warps, num_stages=3, maxnreg=most)
    for m, n, warps, most in ((64, 128, 4, 168), (128, 128, 8, 128))
    for d in (64, 32)
]
TUNING: dict[str, list[Tiles]] = {
    "contrastive_lse_forward": _CANDIDATES,
    "contrastive_lse_weights": _CANDIDATES,
}


def unsupported(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> str | None:
    if reason := objection(x, y, scale, x_valid, y_valid):
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype} is for the reference"
    if max(y.shape[0], x.shape[0] + first) * texts_per_clip >= 2**31:
        return "it counts texts in 32 bits"
    return None
