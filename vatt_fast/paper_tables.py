"""The paper's tables: its published figures, its way to count FLOPs, and the text that prints them.

The paper's GFLOPs are statistics of the TensorFlow profiler. It counts 2 for a multiply-add of a
matmul or convolution, 5 for an element of a softmax, 1 for an element-wise operation, and nothing
for Q K^T, an einsum without a registered count. All patches are projected, with DropToken or not.

Symbols: N tokens with AGG, d dim, f mlp_dim, H heads, L layers, k values a patch.
"""

from dataclasses import dataclass
from typing import Any

from .config import (
    AUDIO_PATCHES,
    BASE,
    CLIP_SIZES,
    LARGE,
    MEDIUM,
    MODALITIES,
    VIDEO_PATCHES,
    TowerConfig,
    VATTConfig,
    preset,
    with_input,
)
from .flops import heads_flops, patches_of, true_flops
from .kernels.drop_token import num_kept
from .parameters import model_parameters, tower_parameters

# Softmax and element-wise operations of a layer, (per head and score, per token and dim), as the
# profiler sees the two graphs; the training graph adds dropout. With them the formula meets Tables
# 5 and 6 within 0.015 %. Table 1 lies 0.05-0.06 % lower than the formula and than Table 6 itself,
# whose 1252.3 GFLOPs a view make 15.03 TFLOPs for the 12 views printed as 15.02.
_INFERENCE, _TRAINING = (6, 41), (9, 59)

_VIEWS = 12  # 4 clips x 3 crops


@dataclass(frozen=True)
class PublishedRow:
    """One published figure: what was counted, and the number printed."""

    table: int
    configuration: str
    config: VATTConfig
    drop_rate: float
    published_gflops: float
    training: bool  # the training graph was counted, not the inference graph
    modalities: tuple[str, ...] = ("video",)
    views: int = 1


def _video(tower: TowerConfig, frames: int, side: int) -> VATTConfig:
    return VATTConfig(video=tower, frames=frames, height=side, width=side).with_recipe("released")


def published_rows() -> list[PublishedRow]:
    """The rows of the paper's Tables 1, 5 and 6."""
    rows = [
        PublishedRow(
            1,
            f"{name} 32x320x320, {_VIEWS} views",
            _video(tower, 32, 320),
            0.0,
            tera * 1000,
            training=False,
            views=_VIEWS,
        )
        for name, tower, tera in (
            ("base", BASE, 9.09),
            ("medium", MEDIUM, 15.02),
            ("large", LARGE, 29.80),
        )
    ]
    name, multimodal = "medium_base_small 32x224x224", preset("medium_base_small", "released")
    rows += [
        PublishedRow(5, name, multimodal, drop, gflops, training=True, modalities=MODALITIES)
        for drop, gflops in ((0.75, 188.1), (0.5, 375.4), (0.25, 574.2), (0.0, 784.8))
    ]
    rows += [
        PublishedRow(
            6, f"medium {frames}x224x224", _video(MEDIUM, frames, 224), 0.0, gflops, training=False
        )
        for frames, gflops in ((32, 548.1), (64, 1222.1))
    ]
    rows += [
        PublishedRow(
            6, "medium 32x320x320", _video(MEDIUM, 32, 320), drop, gflops, training=drop > 0
        )
        for drop, gflops in ((0.75, 279.8), (0.5, 572.5), (0.25, 898.9), (0.0, 1252.3))
    ]
    return rows


def flops_table() -> list[dict[str, Any]]:
    """Tables 1, 5 and 6 of the paper, with our counts beside the printed ones.

    Figures are for one clip (Table 1: all its views; Table 5: with two 17-token texts).

    Returns:
        rows {table, configuration, drop_rate, published_gflops, convention_gflops, true_gflops,
        true_gflops_drop_first}. ``true_gflops`` projects all patches as the paper does,
        ``true_gflops_drop_first`` only the kept ones as this library does.
    """
    table = []
    for row in published_rows():
        convention = convention_flops(
            row.config, row.drop_rate, modalities=row.modalities, training=row.training
        )
        all_projected, kept_projected = (
            sum(
                true_flops(
                    row.config, row.drop_rate, drop_first=first, texts=2, modalities=row.modalities
                ).values()
            )
            for first in (False, True)
        )
        table.append(
            {
                "table": row.table,
                "configuration": row.configuration,
                "drop_rate": row.drop_rate,
                "published_gflops": row.published_gflops,
                "convention_gflops": row.views * convention / 1e9,
                "true_gflops": row.views * all_projected / 1e9,
                "true_gflops_drop_first": row.views * kept_projected / 1e9,
            }
        )
    return table


