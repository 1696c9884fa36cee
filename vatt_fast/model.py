"""VATT in PyTorch, in the order of the data: positions, tokens, encoder, common space, model.

Shapes: B clips, N patches, K kept patches, P texts a clip, W words, T = 1 + kept tokens, H heads.
Facts follow the paper (Akbari et al., NeurIPS 2021) and the released code; where they differ, ``VATTConfig`` decides.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import collectives
from .config import TowerConfig, VATTConfig, video_grid
from .kernels import attention, patch_embed, patchify, sample_keep
from .kernels.dispatch import autocast_dtype
from .kernels.drop_token import check_keep
from .positions import relative_position_buckets, resample_matrix

if TYPE_CHECKING:
    from .data.text import Vocabulary

NORM_EPS = 1e-6
MAX_SCALE = 100.0  # 1 / temperature never exceeds it

# -- positions ---------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _resample_matrix(n_old: int, n_new: int) -> Tensor:
    return torch.from_numpy(resample_matrix(n_old, n_new))


@torch.compiler.assume_constant_result
def _relative_buckets(length: int, num_buckets: int, max_distance: int) -> Tensor:
    return torch.from_numpy(relative_position_buckets(length, num_buckets, max_distance))


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
                table = _resample_matrix(table.shape[0], length).to(table) @ table
            rows.append(table.view([length if i == axis else 1 for i in range(len(grid))] + [-1]))
        return self.norm(functools.reduce(torch.add, rows).flatten(0, -2))


# -- tokens ------------------------------------------------------------------------------------------------------------


class PatchTokens(nn.Module):
    """Raw patches of video or audio -> tokens, AGG first.

    With ``pre_proj`` (modality-agnostic) the order is project, Dense + GELU, position, DropToken, AGG; every step acts
    on one token, so patches are dropped before the projection in both cases.
    """

    def __init__(
        self,
        patch: tuple[int, ...],
        values: int,
        grid: tuple[int, ...],
        dim: int,
        *,
        pre_proj: bool,
        dropout: float,
    ):
        super().__init__()
        self.patch, self.dropout = patch, dropout
        self.project = _dense(values, dim)
        self.pre_proj = _dense(dim, dim) if pre_proj else None
        self.position = PositionTable(grid, dim)
        self.agg = nn.Parameter(torch.randn(dim) * dim**-0.5)

    def forward(
        self,
        patches: Tensor,
        grid: tuple[int, ...],
        keep: Tensor | None,
        *,
        scale: float,
        shift: float,
    ) -> Tensor:
        """patches (B, N, k), or only the kept (B, K, k) -> tokens (B, 1 + K, dim)."""
        position = self.position(grid)
        gathered = keep is not None and patches.shape[1] == keep.shape[-1]
        weight, bias = self.project.weight, self.project.bias
        if self.pre_proj is None and not (self.training and self.dropout):
            return patch_embed(
                patches,
                weight,
                bias,
                position,
                keep,
                scale=scale,
                shift=shift,
                agg=self.agg,
                gathered=gathered,
            )
        tokens = patch_embed(
            patches, weight, bias, None, keep, scale=scale, shift=shift, gathered=gathered
        )
        if self.pre_proj is not None:
            tokens = F.gelu(self.pre_proj(tokens))
        tokens = tokens + (position if keep is None else position[keep]).to(tokens.dtype)
        return _prepend(self.agg, F.dropout(tokens, self.dropout, self.training))


class WordTokens(nn.Module):
    """Word ids -> tokens, AGG first. ``position`` (modality-agnostic) adds a table of word positions."""

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
        if self.agnostic:
            tokens = tokens + self.position((ids.shape[1],)).to(tokens.dtype)
        tokens = F.dropout(tokens, self.dropout, self.training)
        return _prepend(self.agg, tokens) if self.agnostic else tokens


# -- encoder -----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Pre-norm transformer block: x + MHA(norm(x)), then x + MLP(LayerNorm(x)). ``t5``: RMS norm, no linear biases, unscaled scores."""

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
        """x (B, T, dim) -> (B, T, dim), or with ``agg_only`` the same function's (B, 1, dim) at index 0."""
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
            q_bias, kv_bias = (
                (None, None) if self.qkv.bias is None else self.qkv.bias.split((inner, 2 * inner))
            )
            q = F.linear(x[:, :1], self.qkv.weight[:inner], q_bias).unflatten(
                -1, (self.num_heads, -1)
            )
            k, v = (
                F.linear(x, self.qkv.weight[inner:], kv_bias)
                .unflatten(-1, (2, self.num_heads, -1))
                .unbind(2)
            )
            bias = None if bias is None else bias[:, :1]
        else:
            q, k, v = (
                self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            )  # strided views, no copy
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
    """The same function for every modality and both kinds of model. ``t5`` adds the relative position bias of the text tower."""

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
        self.blocks = nn.ModuleList(
            Block(tower, t5=t5, dropout=dropout) for _ in range(tower.depth)
        )
        self.norm = _norm(tower.dim, t5)

    def forward(
        self, x: Tensor, key_mask: Tensor | None = None, *, agg_only: bool = False
    ) -> Tensor:
        """x (B, T, dim) -> features (B, T, dim); ``agg_only``: (B, 1, dim), the last block's queries, output and MLP for AGG alone."""
        bias = self._bias(x.shape[1])
        for i, block in enumerate(self.blocks):
            x = block(x, bias, key_mask, agg_only and i == len(self.blocks) - 1)
        return F.dropout(self.norm(x), self.dropout, self.training)

    def _bias(self, length: int) -> Tensor | None:
        if self.relative_bias is None:
            return None
        buckets = _relative_buckets(length, self.relative_bias.shape[0], self.max_distance).to(
            self.relative_bias.device
        )
        return self.relative_bias[buckets].permute(2, 0, 1)  # (H, T, T)


