"""Which key of the released checkpoints belongs to which weight of ours, part by part.

Every function gives the weights of one part, from where it lies in the checkpoint (``at``) and its
sizes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from ..config import MODALITIES, TowerConfig, VATTConfig

WORD_TABLE = "text_tokens.table.weight"
SHORT = {"video": "vid", "audio": "aud", "text": "txt"}
AXES = {
    "video": ("temporal", "vertical", "horizontal"),
    "audio": ("temporal",),
    "text": ("temporal",),
}
PROJECTIONS = {"video": "voxel_to_patch", "audio": "wave_to_patch"}
_LEAVES = {  # of a norm
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


@dataclass(frozen=True)
class Weight:
    """A key of the checkpoint, its shape there, and our name.

    Kernels are (..., inputs, outputs) there and (outputs, inputs) here. q, k and v are one weight
    here; ``part`` says which third this is.
    """

    key: str
    shape: tuple[int, ...]
    name: str
    part: int | None = None


@dataclass(frozen=True)
class Places:
    """Where a modality's way into its encoder lies."""

    project: str
    position: str
    agg: str
    pre_proj: str | None

    @classmethod
    def of_tower(cls, at: str, modality: str, *, pre_proj: bool = False) -> "Places":
        return cls(
            project=f"{at}/{PROJECTIONS[modality]}",
            position=f"{at}/pos_embedding_lookup",
            agg=f"{at}/agg_embedding",
            pre_proj=f"{at}/pre_proj" if pre_proj else None,
        )

    @classmethod
    def of_trunk(cls, at: str, modality: str) -> "Places":
        return cls(
            project=f"{at}/raw_to_embeddings/{modality}",
            position=f"{at}/pos_embedding_lookup/{modality}",
            agg=f"{at}/{SHORT[modality]}_agg_embedding",
            pre_proj=f"{at}/pre_proj/{modality}",
        )

    def table(self, axis: str) -> str:
        return f"{self.position}/{axis}_position_embeddings/embeddings"


def patch_tokens(config: VATTConfig, modality: str, places: Places) -> Iterator[Weight]:
    ours, dim = f"{modality}_tokens", getattr(config, modality).dim
    shape: tuple[int, ...] = (config.audio_patch, 1, dim)
    grid: tuple[int, ...] = (config.num_audio_patches,)
    if modality == "video":
        shape, grid = (*config.video_patch, 3, dim), config.video_grid
    yield Weight(f"{places.project}/kernel", shape, f"{ours}.project.weight")
    yield Weight(f"{places.project}/bias", (dim,), f"{ours}.project.bias")
    yield Weight(places.agg, (dim,), f"{ours}.agg")
    yield from _positions(places, ours, AXES[modality], grid, dim)
    if places.pre_proj is not None:
        yield from dense(places.pre_proj, f"{ours}.pre_proj", dim, dim, bias=True)


def _positions(
    places: Places, ours: str, axes: tuple[str, ...], grid: tuple[int, ...], dim: int
) -> Iterator[Weight]:
    for i, (axis, length) in enumerate(zip(axes, grid, strict=True)):
        yield Weight(places.table(axis), (length, dim), f"{ours}.position.tables.{i}")
    yield from _vectors(f"{places.position}/layernorm", f"{ours}.position.norm", dim)


def encoder(at: str, ours: str, tower: TowerConfig) -> Iterator[Weight]:
    dim, inner, mlp_dim = tower.dim, tower.num_heads * tower.head_dim, tower.mlp_dim
    for i in range(tower.depth):
        layer, block = f"{at}/layers/{i}", f"{ours}.blocks.{i}"
        yield from _vectors(f"{layer}/layer_norm", f"{block}.attention_norm", dim)
        yield from _attention(f"{layer}/mha", block, dim, inner, bias=True)
        yield from _vectors(f"{layer}/feed_forward/layer_norm", f"{block}.mlp_norm", dim)
        mlp = f"{layer}/feed_forward/mlp"
        yield from dense(f"{mlp}/wi", f"{block}.mlp_in", dim, mlp_dim, bias=True)
        yield from dense(f"{mlp}/wo", f"{block}.mlp_out", mlp_dim, dim, bias=True)
    yield from _vectors(f"{at}/final_layer_norm", f"{ours}.norm", dim)


