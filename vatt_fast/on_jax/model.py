"""VATT in JAX, on a dict of arrays: positions, tokens, encoder, common space, model.

Function for function the twin of ``vatt_fast/model.py``.

    from vatt_fast.on_jax import model, weights

    # the same folder that ``VATT.from_pretrained`` reads
    config, params, statistics = weights.load("runs/demo")
    out, statistics = model.forward(params, statistics, video, audio, text, config=config)

``statistics`` are the batch norms' running statistics, a state that goes in and comes out. Names
and layouts are those of ``weights``: attention's weights split by head, the blocks of an encoder
stacked.

Shapes: B clips, N patches, K kept patches, P texts a clip, W words, T = 1 + kept tokens, H heads,
D head_dim.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .. import spectrogram
from ..config import MAX_SCALE, MODALITIES, NORM_EPS, TowerConfig, VATTConfig
from ..inputs import PatchInput, audio_input, check_text, require_input, video_input
from ..kernels import jax_ops
from ..kernels.patch_embed import patchify
from ..model import VATTOutput, moving_weights
from ..positions import relative_position_buckets, resample_matrix
from .weights import Arrays


def part(p: Arrays, name: str) -> Arrays:
    """What belongs to the module ``name``, under the module's own names."""
    return {key[len(name) + 1 :]: value for key, value in p.items() if key.startswith(name + ".")}


# -- positions -------------------------------------------------------------------------------------


def position_table(p: Arrays, grid: tuple[int, ...]) -> jax.Array:
    """(N, dim), row-major over ``grid``; tables of another length are resampled first."""
    rows = []
    for axis, length in enumerate(grid):
        table = p[f"tables.{axis}"]
        if table.shape[0] != length:
            table = _matmul(
                "nm,md->nd",
                jnp.asarray(resample_matrix(table.shape[0], length), table.dtype),
                table,
            )
        rows.append(table.reshape([length if i == axis else 1 for i in range(len(grid))] + [-1]))
    return norm(part(p, "norm"), functools.reduce(jnp.add, rows).reshape(-1, rows[0].shape[-1]))


# -- tokens ----------------------------------------------------------------------------------------


def patch_tokens(
    p: Arrays, patches, how: PatchInput, keep, *, dtype, dropout: float = 0.0, key=None
) -> jax.Array:
    """Patch rows (B, N, k), or only the kept (B, K, k) -> tokens (B, 1 + K, dim) in ``dtype``.

    See ``PatchTokens``.
    """
    position = position_table(part(p, "position"), how.grid)
    project = functools.partial(
        jax_ops.patch_embed, patches, p["project.weight"], p["project.bias"]
    )
    options: dict[str, Any] = dict(
        scale=how.scale, shift=how.shift, gathered=how.gathered, dtype=dtype
    )
    if "pre_proj.weight" not in p and key is None:
        return project(position, keep, agg=p["agg"], **options)
    tokens = project(None, keep, **options)
    if "pre_proj.weight" in p:
        tokens = gelu(dense(part(p, "pre_proj"), tokens))
    tokens = tokens + (position if keep is None else position[keep]).astype(tokens.dtype)
    return _prepend(p["agg"], drop(tokens, dropout, key))


def audio_rows(config: VATTConfig, audio) -> jax.Array:
    """Waveforms (B, S) of a model that looks at spectrograms -> patch rows (B, N, k).

    They are fp32 at least. Any other audio comes back as it is.
    """
    if not spectrogram.needs_spectrogram(config, audio):
        return audio
    audio = jnp.asarray(audio)
    audio = audio.astype(_wide(audio.dtype))
    constants = spectrogram.window_and_mel(
        config.spectrogram_hop, config.sample_rate_hz, config.mel_bins
    )
    window, weights = (jnp.asarray(part, audio.dtype) for part in constants)
    matmul = functools.partial(_matmul, "bfk,km->bfm")
    mel = spectrogram.log_mel(audio, window, weights, xp=jnp, matmul=matmul)
    return spectrogram.patch_rows(mel, config.spectrogram_patch, xp=jnp)


