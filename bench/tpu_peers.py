"""What JAX users have for attention on TPUs, beside ours: the same case through the same compiler.

flash and splash are the kernels that come with JAX. Splash, and flash in its backward pass, take
lengths in multiples of 128: tokens are padded, and segment ids keep the padding out. Tiles are the
whole length, where theirs are best (their defaults of 128 take 4 to 17 times ours). xla is
``jax.nn.dot_product_attention``.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import flash_attention
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from vatt_fast.kernels.cases import AttentionCase

# B batch, T tokens, H heads, D head_dim; q, k, v (B, H, T, D)

PEERS = ("flash", "splash", "xla")


def program(
    peer: str, case: AttentionCase, dtype: str
) -> tuple[Callable, dict[str, Any], dict[str, Any]]:
    """As ``compile_tpu.program``: a function of (differentiable arrays, no others), and shapes.

    Raises:
        ValueError: a case with a bias, a mask, or as many keys as queries do not have.
    """
    if case.bias or case.num_keys or case.queries != case.keys:
        raise ValueError(f"{case.name}: peers are given self-attention without bias and mask")
    shape = (case.batch, case.heads, case.queries, case.head_dim)
    scale = case.head_dim**-0.5 if case.scale is None else case.scale
    attend = functools.partial(_ATTEND[peer], scale=scale)
    kind = {"bf16": jnp.bfloat16, "fp32": jnp.float32}[dtype]
    leaves = {name: jax.ShapeDtypeStruct(shape, kind) for name in "qkv"}

    def both(leaves, fixed):
        out, backward = jax.vjp(lambda leaves: attend(**leaves), leaves)
        return out, backward(out * 0.5)

    return both, leaves, {}


def _padded(attend: Callable) -> Callable:
    """attend(q, k, v, segments, scale) on lengths that are multiples of 128."""

    def call(q, k, v, *, scale):
        T = q.shape[2]
        missing = -T % 128
        q, k, v = (jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (q, k, v))
        segments = jnp.broadcast_to(jnp.arange(T + missing) >= T, (len(q), T + missing))
        return attend(q, k, v, segments.astype(jnp.int32), scale)[:, :, :T]

    return call


@_padded
def _flash(q, k, v, segments, scale):
    T = q.shape[2]
    names = "block_q block_k_major block_k block_q_major_dkv block_k_major_dkv block_k_dkv"
    names += " block_q_dkv block_k_major_dq block_k_dq block_q_dq"
    sizes = flash_attention.BlockSizes(block_b=1, **dict.fromkeys(names.split(), T))
    ids = flash_attention.SegmentIds(q=segments, kv=segments)
    return flash_attention.flash_attention(
        q, k, v, segment_ids=ids, sm_scale=scale, block_sizes=sizes
    )


@_padded
def _splash(q, k, v, segments, scale):
    (_, H, T, _) = q.shape
    names = "block_q block_kv block_kv_compute block_q_dkv block_kv_dkv block_kv_dkv_compute"
    sizes = splash_attention_kernel.BlockSizes(
        use_fused_bwd_kernel=True, **dict.fromkeys(names.split(), T)
    )
    mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.FullMask((T, T))] * H)
    kernel = splash_attention_kernel.make_splash_mha_single_device(mask, block_sizes=sizes)
    ids = splash_attention_kernel.SegmentIds(q=segments, kv=segments)
    return jax.vmap(kernel)((q * scale).astype(q.dtype), k, v, segment_ids=ids)


def _xla(q, k, v, *, scale):
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    out = jax.nn.dot_product_attention(q, k, v, scale=scale)
    return jnp.swapaxes(out, 1, 2)


_ATTEND = dict(zip(PEERS, (_flash, _splash, _xla), strict=True))
