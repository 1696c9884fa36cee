"""DropToken: taking the tokens that stay (VATT, section 3.3)."""

from typing import NamedTuple

from torch import Tensor

from ..checks import one_device
from ..registration import Operator
from ..settings import PLAIN, requested
from . import plain
from .checks import check

# B batch, N tokens, K kept


def drop_token(tokens: Tensor, keep: Tensor) -> Tensor:
    """Take the kept tokens. Replaces ``tokens[:, keep]`` or a per-clip gather.

        kept_n = tokens[keep[n]]

    Args:
        tokens: (B, N, dim), any dtype, kept as it is.
        keep: (K,) for all clips or (B, K), int32 or int64, distinct (``check_keep``).

    Returns:
        (B, K, dim). The gradient is scattered back, zeros for dropped tokens, the same bits every
        run.

    Raises:
        ValueError: shapes or dtypes that do not fit; or the backend asked for cannot run them.
    """
    check(tokens, keep)
    one_device(tokens=tokens, keep=keep)
    backend = requested("drop_token")
    if backend == PLAIN:
        return plain.drop_token(tokens, keep)
    return _drop_token(tokens, keep, backend)


class _Arguments(NamedTuple):
    tokens: Tensor
    keep: Tensor


def _fake(given: _Arguments) -> Tensor:
    B, _, dim = given.tokens.shape
    return given.tokens.new_empty((B, given.keep.shape[-1], dim))


_drop_token = Operator(
    "drop_token",
    _Arguments,
    _fake,
    tensors=2,
    outputs=("kept",),
    gradients=("tokens",),
    sized={"tokens": 1},
    instead="index the tokens",
).call
