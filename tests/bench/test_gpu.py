"""Every item of the run that waits for a GPU, dry on the CPU."""

import importlib.util
import json
import time

import pytest
import torch
from bench_lines import command

from bench import gpu, lines, tune
from vatt_fast.kernels.cases import CASES

CPU = torch.device("cpu")


def test_the_dry_run_does_every_item(tmp_path):
    done = command("gpu", "--out", tmp_path, "--dry-run", timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = [json.loads(text) for text in (tmp_path / "parts.jsonl").read_text().splitlines()]
    assert {each["item"] for each in parts} == set(gpu.ITEMS) - {"compile"}  # it interprets
    assert all(each["done"] for each in parts)
    measured = lines.read(tmp_path / "ops.jsonl")
    assert {line.op for line in measured} == set(CASES)
    assert {line.ours for line in measured} == {True, False}
    ways = {line.backend for line in measured if line.mode == "bwd"}
    assert {"reference", "reference one pass", "reference two passes"} <= ways
    assert {line.backend for line in lines.read(tmp_path / "step.jsonl")} == {"auto", "plain"}
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# Dry run") and "its times mean nothing" in summary
    assert "| contrastive_lse | reference | 1 | green |" in summary
    if importlib.util.find_spec("triton"):
        (path,) = (tmp_path / "tuned").glob("*.json")
        assert {"drop_token_forward", "contrastive_lse_forward"} <= set(tune.read_table(path))
        assert "- tune:" not in summary
    again = command("gpu", "--out", tmp_path, "--dry-run", "--item", "ops", "parity")
    assert again.returncode == 0  # nothing is missing: nothing is done twice
    assert len(lines.read(tmp_path / "ops.jsonl")) == len(measured)
    assert len((tmp_path / "parts.jsonl").read_text().splitlines()) == len(parts)


def one_item(monkeypatch, *parts):
    monkeypatch.setattr(gpu, "ITEMS", {"ops": (1.0, lambda run: iter(parts))})


def test_a_part_that_fails_is_told_and_the_next_one_runs(tmp_path, monkeypatch):
    ran = []

    def broken():
        ran.append("broken")
        raise RuntimeError("no such kernel")

    def slow():
        ran.append("slow")
        return [("7 left", "out of time; run it again to continue")] if len(ran) < 4 else []

    one_item(monkeypatch, ("broken", broken), ("slow", slow), ("absent", lambda: [("flex", "no")]))
    for _ in range(3):
        assert gpu.main(gpu.Run(tmp_path, CPU, True), ["ops"], 1.0) == 0
    assert ran == ["broken", "slow", "slow", "slow"]  # until it is done, and what failed only once
    summary = (tmp_path / "summary.md").read_text()
    assert "- ops: broken: RuntimeError: no such kernel" in summary
    assert "- ops: absent: flex: no" in summary and "out of time" not in summary


def test_without_time_left_nothing_begins_and_nothing_is_done(tmp_path, monkeypatch):
    one_item(monkeypatch, ("a part", lambda: pytest.fail("there was no time")))
    gpu.main(gpu.Run(tmp_path, CPU, True), ["ops"], 0.0)
    (part,) = gpu.Run(tmp_path, CPU, True).records("parts")
    assert (
        not part["done"] and "- ops: a part: out of time" in (tmp_path / "summary.md").read_text()
    )


def test_what_an_item_leaves_of_its_time_goes_to_the_others(tmp_path, monkeypatch):
    run = gpu.Run(tmp_path, CPU, True)
    given = {}

    def parts(item):
        return lambda run: iter([("", lambda: given.update({item: run.deadline}) or [])])

    items = {"ops": (0.1, parts("ops")), "tune": (0.3, parts("tune")), "step": (0.1, parts("step"))}
    monkeypatch.setattr(gpu, "ITEMS", items)
    began = time.monotonic()
    gpu.main(run, ["step", "tune"], 1000.0)
    assert list(given) == ["tune", "step"]
    assert abs(given["tune"] - began - 45000) < 60 and abs(given["step"] - began - 60000) < 60


def test_checks_that_find_no_time_are_left_for_the_next_call(tmp_path):
    run = gpu.Run(tmp_path, CPU, True, deadline=time.monotonic())
    (missing,) = gpu._check_all(run)
    assert missing[0].endswith(" left") and "out of time" in missing[1]
    assert not run.records("parity")


def test_what_is_red_or_unchecked_is_not_timed(tmp_path):
    run = gpu.Run(tmp_path, CPU, True)
    checked = dict(op="contrastive_lse", backend="reference")
    run.note("parity", **checked, case="square", reason=None)
    run.note("parity", op="attention", backend="reference", case="text", reason=None)
    assert ("contrastive_lse", "reference") in run.setting().green
    assert "did not run" in run.setting().refused["patch_embed", "reference"]
    run.note("parity", **checked, case="texts", reason="parity is red: 1 failed")
    assert "red" in run.setting().refused["contrastive_lse", "reference"]
    assert "| contrastive_lse | reference | 2 | parity is red: 1 failed |" in gpu.summarise(run)
    records = [json.loads(text) for text in run.file("parity").read_text().splitlines()]
    others = [json.dumps(each | {"commit": "another"}) + "\n" for each in records]
    run.file("parity").write_text("".join(others))
    assert "did not run" in run.setting().refused["attention", "reference"]  # it proves nothing
