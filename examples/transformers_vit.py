"""A vision transformer of Hugging Face's transformers on our attention, beside its own.

    python examples/transformers_vit.py --steps 5

Needs transformers 5. The weights are random and small; with a name of the hub in from_pretrained
the rest stays as it is. Both runs start from the same weights and see the same data.
"""

import argparse

import torch
import torch.nn.functional as F
from transformers import ViTConfig, ViTForImageClassification

from vatt_fast.integrations.transformers import register

register()  # from here on attn_implementation="vatt_fast" is known


def train(steps: int, attn_implementation: str) -> list[float]:
    """Tell bright pictures from dark ones; returns the losses."""
    torch.manual_seed(0)
    sizes = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128)
    config = ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=2)
    model = ViTForImageClassification._from_config(config, attn_implementation=attn_implementation)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        labels = torch.randint(2, (16,))
        images = torch.randn(16, 3, 32, 32) + labels[:, None, None, None] - 0.5
        loss = F.cross_entropy(model(pixel_values=images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    both = zip(train(steps, "vatt_fast"), train(steps, "sdpa"), strict=True)
    for step, (ours, theirs) in enumerate(both):
        print(f"step {step:2d}  ours {ours:.6f}  theirs {theirs:.6f}")
