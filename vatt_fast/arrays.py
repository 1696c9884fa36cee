"""Frames and waveforms as people have them: converted where only one reading is right, else
refused.

Shapes: B clips, T frames, H rows, W columns, S samples.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

# A waveform is [-1, 1]; filters overshoot, other units are far beyond.
LOUDEST = 2.0
# No waveform is shorter; a last axis of this size is that of channels.
MOST_CHANNELS = 8
_UNSIGNED_MIDDLE = 128


def as_frames(value: Any) -> Tensor:
    """Video as a call takes it: (B, T, H, W, 3) uint8, or float32 in [-1, 1].

    Args:
        value: (T, H, W, 3) or (B, T, H, W, 3), integers from 0 to 255 or floats in [-1, 1].

    Raises:
        ValueError: another layout or range, with rule and remedy.
    """
    array = _array("video", value)
    if array.ndim not in (4, 5) or 0 in array.shape:
        raise ValueError(
            f"video is an array {tuple(array.shape)}; it takes (T, H, W, 3) or (B, T, H, W, 3), or "
            "media files"
        )
    if array.shape[-1] != 3:
        first = "channels first: permute it so that they are last" if 3 in array.shape[1:3] else ""
        raise ValueError(
            f"video is {tuple(array.shape)}; its last axis is the 3 colours (T, H, W, 3)"
            f"{'; this one looks like ' + first if first else '; give RGB'}"
        )
    if array.dtype != torch.uint8:
        low, high = float(array.min()), float(array.max())
        if not array.dtype.is_floating_point:
            if low < 0 or high > 255:
                raise ValueError(
                    f"video holds integers {low:g} to {high:g}; they lie in 0 .. 255: scale them"
                )
            array = array.to(torch.uint8)
        elif not (low >= -1 and high <= 1):  # nan too
            raise ValueError(
                f"video holds floats {low:g} to {high:g}; they lie in [-1, 1]: "
                "pass uint8 frames, or x / 127.5 - 1"
            )
        elif low >= 0 and high > 0:
            raise ValueError(
                f"video holds floats {low:g} to {high:g}, which is the range 0 .. 1; they lie in "
                "[-1, 1], black is -1: pass uint8 frames, or 2 * x - 1"
            )
        else:
            array = array.float()
    return array if array.ndim == 5 else array[None]


def as_waveforms(value: Any) -> Tensor:
    """Sound as a call takes it: (B, S) float32.

    Args:
        value: (S,) or (B, S), mono, float in [-1, 1]; or 8, 16 or 32-bit integers as files hold
            them, which are scaled.

    Raises:
        ValueError: another layout or range, with rule and remedy.
    """
    array = _array("audio", value)
    if array.ndim not in (1, 2) or 0 in array.shape:
        raise ValueError(
            f"audio is an array {tuple(array.shape)}; it takes mono (S,) or (B, S), or media files"
        )
    if array.shape[-1] <= MOST_CHANNELS:
        layout = (
            f"which looks like (S, C) with {array.shape[-1]} channels: average them, x.mean(-1)"
            if array.ndim == 2
            else "which is no sound: give more samples"
        )
        raise ValueError(f"audio is {tuple(array.shape)}, {layout}; it takes mono (S,) or (B, S)")
    array = _scaled(array)
    loudest = float(array.abs().max())
    if not loudest <= LOUDEST:  # nan too
        raise ValueError(
            f"audio reaches {loudest:g}; floats lie in [-1, 1]: pass int16 samples as they are, or "
            "divide by their full scale"
        )
    return array if array.ndim == 2 else array[None]


def _scaled(array: Tensor) -> Tensor:
    """Samples as float32, integers divided by their full scale."""
    if array.dtype.is_floating_point:
        return array.float()
    if array.dtype == torch.uint8:
        return (array.float() - _UNSIGNED_MIDDLE) / _UNSIGNED_MIDDLE
    if array.dtype in (torch.int8, torch.int16, torch.int32):
        loudest = int(array.long().abs().max())
        if array.dtype == torch.int32 and 0 < loudest < 2**15:
            raise ValueError(
                f"audio is int32 and reaches {loudest}, which would be near silence; if these are "
                "16-bit samples, pass them as int16"
            )
        return (array.double() / -torch.iinfo(array.dtype).min).float()
    raise ValueError(
        f"audio is {array.dtype}, whose full scale nobody knows; pass float in [-1, 1] or int16"
    )


def _array(name: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        array = value
    else:
        given = np.asarray(value)
        if given.dtype.kind not in "iuf":
            raise ValueError(
                f"{name} is a {type(value).__name__} of {given.dtype}; give numbers, or media files"
            )
        # torch knows few unsigned types
        given = given.astype(np.int64) if given.dtype.kind == "u" and given.itemsize > 1 else given
        array = torch.from_numpy(np.ascontiguousarray(given))
    if array.dtype == torch.bool or array.dtype.is_complex:
        raise ValueError(f"{name} is {array.dtype}; give an array of numbers, or media files")
    return array
