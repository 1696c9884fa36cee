"""FLOPs and parameters by formula: the paper's tables in its own counting convention, beside true counts.

The paper's GFLOPs are statistics of the TensorFlow profiler: 2 for a multiply-add of a matmul or convolution, 5 for an element of a
softmax, 1 for an element-wise operation, and nothing for Q K^T, an einsum without a registered count. Whether DropToken or not, all
patches are projected. True counts are 2 for a multiply-add of every matmul, Q K^T included, and nothing else: no norms, softmax, GELU,
biases, positions or losses; they are what torch's FlopCounterMode finds in the model with ``features=True``.

Symbols: N tokens with AGG, d dim, f mlp_dim, H heads, L layers, k values a patch.
"""

import dataclasses
from typing import Any

from .config import BASE, LARGE, MEDIUM, TowerConfig, VATTConfig, preset
from .kernels.drop_token import num_kept

# Softmax and element-wise operations of a layer, (per head and score, per token and dim), as the profiler sees the two graphs; the
# training graph adds dropout. With them the formula meets Tables 5 and 6 within 0.015 %. Table 1 lies 0.05-0.06 % lower than the formula and
# than Table 6 itself, whose 1252.3 GFLOPs a view make 15.03 TFLOPs for the 12 views printed as 15.02.
_INFERENCE, _TRAINING = (6, 41), (9, 59)

_VIEWS = 12  # 4 clips x 3 crops


@dataclasses.dataclass(frozen=True)
class _Row:
    """One published figure: what was counted, and the number printed."""

    table: int
    configuration: str
    config: VATTConfig
    drop_rate: float
    published_gflops: float
    graph: tuple[int, int]
    modalities: tuple[str, ...] = ("video",)
    views: int = 1


def _video(tower: TowerConfig, frames: int, side: int) -> VATTConfig:
    return VATTConfig(video=tower, frames=frames, height=side, width=side).with_recipe("released")


def _published() -> list[_Row]:
    names = {"base": BASE, "medium": MEDIUM, "large": LARGE}
    rows = [
        _Row(
            1,
            f"{name} 32x320x320, {_VIEWS} views",
            _video(names[name], 32, 320),
            0.0,
            tera * 1000,
            _INFERENCE,
            views=_VIEWS,
        )
        for name, tera in (("base", 9.09), ("medium", 15.02), ("large", 29.80))
    ]
    multimodal = preset("medium_base_small", "released")
    everything = ("video", "audio", "text")
    rows += [
        _Row(5, "medium_base_small 32x224x224", multimodal, drop, published, _TRAINING, everything)
        for drop, published in ((0.75, 188.1), (0.5, 375.4), (0.25, 574.2), (0.0, 784.8))
    ]
    rows += [
        _Row(6, f"medium {frames}x224x224", _video(MEDIUM, frames, 224), 0.0, g, _INFERENCE)
        for frames, g in ((32, 548.1), (64, 1222.1))
    ]
    rows += [
        _Row(
            6,
            "medium 32x320x320",
            _video(MEDIUM, 32, 320),
            drop,
            published,
            _TRAINING if drop else _INFERENCE,
        )
        for drop, published in ((0.75, 279.8), (0.5, 572.5), (0.25, 898.9), (0.0, 1252.3))
    ]
    return rows


def flops_table() -> list[dict[str, Any]]:
    """Tables 1, 5 and 6 of the paper: {table, configuration, drop_rate, published_gflops, convention_gflops, true_gflops, true_gflops_drop_first}.

    Figures are for one clip (Table 1: all its views; Table 5: with two 17-token texts). ``true_gflops`` projects all patches as the paper
    does, ``true_gflops_drop_first`` only the kept ones as this library does.
    """
    table = []
    for row in _published():
        convention = convention_flops(
            row.config, row.drop_rate, modalities=row.modalities, training=row.graph is _TRAINING
        )
        true = [
            row.views
            * sum(
                true_flops(
                    row.config, row.drop_rate, drop_first=first, texts=2, modalities=row.modalities
                ).values()
            )
            / 1e9
            for first in (False, True)
        ]
        table.append(
            {
                "table": row.table,
                "configuration": row.configuration,
                "drop_rate": row.drop_rate,
                "published_gflops": row.published_gflops,
                "convention_gflops": row.views * convention / 1e9,
                "true_gflops": true[0],
                "true_gflops_drop_first": true[1],
            }
        )
    return table


