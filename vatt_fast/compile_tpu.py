"""Compiling for a TPU on a machine without one."""

import os
from pathlib import Path

_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def has_a_tpu() -> bool:
    """Whether a TPU is plugged into this machine, by Google's number on the PCI bus."""
    return any(path.read_text().strip() == "0x1ae0" for path in Path("/sys/bus/pci/devices").glob("*/vendor"))


def without_a_tpu(*, jax_on_cpu: bool = True) -> None:
    """Prepare the environment for libtpu and JAX, which read it when they are loaded: no metadata server to ask, no device to look for, and
    JAX's own work on the CPU (or else on its default platform)."""
    for variable, value in _ENVIRONMENT.items():
        os.environ.setdefault(variable, value)
    if jax_on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
