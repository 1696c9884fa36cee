"""The race against size: who leaves it, what it prints and keeps."""

import dataclasses

import pytest
import torch

from bench import floors, results, scaling
from vatt_fast.kernels.cases import AttentionCase

CPU = torch.device("cpu")


def cost(size, ms, peak_bytes):
    return scaling._Cost(size, ms, peak_bytes)


def test_costs_grow_as_they_grew():
    assert scaling.predict([cost(10, 2.0, 100)], 30) == cost(
        30, pytest.approx(18.0), 900
    )  # one point: squared
    linear = scaling.predict(
        [cost(1, 9.0, 1), cost(10, 2.0, 100), cost(20, 4.0, 400)], 40
    )  # of the last two
    assert linear == cost(40, pytest.approx(8.0), 1600)
    assert scaling.predict([cost(10, 2.0, 100), cost(20, 2.0, 100)], 40).ms == pytest.approx(
        4.0
    )  # at least linear: caches end
    assert scaling.predict([cost(10, 1.0, 0), cost(20, 100.0, 0)], 40).ms == pytest.approx(
        400.0
    )  # at most squared


def test_who_would_take_too_much_is_told_why():
    assert scaling.objection(cost(1, 999.0, 2**30), 1000.0, 2**31) is None
    assert "about 2 s, more than 1" in scaling.objection(cost(1, 2000.0, 0), 1000.0, 2**31)
    assert "about 4 GiB, 2 are free" in scaling.objection(cost(1, 1.0, 2**32), 1000.0, 2**31)
    assert 2**20 < scaling.free_bytes(CPU) < 2**45


def test_the_sizes_are_those_of_the_models():
    for op, cases in scaling.CASES.items():
        for size, case in cases.items():
            assert case.name.startswith("scaling_") and case.name.endswith(f"_{size}")
            assert floors.work(case, "fwd").bytes > 0, op
    assert list(scaling.CASES["attention"]) == [197, 393, 785, 1569, 3201, 6401]
    clip = scaling.CASES["patch_embed"][32 * 224 * 224]
    assert (clip.patches, clip.values, clip.kept) == (1568, 3072, 784)


@pytest.fixture
def small(monkeypatch):
    """Attention at two tiny sizes, and no parity run before it."""
    cases = {
        size: AttentionCase(f"scaling_tokens_{size}", 1, size, size, 2, 16) for size in (5, 40)
    }
    monkeypatch.setitem(scaling.CASES, "attention", cases)
    monkeypatch.setattr(
        scaling,
        "gate",
        lambda setting, ops, dtype, **options: [
            setting.set_verdict(op, "reference", None) for op in ops
        ],
    )


def run_main(*arguments):
    return scaling.main(
        ["--device", "cpu", "--op", "attention", "--dtype", "fp32", *map(str, arguments)]
    )


def test_a_size_is_measured_once_and_the_slow_leave(small, monkeypatch, tmp_path, capsys):
    peers = {peer.name: peer for peer in scaling.peers("attention")}
    monkeypatch.setattr(scaling, "peers", lambda op: [peers["eager"], peers["sdpa_math"]])
    out = tmp_path / "lines.jsonl"
    assert run_main("--size", 5, "--mode", "fwd", "--seconds", 0, "--out", out) == 0
    first = results.read(out)
    assert {line.backend for line in first} == {"auto", "eager", "sdpa_math"}
    assert {(line.case, line.mode, line.rounds) for line in first} == {
        ("scaling_tokens_5", "fwd", 2)
    }
    # as if a peer had taken long at the small size
    slow = [
        dataclasses.replace(line, ms_p50=1e4 if line.backend == "eager" else line.ms_p50)
        for line in first
    ]
    out.unlink()
    results.append(
        out, [dataclasses.replace(line, ms_p50=1.0) for line in slow]
    )  # of an earlier run: the last of each counts
    results.append(out, slow)
    monkeypatch.setattr(results, "stale", lambda line: None)
    capsys.readouterr()
    assert run_main("--mode", "fwd", "--seconds", 0, "--resume", "--out", out) == 0
    found = results.read(out)
    assert found[len(slow) : 2 * len(slow)] == slow  # nothing measured again
    later = {line.backend for line in found[2 * len(slow) :]}
    assert "eager" not in later and {"sdpa_math", "auto"} <= later
    assert (
        "absent: attention scaling_tokens_40: eager: a call would take about"
        in capsys.readouterr().out
    )


def test_what_takes_too_long_to_compile_is_left_out(small, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(scaling._COMPILED_UP_TO, "attention", 4)
    assert (
        run_main("--size", 5, "--mode", "fwd", "--seconds", 0, "--out", tmp_path / "lines.jsonl")
        == 0
    )
    backends = {line.backend for line in results.read(tmp_path / "lines.jsonl")}
    assert (
        "auto" in backends
        and "eager" in backends
        and not any(name.endswith("_compiled") for name in backends)
    )
    assert "eager_compiled: torch.compile is not waited for beyond 4" in capsys.readouterr().out


def test_an_unknown_size_is_refused(small, capsys):
    with pytest.raises(SystemExit):
        run_main("--size", 6)
    assert "it has 5, 40" in capsys.readouterr().err


def test_where_nothing_is_left_no_parity_is_run(small, monkeypatch, tmp_path):
    out = tmp_path / "lines.jsonl"
    assert run_main("--size", 5, "--mode", "fwd", "--seconds", 0, "--out", out) == 0
    monkeypatch.setattr(results, "stale", lambda line: None)
    monkeypatch.setattr(scaling, "gate", lambda *args, **options: pytest.fail("parity was run"))
    before = out.read_text()
    assert run_main("--size", 5, "--mode", "fwd", "--seconds", 0, "--out", out, "--resume") == 0
    assert out.read_text() == before
