"""The two exchanges between devices that a contrastive batch needs.

Both are differentiable, and identities on a single device.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if world_size() > 1 else 0


def gather(x: Tensor) -> Tensor:
    """(W, *x.shape): every device's x, which must have one shape everywhere.

    Gradients of all devices return to the owner, summed.
    """
    if world_size() == 1:
        return x[None]
    if not x.is_floating_point():
        parts = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.stack(parts)
    return torch.stack(list(_differentiable().all_gather(x.contiguous())))


def total(x: Tensor) -> Tensor:
    """Sum of x over devices; the gradient is summed over devices too."""
    return _differentiable().all_reduce(x) if world_size() > 1 else x


def _differentiable():
    """Imported on use, because its package writes a module to a temporary folder first."""
    import torch.distributed.nn.functional

    return torch.distributed.nn.functional
