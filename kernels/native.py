"""The C++ extension (csrc/): whether it was built, and which instruction set of this machine its kernels use.

The environment variable VATT_FAST_ISA (base, avx2, avx512, avx512_bf16, amx_bf16), read at import, holds them to a lower one.
"""

import importlib
import os
from typing import Any

INTERFACE = (
    4  # csrc/binding.cpp has the same: raise both when what the extension takes or offers changes
)
extension: Any = None
_failure = "not built: the install found no C++ compiler, or it failed (pip install with VATT_FAST_NATIVE=required shows why)"
try:
    extension = importlib.import_module("._native", __package__)
except ModuleNotFoundError:
    pass
except ImportError as error:
    _failure = f"built, but cannot be loaded: {error}"

if (
    extension is not None and getattr(extension, "INTERFACE", 1) != INTERFACE
):  # an editable install's sources have moved on
    extension, _failure = None, "built from other sources than these: install again (make setup)"

if extension is not None and (_asked := os.environ.get("VATT_FAST_ISA")):
    try:
        extension.hold_to(_asked)
    except ValueError as error:
        raise ValueError(f"VATT_FAST_ISA is {_asked!r}: {error}") from None


def level() -> str:
    """Instruction set in use: "base", "avx2", "avx512", "avx512_bf16", "amx_bf16"; "" without the extension."""
    return "" if extension is None else extension.level()


def multiplies_bf16() -> bool:
    """Whether that set has products of bf16 with fp32 sums."""
    return level() in ("avx512_bf16", "amx_bf16")


def address(tensor) -> int:
    """What the extension takes for a tensor; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def explain() -> str:
    """One line: what is used, and why not more."""
    if extension is None:
        return _failure
    if level() != extension.available():
        return f"{level()}, asked for by VATT_FAST_ISA (this machine has {extension.available()})"
    return level() + (f"; {extension.missing()}" if extension.missing() else "")
