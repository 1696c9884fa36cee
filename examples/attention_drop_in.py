"""Our attention inside a plain torch module, trained beside the same module on torch's own.

    python examples/attention_drop_in.py --steps 20

Both start from the same weights and see the same data, so their losses agree to rounding.
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vatt_fast.kernels import attention


class SelfAttention(nn.Module):
    def __init__(self, dim: int, heads: int, *, ours: bool):
        super().__init__()
        self.heads, self.ours = heads, ours
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, T, dim) -> (B, T, dim)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(2)  # (B, T, H, head_dim)
        scale = q.shape[-1] ** -0.5
        if self.ours:
            attended, _ = attention(q, k, v, scale=scale)  # the second result is the log-sum-exp
        else:
            q, k, v = (part.transpose(1, 2) for part in (q, k, v))
            attended = F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
        return self.out(attended.flatten(2))


def train(steps: int, *, ours: bool) -> list[float]:
    """Learn the mean of a sequence's tokens; returns the losses."""
    torch.manual_seed(0)
    module = SelfAttention(64, 4, ours=ours)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 65, 64)
        loss = F.mse_loss(module(x), x.mean(1, keepdim=True).expand_as(x))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    both = zip(train(steps, ours=True), train(steps, ours=False), strict=True)
    for step, (ours, sdpa) in enumerate(both):
        print(f"step {step:2d}  ours {ours:.6f}  SDPA {sdpa:.6f}")
