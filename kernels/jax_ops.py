"""The four ops on JAX arrays: the same contracts, differentiable, under jit, vmap-free, TPU kernels in Pallas beside the shared reference.

    from vatt_fast.kernels import jax_ops
    out, lse = jax_ops.attention(q, k, v, scale=64**-0.5)        # (B, H, T, head_dim): from per-head projections, no copy

On a TPU the Pallas kernels run; elsewhere the reference, and ``use_backend("pallas_tpu")`` interprets the kernels. The choice is made when
a function is traced, and stays with its compiled form.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from .dispatch import choose
from .settings import requested

# B batch, T queries, S keys, H heads, D head_dim or dimensions, N patches or clips, K kept, k values a patch, M clips of x, P texts a clip


# -- attention ---------------------------------------------------------------------------------------------------------

ATTENTION_RESULTS = "vatt_attention"  # their name for policies of jax.checkpoint: kept, the backward pass does not attend again


def attention(q, k, v, *, scale: float, bias=None, key_mask=None):
    """Attend; the contract of ``vatt_fast.kernels.attention`` in JAX's layout.

        scores = scale * q @ k^T + bias            # masked keys excluded
        out    = softmax(scores) @ v
        lse    = logsumexp(scores)

    Args:
        q: (B, H, T, head_dim) float; k, v: (B, H, S, head_dim), same dtype.
        scale: factor of the logits.
        bias: (H, T, S) float added to the scores, with gradient; -inf excludes a key too.
        key_mask: (B, S) bool, True = attend.

    Returns:
        out (B, H, T, head_dim) in q's dtype and lse (B, H, T) in fp32 (fp64 for fp64), both differentiable. A row without any key gives
        out 0, lse -inf and zero gradients, whatever gradient its lse receives.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    if (
        q.ndim != 4
        or k.shape != v.shape
        or k.ndim != 4
        or q.shape[:2] != k.shape[:2]
        or q.shape[3] != k.shape[3]
    ):
        raise ValueError(
            f"attention takes q (B, H, T, head_dim), k and v (B, H, S, head_dim), got {q.shape}, {k.shape}, {v.shape}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"q {q.shape} or k {k.shape} is empty; every axis needs at least one element"
        )
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one floating point dtype"
        )
    (B, H, T, _), S = q.shape, k.shape[2]
    if bias is not None and (
        bias.shape != (H, T, S) or not jnp.issubdtype(bias.dtype, jnp.floating)
    ):
        raise ValueError(
            f"bias is {bias.shape} {bias.dtype}; it must be float (H, T, S) = {(H, T, S)}"
        )
    if key_mask is not None and (key_mask.shape != (B, S) or key_mask.dtype != jnp.bool_):
        raise ValueError(
            f"key_mask is {key_mask.shape} {key_mask.dtype}; it must be bool (B, S) = {(B, S)}"
        )
    return _attention(q, k, v, bias, key_mask, float(scale), requested("attention"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q, k, v, bias, key_mask, scale, backend):
    return _attention_forward(q, k, v, bias, key_mask, scale, backend)[0]


def _attention_forward(q, k, v, bias, key_mask, scale, backend):
    module = choose("attention", "fwd", backend, q, k, v, scale=scale, bias=bias, key_mask=key_mask)
    if _is_reference(module):
        out, lse = module.forward(
            *(_swap(x) for x in (q, k, v)), scale=scale, bias=bias, key_mask=key_mask, xp=jnp
        )
        out = _swap(out)
    else:
        out, lse = module.forward(q, k, v, scale=scale, bias=bias, key_mask=key_mask)
    out, lse = (checkpoint_name(x, ATTENTION_RESULTS) for x in (out, lse))
    return (out, lse), (q, k, v, bias, key_mask, out, lse)


def _attention_backward(scale, backend, saved, gradients):
    q, k, v, bias, key_mask, out, lse = saved
    d_out, d_lse = gradients
    module = choose("attention", "bwd", backend, q, k, v, scale=scale, bias=bias, key_mask=key_mask)
    options = dict(scale=scale, bias=bias, key_mask=key_mask, bias_grad=bias is not None)
    if _is_reference(module):
        d_out, q, k, v, out = (_swap(x) for x in (d_out, q, k, v, out))
        *gradients, d_bias = module.backward(d_out, d_lse, q, k, v, out, lse, **options, xp=jnp)
        d_q, d_k, d_v = (_swap(x) for x in gradients)
    else:
        d_q, d_k, d_v, d_bias = module.backward(d_out, d_lse, q, k, v, out, lse, **options)
    return d_q, d_k, d_v, None if bias is None else d_bias.astype(bias.dtype), None


_attention.defvjp(_attention_forward, _attention_backward)


# -- drop_token --------------------------------------------------------------------------------------------------------


def drop_token(tokens, keep):
    """Take the kept tokens: kept_n = tokens[keep[n]]; the gradient is scattered back, zeros for dropped tokens.

    Args:
        tokens: (B, N, dim) float.
        keep: (K,) for all clips or (B, K), int32, distinct and in range (``vatt_fast.kernels.drop_token.check_keep`` on the host).

    Returns:
        (B, K, dim) in tokens' dtype.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    if tokens.ndim != 3 or 0 in tokens.shape:
        raise ValueError(f"tokens is {tokens.shape}; drop_token takes (B, N, dim), no axis empty")
    _check_keep_shape(keep, tokens.shape[0])
    return _drop_token(tokens, keep, tokens.shape[1], requested("drop_token"))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _drop_token(tokens, keep, num_tokens, backend):
    return _drop_token_forward(tokens, keep, num_tokens, backend)[0]


def _drop_token_forward(tokens, keep, num_tokens, backend):
    module = choose("drop_token", "fwd", backend, tokens, keep)
    return module.forward(tokens, keep, **_xp(module)), keep


def _drop_token_backward(num_tokens, backend, keep, d_kept):
    module = choose("drop_token", "bwd", backend, d_kept, keep)
    return module.backward(d_kept, keep, num_tokens, **_xp(module)), None


_drop_token.defvjp(_drop_token_forward, _drop_token_backward)


def _check_keep_shape(keep, batch: int) -> None:
    fits = (
        keep.ndim in (1, 2) and 0 not in keep.shape and (keep.ndim == 1 or keep.shape[0] == batch)
    )
    if not jnp.issubdtype(keep.dtype, jnp.integer) or not fits:
        raise ValueError(
            f"keep is {keep.shape} {keep.dtype}; it must be integer, (K,) or (B, K) with B = {batch} and at least one index"
        )


# -- patch_embed -------------------------------------------------------------------------------------------------------


def patch_embed(
    patches,
    weight,
    bias,
    position=None,
    keep=None,
    *,
    scale: float,
    shift: float,
    agg=None,
    gathered: bool = False,
    dtype=None,
):
    """Project the kept patches only; the contract of ``vatt_fast.kernels.patch_embed``, for rows.

        row_n    = patches[keep[n]]                                          # already rows keep[n] when gathered
        tokens_n = (row_n * scale + shift) @ weight.T + bias + position[keep[n]]
        tokens_0 = agg, when given; patches follow from index 1

    Clips are cut into rows by the loader (``patchify``): at batch 8 the clip form would need 755 MB of temporaries on a TPU, rows none.

    Args:
        patches: (B, N, k) uint8 or float rows, (B, K, k) when gathered.
        weight: (dim, k) float; bias: (dim,).
        position: (N, dim) float, the ready table; or None.
        keep: (K,) or (B, K) integers, distinct and in range; None keeps all.
        scale, shift: normalise raw values; scale is not 0.
        agg: (dim,) float, prepended to every clip; or None.
        dtype: compute dtype of the product and of tokens; the weight's if None.

    Returns:
        tokens (B, [1 +] K, dim). Gradients for weight, bias, position, agg, and for float patches.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    if patches.ndim != 3 or 0 in patches.shape:
        raise ValueError(
            f"patches is {patches.shape}; patch_embed takes rows (B, N, k), no axis empty; cut clips with patchify"
        )
    B, count, k = patches.shape
    if patches.dtype != jnp.uint8 and not jnp.issubdtype(patches.dtype, jnp.floating):
        raise ValueError(f"patches is {patches.dtype}; it must be uint8 or floating point")
    if weight.ndim != 2 or weight.shape[1] != k:
        raise ValueError(f"weight is {weight.shape}; it must be (dim, k) with k = {k}")
    dim = weight.shape[0]
    for name, vector in (("bias", bias), ("agg", agg)):
        if vector is not None and vector.shape != (dim,):
            raise ValueError(f"{name} is {vector.shape}; it must be ({dim},)")
    if scale == 0 or not math.isfinite(scale) or not math.isfinite(shift):
        raise ValueError(
            f"scale is {scale} and shift {shift}; both must be finite and scale not 0: the shift is folded as shift / scale"
        )
    if keep is not None:
        _check_keep_shape(keep, B)
        if gathered and keep.shape[-1] != count:
            raise ValueError(
                f"gathered patches have {count} rows, keep has {keep.shape[-1]} indices; they must agree"
            )
    known = not gathered or keep is None
    if position is not None and (
        position.ndim != 2 or position.shape[1] != dim or (known and position.shape[0] != count)
    ):
        raise ValueError(
            f"position is {position.shape}; it must be (N, dim) = ({count if known else 'N'}, {dim})"
        )
    dtype = jnp.dtype(weight.dtype if dtype is None else dtype)
    options = (float(scale), float(shift), bool(gathered), dtype, requested("patch_embed"))
    return _patch_embed(patches, weight, bias, position, keep, agg, *options)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8, 9, 10))
