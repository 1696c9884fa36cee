"""One clip's sizes, a batch of clips, and DropToken in the last copy of a training batch.

Shapes: B clips, T frames, H rows, W columns, S samples, P texts a clip; N patches, K kept patches,
k values a patch.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
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

    A loader's batch is valid until the next one is asked for; ``clone`` keeps it.

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
    # patches, int32: (K,) for all clips, (n, K) for n equal parts of them, or (B, K) for each clip
    video_keep: Tensor | None = None
    audio_keep: Tensor | None = None

    def __len__(self) -> int:
        return len(self.files)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch with its tensors on ``device``."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def clone(self) -> "Batch":
        """The same batch in memory of its own."""
        return self._map(lambda tensor: tensor.clone())

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        names = [field.name for field in dataclasses.fields(self)]
        values: dict[str, Any] = {name: getattr(self, name) for name in names}
        for name, value in values.items():
            if isinstance(value, Tensor):
                values[name] = change(value)
        return Batch(**values)


Shapes = dict[str, tuple[tuple[int, ...], Any]]  # of arrays by name, with their dtypes


def row_shapes(spec: ClipSpec, kept: dict[str, tuple[int, ...]] | None = None) -> Shapes:
    """The arrays of one row of a batch; ``kept`` are shapes (K, k) of patch rows, by modality."""
    clip = {"video": (spec.frames, spec.height, spec.width, 3), "audio": (spec.samples,)}
    clip |= kept or {}
    return {
        "video": (clip["video"], np.uint8),
        "audio": (clip["audio"], np.float32),
        "text": ((spec.texts_per_clip, spec.words), np.int32),
        "video_valid": ((), np.bool_),
        "audio_valid": ((), np.bool_),
        "text_valid": ((spec.texts_per_clip,), np.bool_),
        "start_seconds": ((), np.float64),
    }


def many(count: int, shapes: Shapes) -> Shapes:
    """The shapes with an axis of ``count`` before their first."""
    return {name: ((count, *shape), dtype) for name, (shape, dtype) in shapes.items()}


_ALIGNMENT = 64  # bytes, of each array in one buffer


def bytes_of(shapes: Shapes) -> int:
    """How large a buffer the arrays take."""
    return sum(_padded_bytes(*one) for one in shapes.values())


def arrays_in(buffer: Any, shapes: Shapes, offset: int = 0) -> dict[str, np.ndarray]:
    """The arrays one behind the other in a buffer, from a multiple of 64 bytes on."""
    arrays = {}
    for name, (shape, dtype) in shapes.items():
        arrays[name] = np.ndarray(shape, dtype, buffer, offset)
        offset += _padded_bytes(shape, dtype)
    return arrays


def _padded_bytes(shape: tuple[int, ...], dtype: Any) -> int:
    return -(-math.prod(shape) * np.dtype(dtype).itemsize // _ALIGNMENT) * _ALIGNMENT


def to_batch(
    arrays: Mapping[str, np.ndarray], files: Iterable[str], skipped: Iterable[Skipped]
) -> Batch:
    """The arrays as a Batch, without a copy."""
    tensors: dict[str, Any] = {name: torch.from_numpy(values) for name, values in arrays.items()}
    return Batch(**tensors, files=tuple(files), skipped=tuple(dict.fromkeys(skipped)))


@dataclass(frozen=True)
class DropToken:
    """Training batches of kept patch rows: dropped ones are never copied, nor sent to a device.

    Args:
        shards: a batch, of all ranks together, is so many equal parts, each with a draw of its own.
            The draws depend on nothing else, so a run may go on with another number of ranks or
            devices. None: each device has its own.
        devices: of one process.
    """

    config: VATTConfig
    drop_rate: float
    per: DropPer = "batch"
    devices: int = 1
    shards: int | None = None

    @property
    def patches(self) -> dict[str, tuple[int, ...]]:
        """Sizes of a patch, by modality, as far as patches are cut here.

        Waveforms of which the model makes spectrograms stay whole: it takes the kept patches then.
        """
        audio = {"audio": (self.config.audio_patch,)}
        cut_here = self.config.audio_input == "waveform"
        return {"video": self.config.video_patch, **(audio if cut_here else {})}

    @property
    def patch_values(self) -> dict[str, int]:
        values = {"video": self.config.video_patch_values, "audio": self.config.audio_patch}
        return {name: values[name] for name in self.patches}

    def draw(
        self, batch_size: int, *, seed: int, step: int, rank: int = 0, world: int = 1
    ) -> dict[str, np.ndarray]:
        """The kept indices of one rank's batch of ``batch_size`` clips, as ``Batch`` holds them.

        Raises:
            ValueError: the batch of all ranks is no multiple of the shards.
        """
        shards, total = self.shards or self.devices * world, batch_size * world
        if total % shards:
            raise ValueError(
                f"a batch of {total} clips has {shards} shards, each with its own draw of "
                "DropToken: take a multiple"
            )
        clips, first = total // shards, rank * batch_size  # of a shard; of this rank
        numbers = range(first // clips, (first + batch_size - 1) // clips + 1)
        options: dict[str, Any] = dict(seed=seed, step=step, per=self.per, batch=clips)
        draws = [
            sample_keeps(self.config, self.drop_rate, rank=number, **options) for number in numbers
        ]
        if self.per == "batch" and len(draws) == 1:
            return draws[0]
        joined = {name: np.stack([draw[name] for draw in draws]) for name in draws[0]}
        if self.per == "batch" and batch_size % clips == 0:
            return joined
        # a draw of each clip
        mine = np.arange(first, first + batch_size) - numbers[0] * clips
        if self.per == "batch":
            return {name: keep[mine // clips] for name, keep in joined.items()}
        return {name: keep[mine // clips, mine % clips] for name, keep in joined.items()}


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
