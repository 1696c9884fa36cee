"""The backward of short sequences (texts) in Triton: all queries and keys of a head fit one tile.

One kernel does all of it. The forward needs no kernel of its own.
"""

import torch
import triton
import triton.language as tl

from .. import tiles
from ..triton_common import LOG2E, dot_precision, load_rows, offset
from .triton_tiles import backward_small_tiles, dot_size, roomy

# B batch, T queries, S keys, H heads, D head_dim; a strip holds the d_bias of a few batch items

_PROGRAMS = 512  # of one launch at most, where d_bias is wanted: so its strips stay few


def log_scale(dtype: torch.dtype) -> float:
    """Factor of the scores: log2(e), part of the scale, so that exp2 follows one FMA.

    In fp32 it is 1 and exp is taken: the factor rounds the scale, the score and lse, each times
    the score, and the error would be more than twice that of plain torch.
    """
    return 1.0 if dtype == torch.float32 else LOG2E.value


@triton.jit
def scaled_exp(x, LOG_SCALE: tl.constexpr):
    """exp(x / LOG_SCALE)."""
    return tl.exp(x) if LOG_SCALE == 1.0 else tl.exp2(x)


@triton.jit(do_not_specialize=["B", "T", "S", "items"])
def _backward_kernel(
    d_out, q, k, v, bias, key_mask, lse, d_lse, d_q, d_k, d_v, d_bias_strips,
    scale, items, B, H, T, S,
    g_b, g_t, g_h, q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,  # strides, g of d_out
    bias_h, bias_t, bias_s, mask_b, mask_s,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr, HAS_D_LSE: tl.constexpr,
    BIAS_GRAD: tl.constexpr, LOG_SCALE: tl.constexpr, PRECISION: tl.constexpr,
    CAUSAL: tl.constexpr = False,
):  # fmt: skip
    """One program: one head of ``items`` batch items, with all their queries and keys.

    Writes d_q, d_k, d_v, and its sum of d_scores to its own strip of d_bias_strips
    (strips, H, T, S) fp32: no atomics, the same bits every run.
    """
    h = tl.cast(tl.program_id(0) % H, tl.int64)
    strip = tl.cast(tl.program_id(0) // H, tl.int64)
    t, s, d = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    inside = (t[:, None] < T) & (s[None, :] < S)
    inside_t = (t[:, None] < T) & (d[None, :] < HEAD_DIM)
    inside_s = (s[:, None] < S) & (d[None, :] < HEAD_DIM)
    score_bias = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    if HAS_BIAS:
        pointers = bias + h * bias_h + offset(t[:, None], bias_t) + offset(s[None, :], bias_s)
        score_bias = tl.load(pointers, mask=inside, other=0.0).to(tl.float32) * LOG_SCALE
    d_bias = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for b in range(strip * items, tl.minimum(strip * items + items, B)):
        queries = load_rows(q + b * q_b + h * q_h, q_t, t, d, T, HEAD_DIM, True)
        keys = load_rows(k + b * k_b + h * k_h, k_s, s, d, S, HEAD_DIM, True)
        values = load_rows(v + b * v_b + h * v_h, v_s, s, d, S, HEAD_DIM, True)
        gradients = load_rows(d_out + b * g_b + h * g_h, g_t, t, d, T, HEAD_DIM, True)
        rows = (b * H + h) * T + t
        row_lse = tl.load(lse + rows, mask=t < T, other=-float("inf"))
        keyless = row_lse == -float("inf")  # rows without a key, and those beyond the last
        row_lse = tl.where(keyless, float("inf"), row_lse * LOG_SCALE)

        attended = inside
        if CAUSAL:
            attended = attended & (s[None, :] <= t[:, None])
        if HAS_MASK:
            mask = tl.load(key_mask + b * mask_b + offset(s, mask_s), mask=s < S, other=0) != 0
            attended = attended & mask[None, :]
        products = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
        scores = products * (scale * LOG_SCALE) + score_bias
        p = tl.where(attended, scaled_exp(scores - row_lse[:, None], LOG_SCALE), 0.0)
        # 1 but for the roundings of lse, which would reach the gradients of a single query
        p_sum = tl.sum(p, 1)
        p /= tl.where(p_sum == 0.0, 1.0, p_sum)[:, None]
        d_p = tl.dot(gradients, tl.trans(values), input_precision=PRECISION)
        # the whole row is here: this is more exact than rowsum(out * d_out), and needs no out
        delta = tl.sum(p * d_p, 1)
        if HAS_D_LSE:
            row_d_lse = tl.load(d_lse + rows, mask=t < T, other=0.0).to(tl.float32)
            delta -= tl.where(keyless, 0.0, row_d_lse)
        d_s = p * (d_p - delta[:, None])
        if BIAS_GRAD:
            d_bias += d_s
        p = p.to(queries.dtype)
        d_s = d_s.to(queries.dtype)
        acc_v = tl.dot(tl.trans(p), gradients, input_precision=PRECISION)
        acc_k = tl.dot(tl.trans(d_s), queries, input_precision=PRECISION) * scale
        acc_q = tl.dot(d_s, keys, input_precision=PRECISION) * scale
        at_t = ((b * T + t[:, None]) * H + h) * HEAD_DIM + d[None, :]
        at_s = ((b * S + s[:, None]) * H + h) * HEAD_DIM + d[None, :]
        tl.store(d_q + at_t, acc_q.to(d_q.dtype.element_ty), mask=inside_t)
        tl.store(d_k + at_s, acc_k.to(d_k.dtype.element_ty), mask=inside_s)
        tl.store(d_v + at_s, acc_v.to(d_v.dtype.element_ty), mask=inside_s)
    if BIAS_GRAD:
        at = ((strip * H + h) * T + t[:, None]) * S + s[None, :]
        tl.store(d_bias_strips + at, d_bias, mask=inside)


def backward(arch, d_out, d_lse, q, k, v, lse, *, scale, bias, key_mask, causal, bias_grad):
    B, T, H, D = q.shape
    S = k.shape[1]
    blocks = tiles.choose(
        "attention_backward_small",
        arch,
        q.dtype,
        backward_small_tiles(q.dtype, T, S, D),
        queries=T,
        keys=S,
        head_dim=D,
    )
    items = triton.cdiv(B, max(1, _PROGRAMS // H)) if bias_grad else 1
    strips = triton.cdiv(B, items)
    d_q, d_k, d_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    d_bias_shape = (strips, H, T, S) if bias_grad else 1
    d_bias = torch.empty(d_bias_shape, dtype=torch.float32, device=q.device)
    inputs = (
        *(d_out, q, k, v),
        *optional(q, bias, key_mask),
        *(lse, lse if d_lse is None else d_lse),
    )
    constants = dict(
        HEAD_DIM=D,
        BLOCK_D=dot_size(D),
        BLOCK_T=dot_size(T),
        BLOCK_S=dot_size(S),
        HAS_BIAS=bias is not None,
        HAS_MASK=key_mask is not None,
        HAS_D_LSE=d_lse is not None,
        BIAS_GRAD=bias_grad,
        LOG_SCALE=log_scale(q.dtype),
        PRECISION=dot_precision(q.dtype),
        **({"CAUSAL": True} if causal else {}),
    )
    sizes = (items, B, H, T, S)
    strides = all_strides((d_out, q, k, v), bias, key_mask)
    _backward_kernel[(strips * H,)](
        *inputs, d_q, d_k, d_v, d_bias, scale, *sizes, *strides, **constants, **blocks
    )
    return d_q, d_k, d_v, d_bias.sum(0) if bias_grad else None


def optional(q, bias, key_mask) -> tuple[torch.Tensor, torch.Tensor]:
    """bias and key_mask as kernels take them: q stands for an absent one and is never read."""
    return q if bias is None else bias, q if key_mask is None else key_mask


def all_strides(tensors, bias, key_mask) -> tuple[int, ...]:
    """Strides of the first three axes of ``tensors``, then those of bias and key_mask."""
    return (
        *(stride for x in tensors for stride in x.stride()[:3]),
        *((0, 0, 0) if bias is None else bias.stride()),
        *((0, 0) if key_mask is None else key_mask.stride()),
    )


def fits(arch: str, q: torch.Tensor, k: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """All queries by all keys fit the registers of one program."""
    block_t, block_s = dot_size(q.shape[1]), dot_size(k.shape[1])
    if q.shape[-1] > 64:
        return max(block_t, block_s) <= 32
    if bias is not None or q.dtype == torch.float32:
        return max(block_t, block_s) <= 64 and block_t * block_s <= 32 * 32
    return block_t <= (64 if roomy(arch) else 32) and block_s <= 64
