"""The examples of other libraries train as those libraries do themselves."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench.integration_cases import missing

ROOT = Path(__file__).resolve().parents[2]
# with what is not installed in its place, as in this process
_RUN = """
import importlib.util, runpy, sys
name, folder, example = sys.argv[1:4]
spec = importlib.util.spec_from_file_location(name, folder)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
module.stand_in()
sys.argv = [example, "--steps", "3"]
runpy.run_path(example, run_name="__main__")
"""


@pytest.mark.parametrize(
    ("example", "library"),
    [
        ("transformers_vit.py", "transformers"),
        ("open_clip_loss.py", "open_clip"),
        ("sentence_transformers_loss.py", "sentence_transformers"),
        ("timm_vit.py", "timm"),
    ],
)
def test_trains_as_the_library_does(example, library, tmp_path):
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if reason := missing(library):
        pytest.skip(reason)
    stand_in = ROOT / "bench" / "without_torchvision.py"
    command = [
        sys.executable,
        "-c",
        _RUN,
        "stand_in",
        str(stand_in),
        str(ROOT / "examples" / example),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    losses = np.array(re.findall(r"ours (\S+)  theirs (\S+)", done.stdout), float)
    assert losses.shape == (3, 2)
    np.testing.assert_allclose(losses[:, 0], losses[:, 1], rtol=1e-3)
    assert len(set(losses[:, 0])) == 3


def test_vatt_trains_under_trainer_and_loads_again(tmp_path):
    for library in ("transformers", "accelerate"):
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    command = [sys.executable, str(ROOT / "examples" / "transformers_vatt.py"), "--steps", "3"]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr
    losses = re.findall(r"step +\d  loss (\S+)", done.stdout)
    assert len(losses) == 3 and np.isfinite(np.array(losses, float)).all()
    moved = re.search(r"same words True, greatest difference (\S+)", done.stdout)
    assert moved and float(moved[1]) < 1e-5, done.stdout
