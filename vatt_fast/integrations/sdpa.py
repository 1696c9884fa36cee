"""Our attention behind ``F.scaled_dot_product_attention`` on CUDA, whoever calls it.

    from vatt_fast.integrations import sdpa

    sdpa.activate(unmeasured=True)
    torch.nn.attention.restore_flash_attention_impl()        # and back

It takes the place of torch's flash attention, which torch chooses for fp16 and bf16 without a mask;
torch 2.13's registry puts it there, without a change to a model, under ``torch.compile`` as well.
What ours does not take (dropout, grouped heads, other lengths under a causal mask, head_dim past
128) goes on to the kernel that was there. No GPU has measured it yet, and so it must be asked for.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.dispatch import unsupported

NAME = "vatt_fast"
_FORWARD = "_scaled_dot_product_flash_attention"
_BACKWARD = "_scaled_dot_product_flash_attention_backward"

# B batch, T queries, S keys, H heads


def activate(*, unmeasured: bool = False) -> None:
    """Register with torch, and take the place of its flash attention in this process.

    Raises:
        ValueError: ``unmeasured`` is False, or torch has no such registry (it came with 2.13).
    """
    if not unmeasured:
        raise ValueError(
            "no GPU has measured this yet, and it may be slower than torch's own; "
            "activate(unmeasured=True) takes it all the same"
        )
    registry: Any = torch.nn.attention
    if not hasattr(registry, "register_flash_attention_impl"):
        raise ValueError(f"torch {torch.__version__} has no registry of attention; take 2.13")
    registry.register_flash_attention_impl(NAME, register_fn=_install)
    registry.activate_flash_attention_impl(NAME)


@dataclasses.dataclass
class _Handle:
    """What torch's registry keeps; without the library the kernels that were there are back."""

    library: torch.library.Library | None

    def remove(self) -> None:
        self.library = None


def _install(key: str = "CUDA", backend: str = "triton_gpu") -> _Handle:
    forward, backward = (torch.library.get_kernel(f"aten::{n}", key) for n in (_FORWARD, _BACKWARD))
    library = torch.library.Library("aten", "IMPL", key)
    options: dict[str, Any] = dict(with_keyset=True, allow_override=True)
    library.impl(_FORWARD, _forward_of(backend, forward.call_boxed), key, **options)
    library.impl(_BACKWARD, _backward_of(backend, backward.call_boxed), key, **options)
    return _Handle(library)


def _forward_of(backend: str, torchs: Callable[..., Any]) -> Callable[..., Any]:
    def forward(
        keys,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ):
        """query (B, H, T, head_dim); key, value (B, H, S, head_dim) -> out as query, lse, ..."""
        taken = _taken(backend, query, key, value, dropout_p, is_causal, scale)
        if taken is None or return_debug_mask:
            given = (query, key, value, dropout_p, is_causal, return_debug_mask)
            return torchs(keys, *given, scale=scale)
        q, k, v, *options = taken
        found, lse = torch.ops.vatt_fast.attention(q, k, v, None, None, *options, False, backend)
        # as torch's own: laid out as the query
        out = found.transpose(1, 2)
        if out.stride() != query.stride():
            out = torch.empty_like(query).copy_(out)
        seed = torch.zeros(2, dtype=torch.uint64, device=query.device)
        unused, debug = seed.new_zeros(()), query.new_empty(0)
        return out, lse, None, None, query.shape[2], key.shape[2], seed, unused, debug

    return forward


def _backward_of(backend: str, torchs: Callable[..., Any]) -> Callable[..., Any]:
    def backward(
        keys,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ):
        # the same question as in the forward, and so the same answer
        taken = _taken(backend, query, key, value, dropout_p, is_causal, scale)
        if taken is None:
            tensors = (grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k)
            others = (max_q, max_k, dropout_p, is_causal, philox_seed, philox_offset)
            return torchs(keys, *tensors, *others, scale=scale)
        q, k, v, *options = taken
        d_out, out = (x.transpose(1, 2).contiguous() for x in (grad_out, out))
        gradients = torch.ops.vatt_fast.attention_backward(
            d_out, None, q, k, v, None, None, *options, False, out, logsumexp, backend
        )
        return tuple(x.transpose(1, 2) for x in gradients[:3])

    return backward


def _taken(backend, query, key, value, dropout_p, is_causal, scale) -> tuple[Any, ...] | None:
    """The call as our op takes it (q, k, v, scale, causal, deterministic); None for torch's own."""
    if dropout_p or key.shape != value.shape or query.shape[:2] != key.shape[:2]:
        return None
    if is_causal and query.shape[2] != key.shape[2]:
        return None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if unsupported("attention", backend, q, k, v, scale=scale, causal=is_causal):
        return None
    return q, k, v, scale, is_causal, torch.are_deterministic_algorithms_enabled()