def _patch_embed(
    patches, weight, bias, position, keep, agg, scale, shift, gathered, dtype, backend
):
    return _patch_embed_forward(
        patches, weight, bias, position, keep, agg, scale, shift, gathered, dtype, backend
    )[0]


def _patch_embed_forward(
    patches, weight, bias, position, keep, agg, scale, shift, gathered, dtype, backend
):
    options = dict(
        position=position,
        keep=keep,
        agg=agg,
        scale=scale,
        shift=shift,
        gathered=gathered,
        dtype=dtype,
    )
    module = choose("patch_embed", "fwd", backend, patches, weight, bias, **options)
    return module.forward(patches, weight, bias, **options, **_xp(module)), (
        patches,
        weight,
        bias,
        position,
        keep,
        agg,
    )


def _patch_embed_backward(scale, shift, gathered, dtype, backend, saved, d_tokens):
    patches, weight, bias, position, keep, agg = saved
    options = dict(
        position=position,
        keep=keep,
        agg=agg,
        scale=scale,
        shift=shift,
        gathered=gathered,
        dtype=dtype,
    )
    module = choose("patch_embed", "bwd", backend, patches, weight, bias, **options)
    raw = patches.dtype == jnp.uint8
    gradients = module.backward(
        d_tokens, patches, weight, bias, **options, d_patches=not raw, **_xp(module)
    )
    like = (patches, weight, bias, position, agg)
    d_patches, d_weight, d_bias, d_position, d_agg = (
        None if g is None or x is None else g.astype(x.dtype)
        for g, x in zip(gradients, like, strict=True)
    )
    return None if raw else d_patches, d_weight, d_bias, d_position, None, d_agg


