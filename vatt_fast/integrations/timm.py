"""timm's vision transformers: our attention, and VATT's DropToken.

    import timm
    from vatt_fast.integrations import timm as vatt_fast_timm

    vatt_fast_timm.register()
    model = timm.create_model("vit_base_patch16_224", attn_layer="vatt_fast")
    model.patch_drop = vatt_fast_timm.DropToken(0.5, num_prefix_tokens=model.num_prefix_tokens)

Weights keep their names and shapes. q, k and v are the slices of timm's packed product, of which
nothing is copied.
"""

import torch
from timm.layers.attention import Attention as _Attention
from timm.models import vision_transformer
from torch import Tensor, nn

from ..kernels import attention, drop_token, sample_keep
from .fallback import say

# B batch, N tokens, H heads


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
            return f"the op takes a mask of keys (B, 1, 1, N), not {tuple(attn_mask.shape)}"
        return None


def keys_of(attn_mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
    """A mask (B or 1, 1, 1, N) of bool as one of keys (B, N); None where it is another."""
    if attn_mask is None or attn_mask.dtype != torch.bool or attn_mask.ndim != 4:
        return None
    if attn_mask.shape[1:] != (1, 1, tokens) or attn_mask.shape[0] not in (1, batch):
        return None
    return attn_mask[:, 0, 0].expand(batch, tokens)


class DropToken(nn.Module):
    """VATT's DropToken (section 3.3) in the place of timm's ``PatchDropout``.

    timm draws other patches for every picture; this draws once a batch, from seed and step, so that
    a run can be repeated. Prefix tokens stay. It counts its own steps, in training only.

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
        count = x.shape[1] - prefix
        keep = sample_keep(count, self.prob, seed=self.seed, step=self.step, stream="timm")
        self.step += 1
        kept = torch.cat((torch.arange(prefix), torch.from_numpy(keep) + prefix))
        return drop_token(x, kept.to(x.device))
