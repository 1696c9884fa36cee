"""The C++ extension (csrc/): whether it was built, and which instruction set of this machine its
kernels use.

The environment variable VATT_FAST_ISA (base, avx2, avx512, avx512_bf16, amx_bf16), read at import,
holds them to a lower one.
"""

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import native_interface


def _load() -> ModuleType | None:
    """The extension beside this file. Where there is none, the one of an installed package: Python
    was started in the root of a checkout, whose folder hides that package.

    Raises:
        ImportError: it cannot be loaded.
    """
    name = f"{__package__}._native"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        pass
    for folder in sys.path:
        for suffix in importlib.machinery.EXTENSION_SUFFIXES:
            file = Path(folder, "vatt_fast", "kernels", f"_native{suffix}")
            if file.is_file():
                spec = importlib.util.spec_from_file_location(name, file)
                assert spec is not None and spec.loader is not None
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module
    return None


extension: Any = None
_failure = (
    "not built: the install found no C++ compiler, or it failed "
    "(pip install with VATT_FAST_NATIVE=required shows why)"
)
try:
    extension = _load()
except ImportError as error:
    _failure = f"built, but cannot be loaded: {error}"

if extension is not None and getattr(extension, "INTERFACE", None) != native_interface.expected():
    # sources have moved on since an editable install, or another version is installed
    extension, _failure = None, "built from other sources than these: install again (make setup)"

if extension is not None and (_asked := os.environ.get("VATT_FAST_ISA")):
    try:
        extension.hold_to(_asked)
    except ValueError as error:
        raise ValueError(f"VATT_FAST_ISA is {_asked!r}: {error}") from None


def level() -> str:
    """Instruction set in use: "base", "avx2", "avx512", "avx512_bf16" or "amx_bf16"; "" without the
    extension."""
    return "" if extension is None else extension.level()


def multiplies_bf16() -> bool:
    """Whether that set has products of bf16 with fp32 sums."""
    return level() in ("avx512_bf16", "amx_bf16")


def address(tensor: torch.Tensor | None) -> int:
    """What the extension takes for a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def explain() -> str:
    """One line: what is used, and why not more."""
    if extension is None:
        return _failure
    if level() != extension.available():
        return f"{level()}, asked for by VATT_FAST_ISA (this machine has {extension.available()})"
    return level() + (f"; {extension.missing()}" if extension.missing() else "")
