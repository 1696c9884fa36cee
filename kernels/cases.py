"""Named cases of the four ops, their numbers written out: tests and benchmarks read them here.

``parity``: small and ragged, run on every backend. ``primary``: the sizes the presets train and
test with, at four drop rates, 224 and 320 pixels. A primary case names the presets it comes from;
a test compares its numbers with them, because this package imports nothing of the model. For
another batch: ``dataclasses.replace(case, batch=...)``.
"""

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .drop_token import num_kept, sample_keep

Tag = Literal["parity", "primary"]

# B batch, T queries, S keys, H heads, N patches, K kept, k values a patch, M clips of x, P texts a
# clip


@dataclass(frozen=True)
class Origin:
    """Where a primary case's numbers come from.

    Presets by short name, modality, drop rate and, for video, the clip's side in pixels.
    """

    presets: tuple[str, ...]
    modality: Literal["video", "audio", "text"]
    drop_rate: float = 0.0
    pixels: int | None = None


@dataclass(frozen=True)
class AttentionCase:
    """q (B, T, H, head_dim) against S keys.

    ``num_keys``: keys each clip may attend, repeated over the batch; 0 is a clip without any.
    """

    name: str
    batch: int
    queries: int
    keys: int
    heads: int
    head_dim: int
    bias: bool = False
    num_keys: tuple[int, ...] | None = None  # None: no key_mask
    causal: bool = False
    packed: bool = False  # q, k, v are slices of one (B, T, 3, H, head_dim)
    scale: float | None = None  # None: head_dim ** -0.5
    origin: Origin | None = None


@dataclass(frozen=True)
class DropTokenCase:
    """tokens (B, N, dim), K of them kept, the same for all clips or drawn per clip."""

    name: str
    batch: int
    tokens: int
    kept: int
    dim: int
    per: Literal["batch", "clip"] = "batch"
    origin: Origin | None = None


@dataclass(frozen=True)
class NCECase:
    """x holds M clips from ``first`` on, y the P texts of each of N clips, and ``extra`` more.

    ``*_invalid`` are indices taken out.
    """

    name: str
    batch: int  # M
    clips: int  # N
    texts_per_clip: int
    dim: int
    first: int = 0
    x_invalid: tuple[int, ...] | None = None
    y_invalid: tuple[int, ...] | None = None
    bound: bool = False  # give the scale's cap as the bound, as losses.py does
    scale: float = 1 / 0.07
    exclude_own: bool = False
    extra: int = 0
    origin: Origin | None = None


@dataclass(frozen=True)
class PatchEmbedCase:
    """Patches (B, N, values) -> dim, or with ``clip`` the clip's shape cut by ``patch``.

    ``kept`` None keeps all. ``levels`` is the span of raw values drawn, for uint8 out of 0 .. 255;
    float patches span -1 .. 1.
    """

    name: str
    batch: int
    patches: int
    values: int
    dim: int
    kept: int | None = None
    per: Literal["batch", "clip"] = "batch"
    gathered: bool = False
    clip: tuple[int, ...] | None = None  # (T, H, W, C) or (S,)
    patch: tuple[int, ...] | None = None
    patch_dtype: torch.dtype | None = torch.uint8  # None: the compute dtype
    levels: tuple[int, int] = (0, 255)
    scale: float = 2 / 255
    shift: float = -1.0
    position: bool = True
    agg: bool = True
    origin: Origin | None = None


Case = AttentionCase | DropTokenCase | NCECase | PatchEmbedCase


def tag(case: Case) -> Tag:
    """primary: a preset's own size; parity: small and ragged."""
    return "primary" if case.origin else "parity"


# -- the presets' numbers ----------------------------------------------------------------------

# patches kept at each drop rate; AGG is one token more
_VIDEO_224 = {0.0: 1568, 0.25: 1176, 0.5: 784, 0.75: 392}
_VIDEO_320 = {0.0: 3200, 0.25: 2400, 0.5: 1600, 0.75: 800}
_AUDIO = {0.0: 1200, 0.25: 900, 0.5: 600, 0.75: 300}
_VIDEO_TINY = {0.0: 256, 0.25: 192, 0.5: 128, 0.75: 64}
_AUDIO_TINY = {0.0: 200, 0.25: 150, 0.5: 100, 0.75: 50}

