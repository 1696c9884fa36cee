"""The contrastive log-sums on JAX arrays."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ..registration_jax import Operator
from . import others
from .checks import check, check_scale

# M clips of x, N clips in all, P texts a clip, D dimensions


def contrastive_lse(
    x: jax.Array,
    y: jax.Array,
    *,
    scale: jax.Array | float,
    texts_per_clip: int = 1,
    first: jax.Array | int = 0,
    x_valid: jax.Array | None = None,
    y_valid: jax.Array | None = None,
    bound: float | None = None,
    exclude_own: bool = False,
    extra_texts: int = 0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The three log-sums from which every published NCE form is a few lines; the contract of
    ``vatt_fast.kernels.contrastive_lse``.

        S      = scale * x @ y^T                                       # (M, N * P [+ extra])
        row_i  = logsumexp of S[i, j] over all valid texts j
        col_j  = logsumexp of S[i, j] over the given valid clips i     # devices join theirs
        pos_i  = logsumexp of S[i, j] over clip i's own valid texts

    Args:
        x: (M, D) float: clips first .. first + M - 1 of N. y: (N * P, D): all texts, clip-major,
            and then ``extra_texts`` more.
        scale: 1 / temperature, a float or an array () or (1,) (with gradient).
        texts_per_clip: P.
        first: index of x's first clip among the N, an int or, under ``shard_map``, a traced scalar
            (``axis_index * M``).
        x_valid: (M,) bool; y_valid: bool, one a row of y.
        bound: a promise that abs(S) <= bound, which spares kernels the running maximum.
        exclude_own: leave a clip's own texts out of its row, and it out of their col; pos stays.
        extra_texts: so many last rows of y belong to no clip: negatives of all.

    Returns:
        row (M,), col (a row of y each), pos (M,) fp32 (fp64 for fp64), differentiable in x, y
            and scale. An empty set is -inf with zero gradient.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit; or the backend asked for cannot run
            them.
    """
    known = int(first) if isinstance(first, int | np.integer) else None
    check(x, y, texts_per_clip, known, x_valid, y_valid, extra_texts)
    scale = jnp.asarray(scale, jnp.promote_types(x.dtype, jnp.float32))
    check_scale(scale)
    scale = scale.reshape(())
    bound = math.inf if bound is None else float(bound)

    def lse(x, x_valid, y_valid, first):
        place = jnp.asarray(first, jnp.int32)
        arrays = dict(x=x, y=y, scale=scale, first=place, x_valid=x_valid, y_valid=y_valid)
        return _contrastive_lse.call(arrays, texts_per_clip=texts_per_clip, bound=bound)

    if exclude_own:
        return others.contrastive_lse(
            lse, x, y, scale, x_valid, y_valid, texts_per_clip, first, xp=jnp
        )
    return lse(x, x_valid, y_valid, first)


_contrastive_lse = Operator(
    "contrastive_lse", tensors=("x", "y"), gradients=("x", "y", "scale"), saves_outputs=True
)
