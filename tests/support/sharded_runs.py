"""A program that pre-trains with strategy fsdp2 on two ranks, many times: killed, starved, stopped.

Each rank is a fork of this process, which has imported everything and run nothing. Prints one JSON
line. ``python tests/support/sharded_runs.py MEDIA OUT``
"""

import contextlib
import dataclasses
import errno
import importlib
import json
import os
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
import torch.distributed as dist
from training_runs import MODEL, metrics, settings

from vatt_fast.config import MODALITIES, TowerConfig
from vatt_fast.training import loop, running
from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.shards import folders, join_shards
from vatt_fast.training.step import TorchTrainer

# what a run imports meanwhile, as torch does at an optimizer's first step
for name in ("fsdp", "tensor", "checkpoint", "nn.functional"):
    importlib.import_module(f"torch.distributed.{name}")
for name in ("av", "PIL.Image", "torch._dynamo", "torch._inductor.test_operators"):
    importlib.import_module(name)

TOWER = TowerConfig(depth=1, dim=16, mlp_dim=32, num_heads=2, head_dim=8)
SMALL = dataclasses.replace(
    MODEL, **dict.fromkeys(MODALITIES, TOWER), d_va=16, d_vt=8, learn_temperature=True
)
MEDIA, OUT = map(Path, sys.argv[1:])


def pretrain(out: Path, keep_last: int = 3) -> None:
    config = settings(MEDIA, out, strategy="fsdp2", loggers="none", keep_last=keep_last)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup_steps")
        warnings.filterwarnings("ignore", message="FSDP2-wrapped")
        loop.pretrain(config, model_config=SMALL, progress=False)


def on_ranks(work: Callable[[int], object], world: int = 2, whole: bool = True) -> list[str]:
    """What ``work`` raises on each rank; if one is killed, so are the others."""
    meeting = OUT / "meeting"
    meeting.unlink(missing_ok=True)
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            try:
                told = ""
                where = dict(init_method=f"file://{meeting}", rank=rank, world_size=world)
                dist.init_process_group("gloo", **where)
                try:
                    work(rank)
                except (ValueError, OSError, KeyboardInterrupt) as error:
                    told = f"{type(error).__name__}: {error}"
                (OUT / f"told_{rank}").write_text(told)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                os._exit(1)
        children.append(child)
    left, codes = set(children), []
    while left:
        child, status = os.wait()
        left.discard(child)
        codes.append(os.waitstatus_to_exitcode(status))
        if codes[-1]:
            for other in left:
                os.kill(other, 9)
    assert codes == [0] * world if whole else codes[0] == 9, codes
    return [(OUT / f"told_{rank}").read_text() for rank in range(world)] if whole else []


def at_fsync(count: int, act: Callable[[], None], joining: bool = False) -> None:
    """Do it when this process puts a file on disk for the ``count``-th time.

    Only what is written beside the steps is counted, or what is written when shards are joined.
    """
    fsync, join = os.fsync, running.join_shards
    calls, joins = [], []

    def counted(number: int) -> None:
        beside = threading.current_thread() is not threading.main_thread()
        if beside != joining and bool(joins) == joining:
            calls.append(number)
            if len(calls) == count:
                act()
        fsync(number)

    def noted(*arguments) -> None:
        joins.append(True)
        join(*arguments)

    os.fsync, running.join_shards = counted, noted


def same(a: Path, b: Path) -> bool:
    left, right = safetensors.torch.load_file(a), safetensors.torch.load_file(b)
    return left.keys() == right.keys() and all(left[n].equal(right[n]) for n in left)


def as_whole(out: Path) -> dict[str, bool]:
    """Whether a run ended as the undisturbed one: bits, losses, files."""
    names = [sorted(path.name for path in each.rglob("*")) for each in (WHOLE, out)]
    losses = [[line["loss"] for line in metrics(each)] for each in (WHOLE, out)]
    return {
        "weights": all(same(path, out / path.name) for path in WHOLE.glob("*.safetensors")),
        "losses": losses[0] == losses[1],
        "files": names[0] == names[1],
    }


def killed(rank: int, count: int, joining: bool = False) -> dict:
    out = OUT / f"killed_{rank}_{count}_{joining}"

    def until_killed(mine: int) -> None:
        if mine == rank:
            at_fsync(count, lambda: os._exit(9), joining)
        pretrain(out)

    on_ranks(until_killed, whole=False)
    lay = {path.name for path in out.glob("*")} | {path.name for path in out.glob(".*.part")}
    on_ranks(lambda mine: pretrain(out))
    return {"lay": sorted(lay), **as_whole(out)}


