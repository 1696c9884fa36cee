"""An op's call in each mode, its inputs, and its error: the same for our backends and for peers."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vatt_fast.kernels import attention, contrastive_lse, drop_token, patch_embed, use_backend
from vatt_fast.kernels.cases import AttentionCase, Case, DropTokenCase, NCECase, make

from .floors import Mode
from .timer import Call, l2_bytes

OPS: dict[str, Callable[..., Any]] = {
    "attention": attention,
    "drop_token": drop_token,
    "contrastive_lse": contrastive_lse,
    "patch_embed": patch_embed,
}
# outputs that every contender returns and whose gradients flow back: attention's lse has none in the model
COMPARED = {
    "attention": ("out",),
    "drop_token": ("kept",),
    "contrastive_lse": ("row", "col", "pos"),
    "patch_embed": ("tokens",),
}
# what training differentiates: raw patches and a fixed temperature have no gradient there
TRAINED = {
    "attention": ("q", "k", "v", "bias"),
    "drop_token": ("tokens",),
    "contrastive_lse": ("x", "y"),
    "patch_embed": ("weight", "bias", "position", "agg"),
}
_MAX_SETS = 8


def on_backend(op: str, backend: str) -> Callable[..., tuple[Tensor, ...]]:
    """The op on one backend ("" chooses automatically), returning what COMPARED lists."""

    def run(**inputs):
        with use_backend(f"{op}={backend}" if backend else ""):
            outputs = OPS[op](**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs[: len(COMPARED[op])]

    return run


def input_sets(case: Case, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Input sets to rotate through, on a GPU together more than twice its L2 cache where eight of them are."""
    first = make(case, dtype, device)
    count = 2
    if device.type == "cuda":
        size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        count = min(_MAX_SETS, max(2, -(-2 * l2_bytes(device) // size)))
    return [first, *(make(case, dtype, device, seed) for seed in range(1, count))]


def _with_leaves(op: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in TRAINED[op]
        if isinstance(inputs[name], Tensor) and inputs[name].is_floating_point()
    }
    return inputs | leaves, leaves


def _seeds(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def call(
    function: Callable[..., tuple[Tensor, ...]], op: str, inputs: dict[str, Any], mode: Mode
) -> Call:
    """One timed call. bwd runs on a graph made once, whose saved tensors stay."""
    if mode == "fwd":

        def forward():
            with torch.no_grad():
                return function(**inputs)

        return forward
    inputs, leaves = _with_leaves(op, inputs)
    tensors = list(leaves.values())
    if mode == "bwd":
        outputs = function(**inputs)
        seeds = _seeds(outputs)
        return lambda: torch.autograd.grad(outputs, tensors, seeds, retain_graph=True)
    with torch.no_grad():
        seeds = _seeds(function(**inputs))
    return lambda: torch.autograd.grad(function(**inputs), tensors, seeds)


# -- error -------------------------------------------------------------------------------------------------------------


def reduced(case: Case, device: torch.device) -> Case:
    """The case at a batch whose fp64 truth, computed with everything materialised, is affordable; of long attention fewer heads too."""
    limit = 2**29 if device.type == "cuda" else 2**24
    batch = max(1, min(case.batch, limit // _elements_a_clip(case)))
    heads = {}
    if isinstance(case, AttentionCase):
        heads["heads"] = max(1, min(case.heads, limit // (batch * case.queries * case.keys)))
    return dataclasses.replace(case, batch=batch, **heads)


def _elements_a_clip(case: Case) -> int:
    if isinstance(case, AttentionCase):
        return case.heads * case.queries * case.keys
    if isinstance(case, NCECase):
        return case.clips * case.texts_per_clip
    if isinstance(case, DropTokenCase):
        return case.tokens * case.dim
    return case.patches * max(case.values, case.dim)


Values = dict[str, Tensor]


def values(function: Callable[..., tuple[Tensor, ...]], op: str, inputs: dict[str, Any]) -> Values:
    """{output: value, d_input: gradient} of one forward and backward."""
    inputs, leaves = _with_leaves(op, inputs)
    outputs = function(**inputs)
    grads = torch.autograd.grad(outputs, list(leaves.values()), _seeds(outputs))
    found = dict(zip(COMPARED[op], outputs, strict=True)) | {
        f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }
    return {name: value.detach() for name, value in found.items()}


def truth(op: str, inputs: dict[str, Any], dtype: torch.dtype) -> Values:
    """The reference in fp64, on the same input values and the same gradients of outputs as a contender's in ``dtype``."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    reference = on_backend(op, "reference")
    wide, leaves = _with_leaves(op, wide)
    outputs = reference(**wide)
    statistics = op == "contrastive_lse"  # fp32 in every contender
    seeds = [
        seed.to(torch.promote_types(dtype, torch.float32) if statistics else dtype).double()
        for seed in _seeds(outputs)
    ]
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    found = dict(zip(COMPARED[op], outputs, strict=True)) | {
        f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)
    }
    return {name: value.detach() for name, value in found.items()}


def errors(found: Values, exact: Values) -> dict[str, float]:
    """||x - exact|| / ||exact|| of every tensor; nan and inf where exact is finite count as inf."""
    result = {}
    for name, wanted in exact.items():
        value = found[name].double()
        finite = wanted.isfinite()
        if not torch.equal(value.isfinite(), finite):
            result[name] = float("inf")
            continue
        difference = torch.where(finite, value - wanted, 0.0).norm()
        unit = torch.where(finite, wanted, 0.0).norm()
        result[name] = float(difference / unit) if unit else float(difference)
    return result


def worst(found: dict[str, float], mode: Mode) -> tuple[float, str]:
    """The largest error that a mode answers for, and its tensor."""
    of_mode = {
        name: value for name, value in found.items() if mode != "fwd" or not name.startswith("d_")
    }
    name = max(of_mode, key=lambda each: of_mode[each])
    return of_mode[name], name


def red(found: dict[str, float], plain: dict[str, float], dtype: torch.dtype) -> str | None:
    """Why a backend may not be timed: an error beyond twice plain torch's plus half an eps of the dtype."""
    eps = torch.finfo(dtype).eps
    bad = [
        f"{name} {found[name]:.1e}, plain torch {plain[name]:.1e}"
        for name in found
        if not found[name] <= 2 * plain[name] + eps / 2
    ]
    return f"error beyond twice plain torch's: {'; '.join(bad)}" if bad else None
