"""What a model is given: clips, patch rows, kept patches, word ids.

One set of checks for torch and JAX: the functions read shapes, dtypes and, of host arrays, indices.

Shapes: B clips, N patches, K kept patches, k values a patch, P texts a clip, W words.
"""

import math
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .config import VATTConfig, video_grid
from .kernels import sample_keep
from .kernels.drop_token import check_keep

DropPer = Literal["batch", "clip"]


class PatchInput(NamedTuple):
    """How ``patch_embed`` reads one modality's input."""

    grid: tuple[int, ...]  # patches along each axis; N is their product
    patch: tuple[int, ...] | None  # sizes of a clip's patch; None where the input is patch rows
    gathered: bool  # the rows are the kept ones only
    scale: float  # raw * scale + shift lies in [-1, 1]
    shift: float
    pad_value: float = 0  # raw black or silence, past the end of a clip of an odd size


def require_input(video: Any, audio: Any, text: Any) -> None:
    """Raises ValueError where no modality is given."""
    if video is None and audio is None and text is None:
        raise ValueError("no input; give at least one of video, audio, text")


def video_input(
    config: VATTConfig, video: Any, keep: Any = None, grid: tuple[int, int, int] | None = None
) -> PatchInput:
    """Check the video of a call.

    Args:
        video: frames (B, T, H, W, 3) of any size, or patch rows (B, N, k) or (B, K, k).
        keep: kept indices (K,) or (B, K), or None.
        grid: patches along (time, height, width), for patch rows of another size than the config's.

    Raises:
        ValueError: shapes or indices that do not fit.
    """
    uint8 = str(video.dtype).removeprefix("torch.") == "uint8"
    scale, shift = (2 / 255, -1.0) if uint8 else (1.0, 0.0)
    if video.ndim == 5 and video.shape[-1] == 3:
        _refuse_empty("video", video)
        _, frames, height, width, _ = video.shape
        grid = video_grid(frames, height, width, config.video_patch)
        _check_keep("video", keep, math.prod(grid), video.shape[0])
        pad_value = 0.0 if uint8 else -1.0
        return PatchInput(grid, config.video_patch, False, scale, shift, pad_value)
    if video.ndim != 3:
        raise ValueError(
            f"video is {tuple(video.shape)}; it takes frames (B, T, H, W, 3) "
            f"or patch rows (B, N, {config.video_patch_values})"
        )
    grid = grid or config.video_grid
    gathered = _check_rows("video", video, keep, grid, config.video_patch_values)
    return PatchInput(grid, None, gathered, scale, shift)


def audio_input(config: VATTConfig, audio: Any, keep: Any = None) -> PatchInput:
    """Check the audio of a call: a waveform (B, S), or patch rows (B, N, k) or (B, K, k).

    Where the model looks at spectrograms, what is returned belongs to the rows of a waveform's
    spectrogram, which come before the kept ones are chosen.

    Raises:
        ValueError: shapes or indices that do not fit.
    """
    if audio.ndim == 2:
        _refuse_empty("audio", audio)
        grid = config.audio_grid_of(audio.shape[1])
        if not math.prod(grid):
            raise ValueError(
                f"audio is {tuple(audio.shape)}; a patch of the spectrogram takes at least "
                f"{(config.spectrogram_patch[0] - 1) * config.spectrogram_hop + 1} samples"
            )
        _check_keep("audio", keep, math.prod(grid), audio.shape[0])
        patch = (config.audio_patch,) if config.audio_input == "waveform" else None
        return PatchInput(grid, patch, False, 1.0, 0.0)
    if audio.ndim != 3:
        raise ValueError(
            f"audio is {tuple(audio.shape)}; it takes a waveform (B, S) "
            f"or patch rows (B, N, {config.audio_patch_values})"
        )
    only_kept = keep is not None and audio.shape[1] == keep.shape[-1]
    bins = config.audio_grid[1:]  # a spectrogram's patches along frequency
    times = audio.shape[1] // math.prod(bins)
    grid = config.audio_grid if only_kept else (times, *bins)
    gathered = _check_rows("audio", audio, keep, grid, config.audio_patch_values)
    return PatchInput(grid, None, gathered, 1.0, 0.0)


