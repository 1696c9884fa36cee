"""Training in JAX on two hosts is that on one host of all their devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from labelled_media import write_labelled
from safetensors.torch import load_file
from torchrun import environment, free_port
from training_runs import metrics, write_media

from vatt_fast.finetuning.settings import FineTuneConfig
from vatt_fast.on_jax.hosts import announce_hosts
from vatt_fast.training.settings import PretrainConfig

pytest.importorskip("jax", reason="the JAX model needs jax")
pytest.importorskip("optax", reason="training in JAX needs optax")

RUN = """
import functools, json, os, sys, warnings
folder, out, many = sys.argv[1:]
warnings.filterwarnings("ignore", message="warmup_steps")
import torch.distributed as dist
from vatt_fast.on_jax.hosts import announce_hosts
from vatt_fast.training.settings import PretrainConfig
announce_hosts(PretrainConfig(data=folder, out=out, framework="jax"))
world = int(os.environ.get("WORLD_SIZE", "1"))
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


FINETUNE = """
import json, os, sys
from labelled_media import settings
from training_runs import MODEL
from vatt_fast.finetuning.loop import finetune
folder, out, changes = sys.argv[1:]
run = settings(folder, out, batch_size=8, steps=3, framework="jax", device="cpu",
               eval_split="test", **json.loads(changes))
finetune(run, model_config=MODEL, progress=False)
sys.stdout.flush()
os._exit(0)
"""


def hosts(world: int, devices: int, script: str, *given: str) -> None:
    """Run it as SLURM starts it."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    where = dict(SLURM_JOB_ID="7", SLURM_STEP_NODELIST="localhost", SLURM_NTASKS=str(world))
    where |= dict(JAX_COORDINATOR_PORT=str(free_port()), XLA_FLAGS=flags)
    finish(
        [
            start([script, *given], SLURM_PROCID=str(i), SLURM_LOCALID=str(i), **where)
            for i in range(world)
        ]
    )


def start(arguments: list[str], **variables: str) -> subprocess.Popen:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "support")])
    return subprocess.Popen(
        [sys.executable, "-c", *arguments],
        env=environment(JAX_PLATFORMS="cpu", PYTHONPATH=paths, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> list[str]:
    told = [each.communicate(timeout=600) for each in processes]
    assert [each.returncode for each in processes] == [0] * len(processes), told
    return [out for out, _ in told]


def test_two_hosts_are_one(tmp_path):
    (tmp_path / "media").mkdir()
    folder = write_media(tmp_path / "media")
    one, two = tmp_path / "one", tmp_path / "two"
    hosts(1, 8, RUN, str(folder), str(one), "[0]")
    hosts(2, 4, RUN, str(folder), str(two), "[0, 1]")
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


AUDIO = dict(task="audio", recipe="audioset", samples=1280, sample_rate_hz=8000, warmup_steps=0)


@pytest.mark.parametrize(
    "changes", [dict(drop_rate=0.5), AUDIO | dict(mixup=0.0)], ids=["video", "audio"]
)
def test_fine_tuning_on_two_hosts_is_that_on_one(tmp_path, changes):
    """DropToken's draw is shared; the weights of the balanced loss are of the whole batch."""
    folder = str(write_labelled(tmp_path / "media"))
    for world in (1, 2):
        out = str(tmp_path / str(world))
        hosts(world, 4 // world, FINETUNE, folder, out, json.dumps(changes))
    a, b = (load_file(tmp_path / world / "checkpoint.safetensors") for world in "12")
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-5, msg=key)
    for x, y in zip(*(metrics(tmp_path / world) for world in "12"), strict=True):
        told = [key for key in x if key.startswith(("loss", "gradient", "train_", "eval_"))]
        assert {"loss", "gradient_norm"} <= set(told)
        assert [y[key] for key in told] == pytest.approx([x[key] for key in told], rel=1e-3)
    assert (tmp_path / "2" / "report.html").is_file()


JOIN = """
import dataclasses, os, sys
from vatt_fast.on_jax.hosts import announce_hosts
from vatt_fast.on_jax.training import join_hosts
from vatt_fast.training.distributed import joined, speaks
from vatt_fast.training.settings import PretrainConfig
where = dict(coordinator=sys.argv[1], processes=2, process=int(sys.argv[2]))
run = PretrainConfig(data="d", out="o", framework="jax", **where)
announce_hosts(run)
with joined("auto", 60, "jax") as ranks:
    join_hosts(ranks)
    import jax
    print(ranks.all((ranks.rank, jax.process_index(), jax.device_count(), speaks())))
announce_hosts(run)
try:
    announce_hosts(dataclasses.replace(run, process=1 - ranks.rank))
except ValueError as error:
    print(error)
sys.stdout.flush()
os._exit(0)
"""


def test_hosts_that_settings_tell_join():
    flags = "--xla_force_host_platform_device_count=2"
    where = f"localhost:{free_port()}"
    told = finish([start([JOIN, where, str(i)], XLA_FLAGS=flags) for i in range(2)])
    for number, lines in enumerate(told):
        joined, refused = lines.splitlines()
        assert joined == "[(0, 0, 4, True), (1, 1, 4, False)]"
        assert refused == (
            f"coordinator, processes and process are {where}, 2 and {1 - number}, but MASTER_ADDR, "
            f"MASTER_PORT, WORLD_SIZE, RANK say {where}, 2 and {number}: leave one out"
        )


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            dict(coordinator="a:1"),
            "processes and process must be given too, or none of .* JAX finds them itself",
        ),
        (dict(processes=2, process=0), "coordinator must be given too"),
        (dict(coordinator="a", processes=2, process=0), "coordinator is 'a'; it is host:port of"),
        (dict(coordinator="a:0", processes=2, process=0), "coordinator is 'a:0'"),
        (dict(coordinator="a:1", processes=2, process=2), "process is 2 of 2 processes; it counts"),
        (dict(coordinator="a:1", processes=0, process=0), "process is 0 of 0 processes"),
        (dict(framework="torch", process=0), "belong to framework 'jax'; torchrun joins"),
    ],
)
def test_partial_or_wrong_settings_are_one_line(changes, told):
    with pytest.raises(ValueError, match=told) as error:
        PretrainConfig(**dict(data="d", out="o", framework="jax") | changes)
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=told):
        FineTuneConfig(**dict(data="d", out="o", init="i", framework="jax") | changes)


def test_a_cluster_that_tells_nonsense_is_one_line(monkeypatch):
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    for name, value in zip(names, ("7", "node[001-002]", "two", "0", "0"), strict=True):
        monkeypatch.setenv(f"SLURM_{name}", value)
    run = PretrainConfig(data="d", out="o", framework="jax")
    with pytest.raises(ValueError, match=r"JAX finds a cluster, but not .*'two'.*: give coord"):
        announce_hosts(run)
    monkeypatch.setenv("SLURM_NTASKS", "1")  # alone
    announce_hosts(run)
    assert "RANK" not in os.environ
