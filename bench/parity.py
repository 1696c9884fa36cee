"""The op tests as a gate: what is red, or was never run, is not timed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterable

from .machine import ROOT

_VERDICT = re.compile(
    r"^(PASSED|FAILED|ERROR) tests/kernels/test_ops\.py::\w+\[(?P<op>\w+)-(?P<backend>\w+)-",
    re.MULTILINE,
)


def environment(device: str) -> dict[str, str]:
    """Of a test process: on a GPU kernels are compiled, whatever this process was told."""
    own = dict(os.environ)
    if device == "cuda":
        own.pop("TRITON_INTERPRET", None)
    own.pop("VATT_FAST_BACKEND", None)
    return own


def pytest(arguments: list[str], device: str, timeout: float | None = None) -> tuple[int, str]:
    """Exit status and output of pytest on the checkout's tests; -1 where it ran out of time."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-rpfE",
        "--no-header",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        *arguments,
    ]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment(device),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        text = error.stdout.decode() if isinstance(error.stdout, bytes) else error.stdout or ""
        return -1, text + f"\nstopped after {timeout:.0f} s\n"
    return done.returncode, done.stdout + done.stderr


def expression(pairs: Iterable[tuple[str, str]], dtype: str, device: str) -> str:
    """pytest -k for the parity of some (op, backend) in a dtype on a device; ids read [op-backend-case-(cuda-)dtype]."""
    of_pairs = " or ".join(f"[{op}-{backend}-" for op, backend in pairs)
    return f"test_gradients and ({of_pairs}) and -{dtype}] and {'-cuda-' if device == 'cuda' else 'not -cuda-'}"


def counts(output: str) -> dict[tuple[str, str], dict[str, int]]:
    """{(op, backend): {"passed": n, "failed": n}} of pytest's -rpfE lines."""
    found: dict[tuple[str, str], dict[str, int]] = {}
    for match in _VERDICT.finditer(output):
        verdict = found.setdefault((match["op"], match["backend"]), {"passed": 0, "failed": 0})
        verdict["passed" if match[1] == "PASSED" else "failed"] += 1
    return found


def objection(found: dict[tuple[str, str], dict[str, int]], op: str, backend: str) -> str | None:
    """Why a backend of an op may not be timed; None: it is green."""
    verdict = found.get((op, backend))
    if verdict is None:
        return "its parity tests did not run here"
    if verdict["failed"]:
        return f"its parity tests are red: {verdict['failed']} failed, {verdict['passed']} passed"
    return None


def check(
    pairs: Iterable[tuple[str, str]], dtype: str, device: str, timeout: float | None = None
) -> tuple[dict[tuple[str, str], dict[str, int]], str]:
    """Run the parity tests of some (op, backend) in one dtype on a device: counts and the whole output."""
    status, output = pytest(
        ["tests/kernels/test_ops.py", "-k", expression(pairs, dtype, device)], device, timeout
    )
    return (counts(output) if status in (0, 1) else {}), output
