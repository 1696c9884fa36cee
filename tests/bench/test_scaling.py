"""The race against size: who leaves it, what it prints and keeps."""

import dataclasses

import pytest
import torch
from bench_lines import LINE, no_gate

from bench import __main__, floors, lines, sweeps
from vatt_fast.kernels.cases import AttentionCase

CPU = torch.device("cpu")


def test_who_would_take_too_much_is_told_why():
    last = dataclasses.replace(LINE, ms_p50=3000.0, peak_bytes=2**28)
    assert sweeps.too_much(last, 4, 2**31) is None
    assert "about 60 s, more than 30" in sweeps.too_much(last, 20, 2**33)
    assert "about 2 GiB, 1 are free" in sweeps.too_much(last, 8, 2**30)
    assert 2**20 < sweeps.free_bytes(CPU) < 2**45


def test_the_sizes_are_those_of_the_models():
    for op, cases in sweeps.SIZES.items():
        for size, case in cases.items():
            assert case.name.startswith("scaling_") and case.name.endswith(f"_{size}")
            assert floors.op_of(case) == op and floors.work(case, "fwd").bytes > 0
    assert list(sweeps.SIZES["attention"]) == [197, 393, 785, 1569, 3201, 6401]
    clip = sweeps.SIZES["patch_embed"][32 * 224 * 224]
    assert (clip.patches, clip.values, clip.kept) == (1568, 3072, None)


def attention_at(monkeypatch, *sizes):
    """Attention at tiny sizes alone, and no parity check before it."""
    cases = {n: AttentionCase(f"scaling_tokens_{n}", 1, n, n, 2, 16) for n in sizes}
    monkeypatch.setitem(sweeps.SIZES, "attention", cases)
    no_gate(monkeypatch)


def run(out, *options):
    asked = "scaling --device cpu --op attention --dtype fp32 --mode fwd --seconds 0"
    assert __main__.main([*asked.split(), "--out", str(out), *options]) == 0
    return lines.read(out)


def test_a_size_is_measured_once_and_the_slow_leave(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sweeps, "peers", lambda op: ("eager", "sdpa_math"))
    attention_at(monkeypatch, 5)
    first = run(tmp_path / "first.jsonl")
    assert {line.backend for line in first} == {"auto", "eager", "sdpa_math"}
    assert {(line.case, line.rounds) for line in first} == {("scaling_tokens_5", 2)}
    # as if a peer had taken long at the small size; of an earlier run the last of each counts
    slow = [
        dataclasses.replace(line, ms_p50=1e4 if line.backend == "eager" else 1.0) for line in first
    ]
    earlier = [*(dataclasses.replace(line, ms_p50=1.0) for line in slow), *slow]
    out = tmp_path / "lines.jsonl"
    lines.append(out, earlier)
    attention_at(monkeypatch, 5, 40)
    found = run(out, "--resume")
    assert found[: len(earlier)] == earlier  # nothing measured again
    assert {line.backend for line in found[len(earlier) :]} == {"sdpa_math", "auto"}
    told = "absent: attention scaling_tokens_40: eager: a call would take about"
    assert told in capsys.readouterr().out
    attention_at(monkeypatch, 5)
    monkeypatch.setattr(__main__, "gate", lambda *args, **options: pytest.fail("checked parity"))
    assert run(out, "--resume") == found


def test_what_takes_too_long_to_compile_is_left_out(monkeypatch, tmp_path, capsys):
    attention_at(monkeypatch, 5)
    monkeypatch.setitem(sweeps._COMPILED_UP_TO, "attention", 4)
    backends = {line.backend for line in run(tmp_path / "lines.jsonl")}
    assert {"auto", "eager"} <= backends
    assert not any(name.endswith("_compiled") for name in backends)
    assert "eager_compiled: torch.compile takes too long beyond 4" in capsys.readouterr().out
