"""What a race measures and a line says: floors, cases, modes, errors, clocks, the parity gate."""

import dataclasses
import subprocess
from collections import Counter

import pytest
import torch
from bench_lines import LINE, command

from bench import __main__, calls, floors, lines, machine, setting
from bench.measure import measure_op
from bench.report import tables
from bench.setting import Setting
from vatt_fast.kernels import parity
from vatt_fast.kernels.cases import CASES, AttentionCase, make, tag
from vatt_fast.kernels.ops import OPS

CPU = torch.device("cpu")


def quick(backends, names, **options):
    options = dict(rounds=1, warmup=0, quick=True) | options
    return Setting(CPU, backends=backends, peer_names=names, **options)


# -- floors -----------------------------------------------------------------------------------


def test_floors_of_one_case_by_hand():
    case = AttentionCase("by_hand", 2, 3, 5, 7, 8)
    operands = 2 * (2 * 2 * 3 * 7 * 8 + 2 * 2 * 5 * 7 * 8)
    assert floors.work(case, "fwd") == (4 * 2 * 7 * 3 * 5 * 8, operands + 4 * 2 * 7 * 3)
    ceilings = machine.Ceilings(tflops=1e-9, gb_per_s=1e-6)  # 1 FLOP and 1 byte a millisecond
    work = floors.Work(flops=30, bytes=20)
    assert (work.ms(ceilings), work.bound(ceilings)) == (30, "compute")
    assert floors.Work(30, 40).bound(ceilings) == "memory"


def test_the_sheet_holds_every_primary_case(capsys):
    assert __main__.main(["floors", "--op", "contrastive_lse", "attention"]) == 0
    printed = capsys.readouterr().out
    for op in ("contrastive_lse", "attention"):
        primary = [name for name, case in CASES[op].items() if tag(case) == "primary"]
        rows = [f"| {op} | {name} | {mode} |" for name in primary for mode in floors.MODES]
        assert rows and all(printed.count(row) == 1 for row in rows)
    assert "patch_embed" not in printed


# -- cases ------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", calls.FOR_CPU)
def test_every_case_of_the_cpu_can_be_asked_for_by_name(op):
    names = list(calls.FOR_CPU[op])
    assert [case.name for case in calls.select(op, ["cpu"])] == names
    assert [case.name for name in names for case in calls.select(op, [name])] == names
    name = next(iter(CASES[op]))
    assert calls.select(op, [name, "cpu"])[0] == CASES[op][name]
    with pytest.raises(ValueError, match="unknown case 'none'"):
        calls.select(op, ["none"])


def test_patches_are_read_by_the_road_that_a_case_names():
    names = ("video_mbs_drop50_b2_rows", "video_mbs_drop0_b2_clip")
    names += ("audio_bbs_drop50_clip", "video_tiny_drop50_clip")
    rows, clip, audio, tiny = calls.select("patch_embed", names)
    assert rows.gathered and make(rows, torch.float32)["patches"].shape == (2, 784, 3072)
    assert clip.kept is None and clip.clip == (32, 224, 224, 3) and clip.patch == (4, 16, 16)
    assert audio.clip == (153600,) and audio.patch == (128,)
    assert tiny.patches == 256
    for case in (rows, audio, tiny):
        inputs = make(dataclasses.replace(case, batch=1), torch.float32)
        found = calls.values(calls.on_backend("patch_embed", ""), "patch_embed", inputs)
        exact = calls.truth("patch_embed", inputs, torch.float32)
        assert max(parity.errors(found, exact).values()) < 1e-5, case.name
    with pytest.raises(ValueError, match="unknown case"):
        calls.select("attention", ["video_bbs_drop50_rows"])


# -- errors and modes -------------------------------------------------------------------------


