"""Processes of tests: several joined by gloo, as many devices are; their memory, and their end."""

import contextlib
import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from vatt_fast.collectives import process_group


def in_processes(
    world: int, function: Callable[..., Any], *arguments: Any, dtensors: bool = False
) -> list[Any]:
    """What ``function(rank, world, *arguments)`` returns in each of ``world`` processes, by rank.

    Results are what ``torch.save`` takes. A process group that outlives ``destroy_process_group``
    fails the call: its threads may abort the interpreter at its end. ``dtensors`` says that there
    are DTensors; torch's caches of them keep the group, and the interpreter is left another way.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = (world, folder, function, arguments, dtensors)
        spawned = mp.spawn(_process, given, nprocs=world, join=False)
        try:
            while not spawned.join():
                pass
        except BaseException:  # a test that hangs is interrupted; its processes would go on
            for process in spawned.processes:
                process.kill()
            raise
        return [
            torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)
        ]


def _process(
    rank: int, world: int, folder: str, function: Callable, arguments: tuple, dtensors: bool
) -> None:
    torch.set_num_threads(1)
    where = dict(init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    with process_group("gloo", **where):
        torch.save(function(rank, world, *arguments), Path(folder) / f"{rank}.pt")
        dist.barrier()
    if dtensors:
        os._exit(0)
    assert not gloo_threads()


def gloo_threads() -> list[str]:
    """Names of this process's threads that belong to a gloo process group (Linux)."""
    names = [path.read_text().strip() for path in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def memory_of_group(group: int) -> int:
    """Bytes that the processes of a group hold together, but for files (Linux).

    Programs and libraries are shared with whatever else runs on the machine.
    """
    total, counted = 0, ("Pss_Anon:", "Pss_Shmem:")
    for process in Path("/proc").glob("[0-9]*"):
        # one that has just ended, or is another user's
        with contextlib.suppress(ProcessLookupError, FileNotFoundError, PermissionError):
            if os.getpgid(int(process.name)) == group:
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += sum(int(line.split()[1]) for line in lines if line.startswith(counted))
    return total * 1024


def kill_processes_of(test: str) -> None:
    """Kill what a test has started and not ended, however deep and in whatever session (Linux)."""
    mark = f"PYTEST_CURRENT_TEST={test} (call)".encode()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if mark in (path / "environ").read_bytes().split(b"\0"):
                os.kill(int(path.name), signal.SIGKILL)
