"""The contrastive losses of VATT on the ``contrastive_lse`` op: three published forms, masks, any
number of devices.

The bodies serve torch, where a device is a process, and JAX: ``Devices`` holds what differs,
``on_jax.losses`` has JAX's.

Shapes: M clips on this device, N over all W devices, P texts a clip, D dimensions of a space.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import collectives
from .config import MAX_SCALE, NCEForm, VATTConfig
from .kernels import contrastive_lse

# bf16 unit vectors may exceed unit length by their rounding; the op's bound allows for it
BOUND_SLACK = 1.02

# Embeddings shorter than this are 0 and pass no gradient. Batch norm makes them where all valid
# rows are equal and its bias is still 0: one captioned clip in the first batch. The released code
# divides the gradient by 1e-12 there, and Adam's second moment stays poisoned for 50,000 steps.
NO_DIRECTION = 1e-6


def nce_terms(row: Any, col: Any, pos: Any, form: NCEForm, *, xp: Any = torch) -> Any:
    """Loss of each clip from its row, column and positive log-sums, all (M,).

    paper      log(e^row + e^col - e^pos) - pos   positives once (eq. 4-5; Miech et al. 2020)
    released   logaddexp(row, col) - pos          positives twice: never below ln 2
    symmetric  (row - pos) + (col - pos)          two softmax cross-entropies

    ``xp`` is torch, or jax.numpy for JAX arrays. Raises ValueError for an unknown form.
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
    group: collectives.Group = None,
    most_clips: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Loss of each of this process's clips against the clips of all (paper eq. 4 and 5).

    It is NCE, and with P > 1 texts MIL-NCE. ``global_mean`` makes one loss of the terms. Processes
    may hold different numbers M of clips; all must call.

    Args:
        x: (M, D) embeddings of one modality. They are brought to unit length here.
        y: (M, D) or (M, P, D) embeddings of the other.
        scale: 1 / temperature, a float or a scalar tensor with gradient.
        x_valid: (M,) bool; an invalid clip is nobody's negative and has no term.
        y_valid: (M,) or (M, P) bool; an invalid text is nobody's negative or positive; a clip
            without a valid one has no term.
        group: the ``torch.distributed`` process group that shares the batch; None: all processes.
        most_clips: as many clips as any process holds at most, the same everywhere. None: the
            processes tell each other, for which the host waits for the device; where it cannot,
            under ``torch.compile`` and in CUDA graphs, each must hold equally many.

    Returns:
        terms (M,), 0 where there is none, and valid (M,) bool: which clips have a term.

    Raises:
        ValueError: shapes that do not fit, here or between processes, or an unknown form.
    """
    y = _with_texts(x, y)
    M, P, D = y.shape
    if most_clips is None:
        most_clips = _most_clips(M, P, D, x.device, group)
    elif most_clips < M:
        raise ValueError(f"most_clips is {most_clips}, and this process holds {M} clips")
    if spare := most_clips - M:
        x, y = (F.pad(z, (*[0, 0] * (z.ndim - 1), 0, spare)) for z in (x, y))
        if x_valid is None:
            x_valid = x.new_ones(M, dtype=torch.bool)
        x_valid = F.pad(x_valid, (0, spare))
        if y_valid is None:
            y_valid = x.new_ones(M, P, dtype=torch.bool)
        y_valid = F.pad(y_valid.reshape(M, -1), (0, 0, 0, spare))
    terms, valid = terms_over_devices(_TorchDevices(group), x, y, scale, form, x_valid, y_valid)
    return (terms[:M], valid[:M]) if spare else (terms, valid)


def _most_clips(M: int, P: int, D: int, device: torch.device, group: collectives.Group) -> int:
    if collectives.world_size(group) == 1 or torch.compiler.is_compiling():
        return M
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return M
    held = collectives.of_all((M, P, D), device, group)
    if any(each[1:] != [P, D] for each in held):
        raise ValueError(
            "processes hold embeddings (M, P, D) of different shapes, by rank: "
            f"{', '.join(str(tuple(each)) for each in held)}; P and D must be one everywhere: "
            "fill up missing texts, and mark them invalid"
        )
    return max(each[0] for each in held)


def global_mean(
    terms: Tensor,
    valid: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    group: collectives.Group = None,
) -> Tensor:
    """Mean of ``terms`` over the valid clips of all processes; without any 0, in a connected graph.

    Args:
        reduction: what the trainer does with the processes' gradients. "mean", as
            DistributedDataParallel and FSDP do: every process returns W times its share, so that
            the mean over processes is the loss of the global batch. "sum", as trainers do that set
            FSDP's divide factor to 1: every process returns its share.
        group: as ``contrastive_terms`` takes it.

    Raises:
        ValueError: another reduction.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction is {reduction!r}; it is one of mean, sum")
    count = collectives.total(valid.sum(dtype=terms.dtype), group).clamp(min=1)
    copies = collectives.world_size(group) if reduction == "mean" else 1
    return terms.sum() * copies / count


