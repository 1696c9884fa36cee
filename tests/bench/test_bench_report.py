"""The report says what the lines say: figures, marked tables and commands."""

import dataclasses
import json
import re
import shlex
import sys

import pytest

from bench import __main__, calls, lines, steps, sweeps
from bench.lines import Line
from bench.report import figures, tables

DEVICE, GPU = "A Processor @ 2.10GHz, 2 threads", "NVIDIA H200"
MACHINE = (DEVICE, "")
CHANGED = "the sources that it ran have changed"


def line(
    op="attention", case="video_bbs_drop50_b1", mode="fwd", backend="torch_sdpa", ms=2.0, **others
):
    ours = others.pop("ours", backend in ("torch_sdpa", "native_cpu", "auto"))
    values = dict(op=op, case=case, dtype="fp32", mode=mode, backend=backend, ours=ours, rounds=5)
    values |= dict(ms_p20=0.9 * ms, ms_p50=ms, ms_p80=1.1 * ms, clock="perf_counter")
    values |= dict(peak_bytes=2**21, tflops=0.05, gb_per_s=None, share_of_ceiling=0.5)
    values |= dict(error=1e-6, error_of="out", error_batch=1, device=DEVICE, commit="new")
    values |= dict(versions={"torch": "2.13.0", "python": "3.11.2"}, date="2026-12-01")
    return Line(**(values | others))


def ops():
    compared = dict(speedup_over_best_peer=1.37, best_peer="eager", best_peer_ms_p50=2.741)
    return [
        line(ms=2.0013, **compared),
        line(backend="eager", ms=2.741),
        line(mode="fwd+bwd", ms=7.1234),  # its peer failed
        line("contrastive_lse", "vt_bbs", backend="materialised", ms=11.33, commit="old"),
        line(
            "contrastive_lse", "vt_bbs", backend="native_cpu", ms=10.21, tflops=None, gb_per_s=6.5
        ),
        line("patch_embed", "video_mbs_drop50_b2_clip", backend="native_cpu", ms=31.31),
    ]


def sweep(
    op="attention",
    variable="tokens",
    sizes=(99, 393, 785),
    names=("native_cpu", "eager"),
    without=(),
):
    scale = {"fwd": 1, "fwd+bwd": 3.3}
    return [
        line(
            op,
            f"scaling_{variable}_{x}",
            mode,
            name,
            ms=scale[mode] * (1 + i) * (0.013 + x**2 / 1e5),
            peak_bytes=(1 + i) * x * 4096,
        )
        for mode in scale
        for i, name in enumerate(names)
        for x in sizes
        if (name, x) not in without
    ]


def whole_steps(
    configuration="mbs_32x224x224",
    names=("auto", "plain", "videomae"),
    percents=(75, 50, 25, 0),
    **others,
):
    scale = {"fwd+bwd": 3, "fwd": 1}
    others |= dict(error=None, error_of=None, clips_per_second=1.2345)

    def one(mode, i, name, p):
        ms = scale[mode] * (1 + i) * (4017 - 41 * p)
        told = dict(drop_rate=p / 100, peak_bytes=(1 + i) * 2**30)
        told["speedup_over_best_peer"] = None if i else 1.53
        return line("step", f"{configuration}_drop{p}_b1", mode, name, ms=ms, **told, **others)

    return [
        one(mode, i, name, p)
        for mode in scale
        for i, name in enumerate(names)
        for p in percents
        if (name, p) != ("videomae", 0)  # it did not fit
    ]


def runs(seeds=3):
    def one(rate, seed):
        rates = (50.0, 95 - 5 * rate + seed, 40.0, 80 - 4 * rate - seed, 5.5, 50.0)
        where = (DEVICE, {"torch": "2.13.0"}, "new", "2026-12-02")
        return sweeps.Run(rate, seed, 1000, *rates, 9.1 * (1.05 - rate), *where)

    return [one(rate, seed) for rate in (0.75, 0.5, 0.25, 0.0) for seed in range(seeds)]


