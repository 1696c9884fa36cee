"""The demo in small, through the command: render, pre-train, embed, retrieve, report.

Its quality at full size is in the notes.
"""

import json
import subprocess
import sys

import numpy as np
import pytest

from vatt_fast.cli import main
from vatt_fast.data.folder import folder_captions
from vatt_fast.demo.run import DemoConfig, run_demo
from vatt_fast.evaluation.retrieval import retrieval_metrics
from vatt_fast.model import create_model

KEYS = (
    "seconds steps t2v_r1 t2v_r10 t2v_median_rank a2v_r10 t2v_r10_before "
    "motion_probe motion_probe_before report"
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    root = tmp_path_factory.mktemp("demo")
    arguments = dict(
        out=root / "run",
        world=root / "world",
        steps=8,
        batch_size=8,
        train_clips=40,
        test_clips=12,
        workers=0,
    )
    command = [
        sys.executable,
        "-m",
        "vatt_fast.cli",
        "demo",
        *(str(x) for k, v in arguments.items() for x in (f"--{k.replace('_', '-')}", v)),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    return (
        root,
        done.stdout,
        DemoConfig(**{k: v if isinstance(v, int) else str(v) for k, v in arguments.items()}),
    )


def test_the_last_line_is_the_summary(demo):
    root, output, _ = demo
    summary = json.loads(output.splitlines()[-1])
    assert list(summary) == KEYS.split()
    assert all(0 <= summary[key] <= 100 for key in summary if key not in ("report", "seconds"))
    assert summary["steps"] == 8 and (root / "run" / "report.md").samefile(summary["report"])


def test_the_report_shows_curves_tables_and_clips(demo):
    report = (demo[0] / "run" / "report.md").read_text()
    for part in (
        "Text to video",
        "Audio to video",
        "| colour |",
        "| motion |",
        "linear probe",
        "contact_sheet.png",
        "curves.png",
    ):
        assert part in report
    assert all(
        (demo[0] / "run" / name).stat().st_size > 10_000
        for name in ("curves.png", "contact_sheet.png")
    )


def test_a_finished_demo_starts_anew_on_the_same_world(demo):
    """Rendering is not repeated, training is, with the same numbers."""
    root, output, config = demo
    world = {path: path.stat().st_mtime_ns for path in (root / "world").rglob("*.mp4")}
    again = run_demo(config, progress=False)
    first = json.loads(output.splitlines()[-1])
    assert {k: v for k, v in again.items() if k != "seconds"} == {
        k: v for k, v in first.items() if k != "seconds"
    }
    assert world == {path: path.stat().st_mtime_ns for path in (root / "world").rglob("*.mp4")}
    assert len((root / "run" / "metrics.jsonl").read_text().splitlines()) == 1


def test_embed_and_retrieve_commands(demo, tmp_path, capsys):
    root, _, _ = demo
    test_clips = next((root / "world").rglob("queries.json")).parent
    main(
        [
            "embed",
            "--model",
            str(root / "run"),
            "--data",
            str(test_clips),
            "--out",
            str(tmp_path / "e.npz"),
        ]
    )
    with np.load(tmp_path / "e.npz") as file:
        found = {name: file[name] for name in file.files}
    assert found["files"].tolist() == sorted(folder_captions(test_clips)) and found[
        "z_video_vt"
    ].shape == (12, 64)
    np.testing.assert_allclose(np.linalg.norm(found["z_audio_va"], axis=1), 1, rtol=1e-5)

    capsys.readouterr()
    options = ["--model", str(root / "run"), "--data", str(test_clips), "--windows", "1", "--json"]
    main(["retrieve", *options])
    measured = json.loads(capsys.readouterr().out)
    sentences = json.loads((test_clips / "queries.json").read_text())
    model = create_model(root / "run")
    queries = np.concatenate(
        [
            model.encode(text=sentences[name])["z_text_vt"].numpy()
            for name in found["files"].tolist()
        ]
    )
    expected = retrieval_metrics(queries, found["z_video_vt"], np.arange(12))
    assert measured["text_to_video"] == pytest.approx({"queries": 12, **expected})

    first = str(test_clips / found["files"][0])
    main(["retrieve", *options, "--text", "a red ring", "--audio", first, "--top", "3"])
    hits = json.loads(capsys.readouterr().out)
    assert set(hits) == {"a red ring", first}
    similarity = found["z_video_vt"] @ model.encode(text="a red ring")["z_text_vt"].numpy()[0]
    assert list(hits["a red ring"]) == [found["files"][i] for i in np.argsort(-similarity)[:3]]


def test_doctor_names_device_and_backends(capsys):
    main(["doctor", "--json"])
    report = json.loads(capsys.readouterr().out)
    assert set(report["backends"]) == {"attention", "drop_token", "contrastive_lse", "patch_embed"}
    assert (
        "preferred" in str(report["backends"]["attention"]) and report["requested"] == "automatic"
    )


def test_doctor_prints_a_line_a_backend(capsys):
    main(["doctor"])
    printed = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in printed)
    heading = next(i for i, line in enumerate(printed) if line.startswith("attention on the case"))
    backends = [line.split()[0] for line in printed[heading + 1 :] if line[:3] == f"  {line[2:3]}"]
    assert {"reference", "torch_sdpa", "native_cpu"} <= set(backends)
    assert any("  preferred (" in line for line in printed[heading:])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["embed", "--model", "nowhere", "--data", ".", "--out", "x.npz"],
            "neither a folder nor a preset",
        ),
        (["retrieve", "--model", "tiny", "--data", "."], "has no vocabulary"),
        (["pretrain", "--data", "nowhere", "--out", "x"], "nowhere"),
        (["pretrain", "--data", ".", "--out", "x", "--drop-rate", "1"], "lies in"),
    ],
)
def test_errors_are_one_line_and_status_2(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    errors = capsys.readouterr().err
    assert stop.value.code == 2 and message in errors and len(errors.splitlines()) == 1
    assert not list(tmp_path.iterdir())
