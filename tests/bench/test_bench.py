"""What the benchmarks say must be right too: floors, tiles, statistics, result lines, the gate against red kernels, and every stage once."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bench import (
    floors,
    gpu,
    machine,
    op_calls,
    parity,
    peers,
    results,
    run,
    scaling,
    step,
    timer,
    tune,
)
from bench.setting import Setting
from vatt_fast.config import PRESETS
from vatt_fast.kernels import tiles
from vatt_fast.kernels.cases import CASES, AttentionCase, tag
from vatt_fast.model import VATT

ROOT = Path(__file__).resolve().parents[2]


CPU = torch.device("cpu")
PRIMARY = [
    (op, name)
    for op, cases in CASES.items()
    for name, case in cases.items()
    if tag(case) == "primary"
]
SMALL = {
    "attention": "ragged_17",
    "drop_token": "ragged",
    "contrastive_lse": "texts",
    "patch_embed": "kept_rows",
}


def command(*arguments, timeout=300):
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


# -- floors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), PRIMARY)
def test_floors_count_what_the_ops_register(op, name):
    """FLOPs are those of the ops' own formulas, on shapes alone, at a small batch."""
    case = dataclasses.replace(CASES[op][name], batch=2)
    inputs = op_calls.make(case, torch.bfloat16)
    inputs = {
        key: value.to("meta") if isinstance(value, torch.Tensor) else value
        for key, value in inputs.items()
    }
    function = op_calls.on_backend(op, "reference")
    counter = FlopCounterMode(display=False)
    with counter:
        op_calls.values(function, op, inputs)
    assert counter.get_total_flops() == floors.work(case, "fwd+bwd").flops


def test_useful_shares_are_the_targets():
    """TARGETS' figures: FA3's tile, the usual tile, and 64-row tiles with a key tail."""
    found = {
        length: [
            round(100 * floors.useful_share(length, length, tiling)) for tiling in floors.TILINGS
        ]
        for length in (393, 785, 1569)
    }
    assert found == {393: [47, 59, 86], 785: [67, 77, 93], 1569: [82, 89, 97]}
    assert floors.useful_share(64, 33, floors.TILINGS[2]) == 33 / 48


def test_useful_shares_of_our_tiles():
    """The last query tile and the key tail are the smallest powers of two that cover the rest, a query tile of 32 made 64."""
    pytest.importorskip("triton")
    ours = {tiling.name: tiling for tiling in floors.our_tilings()}
    assert floors.useful_share(128, 128, ours["ours 128x64"]) == 1
    assert floors.useful_share(393, 393, ours["ours 128x64"]) == 393**2 / ((384 + 16) * (384 + 16))
    assert floors.useful_share(280, 33, ours["ours 128x64"]) == 280 * 33 / ((256 + 64) * 64)


def test_floors_of_one_case_by_hand():
    case = AttentionCase("by_hand", 2, 3, 5, 7, 8)
    assert floors.work(case, "fwd") == (
        4 * 2 * 7 * 3 * 5 * 8,
        2 * (2 * 2 * 3 * 7 * 8 + 2 * 2 * 5 * 7 * 8) + 4 * 2 * 7 * 3,
    )
    assert floors.work(case, "bwd", deterministic=True).flops == 14 * 2 * 7 * 3 * 5 * 8
    ceilings = machine.Ceilings(tflops=1e-9, gb_per_s=1e-6)  # 1 FLOP and 1 byte a millisecond
    work = floors.Work(flops=30, bytes=20)
    assert (work.ms(ceilings), work.bound(ceilings)) == (30, "compute")
    assert (work + floors.Work(0, 20)).bound(ceilings) == "memory"


@pytest.mark.parametrize("features", [True, False])
@pytest.mark.parametrize("name", ["tiny", "medium_base_small", "agnostic_medium"])
def test_step_flops_are_those_of_the_real_modules(name, features):
    config = PRESETS[name]
    with torch.device("meta"):
        model = VATT(config).eval()
        inputs = dict(
            video=torch.empty(
                1, config.num_video_patches, config.video_patch_values, dtype=torch.uint8
            ),
            audio=torch.empty(1, config.num_audio_patches, config.audio_patch),
            text=torch.empty(1, config.texts_per_clip, config.words, dtype=torch.int64),
        )
    keep = {key: value.to("meta") for key, value in model.sample_keep(0.5, seed=0, step=0).items()}
    with FlopCounterMode(display=False) as counter:
        model(**inputs, **keep, features=features)
    assert floors.step_flops(config, 4, 0.5, features=features) == 4 * 3 * counter.get_total_flops()


def test_the_sheet_holds_every_primary_case():
    sheet = floors.sheet()
    assert all(
        sheet.count(f"| {op} | {name} | {mode} |") == 1
        for op, name in PRIMARY
        for mode in floors.MODES
    )
    assert "| 393 x 393 | 47% | 59% | 86% |" in sheet
    printed = command("bench.floors", "--op", "contrastive_lse", "--tflops", 100)
    assert printed.returncode == 0, printed.stderr
    assert "va_bbs_one_device" in printed.stdout and "video" not in printed.stdout


