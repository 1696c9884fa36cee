"""Attention of few tokens in C++ with AVX2 or AVX-512 (csrc/attention/short.cpp): fp32, the scores
of a head in a core's cache."""

import torch
import torch.nn.functional as F

from .. import native
from ..native import address

# B batch, T queries, S keys, H heads, D head_dim

_MOST_TOKENS = 512  # beyond, a head's scores leave any core's cache
# of clips, each with a d_bias of its own: as many for any number of threads, so that the bits are
# the same
_GROUPS = 16
# floats of the widest vector: the kernel takes biases by key, queries filled up to whole vectors
_LANES = 16


def forward(q, k, v, *, scale, bias, key_mask, causal):
    B, T, H, _ = q.shape
    arguments, _kept = _arguments(q, k, v, scale, bias, key_mask, causal)
    out, lse = contiguous_like(q), torch.empty((B, H, T), dtype=q.dtype)
    native.extension.short_attention_forward(**arguments, out=address(out), lse=address(lse))
    return out, lse


def backward(d_out, d_lse, q, k, v, lse, *, scale, bias, key_mask, causal, bias_grad):
    B, T, H, _ = q.shape
    arguments, _kept = _arguments(q, k, v, scale, bias, key_mask, causal)
    d_out = d_out if d_out.stride(-1) == 1 else d_out.contiguous()
    lse, d_lse = lse.contiguous(), None if d_lse is None else d_lse.contiguous()
    groups = min(B, _GROUPS) if bias_grad else B
    d_q, d_k, d_v = contiguous_like(q), contiguous_like(k), contiguous_like(v)
    d_bias = None
    if bias_grad:
        d_bias = torch.empty((groups, H, k.shape[1], T + -T % _LANES), dtype=q.dtype)
    native.extension.short_attention_backward(
        **arguments,
        d_out=strided(d_out),
        lse=address(lse),
        d_lse=address(d_lse),
        d_q=address(d_q),
        d_k=address(d_k),
        d_v=address(d_v),
        d_bias=address(d_bias),
        groups=groups,
    )
    return d_q, d_k, d_v, None if d_bias is None else d_bias.sum(0)[..., :T].transpose(1, 2)


def _arguments(q, k, v, scale, bias, key_mask, causal):
    """What both calls have in common, and the tensors whose addresses are in it."""
    B, T, H, D = q.shape
    shape, threads = (B, T, k.shape[1], H, D), min(torch.get_num_threads(), B * H)
    padding = -T % _LANES
    key_mask = None if key_mask is None else key_mask.contiguous()
    if bias is not None:
        bias = F.pad(in_fp32(bias).transpose(1, 2), (0, padding)).contiguous()
    floats = threads * native.extension.short_attention_floats(shape=shape)
    scratch = torch.empty(floats, dtype=q.dtype)
    arguments = dict(
        shape=shape,
        scale=scale,
        causal=causal,
        threads=threads,
        q=strided(q),
        k=strided(k),
        v=strided(v),
        key_mask=address(key_mask),
        bias=address(bias),
        bias_row=T + padding,
        scratch=address(scratch),
    )
    return arguments, (key_mask, bias, scratch)


# A call of few tokens is as short as the Python around it: these spare it microseconds.


def contiguous_like(x: torch.Tensor) -> torch.Tensor:
    """New memory for a tensor of this shape and dtype; half the time of ``torch.empty``."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def in_fp32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float32 else x.to(torch.float32)


def strided(x) -> tuple[int, ...]:
    return (x.data_ptr(), *x.stride()[:3])


def unsupported(q, k) -> str | None:
    if native.level() == "base":
        return f"in fp32 it needs AVX2, and the instruction set is {native.explain()}"
    tokens = max(q.shape[1], k.shape[1])
    if tokens > _MOST_TOKENS:
        return f"{tokens} tokens are more than the {_MOST_TOKENS} that its fp32 kernel takes"
    return None
