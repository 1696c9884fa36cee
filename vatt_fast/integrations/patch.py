"""Our attention in a model that exists already, whichever library it is from.

    from vatt_fast.integrations.patch import patch

    undo = patch(model)      # prints what it did, and what it left
    ...
    undo()                   # the model is as it was

It finds models of transformers, ``Attention`` layers of timm, and torch's ``nn.MultiheadAttention``
as open_clip's and torchvision's vision transformers use it. Weights are not touched.
"""

import functools
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import attention
from .fallback import say

# B batch, T queries, S keys, H heads

Undo = Callable[[], None]


class _Found(NamedTuple):
    """A layer of attention: how ours takes its place, or why it stays."""

    layer: nn.Module
    what: str
    left: str | None = None  # the reason
    undo: Undo | None = None


def patch(model: nn.Module, *, quiet: bool = False) -> Undo:
    """Swap the attention in ``model``, in place; say what was swapped, and what was left and why.

    Args:
        quiet: print nothing.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ValueError: the model holds no attention that is known here.
    """
    undos: list[Undo] = []
    swapped: Counter[str] = Counter()
    left: Counter[str] = Counter()
    known: set[nn.Module] = set()
    for found in _found(model):
        known.update(found.layer.modules())
        if found.left is None:
            swapped[found.what] += 1
        else:
            left[f"{found.what}: {found.left}"] += 1
        if found.undo is not None:
            undos.append(found.undo)
    for layer in model.modules():
        if layer not in known and _is_attention(layer):
            ours = type(layer).__module__.startswith("vatt_fast.")
            why = "it is ours already" if ours else "its forward is not known here"
            left[f"{_name(layer)}: {why}"] += 1
    stays = [f"left {count} x {what}" for what, count in left.items()]
    if not swapped:
        raise ValueError(
            f"{type(model).__name__} holds no attention of transformers, timm or"
            " nn.MultiheadAttention that ours can replace; call vatt_fast.kernels.attention in its"
            f" forward{''.join(f'; {line}' for line in stays)}"
        )
    if not quiet:
        for line in (*(f"{count} x {what}" for what, count in swapped.items()), *stays):
            print(f"vatt_fast: {line}")

    def undo_all() -> None:
        while undos:
            undos.pop()()

    return undo_all


def _found(model: nn.Module) -> Iterator[_Found]:
    """Swap, and tell of it."""
    inside: set[nn.Module] = set()  # of a model of transformers that is done
    for module in list(model.modules()):
        if module not in inside and (layers := _transformers_model(module)):
            inside.update(module.modules())
            yield from layers
        for layer in (_timm_layer(module), _torch_layer(module)):
            if layer is not None:
                yield layer


def _is_attention(module: nn.Module) -> bool:
    """By its name, and with no other in it: that one is meant, and this a block around it."""
    named = [part for part in module.modules() if "attention" in type(part).__name__.lower()]
    return len(named) == 1 and named[0] is module


def _name(module: nn.Module) -> str:
    return f"{type(module).__name__} ({type(module).__module__})"


def _transformers_model(module: nn.Module) -> list[_Found]:
    """A model of transformers, all within: its outermost one sets the implementation of each."""
    library = sys.modules.get("transformers")
    if library is None or not isinstance(module, kind := library.PreTrainedModel):
        return []
    from .transformers import NAME, register

    layers = [(*each, each[0].config._attn_implementation) for each in _dispatching(module, kind)]
    undo = None
    if any(reason is None and before != NAME for _, reason, before in layers):
        undo = functools.partial(module.set_attn_implementation, _implementations(module.config))
        register()
        module.set_attn_implementation(NAME)
    found = []
    for layer, reason, before in layers:
        if before == NAME:
            reason = "it is ours already"
        elif reason is None and layer.config._attn_implementation != NAME:
            reason = "transformers sets no other attn_implementation for it"
        swapped = f"{type(layer).__name__}: attn_implementation {before!r} -> {NAME!r}"
        found.append(_Found(layer, _name(layer) if reason else swapped, reason))
    return found if undo is None else [*found[:-1], found[-1]._replace(undo=undo)]