def test_errors_see_what_is_wrong():
    exact = {"out": torch.tensor([3.0, 4.0, -torch.inf]).double(), "d_q": torch.zeros(2).double()}
    found = {"out": torch.tensor([3.0, 4.5, -torch.inf]), "d_q": torch.tensor([0.0, 0.25])}
    errors = parity.errors(found, exact)
    assert errors == {"out": pytest.approx(0.1), "d_q": 0.25}
    assert calls.worst(errors, "fwd") == (pytest.approx(0.1), "out")
    assert calls.worst(errors, "bwd") == (0.25, "d_q")
    wrong = parity.errors(found | {"out": torch.full((3,), torch.nan)}, exact)
    assert wrong["out"] == float("inf")
    assert "d_q" in calls.red(errors, {"out": 0.1, "d_q": 0.01}, torch.float32)
    assert calls.red({"out": float("nan")}, {"out": 0.1}, torch.float32)


def test_modes_run_what_they_say():
    case = CASES["attention"]["ragged_17"]
    inputs = make(case)
    runs = Counter()

    def function(**options):
        runs["forward"] += 1
        q, k, v = (options[name] for name in "qkv")
        out = torch.einsum("bthd,bshd->bthd", q, k + v)
        if out.requires_grad:
            out.register_hook(lambda grad: runs.update(["backward"]))
        return (out,)

    # fwd+bwd looks at the outputs' shapes first
    for mode, expected in {"fwd": (3, 0), "bwd": (1, 3), "fwd+bwd": (4, 3)}.items():
        runs.clear()
        call = calls.call(function, "attention", inputs, mode)
        for _ in range(3):
            call()
        assert (runs["forward"], runs["backward"]) == expected, mode


class ToldTimes:
    """A clock that knows what each contender takes, in order; None cannot be captured."""

    def __init__(self, *ms):
        self.ms = iter(ms)

    def prepare(self, calls):
        if (ms := next(self.ms)) is None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return lambda i: ms


@pytest.mark.parametrize(
    ("events", "told"),
    [
        # eager cannot be captured: by events it is slower than flash, by graphs nobody knows
        ((2.0, 5.0, 4.0), {"reference": 2.0, "eager": 5.0, "sdpa_flash": 4.0}),
        # it does not run at all: what graphs told of the others stays
        ((2.0, None, 4.0), {"reference": 1.0, "sdpa_flash": 3.0}),
    ],
    ids=["by events", "by graphs"],
)
def test_what_no_graph_captures_is_timed_by_events_and_all_with_it(events, told, monkeypatch):
    clocks = {"cuda_graph": ToldTimes(1.0, None, 3.0), "cuda_events": ToldTimes(*events)}
    here = quick(("reference",), ("eager", "sdpa_flash"), rounds=2, warmup=1)
    here.clock = "cuda_graph"
    monkeypatch.setattr(here, "make_clock", lambda name="": clocks[name or here.clock])
    found, absent = measure_op(here, "attention", CASES["attention"]["ragged_17"], "fp32", ["fwd"])
    assert {line.backend: line.ms_p50 for line in found} == told
    assert [*absent] == [f"{name} fwd" for name in ("eager",) if name not in told]
    (clock,) = {line.clock for line in found}
    assert clock == ("cuda_events" if "eager" in told else "cuda_graph")
    counted = "(launches counted)" in lines.cells(found[0])[4]
    assert counted == (clock == "cuda_events")
    (ours,) = (line for line in found if line.ours)
    peer = told["sdpa_flash"]
    assert (ours.best_peer, ours.best_peer_ms_p50) == ("sdpa_flash", peer)
    assert ours.speedup_over_best_peer == peer / told["reference"]


def test_a_line_holds_what_was_measured():
    here = quick(("reference",), ("eager", "sdpa_flash"), rounds=3)
    case, modes = CASES["attention"]["ragged_17"], ["fwd", "bwd", "fwd+bwd"]
    found, absent = measure_op(here, "attention", case, "fp32", modes)
    assert not absent and len(found) == 9
    for line in found:
        assert line.ms_p20 <= line.ms_p50 <= line.ms_p80
        assert (line.rounds, line.clock) == (3, "perf_counter")
        assert (line.tflops is None) != (line.gb_per_s is None) and line.share_of_ceiling > 0
        assert (line.peak_bytes is None) if line.mode == "bwd" else line.peak_bytes > 0
        assert line.error < 1e-6 and line.versions["torch"] == torch.__version__
        assert (line.speedup_over_best_peer is None) == (line.backend != "reference")
        assert line.backend in lines.describe(line)


