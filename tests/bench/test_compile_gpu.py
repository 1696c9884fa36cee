"""Kernels through the real GPU compilers, no device needed: a part of ``bench compile``."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton", reason="compiling kernels needs triton, which is not installed")
ROOT = Path(__file__).resolve().parents[2]
COUNTS = ROOT / "bench" / "results" / "compile_gpu_sm_90.jsonl"
OTHERS = COUNTS.with_name("compile_gpu.jsonl")

# op, cases, targets: each kernel once for Hopper, the heaviest ones for the tightest targets too,
# and of the variants those whose kernels differ most from the primary cases'
PARTS = {
    "attention": (("video_mbs_drop50", "text_bbs"), ("sm_90",)),
    "attention_elsewhere": (("video_mbs_drop75",), ("sm_80", "gfx942")),
    "attention_variants": (("video_mbs_drop50_mask", "text_bbs_d_lse"), ("sm_90",)),
    "drop_token": (("video_mbs_drop50_per_clip",), ("sm_90",)),
    "contrastive_lse": (("vt_bbs",), ("sm_90", "sm_89")),
    "contrastive_lse_variants": (("vt_bbs_no_bound_masks",), ("sm_90",)),
    "contrastive_lse_tf32": (("va_tiny",), ("sm_90",)),
    "patch_embed": (("video_mbs_drop50", "audio_bbs_drop50"), ("sm_90", "sm_120")),
    "patch_embed_variants": (
        ("audio_bbs_drop50_shifted", "video_mbs_drop50_clip", "video_mbs_drop0_only_projected"),
        ("sm_90",),
    ),
}


@pytest.mark.parametrize("part", PARTS)
def test_kernels_compile_within_the_rules(part, tmp_path):
    cases, targets = PARTS[part]
    op = part.removesuffix("_elsewhere").removesuffix("_variants").removesuffix("_tf32")
    dtype = "tf32" if part.endswith("_tf32") else "bf16"
    rows = compile_part(tmp_path / "rows.jsonl", op, cases, targets, dtype)
    assert {row["target"] for row in rows} == set(targets)
    assert {row["mode"] for row in rows} == {"fwd", "bwd"}
    for row in rows:
        assert not row["faults"], (
            f"{row['kernel']} for {row['target']} ({row['tiles']}): {'; '.join(row['faults'])}"
        )
        assert 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255)
    if not part.endswith("_variants") and "sm_90" in targets:
        assert not moved(rows, committed())


def compile_part(out, op, cases, targets, dtype):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compile", "--op", op]
    command += ["--case", *cases, "--target", *targets, "--dtype", dtype]
    command += ["--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_a_kernel_that_does_not_compile_is_told_after_the_others(monkeypatch, capsys):
    from bench import compile, compile_gpu

    def broken_at_one(op, case, dtype, target, **options):
        if case == "va_tiny":
            raise RuntimeError("at 41:12:") from TypeError("no such instruction")
        return []

    monkeypatch.setattr(compile_gpu, "compile_case", broken_at_one)
    what = (["sm_90"], ["contrastive_lse"], ["va_tiny", "vt_tiny"], ["bf16"], None)
    status = compile.compile_targets(*what)
    told, errors = capsys.readouterr()
    assert status == 1 and "vt_tiny bf16 sm_90: 0 rows" in errors
    assert "not compile: contrastive_lse va_tiny bf16 sm_90: TypeError: no such" in told


# -- committed counts -------------------------------------------------------------------------


def committed():
    return [json.loads(line) for line in COUNTS.read_text().splitlines()]


def moved(rows, known):
    """Rows that are none of the committed ones, made by the same compilers for sm_90."""
    versions = {row["versions"] for row in known}
    # cases and dtypes that meet the same code are one row
    known = [row | {"case": "", "dtype": ""} for row in known]
    ours = (row for row in rows if row["target"] == "sm_90" and row["versions"] in versions)
    return [row for row in ours if row | {"case": "", "dtype": ""} not in known]


def test_a_count_that_moves_is_told():
    known = committed()
    row = next(each for each in known if each["loop"])
    other = row | {"loop": row["loop"] | {"waits": row["loop"]["waits"] + 1}}
    more = row | {"registers": row["registers"] + 1}
    assert moved([row | {"case": "another"}, other, more], known) == [other, more]
    assert not moved([more | {"versions": "of another compiler"}], known)


def test_committed_counts_are_of_what_a_step_meets_and_have_no_fault():
    from bench.compile import in_a_step
    from vatt_fast.kernels.cases import CASES, tag

    everywhere = [json.loads(line) for line in OTHERS.read_text().splitlines()]
    for known in (committed(), everywhere):
        assert {(row["op"], row["dtype"]) for row in known} >= {
            *((op, "bf16") for op in CASES),
            *((op, "fp32") for op in CASES),
            *((op, dtype) for op in CASES if op != "drop_token" for dtype in ("fp16", "tf32")),
        }
        for row in known:
            case = CASES[row["op"]][row["case"]]
            assert tag(case) == "primary" if row["dtype"] == "bf16" else in_a_step(case)
            assert not row["faults"], row
    assert {row["target"] for row in everywhere} == {"sm_80", "sm_89", "sm_100", "sm_120", "gfx942"}
    assert {row["target"] for row in committed()} == {"sm_90"}


def test_the_page_tells_what_the_rows_say():
    from bench import compile

    page = (COUNTS.parent / "compile_gpu.md").read_text()
    told = compile.read([OTHERS, COUNTS])
    for table in told.split("\n\n")[:2]:
        assert table in page


def test_model_takes_what_a_training_step_reaches():
    """fp32 attention is torch's; but a trainable bias has a gradient in Triton alone."""
    told = script("""
from bench import compile, compile_gpu
compile.in_a_step = lambda case: case.name in ("video_tiny_drop50", "text_tiny")
named = "video_tiny_drop0"
for op, name in (("attention", named), ("attention", "model"), ("drop_token", "model")):
    chosen = compile._chosen([op], [name], ["bf16", "tf32"], compile_gpu)
    print(", ".join(f"{case} {dtype}" for _, case, dtype in chosen))
""").splitlines()
    assert told == [
        "video_tiny_drop0 bf16, video_tiny_drop0 tf32",
        "video_tiny_drop50 bf16, text_tiny bf16, text_tiny tf32",
        "video_tiny_drop50 bf16, video_tiny_drop50 tf32",
    ]


