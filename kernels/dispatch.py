"""The one place that decides which backend runs a call, and can say why."""

from typing import Any

import torch

from .backends import BACKENDS, JAX_BACKENDS, OP_NAMES, PREFERENCE, REFERENCES, load
from .settings import jax_platform


def choose(
    op: str, mode: str, name: str, *tensors: Any, lse_grad: bool = False, **options: Any
) -> Any:
    """The module that runs ``op``.

    Args:
        mode: "fwd" or "bwd".
        name: a backend, which then runs or raises; "" for the first preferred backend that can run
            the call, and at last the reference.
        lse_grad: the backward has a gradient of attention's lse to take.
        tensors, options: as the backend's ``unsupported`` takes them.

    Raises:
        ValueError: the backend asked for by name cannot run this call.
    """
    framework = "torch" if isinstance(tensors[0], torch.Tensor) else "jax"
    if name:
        if reason := unsupported(op, name, *tensors, **options):
            raise ValueError(f"{op}: backend {name!r} cannot run this: {reason}")
        return load(op, name, framework)
    device = tensors[0].device.type if framework == "torch" else jax_platform()
    for row in PREFERENCE.get((framework, device), REFERENCES):
        if row.op != op:
            continue
        if not (row.when is None or row.when(mode, *tensors, lse_grad=lse_grad, **options)):
            continue
        if not unsupported(op, row.backend, *tensors, **options):
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
    known = BACKENDS if isinstance(tensors[0], torch.Tensor) else JAX_BACKENDS
    for backend in known[op]:
        modes = [mode for mode, name in chosen.items() if name == backend]
        verdicts[backend] = unsupported(op, backend, *tensors, **options) or (
            f"preferred ({', '.join(modes)})" if modes else "runs when asked for"
        )
    return verdicts


def unsupported(op: str, name: str, *tensors: Any, **options: Any) -> str | None:
    """The reason why backend ``name`` cannot run this call, or None."""
    framework, known = "torch", BACKENDS[op]
    if not isinstance(tensors[0], torch.Tensor):
        framework, known = "jax", JAX_BACKENDS[op]
    if name not in known:
        return (
            f"{op} has no such backend; it has {', '.join(known)}"
            f" (ask per op: VATT_FAST_BACKEND={op}=...)"
        )
    try:
        module = load(op, name, framework)
    except ModuleNotFoundError as error:
        # a module of ours that is missing is a bug, not a part to install
        if (error.name or __package__).startswith(__package__):
            raise
        return f"it needs {error.name}, which is not installed"
    return module.unsupported(*tensors, **options)


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; autocast only slows others down."""
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
