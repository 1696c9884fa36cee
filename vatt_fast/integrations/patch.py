"""Our attention in a model that exists already, whichever library it is from.

    from vatt_fast.integrations.patch import patch

    undo = patch(model)      # prints what it did
    ...
    undo()                   # the model is as it was

It finds models of transformers, ``Attention`` layers of timm, and torch's ``nn.MultiheadAttention``
as open_clip's and torchvision's vision transformers use it. Weights are not touched.
"""

import sys
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from .fallback import say

# B batch, T queries, S keys, H heads

Undo = Callable[[], None]


def patch(model: nn.Module, *, quiet: bool = False) -> Undo:
    """Swap the attention in ``model``, in place, and say what was swapped.

    Args:
        quiet: print nothing.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ValueError: the model holds no attention that is known here.
    """
    undos: list[Undo] = []
    found: Counter[str] = Counter()
    for module in model.modules():
        for swap in (_transformers_model, _timm_layer, _torch_layer):
            if swapped := swap(module):
                what, undo = swapped
                found[what] += 1
                undos.append(undo)
                break
    if not found:
        raise ValueError(
            f"{type(model).__name__} holds no attention of transformers, timm or"
            " nn.MultiheadAttention; call vatt_fast.kernels.attention in its forward"
        )
    if not quiet:
        for what, count in found.items():
            print(f"vatt_fast: {count} x {what}")

    def undo_all() -> None:
        while undos:
            undos.pop()()

    return undo_all


Swap = tuple[str, Undo] | None


def _transformers_model(module: nn.Module) -> Swap:
    """A model of transformers: its outermost one sets the implementation of all within."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(module, library.PreTrainedModel):
        return None
    from .transformers import NAME, register

    before = module.config._attn_implementation
    if before == NAME:  # one around it has done so
        return None
    register()
    module.set_attn_implementation(NAME)
    what = f"{type(module).__name__}: attn_implementation {before!r} -> {NAME!r}"
    return what, lambda: module.set_attn_implementation(before)


def _timm_layer(module: nn.Module) -> Swap:
    library = sys.modules.get("timm.layers.attention")
    if library is None or type(module) is not library.Attention:
        return None
    from .timm import Attention

    return f"timm Attention ({module.num_heads} heads)", _reclass(module, Attention)


def _torch_layer(module: nn.Module) -> Swap:
    if type(module) is not nn.MultiheadAttention:
        return None
    if not module._qkv_same_embed_dim or module.bias_k is not None or module.add_zero_attn:
        return None
    what = f"torch MultiheadAttention ({module.num_heads} heads)"
    return what, _reclass(module, _MultiheadAttention)


def _reclass(module: nn.Module, other: type) -> Undo:
    before = type(module)
    module.__class__ = other  # a subclass with another forward: parameters and hooks stay

    def undo() -> None:
        module.__class__ = before

    return undo


class _MultiheadAttention(nn.MultiheadAttention):
    """torch's module; its product of q, k and v is the op's where the op takes it."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As torch's."""
        options: dict[str, Any] = dict(
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        if reason := self._unsupported(query, key_padding_mask, need_weights, attn_mask):
            say("torch's MultiheadAttention", "torch's own", reason)
            return super().forward(query, key, value, **options)
        if self.batch_first is False:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        weight, bias = self.in_proj_weight, self.in_proj_bias
        if query is key and key is value:
            q, k, v = F.linear(query, weight, bias).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        else:
            biases = (None,) * 3 if bias is None else bias.chunk(3)
            q, k, v = (
                F.linear(x, w, b).unflatten(-1, (self.num_heads, -1))
                for x, w, b in zip((query, key, value), weight.chunk(3), biases, strict=True)
            )
        out, _ = attention(
            *(q, k, v),
            scale=self.head_dim**-0.5,
            bias=self._bias(attn_mask, q),
            key_mask=None if key_padding_mask is None else ~key_padding_mask,
        )
        out = self.out_proj(out.flatten(2))
        return (out if self.batch_first else out.transpose(0, 1)), None

    def _bias(self, attn_mask: Tensor | None, q: Tensor) -> Tensor | None:
        """(T, S), True = leave out, or a float to add, as (H, T, S)."""
        if attn_mask is None:
            return None
        if attn_mask.dtype == torch.bool:
            attn_mask = torch.zeros_like(attn_mask, dtype=q.dtype).masked_fill(
                attn_mask, float("-inf")
            )
        return attn_mask.expand(self.num_heads, -1, -1)

    def _unsupported(self, query, key_padding_mask, need_weights, attn_mask) -> str | None:
        if query.ndim != 3:
            return f"the op takes a batch, not queries {tuple(query.shape)}"
        if need_weights:
            return "the op returns no probabilities; call it with need_weights=False"
        if self.training and self.dropout:
            return f"the op has no dropout of probabilities ({self.dropout})"
        if attn_mask is not None and (attn_mask.ndim != 2 or attn_mask.requires_grad):
            return f"the op takes attn_mask (T, S) without gradient, not {tuple(attn_mask.shape)}"
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            return f"the op takes key_padding_mask of bool, not {key_padding_mask.dtype}"
        return None
