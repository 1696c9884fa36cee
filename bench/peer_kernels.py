"""Kernels as a Triton user writes them first: what the compiled code of ours is read beside.

Attention has the shape of Triton's tutorial: 128 queries by 64 keys, one loop, keys past the end
masked in every step. The contrastive log-sums take a tile of scores and a running maximum, a
direction at a time. Neither has bias or masks, nor any trick of our own kernels.
"""

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fused_attention(
    q, k, v, out, lse, scale, H, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one head. Writes out (B, T, H, HEAD_DIM), lse (B, H, T)."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, HEAD_DIM)
    inside = (t < T)[:, None]
    queries = tl.load(q + b * q_b + h * q_h + t[:, None] * q_t + d[None, :], mask=inside, other=0.0)
    k += b * k_b + h * k_h + d[:, None]
    v += b * v_b + h * v_h + d[None, :]
    top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    factor = scale * LOG2E
    for start in range(0, S, BLOCK_S):
        key = start + s
        keys = tl.load(k + key[None, :] * k_s, mask=(key < S)[None, :], other=0.0)
        scores = tl.where((key < S)[None, :], tl.dot(queries, keys), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        values = tl.load(v + key[:, None] * v_s, mask=(key < S)[:, None], other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None])
        total = total * rescale + tl.sum(p, 1)
        top = new_top
    at = ((b * T + t) * H + h)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (b * H + h) * T + t, (top + tl.log2(total)) / LOG2E, mask=t < T)


def attention(q, k, v, *, scale, **absent):
    """(out, lse) as the op gives them; head_dim a power of two."""
    B, T, H, D = q.shape
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    blocks = dict(HEAD_DIM=D, BLOCK_T=128, BLOCK_S=64, num_warps=8, num_stages=3)
    fused_attention[(triton.cdiv(T, 128), B * H)](
        *(q, k, v, out, lse, scale, H, T, k.shape[1]), *strides, **blocks
    )
    return out, lse


@triton.jit
def row_log_sums(
    x, y, scale, row, M, T, stride_x, stride_y,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: row[m] = log sum_n exp(scale x[m] . y[n]) of BLOCK_M clips, over all texts."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    factor = tl.load(scale)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, T, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, D, BLOCK_D):
            at_x = x + m[:, None] * stride_x + start + d[None, :]
            at_y = y + n[None, :] * stride_y + start + d[:, None]
            clips = tl.load(at_x, mask=(m < M)[:, None], other=0.0)
            texts = tl.load(at_y, mask=(n < T)[None, :], other=0.0)
            scores = tl.dot(clips, texts, scores)
        scores = tl.where((n < T)[None, :], scores * factor, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - new_top)
        total += tl.sum(tl.exp(scores - new_top[:, None]), 1)
        top = new_top
    tl.store(row + m, top + tl.log(total), mask=m < M)


def contrastive_lse(x, y, *, scale, **ignored):
    """(row, col) as the op gives them, without pos; D a multiple of 64."""
    sums = []
    for mine, others in ((x, y), (y, x)):
        (M, D), T = mine.shape, len(others)
        sums.append(torch.empty(M, dtype=torch.float32, device=x.device))
        sizes = (M, T, mine.stride(0), others.stride(0))
        blocks = dict(D=D, BLOCK_M=128, BLOCK_N=128, BLOCK_D=64, num_warps=8, num_stages=3)
        row_log_sums[(triton.cdiv(M, 128),)](mine, others, scale, sums[-1], *sizes, **blocks)
    return tuple(sums)


FORWARD: dict[str, Callable] = {"attention": attention, "contrastive_lse": contrastive_lse}


def can_run(op: str, inputs: dict[str, Any]) -> bool:
    masks = ("bias", "key_mask", "x_valid", "y_valid")
    return op in FORWARD and all(inputs.get(name) is None for name in masks)
