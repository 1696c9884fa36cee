"""The contrastive losses in JAX: the bodies of ``vatt_fast.losses`` with JAX's exchanges.

Across devices the functions run inside ``shard_map``, and ``axis`` names the mesh axis that shares
the batch. What a device returns is its share: the sum over devices is the loss of the global batch,
and gradients summed over devices are its gradients.

Shapes: M clips on this device, N over all W devices, P texts a clip, D dimensions of a space.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ..config import NCEForm, VATTConfig
from ..kernels import jax_ops
from ..losses import NO_DIRECTION, VATTLoss, sum_of_pairs, terms_over_devices

jax.tree_util.register_dataclass(VATTLoss, ["total", "va", "vt"], [])


def contrastive_terms(
    x: jax.Array,
    y: jax.Array,
    *,
    scale: jax.Array | float,
    form: NCEForm = "paper",
    x_valid: jax.Array | None = None,
    y_valid: jax.Array | None = None,
    axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """``vatt_fast.contrastive_terms`` on JAX arrays; ``axis`` is the mesh axis of the devices."""
    return terms_over_devices(_JaxDevices(axis), x, y, scale, form, x_valid, y_valid)


def global_mean(terms: jax.Array, valid: jax.Array, axis: str | None = None) -> jax.Array:
    """This device's share of the mean of ``terms`` over the valid clips of all devices.

    0 where there is none.
    """
    count = valid.sum(dtype=terms.dtype)
    return terms.sum() / jnp.maximum(count if axis is None else jax.lax.psum(count, axis), 1)


def vatt_loss(
    output: Any,
    config: VATTConfig,
    *,
    scale: jax.Array | float | None = None,
    video_valid: jax.Array | None = None,
    audio_valid: jax.Array | None = None,
    text_valid: jax.Array | None = None,
    axis: str | None = None,
) -> VATTLoss:
    """``vatt_fast.vatt_loss`` on JAX arrays: the shares of the devices of ``axis`` sum to the loss.

    ``scale`` is ``on_jax.model.scale(params, config)``; None takes the config's temperature. The
    products of embeddings are computed in the towers' dtype, as they are under autocast in torch.
    """
    pooled = (output.video_pooled, output.audio_pooled, output.text_pooled)
    dtype = next((one.dtype for one in pooled if one is not None), None)

    def pair_loss(x, y, scale, y_valid) -> jax.Array:
        devices = _JaxDevices(axis, dtype)
        terms = terms_over_devices(devices, x, y, scale, config.nce_form, video_valid, y_valid)
        return global_mean(*terms, axis)

    return sum_of_pairs(output, config, scale, audio_valid, text_valid, pair_loss)


@dataclass(frozen=True)
class _JaxDevices:
    axis: str | None
    dtype: Any = None  # of the products; None: the embeddings' own
    xp = jnp

    def unit(self, z):
        z = z.astype(jnp.promote_types(z.dtype, jnp.float32))
        square = jnp.square(z).sum(-1, keepdims=True)
        short = square <= NO_DIRECTION**2  # nan is not, and stays nan
        # inside too: the gradient of what ``where`` leaves out would be nan
        return jnp.where(short, 0.0, z / jnp.sqrt(jnp.where(short, 1.0, square)))

    def gather(self, x):
        return x if self.axis is None else jax.lax.all_gather(x, self.axis, tiled=True)

    def first_of(self, clips: int):
        return 0 if self.axis is None else jax.lax.axis_index(self.axis) * clips

    def contrastive_lse(self, x, y, **options):
        dtype = self.dtype or x.dtype
        return jax_ops.contrastive_lse(x.astype(dtype), y.astype(dtype), **options)

    def own_columns(self, col, clips: int, texts: int):
        col = col.reshape(-1, clips, texts)  # (W, M, P)
        return col if self.axis is None else jax.lax.all_to_all(col, self.axis, 0, 0)

    def logsumexp(self, x):
        return jax.nn.logsumexp(x, -1)
