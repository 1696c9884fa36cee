"""Shapes and dtypes that attention takes, for torch tensors and JAX arrays alike."""

from typing import Any

from ..checks import is_bool, is_float, shown

# B batch, T queries, S keys, H heads


def check(
    q: Any, k: Any, v: Any, bias: Any, key_mask: Any, *, heads: int, causal: bool = False
) -> None:
    """Raise ValueError unless attention can take these.

    Args:
        heads: the axis of heads: 2 for torch's (B, T, H, head_dim), 1 for JAX's
            (B, H, T, head_dim).
    """
    tokens = 3 - heads
    alike = (
        q.ndim == 4
        and k.ndim == 4
        and k.shape == v.shape
        and q.shape[0] == k.shape[0]
        and q.shape[heads] == k.shape[heads]
        and q.shape[3] == k.shape[3]
    )
    if not alike:
        kv = q.ndim == k.ndim == 4 and k.shape[heads]
        if kv and k.shape == v.shape and q.shape[heads] % kv == 0 and kv != q.shape[heads]:
            repeat = ("k.repeat_interleave({}, 2)", "jnp.repeat(k, {}, 1)")[heads == 1]
            raise ValueError(
                f"attention has no grouped heads, and q has {q.shape[heads]}, k and v {kv};"
                f" repeat k and v, {repeat.format(q.shape[heads] // kv)}"
            )
        order = ("B, {}, H, head_dim", "B, H, {}, head_dim")[heads == 1]
        raise ValueError(
            f"attention takes q ({order.format('T')}), k and v ({order.format('S')}),"
            f" got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if 0 in q.shape or 0 in k.shape:
        raise ValueError(
            f"q {tuple(q.shape)} or k {tuple(k.shape)} is empty;"
            " every axis needs at least one element"
        )
    if not is_float(q):
        raise ValueError(f"q is {q.dtype}; attention takes floating point")
    B, H, T, S = q.shape[0], q.shape[heads], q.shape[tokens], k.shape[tokens]
    if causal and T != S:
        raise ValueError(
            f"causal attention takes as many queries as keys, got {T} and {S};"
            " give what each query may see as a bias of 0 and -inf"
        )
    if bias is not None and (tuple(bias.shape) != (H, T, S) or not is_float(bias)):
        raise ValueError(f"bias is {shown(bias)}; it must be float (H, T, S) = {(H, T, S)}")
    if key_mask is not None and (tuple(key_mask.shape) != (B, S) or not is_bool(key_mask)):
        raise ValueError(
            f"key_mask is {shown(key_mask)}; it must be bool (B, S) = {(B, S)}, True = attend"
        )


def check_one_dtype(q: Any, k: Any, v: Any) -> None:
    """Raise ValueError unless q, k and v share their dtype."""
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(
            f"q, k, v are {q.dtype}, {k.dtype}, {v.dtype}; they must share one dtype:"
            " cast them, or use autocast"
        )
