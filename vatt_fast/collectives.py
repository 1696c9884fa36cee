"""The exchanges between processes that a contrastive batch needs.

Those of tensors are differentiable, and identities in a single process. A group of None is all
processes. Groups are only ever passed on: whoever holds one keeps its threads alive after
``destroy_process_group``, and gloo's abort the interpreter at its end ("terminate called without an
active exception").
"""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Group = Any  # a torch.distributed.ProcessGroup; None: all processes

# torch.distributed._functional_collectives wraps these, under other names in every version
_ops = torch.ops._c10d_functional


@contextlib.contextmanager
def process_group(backend: str | None = None, **options: Any) -> Iterator[None]:
    """``init_process_group`` with these arguments, at the end ``destroy_process_group``.

    No thread of the group is left then, unless the caller holds the group. An error leaves the
    group as it is: destroying one in which others still wait may wait for ever.
    """
    # Its functions have the group as a default argument if they are defined while there is one, and
    # torch's compiler imports it at the first step of any optimizer.
    import torch.distributed.nn.functional  # noqa: F401

    dist.init_process_group(backend, **options)
    yield
    gc.collect()  # DistributedDataParallel holds the group, and lies in cycles
    dist.destroy_process_group()


def world_size(group: Group = None) -> int:
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def rank(group: Group = None) -> int:
    """This process's place in the group, from 0."""
    return dist.get_rank(group) if world_size(group) > 1 else 0


def of_all(numbers: Sequence[int], device: torch.device, group: Group = None) -> list[list[int]]:
    """Every process's ``numbers``, by rank; all have equally many. The host waits for the device.

    Args:
        device: of the kind that the group exchanges.
    """
    if world_size(group) == 1:
        return [list(numbers)]
    return gather(torch.tensor(numbers, device=device), group).tolist()


def gather(x: Tensor, group: Group = None) -> Tensor:
    """(W, *x.shape): every process's x, which must have one shape everywhere.

    Gradients of all processes return to the owner, summed.
    """
    world = world_size(group)
    if world == 1:
        return x[None]
    if x.dtype == torch.bool:
        return gather(x.byte(), group).bool()
    return _Gather.apply(x[None], world, _name(group))


def total(x: Tensor, group: Group = None) -> Tensor:
    """Sum of x over processes; the gradient is summed over processes too."""
    return _Total.apply(x, _name(group)) if world_size(group) > 1 else x


def exchange(x: Tensor, group: Group = None) -> Tensor:
    """x (W, ...): part w goes to process w, and (W, ...) is what the processes had for this one.

    Gradients go the way back.
    """
    return _Exchange.apply(x, _name(group)) if world_size(group) > 1 else x


def _name(group: Group) -> str:
    whole: Any = dist.group.WORLD
    return (whole if group is None else group).group_name


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, world, name):
        ctx.world, ctx.name = world, name
        return _ops.wait_tensor(_ops.all_gather_into_tensor(x.contiguous(), world, name))

    @staticmethod
    def backward(ctx, gradient):
        return _Scatter.apply(gradient, ctx.world, ctx.name), None, None


class _Scatter(torch.autograd.Function):
    """(W, ...) -> (1, ...): the sum of all processes' parts for this one."""

    @staticmethod
    def forward(ctx, x, world, name):
        ctx.world, ctx.name = world, name
        return _ops.wait_tensor(_ops.reduce_scatter_tensor(x.contiguous(), "sum", world, name))

    @staticmethod
    def backward(ctx, gradient):
        return _Gather.apply(gradient, ctx.world, ctx.name), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        return _ops.wait_tensor(_ops.all_reduce(x.contiguous(), "sum", name))

    @staticmethod
    def backward(ctx, gradient):
        return _Total.apply(gradient, ctx.name), None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, name):
        ctx.name = name
        sizes = [1] * x.shape[0]
        return _ops.wait_tensor(_ops.all_to_all_single(x.contiguous(), sizes, sizes, name))

    @staticmethod
    def backward(ctx, gradient):
        return _Exchange.apply(gradient, ctx.name), None
