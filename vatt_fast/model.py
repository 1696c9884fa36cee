"""VATT in PyTorch, in the order of the data: positions, tokens, encoder, common space, model.

Shapes: B clips, N patches, K kept patches, P texts a clip, W words, T = 1 + kept tokens, H heads.
Facts follow the paper (Akbari et al., NeurIPS 2021) and the released code; where they differ,
``VATTConfig`` decides.
"""

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import collectives, spectrogram
from .checkpoints.bundle import is_checkpoint, prefix_of
from .checkpoints.layouts import HeadDim
from .checkpoints.released import Released, read_released
from .config import (
    MAX_SCALE,
    MODALITIES,
    NORM_EPS,
    PRESETS,
    SHORT_NAMES,
    Recipe,
    TowerConfig,
    VATTConfig,
    preset,
)
from .data.text import Vocabulary
from .encoding import encode
from .inputs import (
    DropPer,
    PatchInput,
    audio_input,
    check_text,
    require_input,
    sample_keeps,
    video_input,
)
from .kernels import attention, patch_embed
from .kernels.dispatch import autocast_dtype
from .positions import distance_buckets, evaluate_spline, spline
from .recompute import Compile, Recompute, compiled, recomputed
from .weights import WEIGHTS, load_weights, read_folder, save_model

Module = TypeVar("Module", bound=nn.Module)

# -- positions -------------------------------------------------------------------------------------


# lengths may be symbolic in torch.compile, so constants depend on the weights' sizes alone


def _constant_when_compiled(function):
    """``torch.compiler.assume_constant_result``, which imports the whole compiler to set this."""
    function._dynamo_marked_constant = True
    return function


@_constant_when_compiled
def _spline(n_old: int) -> tuple[Tensor, Tensor]:
    knots, second = spline(n_old)
    return torch.from_numpy(knots), torch.from_numpy(second)


class PositionTable(nn.Module):
    """One learned table per axis; a token's position is the LayerNorm of its rows' sum."""

    def __init__(self, lengths: tuple[int, ...], dim: int):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.empty(n, dim)) for n in lengths)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        for table in self.tables:
            nn.init.trunc_normal_(table, std=dim**-0.5, a=-2 * dim**-0.5, b=2 * dim**-0.5)

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """(N, dim), row-major over ``grid``; tables of another length are resampled first."""
        rows = []
        for axis, (table, length) in enumerate(zip(self.tables, grid, strict=True)):
            if table.shape[0] != length:
                table = _resample(table, length)
            rows.append(table.view([length if i == axis else 1 for i in range(len(grid))] + [-1]))
        return self.norm(functools.reduce(torch.add, rows).flatten(0, -2))


def _resample(table: Tensor, length: int) -> Tensor:
    """(n, dim) -> (length, dim); see ``positions.resample_matrix``."""
    wide = torch.promote_types(table.dtype, torch.float32)
    knots, second = (_send(part, table.device).to(wide) for part in _spline(table.shape[0]))
    index = torch.arange(length, device=table.device)
    weights = evaluate_spline(knots, second, index, length, xp=torch)
    with torch.autocast(table.device.type, enabled=False):  # positions are not rounded twice
        return weights.to(table.dtype) @ table


# -- tokens ----------------------------------------------------------------------------------------


class PatchTokens(nn.Module):
    """Raw patches of video or audio -> tokens, AGG first.

    With ``pre_proj`` (modality-agnostic) the order is project, Dense + GELU, position, DropToken,
    AGG. Every step acts on one token, so patches are dropped before the projection in both cases.
    """

    def __init__(
        self, values: int, grid: tuple[int, ...], dim: int, *, pre_proj: bool, dropout: float
    ):
        super().__init__()
        self.dropout = dropout
        self.project = _dense(values, dim)
        self.pre_proj = _dense(dim, dim) if pre_proj else None
        self.position = PositionTable(grid, dim)
        self.agg = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def forward(self, patches: Tensor, how: PatchInput, keep: Tensor | np.ndarray | None) -> Tensor:
        """Clips, which are read in place, or patch rows, as ``how`` says -> (B, 1 + K, dim)."""
        if how.patch is not None:
            patches = _fill_patches(patches, how.patch, how.pad_value)
        if isinstance(keep, np.ndarray):
            keep = torch.from_numpy(keep)
        keep = None if keep is None else _send(keep, patches.device)
        position = self.position(how.grid)
        embed = functools.partial(
            patch_embed,
            patches,
            self.project.weight,
            self.project.bias,
            scale=how.scale,
            shift=how.shift,
            patch=how.patch,
            gathered=how.gathered,
        )
        if self.pre_proj is None and not (self.training and self.dropout):
            return embed(position, keep, agg=self.agg)
        tokens = embed(None, keep)
        if self.pre_proj is not None:
            tokens = F.gelu(self.pre_proj(tokens))
        tokens = tokens + (position if keep is None else position[keep]).to(tokens.dtype)
        return _prepend(self.agg, F.dropout(tokens, self.dropout, self.training))