def word_tokens(
    p: Arrays, ids, *, agnostic: bool, dtype, dropout: float = 0.0, key=None
) -> jax.Array:
    """ids (B, W) -> tokens (B, 1 + W, dim) in ``dtype``."""
    tokens = p["table.weight"][ids].astype(dtype)
    if not agnostic:
        tokens = _prepend(p["agg"], tokens)
    if "pre_proj.weight" in p:
        tokens = gelu(dense(part(p, "pre_proj"), tokens))
    if agnostic:
        table = part(p, "position")
        position = position_table(table, (table["tables.0"].shape[0],))[: ids.shape[1]]
        tokens = tokens + position.astype(dtype)
    tokens = drop(tokens, dropout, key)
    return _prepend(p["agg"], tokens) if agnostic else tokens


# -- encoder ---------------------------------------------------------------------------------------


def block(
    p: Arrays, x, bias, key_mask, agg_only: bool, *, scale: float, dropout: float = 0.0, key=None
) -> jax.Array:
    """x (B, T, dim) -> (B, T, dim); with ``agg_only`` the same function's (B, 1, dim) at index 0.

    See ``Block``.
    """
    keys = _split(key, 4)
    attended = attend(
        p,
        norm(part(p, "attention_norm"), x),
        bias,
        key_mask,
        agg_only,
        scale=scale,
        dropout=dropout,
        key=keys[0],
    )
    if agg_only:
        x = x[:, :1]
    out = _matmul("bhte,hed->btd", attended, p["out.weight"].astype(x.dtype))
    x = _keep(x + drop(_add_bias(p, "out.bias", out), dropout, keys[1]))
    hidden = drop(
        gelu(_keep(dense(part(p, "mlp_in"), norm(part(p, "mlp_norm"), x)))), dropout, keys[2]
    )
    return x + drop(dense(part(p, "mlp_out"), hidden), dropout, keys[3])


def attend(
    p: Arrays, x, bias, key_mask, agg_only: bool, *, scale: float, dropout: float, key
) -> jax.Array:
    """x (B, T, dim) -> what each head gathered, (B, H, T or 1, D)."""
    q = _heads(p, "q", x[:, :1] if agg_only else x)
    k, v = _heads(p, "k", x), _heads(p, "v", x)
    if agg_only and bias is not None:
        bias = bias[:, :1]
    if key is None:
        return jax_ops.attention(q, k, v, scale=scale, bias=bias, key_mask=key_mask)[0]
    # dropout on attention probabilities (recipe ``released``) is plain JAX; our op has none
    scores = scale * _matmul("bhte,bhse->bhts", q, k).astype(_wide(q.dtype))
    scores = scores if bias is None else scores + bias
    scores = (
        scores if key_mask is None else jnp.where(key_mask[:, None, None, :], scores, -math.inf)
    )
    return _matmul("bhts,bhse->bhte", drop(jax.nn.softmax(scores), dropout, key).astype(q.dtype), v)


def _heads(p: Arrays, name: str, x) -> jax.Array:
    """(B, T, dim) -> (B, H, T, D)."""
    out = _matmul("btd,hed->bhte", x, p[f"{name}.weight"].astype(x.dtype))
    bias = p.get(f"{name}.bias")
    return _keep(out if bias is None else out + bias[:, None].astype(x.dtype))


_KEPT = "vatt_block"


def _keep(x) -> jax.Array:
    """Mark what a block keeps for its backward pass, beside its input and attention's results.

    The backward pass computes the rest again: norms, GELU, casts.
    """
    return checkpoint_name(x, _KEPT)


def encoder(
    p: Arrays,
    x,
    tower: TowerConfig,
    key_mask=None,
    *,
    agg_only: bool = False,
    max_distance: int = 64,
    dropout: float = 0.0,
    key=None,
    fetch: Callable[[str, Arrays], Arrays] = lambda name, p: p,
    recompute: bool = False,
) -> jax.Array:
    """x (B, T, dim) -> features (B, T, dim).

    ``agg_only``: (B, 1, dim), the last block's queries, output and MLP for AGG alone. With a
    relative position bias it is T5's: unscaled scores. See ``forward`` for ``fetch`` and
    ``recompute``.
    """
    t5 = "relative_bias" in p
    bias = relative_bias(p["relative_bias"], x.shape[1], max_distance) if t5 else None
    *keys, last_key, drop_key = _split(key, tower.depth + 1)

    def run(name, agg_only, x, p, key):
        scale = 1.0 if t5 else tower.head_dim**-0.5
        return block(
            fetch(name, p), x, bias, key_mask, agg_only, scale=scale, dropout=dropout, key=key
        )

    def step(x, one):
        return run("blocks", False, x, *one), None

    policy = (
        None
        if recompute
        else jax.checkpoint_policies.save_only_these_names(_KEPT, jax_ops.ATTENTION_RESULTS)
    )
    if tower.depth > 1:
        stacked = part(p, "blocks"), None if key is None else jnp.stack(keys)
        x, _ = jax.lax.scan(jax.checkpoint(step, policy=policy, prevent_cse=False), x, stacked)
    x = jax.checkpoint(functools.partial(run, "last", agg_only), policy=policy)(
        x, part(p, "last"), last_key
    )
    return drop(norm(part(p, "norm"), x), dropout, drop_key)