# name, presets, modality, pixels, kept, batch, heads, head_dim, dim, values a patch
_TOWERS: tuple[
    tuple[str, tuple[str, ...], Any, int | None, dict[float, int], int, int, int, int, int], ...
] = (
    ("video_bbs", ("bbs",), "video", 224, _VIDEO_224, 8, 12, 64, 768, 3072),
    ("video_mbs", ("mbs", "lbs", "ma"), "video", 224, _VIDEO_224, 8, 16, 64, 1024, 3072),
    ("video_bbs_320", ("bbs",), "video", 320, _VIDEO_320, 4, 12, 64, 768, 3072),
    ("video_mbs_320", ("mbs", "lbs", "ma"), "video", 320, _VIDEO_320, 4, 16, 64, 1024, 3072),
    ("video_tiny", ("tiny",), "video", 64, _VIDEO_TINY, 32, 4, 32, 128, 768),
    ("audio_bbs", ("bbs", "mbs", "lbs"), "audio", None, _AUDIO, 8, 12, 64, 768, 128),
    ("audio_ma", ("ma",), "audio", None, _AUDIO, 8, 16, 64, 1024, 128),
    ("audio_tiny", ("tiny",), "audio", None, _AUDIO_TINY, 32, 4, 32, 128, 128),
)
_WORDS_AND_AGG = 17
# keys of the five texts of a clip: words and AGG, one of them all padding
_SENTENCES = (17, 9, 4, 1, 12)


def _name(tower: str, drop_rate: float) -> str:
    return f"{tower}_drop{round(100 * drop_rate)}"


ATTENTION: tuple[AttentionCase, ...] = (
    AttentionCase("one_query", 2, 1, 37, 2, 64),  # the last block for AGG alone
    AttentionCase("one_key", 2, 5, 1, 2, 16),
    AttentionCase("one_query_one_key", 1, 1, 1, 1, 8),
    AttentionCase("ragged_17", 2, 17, 17, 3, 16),
    AttentionCase("ragged_37_by_70", 2, 37, 70, 2, 40),
    AttentionCase("ragged_70_by_37", 1, 70, 37, 2, 24),
    AttentionCase("past_a_tile", 1, 65, 129, 2, 64),
    AttentionCase("packed", 2, 65, 65, 3, 32, packed=True),
    AttentionCase("head_dim_8", 2, 33, 33, 2, 8, packed=True),
    AttentionCase("head_dim_128", 1, 33, 19, 2, 128),
    # scores far from 0: the maximum must be subtracted
    AttentionCase("sharp", 2, 19, 45, 2, 16, scale=2.0),
    AttentionCase(
        "text", 5, 17, 17, 2, 32, bias=True, num_keys=_SENTENCES, packed=True, scale=32**-0.5
    ),
    AttentionCase("text_one_query", 5, 1, 17, 2, 32, bias=True, num_keys=_SENTENCES),
    AttentionCase("bias", 2, 21, 35, 3, 16, bias=True),
    AttentionCase("keyless", 4, 21, 35, 2, 16, num_keys=(35, 0, 2, 13)),
    AttentionCase("keyless_bias", 3, 17, 17, 2, 16, bias=True, num_keys=(0, 17, 5)),
    AttentionCase("causal", 2, 70, 70, 2, 32, causal=True, packed=True),
    AttentionCase("causal_bias", 2, 35, 35, 3, 16, bias=True, causal=True),
    AttentionCase("causal_padded", 3, 21, 21, 2, 16, num_keys=(21, 13, 1), causal=True),
    AttentionCase("causal_bias_keyless", 3, 17, 17, 2, 16, True, num_keys=(17, 0, 5), causal=True),
    AttentionCase("all_keyless", 2, 9, 11, 2, 16, num_keys=(0,)),
    *(
        AttentionCase(
            _name(name, drop_rate),
            batch,
            kept + 1,
            kept + 1,
            heads,
            head_dim,
            packed=True,
            origin=Origin(presets, modality, drop_rate, pixels),
        )
        for name, presets, modality, pixels, kept_at, batch, heads, head_dim, _, _ in _TOWERS
        for drop_rate, kept in kept_at.items()
    ),
    AttentionCase(
        "video_mbs_drop50_agg",
        8,
        1,
        785,
        16,
        64,
        origin=Origin(("mbs", "lbs", "ma"), "video", 0.5, 224),
    ),
    AttentionCase(
        "audio_bbs_drop50_agg",
        8,
        1,
        601,
        12,
        64,
        origin=Origin(("bbs", "mbs", "lbs"), "audio", 0.5),
    ),
    *(
        AttentionCase(
            name,
            batch,
            _WORDS_AND_AGG,
            _WORDS_AND_AGG,
            heads,
            head_dim,
            bias=t5,
            num_keys=_SENTENCES,
            packed=True,
            scale=1.0 if t5 else None,
            origin=Origin(presets, "text"),
        )
        for name, presets, batch, heads, head_dim, t5 in (
            ("text_bbs", ("bbs", "mbs", "lbs"), 40, 8, 64, True),
            ("text_ma", ("ma",), 40, 16, 64, False),
            ("text_tiny", ("tiny",), 160, 4, 32, True),
        )
    ),
)

