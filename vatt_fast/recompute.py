"""How blocks are computed: compiled, and again in the backward pass, which saves memory."""

import functools
from collections.abc import Callable
from typing import Any, Literal, TypeVar

import torch
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from .kernels import SAVE_OPS

_GRAPHS, _BACKEND = 64, "inductor"
R = TypeVar("R")
Recompute = Literal["none", "blocks", "ops"]
Compile = Literal["off", "blocks"]

_aten = torch.ops.aten
# torch's own attention, which a model trained with dropout on attention uses
_KEPT = [
    *SAVE_OPS,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
]


def recomputed(how: Recompute, function: Callable[..., R], *inputs: Any) -> R:
    """``function(*inputs)``; its backward pass computes again what ``how`` says.

    Dropout is drawn again as it was. "none": nothing. "blocks": all; only the inputs are kept.
    "ops": all but attention, whose result is kept too.
    """
    if how == "none" or not torch.is_grad_enabled():
        return function(*inputs)
    if how == "blocks":
        return checkpoint(function, *inputs, use_reentrant=False)
    # autocast's copies of weights would be found in the forward pass, where a block serves several
    # modalities, and not again in the backward pass: torch then misses an op
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        return checkpoint(function, *inputs, use_reentrant=False, context_fn=_keep_attention)
    finally:
        torch.set_autocast_cache_enabled(cached)


def _keep_attention() -> Any:
    return create_selective_checkpoint_contexts(_KEPT)


@functools.cache
def compiled(function: Callable[..., R]) -> Callable[..., R]:
    """``torch.compile`` of a function, once for all modules that are passed to it.

    Modules of one structure share a graph. A model needs a few for each tower, in training and
    evaluation: more in all than the compiler allows by itself.
    """
    import torch._dynamo

    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, _GRAPHS)
    return torch.compile(function, fullgraph=True, backend=_BACKEND)
