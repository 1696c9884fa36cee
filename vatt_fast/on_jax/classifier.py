"""A fine-tuned tower with its classifier in JAX; the twin of ``vatt_fast/classifier.py``.

config, params = classifier.load("runs/vit_base_k400")
logits = classifier.forward(params, clips, config=config)
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import torch

from ..classifier import Classifier, ClassifierConfig
from ..inputs import audio_input, require_input, video_input
from .model import CallOptions, dense, drop, encode_patches, part
from .weights import Arrays, as_tensors, rearrange, restore


def load(folder: str | Path) -> tuple[ClassifierConfig, Arrays]:
    """Config and params of a folder that ``convert`` or ``Classifier.save_pretrained`` wrote."""
    model = Classifier.from_pretrained(folder)
    tensors = rearrange(model.state_dict(), model.config)
    return model.settings, {name: jnp.array(value.numpy()) for name, value in tensors.items()}


def forward(
    params: Arrays,
    clips: Any,
    *,
    config: ClassifierConfig,
    keep: Any = None,
    grid: tuple[int, int, int] | None = None,
    dtype: Any = None,
    keys: tuple[Any, Any] = (None, None),
    classifier_dropout: float = 0.0,
    recompute: bool = False,
) -> jax.Array:
    """Logits (B, classes) of clips or waveforms, see ``Classifier.forward``.

    Args:
        dtype: of the tower's arithmetic; the weights' if None.
        keys: random keys of dropout, within the tower and before the classifier; None for none.
        recompute: keep only the blocks' inputs for the backward pass.
    """
    require_input(clips, None, None)
    modality = config.modality
    if modality == "video":
        how = video_input(config.model, clips, keep, grid)
    else:
        how = audio_input(config.model, clips, keep)
    dtype = params[f"{modality}_tokens.agg"].dtype if dtype is None else jnp.dtype(dtype)
    of_tower = {modality: keys[0]}
    call = CallOptions(params, config.model, dtype, False, of_tower, lambda name, p: p, recompute)
    _, pooled = encode_patches(call, modality, clips, how, keep)
    return dense(part(params, "classifier"), drop(pooled, classifier_dropout, keys[1]))


def to_torch(config: ClassifierConfig, params: Arrays) -> Classifier:
    """The torch model with these weights, copied, in evaluation mode on the CPU."""
    with torch.device("meta"):
        model = Classifier(config)
    model.load_state_dict(restore(as_tensors(params), config.model), assign=True)
    return model.eval()
