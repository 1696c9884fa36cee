"""FLOPs of a model by formula: what its matrix products need, and nothing else.

A multiply-add counts 2. Norms, softmax, GELU, biases, positions and losses count nothing. These are
the numbers that torch's FlopCounterMode finds in the model. The paper counts in another way:
``paper_tables.py`` has its convention and its figures.

Symbols: N tokens with AGG, d dim, f mlp_dim, H heads, L layers, k values a patch.
"""

from typing import Literal

from .config import MODALITIES, TowerConfig, VATTConfig
from .kernels.drop_token import num_kept

# the backward pass has two products for each one of the forward pass
_PASSES = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}


def true_flops(
    config: VATTConfig,
    drop_rate: float = 0.0,
    *,
    features: bool = True,
    batch: int = 1,
    mode: Literal["fwd", "bwd", "fwd+bwd"] = "fwd",
    drop_first: bool = True,
    texts: int | None = None,
    modalities: tuple[str, ...] = MODALITIES,
) -> dict[str, int]:
    """FLOPs by part: each modality's tower, and "heads" when there are several modalities.

    Args:
        drop_rate: fraction of video and audio patches removed, in [0, 1).
        features: the features of all tokens are asked for; without them the last block computes
            keys and values for all tokens, and the rest for AGG alone.
        batch: clips.
        mode: the forward pass, the backward pass (twice the forward pass), or both.
        drop_first: project the kept patches only; False projects all, as the paper counts.
        texts: sentences a clip; None takes the config's.
        modalities: any of "video", "audio", "text". One alone is a tower without the common space.

    Raises:
        ValueError: drop_rate out of range, an unknown modality or none.
    """
    if not modalities or not set(modalities) <= set(MODALITIES):
        raise ValueError(f"modalities is {modalities!r}; it takes some of 'video', 'audio', 'text'")
    texts = config.texts_per_clip if texts is None else texts
    parts = {
        modality: _tower_flops(config, modality, drop_rate, features, drop_first)
        for modality in modalities
    }
    if "text" in parts:
        parts["text"] *= texts
    if len(modalities) > 1:
        heads = heads_flops(config, texts)
        parts["heads"] = sum(heads[modality] for modality in modalities)
    return {part: _PASSES[mode] * batch * count for part, count in parts.items()}


def patches_of(config: VATTConfig, modality: str) -> tuple[int, int]:
    """Patches of a clip and values in each, for "video" or "audio"."""
    if modality == "video":
        return config.num_video_patches, config.video_patch_values
    return config.num_audio_patches, config.audio_patch_values


def _tower_flops(
    config: VATTConfig, modality: str, drop_rate: float, features: bool, drop_first: bool
) -> int:
    """The forward pass of one clip or one sentence."""
    tower: TowerConfig = getattr(config, modality)
    d, inner, f = tower.dim, tower.num_heads * tower.head_dim, tower.mlp_dim
    way_in = 0
    if modality == "text":
        tokens = config.words + 1
        if config.agnostic:
            way_in = 2 * config.words * (config.word_dim or d) * d
        elif config.word_dim:
            way_in = 2 * tokens * config.word_dim * d
    else:
        patches, values = patches_of(config, modality)
        kept = num_kept(patches, drop_rate)
        tokens = kept + 1
        projected = kept if drop_first else patches
        way_in = 2 * projected * values * d + (2 * projected * d * d if config.agnostic else 0)
        if modality == "audio" and config.audio_input == "spectrogram":
            hop = config.spectrogram_hop
            way_in += 2 * -(-config.samples // hop) * (hop + 1) * config.mel_bins

    def block(queries: int) -> int:
        """Keys and values of all tokens; attention and the MLP of ``queries`` tokens."""
        products = 4 * tokens * d * inner + queries * (4 * d * inner + 4 * d * f)
        return products + 4 * queries * tokens * inner

    asked = tokens if features else 1
    way_out = 2 * asked * d * config.pooled_dim(modality) if config.agnostic else 0
    return way_in + (tower.depth - 1) * block(tokens) + block(asked) + way_out


def heads_flops(config: VATTConfig, texts: int) -> dict[str, int]:
    """The common space's share of each modality, for one clip with ``texts`` sentences."""
    va, vt = config.d_va, config.d_vt
    return {
        "video": 2 * (config.pooled_dim("video") * va + va * va + va * vt),
        "audio": 2 * config.pooled_dim("audio") * va,
        "text": 2 * config.pooled_dim("text") * vt * texts,
    }
