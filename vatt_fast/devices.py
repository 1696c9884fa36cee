"""Which devices this machine has, for torch and for JAX."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch

_WITHOUT_A_TPU = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
}


def pick_device(name: str) -> torch.device:
    """The torch device of that name; "auto" is the first GPU if there is one, else the CPU.

    Raises:
        ValueError: a device of no such name, or a CUDA device that this torch does not see.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device is {name!r}; use 'cpu', 'cuda', 'cuda:1' or 'auto'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"device is {name!r}, but this torch sees no CUDA device; use 'cpu' or 'auto'"
        )
    return device


def has_a_tpu() -> bool:
    """Whether a TPU is plugged into this machine, by Google's number on the PCI bus."""
    return any(
        path.read_text().strip() == "0x1ae0"
        for path in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def without_a_tpu(*, jax_on_cpu: bool = True) -> None:
    """Set the environment variables for libtpu and JAX on a machine without a TPU.

    They read them when they are loaded: no metadata server to ask, and no device to look for.
    Variables that are set already stay.

    Args:
        jax_on_cpu: JAX's own work goes to the CPU; otherwise to its default platform.
    """
    for variable, value in _WITHOUT_A_TPU.items():
        os.environ.setdefault(variable, value)
    if jax_on_cpu:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")


@contextlib.contextmanager
def importing_jax() -> Iterator[None]:
    """Around imports of what needs JAX. Raises ValueError where it is not installed."""
    if not has_a_tpu():
        # where libtpu is installed to compile with, JAX would look for a TPU, and say so at length
        without_a_tpu(jax_on_cpu=False)
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(
            f"framework 'jax' needs {error.name}: pip install 'vatt_fast[jax]'"
        ) from error
