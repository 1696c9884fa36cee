"""The report says what the lines say: figures, marked tables and commands."""

import dataclasses
import json
import re
import shlex
import sys

import pytest
from bench_lines import LINE

from bench import __main__, calls, lines, report, steps, sweeps
from bench.report import Report, figures, tables

DEVICE = "A Processor @ 2.10GHz, 2 threads"
VERSIONS = {"torch": "2.13.0"}
AMX = dict(dtype="bf16", versions=VERSIONS | {"instructions": "amx_bf16"})
CHANGED = "the sources that it ran have changed"


@pytest.fixture(autouse=True)
def stale_by_commit(monkeypatch):
    monkeypatch.setattr(lines, "stale", lambda line: CHANGED if line.commit == "old" else None)


# -- lines ------------------------------------------------------------------------------------


def line(op="attention", case="video_bbs_drop50_b1", mode="fwd", backend="auto", ms=2.0, **others):
    values = dict(op=op, case=case, dtype="fp32", mode=mode, backend=backend)
    values |= dict(ours=backend.startswith(("auto", "native_cpu")), commit="new", device=DEVICE)
    values |= dict(ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, versions=VERSIONS)
    values |= dict(tflops=0.05, share_of_ceiling=0.5, speedup_over_best_peer=None)
    return dataclasses.replace(LINE, **values | others)


def ops():
    compared = dict(speedup_over_best_peer=1.37, best_peer="eager", best_peer_ms_p50=2.741)
    memory = dict(tflops=None, gb_per_s=6.5)
    return [
        line(ms=2.0013, **compared),
        line(backend="eager", ms=2.741),
        line(mode="fwd+bwd", ms=7.1234),  # its peer failed
        line("contrastive_lse", "vt_bbs", backend="materialised", ms=11.33, commit="old"),
        line("contrastive_lse", "vt_bbs", backend="native_cpu", ms=10.21, **memory),
        line("drop_token", "video_mbs_drop50", backend="gather"),  # none of ours
    ]


def sweep(op="attention", variable="tokens", sizes=(99, 393), names=("auto", "eager"), **others):
    scale = {"fwd": 1, "fwd+bwd": 3.3}
    return [
        line(op, f"scaling_{variable}_{x}", mode, name, scale[mode] * (1 + i) * x, **others)
        for mode in scale
        for i, name in enumerate(names)
        for x in sizes
    ]


def whole_steps(configuration="mbs_32x224x224", names=("auto", "plain", "third"), **others):
    def one(mode, i, name, p):
        ms = (1 + i) * (4017 - 41 * p)
        told = dict(drop_rate=p / 100, speedup_over_best_peer=None if i else 1.53)
        return line("step", f"{configuration}_drop{p}_b1", mode, name, ms, **told | others)

    return [
        one(mode, i, name, p)
        for mode in ("fwd+bwd", "fwd")
        for i, name in enumerate(names)
        for p in (75, 50, 25, 0)
        if (name, p) != ("third", 0)  # it did not fit
    ]


def told(table, measured, runs=()):
    """What stands in a page under a marker."""
    page = report.fill(f"<!-- table: {table} -->\n<!-- end -->\n", Report.of(measured, runs))
    head, tail = f"<!-- table: {table} -->\n\n", "\n\n<!-- end -->\n"
    assert page.startswith(head) and page.endswith(tail)
    return page.removeprefix(head).removesuffix(tail)