# -- common space ------------------------------------------------------------------------------------------------------


class BatchNorm(nn.Module):
    """Batch norm over the valid rows of all devices; the moving variance is the biased one (Keras, not torch)."""

    def __init__(self, dim: int, *, momentum: float, eps: float):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.register_buffer("running_mean", torch.zeros(dim))
        self.register_buffer("running_var", torch.ones(dim))
        self.running_mean: Tensor
        self.running_var: Tensor

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """x (R, dim); valid (R,) bool. Statistics are fp32 at least; so is the result: embeddings feed the loss."""
        x = x.to(self.weight.dtype)
        if self.training:
            rows = x.new_ones(x.shape[0], 1) if valid is None else valid[:, None].to(x.dtype)
            count = collectives.total(rows.sum())
            mean = collectives.total((x * rows).sum(0)) / count.clamp(min=1)
            var = collectives.total(((x - mean).square() * rows).sum(0)) / count.clamp(min=1)
            with torch.no_grad():  # a batch without a valid row teaches nothing
                step = self.momentum * (count > 0)
                self.running_mean.lerp_(mean, step)
                self.running_var.lerp_(var, step)
        else:
            mean, var = self.running_mean, self.running_var
        return (x - mean) * (var + self.eps).rsqrt() * self.weight + self.bias


