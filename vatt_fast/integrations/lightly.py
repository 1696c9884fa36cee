"""lightly's ``NTXentLoss`` without its four matrices of logits (Chen et al. 2020).

    from vatt_fast.integrations.lightly import NTXentLoss

The same arguments, value and gradients, memory bank and processes included. ``valid`` is new.
"""

import torch
import torch.nn.functional as F
from lightly.loss.ntx_ent_loss import NTXentLoss as _NTXentLoss
from torch import Tensor

from .. import collectives
from ..kernels import contrastive_lse
from .pairs import mean_of_valid

# M pairs of this process, D dimensions


class NTXentLoss(_NTXentLoss):
    """lightly's, and subclassed from it: its arguments and its memory bank are its own."""

    def forward(self, out0: Tensor, out1: Tensor, *, valid: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            out0, out1: (M, D), two views of each; they are brought to unit length here.
            valid: (M,) bool; False takes both views of a pair out of the batch. Not with a memory
                bank, which would keep them.

        Raises:
            ValueError: ``valid`` with a memory bank.
        """
        out0, out1 = F.normalize(out0, dim=1), F.normalize(out1, dim=1)
        out1, bank = self.memory_bank.forward(out1, update=out0.requires_grad)
        scale = 1 / self.temperature
        pos = scale * (out0 * out1).sum(1, dtype=torch.promote_types(out0.dtype, torch.float32))
        if bank is not None:
            if valid is not None:
                raise ValueError("valid does not go with a memory bank; take those pairs out")
            row = _log_sums(out0, bank.T.to(out0), scale)
            return (torch.logaddexp(row, pos) - pos).mean()
        views = torch.cat((out0, out1))  # (2 * M, D)
        both = None if valid is None else torch.cat((valid, valid))
        everyone, counted, first = views, both, 0
        if self.gather_distributed and collectives.world_size() > 1:
            everyone = collectives.gather(views).flatten(0, 1)
            counted = None if both is None else collectives.gather(both).flatten()
            first = views.shape[0] * collectives.rank()
        row, _, _ = contrastive_lse(
            *(views, everyone),
            scale=scale,
            first=first,
            y_valid=counted,
            bound=1.02 * abs(scale),
            exclude_own=True,
        )
        pos = torch.cat((pos, pos))
        if both is not None:  # the row of one that is left out may be empty
            row = torch.where(both, row, pos)
        return mean_of_valid(row - pos, both)


def _log_sums(x: Tensor, others: Tensor, scale: float) -> Tensor:
    """Of each x (M, D), logsumexp of its scores against K others (K, D), (M,).

    The op expects each of its rows to have a column of its own: the fewer ones are its rows.
    """
    turned = len(others) < len(x)
    rows, columns = (others, x) if turned else (x, others)
    row, col, _ = contrastive_lse(
        *(rows, torch.cat((rows.detach(), columns))),
        scale=scale,
        y_valid=torch.arange(len(rows) + len(columns), device=x.device) >= len(rows),
        extra_texts=len(columns),
    )
    return col[len(rows) :] if turned else row
