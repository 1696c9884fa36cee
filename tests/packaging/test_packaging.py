"""What an install holds, and that Python works in the root of a checkout after a plain install."""

import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _can_build() -> bool:
    """A build without isolation takes the build requirements from this environment."""
    try:
        return int(version("setuptools").split(".")[0]) >= 77
    except PackageNotFoundError:
        return False


pytestmark = pytest.mark.skipif(not _can_build(), reason="needs setuptools >= 77 to build")


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """The files that a build needs, in a folder of their own."""
    there = tmp_path_factory.mktemp("packaging") / "checkout"
    unwanted = shutil.ignore_patterns("__pycache__", "*.so")
    for name in ("csrc", "kernels", "vatt_fast"):
        shutil.copytree(ROOT / name, there / name, ignore=unwanted)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, there)
    return there


def run(*command: str, folder: Path, **environment: str) -> str:
    """What a command prints; the test fails with what it said on stderr where the command fails."""
    inherited = {name: x for name, x in os.environ.items() if not name.startswith("VATT_FAST_")}
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env=inherited | environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build_wheel(checkout: Path) -> list[str]:
    """The names in a wheel; without a compiler, which the files of Python do not need."""
    shutil.rmtree(checkout / "dist", ignore_errors=True)
    code = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    run(sys.executable, "-c", code, folder=checkout, CXX="/nonexistent")
    with zipfile.ZipFile(next((checkout / "dist").glob("*.whl"))) as wheel:
        return wheel.namelist()


def test_what_was_deleted_is_not_in_the_wheel(checkout):
    assert "vatt_fast/config.py" in build_wheel(checkout)
    (built,) = (checkout / "build").glob("lib*/vatt_fast")
    for left in (built / "ghost.py", built / "kernels" / "_native.ghost.so"):
        left.touch()
    assert not [name for name in build_wheel(checkout) if "ghost" in name]


def test_the_wheel_says_that_it_is_typed(checkout):
    names = build_wheel(checkout)
    for package in ("vatt_fast", "vatt_fast/kernels"):
        assert f"{package}/py.typed" in names


def test_python_works_in_the_checkout_after_a_plain_install(checkout, tmp_path):
    """There the checkout's vatt_fast comes before the installed one, and has no kernels inside."""
    target = tmp_path / "installed"
    line = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation"]
    run(*line, "--target", str(target), ".", folder=checkout, CXX="/nonexistent")

    # -S leaves out this environment's own install, which may be an editable one
    libraries = [entry for entry in sys.path if "site-packages" in entry]
    python = [sys.executable, "-S"]
    paths = dict(PYTHONPATH=os.pathsep.join([str(target), *libraries]))
    code = """
        import torch, vatt_fast, vatt_fast.kernels.jax_ops
        from vatt_fast.kernels import attention, native
        q = torch.randn(1, 3, 2, 8)
        out, lse = attention(q, q, q, scale=1.0)
        assert out.shape == q.shape
        print(vatt_fast.__file__, vatt_fast.kernels.__file__, sep="\\n")
    """
    code = "\n".join(line.strip() for line in code.splitlines())
    for folder, root in ((checkout, checkout), (tmp_path, target)):
        package, kernels = run(*python, "-c", code, folder=folder, **paths).splitlines()
        assert Path(package).parent == root / "vatt_fast"
        inside = "kernels" if root == checkout else "vatt_fast/kernels"
        assert Path(kernels).parent == root / inside
    printed = run(*python, "-m", "vatt_fast.cli", "flops", folder=checkout, **paths)
    assert "medium_base_small" in printed


def test_a_foreign_import_of_kernels_stays_silent(checkout):
    """transformers looks for a package of that name, and finds the source folder in a checkout."""
    code = "import vatt_fast, kernels; print(hasattr(kernels, 'get_kernel'), dir(kernels) != [])"
    assert run(sys.executable, "-c", code, folder=checkout) == "False True\n"
