"""The package map and the C++ extension; everything static stands in pyproject.toml.

``kernels`` is installed as ``vatt_fast.kernels``: another published package owns the top-level
name.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import compile_native  # noqa: E402

NATIVE = "vatt_fast.kernels._native"
REQUIRED = os.environ.get("VATT_FAST_NATIVE") == "required"


class BuildNative(build_ext):
    """Builds the extension if it can be built; VATT_FAST_NATIVE=required turns a failure into an
    error."""

    def build_extension(self, extension):
        try:
            target = Path(self.get_ext_fullpath(NATIVE))
            compile_native.build(target, Path(self.build_temp).resolve())
            # beside an installed extension, where no sources tell (kernels/native_interface.py)
            target.with_name("native_interface.txt").write_text(compile_native.interface())
        except RuntimeError as error:
            instead = (
                "; vatt_fast is installed without its C++ kernels, torch's own run in their place"
            )
            raise CompileError(
                f"{error}{'' if REQUIRED else instead}"
            ) from error  # an optional extension's becomes a warning


kernels = ["vatt_fast.kernels", *(f"vatt_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["vatt_fast", "vatt_fast.*"]), *kernels],
    package_dir={"vatt_fast.kernels": "kernels"},
    package_data={"vatt_fast.kernels": ["tiles/*.json"]},
    ext_modules=[Extension(NATIVE, [], optional=not REQUIRED)],
    cmdclass={"build_ext": BuildNative},
)
