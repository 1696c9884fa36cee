"""Embeddings of arrays and media files by a trained model.

Shapes: B clips, P texts a clip.
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import as_frames, as_waveforms
from .data.clips import Batch, ClipSpec, spread
from .data.media import MediaReader
from .data.text import UNKNOWN_ID

if TYPE_CHECKING:
    from .model import VATT

EMBEDDINGS = ("z_video_va", "z_audio_va", "z_video_vt", "z_text_vt")
# how the windows of a file become one embedding: the mean of the raw ones brought to unit norm; or
# the mean of unit vectors, whose dot product with a unit vector is the mean of the cosines
Protocol = Literal["paper", "cosines"]
# clips of files or arrays in one call of the model
BATCH_CLIPS = 32


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
        video: a media file or a list of them; or frames (T, H, W, 3) or (B, T, H, W, 3), integers
            from 0 to 255 or float in [-1, 1], at the config's rate.
        audio: a media file or a list of them; or a mono waveform (S,) or (B, S), float in [-1, 1]
            or 8, 16 or 32-bit integers, at the config's sample rate.
        text: a sentence or a list of sentences. A warning names those without a known word.
        windows: how many windows of the model's length are embedded and averaged. They are spaced
            evenly over a file; 1 takes its middle. Those without picture, or sound, do not count.

    Returns:
        z_video_va, z_video_vt, z_audio_va, z_text_vt of the modalities that were given, each (B, d)
        fp32 on the CPU. A dot product compares a clip with sound in the space S_va (z_video_va,
        z_audio_va) and with text in the space S_vt (z_video_vt, z_text_vt).

    Raises:
        ValueError: nothing given, arrays of another range or layout, a file that cannot be decoded
            or without the stream asked for, or sentences for a model without a vocabulary.
    """
    if video is None and audio is None and text is None:
        raise ValueError("nothing to encode; give at least one of video, audio, text")
    found: dict[str, Tensor] = {}
    for modality, value in (("video", video), ("audio", audio)):
        if value is None:
            continue
        if paths := _paths(value):
            found |= _encode_files(model, modality, paths, windows)
        else:
            clips = as_frames(value) if modality == "video" else as_waveforms(value)
            parts = [_embed(model, **{modality: part}) for part in clips.split(BATCH_CLIPS)]
            found |= {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    if text is not None:
        found |= _embed(
            model, text=_word_ids(model, [text] if isinstance(text, str) else list(text))
        )
    return {name: F.normalize(value, dim=-1) for name, value in found.items()}


def embed_batches(
    model: "VATT",
    batches: Iterable[Batch],
    *,
    modalities: Sequence[str] = ("video", "audio", "text"),
    pooled: bool = False,
    windows: int = 1,
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Embed the batches of a folder, as ``evaluation_clips`` reads them.

    Args:
        pooled: return the towers' pooled outputs too: video_pooled and so on.
        windows: as many rows of a batch as this, one after the other, are windows of one file.

    Returns:
        arrays (clips, ...) by output name, and the clips' files. Embeddings are of unit norm, of
        several windows that of their mean; z_text_vt is (clips, P, d_vt). Rows of a missing stream
        are nan.
    """
    columns: dict[str, list[np.ndarray]] = {}
    files: list[str] = []
    for batch in batches:
        found = embed_batch(model, batch, modalities=modalities, pooled=pooled, windows=windows)
        files += batch.files[::windows]
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    return {name: np.concatenate(parts) for name, parts in columns.items()}, files


def embed_batch(
    model: "VATT",
    batch: Batch,
    *,
    modalities: Sequence[str] = ("video", "audio", "text"),
    pooled: bool = False,
    features: bool = False,
    windows: int = 1,
    protocol: Protocol = "paper",
) -> dict[str, np.ndarray]:
    """One batch's part of what ``embed_batches`` returns.

    Args:
        protocol: "cosines" leaves embeddings the mean of the windows' unit vectors.
        features: return the features of all tokens too, (clips, tokens, dim), of text
            (clips, P, tokens, dim); of one window only.

    Raises:
        ValueError: features of several windows.
    """
    if features and windows > 1:
        raise ValueError("features belong to one window; leave windows at 1, or features out")
    inputs = {modality: getattr(batch, modality) for modality in modalities}
    if windows > 1 and "text" in inputs:
        inputs["text"] = inputs["text"][::windows]  # the same for all windows
    out = _forward(model, inputs, features)
    found = {}
    for modality in modalities:
        valid = getattr(batch, f"{modality}_valid")
        each = 1 if modality == "text" else windows
        if modality == "text":
            valid = valid[::windows]
        names = [f"z_{modality}_va", f"z_{modality}_vt"]
        names += [f"{modality}_pooled"] * pooled + [f"{modality}_features"] * features
        for name in names:
            if (value := getattr(out, name, None)) is not None:
                value = value.float().cpu()
                if name == "text_features":
                    value = value.unflatten(0, valid.shape)
                embedding = name[0] == "z"
                if embedding and protocol == "cosines":
                    value = F.normalize(value, dim=-1)
                value = _mean_of_valid(value, valid, each)
                if embedding and protocol == "paper":
                    value = F.normalize(value, dim=-1)
                found[name] = value.numpy()
    return found


def embed_sentences(model: "VATT", sentences: Sequence[str], batch_size: int = 256) -> np.ndarray:
    """(n, d_vt) unit-norm z_text_vt of sentences. A warning names those without a known word."""
    ids = _word_ids(model, list(sentences))
    parts = [_embed(model, text=part)["z_text_vt"] for part in ids.split(batch_size)]
    return F.normalize(torch.cat(parts), dim=-1).numpy()


def without_known_words(model: "VATT", sentences: Sequence[str]) -> list[str]:
    """The sentences of which the model knows no word."""
    return _unknown(sentences, _numbers(model, list(sentences)))


def _mean_of_valid(values: Tensor, valid: Tensor, windows: int) -> Tensor:
    """The mean over each clip's valid windows; nan where there are none.

    Args:
        values: (clips * windows, ...), or with valid (clips, P) as many more leading axes.
    """
    while valid.ndim < values.ndim:
        valid = valid[..., None]
    if windows == 1:
        return values.masked_fill(~valid, torch.nan)
    values, valid = values.unflatten(0, (-1, windows)), valid.unflatten(0, (-1, windows))
    # 0 / 0 is nan
    return values.masked_fill(~valid, 0).sum(1) / valid.sum(1)


def _embed(model: "VATT", **inputs: Tensor) -> dict[str, Tensor]:
    out = _forward(model, inputs)
    return {
        name: getattr(out, name).float().cpu()
        for name in EMBEDDINGS
        if getattr(out, name) is not None
    }


@torch.no_grad()
def _forward(model: "VATT", inputs: dict[str, Tensor], features: bool = False):
    device = model.log_scale.device
    training = model.training
    model.eval()
    try:
        return model(**{name: x.to(device) for name, x in inputs.items()}, features=features)
    finally:
        model.train(training)


def _numbers(model: "VATT", sentences: list[str]) -> np.ndarray:
    if model.vocabulary is None:
        raise ValueError(
            "this model has no vocabulary, so it cannot read sentences; "
            "load a trained folder, or set model.vocabulary"
        )
    if not sentences:
        raise ValueError("text is an empty list; give at least one sentence")
    return model.vocabulary.encode(sentences, model.config.words)


def _unknown(sentences: Sequence[str], numbers: np.ndarray) -> list[str]:
    return [
        sentence
        for sentence, row in zip(sentences, numbers, strict=True)
        if not (row > UNKNOWN_ID).any()
    ]


def _word_ids(model: "VATT", sentences: list[str]) -> Tensor:
    numbers = _numbers(model, sentences)
    if unknown := _unknown(sentences, numbers):
        listed = ", ".join(map(repr, unknown[:3]))
        warnings.warn(
            f"of {len(unknown)} of {len(sentences)} sentences the model knows no word: {listed}; "
            "their embeddings mean nothing",
            stacklevel=4,
        )
    return torch.as_tensor(numbers)


def _paths(value: Any) -> list[str | os.PathLike]:
    """Media files, where the value is one or a list of them."""
    if isinstance(value, str | os.PathLike):
        return [value]
    listed = isinstance(value, list | tuple)
    if listed and all(isinstance(path, str | os.PathLike) for path in value):
        return list(value)
    return []


def _encode_files(
    model: "VATT", modality: str, paths: list[str | os.PathLike], windows: int
) -> dict[str, Tensor]:
    """Not normalised: the mean over each file's windows. Files are decoded a batch at a time."""
    names = [name for name in EMBEDDINGS if modality in name]
    sums: dict[str, list[Tensor]] = {name: [torch.tensor(0.0)] * len(paths) for name in names}
    counts = [0] * len(paths)
    found = _file_windows(model, modality, paths, windows)
    while part := list(islice(found, BATCH_CLIPS)):
        places, clips = zip(*part, strict=True)
        out = _embed(model, **{modality: torch.from_numpy(np.stack(clips))})
        for row, place in enumerate(places):
            counts[place] += 1
            for name in names:
                sums[name][place] = sums[name][place] + out[name][row]
    return {
        name: torch.stack([total / n for total, n in zip(rows, counts, strict=True)])
        for name, rows in sums.items()
    }


def _file_windows(
    model: "VATT", modality: str, paths: list[str | os.PathLike], windows: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Which file, and a window of it; windows without anything in them are left out."""
    spec = ClipSpec.from_config(model.config)
    sizes = spec.reader_arguments()
    for place, path in enumerate(paths):
        found = 0
        with MediaReader(path) as reader:
            info = reader.info
            if not (info.has_video if modality == "video" else info.has_audio):
                raise ValueError(f"{reader.missing(modality)}; leave {modality} out")
            for first in spread(spec.places(info.duration_seconds), windows):
                clip = reader.clip(start=first / spec.frames_per_second, **sizes, only=modality)
                values, valid = (
                    (clip.video, clip.video_valid)
                    if modality == "video"
                    else (clip.audio, clip.audio_valid)
                )
                if valid and values is not None:
                    found += 1
                    yield place, values
        if not found:
            raise ValueError(
                f"{path} has no {modality} in the windows embedded, {windows} of "
                f"{spec.seconds:g} s over {info.duration_seconds:.2f} s; give more windows, or "
                f"leave {modality} out"
            )
