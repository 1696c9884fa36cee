"""Reading libtpu's schedules: loops, trips, rows of the matrix unit."""

import json
import subprocess
import sys

import pytest

from bench import tpu_schedule
from bench.machine import ROOT

# as libtpu writes them, shortened: a grid of 6 steps, in each a loop of 3 turns
SCHEDULE = """= control target key start
LB: loop body
= control target key end

     0   :  { %s1_s0 = inlined_call_operand.hbm [shape: bf16[8,16]] /* two
lines: 1 */ }
   0x1 LB: > { %s2_s1 = sphi %s1_s0, %s3_s1 /* iteration index, stage = 0 */ } /* Start region 9 */
   0x2   : > { %5 = vmatmul.bf16.gmra.mxu0 %v1_v0  ;;  %6 = vmatmul.f32.gmra.mxu1 %v1_v0 }
   0x3 LB: >> { %7 = vmatmul.lmr.bf16.gmra.8.mxu2 %v1_v0 } /* Start region 4 :: Start region 5 */
   0x4   : >> { %p10_p3 = scmp.ge.s32.totalorder %s9_s2, 3 /* loop exit test */ }
   0x5   : > { %12 = sbr.rel (!%p10_p3) target = $region4 }
   0x6   : >> {}
   0x7   : >> {}
   0x8   : >> {}
   0x9   : >> {} /* End region 4 */
   0xa PF: > { %p20_p4 = scmp.ge.s32.totalorder (%p10_p3), %s3_s1, 8 /* exit */ } /* End region 9 */
   0xb   : > { %13 = sbr.rel (!%p20_p4) target = $region9 }
   0xc   : > {}
   0xd   : > {}
   0xe   : > {}
   0xf   : > {}
  0x10   :  { %14 = vsyncpa [#allocation3], 1 }
"""


def test_a_schedule_is_counted_loop_by_loop():
    read = tpu_schedule.read(SCHEDULE)
    assert str(read) == "2 + 6 x (8 + 3 x 7)"
    assert read.once() == 17
    # one 16-row product and one of 8 fp32 rows, and one of 8 rows in the inner loop
    assert read.cycles() == (2 + 6 * (8 + 3 * 7), 6 * (4 + 2 + 3 * 2))
    assert read.cycles().floor == 176


def test_a_count_of_turns_known_at_run_time_is_said_so():
    unknown = SCHEDULE.replace("%s9_s2, 3 /*", "%s9_s2, %s8_s1 /*")
    assert str(tpu_schedule.read(unknown)) == "2 + 6 x (8 + ? x 7)"


def test_rows_that_stream_bound_what_bundles_do_not():
    crowded = SCHEDULE.replace("{}", "{ %1 = vmatmul.mubr.bf16.gmra.mxu0  ;;  %2 = vmatmul.bf16 }")
    bundles, rows = tpu_schedule.read(crowded).cycles()
    assert rows > bundles and tpu_schedule.read(crowded).cycles().floor == rows


def test_committed_peers_are_what_the_compiler_makes(tmp_path):
    """The smallest case again, ours and flash: where versions agree, so do the cycles."""
    pytest.importorskip("libtpu", reason="compiling for a TPU needs libtpu, which is not installed")
    out = tmp_path / "rows.jsonl"
    command = "compile --target v5e --op attention --case audio_tiny_drop75 --dtype bf16 --alone"
    command += f" --schedule --peers flash --out {out}"
    done = subprocess.run(
        [sys.executable, "-m", "bench", *command.split()], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    made = {row["peer"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert set(made) == {"", "flash"}
    ours, flash = (sum(row["cycles"].values()) for row in made.values())
    assert 0 < ours < flash
    path = ROOT / "bench" / "results" / "compile_tpu_peers.jsonl"
    kept = [json.loads(line) for line in path.read_text().splitlines()]
    for row in made.values():
        keys = ("peer", "case", "dtype", "topology")
        (known,) = (each for each in kept if all(each[key] == row[key] for key in keys))
        if known["versions"] == row["versions"]:
            assert known["cycles"] == row["cycles"]