def check_text(config: VATTConfig, text: Any) -> None:
    """Check word ids (B, P, W) or (B, W), 0 = padding.

    Raises:
        ValueError: another shape or dtype, more words than the position table holds, or, on the
            host, ids beyond the vocabulary (on a device nobody reads them).
    """
    name = str(text.dtype).removeprefix("torch.")
    if text.ndim not in (2, 3) or not name.startswith(("int", "uint")):
        raise ValueError(
            f"text is {tuple(text.shape)} {text.dtype}; "
            "it takes integer word ids (B, P, W) or (B, W)"
        )
    _refuse_empty("text", text)
    if config.agnostic and text.shape[-1] > config.words:
        raise ValueError(
            f"text has {text.shape[-1]} words; this model's position table holds {config.words}: "
            "cut the sentences"
        )
    if _is_readable(text) and not 0 <= text.min() <= text.max() < config.vocab_size:
        raise ValueError(
            f"text holds ids {int(text.min())} to {int(text.max())}; this model's vocabulary has "
            f"{config.vocab_size} words, 0 is padding"
        )


def sample_keeps(
    config: VATTConfig,
    drop_rate: float,
    *,
    seed: int,
    step: int,
    per: DropPer = "batch",
    batch: int | None = None,
    rank: int = 0,
    video: Any = None,
    audio: Any = None,
    video_grid: tuple[int, int, int] | None = None,
) -> dict[str, np.ndarray]:
    """Draw DropToken for one step of one device: {"video_keep": ..., "audio_keep": ...}.

    Args:
        drop_rate: fraction of patches removed, in [0, 1).
        per: "batch" keeps the same patches of all clips, (K,); "clip" draws anew for each clip,
            (batch, K), and needs ``batch``, the number of clips.
        rank: device of a data-parallel run; each draws its own.
        video, audio, video_grid: the inputs that the draw is for, as the model takes them, where
            they have another size than the config's. Only their shapes are read.

    Returns:
        int32 indices, sorted, the same for the same seed, step, rank and number of patches.

    Raises:
        ValueError: an argument out of range, or per="clip" without ``batch``.
    """
    counts = {"video": config.num_video_patches, "audio": config.num_audio_patches}
    if video is not None:
        counts["video"] = math.prod(video_input(config, video, grid=video_grid).grid)
    elif video_grid is not None:
        counts["video"] = math.prod(video_grid)
    if audio is not None:
        counts["audio"] = math.prod(audio_input(config, audio).grid)
    return {
        f"{modality}_keep": sample_keep(
            count,
            drop_rate,
            seed=seed,
            step=step,
            stream=f"{modality}/{rank}",
            per=per,
            batch=batch,
        )
        for modality, count in counts.items()
    }


def _refuse_empty(name: str, x: Any) -> None:
    if 0 in x.shape:
        raise ValueError(
            f"{name} is {tuple(x.shape)}; an empty batch or clip cannot be encoded: "
            "leave the modality out instead"
        )


def _check_rows(modality: str, rows: Any, keep: Any, grid: tuple[int, ...], values: int) -> bool:
    """Check patch rows; True where they are the kept ones only."""
    _refuse_empty(modality, rows)
    count = math.prod(grid)
    _check_keep(modality, keep, count, rows.shape[0])
    kept = count if keep is None else keep.shape[-1]
    if rows.shape[1] not in (count, kept) or rows.shape[2] != values:
        either = (
            "; another size needs frames, or video_grid"
            if keep is None
            else f" or the {kept} kept rows"
        )
        raise ValueError(
            f"{modality} patches are {tuple(rows.shape)}; "
            f"a grid of {tuple(grid)} takes (B, {count}, {values}){either}"
        )
    return keep is not None and rows.shape[1] == kept


def _check_keep(modality: str, keep: Any, count: int, batch: int) -> None:
    if keep is None:
        return
    if _is_readable(keep):
        check_keep(keep, count, name=f"{modality}_keep")
    if keep.ndim == 2 and keep.shape[0] != batch:
        raise ValueError(
            f"{modality}_keep is {tuple(keep.shape)} for a batch of {batch}; "
            "it takes (K,) or (B, K)"
        )


def _is_readable(indices: Any) -> bool:
    """Whether values lie on the host. Reading them on a device would wait for it."""
    if isinstance(indices, Tensor):
        plain = type(indices) in (Tensor, torch.nn.Parameter)
        return plain and indices.device.type == "cpu" and not torch.compiler.is_compiling()
    return isinstance(indices, np.ndarray)