README = (
    "# Title\n\n<!-- table: steps -->\nold\n<!-- end -->\n\nand\n\n"
    "<!-- table: accuracy -->\n<!-- end -->\ntail\n"
)


@pytest.fixture(autouse=True)
def fakes(monkeypatch):
    monkeypatch.setattr(lines, "stale", lambda line: CHANGED if line.commit == "old" else None)


def build(folder, measured, monkeypatch, *options, runs=()):
    """Run the command on lines in a folder of their own; its status."""
    lines.append(folder / "results" / "machine.jsonl", measured)
    (folder / "results" / "compile_gpu.jsonl").write_text('{"another": "record"}\n')
    with (folder / "results" / "accuracy.jsonl").open("w") as file:
        file.writelines(f"{json.dumps(dataclasses.asdict(each))}\n" for each in runs)
    readme = folder / "README.md"
    if not readme.exists():
        readme.write_text(README)
    return again(folder, monkeypatch, *options)


def again(folder, monkeypatch, *options):
    paths = ["--results", folder / "results", "--out", folder / "figures"]
    paths += ["--pages", folder / "README.md"]
    return __main__.main(["report", *map(str, paths), *options])


# -- figures ----------------------------------------------------------------------------------


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_lines_draw_the_same_figures(tmp_path, monkeypatch):
    measured = [*ops(), *sweep(without={("eager", 393)}), *whole_steps()]
    assert build(tmp_path, measured, monkeypatch) == 0
    slug = lines.slug(DEVICE)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {
        f"{slug}_scaling_attention_tokens_fp32.png",
        f"{slug}_mbs_32x224x224_fp32_b1_time.png",
    }
    first = contents(tmp_path)
    assert again(tmp_path, monkeypatch) == 0 and contents(tmp_path) == first


def test_a_curve_is_a_backend_and_the_floor_a_bound():
    shown = tables.current(sweep(sizes=(99, 393)))
    time = figures._times([each for each in shown if each.line.mode == "fwd"])
    kinds = {"native_cpu": "ours", "eager": "peer"}
    assert {curve.name: curve.kind for curve in time[:-1]} == kinds and time[-1].kind == "bound"
    ms = shown[1].line.ms_p50
    assert time[0].points[1] == (393, ms, 0.9 * ms, 1.1 * ms, False)
    assert time[-1].points[1][:2] == (393, pytest.approx(0.5 * shown[3].line.ms_p50))
    # no logarithm of nothing
    assert not figures._peaks([tables.Shown(line(case="scaling_tokens_99", peak_bytes=None))])


@pytest.mark.parametrize(
    "few",
    [
        sweep(sizes=(785,), names=("native_cpu",)),
        [
            dataclasses.replace(each, peak_bytes=None, share_of_ceiling=None)
            for each in sweep("patch_embed", "pixels", (1605632, 3211264))
        ],
        [*whole_steps(percents=(50,), names=("auto",)), *whole_steps("small", names=("plain",))],
    ],
    ids=["one point", "no memory and no floor", "one drop rate, and none of ours"],
)
def test_figures_of_few_lines(tmp_path, monkeypatch, few, capsys):
    assert build(tmp_path, few, monkeypatch) == 0
    drawn = list((tmp_path / "figures").glob("*.png"))
    assert drawn and sorted(map(str, drawn)) == sorted(capsys.readouterr().out.splitlines())


def test_nothing_measured_is_said(tmp_path, monkeypatch):
    assert build(tmp_path, [], monkeypatch) == 0
    assert "No lines exist yet." in (tmp_path / "README.md").read_text()


def test_without_matplotlib_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"vatt_fast\[eval\]"):
        build(tmp_path, sweep(), monkeypatch)


# -- which lines ------------------------------------------------------------------------------