@dataclasses.dataclass
class VATTLoss:
    """``total`` = va_weight * va + vt_weight * vt. Absent modalities: the part is None, counts 0.

    Tensors of torch; in JAX its arrays.
    """

    total: Tensor
    va: Tensor | None = None
    vt: Tensor | None = None


def vatt_loss(
    output: Any,
    config: VATTConfig,
    *,
    scale: Tensor | float | None = None,
    video_valid: Tensor | None = None,
    audio_valid: Tensor | None = None,
    text_valid: Tensor | None = None,
    reduction: Literal["mean", "sum"] = "mean",
    group: collectives.Group = None,
    most_clips: int | None = None,
) -> VATTLoss:
    """Pre-training loss of a ``VATTOutput`` (paper eq. 6).

    It is the weighted sum of video-audio NCE in S_va and video-text MIL-NCE in S_vt.

    Args:
        scale: ``model.scale()``; None takes the config's fixed temperature.
        video_valid, audio_valid: (B,) bool; text_valid: (B, P) bool; None: all valid. Give the
            model the same ones: it keeps invalid clips out of its batch norms. Here they have no
            term and are nobody's negative.
        reduction: as ``global_mean`` takes it. group, most_clips: as ``contrastive_terms`` takes
            them; give the model the same group.

    Raises:
        ValueError: no pair of modalities in the output.
    """

    def pair_loss(x: Tensor, y: Tensor, scale, y_valid) -> Tensor:
        options: dict[str, Any] = dict(scale=scale, form=config.nce_form, most_clips=most_clips)
        terms = contrastive_terms(
            x, y, x_valid=video_valid, y_valid=y_valid, group=group, **options
        )
        return global_mean(*terms, reduction=reduction, group=group)

    return sum_of_pairs(output, config, scale, audio_valid, text_valid, pair_loss)


# -- for torch and JAX -----------------------------------------------------------------------------


class Devices(Protocol):
    """What the devices of one framework compute and exchange for a contrastive loss."""

    @property
    def xp(self) -> Any:
        """torch or jax.numpy."""

    def unit(self, z: Any) -> Any:
        """z of unit length along the last axis, in fp32 at least; no gradient where z is next to 0.

        ``NO_DIRECTION`` says why.
        """

    def gather(self, x: Any) -> Any:
        """(W * M, ...): every device's x. Gradients return to the owner, summed."""

    def first_of(self, clips: int) -> Any:
        """Index of this device's first clip among all."""

    def contrastive_lse(self, x: Any, y: Any, **options: Any) -> tuple[Any, Any, Any]:
        """The op."""

    def own_columns(self, col: Any, clips: int, texts: int) -> Any:
        """col (N * P,) of each device -> all devices' parts about this one's clips, (W, M, P)."""

    def logsumexp(self, x: Any) -> Any:
        """Along the last axis."""