DROP_TOKEN: tuple[DropTokenCase, ...] = (
    DropTokenCase("one_of_one", 1, 1, 1, 8),
    DropTokenCase("ragged", 3, 37, 19, 24),
    DropTokenCase("ragged_per_clip", 3, 37, 19, 24, per="clip"),
    DropTokenCase("all_kept", 2, 17, 17, 16),
    DropTokenCase("one_kept", 2, 17, 1, 16, per="clip"),
    *(
        DropTokenCase(
            _name(name, drop_rate) + ("_per_clip" if per == "clip" else ""),
            batch,
            kept_at[0.0],
            kept,
            dim,
            per,
            origin=Origin(presets, modality, drop_rate, pixels),
        )
        for name, presets, modality, pixels, kept_at, batch, _, _, dim, _ in _TOWERS
        for drop_rate, kept in kept_at.items()
        for per in (("batch", "clip") if drop_rate == 0.5 else ("batch",))
    ),
)

_ALL = ("bbs", "mbs", "lbs", "ma")

NCE: tuple[NCECase, ...] = (
    NCECase("one_pair", 1, 1, 1, 8),
    NCECase("square", 17, 17, 1, 24),
    NCECase("texts", 13, 13, 5, 32),
    NCECase("texts_bounded", 13, 13, 5, 32, bound=True),
    NCECase("shard", 5, 13, 3, 40, first=4),
    NCECase(
        "shard_masked",
        6,
        19,
        2,
        16,
        first=13,
        x_invalid=(0, 5),
        y_invalid=(0, 26, 27, 31),
        bound=True,
    ),
    NCECase("past_a_tile", 37, 67, 1, 64, first=30),
    # clip 2 is left without a text
    NCECase("masked", 11, 11, 3, 16, x_invalid=(2, 10), y_invalid=(0, 6, 7, 8, 32)),
    NCECase("no_valid_x", 5, 5, 2, 16, x_invalid=(0, 1, 2, 3, 4)),
    NCECase("no_valid_y", 5, 5, 2, 16, y_invalid=tuple(range(10))),
    NCECase(
        "nothing_valid",
        3,
        7,
        1,
        16,
        first=2,
        x_invalid=(0, 1, 2),
        y_invalid=tuple(range(7)),
        bound=True,
    ),
    NCECase("flat", 9, 9, 2, 16, scale=1.0),
    NCECase("extra", 7, 11, 2, 16, first=3, extra=6),
    NCECase("extra_masked", 9, 9, 1, 16, x_invalid=(3,), y_invalid=(1, 9, 13), extra=5),
    NCECase("others", 13, 13, 5, 32, exclude_own=True),
    # without a text of others: rows and columns are empty
    NCECase("others_of_one", 1, 1, 2, 16, exclude_own=True),
    NCECase(
        "others_shard",
        *(6, 19, 2, 16),
        first=13,
        x_invalid=(0, 5),
        y_invalid=(0, 26, 27, 31),
        bound=True,
        exclude_own=True,
        extra=3,
    ),
    NCECase(
        "others_past_a_block", 10, 10, 64, 32, x_invalid=(7,), scale=4.0, exclude_own=True, extra=1
    ),
    # the first two are of one of 8 devices
    NCECase("va_bbs", 256, 2048, 1, 512, first=512, bound=True, origin=Origin(_ALL, "audio")),
    NCECase("vt_bbs", 256, 2048, 5, 256, first=512, bound=True, origin=Origin(_ALL, "text")),
    NCECase("va_bbs_one_device", 2048, 2048, 1, 512, bound=True, origin=Origin(_ALL, "audio")),
    NCECase("vt_bbs_one_device", 2048, 2048, 5, 256, bound=True, origin=Origin(_ALL, "text")),
    NCECase("va_tiny", 32, 32, 1, 64, bound=True, origin=Origin(("tiny",), "audio")),
    NCECase("vt_tiny", 32, 32, 5, 64, bound=True, origin=Origin(("tiny",), "text")),
)