def test_a_fresh_line_wins_and_the_last_of_several():
    old, first, last = line(ms=1.0, commit="old"), line(ms=2.0), line(ms=3.0)
    other = line(ms=9.0, device=GPU)
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
    lines = [
        line(tflops=0.05, share_of_ceiling=0.5),
        line(tflops=0.05, share_of_ceiling=0.25),  # in a faster moment
        line(tflops=0.05, share_of_ceiling=0.1, dtype="bf16"),
        line(tflops=None, gb_per_s=6.0, share_of_ceiling=0.5),
        line(tflops=None, gb_per_s=6.0, share_of_ceiling=0.3, dtype="bf16"),
        line(tflops=0.05, share_of_ceiling=0.01, device="another"),
        line(tflops=None, share_of_ceiling=None),
    ]
    assert [each.share_of_ceiling for each in tables.of_one_ceiling(lines)] == pytest.approx(
        [0.25, 0.25, 0.1, 0.3, 0.3, 0.01, None]
    )


# -- README -----------------------------------------------------------------------------------


def test_marked_tables_are_replaced_and_nothing_else(tmp_path, monkeypatch, capsys):
    stale = [dataclasses.replace(each, commit="old") for each in whole_steps(names=("plain",))]
    assert build(tmp_path, [*whole_steps(names=("auto",)), *stale], monkeypatch, "--check") == 1
    assert (tmp_path / "README.md").read_text() == README
    assert not (tmp_path / "figures").exists()
    assert "+| configuration | drop rate | 75 % | 50 % | 25 % | 0 % |" in capsys.readouterr().out
    assert again(tmp_path, monkeypatch) == 0
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- table: steps -->\n\n" + DEVICE)
    assert (
        "<!-- end -->\n\nand\n\n<!-- table: accuracy -->\n\nNo runs exist yet.\n\n"
        "    python -m bench accuracy && make report\n\n<!-- end -->\ntail\n"
    ) in text
    assert "old" not in text
    assert "\n    python -m bench steps && make report\n\n<!-- end -->" in text
    row = "| mbs_32x224x224, fp32, batch 1 | GFLOPs of a clip, forward, as timed (published) |"
    assert re.search(rf"{re.escape(row)} [\d.]+ \(188.1\) \|", text)
    assert (
        "| training step, ms | **auto 2826**, plain 2826 †, 1.53x |" in text
        and f"† stale: {CHANGED}." in text
    )
    assert again(tmp_path, monkeypatch, "--check") == 0 and again(tmp_path, monkeypatch) == 0
    assert (tmp_path / "README.md").read_text() == text


def test_what_another_device_tells_afresh_leaves_the_readme(tmp_path, monkeypatch):
    tiny = whole_steps("tiny", device="once measured", commit="old")
    assert (
        build(tmp_path, [*whole_steps(device="once measured", commit="old"), *tiny], monkeypatch)
        == 0
    )
    assert (tmp_path / "README.md").read_text().count("mbs_32x224x224") == 1  # better than nothing
    assert build(tmp_path, whole_steps(), monkeypatch) == 0
    before, now = (tmp_path / "README.md").read_text().split(f"\n{DEVICE}:\n")
    assert (
        "mbs_32x224x224" in now
        and "†" not in now
        and "mbs_32x224x224" not in before
        and "| tiny" in before
        and "†" in before
    )


def test_a_readme_without_markers_is_left_alone_and_a_wrong_marker_is_an_error(
    tmp_path, monkeypatch, capsys
):
    for text, problem in (
        ("<!-- table: nothing -->\n<!-- end -->", "'nothing'; there are readme"),
        ("<!-- table: ops -->\n", "'ops' has no"),
        ("<!-- table: ops -->\n<!-- table: steps -->\n<!-- end -->", "'ops' has no"),
    ):
        (tmp_path / "README.md").write_text(text)
        with pytest.raises(SystemExit):
            build(tmp_path, [], monkeypatch)
        assert problem in capsys.readouterr().err and (tmp_path / "README.md").read_text() == text
    (tmp_path / "README.md").write_text("no table\n")
    assert again(tmp_path, monkeypatch) == 0
    assert (tmp_path / "README.md").read_text() == "no table\n"


