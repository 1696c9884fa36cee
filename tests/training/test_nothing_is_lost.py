"""Runs that are killed, stopped, starved or fed nonsense: the last good checkpoint stays, and what
happened is one line."""

import contextlib
import dataclasses
import json
import os
import random
import re
import signal
import stat
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from training_runs import MODEL, metrics, settings, write_media

from vatt_fast.cli import main
from vatt_fast.data import loader as loader_module
from vatt_fast.data.media import MediaReader
from vatt_fast.data.media_writer import write_clip
from vatt_fast.files import only_writer, replacing, write_text
from vatt_fast.model import create_model
from vatt_fast.training.checkpoint import Data, check_same_run, read_standing, read_state
from vatt_fast.training.loop import BEST, CHECKPOINT, METRICS, PretrainConfig, pretrain
from vatt_fast.training.metrics import NonFiniteError
from vatt_fast.training.settings import differences
from vatt_fast.weights import read_folder, save_tensors

PATIENCE = 240  # seconds; machines may be busy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("whole")
    run(settings(folder, out))
    return out


def run(config, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup_steps")
        return pretrain(config, model_config=MODEL, progress=False, **options)


def weights(out: Path) -> dict[str, torch.Tensor]:
    return load_file(out / CHECKPOINT)


def same_weights(a: Path, b: Path) -> None:
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left)


def litter(out: Path) -> list[str]:
    return [path.name for path in out.rglob("*") if ".part" in path.name or "tmp" in path.name]


def python(code: str, *arguments, ends_with: int = 0, within: tuple[str, ...] = ()) -> str:
    """Run it in a process that can import this module; what it prints.

    ``within`` is the command that starts the process.
    """
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "support")])
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [*within, sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == ends_with, done.stderr
    return done.stdout


# -- signals ---------------------------------------------------------------------------------------


def start(folder, out, *more: str, **changes) -> subprocess.Popen:
    """`vatt-fast pretrain` in a process group of its own."""
    options = dict(data=folder, out=out, steps=100_000, batch_size=2, warmup_steps=2)
    options |= dict(log_every=1, checkpoint_every=50_000, workers=0, precision="fp32") | changes
    command = [sys.executable, "-m", "vatt_fast.cli", "pretrain", *more]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def wait_for_steps(process: subprocess.Popen, out: Path, count: int) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ((out / METRICS).exists() and len((out / METRICS).read_text().splitlines()) >= count):
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("number", "workers", "framework"),
    [
        (signal.SIGTERM, 2, "torch"),
        (signal.SIGUSR1, 2, "torch"),
        (signal.SIGINT, 0, "torch"),
        (signal.SIGTERM, 1, "jax"),
    ],
)
def test_a_signal_to_the_whole_group_saves_and_ends(folder, tmp_path, number, workers, framework):
    """What SLURM, systemd and timeout send reaches the loader's workers too."""
    if framework == "jax":
        pytest.importorskip("jax")
    process = start(folder, tmp_path, workers=workers, framework=framework)
    try:
        wait_for_steps(process, tmp_path, 2)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=PATIENCE)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130, errors
    assert "the same command continues from there" in errors.splitlines()[-1]
    assert "Traceback" not in errors
    assert read_standing(tmp_path / CHECKPOINT).step == metrics(tmp_path)[-1]["step"]
    assert not litter(tmp_path)


# -- kills -----------------------------------------------------------------------------------------

KILLED = """
import os, sys, warnings
from vatt_fast import files
from test_nothing_is_lost import run, settings
folder, out, count = sys.argv[1:]
calls, original = [], getattr(files, "_sync")
def sync(path):
    calls.append(path)
    if len(calls) == int(count):
        os._exit(9)
    original(path)
files._sync = sync
run(settings(folder, out))
"""


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8, 11, 14, 17, 25])
def test_a_kill_inside_a_save_costs_nothing(folder, whole, tmp_path, count):
    """Each count ends the process at another file of the first or a later save."""
    python(KILLED, folder, tmp_path, count, ends_with=9)
    assert litter(tmp_path)
    run(settings(folder, tmp_path))
    assert not litter(tmp_path)
    same_weights(whole, tmp_path)
    assert [line["loss"] for line in metrics(tmp_path)] == [line["loss"] for line in metrics(whole)]
    assert load_file(tmp_path / BEST / "model.safetensors").keys()
    assert read_standing(whole / CHECKPOINT) == read_standing(tmp_path / CHECKPOINT)


