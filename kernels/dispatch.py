"""The one place that decides which backend runs a call, and can say why."""

from typing import Any

import torch

from .backends import BACKENDS, JAX_BACKENDS, OP_NAMES, PREFERENCE, REFERENCES, Row, load
from .settings import jax_platform


def choose(op: str, mode: str, name: str, *tensors: Any, **options: Any) -> Any:
    """The module that runs ``op``.

    Args:
        mode: "fwd" or "bwd".
        name: a backend, which then runs or raises; "" for the first preferred backend that can run
            the call, and at last the reference.
        tensors, options: as the backend's ``unsupported`` takes them.

    Raises:
        ValueError: the backend asked for by name cannot run this call.
    """
    framework = _framework(tensors[0])
    if name:
        if reason := unsupported(op, name, *tensors, **options):
            raise ValueError(f"{op}: backend {name!r} cannot run this: {reason}")
        return load(op, name, framework)
    for row in _rows(op, tensors[0]):
        preferred = row.when is None or row.when(mode, *tensors, **options)
        if preferred and not unsupported(op, row.backend, *tensors, **options):
            return load(op, row.backend, framework)
    return load(op, "reference", framework)


def explain(op: str, *tensors: Any, **options: Any) -> dict[str, str]:
    """What every backend of the framework would say to this call.

    Args:
        op: its name, "attention".
        tensors, options: the op's own arguments.

    Returns:
        {backend: the reason why it cannot run, "preferred (fwd, bwd)" or "runs when asked for"}.

    Raises:
        ValueError: unknown op.
    """
    if op not in OP_NAMES:
        raise ValueError(f"unknown op {op!r}; ops are {', '.join(OP_NAMES)}")
    chosen = {
        mode: choose(op, mode, "", *tensors, **options).__name__.rpartition(".")[2]
        for mode in ("fwd", "bwd")
    }
    verdicts = {}
    for backend in _known(op, tensors[0]):
        modes = [mode for mode, name in chosen.items() if name == backend]
        verdicts[backend] = unsupported(op, backend, *tensors, **options) or (
            f"preferred ({', '.join(modes)})" if modes else "runs when asked for"
        )
    return verdicts


def unsupported(op: str, name: str, *tensors: Any, **options: Any) -> str | None:
    """The reason why backend ``name`` cannot run this call, or None."""
    known = _known(op, tensors[0])
    if name not in known:
        return (
            f"{op} has no such backend; it has {', '.join(known)}"
            f" (ask per op: VATT_FAST_BACKEND={op}=...)"
        )
    try:
        module = load(op, name, _framework(tensors[0]))
    except ModuleNotFoundError as error:
        # a module of ours that is missing is a bug, not a part to install
        if (error.name or __package__).startswith(__package__):
            raise
        return f"it needs {error.name}, which is not installed"
    return module.unsupported(*tensors, **options)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere autocast would only slow it down."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype of an active autocast; None outside one, and on devices that know none (meta)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def _framework(tensor: Any) -> str:
    return "torch" if isinstance(tensor, torch.Tensor) else "jax"


def _known(op: str, tensor: Any) -> tuple[str, ...]:
    return (BACKENDS if _framework(tensor) == "torch" else JAX_BACKENDS)[op]


def _rows(op: str, tensor: Any) -> tuple[Row, ...]:
    framework = _framework(tensor)
    device = tensor.device.type if framework == "torch" else jax_platform()
    return tuple(row for row in PREFERENCE.get((framework, device), REFERENCES) if row.op == op)
