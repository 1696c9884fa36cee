"""Our attention as JAX, Flax and tokamax call theirs; attention and a loss over a mesh.

    from vatt_fast.integrations.jax import dot_product_attention, flax_attention_fn

    out = dot_product_attention(q, k, v, is_causal=True)                  # as jax.nn's
    nnx.MultiHeadAttention(..., attention_fn=flax_attention_fn)           # and Linen's
    tokamax.dot_product_attention(q, k, v, implementation=(tokamax_implementation, "xla"))
    attend = sharded_attention(mesh, batch="data", heads="model")         # attend(q, k, v)
    loss = contrastive_loss(mesh, "data")                                 # loss(x, y, scale)

A mask must be one of keys, a bias the same for every clip. Anything else raises
NotImplementedError in one sentence: JAX traces once, and nobody would see a warning.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from ..config import NCEForm
from ..kernels import jax_ops
from ..on_jax.losses import contrastive_terms, global_mean

# B batch, T queries, S keys, H heads; N clips, D dimensions


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
        bias: added to the scores, (H, T, S) or (1, H, T, S); axes of length 1 are broadcast.
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
    _check(query, key, value)
    (B, T, H, _), S = query.shape, key.shape[1]
    if is_causal and T != S:
        raise NotImplementedError(f"causal attention has as many queries as keys, not {T} and {S}")
    key_mask = _keys(mask, B, S)
    if key_value_seq_lengths is not None:
        within = jnp.arange(S) < key_value_seq_lengths[:, None]
        key_mask = within if key_mask is None else key_mask & within
    out, lse = jax_ops.attention(
        *(jnp.swapaxes(x, 1, 2) for x in (query, key, value)),
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        bias=_of_all_clips(bias, (H, T, S)),
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
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    qk_attn_weights_einsum: Any = None,
    attn_weights_value_einsum: Any = None,
    is_causal: bool = False,
    **_: Any,
) -> jax.Array:
    """The ``attention_fn`` of Flax's MultiHeadAttention, NNX and Linen.

    Args:
        dtype: queries, keys and values are cast to it, None: to the one that holds them all.

    Raises:
        NotImplementedError: dropout of probabilities, probabilities to sow, a precision, products
            of the caller's own, and as ``dot_product_attention``.
    """
    if dropout_rate and not deterministic:
        raise NotImplementedError(f"there is no dropout of probabilities ({dropout_rate})")
    if module is not None:
        raise NotImplementedError("there are no probabilities to sow; set sow_weights to False")
    if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
        raise NotImplementedError("products are ours; leave out the einsum classes")
    _check_precision(precision)
    dtype = jnp.result_type(query, key, value) if dtype is None else dtype
    query, key, value = (x.astype(dtype) for x in (query, key, value))
    return dot_product_attention(query, key, value, bias, mask, is_causal=is_causal)


def tokamax_implementation(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    bias: jax.Array | None = None,
    mask: Any = None,
    logits_scale: Any = None,
    precision: Any = None,
    logits_soft_cap: float | None = None,
    q_sharding: Any = None,
) -> jax.Array:
    """What ``implementation=`` of ``tokamax.dot_product_attention`` takes beside its own names.

    Raises:
        NotImplementedError: what ours does not have; tokamax goes on to its next implementation.
    """
    if query.ndim != 4 or not all(isinstance(x, jax.Array) for x in (query, key, value)):
        raise NotImplementedError(f"queries are (B, T, H, head_dim) arrays, not {query.shape}")
    if logits_soft_cap is not None or q_sharding is not None:
        raise NotImplementedError("there is no soft cap and no sharding; use shard_map")
    _check_precision(precision)
    options: dict[str, Any] = {}
    if mask is not None:
        if not (mask.q_start is mask.q_end is mask.k_start is None):
            raise NotImplementedError("there are no windows and no lengths of queries")
        if mask.k_end is not None:
            lengths = jnp.asarray(mask.k_end)
            if lengths.size not in (1, len(query)) or any(n != 1 for n in lengths.shape[1:]):
                raise NotImplementedError(f"lengths are those of clips, not {lengths.shape}")
            options["key_value_seq_lengths"] = jnp.broadcast_to(lengths.ravel(), len(query))
        options |= dict(mask=mask.bool_mask, is_causal=mask.is_causal)
    # its own default is a class
    scale = None if isinstance(logits_scale, type) else logits_scale
    return dot_product_attention(query, key, value, bias, scale=scale, **options)


def sharded_attention(
    mesh: Mesh, *, batch: str | None = None, heads: str | None = None
) -> Callable[..., jax.Array]:
    """Attention of clips and heads that lie on the devices of mesh axes; nothing is sent.

    The function takes whole arrays, inside ``jit`` or not, and has their gradients. On a mesh of
    explicit axes they lie along ``batch`` and ``heads`` already, as ``jax.reshard`` puts them.

    Args:
        mesh: of devices.
        batch, heads: which of its axes shares the clips, and which the heads; None: none.

    Returns:
        ``attend(query, key, value, bias=None, mask=None, *, scale=None, is_causal=False)``, as
        ``dot_product_attention``.

    Raises:
        ValueError: an unknown axis; when called, clips or heads that it does not divide.
    """
    for axis in (batch, heads):
        if axis is not None:
            _check_axis(mesh, axis)

    def attend(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | None = None,
        *,
        scale: float | None = None,
        is_causal: bool = False,
    ) -> jax.Array:
        (B, T, H, _), S = query.shape, key.shape[1]
        for axis, size, what in ((batch, B, "clips"), (heads, H, "heads")):
            if axis is not None and size % mesh.shape[axis]:
                raise ValueError(f"{size} {what} do not divide into {mesh.shape[axis]} devices")
        # what is None is no array of the mesh
        given: dict[str, Any] = dict(query=query, key=key, value=value)
        along = dict.fromkeys(given, P(batch, None, heads))
        if bias is not None:
            given["bias"], along["bias"] = _of_all_clips(bias, (H, T, S)), P(heads)
        keys = _keys(mask, B, S)
        if keys is not None:
            given["mask"], along["mask"] = keys[:, None, None], P(batch)
        return jax.shard_map(
            lambda given: dot_product_attention(**given, scale=scale, is_causal=is_causal),
            mesh=mesh,
            in_specs=(along,),
            out_specs=P(batch, None, heads),
            check_vma=False,  # kernels do not say how their outputs vary over the mesh
        )(given)

    return attend


def contrastive_loss(
    mesh: Mesh, axis: str, *, form: NCEForm = "symmetric"
) -> Callable[..., jax.Array]:
    """CLIP's loss, or VATT's, of a batch that lies on the devices of a mesh axis.

    Each device computes its rows only, and columns are joined; no device holds the matrix. The
    function takes whole arrays, inside ``jit`` or not, and has their gradients. On a mesh of
    explicit axes the arrays lie along ``axis`` already, as ``jax.reshard`` puts them.

    Args:
        mesh: of devices.
        axis: which of its axes shares the batch.
        form: "symmetric", two softmax cross-entropies (summed, which is twice CLIP's mean); or
            VATT's "paper" and "released". See ``vatt_fast.losses.nce_terms``.

    Returns:
        ``loss(x, y, scale, x_valid=None, y_valid=None)``: x (N, D), y (N, D) or (N, P, D) are
        brought to unit length; scale is a float, or an array () of at most 100; x_valid (N,) and
        y_valid (N,) or (N, P) bool. The mean over valid pairs, 0 without any.

    Raises:
        ValueError: an unknown axis; when called, N that the axis does not divide.
    """
    _check_axis(mesh, axis)

    def loss(
        x: jax.Array,
        y: jax.Array,
        scale: jax.Array | float,
        x_valid: jax.Array | None = None,
        y_valid: jax.Array | None = None,
    ) -> jax.Array:
        if x.shape[0] % mesh.shape[axis]:
            raise ValueError(f"{x.shape[0]} clips do not divide into {mesh.shape[axis]} devices")
        # what is None, and a float, which bounds the scores, are no arrays of the mesh
        given = dict(x=x, y=y, x_valid=x_valid, y_valid=y_valid)
        along = {name: value for name, value in given.items() if value is not None}
        everywhere = {} if isinstance(scale, float) else {"scale": scale}

        def share(along, everywhere):
            options = {"scale": scale, **along, **everywhere}
            terms = contrastive_terms(
                options.pop("x"), options.pop("y"), form=form, axis=axis, **options
            )
            return global_mean(*terms, axis)[None]

        # check_vma off: kernels do not say how their outputs vary over the mesh
        shares = jax.shard_map(
            share, mesh=mesh, in_specs=(P(axis), P()), out_specs=P(axis), check_vma=False
        )
        return shares(along, everywhere).sum()

    return loss


def _check_axis(mesh: Mesh, axis: str) -> None:
    if axis not in mesh.shape:
        raise ValueError(f"axis is {axis!r}; the mesh has {', '.join(map(repr, mesh.shape))}")


def _keys(mask: jax.Array | None, batch: int, keys: int) -> jax.Array | None:
    if mask is None:
        return None
    if mask.ndim != 4 or mask.shape[0] not in (1, batch) or mask.shape[1:] != (1, 1, keys):
        raise NotImplementedError(
            f"the mask is {mask.shape}; ours is one of keys, ({batch}, 1, 1, {keys})"
        )
    return jnp.broadcast_to(mask[:, 0, 0].astype(bool), (batch, keys))


def _of_all_clips(bias: jax.Array | None, shape: tuple[int, int, int]) -> jax.Array | None:
    if bias is None:
        return None
    if bias.ndim == 4 and bias.shape[0] == 1:
        bias = bias[0]
    fits = bias.ndim == 3 and all(n in (1, m) for n, m in zip(bias.shape, shape, strict=True))
    if not fits or not jnp.issubdtype(bias.dtype, jnp.floating):
        raise NotImplementedError(
            f"the bias is {bias.shape} {bias.dtype}; ours is a float one of all clips,"
            f" (H, T, S) = {shape}"
        )
    return jnp.broadcast_to(bias, shape)


def _check_precision(precision: Any) -> None:
    if precision not in (None, "default", jax.lax.Precision.DEFAULT):
        raise NotImplementedError(f"precision is {precision}; ours is that of the inputs")


def _check(query: jax.Array, key: jax.Array, value: jax.Array) -> None:
    """Raise NotImplementedError where the op has no such product."""
    q, k, v = query.shape, key.shape, value.shape
    if k != v or len(k) != 4 or q[0] != k[0] or q[3] != k[3]:
        raise NotImplementedError(
            f"queries {q}, keys {k} and values {v} must be (B, T or S, H, head_dim) alike"
        )
    if q[2] != k[2]:
        raise NotImplementedError(
            f"there are no grouped heads ({q[2]} and {k[2]}); repeat keys and values with"
            " jnp.repeat(..., axis=2)"
        )
    if not query.dtype == key.dtype == value.dtype:
        raise NotImplementedError(
            f"queries, keys and values are {query.dtype}, {key.dtype} and {value.dtype};"
            " cast them to one dtype"
        )
