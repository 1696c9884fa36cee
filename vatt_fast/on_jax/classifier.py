"""A fine-tuned tower with its classifier in JAX; the twin of ``vatt_fast/classifier.py``.

config, params = classifier.load("runs/vit_base_k400")
logits = classifier.forward(params, clips, config=config)
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..classifier import Classifier, ClassifierConfig
from ..inputs import audio_input, require_input, video_input
from .model import CallOptions, dense, encode_patches, part
from .weights import Arrays, rearrange


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
) -> jax.Array:
    """Logits (B, classes) of clips or waveforms, see ``Classifier.forward``; no dropout."""
    require_input(clips, None, None)
    modality = config.modality
    if modality == "video":
        how = video_input(config.model, clips, keep, grid)
    else:
        how = audio_input(config.model, clips, keep)
    dtype = params[f"{modality}_tokens.agg"].dtype if dtype is None else jnp.dtype(dtype)
    call = CallOptions(
        params, config.model, dtype, False, {modality: None}, lambda name, p: p, False
    )
    _, pooled = encode_patches(call, modality, clips, how, keep)
    return dense(part(params, "classifier"), pooled)
