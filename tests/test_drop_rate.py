"""Cost and accuracy against the drop rate: what bench.drop_rate and bench.accuracy say of themselves."""

import dataclasses

from test_bench import command

from bench import accuracy

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
    run = accuracy.Run(0.5, 0, 9, 10.0, 20.0, 30.0, 40.0, 5.0, 12.5, 1.0, "cpu", {}, "abc", "2026-01-01")
    runs = [run, dataclasses.replace(run, seed=1, t2v_r10=26.0), dataclasses.replace(run, drop_rate=0.75)]
    lines = accuracy.markdown(runs).splitlines()
    assert lines[2].startswith("| 75% | 1.00 | 20.0 | 10.0 |") and lines[3].startswith("| 50% | 1.00 | 23.0 ± 4.2 | 10.0 ± 0.0 |")