# -- rules ------------------------------------------------------------------------------------


def loop(**changes):
    counts = dict(looped=1, spills=0, copies_ahead=2, loaded_bytes=64, narrow_bytes=8)
    return counts | changes


@pytest.mark.parametrize(
    ("changes", "rows", "fault"),
    [
        ({}, 64, None),
        (dict(matrix="HMMA"), 64, "no HGMMA for matmul tiles of [64] rows"),
        (dict(matrix="HMMA"), 32, None),
        (dict(matrix=""), 32, "no HMMA"),
        (dict(matrix=""), None, None),  # no matmul
        (dict(matrix="", dtype="fp32"), 64, None),
        (dict(spills=3), None, "3 spills"),
        (dict(spills=3, mode="bwd"), None, None),
        (dict(shared_bytes=240_000), None, "240000 bytes of shared memory, the limit is 232448"),
        (dict(shared_bytes=240_000, dtype="fp32"), None, "the limit is"),
        (dict(serialised="C7515"), 64, "wait for one another (C7515)"),
        (dict(serialised="C7515", dtype="fp32"), 64, None),
        (dict(loop=loop()), 64, None),
        (dict(loop=loop(spills=2), mode="bwd"), 64, "2 spills in the loop"),
        (dict(loop=loop(spills=2), mode="bwd", dtype="fp32"), 64, "2 spills in the loop"),
        (dict(loop=loop(spills=2, looped=0), mode="bwd"), 64, None),
        (dict(loop=loop(copies_ahead=0)), 64, "no copy in flight in spite of 3 stages"),
        (dict(loop=loop(copies_ahead=None)), 64, None),  # nothing is copied
        (dict(loop=loop(narrow_bytes=40)), 64, "loads 40 of 64 bytes by less than 16"),
        (dict(loop=loop(narrow_bytes=40), case="a variant"), 64, None),
        (dict(loop=loop(), programs=3), 64, "12 warps a multiprocessor, 16 are planned"),
        (dict(loop=loop(), programs=3, target="sm_100", matrix="UTCHMMA"), 64, None),
    ],
)
def test_what_breaks_a_rule_is_named(changes, rows, fault):
    fields = dict(op="attention", case="video_mbs_drop50", dtype="bf16", mode="fwd")
    fields |= dict(kernel="_forward_kernel", target="sm_90", programs=4)
    fields |= dict(tiles="", registers=99, stack_bytes=0, spills=0, shared_bytes=1000)
    fields |= dict(matrix="HGMMA", faults=[])
    from bench import compile_gpu  # imports triton

    dot = f"tt.dot %a, %b, %c : tensor<{rows}x64xbf16> -> tensor<{rows}x128xf32>"
    ttir = dot if rows else "tt.reduce"
    metadata = SimpleNamespace(num_warps=4, num_stages=3)
    kernel = SimpleNamespace(asm={"ttir": ttir}, metadata=metadata)
    faults = compile_gpu._faults(compile_gpu.Row(**fields | changes), kernel)
    assert [fault in found for found in faults] == ([True] if fault else [])