def convention_flops(
    config: VATTConfig, drop_rate: float, *, modalities: tuple[str, ...], training: bool
) -> float:
    """Forward FLOPs of one clip, text counted for two sentences of 17 tokens, as the paper's profiler saw them.

    Args:
        training: the training graph, as in Table 5 and the dropped rows of Table 6, or the inference graph, as in its other rows.
    """
    total = sum(
        _convention(config, modality, drop_rate, _TRAINING if training else _INFERENCE)
        for modality in modalities
    )
    heads = (
        2 * sum(_heads_flops(config, texts=1).values()) if len(modalities) > 1 else 0
    )  # the profiler saw them twice
    return total + heads


def true_flops(
    config: VATTConfig,
    drop_rate: float = 0.0,
    *,
    drop_first: bool = True,
    texts: int | None = None,
    modalities: tuple[str, ...] = ("video", "audio", "text"),
) -> dict[str, int]:
    """Forward FLOPs of one clip by part: each modality's tower (features of all tokens), and "heads" when there are several modalities.

    Args:
        drop_rate: fraction of video and audio patches removed, in [0, 1).
        drop_first: project kept patches only; False projects all and drops tokens, as the paper counts.
        texts: sentences a clip; None takes the config's.
        modalities: any of "video", "audio", "text".

    Raises:
        ValueError: drop_rate out of range, an unknown modality or none.
    """
    if not modalities or not set(modalities) <= {"video", "audio", "text"}:
        raise ValueError(f"modalities is {modalities!r}; it takes some of 'video', 'audio', 'text'")
    texts = config.texts_per_clip if texts is None else texts
    parts = {
        modality: _tower_flops(config, modality, drop_rate, drop_first) for modality in modalities
    }
    if "text" in parts:
        parts["text"] *= texts
    if len(modalities) > 1:
        heads = _heads_flops(config, texts)
        parts["heads"] = sum(heads[modality] for modality in modalities)
    return parts


def _patches(config: VATTConfig, modality: str) -> tuple[int, int]:
    """Patches of a clip and values in each."""
    if modality == "video":
        return config.num_video_patches, config.video_patch_values
    return config.num_audio_patches, config.audio_patch


def _tower_flops(config: VATTConfig, modality: str, drop_rate: float, drop_first: bool) -> int:
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
        patches, values = _patches(config, modality)
        kept = num_kept(patches, drop_rate)
        tokens = kept + 1
        projected = kept if drop_first else patches
        way_in = 2 * projected * values * d + (2 * projected * d * d if config.agnostic else 0)
    layer = 2 * tokens * (4 * d * inner + 2 * d * f) + 4 * tokens**2 * inner
    way_out = 2 * tokens * d * config.pooled_dim(modality) if config.agnostic else 0
    return way_in + tower.depth * layer + way_out


def _heads_flops(config: VATTConfig, texts: int) -> dict[str, int]:
    va, vt = config.d_va, config.d_vt
    return {
        "video": 2 * (config.pooled_dim("video") * va + va * va + va * vt),
        "audio": 2 * config.pooled_dim("audio") * va,
        "text": 2 * config.pooled_dim("text") * vt * texts,
    }


def _convention(
    config: VATTConfig, modality: str, drop_rate: float, graph: tuple[int, int]
) -> float:
    """One clip of one modality as the profiler counted it, for two texts of 17 tokens.

    2 k d P + L (24 d^2 N + 2 N^2 d + s H N^2 + e d N) + 2 m, m being the tower's parameters.
    """
    per_score, per_token = graph
    tower: TowerConfig = getattr(config, modality)
    d = tower.dim
    if modality == "text":
        tokens = config.words + 1
        way_in = 2 * (config.word_dim or 0) * d * tokens
    else:
        patches, values = _patches(config, modality)
        tokens = num_kept(patches, drop_rate) + 1
        way_in = 2 * values * d * patches  # all of them, dropped or not
    products = 2 * tokens * (4 * d * d + 2 * d * tower.mlp_dim) + 2 * tokens**2 * d
    layer = products + per_score * tower.num_heads * tokens**2 + per_token * d * tokens
    once = way_in + tower.depth * layer + 2 * tower_parameters(config, modality)["tower"]
    return 2 * once if modality == "text" else once


# -- parameters --------------------------------------------------------------------------------------------------------


