"""Attention in Triton. Forward: each tile of queries walks the keys. Backward: one or two passes.

The backward in one pass adds to d_q with atomics; in two passes it gives the same bits every run.
The presets' lengths (393, 785, 1569) sit just past a tile's edge. So every walk takes one narrow
tail, the smallest of 16, 32, 64, 128 that covers the rest, then full blocks without a mask. The
tail comes first: behind the loop it made ptxas serialise Hopper's asynchronous products (C7515).
With CAUSAL, T == S: a walk ends, or begins, with its tile; blocks on the diagonal take the tail's
place, and only they are masked.
Short sequences have a backward of their own, in triton_small.py. Tile sizes: triton_tiles.py.
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl

from .. import tiles
from ..tiles import Tiles
from ..triton_common import (
    arch,
    dot_precision,
    load_rows,
    offset,
    store_rows,
    unsupported_operands,
)
from . import triton_small, triton_tiles
from .triton_small import all_strides, log_scale, optional, scaled_exp
from .triton_tiles import TUNING, dot_size, walk  # noqa: F401 (TUNING: read by the tuner)

# B batch, T queries, S keys, H heads, D head_dim. Strides are named for tensor and axis: q_t; g is
# d_out. At half precision scores and lse2 are in base 2, multiplied by LOG_SCALE = log2(e), so
# that exp2 serves.


@triton.jit
def _locate(length, H, BLOCK: tl.constexpr, REVERSED: tl.constexpr = False):
    """(b, h, first row) of this program. Neighbours share a head, so its other side stays in L2."""
    programs = tl.cdiv(length, BLOCK)
    head = tl.program_id(0) // programs
    b, h = tl.cast(head // H, tl.int64), tl.cast(head % H, tl.int64)
    tile = tl.program_id(0) % programs
    if REVERSED:  # the longest walks begin first
        tile = programs - 1 - tile
    return b, h, tl.cast(tile * BLOCK, tl.int64)


# -- forward -----------------------------------------------------------------------------------


@triton.jit
def _attend(
    acc, row_sum, row_max,  # (BLOCK_T, BLOCK_D), (BLOCK_T,), (BLOCK_T,)
    start, s_left,  # the first key, and how many there are from it on
    q, k, v, bias, key_mask,  # a tile of queries; pointers to the head's first key
    scale, t, t_left, d,
    k_s, v_s, bias_t, bias_s, mask_s,
    WIDTH: tl.constexpr, RAGGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr = False, ahead=0,
):  # fmt: skip
    """One step of the online softmax: WIDTH keys. RAGGED: only ``s_left`` of them exist.

    DIAGONAL: a query attends keys up to its own, the first one those up to ``ahead``.
    """
    k += start * k_s
    v += start * v_s
    bias += start * bias_s
    key_mask += start * mask_s
    s = tl.arange(0, WIDTH)
    keys = load_rows(k, k_s, s, d, s_left, HEAD_DIM, RAGGED)
    scores = tl.dot(q, tl.trans(keys), input_precision=PRECISION)
    if HAS_BIAS or HAS_MASK:
        scores *= scale
        if HAS_BIAS:
            inside = (t[:, None] < t_left) & (s[None, :] < s_left)
            pointers = bias + offset(t[:, None], bias_t) + offset(s[None, :], bias_s)
            scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG_SCALE
        attended = s < s_left
        if HAS_MASK:
            attended = tl.load(key_mask + offset(s, mask_s), mask=attended, other=0) != 0
        scores = tl.where(attended[None, :], scores, -float("inf"))
        if DIAGONAL:
            scores = tl.where(s[None, :] <= t[:, None] + ahead, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))
        # no key so far: -inf less -inf would give nan
        finite_max = tl.where(new_max == -float("inf"), 0.0, new_max)
        p = scaled_exp(scores - finite_max[:, None], LOG_SCALE)
        rescale = scaled_exp(row_max - finite_max, LOG_SCALE)
    else:
        if DIAGONAL:  # no query has come to keys beyond the last
            scores = tl.where(s[None, :] <= t[:, None] + ahead, scores, -float("inf"))
        elif RAGGED:
            scores = tl.where(s[None, :] < s_left, scores, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
        p = scaled_exp(scores * scale - new_max[:, None], LOG_SCALE)  # one FMA
        rescale = scaled_exp(row_max - new_max, LOG_SCALE)
    values = load_rows(v, v_s, s, d, s_left, HEAD_DIM, RAGGED)
    acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None], input_precision=PRECISION)
    return acc, row_sum * rescale + tl.sum(p, 1), new_max


@triton.jit
def _forward_tile(
    scale, out_t,
    q, k, v, bias, key_mask, out, lse,  # pointers to the tile's first query, to the first key
    t_left, first, S, q_t, k_s, v_s, bias_t, bias_s, mask_s,
    ROWS: tl.constexpr, RAGGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_S: tl.constexpr, TAIL_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """ROWS queries by the keys of their head. RAGGED: only ``t_left`` of the queries exist."""
    t, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    queries = load_rows(q, q_t, t, d, t_left, HEAD_DIM, RAGGED)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    full = S // BLOCK_S * BLOCK_S
    tile = (queries, k, v, bias, key_mask, scale, t, t_left, d, k_s, v_s, bias_t, bias_s, mask_s)
    if CAUSAL:
        full = first // BLOCK_S * BLOCK_S
        for step in tl.static_range(0, ROWS, BLOCK_S):
            start = full + step
            acc, row_sum, row_max = _attend(
                *(acc, row_sum, row_max),
                *(tl.cast(start, tl.int64), S - start),
                *tile,
                *(BLOCK_S, True),
                *(HEAD_DIM, HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION),
                *(True, first - start),
            )
    elif TAIL_S:
        acc, row_sum, row_max = _attend(
            *(acc, row_sum, row_max),
            *(tl.cast(full, tl.int64), S - full),
            *tile,
            *(TAIL_S, True),
            *(HEAD_DIM, HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION),
        )
    if FULL_S:  # else the loop would be compiled, and its registers kept, for nothing
        for start in range(0, full, BLOCK_S):
            acc, row_sum, row_max = _attend(
                *(acc, row_sum, row_max),
                *(tl.cast(start, tl.int64), BLOCK_S),
                *tile,
                *(BLOCK_S, False),
                *(HEAD_DIM, HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION),
            )

    if HAS_BIAS or HAS_MASK:
        row_sum = tl.where(row_sum == 0.0, 1.0, row_sum)  # no key at all: acc 0 and row_max -inf
    store_rows(out, acc / row_sum[:, None], out_t, t, d, t_left, HEAD_DIM, RAGGED)
    if LOG_SCALE == 1.0:
        row_lse = row_max + tl.log(row_sum)
    else:
        row_lse = (row_max + tl.log2(row_sum)) / LOG_SCALE
    if RAGGED:
        tl.store(lse + t, row_lse, mask=t < t_left)
    else:
        tl.store(lse + t, row_lse)


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    q, k, v, bias, key_mask, out, lse,
    scale, H, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_T: tl.constexpr, TAIL_T: tl.constexpr, FULL_S: tl.constexpr, TAIL_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_T queries of one head, or the TAIL_T last ones; walks the keys.

    FULL_T: full tiles have code of their own, without a mask. TAIL_T = BLOCK_T: all tiles are
    masked, by one code for them and the last. Keeps the running row_max, row_sum and acc. Writes
    out (B, T, H, D) and lse (B, H, T).
    """
    b, h, first = _locate(T, H, BLOCK_T, CAUSAL)
    q += b * q_b + h * q_h + first * q_t
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bias += h * bias_h + first * bias_t
    key_mask += b * mask_b
    out += ((b * T + first) * H + h) * HEAD_DIM
    lse += (b * H + h) * T + first
    t_left = (T - first).to(tl.int32)
    pointers = (q, k, v, bias, key_mask, out, lse)
    sizes = (t_left, first.to(tl.int32), S, q_t, k_s, v_s, bias_t, bias_s, mask_s)
    if FULL_T:  # noqa: SIM102 (the outer one is the compiler's)
        if t_left >= BLOCK_T:
            _forward_tile(
                *(scale * LOG_SCALE, H * HEAD_DIM),
                *pointers,
                *sizes,
                *(BLOCK_T, False),
                *(HEAD_DIM, BLOCK_D, BLOCK_S, FULL_S, TAIL_S),
                *(HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION, CAUSAL),
            )
    if TAIL_T:  # noqa: SIM102
        if t_left < BLOCK_T or TAIL_T == BLOCK_T:
            _forward_tile(
                *(scale * LOG_SCALE, H * HEAD_DIM),
                *pointers,
                *sizes,
                *(TAIL_T, True),
                *(HEAD_DIM, BLOCK_D, BLOCK_S, FULL_S, TAIL_S),
                *(HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION, CAUSAL),
            )