def relative_bias(table, length: int, max_distance: int) -> jax.Array:
    """(H, T, T) fp32 at least, from the table (buckets, H)."""
    return jnp.transpose(
        table[relative_position_buckets(length, table.shape[0], max_distance)], (2, 0, 1)
    )


# -- common space ----------------------------------------------------------------------------------


def batch_norm(
    p: Arrays, s: Arrays, x, valid=None, *, momentum: float, eps: float, training: bool, axis=None
) -> tuple[jax.Array, Arrays]:
    """x (R, dim), valid (R,) bool -> the normalised x and the new running statistics.

    Statistics over the valid rows of all devices of the mesh axis ``axis``, fp32 at least whatever
    dtype the weights have; so is the result: embeddings feed the loss. See ``BatchNorm``.
    """
    dtype = _wide(p["weight"].dtype)
    x = x.astype(dtype)
    weight, bias = p["weight"].astype(dtype), p["bias"].astype(dtype)
    if not training:
        mean, var = s["running_mean"].astype(dtype), s["running_var"].astype(dtype)
    else:
        rows = (
            jnp.ones((x.shape[0], 1), x.dtype) if valid is None else valid[:, None].astype(x.dtype)
        )
        count = _total(rows.sum(), axis)
        mean = _total((x * rows).sum(0), axis) / jnp.maximum(count, 1)
        var = _total((jnp.square(x - mean) * rows).sum(0), axis) / jnp.maximum(count, 1)
        devices = 1 if axis is None else jax.lax.psum(1, axis)  # a number, nothing is exchanged
        share, widen = moving_weights(count, x.shape[0] * devices)
        step = momentum * share
        now = {"running_mean": mean, "running_var": var * widen}
        s = {
            name: (value + step * (jax.lax.stop_gradient(now[name]) - value)).astype(value.dtype)
            for name, value in s.items()
        }
    return (x - mean) * jax.lax.rsqrt(var + eps) * weight + bias, s


class CommonSpace:
    """Pooled vectors -> S_va (video, audio) and S_vt (video, text).

    Collects the batch norms' new statistics. See ``vatt_fast.model.CommonSpace``.
    """

    def __init__(
        self, p: Arrays, statistics: Arrays, config: VATTConfig, *, training: bool, axis=None
    ):
        self.p, self.statistics, self.relu_before_vt = p, dict(statistics), config.heads != "paper"
        self._options: dict[str, Any] = dict(
            momentum=config.batch_norm_momentum,
            eps=config.batch_norm_eps,
            training=training,
            axis=axis,
        )

    def video(self, pooled, valid=None) -> tuple[jax.Array, jax.Array]:
        """pooled (B, dim) -> z_video_va (B, d_va), z_video_vt (B, d_vt), not of unit length."""
        hidden = jax.nn.relu(
            self._norm("video_hidden_norm", self._dense("video_hidden", pooled), valid)
        )
        z_va = self._norm(
            "video_va_norm", self._dense("video_va", hidden.astype(pooled.dtype)), valid
        )
        z_vt = self._dense(
            "video_vt", (jax.nn.relu(z_va) if self.relu_before_vt else z_va).astype(pooled.dtype)
        )
        return z_va, self._norm("video_vt_norm", z_vt, valid)

    def audio(self, pooled, valid=None) -> jax.Array:
        return self._norm("audio_va_norm", self._dense("audio_va", pooled), valid)

    def text(self, pooled, valid=None) -> jax.Array:
        return self._norm("text_vt_norm", self._dense("text_vt", pooled), valid)

    def _dense(self, name: str, x) -> jax.Array:
        return dense(part(self.p, name), x)

    def _norm(self, name: str, x, valid) -> jax.Array:
        if f"{name}.weight" not in self.p:  # the released layers have none after audio and text
            return x.astype(_wide(x.dtype))
        x, new = batch_norm(
            part(self.p, name), part(self.statistics, name), x, valid, **self._options
        )
        self.statistics |= {f"{name}.{key}": value for key, value in new.items()}
        return x


