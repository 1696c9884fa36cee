"""Released checkpoints -> folders of ours."""

import os
from pathlib import Path
from typing import Any

import torch

from ..classifier import Classifier, read_labels
from ..config import MODALITIES
from ..files import check_folder
from ..model import VATT
from ..weights import CONFIG, WEIGHTS
from .layouts import HeadDim
from .released import Released, read_released


def convert(
    checkpoint: str | os.PathLike,
    out: str | os.PathLike,
    *,
    words: str | os.PathLike | None = None,
    labels: str | os.PathLike | None = None,
    head_dim: HeadDim | None = None,
    partial: bool = False,
) -> dict[str, Any]:
    """Write a released checkpoint as a folder that torch and JAX load.

    A pre-trained one becomes what ``create_model`` and ``on_jax.weights.load`` read, a fine-tuned
    one what ``Classifier.from_pretrained`` and ``on_jax.classifier.load`` read.

    Args:
        checkpoint, words, head_dim, partial: see ``checkpoints.released.read_released``. With
            ``partial`` weights that are not there are drawn at random, from seed 0.
        out: the folder; it must hold no model yet.
        labels: the classes' names in the order of the outputs, one a line; of fine-tuned ones.

    Returns:
        what was found: kind, sizes, keys by their fate, notes.

    Raises:
        ValueError: see ``read_released``; or labels that don't fit, or a folder in use.
        OSError: the folder cannot be written.
    """
    out = Path(out)
    check_folder(out)
    if (out / CONFIG).exists() or (out / WEIGHTS).exists():
        raise ValueError(f"{out} holds a model already; name another folder")
    released = read_released(checkpoint, words=words, head_dim=head_dim, partial=partial)
    if labels is not None and released.num_classes is None:
        raise ValueError(f"{checkpoint} has no classifier, so it has no use for {labels}")
    names = None
    if labels is not None and released.num_classes is not None:
        names = read_labels(labels, released.num_classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_of(released)
    if isinstance(model, Classifier):
        model.labels = names
    model.save_pretrained(out)
    return {
        **_sizes(released),
        "weights": sum(value.numel() for value in model.state_dict().values()),
        "left out": released.left_out,
        **({"not matched": released.mismatch.lines()} if released.mismatch else {}),
        **({"notes": released.notes} if released.notes else {}),
    }


def model_of(released: Released) -> VATT | Classifier:
    """The whole model, or the one tower with its classifier; in evaluation mode."""
    if released.modality is None:
        return VATT.from_released(released)
    return Classifier.from_released(released)


def _sizes(released: Released) -> dict[str, Any]:
    config = released.config
    found: dict[str, Any] = {"kind": config.kind}
    for modality in MODALITIES if released.modality is None else (released.modality,):
        tower = getattr(config, modality)
        found[modality] = (
            f"{tower.depth} blocks, dim {tower.dim}, MLP {tower.mlp_dim}, {tower.num_heads} heads "
            f"of {tower.head_dim}"
        )
        if modality == "video":
            found["frames"] = f"{config.frames} x {config.height} x {config.width}"
        elif modality == "audio":
            found["samples"] = config.samples
    if released.modality is not None:
        return found | {"classes": released.num_classes}
    given = "not given: ids only" if released.vocabulary is None else "given"
    return found | {"word table": f"{config.vocab_size} words, their list {given}"}
