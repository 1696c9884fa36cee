"""An op's cases by name, its call in each mode, and its values: the same for ours and for peers."""

import dataclasses
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vatt_fast.config import preset
from vatt_fast.kernels import use_backend
from vatt_fast.kernels.cases import (
    CASES,
    AttentionCase,
    Case,
    DropTokenCase,
    NCECase,
    PatchEmbedCase,
    make,
    tag,
)
from vatt_fast.kernels.ops import OPS

from .floors import Mode
from .timer import Call, l2_bytes

Function = Callable[..., tuple[Tensor, ...]]
Values = dict[str, Tensor]
_MAX_SETS = 8

# -- cases ------------------------------------------------------------------------------------

# what a CPU is judged by: the presets' own sizes, at batches that take a fraction of a second
FOR_CPU: dict[str, tuple[str, ...]] = {
    "attention": (
        *("video_bbs_drop50_b1", "video_bbs_drop0_b1", "audio_bbs_drop50_b1"),
        *("video_mbs_drop50_b2", "text_bbs", "video_tiny_drop50"),
    ),
    "drop_token": ("video_mbs_drop50", "video_mbs_drop50_per_clip"),
    "contrastive_lse": (
        *("va_bbs_one_device", "vt_bbs_one_device", "va_bbs_one_device_b8192", "vt_bbs"),
    ),
    # rows: kept rows, as the loader of a training run writes them; clip: read in place
    "patch_embed": (
        *("video_mbs_drop50_b2_rows", "video_mbs_drop0_b2_clip", "video_mbs_drop50_b2_clip"),
        *("audio_bbs_drop50_rows", "video_tiny_drop50_rows"),
    ),
}


def case_named(op: str, name: str) -> Case | None:
    """A case of the op, perhaps at another batch or on a road: <case>[_b<batch>][_rows | _clip]."""
    if name in CASES[op]:
        return CASES[op][name]
    found = re.fullmatch(r"(.+?)(?:_b(\d+))?(?:_(rows|clip))?", name)
    assert found
    base = CASES[op].get(found[1])
    if base is None or (found[3] and not (isinstance(base, PatchEmbedCase) and base.origin)):
        return None
    if found[2]:
        base = at_batch(base, int(found[2]))
    if found[3] and isinstance(base, PatchEmbedCase):
        base = _on_road(base, found[3])
    return dataclasses.replace(base, name=name)


def at_batch(case: Case, batch: int) -> Case:
    """Another batch; where x holds all clips, all of them."""
    more = {"clips": batch} if isinstance(case, NCECase) and case.batch == case.clips else {}
    return dataclasses.replace(case, batch=batch, name=f"{case.name}_b{batch}", **more)


def _on_road(case: PatchEmbedCase, road: str) -> PatchEmbedCase:
    if road == "rows":
        return dataclasses.replace(case, gathered=case.kept is not None)
    assert case.origin
    config = preset(case.origin.presets[0])
    if case.origin.modality == "audio":
        samples = case.patches * config.audio_patch
        return dataclasses.replace(case, clip=(samples,), patch=(config.audio_patch,))
    height, width = (case.origin.pixels or side for side in (config.height, config.width))
    clip = (config.frames, height, width, 3)
    return dataclasses.replace(case, clip=clip, patch=config.video_patch)


def select(op: str, names: Sequence[str]) -> list[Case]:
    """Cases by name; "primary" and "parity" are all of a tag, "cpu" those a CPU is judged by.

    Raises:
        ValueError: an unknown name.
    """
    chosen: dict[str, Case] = {}
    for name in names:
        if name in ("primary", "parity"):
            chosen |= {case.name: case for case in CASES[op].values() if tag(case) == name}
            continue
        for each in FOR_CPU[op] if name == "cpu" else (name,):
            case = case_named(op, each)
            if case is None:
                raise ValueError(
                    f"unknown case {each!r}; {op} has primary, parity, cpu, "
                    f"{', '.join(CASES[op])}, "
                    "each also with _b<batch>, and of patch_embed's primary ones _rows or _clip"
                )
            chosen[each] = case
    return list(chosen.values())


# -- calls ------------------------------------------------------------------------------------


def compared(op: str) -> tuple[str, ...]:
    """Outputs that every contender returns and whose gradients flow back: not attention's lse."""
    return tuple(name for name in OPS[op].outputs if name != "lse")