def tower_parameters(config: VATTConfig, modality: str) -> dict[str, int]:
    """Parameters of one modality: "tower" (in an agnostic model only its private way in and out), for text also "word_table"."""
    tower: TowerConfig = getattr(config, modality)
    d = tower.dim
    t5 = modality == "text" and not config.agnostic
    own = 0 if config.agnostic else _encoder_parameters(tower, t5, config.relative_buckets)
    table = {}
    if modality == "text":
        word_dim = config.word_dim or d
        table = {"word_table": config.vocab_size * word_dim}
        if config.agnostic:
            own += (
                (word_dim * d + d) + (config.words * d + 2 * d) + d
            )  # pre_proj, positions with their norm, AGG
        else:
            own += word_dim + (word_dim * d if config.word_dim else 0)  # AGG, projection
    else:
        _, values = _patches(config, modality)
        rows = sum(config.video_grid) if modality == "video" else config.num_audio_patches
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


def preset_parameters(config: VATTConfig) -> dict[str, int]:
    """Parameters of a whole model by part; their sum is all but the one of the temperature."""
    parts = {"trunk": _encoder_parameters(config.video, False, 0)} if config.agnostic else {}
    for modality in ("video", "audio", "text"):
        own = tower_parameters(config, modality)
        parts[modality] = own["tower"]
        if "word_table" in own:
            parts["word_table"] = own["word_table"]
    return parts | {"heads": head_parameters(config)}


def parameter_table() -> list[dict[str, Any]]:
    """Rows {configuration, published_millions, millions, explanation}: the paper's Table 7 beside exact counts."""
    classes = 600
    rows = []
    for name, tower, published in (
        ("base", BASE, 87.9),
        ("medium", MEDIUM, 155.0),
        ("large", LARGE, 306.1),
    ):
        count = tower_parameters(_video(tower, 32, 224), "video")["tower"] + classes * (
            tower.dim + 1
        )
        rows.append(
            _parameter_row(
                f"video {name}",
                published,
                count,
                f"with a classifier of {classes} classes, which the paper's figure includes",
            )
        )
    text = tower_parameters(preset("medium_base_small", "released"), "text")
    learned = tower_parameters(preset("medium_base_small", "paper"), "text")["word_table"]
    rows.append(
        _parameter_row(
            "text small",
            20.9,
            text["tower"],
            f"the released module, {20.9 - text['tower'] / 1e6:.2f} M smaller than published; its word table "
            f"apart: {text['word_table'] / 1e6:.2f} M frozen in the release, {learned / 1e6:.2f} M learned in the paper's recipe",
        )
    )
    sums = {
        "base_base_small": (197, "the paper adds its rows 87.9 + 87.9 + 20.9"),
        "medium_base_small": (264, "the paper adds its rows 155.0 + 87.9 + 20.9"),
        "large_base_small": (415, "the paper adds its rows 306.1 + 87.9 + 20.9"),
        "agnostic_medium": (
            155,
            "the paper gives its video medium, with classifier and without the other modalities' parts",
        ),
    }
    for name, (published, why) in sums.items():
        parts = preset_parameters(preset(name, "released"))
        text_of = ", ".join(f"{part} {count / 1e6:.2f}" for part, count in parts.items())
        rows.append(
            _parameter_row(
                name,
                published,
                sum(parts.values()) - parts["word_table"],
                f"{text_of} (table frozen, not in the sum); {why}",
            )
        )
    return rows


def _parameter_row(name: str, published: float, count: int, explanation: str) -> dict[str, Any]:
    return {
        "configuration": name,
        "published_millions": published,
        "millions": count / 1e6,
        "explanation": explanation,
    }


def format_tables() -> str:
    """Both tables as markdown."""
    lines = [
        "| table | configuration | drop rate | published | convention | off by | true | true, drop first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in flops_table():
        off = row["convention_gflops"] / row["published_gflops"] - 1
        lines.append(
            f"| {row['table']} | {row['configuration']} | {row['drop_rate']:.0%} | {row['published_gflops']:.1f} | {row['convention_gflops']:.2f} "
            f"| {off:+.3%} | {row['true_gflops']:.1f} | {row['true_gflops_drop_first']:.1f} |"
        )
    lines += [
        "",
        "GFLOPs of one clip, forward. Convention: the paper's profiler counts (Q K^T not at all, element-wise operations once, all patches",
        "projected). True: 2 for every multiply-add of the matmuls, without norms, softmax, GELU, biases, positions and losses; drop first:",
        "only kept patches are projected. Table 1 prints 12 views of Table 6's 1252.3, which make 15027.6, as 15.02 TFLOPs, and its other rows",
        "as low: hence its 0.05-0.06 %.",
        "",
        "| parameters | published (M) | exact (M) | explanation |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['configuration']} | {row['published_millions']:g} | {row['millions']:.3f} | {row['explanation']} |"
        for row in parameter_table()
    ]
    return "\n".join(lines)
