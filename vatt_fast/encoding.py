"""Embeddings of arrays and media files by a trained model."""

import os
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from .model import VATT

EMBEDDINGS = ("z_video_va", "z_audio_va", "z_video_vt", "z_text_vt")


def encode(
    model: "VATT",
    *,
    video: Any = None,
    audio: Any = None,
    text: str | Sequence[str] | None = None,
    windows: int = 1,
) -> dict[str, Tensor]:
    """Unit-norm embeddings of any subset of modalities, without DropToken.

    Args:
        video: a media file or a list of them, or frames (T, H, W, 3) or (B, T, H, W, 3), uint8 or float in [-1, 1], at the config's rate.
        audio: likewise, or a mono waveform (S,) or (B, S) float in [-1, 1] at the config's sample rate.
        text: a sentence or a list of sentences.
        windows: of files, how many evenly spaced windows of the model's length are embedded and averaged; 1 takes the middle.

    Returns:
        z_video_va, z_video_vt, z_audio_va, z_text_vt as far as their modality was given, each (B, d) fp32 on the CPU. A clip is compared
        with sound in S_va (z_video_va, z_audio_va) and with text in S_vt (z_video_vt, z_text_vt), by a dot product.

    Raises:
        ValueError: nothing given, a file without the stream asked for, sentences for a model without a vocabulary.
    """
    if video is None and audio is None and text is None:
        raise ValueError("nothing to encode; give at least one of video, audio, text")
    found: dict[str, Tensor] = {}
    for modality, value in (("video", video), ("audio", audio)):
        if value is not None:
            clips, count = _clips(model, modality, value, windows)
            parts = [_embed(model, **{modality: clip[None]}) for clip in clips]
            found |= {
                name: torch.cat([p[name] for p in parts]).unflatten(0, (-1, count)).mean(1)
                for name in parts[0]
            }
    if text is not None:
        found |= _embed(
            model, text=_word_ids(model, [text] if isinstance(text, str) else list(text))
        )
    return {name: F.normalize(value, dim=-1) for name, value in found.items()}


def embed_batches(
    model: "VATT",
    batches: Iterable,
    *,
    modalities: Sequence[str] = ("video", "audio", "text"),
    pooled: bool = False,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Embed a folder's batches (``data.dataset.evaluation_clips``): arrays (clips, ...) by output name, and the clips' files.

    Embeddings are of unit norm, z_text_vt (clips, P, d_vt); rows of a missing stream are nan. ``pooled`` adds video_pooled and so on.
    """
    columns: dict[str, list[np.ndarray]] = {}
    files: list[str] = []
    for batch in batches:
        out = _forward(model, **{modality: getattr(batch, modality) for modality in modalities})
        files += batch.files
        for modality in modalities:
            missing = ~getattr(batch, f"{modality}_valid")[..., None]
            for name in (
                f"z_{modality}_va",
                f"z_{modality}_vt",
                *([f"{modality}_pooled"] if pooled else []),
            ):
                value = getattr(out, name, None)
                if value is not None:
                    value = value.float().cpu()
                    value = F.normalize(value, dim=-1) if name.startswith("z_") else value
                    columns.setdefault(name, []).append(
                        value.masked_fill(missing, torch.nan).numpy()
                    )
    return {name: np.concatenate(parts) for name, parts in columns.items()}, files


def embed_sentences(model: "VATT", sentences: Sequence[str], batch_size: int = 256) -> np.ndarray:
    """(n, d_vt) unit-norm z_text_vt of sentences."""
    ids = _word_ids(model, list(sentences))
    return torch.cat(
        [
            F.normalize(_embed(model, text=part)["z_text_vt"], dim=-1)
            for part in ids.split(batch_size)
        ]
    ).numpy()


def _embed(model: "VATT", **inputs: Tensor) -> dict[str, Tensor]:
    out = _forward(model, **inputs)
    return {
        name: getattr(out, name).float().cpu()
        for name in EMBEDDINGS
        if getattr(out, name) is not None
    }


@torch.no_grad()
def _forward(model: "VATT", **inputs: Tensor):
    device = model.log_scale.device
    training = model.training
    model.eval()
    try:
        return model(**{name: value.to(device) for name, value in inputs.items()})
    finally:
        model.train(training)


def _word_ids(model: "VATT", sentences: list[str]) -> Tensor:
    if model.vocabulary is None:
        raise ValueError(
            "this model has no vocabulary, so it cannot read sentences; load a trained folder, or set model.vocabulary"
        )
    if not sentences:
        raise ValueError("text is an empty list; give at least one sentence")
    return torch.as_tensor(model.vocabulary.encode(sentences, model.config.words))


def _clips(model: "VATT", modality: str, value: Any, windows: int) -> tuple[list[Tensor], int]:
    """Clips one by one, and how many belong to each row of the result."""
    if isinstance(value, str | os.PathLike):
        value = [value]
    if (
        isinstance(value, list | tuple)
        and value
        and all(isinstance(v, str | os.PathLike) for v in value)
    ):
        return [
            clip for path in value for clip in _file_windows(model, modality, path, windows)
        ], windows
    array = torch.as_tensor(np.asarray(value) if not isinstance(value, Tensor) else value)
    axes = {"video": 4, "audio": 1}[modality]
    if array.ndim not in (axes, axes + 1) or 0 in array.shape:
        shape = "(T, H, W, 3) or (B, T, H, W, 3)" if modality == "video" else "(S,) or (B, S)"
        raise ValueError(
            f"{modality} is an array {tuple(array.shape)}; it takes {shape}, or media files"
        )
    if array.dtype != torch.uint8:
        array = array.float()
    return list(array if array.ndim == axes + 1 else array[None]), 1


def _file_windows(
    model: "VATT", modality: str, path: str | os.PathLike, windows: int
) -> list[Tensor]:
    from .data.media import probe, read_audio, read_video

    if windows < 1:
        raise ValueError(f"windows is {windows}; it must be at least 1")
    c, info = model.config, probe(path)
    if not (info.has_video if modality == "video" else info.has_audio):
        raise ValueError(f"{path} has no {modality} stream; leave {modality} out")
    spare = max(0.0, info.duration_seconds - c.clip_seconds)
    starts = [spare / 2] if windows == 1 else [spare * i / (windows - 1) for i in range(windows)]
    if modality == "audio":
        return [
            torch.from_numpy(
                read_audio(path, start=s, num_samples=c.samples, sample_rate_hz=c.sample_rate_hz)
            )
            for s in starts
        ]
    rate, height, width = c.frames_per_second, c.height, c.width
    return [
        torch.from_numpy(
            read_video(
                path,
                start=s,
                num_frames=c.frames,
                frames_per_second=rate,
                height=height,
                width=width,
            )
        )
        for s in starts
    ]