def _fill_patches(clip: Tensor, patch: tuple[int, ...], pad_value: float) -> Tensor:
    """What the op does not do: an image fills one temporal patch, and padding that is not 0."""
    if clip.ndim == 5 and clip.shape[1] == 1:
        clip = clip.expand(-1, patch[0], -1, -1, -1)
    if pad_value:
        short = [-size % p for size, p in zip(clip.shape[1:], patch, strict=False)]
        if any(short):
            pads = [n for amount in (0, *reversed(short)) for n in (0, amount)]
            clip = F.pad(clip, pads, value=pad_value)
    return clip


@_constant_when_compiled
def _window_and_mel(hop: int, rate: float, bins: int) -> tuple[Tensor, Tensor]:
    window, weights = spectrogram.window_and_mel(hop, rate, bins)
    return torch.from_numpy(window), torch.from_numpy(weights)


def audio_rows(config: VATTConfig, audio: Tensor) -> Tensor:
    """Waveforms (B, S) of a model that looks at spectrograms -> patch rows (B, N, k).

    They are fp32 at least. Any other audio comes back as it is.
    """
    if not spectrogram.needs_spectrogram(config, audio):
        return audio
    constants = _window_and_mel(config.spectrogram_hop, config.sample_rate_hz, config.mel_bins)
    wide = torch.promote_types(audio.dtype, torch.float32)
    with torch.autocast(audio.device.type, enabled=False):
        window, weights = (_send(part, audio.device).to(wide) for part in constants)
        mel = spectrogram.log_mel(audio.to(wide), window, weights, xp=torch)
    return spectrogram.patch_rows(mel, config.spectrogram_patch, xp=torch)


