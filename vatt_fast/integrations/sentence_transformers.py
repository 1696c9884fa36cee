"""sentence-transformers' ``MultipleNegativesRankingLoss``, plain and cached, without the matrices
of similarities.

    from vatt_fast.integrations.sentence_transformers import MultipleNegativesRankingLoss

    loss = MultipleNegativesRankingLoss(model)   # in place of losses.MultipleNegativesRankingLoss

All four directions, both partition modes, hard negatives and several devices are theirs in value
and gradient. With hardness weights, or a similarity other than the cosine and the dot product,
their own code runs, and it is said once.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.util import cos_sim, dot_score
from torch import Tensor

from .. import collectives
from ..kernels import contrastive_lse
from .fallback import say
from .pairs import mean_of_valid

# M queries of this process, N of all, C documents a query (the positive, then hard negatives)


class _TakesValid:
    """Before a loss of theirs: its forward, with validity."""

    def forward(
        self,
        sentence_features: Iterable[dict[str, Tensor]],
        labels: Tensor | None = None,
        *,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar, of a batch of queries, positives, and hard negatives if any.

        Args:
            labels: not read.
            valid: (M,) bool; False takes a query and its documents out of the batch.
        """
        # theirs hands labels on to the next method, and reads nothing of them
        return super().forward(sentence_features, _Labels(labels, valid))  # type: ignore[misc]


class MultipleNegativesRankingLoss(_TakesValid, losses.MultipleNegativesRankingLoss):
    """Theirs, and subclassed from it: its arguments are its own."""

    def compute_loss_from_embeddings(
        self, embeddings: list[Tensor], labels: Any, *, valid: Tensor | None = None
    ) -> Tensor:
        """The loss, a scalar.

        Args:
            embeddings: queries, positives, and hard negatives if any, (M, D) each.
            labels: not read.
            valid: (M,) bool; False takes a query and its documents out of the batch.
        """
        if isinstance(labels, _Labels):
            labels, valid = labels
        if reason := _unsupported(self):
            if valid is not None:
                raise ValueError(f"valid needs our loss, and {reason}")
            say("MultipleNegativesRankingLoss", "sentence-transformers' own loss", reason)
            return super().compute_loss_from_embeddings(embeddings, labels)
        return _loss(self, embeddings, valid)


class CachedMultipleNegativesRankingLoss(_TakesValid, losses.CachedMultipleNegativesRankingLoss):
    """Theirs, with its second step (GradCache's all-pairs loss) in one call of the op."""

    def calculate_loss(
        self,
        reps: list[list[Tensor]],
        labels: Any = None,
        *,
        with_backward: bool = False,
        valid: Tensor | None = None,
    ) -> Tensor:
        """The loss, a scalar, of embeddings that lie in mini-batches, as theirs.

        Args:
            reps: for queries, positives, and hard negatives if any: mini-batches (m, D).
            labels: not read.
            with_backward: run the backward here, and return the loss detached.
            valid: (M,) bool; False takes a query and its documents out of the batch.
        """
        if isinstance(labels, _Labels):
            labels, valid = labels
        if reason := _unsupported(self):
            if valid is not None:
                raise ValueError(f"valid needs our loss, and {reason}")
            say("CachedMultipleNegativesRankingLoss", "sentence-transformers' own loss", reason)
            return super().calculate_loss(reps, labels, with_backward=with_backward)
        loss = _loss(self, [torch.cat(batches) for batches in reps], valid)
        if with_backward:
            loss.backward()
            loss = loss.detach()
        return loss


class _Labels(NamedTuple):
    """What ``forward`` was given, on its way through theirs."""

    labels: Tensor | None
    valid: Tensor | None


def _unsupported(loss: Any) -> str | None:
    if loss.hardness_mode is not None and loss.hardness_strength > 0:
        return "it weighs hardness, which needs every similarity"
    if loss.similarity_fct not in (cos_sim, dot_score):
        return "its similarity is neither cos_sim nor dot_score"
    return None


def _loss(loss: Any, embeddings: list[Tensor], valid: Tensor | None) -> Tensor:
    if len(embeddings) < 2:
        raise ValueError(f"Expected at least 2 embeddings, got {len(embeddings)}")
    bound = None
    if loss.similarity_fct is cos_sim:
        embeddings = [F.normalize(z, dim=1) for z in embeddings]
        bound = 1.02 * loss.scale
    q, *docs = embeddings
    M, C = q.shape[0], len(docs)
    if valid is not None and (tuple(valid.shape) != (M,) or valid.dtype != torch.bool):
        raise ValueError(f"valid is {tuple(valid.shape)} {valid.dtype}; it must be bool ({M},)")
    queries, all_docs, counted, first = q, docs, valid, 0
    gathered = loss.gather_across_devices and collectives.world_size() > 1
    if gathered:
        queries, *all_docs = (collectives.gather(z).flatten(0, 1) for z in embeddings)
        counted = None if valid is None else collectives.gather(valid).flatten()
        first = M * collectives.rank()

    def lse(x: Tensor, y: Tensor, copies: int = 1, **options: Any) -> tuple[Tensor, ...]:
        y_valid = None if counted is None else counted.repeat(copies)
        given = dict(scale=loss.scale, first=first, x_valid=valid, y_valid=y_valid, bound=bound)
        return contrastive_lse(x, y, **{**given, **options})

    negatives = (C - 1) * queries.shape[0]
    row, col, pos = lse(q, torch.cat(all_docs), C, extra_texts=negatives)
    rows = [row]
    if "query_to_query" in loss.directions:
        rows.append(lse(q, queries, exclude_own=True)[0])
    if "doc_to_query" in loss.directions:
        rows.append(lse(docs[0], queries)[0] if gathered else col[:M])
    if "doc_to_doc" in loss.directions:
        y = torch.stack(all_docs, 1).flatten(0, 1)  # clip-major
        y_valid = None if counted is None else counted.repeat_interleave(C)
        options: dict[str, Any] = dict(texts_per_clip=C, y_valid=y_valid, exclude_own=True)
        rows.append(lse(docs[0], y, **options)[0])
    if valid is not None:
        rows, pos = [torch.where(valid, r, 0.0) for r in rows], torch.where(valid, pos, 0.0)
    # sets of others are empty in a batch of one: finite and far below takes no part, and no nan
    lowest = torch.finfo(pos.dtype).min
    stacked = torch.stack([r.clamp(min=lowest) for r in rows])
    log_z = torch.logsumexp(stacked, 0) if loss.partition_mode == "joint" else stacked.mean(0)
    return mean_of_valid(log_z - pos, valid)
