"""Checkpoints in shards (fsdp2, gloo): written beside the steps, whole or absent, and in the end
the files that any run has."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torchrun import environment
from training_runs import write_media

from vatt_fast.cli import main
from vatt_fast.training.checkpoint import CHECKPOINT
from vatt_fast.training.shards import join_shards

UNDISTURBED = {"weights": True, "losses": True, "files": True}
SUPPORT = Path(__file__).parents[1] / "support"


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    return tmp_path_factory.mktemp("out")


@pytest.fixture(scope="module")
def runs(out, tmp_path_factory):
    """What the program says, whose ranks may be killed."""
    media = write_media(tmp_path_factory.mktemp("media"))
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "sharded_runs.py"), str(media), str(out)],
        env=environment(PYTHONPATH=str(SUPPORT)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_kill_inside_a_save_costs_nothing(runs):
    own, named, joining = (found.pop("lay") for found in runs["killed"])
    assert runs["killed"] == 3 * [UNDISTURBED]
    assert "shards_00000002" in own and "shards_00000004" not in own and CHECKPOINT not in own
    assert "shards_00000002" in named and not any(name.endswith(".part") for name in named)
    assert {"shards_00000002", "shards_00000006"} <= {*joining}
    assert any(name.startswith(".") and name.endswith(".part") for name in joining)


def test_a_full_disk_on_one_rank_is_said_by_all_and_costs_nothing(runs):
    found = runs["starved"]
    assert found.pop("told") == 2 * [
        "OSError: a checkpoint could not be written: rank 1: [Errno 28] No space left on device; "
        "the checkpoint of step 2 is intact: make room, and the same command continues from there"
    ]
    assert (found.pop("steps"), found.pop("litter")) == ([2], [])
    assert found == UNDISTURBED


def test_training_goes_on_while_shards_are_written(runs):
    """What is written of step 2 waits for two more steps, and is the state of step 2."""
    found = runs["goes on"]
    assert found.pop("let_through") == ["True", "True"]
    assert found == UNDISTURBED


def test_shards_of_an_interrupted_run_are_joined(runs):
    found = runs["joined"]
    described = [".lock", "config.json", "metrics.jsonl", "report.html"]
    assert found["before"] == sorted(
        [*described, "shards_00000002", "shards_00000004", "vocabulary.txt"]
    )
    assert found["step"] == 4 and found["same"] and found["model"]
    one = ["best", CHECKPOINT, "checkpoint_00000002.safetensors", "model.safetensors"]
    assert found["after"] == sorted([*described, *one, "vocabulary.txt"])
    # one rank, without shards, reads them too
    assert found["alone"] == sorted([*found["after"], "checkpoint_00000004.safetensors"])


def test_the_best_model_is_kept_in_shards_and_joined_last(runs):
    found = runs["best"]
    assert found["same"]
    assert [name for name in found["files"] if "safetensors" in name] == [
        CHECKPOINT,
        "model.safetensors",
    ]
    assert found["best"] == ["config.json", "model.safetensors", "vocabulary.txt"]


def test_a_file_that_is_cut_short_or_missing_is_said(runs):
    for told, how in zip(runs["damaged"], (r"\d+", "is gone"), strict=True):
        pattern = r"ValueError: \S+/shards_00000002 is not a whole checkpoint \(shard-00002-\S+ had"
        assert re.match(rf"{pattern} \d+ bytes, and now {how}\); delete the folder", told), told


def test_the_command_joins_and_a_model_in_shards_is_said_to_be(runs, out, capsys):
    folder = out / "interrupted"
    with pytest.raises(SystemExit):
        main(["embed", "--model", str(folder), "--data", "none", "--out", "none"])
    assert f"its checkpoint lies in shards: vatt-fast join {folder}" in capsys.readouterr().err
    main(["join", str(folder)])
    assert "step 4" in capsys.readouterr().out
    assert load_file(folder / "model.safetensors")
    assert join_shards(folder) is None
    with pytest.raises(SystemExit):
        main(["join", str(folder)])
    assert "nothing lies in shards" in capsys.readouterr().err
    assert not [name for name in os.listdir(folder) if name.startswith("shards")]