def forward(q, k, v, *, scale, bias=None, key_mask=None, causal=False, deterministic=False):
    B, T, H, D = q.shape
    S = k.shape[1]
    more = {"causal": 1} if causal else {}
    blocks = _choose("attention_forward", arch(), q, k, bias, triton_tiles.forward_tiles, **more)
    rows = blocks["BLOCK_T"]
    last = triton_tiles.last_tile(T, rows)
    ends = dict(FULL_T=rows <= T and last < rows, TAIL_T=last) | walk("S", S, blocks)
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    inputs = (q, k, v, *optional(q, bias, key_mask))
    strides = all_strides((q, k, v), bias, key_mask)
    constants = _constants(q, bias, key_mask, causal)
    _forward_kernel[(triton.cdiv(T, rows) * B * H,)](
        *inputs, out, lse, scale, H, T, S, *strides, **ends, **constants, **blocks
    )
    return out, lse


# -- backward ----------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["T"])
def _statistics_kernel(
    d_out,
    out,
    lse,
    d_lse,
    lse2,
    delta,
    H,
    T,
    g_b,
    g_t,
    g_h,
    o_b,
    o_t,
    o_h,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_T: tl.constexpr,
    HAS_D_LSE: tl.constexpr,
    LOG_SCALE: tl.constexpr,
):
    """One program: delta and lse2 of BLOCK_T queries of one head. All statistics are (B, H, T).

    delta = rowsum(out * d_out) - d_lse, 0 in a row without a key. lse2 = lse in base 2, +inf in a
    row without a key, so that every probability becomes 0.
    """
    b, h, first = _locate(T, H, BLOCK_T)
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    t_left = (T - first).to(tl.int32)
    d_out += b * g_b + h * g_h + first * g_t
    g = load_rows(d_out, g_t, t, d, t_left, HEAD_DIM, True).to(tl.float32)
    out += b * o_b + h * o_h + first * o_t
    o = load_rows(out, o_t, t, d, t_left, HEAD_DIM, True).to(tl.float32)
    inside = t < t_left
    at = (b * H + h) * T + first + t
    row_lse = tl.load(lse + at, mask=inside, other=0.0)
    keyless = row_lse == -float("inf")
    row_delta = tl.sum(g * o, 1)
    if HAS_D_LSE:
        row_delta -= tl.load(d_lse + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + at, tl.where(keyless, 0.0, row_delta), mask=inside)
    tl.store(lse2 + at, tl.where(keyless, float("inf"), row_lse * LOG_SCALE), mask=inside)