def starved() -> dict:
    """The second checkpoint finds no room on rank 1's disk."""
    out = OUT / "starved"

    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def work(rank: int) -> None:
        if rank == 1:
            at_fsync(2, full)
        pretrain(out)

    told = on_ranks(work)
    steps = [read_standing(each).step for each in folders(out)]
    litter = [path.name for path in out.glob(".*.part")]
    on_ranks(lambda rank: pretrain(out))
    return {"told": told, "steps": steps, "litter": litter, **as_whole(out)}


class Stopped(KeyboardInterrupt):
    pass


def stopped(out: Path, step: int) -> Callable[[int], None]:
    """A run whose ranks are gone before that step, once what they write is written."""

    def work(rank: int) -> None:
        original = TorchTrainer.step

        def before(trainer, batch, number, rate):
            if number == step:
                trainer.shards.finish()
                raise Stopped
            return original(trainer, batch, number, rate)

        TorchTrainer.step = before
        with contextlib.suppress(Stopped):
            pretrain(out)

    return work


def goes_on() -> dict:
    """Of step 2 nothing is written before step 4 is done."""
    out, done = OUT / "goes_on", threading.Event()

    def work(rank: int) -> None:
        original, save = TorchTrainer.step, safetensors.torch.save

        def step(trainer, batch, number, rate):
            update = original(trainer, batch, number, rate)
            if number == 3:
                assert trainer.shards.complete == 0
                done.set()
            return update

        def hold(*arguments, **options):
            (OUT / f"let_through_{rank}").write_text(str(done.wait(240)))
            return save(*arguments, **options)

        TorchTrainer.step, safetensors.torch.save = step, hold
        pretrain(out)

    on_ranks(work)
    let_through = [(OUT / f"let_through_{rank}").read_text() for rank in range(2)]
    return {"let_through": let_through, **as_whole(out)}


def joined() -> dict:
    """What is joined of an interrupted run, and runs on one rank that read it."""
    out, alone = OUT / "joined", OUT / "alone"
    on_ranks(stopped(out, 5))
    found = {"before": sorted(path.name for path in out.iterdir())}
    shutil.copytree(out, alone)
    shutil.copytree(out, OUT / "interrupted")
    found["step"] = join_shards(out)
    found["after"] = sorted(path.name for path in out.iterdir())
    found["same"] = same(out / CHECKPOINT, WHOLE / "checkpoint_00000004.safetensors")
    found["model"] = sorted(safetensors.torch.load_file(out / "model.safetensors")) == sorted(
        safetensors.torch.load_file(WHOLE / "model.safetensors")
    )
    on_ranks(lambda rank: pretrain(alone), world=1)
    found["alone"] = sorted(path.name for path in alone.iterdir())
    return found


def best() -> dict:
    """The best model is that of step 4; of the checkpoints only the last is kept."""
    out = OUT / "best"

    def work(rank: int) -> None:
        means = iter([2.0, 1.0, 3.0])
        running.Mean.take = lambda self: next(means)
        pretrain(out, keep_last=1)

    on_ranks(work)
    left = safetensors.torch.load_file(out / "best" / "model.safetensors")
    right = safetensors.torch.load_file(WHOLE / "checkpoint_00000004.safetensors")
    return {
        "same": all(value.equal(right[f"model/{name}"]) for name, value in left.items()),
        "files": sorted(path.name for path in out.iterdir()),
        "best": sorted(path.name for path in (out / "best").iterdir()),
    }


def damaged() -> list[str]:
    """A rank's file that is cut short, and one that is missing."""
    out = OUT / "damaged"
    on_ranks(stopped(out, 3))
    path, told = sorted(folders(out)[0].glob("*.safetensors"))[1], []
    for size in (path.stat().st_size // 2, None):
        content = path.read_bytes()[:size]
        path.unlink()
        if size is not None:
            path.write_bytes(content)
        told += on_ranks(lambda rank: pretrain(out), world=1)
    return told


# rank, and which file: its own shards; after the new name; amid joining
KILLS = [(1, 2), (0, 5), (0, 9, True)]

if __name__ == "__main__":
    torch.set_num_threads(1)
    WHOLE = OUT / "whole"
    assert on_ranks(lambda rank: pretrain(WHOLE)) == ["", ""]
    print(
        json.dumps(
            {
                "killed": [killed(*each) for each in KILLS],
                "starved": starved(),
                "goes on": goes_on(),
                "joined": joined(),
                "best": best(),
                "damaged": damaged(),
            }
        )
    )
