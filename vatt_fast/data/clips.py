"""One clip's sizes, a batch of clips, and DropToken in the last copy of a training batch.

Shapes: B clips, T frames, H rows, W columns, S samples, P texts a clip; N patches, K kept patches,
k values a patch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import VATTConfig
from ..inputs import DropPer, sample_keeps


@dataclass(frozen=True)
class ClipSpec:
    """The sizes of one clip, under ``VATTConfig``'s names."""

    frames: int
    height: int
    width: int
    frames_per_second: float
    samples: int
    sample_rate_hz: int
    words: int
    texts_per_clip: int

    @classmethod
    def from_config(cls, config: VATTConfig) -> "ClipSpec":
        return cls(**{field.name: getattr(config, field.name) for field in dataclasses.fields(cls)})

    @property
    def seconds(self) -> float:
        """How long a window is: the longer of its video and its audio."""
        return max(self.frames / self.frames_per_second, self.samples / self.sample_rate_hz)

    def places(self, duration_seconds: float) -> int:
        """How many windows fit into a file: they begin at frames 0 up to, but without, this."""
        # the small term: 3.2 - 1.6 must count as 16 frames of 0.1 s
        spare = (duration_seconds - self.seconds) * self.frames_per_second + 1e-6
        return max(0, math.floor(spare)) + 1

    def reader_arguments(self) -> dict[str, Any]:
        """The sizes under the names of ``MediaReader.clip``."""
        return dict(
            num_frames=self.frames,
            frames_per_second=self.frames_per_second,
            height=self.height,
            width=self.width,
            num_samples=self.samples,
            sample_rate_hz=self.sample_rate_hz,
        )


def spread(count: int, windows: int) -> list[int]:
    """``windows`` of ``count`` places, evenly spaced from the first to the last; 1 is the middle.

    Raises:
        ValueError: no window.
    """
    if windows < 1:
        raise ValueError(f"windows is {windows}; it must be at least 1")
    if windows == 1:
        return [round(0.5 * (count - 1))]
    return [round(window / (windows - 1) * (count - 1)) for window in range(windows)]


@dataclass(frozen=True)
class Skipped:
    """A file that could not be read or decoded, and why."""

    file: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """B clips. What a file lacks in the window is zeros with its ``valid`` False.

    ``skipped`` lists the corrupt files that others stand in for. A batch drawn with ``DropToken``
    holds the kept patch rows instead of whole clips, and which ones they are.
    """

    video: Tensor  # (B, T, H, W, 3) uint8, or rows (B, K, k)
    audio: Tensor  # (B, S) float32 in [-1, 1], or rows (B, K, k)
    text: Tensor  # (B, P, words) int32, 0 = padding
    video_valid: Tensor  # (B,) bool
    audio_valid: Tensor  # (B,) bool
    text_valid: Tensor  # (B, P) bool
    start_seconds: Tensor  # (B,) float64, where each window begins in its file
    files: tuple[str, ...]
    skipped: tuple[Skipped, ...] = ()
    # of rows, int32: (K,) for all clips, (devices, K) for each device's, or (B, K) for each clip
    video_keep: Tensor | None = None
    audio_keep: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory; DataLoader calls it for ``pin_memory=True``."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = [field.name for field in dataclasses.fields(self)]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
        return Batch(**values)


def to_batch(
    arrays: dict[str, np.ndarray],
    files: list[str],
    skipped: Iterable[Skipped],
    keeps: dict[str, np.ndarray] | None = None,
) -> Batch:
    """The first ``len(files)`` rows of the arrays as a Batch."""
    arrays = {name: values[: len(files)] for name, values in arrays.items()} | (keeps or {})
    tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return Batch(**tensors, files=tuple(files), skipped=tuple(skipped))


@dataclass(frozen=True)
class DropToken:
    """Training batches of kept patch rows: dropped ones are never copied, nor sent to a device.

    ``devices`` of one process share a batch evenly. Each has its own draw, as every rank has.
    """

    config: VATTConfig
    drop_rate: float
    per: DropPer = "batch"
    devices: int = 1

    @property
    def patches(self) -> dict[str, tuple[int, ...]]:
        """Sizes of a patch, by modality."""
        return {"video": self.config.video_patch, "audio": (self.config.audio_patch,)}

    def draw(
        self, batch_size: int, *, seed: int, step: int, rank: int = 0
    ) -> dict[str, np.ndarray]:
        """The kept indices of a batch, as ``Batch`` holds them."""
        options: dict[str, Any] = dict(seed=seed, step=step, per=self.per)
        draws = [
            sample_keeps(
                self.config,
                self.drop_rate,
                batch=batch_size // self.devices,
                rank=rank * self.devices + device,
                **options,
            )
            for device in range(self.devices)
        ]
        if self.devices == 1:
            return draws[0]
        join = np.concatenate if self.per == "clip" else np.stack
        return {name: join([draw[name] for draw in draws]) for name in draws[0]}


def copy_kept_rows(
    clip: np.ndarray, patch: tuple[int, ...], keep: np.ndarray, rows: np.ndarray
) -> None:
    """rows[:] = patchify(clip[None], patch)[0, keep], and nothing else is copied.

    Args:
        clip: (T, H, W, C) or (S,); the far end of an odd size is padded with zeros.
        keep: (K,). rows: (K, k), written.
    """
    assert rows.flags.c_contiguous
    shape = [-(-size // p) * p for size, p in zip(clip.shape, patch, strict=False)]
    if shape != list(clip.shape[: len(patch)]):
        padded = np.zeros((*shape, *clip.shape[len(patch) :]), clip.dtype)
        padded[tuple(slice(size) for size in clip.shape)] = clip
        clip = padded
    # a line is a patch's run of contiguous values: its columns with their channels, or its samples
    lines = clip.reshape(-1, patch[-1] * math.prod(clip.shape[len(patch) :]))
    index = keep
    if len(patch) == 3:
        grid = [size // p for size, p in zip(shape, patch, strict=True)]
        t, y, x = (axis[:, None, None] for axis in np.unravel_index(keep, grid))
        frame = t * patch[0] + np.arange(patch[0])[:, None]
        row = y * patch[1] + np.arange(patch[1])
        index = ((frame * shape[1] + row) * grid[2] + x).ravel()
    # mode: "raise" would copy through a buffer
    np.take(lines, index, axis=0, out=rows.reshape(len(index), -1), mode="clip")
