"""The contrastive losses in JAX, function for function the twin of ``losses.py``: three published forms, masks, any number of devices.

Shapes: M clips on this device, N over all W devices, P texts a clip, D dimensions of a common space.

Across devices the functions run inside ``shard_map``, ``axis`` names the mesh axis that shares the batch, and what a device returns is its
share: the sum over devices is the loss of the global batch, and gradients summed over devices are its gradients.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ..config import NCEForm, VATTConfig
from ..kernels import jax_ops
from ..losses import BOUND_SLACK, nce_terms
from ..model import MAX_SCALE


def contrastive_terms(
    x, y, *, scale, form: NCEForm = "paper", x_valid=None, y_valid=None, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Per-clip loss terms of this device's clips against the clips of all devices.

    Args:
        x: (M, D) embeddings of one modality; y: (M, D) or (M, P, D) of the other. Normalised here.
        scale: 1 / temperature, a float or a scalar array with gradient.
        x_valid: (M,) bool; an invalid clip is nobody's negative and has no term.
        y_valid: (M,) or (M, P) bool; an invalid text is nobody's negative or positive; a clip without one has no term.
        axis: mesh axis of the devices.

    Returns:
        terms (M,), 0 where there is none, and valid (M,) bool: which clips have a term.
    """
    if y.ndim == 2:
        y = y[:, None]
    if x.ndim != 2 or y.ndim != 3 or x.shape[0] != y.shape[0] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"contrastive_terms takes x (M, D) and y (M, D) or (M, P, D), got {x.shape} and {y.shape}"
        )
    M, P, _ = y.shape
    y_valid = (
        jnp.ones((M, P), bool)
        if y_valid is None
        else jnp.broadcast_to(y_valid.reshape(M, -1), (M, P))
    )
    x_valid = jnp.ones(M, bool) if x_valid is None else x_valid
    valid = x_valid & y_valid.any(1)

    x = _unit(x)
    y_all, y_valid_all = (
        _gather(_unit(y).reshape(M * P, -1), axis),
        _gather(y_valid.reshape(M * P), axis),
    )  # (N * P, D), (N * P,)
    first = 0 if axis is None else jax.lax.axis_index(axis) * M
    bound = BOUND_SLACK * (scale if isinstance(scale, float) else MAX_SCALE)
    options = dict(
        scale=scale,
        texts_per_clip=P,
        first=first,
        x_valid=x_valid,
        y_valid=y_valid_all,
        bound=bound,
    )
    row, col, pos = jax_ops.contrastive_lse(x, y_all, **options)
    # col covers this device's x only: every device sends each other one the part about its clips, and each clip joins its own P texts
    col = col.reshape(-1, M, P)  # (W, M, P)
    col = col if axis is None else jax.lax.all_to_all(col, axis, 0, 0)
    col = _masked_logsumexp(jnp.swapaxes(col, 0, 1).reshape(M, -1), valid)
    row, pos = (
        jnp.where(valid, row, 0.0),
        jnp.where(valid, pos, -math.log(2)),
    )  # any finite values: the term is dropped
    return jnp.where(valid, nce_terms(row, col, pos, form, xp=jnp), 0.0), valid


def global_mean(terms, valid, axis: str | None = None) -> jax.Array:
    """This device's share of the mean of ``terms`` over the valid clips of all devices; 0 where there is none."""
    count = valid.sum(dtype=terms.dtype)
    return terms.sum() / jnp.maximum(count if axis is None else jax.lax.psum(count, axis), 1)


class VATTLoss(NamedTuple):
    """``total`` = va_weight * va + vt_weight * vt; a part whose modalities are absent is None and counts 0."""

    total: jax.Array
    va: jax.Array | None = None
    vt: jax.Array | None = None


def vatt_loss(
    output,
    config: VATTConfig,
    *,
    scale=None,
    video_valid=None,
    audio_valid=None,
    text_valid=None,
    axis: str | None = None,
) -> VATTLoss:
    """Pre-training loss (paper eq. 6) of a ``VATTOutput``: video-audio NCE in S_va and video-text MIL-NCE in S_vt.

    Args:
        scale: ``jax_model.scale(params, config)``; None takes the config's fixed temperature.
        video_valid, audio_valid: (B,) bool; text_valid: (B, P) bool; None: all valid.
        axis: mesh axis of the devices, whose shares sum to the loss.
    """
    scale = 1 / config.temperature if scale is None else scale
    pairs = {
        "va": (output.z_video_va, output.z_audio_va, audio_valid),
        "vt": (output.z_video_vt, output.z_text_vt, text_valid),
    }
    losses = {}
    for name, (z_video, z_other, other_valid) in pairs.items():
        if z_video is not None and z_other is not None:
            options = dict(
                scale=scale,
                form=config.nce_form,
                x_valid=video_valid,
                y_valid=other_valid,
                axis=axis,
            )
            losses[name] = global_mean(*contrastive_terms(z_video, z_other, **options), axis)
    if not losses:
        raise ValueError(
            "the output holds no pair of modalities; a loss needs video with audio, or video with text"
        )
    weights = {"va": config.va_weight, "vt": config.vt_weight}
    weighted = [weights[name] * value for name, value in losses.items()]
    return VATTLoss(weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1], **losses)


def _gather(x, axis: str | None) -> jax.Array:
    """(W * M, ...): every device's x. Gradients of all devices return to the owner, summed."""
    return x if axis is None else jax.lax.all_gather(x, axis, tiled=True)


def _unit(z) -> jax.Array:
    """z / max(norm, 1e-12), also at 0, where the gradient of a plain norm would be nan."""
    z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
    square = jnp.square(z).sum(-1, keepdims=True)
    length = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
    return z / jnp.maximum(length, 1e-12)


def _masked_logsumexp(x, valid) -> jax.Array:
    """Log-sum-exp of each row of x (M, K); rows without a term are log K and pass no gradient (a row of -inf would pass nan)."""
    return jax.nn.logsumexp(jnp.where(valid[:, None], x, 0.0), 1)
