"""The contrastive losses of VATT on the ``contrastive_lse`` op: three published forms, masks, any number of devices.

Shapes: M clips on this device, N over all W devices, P texts a clip, D dimensions of a common space.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import collectives
from .config import NCEForm, VATTConfig
from .kernels import contrastive_lse

# bf16 unit vectors may exceed unit length by their rounding; the bound promised to the op allows for it
BOUND_SLACK = 1.02


def nce_terms(row, col, pos, form: NCEForm, *, xp: Any = torch):
    """Loss of each clip from its row, column and positive log-sums, all (M,); ``xp`` is torch, or jax.numpy for JAX arrays.

    paper      log(e^row + e^col - e^pos) - pos    positives counted once (eq. 4-5; Miech et al. 2020)
    released   logaddexp(row, col) - pos           positives twice: never below ln 2
    symmetric  (row - pos) + (col - pos)           two softmax cross-entropies
    """
    if form == "paper":
        both = xp.logaddexp(row, col)
        return both + xp.log1p(-xp.exp(pos - both)) - pos  # pos - both <= -ln 2: stable
    if form == "released":
        return xp.logaddexp(row, col) - pos
    if form == "symmetric":
        return row + col - 2 * pos
    raise ValueError(f"nce_form is {form!r}; it is one of paper, released, symmetric")


def contrastive_terms(
    x: Tensor,
    y: Tensor,
    *,
    scale: Tensor | float,
    form: NCEForm = "paper",
    x_valid: Tensor | None = None,
    y_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-clip loss terms of this device's clips against the clips of all devices (paper eq. 4 and 5): NCE, with P > 1 texts MIL-NCE.

    ``global_mean`` makes one loss of them. Every device must hold the same number M of clips.

    Args:
        x: (M, D) embeddings of one modality; y: (M, D) or (M, P, D) of the other. Normalised here.
        scale: 1 / temperature, a float or a scalar tensor with gradient.
        x_valid: (M,) bool; an invalid clip is nobody's negative and has no term.
        y_valid: (M,) or (M, P) bool; an invalid text is nobody's negative or positive; a clip without one has no term.

    Returns:
        terms (M,), 0 where there is none, and valid (M,) bool: which clips have a term.

    Raises:
        ValueError: shapes that do not fit, or an unknown form.
    """
    if y.ndim == 2:
        y = y[:, None]
    if x.ndim != 2 or y.ndim != 3 or x.shape[0] != y.shape[0] or x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"contrastive_terms takes x (M, D) and y (M, D) or (M, P, D), got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    M, P, _ = y.shape
    y_valid = (
        y.new_ones((M, P), dtype=torch.bool)
        if y_valid is None
        else y_valid.view(M, -1).expand(M, P)
    )
    x_valid = x.new_ones(M, dtype=torch.bool) if x_valid is None else x_valid
    valid = x_valid & y_valid.any(1)

    x = _unit(x)
    y_all = collectives.gather(_unit(y)).flatten(0, 2)  # (N * P, D)
    y_valid_all = collectives.gather(y_valid).flatten()
    first = M * collectives.rank()
    bound = BOUND_SLACK * (scale if isinstance(scale, float) else 100.0)
    row, col, pos = contrastive_lse(
        x,
        y_all,
        scale=scale,
        texts_per_clip=P,
        first=first,
        x_valid=x_valid,
        y_valid=y_valid_all,
        bound=bound,
    )
    # col covers this device's x only: the devices' parts are joined, then each clip joins its own P texts
    col = collectives.gather(col)[:, first * P : (first + M) * P].unflatten(1, (M, P))  # (W, M, P)
    col = _masked_logsumexp(col.transpose(0, 1).flatten(1), valid)
    row, pos = (
        row.masked_fill(~valid, 0),
        pos.masked_fill(~valid, -math.log(2)),
    )  # any finite values: the term is dropped
    return nce_terms(row, col, pos, form).masked_fill(~valid, 0), valid


def global_mean(terms: Tensor, valid: Tensor) -> Tensor:
    """Mean of ``terms`` over the valid clips of all devices; 0, with a connected graph, where there is none.

    Every device returns W times its share: the mean over devices is the loss of the global batch, and gradients averaged over devices
    (DistributedDataParallel) are its gradients.
    """
    count = collectives.total(valid.sum(dtype=terms.dtype)).clamp(min=1)
    return terms.sum() * collectives.world_size() / count


@dataclasses.dataclass
class VATTLoss:
    """``total`` = va_weight * va + vt_weight * vt; a part whose modalities are absent is None and counts 0."""

    total: Tensor
    va: Tensor | None = None
    vt: Tensor | None = None


def vatt_loss(
    output,
    config: VATTConfig,
    *,
    scale: Tensor | float | None = None,
    video_valid: Tensor | None = None,
    audio_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
) -> VATTLoss:
    """Pre-training loss (paper eq. 6) of a ``VATTOutput``: video-audio NCE in S_va and video-text MIL-NCE in S_vt.

    Args:
        scale: ``model.scale()``; None takes the config's fixed temperature.
        video_valid, audio_valid: (B,) bool; text_valid: (B, P) bool; None: all valid. Give the model the same ones: it keeps invalid clips
            out of its batch norms, here they are no term and nobody's negative.

    Raises:
        ValueError: no pair of modalities in the output.
    """
    scale = 1 / config.temperature if scale is None else scale
    pairs = {
        "va": (output.z_video_va, output.z_audio_va, audio_valid),
        "vt": (output.z_video_vt, output.z_text_vt, text_valid),
    }
    losses = {}
    for name, (z_video, z_other, other_valid) in pairs.items():
        if z_video is not None and z_other is not None:
            terms = contrastive_terms(
                z_video,
                z_other,
                scale=scale,
                form=config.nce_form,
                x_valid=video_valid,
                y_valid=other_valid,
            )
            losses[name] = global_mean(*terms)
    if not losses:
        raise ValueError(
            "the output holds no pair of modalities; a loss needs video with audio, or video with text"
        )
    weights = {"va": config.va_weight, "vt": config.vt_weight}
    weighted = [weights[name] * value for name, value in losses.items()]
    return VATTLoss(weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1], **losses)


def _unit(z: Tensor) -> Tensor:
    return F.normalize(z if z.dtype == torch.float64 else z.float(), dim=-1)


def _masked_logsumexp(x: Tensor, valid: Tensor) -> Tensor:
    """Log-sum-exp of each row of x (M, K); rows without a term are 0 and pass no gradient (a row of -inf would pass nan)."""
    return torch.logsumexp(torch.where(valid[:, None], x, 0.0), 1)