# -- the command ------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_command_makes_tables_and_figures_and_nothing_else(tmp_path, capsys):
    lines.append(tmp_path / "results" / "machine.jsonl", [*ops(), *sweep(), *whole_steps()])
    (tmp_path / "results" / "compile_gpu.jsonl").write_text('{"another": "record"}\n')
    run = sweeps.Run(0.5, 0, 1000, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 9.1, DEVICE, {}, "new", "today")
    (tmp_path / "results" / "accuracy.jsonl").write_text(json.dumps(run.__dict__) + "\n")
    page = tmp_path / "README.md"
    page.write_text(
        "# Title\n\n<!-- table: steps -->\nold\n<!-- end -->\n\nand\n\n"
        "<!-- table: accuracy -->\n<!-- end -->\ntail\n"
    )
    options = ["--results", tmp_path / "results", "--out", tmp_path / "out", "--pages", page]
    command = ["report", *map(str, options)]
    before = contents(tmp_path)
    assert __main__.main([*command, "--check"]) == 1 and contents(tmp_path) == before
    assert "+| configuration | drop rate | 75 % | 50 % | 25 % | 0 % |" in capsys.readouterr().out
    assert __main__.main(command) == 0
    text = page.read_text()
    assert text.startswith(f"# Title\n\n<!-- table: steps -->\n\n{DEVICE}:")
    middle = "\n    python -m bench steps && make report\n\n<!-- end -->\n\nand\n\n<!-- table: acc"
    assert middle in text and "| 2.0 |" in text and "old" not in text
    assert text.endswith("    python -m bench accuracy && make report\n\n<!-- end -->\ntail\n")
    drawn = sorted((tmp_path / "out").iterdir())
    assert [path.name for path in drawn] == [
        f"{lines.slug(DEVICE)}_{what}.png"
        for what in ("mbs_32x224x224_fp32_b1_time", "scaling_attention_tokens_fp32")
    ]
    assert sorted(capsys.readouterr().out.split()) == [str(path) for path in drawn]
    after = contents(tmp_path)
    assert __main__.main([*command, "--check"]) == 0
    assert __main__.main(command) == 0 and contents(tmp_path) == after


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<!-- table: nothing -->\n<!-- end -->", "'nothing'; there are readme"),
        ("<!-- table: ops -->\n", "'ops' has no"),
        ("<!-- table: ops -->\n<!-- table: steps -->\n<!-- end -->", "'ops' has no"),
    ],
)
def test_a_wrong_marker_is_an_error(text, problem, tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(SystemExit):
        __main__.main(["report", "--results", str(tmp_path), "--pages", str(page)])
    assert problem in capsys.readouterr().err and page.read_text() == text


# -- figures ----------------------------------------------------------------------------------


def test_a_curve_is_a_backend_and_the_floor_a_bound():
    shown = tables.current(sweep())
    *curves, floor = figures._times([each for each in shown if each.line.mode == "fwd"])
    kinds = {"auto": "ours", "eager": "peer"}
    assert {curve.name: curve.kind for curve in curves} == kinds and floor.kind == "bound"
    ms = shown[1].line.ms_p50
    assert curves[0].points[1] == (393, ms, 0.9 * ms, 1.1 * ms, False)
    assert floor.points[1][:2] == (393, pytest.approx(0.5 * shown[3].line.ms_p50))
    # no logarithm of nothing
    assert not figures._peaks([tables.Shown(line(case="scaling_tokens_99", peak_bytes=None))])


@pytest.mark.parametrize(
    "few",
    [
        sweep(sizes=(785,), names=("auto",)),
        sweep("patch_embed", "pixels", (1605632,), peak_bytes=None, share_of_ceiling=None),
        [*whole_steps(names=("auto",))[:1], *whole_steps("small", names=("plain",))],
    ],
    ids=["one point", "no memory and no floor", "one drop rate, and none of ours"],
)
def test_figures_of_few_lines(tmp_path, few):
    found = Report.of(few, ())
    drawn = [*figures.scaling(found.scaling, tmp_path), *figures.steps(found.steps, tmp_path)]
    assert drawn and sorted(drawn) == sorted(tmp_path.iterdir())


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"vatt_fast\[eval\]"):
        next(figures.scaling(tables.current(sweep()), tmp_path))


# -- which lines ------------------------------------------------------------------------------


def test_a_fresh_line_wins_and_the_last_of_several():
    old, first, last = line(ms=1.0, commit="old"), line(ms=2.0), line(ms=3.0)
    other = line(ms=9.0, device="NVIDIA H200")
    assert tables.current([first, other, last, old]) == [tables.Shown(last), tables.Shown(other)]
    assert tables.current([old, first]) == [tables.Shown(first)]
    assert tables.current([line(ms=5.0, commit="old"), old]) == [tables.Shown(old, CHANGED)]


def test_steps_of_one_configuration_are_one_group():
    (group,) = tables.step_groups(tables.current(whole_steps()))
    assert group.title == "mbs_32x224x224, fp32, batch 1"
    assert len(group.shown) == 22  # of 24: one contender did not fit twice
    with pytest.raises(ValueError, match="a step's case is 'mbs'"):
        tables.step_groups([tables.Shown(line("step", "mbs"))])


def test_shares_are_of_the_highest_ceiling_of_a_device():
    copied = dict(tflops=None, gb_per_s=6.0)  # whose bytes have no dtype
    measured = [
        line(share_of_ceiling=0.5),
        line(share_of_ceiling=0.25),  # in a faster moment
        line(share_of_ceiling=0.1, dtype="bf16"),
        line(share_of_ceiling=0.5, **copied),
        line(share_of_ceiling=0.3, dtype="bf16", **copied),
        line(share_of_ceiling=0.01, device="another"),
        line(tflops=None, share_of_ceiling=None),
    ]
    assert [each.share_of_ceiling for each in tables.of_one_ceiling(measured)] == pytest.approx(
        [0.25, 0.25, 0.1, 0.3, 0.3, 0.01, None]
    )


# -- tables -----------------------------------------------------------------------------------


