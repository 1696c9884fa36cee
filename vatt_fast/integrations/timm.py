"""timm's vision transformers: our attention, and VATT's DropToken.

    import timm
    from vatt_fast.integrations import timm as vatt_fast_timm

    vatt_fast_timm.register()
    model = timm.create_model("vit_base_patch16_224", attn_layer="vatt_fast")
    undo = vatt_fast_timm.drop_before_embedding(model, 0.5)

Weights keep their names and shapes. q, k and v are the slices of timm's packed product, of which
nothing is copied.
"""

from collections.abc import Callable
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.layers.attention import Attention as _Attention
from timm.models import vision_transformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..kernels import attention, drop_token, patch_embed, sample_keep
from .fallback import say

# B batch, N tokens or patches, K kept of them, H heads


def register() -> None:
    """Make ``attn_layer="vatt_fast"`` known to timm's ``VisionTransformer``."""
    vision_transformer.ATTN_LAYERS["vatt_fast"] = Attention


class Attention(_Attention):
    """timm's own layer with another product of q, k and v. A mask over queries and dropout of
    probabilities run timm's, and it is said once."""

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """x (B, N, dim) -> (B, N, dim_out).

        Args:
            attn_mask: of keys, bool (B, 1, 1, N), True = attend; any other runs timm's own.
        """
        B, N, _ = x.shape
        key_mask = None if is_causal else keys_of(attn_mask, B, N)
        if reason := self._unsupported(attn_mask, key_mask, is_causal):
            say("timm's Attention", "timm's own", reason)
            return super().forward(x, attn_mask=attn_mask, is_causal=is_causal)
        gate = self.gate(x).sigmoid() if self.gate is not None else None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        if q.dtype != v.dtype:  # norms in fp32 under autocast
            q, k = q.to(v.dtype), k.to(v.dtype)
        out, _ = attention(q, k, v, scale=self.scale, key_mask=key_mask, causal=is_causal)
        out = self.norm(out.flatten(2))
        if gate is not None:
            out = out * gate
        return self.proj_drop(self.proj(out))

    def _unsupported(self, attn_mask, key_mask, is_causal: bool) -> str | None:
        if self.training and self.attn_drop.p:
            return (
                f"the op has no dropout of probabilities ({self.attn_drop.p}); set attn_drop to 0"
            )
        if attn_mask is not None and key_mask is None and not is_causal:
            return "the op takes a mask of keys, bool (B, 1, 1, N), and no other"
        return None