_UNIT: dict[str, Any] = dict(scale=1.0, shift=0.0)  # float values arrive normalised

PATCH_EMBED: tuple[PatchEmbedCase, ...] = (
    PatchEmbedCase("one_patch", 1, 1, 12, 8),
    PatchEmbedCase("all_rows", 2, 17, 48, 24),
    PatchEmbedCase("kept_rows", 3, 37, 96, 40, kept=19),
    PatchEmbedCase("kept_per_clip", 3, 37, 96, 40, kept=19, per="clip"),
    PatchEmbedCase("gathered", 2, 37, 96, 40, kept=19, gathered=True),
    PatchEmbedCase("gathered_per_clip", 3, 21, 33, 17, kept=5, per="clip", gathered=True),
    PatchEmbedCase("no_position", 2, 17, 48, 24, kept=9, position=False),
    PatchEmbedCase("no_agg", 2, 17, 48, 24, kept=9, agg=False),
    # the agnostic order
    PatchEmbedCase("only_projected", 2, 17, 48, 24, kept=9, per="clip", position=False, agg=False),
    PatchEmbedCase("dark", 2, 17, 192, 24, kept=9, levels=(0, 12)),
    # without a centre, what the fold adds it takes away again
    PatchEmbedCase("grey", 2, 17, 192, 24, kept=9, levels=(118, 138)),
    PatchEmbedCase("bright", 2, 17, 192, 24, levels=(240, 255)),
    PatchEmbedCase(
        "odd_clip", 2, 2 * 3 * 3, 2 * 4 * 4 * 3, 16, kept=7, clip=(3, 9, 11, 3), patch=(2, 4, 4)
    ),
    PatchEmbedCase(
        "clip_per_clip",
        2,
        2 * 2 * 3,
        2 * 4 * 4 * 3,
        16,
        kept=5,
        per="clip",
        clip=(4, 8, 12, 3),
        patch=(2, 4, 4),
    ),
    PatchEmbedCase(
        "float_clip",
        2,
        2 * 3 * 3,
        96,
        16,
        kept=7,
        clip=(3, 9, 11, 3),
        patch=(2, 4, 4),
        patch_dtype=None,
        **_UNIT,
    ),
    PatchEmbedCase(
        "waveform",
        2,
        19,
        16,
        24,
        kept=10,
        clip=(297,),
        patch=(16,),
        patch_dtype=torch.float32,
        **_UNIT,
    ),
    PatchEmbedCase(
        "fp32_rows", 2, 21, 33, 17, kept=9, patch_dtype=torch.float32, scale=0.5, shift=0.25
    ),
    PatchEmbedCase(
        "bf16_rows",
        2,
        21,
        40,
        24,
        kept=9,
        per="clip",
        patch_dtype=torch.bfloat16,
        scale=0.5,
        shift=0.25,
    ),
    PatchEmbedCase(
        "float_gathered", 2, 21, 40, 24, kept=9, gathered=True, patch_dtype=None, **_UNIT
    ),
    *(
        PatchEmbedCase(
            _name(name, drop_rate),
            batch,
            kept_at[0.0],
            values,
            dim,
            kept=kept if drop_rate else None,
            patch_dtype=torch.uint8 if modality == "video" else torch.float32,
            origin=Origin(presets, modality, drop_rate, pixels),
            **({} if modality == "video" else _UNIT),
        )
        for name, presets, modality, pixels, kept_at, batch, _, _, dim, values in _TOWERS
        for drop_rate, kept in kept_at.items()
    ),
)

CASES: dict[str, dict[str, Case]] = {
    op: {case.name: case for case in cases}
    for op, cases in (
        ("attention", ATTENTION),
        ("drop_token", DROP_TOKEN),
        ("contrastive_lse", NCE),
        ("patch_embed", PATCH_EMBED),
    )
}


# -- inputs ------------------------------------------------------------------------------------


