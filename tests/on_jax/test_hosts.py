"""Pre-training in JAX on two hosts of four devices is that on one host of eight."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torchrun import environment, free_port
from training_runs import metrics, write_media

pytest.importorskip("jax", reason="the JAX model needs jax")
pytest.importorskip("optax", reason="training in JAX needs optax")

RUN = """
import functools, json, os, sys, warnings
world, folder, out, many = int(os.environ["WORLD_SIZE"]), *sys.argv[1:]
warnings.filterwarnings("ignore", message="warmup_steps")
import torch.distributed as dist
if world > 1:
    dist.init_process_group("gloo")
from test_jax_training import MODEL
from training_runs import settings
from vatt_fast.on_jax import training
from vatt_fast.training.loop import pretrain
training.StepOptions = functools.partial(training.StepOptions, smallest_shard=512)
for shard in json.loads(many):
    trainer = []
    original = training.JaxTrainer.__init__
    def init(self, *arguments):
        original(self, *arguments)
        trainer.append(self)
    training.JaxTrainer.__init__ = init
    run = settings(folder, f"{out}/{shard}", steps=3, batch_size=8, framework="jax",
                   shard_weights=bool(shard), loggers="none", adam_eps=1.0,
                   final_learning_rate=1e-3)
    pretrain(run, model_config=MODEL, progress=False)
    training.JaxTrainer.__init__ = original
    split = [not x.is_fully_replicated for x in trainer[0].state.params.values()]
    assert any(split) == bool(shard), split
    assert trainer[0].mesh.size == 8 and trainer[0].devices == 8 // world
if world > 1:
    try:
        pretrain(settings(folder, f"{out}/bad", batch_size=8, framework="jax",
                          seed=int(os.environ["RANK"]), loggers="none"), model_config=MODEL)
    except ValueError as error:
        assert "has seed 1, rank 0 0" in str(error), error
    else:
        raise AssertionError("ranks of other seeds were not refused")
    dist.barrier()
sys.stdout.flush()
os._exit(0)
"""


def hosts(world: int, devices: int, folder: Path, out: Path, shards: list[int]) -> None:
    here = Path(__file__).parent
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    where = dict(WORLD_SIZE=str(world), MASTER_ADDR="localhost", MASTER_PORT=str(free_port()))
    where |= dict(XLA_FLAGS=flags, JAX_PLATFORMS="cpu")
    where |= dict(PYTHONPATH=os.pathsep.join([str(here), str(here.parent / "support")]))
    command = [sys.executable, "-c", RUN, str(folder), str(out), json.dumps(shards)]
    processes = [
        subprocess.Popen(
            command, env=environment(RANK=str(rank), **where), stderr=subprocess.PIPE, text=True
        )
        for rank in range(world)
    ]
    told = [each.communicate(timeout=600)[1] for each in processes]
    assert [each.returncode for each in processes] == [0] * world, "\n".join(told)


def test_two_hosts_are_one(tmp_path):
    (tmp_path / "media").mkdir()
    folder = write_media(tmp_path / "media")
    one, two = tmp_path / "one", tmp_path / "two"
    hosts(1, 8, folder, one, [0])
    hosts(2, 4, folder, two, [0, 1])
    left = load_file(one / "0" / "checkpoint.safetensors")
    for shard in ("0", "1"):
        right = load_file(two / shard / "checkpoint.safetensors")
        assert left.keys() == right.keys()
        for name, value in left.items():
            bound = 1e-4 * max(1.0, float(value.abs().max()))
            assert torch.allclose(right[name], value, rtol=0, atol=bound), name
        for a, b in zip(metrics(one / "0"), metrics(two / shard), strict=True):
            for name in ("loss", "loss_va", "gradient_norm", "cosine_video_va"):
                assert b[name] == pytest.approx(a[name], rel=1e-3, abs=1e-5)
        assert not (two / "bad").exists()