class WordTokens(nn.Module):
    """Word ids -> tokens, AGG first.

    ``position`` (modality-agnostic) adds a table of word positions.
    """

    def __init__(self, config: VATTConfig, dim: int):
        super().__init__()
        agnostic, word_dim = config.agnostic, config.word_dim or dim
        self.agnostic, self.dropout = agnostic, config.dropout
        self.table = nn.Embedding(config.vocab_size, word_dim)
        nn.init.normal_(self.table.weight, std=word_dim**-0.5)
        self.table.weight.requires_grad_(config.train_words)
        self.agg = nn.Parameter(torch.randn(dim if agnostic else word_dim) * dim**-0.5)
        if agnostic:
            self.pre_proj: nn.Linear | None = _dense(word_dim, dim)
            self.position = PositionTable((config.words,), dim)
        else:
            self.pre_proj = _dense(word_dim, dim, bias=False) if config.word_dim else None

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, W) -> tokens (B, 1 + W, dim)."""
        tokens = self.table(ids)
        if not self.agnostic:
            tokens = _prepend(self.agg, tokens)
        if self.pre_proj is not None:
            tokens = F.gelu(self.pre_proj(tokens))
        if self.agnostic:  # rows of the table, also for fewer words: padding changes nothing
            position = self.position((len(self.position.tables[0]),))[: ids.shape[1]]
            tokens = tokens + position.to(tokens.dtype)
        tokens = F.dropout(tokens, self.dropout, self.training)
        return _prepend(self.agg, tokens) if self.agnostic else tokens


# -- encoder ---------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block: x + MHA(norm(x)), then x + MLP(LayerNorm(x)).

    ``t5``: RMS norm, no linear biases, unscaled scores.
    """

    recompute: Recompute = "none"  # see VATT.set_execution
    compile_mode: Compile = "off"

    def __init__(self, tower: TowerConfig, *, t5: bool, dropout: float):
        super().__init__()
        inner = tower.num_heads * tower.head_dim
        self.num_heads, self.dropout = tower.num_heads, dropout
        self.scale = 1.0 if t5 else tower.head_dim**-0.5
        self.attention_norm = _norm(tower.dim, t5)
        self.qkv = nn.Linear(tower.dim, 3 * inner, bias=not t5)
        for part in self.qkv.weight.data.split(inner):
            nn.init.xavier_uniform_(part)
        if self.qkv.bias is not None:
            nn.init.zeros_(self.qkv.bias)
        self.out = _dense(inner, tower.dim, bias=not t5)
        self.mlp_norm = nn.LayerNorm(tower.dim, eps=NORM_EPS)
        self.mlp_in = _dense(tower.dim, tower.mlp_dim, bias=not t5)
        self.mlp_out = _dense(tower.mlp_dim, tower.dim, bias=not t5)

    def forward(
        self, x: Tensor, bias: Tensor | None, key_mask: Tensor | None, agg_only: bool
    ) -> Tensor:
        """x (B, T, dim) -> (B, T, dim).

        ``agg_only``: the same function's (B, 1, dim) at index 0.
        """
        # compiled inside, computed again outside of that, and FSDP's hooks around both
        compile = self.training and self.compile_mode == "blocks"  # evaluation meets many sizes
        compute = compiled(Block._compute) if compile else Block._compute
        return recomputed(self.recompute, compute, self, x, bias, key_mask, agg_only)

    def _compute(
        self, x: Tensor, bias: Tensor | None, key_mask: Tensor | None, agg_only: bool
    ) -> Tensor:
        attended = self._attend(self.attention_norm(x), bias, key_mask, agg_only)
        if agg_only:
            x = x[:, :1]
        x = x + self._drop(self.out(attended))
        hidden = self._drop(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x + self._drop(self.mlp_out(hidden))

    def _attend(
        self, x: Tensor, bias: Tensor | None, key_mask: Tensor | None, agg_only: bool
    ) -> Tensor:
        if agg_only:
            inner = self.qkv.out_features // 3
            q_bias = kv_bias = None
            if self.qkv.bias is not None:
                q_bias, kv_bias = self.qkv.bias.split((inner, 2 * inner))
            q = F.linear(x[:, :1], self.qkv.weight[:inner], q_bias)
            kv = F.linear(x, self.qkv.weight[inner:], kv_bias)
            q = q.unflatten(-1, (self.num_heads, -1))
            k, v = kv.unflatten(-1, (2, self.num_heads, -1)).unbind(2)
            bias = None if bias is None else bias[:, :1]
        else:
            # strided views, no copy
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        if self.training and self.dropout:
            return self._attend_with_dropout(q, k, v, bias, key_mask).flatten(2)
        return attention(q, k, v, scale=self.scale, bias=bias, key_mask=key_mask)[0].flatten(2)

    def _attend_with_dropout(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None
    ) -> Tensor:
        """Dropout on attention probabilities (recipe ``released``) is torch's; our op has none."""
        mask = None if bias is None else bias[None].to(q.dtype)
        if key_mask is not None:
            allowed = key_mask[:, None, None, :]
            mask = allowed if mask is None else mask.masked_fill(~allowed, -math.inf)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, dropout_p=self.dropout, scale=self.scale
        ).transpose(1, 2)

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class Encoder(nn.Module):
    """The same function for every modality and both kinds of model.

    ``t5`` adds the relative position bias of the text tower.
    """

    def __init__(
        self,
        tower: TowerConfig,
        *,
        t5: bool = False,
        dropout: float = 0.0,
        buckets: int = 32,
        max_distance: int = 64,
    ):
        super().__init__()
        self.dropout, self.max_distance = dropout, max_distance
        self.relative_bias = (
            nn.Parameter(torch.randn(buckets, tower.num_heads) * tower.dim**-0.5) if t5 else None
        )
        self.distance_buckets: Tensor | None
        self.register_buffer("distance_buckets", None, persistent=False)
        self._place_buckets()
        # weights that are assigned, not copied, may lie on another device than before
        self.register_load_state_dict_post_hook(_place_buckets_of)
        self.blocks = nn.ModuleList(
            Block(tower, t5=t5, dropout=dropout) for _ in range(tower.depth)
        )
        self.norm = _norm(tower.dim, t5)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, *, agg_only: bool = False
    ) -> Tensor:
        """x (B, T, dim) -> features (B, T, dim).

        ``agg_only``: (B, 1, dim), the last block's queries, output and MLP for AGG alone.
        """
        bias = self._bias(x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, bias, key_mask, agg_only and i == len(self.blocks) - 1)
        return F.dropout(self.norm(x), self.dropout, self.training)

    def _bias(self, length: int) -> Tensor | None:
        if self.relative_bias is None or self.distance_buckets is None:
            return None
        m = self.max_distance
        index = torch.arange(length, device=self.relative_bias.device)
        distance = (index[:, None] - index).clamp(-m, m)  # of query and key
        buckets = self.distance_buckets[distance + m]
        return self.relative_bias[buckets].permute(2, 0, 1)  # (H, T, T)

    def _place_buckets(self) -> None:
        """Where the weights are: a copy from the host in each forward would wait for the device."""
        if self.relative_bias is not None:
            buckets = distance_buckets(self.relative_bias.shape[0], self.max_distance)
            self.distance_buckets = torch.tensor(buckets, device=self.relative_bias.device)

    def _apply(self, fn, recurse=True):
        """Of ``to``, ``to_empty`` and others: the buckets follow, and hold their values again."""
        super()._apply(fn, recurse)
        self._place_buckets()
        return self


