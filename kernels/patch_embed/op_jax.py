"""Raw patches to tokens, on JAX arrays."""

import jax
import jax.numpy as jnp
import numpy as np

from ..registration_jax import Operator
from .checks import check

# B batch, N patches, K kept, k values a patch


def patch_embed(
    patches: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    position: jax.Array | None = None,
    keep: jax.Array | None = None,
    *,
    scale: float,
    shift: float,
    agg: jax.Array | None = None,
    gathered: bool = False,
    dtype: np.dtype | type | None = None,
) -> jax.Array:
    """Project the kept patches only; the contract of ``vatt_fast.kernels.patch_embed``, for rows.

        row_n    = patches[keep[n]]                            # already rows keep[n] when gathered
        tokens_n = (row_n * scale + shift) @ weight.T + bias + position[keep[n]]
        tokens_0 = agg, when given; patches follow from index 1

    Clips are cut into rows by the loader (``patchify``): at batch 8 the clip form would need 755 MB
    of temporaries on a TPU, rows none.

    Args:
        patches: (B, N, k) uint8 or float rows, (B, K, k) when gathered.
        weight: (dim, k) float; bias: (dim,).
        position: (N, dim) float, the ready table; or None.
        keep: (K,) or (B, K) int32 or int64, distinct and in range; None keeps all.
        scale, shift: normalise raw values; scale is not 0.
        agg: (dim,) float, prepended to every clip; or None.
        dtype: compute dtype of the product and of tokens; the weight's if None.

    Returns:
        tokens (B, [1 +] K, dim). Gradients for weight, bias, position, agg, and for float patches.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    check(patches, weight, bias, position, keep, agg, scale, shift, None, gathered)
    arrays = dict(patches=patches, weight=weight, bias=bias, position=position, keep=keep, agg=agg)
    return _patch_embed.call(
        arrays,
        scale=float(scale),
        shift=float(shift),
        gathered=bool(gathered),
        dtype=jnp.dtype(weight.dtype if dtype is None else dtype),
    )


_patch_embed = Operator(
    "patch_embed",
    tensors=("patches", "weight", "bias"),
    gradients=("patches", "weight", "bias", "position", "agg"),
    wanted={"patches": "d_patches"},
)
