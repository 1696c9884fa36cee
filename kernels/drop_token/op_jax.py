"""DropToken on JAX arrays."""

import jax

from ..registration_jax import Operator
from .checks import check

# B batch, N tokens, K kept


def drop_token(tokens: jax.Array, keep: jax.Array) -> jax.Array:
    """Take the kept tokens: kept_n = tokens[keep[n]].

    Args:
        tokens: (B, N, dim) float.
        keep: (K,) for all clips or (B, K), int32 or int64, distinct and in range
            (``vatt_fast.kernels.drop_token.check_keep`` on the host).

    Returns:
        (B, K, dim) in tokens' dtype. The gradient is scattered back, zeros for dropped tokens.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    check(tokens, keep)
    return _drop_token.call(dict(tokens=tokens, keep=keep))


_drop_token = Operator(
    "drop_token", tensors=("tokens", "keep"), gradients=("tokens",), sized={"tokens": 1}
)