# -- model -----------------------------------------------------------------------------------------


jax.tree_util.register_dataclass(
    VATTOutput, [field.name for field in dataclasses.fields(VATTOutput)], []
)


def forward(
    params: Arrays,
    statistics: Arrays,
    video=None,
    audio=None,
    text=None,
    *,
    config: VATTConfig,
    video_keep=None,
    audio_keep=None,
    video_valid=None,
    audio_valid=None,
    text_valid=None,
    video_grid: tuple[int, int, int] | None = None,
    features: bool = False,
    training: bool = False,
    key=None,
    dtype=None,
    axis: str | None = None,
    fetch: Callable[[str, Arrays], Arrays] = lambda name, p: p,
    recompute: bool = False,
) -> tuple[VATTOutput, Arrays]:
    """Encode any subset of modalities; the arguments of ``VATT.forward`` and these.

    Args:
        training: batch norms use and learn the batch's statistics.
        key: random key of dropout; None for none, whatever the config says.
        dtype: of the towers' arithmetic, as autocast in torch; the weights' if None. Statistics and
            embeddings stay fp32 at least.
        axis: inside ``shard_map``, the mesh axis whose devices share the batch.
        fetch: called as ``fetch(name, arrays)`` right before a part's arrays are used: where
            weights lie in shards, it joins them.
        recompute: keep only the blocks' inputs for the backward pass, and run the blocks again
            there.

    Returns:
        The output and the statistics after the call, which are the given ones unless ``training``.

    Raises:
        ValueError: no input, an empty batch, shapes that do not fit, and ids in a NumPy array
            beyond the vocabulary; each names the value, the rule and the remedy.
    """
    require_input(video, audio, text)
    keys = dict(zip(MODALITIES, _split(key if config.dropout else None, 3), strict=True))
    dtype = params["video_tokens.agg"].dtype if dtype is None else jnp.dtype(dtype)
    call = CallOptions(params, config, dtype, features, keys, fetch, recompute)
    space = CommonSpace(
        fetch("common_space", part(params, "common_space")),
        part(statistics, "common_space"),
        config,
        training=training,
        axis=axis,
    )
    out: Any = VATTOutput()
    if video is not None:
        how = video_input(config, video, video_keep, video_grid)
        out.video_features, pooled = encode_patches(call, "video", video, how, video_keep)
        out.video_pooled = pooled
        out.z_video_va, out.z_video_vt = space.video(pooled, video_valid)
    if audio is not None:
        how = audio_input(config, audio, audio_keep)
        out.audio_features, pooled = encode_patches(call, "audio", audio, how, audio_keep)
        out.audio_pooled = pooled
        out.z_audio_va = space.audio(pooled, audio_valid)
    if text is not None:
        out.text_features, pooled = _encode_text(call, text)
        z = space.text(pooled, None if text_valid is None else text_valid.reshape(-1))
        lead = text.shape[:-1]
        out.text_pooled, out.z_text_vt = pooled.reshape(*lead, -1), z.reshape(*lead, -1)
    return out, {f"common_space.{name}": value for name, value in space.statistics.items()}


class CallOptions(NamedTuple):
    """What the three encodings of one call share; see ``forward``."""

    params: Arrays
    config: VATTConfig
    dtype: Any
    features: bool
    keys: dict[str, Any]  # of dropout, by modality
    fetch: Callable[[str, Arrays], Arrays]
    recompute: bool

    def part(self, name: str) -> Arrays:
        return self.fetch(name, part(self.params, name))


def encode_patches(call: CallOptions, modality: str, patches, how: PatchInput, keep):
    """Clips or patch rows -> features if asked for, and pooled."""
    if modality == "audio":
        patches = audio_rows(call.config, patches)
    if how.patch is not None:
        # the op takes rows here; an image fills one temporal patch
        if patches.ndim == 5 and patches.shape[1] == 1:
            patches = jnp.repeat(patches, how.patch[0], axis=1)
        patches = patchify(patches, how.patch, pad_value=how.pad_value)
    keys = _split(call.keys[modality], 2)
    x = patch_tokens(
        call.part(f"{modality}_tokens"),
        jnp.asarray(patches),
        how,
        None if keep is None else jnp.asarray(keep),
        dtype=call.dtype,
        dropout=call.config.dropout,
        key=keys[0],
    )
    return _run_encoder(call, modality, x, None, keys[1])