@triton.jit
def _accumulate_dk_dv(
    d_k, d_v,  # (BLOCK_S, BLOCK_D)
    start, t_left,  # the first query, and how many there are from it on
    k, v, q, g, bias, lse2, delta, d_q,  # tiles of keys and values; pointers to the first query
    scale, score_scale, attended, s, s_left, d,
    q_t, g_t, bias_t, bias_s, d_q_t,
    WIDTH: tl.constexpr, RAGGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, ONE_PASS: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr = False, ahead=0,
):  # fmt: skip
    """d_k and d_v of a tile of keys, plus what WIDTH queries add; scores are transposed.

    RAGGED: only ``t_left`` of the queries exist. ONE_PASS: also adds what the keys give to the
    queries' d_q, atomically. DIAGONAL: a key meets the queries from its own on, the first one those
    from ``ahead`` on.
    """
    q += start * q_t
    g += start * g_t
    bias += start * bias_t
    lse2 += start
    delta += start
    d_q += start * d_q_t
    t = tl.arange(0, WIDTH)
    queries = load_rows(q, q_t, t, d, t_left, HEAD_DIM, RAGGED)
    gradients = load_rows(g, g_t, t, d, t_left, HEAD_DIM, RAGGED)
    if RAGGED:
        row_lse = tl.load(lse2 + t, mask=t < t_left, other=float("inf"))  # p becomes 0
        row_delta = tl.load(delta + t, mask=t < t_left, other=0.0)
    else:
        row_lse = tl.load(lse2 + t)
        row_delta = tl.load(delta + t)
    products = tl.dot(k, tl.trans(queries), input_precision=PRECISION)
    # here, not where it is used: so it runs beside the exponentials
    d_p = tl.dot(v, tl.trans(gradients), input_precision=PRECISION)
    scores = products * score_scale  # (BLOCK_S, WIDTH)
    if HAS_BIAS:
        inside = (s[:, None] < s_left) & (t[None, :] < t_left)
        pointers = bias + offset(s[:, None], bias_s) + offset(t[None, :], bias_t)
        scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG_SCALE
    p = scaled_exp(scores - row_lse[None, :], LOG_SCALE)
    if ONE_PASS:
        # d_q mixes the keys. d_k and d_v do not: in them the rows of masked or missing keys may
        # hold anything, and are set to 0 at the end or not stored.
        p = tl.where(attended[:, None], p, 0.0)
    if DIAGONAL:
        p = tl.where(t[None, :] >= s[:, None] + ahead, p, 0.0)
    d_v = tl.dot(p.to(gradients.dtype), gradients, d_v, input_precision=PRECISION)
    d_s = (p * (d_p - row_delta[None, :])).to(queries.dtype)
    d_k = tl.dot(d_s, queries, d_k, input_precision=PRECISION)
    if ONE_PASS:
        d_q_part = tl.dot(tl.trans(d_s), k, input_precision=PRECISION) * scale
        inside = d[None, :] < HEAD_DIM
        if RAGGED:
            inside = inside & (t[:, None] < t_left)
        tl.atomic_add(d_q + t[:, None] * d_q_t + d[None, :], d_q_part, mask=inside, sem="relaxed")
    return d_k, d_v