@pytest.mark.gpu
@pytest.mark.parametrize("clock", ["cuda_graph", "cuda_events"])
def test_gpu_clocks_agree_with_the_floor(clock):
    device = torch.device("cuda")
    setting = Setting(
        device, clock=clock, rounds=5, peer_names=("eager", "sdpa_flash"), backends=("torch_sdpa",)
    )
    found, absent = measure_op(
        setting, "attention", CASES["attention"]["video_mbs_drop50"], "bf16", ["fwd", "bwd"]
    )
    assert not absent and len(found) == 6
    for line in found:
        assert line.share_of_ceiling < 1.05, f"{line.backend} {line.mode} beats the ceiling: {line}"
        assert line.clock == clock


# -- the gate ---------------------------------------------------------------------------------


def test_the_gate_asks_the_batterys_check(monkeypatch, capsys):
    asked = []

    def check(op, backend, case, dtype, device="cpu"):
        asked.append((op, backend, dtype, device))
        if backend == "torch_sdpa":
            raise AssertionError("out: error 1.00e+00, plain torch 1.00e-07")
        if backend == "native_cpu":
            raise ValueError("attention: backend 'native_cpu' cannot run this: no extension")

    monkeypatch.setattr(setting.parity, "check", check)
    here = quick(("reference", "torch_sdpa", "native_cpu", "triton_gpu"), ())
    setting.gate(here, ["attention"], "bf16")
    cases = sum(tag(case) == "parity" for case in CASES["attention"].values())
    assert asked.count(("attention", "torch_sdpa", torch.bfloat16, "cpu")) == cases
    assert here.green == {("attention", "reference")}
    assert "parity is red: " in here.refused["attention", "torch_sdpa"]
    assert "plain torch 1.00e-07" in capsys.readouterr().out
    assert "no extension" in here.refused["attention", "native_cpu"]
    assert "triton_gpu" not in {backend for _, backend, *_ in asked}  # it would be interpreted
    assert "parity is red: attention torch_sdpa" in here.refusal(["attention"])
    assert "no parity check of drop_token has passed" in here.refusal(["drop_token"])
    asked.clear()
    setting.gate(quick(("auto", "torch_cudnn"), ()), ["attention"], "bf16")  # and who was named
    everyone = {*setting.chosen_among("attention", CPU), "torch_cudnn"}
    assert {name for _, name, *_ in asked} == everyone


def test_a_wrong_kernel_is_red_and_not_timed(monkeypatch):
    wrong = dataclasses.replace(
        OPS["drop_token"], function=lambda tokens, keep: 1.01 * tokens[:, : keep.shape[-1]]
    )
    here = quick(("reference",), ("gather",))
    with monkeypatch.context() as patch:
        patch.setitem(OPS, "drop_token", wrong)
        setting.gate(here, ["drop_token"], "fp32")
    found, absent = measure_op(here, "drop_token", CASES["drop_token"]["ragged"], "fp32", ["fwd"])
    assert [line.backend for line in found] == ["gather"]
    assert "parity is red" in absent["reference"] and here.red


def test_what_is_wrong_at_the_case_is_not_timed(monkeypatch, capsys):
    here, values = quick(("reference",), ("materialised",)), calls.values
    asked = Counter()

    def broken(function, op, inputs, *seeds):
        asked["values"] += 1  # truth and plain come before the backend
        wrong = {"scale": torch.tensor(9.0)} if asked["values"] == 3 else {}
        return values(function, op, inputs | wrong, *seeds)

    monkeypatch.setattr(calls, "values", broken)
    case = CASES["contrastive_lse"]["texts"]
    found, absent = measure_op(here, "contrastive_lse", case, "fp32", ["fwd"])
    assert [line.backend for line in found] == ["materialised"]
    assert "error beyond twice plain torch's" in absent["reference"]
    assert "RED: contrastive_lse reference" in capsys.readouterr().out


