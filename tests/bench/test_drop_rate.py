"""Cost and accuracy against the drop rate: what bench.drop_rate and bench.accuracy say of themselves."""

import dataclasses
import sys

import pytest
import torch
from test_bench import LINE, command
from torch.utils.flop_counter import FlopCounterMode

from bench import accuracy, drop_rate, floors, parity, race, results, step
from bench.setting import Setting
from vatt_fast.config import TowerConfig, VATTConfig
from vatt_fast.kernels import dispatch
from vatt_fast.model import VATT

# -- accuracy ----------------------------------------------------------------------------------------------------------


def test_accuracy_is_measured_once_per_rate_and_seed(tmp_path):
    arguments = [
        "bench.accuracy",
        "--steps",
        2,
        "--clips",
        24,
        8,
        "--seed",
        0,
        "--folder",
        tmp_path / "runs",
        "--out",
        tmp_path / "runs.jsonl",
    ]
    first = command(*arguments, "--drop-rate", 0.75)
    assert first.returncode == 0, first.stderr
    (one,) = accuracy.read(tmp_path / "runs.jsonl")
    again = command(*arguments, "--drop-rate", 0.75, 0.0)
    assert again.returncode == 0, again.stderr
    kept, other = accuracy.read(tmp_path / "runs.jsonl")
    assert kept == one and (other.drop_rate, other.seed, other.steps) == (0.0, 0, 2)
    assert other.train_gflops > 2 * one.train_gflops
    assert "| 75% |" in again.stdout and "| 0% |" in again.stdout


def test_accuracy_is_told_with_its_spread():
    run = accuracy.Run(
        0.5, 0, 9, 10.0, 20.0, 30.0, 40.0, 5.0, 12.5, 1.0, "cpu", {}, "abc", "2026-01-01"
    )
    runs = [
        run,
        dataclasses.replace(run, seed=1, t2v_r10=26.0),
        dataclasses.replace(run, drop_rate=0.75),
    ]
    lines = accuracy.markdown(runs).splitlines()
    assert lines[2].startswith("| 75% | 1.00 | 20.0 | 10.0 |") and lines[3].startswith(
        "| 50% | 1.00 | 23.0 ± 4.2 | 10.0 ± 0.0 |"
    )


# -- cost --------------------------------------------------------------------------------------------------------------


def test_the_papers_gflops_are_met_within_a_tenth_of_a_percent():
    published = {}
    for name, (_, _, of_paper) in drop_rate.CONFIGURATIONS.items():
        for rate in drop_rate.DROP_RATES:
            found = drop_rate.gflops(name, rate)
            if found.published is not None:
                published[name, rate] = found.published
                assert found.convention == pytest.approx(found.published, rel=1e-3)
            assert of_paper or found.published is None
    assert len(published) == 10  # Table 5's four, Table 6's six
    assert (
        published["mbs_32x224x224", 0.5] == 375.4
        and published["medium_video_64x224x224", 0.0] == 1222.1
    )


def test_true_gflops_are_what_the_tower_runs():
    config, modalities, _ = drop_rate.CONFIGURATIONS["medium_video_32x224x224"]
    with torch.device("meta"):
        model = VATT(config).eval()
        video = torch.empty(
            1, config.num_video_patches, config.video_patch_values, dtype=torch.uint8
        )
    keep = model.sample_keep(0.75, seed=0, step=0)["video_keep"].to("meta")
    for features in (True, False):
        with FlopCounterMode(display=False) as counter:
            model(video=video, video_keep=keep, features=features)
        head = 2 * (
            config.video.dim * config.d_va + config.d_va**2 + config.d_va * config.d_vt
        )  # runs wherever video does
        counted = counter.get_total_flops() - head
        assert (
            floors.step_flops(config, 1, 0.75, features=features, mode="fwd", modalities=modalities)
            == counted
        )
        assert (
            not features or drop_rate.gflops("medium_video_32x224x224", 0.75).true == counted / 1e9
        )


@pytest.fixture
def small_video(monkeypatch):
    """A configuration of seconds, and no parity run before it."""
    tower = TowerConfig(depth=2, dim=32, mlp_dim=64, num_heads=2, head_dim=16)
    config = VATTConfig(
        video=tower, audio=tower, text=tower, frames=8, height=32, width=32, vocab_size=2
    )
    monkeypatch.setitem(
        drop_rate.CONFIGURATIONS, "small_video", drop_rate.Configuration(config, ("video",), None)
    )
    monkeypatch.setattr(
        drop_rate,
        "gate",
        lambda setting, ops, dtype, **options: [
            setting.set_verdict(op, "reference", None) for op in ops
        ],
    )
    return config


def run_main(module, *arguments):
    return module.main([str(each) for each in arguments])