def trained(op: str) -> tuple[str, ...]:
    """What training differentiates: raw patches and a fixed temperature have no gradient there."""
    return tuple(name for name in OPS[op].differentiable if name not in ("patches", "scale"))


def on_backend(op: str, backend: str) -> Function:
    """The op on one backend ("" chooses automatically), returning its ``compared`` outputs."""
    asked = {op: backend} if backend else {}

    def run(**inputs):
        with use_backend(**asked):
            outputs = OPS[op].function(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return outputs[: len(compared(op))]

    return run


def input_sets(case: Case, dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    """Input sets to rotate through; on a GPU together more than twice its L2 cache, at most 8."""
    first = make(case, dtype, device)
    count = 2
    if device.type == "cuda":
        size = sum(value.nbytes for value in first.values() if isinstance(value, Tensor))
        count = min(_MAX_SETS, max(2, -(-2 * l2_bytes(device) // size)))
    return [first, *(make(case, dtype, device, seed) for seed in range(1, count))]


def _with_leaves(op: str, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    leaves = {
        name: inputs[name].detach().requires_grad_()
        for name in trained(op)
        if isinstance(inputs[name], Tensor) and inputs[name].is_floating_point()
    }
    return inputs | leaves, leaves


def _seeds(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(output.shape, generator=generator).to(output) for output in outputs]


def call(function: Function, op: str, inputs: dict[str, Any], mode: Mode) -> Call:
    """One timed call. bwd runs on a graph made once, whose saved tensors stay."""

    def forward():
        with torch.no_grad():
            return function(**inputs)

    if mode == "fwd":
        return forward
    inputs, leaves = _with_leaves(op, inputs)
    tensors = list(leaves.values())
    if mode == "bwd":
        outputs = function(**inputs)
        seeds = _seeds(outputs)
        return lambda: torch.autograd.grad(outputs, tensors, seeds, retain_graph=True)
    seeds = _seeds(forward())
    return lambda: torch.autograd.grad(function(**inputs), tensors, seeds)


# -- values -----------------------------------------------------------------------------------


def reduced(case: Case, device: torch.device) -> Case:
    """The case at a batch whose fp64 truth is affordable; of long attention fewer heads too."""
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


def values(
    function: Function, op: str, inputs: dict[str, Any], seed_dtype: torch.dtype | None = None
) -> Values:
    """{output: value, d_input: gradient} of one forward and backward.

    Args:
        seed_dtype: the gradients of the outputs are rounded to it first; None: to the outputs' own.
    """
    inputs, leaves = _with_leaves(op, inputs)
    outputs = function(**inputs)
    seeds = _seeds(outputs)
    if seed_dtype is not None:
        seeds = [seed.to(seed_dtype).to(seed.dtype) for seed in seeds]
    grads = torch.autograd.grad(outputs, list(leaves.values()), seeds)
    found = dict(zip(compared(op), outputs, strict=True))
    found |= {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


def truth(op: str, inputs: dict[str, Any], dtype: torch.dtype) -> Values:
    """The reference in fp64, on the values and the gradients of outputs that ``dtype`` holds."""
    wide = {
        name: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in inputs.items()
    }
    # every contender's statistics of the contrastive loss are fp32
    seeds = torch.promote_types(dtype, torch.float32) if op == "contrastive_lse" else dtype
    return values(on_backend(op, "reference"), op, wide, seeds)


def worst(found: dict[str, float], mode: Mode) -> tuple[float, str]:
    """The largest error that a mode answers for, and its tensor."""
    of_mode = {
        name: value for name, value in found.items() if mode != "fwd" or not name.startswith("d_")
    }
    name = max(of_mode, key=lambda each: of_mode[each])
    return of_mode[name], name


def red(found: dict[str, float], plain: dict[str, float], dtype: torch.dtype) -> str | None:
    """Why a backend is not timed at a case: an error beyond twice plain's plus half an eps."""
    eps = torch.finfo(dtype).eps
    bad = [
        f"{name} {found[name]:.1e}, plain torch {plain[name]:.1e}"
        for name in found
        if not found[name] <= 2 * plain[name] + eps / 2
    ]
    return f"error beyond twice plain torch's: {'; '.join(bad)}" if bad else None
