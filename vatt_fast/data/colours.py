"""Brightness, saturation, contrast and hue of clips, as tf.image.adjust_* define them, in bytes.

All steps but one division are exact in fp32: values are whole numbers of fractions of a level. So
the C++ of ``csrc/clip_colours.cpp``, this torch and any device give the same bytes; results lie
within a level of the same operations in fp64.

Shapes: B clips, T frames, H rows, W columns.
"""

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..kernels import native
from ..kernels.native import address

_scratch = threading.local()


@dataclasses.dataclass(frozen=True)
class Colours:
    """One clip's change of colours; the defaults change nothing.

    In whole numbers: ``brightness`` is added, in sixteenths of a level of 0 .. 255; ``saturation``
    is a factor in 1024ths, ``contrast`` one in 256ths; ``hue`` a turn of the circle in 384ths.

    Raises:
        ValueError: out of range.
    """

    brightness: int = 0
    saturation: int = 1024
    contrast: int = 256
    hue: int = 0

    def __post_init__(self) -> None:
        # beyond, products no longer fit fp32
        limits = {
            "brightness": (-1024, 1024),
            "saturation": (0, 2048),
            "contrast": (0, 512),
            "hue": (-192, 192),
        }
        for name, (low, high) in limits.items():
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} is {getattr(self, name)}; it lies between {low} and {high}"
                )


def change_colours(frames: Tensor, colours: Colours) -> Tensor:
    """One clip (T, H, W, 3) uint8 RGB in other colours, in the memory of ``frames`` on a CPU.

    The order is brightness, saturation, contrast (around the means of each frame's channels), hue;
    only then levels are cut to 0 .. 255.
    """
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames are {tuple(frames.shape)} {frames.dtype}; they must be (T, H, W, 3) uint8"
        )
    if frames.device.type != "cpu":
        return change_clips_in_torch(frames[None], [colours])[0]
    if native.extension is None:
        return change_colours_in_torch(frames, colours)
    frames = frames.contiguous()
    T, H, W, _ = frames.shape
    threads = min(torch.get_num_threads(), T)
    native.extension.clip_colours(
        from_=address(frames),
        to=address(frames),
        frames=T,
        pixels=H * W,
        scratch=address(_room(threads * native.extension.clip_colours_scratch(pixels=H * W))),
        threads=threads,
        **{name: float(value) for name, value in dataclasses.asdict(colours).items()},
    )
    return frames


def _room(values: int) -> Tensor:
    """Scratch that stays with a thread: memory asked for anew costs as much as half the work."""
    kept: Any = getattr(_scratch, "kept", None)
    if kept is None or len(kept) < values:
        kept = _scratch.kept = torch.empty(values, dtype=torch.int16)
    return kept


def change_colours_in_torch(frames: Tensor, colours: Colours) -> Tensor:
    """``change_colours`` on any device, into new memory."""
    out = torch.empty_like(frames)
    for frame, to in zip(frames, out, strict=True):  # a frame at a time: fp32 is 12 times as much
        to.copy_(change_clips_in_torch(frame[None, None], [colours])[0, 0])
    return out


def change_clips_in_torch(clips: Tensor, colours: Sequence[Colours]) -> Tensor:
    """(B, T, H, W, 3) uint8, each clip in colours of its own: all in one, in some 100 B a pixel."""
    brightness, saturation, contrast, hue = (
        torch.tensor([getattr(one, field.name) for one in colours], device=clips.device)
        .float()
        .view(-1, 1, 1, 1)
        for field in dataclasses.fields(Colours)
    )
    x = clips.movedim(-1, 0).float() * 16 + brightness  # (3, B, T, H, W)
    most, least = x.amax(0), x.amin(0)
    # where a factor would take the least channel below 0, it takes it there
    until_0 = most.clamp_min(0) * 1024 / (most - least).clamp_min(1)
    factor = until_0.minimum(saturation).round()
    x = most * 4 - ((most - x) * factor / 256).round()  # 64ths of a level
    total = x.to(torch.int32).sum((-2, -1), keepdim=True).double()
    pull = (total * (256 - contrast) / (256.0 * x.shape[-2] * x.shape[-1])).round().float()
    x = (x * contrast / 256 + pull).round()
    r, g, b = x
    most, least = x.amax(0), x.amin(0)
    C = most - least  # q = C * hue, in sixths of the circle
    q = torch.where(r == most, g - b, torch.where(g == most, b - r + 2 * C, r - g + 4 * C))
    q = q + (C * hue / 64).round()
    q = torch.where(q < 0, q + 6 * C, q)
    q = torch.where(q >= 6 * C, q - 6 * C, q)
    parts = (q - 3 * C).abs() - C, 2 * C - (q - 2 * C).abs(), 2 * C - (q - 4 * C).abs()
    found = torch.stack([least + part.clamp_min(0).minimum(C) for part in parts], -1)
    return (found / 64).round().clamp(0, 255).to(torch.uint8)