def test_a_run_on_shards_that_is_killed_goes_on(folder, tmp_path):
    """The index was made by the killed process; the next one opens it, and seeks."""
    shards = tmp_path / "shards"
    shards.mkdir()
    said = json.loads((folder / "captions.json").read_text())
    for shard in range(3):
        with tarfile.open(shards / f"{shard}.tar", "w") as tar:
            for number in range(3 * shard, min(3 * shard + 3, 8)):
                text = tmp_path / "text.json"
                text.write_text(json.dumps({"captions": said.get(f"{number}.mp4", [])}))
                tar.add(folder / f"{number}.mp4", f"{number}.mp4")
                tar.add(text, f"{number}.json")
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    python(KILLED, shards, killed, 14, ends_with=9)
    assert (shards / "vatt_index").is_dir() and 0 < len(metrics(killed)) < 6
    run(settings(shards, killed, workers=2))
    run(settings(shards, whole))
    same_weights(whole, killed)
    assert [line["loss"] for line in metrics(killed)] == [line["loss"] for line in metrics(whole)]


def test_a_finished_run_is_left_as_it_is(folder, tmp_path):
    run(settings(folder, tmp_path, steps=2))
    before = (tmp_path / CHECKPOINT).read_bytes()
    run(settings(folder, tmp_path, steps=2))
    assert (tmp_path / CHECKPOINT).read_bytes() == before


# -- numbers ---------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_any_file(folder, tmp_path):
    run(settings(folder, tmp_path, steps=4, learning_rate=1e-3))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    metadata = read_standing(tmp_path / CHECKPOINT)
    # the same run, whose rate has been raised beyond all bounds
    poisoned = load_file(tmp_path / CHECKPOINT)
    poisoned["model/video_tokens.project.bias"] += float("nan")
    save_file(poisoned, tmp_path / CHECKPOINT, metadata._replace(step=2).metadata())
    before[tmp_path / CHECKPOINT] = (tmp_path / CHECKPOINT).read_bytes()
    with pytest.raises(NonFiniteError, match=r"step 3 is not finite: .*nan; .*\d\.mp4") as error:
        run(settings(folder, tmp_path, steps=4, learning_rate=1e-3))
    assert f"{CHECKPOINT} of step 2 stays" in str(error.value)
    assert before == {path: path.read_bytes() for path in before}
    assert all(np.isfinite(line["loss"]) for line in metrics(tmp_path))


def test_a_rate_beyond_all_bounds_is_one_line(folder, tmp_path, capsys):
    arguments = dict(
        data=folder,
        out=tmp_path,
        learning_rate=1e30,
        precision="fp32",
        steps=30,
        batch_size=4,
        warmup_steps=1,
        workers=0,
    )
    command = ["pretrain"]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    with pytest.raises(SystemExit) as end:
        main(command)
    assert end.value.code == 2
    assert re.search(r"step \d+ is not finite.*lower the learning rate", capsys.readouterr().err)
    assert not (tmp_path / CHECKPOINT).exists()


# -- files -----------------------------------------------------------------------------------------


LIMITED = """
import resource, sys
from vatt_fast.training import running
from test_nothing_is_lost import run, settings
folder, out, limit = sys.argv[1:]
original = running.save
def save(job, standing, *more):
    if standing.step == 4:  # the second save: no file may grow beyond the limit
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    original(job, standing, *more)
running.save = save
try:
    run(settings(folder, out))
except OSError as error:
    print(error)
"""


