"""Pre-training on several processes (gloo): the same run on any number of them, stopped or not, and
all of them say the same where something is wrong."""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from safetensors.torch import load_file
from training_runs import MODEL, metrics, settings, write_media

from vatt_fast.data.dataset import ClipDataset
from vatt_fast.data.media import MediaError
from vatt_fast.training import checkpoint as checkpoint_module
from vatt_fast.training import distributed
from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.loop import pretrain
from vatt_fast.training.metrics import NonFiniteError
from vatt_fast.training.settings import PretrainConfig
from vatt_fast.training.step import TorchTrainer

STEPS = 6
# Adam divides the rounding of a gradient that is 0 by itself: a large eps leaves it rounding
EXACT = dict(adam_eps=1.0, learning_rate=1e-3, final_learning_rate=1e-3, drop_draws=4)


class Stopped(Exception):
    pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def run(config: PretrainConfig, stop: int | None = None, spoil: Any = None) -> list[list]:
    """Pre-train up to a step; what each step's batch was."""
    seen: list[list] = []
    original = TorchTrainer.step

    def step(trainer, batch, number, rate):
        if number == stop:
            if trainer.shards is not None:  # or this process would go on to write
                trainer.shards.finish()
            raise Stopped
        arrays = (batch.video, batch.audio, batch.text, batch.video_keep, batch.start_seconds)
        seen.append([number, list(batch.files), *(x.numpy().copy() for x in arrays)])
        if spoil is not None:
            spoil(batch, number)
        return original(trainer, batch, number, rate)

    TorchTrainer.step = step
    try:
        with warnings.catch_warnings(), contextlib.suppress(Stopped):
            warnings.filterwarnings("ignore", message="warmup_steps")
            warnings.filterwarnings("ignore", message="FSDP2-wrapped")
            pretrain(config, model_config=MODEL, progress=False)
    finally:
        TorchTrainer.step = original
    return seen


def error_of(config: PretrainConfig, **options) -> str:
    """One line, and its kind."""
    try:
        run(config, **options)
    except (ValueError, OSError, NonFiniteError) as error:
        return f"{type(error).__name__}: {error}"
    return "none"


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / CHECKPOINT)


