"""Tests import the installed package, never the checkout's folders.

The root's ``kernels`` must not be found as a top-level name. ``bench`` is not installed; it alone
is taken from the checkout. Without a GPU, Triton kernels run in Triton's interpreter, which has to
be asked for before they are imported. Without a TPU, JAX runs on the CPU, and libtpu, where it is
installed, only compiles.
"""

import hashlib
import importlib.util
import os
import sys
import tempfile
import time
from pathlib import Path

import pytest

# pytest --numprocesses: the workers share the cores
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

_root = Path(__file__).resolve().parent.parent

# torch.compile keeps graphs on disk, and its key knows nothing of our operators' arguments: graphs
# of other sources must not be found
_sources = b"".join(path.read_bytes() for path in sorted((_root / "kernels").rglob("*.py")))
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir(), f"vatt_fast_{hashlib.sha256(_sources).hexdigest()[:12]}")),
)

sys.path[:] = [entry for entry in sys.path if entry not in ("", str(_root))]

from vatt_fast.devices import has_a_tpu, without_a_tpu  # noqa: E402

if not has_a_tpu():
    without_a_tpu()
    # what XLA makes for a CPU is compiled once and run once: a third of the time without its passes
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    )

_spec = importlib.util.spec_from_file_location(
    "bench", _root / "bench" / "__init__.py", submodule_search_locations=[str(_root / "bench")]
)
sys.modules["bench"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules["bench"])

from native_fixtures import emulated_extension  # noqa: E402, F401
from processes import kill_processes_of  # noqa: E402

_QUICK_SECONDS = 0.5  # nothing that starts Python ends sooner


@pytest.fixture(autouse=True)
def _no_process_outlives_its_test(request):
    """A failed test would leave its runs to train on, beside all later tests."""
    began = time.monotonic()
    yield
    if sys.platform == "linux" and time.monotonic() - began > _QUICK_SECONDS:
        kill_processes_of(request.node.nodeid)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a GPU, and torch sees none"))
