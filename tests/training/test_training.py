"""Pre-training: schedules as published, runs that may be interrupted, errors that lose nothing."""

import dataclasses
import inspect
import itertools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from oracle import recording
from training_runs import MODEL, metrics, settings, write_media

from vatt_fast.cli import main
from vatt_fast.data.clips import Batch
from vatt_fast.demo.run import DemoConfig
from vatt_fast.model import VATT, create_model
from vatt_fast.on_jax.compile_tpu import CompileTPUConfig
from vatt_fast.training import loop as loop_module
from vatt_fast.training import running
from vatt_fast.training import step as step_module
from vatt_fast.training.loop import CHECKPOINT, METRICS, pretrain
from vatt_fast.training.schedule import learning_rate
from vatt_fast.training.settings import PretrainConfig
from vatt_fast.weights import load_tensors


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def run(config, **options):
    return pretrain(config, model_config=MODEL, progress=False, **options)


@pytest.mark.parametrize("pinned", [False, True])
def test_batches_go_to_a_gpu_from_pinned_memory(folder, tmp_path, monkeypatch, pinned):
    """Out of pageable memory the copy waits for the end of the last step."""
    seen, original = [], running.loader

    def loader(*args, pin_memory, **options):
        seen.append(pin_memory)
        return original(*args, **options)

    class Trainer(step_module.TorchTrainer):
        def __init__(self, *args):
            super().__init__(*args)
            assert self.pin_memory == (self.device.type == "cuda")
            self.pin_memory = pinned

    def to(self, device, non_blocking=False):
        seen.append(non_blocking)
        return self

    monkeypatch.setattr(running, "loader", loader)
    monkeypatch.setattr(loop_module, "TorchTrainer", Trainer)
    monkeypatch.setattr(Batch, "to", to)
    run(settings(folder, tmp_path, steps=1, warmup_steps=0, device="cpu"))
    assert seen == [pinned, pinned]


def test_schedules_as_released():
    steps = recording()["lr/steps"]
    pretraining = [
        learning_rate(
            int(s),
            peak=1e-4,
            final=5e-5,
            warmup_steps=5000,
            total_steps=500_000,
            schedule="half_cosine",
        )
        for s in steps
    ]
    np.testing.assert_allclose(pretraining, recording()["lr/pretrain"], rtol=1e-6)
    key = next(k for k in recording() if k.startswith("lr/finetune"))
    warmup, total, peak = key.split("_")[1:]
    rates = [
        learning_rate(
            int(s),
            peak=float(peak),
            final=0.0,
            warmup_steps=int(warmup),
            total_steps=int(total),
            schedule="half_cosine",
        )
        for s in steps[:6]
    ]
    np.testing.assert_allclose(rates, recording()[key], rtol=1e-6, atol=1e-12)


def test_quarter_cosine_of_the_paper():
    rate = dict(
        peak=1e-4, final=5e-5, warmup_steps=10_000, total_steps=500_000, schedule="quarter_cosine"
    )
    assert learning_rate(5_000, **rate) == pytest.approx(5e-5)
    assert learning_rate(10_000, **rate) == pytest.approx(1e-4)
    assert learning_rate(255_000, **rate) == pytest.approx(5e-5 + 5e-5 * np.cos(np.pi / 4))
    assert learning_rate(500_000, **rate) == pytest.approx(5e-5)
    with pytest.raises(ValueError, match="quarter_cosine or half_cosine"):
        learning_rate(20_000, **rate | {"schedule": "linear"})