def test_the_table_of_ops(tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("<!-- table: ops -->\n<!-- end -->\n")
    assert build(tmp_path, ops(), monkeypatch) == 0
    text = (tmp_path / "README.md").read_text()
    names = "| attention | video_bbs_drop50_b1 | fp32 | fwd |"
    assert f"{names} **torch_sdpa** | 2.001 | eager | 2.741 | 1.37x | 50% |" in text
    # the heading, and no row of a case without ours
    assert len(re.findall(r"^\| \w+ \|", text, re.MULTILINE)) == 5


def test_the_readmes_table_shows_fresh_rows_with_their_commands():
    amx = dict(dtype="bf16", versions={"torch": "2.13.0", "instructions": "amx_bf16"})
    peer = dict(speedup_over_best_peer=1.85, best_peer="sdpa_flash", best_peer_ms_p50=7.5)
    short = "video_mbs_drop50_b2"
    patches = dict(op="patch_embed", mode="fwd+bwd", backend="auto")
    whole = ("step", "mbs_32x224x224_drop50_b1", "fwd+bwd")
    measured = [
        line(case="video_mbs_drop50_b2", ms=6.0, **patches, **amx, **peer),
        line(case="video_mbs_drop50_b2_rows", ms=8.0, **patches, **amx, **peer),
        line(case=short, ms=2.0, backend="auto", **peer),  # a processor with less
        line(case=short, ms=4.0, backend="auto", **amx, **peer),
        line(case=short, ms=3.9, backend="native_cpu", **amx, **peer),  # dispatch chose the other
        line(case="video_bbs_drop0_b1", backend="auto", commit="old", **amx, **peer),
        line(case="video_bbs_drop0_b1", backend="auto", mode="fwd+bwd", ms=9.0, **peer),
        line(*whole, "auto", ms=20.0, **amx, **peer),
        line(*whole, "auto_compiled", ms=19.0, ours=True, **amx, **peer),
    ]
    text = tables.readme(tables.current(measured))
    rows = [row for row in text.splitlines() if row.startswith("| ")][2:]
    assert len(rows) == 4
    where = "A @ 2.10GHz, AMX"
    row = f"| attention, 2 x 785 tokens, forward | bf16 | {where} | 4 | 7.5 (sdpa_flash) | 1.85 |"
    assert rows[0] == row
    assert rows[1].startswith("| attention, 1569 tokens, with backward | fp32 | ")
    assert "| 9 | 7.5 (sdpa_flash) |" in rows[1]
    assert rows[2].startswith(f"| half of two clips' patches, with backward | bf16 | {where} | 8 |")
    assert "whole training step" in rows[3] and "| 19, compiled | 7.5" in rows[3]
    assert text.count("    python -m bench ") == 1 and f"--case {short}" in text
    assert tables.readme([]) == "No fresh lines exist yet."


# -- commands ---------------------------------------------------------------------------------


def parsed(command):
    """What the parser makes of a printed command; nothing runs."""
    python, flag, module, *options = shlex.split(command)
    assert (python, flag, module) == ("python", "-m", "bench")
    return __main__._parser().parse_args(options)


@pytest.mark.parametrize("cuda", [False, True])
def test_commands_are_those_of_the_parser(cuda):
    versions = {"torch": "2.13.0"} | ({"cuda": "13.0"} if cuda else {})
    for each in (
        *ops(),
        *whole_steps("tiny"),
        *whole_steps("bbs"),
        line(case="text_tiny_b7"),
        line("patch_embed", "audio_bbs_drop50_rows"),
    ):
        given = parsed(tables.command(dataclasses.replace(each, versions=versions)))
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
