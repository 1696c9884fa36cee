"""open_clip's ``ClipLoss`` without the matrix of logits.

    import open_clip_train.main
    from vatt_fast.integrations import open_clip as ours

    open_clip_train.main.create_loss = ours.create_loss      # open_clip 3.3: before main(args)
    CLIPTask(model, loss=ours.ClipLoss(rank=..., world_size=...))     # later versions

The same arguments, value and gradients, on one process and on many, and the op compiles with the
model. ``valid`` is new: pairs of which a part is missing have no term and are nobody's negative.
"""

from typing import Any

from torch import Tensor, nn

from .. import collectives
from .fallback import say
from .pairs import symmetric_terms

# M pairs of this process, D dimensions


class ClipLoss(nn.Module):
    """The mean of two softmax cross-entropies, image to text and text to image.

    Args:
        local_loss: each process's own rows only; the trainer averages. Wants ``gather_with_grad``.
        gather_with_grad: other processes' embeddings receive gradients too.
        cache_labels: taken and not needed; there are no labels here.
        rank, world_size: of the processes that share the batch; a world of 1 shares nothing.
        use_horovod: refused.
        group: their ``torch.distributed`` group; None: all.

    Raises:
        ValueError: Horovod; or ``local_loss`` without ``gather_with_grad`` on several processes.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: collectives.Group = None,
    ):
        super().__init__()
        if use_horovod:
            raise ValueError("use_horovod is not supported; use torch.distributed")
        if world_size > 1 and local_loss and not gather_with_grad:
            raise ValueError("local_loss without gather_with_grad is not supported; give both")
        self.local_loss, self.gather_with_grad = local_loss, gather_with_grad
        self.rank, self.world_size, self.group = rank, world_size, group

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | None = None,
        output_dict: bool = False,
        *,
        valid: Tensor | None = None,
    ) -> Any:
        """The loss, a scalar; with ``output_dict`` {"contrastive_loss": it}.

        Args:
            image_features, text_features: (M, D), of unit length as open_clip's models give them.
                Every process holds equally many.
            logit_scale: the factor of the cosines, a float or a tensor () or (1,).
            logit_bias: cancels in a softmax: its gradient is 0.
            valid: (M,) bool; False takes a pair out of the batch.

        Raises:
            ValueError: shapes that do not fit.
        """
        alone = self.world_size == 1
        terms, counted = symmetric_terms(
            *(image_features, text_features, logit_scale, valid), alone=alone, group=self.group
        )
        if alone:
            loss = terms.sum() / (2 * counted.sum().clamp(min=1))
        else:
            loss = self._over_processes(terms, counted)
        if logit_bias is not None:
            loss = loss + 0 * logit_bias.sum()
        return {"contrastive_loss": loss} if output_dict else loss

    def _over_processes(self, terms: Tensor, counted: Tensor) -> Tensor:
        count = collectives.total(counted.sum(dtype=terms.dtype), self.group).clamp(min=1)
        if self.local_loss:
            return terms.sum() * self.world_size / (2 * count)
        loss = collectives.total(terms.sum(), self.group) / (2 * count)
        if self.gather_with_grad:
            return loss
        # theirs: the same value everywhere, and gradients of this process's embeddings alone
        part = loss / self.world_size
        return part + (loss - part).detach()


def create_loss(args: Any) -> nn.Module:
    """open_clip's factory, with our loss where ``args`` ask for ``ClipLoss``; theirs, said once,
    where they ask for another (distillation, CoCa, SigLIP) or for what ours refuses."""
    import open_clip

    if args.siglip:
        why = "SigLipLoss sums softplus over all pairs, which no log-sum-exp of a row gives"
        say("create_loss", "open_clip's own SigLipLoss", why)
        return open_clip.create_loss(args)
    other = "coca" in args.model.lower() or args.distill
    mixed = args.world_size > 1 and args.local_loss and not args.gather_with_grad
    if other or mixed or args.horovod:
        why = "ours takes the place of ClipLoss alone, without Horovod or a local loss that has no"
        say("create_loss", "open_clip's own loss", f"{why} gathered gradients")
        return open_clip.create_loss(args)
    return ClipLoss(
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
    )
