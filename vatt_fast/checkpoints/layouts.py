"""What model a released checkpoint holds, told from its shapes alone.

Three layouts are known, all below one root such as ``model/layer_with_weights-0/``:

    _base_layer/{vid,aud,txt}_backbone/...           pre-trained, modality-specific (tx_fac)
    _base_layer/unified_backbone/...                 pre-trained, modality-agnostic (ut_fac)
    _base/{voxel,wave}_to_patch/..., _ops/cls/...    one fine-tuned tower with its classifier

Sources: google-research/vatt, utils/train/restore.py for the towers' names, attributes in modeling/
for the others. What shapes don't tell is the release's default (configs/).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..config import (
    BASE,
    LARGE,
    MEDIUM,
    MODALITIES,
    RECIPES,
    SMALL,
    TowerConfig,
    VATTConfig,
)
from .names import (
    AXES,
    PROJECTIONS,
    SHORT,
    Places,
    Weight,
    agnostic_text,
    common_space,
    dense,
    encoder,
    patch_tokens,
    post_proj,
    t5_text,
)

# in the released code's configs (vit_xlarge), of no published file
_XLARGE = TowerConfig(depth=24, dim=1536, mlp_dim=4096, num_heads=24)
_PUBLISHED = {  # depth, dim, mlp_dim, width of q -> width of a head
    (t.depth, t.dim, t.mlp_dim, t.num_heads * t.head_dim): t.head_dim
    for t in (SMALL, BASE, MEDIUM, LARGE, _XLARGE)
}
_WIDTHS = {sizes[1:]: head_dim for sizes, head_dim in _PUBLISHED.items()}
_PARTS = ("_base_layer", "_head_layer", "_base", "_ops")

Shapes = dict[str, tuple[int, ...]]
HeadDim = int | Mapping[str, int]  # of all towers, or by modality


@dataclass(frozen=True)
class Layout:
    """A checkpoint's model: its sizes and where each weight belongs.

    ``root`` is what its keys begin with. ``modality`` and ``num_classes`` are those of a fine-tuned
    tower.
    """

    config: VATTConfig
    weights: list[Weight]
    root: str
    notes: tuple[str, ...] = ()
    modality: str | None = None
    num_classes: int | None = None

    def holds(self, key: str) -> bool:
        """Whether the key is of the model."""
        return key.startswith(self.root) if self.root else key.partition("/")[0] in _PARTS


class _Sizes:
    """Sizes by key; what they are read from must be there, whatever else is missing."""

    def __init__(self, shapes: Shapes, source: str, head_dim: HeadDim | None) -> None:
        self.shapes, self.source = shapes, source
        if head_dim is None or isinstance(head_dim, int):
            head_dim = {} if head_dim is None else dict.fromkeys(PROJECTIONS, head_dim)
        if unknown := set(head_dim) - set(PROJECTIONS):
            raise ValueError(f"head_dim names {', '.join(unknown)}; it is of video and audio")
        self.head_dims = head_dim
        self.notes: list[str] = []

    def has(self, key: str) -> bool:
        return key in self.shapes

    def of(self, key: str, rank: int) -> tuple[int, ...]:
        if key not in self.shapes:
            raise ValueError(f"{self.source} has no {key}, which tells sizes of the model")
        shape = self.shapes[key]
        if len(shape) != rank or min(shape) < 1:
            raise ValueError(
                f"{self.source}: {key} has shape {shape}; it must have {rank} sizes above 0"
            )
        return shape

    def depth(self, at: str) -> int:
        numbered = re.compile(re.escape(at) + r"/layers/(0|[1-9]\d*)/")
        layers = {int(found[1]) for key in self.shapes if (found := numbered.match(key))}
        if layers != set(range(len(layers))) or not layers:
            listed = ", ".join(map(str, sorted(layers)[:20])) or "none"
            raise ValueError(
                f"{self.source}: the layers of {at} are {listed}; they must be numbered from 0 "
                "without a gap"
            )
        return len(layers)

    def tower(self, at: str, modality: str) -> TowerConfig:
        """Of a video, audio or shared encoder."""
        dim, inner = self.of(f"{at}/layers/0/mha/q/kernel", 2)
        mlp_dim = self.of(f"{at}/layers/0/feed_forward/mlp/wi/kernel", 2)[1]
        depth = self.depth(at)
        head_dim = self.head_dims.get(modality)
        if head_dim is None:
            head_dim = self._head_dim(at, (depth, dim, mlp_dim, inner))
        if head_dim < 1 or inner % head_dim:
            raise self._untold(at, inner, f"no multiple of {head_dim}")
        return TowerConfig(depth, dim, mlp_dim, inner // head_dim, head_dim)

    def _head_dim(self, at: str, sizes: tuple[int, int, int, int]) -> int:
        """The published one; else the text tower's, else that of published widths, and a note."""
        if sizes in _PUBLISHED:
            return _PUBLISHED[sizes]
        inner, found, like = sizes[3], self._text_head_dim(), "in the text tower"
        if found is None:
            found, like = _WIDTHS.get(sizes[1:]), "in published towers of this width"
        if found is None:
            raise self._untold(at, inner, "of no published size, beside no text tower that tells")
        if inner % found == 0:
            self.notes.append(
                f"{at}: {inner // found} heads of {found}, as {like}; the shapes don't tell, "
                "convert --head-dim (head_dim) sets another size"
            )
        return found

    def _untold(self, at: str, inner: int, why: str) -> ValueError:
        return ValueError(
            f"{self.source}: the heads of {at} cannot be told, q is {inner} wide, {why}; give the "
            f"size of a head: convert --head-dim N, in Python head_dim=N, where N divides {inner}"
        )

    def _text_head_dim(self) -> int | None:
        """The table of relative positions has a column a head."""
        for key, shape in self.shapes.items():
            if key.endswith("/relative_attention_bias/embeddings") and len(shape) == 2:
                layer = key.removesuffix("/relative_attention_bias/embeddings")
                return self.of(f"{layer}/q/kernel", 2)[1] // max(shape[1], 1) or None
        return None

    def relative_buckets(self, key: str) -> int:
        """Half of them are of keys after the query, and half of these of single distances."""
        buckets, most = self.of(key, 2)[0], 4 * VATTConfig().relative_max_distance
        if not 4 <= buckets < most:
            raise ValueError(
                f"{self.source}: {key} has {buckets} rows; relative positions take 4 to {most - 1}"
            )
        return buckets

    def t5_tower(self, at: str) -> TowerConfig:
        attention = f"{at}/layers/0/self_attention/attention"
        dim, inner = self.of(f"{attention}/q/kernel", 2)
        heads = self.of(f"{attention}/relative_attention_bias/embeddings", 2)[1]
        if inner % heads:
            raise ValueError(
                f"{self.source}: {attention} has {heads} heads, which do not divide {inner}"
            )
        mlp_dim = self.of(f"{at}/layers/0/feed_forward/mlp/wi/kernel", 2)[1]
        return TowerConfig(self.depth(at), dim, mlp_dim, heads, inner // heads)


def layout_of(
    shapes: Shapes,
    *,
    head_dim: HeadDim | None = None,
    num_words: int | None = None,
    source: str = "it",
) -> Layout:
    """The model that these shapes belong to.

    Args:
        shapes: by key without ``/.ATTRIBUTES/VARIABLE_VALUE``, of weights only.
        head_dim: see ``read_released``.
        num_words: rows of the word table, where it is not in the checkpoint.
        source: names the checkpoint in errors.

    Raises:
        ValueError: no known layout, or sizes that cannot be told.
    """
    sizes = _Sizes(shapes, source, head_dim)
    for key in sorted(shapes):
        if found := re.match(r"((?:.*/)?)_base_layer/(unified|vid|aud|txt)_backbone/", key):
            read = _agnostic if found[2] == "unified" else _specific
            return read(sizes, found[1], num_words)
        if found := re.match(r"((?:.*/)?)_base/(\w+)/kernel$", key):
            if found[2] in PROJECTIONS.values():
                return _fine_tuned(sizes, found[1], found[2])
            if found[2] == "spectrum_to_patch":
                raise ValueError(
                    f"{source} is a spectrogram tower (spt), which has no model here; only "
                    "waveform towers (wat) have"
                )
    some = ", ".join(sorted(shapes)[:3]) or "no weights at all"
    raise ValueError(f"{source} holds no VATT that is known here: {some}")


def _specific(sizes: _Sizes, root: str, num_words: int | None) -> Layout:
    at = {m: f"{root}_base_layer/{SHORT[m]}_backbone" for m in MODALITIES}
    lm, projection = f"{at['text']}/base_lm", f"{at['text']}/pre_proj/kernel"
    places = {m: Places.of_tower(f"{at[m]}/_base", m) for m in PROJECTIONS}
    bias = f"{lm}/layers/0/self_attention/attention/relative_attention_bias/embeddings"
    text, heads = sizes.t5_tower(lm), _heads_of(sizes, root)
    config = _config(
        video=sizes.tower(f"{at['video']}/_base/tx", "video"),
        audio=sizes.tower(f"{at['audio']}/_base/tx", "audio"),
        text=text,
        relative_buckets=sizes.relative_buckets(bias),
        # without a projection the words have the tower's width, as in the paper
        word_dim=sizes.of(projection, 2)[0] if sizes.has(projection) else None,
        vocab_size=_vocab_size(sizes, f"{at['text']}/embedding/embeddings", num_words),
        **_video_size(sizes, places["video"]),
        **_audio_size(sizes, places["audio"]),
        **_spaces(sizes, heads),
    )
    weights = [
        *patch_tokens(config, "video", places["video"]),
        *encoder(f"{at['video']}/_base/tx", "video_encoder", config.video),
        *patch_tokens(config, "audio", places["audio"]),
        *encoder(f"{at['audio']}/_base/tx", "audio_encoder", config.audio),
        *t5_text(config, at["text"]),
        *common_space(config, heads),
    ]
    return Layout(config, weights, root, tuple(sizes.notes))


def _agnostic(sizes: _Sizes, root: str, num_words: int | None) -> Layout:
    at = f"{root}_base_layer/unified_backbone/unified_transformer"
    places = {m: Places.of_trunk(at, m) for m in MODALITIES}
    trunk, heads = sizes.tower(f"{at}/tx", "video"), _heads_of(sizes, root)
    config = _config(
        kind="modality_agnostic",
        video=trunk,
        audio=trunk,
        text=trunk,
        words=sizes.of(places["text"].table("temporal"), 2)[0],
        word_dim=sizes.of(f"{places['text'].pre_proj}/kernel", 2)[0],
        vocab_size=_vocab_size(sizes, f"{places['text'].project}/embeddings", num_words),
        post_proj_dim=_post_proj_dim(sizes, f"{at}/post_proj/video", trunk),
        **_video_size(sizes, places["video"]),
        **_audio_size(sizes, places["audio"]),
        **_spaces(sizes, heads),
    )
    weights = [
        *patch_tokens(config, "video", places["video"]),
        *patch_tokens(config, "audio", places["audio"]),
        *agnostic_text(config, places["text"]),
        *encoder(f"{at}/tx", "trunk", trunk),
        *(w for m in MODALITIES for w in post_proj(config, f"{at}/post_proj/{m}", m)),
        *common_space(config, heads),
    ]
    return Layout(config, weights, root, tuple(sizes.notes))


def _fine_tuned(sizes: _Sizes, root: str, projection: str) -> Layout:
    modality = next(m for m, name in PROJECTIONS.items() if name == projection)
    at = f"{root}_base"
    agnostic = sizes.has(f"{at}/pre_proj/kernel")
    places = Places.of_tower(at, modality, pre_proj=agnostic)
    tower = sizes.tower(f"{at}/tx", modality)
    found: dict[str, Any] = {modality: tower}
    if agnostic:
        found = dict.fromkeys(MODALITIES, tower) | {
            "kind": "modality_agnostic",
            "post_proj_dim": _post_proj_dim(sizes, f"{at}/post_proj", tower),
        }
    # 32 frames of 25 per second, every other one; 6.4 s of 24 kHz (paper, section 4)
    if modality == "video":
        found |= {"frames_per_second": 12.5, **_video_size(sizes, places)}
    else:
        found |= {"sample_rate_hz": 24000, **_audio_size(sizes, places)}
    config = _config(**found)
    classifier = _classifier_of(sizes, at)
    num_classes = sizes.of(f"{classifier}/kernel", 2)[1]
    weights = [
        *patch_tokens(config, modality, places),
        *encoder(f"{at}/tx", "trunk" if agnostic else f"{modality}_encoder", tower),
        *(post_proj(config, f"{at}/post_proj", modality) if agnostic else ()),
        *dense(classifier, "classifier", config.pooled_dim(modality), num_classes, bias=True),
    ]
    return Layout(config, weights, root, tuple(sizes.notes), modality, num_classes)


def _config(**found: Any) -> VATTConfig:
    """The released code's choices, and what was found."""
    return VATTConfig(**RECIPES["released"] | found)


def _vocab_size(sizes: _Sizes, table: str, num_words: int | None) -> int:
    return sizes.of(table, 2)[0] if sizes.has(table) else num_words or VATTConfig().vocab_size


def _post_proj_dim(sizes: _Sizes, at: str, trunk: TowerConfig) -> int | None:
    width = sizes.of(f"{at}/kernel", 2)[1]
    return None if width == trunk.dim else width


def _video_size(sizes: _Sizes, places: Places) -> dict[str, Any]:
    patch = sizes.of(f"{places.project}/kernel", 5)[:3]
    grid = [sizes.of(places.table(axis), 2)[0] for axis in AXES["video"]]
    frames, height, width = (n * p for n, p in zip(grid, patch, strict=True))
    return dict(video_patch=patch, frames=frames, height=height, width=width)


def _audio_size(sizes: _Sizes, places: Places) -> dict[str, Any]:
    patch = sizes.of(f"{places.project}/kernel", 3)[0]
    return dict(audio_patch=patch, samples=patch * sizes.of(places.table("temporal"), 2)[0])


def _heads_of(sizes: _Sizes, root: str) -> str:
    """Where the common spaces lie, told from one of their names: the way there is not published."""
    name = "/hid_to_va/dense/kernel"
    found = sorted(key for key in sizes.shapes if key.startswith(root) and key.endswith(name))
    return found[0].removesuffix(name) if found else f"{root}_head_layer/_bridge_heads/0"


def _classifier_of(sizes: _Sizes, tower: str) -> str:
    """The one product outside the tower; ``_ops/cls`` in the released code."""
    found = [
        key for key in sizes.shapes if key.endswith("/kernel") and not key.startswith(f"{tower}/")
    ]
    if len(found) != 1:
        some = ", ".join(sorted(found)[:3]) or "none"
        raise ValueError(
            f"{sizes.source} is a fine-tuned tower and must have one classifier beside {tower}:"
            f" there is {some}"
        )
    return found[0].removesuffix("/kernel")


def _spaces(sizes: _Sizes, at: str) -> dict[str, int]:
    return dict(
        d_va=sizes.of(f"{at}/hid_to_va/dense/kernel", 2)[1],
        d_vt=sizes.of(f"{at}/va_to_vat/dense/kernel", 2)[1],
    )
