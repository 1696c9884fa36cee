"""A vision transformer of timm on our attention, with VATT's DropToken in training.

    python examples/timm_vit.py --steps 5

Needs timm. Half of the patches are dropped before they are embedded. The same model without either
runs beside it, from the same weights.
"""

import argparse

import timm
import torch
import torch.nn.functional as F

from vatt_fast.integrations.patch import patch
from vatt_fast.integrations.timm import drop_before_embedding, register

register()  # from here on attn_layer="vatt_fast" is known

SIZES = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=4, num_classes=2)


def train(steps: int, *, drop: float, **options) -> list[float]:
    """Tell bright pictures from dark ones; returns the losses."""
    torch.manual_seed(0)
    model = timm.create_model("vit_base_patch16_224", **SIZES, **options)
    if drop:
        drop_before_embedding(model, drop)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(steps):
        labels = torch.randint(2, (16,))
        images = torch.randn(16, 3, 32, 32) + labels[:, None, None, None] - 0.5
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    ours = train(steps, drop=0.0, attn_layer="vatt_fast")
    theirs, dropped = train(steps, drop=0.0), train(steps, drop=0.5, attn_layer="vatt_fast")
    for step, losses in enumerate(zip(ours, theirs, dropped, strict=True)):
        print(f"step {step:2d}  ours {losses[0]:.6f}  theirs {losses[1]:.6f}  half {losses[2]:.6f}")
    undo = patch(timm.create_model("vit_base_patch16_224", **SIZES))  # of a model that exists
    undo()