# -- reading machine code ---------------------------------------------------------------------

LISTING = """
        /*0000*/                   LDG.E R2, desc[UR4][R2.64] ;        /* 0x0000 */
        /*0010*/                   MUFU.EX2 R3, R3 ;
        /*0020*/                   LDGSTS.E.BYPASS.128 [R5], desc[UR4][R6.64] ;
        /*0030*/                   DEPBAR.LE SB0, 0x2 ?WAIT4_END_GROUP ;
        /*0040*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0060*/                   HGMMA.64x64x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0 ;
        /*0070*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0080*/                   LDL R9, [R1] ;
        /*0090*/              @!P0 MUFU.EX2 R3, R3 ;
        /*00a0*/                   LDS R3, [R4] ;
        /*00b0*/               @P0 BRA 0x20 ;
        /*00c0*/                   HGMMA.64x8x16.F32.BF16 R24, R12, gdesc[UR8], R24, gsb0 ;
        /*00d0*/              @!P1 BRA P2, `(.L_x_1) ;
        /*00e0*/               @P1 BRA 0x00 ;
        /*00f0*/                   BRA 0xf0 ;
"""


def test_the_innermost_loop_with_most_products_is_counted():
    from bench import sass

    code = sass._instructions(LISTING)
    assert len(code) == 16 and code[9] == (0x90, "MUFU.EX2 R3, R3")
    counted = sass._main_loop(code, warps=8)
    assert counted == dict(
        looped=1,
        instructions=10,  # 0x20 to 0xb0: not the loop around it
        products=2,
        waits=1,
        barriers=1,
        copies_ahead=2,
        exponentials=1,
        atomics=0,
        spills=1,
        loaded_bytes=16,
        narrow_bytes=0,
        shared_accesses=1,
        # B of two products, A of one, twice; 16 and 4 bytes of 256 threads
        shared_clocks=(2 * (64 * 16 * 2 * 3) + 16 * 256 + 4 * 256) // 128,
        tensor_clocks=2 * 64 // 2 * 2,
    )
    fused = sass._main_loop([*code, (0x100, "FFMA R1, R2, R3, R1")], 8, ("FFMA",))
    assert fused["products"] == 1 and not fused["looped"]
    unrolled = [each for each in code if "BRA" not in each[1]]
    assert sass._main_loop(unrolled, warps=8)["looped"] == 0
    assert sass._main_loop(unrolled, warps=8)["products"] == 3
    assert sass._main_loop([(0, "FADD R1, R2, R3")], warps=8) is None


def test_a_multiprocessor_holds_what_registers_shared_memory_and_warps_allow():
    from bench import sass

    hopper = sass.LIMITS[90]
    assert sass._programs(hopper, registers=108, shared_bytes=32 << 10, warps=8) == 2
    assert sass._programs(hopper, registers=146, shared_bytes=32 << 10, warps=8) == 1
    assert sass._programs(hopper, registers=32, shared_bytes=110 << 10, warps=4) == 2
    assert sass._programs(hopper, registers=16, shared_bytes=0, warps=16) == 4


# -- what is compiled -------------------------------------------------------------------------


def script(text):
    """Run in a process that compiles instead of interpreting."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", text]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_variants_reach_what_the_primary_cases_do_not():
    """Flags that training and the ops' own arguments set, of all variants' launches together."""
    told = script("""
import collections, dataclasses
from bench import compile_gpu as c
def few_clips(case, *args):  # drawing the inputs of all would take a minute
    contrastive = hasattr(case, "clips")
    return make(case if contrastive else dataclasses.replace(case, batch=1), *args)
make, c.make = c.make, few_clips
found = collections.defaultdict(set)
def launch(self, *args, grid, warmup, **kwargs):
    for name, value in kwargs.items():
        found[f"{self.fn.__module__.split('.')[2]}.{self.fn.__name__} {name}"].add(str(value))
for op in c.VARIANTS:
    for each in c.VARIANTS[op]:
        inputs = c.meta_inputs(op, each.case.name, each.dtypes[0])
        for mode, call in c.launches(op, inputs, c.DTYPES[each.dtypes[0]], d_lse=each.d_lse):
            with c.compiling_for("sm_90"):
                c.JITFunction.run = launch
                call()
for name in sorted(found):
    print(name, " ".join(sorted(found[name])))