def test_a_continued_run_equals_an_uninterrupted_one(folder, tmp_path):
    whole = run(settings(folder, tmp_path / "whole"))
    stopped = settings(folder, tmp_path / "stopped", workers=1)

    class Stopped(Exception):
        pass

    # stop like a kill between checkpoints: three steps done, the checkpoint holds two
    original, calls = step_module.train_step, []

    def failing(*args):
        if len(calls) == 3:
            raise Stopped
        calls.append(1)
        return original(*args)

    step_module.train_step = failing
    try:
        with pytest.raises(Stopped):
            run(stopped)
    finally:
        step_module.train_step = original
    assert len(metrics(tmp_path / "stopped")) == 3
    with (tmp_path / "stopped" / METRICS).open("a") as file:
        file.write('{"step": 4, "lo')  # a line cut short
    continued = run(stopped)
    for (name, a), b in zip(
        whole.state_dict().items(), continued.state_dict().values(), strict=True
    ):
        assert torch.equal(a, b), name
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 3, 4, 5, 6]
    for a, b in zip(metrics(tmp_path / "whole"), metrics(tmp_path / "stopped"), strict=True):
        assert a["loss"] == b["loss"]


def test_a_folder_without_captions_trains_video_and_audio(folder, tmp_path):
    media = tmp_path / "media"
    media.mkdir()
    for file in folder.glob("*.mp4"):
        (media / file.name).symlink_to(file)
    model = run(settings(media, tmp_path / "run", steps=3))
    lines = metrics(tmp_path / "run")
    assert all(
        line["loss_va"] > 0 and "loss_vt" not in line and np.isfinite(line["loss"])
        for line in lines
    )
    before = step_module.initial_model(model.config, model.vocabulary, 0).state_dict()
    assert not torch.equal(
        model.state_dict()["video_tokens.project.weight"], before["video_tokens.project.weight"]
    )
    assert all(
        value.isfinite().all() for value in model.state_dict().values() if value.is_floating_point()
    )
    found = model.encode(video=media / "0.mp4", audio=media / "0.mp4", text=["a word"])
    assert all(value.isfinite().all() for value in found.values())


def test_the_last_steps_gradients_are_gone_before_the_forward(folder, tmp_path, monkeypatch):
    seen, forward = [], VATT.forward

    def looking(model, *args, **options):
        seen.append([name for name, weight in model.named_parameters() if weight.grad is not None])
        return forward(model, *args, **options)

    monkeypatch.setattr(VATT, "forward", looking)
    run(settings(folder, tmp_path / "run", steps=3))
    assert seen == [[], [], []]


def test_a_warm_up_beyond_the_run_is_told(folder, tmp_path):
    with pytest.warns(
        UserWarning, match="warmup_steps 2 >= steps 2: the learning rate never reaches 0.001"
    ):
        run(settings(folder, tmp_path / "run", steps=2))


def test_a_terminated_process_leaves_a_checkpoint_and_continues(folder, tmp_path):
    """The real thing: SIGTERM to `vatt-fast pretrain`, then the same command again."""
    out = tmp_path / "run"
    arguments = dict(
        data=folder,
        out=out,
        steps=100_000,
        batch_size=2,
        warmup_steps=2,
        log_every=1,
        checkpoint_every=50_000,
        workers=0,
    )
    command = [sys.executable, "-m", "vatt_fast.cli", "pretrain"]
    command += [
        part
        for name, value in arguments.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    deadline = time.monotonic() + 120
    while not ((out / METRICS).exists() and len((out / METRICS).read_text().splitlines()) >= 2):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command continues from there" in errors
    done = metrics(out)[-1]["step"]
    assert (out / CHECKPOINT).exists() and create_model(out).config.vocab_size > 2
    again = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path
    )
    while metrics(out)[-1]["step"] <= done:
        assert again.poll() is None, again.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    again.kill()
    again.communicate()
    steps = [line["step"] for line in metrics(out)]
    assert steps == list(range(1, len(steps) + 1))