def _place_buckets_of(encoder: Encoder, keys: Any) -> None:
    encoder._place_buckets()


# -- common space ----------------------------------------------------------------------------------


def moving_weights(count: Any, rows: Any) -> tuple[Any, Any]:
    """How a batch with ``count`` valid rows among ``rows`` moves batch norm's statistics.

    Returns:
        the share of the momentum that the batch is worth, 0 for fewer than two valid rows; and the
        factor by which the biased variance of few rows falls short of that of all, on average.
        Both are 1 where all rows are valid. For arrays of torch and JAX.
    """
    enough = count > 1
    count = count * enough + 2 * ~enough
    rows = rows + (rows < 2)
    share = enough * (count - 1) / (rows - 1)
    return share, count * (rows - 1) / ((count - 1) * rows)


class BatchNorm(nn.Module):
    """Batch norm over the valid rows of all devices, in fp32, or fp64 for fp64 weights.

    The moving variance is the biased one (Keras, not torch). With invalid rows the update leaves
    the released code, which knows none: it is weighed by the number of valid rows, and the variance
    of few is brought to what that of the whole batch is on average. A batch with fewer than two
    valid rows teaches nothing.
    """

    def __init__(self, dim: int, *, momentum: float, eps: float):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(
        self, x: Tensor, valid: Tensor | None = None, group: collectives.Group = None
    ) -> Tensor:
        """x (R, dim), valid (R,) bool -> (R, dim) in fp32 at least: embeddings feed the loss.

        In training the processes of ``group`` share one exchange; R may differ between them.
        """
        # bf16 weights (FSDP2's mixed precision) must not round the statistics
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        x = x.to(dtype)
        if self.training:
            count, rows, mean, var = _moments(x, valid, group)
            with torch.no_grad():
                share, widen = moving_weights(count, rows)
                step = self.momentum * share
                for running, now in ((self.running_mean, mean), (self.running_var, var * widen)):
                    running.copy_(torch.lerp(running.to(dtype), now, step))
        else:
            mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return (x - mean) * (var + self.eps).rsqrt() * weight + bias


def _moments(
    x: Tensor, valid: Tensor | None, group: collectives.Group
) -> tuple[Tensor, Tensor | int, Tensor, Tensor]:
    """Valid rows and rows of all processes, and mean and biased variance (dim,) of the valid ones.

    Each process's squares are about its own mean and joined by Chan, Golub and LeVeque (1979), so
    that nothing cancels, in one exchange.
    """
    kept = x.new_ones(x.shape[0], 1) if valid is None else valid[:, None].to(x.dtype)
    count, sums = kept.sum(), (x * kept).sum(0)
    mean = sums / count.clamp(min=1)
    squares = ((x - mean).square() * kept).sum(0)
    if collectives.world_size(group) == 1:
        return count, x.shape[0], mean, squares / count.clamp(min=1)
    own = torch.cat((torch.stack((count, count.new_tensor(x.shape[0]))), sums, squares))
    all_counts, all_sums, all_squares = collectives.gather(own, group).split(
        (2, len(sums), len(sums)), 1
    )
    count, rows = all_counts.sum(0)
    counts = all_counts[:, :1]  # (W, 1)
    mean = all_sums.sum(0) / count.clamp(min=1)
    apart = all_sums / counts.clamp(min=1) - mean
    squares = (all_squares + counts * apart.square()).sum(0)
    return count, rows, mean, squares / count.clamp(min=1)


