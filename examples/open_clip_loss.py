"""open_clip's training loss on our op: the factory swapped, the rest of the trainer as it is.

    python examples/open_clip_loss.py --steps 5

Needs open_clip_torch 3.3. The model is a small CLIP of random weights.
"""

import argparse

import open_clip
import torch
from open_clip.model import CLIP

from vatt_fast.integrations import open_clip as ours


def arguments(**changed) -> argparse.Namespace:
    """What open_clip's command line gives to ``create_loss``."""
    options = dict(model="ViT-B-32", distill=False, siglip=False, horovod=False)
    devices = dict(local_loss=True, gather_with_grad=True, rank=0, world_size=1)
    return argparse.Namespace(**options | devices | changed)


def train(steps: int, create_loss) -> list[float]:
    """Match random pictures with random words; returns the losses."""
    torch.manual_seed(0)
    vision = dict(layers=2, width=64, head_width=16, patch_size=8, image_size=32)
    text = dict(context_length=12, vocab_size=99, width=64, heads=4, layers=2)
    model = CLIP(embed_dim=32, vision_cfg=vision, text_cfg=text, output_dict=True)
    images, words = torch.randn(16, 3, 32, 32), torch.randint(3, 99, (16, 12))
    loss = create_loss(arguments())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    values = []
    for _ in range(steps):
        # as open_clip_train.train has it
        losses = loss(**model(images, words), output_dict=True)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(total.item())
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=5)
    steps = parser.parse_args().steps
    both = zip(train(steps, ours.create_loss), train(steps, open_clip.create_loss), strict=True)
    for step, (mine, theirs) in enumerate(both):
        print(f"step {step:2d}  ours {mine:.6f}  theirs {theirs:.6f}")
