"""Kernels through the real TPU compiler, no device needed: a part of ``bench compile``."""

import json

import pytest

pytest.importorskip("jax", reason="compiling for a TPU needs jax, which is not installed")
pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu, which is not installed")

import jax
import jax.numpy as jnp

from bench import __main__, compile_tpu, lines
from bench.compile import in_a_step
from bench.compile_tpu import Row, compile_case, distinct, is_of
from bench.machine import TPUS
from vatt_fast.kernels import dispatch, settings
from vatt_fast.kernels.attention import pallas_tpu as attention
from vatt_fast.kernels.cases import CASES, AttentionCase

# (op, dtype): case, chip; each kernel once in each dtype, each chip at least once
PARTS = {
    ("attention", "bf16"): ("audio_bbs_drop50", "v5e"),
    ("attention", "fp32"): ("text_bbs", "v4"),
    ("drop_token", "bf16"): ("audio_bbs_drop50_per_clip", "v5p"),
    ("drop_token", "fp32"): ("video_tiny_drop50", "v6e"),
    ("contrastive_lse", "bf16"): ("vt_bbs", "v6e"),
    ("contrastive_lse", "fp32"): ("va_tiny", "tpu7x"),
    ("patch_embed", "bf16"): ("video_mbs_drop50", "tpu7x"),
    ("patch_embed", "fp32"): ("audio_bbs_drop50", "v5e"),
}
COUNTS = ("kernels", "code_bytes", "temp_bytes", "vmem_bytes", "copies", "faults")


def committed():
    path = lines.RESULTS / "compile_tpu.jsonl"
    return [Row(**json.loads(text)) for text in path.read_text().splitlines()]


@pytest.mark.parametrize(("op", "dtype"), PARTS)
def test_kernels_compile_within_the_rules_and_as_committed(op, dtype):
    case, chip = PARTS[op, dtype]
    (row,) = compile_case(op, case, dtype, chip, alone=dtype == "fp32")
    assert not row.faults and any(name.startswith(f"vatt_{op}") for name in row.kernels), row
    assert row.code_bytes > 0 and 0 < row.vmem_bytes <= 16 << 20, row
    (known,) = (each for each in committed() if is_of(each, op, case, dtype, chip, row.alone))
    if known.versions == row.versions:  # what another compiler makes is another thing
        assert [getattr(known, name) for name in COUNTS] == [getattr(row, name) for name in COUNTS]


def test_what_a_step_meets_is_committed_for_every_chip_without_a_fault():
    rows = committed()
    found = {(row.op, row.case, row.dtype, row.topology) for row in rows if not row.faults}
    assert len(rows) == len(distinct(rows, []))
    wanted = [(op, name) for op in CASES for name in CASES[op] if in_a_step(CASES[op][name])]
    every = {(*what, dtype, chip) for what in wanted for dtype in ("bf16", "fp32") for chip in TPUS}
    assert len(wanted) == 40 and every <= found


# beyond the presets' own: the longest bias beside its gradient, wide heads, a mask's column
LARGE = {
    "long_bias": AttentionCase("long_bias", 8, 512, 512, 12, 64, bias=True),
    "wide_masked": AttentionCase("wide_masked", 4, 1280, 1280, 4, 128, num_keys=(1280, 77)),
}


@pytest.mark.parametrize("name", LARGE)
def test_what_attention_takes_fits_the_smallest_vmem(name, monkeypatch):
    monkeypatch.setitem(CASES["attention"], name, LARGE[name])
    (row,) = compile_case("attention", name, "bf16", "v4", alone=True)
    assert not row.faults and 0 < row.vmem_bytes <= 16 << 20, row


def test_what_a_kernel_refuses_is_a_fault_and_never_the_reference(monkeypatch):
    monkeypatch.setattr(attention, "_BIAS_SIDE", 8)
    (row,) = compile_case("attention", "text_bbs", "bf16", "v5e")
    assert not row.kernels and "a bias of 17 x 17 does not fit" in row.faults[0]


@pytest.mark.parametrize(("queries", "stays"), [(17, "reference"), (785, "pallas_tpu")])
def test_the_table_chooses_for_what_is_compiled(queries, stays):
    q = jax.ShapeDtypeStruct((2, 8, queries, 64), jnp.bfloat16)
    with settings.lowering_for("tpu"):
        verdicts = dispatch.explain("attention", q, q, q, scale=0.125)
    assert verdicts[stays] == "preferred (fwd, bwd)"


def test_rows_are_read_as_a_table_and_not_made_twice(capsys, monkeypatch):
    rows = lines.RESULTS / "compile_tpu.jsonl"
    assert __main__.main(["compile", "--read", str(rows)]) == 0
    table = capsys.readouterr().out.strip()
    assert "| attention | bf16 | v5e | 7/7 |" in table
    assert rows.with_suffix(".md").read_text().endswith(f"\n\n{table}\n")
    monkeypatch.setattr(compile_tpu, "compile_case", lambda *what, **_: pytest.fail(str(what)))
    asked = f"compile --target v4 v5e --case model --alone --resume --out {rows}"
    assert __main__.main(asked.split()) == 0
    assert "0 rows compiled for v4, v5e" in capsys.readouterr().out
