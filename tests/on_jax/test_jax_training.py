"""Pre-training in JAX: the same run as torch's, continued by either; 8 devices as one.

And the step compiled for a TPU by libtpu.
"""

import dataclasses
import json
import mmap
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import metrics, settings, write_media

jax = pytest.importorskip("jax", reason="the JAX model needs jax")
pytest.importorskip("optax", reason="training in JAX needs optax")

from vatt_fast.cli import main  # noqa: E402
from vatt_fast.config import PRESETS, TowerConfig  # noqa: E402
from vatt_fast.data.clips import Batch  # noqa: E402
from vatt_fast.model import create_model  # noqa: E402
from vatt_fast.on_jax import training as jax_loop  # noqa: E402
from vatt_fast.on_jax.compile_tpu import CompileTPUConfig, compile_step  # noqa: E402
from vatt_fast.training.loop import CHECKPOINT, pretrain  # noqa: E402
from vatt_fast.training.step import TorchTrainer  # noqa: E402
from vatt_fast.weights import load_tensors  # noqa: E402

TOWER = TowerConfig(depth=3, dim=32, mlp_dim=64, num_heads=2, head_dim=16)
ONE_BLOCK = dataclasses.replace(TOWER, depth=1)
MODEL = dataclasses.replace(
    PRESETS["tiny"],
    video=TOWER,
    audio=ONE_BLOCK,
    text=ONE_BLOCK,
    frames=4,
    height=16,
    width=16,
    samples=1280,
    sample_rate_hz=8000,
    texts_per_clip=2,
    d_va=16,
    d_vt=16,
    learn_temperature=True,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def test_a_batch_on_the_devices_is_a_copy():
    """A loader fills its memory anew; JAX would lend aligned memory to arrays on the CPU."""
    memory = np.ndarray((2, 4, 64), np.uint8, mmap.mmap(-1, 4096))
    memory[:] = 1
    arrays = jax_loop.on_mesh({"video": memory}, jax_loop.make_mesh(jax.devices("cpu")[:1]))
    jax.block_until_ready(arrays)
    memory[:] = 2
    assert (np.asarray(arrays["video"]) == 1).all()


@pytest.mark.parametrize(("draws", "devices", "rows"), [(1, 4, 4), (2, 4, 4), (4, 4, 4), (4, 2, 8)])
def test_devices_share_draws_or_hold_several(draws, devices, rows):
    """A run goes on with the draws it began with: of 8 clips, on more or fewer devices."""
    zeros, keep = torch.zeros(8, 1), torch.arange(draws)[:, None].repeat(1, 3).squeeze(0)
    batch = Batch(*[zeros] * 7, ("",) * 8, (), keep, keep)
    found = jax_loop.host_batch(batch, devices)["video_keep"]
    assert found.shape == (rows, 3)
    assert np.repeat(found[:, 0], 8 // rows).tolist() == [n * draws // 8 for n in range(8)]


def run(config, **options):
    return pretrain(config, model_config=MODEL, progress=False, **options)


@pytest.fixture
def compiled_once(tmp_path):
    """A run that continues traces its step anew; it need not compile it anew."""
    names = {
        "jax_compilation_cache_dir": str(tmp_path / "compiled"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
    }
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


def test_a_run_in_jax_is_the_run_in_torch_and_may_change_sides(
    folder,
    tmp_path,
    monkeypatch,
    compiled_once,
):
    """Same batches, same DropToken, same weights to start from: the losses agree.

    So they do after a stop, whoever continues.
    """
    config = settings(folder, tmp_path / "torch", steps=4, checkpoint_every=2, drop_per="clip")
    halfway = tmp_path / "from_torch"
    save = TorchTrainer.save

    def save_and_copy(trainer, path, model, standing):
        save(trainer, path, model, standing)
        if standing.step == 2:
            shutil.copytree(tmp_path / "torch", halfway)

    monkeypatch.setattr(TorchTrainer, "save", save_and_copy)
    run(config)
    ours = dataclasses.replace(config, out=str(tmp_path / "jax"), framework="jax", workers=1)
    run(dataclasses.replace(ours, out=str(halfway)))

    class Stopped(Exception):
        pass

    def failing(trainer, batch, step, rate):
        if step == 3:
            raise Stopped
        return original(trainer, batch, step, rate)

    original = jax_loop.JaxTrainer.step
    monkeypatch.setattr(jax_loop.JaxTrainer, "step", failing)
    with pytest.raises(Stopped):
        run(ours)
    monkeypatch.undo()
    (tmp_path / "changed").mkdir()
    for name in (CHECKPOINT, "metrics.jsonl"):
        (tmp_path / "changed" / name).write_bytes((tmp_path / "jax" / name).read_bytes())
    model = run(ours)
    run(dataclasses.replace(config, out=str(tmp_path / "changed")))
    expected = metrics(tmp_path / "torch")
    for out in ("jax", "changed", "from_torch"):
        found = metrics(tmp_path / out)
        assert [set(line) for line in found] == [set(line) for line in expected]
        for a, b in zip(found, expected, strict=True):
            for name in (
                "step",
                "loss",
                "loss_va",
                "loss_vt",
                "learning_rate",
                "temperature",
                "skipped_files",
            ):
                assert a[name] == pytest.approx(b[name], rel=2e-3), (out, name, a["step"])
            for name in ("video_va", "audio_va", "video_vt", "text_vt"):
                assert a[f"cosine_{name}"] == pytest.approx(b[f"cosine_{name}"], abs=5e-3)
    assert set(load_tensors(tmp_path / "jax" / CHECKPOINT)) == set(
        load_tensors(tmp_path / "torch" / CHECKPOINT)
    )
    again = create_model(tmp_path / "jax")
    z = again.encode(video=folder / "0.mp4", text=["clip number 0"])
    assert (z["z_text_vt"] == model.encode(text=["clip number 0"])["z_text_vt"]).all()
    with pytest.raises(ValueError, match=r"belongs to another run \(learning_rate"):
        run(dataclasses.replace(ours, learning_rate=1e-2))


def test_the_step_runs_where_it_was_asked_to(folder, tmp_path, monkeypatch):
    """Asked for the CPU of a machine whose JAX prefers a TPU."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    run(settings(folder, tmp_path / "out", steps=1, framework="jax", device="cpu"))
    assert len(metrics(tmp_path / "out")) == 1


def test_bad_settings_are_named(folder, tmp_path):
    for changes, message in (
        (dict(device="quantum"), "this JAX sees none"),
        (dict(framework="tensorflow"), "it is one of torch, jax"),
    ):
        with pytest.raises(ValueError, match=message):
            run(
                dataclasses.replace(
                    settings(folder, tmp_path / "out"), **{"framework": "jax"} | changes
                )
            )
    assert not (tmp_path / "out").exists()


def test_eight_devices_equal_one():
    """Loss, gradients and statistics, weights everywhere or in shards, with clips that lack a part.

    Sharded weights and Adam's moments are never whole on a device, at the start and after a
    restart. In a process with 8 virtual devices.
    """
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).parents[1] / "support" / "jax_sharded.py"
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert results.pop("whole") == []
    of_helper = results.pop("contrastive_loss")
    assert of_helper["loss"] < 1e-6 and of_helper["gradient"] < 1e-5, of_helper
    for name, found in results.items():
        assert found["loss"] < 1e-5 and found["gradient"] < 1e-4, (name, found)
        assert name == "fine-tuning" or found["statistics"] < 1e-4, (name, found)
        assert (found["split"] > 20) == (name == "shards"), (name, found)


# -- compiled for a TPU ----------------------------------------------------------------------------


def test_the_step_compiles_for_a_tpu():
    """Two video layers of tiny, one of audio and of text, on four v5e chips, weights in shards.

    Kernels are in their places, memory and layout copies in budget. A whole medium_base_small is
    `vatt-fast compile-tpu`, minutes on two cores.
    """
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
    tiny = PRESETS["tiny"]
    depths: dict = {
        name: dataclasses.replace(getattr(tiny, name), depth=2 if name == "video" else 1)
        for name in ("video", "audio", "text")
    }
    run = CompileTPUConfig(topology="v5e:2x2", batch=64, shard_weights=True, recompute=True)
    report = compile_step(run, model_config=dataclasses.replace(tiny, **depths))
    assert report["fits"] and report["peak_hbm_gb"] < 0.05, report
    for op in ("attention", "contrastive_lse", "patch_embed"):
        assert (
            sum(count for name, count in report["kernels"].items() if name.startswith(f"vatt_{op}"))
            >= 2
        ), report
    assert {"all-reduce", "all-gather", "reduce-scatter", "all-to-all"} <= set(
        report["collectives"]
    ), report
    assert report["kernel_copies"] <= 1 and report["copies_gb"] < 0.003, report


def test_the_command_names_what_it_cannot_compile(capsys):
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu")
    for arguments, message in (
        (["--topology", "v9:2x2"], "its chip is one of v4, v5e"),
        (["--topology", "v5e"], "it takes chip and shape"),
        (["--topology", "v5e:7x7"], "which libtpu refuses"),
        (["--batch", "63"], "share it evenly"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compile-tpu", *arguments])
        assert stop.value.code == 2 and message in capsys.readouterr().err
