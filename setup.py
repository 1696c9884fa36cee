"""The package map and the C++ extension; everything static stands in pyproject.toml.

``kernels`` is installed as ``vatt_fast.kernels``: another published package owns the name
``kernels``.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))
import compile_native  # noqa: E402

NATIVE = "vatt_fast.kernels._native"
REQUIRED = os.environ.get("VATT_FAST_NATIVE") == "required"


class BuildPython(build_py):
    """Copies the package's files, after removing what an earlier build left in ``build/``.

    A wheel is packed from that folder, so a file that was deleted here would come back, and so
    would an extension that can no longer be compiled. ``build_ext`` runs after this command.
    """

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "vatt_fast", ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """Builds the extension if it can; VATT_FAST_NATIVE=required turns a failure into an error."""

    def build_extension(self, extension: Extension) -> None:
        target, objects = Path(self.get_ext_fullpath(NATIVE)), Path(self.build_temp).resolve()
        try:
            compile_native.build(target, objects)
        except RuntimeError as error:
            said = str(error)
            if not REQUIRED:
                said += (
                    "; vatt_fast is installed without its C++ kernels, "
                    "torch's own run in their place"
                )
            # setuptools turns this error into a warning where the extension is optional
            raise CompileError(said) from error


kernels = ["vatt_fast.kernels", *(f"vatt_fast.kernels.{name}" for name in find_packages("kernels"))]

setup(
    packages=[*find_packages(include=["vatt_fast", "vatt_fast.*"]), *kernels],
    package_dir={"vatt_fast.kernels": "kernels"},
    package_data={"vatt_fast.kernels": ["tiles/*.json"]},
    ext_modules=[Extension(NATIVE, [], optional=not REQUIRED)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildNative},
)
