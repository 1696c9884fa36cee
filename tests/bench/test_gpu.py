"""Every stage of the run that waits for a GPU, dry on the CPU."""

import importlib.util
import json

import torch
from bench_lines import command

from bench import gpu, lines, sweeps, tune
from vatt_fast.kernels.cases import CASES

CPU = torch.device("cpu")


def test_the_dry_run_passes_every_stage(tmp_path):
    done = command("gpu", "--out", tmp_path, "--dry-run", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    found = {path.name for path in tmp_path.iterdir()}
    stages = ("parity", "ops", "step", "paper", "scaling", "failures")
    assert {f"{stage}.jsonl" for stage in stages} | {"summary.md"} <= found
    measured = lines.read(tmp_path / "ops.jsonl")
    assert {line.op for line in measured} == set(CASES)
    assert {line.ours for line in measured} == {True, False}
    assert {line.backend for line in lines.read(tmp_path / "step.jsonl")} == {"auto", "plain"}
    paper = {(line.case, line.mode) for line in lines.read(tmp_path / "paper.jsonl")}
    assert paper == {("tiny_drop50_b2", mode) for mode in ("fwd", "fwd+bwd")}
    assert {line.op for line in lines.read(tmp_path / "scaling.jsonl")} == set(sweeps.SIZES)
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# Dry run") and "its times mean nothing" in summary
    assert "| contrastive_lse | reference | fp32 | green |" in summary
    assert "the whole stage" not in summary
    if importlib.util.find_spec("triton"):
        (path,) = (tmp_path / "tuned").glob("*.json")
        assert {"drop_token_forward", "contrastive_lse_forward"} <= set(tune.read_table(path))
        assert "- tune:" not in summary
    again = command("gpu", "--out", tmp_path, "--dry-run", "--stage", "ops")
    assert again.returncode == 0  # nothing is missing: nothing is measured twice
    assert len(lines.read(tmp_path / "ops.jsonl")) == len(measured)


def test_the_summary_tells_failures_and_red_parity(tmp_path):
    one = gpu.Run(tmp_path, CPU, True, 1.0)
    for case in ("this", "that"):
        one.fail("ops", f"attention {case}: flex", "RuntimeError: no")
    one.fail("tune", "contrastive_lse", "out of time")
    one.forget_failures("tune")
    gpu._note(one, "contrastive_lse", "reference", "fp32", None)
    gpu._note(one, "contrastive_lse", "reference", "bf16", "parity is red: 1 failed")
    gpu._note(one, "attention", "reference", "fp32", None)
    gpu._note(one, "attention", "reference", "fp64", "no parity case ran: no fp64")
    summary = gpu.summarise(one)
    assert "- ops: flex at 2 cases, attention this first: RuntimeError: no" in summary
    assert "out of time" not in summary
    assert "| contrastive_lse | reference | bf16 | parity is red: 1 failed |" in summary
    setting = one.setting()
    assert "red" in setting.refused["contrastive_lse", "reference"]
    assert ("attention", "reference") in setting.green
    records = [json.loads(text) | {"commit": "another"} for text in _texts(one)]
    one.file("parity").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert "did not run" in one.setting().refused["attention", "reference"]  # it proves nothing


def _texts(run):
    return run.file("parity").read_text().splitlines()