class CommonSpace(nn.Module):
    """Pooled vectors -> S_va (video, audio) and S_vt (video, text). Paper section 3.3.

    ``config.heads`` picks the layers of the paper's text or the released ones.
    """

    def __init__(self, config: VATTConfig):
        super().__init__()
        d_va, d_vt, paper = config.d_va, config.d_vt, config.heads == "paper"
        self.relu_before_vt = not paper

        def norm(dim: int) -> BatchNorm:
            return BatchNorm(dim, momentum=config.batch_norm_momentum, eps=config.batch_norm_eps)

        self.video_hidden = _dense(config.pooled_dim("video"), d_va, bias=False)
        self.video_hidden_norm = norm(d_va)
        self.video_va, self.video_va_norm = _dense(d_va, d_va, bias=False), norm(d_va)
        self.audio_va = _dense(config.pooled_dim("audio"), d_va, bias=not paper)
        self.video_vt, self.video_vt_norm = _dense(d_va, d_vt, bias=False), norm(d_vt)
        self.text_vt = _dense(config.pooled_dim("text"), d_vt, bias=not paper)
        self.audio_va_norm = norm(d_va) if paper else None
        self.text_vt_norm = norm(d_vt) if paper else None

    def video(
        self, pooled: Tensor, valid: Tensor | None = None, group: collectives.Group = None
    ) -> tuple[Tensor, Tensor]:
        """pooled (B, dim) -> z_video_va (B, d_va), z_video_vt (B, d_vt), not of unit length."""
        # norms give fp32, whatever dtype the weights have
        dtype = self.video_va.weight.dtype
        hidden = F.relu(self.video_hidden_norm(self.video_hidden(pooled), valid, group))
        z_va = self.video_va_norm(self.video_va(hidden.to(dtype)), valid, group)
        before_vt = F.relu(z_va) if self.relu_before_vt else z_va
        return z_va, self.video_vt_norm(self.video_vt(before_vt.to(dtype)), valid, group)

    def audio(
        self, pooled: Tensor, valid: Tensor | None = None, group: collectives.Group = None
    ) -> Tensor:
        z = self.audio_va(pooled)
        return z if self.audio_va_norm is None else self.audio_va_norm(z, valid, group)

    def text(
        self, pooled: Tensor, valid: Tensor | None = None, group: collectives.Group = None
    ) -> Tensor:
        z = self.text_vt(pooled)
        return z if self.text_vt_norm is None else self.text_vt_norm(z, valid, group)


# -- model -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class VATTOutput:
    """What a call computed; absent modalities are None. Tensors of torch; in JAX its arrays.

    ``*_features`` (B, T, dim) after the final norm, AGG at index 0 (only when asked for);
    ``*_pooled`` (B, dim), for text (B, P, dim);
    ``z_*`` embeddings in S_va (B, d_va) and S_vt (B, d_vt), text (B, P, d_vt), before l2
    normalisation.
    """

    video_features: Tensor | None = None
    audio_features: Tensor | None = None
    text_features: Tensor | None = None
    video_pooled: Tensor | None = None
    audio_pooled: Tensor | None = None
    text_pooled: Tensor | None = None
    z_video_va: Tensor | None = None
    z_audio_va: Tensor | None = None
    z_video_vt: Tensor | None = None
    z_text_vt: Tensor | None = None


torch.export.register_dataclass(VATTOutput)


