"""Losses of classification, as weights and terms of single examples, and mixup.

Shapes: B examples, C classes.
"""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

# one stream of random numbers each, beside those of the loader
_MIXUP = 200


def balanced_weights(targets: Any, xp: Any = torch) -> Any:
    """(B,) weights w_b = sum_c (y_bc / n_c) / sum_c y_bc, where n_c = sum_b y_bc.

    A class counts as much as another one, however rare it is in the batch; terms of classes that
    are not there, and weights of examples without a class, are 0 (released audio fine-tuning).

    Args:
        targets: (B, C) in [0, 1], mixed up or not, of torch or jax.numpy (``xp``).
    """
    of_class, of_example = targets.sum(0), targets.sum(1)
    shares = xp.where(of_class > 0, targets / of_class, 0.0).sum(1)
    return xp.where(of_example > 0, shares / of_example, 0.0)


def weights_of(loss: str, targets: Any, valid: Any, xp: Any = torch) -> Any:
    """(B,) what each example's term counts in the batch's loss; 0 where it is not valid."""
    weights = valid / xp.clip(valid.sum(), 1)
    if loss == "balanced":
        weights = weights * balanced_weights(targets * valid[:, None], xp)
    return weights


def terms_of(loss: str, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """(B,) cross-entropy of each example.

    Args:
        loss: "softmax" over classes, of targets (1 - smoothing) y + smoothing / C; otherwise that
            of C sigmoids, summed.
        logits, targets: (B, C).
    """
    if loss == "softmax":
        targets = (1 - smoothing) * targets + smoothing / targets.shape[1]
        return -(targets * F.log_softmax(logits, -1)).sum(-1)
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum(-1)


def mixup_draw(
    count: int, concentration: float, *, seed: int, step: int, rank: int = 0
) -> tuple[Tensor, Tensor]:
    """(count,) lambda ~ Beta(a, a) of each example, and its partner, a permutation.

    A pure function of its arguments. Partners are of the same rank, as in the release.
    """
    entropy = np.random.SeedSequence((seed, _MIXUP, step, rank))
    generator = np.random.Generator(np.random.Philox(entropy))
    share = generator.beta(concentration, concentration, count).astype(np.float32)
    return torch.from_numpy(share), torch.from_numpy(generator.permutation(count))


def mixed(x: Tensor, share: Tensor, partner: Tensor) -> Tensor:
    """share * x + (1 - share) * x[partner] along the first axis; bytes are frames, in [-1, 1]."""
    if x.dtype == torch.uint8:
        x = x.float() * (2 / 255) - 1
    share = share.to(x.device).reshape(-1, *[1] * (x.ndim - 1))
    return share * x + (1 - share) * x[partner.to(x.device)]
