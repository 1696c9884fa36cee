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

# op, cases, targets: each kernel once for Hopper, the heaviest ones for the tightest targets too
PARTS = {
    "attention": (("video_mbs_drop50", "text_bbs"), ("sm_90",)),
    "attention_elsewhere": (("video_mbs_drop75",), ("sm_80", "gfx942")),
    "drop_token": (("video_mbs_drop50_per_clip",), ("sm_90",)),
    "contrastive_lse": (("vt_bbs",), ("sm_90", "sm_89")),
    "patch_embed": (("video_mbs_drop50", "audio_bbs_drop50"), ("sm_90", "sm_120")),
}


@pytest.mark.parametrize("part", PARTS)
def test_kernels_compile_within_the_rules(part, tmp_path):
    cases, targets = PARTS[part]
    op = part.removesuffix("_elsewhere")
    rows = compile_part(tmp_path / "rows.jsonl", op, cases, targets)
    assert {row["target"] for row in rows} == set(targets)
    assert {row["mode"] for row in rows} == {"fwd", "bwd"}
    for row in rows:
        assert not row["faults"], (
            f"{row['kernel']} for {row['target']} ({row['tiles']}): {'; '.join(row['faults'])}"
        )
        assert 0 < row["registers"] <= (512 if row["target"] == "gfx942" else 255)


def compile_part(out, op, cases, targets):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "bench", "compile", "--op", op, "--dtype", "bf16"]
    command += ["--case", *cases, "--target", *targets]
    command += ["--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads(line) for line in out.read_text().splitlines()]


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
    ],
)
def test_what_breaks_a_rule_is_named(changes, rows, fault):
    fields = dict(op="attention", case="c", dtype="bf16", mode="fwd", kernel="k", target="sm_90")
    fields |= dict(tiles="", registers=99, stack_bytes=0, spills=0, shared_bytes=1000)
    fields |= dict(matrix="HGMMA", faults=[])
    from bench import compile_gpu  # imports triton

    dot = f"tt.dot %a, %b, %c : tensor<{rows}x64xbf16> -> tensor<{rows}x128xf32>"
    ttir = dot if rows else "tt.reduce"
    kernel = SimpleNamespace(asm={"ttir": ttir}, metadata=SimpleNamespace(num_warps=4))
    faults = compile_gpu._faults(compile_gpu.Row(**fields | changes), kernel)
    assert [fault in found for found in faults] == ([True] if fault else [])
