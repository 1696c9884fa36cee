"""The backward of short sequences (texts): one kernel, since all queries and keys of a head fit one tile. Forward needs none of its own."""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..tiles import Tiles
from ..triton_common import arch, dot_precision, load_rows

# B batch, T queries, S keys, H heads, D head_dim, strips of a few batch items each

_PROGRAMS = 512  # of one launch at most, where d_bias is wanted: its strips stay few


def unit(dtype: torch.dtype) -> float:
    """Scores are multiplied by this: log2(e), folded into the scale, so that exp2 follows one FMA. Not in fp32, where it would cost more
    than twice plain torch's error: the roundings of a scale, a score and an lse, all times the score."""
    return 1.0 if dtype == torch.float32 else 1.4426950408889634


@triton.jit
def power(x, UNIT: tl.constexpr):
    """exp(x / UNIT)."""
    return tl.exp(x) if UNIT == 1.0 else tl.exp2(x)


@triton.jit(do_not_specialize=["B", "T", "S", "items"])
def _backward_kernel(
    d_out, q, k, v, bias, key_mask, lse, d_lse, d_q, d_k, d_v, d_bias_strips,
    factor, items, B, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_D_LSE: tl.constexpr, BIAS_GRAD: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: one head of ``items`` batch items, all their queries and keys. Writes their d_q, d_k, d_v, and their sum of d_scores to
    its own strip of d_bias_strips (strips, H, T, S) fp32: no atomics, the same bits every run."""
    h = tl.cast(tl.program_id(0) % H, tl.int64)
    strip = tl.cast(tl.program_id(0) // H, tl.int64)
    t, s, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    square = (t[:, None] < T) & (s[None, :] < S)
    t_tile = (t[:, None] < T) & (d[None, :] < HEAD_DIM)
    s_tile = (s[:, None] < S) & (d[None, :] < HEAD_DIM)
    offset = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    if HAS_BIAS:
        offset = (
            tl.load(
                bias + h * bias_h + t[:, None] * bias_t + s[None, :] * bias_s,
                mask=square,
                other=0.0,
            ).to(tl.float32)
            * UNIT
        )
    d_bias = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for b in range(strip * items, tl.minimum(strip * items + items, B)):
        queries = load_rows(q + b * q_b + h * q_h, q_t, t, d, T, HEAD_DIM, True)
        keys = load_rows(k + b * k_b + h * k_h, k_s, s, d, S, HEAD_DIM, True)
        values = load_rows(v + b * v_b + h * v_h, v_s, s, d, S, HEAD_DIM, True)
        gradients = load_rows(d_out + b * g_b + h * g_h, g_t, t, d, T, HEAD_DIM, True)
        rows = (b * H + h) * T + t
        log_sum = tl.load(lse + rows, mask=t < T, other=-float("inf"))
        keyless = log_sum == -float("inf")  # and the rows beyond the last
        log_sum = tl.where(keyless, float("inf"), log_sum * UNIT)

        live = square
        if HAS_MASK:
            live = (
                live
                & (tl.load(key_mask + b * mask_b + s * mask_s, mask=s < S, other=0) != 0)[None, :]
            )
        scores = (
            tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * (factor * UNIT) + offset
        )
        p = tl.where(live, power(scores - log_sum[:, None], UNIT), 0.0)
        total = tl.sum(
            p, 1
        )  # 1, but for the roundings of lse, which one query's gradients would feel
        p /= tl.where(total == 0.0, 1.0, total)[:, None]
        d_p = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
        delta = tl.sum(
            p * d_p, 1
        )  # the whole row is here: more exact than rowsum(out * d_out), and out need not be read
        if HAS_D_LSE:
            delta -= tl.where(
                keyless, 0.0, tl.load(d_lse + rows, mask=t < T, other=0.0).to(tl.float32)
            )
        d_s = p * (d_p - delta[:, None])
        if BIAS_GRAD:
            d_bias += d_s
        p = p.to(queries.dtype)
        d_s = d_s.to(queries.dtype)
        sum_v = tl.dot(tl.trans(p), gradients, input_precision=PRECISION)
        sum_k = tl.dot(tl.trans(d_s), queries, input_precision=PRECISION) * factor
        sum_q = tl.dot(d_s, keys, input_precision=PRECISION) * factor
        at_t = ((b * T + t[:, None]) * H + h) * HEAD_DIM + d[None, :]
        at_s = ((b * S + s[:, None]) * H + h) * HEAD_DIM + d[None, :]
        tl.store(d_q + at_t, sum_q.to(d_q.dtype.element_ty), mask=t_tile)
        tl.store(d_k + at_s, sum_k.to(d_k.dtype.element_ty), mask=s_tile)
        tl.store(d_v + at_s, sum_v.to(d_v.dtype.element_ty), mask=s_tile)
    if BIAS_GRAD:
        tl.store(
            d_bias_strips + ((strip * H + h) * T + t[:, None]) * S + s[None, :], d_bias, mask=square
        )


def backward(d_out, d_lse, q, k, v, lse, *, scale, bias, key_mask, bias_grad):
    B, T, H, D = q.shape
    S = k.shape[1]
    block_t, block_s = _block(T), _block(S)
    choice = tiles.choose(
        "attention_backward_small",
        arch(),
        q.dtype,
        _tiles(block_t, block_s),
        queries=T,
        keys=S,
        head_dim=D,
    )
    items = triton.cdiv(B, max(1, _PROGRAMS // H)) if bias_grad else 1
    strips = triton.cdiv(B, items)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_bias = torch.empty(
        (strips, H, T, S) if bias_grad else 1, dtype=torch.float32, device=q.device
    )
    _backward_kernel[(strips * H,)](
        d_out, q, k, v, q if bias is None else bias, q if key_mask is None else key_mask,
        lse, lse if d_lse is None else d_lse, d_q, d_k, d_v, d_bias,
        scale, items, B, H, T, S,
        *d_out.stride()[:3], *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        *((0, 0, 0) if bias is None else bias.stride()), *((0, 0) if key_mask is None else key_mask.stride()),
        HEAD_DIM=D, BLOCK_D=_block(D), BLOCK_T=block_t, BLOCK_S=block_s,
        HAS_BIAS=bias is not None, HAS_MASK=key_mask is not None, HAS_D_LSE=d_lse is not None, BIAS_GRAD=bias_grad,
        UNIT=unit(q.dtype), PRECISION=dot_precision(q.dtype), **choice,
    )  # fmt: skip
    return d_q, d_k, d_v, d_bias.sum(0) if bias_grad else None


def _block(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _tiles(block_t: int, block_s: int) -> Tiles:
    return dict(num_warps=4 if block_t * block_s > 16 * 16 else 2, num_stages=1)


TUNING: dict[str, list[Tiles]] = {
    "attention_backward_small": [
        dict(num_warps=warps, num_stages=stages) for warps in (1, 2, 4, 8) for stages in (1, 2)
    ]
}


def fits(q: torch.Tensor, k: torch.Tensor) -> bool:
    """All queries by all keys fit the registers of one program: 64 by 64 at half precision, 32 by 32 or 16 by 64 in fp32."""
    block_t, block_s = _block(q.shape[1]), _block(k.shape[1])
    narrow = q.shape[-1] <= 64
    scores = 64 * 64 if narrow and q.dtype != torch.float32 else 32 * 32
    return max(block_t, block_s) <= (64 if narrow else 32) and block_t * block_s <= scores