class VATT(nn.Module):
    """Three encoders and the common space.

    ``modality_agnostic``: the encoders are one trunk; each modality keeps its own way in and out.
    """

    def __init__(self, config: VATTConfig):
        super().__init__()
        self.config = config
        # travels with a saved folder, so that ``encode`` takes sentences
        self.vocabulary: Vocabulary | None = None
        c, dropout = config, config.dropout
        options: dict[str, Any] = dict(pre_proj=c.agnostic, dropout=dropout)
        self.video_tokens = PatchTokens(c.video_patch_values, c.video_grid, c.video.dim, **options)
        self.audio_tokens = PatchTokens(c.audio_patch_values, c.audio_grid, c.audio.dim, **options)
        self.text_tokens = WordTokens(c, c.text.dim)
        if config.agnostic:
            self.trunk = Encoder(c.video, dropout=dropout)
            self.post_proj = nn.ModuleDict(
                {m: _dense(c.video.dim, c.pooled_dim(m)) for m in MODALITIES}
            )
        else:
            self.video_encoder = Encoder(c.video, dropout=dropout)
            self.audio_encoder = Encoder(c.audio, dropout=dropout)
            self.text_encoder = Encoder(
                c.text,
                t5=True,
                dropout=dropout,
                buckets=c.relative_buckets,
                max_distance=c.relative_max_distance,
            )
        self.common_space = CommonSpace(c)
        # log(1 / temperature); fp32 always, learned only when the config says so
        self.log_scale = nn.Parameter(
            torch.tensor(-math.log(c.temperature)), requires_grad=c.learn_temperature
        )

    def forward(
        self,
        video: Tensor | None = None,
        audio: Tensor | None = None,
        text: Tensor | None = None,
        *,
        video_keep: Tensor | np.ndarray | None = None,
        audio_keep: Tensor | np.ndarray | None = None,
        video_valid: Tensor | None = None,
        audio_valid: Tensor | None = None,
        text_valid: Tensor | None = None,
        video_grid: tuple[int, int, int] | None = None,
        features: bool = False,
        heads: bool = True,
        pooled: VATTOutput | None = None,
        group: collectives.Group = None,
    ) -> VATTOutput:
        """Encode any subset of modalities.

        Args:
            video: (B, T, H, W, 3) uint8 or float in [-1, 1], any size: positions are resampled,
                odd sizes padded with black, one frame is an image. Or patch rows (B, N, k) of
                ``patchify``, or only the kept rows (B, K, k) together with ``video_keep``.
            audio: (B, S) float waveform in [-1, 1], or patch rows (B, N, k) or (B, K, k).
            text: (B, P, W) or (B, W) integer word ids, 0 = padding.
            video_keep, audio_keep: (K,) or (B, K) sorted distinct patch indices
                (``sample_keep``); None keeps all.
            video_valid, audio_valid, text_valid: (B,), (B,), (B, P) bool; invalid rows stay out
                of the batch norm statistics in training.
            video_grid: patches along (time, height, width), for patch rows of another size than
                the config's.
            features: also return every token's feature; otherwise the last block works for AGG
                only.
            heads: False stops at the pooled vectors.
            pooled: what such calls returned, joined along the batch, instead of video, audio and
                text: the embeddings of these. Both together are one call in two halves.
            group: the process group whose processes share the batch norms' statistics in training;
                None: all processes.

        Raises:
            ValueError: no input, an empty batch, shapes or ids that do not fit; each names the
                value, the rule and the remedy.
        """
        if pooled is None:
            require_input(video, audio, text)
        out = VATTOutput() if pooled is None else dataclasses.replace(pooled)
        if video is not None:
            how = video_input(self.config, video, video_keep, video_grid)
            tokens = self.video_tokens(video, how, video_keep)
            out.video_features, out.video_pooled = run_encoder(
                self, "video", tokens, features=features
            )
        if audio is not None:
            how = audio_input(self.config, audio, audio_keep)
            tokens = self.audio_tokens(audio_rows(self.config, audio), how, audio_keep)
            out.audio_features, out.audio_pooled = run_encoder(
                self, "audio", tokens, features=features
            )
        if text is not None:
            check_text(self.config, text)
            lead, ids = text.shape[:-1], text.flatten(0, -2).long()
            key_mask = F.pad(ids != 0, (1, 0), value=True)  # AGG is always attended
            tokens = self.text_tokens(ids)
            out.text_features, vectors = run_encoder(
                self, "text", tokens, key_mask, features=features
            )
            out.text_pooled = vectors.unflatten(0, lead)
        if heads:
            self._embed(out, video_valid, audio_valid, text_valid, group)
        return out

    def _embed(
        self,
        out: VATTOutput,
        video_valid: Tensor | None,
        audio_valid: Tensor | None,
        text_valid: Tensor | None,
        group: collectives.Group,
    ) -> None:
        """Fill in the embeddings of the pooled vectors that are there."""
        space = self.common_space
        if out.video_pooled is not None:
            out.z_video_va, out.z_video_vt = space.video(out.video_pooled, video_valid, group)
        if out.audio_pooled is not None:
            out.z_audio_va = space.audio(out.audio_pooled, audio_valid, group)
        if out.text_pooled is not None:
            valid = None if text_valid is None else text_valid.flatten()
            z = space.text(out.text_pooled.flatten(0, -2), valid, group)
            out.z_text_vt = z.unflatten(0, out.text_pooled.shape[:-1])

    def sample_keep(
        self,
        drop_rate: float,
        *,
        seed: int,
        step: int,
        rank: int = 0,
        per: DropPer = "batch",
        batch: int | None = None,
        video: Any = None,
        audio: Any = None,
        video_grid: tuple[int, int, int] | None = None,
    ) -> dict[str, Tensor]:
        """DropToken for one step, as ``forward`` takes it: see ``inputs.sample_keeps``.

        Returns:
            {"video_keep": ..., "audio_keep": ...}, int32 indices on the CPU.
        """
        options: dict[str, Any] = dict(seed=seed, step=step, rank=rank, per=per, batch=batch)
        options |= dict(video=video, audio=audio, video_grid=video_grid)
        keeps = sample_keeps(self.config, drop_rate, **options)
        return {name: torch.from_numpy(keep) for name, keep in keeps.items()}

    def scale(self) -> Tensor | float:
        """Logits factor 1 / temperature, at most 100.

        A float when fixed, else a scalar with gradient, fp32 at least.
        """
        if not self.config.learn_temperature:
            return 1 / self.config.temperature
        log_scale: Any = self.log_scale
        if hasattr(log_scale, "to_local"):  # of a sharded model
            from torch.distributed.tensor import Partial

            log_scale = log_scale.to_local(grad_placements=[Partial("avg")])
        wide = log_scale.to(torch.promote_types(log_scale.dtype, torch.float32))
        return wide.clamp(max=math.log(MAX_SCALE)).exp()

    def set_execution(self, *, recompute: Recompute = "none", compile: Compile = "off") -> None:
        """How the encoders' blocks are run in training; results are the same but for rounding.

        Args:
            recompute: what the backward pass computes again, to save memory. "blocks": whole
                blocks, of which only the inputs are kept. "ops": all of them but attention, whose
                result is kept too.
            compile: "blocks" compiles them by ``torch.compile``.

        Raises:
            ValueError: neither of these words.
        """
        for name, value, words in (
            ("recompute", recompute, get_args(Recompute)),
            ("compile", compile, get_args(Compile)),
        ):
            if value not in words:
                raise ValueError(f"{name} is {value!r}; it is one of {', '.join(words)}")
        for module in self.modules():
            if isinstance(module, Block):
                module.recompute, module.compile_mode = recompute, compile

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring a learned temperature back to at least 1/100.

        Call it after each optimizer step, or the temperature could stick beyond the clamp.
        """
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def encode(
        self,
        video: Any = None,
        audio: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        windows: int = 1,
    ) -> dict[str, Tensor]:
        """Unit-norm embeddings of arrays or media files; see ``vatt_fast.encoding.encode``."""
        return encode(self, video=video, audio=audio, text=text, windows=windows)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if there is one, vocabulary.txt."""
        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VATT":
        """Read what ``save_pretrained`` wrote; the model is in evaluation mode.

        Raises:
            ValueError: files are missing, cut short or of another config.
        """
        config, tensors, vocabulary = read_folder(folder)
        model = cls(config)
        load_weights(model, tensors, source=str(Path(folder) / WEIGHTS))
        model.vocabulary = vocabulary
        return model.eval()

    @classmethod
    def from_released(cls, released: Released) -> "VATT":
        """The model of what ``checkpoints.released.read_released`` read, in evaluation mode.

        Weights that it lacks, after ``partial=True``, stay random.

        Raises:
            ValueError: it is one fine-tuned tower.
        """
        if released.modality is not None:
            raise ValueError(
                f"this checkpoint is a fine-tuned {released.modality} classifier; load it with "
                "vatt_fast.classifier.Classifier.from_released"
            )
        model = with_weights(lambda: cls(released.config), released.tensors)
        model.vocabulary = released.vocabulary
        return model.eval()