_patch_embed.defvjp(_patch_embed_forward, _patch_embed_backward)


# -- contrastive_lse ---------------------------------------------------------------------------------------------------------------


def contrastive_lse(
    x,
    y,
    *,
    scale,
    texts_per_clip: int = 1,
    first=0,
    x_valid=None,
    y_valid=None,
    bound: float | None = None,
):
    """The three log-sums from which every published NCE form is a few lines; the contract of ``vatt_fast.kernels.contrastive_lse``.

        S      = scale * x @ y^T                                       # (M, N * P)
        row_i  = logsumexp of S[i, j] over all valid texts j
        col_j  = logsumexp of S[i, j] over the given valid clips i     # partial: devices join theirs by a logsumexp
        pos_i  = logsumexp of S[i, j] over clip i's own valid texts

    Args:
        x: (M, D) float: clips first .. first + M - 1 of N. y: (N * P, D): all texts, clip-major.
        scale: 1 / temperature, a float or a scalar array (with gradient).
        texts_per_clip: P.
        first: index of x's first clip among the N, an int or, under ``shard_map``, a traced scalar (``axis_index * M``).
        x_valid: (M,) bool; y_valid: (N * P,) bool.
        bound: a promise that abs(S) <= bound, which spares kernels the running maximum.

    Returns:
        row (M,), col (N * P,), pos (M,) fp32 (fp64 for fp64), differentiable in x, y and scale. An empty set is -inf with zero gradient.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit; or the backend asked for cannot run them.
    """
    if x.ndim != 2 or y.ndim != 2 or x.shape[1] != y.shape[1] or 0 in x.shape or 0 in y.shape:
        raise ValueError(
            f"contrastive_lse takes x (M, D) and y (N * P, D), none empty, got {x.shape} and {y.shape}"
        )
    if x.dtype != y.dtype or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x is {x.dtype} and y {y.dtype}; they must share one floating point dtype"
        )
    if texts_per_clip < 1 or y.shape[0] % texts_per_clip:
        raise ValueError(
            f"y has {y.shape[0]} rows; they must be a multiple of texts_per_clip = {texts_per_clip}"
        )
    clips = y.shape[0] // texts_per_clip
    if isinstance(first, int | np.integer) and (first < 0 or first + x.shape[0] > clips):
        raise ValueError(
            f"x holds clips {first} .. {first + x.shape[0] - 1}, but y has texts of {clips} clips; check first and texts_per_clip"
        )
    for name, valid, count in (("x_valid", x_valid, x.shape[0]), ("y_valid", y_valid, y.shape[0])):
        if valid is not None and (valid.shape != (count,) or valid.dtype != jnp.bool_):
            raise ValueError(f"{name} is {valid.shape} {valid.dtype}; it must be bool ({count},)")
    scale = jnp.asarray(scale, jnp.promote_types(x.dtype, jnp.float32))
    if scale.ndim:
        raise ValueError(f"scale has shape {scale.shape}; it must be a float or a scalar array")
    first = jnp.asarray(first, jnp.int32)
    bound = math.inf if bound is None else float(bound)
    return _contrastive_lse(
        x, y, scale, first, x_valid, y_valid, texts_per_clip, bound, requested("contrastive_lse")
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(6, 7, 8))
def _contrastive_lse(x, y, scale, first, x_valid, y_valid, texts_per_clip, bound, backend):
    return _contrastive_lse_forward(
        x, y, scale, first, x_valid, y_valid, texts_per_clip, bound, backend
    )[0]