# -- timer -------------------------------------------------------------------------------------------------------------


class FakeClock:
    """Takes a call's result for its milliseconds."""

    name = "fake"

    def prepare(self, calls):
        return lambda i: float(calls[i % len(calls)]())


def test_contenders_run_in_rotating_order_on_rotating_inputs():
    order = []

    def call(name, number):
        return lambda: order.append((name, number)) or number + 1

    contenders = {name: [call(name, number) for number in range(2)] for name in "abc"}
    times = timer.interleaved(contenders, rounds=4, warmup=0, clock=FakeClock())
    names = "".join(name for name, _ in order)
    assert names == "abc" + "bca" + "cab" + "abc"
    assert [number for _, number in order] == [0] * 3 + [1] * 3 + [0] * 3 + [1] * 3
    assert times["a"].ms == (1, 2, 1, 2)


def test_a_failing_contender_leaves_and_the_others_go_on():
    def broken():
        raise RuntimeError("out of resources\nand more")

    failed = {}
    times = timer.interleaved(
        {"good": [lambda: 1], "bad": [broken]}, rounds=3, warmup=1, clock=FakeClock(), failed=failed
    )
    assert set(times) == {"good"} and failed == {"bad": "RuntimeError: out of resources"}
    with pytest.raises(RuntimeError):
        timer.interleaved({"bad": [broken]}, rounds=1, warmup=1, clock=FakeClock())


def test_a_deadline_leaves_one_round():
    times = timer.interleaved(
        {"a": [lambda: 1]}, rounds=9, warmup=0, clock=FakeClock(), deadline=time.monotonic() - 1
    )
    assert times["a"].ms == (1,)


def test_stolen_time_is_told(tmp_path, monkeypatch):
    """Of 100 ticks, guests' not among them, 30 were stolen."""
    stat = tmp_path / "stat"
    stat.write_text("cpu  10 0 0 50 0 0 0 40 5 5\ncpu0 1 0 0 5 0 0 0 4 0 0\n")
    assert (
        timer._processor_ticks(stat) == (100, 40)
        and timer._processor_ticks(tmp_path / "none") is None
    )
    ticks = iter([(100, 40), (200, 70)])
    monkeypatch.setattr(timer, "_processor_ticks", lambda: next(ticks))
    times = timer.interleaved(
        {"a": [lambda: 1], "b": [lambda: 2]}, rounds=2, warmup=0, clock=FakeClock()
    )
    assert times["a"].stolen == times["b"].stolen == 0.3
    fresh = dataclasses.replace(LINE, stolen=None)
    monkeypatch.setattr(machine, "changed_since", lambda commit, paths: None)
    lines = [
        dataclasses.replace(fresh, versions={"torch": torch.__version__}, stolen=each)
        for each in (None, 0.04, 0.3)
    ]
    assert [bool(results.stale(line)) for line in lines] == [False, False, True]


def test_percentiles_and_ratios():
    timing = timer.Timing((5.0, 1.0, 3.0, 2.0, 4.0, 6.0))
    assert (timing.p20, timing.p50, timing.p80) == (2.0, 3.5, 5.0)
    noisy, twice = timer.Timing((1.0, 10.0, 2.0)), timer.Timing((2.0, 20.0, 4.0))
    assert noisy.speedup_over(twice) == 2.0  # round by round, whatever the rounds did
    assert timer.Timing((7.0,)).p80 == 7.0


def test_the_host_clock_measures_time():
    sample = timer.HostClock().prepare([lambda: time.sleep(0.02)])
    assert 20 <= sample(0) < 2000


def test_peak_memory_on_the_cpu_is_what_torch_allocates():
    x = torch.randn(1000, 1000)
    assert timer.peak_bytes(lambda: x + 1, CPU) == pytest.approx(4e6, rel=0.01)
    assert timer.peak_bytes(lambda: ((x + 1) * 2).sum(), CPU) == pytest.approx(8e6, rel=0.01)


def test_peak_memory_of_a_step_counts_its_gradients_whatever_lay_there_before():
    weight = torch.randn(1000, 1000, requires_grad=True)

    def step():
        weight.grad = None  # the last step's
        weight.sum().backward()

    for _ in range(3):  # the profiler knows the first gradient, and may take a later one for it
        assert timer.peak_bytes(step, CPU) == pytest.approx(4e6, rel=0.01)
        weight.grad = None
        step()


# -- result lines ------------------------------------------------------------------------------------------------------