def with_weights(build: Callable[[], Module], tensors: dict[str, Tensor]) -> Module:
    """The module that ``build`` makes, with these weights; those that lack stay random.

    Where none lacks, none is drawn, which takes seconds for large models.
    """
    with torch.device("meta"):
        model = build()
    if model.state_dict().keys() <= tensors.keys():
        model.load_state_dict(tensors, assign=True)
        return model
    model = build()
    model.load_state_dict(tensors, strict=False)
    return model


def run_encoder(
    model: Any, modality: str, x: Tensor, key_mask: Tensor | None = None, *, features: bool
) -> tuple[Tensor | None, Tensor]:
    """tokens (B, T, dim) -> features (B, T, dim) if asked for, and pooled (B, dim).

    ``model`` has a config and the modality's encoder, under VATT's names.
    """
    if dtype := autocast_dtype(x.device):
        x = x.to(dtype)  # the residual stream in the compute dtype, for text as for patches
    agnostic = model.config.agnostic
    encoder: Encoder = model.trunk if agnostic else getattr(model, f"{modality}_encoder")
    x = encoder(x, key_mask, agg_only=not features)
    if agnostic:
        x = F.gelu(model.post_proj[modality](x))
    return (x if features else None), x[:, 0]


def create_model(
    name: str | Path,
    *,
    recipe: Recipe | None = None,
    words: str | Path | None = None,
    head_dim: HeadDim | None = None,
) -> VATT:
    """A model from a saved folder, a released checkpoint, or a preset with random weights.

    Args:
        name: a folder written by ``save_pretrained`` or ``pretrain``; a released checkpoint's
            prefix, such as ".../ckpt-500000"; or a preset: base_base_small (bbs),
            medium_base_small (mbs), large_base_small (lbs), agnostic_medium (ma), tiny.
        recipe: for presets, "paper" (default) or "released".
        words, head_dim: for released checkpoints, see ``checkpoints.released.read_released``; what
            had to be assumed is a warning.

    Raises:
        ValueError: none of these; one that cannot be read; an option that does not belong to it.
    """
    is_folder = Path(name).is_dir()
    is_released = not is_folder and is_checkpoint(name)
    if recipe is not None and (is_folder or is_released):
        raise ValueError(
            f"{name} is a saved model, whose config holds its recipe; leave recipe out"
        )
    if not is_released and not (words is None and head_dim is None):
        raise ValueError(
            f"{str(name)!r} is no released checkpoint, to which words and head_dim belong; "
            "leave them out"
        )
    if is_folder:
        return VATT.from_pretrained(name)
    if is_released:
        released = read_released(name, words=words, head_dim=head_dim)
        for note in released.notes:
            warnings.warn(note, stacklevel=2)
        return VATT.from_released(released)
    if str(name).lower() in (*PRESETS, *SHORT_NAMES):
        return VATT(preset(str(name), recipe or "paper"))
    raise ValueError(
        f"{str(name)!r} is neither a folder nor a preset, and there is no {prefix_of(name)}.index; "
        f"presets are {', '.join(PRESETS)} (short: {', '.join(SHORT_NAMES)})"
    )


# -- small parts -----------------------------------------------------------------------------------


def _dense(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    nn.init.xavier_uniform_(layer.weight)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


class RMSNorm(nn.RMSNorm):
    """Computed in the weight's dtype, as torch's LayerNorm is for bf16 tokens and fp32 weights."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


def _norm(dim: int, t5: bool) -> nn.Module:
    return RMSNorm(dim, eps=NORM_EPS) if t5 else nn.LayerNorm(dim, eps=NORM_EPS)


def _prepend(agg: Tensor, tokens: Tensor) -> Tensor:
    return torch.cat((agg.to(tokens.dtype).expand(tokens.shape[0], 1, -1), tokens), 1)


def _send(x: Tensor, device: torch.device) -> Tensor:
    """x on ``device``. On its way to a GPU nobody waits for what the GPU has still to do."""
    pin = x.device.type == "cpu" and device.type == "cuda" and torch.cuda.is_available()
    # a graph would replay the copy, from memory that has long been another's
    if pin and not torch.compiler.is_compiling() and not torch.cuda.is_current_stream_capturing():
        x = x.pin_memory()
    return x.to(device, non_blocking=True)
