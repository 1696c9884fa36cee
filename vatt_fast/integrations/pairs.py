"""Contrastive losses of other packages on ``contrastive_lse``: what their shells share."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from .. import collectives
from ..kernels import contrastive_lse
from ..losses import _TorchDevices, terms_over_devices

# M pairs of this process, N of all W processes, D dimensions


@dataclasses.dataclass(frozen=True)
class _AsGiven(_TorchDevices):
    """Embeddings keep the length that they have, so that gradients are the original loss's."""

    alone: bool = False  # this process's pairs only, whoever else there is

    def unit(self, z: Tensor) -> Tensor:
        return z

    def gather(self, x: Tensor) -> Tensor:
        return x if self.alone else super().gather(x)

    def first_of(self, clips: int) -> int:
        return 0 if self.alone else super().first_of(clips)

    def contrastive_lse(self, x: Tensor, y: Tensor, **options: Any) -> Any:
        return contrastive_lse(x, y, **{**options, "bound": None})  # of any length

    def own_columns(self, col: Tensor, clips: int, texts: int) -> Tensor:
        if self.alone:
            return col.unflatten(0, (-1, clips, texts))
        return super().own_columns(col, clips, texts)


def symmetric_terms(
    x: Tensor,
    y: Tensor,
    scale: Tensor | float,
    valid: Tensor | None,
    *,
    alone: bool,
    group: collectives.Group = None,
) -> tuple[Tensor, Tensor]:
    """(row - pos) + (col - pos) of each of this process's pairs (M,), and which count (M,) bool."""
    if x.shape != y.shape or x.ndim != 2:
        raise ValueError(
            f"embeddings of pairs are (M, D) both, got {tuple(x.shape)} and {tuple(y.shape)}"
        )
    if valid is not None and valid.shape != x.shape[:1]:
        raise ValueError(f"valid is {tuple(valid.shape)}; it must be bool ({x.shape[0]},)")
    if isinstance(scale, Tensor):
        scale = scale.reshape(())
    devices = _AsGiven(group, alone)
    return terms_over_devices(devices, x, y, scale, "symmetric", valid, valid)


def mean_of_valid(values: Tensor, valid: Tensor | None) -> Tensor:
    """Mean over the valid ones; of none it is 0."""
    if valid is None:
        return values.mean()
    return torch.where(valid, values, 0.0).sum() / valid.sum().clamp(min=1)