LINE = results.Line(
    op="attention",
    case="ragged_17",
    dtype="bf16",
    mode="fwd",
    backend="reference",
    ours=True,
    ms_p20=1.0,
    ms_p50=2.0,
    ms_p80=3.0,
    rounds=5,
    clock="perf_counter",
    peak_bytes=2**21,
    tflops=1.5,
    gb_per_s=None,
    share_of_ceiling=0.25,
    error=1e-3,
    error_of="out",
    error_batch=2,
    device="a machine",
    versions={"torch": "2"},
    commit="unknown",
    date="2026-01-01",
    speedup_over_best_peer=1.25,
)


def test_lines_survive_a_file(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    peer = dataclasses.replace(
        LINE, backend="eager", ours=False, ms_p50=1.0, speedup_over_best_peer=None
    )
    results.append(path, [LINE])
    results.append(path, [peer])
    assert results.read(path) == [LINE, peer]
    with path.open("a") as file:
        file.write('{"op": "atten')  # a killed run
    assert results.read(path) == [LINE, peer]
    assert results.read(tmp_path / "none.jsonl") == []
    table = results.markdown([LINE, peer]).splitlines()
    assert len(table) == 4
    assert (
        "| eager | 1 |" in table[2]
        and "**reference** | 2 | 1..3 of 5 | 1.5 TFLOP/s | 25% | 1.0e-03 (out) | 2.0 | 1.25x |"
        in table[3]
    )


def test_the_commit_says_dirty_and_unknown(monkeypatch, tmp_path):
    machine.commit.cache_clear()
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert machine.commit() == "unknown"
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    try:
        subprocess.run([*git, "init", "-q"], cwd=tmp_path, check=True)
    except OSError:
        pytest.skip("git is not installed")
    (tmp_path / "file").write_text("1")
    subprocess.run([*git, "add", "file"], cwd=tmp_path, check=True)
    subprocess.run([*git, "commit", "-qm", "x"], cwd=tmp_path, check=True)
    machine.commit.cache_clear()
    clean = machine.commit()
    assert len(clean) == 10
    (tmp_path / "file").write_text("2")
    machine.commit.cache_clear()
    assert machine.commit() == f"{clean}-dirty"
    machine.commit.cache_clear()


def test_what_measuring_writes_makes_no_tree_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    def commit():
        machine.commit.cache_clear()
        return machine.commit()

    monkeypatch.setenv("VATT_FAST_COMMIT", "1234567890")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    assert commit() == "1234567890"  # no checkout
    written = ("bench/results/cpu.jsonl", "bench/figures/a.png", "bench/report.html", "README.md")
    for name in (*written, "kernels/a.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    clean = commit()
    for name in written:
        (tmp_path / name).write_text("2\n")
    assert commit() == clean and len(clean) == 10
    (tmp_path / "kernels/a.py").write_text("2\n")
    assert commit() == f"{clean}-dirty"
    machine.commit.cache_clear()


def test_a_line_is_stale_once_what_it_measured_has_changed(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    def stale(**changes):
        machine.changed_since.cache_clear()
        return results.stale(dataclasses.replace(line, **changes))

    for name in (
        "attention/reference",
        "attention/pallas_tpu",
        "attention/native_cpu",
        "contrastive_lse/reference",
        "dispatch",
        "cases",
    ):
        (tmp_path / f"kernels/{name}.py").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"kernels/{name}.py").write_text("1\n")
    for name in ("bench/peers.py", "csrc/products.h"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("1\n")
    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    machine.commit.cache_clear()
    line = dataclasses.replace(LINE, commit=machine.commit(), versions={"torch": torch.__version__})
    assert stale() is None
    assert (
        stale(versions={"torch": "1.0"})
        == f"torch was 1.0, here it is {torch.__version__.split('+')[0]}"
    )
    assert "not committed" in stale(commit=line.commit + "-dirty") and "not known" in stale(
        commit="0123456789"
    )
    for name in ("attention/pallas_tpu", "cases", "contrastive_lse/reference"):
        (tmp_path / f"kernels/{name}.py").write_text("2\n")
    (tmp_path / "kernels/dispatch.py").write_text('"""What it is."""\n1  # what it does\n')
    assert (
        stale() is None and stale(op="step") == "kernels/contrastive_lse/reference.py has changed"
    )
    (tmp_path / "kernels/attention/native_cpu.py").write_text("2\n")
    assert stale() == "kernels/attention/native_cpu.py has changed"
    assert stale(versions=line.versions | {"cuda": "13.0"}) is None
    assert stale(op="drop_token", ours=False) is None
    (tmp_path / "bench/peers.py").write_text("2\n")
    assert (
        stale(op="drop_token", ours=False)
        == stale(op="drop_token", ours=True, best_peer="eager")
        == "bench/peers.py has changed"
    )
    assert stale(op="drop_token", ours=True) is None
    (tmp_path / "csrc/products.h").write_text("2\n")
    assert (
        stale(op="contrastive_lse") == "csrc/products.h has changed"
        and stale(op="drop_token", ours=True) is None
    )
    results.append(tmp_path / "lines.jsonl", [line, dataclasses.replace(line, op="drop_token")])
    assert [each.op for each in results.measured(tmp_path / "lines.jsonl", case=line.case)] == [
        "drop_token"
    ]
    assert not results.measured(tmp_path / "lines.jsonl", case="another")
    machine.commit.cache_clear()


# -- contenders --------------------------------------------------------------------------------------------------------


def test_peers_compute_what_the_ops_do():
    """Every eager peer of every small case within rounding of fp64, gradients included."""
    for op, name in SMALL.items():
        for case in (
            CASES[op][name],
            *[
                c
                for c in CASES[op].values()
                if c.name in ("text", "shard_masked", "kept_per_clip", "odd_clip")
            ],
        ):
            inputs = op_calls.make(case, torch.float32, seed=1)
            exact = op_calls.truth(op, inputs, torch.float32)
            for peer in peers.peers(op):
                function = peer.build(case, CPU)
                no_kernel = (
                    peer.name == "sdpa_flash" and inputs.get("bias") is not None
                )  # on the CPU it has no gradient for a mask
                if peer.compiled or not peer.alike or isinstance(function, str) or no_kernel:
                    continue
                errors = op_calls.errors(op_calls.values(function, op, inputs), exact)
                assert max(errors.values()) < 1e-5, (peer.name, case.name, errors)


def test_the_chunked_peer_is_the_materialised_one(monkeypatch):
    monkeypatch.setattr(peers, "_CHUNK", 5)
    inputs = op_calls.make(CASES["contrastive_lse"]["masked"], torch.float32)
    one, other = (
        op_calls.values(function, "contrastive_lse", inputs)
        for function in (peers.materialised, peers.chunked)
    )
    assert (
        max(op_calls.errors(other, {name: value.double() for name, value in one.items()}).values())
        < 1e-6
    )


def test_absent_peers_say_why():
    cuda = torch.device("cuda")
    case = CASES["attention"]["text"]
    reasons = {
        peer.name: peer.build(case, CPU) for peer in peers.peers("attention") if not peer.compiled
    }
    assert "not on cpu" in reasons["sdpa_cudnn"] and "runs on CUDA" in reasons["flash_attn"]
    assert "no bias" in peers.peers("attention", ("flash_attn",))[0].build(case, cuda)
    with pytest.raises(ValueError, match="unknown peers"):
        peers.peers("contrastive_lse", ("softmax",))


@pytest.mark.parametrize("op", SMALL)
def test_our_backends_are_green_at_a_small_case(op):
    inputs = op_calls.make(CASES[op][SMALL[op]], torch.float32, seed=3)
    exact = op_calls.truth(op, inputs, torch.float32)
    plain = op_calls.errors(
        op_calls.values(run._yardstick(op, CASES[op][SMALL[op]], CPU), op, inputs), exact
    )
    errors = op_calls.errors(
        op_calls.values(op_calls.on_backend(op, "reference"), op, inputs), exact
    )
    assert op_calls.red(errors, plain, torch.float32) is None
    assert set(errors) == set(exact) and any(name.startswith("d_") for name in errors)


def test_errors_see_what_is_wrong():
    exact = {"out": torch.tensor([3.0, 4.0, -torch.inf]).double(), "d_q": torch.zeros(2).double()}
    found = {"out": torch.tensor([3.0, 4.5, -torch.inf]), "d_q": torch.tensor([0.0, 0.25])}
    errors = op_calls.errors(found, exact)
    assert errors == {"out": pytest.approx(0.1), "d_q": 0.25}
    assert op_calls.worst(errors, "fwd") == (pytest.approx(0.1), "out") and op_calls.worst(
        errors, "bwd"
    ) == (0.25, "d_q")
    assert op_calls.errors(found | {"out": torch.full((3,), torch.nan)}, exact)["out"] == float(
        "inf"
    )
    assert "d_q" in op_calls.red(errors, {"out": 0.1, "d_q": 0.01}, torch.float32)
    assert op_calls.red({"out": float("nan")}, {"out": 0.1}, torch.float32)


def test_modes_run_what_they_say():
    case = CASES["attention"]["ragged_17"]
    inputs = op_calls.make(case)
    runs = Counter()

    def function(**options):
        runs["forward"] += 1
        q, k, v = (options[name] for name in "qkv")
        out = torch.einsum("bthd,bshd->bthd", q, k + v)
        if out.requires_grad:
            out.register_hook(lambda grad: runs.update(["backward"]))
        return (out,)

    for mode, expected in (
        ("fwd", (3, 0)),
        ("bwd", (1, 3)),
        ("fwd+bwd", (4, 3)),
    ):  # fwd+bwd looks at the outputs' shapes first
        runs.clear()
        call = op_calls.call(function, "attention", inputs, mode)
        for _ in range(3):
            call()
        assert (runs["forward"], runs["backward"]) == expected, mode


# -- parity gate -------------------------------------------------------------------------------------------------------


def test_verdicts_are_read_from_pytest():
    output = """PASSED tests/kernels/test_ops.py::test_gradients[attention-reference-one_query-fp32]
PASSED tests/kernels/test_ops.py::test_gradients[contrastive_lse-triton_gpu-texts-cuda-bf16]
FAILED tests/kernels/test_ops.py::test_gradients[contrastive_lse-triton_gpu-shard-cuda-bf16] - AssertionError: row: error 1
ERROR tests/kernels/test_ops.py::test_gradients[contrastive_lse-triton_gpu-flat-cuda-bf16]
SKIPPED [1] tests/kernels/test_ops.py:100: it cannot run this"""
    found = parity.counts(output)
    assert found == {
        ("attention", "reference"): {"passed": 1, "failed": 0},
        ("contrastive_lse", "triton_gpu"): {"passed": 1, "failed": 2},
    }
    assert parity.objection(found, "attention", "reference") is None
    assert "red: 2 failed" in parity.objection(found, "contrastive_lse", "triton_gpu")
    assert "did not run" in parity.objection(found, "contrastive_lse", "reference")


def test_what_parity_refuses_is_not_timed():
    setting = Setting(
        CPU,
        rounds=1,
        warmup=0,
        backends=("reference",),
        peer_names=("gather",),
        quick_ceilings=True,
    )
    setting.refused["drop_token", "reference"] = "its parity tests are red: 1 failed, 0 passed"
    lines, absent = run.measure(
        setting, "drop_token", CASES["drop_token"]["ragged"], "fp32", ["fwd"]
    )
    assert [line.backend for line in lines] == ["gather"]
    assert "red" in absent["reference"]


def test_some_contenders_alone_are_kept_in_no_file():
    setting = Setting(CPU, quick_ceilings=True)
    assert (
        run._out(None, setting, True) is None
        and run._out("here.jsonl", setting, True) == "here.jsonl"
    )
    assert run._out(None, setting, False) == results.of_device(setting.device_name)


def test_what_is_wrong_at_the_case_is_not_timed(monkeypatch):
    setting = Setting(
        CPU,
        rounds=1,
        warmup=0,
        backends=("reference",),
        peer_names=("materialised",),
        quick_ceilings=True,
    )
    exact_of = op_calls.truth

    def truth(op, inputs, dtype):  # from the op as it is; then it breaks
        exact = exact_of(op, inputs, dtype)
        monkeypatch.setitem(
            op_calls.OPS,
            "contrastive_lse",
            lambda **given: peers.materialised(**given | {"scale": given["scale"] * 1.01}),
        )
        return exact

    monkeypatch.setattr(op_calls, "truth", truth)
    reports = []
    setting.report = reports.append
    lines, absent = run.measure(
        setting, "contrastive_lse", CASES["contrastive_lse"]["texts"], "fp32", ["fwd"]
    )
    assert [line.backend for line in lines] == ["materialised"]
    assert "error beyond twice plain torch's" in absent["reference"] and any(
        text.startswith("RED") for text in reports
    )


class ToldTimes:
    """A clock that knows beforehand what each contender takes, in the order of their turns; None cannot be captured."""

    def __init__(self, *ms):
        self.ms = iter(ms)

    def prepare(self, calls):
        if (ms := next(self.ms)) is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda i: ms


def test_when_ours_cannot_be_captured_all_peers_race_with_it_again(monkeypatch):
    """By graphs flash is the best peer, by events eager is."""
    clocks = {"cuda_graph": ToldTimes(None, 3.0, 1.0), "cuda_events": ToldTimes(4.0, 5.0, 6.0)}
    setting = Setting(
        CPU,
        rounds=2,
        warmup=1,
        backends=("reference",),
        peer_names=("eager", "sdpa_flash"),
        quick_ceilings=True,
    )
    setting.clock = "cuda_graph"
    monkeypatch.setattr(setting, "make_clock", lambda name="": clocks[name or setting.clock])
    lines, _ = run.measure(setting, "attention", CASES["attention"]["ragged_17"], "fp32", ["fwd"])
    ours = next(line for line in lines if line.ours)
    assert (ours.clock, ours.ms_p50, ours.best_peer, ours.best_peer_ms_p50) == (
        "cuda_events",
        4.0,
        "eager",
        5.0,
    )


def test_what_cannot_be_captured_is_compared_with_ours_by_the_same_clock(monkeypatch):
    """By graphs ours takes 1 ms and eager 3; by events flash takes 2, ours 4 and eager 5."""
    clocks = {"cuda_graph": ToldTimes(1.0, 3.0, None), "cuda_events": ToldTimes(2.0, 4.0, 5.0)}
    raced, interleaved = [], run.interleaved
    monkeypatch.setattr(
        run,
        "interleaved",
        lambda calls, **options: raced.append([*calls]) or interleaved(calls, **options),
    )
    setting = Setting(
        CPU,
        rounds=2,
        warmup=1,
        backends=("reference",),
        peer_names=("eager", "sdpa_flash"),
        quick_ceilings=True,
    )
    setting.clock = "cuda_graph"
    monkeypatch.setattr(setting, "make_clock", lambda name="": clocks[name or setting.clock])
    lines, absent = run.measure(
        setting, "attention", CASES["attention"]["ragged_17"], "fp32", ["fwd"]
    )
    assert not absent
    assert {line.backend: line.clock for line in lines} == {
        "reference": "cuda_events",
        "eager": "cuda_graph",
        "sdpa_flash": "cuda_events",
    }
    assert "sdpa_flash (launches counted)" in results.markdown(lines)
    assert raced == [
        ["reference", "eager", "sdpa_flash"],
        ["sdpa_flash", "reference", "eager"],
    ]  # again with whom it is compared
    ours = next(line for line in lines if line.ours)
    assert ours.ms_p50 == 4.0 and (
        ours.best_peer,
        ours.best_peer_ms_p50,
        ours.speedup_over_best_peer,
    ) == ("sdpa_flash", 2.0, 0.5)


def test_a_line_holds_what_was_measured():
    setting = Setting(
        CPU,
        rounds=3,
        warmup=1,
        backends=("reference",),
        peer_names=("eager", "sdpa_flash"),
        quick_ceilings=True,
    )
    lines, absent = run.measure(
        setting, "attention", CASES["attention"]["ragged_17"], "fp32", ["fwd", "bwd", "fwd+bwd"]
    )
    assert not absent and len(lines) == 9
    for line in lines:
        assert (
            line.ms_p20 <= line.ms_p50 <= line.ms_p80
            and line.rounds == 3
            and line.clock == "perf_counter"
        )
        assert (line.tflops is None) != (line.gb_per_s is None) and line.share_of_ceiling > 0
        assert (line.peak_bytes is None) if line.mode == "bwd" else line.peak_bytes > 0
        assert line.error < 1e-6 and line.versions["torch"] == torch.__version__
        assert (line.speedup_over_best_peer is None) == (line.backend != "reference")
        assert line.backend in run.describe(line)


def test_the_command_gates_times_and_writes(tmp_path):
    out = tmp_path / "lines.jsonl"
    options = [
        "--device",
        "cpu",
        "--op",
        "drop_token",
        "--case",
        "ragged",
        "one_kept",
        "--dtype",
        "fp32",
        "--rounds",
        "2",
    ]
    done = command(
        "bench.run", *options, "--backends", "reference", "--no-compiled-peers", "--out", out
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = results.read(out)
    assert {(line.case, line.mode, line.backend) for line in lines} == {
        (case, mode, backend)
        for case in ("ragged", "one_kept")
        for mode in ("fwd", "fwd+bwd")
        for backend in ("reference", "gather")
    }
    assert "best peer" in done.stdout and "ceilings on" in done.stdout
    wrong = command("bench.run", "--op", "drop_token", "--case", "raged")
    assert wrong.returncode == 2 and "unknown case 'raged'" in wrong.stderr


# -- tuning ------------------------------------------------------------------------------------------------------------


def fake_kernels(monkeypatch, seen):
    """An attention on "kernels" whose time is told by their tiles: forward, and a backward that a plan makes of one kernel or another."""

    def choose(kernel, heuristic, q):
        choice = tiles.choose(kernel, "no_arch", q.dtype, heuristic, queries=q.shape[1])
        if choice.get("BLOCK", 0) > 128:
            raise MemoryError("out of resources: shared memory")
        seen.append((kernel, tuple(choice.items())))
        return choice

    class Fake(torch.autograd.Function):
        @staticmethod
        def forward(ctx, q, k, v):
            choice = choose("fake_forward", {"BLOCK": 64, "num_warps": 4}, q)
            ctx.save_for_backward(q)
            return (q + k + v) * (
                2 if choice["BLOCK"] == 32 else 1
            )  # a tile that breaks the kernel

        @staticmethod
        def backward(ctx, d_out):
            (q,) = ctx.saved_tensors
            plan = choose("fake_plan", {"ONE_PASS": 0}, q)["ONE_PASS"]
            choose(("fake_two", "fake_one")[plan], {"BLOCK": 64, "num_warps": 4}, q)
            return d_out, d_out, d_out

    class Clock:
        name = "fake"

        def __init__(self):
            self.cost = {"fake_forward": 1.0, "fake_two": 2.0, "fake_one": 1.0, "fake_plan": 0.0}

        def prepare(self, calls):
            def sample(i):
                seen.clear()
                calls[i % len(calls)]()
                return sum(
                    self.cost[kernel] * 1000 / dict(choice).get("BLOCK", 1000)
                    for kernel, choice in seen
                )

            return sample

    return (lambda q, k, v, **_: (Fake.apply(q, k, v),)), Clock()


def test_tuning_keeps_the_fastest_tiles_that_are_right(monkeypatch):
    seen = []
    function, clock = fake_kernels(monkeypatch, seen)
    blocks = [{"BLOCK": block, "num_warps": 4} for block in (16, 32, 128, 256)]
    candidates = {
        "fake_forward": blocks,
        "fake_plan": [{"ONE_PASS": 0}, {"ONE_PASS": 1}],
        "fake_two": blocks[2:],
        "fake_one": blocks[2:],
    }
    table, skipped = {}, Counter()
    options = dict(
        candidates_of=candidates, clock=clock, rounds=2, function=function, report=lambda text: None
    )
    case = AttentionCase("fake", 2, 5, 5, 2, 8)
    tune.tune_case("attention", case, torch.float32, CPU, table=table, skipped=skipped, **options)
    best = {"BLOCK": 128, "num_warps": 4}
    key = "fp32 queries=5"
    assert table == {
        "fake_forward": {key: best},
        "fake_plan": {key: {"ONE_PASS": 1}},
        "fake_two": {key: best},
        "fake_one": {key: best},
    }
    assert skipped == {"changes the result": 1, "MemoryError": 3}
    assert tiles.choose.__module__ == tiles.__name__  # no longer overheard

    seen.clear()
    tune.tune_case(
        "attention", case, torch.float32, CPU, table=table, **options
    )  # every key is there: nothing is timed
    assert ("fake_forward", tuple(best.items())) not in seen


def test_the_heuristic_stays_unless_something_is_faster(monkeypatch):
    function, clock = fake_kernels(monkeypatch, [])
    clock.cost = dict.fromkeys(clock.cost, 0.0)
    candidates = {"fake_forward": [{"BLOCK": 128, "num_warps": 4}]}
    table = {}
    case = AttentionCase("fake", 2, 5, 5, 2, 8)
    options = dict(
        candidates_of=candidates, clock=clock, rounds=1, function=function, report=lambda text: None
    )
    tune.tune_case("attention", case, torch.float32, CPU, table=table, **options)
    assert table == {"fake_forward": {"fp32 queries=5": {"BLOCK": 64, "num_warps": 4}}}


def test_a_table_serves_before_it_is_installed():
    choice = {"BLOCK": 8}
    with tune.applied({"kernel": {"fp16 n=3": choice}}):
        assert tiles.choose("kernel", "sm_00", torch.float16, {}, n=3) == choice
    assert tiles.choose("kernel", "sm_00", torch.float16, {}, n=3) == {}


def test_tables_are_sorted_and_read_back(tmp_path):
    table = {"b": {"k2": {"N": 2, "A": 1}, "k1": {"N": 3}}, "a": {"k": {"num_warps": 4}}}
    path = tmp_path / "tuned" / "sm_00.json"
    tune.write_table(path, table)
    text = path.read_text()
    assert tune.read_table(path) == table == json.loads(text)
    assert (
        text
        == '{\n  "a": {\n    "k": {"num_warps": 4}\n  },\n  "b": {\n    "k1": {"N": 3},\n    "k2": {"A": 1, "N": 2}\n  }\n}\n'
    )
    assert tune.read_table(tmp_path / "none.json") == {}


# -- training step -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("features", [False, True])
def test_every_formulation_of_the_step_has_the_same_loss(features):
    contenders = step.formulations(("auto", "reference", "plain"), ())
    losses = {}
    for formulation in contenders:
        trainer = step.Trainer(PRESETS["tiny"], 3, 0.5, CPU, torch.float32)
        calls = trainer.step_of(formulation, features)
        losses[formulation.name] = torch.stack([calls[0](), calls[1](), calls[0]()])
    for name, loss in losses.items():
        torch.testing.assert_close(
            loss,
            losses["reference"],
            rtol=1e-4,
            atol=1e-5,
            msg=lambda text, name=name: f"{name}: {text}",
        )
    assert len(set(losses["reference"].tolist())) == 3  # it trains


def test_plain_ops_leave_the_model_as_it_was():
    import vatt_fast.losses
    import vatt_fast.model

    before = (
        vatt_fast.model.attention,
        vatt_fast.model.patch_embed,
        vatt_fast.losses.contrastive_lse,
    )
    with step.plain_ops():
        assert vatt_fast.model.attention is not before[0]
    assert before == (
        vatt_fast.model.attention,
        vatt_fast.model.patch_embed,
        vatt_fast.losses.contrastive_lse,
    )
    with pytest.raises(ValueError, match="unknown formulations"):
        step.formulations(("fast",), ())


# -- everything on a GPU, dry ------------------------------------------------------------------------------------------


def test_shards_cover_the_battery_once():
    """Every test of the battery on a GPU belongs to exactly one shard's expression."""
    shards = gpu._shards(gpu.Run(Path(), torch.device("cuda"), False, 1.0, "mbs"))
    expressions = {name: arguments[2] for name, arguments in shards.items() if arguments[1] == "-k"}
    for test, name in {
        "test_gradients[attention-triton_gpu-one_query-cuda-bf16]": "attention bf16",
        "test_gradients_without_one_of_lse[attention-triton_gpu-one_query-cuda-fp64]": "attention fp64",
        "test_every_value_is_written_and_repeats[contrastive_lse-reference-texts-cuda]": "contrastive_lse properties",
        "test_attention_at_a_real_length[bf16-triton_gpu-long]": "further properties",
    }.items():
        assert [
            shard for shard, expression in expressions.items() if selects(expression, test)
        ] == [name]
    assert not [
        shard
        for shard, expression in expressions.items()
        if selects(expression, "test_gradients[contrastive_lse-reference-texts-fp32]")
    ]


def selects(expression, test):
    """pytest's -k with and, or, not and parentheses, on a test's name."""
    words = expression.replace("(", " ( ").replace(")", " ) ").split()
    return eval(
        " ".join(
            word if word in ("and", "or", "not", "(", ")") else str(word in test) for word in words
        )
    )


def test_the_dry_run_passes_every_stage(tmp_path):
    done = command("bench.gpu", "--out", tmp_path, "--dry-run")
    assert done.returncode == 0, done.stdout + done.stderr
    found = {
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    }
    assert {
        "parity.txt",
        "ops.jsonl",
        "step.jsonl",
        "paper.jsonl",
        "scaling.jsonl",
        "summary.md",
        "failures.jsonl",
    } <= found
    lines = results.read(tmp_path / "ops.jsonl")
    assert {line.op for line in lines} == set(CASES) and {line.ours for line in lines} == {
        True,
        False,
    }
    assert {line.backend for line in results.read(tmp_path / "step.jsonl")} == {"auto", "plain"}
    assert {(line.case, line.mode) for line in results.read(tmp_path / "paper.jsonl")} == {
        ("tiny_drop50_b2", m) for m in ("fwd", "fwd+bwd")
    }
    assert {line.op for line in results.read(tmp_path / "scaling.jsonl")} == set(scaling.CASES)
    summary = (tmp_path / "summary.md").read_text()
    assert (
        summary.startswith("# Dry run")
        and "| contrastive_lse | reference | " in summary
        and "its times mean nothing" in summary
    )
    assert not [line for line in summary.splitlines() if "the whole stage" in line]
    if importlib.util.find_spec("triton"):
        table = tune.read_table(tmp_path / "tuned" / "sm_90.json")
        assert {"drop_token_forward", "contrastive_lse_forward"} <= set(
            table
        ) and "- tune:" not in summary

    again = command(
        "bench.gpu", "--out", tmp_path, "--dry-run", "--stage", "ops"
    )  # nothing is missing: nothing is measured twice
    assert again.returncode == 0 and len(results.read(tmp_path / "ops.jsonl")) == len(lines)


def test_the_summary_tells_failures_and_red_parity(tmp_path):
    one = gpu.Run(tmp_path, CPU, True, 1.0, "tiny")
    for case in ("this", "that"):
        one.fail("ops", f"attention {case}: flex", "RuntimeError: no")
    one.fail("tune", "contrastive_lse", "out of time")
    one.forget_failures("tune")
    (tmp_path / "parity.txt").write_text(
        one.heading()
        + "FAILED tests/kernels/test_ops.py::test_gradients[contrastive_lse-reference-texts-fp32] - no\n"
    )
    summary = gpu.summarise(one)
    assert (
        "- ops: flex at 2 cases, attention this first: RuntimeError: no" in summary
        and "out of time" not in summary
    )
    assert "| contrastive_lse | reference | 0 | 1 |" in summary
    assert "red" in one.setting().refused["contrastive_lse", "reference"]
    (tmp_path / "parity.txt").write_text(
        "commit other\nPASSED tests/kernels/test_ops.py::test_gradients[contrastive_lse-reference-texts-fp32]\n"
    )
    assert (
        "did not run" in one.setting().refused["contrastive_lse", "reference"]
    )  # another commit proves nothing


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("clock", ["cuda_graph", "cuda_events"])
def test_gpu_clocks_agree_with_the_floor(clock):
    device = torch.device("cuda")
    setting = Setting(
        device, clock=clock, rounds=5, peer_names=("eager", "sdpa_flash"), backends=("torch_sdpa",)
    )
    lines, absent = run.measure(
        setting, "attention", CASES["attention"]["video_mbs_drop50"], "bf16", ["fwd", "bwd"]
    )
    assert not absent and len(lines) == 6
    for line in lines:
        assert line.share_of_ceiling < 1.05, f"{line.backend} {line.mode} beats the ceiling: {line}"
        assert line.clock == clock


@pytest.mark.gpu
def test_gpu_peak_memory_counts_the_output():
    x = torch.randn(1024, 1024, device="cuda")
    assert timer.peak_bytes(lambda: x + 1, x.device) == x.nbytes
