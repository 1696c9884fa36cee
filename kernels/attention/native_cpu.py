"""Attention in C++: bf16 by AVX-512 BF16 or AMX (csrc/attention/forward.cpp, backward.cpp), with
fp32 sums and statistics, scores never stored; fp32 of few tokens with AVX2 or AVX-512
(native_short.py).
"""

import torch

from .. import native
from ..native import address
from . import native_short
from .native_short import contiguous_like, in_fp32, strided

# B batch, T queries, S keys, H heads, D head_dim

_MAX_HEAD_DIM = 128


def forward(q, k, v, *, scale, bias=None, key_mask=None, causal=False, deterministic=False):
    if q.dtype == torch.float32:
        options = dict(scale=scale, bias=bias, key_mask=key_mask, causal=causal)
        return native_short.forward(q, k, v, **options)
    B, T, H, _ = q.shape
    shape, threads, _memory, scratch = _prepare(q, k, backward=False)
    key_mask = None if key_mask is None else key_mask.contiguous()
    bias = None if bias is None else in_fp32(bias).contiguous()
    out = contiguous_like(q)
    lse = torch.empty((B, H, T), dtype=torch.float32)
    native.extension.attention_forward(
        shape=shape,
        scale=scale,
        causal=causal,
        threads=threads,
        q=strided(q),
        k=strided(k),
        v=strided(v),
        key_mask=address(key_mask),
        bias=address(bias),
        out=address(out),
        lse=address(lse),
        scratch=scratch,
    )
    return out, lse


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
    if q.dtype == torch.float32:
        return native_short.backward(
            d_out,
            d_lse,
            q,
            k,
            v,
            lse,
            scale=scale,
            bias=bias,
            key_mask=key_mask,
            causal=causal,
            bias_grad=bias_grad,
        )
    _, T, H, _ = q.shape
    d_out, out = (x if x.stride(-1) == 1 else x.contiguous() for x in (d_out, out))
    shape, threads, _memory, scratch = _prepare(q, k, backward=True)
    key_mask = None if key_mask is None else key_mask.contiguous()
    # the backward takes scores transposed
    bias = None if bias is None else in_fp32(bias).transpose(1, 2).contiguous()
    lse = lse.contiguous()
    d_lse = None if d_lse is None else in_fp32(d_lse).contiguous()
    d_q, d_k, d_v = contiguous_like(q), contiguous_like(k), contiguous_like(v)
    d_bias = torch.zeros((H, k.shape[1], T), dtype=torch.float32) if bias_grad else None
    native.extension.attention_backward(
        shape=shape,
        scale=scale,
        causal=causal,
        threads=threads,
        q=strided(q),
        k=strided(k),
        v=strided(v),
        out=strided(out),
        d_out=strided(d_out),
        key_mask=address(key_mask),
        bias=address(bias),
        lse=address(lse),
        d_lse=address(d_lse),
        d_q=address(d_q),
        d_k=address(d_k),
        d_v=address(d_v),
        d_bias=address(d_bias),
        scratch=scratch,
    )
    return d_q, d_k, d_v, None if d_bias is None else d_bias.transpose(1, 2)


def _prepare(q, k, *, backward: bool):
    """The sizes, the number of threads, memory for them to work in, and its address on a cache
    line's border."""
    B, T, H, D = q.shape
    shape = (B, T, k.shape[1], H, D)
    threads = min(torch.get_num_threads(), B * H if backward else B * H * -(-T // 32))
    size = native.extension.attention_scratch(shape=shape, threads=threads, backward=backward)
    memory = torch.empty(size + 64, dtype=torch.uint8)
    return shape, threads, memory, -(-memory.data_ptr() // 64) * 64


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
    if q.device.type != "cpu":
        return f"tensors are on {q.device.type}; these kernels run on cpu"
    if native.extension is None:
        return f"the C++ extension is {native.explain()}"
    if any(x.stride(-1) != 1 for x in (q, k, v)):
        return "the last axis of q, k and v must be contiguous"
    if q.dtype == torch.float32:
        return native_short.unsupported(q, k)
    if q.dtype != torch.bfloat16:
        return f"{q.dtype} is neither float32 nor bfloat16"
    if not native.multiplies_bf16():
        return (
            f"in bf16 it needs AVX-512 BF16 or AMX, and the instruction set is {native.explain()}"
        )
    if q.shape[-1] > _MAX_HEAD_DIM:
        return f"head_dim {q.shape[-1]} is beyond {_MAX_HEAD_DIM}"
    return None