def _dispatching(model: nn.Module, kind: type) -> Iterator[tuple[Any, str | None]]:
    """Layers that call what ``attn_implementation`` names, each with the reason to leave it."""
    models = [(part, set(part.modules())) for part in model.modules() if isinstance(part, kind)]
    for module in model.modules():
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is None or "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            continue
        innermost = [part for part, inner in models if module in inner][-1]
        names = [*code.co_names, *code.co_varnames]
        names += [name for name, _ in innermost.named_modules()]
        names += [name for name, _ in innermost.named_parameters()]
        if any("position_bias" in name or "relative_" in name for name in names):
            yield module, "it adds relative positions to the scores"
        elif getattr(module, "num_key_value_groups", 1) > 1:
            yield module, "the op has no grouped heads"
        else:
            yield module, None


def _implementations(config: Any) -> dict[str, Any]:
    """Of a config and those in it, as ``set_attn_implementation`` takes them."""
    parts = {key: getattr(config, key, None) for key in config.sub_configs}
    inner = {key: _implementations(part) for key, part in parts.items() if part is not None}
    return {"": config._attn_implementation, **inner}


def _timm_layer(module: nn.Module) -> _Found | None:
    library = sys.modules.get("timm.layers.attention")
    if library is None or type(module) is not library.Attention:
        return None
    from .timm import Attention

    what = f"timm Attention ({module.num_heads} heads)"
    return _Found(module, what, undo=_reclass(module, Attention))


def _torch_layer(module: nn.Module) -> _Found | None:
    if type(module) is not nn.MultiheadAttention:
        return None
    what = f"torch MultiheadAttention ({module.num_heads} heads)"
    if module.bias_k is not None or module.add_zero_attn:
        return _Found(module, what, "it adds keys of its own (add_bias_kv, add_zero_attn)")
    if not module._qkv_same_embed_dim:
        return _Found(module, what, "keys or values have another width (kdim, vdim)")
    return _Found(module, what, undo=_reclass(module, _MultiheadAttention))


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
        if is_causal and attn_mask is None:  # refused there
            return super().forward(query, key, value, **options)
        left_out = _left_out(key_padding_mask)
        if reason := self._unsupported(query, key_padding_mask, left_out, need_weights, attn_mask):
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
            key_mask=None if left_out is None else ~left_out,
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

    def _unsupported(self, query, key_padding_mask, left_out, need_weights, attn_mask):
        """Why the op does not take this call, or None."""
        if query.ndim != 3:
            return "the op takes a batch (B, T, dim)"
        if need_weights:
            return "the op returns no probabilities; call it with need_weights=False"
        if self.training and self.dropout:
            return f"the op has no dropout of probabilities ({self.dropout})"
        if attn_mask is not None and (attn_mask.ndim != 2 or attn_mask.requires_grad):
            return "the op takes attn_mask (T, S) without gradient"
        if key_padding_mask is not None and left_out is None:
            return (
                "the op takes key_padding_mask of bool, or on a CPU of 0 and -inf, which is what"
                " torch's encoder layers make of one; elsewhere and compiled it is not read"
            )
        return None


def _left_out(key_padding_mask: Tensor | None) -> Tensor | None:
    """The keys to leave out, bool (B, S); None where the mask may be another kind of float.

    Reading its values would make a GPU wait, and break a compiled graph.
    """
    if key_padding_mask is None or key_padding_mask.dtype == torch.bool:
        return key_padding_mask
    if torch.compiler.is_compiling() or not key_padding_mask.is_cpu:
        return None
    left_out = key_padding_mask == float("-inf")
    plain = not key_padding_mask.requires_grad and bool((left_out | (key_padding_mask == 0)).all())
    return left_out if plain else None
