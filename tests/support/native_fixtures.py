"""The C++ extension in other builds than the installed one: instructions of larger machines written
out in AVX-512, sanitizers.

VATT_FAST_TEST_EXTENSION names the file of a build that a whole test run uses, VATT_FAST_TEST_ISA
the instruction set it is held to.
"""

import contextlib
import ctypes
import functools
import importlib.util
import math
import mmap
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from vatt_fast.kernels import native

LEVELS = ("base", "avx2", "avx512", "avx512_bf16", "amx_bf16")  # each includes those before it
SOURCES = Path(__file__).resolve().parents[2] / "csrc"


@functools.cache
def recipe() -> ModuleType:
    """csrc/compile_native.py, which is not installed."""
    return _load("compile_native", SOURCES / "compile_native.py")


def build(folder: Path, **options) -> ModuleType:
    """Compile the extension into ``folder`` with the recipe's options and load it, beside the
    installed one."""
    target = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    recipe().build(target, folder, **options)
    return _load("_native", target)


def _load(name: str, file: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if _named := os.environ.get("VATT_FAST_TEST_EXTENSION"):
    native.extension = _load("_native", Path(_named))
    native.extension.hold_to(os.environ.get("VATT_FAST_TEST_ISA") or native.extension.available())


@contextlib.contextmanager
def using(extension) -> Iterator[None]:
    """Kernels run from ``extension``; None: as if none had been built."""
    before, native.extension = native.extension, extension
    try:
        yield
    finally:
        native.extension = before


@contextlib.contextmanager
def held_to(level: str, request) -> Iterator[None]:
    """Kernels run at an instruction set: from the installed extension where the machine has it,
    else from the emulated one."""
    if native.extension is None:
        pytest.skip(f"the extension is {native.explain()}")
    extension = native.extension
    if LEVELS.index(level) > LEVELS.index(extension.available()):
        extension = request.getfixturevalue("emulated_extension")
    before = extension.level()
    with using(extension):
        extension.hold_to(level)
        yield
        extension.hold_to(before)


needs_guard_pages = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mprotect"), reason="no mprotect here"
)


def guarded(shape, dtype: torch.dtype, at_end: bool) -> torch.Tensor:
    """Uninitialised memory, bits all set, between two pages that end the process when touched:
    flush against the second, or the first."""
    page = mmap.PAGESIZE
    size = math.prod(shape) * dtype.itemsize
    pages = max(1, -(-size // page))
    area = mmap.mmap(-1, (pages + 2) * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(area))
    libc = ctypes.CDLL(None, use_errno=True)
    for edge in (start, start + (pages + 1) * page):
        assert libc.mprotect(ctypes.c_void_p(edge), page, 0) == 0
    offset = page + (pages * page - size if at_end else 0)
    ctypes.memset(start + offset, 0xFF, size)
    return torch.frombuffer(area, dtype=dtype, count=math.prod(shape), offset=offset).view(
        shape
    )  # keeps the area


def cpu_flags() -> set[str]:
    """What Linux says of the processor, empty elsewhere: asked here for what the extension does not
    report."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return set(
        next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    )


def skip_without_avx512() -> None:
    missing = {"avx512f", "avx512bw", "avx512vl", "avx512dq"} - cpu_flags()
    if missing:
        lacks = ", ".join(sorted(missing))
        pytest.skip(f"the emulation is written in AVX-512, and this machine lacks {lacks}")
    if native.extension is None:
        pytest.skip(f"the extension is {native.explain()}")


@pytest.fixture(scope="session")
def emulated_extension(tmp_path_factory) -> ModuleType:
    """The extension with bf16 instructions and the matrix unit written out in AVX-512: it reports
    amx_bf16, and runs avx512_bf16 too."""
    skip_without_avx512()
    return build(tmp_path_factory.mktemp("emulated"), emulated=True)
