"""``jax.nn.dot_product_attention`` and Flax's ``attention_fn`` on our attention.

    from vatt_fast.integrations.jax import dot_product_attention, flax_attention_fn

    out = dot_product_attention(q, k, v, is_causal=True)                  # as jax.nn's
    nnx.MultiHeadAttention(..., attention_fn=flax_attention_fn)           # and Linen's

A mask must be one of keys, a bias the same for every clip. Anything else raises
NotImplementedError in one sentence: JAX traces once, and nobody would see a warning.
"""

from typing import Any

import jax
import jax.numpy as jnp

from ..kernels import jax_ops

# B batch, T queries, S keys, H heads


def dot_product_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: jax.Array | None = None,
    key_value_seq_lengths: jax.Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | None = None,
    return_residual: bool = False,
) -> Any:
    """As ``jax.nn.dot_product_attention`` (JAX 0.10).

    Args:
        query: (B, T, H, head_dim) or (T, H, head_dim); key, value: the same with S.
        bias: (H, T, S) or (1, H, T, S), added to the scores.
        mask: bool (B or 1, 1, 1, S), True = attend.
        scale: None: head_dim ** -0.5.
        key_value_seq_lengths: (B,): so many first keys are attended.

    Returns:
        out in query's shape; with ``return_residual`` also the log-sum-exp (B, T, H).

    Raises:
        NotImplementedError: what ours does not have.
    """
    if query.ndim == 3:
        results = dot_product_attention(
            query[None],
            key[None],
            value[None],
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=implementation,
            return_residual=return_residual,
        )
        return jax.tree.map(lambda x: x[0], results)
    if implementation is not None:
        raise NotImplementedError(f"implementation is {implementation!r}; ours chooses its own")
    if local_window_size is not None or query_seq_lengths is not None:
        raise NotImplementedError("there are no windows and no lengths of queries; use jax.nn's")
    (B, _, H, _), S = query.shape, key.shape[1]
    if key.shape[2] != H:
        raise NotImplementedError(f"there are no grouped heads ({H} and {key.shape[2]})")
    key_mask = _keys(mask, B, S)
    if key_value_seq_lengths is not None:
        within = jnp.arange(S) < key_value_seq_lengths[:, None]
        key_mask = within if key_mask is None else key_mask & within
    out, lse = jax_ops.attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        bias=_of_all_clips(bias),
        key_mask=key_mask,
        causal=is_causal,
    )
    out = jnp.swapaxes(out, 1, 2)
    return (out, jnp.swapaxes(lse, 1, 2)) if return_residual else out


def flax_attention_fn(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    is_causal: bool = False,
    **_: Any,
) -> jax.Array:
    """The ``attention_fn`` of Flax's MultiHeadAttention, NNX and Linen.

    Raises:
        NotImplementedError: dropout of probabilities, and as ``dot_product_attention``.
    """
    if dropout_rate and not deterministic:
        raise NotImplementedError(f"there is no dropout of probabilities ({dropout_rate})")
    return dot_product_attention(query, key, value, bias, mask, is_causal=is_causal)


def _keys(mask: jax.Array | None, batch: int, keys: int) -> jax.Array | None:
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, 1, keys):
        raise NotImplementedError(
            f"the mask is {mask.shape}; ours is one of keys, ({batch}, 1, 1, {keys})"
        )
    return jnp.broadcast_to(mask[:, 0, 0].astype(bool), (batch, keys))


def _of_all_clips(bias: jax.Array | None) -> jax.Array | None:
    if bias is None or bias.ndim == 3:
        return bias
    if bias.shape[0] != 1:
        raise NotImplementedError(f"the bias is {bias.shape}; ours is one of all clips (H, T, S)")
    return bias[0]
