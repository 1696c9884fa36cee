"""Starting `vatt-fast pretrain` under torchrun, and finding its ranks."""

import os
import socket
from pathlib import Path


def pretrain_command(folder: Path, out: Path, **changes) -> list[str]:
    """Module and arguments of a small run on the CPU."""
    options = dict(data=folder, out=out, steps=100_000, batch_size=4, warmup_steps=2, log_every=1)
    options |= dict(checkpoint_every=50_000, workers=0, precision="fp32", loggers="none")
    options |= dict(frames=4, height=16, width=16, samples=1280, device="cpu") | changes
    found = ["vatt_fast.cli", "pretrain"]
    for name, value in options.items():
        found += [f"--{name.replace('_', '-')}", str(value)]
    return found


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return one.getsockname()[1]


def pid_of(parent: int, rank: int) -> int | None:
    """The process of a rank that torchrun, of that process id, has started (Linux)."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = (path / "stat").read_text().rpartition(")")[2].split()
            variables = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if int(status[1]) == parent and f"RANK={rank}".encode() in variables:
            return int(path.name)
    return None
