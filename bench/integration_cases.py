"""Other libraries' paths and ours, on the same weights and inputs, which ``integrations`` measures.

Each case is small, and once more of a real size, for time and memory. Weights are random.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.without_torchvision import stand_in
from vatt_fast.devices import has_a_tpu, without_a_tpu

_SEED = 0


class Result(NamedTuple):
    """One path's output and gradients."""

    value: Tensor
    gradient: Tensor


Step = Callable[[], Result]  # a forward and backward; again and again


class Case(NamedTuple):
    """A library's path and ours, on the same weights and inputs."""

    library: str
    name: str
    prepare: Callable[[torch.dtype, bool], Step]  # (dtype, ours)
    prepare_real: Callable[[torch.dtype, bool], Step]  # the same of a real size
    prepare_batch: Callable[..., Step] | None = None  # of a loss: rows= pairs
    on_cuda: bool = False

    def run(self, dtype: torch.dtype, ours: bool) -> Result:
        return self.prepare(dtype, ours)()

    def absent(self) -> str | None:
        """Why it cannot run here, or None."""
        if self.on_cuda and not torch.cuda.is_available():
            return f"{self.library} {self.name} needs CUDA"
        return missing(self.library)


def missing(library: str) -> str | None:
    """Why the library cannot be used here, or None."""
    stand_in()
    if not has_a_tpu():
        without_a_tpu()
    try:
        importlib.import_module(library)
    except Exception as error:
        # a library that is there and breaks on what it needs tells more than ImportError
        return f"{library} does not import: {type(error).__name__}: {error}"
    return None


def _differentiated(output: Tensor, leaves: Sequence[Tensor]) -> Result:
    for x in leaves:
        x.grad = None
    # weighed at random: the sum of squares of what a layer norm gives is constant
    generator = torch.Generator().manual_seed(_SEED)
    (output.float() * torch.randn(output.shape, generator=generator)).sum().backward()
    gradients = [x.grad for x in leaves if x.grad is not None]
    return Result(output.detach(), torch.cat([g.float().flatten() for g in gradients]))


# -- transformers ------------------------------------------------------------------------------

_SIZES: dict[str, Any] = dict(
    hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96
)
VISION = dict(**_SIZES, image_size=32, patch_size=8)
_REAL: dict[str, Any] = dict(
    hidden_size=384, num_hidden_layers=2, num_attention_heads=6, intermediate_size=1536
)


class _Model(NamedTuple):
    model: str
    config: str
    arguments: dict[str, Any]
    inputs: Callable[[], dict[str, Tensor]]
    output: str = "last_hidden_state"


def _images(size: int, count: int) -> dict[str, Tensor]:
    return dict(pixel_values=torch.randn(count, 3, size, size))


