"""Ranks that are stopped, killed or silent: nothing is lost, and the end is one clear line."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchrun import environment, free_port, pid_of, pretrain_command
from training_runs import metrics, write_media

from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.metrics import METRICS

PATIENCE = 240  # seconds; machines may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def ranks(world: int, arguments: list[str], option: str = "-m") -> list[subprocess.Popen]:
    """The processes that torchrun would start, whose ends can be seen; ``option`` is Python's."""
    port = str(free_port())
    where = dict(WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=port)
    return [
        subprocess.Popen(
            [sys.executable, option, *arguments],
            stderr=subprocess.PIPE,
            text=True,
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **where),
            start_new_session=True,
        )
        for rank in range(world)
    ]


def wait_for_steps(processes: list[subprocess.Popen], out: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ((out / METRICS).exists() and len((out / METRICS).read_text().splitlines()) >= count):
        for each in processes:
            assert each.poll() is None, each.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ends(processes: list[subprocess.Popen]) -> tuple[list[int], list[str]]:
    told = [each.communicate(timeout=PATIENCE)[1] for each in processes]
    return [each.returncode for each in processes], told


def same_weights(a: Path, b: Path) -> None:
    left, right = load_file(a / CHECKPOINT), load_file(b / CHECKPOINT)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


RUNS = """
from vatt_fast.training.distributed import joined
for number in range(12):
    with joined("cpu", 30) as ranks:
        assert ranks.all((ranks.rank, number)) == [(0, number), (1, number)]
"""


def test_processes_share_one_run_after_another():
    """Whichever of them comes to the next one first."""
    codes, told = ends(ranks(2, [RUNS], "-c"))
    assert codes == [0, 0], told


def test_a_signal_to_the_whole_group_saves(folder, tmp_path):
    """The launcher passes on what the ranks have got already, one of them first."""
    processes = ranks(2, pretrain_command(folder, tmp_path, workers=1))
    wait_for_steps(processes, tmp_path, 2)
    for number in (1, 0, 1, 0):
        os.killpg(processes[number].pid, signal.SIGTERM)
    codes, told = ends(processes)
    assert codes == [130, 130], told
    step = read_standing(tmp_path / CHECKPOINT).step
    assert f"vatt-fast: stopped after step {step}; the same command continues" in told[0]
    assert "vatt-fast" not in told[1] and "terminate" not in "".join(told)
    assert len(metrics(tmp_path)) == step >= 2


def test_a_silent_rank_is_named(folder, tmp_path):
    processes = ranks(
        2, pretrain_command(folder, tmp_path, checkpoint_every=1, patience=15, workers=1)
    )
    wait_for_steps(processes, tmp_path, 2)
    os.kill(processes[1].pid, signal.SIGSTOP)
    try:
        codes, told = ends(processes[:1])
    finally:
        os.killpg(processes[1].pid, signal.SIGKILL)
    assert codes == [2]
    named = rf"vatt-fast: rank 1 \(\S+, process {processes[1].pid}\) did not answer for 15 s; the "
    assert re.search(named + "last checkpoint stays: the same command continues", told[0]), told[0]
    assert read_standing(tmp_path / CHECKPOINT).step >= 1
    processes[1].communicate()


def test_a_killed_rank_is_started_again(folder, tmp_path):
    """torchrun starts all ranks again, which continue; the end is that of an undisturbed run."""
    more = dict(steps=24, checkpoint_every=4, workers=1)
    codes, told = ends(ranks(2, pretrain_command(folder, tmp_path / "whole", **more)))
    assert codes == [0, 0], told
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    launch += ["--max-restarts", "3", "--master-port", str(free_port()), "-m"]
    out = tmp_path / "killed"
    process = subprocess.Popen(
        launch + pretrain_command(folder, out, **more),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    for rank, step in ((1, 6), (0, 14)):
        wait_for_steps([process], out, step)
        pid = pid_of(process.pid, rank)
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        beyond = read_standing(out / CHECKPOINT).step if (out / CHECKPOINT).exists() else 0
        assert beyond < 24
    codes, told = ends([process])
    assert codes == [0], told[0]
    assert "SIGKILL" in told[0] or "Signal 9" in told[0] or "exitcode: -9" in told[0]
    same_weights(tmp_path / "whole", out)
    losses = [[line["loss"] for line in metrics(one)] for one in (tmp_path / "whole", out)]
    assert losses[0] == losses[1] and len(losses[0]) == 24
    assert not [path.name for path in out.rglob("*") if ".part" in path.name]
