"""Training steps of several ranks on one host: their time, and the bytes that a rank sends.

Each rank is a process with one thread, over gloo, as `vatt-fast pretrain` runs it. The ranks share
one batch. On as many cores as ranks, or fewer, this tells what exchanging costs, not how it scales.
"""

import dataclasses
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vatt_fast.data.clips import Batch
from vatt_fast.data.text import PADDING, UNKNOWN, Vocabulary
from vatt_fast.plan import exchanged_bytes
from vatt_fast.training.distributed import joined, leave
from vatt_fast.training.settings import PretrainConfig
from vatt_fast.training.step import TorchTrainer

from . import digest, lines, machine
from .steps import CONFIGURATIONS, make_batch

FILE = lines.RESULTS / "ranks.jsonl"
CELLS = ((1, "ddp"), (2, "ddp"), (2, "fsdp2"), (4, "ddp"), (4, "fsdp2"))
_DROP_RATE, _WARMUP = 0.5, 3


@dataclasses.dataclass(frozen=True)
class Row:
    """Steps of so many ranks. ``lines.Line`` is for one process."""

    configuration: str
    batch: int  # clips of all ranks
    ranks: int
    strategy: str
    ms_p20: float  # of a step, of the slowest rank
    ms_p50: float
    ms_p80: float
    rounds: int
    sent_mb: float | None  # by the rank that sends most, in a step; Linux only
    planned_mb: float  # by `vatt-fast plan`, of rings
    device: str
    versions: dict[str, str]
    commit: str
    date: str
    source: str  # digest of the model's sources


def measure(name: str, batch: int, ranks: int, strategy: str, rounds: int) -> Row:
    """Start the ranks, and take rank 0's word for all. Raises RuntimeError: a rank failed."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = dict(OMP_NUM_THREADS="1", MASTER_ADDR="localhost", MASTER_PORT=str(port))
    command = [sys.executable, "-m", "bench.ranks", name, str(batch), strategy, str(rounds)]
    started = [
        subprocess.Popen(
            command,
            cwd=machine.ROOT,
            env=os.environ | shared | dict(RANK=str(rank), WORLD_SIZE=str(ranks)),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [each.communicate() for each in started]
    if any(each.returncode for each in started):
        raise RuntimeError("\n".join(errors for _, errors in told))
    ms, sent = json.loads(told[0][0].splitlines()[-1])
    config, cpu = CONFIGURATIONS[name].config, torch.device("cpu")
    planned = sum(exchanged_bytes(config, batch // ranks, ranks, strategy).values())
    p20, p50, p80 = (float(np.percentile(ms, share)) for share in (20, 50, 80))
    return Row(
        name,
        batch,
        ranks,
        strategy,
        p20,
        p50,
        p80,
        rounds,
        None if sent is None else float(np.median(sent)) / 1e6,
        planned / 1e6,
        machine.name(cpu),
        machine.versions(cpu),
        machine.commit(),
        machine.today(),
        _source(),
    )


def _source() -> str:
    return digest.of("step", "auto", True, None, "fp32", False)


def run(name: str, batch: int, rounds: int, out: Path | None, resume: bool) -> int:
    """Measure all cells, each appended to ``out`` as it is done; print their table."""
    if uneven := [ranks for ranks, _ in CELLS if batch % ranks]:
        raise ValueError(f"batch is {batch}; {uneven[0]} ranks cannot share it evenly")
    rows = read(out) if out is not None and resume else []
    here = (machine.name(torch.device("cpu")), torch.__version__, _source())
    there = {
        (row.ranks, row.strategy)
        for row in rows
        if (row.device, row.versions["torch"], row.source) == here
        and (row.configuration, row.batch) == (name, batch)
    }
    for ranks, strategy in CELLS:
        if (ranks, strategy) in there:
            continue
        rows.append(row := measure(name, batch, ranks, strategy, rounds))
        print(table([row]).splitlines()[-1], flush=True)
        if out is not None:
            with out.open("a") as file:
                file.write(json.dumps(dataclasses.asdict(row)) + "\n")
    print(table(rows))
    return 0


def read(path: Path) -> list[Row]:
    """Rows of a file, of each cell the last one; none where it does not exist."""
    if not path.exists():
        return []
    found = [Row(**json.loads(line)) for line in path.read_text().splitlines()]
    cells = {(r.device, r.configuration, r.batch, r.ranks, r.strategy): r for r in found}
    return list(cells.values())


def table(rows: Sequence[Row]) -> str:
    cells = [
        (
            row.configuration,
            row.batch,
            row.ranks,
            row.strategy if row.ranks > 1 else "",
            lines.number(row.ms_p50),
            f"{lines.number(row.ms_p20)}..{lines.number(row.ms_p80)} of {row.rounds}",
            "" if row.sent_mb is None else f"{row.sent_mb:.2f}",
            f"{row.planned_mb:.2f}",
        )
        for row in sorted(rows, key=lambda row: (row.device, row.configuration, row.ranks))
    ]
    headings = ("model", "batch", "ranks", "strategy", "ms_p50", "p20..p80", "MB sent", "planned")
    return lines.markdown_table(headings, cells)


def tables(rows: Sequence[Row]) -> str:
    """A table a machine, under its name."""
    made = []
    for device in dict.fromkeys(row.device for row in rows):
        own = [row for row in rows if row.device == device]
        made.append(f"{device}, {own[-1].date}:\n\n{table(own)}")
    return "\n\n".join(made) or "No lines exist yet."


# -- a rank ----------------------------------------------------------------------------------------


def _rank(name: str, batch: int, strategy: str, rounds: int) -> tuple[list[float], Any]:
    """Milliseconds and bytes of each step: the slowest rank's, and those of who sends most."""
    config = CONFIGURATIONS[name].config
    options: dict[str, Any] = dict(batch_size=batch, strategy=strategy, precision="fp32")
    with tempfile.TemporaryDirectory() as out, joined("cpu", 600) as ranks:
        run = PretrainConfig(data="", out=out, device="cpu", log_every=10**6, **options)
        trainer = TorchTrainer(run, config, Vocabulary([PADDING, UNKNOWN]), None, ranks)
        clips = batch // ranks.world
        made: dict[str, Any] = make_batch(
            config, clips, _DROP_RATE, "fwd+bwd", trainer.device, seed=ranks.rank
        )
        shapes = {"video": (clips,), "audio": (clips,), "text": (clips, config.texts_per_clip)}
        made |= {f"{n}_valid": torch.ones(size, dtype=torch.bool) for n, size in shapes.items()}
        rows = Batch(**made, start_seconds=torch.zeros(clips), files=("",) * clips)
        found = []
        for number in range(_WARMUP + rounds):
            ranks.any(False)  # all begin together
            before, began = _written(), time.perf_counter()
            trainer.step(rows, number, 1e-5)
            took, after = time.perf_counter() - began, _written()
            found.append(ranks.largest({"ms": 1e3 * took, "sent": after - before}))
    found = found[_WARMUP:]
    sent = [each["sent"] for each in found] if _IO.exists() else None
    return [each["ms"] for each in found], sent


_IO = Path("/proc/self/io")


def _written() -> int:
    """Bytes that this process has written so far, to sockets above all."""
    if not _IO.exists():
        return 0
    return int(_IO.read_text().partition("wchar: ")[2].split()[0])


if __name__ == "__main__":
    name, batch, strategy, rounds = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(_rank(name, int(batch), strategy, int(rounds))), flush=True)
    leave(0)
