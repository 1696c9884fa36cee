"""What the ops' checks share, for torch tensors and JAX arrays alike."""

from typing import Any

import torch


def is_float(x: Any) -> bool:
    return x.is_floating_point() if isinstance(x, torch.Tensor) else "float" in str(x.dtype)


def is_bool(x: Any) -> bool:
    return x.dtype == (torch.bool if isinstance(x, torch.Tensor) else bool)


def is_index(x: Any) -> bool:
    """int32 or int64."""
    if isinstance(x, torch.Tensor):
        return x.dtype in (torch.int32, torch.int64)
    return x.dtype in ("int32", "int64")


def shown(x: Any) -> str:
    """Shape and dtype, as error messages show them."""
    return f"{tuple(x.shape)} {x.dtype}"


def one_device(**tensors: torch.Tensor | None) -> None:
    """Tensors, None ones aside, lie on one device: a kernel would read foreign memory.

    Raises:
        ValueError: they do not.
    """
    given = [tensor.device for tensor in tensors.values() if tensor is not None]
    if given.count(given[0]) != len(given):
        devices = [
            f"{name} is on {tensor.device}"
            for name, tensor in tensors.items()
            if tensor is not None
        ]
        raise ValueError(f"{', '.join(devices)}; move them to one device")
