"""The four ops on JAX arrays: the same contracts, differentiable, under jit.

    from vatt_fast.kernels import jax_ops
    out, lse = jax_ops.attention(q, k, v, scale=64**-0.5)    # (B, H, T, head_dim): no copy

``attention`` takes heads before tokens, as per-head projections give them. On a TPU the Pallas
kernels run; elsewhere the reference, and ``use_backend("pallas_tpu")`` interprets the kernels. The
choice is made when a function is traced, and stays with its compiled form.
"""

from .attention.op_jax import ATTENTION_RESULTS, attention
from .contrastive_lse.op_jax import contrastive_lse
from .drop_token.op_jax import drop_token
from .patch_embed.op_jax import patch_embed

__all__ = ["ATTENTION_RESULTS", "attention", "contrastive_lse", "drop_token", "patch_embed"]