@pytest.mark.parametrize("which", ["model.safetensors", CHECKPOINT])
def test_a_full_disk_is_one_line_and_loses_nothing(folder, whole, tmp_path, which):
    """A file that may not grow stands for the disk."""
    sizes = {name: (whole / name).stat().st_size for name in ("model.safetensors", CHECKPOINT)}
    limit = sizes[which] * 2 // 3
    assert which == CHECKPOINT or limit < sizes["model.safetensors"] < sizes[CHECKPOINT] // 2
    told = python(LIMITED, folder, tmp_path, limit)
    assert f"{which} could not be written and is as it was: " in told
    assert "the checkpoint of step 2 is intact: make room, and the same command" in told
    assert read_standing(tmp_path / CHECKPOINT).step == 2 and not litter(tmp_path)
    run(settings(folder, tmp_path))
    same_weights(whole, tmp_path)


ON_A_SMALL_DISK = """
import subprocess, sys
from pathlib import Path
from test_nothing_is_lost import CHECKPOINT, litter, read_standing, run, same_weights, settings
folder, whole, disk = map(Path, sys.argv[1:])
out = disk / "run"
def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], check=True)
sizes = {path.stat().st_ino: path.stat().st_size for path in whole.rglob("*")}  # links count once
mount(f"size={int(1.3 * sum(sizes.values()))}")  # for one save
try:
    run(settings(folder, out))
except OSError as error:
    print(error)
assert read_standing(out / CHECKPOINT).step == 2 and not litter(out)
mount("remount,size=1g")
run(settings(folder, out))
same_weights(whole, out)
"""


def test_a_full_tmpfs_loses_nothing(folder, whole, tmp_path):
    """A real disk without room for the second save; once it has room, the same run goes on."""
    apart = ("unshare", "--mount")  # the disk is seen by this process alone, and goes with it
    trial = [*apart, "mount", "-t", "tmpfs", "tmpfs", str(tmp_path)]
    if subprocess.run(trial, capture_output=True, check=False).returncode:
        pytest.skip("this user may not mount a disk")
    told = python(ON_A_SMALL_DISK, folder, whole, tmp_path, within=apart)
    assert re.search("could not be written and is as it was: .*No space left on device", told)
    assert "the checkpoint of step 2 is intact: make room, and the same command" in told


def test_a_second_process_is_refused(folder, tmp_path):
    run(settings(folder, tmp_path, steps=2))
    with (
        only_writer(tmp_path),
        pytest.raises(ValueError, match=f"process {os.getpid()} is writing to"),
    ):
        run(settings(folder, tmp_path, steps=2))
    run(settings(folder, tmp_path, steps=2))  # the lock went with its owner


