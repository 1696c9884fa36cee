"""Random crops, flips, colours and noise of training clips: one draw a clip, the same for all
frames.

A draw is a pure function of the clip's key (seed, step, row of the global batch). So it does not
depend on the batch around a clip, on ranks, workers, device, or on where a run was continued.

Shapes: B clips, T frames, H rows, W columns, S samples.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .colours import Colours, change_clips_in_torch, change_colours
from .order import uniform

# One stream of random numbers for each decision, beside those of the order and the windows.
_CROP, _FLIP, _COLOUR, _NOISE = range(100, 104)
# What a device changes together, beyond one clip: some 0.4 GB of its memory.
_PIXELS_AT_ONCE = 1 << 22


class Key(NamedTuple):
    """Which clip of a run: what all its draws depend on."""

    seed: int
    step: int
    row: int  # of the global batch


class Box(NamedTuple):
    """A part of a picture, in fractions of its height and width."""

    top: float
    left: float
    height: float
    width: float


WHOLE = Box(0.0, 0.0, 1.0, 1.0)


class ClipAugment(Protocol):
    """What a loader calls for each clip."""

    def crop(self, key: Key, height: int, width: int) -> Box | None:
        """The part of a picture of that size which is scaled to the clip's; None: its centre."""

    def frames(self, key: Key, frames: np.ndarray) -> np.ndarray:
        """(T, H, W, 3) uint8, cropped already, in its memory or new one."""

    def sound(self, key: Key, samples: np.ndarray) -> np.ndarray:
        """(S,) float32, in its memory or new one."""


# -- crops -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AreaCrop:
    """A part with a random share of the picture's area and a random shape (paper section 4.1).

    As tf.image.sample_distorted_bounding_box draws it: the shape (width / height, in pixels)
    uniform, then the height uniform between those of the smallest and the largest area that fit.
    A picture in which no such part fits is taken whole.
    """

    area: tuple[float, float] = (0.08, 1.0)
    shape: tuple[float, float] = (0.5, 2.0)

    def draw(self, uniform: np.ndarray, height: int, width: int) -> Box:
        least, most = (share * height * width for share in self.area)
        # shapes of which at least the smallest area fits: TF draws until it meets one
        low = max(self.shape[0], least / height**2)
        high = min(self.shape[1], width**2 / least)
        if low > high:
            return WHOLE
        shape = low + uniform[0] * (high - low)
        lowest = math.sqrt(least / shape)
        highest = min(math.sqrt(most / shape), height, width / shape)
        rows = lowest + uniform[1] * max(highest - lowest, 0.0)
        part_height, part_width = min(rows / height, 1.0), min(rows * shape / width, 1.0)
        return _placed(part_height, part_width, uniform[2:4])


@dataclasses.dataclass(frozen=True)
class JitterCrop:
    """The released code's default: height and width scaled apart, then a crop of the clip's shape.

    The scaled picture is brought to where it just covers the clip; so the part is as high or as
    wide as the picture.
    """

    clip_shape: float = 1.0  # width / height of the clip
    factor: tuple[float, float] = (0.8, 1.2)
    probability: float = 0.8

    def draw(self, uniform: np.ndarray, height: int, width: int) -> Box:
        low, high = self.factor
        rows, columns = float(height), float(width)
        if uniform[4] < self.probability:
            rows *= low + uniform[0] * (high - low)
            columns *= low + uniform[1] * (high - low)
        side = min(rows, columns / self.clip_shape)  # the part's height, of the scaled picture
        part_height, part_width = min(side / rows, 1.0), min(side * self.clip_shape / columns, 1.0)
        return _placed(part_height, part_width, uniform[2:4])


def _placed(height: float, width: float, uniform: np.ndarray) -> Box:
    top, left = uniform * (1 - height, 1 - width)
    return Box(float(top), float(left), height, width)


