"""Parameters of a model by formula; tests compare them with the modules."""

from .config import MODALITIES, TowerConfig, VATTConfig
from .flops import patches_of


def tower_parameters(config: VATTConfig, modality: str) -> dict[str, int]:
    """Parameters of one modality: "tower", and for text also "word_table".

    In an agnostic model "tower" is the modality's private way in and out only; the encoder is
    shared.
    """
    tower: TowerConfig = getattr(config, modality)
    d = tower.dim
    t5 = modality == "text" and not config.agnostic
    own = 0 if config.agnostic else _encoder_parameters(tower, t5, config.relative_buckets)
    table = {}
    if modality == "text":
        word_dim = config.word_dim or d
        table = {"word_table": config.vocab_size * word_dim}
        if config.agnostic:
            # pre_proj, positions with their norm, AGG
            own += (word_dim * d + d) + (config.words * d + 2 * d) + d
        else:
            own += word_dim + (word_dim * d if config.word_dim else 0)  # AGG, projection
    else:
        _, values = patches_of(config, modality)
        rows = sum(config.video_grid if modality == "video" else config.audio_grid)
        own += values * d + d + rows * d + 2 * d + d  # projection, positions with their norm, AGG
        own += d * d + d if config.agnostic else 0
    if config.agnostic:
        out = config.pooled_dim(modality)
        own += d * out + out
    return {"tower": own, **table}


def _encoder_parameters(tower: TowerConfig, t5: bool, buckets: int) -> int:
    d, inner, f = tower.dim, tower.num_heads * tower.head_dim, tower.mlp_dim
    layer = 4 * d * inner + 2 * d * f + (3 * d if t5 else (3 * inner + d) + (f + d) + 4 * d)
    return tower.depth * layer + (d + buckets * tower.num_heads if t5 else 2 * d)


def head_parameters(config: VATTConfig) -> int:
    """Parameters of the common space, batch norm scales and offsets included."""
    va, vt = config.d_va, config.d_vt
    video = config.pooled_dim("video") * va + va * va + va * vt + 2 * (va + va + vt)
    paper = config.heads == "paper"
    audio = config.pooled_dim("audio") * va + (2 * va if paper else va)
    text = config.pooled_dim("text") * vt + (2 * vt if paper else vt)
    return video + audio + text


def model_parameters(config: VATTConfig) -> dict[str, int]:
    """Parameters of a whole model by part; their sum is all but the one of the temperature."""
    parts = {"trunk": _encoder_parameters(config.video, False, 0)} if config.agnostic else {}
    for modality in MODALITIES:
        own = tower_parameters(config, modality)
        parts[modality] = own["tower"]
        if "word_table" in own:
            parts["word_table"] = own["word_table"]
    return parts | {"heads": head_parameters(config)}
