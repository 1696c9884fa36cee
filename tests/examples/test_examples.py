"""Every script in examples/ runs, on small inputs, and prints what it promises."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vatt_fast import create_model
from vatt_fast.demo.world import render_world

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder of six rendered clips with captions."""
    world = tmp_path_factory.mktemp("world") / "small"
    render_world(world, num_train=6, num_test=1, seed=0, workers=1, progress=False)
    return world / "train"


@pytest.fixture(scope="module")
def trained(clips, tmp_path_factory):
    """What train_loop.py printed, and the model that it saved."""
    out = tmp_path_factory.mktemp("runs") / "mine"
    arguments = ("--data", clips, "--out", out, "--steps", 2, "--batch-size", 3)
    return run("train_loop.py", *arguments, cwd=out.parent), out


def run(name: str, *arguments, cwd: Path) -> str:
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_tested():
    text = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    assert all(f'"{path.name}"' in text for path in EXAMPLES.glob("*.py"))


def test_attention_drop_in_trains_as_torchs_own(tmp_path):
    output = run("attention_drop_in.py", "--steps", 8, cwd=tmp_path)
    losses = np.array(re.findall(r"ours (\S+)  SDPA (\S+)", output), float)
    assert losses.shape == (8, 2)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)
    assert losses[-1, 0] < losses[0, 0]


def test_two_processes_have_the_gradients_of_one(tmp_path):
    output = run("contrastive_loss_ddp.py", cwd=tmp_path)
    error = re.search(r"2 processes against one: relative difference (\S+)", output)
    assert error and float(error[1]) < 1e-5


def test_the_training_loop_saves_a_model(trained, clips):
    output, out = trained
    losses = re.findall(r"^step (\d)  loss (\S+)$", output, re.MULTILINE)
    assert [step for step, _ in losses] == ["0", "1"]
    assert all(np.isfinite(float(loss)) for _, loss in losses)
    model = create_model(out)
    captions = json.loads((clips / "captions.json").read_text())
    first = captions["clip_00000.mp4"][0]["text"].split()[0].lower()
    assert model.vocabulary is not None and first in model.vocabulary


def test_files_are_embedded_and_ranked(trained, clips, tmp_path):
    files = sorted(clips.glob("*.mp4"))[:3]
    asked = ("--model", trained[1], "--text", "a red star", "--sound", files[0])
    output = run("encode_files.py", *files, *asked, "--out", "found.npz", cwd=tmp_path)
    with np.load(tmp_path / "found.npz") as found:
        assert found["files"].tolist() == list(map(str, files))
        z = found["z_video_vt"]
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, rtol=1e-5)
    model = create_model(trained[1])
    text = model.encode(text="a red star")["z_text_vt"].numpy()[0]
    ranked = re.search(r"\na red star\n((?:  .*\n)+)", output)
    assert ranked
    names = [line.split()[-1] for line in ranked[1].splitlines()]
    assert names == [str(files[i]) for i in np.argsort(-(z @ text))]
    assert output.count(str(files[0])) == 3  # the sound's heading, and once in each ranking


def test_pretraining_from_shards_ends_with_retrieval(tmp_path):
    arguments = ("--clips", 18, "--held-out", 6, "--steps", 2, "--batch-size", 3)
    output = run("pretrain_from_shards.py", "--out", tmp_path / "out", *arguments, cwd=tmp_path)
    assert output.count("text_to_video: R@1") == output.count("audio_to_video: R@1") == 2
    assert "12 clips in 1 shards" in output and "6 held-out clips" in output
    first, second = (json.loads((tmp_path / "out" / name / "run" / "metrics.jsonl").read_text()
                                .splitlines()[-1]) for name in ("first", "second"))  # fmt: skip
    assert first["step"] == second["step"] == 2