def _words(length: int, padded: bool) -> dict[str, Tensor]:
    ids = torch.randint(3, 99, (3, length))
    if not padded:
        return dict(input_ids=ids)
    lengths = torch.tensor([[length], [2 * length // 3], [length // 4]])
    return dict(input_ids=ids, attention_mask=(torch.arange(length) < lengths) + 0)


def _sound(samples: int, padded: bool) -> dict[str, Tensor]:
    given = dict(input_values=torch.randn(2, samples))
    if padded:
        lengths = torch.tensor([[samples], [3 * samples // 5]])
        given["attention_mask"] = (torch.arange(samples) < lengths) + 0
    return given


def _models(sizes: dict[str, Any], image: int, words: int, samples: int) -> dict[str, _Model]:
    vision: dict[str, Any] = dict(**sizes, image_size=image, patch_size=8)
    text: dict[str, Any] = dict(
        **sizes,
        vocab_size=99,
        max_position_embeddings=words,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=1,
    )
    both: dict[str, Any] = dict(text_config=text, vision_config=vision)
    mel: dict[str, Any] = dict(
        **sizes,
        num_mel_bins=image,
        max_length=2 * image,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    )
    wave: dict[str, Any] = dict(
        **sizes,
        conv_dim=(32,) * 4,
        conv_stride=(5, 2, 2, 2),
        conv_kernel=(10, 3, 3, 3),
        num_feat_extract_layers=4,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        apply_spec_augment=False,
    )

    def pictures_and_words() -> dict[str, Tensor]:
        return _words(words, True) | _images(image, 3)

    def frames() -> dict[str, Tensor]:
        return dict(pixel_values=torch.randn(2, 4, 3, image, image))

    def mels() -> dict[str, Tensor]:
        return dict(input_values=torch.randn(2, 2 * image, image))

    captions = ("CLIPTextModel", "CLIPTextConfig", text)
    logits = "logits_per_image"
    found = {
        "ViT": _Model("ViTModel", "ViTConfig", vision, functools.partial(_images, image, 2)),
        "VideoMAE": _Model("VideoMAEModel", "VideoMAEConfig", vision | dict(num_frames=4), frames),
        "CLIP text, causal": _Model(*captions, functools.partial(_words, words, False)),
        "CLIP text, causal, padded": _Model(*captions, functools.partial(_words, words, True)),
        "CLIP": _Model(
            "CLIPModel", "CLIPConfig", both | dict(projection_dim=32), pictures_and_words, logits
        ),
        "SigLIP, padded": _Model("SiglipModel", "SiglipConfig", both, pictures_and_words, logits),
        "AST": _Model("ASTModel", "ASTConfig", mel, mels),
    }
    for padded in (False, True):
        inputs = functools.partial(_sound, samples, padded)
        name = f"Wav2Vec2{', padded' * padded}"
        found[name] = _Model("Wav2Vec2Model", "Wav2Vec2Config", wave, inputs)
    return found


MODELS = _models(_SIZES, image=32, words=12, samples=2000)
_REAL_MODELS = _models(_REAL, image=112, words=77, samples=16000)


def _transformers(models: dict[str, _Model], name: str, dtype: torch.dtype, ours: bool) -> Step:
    import transformers

    from vatt_fast.integrations import transformers as integration

    integration.register()
    each = models[name]
    torch.manual_seed(_SEED)
    built = getattr(transformers, each.model)(getattr(transformers, each.config)(**each.arguments))
    built.set_attn_implementation("vatt_fast" if ours else "sdpa")
    built = built.to(dtype).eval()  # no dropout; gradients all the same
    given = {k: x.to(dtype) if x.is_floating_point() else x for k, x in each.inputs().items()}
    leaves = list(built.parameters())
    return lambda: _differentiated(getattr(built(**given), each.output), leaves)


# -- losses ------------------------------------------------------------------------------------


def _unit(rows: int, dim: int, dtype: torch.dtype) -> Tensor:
    return F.normalize(torch.randn(rows, dim), dim=1).to(dtype).requires_grad_()


def _loss_of(loss: Callable[..., Tensor], leaves: list[Tensor]) -> Step:
    def step() -> Result:
        for x in leaves:
            x.grad = None
        value = loss(*leaves)
        value.backward()
        gradients = [x.grad.float().flatten() for x in leaves if x.grad is not None]
        return Result(value.detach(), torch.cat(gradients))

    return step


def _open_clip(bias: bool, dtype: torch.dtype, ours: bool, rows: int = 97, dim: int = 32) -> Step:
    import open_clip

    from vatt_fast.integrations import open_clip as integration

    torch.manual_seed(_SEED)
    loss = (integration if ours else open_clip).ClipLoss()
    leaves = [_unit(rows, dim, dtype), _unit(rows, dim, dtype)]
    leaves.append(torch.tensor(14.0, dtype=dtype, requires_grad=True))
    if bias:
        leaves.append(torch.tensor(-3.0, dtype=dtype, requires_grad=True))
    return _loss_of(loss, leaves)


def _lightly(
    temperature: float,
    dtype: torch.dtype,
    ours: bool,
    rows: int = 300,
    dim: int = 32,
    bank: int = 0,
) -> Step:
    from lightly.loss import ntx_ent_loss

    from vatt_fast.integrations import lightly as integration

    torch.manual_seed(_SEED)
    made = integration if ours else ntx_ent_loss
    loss = made.NTXentLoss(temperature, memory_bank_size=(bank, dim) if bank else 0)
    loss = loss.to(dtype)  # and its bank
    if bank:  # a batch goes in first
        loss(_unit(rows, dim, dtype), _unit(rows, dim, dtype))
    return _loss_of(loss, [_unit(rows, dim, dtype), _unit(rows, dim, dtype)])


_ALL_DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def _ranking(
    options: dict[str, Any],
    columns: int,
    cached: bool,
    dtype: torch.dtype,
    ours: bool,
    rows: int = 97,
    dim: int = 32,
) -> Step:
    from sentence_transformers.sentence_transformer import losses

    from vatt_fast.integrations import sentence_transformers as integration

    torch.manual_seed(_SEED)
    made: Any = integration if ours else losses
    leaves = [_unit(rows, dim, dtype) for _ in range(columns)]
    model = nn.Sequential(nn.Identity())  # embeddings are given
    if cached:
        loss = made.CachedMultipleNegativesRankingLoss(model, mini_batch_size=32, **options)
        return _loss_of(lambda *z: loss.calculate_loss([list(x.split(32)) for x in z]), leaves)
    loss = made.MultipleNegativesRankingLoss(model, **options)
    return _loss_of(lambda *z: loss.compute_loss_from_embeddings(list(z), None), leaves)


_RANKING: dict[str, tuple[dict[str, Any], int]] = {
    "pairs": ({}, 2),
    "pairs, both directions": (
        dict(directions=("query_to_doc", "doc_to_query"), partition_mode="per_direction"),
        2,
    ),
    "two hard negatives": ({}, 4),
    "four directions, a hard negative": (dict(directions=_ALL_DIRECTIONS), 3),
}


# -- timm --------------------------------------------------------------------------------------


def _timm(
    arguments: dict[str, Any],
    dtype: torch.dtype,
    ours: bool,
    size: int = 32,
    dim: int = 64,
    heads: int = 4,
) -> Step:
    import timm

    from vatt_fast.integrations import timm as integration

    integration.register()
    torch.manual_seed(_SEED)
    given: dict[str, Any] = dict(img_size=size, embed_dim=dim, num_heads=heads)
    given |= dict(patch_size=8, depth=2, num_classes=10)
    layer = {"attn_layer": "vatt_fast"} if ours else {}
    model = timm.create_model("vit_base_patch16_224", **given, **arguments, **layer)
    model = model.to(dtype).eval()
    images, leaves = torch.randn(2, 3, size, size, dtype=dtype), list(model.parameters())
    return lambda: _differentiated(model(images), leaves)


# -- patch, and torch's registry ---------------------------------------------------------------


def _patched(model: nn.Module, dtype: torch.dtype, ours: bool) -> nn.Module:
    from vatt_fast.integrations.patch import patch

    model = model.to(dtype)
    if ours:
        patch(model, quiet=True)
    return model


def _encoder(
    padded: bool,
    dtype: torch.dtype,
    ours: bool,
    tokens: int = 24,
    dim: int = 64,
    heads: int = 4,
) -> Step:
    torch.manual_seed(_SEED)
    layer = nn.TransformerEncoderLayer(dim, heads, 4 * dim, dropout=0.0, batch_first=True)
    model = _patched(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), dtype, ours)
    x, leaves = torch.randn(2, tokens, dim, dtype=dtype), list(model.parameters())
    mask = torch.arange(tokens) >= torch.tensor([[tokens], [tokens // 2]]) if padded else None
    return lambda: _differentiated(model(x, src_key_padding_mask=mask), leaves)


def _open_clip_model(dtype: torch.dtype, ours: bool, size: int = 32, dim: int = 64) -> Step:
    from open_clip.model import CLIP

    torch.manual_seed(_SEED)
    vision = dict(layers=2, width=dim, head_width=16, patch_size=8, image_size=size)
    text = dict(context_length=77, vocab_size=99, width=dim, heads=4, layers=2)
    model = _patched(CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text), dtype, ours)
    images, words = torch.randn(2, 3, size, size, dtype=dtype), torch.randint(3, 99, (2, 77))
    leaves = [x for name, x in model.named_parameters() if name != "logit_scale"]
    return lambda: _differentiated(torch.cat(model(images, words)[:2]), leaves)


def _registry(dtype: torch.dtype, ours: bool, tokens: int = 197, heads: int = 4) -> Step:
    """On CUDA. Flash attention takes no fp32, and fp16 stands for it."""
    from vatt_fast.integrations import sdpa

    torch.manual_seed(_SEED)
    dtype = torch.float16 if dtype == torch.float32 else dtype
    rows = torch.randn(3, 2, tokens, heads, 64).to("cuda", dtype)
    leaves = [x.transpose(1, 2).detach().requires_grad_() for x in rows]

    def step() -> Result:
        if ours:
            sdpa.activate(unmeasured=True)
        try:
            found = _differentiated(F.scaled_dot_product_attention(*leaves), leaves)
        finally:
            if ours:
                torch.nn.attention.restore_flash_attention_impl()
        torch.cuda.synchronize()
        return found

    return step


# -- jax ---------------------------------------------------------------------------------------


def _of_jax(function: Callable[..., Any], leaves: tuple[Any, ...]) -> Step:
    import jax
    import jax.numpy as jnp

    def total(*leaves: Any) -> Any:
        out = function(*leaves).astype(jnp.float32)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    run = jax.jit(jax.grad(total, tuple(range(len(leaves))), has_aux=True))

    def step() -> Result:
        gradients, out = run(*leaves)
        flat = [np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(gradients)]
        return Result(torch.from_numpy(np.array(out)), torch.from_numpy(np.concatenate(flat)))

    return step


def _jax(
    options: dict[str, Any],
    dtype: torch.dtype,
    ours: bool,
    tokens: int = 24,
    heads: int = 3,
    dim: int = 16,
) -> Step:
    import jax
    import jax.numpy as jnp

    from vatt_fast.integrations.jax import dot_product_attention

    draw, name = np.random.default_rng(_SEED), str(dtype).removeprefix("torch.")
    leaves = [jnp.asarray(draw.standard_normal((2, tokens, heads, dim)), name) for _ in range(3)]
    attend = dot_product_attention if ours else jax.nn.dot_product_attention
    given = dict(options)
    if given.pop("padded", False):
        given["key_value_seq_lengths"] = jnp.array([tokens, tokens // 2])
    return _of_jax(functools.partial(attend, **given), tuple(leaves))


def _flax(dtype: torch.dtype, ours: bool, tokens: int = 24, heads: int = 4, dim: int = 64) -> Step:
    import jax
    import jax.numpy as jnp
    from flax import linen

    from vatt_fast.integrations.jax import flax_attention_fn

    draw, name = np.random.default_rng(_SEED), str(dtype).removeprefix("torch.")
    x = jnp.asarray(draw.standard_normal((2, tokens, dim)), name)
    layer = linen.MultiHeadAttention(
        heads, dtype=name, param_dtype=name, **({"attention_fn": flax_attention_fn} if ours else {})
    )
    weights = layer.clone(param_dtype="float32").init(jax.random.key(_SEED), x)
    weights = jax.tree.map(lambda each: each.astype(name), weights)  # other dtypes draw others
    return _of_jax(lambda weights: layer.apply(weights, x, deterministic=True), (weights,))


def _case(library: str, name: str, prepare: Callable[..., Step], **real: Any) -> Case:
    batch = prepare if "rows" in real else None
    return Case(library, name, prepare, functools.partial(prepare, **real), batch)


_REAL_LOSS: dict[str, Any] = dict(rows=1024, dim=256)
_REAL_BANK: dict[str, Any] = dict(rows=256, dim=256, bank=4096)
_REAL_TIMM: dict[str, Any] = dict(size=112, dim=384, heads=6)
_REAL_TOKENS: dict[str, Any] = dict(tokens=784, dim=384, heads=6)
_REAL_JAX: dict[str, Any] = dict(tokens=784, dim=64, heads=6)
_partial = functools.partial
CASES: tuple[Case, ...] = (
    *(
        Case(
            *("transformers", name),
            _partial(_transformers, MODELS, name),
            _partial(_transformers, _REAL_MODELS, name),
        )
        for name in MODELS
    ),
    _case("open_clip", "ClipLoss", _partial(_open_clip, False), **_REAL_LOSS),
    _case("open_clip", "ClipLoss, logit_bias", _partial(_open_clip, True), **_REAL_LOSS),
    *(
        _case(
            *("sentence_transformers", f"{kind}, {name}"),
            _partial(_ranking, options, columns, cached),
            **_REAL_LOSS,
        )
        for cached, kind in ((False, "MNRL"), (True, "CachedMNRL"))
        for name, (options, columns) in _RANKING.items()
    ),
    _case("lightly", "NTXentLoss", _partial(_lightly, 0.5), **_REAL_LOSS),
    _case("lightly", "NTXentLoss, temperature 0.07", _partial(_lightly, 0.07), **_REAL_LOSS),
    _case(
        "lightly", "NTXentLoss, small memory bank", _partial(_lightly, 0.1, bank=40), **_REAL_LOSS
    ),
    _case("lightly", "NTXentLoss, memory bank", _partial(_lightly, 0.1, bank=512), **_REAL_BANK),
    _case("timm", "ViT", _partial(_timm, {}), **_REAL_TIMM),
    _case("timm", "ViT, norms of q and k", _partial(_timm, dict(qk_norm=True)), **_REAL_TIMM),
    _case("torch", "TransformerEncoder, patch", _partial(_encoder, False), **_REAL_TOKENS),
    _case("torch", "TransformerEncoder, padded, patch", _partial(_encoder, True), **_REAL_TOKENS),
    _case("open_clip", "CLIP, patch", _open_clip_model, size=112, dim=384),
    Case(
        *("torch", "scaled_dot_product_attention, registry", _registry),
        _partial(_registry, tokens=1569, heads=12),
        on_cuda=True,
    ),
    _case("jax", "dot_product_attention", _partial(_jax, {}), **_REAL_JAX),
    _case("jax", "causal", _partial(_jax, dict(is_causal=True)), **_REAL_JAX),
    _case("jax", "padded", _partial(_jax, dict(padded=True)), **_REAL_JAX),
    _case("flax", "linen MultiHeadAttention", _flax, **_REAL_TOKENS),
)
