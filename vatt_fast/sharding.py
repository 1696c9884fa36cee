"""A model whose weights, gradients and optimizer state lie in shards over processes (FSDP2)."""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .model import VATT, BatchNorm, Block

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    model: VATT, mesh: "DeviceMesh | None" = None, *, param_dtype: torch.dtype | None = None
) -> VATT:
    """``fully_shard`` a model in place: its blocks each, its batch norms each, and the rest.

    Set recompute and compile first (``VATT.set_execution``), make the optimizer afterwards.
    Gradients are averaged over processes, as ``global_mean`` expects.

    Args:
        mesh: of one dimension, the processes that share the batch: None is all of them. Give the
            model and the loss ``mesh.get_group()``.
        param_dtype: what weights are cast to for computing, such as torch.bfloat16; None: as they
            are. Batch norms, the temperature and losses stay fp32, as do gradients on their way.

    Returns:
        ``model``. Its state dict holds DTensors; names and shapes are as they were.

    Raises:
        ValueError: a mesh of two dimensions.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    if mesh is None:
        device = next(model.parameters()).device.type
        mesh = init_device_mesh(device, (torch.distributed.get_world_size(),))
    if mesh.ndim != 1:
        raise ValueError(f"mesh has {mesh.ndim} dimensions; it must have one: pass mesh['name']")
    # the temperature has no dimension to shard: every process keeps it, its gradients are averaged
    whole = model.log_scale
    policy = MixedPrecisionPolicy(
        param_dtype=param_dtype,
        reduce_dtype=None if param_dtype is None else torch.float32,
        cast_forward_inputs=False,
    )
    for module in model.modules():
        if isinstance(module, Block):
            fully_shard(module, mesh=mesh, mp_policy=policy)
        elif isinstance(module, BatchNorm):
            fully_shard(module, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params={whole})
    kept = DTensor.from_local(whole.detach(), mesh, [Replicate()])
    model.log_scale = nn.Parameter(kept, requires_grad=whole.requires_grad)
    if whole.requires_grad:
        model.log_scale.register_hook(lambda gradient: gradient.redistribute(mesh, [Replicate()]))
    return model