def terms_over_devices(
    devices: Devices, x: Any, y: Any, scale: Any, form: NCEForm, x_valid: Any, y_valid: Any
) -> tuple[Any, Any]:
    """``contrastive_terms`` in either framework."""
    xp = devices.xp
    y = _with_texts(x, y)
    M, P, _ = y.shape
    if y_valid is None:
        y_valid = xp.ones_like(y[..., 0], dtype=bool)
    y_valid = xp.broadcast_to(y_valid.reshape(M, -1), (M, P))
    x_valid = xp.ones_like(x[:, 0], dtype=bool) if x_valid is None else x_valid
    valid = x_valid & y_valid.any(1)

    x = devices.unit(x)
    y_all = devices.gather(devices.unit(y).reshape(M * P, -1))  # (N * P, D)
    y_valid_all = devices.gather(y_valid.reshape(M * P))
    row, col, pos = devices.contrastive_lse(
        x,
        y_all,
        scale=scale,
        texts_per_clip=P,
        first=devices.first_of(M),
        x_valid=x_valid,
        y_valid=y_valid_all,
        bound=BOUND_SLACK * (scale if isinstance(scale, float) else MAX_SCALE),
    )
    # col covers this device's x only: join the devices' parts, then each clip's own P texts
    col = devices.own_columns(col, M, P).swapaxes(0, 1).reshape(M, -1)
    # any finite values where there is no term: it is dropped, and -inf would pass nan gradients
    col = devices.logsumexp(xp.where(valid[:, None], col, 0.0))
    row, pos = xp.where(valid, row, 0.0), xp.where(valid, pos, -math.log(2))
    return xp.where(valid, nce_terms(row, col, pos, form, xp=xp), 0.0), valid


def _with_texts(x: Any, y: Any) -> Any:
    """y (M, D) or (M, P, D) as (M, P, D). Raises ValueError where it does not fit x (M, D)."""
    texts = y[:, None] if y.ndim == 2 else y
    if x.ndim != 2 or texts.ndim != 3 or (x.shape[0], x.shape[1]) != texts.shape[::2]:
        raise ValueError(
            "contrastive_terms takes x (M, D) and y (M, D) or (M, P, D), "
            f"got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    return texts


def sum_of_pairs(
    output: Any,
    config: VATTConfig,
    scale: Any,
    audio_valid: Any,
    text_valid: Any,
    pair_loss: Callable[[Any, Any, Any, Any], Any],
) -> VATTLoss:
    """``vatt_loss`` in either framework: ``pair_loss(z_video, z_other, scale, other_valid)``."""
    scale = 1 / config.temperature if scale is None else scale
    va = vt = None
    if output.z_video_va is not None and output.z_audio_va is not None:
        va = pair_loss(output.z_video_va, output.z_audio_va, scale, audio_valid)
    if output.z_video_vt is not None and output.z_text_vt is not None:
        vt = pair_loss(output.z_video_vt, output.z_text_vt, scale, text_valid)
    weighted = [
        weight * part
        for weight, part in ((config.va_weight, va), (config.vt_weight, vt))
        if part is not None
    ]
    if not weighted:
        raise ValueError(
            "the output holds no pair of modalities; "
            "a loss needs video with audio, or video with text"
        )
    return VATTLoss(weighted[0] if len(weighted) == 1 else weighted[0] + weighted[1], va, vt)


@dataclasses.dataclass(frozen=True)
class _TorchDevices:
    group: collectives.Group = None
    xp = torch

    def unit(self, z: Tensor) -> Tensor:
        z = z if z.dtype == torch.float64 else z.float()
        length = z.norm(dim=-1, keepdim=True)
        # so compared, nan stays nan
        return torch.where(length <= NO_DIRECTION, 0.0, z / length.clamp_min(NO_DIRECTION))

    def gather(self, x: Tensor) -> Tensor:
        return collectives.gather(x, self.group).flatten(0, 1)

    def first_of(self, clips: int) -> int:
        return clips * collectives.rank(self.group)

    def contrastive_lse(
        self, x: Tensor, y: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        return contrastive_lse(x, y, **options)

    def own_columns(self, col: Tensor, clips: int, texts: int) -> Tensor:
        return collectives.exchange(col.unflatten(0, (-1, clips, texts)), self.group)

    def logsumexp(self, x: Tensor) -> Tensor:
        return torch.logsumexp(x, -1)