def _encode_text(call: CallOptions, text):
    c = call.config
    check_text(c, text)
    ids = jnp.asarray(text).reshape(-1, text.shape[-1])
    key_mask = jnp.pad(ids != 0, ((0, 0), (1, 0)), constant_values=True)  # AGG is always attended
    keys = _split(call.keys["text"], 2)
    x = word_tokens(
        call.part("text_tokens"),
        ids,
        agnostic=c.agnostic,
        dtype=call.dtype,
        dropout=c.dropout,
        key=keys[0],
    )
    return _run_encoder(call, "text", x, key_mask, keys[1])


def _run_encoder(call: CallOptions, modality: str, x, key_mask, key):
    c, name = call.config, "trunk" if call.config.agnostic else f"{modality}_encoder"
    x = encoder(
        part(call.params, name),
        x,
        getattr(c, modality),
        key_mask,
        agg_only=not call.features,
        max_distance=c.relative_max_distance,
        dropout=c.dropout,
        key=key,
        fetch=lambda below, p: call.fetch(f"{name}.{below}", p),
        recompute=call.recompute,
    )
    if c.agnostic:
        x = gelu(dense(call.part(f"post_proj.{modality}"), x))
    return (x if call.features else None), x[:, 0]


def scale(params: Arrays, config: VATTConfig) -> jax.Array | float:
    """Logits factor 1 / temperature, at most 100.

    A float when fixed, else an fp32 scalar with gradient.
    """
    if not config.learn_temperature:
        return 1 / config.temperature
    return jnp.exp(_clamped(params["log_scale"].astype(jnp.float32)))


def clamp_temperature(params: Arrays) -> Arrays:
    """Bring a learned temperature back to at least 1/100.

    Call it after each optimizer step, or the temperature could stick beyond the clamp.
    """
    return params | {"log_scale": _clamped(params["log_scale"])}


# -- small parts -----------------------------------------------------------------------------------


def dense(p: Arrays, x) -> jax.Array:
    """x @ weight.T + bias in x's dtype."""
    return _add_bias(p, "bias", _matmul("...i,oi->...o", x, p["weight"].astype(x.dtype)))


def norm(p: Arrays, x) -> jax.Array:
    """LayerNorm, or without a bias RMS norm, in x's dtype.

    Statistics and the affine map are fp32 at least.
    """
    wide = x.astype(_wide(x.dtype))
    if "bias" in p:
        wide = wide - wide.mean(-1, keepdims=True)
    wide = wide * jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + NORM_EPS) * p["weight"]
    return (wide + p["bias"] if "bias" in p else wide).astype(x.dtype)


@jax.custom_vjp
def gelu(x):
    """x * Phi(x), exact.

    Only x is kept for the backward pass: left to itself, JAX keeps fp32 intermediates of a bf16 x.
    """
    return _gelu_forward(x)[0]


def _gelu_forward(x):
    wide = x.astype(_wide(x.dtype))
    return (wide * _normal_cdf(wide)).astype(x.dtype), x


def _gelu_backward(x, d_out):
    wide = x.astype(_wide(x.dtype))
    slope = _normal_cdf(wide) + wide * jnp.exp(-0.5 * wide * wide) * (2 * math.pi) ** -0.5
    return ((d_out * slope).astype(x.dtype),)


gelu.defvjp(_gelu_forward, _gelu_backward)


def _normal_cdf(x):
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


def drop(x, rate: float, key) -> jax.Array:
    """Dropout; without a key, x."""
    if key is None or not rate:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(
        x.dtype
    )


def _split(key, count: int) -> list:
    return [None] * count if key is None else list(jax.random.split(key, count))


def _matmul(equation: str, x, y) -> jax.Array:
    """fp32 is fp32 on every platform: a TPU would otherwise round the operands to bf16."""
    return jnp.einsum(
        equation, x, y, precision=None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    )


def _add_bias(p: Arrays, name: str, x) -> jax.Array:
    return x + p[name].astype(x.dtype) if name in p else x


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _total(x, axis):
    return x if axis is None else jax.lax.psum(x, axis)


def _clamped(log_scale):
    top = math.log(MAX_SCALE)
    # minimum would halve the gradient at the cap
    return jnp.where(log_scale <= top, log_scale, top)


def _prepend(agg, tokens) -> jax.Array:
    return jnp.concatenate(
        [jnp.broadcast_to(agg.astype(tokens.dtype), (tokens.shape[0], 1, tokens.shape[2])), tokens],
        1,
    )