def t5_text(config: VATTConfig, at: str) -> Iterator[Weight]:
    tower, ours = config.text, "text_encoder"
    dim, inner, mlp_dim = tower.dim, tower.num_heads * tower.head_dim, tower.mlp_dim
    word_dim = config.word_dim or dim
    yield Weight(f"{at}/embedding/embeddings", (config.vocab_size, word_dim), WORD_TABLE)
    yield Weight(f"{at}/agg_embedding", (word_dim,), "text_tokens.agg")
    if config.word_dim is not None:
        yield from dense(f"{at}/pre_proj", "text_tokens.pre_proj", word_dim, dim, bias=False)
    for i in range(tower.depth):
        layer, block = f"{at}/base_lm/layers/{i}", f"{ours}.blocks.{i}"
        heads, mlp = f"{layer}/self_attention", f"{layer}/feed_forward/mlp"
        yield Weight(f"{heads}/layer_norm/weight", (dim,), f"{block}.attention_norm.weight")
        yield from _attention(f"{heads}/attention", block, dim, inner, bias=False)
        yield from _vectors(f"{layer}/feed_forward/layer_norm", f"{block}.mlp_norm", dim)
        yield from dense(f"{mlp}/wi", f"{block}.mlp_in", dim, mlp_dim, bias=False)
        yield from dense(f"{mlp}/wo", f"{block}.mlp_out", mlp_dim, dim, bias=False)
    yield Weight(
        f"{at}/base_lm/layers/0/self_attention/attention/relative_attention_bias/embeddings",
        (config.relative_buckets, tower.num_heads),
        f"{ours}.relative_bias",
    )
    yield Weight(f"{at}/base_lm/final_layer_norm/weight", (dim,), f"{ours}.norm.weight")


def agnostic_text(config: VATTConfig, places: Places) -> Iterator[Weight]:
    ours, dim, word_dim = "text_tokens", config.text.dim, config.word_dim or config.text.dim
    yield Weight(f"{places.project}/embeddings", (config.vocab_size, word_dim), WORD_TABLE)
    yield Weight(places.agg, (dim,), f"{ours}.agg")
    yield from _positions(places, ours, AXES["text"], (config.words,), dim)
    yield from dense(f"{places.pre_proj}", f"{ours}.pre_proj", word_dim, dim, bias=True)


def post_proj(config: VATTConfig, at: str, modality: str) -> Iterator[Weight]:
    width = config.pooled_dim(modality)
    yield from dense(at, f"post_proj.{modality}", config.video.dim, width, bias=True)


def common_space(config: VATTConfig, at: str) -> Iterator[Weight]:
    ours, d_va, d_vt = "common_space", config.d_va, config.d_vt
    pooled = {m: config.pooled_dim(m) for m in MODALITIES}
    yield from dense(f"{at}/vid_to_hid", f"{ours}.video_hidden", pooled["video"], d_va, bias=False)
    yield from _batch_norm(f"{at}/hid_to_va/pre_bn", f"{ours}.video_hidden_norm", d_va)
    yield from dense(f"{at}/hid_to_va/dense", f"{ours}.video_va", d_va, d_va, bias=False)
    yield from _batch_norm(f"{at}/hid_to_va/bn", f"{ours}.video_va_norm", d_va)
    yield from dense(f"{at}/aud_to_va", f"{ours}.audio_va", pooled["audio"], d_va, bias=True)
    yield from dense(f"{at}/va_to_vat/dense", f"{ours}.video_vt", d_va, d_vt, bias=False)
    yield from _batch_norm(f"{at}/va_to_vat/bn", f"{ours}.video_vt_norm", d_vt)
    yield from dense(f"{at}/txt_to_vat", f"{ours}.text_vt", pooled["text"], d_vt, bias=True)


def _attention(at: str, block: str, dim: int, inner: int, *, bias: bool) -> Iterator[Weight]:
    for part, each in enumerate("qkv"):
        yield Weight(f"{at}/{each}/kernel", (dim, inner), f"{block}.qkv.weight", part)
        if bias:
            yield Weight(f"{at}/{each}/bias", (inner,), f"{block}.qkv.bias", part)
    yield from dense(f"{at}/o", f"{block}.out", inner, dim, bias=bias)


def dense(at: str, ours: str, inputs: int, outputs: int, *, bias: bool) -> Iterator[Weight]:
    yield Weight(f"{at}/kernel", (inputs, outputs), f"{ours}.weight")
    if bias:
        yield Weight(f"{at}/bias", (outputs,), f"{ours}.bias")


def _vectors(
    at: str, ours: str, dim: int, leaves: tuple[str, ...] = ("gamma", "beta")
) -> Iterator[Weight]:
    for leaf in leaves:
        yield Weight(f"{at}/{leaf}", (dim,), f"{ours}.{_LEAVES[leaf]}")


def _batch_norm(at: str, ours: str, dim: int) -> Iterator[Weight]:
    yield from _vectors(at, ours, dim, tuple(_LEAVES))