def convention_flops(
    config: VATTConfig, drop_rate: float, *, modalities: tuple[str, ...], training: bool
) -> float:
    """Forward FLOPs of one clip as the paper's profiler saw them.

    Text is counted for two sentences of 17 tokens.

    Args:
        training: the training graph, as in Table 5 and the dropped rows of Table 6, or the
            inference graph, as in its other rows.
    """
    total = sum(_convention(config, modality, drop_rate, training) for modality in modalities)
    # the profiler saw the heads twice
    heads = 2 * sum(heads_flops(config, texts=1).values()) if len(modalities) > 1 else 0
    return total + heads


def _convention(config: VATTConfig, modality: str, drop_rate: float, training: bool) -> float:
    """One clip of one modality as the profiler counted it, for two texts of 17 tokens.

    2 k d P + L (24 d^2 N + 2 N^2 d + s H N^2 + e d N) + 2 m, m being the tower's parameters.
    """
    per_score, per_token = _TRAINING if training else _INFERENCE
    tower: TowerConfig = getattr(config, modality)
    d = tower.dim
    if modality == "text":
        tokens = config.words + 1
        way_in = 2 * (config.word_dim or 0) * d * tokens
    else:
        patches, values = patches_of(config, modality)
        tokens = num_kept(patches, drop_rate) + 1
        way_in = 2 * values * d * patches  # all of them, dropped or not
    products = 2 * tokens * (4 * d * d + 2 * d * tower.mlp_dim) + 2 * tokens**2 * d
    layer = products + per_score * tower.num_heads * tokens**2 + per_token * d * tokens
    once = way_in + tower.depth * layer + 2 * tower_parameters(config, modality)["tower"]
    return 2 * once if modality == "text" else once


def input_table(name: str = "medium_base_small") -> list[dict[str, Any]]:
    """A preset's video tower by frames and patches, its audio tower by patches; no DropToken.

    Returns:
        rows {modality, input, patch, tokens, published_gflops, convention_gflops, true_gflops};
        published where the paper prints the same tower, clip and patch, else None.
    """
    base = preset(name, "released")
    published = {
        (row.config.video, row.config.frames, row.config.height): row.published_gflops
        for row in published_rows()
        if row.table == 6 and not row.drop_rate
    }
    rows = []
    for patch in VIDEO_PATCHES:
        for clip in CLIP_SIZES:
            config = with_input(base, clip=clip, video_patch=patch)
            known = patch == VIDEO_PATCHES[0]
            figure = published.get((base.video, *clip[:2])) if known else None
            rows.append(_input_row(config, "video", _times(clip), _times(patch), figure))
    for samples in AUDIO_PATCHES:
        if samples is None:
            config = with_input(base, audio_input="spectrogram")
            kind, size = f"log-mel, {config.mel_bins} bins", _times(config.spectrogram_patch)
        else:
            config, kind = with_input(base, audio_patch=samples), f"{base.samples} samples"
            size = str(samples)
        rows.append(_input_row(config, "audio", kind, size, None))
    return rows


def _input_row(
    config: VATTConfig, modality: str, clip: str, patch: str, published: float | None
) -> dict[str, Any]:
    one = (modality,)
    return {
        "modality": modality,
        "input": clip,
        "patch": patch,
        "tokens": patches_of(config, modality)[0] + 1,
        "published_gflops": published,
        "convention_gflops": convention_flops(config, 0.0, modalities=one, training=False) / 1e9,
        "true_gflops": sum(true_flops(config, modalities=one).values()) / 1e9,
    }


def _times(sizes: tuple[int, ...]) -> str:
    return "x".join(map(str, sizes))


# -- parameters ------------------------------------------------------------------------------------


