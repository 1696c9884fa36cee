"""Whole steps: their batches and contenders, what their cells cost, and accuracy by drop rate."""

import dataclasses

import pytest
import torch
from bench_lines import LINE, command, no_gate
from torch.utils.flop_counter import FlopCounterMode

from bench import __main__, contenders, lines, measure, setting, steps, sweeps
from bench.contenders import Contender
from bench.floors import Work
from bench.measure import Task
from bench.setting import Setting
from bench.sweeps import Cell
from bench.timer import peak_bytes
from vatt_fast.config import PRESETS, TowerConfig, VATTConfig
from vatt_fast.kernels.cases import CASES
from vatt_fast.model import VATT

CPU = torch.device("cpu")
TINY = PRESETS["tiny"]


def trained(name, drop_rate, *, batch=3, config=TINY, modalities=steps.MODALITIES):
    trainer = steps.Trainer(config, CPU, torch.float32, modalities)
    trainer.set_batch(batch, drop_rate, "fwd+bwd")
    return trainer, trainer.step_of(steps.Formulation(name))


# -- batches and formulations -----------------------------------------------------------------


def test_training_takes_kept_rows_and_inference_whole_clips():
    train, infer = (
        steps.make_batch(TINY, 2, 0.5, mode, CPU, seed=1) for mode in ("fwd+bwd", "fwd")
    )
    kept = train["video_keep"].shape[0]
    assert kept == TINY.num_video_patches // 2
    assert train["video"].shape == (2, kept, TINY.video_patch_values)
    assert train["video"].dtype == torch.uint8
    assert train["audio"].shape == (2, TINY.num_audio_patches // 2, TINY.audio_patch)
    assert infer["video"].shape == (2, TINY.frames, TINY.height, TINY.width, 3)
    assert infer["audio"].shape == (2, TINY.num_audio_patches * TINY.audio_patch)
    assert torch.equal(infer["video_keep"], train["video_keep"])
    assert set(steps.make_batch(TINY, 2, 0.0, "fwd", CPU, 1, ("video",))) == {"video"}


def test_ours_and_plain_have_the_same_loss():
    losses = {}
    for name in ("auto", "plain"):
        _, (one, other) = trained(name, 0.5)
        losses[name] = torch.stack([one(), other(), one()])
    torch.testing.assert_close(losses["auto"], losses["plain"], rtol=1e-4, atol=1e-5)
    assert len(set(losses["auto"].tolist())) == 3  # it trains


def test_a_formulation_is_named_by_its_compilation():
    titles = [each.title for each in steps.formulations(("auto", "plain"), ("default", "max"))]
    names = ("auto", "auto_compiled", "auto_max", "plain", "plain_compiled", "plain_max")
    assert titles == [*names]


def test_a_training_step_pays_for_kept_tokens_alone():
    found = {}
    for rate in (0.0, 0.75):
        for name in ("auto", "plain"):
            trainer, (call, _) = trained(name, rate, batch=8)
            call()  # Adam's state
            found[rate, name] = peak_bytes(call, CPU)
    parameters = sum(p.nbytes for p in trainer.model.parameters())  # as many gradients
    assert found[0.75, "auto"] - parameters < 0.3 * (found[0.0, "auto"] - parameters)
    assert all(found[rate, "auto"] < 1.02 * found[rate, "plain"] for rate in (0.0, 0.75))


# -- cost -------------------------------------------------------------------------------------


def test_gflops_are_published_and_what_the_tower_runs():
    published = {
        (name, rate): steps.gflops(name, rate)[1]
        for name in steps.OF_THE_PAPER
        for rate in sweeps.DROP_RATES
    }
    assert sum(found is not None for found in published.values()) == 10  # Tables 5 and 6
    assert published["mbs_32x224x224", 0.5] == 375.4
    assert published["medium_video_64x224x224", 0.0] == 1222.1
    name = "medium_video_32x224x224"
    config, _, _ = steps.OF_THE_PAPER[name]
    batch = steps.make_batch(config, 1, 0.75, "fwd+bwd", CPU, 0, ("video",))
    with torch.device("meta"):
        model = VATT(config).eval()
    with FlopCounterMode(display=False) as counter:
        model(**{name: value.to("meta") for name, value in batch.items()}, features=False)
    c = config
    head = 2 * (c.video.dim * c.d_va + c.d_va**2 + c.d_va * c.d_vt)  # runs wherever video does
    assert steps.gflops(name, 0.75)[0] == (counter.get_total_flops() - head) / 1e9


# -- cells ------------------------------------------------------------------------------------


@pytest.fixture
def small_video(monkeypatch):
    """A configuration of seconds, and no parity check before it."""
    tower = TowerConfig(depth=2, dim=32, mlp_dim=64, num_heads=2, head_dim=16)
    sizes = dict(frames=8, height=32, width=32, vocab_size=2)
    config = VATTConfig(video=tower, audio=tower, text=tower, **sizes)
    made = steps.Configuration(config, ("video",))
    monkeypatch.setitem(steps.CONFIGURATIONS, "small_video", made)
    no_gate(monkeypatch)
    return config


def run(text, *more):
    return __main__.main([*text.split(), *map(str, more)])


def test_a_cell_is_measured_once(small_video, monkeypatch, tmp_path):
    out = tmp_path / "lines.jsonl"
    asked = "steps --device cpu --configuration small_video --compile --batch 2 --seconds 0"
    asked += " --dtype fp32"
    assert run(f"{asked} --drop-rate 0.75", "--out", out) == 0
    first = lines.read(out)
    assert [(line.mode, line.backend) for line in first] == [
        (mode, name) for mode in ("fwd", "fwd+bwd") for name in ("auto", "plain")
    ]
    for line in first:
        told = (line.op, line.case, line.drop_rate, line.rounds)
        assert told == ("step", "small_video_drop75_b2", 0.75, 2)
        assert (line.speedup_over_best_peer is None) == (line.backend != "auto")
        assert line.peak_bytes > 0 and lines.stale(line) is None
        if line.tflops is not None:
            factor = 2 * (1 if line.mode == "fwd" else 3)
            parts = sweeps.true_flops(small_video, 0.75, features=False, modalities=("video",))
            flops = pytest.approx(factor * sum(parts.values()), rel=1e-3)
            assert line.tflops * line.ms_p50 * 1e9 == flops
    assert run(f"{asked} --drop-rate 0.75 0.0 --mode fwd --resume", "--out", out) == 0
    more = lines.read(out)
    assert more[: len(first)] == first
    assert {(line.mode, line.drop_rate) for line in more[len(first) :]} == {("fwd", 0.0)}
    monkeypatch.setattr(lines, "stale", lambda line: "changed")
    assert run(f"{asked} --drop-rate 0.75 --mode fwd --resume", "--out", out) == 0
    assert len(lines.read(out)) > len(more)


@pytest.mark.parametrize(
    ("verdict", "ops", "reason"),
    [
        ("its parity checks ran out of time", [*CASES], "no parity check of attention, drop_token"),
        ("parity is red: 1 failed", ["contrastive_lse"], "parity is red: contrastive_lse"),
    ],
)
def test_nothing_is_timed_unless_parity_is_green(verdict, ops, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(setting, "verdict_of", lambda op, *_: verdict if op in ops else None)
    out = tmp_path / "lines.jsonl"
    with pytest.raises(SystemExit, match=reason):
        run("steps --device cpu --configuration tiny", "--out", out)
    assert not out.exists()


def test_who_computes_something_else_is_not_timed(small_video):
    here = Setting(CPU, quick=True, rounds=1, warmup=0)
    trainer = steps.Trainer(small_video, CPU, torch.float32, ("video",))
    trainer.set_batch(2, 0.5, "fwd")
    right = contenders.of_step(trainer, steps.formulations(("auto", "plain"), ()))
    plain = next(each for each in right if each.name == "plain")
    result = 1.01 * plain.build("fwd")[0]()
    wrong = Contender("wrong", False, lambda mode: [lambda: result])  # the fastest of all
    task = Task("step", "case", "fp32", "fwd", Work(10**9, 0), 0.5, batch=2)
    found, absent = measure.race(here, task, [*right, wrong])
    assert [line.backend for line in found] == ["auto", "plain"]
    assert "other results" in absent["wrong"]
    assert {line.best_peer for line in found if line.ours} == {"plain"}
    ours = dataclasses.replace(wrong, name="auto", ours=True)
    found, absent = measure.race(here, task, [ours, plain])
    assert [line.backend for line in found] == ["plain"] and "other results" in absent["auto"]


def test_a_cell_is_done_when_ours_is(small_video, monkeypatch, tmp_path):
    monkeypatch.setattr(lines, "stale", lambda line: None)
    here = Setting(CPU, quick=True)
    cell = Cell("small_video", 0.5, "fwd", 2, ("default",))
    line = dataclasses.replace(LINE, op="step", case=cell.case, dtype="fp32")
    line = dataclasses.replace(line, device=here.device_name, versions=here.versions)
    out = tmp_path / "lines.jsonl"
    for backend, ours, left in (
        ("plain_compiled", False, True),
        ("auto", True, True),
        ("auto_compiled", True, False),
    ):
        lines.append(out, [dataclasses.replace(line, backend=backend, ours=ours)])
        assert bool(sweeps.unmeasured([cell], "fp32", out, here)) == left, backend
    assert sweeps.unmeasured([cell._replace(batch=4)], "fp32", out, here)


def test_a_classifier_learns_from_the_tower_alone(small_video):
    trainer, (call, _) = trained("auto", 0.5, batch=2, config=small_video, modalities=("video",))
    assert all(name.startswith("video") for batch in trainer.batches for name in batch)
    losses = [float(call()) for _ in range(3)]
    assert losses[2] < losses[0]
    named = trainer.model.named_parameters()
    assert all(p.grad is None for name, p in named if name.startswith(("audio", "text")))


# -- accuracy ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_accuracy_is_measured_once_per_rate_and_seed(tmp_path):
    out = tmp_path / "runs.jsonl"
    asked = ["accuracy", "--steps", 2, "--clips", 24, 8, "--seed", 0, "--folder", tmp_path / "runs"]
    first = command(*asked, "--out", out, "--drop-rate", 0.75)
    assert first.returncode == 0, first.stderr
    (one,) = sweeps.read_runs(out)
    again = command(*asked, "--out", out, "--drop-rate", 0.75, 0.0)
    assert again.returncode == 0, again.stderr
    kept, other = sweeps.read_runs(out)
    assert kept == one and (other.drop_rate, other.seed, other.steps) == (0.0, 0, 2)
    assert other.train_gflops > 2 * one.train_gflops
    assert "| 75% |" in again.stdout and "| 0% |" in again.stdout


def test_accuracy_is_told_with_its_spread():
    rates = (10.0, 20.0, 30.0, 40.0, 5.0, 12.5)
    one = sweeps.Run(0.5, 0, 9, *rates, 1.0, "cpu", {}, "abc", "2026-01-01")
    other = dataclasses.replace(one, seed=1, t2v_r10=26.0)
    told = sweeps.accuracy_table([one, other, dataclasses.replace(one, drop_rate=0.75)])
    rows = told.splitlines()
    assert rows[2].startswith("| 75% | 1.00 | 20.0 | 10.0 |")
    assert rows[3].startswith("| 50% | 1.00 | 23.0 ± 4.2 | 10.0 ± 0.0 |")
