"""Made-up result lines, and the command as a user runs it."""

import subprocess
import sys
from pathlib import Path

from bench import __main__
from bench.lines import Line

ROOT = Path(__file__).resolve().parents[2]
LINE = Line(
    op="attention",
    case="ragged_17",
    dtype="bf16",
    mode="fwd",
    backend="reference",
    ours=True,
    ms_p20=1.0,
    ms_p50=2.0,
    ms_p80=3.0,
    rounds=5,
    clock="perf_counter",
    peak_bytes=2**21,
    tflops=1.5,
    gb_per_s=None,
    share_of_ceiling=0.25,
    error=1e-3,
    error_of="out",
    error_batch=2,
    device="a machine",
    versions={"torch": "2"},
    commit="unknown",
    date="2026-01-01",
    speedup_over_best_peer=1.25,
)


def no_gate(monkeypatch):
    """Commands of the test process then check no parity, and leave its allocator alone."""

    def green(here, ops, dtype, **options):
        for op in ops:
            here.set_verdict(op, "reference", None)

    monkeypatch.setattr(__main__, "gate", green)
    monkeypatch.setattr(__main__, "keep_host_memory", lambda: None)


def command(*arguments, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