# -- lines and the command --------------------------------------------------------------------


def test_lines_survive_a_file(tmp_path):
    path = tmp_path / "new" / "lines.jsonl"
    peer = dataclasses.replace(
        LINE, backend="eager", ours=False, ms_p50=1.0, speedup_over_best_peer=None
    )
    lines.append(path, [LINE])
    lines.append(path, [peer])
    with path.open("a") as file:
        file.write('{"op": "atten')  # a killed run
    assert lines.read(path) == [LINE, peer]
    assert lines.read(tmp_path / "none.jsonl") == []
    table = tables.every_line(tables.current([LINE, peer])).splitlines()
    assert len(table) == 6 and "| eager | 1 " in table[2]
    row = "| 1..3 of 5 | 1.5 TFLOP/s | 25% | 1.0e-03 (out) | 2.0 | 1.25x |"
    assert "| **reference** | 2 " in table[3] and row in table[3]


def test_a_machine_is_told_by_processor_and_instructions():
    xeon, amx = "Intel(R) Xeon(R) Processor, 2 threads", {"instructions": "amx_bf16"}
    assert lines.file_of(xeon, amx).name == "intel_xeon_2_threads_amx_bf16.jsonl"
    assert lines.slug("AMD EPYC, 2 threads", "avx512_bf16") == "amd_epyc_2_threads_avx512_bf16"
    one, other = (dataclasses.replace(LINE, versions={"instructions": each}) for each in "ab")
    assert one.machine != other.machine


def test_what_measuring_writes_makes_no_tree_dirty(tmp_path, monkeypatch):
    def git(*arguments):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    def commit_with(names, text):
        for name in names:
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        machine.commit.cache_clear()
        return machine.commit()

    monkeypatch.setenv("VATT_FAST_COMMIT", "1234567890")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    written = ("bench/results/cpu.jsonl", "bench/figures/a.png", "README.md", "docs/a.md")
    assert commit_with((*written, "kernels/a.py"), "1\n") == "1234567890"  # no checkout
    for arguments in (("init",), ("add", "."), ("commit", "-m", "one")):
        git(*arguments)
    clean = commit_with((), "")
    assert commit_with(written, "2\n") == clean and len(clean) == 10
    assert commit_with(("kernels/a.py",), "2\n") == f"{clean}-dirty"
    machine.commit.cache_clear()


def test_the_command_gates_times_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(__main__, "keep_host_memory", lambda: None)  # of the test process
    out = tmp_path / "lines.jsonl"
    asked = "ops --device cpu --op drop_token --case ragged one_kept --dtype fp32 --seconds 0"
    only = "--backends reference --peers gather"
    assert __main__.main([*asked.split(), *only.split(), "--out", str(out)]) == 0
    found = lines.read(out)
    assert {(line.case, line.mode, line.backend) for line in found} == {
        (case, mode, backend)
        for case in ("ragged", "one_kept")
        for mode in ("fwd", "fwd+bwd")
        for backend in ("reference", "gather")
    }
    assert all(lines.stale(line) is None for line in found)
    printed = capsys.readouterr().out
    assert "x (gather " in printed and "ceilings on" in printed
    again = [*asked.split(), *only.split(), "--resume", "--out", str(out)]
    assert __main__.main(again) == 0 and lines.read(out) == found  # nothing is measured twice
    with pytest.raises(SystemExit):
        __main__.main(["ops", "--op", "drop_token", "--case", "raged"])
    assert "unknown case 'raged'" in capsys.readouterr().err


def test_the_module_is_the_command():
    helped = command("--help")
    assert helped.returncode == 0, helped.stderr
    for name in ("ops", "steps", "scaling", "accuracy", "floors", "compile", "tune", "gpu"):
        assert f"python -m bench {name}" in helped.stdout