def keys_of(attn_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """A mask (B or 1, 1, 1, N) of bool as one of keys (B, N); None where it is another."""
    if attn_mask is None or attn_mask.dtype != torch.bool or attn_mask.ndim != 4:
        return None
    if attn_mask.shape[1:] != (1, 1, tokens) or attn_mask.shape[0] not in (1, batch):
        return None
    return attn_mask[:, 0, 0].expand(batch, tokens)


class DropToken(nn.Module):
    """VATT's DropToken (section 3.3) in the place of timm's ``PatchDropout``, after the embedding.

    For any model that has a ``patch_drop``; ``drop_before_embedding`` costs less. timm draws other
    patches for every picture; this draws once a batch, from seed and step, so that a run can be
    repeated. Prefix tokens stay. It counts its own steps, in training only.

    Args:
        prob: share of patches that is dropped, in [0, 1).
        num_prefix_tokens: so many first tokens are never dropped.
        seed, step: of the draw; the step grows with every call.
    """

    def __init__(self, prob: float, num_prefix_tokens: int = 1, *, seed: int = 0, step: int = 0):
        super().__init__()
        if not 0 <= prob < 1:
            raise ValueError(f"prob is {prob}; it must be in [0, 1)")
        self.prob, self.num_prefix_tokens, self.seed, self.step = (
            prob,
            num_prefix_tokens,
            seed,
            step,
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, prefix + N, dim) -> (B, prefix + kept, dim)."""
        if not self.training or not self.prob:
            return x
        prefix = self.num_prefix_tokens
        keep = self.draw(x.shape[1] - prefix)
        kept = torch.cat((torch.arange(prefix), keep + prefix))
        return drop_token(x, kept.to(x.device))

    @torch.compiler.disable
    def draw(self, count: int) -> Tensor:
        """Of so many patches the kept ones, sorted, int32 (K,); and count a step."""
        keep = sample_keep(count, self.prob, seed=self.seed, step=self.step, stream="timm")
        self.step += 1
        return torch.from_numpy(keep)


def drop_before_embedding(
    model: VisionTransformer, prob: float, *, seed: int = 0, step: int = 0
) -> Callable[[], None]:
    """VATT's DropToken where VATT has it: in training, dropped patches are not embedded at all.

    Values and gradients are those of ``DropToken`` with the same draws. It works in place; while
    ``model.patch_embed`` is in evaluation nothing is dropped.

    Args:
        prob: share of patches that is dropped, in [0, 1).
        seed, step: of the draw, one for a batch; ``model.patch_drop.step`` grows with every call.

    Returns:
        A function without arguments that undoes it.

    Raises:
        ValueError: a model whose embedding is not one linear map of whole patches, in one sentence.
    """
    if reason := _not_first(model):
        raise ValueError(
            f"DropToken cannot stand before the embedding, because {reason};"
            " put timm.DropToken into model.patch_drop"
        )
    embed, before = model.patch_embed, (model.patch_drop, type(model), type(model.patch_embed))
    drop = _DrawnBefore(prob, model.num_prefix_tokens, seed=seed, step=step).train(model.training)
    # subclasses with another method: parameters, their names and hooks stay
    model.patch_drop, model.__class__, embed.__class__ = drop, _DropsFirst, _EmbedsLater

    def undo() -> None:
        model.patch_drop, model.__class__, embed.__class__ = before

    return undo


def _not_first(model: nn.Module) -> str | None:
    if type(model) is _DropsFirst:
        return "it stands there already"
    if type(model) is not VisionTransformer:
        return f"{type(model).__name__} is not timm's VisionTransformer"
    embed: Any = model.patch_embed
    if model.dynamic_img_size or getattr(embed, "dynamic_img_pad", False):
        return "images of any size have no one grid of patches (dynamic_img_size, dynamic_img_pad)"
    if type(embed) is not PatchEmbed or type(embed.proj) is not nn.Conv2d or not embed.flatten:
        return f"{type(embed).__name__} is not timm's PatchEmbed of a Conv2d"
    if not isinstance(embed.norm, nn.Identity):
        return f"PatchEmbed has a {type(embed.norm).__name__} between projection and position"
    return None


class _DrawnBefore(DropToken):
    """Draws for the model, and finds nothing left to drop."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class _EmbedsLater(PatchEmbed):
    """In training it hands the images on: the model embeds the kept patches only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if tuple(x.shape[2:]) != self.img_size:
            raise ValueError(
                f"images are {tuple(x.shape[2:])}; the model takes {self.img_size},"
                " see its set_input_size"
            )
        return x


class _DropsFirst(VisionTransformer):
    """timm's, with another embedding in training."""

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Images (B, C, height, width) -> (B, prefix + K, dim); what is embedded goes to timm's."""
        if x.ndim == 3:
            return super()._pos_embed(x)
        embed: Any = self.patch_embed
        keep = self.patch_drop.draw(embed.num_patches)
        weight, position = embed.proj.weight, self.pos_embed
        tokens = patch_embed(
            x[..., None],  # channels as frames: a patch's values lie as the convolution's weight
            weight.flatten(1),
            weight.new_zeros(len(weight)) if embed.proj.bias is None else embed.proj.bias,
            None if position is None else position[0, -embed.num_patches :],
            keep.to(x.device),
            scale=1.0,
            shift=0.0,
            patch=(x.shape[1], *embed.patch_size),
        )
        prefix = [part for part in (self.cls_token, self.reg_token) if part is not None]
        first = torch.cat(prefix, 1) if prefix else None
        if position is not None:
            tokens = tokens.to(position.dtype)  # under autocast, as the sum would be
            if first is not None and not self.no_embed_class:
                first = first + position[:, : self.num_prefix_tokens]
        if first is not None:
            tokens = torch.cat((first.expand(len(x), -1, -1), tokens), 1)
        return tokens if position is None else self.pos_drop(tokens)