def test_a_table_cell_is_measured_once(small_video, monkeypatch, tmp_path, capsys):
    out = tmp_path / "lines.jsonl"
    arguments = [
        "--device",
        "cpu",
        "--configuration",
        "small_video",
        "--compiled-at",
        "--batch",
        2,
        "--seconds",
        0,
        "--dtype",
        "fp32",
        "--out",
        out,
    ]
    assert run_main(drop_rate, *arguments, "--drop-rate", 0.75) == 0
    first = results.read(out)
    assert [(line.mode, line.backend) for line in first if line.backend != "videomae"] == [
        (mode, name) for mode in ("fwd", "fwd+bwd") for name in ("auto", "plain")
    ]
    for line in first:
        assert (line.op, line.case, line.drop_rate, line.rounds) == (
            "step",
            "small_video_drop75_b2",
            0.75,
            2,
        )
        assert (
            (line.speedup_over_best_peer is None)
            == (line.best_peer is None)
            == (line.backend != "auto")
        )
        assert line.peak_bytes > 0 and (
            line.peak_resident is None or line.peak_resident > line.peak_bytes
        )
        assert line.tflops * line.ms_p50 * 1e9 == pytest.approx(
            floors.step_flops(
                small_video, 2, 0.75, features=False, mode=line.mode, modalities=("video",)
            ),
            rel=1e-3,
        )
    monkeypatch.setattr(results, "stale", lambda line: None)
    assert (
        run_main(drop_rate, *arguments, "--drop-rate", 0.75, 0.0, "--mode", "fwd", "--resume") == 0
    )
    more = results.read(out)
    assert more[: len(first)] == first and {
        (line.mode, line.drop_rate) for line in more[len(first) :]
    } == {("fwd", 0.0)}
    monkeypatch.setattr(results, "stale", lambda line: "changed")
    assert run_main(drop_rate, *arguments, "--drop-rate", 0.75, "--mode", "fwd", "--resume") == 0
    assert len(results.read(out)) == len(more) + len(more) - len(first)


@pytest.mark.parametrize(
    ("found", "reason"),
    [
        (
            {},
            "no parity test of attention, drop_token, contrastive_lse, patch_embed has passed",
        ),  # a crash, or no time
        (
            {
                (op, "reference"): {"passed": 9, "failed": int(op == "contrastive_lse")}
                for op in dispatch.OPS
            },
            "parity is red: contrastive_lse reference",
        ),
    ],
)
@pytest.mark.parametrize("module", [drop_rate, step])
def test_nothing_is_timed_unless_parity_is_green(module, found, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(parity, "check", lambda *args: (found, "Segmentation fault"))
    monkeypatch.setattr(
        sys, "argv", ["bench", "--device", "cpu", "--out", str(tmp_path / "lines.jsonl")]
    )
    with pytest.raises(SystemExit, match=reason):
        module.main()
    assert not (tmp_path / "lines.jsonl").exists()


def test_who_computes_something_else_is_not_timed(small_video):
    setting = Setting(torch.device("cpu"), quick_ceilings=True, rounds=1, warmup=0)
    trainer = step.Trainer(small_video, 2, 0.5, setting.device, torch.float32, ("video",))
    right = drop_rate.contenders_of(trainer, "fwd", compiled=False)
    (call, _) = right["plain"].build()
    result = 1.01 * call()
    wrong = race.Contender(False, lambda: [lambda: result])  # the fastest of all
    task = step.task_of(trainer, "case", "fwd", 2, 0.5)
    lines, absent = race.compare(
        setting, task, right | {"wrong": wrong, "another": wrong._replace(alike=False)}
    )
    assert {line.backend for line in lines} - {"videomae"} == {
        "auto",
        "plain",
        "another",
    } and "other results" in absent["wrong"]
    assert {line.best_peer for line in lines if line.ours} == {
        "plain"
    }  # not another model, were it faster
    assert all(
        (line.tflops is None) == (line.backend in ("another", "videomae")) for line in lines
    )  # whose FLOPs nobody counted
    lines, absent = race.compare(
        setting, task, {"auto": wrong._replace(ours=True), "plain": right["plain"]}
    )
    assert [line.backend for line in lines] == ["plain"] and "other results" in absent["auto"]


def test_a_cell_is_done_when_ours_is(small_video, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "stale", lambda line: None)
    (cell,) = drop_rate.cells(
        ["small_video"], ["fwd"], [0.5], batch=2, compiled_at=[0.5], cuda=False
    )
    line = dataclasses.replace(
        LINE, op="step", case=cell.case, dtype="fp32", mode="fwd", device="here"
    )
    for backend, ours, left in (
        ("plain_compiled", False, 1),
        ("auto", True, 1),
        ("auto_compiled", True, 0),
    ):
        results.append(
            tmp_path / "lines.jsonl", [dataclasses.replace(line, backend=backend, ours=ours)]
        )
        assert (
            len(drop_rate.unmeasured([cell], "fp32", tmp_path / "lines.jsonl", "here")) == left
        ), backend


@pytest.mark.parametrize("mode", ["fwd", "fwd+bwd"])
def test_videomae_does_the_same_work(small_video, mode):
    pytest.importorskip("transformers")
    trainer = step.Trainer(small_video, 2, 0.5, torch.device("cpu"), torch.float32, ("video",))
    contender = drop_rate.contenders_of(trainer, mode, compiled=False)["videomae"]
    calls = contender.build()
    if isinstance(calls, str):
        pytest.skip(calls)
    assert not contender.ours and not contender.alike and len(calls) == len(trainer.batches)
    found = [calls[0]() for _ in range(3)]
    if mode == "fwd":
        assert found[0].shape == (2, step.CLASSES) and torch.equal(found[0], found[2])
    else:
        assert found[2] < found[0]


def test_a_classifier_learns_from_the_tower_alone(small_video):
    trainer = step.Trainer(small_video, 2, 0.5, torch.device("cpu"), torch.float32, ("video",))
    assert all(name.startswith("video") for batch in trainer.batches for name in batch)
    (call, _) = trainer.step_of(step.formulations(("auto",), ())[0], False)
    losses = [float(call()) for _ in range(3)]
    assert losses[2] < losses[0]
    assert all(
        p.grad is None
        for name, p in trainer.model.named_parameters()
        if name.startswith(("audio", "text"))
    )