def _contrastive_lse_forward(x, y, scale, first, x_valid, y_valid, texts_per_clip, bound, backend):
    options = dict(
        scale=scale,
        texts_per_clip=texts_per_clip,
        first=first,
        x_valid=x_valid,
        y_valid=y_valid,
        bound=bound,
    )
    module = choose("contrastive_lse", "fwd", backend, x, y, **options)
    row, col, pos = module.forward(x, y, **options, **_xp(module))
    return (row, col, pos), (x, y, scale, first, x_valid, y_valid, row, col, pos)


def _contrastive_lse_backward(texts_per_clip, bound, backend, saved, gradients):
    x, y, scale, first, x_valid, y_valid, row, col, pos = saved
    options = dict(
        scale=scale,
        texts_per_clip=texts_per_clip,
        first=first,
        x_valid=x_valid,
        y_valid=y_valid,
        bound=bound,
    )
    module = choose("contrastive_lse", "bwd", backend, x, y, **options)
    d_x, d_y, d_scale = module.backward(*gradients, x, y, row, col, pos, **options, **_xp(module))
    return d_x.astype(x.dtype), d_y.astype(y.dtype), d_scale.astype(scale.dtype), None, None, None


_contrastive_lse.defvjp(_contrastive_lse_forward, _contrastive_lse_backward)


# -- the reference is written for torch and jax.numpy alike --------------------------------------------------------------


def _is_reference(module) -> bool:
    return module.__name__.endswith(".reference")


def _xp(module) -> dict:
    return {"xp": jnp} if _is_reference(module) else {}


def _swap(x):
    """(B, H, T, D) <-> (B, T, H, D)."""
    return jnp.swapaxes(x, 1, 2)