@triton.jit(do_not_specialize=["T", "S"])
def _backward_keys_kernel(
    d_out, q, k, v, bias, key_mask, lse2, delta, d_q, d_k, d_v,
    scale, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_T: tl.constexpr, TAIL_T: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    ONE_PASS: tl.constexpr, LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_S keys of one head; walks the queries; writes d_k and d_v (B, S, H, D).

    ONE_PASS: also adds to d_q (B, T, H, D) fp32.
    """
    b, h, first = _locate(S, H, BLOCK_S)
    q += b * q_b + h * q_h
    d_out += b * g_b + h * g_h
    k += b * k_b + h * k_h + first * k_s
    v += b * v_b + h * v_h + first * v_s
    bias += h * bias_h + first * bias_s
    key_mask += b * mask_b + first * mask_s
    lse2 += (b * H + h) * T
    delta += (b * H + h) * T
    d_q += (b * T * H + h) * HEAD_DIM
    d_k += ((b * S + first) * H + h) * HEAD_DIM
    d_v += ((b * S + first) * H + h) * HEAD_DIM
    s_left = (S - first).to(tl.int32)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    attended = s < s_left
    if HAS_MASK:
        attended = tl.load(key_mask + offset(s, mask_s), mask=attended, other=0) != 0
    keys = load_rows(k, k_s, s, d, s_left, HEAD_DIM, True)
    values = load_rows(v, v_s, s, d, s_left, HEAD_DIM, True)
    acc_k = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    acc_v = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    begin, full = 0, T // BLOCK_T * BLOCK_T
    tile = (keys, values, q, d_out, bias, lse2, delta, d_q, scale, scale * LOG_SCALE)
    place = (attended, s, s_left, d, q_t, g_t, bias_t, bias_s, H * HEAD_DIM)
    if TAIL_T:
        at = tl.cast(full, tl.int64)
        acc_k, acc_v = _accumulate_dk_dv(
            *(acc_k, acc_v),
            *(at, T - full),
            *tile,
            *place,
            *(TAIL_T, True),
            *(HEAD_DIM, HAS_BIAS, ONE_PASS, LOG_SCALE, PRECISION),
            *(CAUSAL, first.to(tl.int32) - full),
        )
    if CAUSAL and FULL_T:
        row = first.to(tl.int32)
        begin = tl.cdiv(row + BLOCK_S, BLOCK_T) * BLOCK_T
        for step in tl.static_range(0, BLOCK_S, BLOCK_T):
            start = row // BLOCK_T * BLOCK_T + step
            at = tl.cast(start, tl.int64)
            acc_k, acc_v = _accumulate_dk_dv(
                *(acc_k, acc_v),
                *(at, full - start),  # without the tail, which is there already
                *tile,
                *place,
                *(BLOCK_T, True),
                *(HEAD_DIM, HAS_BIAS, ONE_PASS, LOG_SCALE, PRECISION),
                *(True, row - start),
            )
    if FULL_T:
        for start in range(begin, full, BLOCK_T):
            at = tl.cast(start, tl.int64)
            acc_k, acc_v = _accumulate_dk_dv(
                *(acc_k, acc_v),
                *(at, BLOCK_T),
                *tile,
                *place,
                *(BLOCK_T, False),
                *(HEAD_DIM, HAS_BIAS, ONE_PASS, LOG_SCALE, PRECISION),
            )

    if HAS_MASK:  # the probabilities of a masked key were not set to 0, and may be inf
        acc_k = tl.where(attended[:, None], acc_k, 0.0)
        acc_v = tl.where(attended[:, None], acc_v, 0.0)
    store_rows(d_k, acc_k * scale, H * HEAD_DIM, s, d, s_left, HEAD_DIM, True)
    store_rows(d_v, acc_v, H * HEAD_DIM, s, d, s_left, HEAD_DIM, True)


@triton.jit
def _score_gradients(
    q,
    g,
    k,
    v,
    bias,  # bias and key_mask point to the tile's first element
    key_mask,
    row_lse,
    row_delta,
    score_scale,
    t,
    t_left,
    s,
    s_left,
    bias_t,
    bias_s,
    mask_s,
    RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr = False,
    ahead=0,
):
    """d_scores (queries, keys) fp32 of a tile, recomputed from lse.

    They are 0 where a key is masked or, with RAGGED, beyond the last; with DIAGONAL where it is
    after its query, the first of which attends keys up to ``ahead``.
    """
    products = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    d_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)  # runs beside the exponentials
    scores = products * score_scale
    if HAS_BIAS:
        inside = (t[:, None] < t_left) & (s[None, :] < s_left)
        pointers = bias + offset(t[:, None], bias_t) + offset(s[None, :], bias_s)
        scores += tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG_SCALE
    p = scaled_exp(scores - row_lse[:, None], LOG_SCALE)
    if RAGGED or HAS_MASK:
        attended = s < s_left
        if HAS_MASK:
            attended = tl.load(key_mask + offset(s, mask_s), mask=attended, other=0) != 0
        p = tl.where(attended[None, :], p, 0.0)
    if DIAGONAL:
        p = tl.where(s[None, :] <= t[:, None] + ahead, p, 0.0)
    return p * (d_p - row_delta[:, None])


@triton.jit
def _accumulate_dq(
    acc,  # (BLOCK_T, BLOCK_D)
    start, s_left,  # the first key, and how many there are from it on
    q, g, k, v, bias, key_mask, row_lse, row_delta,  # tiles; pointers to the head's first key
    score_scale, t, t_left, d, k_s, v_s, bias_t, bias_s, mask_s,
    WIDTH: tl.constexpr, RAGGED: tl.constexpr,
    HEAD_DIM: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    DIAGONAL: tl.constexpr = False, ahead=0,
):  # fmt: skip
    """d_q of a tile of queries, plus what WIDTH keys add. RAGGED: only ``s_left`` exist."""
    k += start * k_s
    v += start * v_s
    bias += start * bias_s
    key_mask += start * mask_s
    s = tl.arange(0, WIDTH)
    keys = load_rows(k, k_s, s, d, s_left, HEAD_DIM, RAGGED)
    values = load_rows(v, v_s, s, d, s_left, HEAD_DIM, RAGGED)
    tile = (q, g, keys, values, bias, key_mask, row_lse, row_delta)
    place = (t, t_left, s, s_left, bias_t, bias_s, mask_s)
    d_s = _score_gradients(
        *tile,
        score_scale,
        *place,
        RAGGED,
        *(HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION, DIAGONAL, ahead),
    )
    return tl.dot(d_s.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S"])
def _backward_queries_kernel(
    d_out, q, k, v, bias, key_mask, lse2, delta, d_q,
    scale, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_S: tl.constexpr, TAIL_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_T queries of one head; walks the keys; writes d_q (B, T, H, D)."""
    b, h, first = _locate(T, H, BLOCK_T, CAUSAL)
    q += b * q_b + h * q_h + first * q_t
    d_out += b * g_b + h * g_h + first * g_t
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bias += h * bias_h + first * bias_t
    key_mask += b * mask_b
    lse2 += (b * H + h) * T + first
    delta += (b * H + h) * T + first
    d_q += ((b * T + first) * H + h) * HEAD_DIM
    t_left = (T - first).to(tl.int32)
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    queries = load_rows(q, q_t, t, d, t_left, HEAD_DIM, True)
    gradients = load_rows(d_out, g_t, t, d, t_left, HEAD_DIM, True)
    row_lse = tl.load(lse2 + t, mask=t < t_left, other=float("inf"))
    row_delta = tl.load(delta + t, mask=t < t_left, other=0.0)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    full = S // BLOCK_S * BLOCK_S
    tile = (queries, gradients, k, v, bias, key_mask, row_lse, row_delta, scale * LOG_SCALE)
    place = (t, t_left, d, k_s, v_s, bias_t, bias_s, mask_s)
    if CAUSAL:
        row = first.to(tl.int32)
        full = row // BLOCK_S * BLOCK_S
        for step in tl.static_range(0, BLOCK_T, BLOCK_S):
            start = full + step
            at = tl.cast(start, tl.int64)
            acc = _accumulate_dq(
                acc,
                *(at, S - start),
                *tile,
                *place,
                *(BLOCK_S, True),
                *(HEAD_DIM, HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION),
                *(True, row - start),
            )
    elif TAIL_S:
        at = tl.cast(full, tl.int64)
        acc = _accumulate_dq(
            acc,
            *(at, S - full),
            *tile,
            *place,
            *(TAIL_S, True),
            *(HEAD_DIM, HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION),
        )
    if FULL_S:
        for start in range(0, full, BLOCK_S):
            at = tl.cast(start, tl.int64)
            acc = _accumulate_dq(
                acc,
                *(at, BLOCK_S),
                *tile,
                *place,
                *(BLOCK_S, False),
                *(HEAD_DIM, HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION),
            )
    store_rows(d_q, acc * scale, H * HEAD_DIM, t, d, t_left, HEAD_DIM, True)


@triton.jit(do_not_specialize=["B", "T", "S"])
def _backward_bias_kernel(
    d_out, q, k, v, bias, key_mask, lse2, delta, d_bias,
    scale, B, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr = False,
):  # fmt: skip
    """One program: BLOCK_T queries by BLOCK_S keys of one head; walks the batch.

    It alone writes its tile of d_bias (H, T, S) fp32: no atomics.
    """
    first_s = tl.cast(tl.program_id(0), tl.int64) * BLOCK_S
    programs = tl.cdiv(T, BLOCK_T)
    first_t = tl.cast(tl.program_id(1) % programs * BLOCK_T, tl.int64)
    h = tl.cast(tl.program_id(1) // programs, tl.int64)
    t, s, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    t_left, s_left = (T - first_t).to(tl.int32), (S - first_s).to(tl.int32)
    bias += h * bias_h + first_t * bias_t + first_s * bias_s
    q += h * q_h + first_t * q_t
    d_out += h * g_h + first_t * g_t
    k += h * k_h + first_s * k_s
    v += h * v_h + first_s * v_s
    key_mask += first_s * mask_s
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    place = (t, t_left, s, s_left, bias_t, bias_s, mask_s)
    ahead = (first_t - first_s).to(tl.int32)
    items = B
    if CAUSAL:
        items = tl.where(ahead + BLOCK_T > 0, B, 0)  # keys of later tiles: zeros
    for item in range(0, items):
        b = tl.cast(item, tl.int64)
        rows = (b * H + h) * T + first_t + t
        tile = (
            load_rows(q + b * q_b, q_t, t, d, t_left, HEAD_DIM, True),
            load_rows(d_out + b * g_b, g_t, t, d, t_left, HEAD_DIM, True),
            load_rows(k + b * k_b, k_s, s, d, s_left, HEAD_DIM, True),
            load_rows(v + b * v_b, v_s, s, d, s_left, HEAD_DIM, True),
            bias,
            key_mask + b * mask_b,
            tl.load(lse2 + rows, mask=t < t_left, other=float("inf")),
            tl.load(delta + rows, mask=t < t_left, other=0.0),
        )
        acc += _score_gradients(
            *tile,
            scale * LOG_SCALE,
            *place,
            True,
            *(HAS_BIAS, HAS_MASK, LOG_SCALE, PRECISION, CAUSAL, ahead),
        )
    inside = (t[:, None] < t_left) & (s[None, :] < s_left)
    tl.store(d_bias + (h * T + first_t + t[:, None]) * S + first_s + s[None, :], acc, mask=inside)


def backward(
    d_out,
    d_lse,
    q,
    k,
    v,
    out,
    lse,
    *,
    scale,
    bias=None,
    key_mask=None,
    causal=False,
    deterministic=False,
    bias_grad=False,
):
    B, T, H, D = q.shape
    S = k.shape[1]
    d_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_out, out))
    lse, d_lse = lse.contiguous(), None if d_lse is None else d_lse.contiguous()
    here = arch()
    if triton_small.fits(here, q, k, bias):
        options = dict(scale=scale, bias=bias, key_mask=key_mask, causal=causal)
        return triton_small.backward(
            here, d_out, d_lse, q, k, v, lse, **options, bias_grad=bias_grad
        )

    lse2, delta = _statistics(d_out, d_lse, q, out, lse)
    inputs = (d_out, q, k, v, *optional(q, bias, key_mask), lse2, delta)
    strides = all_strides((d_out, q, k, v), bias, key_mask)
    constants = _constants(q, bias, key_mask, causal)
    shape = (here, q, k, bias)
    plan = _choose("attention_backward", *shape, triton_tiles.backward_plan)
    one_pass = not deterministic and bool(plan["ONE_PASS"])

    d_q = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.empty((B, S, H, D), dtype=q.dtype, device=q.device) for _ in range(2))
    d_q_sum = torch.zeros((B, T, H, D), dtype=torch.float32, device=q.device) if one_pass else d_q
    blocks = _choose("attention_backward_keys", *shape, triton_tiles.backward_keys_tiles)
    ends = walk("T", T, blocks) | dict(ONE_PASS=one_pass)
    _backward_keys_kernel[(triton.cdiv(S, blocks["BLOCK_S"]) * B * H,)](
        *inputs, d_q_sum, d_k, d_v, scale, H, T, S, *strides, **ends, **constants, **blocks
    )
    if one_pass:
        d_q = d_q_sum.to(q.dtype)
    else:
        blocks = _choose("attention_backward_queries", *shape, triton_tiles.backward_queries_tiles)
        _backward_queries_kernel[(triton.cdiv(T, blocks["BLOCK_T"]) * B * H,)](
            *inputs, d_q, scale, H, T, S, *strides, **walk("S", S, blocks), **constants, **blocks
        )
    if not bias_grad:
        return d_q, d_k, d_v, None

    d_bias = torch.empty((H, T, S), dtype=torch.float32, device=q.device)
    blocks = _choose("attention_backward_bias", *shape, triton_tiles.backward_bias_tiles)
    grid = (triton.cdiv(S, blocks["BLOCK_S"]), triton.cdiv(T, blocks["BLOCK_T"]) * H)
    _backward_bias_kernel[grid](*inputs, d_bias, scale, B, H, T, S, *strides, **constants, **blocks)
    return d_q, d_k, d_v, d_bias