def make(
    case: Case,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> dict[str, Any]:
    """Fresh random inputs of a case: the keyword arguments of its op, absent ones None.

    They are never zeros, and none needs a gradient.

    Args:
        dtype: the compute dtype. What an op keeps wider stays so: a float patch of its own dtype,
            the scale of contrastive_lse.
        device: where they go; they are drawn on the host, so that every device gets the same.
        seed: of the draw.
    """
    draw = _Draw(dtype, seed)
    inputs = _MAKERS[type(case)](case, draw)
    if torch.device(device).type == "cpu":
        return inputs
    if getattr(case, "packed", False):  # moved as one, so that the strides stay
        qkv = draw.packed.to(device)
        inputs |= dict(zip("qkv", qkv.unbind(2), strict=True))
    return {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }


class _Draw:
    """Random tensors of one case."""

    packed: Tensor

    def __init__(self, dtype: torch.dtype, seed: int):
        self.dtype, self.seed, self.generator = dtype, seed, torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, std: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * std).to(self.dtype)

    def integers(self, low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high + 1, shape, generator=self.generator)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator) * 2 - 1

    def unit(self, *shape: int) -> Tensor:
        return torch.nn.functional.normalize(
            torch.randn(shape, generator=self.generator), dim=-1
        ).to(self.dtype)

    def keep(self, count: int, kept: int, per: str, batch: int) -> Tensor:
        drop_rate = (count - kept) / count
        assert num_kept(count, drop_rate) == kept
        indices = sample_keep(
            count, drop_rate, seed=self.seed, step=0, stream="cases", per=per, batch=batch
        )
        return torch.from_numpy(indices)


def _make_attention(case: AttentionCase, draw: _Draw) -> dict[str, Any]:
    B, T, S, H, D = case.batch, case.queries, case.keys, case.heads, case.head_dim
    if case.packed:
        draw.packed = draw.normal(B, T, 3, H, D)
        q, k, v = draw.packed.unbind(2)
    else:
        q, k, v = draw.normal(B, T, H, D), draw.normal(B, S, H, D), draw.normal(B, S, H, D)
    key_mask = None
    if case.num_keys is not None:
        counts = torch.tensor([case.num_keys[i % len(case.num_keys)] for i in range(B)])
        key_mask = torch.arange(S) < counts[:, None]
    bias = draw.normal(H, T, S) if case.bias else None
    return dict(
        q=q,
        k=k,
        v=v,
        scale=D**-0.5 if case.scale is None else case.scale,
        bias=bias,
        key_mask=key_mask,
        **({"causal": True} if case.causal else {}),  # what few cases have is given where it is
    )


def _make_drop_token(case: DropTokenCase, draw: _Draw) -> dict[str, Any]:
    keep = draw.keep(case.tokens, case.kept, case.per, case.batch)
    return dict(tokens=draw.normal(case.batch, case.tokens, case.dim), keep=keep)


def _make_nce(case: NCECase, draw: _Draw) -> dict[str, Any]:
    texts = case.clips * case.texts_per_clip + case.extra
    x, y = draw.unit(case.batch, case.dim), draw.unit(texts, case.dim)
    valid = {}
    for name, count, invalid in (
        ("x_valid", x.shape[0], case.x_invalid),
        ("y_valid", y.shape[0], case.y_invalid),
    ):
        valid[name] = (
            None
            if invalid is None
            else torch.ones(count, dtype=torch.bool).index_fill(0, torch.tensor(invalid), False)
        )
    scale = torch.tensor(case.scale, dtype=torch.promote_types(draw.dtype, torch.float32))
    bound = 1.02 * case.scale if case.bound else None
    return dict(
        x=x,
        y=y,
        scale=scale,
        texts_per_clip=case.texts_per_clip,
        first=case.first,
        bound=bound,
        **valid,
        **({"exclude_own": True} if case.exclude_own else {}),
        **({"extra_texts": case.extra} if case.extra else {}),
    )


def _make_patch_embed(case: PatchEmbedCase, draw: _Draw) -> dict[str, Any]:
    rows = case.kept if case.gathered and case.kept else case.patches
    shape = (case.batch, *case.clip) if case.clip else (case.batch, rows, case.values)
    if case.patch_dtype == torch.uint8:
        patches = draw.integers(*case.levels, shape).to(torch.uint8)
    else:
        patches = draw.uniform(*shape).to(case.patch_dtype or draw.dtype)
    keep = None if case.kept is None else draw.keep(case.patches, case.kept, case.per, case.batch)
    return dict(
        patches=patches,
        weight=draw.normal(case.dim, case.values, std=case.values**-0.5),
        bias=draw.normal(case.dim, std=0.1),
        position=draw.normal(case.patches, case.dim) if case.position else None,
        keep=keep,
        scale=case.scale,
        shift=case.shift,
        agg=draw.normal(case.dim) if case.agg else None,
        patch=case.patch,
        gathered=case.gathered,
    )


_MAKERS: dict[type, Any] = {
    AttentionCase: _make_attention,
    DropTokenCase: _make_drop_token,
    NCECase: _make_nce,
    PatchEmbedCase: _make_patch_embed,
}
