"""sentence-transformers' ranking loss on our op, in a plain loop beside its own.

    python examples/sentence_transformers_loss.py --steps 5

Needs sentence-transformers 6. The model embeds words' indices with a table of random vectors;
``SentenceTransformerTrainer(model=model, loss=loss, ...)`` takes the loss in the same way.
"""

import argparse

import torch
from sentence_transformers.sentence_transformer import losses
from torch import Tensor, nn

from vatt_fast.integrations import sentence_transformers as ours


class Words(nn.Module):
    """Sentences of word indices (B, L) -> their mean vectors, as a sentence transformer gives."""

    def __init__(self):
        super().__init__()
        self.table = nn.EmbeddingBag(99, 32, mode="mean")

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"sentence_embedding": self.table(features["input_ids"])}


def train(steps: int, loss_class) -> list[float]:
    """Match questions with answers that share words, and keep a hard negative away."""
    torch.manual_seed(0)
    model = nn.Sequential(Words())
    loss = loss_class(model, directions=("query_to_doc", "doc_to_query"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    values = []
    for _ in range(steps):
        question = torch.randint(99, (32, 8))
        answer = torch.cat((question[:, :4], torch.randint(99, (32, 4))), 1)
        wrong = torch.cat((question[:, :1], torch.randint(99, (32, 7))), 1)
        columns = [model({"input_ids": x})["sentence_embedding"] for x in (question, answer, wrong)]
        value = loss.compute_loss_from_embeddings(columns, None)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        values.append(value.item())
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    both = zip(
        train(steps, ours.MultipleNegativesRankingLoss),
        train(steps, losses.MultipleNegativesRankingLoss),
        strict=True,
    )
    for step, (mine, theirs) in enumerate(both):
        print(f"step {step:2d}  ours {mine:.6f}  theirs {theirs:.6f}")