def _statistics(d_out, d_lse, q, out, lse) -> tuple[torch.Tensor, torch.Tensor]:
    """lse2 and delta (B, H, T) fp32, as ``_statistics_kernel`` defines them."""
    B, T, H, D = q.shape
    lse2, delta = torch.empty((2, B, H, T), dtype=torch.float32, device=q.device)
    blocks = triton_tiles.statistics_tiles(D)
    constants = dict(
        HEAD_DIM=D,
        BLOCK_D=dot_size(D),
        HAS_D_LSE=d_lse is not None,
        LOG_SCALE=log_scale(q.dtype),
    )
    tensors = (d_out, out, lse, lse if d_lse is None else d_lse, lse2, delta)
    strides = (*d_out.stride()[:3], *out.stride()[:3])
    _statistics_kernel[(triton.cdiv(T, blocks["BLOCK_T"]) * B * H,)](
        *tensors, H, T, *strides, **constants, **blocks
    )
    return lse2, delta


def _constants(q, bias, key_mask, causal) -> dict[str, bool | int | float | str]:
    return dict(
        HEAD_DIM=q.shape[-1],
        BLOCK_D=dot_size(q.shape[-1]),
        HAS_BIAS=bias is not None,
        HAS_MASK=key_mask is not None,
        LOG_SCALE=log_scale(q.dtype),
        PRECISION=dot_precision(q.dtype),
        **({"CAUSAL": True} if causal else {}),
    )


def _choose(
    kernel: str, arch: str, q, k, bias, heuristic: Callable[..., Tiles], **more: int
) -> Tiles:
    (_, T, _, D), S, biased = q.shape, k.shape[1], bias is not None
    shape = dict(queries=T, keys=S, head_dim=D, bias=int(biased)) | more
    given = heuristic(arch, q.dtype, T, S, D, biased, **more)
    return tiles.choose(kernel, arch, q.dtype, given, **shape)


def unsupported(
    q,
    k,
    v,
    *,
    scale,
    bias=None,
    key_mask=None,
    causal=False,
    deterministic=False,
    bias_grad=False,
) -> str | None:
    if reason := unsupported_operands(q, k, v, bias):
        return reason
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim {q.shape[-1]} is not a multiple of 8 up to 128"
    if scale <= 0:
        return f"scale {scale} is not positive; the running maximum is taken before scaling"
    return None