""")
    words = [line.split() for line in told.splitlines()]
    flags = {f"{kernel} {name}": set(values) for kernel, name, *values in words}
    wanted = {
        "attention._backward_bias_kernel HAS_MASK": {"False", "True"},
        "attention._backward_keys_kernel HAS_BIAS": {"False", "True"},
        "attention._backward_queries_kernel HAS_MASK": {"False", "True"},
        "attention._statistics_kernel HAS_D_LSE": {"False", "True"},
        "attention._backward_kernel HAS_D_LSE": {"False", "True"},
        "attention._forward_kernel HEAD_DIM": {"16", "32", "64", "80", "128"},
        "contrastive_lse._forward_kernel RUNNING": {"False", "True"},
        "contrastive_lse._weights_kernel RUNNING": {"False", "True"},
        "patch_embed._forward_kernel FOLD": {"False", "True"},
        "patch_embed._forward_kernel SUM": {"False", "True"},
        "patch_embed._forward_kernel GATHERED": {"False", "True"},
        "patch_embed._forward_kernel POSITION": {"False", "True"},
        "patch_embed._forward_kernel AGG": {"0", "1"},
        "patch_embed._forward_kernel CLIP": {"False", "True"},
        "patch_embed._pack_kernel PADDED": {"False", "True"},
    }
    assert {name: flags[name] for name in wanted} == wanted


def test_a_tuner_refuses_code_whose_products_wait_or_that_spills():
    told = script("""
from bench.compile_gpu import refusal
def of(case, rows, columns, warps, **more):
    tiles = dict(BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=2, **more)
    return refusal("attention", case, "bf16", "sm_90", "fwd", {"attention_forward": tiles})
print(of("video_mbs_drop50", 128, 128, 4))
print(of("video_mbs_drop50", 128, 64, 8, maxnreg=80))
print(of("text_bbs", 32, 32, 1))
print(of("text_bbs", 32, 32, 2, maxnreg=16), flush=True)
""").splitlines()
    assert "_forward_kernel" in told[0] and "wait for one another" in told[0]
    assert " spills" in told[1] and not told[1].startswith("_forward_kernel: 0 ")
    assert told[2] == "None"
    assert told[-1].startswith("PTXASError")  # Triton prints the program before it


def test_what_a_gpu_run_times_is_compiled_first_in_other_processes(tmp_path):
    told = script(f"""
import pathlib, torch
from bench import gpu, tune
tune.arch = lambda: "sm_90"
gpu._WAYS = {{}}
gpu._TIMED = dict.fromkeys(gpu.OPS, ()) | dict(drop_token=("video_tiny_drop50", "no_such_case"))
gpu.Run.cases = lambda run, op: [gpu.CASES[op].get(name, "?") for name in gpu._TIMED[op]]
run = gpu.Run(pathlib.Path({str(tmp_path)!r}), torch.device("cpu"), False)
gpu.CASES["drop_token"]["no_such_case"] = gpu.dataclasses.replace(
    gpu.CASES["drop_token"]["one_of_one"], name="no_such_case")
print(gpu._compile(run))
print(sorted(each["kernel"] for each in run.records("compile")))
""").splitlines()
    assert told[-2].startswith("[('drop_token no_such_case', \"KeyError: ")
    assert "_kernel" in told[-1]


def test_peers_are_compiled_beside_ours():
    told = script("""
from bench.compile_gpu import compile_case, schedule
rows = compile_case("attention", "video_mbs_drop50", "bf16", "sm_90", peers=True, modes=())
rows += compile_case("contrastive_lse", "va_bbs", "bf16", "sm_90", peers=True, modes=())
assert not compile_case("attention", "text_bbs", "bf16", "sm_90", peers=True, modes=())
assert not any(row.faults for row in rows)
print(schedule(rows))
""").splitlines()
    tutorial, plain, *_ = told[2:]
    assert tutorial.startswith("| attention.fused_attention | peer | video_mbs_drop50 | sm_90 |")
    assert "| 128x64 | 8 / 3 |" in tutorial
    assert plain.startswith("| contrastive_lse.row_log_sums |")


def test_peers_compute_what_the_ops_do():
    """Interpreted: what is compiled beside ours is the same function."""
    import torch

    from bench import peer_kernels
    from vatt_fast.kernels import attention, contrastive_lse, use_backend
    from vatt_fast.kernels.cases import AttentionCase, NCECase, make

    case = AttentionCase("peers", 2, 150, 131, 2, 64, packed=False)
    inputs = make(case, torch.float32)
    with use_backend("reference"):
        expected = attention(**inputs)
    out, lse = peer_kernels.attention(**inputs)
    torch.testing.assert_close(out, expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected[1], rtol=1e-4, atol=1e-4)
    inputs = make(NCECase("peers", 150, 150, 1, 128), torch.float32)
    with use_backend("reference"):
        row, col, _ = contrastive_lse(**inputs)
    found = peer_kernels.contrastive_lse(**inputs)
    torch.testing.assert_close(found[0], row, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found[1], col, rtol=1e-4, atol=1e-4)
