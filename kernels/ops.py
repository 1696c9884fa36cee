"""One record an op: what tests, benchmarks and ``vatt-fast doctor`` need to know of it."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from .attention import attention
from .attention.flops import flops as attention_flops
from .attention.plain import attention_with_lse
from .cases import CASES, Case
from .contrastive_lse import contrastive_lse
from .contrastive_lse.flops import flops as contrastive_lse_flops
from .contrastive_lse.plain import contrastive_lse_in_one_dtype
from .drop_token import drop_token
from .drop_token.plain import drop_token as plain_drop_token
from .patch_embed import patch_embed
from .patch_embed.flops import flops as patch_embed_flops
from .patch_embed.plain import patch_embed as plain_patch_embed

Mode = Literal["fwd", "bwd", "fwd+bwd"]


@dataclass(frozen=True)
class Op:
    """An op of ``vatt_fast.kernels``."""

    name: str
    function: Callable[..., Any]  # the public one, on torch tensors
    tensors: tuple[str, ...]  # that a backend takes by position; everything else goes by name
    outputs: tuple[str, ...]
    differentiable: tuple[str, ...]  # arguments with a gradient, where given and floating point
    # the same on torch's own ops, all outputs: the yardstick of the tolerance rule, and in fp64
    # the truth. What ``use_backend("plain")`` runs may differ; see the op's plain.py.
    plain: Callable[..., Any]
    count: Callable[[Any, str], int]

    @property
    def cases(self) -> dict[str, Case]:
        return CASES[self.name]

    @property
    def jax_function(self) -> Callable[..., Any]:
        """The public function on JAX arrays. Loads JAX."""
        return getattr(importlib.import_module(f"{__package__}.jax_ops"), self.name)

    def flops(self, case: Case, mode: Mode) -> int:
        """FLOPs of the products of one call, a multiply-add counted as 2.

        The backward pass is that of training: raw patches receive no gradient.
        """
        modes = ("fwd", "bwd") if mode == "fwd+bwd" else (mode,)
        return sum(self.count(case, each) for each in modes)


def _attention_flops(case: Any, mode: str) -> int:
    return attention_flops(mode, case.batch, case.heads, case.queries, case.keys, case.head_dim)


def _contrastive_lse_flops(case: Any, mode: str) -> int:
    return contrastive_lse_flops(mode, case.batch, case.clips * case.texts_per_clip, case.dim)


def _patch_embed_flops(case: Any, mode: str) -> int:
    rows = case.kept or case.patches
    return patch_embed_flops(mode, case.batch, rows, case.values, case.dim)


OPS: dict[str, Op] = {
    op.name: op
    for op in (
        Op(
            "attention",
            attention,
            tensors=("q", "k", "v"),
            outputs=("out", "lse"),
            differentiable=("q", "k", "v", "bias"),
            plain=attention_with_lse,
            count=_attention_flops,
        ),
        Op(
            "drop_token",
            drop_token,
            tensors=("tokens", "keep"),
            outputs=("kept",),
            differentiable=("tokens",),
            plain=plain_drop_token,
            count=lambda case, mode: 0,
        ),
        Op(
            "contrastive_lse",
            contrastive_lse,
            tensors=("x", "y"),
            outputs=("row", "col", "pos"),
            differentiable=("x", "y", "scale"),
            plain=contrastive_lse_in_one_dtype,
            count=_contrastive_lse_flops,
        ),
        Op(
            "patch_embed",
            patch_embed,
            tensors=("patches", "weight", "bias"),
            outputs=("tokens",),
            differentiable=("patches", "weight", "bias", "position", "agg"),
            plain=plain_patch_embed,
            count=_patch_embed_flops,
        ),
    )
}
