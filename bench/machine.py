"""The device under test: its name, versions, commit, and the ceilings measured on it now."""

import datetime
import functools
import importlib.metadata
import os
import platform
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

from vatt_fast.kernels import native

from .timer import Clock, EventClock, HostClock, interleaved

# what kernels are compiled for, with or without the device
GPUS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
TPUS = {
    "v4": "v4:2x2x1",
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
    "tpu7x": "tpu7x:2x2x1",
}
ROOT = Path(__file__).resolve().parent.parent
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Ceilings:
    """What the device reaches at best: a large matmul in a dtype, and a large copy.

    The copy's bytes count twice, read and written.
    """

    tflops: float
    gb_per_s: float


# bf16, as measured on one: the floor sheet predicts with them
H200 = Ceilings(tflops=790.0, gb_per_s=4300.0)


def measure_ceilings(device: torch.device, dtype: torch.dtype, *, quick: bool = False) -> Ceilings:
    """The fastest of interleaved runs of one matmul and one copy.

    ``quick`` takes sizes that only exercise the code.
    """
    cuda = device.type == "cuda"
    side = 256 if quick else 8192 if cuda else 1024
    size = 1 << (16 if quick else 28 if cuda else 25)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    source = torch.randn(size, device=device)
    target = torch.empty_like(source)
    clock: Clock = EventClock(device) if cuda else HostClock()
    rounds = 3 if quick else 20 if cuda else 7
    calls = {"matmul": [lambda: a @ b], "copy": [lambda: target.copy_(source)]}
    times = interleaved(calls, rounds=rounds, warmup=2, clock=clock)
    return Ceilings(
        2 * side**3 / min(times["matmul"].ms) / 1e9, 2 * source.nbytes / min(times["copy"].ms) / 1e6
    )


def name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = models[0] if models else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def versions(device: torch.device) -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    if device.type == "cpu":
        found["instructions"] = native.level() or "none: the C++ extension was not built"
    if triton := version_of("triton"):
        found["triton"] = triton
    if os.environ.get("TRITON_INTERPRET") == "1":
        found["triton"] = f"{found.get('triton')} (interpreter)"
    if device.type == "cuda":
        found["cuda"] = torch.version.cuda or f"hip {torch.version.hip}"
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def package_version(package: str | None) -> dict[str, str]:
    """{package: version}, of a library that a contender is from; of torch itself nothing."""
    return {package: version_of(package) or "unknown"} if package else {}


# what measuring and reporting write: a line must not make the next one's tree dirty
_WRITTEN = ("bench/results", "bench/figures", "*.md")


@functools.cache
def commit() -> str:
    """Short hash, with "-dirty" where the code differs from it.

    Outside a checkout the value of VATT_FAST_COMMIT, or "unknown".
    """
    excluded = [f":(exclude){each}" for each in _WRITTEN]
    try:
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *excluded)
        return _git("rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("VATT_FAST_COMMIT", "unknown")


def _git(*arguments: str) -> str:
    command = ["git", "--no-optional-locks", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
    ).stdout.strip()


def today() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d")