def parameter_table() -> list[dict[str, Any]]:
    """The paper's Table 7 beside exact counts.

    Returns:
        rows {configuration, published_millions, millions, explanation}.
    """
    classes = 600
    rows = []
    for name, tower, published in (
        ("base", BASE, 87.9),
        ("medium", MEDIUM, 155.0),
        ("large", LARGE, 306.1),
    ):
        features = tower_parameters(_video(tower, 32, 224), "video")["tower"]
        count = features + classes * (tower.dim + 1)
        why = f"with a classifier of {classes} classes, which the paper's figure includes"
        rows.append(_parameter_row(f"video {name}", published, count, why))
    rows.append(_text_row(20.9))
    sums = {
        "base_base_small": (197, "the paper adds its rows 87.9 + 87.9 + 20.9"),
        "medium_base_small": (264, "the paper adds its rows 155.0 + 87.9 + 20.9"),
        "large_base_small": (415, "the paper adds its rows 306.1 + 87.9 + 20.9"),
        "agnostic_medium": (
            155,
            "the paper gives its video medium, with classifier and without the other modalities' "
            "parts",
        ),
    }
    for name, (total, why) in sums.items():
        parts = model_parameters(preset(name, "released"))
        listed = ", ".join(f"{part} {count / 1e6:.2f}" for part, count in parts.items())
        count = sum(parts.values()) - parts["word_table"]
        rows.append(
            _parameter_row(name, total, count, f"{listed} (table frozen, not in the sum); {why}")
        )
    return rows


def _text_row(published: float) -> dict[str, Any]:
    text = tower_parameters(preset("medium_base_small", "released"), "text")
    learned = tower_parameters(preset("medium_base_small", "paper"), "text")["word_table"]
    smaller = published - text["tower"] / 1e6
    why = (
        f"the released module, {smaller:.2f} M smaller than published; its word table "
        f"apart: {text['word_table'] / 1e6:.2f} M frozen in the release, {learned / 1e6:.2f} M "
        "learned in the paper's recipe"
    )
    return _parameter_row("text small", published, text["tower"], why)


def _parameter_row(name: str, published: float, count: int, explanation: str) -> dict[str, Any]:
    return {
        "configuration": name,
        "published_millions": published,
        "millions": count / 1e6,
        "explanation": explanation,
    }


# -- text ------------------------------------------------------------------------------------------


def format_tables() -> str:
    """All tables as markdown."""
    lines = [
        "| table | configuration | drop rate | published | convention | off by | true "
        "| true, drop first |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in flops_table():
        off = row["convention_gflops"] / row["published_gflops"] - 1
        lines.append(
            f"| {row['table']} | {row['configuration']} | {row['drop_rate']:.0%} "
            f"| {row['published_gflops']:.1f} | {row['convention_gflops']:.2f} | {off:+.3%} "
            f"| {row['true_gflops']:.1f} | {row['true_gflops_drop_first']:.1f} |"
        )
    lines += [
        "",
        "GFLOPs of one clip, forward. Convention: the paper's profiler counts (Q K^T not at all, "
        "element-wise operations once, all patches",
        "projected). True: 2 for every multiply-add of the matmuls, without norms, softmax, GELU, "
        "biases, positions and losses; drop first:",
        "only kept patches are projected. Table 1 prints 12 views of Table 6's 1252.3, which make "
        "15027.6, as 15.02 TFLOPs, and its other rows",
        "as low: hence its 0.05-0.06 %.",
        "",
        "| modality | input | patch | tokens | published | convention | true |",
        "|---|---|---|---|---|---|---|",
        *(_format_input(row) for row in input_table()),
        "",
        "GFLOPs of medium_base_small's towers by frames and patches, inference graph, no "
        "DropToken; published: the same rows of Table 6.",
        "",
        "| parameters | published (M) | exact (M) | explanation |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['configuration']} | {row['published_millions']:g} | {row['millions']:.3f} "
        f"| {row['explanation']} |"
        for row in parameter_table()
    ]
    return "\n".join(lines)


def _format_input(row: dict[str, Any]) -> str:
    published = "" if row["published_gflops"] is None else f"{row['published_gflops']:.1f}"
    return (
        f"| {row['modality']} | {row['input']} | {row['patch']} | {row['tokens']} | {published} "
        f"| {row['convention_gflops']:.1f} | {row['true_gflops']:.1f} |"
    )
