"""The hosts of a JAX run that torchrun has not started: as settings tell, or as JAX finds them."""

import os
from typing import Any

import torch.distributed as dist

from ..devices import importing_jax
from ..training.distributed import is_launched

_SECONDS = 300  # that the first host's name may take to be known


def announce_hosts(run: Any) -> None:
    """Set torchrun's variables where other things tell this process its place among others.

    That is ``run.coordinator``, ``processes`` and ``process``; or, without them, what JAX detects:
    SLURM's, Open MPI's or Kubernetes' variables, or the metadata of a TPU pod. Nothing is set where
    torchrun did so, where there is a process group, or where a process is alone.

    Args:
        run: a PretrainConfig or FineTuneConfig.

    Raises:
        ValueError: settings beside torchrun's variables that say otherwise; a cluster that does not
            tell what it must.
    """
    told = (run.coordinator, run.processes, run.process)
    if dist.is_initialized():
        return
    if is_launched():
        names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK")
        host, port, world, rank = (os.environ[name] for name in names)
        if run.coordinator is not None and told != (f"{host}:{port}", int(world), int(rank)):
            raise ValueError(
                f"coordinator, processes and process are {told[0]}, {told[1]} and {told[2]}, but "
                f"{', '.join(names)} say {host}:{port}, {world} and {rank}: leave one out"
            )
        return
    address, count, number = told if run.coordinator is not None else _detected()
    if address is None or count is None or number is None or count == 1:
        return
    host, _, port = address.rpartition(":")
    variables = dict(MASTER_ADDR=host, MASTER_PORT=port, WORLD_SIZE=count, RANK=number)
    os.environ |= {name: str(value) for name, value in variables.items()}


def _detected() -> tuple[str | None, int | None, int | None]:
    """Address of process 0, how many there are, and which this is; as ``jax.distributed`` does.

    ``jax.distributed.initialize`` asks the same, and starts JAX at once, which must not be forked
    before an index is built.
    """
    with importing_jax():
        from jax._src.clusters import ClusterEnv
    try:
        found = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, None, _SECONDS
        )
    except Exception as error:  # of JAX, requests or the cluster's own
        raise ValueError(
            f"JAX finds a cluster, but not this process's place in it ({error}): give coordinator, "
            "processes and process"
        ) from error
    return found[:3]