def test_nothing_measured_is_said():
    assert told("ops", []).startswith("No lines exist yet.")
    assert told("accuracy", []).startswith("No runs exist yet.")
    assert told("readme", []) == "No fresh lines exist yet."


def test_the_table_of_steps_compares_ours_with_the_best_peer():
    text = told(
        "steps", [*whole_steps(names=("auto",)), *whole_steps(names=("plain",), commit="old")]
    )
    row = "| mbs_32x224x224, fp32, batch 1 | GFLOPs of a clip, forward, as timed (published) |"
    assert re.search(rf"{re.escape(row)} [\d.]+ \(188.1\) \|", text)
    assert "| training step, ms | **auto 942**, plain 942 †, 1.53x |" in text
    assert f"† stale: {CHANGED}." in text


def test_what_another_device_tells_afresh_leaves_the_table():
    old = dict(device="once measured", commit="old")
    stale = [*whole_steps(**old), *whole_steps("tiny", **old)]
    assert told("steps", stale).count("mbs_32x224x224") == 1  # better than nothing
    before, now = told("steps", [*stale, *whole_steps()]).split(f"\n{DEVICE}:\n")
    assert "mbs_32x224x224" in now and "†" not in now
    assert "mbs_32x224x224" not in before and "| tiny" in before and "†" in before


def test_the_table_of_ops():
    text = told("ops", ops())
    names = "| attention | video_bbs_drop50_b1 | fp32 | fwd |"
    assert f"{names} **auto** | 2.001 | eager | 2.741 | 1.37x | 50% |" in text
    # the heading, and no row of a case without ours
    assert len(re.findall(r"^\| \w+ \|", text, re.MULTILINE)) == 4


def test_the_readmes_table_shows_fresh_rows_with_their_commands():
    peer = dict(speedup_over_best_peer=1.85, best_peer="sdpa_flash", best_peer_ms_p50=7.5)
    short = "video_mbs_drop50_b2"
    patches = dict(op="patch_embed", mode="fwd+bwd")
    whole = ("step", "mbs_32x224x224_drop50_b1", "fwd+bwd")
    measured = [
        line(case=short, ms=6.0, **patches, **AMX, **peer),
        line(case=f"{short}_rows", ms=8.0, **patches, **AMX, **peer),
        line(case=short, ms=2.0, **peer),  # a processor with less
        line(case=short, ms=4.0, **AMX, **peer),
        line(case=short, ms=3.9, backend="native_cpu", **AMX, **peer),  # dispatch chose the other
        line(case="video_bbs_drop0_b1", commit="old", **AMX, **peer),
        line(case="video_bbs_drop0_b1", mode="fwd+bwd", ms=9.0, **peer),
        line(*whole, ms=20.0, **AMX, **peer),
        line(*whole, "auto_compiled", ms=19.0, **AMX, **peer),
    ]
    text = told("readme", measured)
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    where = "A @ 2.10GHz, AMX"
    starts = (
        f"| attention, 2 x 785 tokens, forward | bf16 | {where} | 4 | 7.5 (sdpa_flash) | 1.85 |",
        "| attention, 1569 tokens, with backward | fp32 | A @ 2.10GHz | 9 | 7.5 (sdpa_flash) |",
        f"| half of two clips' patches, with backward | bf16 | {where} | 8 |",
        f"| whole training step, MBS, half dropped | bf16 | {where} | 19, compiled | 7.5 (",
    )
    assert len(rows) == len(starts)
    assert all(row.startswith(start) for row, start in zip(rows, starts, strict=True))
    assert text.count("    python -m bench ") == 1 and f"--case {short}" in text


@pytest.mark.parametrize("cuda", [False, True])
def test_commands_are_those_of_the_parser(cuda):
    measured = [*ops(), *whole_steps("tiny"), *whole_steps("bbs"), line(case="text_tiny_b7")]
    for each in (*measured, line("patch_embed", "audio_bbs_drop50_rows")):
        versions = VERSIONS | ({"cuda": "13.0"} if cuda else {})
        command = tables.command(dataclasses.replace(each, versions=versions))
        python, flag, module, *options = shlex.split(command)
        assert (python, flag, module) == ("python", "-m", "bench")
        given = __main__._parser().parse_args(options)  # nothing runs
        assert (given.dtype, given.mode) == (each.dtype, [each.mode])
        assert not cuda or given.device == "cuda"
        if given.command == "ops":
            (case,) = calls.select(each.op, given.case)
            assert case.name == each.case
        else:
            at = tables.step(each)
            assert given.configuration == [at.configuration] and given.batch == at.batch
            assert given.drop_rate == [each.drop_rate]
            assert at.configuration in steps.CONFIGURATIONS