def test_an_output_that_cannot_be_is_refused_first(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be a folder: .*file is a file"):
        run(settings(folder, tmp_path / "file" / "run"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # tests may run as root
    with pytest.raises(ValueError, match="nothing can be written to"):
        run(settings(folder, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_files_have_the_modes_of_ordinary_files(folder, tmp_path):
    (tmp_path / "ordinary").write_text("")
    mode = stat.S_IMODE((tmp_path / "ordinary").stat().st_mode)
    run(settings(folder, tmp_path / "run", steps=2))
    for path in (tmp_path / "run").iterdir():
        if path.is_file():
            assert stat.S_IMODE(path.stat().st_mode) == mode, path.name


def test_replacing_leaves_the_old_file_where_the_writer_fails(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")

    def fail() -> None:
        with replacing(path) as part:
            part.write_text("new")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert path.read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["x.txt"]
    missing = tmp_path / "missing" / "y"
    with pytest.raises(OSError, match=r"y could not be written and is as it was: No such file"):
        write_text(missing, "new")


def test_shared_memory_too_small_for_the_workers_is_said_before_the_first_step(
    folder, tmp_path, monkeypatch
):
    """Workers would die of it, or wait for ever."""
    monkeypatch.setattr(loader_module, "available_memory", lambda: 8192)
    with pytest.raises(ValueError, match=r"shared memory for 2 batches.*--workers 0"):
        run(settings(folder, tmp_path, workers=2))
    monkeypatch.undo()
    run(settings(folder, tmp_path, steps=2, workers=0))


# -- checkpoints -----------------------------------------------------------------------------------


def test_the_last_ones_and_the_best_are_kept(folder, whole, tmp_path):
    out = tmp_path / "run"
    model = run(settings(folder, out, keep_last=2))
    assert sorted(path.name for path in out.glob("checkpoint*")) == [
        CHECKPOINT,
        "checkpoint_00000004.safetensors",
    ]
    same_weights(whole, out)
    losses = [line["loss"] for line in metrics(out)]
    means = [np.mean(losses[i : i + 2]) for i in (0, 2, 4)]
    best = create_model(out / BEST)
    if means[-1] == min(means):
        assert all(
            torch.equal(a, b)
            for a, b in zip(best.state_dict().values(), model.state_dict().values(), strict=True)
        )
    assert read_standing(out / CHECKPOINT).best_loss == pytest.approx(min(means), rel=1e-6)
    # back to an earlier one
    os.replace(out / "checkpoint_00000004.safetensors", out / CHECKPOINT)
    run(settings(folder, out, keep_last=2))
    same_weights(whole, out)


def test_a_log_off_a_terminal_has_a_line_a_checkpoint(folder, tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup_steps")
        pretrain(settings(folder, tmp_path, steps=4), model_config=MODEL)
    told = capfd.readouterr()
    assert re.fullmatch(
        r"step 2 of 4 saved, mean loss \d\S*\nstep 4 of 4 saved, mean loss \d\S*\n", told.out
    )
    assert "step/s" not in told.err


def rewrite_metadata(out: Path, change) -> None:
    with safe_open(out / CHECKPOINT, "pt") as file:
        metadata = file.metadata()
    change(metadata)
    save_file(weights(out), out / CHECKPOINT, metadata=metadata)


def test_a_checkpoint_of_an_earlier_version_continues(folder, whole, tmp_path):
    """Settings it does not know were at their defaults; the data's path was all it knew."""
    run(settings(folder, tmp_path, keep_last=3))
    os.replace(tmp_path / "checkpoint_00000002.safetensors", tmp_path / CHECKPOINT)

    def age(metadata):
        described = json.loads(metadata["run"])
        for name in ("recipe", "shuffle_captions"):
            del described[name]
        del described["model"]["va_weight"]
        described["data"] = "somewhere/else"
        metadata["run"] = json.dumps(described)
        del metadata["noted"]

    rewrite_metadata(tmp_path, age)
    with pytest.warns(UserWarning, match=r"order of clips was 1, now 2: from step 2 on the run is"):
        run(settings(folder, tmp_path))
    same_weights(whole, tmp_path)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(batch_size=2), "batch_size was 4, now 2"),
        (dict(drop_rate=0.25, seed=3), "drop_rate was 0.5, now 0.25; seed was 0, now 3"),
    ],
)
def test_what_must_not_change_is_refused_before_anything_is_built(
    folder, whole, changes, told, monkeypatch
):
    monkeypatch.setattr("vatt_fast.training.loop._trainer", lambda *args: pytest.fail("built"))
    with pytest.raises(ValueError, match=rf"belongs to another run \({told}\)"):
        run(settings(folder, whole, **changes))


def test_another_model_is_refused_by_the_names_of_its_differences(folder, whole):
    with pytest.raises(ValueError, match=r"\(model.frames was 4, now 8\)"):
        pretrain(
            settings(folder, whole),
            model_config=dataclasses.replace(MODEL, frames=8),
            progress=False,
        )


def test_damaged_checkpoints_and_configs_are_said_to_be(folder, whole, tmp_path):
    """Bits flipped in their headers, and files cut short: a ValueError, or a sound file."""
    draw = random.Random(0)
    checkpoint, config = (whole / CHECKPOINT).read_bytes(), (whole / "config.json").read_bytes()
    header = 8 + int.from_bytes(checkpoint[:8], "little")
    for name in ("model.safetensors", "vocabulary.txt"):
        os.link(whole / name, tmp_path / name)
    described = read_standing(whole / CHECKPOINT).run
    refused = 0
    for number in range(400):
        bad = bytearray(checkpoint)
        bad[draw.randrange(header)] ^= 1 << draw.randrange(8)
        if number % 8 == 0:
            bad = bad[: draw.randrange(len(bad))]
        (tmp_path / CHECKPOINT).write_bytes(bad)
        bad = bytearray(config)
        bad[draw.randrange(len(bad))] ^= 1 << draw.randrange(8)
        (tmp_path / "config.json").write_bytes(bad)
        try:
            standing = read_standing(tmp_path / CHECKPOINT)
            check_same_run(tmp_path / CHECKPOINT, differences(standing.run, described))
            read_state(tmp_path / CHECKPOINT)
        except ValueError:
            refused += 1
        with contextlib.suppress(ValueError):
            read_folder(tmp_path)
    assert refused > 200


@pytest.mark.parametrize(
    "change",
    [
        lambda metadata: metadata.update(run='{"mudel": {}}'),
        lambda metadata: metadata.update(run="[]"),
        lambda metadata: metadata.update(noted='{"arithmetik": 1}'),
        lambda metadata: metadata.update(step="three"),
        lambda metadata: metadata.pop("run"),
    ],
)
def test_metadata_of_another_shape_are_a_damaged_checkpoint(folder, tmp_path, change):
    run(settings(folder, tmp_path, steps=2))
    rewrite_metadata(tmp_path, change)
    with pytest.raises(ValueError, match="not a whole checkpoint"):
        run(settings(folder, tmp_path, steps=2))


# -- data that change ------------------------------------------------------------------------------


@pytest.fixture
def own_folder(tmp_path):
    (tmp_path / "media").mkdir()
    return write_media(tmp_path / "media")


def stop_after_four_of_six(folder, out) -> None:
    run(settings(folder, out, keep_last=2))
    os.replace(out / "checkpoint_00000004.safetensors", out / CHECKPOINT)


def test_what_earlier_versions_called_the_best_retrieval_is_the_best_score(tmp_path):
    noted = json.dumps({"best_loss": 2.0, "best_retrieval": 40.0})
    told = {"step": "2", "run": json.dumps({"model": {}}), "noted": noted}
    save_tensors({"model/x": torch.zeros(1)}, tmp_path / CHECKPOINT, metadata=told)
    standing = read_standing(tmp_path / CHECKPOINT)
    assert (standing.best_loss, standing.best_score) == (2.0, 40.0)


def test_the_same_data_by_another_name_continue(own_folder, whole, tmp_path):
    stop_after_four_of_six(own_folder, tmp_path / "run")
    moved = own_folder.rename(tmp_path / "moved")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="(?s).*(jit|multi-threaded)")
        run(settings(f"{moved}/", tmp_path / "run"))
    same_weights(whole, tmp_path / "run")


def test_several_windows_of_one_decode_continue_amid_them_and_stay(
    own_folder, tmp_path, monkeypatch
):
    opened = []
    original = MediaReader.__init__

    def counted(self, path):
        opened.append(path)
        original(self, path)

    monkeypatch.setattr(MediaReader, "__init__", counted)
    options = dict(windows_per_decode=3, workers=0)
    run(settings(own_folder, tmp_path / "whole", **options))
    assert len({*opened}) == 8 and len(opened) < 6 * 4
    out = tmp_path / "run"
    run(settings(own_folder, out, keep_last=2, **options))
    os.replace(out / "checkpoint_00000004.safetensors", out / CHECKPOINT)
    with pytest.raises(ValueError, match="windows_per_decode was 3, now 1"):
        run(settings(own_folder, out))
    run(settings(own_folder, out, **options))
    same_weights(tmp_path / "whole", out)
    with pytest.raises(ValueError, match="windows_per_decode is 0; it must be at least 1"):
        settings(own_folder, out, windows_per_decode=0)


def test_other_weights_of_sources_are_said(own_folder, tmp_path):
    mix, out = tmp_path / "mix.toml", tmp_path / "run"

    def weigh(*weights):
        tables = [f'[[source]]\npath = "{own_folder}"\nweight = {weight}\n' for weight in weights]
        mix.write_text("".join(tables))

    weigh(0.25, 0.75)
    stop_after_four_of_six(mix, out)
    weigh(0.5, 0.5)
    with pytest.warns(UserWarning, match=r"the sources' weights were 0\.25 0\.75, now 0\.5 0\.5:"):
        run(settings(mix, out))
    # a checkpoint of an earlier version does not say them
    assert not Data(1, 2, "d", "", "0.5 0.5").changes_since(Data(1, 2, "d", ""))


def test_edited_captions_and_missing_files_are_said_and_words_keep_their_ids(own_folder, tmp_path):
    out = tmp_path / "run"
    stop_after_four_of_six(own_folder, out)
    words = (out / "vocabulary.txt").read_bytes()
    captions = json.loads((own_folder / "captions.json").read_text())
    del captions["7.mp4"]
    captions["0.mp4"][0]["text"] = "zebra number 0"
    (own_folder / "captions.json").write_text(json.dumps(captions))
    (own_folder / "7.mp4").unlink()
    with pytest.warns(
        UserWarning, match=r"8 files of \d+ bytes are now 7 of \d+; the captions were edited"
    ):
        run(settings(own_folder, out))
    assert (out / "vocabulary.txt").read_bytes() == words


def test_nothing_to_learn_from_is_an_error(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(4):
        frames = rng.integers(0, 255, (8, 16, 16, 3)).astype(np.uint8)
        write_clip(tmp_path / f"{i}.mp4", frames, None, frames_per_second=10)
    with pytest.raises(ValueError, match="there is nothing to learn from"):
        run(settings(tmp_path, tmp_path / "run", steps=40))


def test_fewer_files_than_the_batch_is_said(folder, tmp_path):
    with pytest.warns(UserWarning, match="8 files, fewer than batch_size 9"):
        run(settings(folder, tmp_path, steps=1, batch_size=9))


# -- settings --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(schedule="linear"), "schedule is 'linear'; it is one of quarter_cosine, half_cosine"),
        (dict(precision="fp16"), "precision is 'fp16'; it is one of auto, bf16, fp32"),
        (dict(drop_per="clips"), "drop_per is 'clips'"),
        (dict(framework="keras"), "framework is 'keras'"),
        (dict(recipe="mine"), "recipe is 'mine'"),
        (dict(batch_size=1), "batch_size is 1; it must be at least 2"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(learning_rate=1e-5, final_learning_rate=5e-5), "the rate falls after the warm-up"),
    ],
)
def test_settings_are_checked_at_once(changes, told):
    with pytest.raises(ValueError, match=told):
        PretrainConfig(data="d", out="o", **changes)


def test_what_is_not_given_follows_the_recipe():
    paper, released = (PretrainConfig(data="d", out="o", recipe=r) for r in ("paper", "released"))
    assert (paper.warmup_steps, paper.schedule, paper.adam_eps) == (10_000, "quarter_cosine", 1e-8)
    assert (released.warmup_steps, released.schedule) == (5_000, "half_cosine")
    assert released.adam_eps == 1e-7 and released.final_learning_rate == 5e-5
    given = PretrainConfig(data="d", out="o", recipe="released", warmup_steps=7, learning_rate=1.0)
    assert (given.warmup_steps, given.final_learning_rate) == (7, 0.5)
