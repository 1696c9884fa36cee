"""Attention in Triton. Forward: a tile of queries walks the keys. Backward: one pass with atomics, or two passes, the same bits every run.

The presets' lengths (393, 785, 1569) sit just past a tile's edge. So every walk takes full blocks without a mask, then one narrow tail, the
smallest of 16, 32, 64, 128 that covers the rest. Short sequences have a backward of their own, in triton_small.py.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..tiles import Tiles
from ..triton_common import arch, dot_precision, load_rows, objection, store_rows
from . import triton_small
from .triton_small import power, unit

# B batch, T queries, S keys, H heads, D head_dim; scores and lse2 are in units of ln(2) at half precision (UNIT), so that exp2 serves


@triton.jit
def _place(length, H, BLOCK: tl.constexpr):
    """(b, h, first row) of this program; neighbours share a head, whose other side then stays in L2."""
    programs = tl.cdiv(length, BLOCK)
    head = tl.program_id(0) // programs
    return (
        tl.cast(head // H, tl.int64),
        tl.cast(head % H, tl.int64),
        tl.cast(tl.program_id(0) % programs * BLOCK, tl.int64),
    )


@triton.jit
def _attend(
    acc, total, peak,  # (BLOCK_T, BLOCK_D), (BLOCK_T,), (BLOCK_T,)
    q, k, v, bias, key_mask,  # a tile of queries; pointers to the block's first key
    scale, t, t_left, s_left, d,
    k_s, v_s, bias_t, bias_s, mask_s,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The online softmax's step over WIDTH keys, of which ``s_left`` exist (RAGGED)."""
    s = tl.arange(0, WIDTH)
    scores = tl.dot(
        q, tl.trans(load_rows(k, k_s, s, d, s_left, HEAD_DIM, RAGGED)), input_precision=PRECISION
    )
    if HAS_BIAS or HAS_MASK:
        scores *= scale
        if HAS_BIAS:
            inside = (t[:, None] < t_left) & (s[None, :] < s_left)
            scores += (
                tl.load(
                    bias + t[:, None] * bias_t + s[None, :] * bias_s, mask=inside, other=0.0
                ).to(tl.float32)
                * UNIT
            )
        live = s < s_left
        if HAS_MASK:
            live = tl.load(key_mask + s * mask_s, mask=live, other=0) != 0
        scores = tl.where(live[None, :], scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        finite = tl.where(
            higher == -float("inf"), 0.0, higher
        )  # no key so far: -inf less -inf would give nan
        p = power(scores - finite[:, None], UNIT)
        fade = power(peak - finite, UNIT)
    else:
        if RAGGED:
            scores = tl.where(s[None, :] < s_left, scores, -float("inf"))
        higher = tl.maximum(peak, tl.max(scores, 1) * scale)
        p = power(scores * scale - higher[:, None], UNIT)  # one FMA
        fade = power(peak - higher, UNIT)
    values = load_rows(v, v_s, s, d, s_left, HEAD_DIM, RAGGED)
    acc = tl.dot(p.to(values.dtype), values, acc * fade[:, None], input_precision=PRECISION)
    return acc, total * fade + tl.sum(p, 1), higher


@triton.jit
def _forward_tile(
    q, k, v, bias, key_mask, out, lse,  # pointers to the tile's first query, to the head's first key, to the tile's first output
    scale, t_left, S, q_t, k_s, v_s, bias_t, bias_s, mask_s, out_t,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, RAGGED: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_S: tl.constexpr, TAIL_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS queries, of which ``t_left`` exist (RAGGED), by all keys of their head."""
    t, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    queries = load_rows(q, q_t, t, d, t_left, HEAD_DIM, RAGGED)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], -float("inf"), tl.float32)
    full = S // BLOCK_S * BLOCK_S
    if FULL_S:  # else the loop would be compiled, and its registers kept, for nothing
        for start in range(0, full, BLOCK_S):
            at = tl.cast(start, tl.int64)
            acc, total, peak = _attend(
                acc, total, peak,
                queries, k + at * k_s, v + at * v_s, bias + at * bias_s, key_mask + at * mask_s,
                scale, t, t_left, BLOCK_S, d,
                k_s, v_s, bias_t, bias_s, mask_s,
                HEAD_DIM, BLOCK_S, False, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
            )  # fmt: skip
    if TAIL_S:
        at = tl.cast(full, tl.int64)
        acc, total, peak = _attend(
            acc, total, peak,
            queries, k + at * k_s, v + at * v_s, bias + at * bias_s, key_mask + at * mask_s,
            scale, t, t_left, S - full, d,
            k_s, v_s, bias_t, bias_s, mask_s,
            HEAD_DIM, TAIL_S, True, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
        )  # fmt: skip

    if HAS_BIAS or HAS_MASK:
        total = tl.where(total == 0.0, 1.0, total)  # no key at all: acc is 0 and peak -inf
    store_rows(out, acc / total[:, None], out_t, t, d, t_left, HEAD_DIM, RAGGED)
    log_sum = peak + tl.log(total) if UNIT == 1.0 else (peak + tl.log2(total)) / UNIT
    if RAGGED:
        tl.store(lse + t, log_sum, mask=t < t_left)
    else:
        tl.store(lse + t, log_sum)


@triton.jit(do_not_specialize=["T", "S"])
def _forward_kernel(
    q, k, v, bias, key_mask, out, lse,
    scale, H, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,  # strides
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_T: tl.constexpr, TAIL_T: tl.constexpr, FULL_S: tl.constexpr, TAIL_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one head, or TAIL_T at its end; walks the keys; keeps running max, sum and accumulator.
    out (B, T, H, D), lse (B, H, T)."""
    b, h, first = _place(T, H, BLOCK_T)
    q += b * q_b + h * q_h + first * q_t
    k += b * k_b + h * k_h
    v += b * v_b + h * v_h
    bias += h * bias_h + first * bias_t
    key_mask += b * mask_b
    out += ((b * T + first) * H + h) * HEAD_DIM
    lse += (b * H + h) * T + first
    t_left = (T - first).to(tl.int32)
    if FULL_T:  # noqa: SIM102 (the outer one is the compiler's)
        if t_left >= BLOCK_T:
            _forward_tile(
                q, k, v, bias, key_mask, out, lse,
                scale * UNIT, t_left, S, q_t, k_s, v_s, bias_t, bias_s, mask_s, H * HEAD_DIM,
                HEAD_DIM, BLOCK_D, BLOCK_T, False, BLOCK_S, FULL_S, TAIL_S, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
            )  # fmt: skip
    if TAIL_T:  # noqa: SIM102
        if t_left < BLOCK_T:
            _forward_tile(
                q, k, v, bias, key_mask, out, lse,
                scale * UNIT, t_left, S, q_t, k_s, v_s, bias_t, bias_s, mask_s, H * HEAD_DIM,
                HEAD_DIM, BLOCK_D, TAIL_T, True, BLOCK_S, FULL_S, TAIL_S, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
            )  # fmt: skip


def forward(q, k, v, *, scale, bias=None, key_mask=None, deterministic=False):
    B, T, H, D = q.shape
    S = k.shape[1]
    choice = tiles.choose(
        "attention_forward",
        arch(),
        q.dtype,
        _forward_tiles(arch(), q.dtype, T, S, D),
        queries=T,
        keys=S,
        head_dim=D,
    )
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    _forward_kernel[(triton.cdiv(T, choice["BLOCK_T"]) * B * H,)](
        q, k, v, *_optional(q, bias, key_mask), out, lse,
        scale, H, T, S,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_strides(bias, key_mask),
        FULL_T=choice["BLOCK_T"] <= T, TAIL_T=_last_tile(T, choice["BLOCK_T"], arch()), **_walk("S", S, choice),
        **_constants(q, bias, key_mask), **choice,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["T"])
def _statistics_kernel(
    d_out, out, lse, d_lse, lse2, delta,
    H, T, g_b, g_t, g_h, o_b, o_t, o_h,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, HAS_D_LSE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one head. delta = rowsum(out * d_out) - d_lse, 0 in a row without a key; lse2 = lse in base 2, +inf
    there, so that every probability becomes 0. All statistics (B, H, T)."""
    b, h, first = _place(T, H, BLOCK_T)
    t, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_D)
    t_left = (T - first).to(tl.int32)
    g = load_rows(d_out + b * g_b + h * g_h + first * g_t, g_t, t, d, t_left, HEAD_DIM, True).to(
        tl.float32
    )
    o = load_rows(out + b * o_b + h * o_h + first * o_t, o_t, t, d, t_left, HEAD_DIM, True).to(
        tl.float32
    )
    inside = t < t_left
    at = (b * H + h) * T + first + t
    log_sum = tl.load(lse + at, mask=inside, other=0.0)
    keyless = log_sum == -float("inf")
    value = tl.sum(g * o, 1)
    if HAS_D_LSE:
        value -= tl.load(d_lse + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(delta + at, tl.where(keyless, 0.0, value), mask=inside)
    tl.store(lse2 + at, tl.where(keyless, float("inf"), log_sum * UNIT), mask=inside)


@triton.jit
def _feel_queries(
    d_k, d_v,  # (BLOCK_S, BLOCK_D)
    k, v, q, g, bias, lse2, delta, d_q,  # tiles of keys and values; pointers to the block's first query, g of d_out
    scale, factor, live, s, s_left, t_left, d,
    q_t, g_t, bias_t, bias_s, d_q_t,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr, ONE_PASS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what WIDTH queries, of which ``t_left`` exist (RAGGED), send to a tile of keys, scores transposed; ONE_PASS: and the answer to
    the queries' d_q, atomically."""
    t = tl.arange(0, WIDTH)
    queries = load_rows(q, q_t, t, d, t_left, HEAD_DIM, RAGGED)
    gradients = load_rows(g, g_t, t, d, t_left, HEAD_DIM, RAGGED)
    if RAGGED:
        log_sum = tl.load(lse2 + t, mask=t < t_left, other=float("inf"))  # p becomes 0
        row_delta = tl.load(delta + t, mask=t < t_left, other=0.0)
    else:
        log_sum = tl.load(lse2 + t)
        row_delta = tl.load(delta + t)
    scores = tl.dot(k, tl.trans(queries), input_precision=PRECISION) * scale  # (BLOCK_S, WIDTH)
    if HAS_BIAS:
        inside = (s[:, None] < s_left) & (t[None, :] < t_left)
        scores += (
            tl.load(bias + s[:, None] * bias_s + t[None, :] * bias_t, mask=inside, other=0.0).to(
                tl.float32
            )
            * UNIT
        )
    p = power(scores - log_sum[None, :], UNIT)
    if ONE_PASS:  # d_q mixes the keys; d_k and d_v alone may hold anything in rows that are zeroed at the end or not stored
        p = tl.where(live[:, None], p, 0.0)
    d_v = tl.dot(p.to(gradients.dtype), gradients, d_v, input_precision=PRECISION)
    d_p = tl.dot(v, tl.trans(gradients), input_precision=PRECISION)
    d_s = (p * (d_p - row_delta[None, :])).to(queries.dtype)
    d_k = tl.dot(d_s, queries, d_k, input_precision=PRECISION)
    if ONE_PASS:
        answer = tl.dot(tl.trans(d_s), k, input_precision=PRECISION) * factor
        inside = d[None, :] < HEAD_DIM
        if RAGGED:
            inside = inside & (t[:, None] < t_left)
        tl.atomic_add(d_q + t[:, None] * d_q_t + d[None, :], answer, mask=inside, sem="relaxed")
    return d_k, d_v


@triton.jit(do_not_specialize=["T", "S"])
def _backward_keys_kernel(
    d_out, q, k, v, bias, key_mask, lse2, delta, d_q, d_k, d_v,
    factor, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_T: tl.constexpr, TAIL_T: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    ONE_PASS: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_S keys of one head; walks the queries; writes d_k and d_v (B, S, H, D), and ONE_PASS adds to
    d_q (B, T, H, D) fp32."""
    b, h, first = _place(S, H, BLOCK_S)
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
    live = s < s_left
    if HAS_MASK:
        live = tl.load(key_mask + s * mask_s, mask=live, other=0) != 0
    keys = load_rows(k, k_s, s, d, s_left, HEAD_DIM, True)
    values = load_rows(v, v_s, s, d, s_left, HEAD_DIM, True)
    sum_k = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    sum_v = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    full = T // BLOCK_T * BLOCK_T
    if FULL_T:
        for start in range(0, full, BLOCK_T):
            at = tl.cast(start, tl.int64)
            sum_k, sum_v = _feel_queries(
                sum_k, sum_v,
                keys, values, q + at * q_t, d_out + at * g_t, bias + at * bias_t, lse2 + at, delta + at, d_q + at * (H * HEAD_DIM),
                factor * UNIT, factor, live, s, s_left, BLOCK_T, d,
                q_t, g_t, bias_t, bias_s, H * HEAD_DIM,
                HEAD_DIM, BLOCK_T, False, HAS_BIAS, ONE_PASS, UNIT, PRECISION,
            )  # fmt: skip
    if TAIL_T:
        at = tl.cast(full, tl.int64)
        sum_k, sum_v = _feel_queries(
            sum_k, sum_v,
            keys, values, q + at * q_t, d_out + at * g_t, bias + at * bias_t, lse2 + at, delta + at, d_q + at * (H * HEAD_DIM),
            factor * UNIT, factor, live, s, s_left, T - full, d,
            q_t, g_t, bias_t, bias_s, H * HEAD_DIM,
            HEAD_DIM, TAIL_T, True, HAS_BIAS, ONE_PASS, UNIT, PRECISION,
        )  # fmt: skip

    if HAS_MASK:  # a masked key's probabilities were not blanked, and may be inf
        sum_k = tl.where(live[:, None], sum_k, 0.0)
        sum_v = tl.where(live[:, None], sum_v, 0.0)
    store_rows(d_k, sum_k * factor, H * HEAD_DIM, s, d, s_left, HEAD_DIM, True)
    store_rows(d_v, sum_v, H * HEAD_DIM, s, d, s_left, HEAD_DIM, True)


@triton.jit
def _score_gradients(
    q, g, k, v, bias, key_mask, log_sum, row_delta,  # tiles; bias and key_mask are pointers to the tile's first element
    scale, t, t_left, s, s_left,
    bias_t, bias_s, mask_s,
    RAGGED: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """d_scores (queries, keys) fp32, recomputed from lse; 0 where a key is masked or, RAGGED, beyond the last."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        inside = (t[:, None] < t_left) & (s[None, :] < s_left)
        scores += (
            tl.load(bias + t[:, None] * bias_t + s[None, :] * bias_s, mask=inside, other=0.0).to(
                tl.float32
            )
            * UNIT
        )
    p = power(scores - log_sum[:, None], UNIT)
    if RAGGED or HAS_MASK:
        live = s < s_left
        if HAS_MASK:
            live = tl.load(key_mask + s * mask_s, mask=live, other=0) != 0
        p = tl.where(live[None, :], p, 0.0)
    d_p = tl.dot(g, tl.trans(v), input_precision=PRECISION)
    return p * (d_p - row_delta[:, None])


@triton.jit
def _feel_keys(
    acc, q, g, k, v, bias, key_mask, log_sum, row_delta,  # tiles; pointers to the block's first key
    scale, t, t_left, s_left, d, k_s, v_s, bias_t, bias_s, mask_s,
    HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, RAGGED: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """acc plus what WIDTH keys, of which ``s_left`` exist (RAGGED), send to a tile of queries."""
    s = tl.arange(0, WIDTH)
    keys = load_rows(k, k_s, s, d, s_left, HEAD_DIM, RAGGED)
    values = load_rows(v, v_s, s, d, s_left, HEAD_DIM, RAGGED)
    d_s = _score_gradients(
        q, g, keys, values, bias, key_mask, log_sum, row_delta,
        scale, t, t_left, s, s_left, bias_t, bias_s, mask_s, RAGGED, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
    )  # fmt: skip
    return tl.dot(d_s.to(keys.dtype), keys, acc, input_precision=PRECISION)


@triton.jit(do_not_specialize=["T", "S"])
def _backward_queries_kernel(
    d_out, q, k, v, bias, key_mask, lse2, delta, d_q,
    factor, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    FULL_S: tl.constexpr, TAIL_S: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one head; walks the keys; writes d_q (B, T, H, D)."""
    b, h, first = _place(T, H, BLOCK_T)
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
    log_sum = tl.load(lse2 + t, mask=t < t_left, other=float("inf"))
    row_delta = tl.load(delta + t, mask=t < t_left, other=0.0)
    acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
    full = S // BLOCK_S * BLOCK_S
    if FULL_S:
        for start in range(0, full, BLOCK_S):
            at = tl.cast(start, tl.int64)
            acc = _feel_keys(
                acc, queries, gradients, k + at * k_s, v + at * v_s, bias + at * bias_s, key_mask + at * mask_s, log_sum, row_delta,
                factor * UNIT, t, t_left, BLOCK_S, d, k_s, v_s, bias_t, bias_s, mask_s,
                HEAD_DIM, BLOCK_S, False, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
            )  # fmt: skip
    if TAIL_S:
        at = tl.cast(full, tl.int64)
        acc = _feel_keys(
            acc, queries, gradients, k + at * k_s, v + at * v_s, bias + at * bias_s, key_mask + at * mask_s, log_sum, row_delta,
            factor * UNIT, t, t_left, S - full, d, k_s, v_s, bias_t, bias_s, mask_s,
            HEAD_DIM, TAIL_S, True, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
        )  # fmt: skip
    store_rows(d_q, acc * factor, H * HEAD_DIM, t, d, t_left, HEAD_DIM, True)


@triton.jit(do_not_specialize=["B", "T", "S"])
def _backward_bias_kernel(
    d_out, q, k, v, bias, key_mask, lse2, delta, d_bias,
    factor, B, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries by BLOCK_S keys of one head; walks the batch; owns its tile of d_bias (H, T, S) fp32: no atomics."""
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
    for item in range(0, B):
        b = tl.cast(item, tl.int64)
        rows = (b * H + h) * T + first_t + t
        acc += _score_gradients(
            load_rows(q + b * q_b, q_t, t, d, t_left, HEAD_DIM, True),
            load_rows(d_out + b * g_b, g_t, t, d, t_left, HEAD_DIM, True),
            load_rows(k + b * k_b, k_s, s, d, s_left, HEAD_DIM, True),
            load_rows(v + b * v_b, v_s, s, d, s_left, HEAD_DIM, True),
            bias, key_mask + b * mask_b,
            tl.load(lse2 + rows, mask=t < t_left, other=float("inf")), tl.load(delta + rows, mask=t < t_left, other=0.0),
            factor * UNIT, t, t_left, s, s_left, bias_t, bias_s, mask_s, True, HAS_BIAS, HAS_MASK, UNIT, PRECISION,
        )  # fmt: skip
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
    deterministic=False,
    bias_grad=False,
):
    B, T, H, D = q.shape
    S = k.shape[1]
    d_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_out, out))
    lse, d_lse = lse.contiguous(), None if d_lse is None else d_lse.contiguous()
    if triton_small.fits(q, k):
        return triton_small.backward(
            d_out,
            d_lse,
            q,
            k,
            v,
            lse,
            scale=scale,
            bias=bias,
            key_mask=key_mask,
            bias_grad=bias_grad,
        )

    def choose(kernel: str, heuristic: Tiles) -> Tiles:
        return tiles.choose(kernel, arch(), q.dtype, heuristic, queries=T, keys=S, head_dim=D)

    constants = _constants(q, bias, key_mask)
    lse2, delta = torch.empty((2, B, H, T), dtype=torch.float32, device=q.device)
    rows = _statistics_tiles(D)
    _statistics_kernel[(triton.cdiv(T, rows["BLOCK_T"]) * B * H,)](
        d_out, out, lse, lse if d_lse is None else d_lse, lse2, delta,
        H, T, *d_out.stride()[:3], *out.stride()[:3],
        HEAD_DIM=D, BLOCK_D=constants["BLOCK_D"], HAS_D_LSE=d_lse is not None, UNIT=constants["UNIT"], **rows,
    )  # fmt: skip

    inputs = (d_out, q, k, v, *_optional(q, bias, key_mask), lse2, delta)
    strides = (
        *d_out.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *_strides(bias, key_mask),
    )
    one_pass = not deterministic and bool(
        choose("attention_backward", _backward_plan(T, S))["ONE_PASS"]
    )
    d_q = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    d_k, d_v = (torch.empty((B, S, H, D), dtype=q.dtype, device=q.device) for _ in range(2))
    d_q_sum = torch.zeros((B, T, H, D), dtype=torch.float32, device=q.device) if one_pass else d_q
    choice = choose("attention_backward_keys", _backward_keys_tiles(arch(), q.dtype, T, S, D))
    _backward_keys_kernel[(triton.cdiv(S, choice["BLOCK_S"]) * B * H,)](
        *inputs, d_q_sum, d_k, d_v, scale, H, T, S, *strides,
        **_walk("T", T, choice), ONE_PASS=one_pass, **constants, **choice,
    )  # fmt: skip
    if one_pass:
        d_q = d_q_sum.to(q.dtype)
    else:
        choice = choose(
            "attention_backward_queries", _backward_queries_tiles(arch(), q.dtype, T, S, D)
        )
        _backward_queries_kernel[(triton.cdiv(T, choice["BLOCK_T"]) * B * H,)](
            *inputs, d_q, scale, H, T, S, *strides, **_walk("S", S, choice), **constants, **choice
        )
    if not bias_grad:
        return d_q, d_k, d_v, None
    d_bias = torch.empty((H, T, S), dtype=torch.float32, device=q.device)
    choice = choose("attention_backward_bias", _backward_bias_tiles(arch(), q.dtype, T, S, D))
    _backward_bias_kernel[
        (triton.cdiv(S, choice["BLOCK_S"]), triton.cdiv(T, choice["BLOCK_T"]) * H)
    ](*inputs, d_bias, scale, B, H, T, S, *strides, **constants, **choice)
    return d_q, d_k, d_v, d_bias


def _constants(q, bias, key_mask) -> dict:
    return dict(
        HEAD_DIM=q.shape[-1],
        BLOCK_D=_block_d(q.shape[-1]),
        HAS_BIAS=bias is not None,
        HAS_MASK=key_mask is not None,
        UNIT=unit(q.dtype),
        PRECISION=dot_precision(q.dtype),
    )


def _optional(q, bias, key_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """Pointers for absent tensors, never read."""
    return q if bias is None else bias, q if key_mask is None else key_mask


def _strides(bias, key_mask) -> tuple[int, ...]:
    return (
        *((0, 0, 0) if bias is None else bias.stride()),
        *((0, 0) if key_mask is None else key_mask.stride()),
    )


# -- tiles: pure functions of architecture and shape -------------------------------------------------------------------


def _block_d(D: int) -> int:
    return max(16, triton.next_power_of_2(D))  # tl.dot's least


def _tail(length: int, block: int) -> int:
    """Width of the last, masked step of a walk in blocks: 0, or the smallest power of two from 16 on."""
    rest = length % block
    return max(16, triton.next_power_of_2(rest)) if rest else 0


def _last_tile(T: int, block: int, arch: str) -> int:
    """Rows of the forward's last query tile. Not 32: too few for Hopper's matrix unit, and enough for the substitute to need more registers
    than the whole rest (132 against 108 a thread). Nor 64 of 128 on sm_100, where it spills (triton 3.7.1)."""
    tail = _tail(T, block)
    if tail in (32, 64) and arch == "sm_100":
        return block
    return min(64, block) if tail == 32 else tail


def _walk(axis: str, length: int, choice: Tiles) -> dict[str, int | bool]:
    """What a kernel has to know of the axis it walks when it is compiled."""
    block = choice[f"BLOCK_{axis}"]
    return {f"FULL_{axis}": block <= length, f"TAIL_{axis}": _tail(length, block)}


def _least(length: int, largest: int) -> int:
    """The smallest power of two from 16 on that covers ``length``, at most ``largest``."""
    return min(max(16, triton.next_power_of_2(length)), largest)


def _forward_tiles(arch: str, dtype: torch.dtype, T: int, S: int, D: int) -> Tiles:
    """128 queries where there are many: 64 would read each key twice as often, and wait for L2. 64 keys: few registers, so that several
    programs share a multiprocessor and one's exponentials hide behind another's products."""
    block_d = _block_d(D)
    if dtype == torch.float32:
        return dict(
            BLOCK_T=_least(T, 64 if block_d <= 64 else 32),
            BLOCK_S=_least(S, 32),
            num_warps=4,
            num_stages=1,
        )
    if T <= 32:  # a read of the keys, and little else
        stages = 4 if arch in _LARGE_SHARED else 2 if arch.startswith("gfx") else 3
        return dict(
            BLOCK_T=_least(T, 32),
            BLOCK_S=_least(S, 64),
            num_warps=4 if S > 64 else 2,
            num_stages=stages,
        )
    many = T >= 256 and block_d <= 64 and not arch.startswith("gfx")
    return dict(
        BLOCK_T=128 if many else 64, BLOCK_S=_least(S, 64), num_warps=8 if many else 4, num_stages=2
    )


def _statistics_tiles(D: int) -> Tiles:
    return dict(BLOCK_T=max(16, 4096 // _block_d(D)), num_warps=4)


def _backward_plan(T: int, S: int) -> Tiles:
    """Atomics spare two of seven products, and cost a pass over d_q in fp32; where a key tile or two cover everything they gain nothing."""
    return dict(ONE_PASS=int(T > 64 and S > 256))


def _backward_keys_tiles(arch: str, dtype: torch.dtype, T: int, S: int, D: int) -> Tiles:
    rows, columns, warps, stages = _backward_block(arch, dtype, S, T, D)
    return dict(BLOCK_S=rows, BLOCK_T=columns, num_warps=warps, num_stages=stages)


def _backward_queries_tiles(arch: str, dtype: torch.dtype, T: int, S: int, D: int) -> Tiles:
    rows, columns, warps, stages = _backward_block(arch, dtype, T, S, D)
    return dict(BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages)


def _backward_block(
    arch: str, dtype: torch.dtype, owned: int, walked: int, D: int
) -> tuple[int, int, int, int]:
    """Rows a program owns, columns a step takes, warps, stages. Two score tiles live at once: 64 by 64 is what the registers bear."""
    wide = _block_d(D) > 64
    if dtype == torch.float32:
        return _least(owned, 32), _least(walked, 16 if wide else 32), 4, 1
    columns = 32 if wide else 64
    return _least(owned, 64), _least(walked, columns), 4, 1 if arch.startswith("gfx") else 2


def _backward_bias_tiles(arch: str, dtype: torch.dtype, T: int, S: int, D: int) -> Tiles:
    largest = 32 if dtype == torch.float32 or _block_d(D) > 64 else 64
    return dict(BLOCK_T=_least(T, largest), BLOCK_S=_least(S, largest), num_warps=4, num_stages=1)


_LARGE_SHARED = ("sm_80", "sm_90", "sm_100", "sm_103")  # 163 KiB a multiprocessor and more


def _grid(rows: str, columns: str, choices: list[tuple[int, int, int, int]]) -> list[Tiles]:
    return [
        {rows: r, columns: c, "num_warps": warps, "num_stages": stages}
        for r, c, warps, stages in choices
    ]


TUNING: dict[str, list[Tiles]] = {
    "attention_forward": _grid(
        "BLOCK_T",
        "BLOCK_S",
        [
            *((64, columns, 4, stages) for columns in (32, 64, 128) for stages in (1, 2, 3, 4)),
            *(
                (128, columns, warps, stages)
                for columns in (64, 128)
                for warps in (4, 8)
                for stages in (2, 3)
            ),
            (16, 64, 4, 4),
            (16, 128, 4, 3),
            (32, 32, 1, 1),
            (32, 32, 2, 1),
        ],
    ),
    "attention_backward": [dict(ONE_PASS=0), dict(ONE_PASS=1)],
    "attention_backward_keys": _grid(
        "BLOCK_S",
        "BLOCK_T",
        [
            *((64, columns, 4, stages) for columns in (32, 64, 128) for stages in (1, 2, 3)),
            *((128, columns, 8, stages) for columns in (32, 64, 128) for stages in (1, 2, 3)),
            (128, 64, 4, 2),
            (32, 64, 4, 2),
            (64, 16, 4, 2),
        ],
    ),
    "attention_backward_queries": _grid(
        "BLOCK_T",
        "BLOCK_S",
        [
            *((64, columns, 4, stages) for columns in (32, 64, 128) for stages in (1, 2, 3)),
            *((128, columns, 8, stages) for columns in (32, 64, 128) for stages in (1, 2, 3)),
            (128, 64, 4, 2),
            (16, 64, 4, 3),
            (32, 64, 4, 2),
        ],
    ),
    "attention_backward_bias": _grid(
        "BLOCK_T",
        "BLOCK_S",
        [(n, m, warps, 1) for n in (32, 64, 128) for m in (32, 64) for warps in (4, 8)],
    ),
    **triton_small.TUNING,
}


def unsupported(
    q, k, v, *, scale, bias=None, key_mask=None, deterministic=False, bias_grad=False
) -> str | None:
    if reason := objection(q, k, v, bias):
        return reason
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"head_dim {q.shape[-1]} is not a multiple of 8 up to 128"
    if scale <= 0:
        return f"scale {scale} is not positive; the running maximum is taken before scaling"
    return None