def same(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def alike(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    for name, value in left.items():
        # batch norms of four clips, most of them alike, magnify rounding
        magnified = name.startswith("optimizer/exp_avg") or ".running_" in name
        bound = 1e-3 * max(1.0, float(value.abs().max())) if magnified else 3e-5
        assert float((right[name] - value).abs().max()) <= bound, name
    for one, other in zip(metrics(a), metrics(b), strict=True):
        for name in ("loss", "loss_va", "loss_vt", "gradient_norm", "cosine_video_va"):
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


def joined(ranks: list[list[list]]) -> list[list]:
    """What all ranks saw, step by step."""
    steps = []
    for parts in zip(*ranks, strict=True):
        files = [name for part in parts for name in part[1]]
        arrays = list(zip(*parts, strict=True))[2:]
        steps.append([parts[0][0], files, *map(np.concatenate, arrays)])
    return steps


def same_clips(a: list[list], b: list[list]) -> None:
    assert len(a) == len(b)
    for one, other in zip(a, b, strict=True):
        assert one[:2] == other[:2]
        for left, right in zip(one[2:], other[2:], strict=True):
            # a single draw that all clips of a process share has no axis of clips
            np.testing.assert_array_equal(left.reshape(right.shape), right)


# -- one run on 1, 2 and 4 ranks -------------------------------------------------------------------


def first_third(rank: int, world: int, config: PretrainConfig) -> list[list]:
    return run(config, stop=2)


def on_two(rank: int, world: int, root: Path, config: PretrainConfig, media: Path) -> dict:
    """The middle third as replicas and in shards, whole runs, and what is refused."""

    def at(name: str, **changes) -> PretrainConfig:
        return dataclasses.replace(config, out=str(root / name), **changes)

    found: dict[str, Any] = {
        "middle": run(at("divided"), stop=4),
        "middle in shards": run(at("divided_shards", strategy="fsdp2"), stop=4),
    }
    run(at("replicas"))
    run(at("replicas_stopped", workers=1), stop=3)
    run(at("replicas_stopped"))
    run(at("shards", strategy="fsdp2"))
    run(at("shards_stopped", strategy="fsdp2"), stop=3)
    run(at("shards_stopped", strategy="fsdp2"))
    run(at("micro", micro_batch=1, strategy="ddp"))
    found["errors"] = {
        "seed": error_of(at("bad", seed=rank)),
        "log_every": error_of(at("bad", log_every=1 + rank)),
        "batch": error_of(at("bad", batch_size=3, drop_draws=None)),
        "files": error_of(at("bad", batch_size=10, drop_draws=None)),
        "data": error_of(at("bad", data=str(media) if rank else config.data)),
        "device": error_of(at("bad", device="nonsense" if rank else "cpu")),
    }
    distributed.__version__ = f"{rank}.0"
    found["errors"]["version"] = error_of(at("bad"))

    def nan(batch, step):
        if rank == 1 and step == 3:
            batch.audio[:] = float("nan")

    distributed.__version__ = "1"
    found["errors"]["nan"] = error_of(at("nan"), spoil=nan)
    if rank == 1:
        _break_reads()
    found["errors"]["corrupt"] = error_of(at("corrupt"))
    _mend_reads()
    save, calls = checkpoint_module.save_tensors, []

    def full(tensors, path, metadata=None):
        calls.append(path)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, metadata)

    checkpoint_module.save_tensors = full
    found["errors"]["disk"] = error_of(at("full"))
    checkpoint_module.save_tensors = save
    run(at("full"))
    os.environ["TORCHFT_LIGHTHOUSE"] = "http://here"
    found["errors"]["replica groups"] = error_of(at("bad"))
    del os.environ["TORCHFT_LIGHTHOUSE"]
    assert dist.is_initialized()  # who made the group ends it
    return found


_reads: list[Any] = []


def _break_reads() -> None:
    _reads.append(ClipDataset.read_row)
    reads = []

    def broken(self, fill, row, *arguments, **options):
        reads.append(row)
        if len(reads) > 6:
            raise MediaError("all the files that I have are corrupt")
        return _reads[0](self, fill, row, *arguments, **options)

    ClipDataset.read_row = broken


def _mend_reads() -> None:
    if _reads:
        ClipDataset.read_row = _reads.pop()


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """One run from end to end in this process, one of 4, then 2, then 1, and much on 2."""
    root = tmp_path_factory.mktemp("runs")
    other = shutil.copytree(folder, tmp_path_factory.mktemp("other") / "media")
    (other / "captions.json").write_text("{}")
    config = settings(folder, root / "one", steps=STEPS, loggers="none", **EXACT)
    seen = {"one": run(config)}
    divided = dataclasses.replace(config, out=str(root / "divided"))
    first = joined(in_processes(4, first_third, divided))
    shutil.copytree(root / "divided", root / "divided_shards")
    two = in_processes(2, on_two, root, config, other, dtensors=True)
    for name in ("divided", "divided_shards"):
        middle = "middle" if name == "divided" else "middle in shards"
        last = run(dataclasses.replace(config, out=str(root / name)))
        seen[name] = first + joined([each[middle] for each in two]) + last
    return root, seen, [each["errors"] for each in two]


@pytest.mark.parametrize("name", ["divided", "divided_shards"])
def test_four_then_two_then_one_are_one_throughout(runs, name):
    root, seen, _ = runs
    same_clips(seen["one"], seen[name])
    alike(root / "one", root / name)


@pytest.mark.parametrize("name", ["replicas", "shards", "micro", "full"])
def test_two_ranks_are_one(runs, name):
    root, _, _ = runs
    alike(root / "one", root / name)
    files = {path.name for path in (root / "one").iterdir()}
    assert files == {path.name for path in (root / name).iterdir()}


def test_a_stopped_run_on_as_many_ranks_is_the_same_bit_for_bit(runs):
    root, _, _ = runs
    same(root / "replicas", root / "replicas_stopped")
    same(root / "shards", root / "shards_stopped")


@pytest.mark.parametrize(
    ("what", "told"),
    [
        ("seed", r"ValueError: the ranks differ: rank 1 \(.*process \d+\) has seed 1, rank 0 0;"),
        ("log_every", r"rank 1 .* has log_every 2, rank 0 1"),
        ("batch", r"ValueError: batch_size is 3, .* 2 ranks cannot share it evenly"),
        ("files", r"ValueError: .* has 8 files, fewer than the batch of 10 clips on 2 ranks"),
        ("data", r"ValueError: the ranks differ: rank 1 .* has .*(data\.|words)"),
        ("device", r"ValueError: rank 1: device is 'nonsense'"),
        ("version", r"ValueError: the ranks differ: rank 1 .* has vatt_fast '1.0', rank 0 '0.0'"),
        (
            "nan",
            r"NonFiniteError: .*step 4 is not finite: .*checkpoint.safetensors of step 2 stays",
        ),
        ("corrupt", r"ValueError: rank 1: all the files that I have are corrupt"),
        ("disk", r"OSError: .*No space left.*the checkpoint of step 2 is intact: make room"),
        ("replica groups", r"ValueError: TORCHFT_LIGHTHOUSE is set: TorchFT's replica groups"),
    ],
)
def test_all_ranks_say_the_same_of_what_is_wrong(runs, what, told):
    root, _, errors = runs
    assert re.search(told, errors[0][what]), errors[0][what]
    assert errors[1][what] == errors[0][what]
    assert not (root / "bad" / CHECKPOINT).exists()
    assert read_standing(root / "nan" / CHECKPOINT).step == 2
    assert read_standing(root / "corrupt" / CHECKPOINT).step == 2