def test_another_run_is_not_continued_and_not_harmed(folder, tmp_path):
    config = settings(folder, tmp_path, steps=2)
    run(config)
    before = {
        name: (tmp_path / name).read_bytes() for name in (CHECKPOINT, METRICS, "model.safetensors")
    }
    with pytest.raises(
        ValueError, match=r"belongs to another run \(learning_rate was 0.001, now 0.01\)"
    ):
        run(dataclasses.replace(config, learning_rate=1e-2))
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    (tmp_path / CHECKPOINT).write_bytes(before[CHECKPOINT][:1000])
    with pytest.raises(ValueError, match="cut short or damaged"):
        run(config)


def test_a_run_folder_is_a_model(folder, tmp_path):
    trained = run(settings(folder, tmp_path, steps=3))
    model = create_model(tmp_path)
    out = model.encode(
        video=folder / "0.mp4", audio=folder / "0.mp4", text=["clip number 0", "the end"]
    )
    assert {name: tuple(z.shape) for name, z in out.items()} == {
        "z_video_va": (1, 64),
        "z_video_vt": (1, 64),
        "z_audio_va": (1, 64),
        "z_text_vt": (2, 64),
    }
    for z in out.values():
        torch.testing.assert_close(z.norm(dim=-1), torch.ones(len(z)))
    assert torch.equal(
        out["z_text_vt"], trained.encode(text=["clip number 0", "the end"])["z_text_vt"]
    )
    with pytest.raises(ValueError, match="has no audio stream"):
        model.encode(audio=folder / "3.mp4")
    line = metrics(tmp_path)[-1]
    assert {
        "step",
        "loss",
        "loss_va",
        "loss_vt",
        "learning_rate",
        "clips_per_second",
        "temperature",
        "skipped_files",
    } <= set(line)
    assert any(path.name.startswith("events.out.tfevents") for path in tmp_path.iterdir())
    assert "model/log_scale" in load_tensors(tmp_path / CHECKPOINT)


@pytest.mark.parametrize("recipe", ["paper", "released"])
def test_training_lowers_the_loss_in_bf16(folder, tmp_path, recipe):
    model = dataclasses.replace(
        MODEL.with_recipe(recipe), learn_temperature=True, dropout=0.0, train_words=True
    )
    config = settings(
        folder,
        tmp_path,
        steps=60,
        batch_size=7,
        precision="bf16",
        learning_rate=3e-3,
        drop_per="clip",
    )
    pretrain(config, model_config=model, progress=False)
    losses = [line["loss"] for line in metrics(tmp_path)]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.3
    assert metrics(tmp_path)[-1]["temperature"] != pytest.approx(0.07, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(drop_rate=1.0), "lies in"),
        (dict(steps=0), "steps is 0"),
        (dict(warmup_steps=-1), "must not be negative"),
        (dict(preset="huge"), "unknown preset"),
        (dict(device="cuda"), "sees no CUDA device"),
        (dict(data="nowhere"), "nowhere"),
    ],
)
def test_bad_settings_are_named_before_anything_is_written(folder, tmp_path, changes, message):
    if changes.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ValueError, match=message):
        pretrain(dataclasses.replace(settings(folder, tmp_path / "out"), **changes), progress=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("config", [PretrainConfig, DemoConfig, CompileTPUConfig])
def test_every_option_has_help(config):
    """The comment behind a field, or above it."""
    lines = inspect.getsource(config).splitlines()
    fields = {field.name for field in dataclasses.fields(config)}
    bare = [
        name
        for above, line in itertools.pairwise(lines)
        if (name := line.strip().partition(":")[0]) in fields
        and "#" not in line
        and not above.strip().startswith("#")
    ]
    assert not bare


@pytest.mark.parametrize("verb", ["pretrain", "demo", "compile-tpu"])
def test_an_options_help_is_its_own(verb, capsys):
    """A comment above a field would be the help of all fields up to the next empty line."""
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    said = [line.strip(" │") for line in capsys.readouterr().out.splitlines()]
    helps = [line for line in said if len(line) > 40 and not line.startswith("-")]
    assert helps and len(set(helps)) == len(helps)