class CommonSpace(nn.Module):
    """Pooled vectors -> S_va (video, audio) and S_vt (video, text). Paper section 3.3; ``heads`` picks its text or the released layers."""

    def __init__(self, config: VATTConfig):
        super().__init__()
        d_va, d_vt, paper = config.d_va, config.d_vt, config.heads == "paper"
        self.relu_before_vt = not paper

        def norm(dim: int) -> BatchNorm:
            return BatchNorm(dim, momentum=config.batch_norm_momentum, eps=config.batch_norm_eps)

        self.video_hidden, self.video_hidden_norm = (
            _dense(config.pooled_dim("video"), d_va, bias=False),
            norm(d_va),
        )
        self.video_va, self.video_va_norm = _dense(d_va, d_va, bias=False), norm(d_va)
        self.audio_va = _dense(config.pooled_dim("audio"), d_va, bias=not paper)
        self.video_vt, self.video_vt_norm = _dense(d_va, d_vt, bias=False), norm(d_vt)
        self.text_vt = _dense(config.pooled_dim("text"), d_vt, bias=not paper)
        self.audio_va_norm = norm(d_va) if paper else None
        self.text_vt_norm = norm(d_vt) if paper else None

    def video(self, pooled: Tensor, valid: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """pooled (B, dim) -> z_video_va (B, d_va), z_video_vt (B, d_vt), not normalised to unit length."""
        hidden = F.relu(self.video_hidden_norm(self.video_hidden(pooled), valid))
        z_va = self.video_va_norm(self.video_va(hidden), valid)
        return z_va, self.video_vt_norm(
            self.video_vt(F.relu(z_va) if self.relu_before_vt else z_va), valid
        )

    def audio(self, pooled: Tensor, valid: Tensor | None = None) -> Tensor:
        z = self.audio_va(pooled)
        return z if self.audio_va_norm is None else self.audio_va_norm(z, valid)

    def text(self, pooled: Tensor, valid: Tensor | None = None) -> Tensor:
        z = self.text_vt(pooled)
        return z if self.text_vt_norm is None else self.text_vt_norm(z, valid)


# -- model -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class VATTOutput:
    """What a call computed; absent modalities are None.

    ``*_features`` (B, T, dim) after the final norm, AGG at index 0 (only when asked for); ``*_pooled`` (B, dim), for text (B, P, dim);
    ``z_*`` embeddings in S_va (B, d_va) and S_vt (B, d_vt), text (B, P, d_vt), before l2 normalisation.
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
    """Three encoders and the common space. ``modality_agnostic``: the encoders are one trunk, each modality keeps its own way in and out."""

    def __init__(self, config: VATTConfig):
        super().__init__()
        self.config = config
        self.vocabulary: Vocabulary | None = (
            None  # travels with a saved folder, so that ``encode`` takes sentences
        )
        c, pre_proj, dropout = config, config.agnostic, config.dropout
        patch_options: dict[str, Any] = dict(pre_proj=pre_proj, dropout=dropout)
        self.video_tokens = PatchTokens(
            c.video_patch, c.video_patch_values, c.video_grid, c.video.dim, **patch_options
        )
        self.audio_tokens = PatchTokens(
            (c.audio_patch,), c.audio_patch, (c.num_audio_patches,), c.audio.dim, **patch_options
        )
        self.text_tokens = WordTokens(c, c.text.dim)
        if config.agnostic:
            self.trunk = Encoder(c.video, dropout=dropout)
            self.post_proj = nn.ModuleDict(
                {m: _dense(c.video.dim, c.pooled_dim(m)) for m in ("video", "audio", "text")}
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
    ) -> VATTOutput:
        """Encode any subset of modalities.

        Args:
            video: (B, T, H, W, 3) uint8 or float in [-1, 1], any size (positions are resampled, odd sizes padded with black; one frame is an
                image), or patch rows (B, N, k) of ``patchify``, or only the kept rows (B, K, k) together with ``video_keep``.
            audio: (B, S) float waveform in [-1, 1], or patch rows (B, N, k) or (B, K, k).
            text: (B, P, W) or (B, W) integer word ids, 0 = padding.
            video_keep, audio_keep: (K,) or (B, K) sorted distinct patch indices (``sample_keep``); None keeps all.
            video_valid, audio_valid, text_valid: (B,), (B,), (B, P) bool; invalid rows stay out of the batch norm statistics in training.
            video_grid: patches along (time, height, width), for patch rows of another size than the config's.
            features: also return every token's feature; otherwise the last block works for AGG only.

        Raises:
            ValueError: no input, an empty batch, shapes or ids that do not fit; each names the value, the rule and the remedy.
        """
        out = VATTOutput()
        if video is None and audio is None and text is None:
            raise ValueError("no input; give at least one of video, audio, text")
        if video is not None:
            out.video_features, out.video_pooled = self._encode_video(
                video, video_keep, video_grid, features
            )
            out.z_video_va, out.z_video_vt = self.common_space.video(out.video_pooled, video_valid)
        if audio is not None:
            out.audio_features, out.audio_pooled = self._encode_audio(audio, audio_keep, features)
            out.z_audio_va = self.common_space.audio(out.audio_pooled, audio_valid)
        if text is not None:
            out.text_features, pooled = self._encode_text(text, features)
            z = self.common_space.text(pooled, None if text_valid is None else text_valid.flatten())
            lead = text.shape[:-1]
            out.text_pooled, out.z_text_vt = pooled.unflatten(0, lead), z.unflatten(0, lead)
        return out

    def _encode_video(
        self, video: Tensor, keep, grid, features: bool
    ) -> tuple[Tensor | None, Tensor]:
        c = self.config
        scale, shift = (2 / 255, -1.0) if video.dtype == torch.uint8 else (1.0, 0.0)
        if video.ndim == 5 and video.shape[-1] == 3:
            _refuse_empty("video", video)
            if video.shape[1] == 1:  # an image fills one temporal patch
                video = video.expand(-1, c.video_patch[0], -1, -1, -1)
            _, frames, height, width, _ = video.shape
            grid = video_grid(frames, height, width, c.video_patch)
            video = patchify(
                video, c.video_patch, pad_value=0 if video.dtype == torch.uint8 else -1
            )
        elif video.ndim != 3:
            raise ValueError(
                f"video is {tuple(video.shape)}; it takes frames (B, T, H, W, 3) or patch rows (B, N, {c.video_patch_values})"
            )
        return self._encode_patches(
            "video", video, keep, grid or c.video_grid, features, scale=scale, shift=shift
        )

    def _encode_audio(self, audio: Tensor, keep, features: bool) -> tuple[Tensor | None, Tensor]:
        c = self.config
        if audio.ndim == 2:
            _refuse_empty("audio", audio)
            audio = patchify(audio, (c.audio_patch,))
            grid = (audio.shape[1],)
        elif audio.ndim == 3:
            only_kept = keep is not None and audio.shape[1] == keep.shape[-1]
            grid = (c.num_audio_patches if only_kept else audio.shape[1],)
        else:
            raise ValueError(
                f"audio is {tuple(audio.shape)}; it takes a waveform (B, S) or patch rows (B, N, {c.audio_patch})"
            )
        return self._encode_patches("audio", audio, keep, grid, features, scale=1.0, shift=0.0)

    def _encode_patches(
        self,
        modality: str,
        patches: Tensor,
        keep,
        grid,
        features: bool,
        *,
        scale: float,
        shift: float,
    ):
        tokens: PatchTokens = getattr(self, f"{modality}_tokens")
        count = math.prod(grid)
        _refuse_empty(modality, patches)
        if keep is not None:
            keep = _checked_keep(modality, keep, count, patches)
        kept = count if keep is None else keep.shape[-1]
        if patches.shape[1] not in (count, kept) or patches.shape[2] != tokens.project.in_features:
            raise ValueError(
                f"{modality} patches are {tuple(patches.shape)}; a grid of {grid} takes (B, {count}, {tokens.project.in_features})"
                + (
                    f" or the {kept} kept rows"
                    if keep is not None
                    else "; another size needs frames, or video_grid"
                )
            )
        x = tokens(patches, grid, keep, scale=scale, shift=shift)
        return self._run_encoder(modality, x, None, features)

    def _encode_text(self, text: Tensor, features: bool) -> tuple[Tensor | None, Tensor]:
        if text.ndim not in (2, 3) or text.is_floating_point() or text.dtype == torch.bool:
            raise ValueError(
                f"text is {tuple(text.shape)} {text.dtype}; it takes integer word ids (B, P, W) or (B, W)"
            )
        _refuse_empty("text", text)
        ids = text.flatten(0, -2).long()
        if self.config.agnostic and ids.shape[1] > self.config.words:
            raise ValueError(
                f"text has {ids.shape[1]} words; this model's position table holds {self.config.words}: cut the sentences"
            )
        key_mask = F.pad(ids != 0, (1, 0), value=True)  # AGG is always attended
        return self._run_encoder("text", self.text_tokens(ids), key_mask, features)

    def _run_encoder(
        self, modality: str, x: Tensor, key_mask: Tensor | None, features: bool
    ) -> tuple[Tensor | None, Tensor]:
        if dtype := autocast_dtype(x.device):
            x = x.to(dtype)  # the residual stream in the compute dtype, for text as for patches
        encoder: Encoder = (
            self.trunk if self.config.agnostic else getattr(self, f"{modality}_encoder")
        )
        x = encoder(x, key_mask, agg_only=not features)
        if self.config.agnostic:
            x = F.gelu(self.post_proj[modality](x))
        return (x if features else None), x[:, 0]

    def sample_keep(
        self,
        drop_rate: float,
        *,
        seed: int,
        step: int,
        rank: int = 0,
        per: str = "batch",
        batch: int | None = None,
    ):
        """DropToken for one step, as ``forward`` takes it: {"video_keep": ..., "audio_keep": ...}, drawn on the host.

        Args:
            drop_rate: fraction of patches removed, in [0, 1).
            rank: device of a data-parallel run; each draws its own.
            per: "batch" keeps the same patches of all clips, (K,); "clip" others of each, (batch, K), and needs ``batch``, clips.

        Returns:
            int32 indices on the CPU, sorted, the same for the same seed, step and rank.

        Raises:
            ValueError: an argument out of range, or per="clip" without ``batch``.
        """
        counts = {"video": self.config.num_video_patches, "audio": self.config.num_audio_patches}
        return {
            f"{modality}_keep": torch.from_numpy(
                sample_keep(
                    count,
                    drop_rate,
                    seed=seed,
                    step=step,
                    stream=f"{modality}/{rank}",
                    per=per,
                    batch=batch,
                )
            )
            for modality, count in counts.items()
        }

    def scale(self) -> Tensor | float:
        """Logits factor 1 / temperature, at most 100: a float when fixed, else an fp32 scalar with gradient."""
        if not self.config.learn_temperature:
            return 1 / self.config.temperature
        return self.log_scale.float().clamp(max=math.log(MAX_SCALE)).exp()

    @torch.no_grad()
    def clamp_temperature(self) -> None:
        """Bring a learned temperature back to at least 1/100; call after each optimizer step, or it could stick beyond the clamp."""
        self.log_scale.clamp_(max=math.log(MAX_SCALE))

    def encode(
        self, video=None, audio=None, text: str | Sequence[str] | None = None, **options
    ) -> dict[str, Tensor]:
        """Unit-norm embeddings of arrays or media files; see ``vatt_fast.encoding.encode``."""
        from .encoding import encode

        return encode(self, video=video, audio=audio, text=text, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json, model.safetensors and, if there is one, vocabulary.txt into ``folder``."""
        from .weights import save_model

        save_model(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "VATT":
        """Read what ``save_pretrained`` wrote. Raises ValueError where files are missing, cut short or of another config."""
        from .weights import load_model

        return load_model(folder)


# -- small parts -------------------------------------------------------------------------------------------------------


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


def _refuse_empty(name: str, x: Tensor) -> None:
    if 0 in x.shape:
        raise ValueError(
            f"{name} is {tuple(x.shape)}; an empty batch or clip cannot be encoded: leave the modality out instead"
        )


def _checked_keep(modality: str, keep: Tensor | np.ndarray, count: int, patches: Tensor) -> Tensor:
    if isinstance(keep, np.ndarray):
        keep = torch.from_numpy(keep)
    if (
        keep.device.type == "cpu" and not torch.compiler.is_compiling()
    ):  # on a device it was checked where it was drawn
        check_keep(keep, count, name=f"{modality}_keep")
    if keep.ndim == 2 and keep.shape[0] != patches.shape[0]:
        raise ValueError(
            f"{modality}_keep is {tuple(keep.shape)} for a batch of {patches.shape[0]}; it takes (K,) or (B, K)"
        )
    return keep.to(patches.device)