def crop_frames(frames: Tensor, box: Box, height: int, width: int) -> Tensor:
    """A part of a clip (T, H, W, 3) uint8 on a CPU, in whole pixels, as (T, height, width, 3).

    Bilinear; where it shrinks, as wide as a pixel of the result is (no aliasing).
    """
    top, bottom, left, right = _part(box, *frames.shape[1:3])
    part = frames[:, top:bottom, left:right].permute(0, 3, 1, 2)
    if part.shape[2:] == (height, width):
        return frames[:, top:bottom, left:right]
    scaled = F.interpolate(
        part, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return scaled.permute(0, 2, 3, 1).contiguous()


def crop_clips(clips: Tensor, boxes: Sequence[Box]) -> Tensor:
    """``crop_frames`` of (B, T, H, W, 3) clips on any device, each at a box of its own, to H x W.

    As two products with matrices of weights, within 2 levels of ``crop_frames``, whose weights for
    bytes have few bits.
    """
    H, W = clips.shape[2:4]
    parts = torch.tensor([_part(box, H, W) for box in boxes], device=clips.device)
    rows, columns = _weights(parts[:, :2], H), _weights(parts[:, 2:], W)
    found = torch.einsum("bih,bthwc->btiwc", rows, clips.float())
    found = torch.einsum("bjw,btiwc->btijc", columns, found)
    return found.round().clamp(0, 255).to(torch.uint8)


def _part(box: Box, height: int, width: int) -> tuple[int, int, int, int]:
    """A box in whole pixels, at least one each way: top, bottom, left, right."""
    top, left = min(round(box.top * height), height - 1), min(round(box.left * width), width - 1)
    bottom = min(max(round((box.top + box.height) * height), top + 1), height)
    right = min(max(round((box.left + box.width) * width), left + 1), width)
    return top, bottom, left, right


def _weights(spans: Tensor, size: int) -> Tensor:
    """(B, size, size) fp32: how each pixel of a span, drawn out to ``size``, mixes the picture's.

    Args:
        spans: (B, 2), the first pixel of each and the one past its last.
    """
    first, past = (end[:, None, None].float() for end in spans.unbind(1))
    at = torch.arange(size, device=spans.device) + 0.5
    scale = (past - first) / size
    reach = (at - (first + scale * at[:, None])).abs() / scale.clamp_min(1)
    found = (1 - reach).clamp_min(0) * ((at > first) & (at < past))
    return found / found.sum(-1, keepdim=True)


# -- colours ---------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ColourJitter:
    """Brightness, saturation, contrast and hue of a clip, each uniform (paper section 4.1)."""

    brightness: float = 32 / 255  # added or subtracted at most, of values in [0, 1]
    saturation: float = 0.4  # a factor in 1 -+ this
    contrast: float = 0.4  # likewise
    hue: float = 0.2  # turned at most, of the circle
    probability: float = 0.8  # that any of it happens (the released code)

    def draw(self, uniform: np.ndarray) -> Colours | None:
        """From five numbers; None: the clip stays as it is."""
        if uniform[4] >= self.probability:
            return None
        brightness, saturation, contrast, hue = (2 * uniform[:4] - 1).tolist()
        return Colours(
            brightness=round(brightness * self.brightness * 255 * 16),
            saturation=round((1 + saturation * self.saturation) * 1024),
            contrast=round((1 + contrast * self.contrast) * 256),
            hue=round(hue * self.hue * 384),
        )


# -- a clip ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Augment:
    """The augmentation of a recipe, or a choice of its parts. A ``ClipAugment``.

    Called itself it takes whole batches, on any device:
    ``augment(frames, keys)`` equals crop, scaling and ``frames`` clip by clip.

    Args:
        cropped: None leaves the centre of the picture.
        flip: probability that a clip is mirrored.
        noise: standard deviation of what is added to the sound, in parts of its loudest sample.
    """

    cropped: AreaCrop | JitterCrop | None = None
    flip: float = 0.0
    colour: ColourJitter | None = None
    noise: float = 0.0

    def crop(self, key: Key, height: int, width: int) -> Box | None:
        if self.cropped is None:
            return None
        return self.cropped.draw(_uniform(5, key, _CROP), height, width)

    def frames(self, key: Key, frames: np.ndarray) -> np.ndarray:
        return self._frames(key, torch.from_numpy(frames)).numpy()

    def sound(self, key: Key, samples: np.ndarray) -> np.ndarray:
        if self.noise:
            samples += self._noise(key, len(samples)) * np.float32(
                self.noise * float(np.abs(samples).max(initial=0))
            )
        return samples

    def __call__(self, frames: Tensor, keys: Sequence[Key]) -> Tensor:
        """(B, T, H, W, 3) uint8 and a key a clip -> the same shape, new memory."""
        _check_keys(frames, keys)
        if frames.dtype != torch.uint8 or frames.ndim != 5 or frames.shape[-1] != 3:
            raise ValueError(
                f"frames are {tuple(frames.shape)} {frames.dtype}; they must be "
                "(B, T, H, W, 3) uint8"
            )
        together = self._clips if frames.device.type != "cpu" else self._clip_by_clip
        count = max(1, _PIXELS_AT_ONCE // max(1, frames[0, ..., 0].numel())) if len(frames) else 1
        out = torch.empty_like(frames)
        for first in range(0, len(frames), count):
            some = slice(first, first + count)
            out[some] = together(frames[some], keys[some])
        return out

    def _clip_by_clip(self, clips: Tensor, keys: Sequence[Key]) -> Tensor:
        out = torch.empty_like(clips)
        height, width = clips.shape[2:4]
        for clip, to, key in zip(clips, out, keys, strict=True):
            box = self.crop(key, height, width)
            to.copy_(clip if box is None else crop_frames(clip, box, height, width))
            to.copy_(self._frames(key, to))
        return out

    def _clips(self, clips: Tensor, keys: Sequence[Key]) -> Tensor:
        """All in one: a device waits for single clips' many small operations."""
        boxes = [self.crop(key, *clips.shape[2:4]) or WHOLE for key in keys]
        if any(box != WHOLE for box in boxes):
            clips = crop_clips(clips, boxes)
        if any(flips := [self._flips(key) for key in keys]):
            mirrored = torch.tensor(flips, device=clips.device).view(-1, 1, 1, 1, 1)
            clips = torch.where(mirrored, clips.flip(3), clips)
        if self.colour is not None:
            colours = [self.colour.draw(_uniform(5, key, _COLOUR)) or Colours() for key in keys]
            clips = change_clips_in_torch(clips, colours)
        return clips

    def sounds(self, samples: Tensor, keys: Sequence[Key]) -> Tensor:
        """(B, S) float32 and a key a clip -> the same shape; equal to ``sound`` clip by clip."""
        _check_keys(samples, keys)
        if not self.noise:
            return samples
        noise = torch.stack(
            [torch.from_numpy(self._noise(key, samples.shape[1])) for key in keys]
        ).to(samples.device)
        loudest = samples.abs().amax(1, keepdim=True).double()
        return samples + noise * (loudest * self.noise).float()

    def _frames(self, key: Key, frames: Tensor) -> Tensor:
        if self._flips(key):
            frames = _mirrored(frames)
        if self.colour is not None:
            colours = self.colour.draw(_uniform(5, key, _COLOUR))
            frames = frames if colours is None else change_colours(frames, colours)
        return frames

    def _flips(self, key: Key) -> bool:
        return bool(self.flip) and bool(_uniform(1, key, _FLIP)[0] < self.flip)

    @staticmethod
    def _noise(key: Key, count: int) -> np.ndarray:
        sequence = np.random.SeedSequence((key.seed, _NOISE, key.step, key.row))
        generator = np.random.Generator(np.random.Philox(sequence))
        return generator.standard_normal(count, dtype=np.float32)


def _mirrored(frames: Tensor) -> Tensor:
    """Left and right exchanged, in place, a frame at a time: new memory costs more."""
    for frame in frames:
        frame.copy_(frame.flip(1))
    return frames


class Frames:
    """Any callable ``function(key, frames) -> frames`` as a ``ClipAugment``."""

    def __init__(self, function: Callable[[Key, np.ndarray], np.ndarray]):
        self.function = function

    def crop(self, key: Key, height: int, width: int) -> Box | None:
        return None

    def frames(self, key: Key, frames: np.ndarray) -> np.ndarray:
        found = np.asarray(self.function(key, frames))
        if found.shape != frames.shape or found.dtype != frames.dtype:
            raise ValueError(
                f"{name_of(self)} returned {found.shape} {found.dtype} for "
                f"{frames.shape} {frames.dtype}; shape and dtype must stay"
            )
        return found

    def sound(self, key: Key, samples: np.ndarray) -> np.ndarray:
        return samples


def augment_clip(
    augment: ClipAugment, key: Key, video: np.ndarray | None, audio: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """One clip (T, H, W, 3) and (S,) already at its size, as from a cache; its memory may change.

    Where pictures are decoded anyway, give the decoder the part instead of cropping here.
    """
    if video is not None:
        height, width = video.shape[1:3]
        box = augment.crop(key, height, width)
        if box is not None:
            video = crop_frames(torch.from_numpy(video), box, height, width).numpy()
        video = augment.frames(key, video)
    return video, None if audio is None else augment.sound(key, audio)


def _check_keys(values: Tensor, keys: Sequence[Key]) -> None:
    if len(keys) != len(values):
        raise ValueError(f"{len(keys)} keys for {len(values)} clips; give one each")


# -- by name ---------------------------------------------------------------------------------------

PARTS = ("crop", "jitter_crop", "flip", "colour", "noise")
RECIPE_PARTS = {
    "paper": ("crop", "flip", "colour"),
    "released": ("jitter_crop", "flip", "colour", "noise"),
}
NOTHING = "none"


def parts_of(named: str, recipe: str) -> str:
    """What "recipe", "none" or a list such as "flip,colour" stands for, in one spelling.

    Raises:
        ValueError: an unknown part, or two crops.
    """
    if named == NOTHING:
        return NOTHING
    parts = RECIPE_PARTS[recipe] if named == "recipe" else tuple(named.split(","))
    if unknown := [part for part in parts if part not in PARTS]:
        raise ValueError(
            f"augment is {named!r}; {unknown[0]!r} is none of {', '.join(PARTS)} "
            "(joined by commas), recipe, none"
        )
    if "crop" in parts and "jitter_crop" in parts:
        raise ValueError(f"augment is {named!r}; a clip is cropped once: take one of the two crops")
    return ",".join(part for part in PARTS if part in parts)


def augmentation(parts: str, height: int, width: int) -> Augment | None:
    """What ``parts_of`` returned, for clips of that size; None where it is nothing."""
    if parts == NOTHING:
        return None
    chosen = parts.split(",")
    cropped: AreaCrop | JitterCrop | None = AreaCrop() if "crop" in chosen else None
    if "jitter_crop" in chosen:
        cropped = JitterCrop(width / height)
    return Augment(
        cropped,
        flip=0.5 if "flip" in chosen else 0.0,
        colour=ColourJitter() if "colour" in chosen else None,
        noise=0.01 if "noise" in chosen else 0.0,
    )


def name_of(augment: Any) -> str:
    """How a run records an augmentation that is no list of parts."""
    given = augment.function if isinstance(augment, Frames) else augment
    kind = given if hasattr(given, "__qualname__") else type(given)
    return f"{kind.__module__}.{kind.__qualname__}"


# -- draws -----------------------------------------------------------------------------------------


@functools.lru_cache(64)  # a reader asks for the crop of each picture of a clip
def _uniform(count: int, key: Key, stream: int) -> np.ndarray:
    """``order.uniform`` of a clip; not to be written to."""
    found = uniform(count, key.seed, stream, key.step, key.row)
    found.flags.writeable = False
    return found
