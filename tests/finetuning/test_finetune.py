"""Fine-tuning runs: beginnings, kills, what is saved, and what is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_media import CLASSES, settings, write_labelled
from released_keys import arrays, random_model, released_keys, with_bookkeeping
from run_pages import parsed
from safetensors.torch import load_file
from test_step import AGNOSTIC
from tf_bundle_writer import write_bundle
from training_runs import MODEL, metrics
from training_runs import settings as pretraining

from vatt_fast.classifier import Classifier
from vatt_fast.cli import main
from vatt_fast.config import TowerConfig
from vatt_fast.data.labels import open_labels
from vatt_fast.evaluation.classify import evaluate, predict
from vatt_fast.finetuning.loop import BEST, finetune
from vatt_fast.finetuning.settings import RECORD, TRAINED, Record, clip_spec
from vatt_fast.model import VATT
from vatt_fast.training.checkpoint import CHECKPOINT, read_standing
from vatt_fast.training.loop import pretrain
from vatt_fast.training.metrics import NonFiniteError
from vatt_fast.training.run_page import REPORT


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_labelled(tmp_path_factory.mktemp("media"))


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A saved model of random weights."""
    out = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(5)
    VATT(MODEL).save_pretrained(out)
    return out


def run(config, *, model_config=MODEL, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup_steps")
        return finetune(config, model_config=model_config, progress=False, **options)


def python(code, *arguments, ends_with=0):
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here), str(here.parent / "support")])
    threads = str(torch.get_num_threads())
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": threads},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == ends_with, done.stderr


# -- kills -----------------------------------------------------------------------------------------

# everything that is drawn at random: order, windows, crops, mixup, dropout, DropToken
DRAWN = dict(classifier_dropout=0.5, dropout=0.1, mixup=2.0, drop_rate=0.5, eval_split="test")
KILLED = """
import os, sys, json
from vatt_fast import files
from test_finetune import run, settings, DRAWN
folder, out, count = sys.argv[1:]
calls, original = [], files._sync
def sync(path):
    calls.append(path)
    if len(calls) == int(count):
        os._exit(9)
    original(path)
files._sync = sync
run(settings(folder, out, **DRAWN))
"""


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """An uninterrupted run of six steps."""
    out = tmp_path_factory.mktemp("whole")
    run(settings(folder, out, **DRAWN))
    return out


def same_runs(a, b):
    left, right = load_file(a / CHECKPOINT), load_file(b / CHECKPOINT)
    assert left.keys() == right.keys()
    assert any(name.startswith("optimizer/momentum_buffer/") for name in left)
    assert all(torch.equal(left[name], right[name]) for name in left)
    timed = ("clips_per_second", "step_seconds", "data_wait_seconds")
    told = [[{k: v for k, v in line.items() if k not in timed} for line in metrics(each)]
            for each in (a, b)]  # fmt: skip
    assert told[0] == told[1]
    assert read_standing(a / CHECKPOINT) == read_standing(b / CHECKPOINT)


@pytest.mark.parametrize(
    ("count", "model", "step"), [(5, False, None), (10, True, None), (24, True, 2)]
)
def test_a_killed_run_ends_as_an_uninterrupted_one(folder, whole, tmp_path, count, model, step):
    """Killed amid the first save, before and behind the model's files, and amid a later one."""
    python(KILLED, folder, tmp_path, count, ends_with=9)
    path = tmp_path / CHECKPOINT
    assert (read_standing(path).step if path.exists() else None) == step
    assert (tmp_path / "model.safetensors").exists() == model
    run(settings(folder, tmp_path, **DRAWN | dict(workers=2)))
    same_runs(whole, tmp_path)
    assert not list(tmp_path.rglob("*.part"))


def test_a_request_to_stop_saves_and_ends(folder, whole, tmp_path, monkeypatch):
    import signal

    from vatt_fast.finetuning import loop

    def rate(config, step):
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return original(config, step)

    original = loop.rate_of
    monkeypatch.setattr(loop, "rate_of", rate)
    with pytest.raises(KeyboardInterrupt, match="after step 3; the same command continues"):
        run(settings(folder, tmp_path, **DRAWN))
    assert read_standing(tmp_path / CHECKPOINT).step == 3
    monkeypatch.undo()
    # best/ is chosen between checkpoints, and this run has one more
    run(settings(folder, tmp_path, **DRAWN))
    left, right = load_file(whole / CHECKPOINT), load_file(tmp_path / CHECKPOINT)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_other_settings_or_classes_are_another_run(folder, whole, tmp_path):
    with pytest.raises(ValueError, match=r"another run \(mixup was 2.0, now 1.0\)"):
        run(settings(folder, whole, **DRAWN | dict(mixup=1.0)))
    other = tmp_path / "other"
    write_labelled(other, each=1)
    (other / "train" / "green").mkdir()
    (other / "train" / "green" / "0.mp4").write_bytes(
        (other / "train" / "red" / "0.mp4").read_bytes()
    )
    with pytest.raises(ValueError, match=r"classes was \['blue', 'red'\], now \['blue', 'green'"):
        run(settings(other, whole, **DRAWN))


# -- what is saved ---------------------------------------------------------------------------------


def test_a_saved_classifier_evaluates_to_the_last_bit(folder, tmp_path):
    model = run(settings(folder, tmp_path, eval_split="test", best_by="score"))
    loaded = Classifier.from_pretrained(tmp_path)
    assert loaded.labels == model.labels == list(CLASSES)
    record = Record.read(tmp_path)
    assert (record.task, record.loss, record.recipe) == ("video", "softmax", "small")
    source = open_labels(folder).source("test", "video", loaded.labels)
    spec = clip_spec("video", record.input, loaded.config)
    both = [predict(m, source, spec, windows=4, crops=3).logits for m in (model, loaded)]
    found = evaluate(tmp_path, folder)
    assert np.array_equal(both[0], both[1])
    assert np.array_equal(both[0], found.predictions.logits)
    assert {path.name for path in (tmp_path / BEST).iterdir()} == {
        "config.json", "model.safetensors", "labels.txt", RECORD, TRAINED
    }  # fmt: skip
    last = metrics(tmp_path)[-1]
    once = evaluate(tmp_path, folder, windows=1, crops=1, batch_size=32)
    assert last["eval_top1"] == once.result["top1"] and last["eval_examples"] == 8
    assert {"loss", "learning_rate", "gradient_norm", "train_top1", "step_seconds"} <= last.keys()
    before = (tmp_path / CHECKPOINT).read_bytes()
    run(settings(folder, tmp_path, eval_split="test", best_by="score"))  # nothing is left to do
    assert (tmp_path / CHECKPOINT).read_bytes() == before


def test_the_report_holds_curves_scores_and_what_is_confused(whole):
    pytest.importorskip("matplotlib", reason="draws the confusion")
    page = parsed(whole / REPORT)
    text = " ".join(page.text)
    for part in ("Step 6 of 6", "recipe small", "top-1 (%)", "Split test", "blue, red", "mixup",
                 torch.__version__):  # fmt: skip
        assert part in text, part
    # loss, right in training, held-out, gradient, rate, clips a second, seconds
    assert page.tags.count("svg") == 7
    (image,) = page.images
    assert image["alt"] == "confusion matrix" and image["src"].startswith("data:image/png;base64,")
    rows = [line for line in metrics(whole) if "eval_top1" in line]
    assert page.tags.count("tr") >= len(rows) == 3


def test_two_classes_are_learned(folder, tmp_path):
    """And the evaluation says so: four windows of three crops of each held-out clip."""
    run(settings(folder, tmp_path, steps=25, learning_rate=0.03, augment="none"))
    assert evaluate(tmp_path, folder).result["top1"] == 100
    shuffled = tmp_path / "shuffled.json"
    names = sorted(str(path) for path in (folder / "test").rglob("*.mp4"))
    shuffled.write_text(json.dumps({name: CLASSES[i % 2] for i, name in enumerate(names)}))
    found = evaluate(tmp_path, shuffled, media=folder, split="train")
    assert found.result["top1"] == 50  # the labels are looked at


@pytest.mark.parametrize("task", ["audio", "image"])
def test_sound_and_pictures(folder, tmp_path, task):
    changes = dict(task=task, steps=2)
    if task == "audio":  # by its own recipe but for the size
        changes |= dict(recipe="audioset", samples=1280, sample_rate_hz=8000, warmup_steps=0)
    model = run(settings(folder, tmp_path, **changes))
    found = evaluate(tmp_path, folder)
    if task == "audio":
        assert "mAP" in found.result and model.config.sample_rate_hz == 8000
        assert found.result["settings"]["windows"] == 4
    else:
        assert model.config.frames == 1 and len(model.video_tokens.position.tables[0]) == 1
        assert "mAP" not in found.result and found.result["settings"]["crops"] == 1


def test_several_classes_each(folder, tmp_path):
    names = sorted(str(path.relative_to(folder)) for path in (folder / "train").rglob("*.mp4"))
    classes = {name: [name.split("/")[1], "any"] for name in names}
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps(classes))
    changes = dict(media=str(folder), steps=2, hold_out=0.25, eval_split="test")
    with pytest.raises(ValueError, match="has 2 classes, and loss softmax takes one each"):
        run(settings(labels, tmp_path / "out", **changes))
    run(settings(labels, tmp_path / "out", loss="sigmoid", **changes))
    found = evaluate(tmp_path / "out", labels, media=folder)
    # what training held out: a quarter
    assert found.result["examples"] == 2
    assert found.result["settings"]["left_out_as_trained"] == 6
    examples = open_labels(labels, media=folder).held_out(0.25).examples
    trained = [example for example in examples if example.split == "train"]
    assert len(trained) == 6
    assert not {example.path for example in trained} & set(found.predictions.files)
    assert "top1" not in found.result and metrics(tmp_path / "out")[-1]["eval_examples"] == 2
    found = evaluate(tmp_path / "out", labels, media=folder, split="train").result
    assert (found["examples"], found["settings"]["trained_on"]) == (8, 6)


def test_media_that_it_was_trained_on_are_left_out(folder, tmp_path):
    """Where nothing names splits: told by what is in the files, wherever they lie."""
    run(settings(folder / "train", tmp_path, steps=2, hold_out=0.25, checkpoint_every=1))
    for model in (tmp_path, tmp_path / BEST):
        found = evaluate(model, folder / "train")
        assert found.predictions.files == sorted(found.predictions.files)
        assert found.result["examples"] == 2
        told = found.result["settings"]
        assert told["left_out_as_trained"] == 6 and told["split"] is None
    names = [str(path.relative_to(folder)) for path in (folder / "train").rglob("*.mp4")]
    rows = [f"{name},{name.split('/')[1]}" for name in sorted(names)]
    (tmp_path / "higher.csv").write_text("\n".join(["file,class", *rows]))
    higher = evaluate(tmp_path, tmp_path / "higher.csv", media=folder)
    assert [name.removeprefix("train/") for name in higher.predictions.files] == (
        found.predictions.files
    )
    other = evaluate(tmp_path, folder / "test")
    assert other.result["examples"] == 8  # of the same names
    run(settings(folder / "train", tmp_path / "all", steps=1, hold_out=0.0))
    with pytest.raises(ValueError, match="the model was trained on all of"):
        evaluate(tmp_path / "all", folder / "train")


def test_training_media_are_told_where_the_data_named_splits(folder, tmp_path, capsys):
    """By the console too; those of a split that is asked for are measured, and counted."""
    run(settings(folder, tmp_path, steps=1))
    with pytest.raises(ValueError, match="the model was trained on all of"):
        evaluate(tmp_path, folder / "train")
    both = tmp_path / "both"
    for split in ("train", "test"):
        for name in CLASSES:
            (both / name).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / split / name / "0.mp4", both / name / f"{split}.mp4")
    command = ["evaluate", "--model", str(tmp_path), "--data", str(both), "--windows", "1"]
    main(command)
    told, warned = capsys.readouterr()
    assert "examples: 2\n" in told and "left out as trained on: 2\n" in told and not warned
    assert "split: none named\n" in told
    main([*command, "--split", "train"])
    told, warned = capsys.readouterr()
    assert "examples: 4\n" in told and "split: train\n" in told
    assert warned == "vatt-fast: the model was trained on 2 of these examples\n"
    main([*command[:4], str(folder), *command[5:]])
    assert "split: test\nleft out as trained on: 0\n" in capsys.readouterr().out


def test_published_splits_are_not_cut(folder, tmp_path):
    """A list whose name says train is for training, all of it."""
    names = sorted(str(path.relative_to(folder)) for path in (folder / "train").rglob("*.mp4"))
    rows = [f"{name},{name.split('/')[1]}" for name in names]
    (tmp_path / "my_train.csv").write_text("\n".join(["file,class", *rows]))
    data = open_labels(tmp_path / "my_train.csv", media=folder)
    assert data.names_splits and data.held_out(0.5) == data
    (tmp_path / "mine.csv").write_text("\n".join(["file,class", *rows]))
    assert not open_labels(tmp_path / "mine.csv", media=folder).names_splits


# -- beginnings ------------------------------------------------------------------------------------


def started(folder, out, **changes):
    """The weights before any step: a rate of 0."""
    return run(settings(folder, out, steps=1, learning_rate=0.0, **changes)).state_dict()


def test_the_tower_is_taken_and_the_classifier_is_new(folder, pretrained, tmp_path):
    tower = load_file(pretrained / "model.safetensors")
    found = started(folder, tmp_path, init=str(pretrained))
    for name, value in found.items():
        if not name.startswith("classifier."):
            assert torch.equal(value, tower[name]), name
    assert found["classifier.weight"].shape == (2, MODEL.video.dim)


def test_a_saved_models_kind_may_be_trained_from_scratch(folder, tmp_path):
    """As a preset of its sizes: agnostic, spectrograms, other patches."""
    sound = dict(samples=6400, sample_rate_hz=16000)
    kind = dataclasses.replace(AGNOSTIC, audio_input="spectrogram", **sound)
    torch.manual_seed(6)
    VATT(kind).save_pretrained(tmp_path / "model")
    changes = dict(task="audio", recipe="audioset", steps=1, warmup_steps=0, **sound)
    saved = dict(init=str(tmp_path / "model"), **changes)
    found = run(settings(folder, tmp_path / "a", from_scratch=True, **saved)).state_dict()
    expected = run(settings(folder, tmp_path / "b", **changes), model_config=kind).state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    with pytest.raises(ValueError, match="from_scratch was True, now None"):
        run(settings(folder, tmp_path / "a", **saved))
    with pytest.raises(ValueError, match="from_scratch is of a saved model; name it with init"):
        settings(folder, tmp_path / "c", from_scratch=True)
    with pytest.raises(ValueError, match="frozen trains the classifier of a random tower"):
        settings(folder, tmp_path / "c", from_scratch=True, frozen=True, **saved)


def spline(table, length):
    """SciPy's natural spline through i / n at j / m, a straight line past the last knot."""
    interpolate = pytest.importorskip("scipy.interpolate", reason="compares with SciPy")
    old = len(table)
    knots, at = np.arange(old) / old, np.arange(length) / length
    cubic = interpolate.CubicSpline(knots, table.double().numpy(), bc_type="natural")
    beyond = np.maximum(at - knots[-1], 0)[:, None]
    return cubic(np.minimum(at, knots[-1])) + beyond * cubic(knots[-1], 1)


def test_positions_of_another_size_are_resampled_once_and_trained(folder, pretrained, tmp_path):
    tower = load_file(pretrained / "model.safetensors")
    changes = dict(init=str(pretrained), height=24, width=40, frames=8)
    found = started(folder, tmp_path / "a", **changes)
    for axis, length in enumerate((2, 3, 5)):
        name = f"video_tokens.position.tables.{axis}"
        if len(tower[name]) > 1:
            expected = spline(tower[name], length)
            np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        assert len(found[name]) == length
    model = run(settings(folder, tmp_path / "b", steps=2, **changes))
    assert not torch.equal(model.state_dict()[name], found[name])
    assert (model.config.frames, model.config.height, model.config.width) == (8, 24, 40)
    assert evaluate(tmp_path / "b", folder).result["settings"]["input"]["width"] == 40


def test_long_position_tables_are_resampled_as_splines(folder, tmp_path):
    """Enough rows on each axis that a straight line would not do."""
    large = dataclasses.replace(MODEL, frames=16, height=32, width=40)
    torch.manual_seed(7)
    VATT(large).save_pretrained(tmp_path / "model")
    tower = load_file(tmp_path / "model" / "model.safetensors")
    sizes = dict(frames=24, height=24, width=72)
    found = started(folder, tmp_path / "out", init=str(tmp_path / "model"), **sizes)
    for axis, (before, after) in enumerate(((4, 6), (4, 3), (5, 9))):
        name = f"video_tokens.position.tables.{axis}"
        assert len(tower[name]) == before and len(found[name]) == after
        expected = spline(tower[name], after)
        np.testing.assert_allclose(found[name].numpy(), expected, rtol=1e-5, atol=1e-6)
        knots = np.arange(before) / before
        line = [np.interp(np.arange(after) / after, knots, x) for x in tower[name].numpy().T]
        assert np.abs(np.stack(line, 1) - expected).max() > 0.01


def test_positions_on_the_fly_keep_their_tables(folder, pretrained, tmp_path):
    """Both ways begin as one function; the record says what size evaluation reads."""
    changes = dict(init=str(pretrained), height=24, width=32)
    once = started(folder, tmp_path / "a", **changes)
    each = run(settings(folder, tmp_path / "b", steps=1, learning_rate=0.0,
                        positions="on_the_fly", drop_rate=0.5, **changes))  # fmt: skip
    tables = [f"video_tokens.position.tables.{axis}" for axis in range(3)]
    assert [len(each.state_dict()[name]) for name in tables] == [1, 2, 2]
    assert [len(once[name]) for name in tables] == [1, 3, 4]
    found = [evaluate(tmp_path / name, folder) for name in "ab"]
    assert found[0].result["settings"]["input"] == found[1].result["settings"]["input"]
    logits = [one.predictions.logits for one in found]
    np.testing.assert_allclose(logits[0], logits[1], rtol=1e-4, atol=1e-5)


def test_a_classifier_goes_on_with_its_classes_or_new_ones(folder, tmp_path):
    first = run(settings(folder, tmp_path / "a"))
    same = started(folder, tmp_path / "b", init=str(tmp_path / "a"))
    assert torch.equal(same["classifier.weight"], first.state_dict()["classifier.weight"])
    renamed = tmp_path / "renamed"
    (renamed / "train").mkdir(parents=True)
    for before, after in (("blue", "sky"), ("red", "fire")):
        (renamed / "train" / after).symlink_to(folder / "train" / before)
    other = started(renamed, tmp_path / "c", init=str(tmp_path / "a"))
    name = "video_encoder.norm.weight"
    assert torch.equal(other[name], first.state_dict()[name])
    assert not torch.equal(other["classifier.weight"], same["classifier.weight"])
    with pytest.raises(ValueError, match="is a tower of video; the task needs audio"):
        started(folder, tmp_path / "d", init=str(tmp_path / "a"), task="audio")


def test_from_a_released_checkpoint(folder, tmp_path):
    small = TowerConfig(depth=1, dim=16, mlp_dim=16, num_heads=2, head_dim=8)
    config = dataclasses.replace(MODEL, video=small, audio=small, text=small, word_dim=4,
                                 d_va=8, d_vt=8, heads="released", vocab_size=20)  # fmt: skip
    model = random_model(config)
    keys = with_bookkeeping(released_keys(config, model.state_dict()))
    write_bundle(tmp_path / "ckpt-5", arrays(keys), shards=1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*heads of 8")
        found = started(folder, tmp_path / "out", init=str(tmp_path / "ckpt-5"))
    for name, value in found.items():
        if not name.startswith("classifier."):
            torch.testing.assert_close(value, model.state_dict()[name], msg=name)


def test_from_an_agnostic_model(folder, tmp_path):
    torch.manual_seed(6)
    model = VATT(AGNOSTIC)
    model.save_pretrained(tmp_path / "model")
    found = started(folder, tmp_path / "out", init=str(tmp_path / "model"))
    assert found["classifier.weight"].shape == (2, 48)
    for name in ("trunk.blocks.0.qkv.weight", "post_proj.video.weight"):
        assert torch.equal(found[name], model.state_dict()[name])
    assert not any(name.startswith(("audio", "post_proj.audio")) for name in found)
    assert evaluate(tmp_path / "out", folder).result["examples"] == 8


def test_what_is_trained_loads_in_jax(folder, tmp_path):
    pytest.importorskip("jax", reason="compares with JAX")
    from vatt_fast.on_jax import classifier

    model = run(settings(folder, tmp_path, task="image", steps=1))
    config, params = classifier.load(tmp_path)
    pictures = torch.randint(0, 256, (2, 1, 16, 16, 3), dtype=torch.uint8)
    ours = classifier.forward(params, pictures.numpy(), config=config)
    with torch.no_grad():
        theirs = model(pictures).numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-4, atol=1e-4)


# -- what is refused -------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_before_any_file(folder, tmp_path):
    config = settings(folder, tmp_path, steps=10, learning_rate=1e30, warmup_steps=1, clip=0.0)
    with pytest.raises(NonFiniteError, match=r"is not finite: .*mp4.*; .*: lower the learning"):
        run(config)
    for path in tmp_path.rglob("*.safetensors"):
        assert all(value.isfinite().all() for value in load_file(path).values())


@pytest.mark.parametrize(
    ("train", "settled"), [(run, settings), (pretrain, pretraining)], ids=["finetune", "pretrain"]
)
def test_a_model_that_is_no_runs_to_continue_stays(folder, pretrained, tmp_path, train, settled):
    """A saved one, and a run's whose checkpoint is gone; the model that it starts from too."""
    shutil.copytree(pretrained, tmp_path / "saved")
    run(settings(folder, tmp_path / "trained", steps=1))
    (tmp_path / "trained" / CHECKPOINT).unlink()
    for out in (tmp_path / "saved", tmp_path / "trained"):
        before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=r"holds a model already, .*name another"):
            train(settled(folder, out, init=str(out)))
        assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_two_writers_are_refused(folder, tmp_path):
    from vatt_fast.files import only_writer

    with only_writer(tmp_path), pytest.raises(ValueError, match="is writing to"):
        run(settings(folder, tmp_path))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda f: (f / "red").rename(f / "dark red"), None),
        (lambda f: shutil.rmtree(f / "red"), "has one class, 'blue'"),
        (lambda f: [p.unlink() for p in (f / "red").iterdir()],
         "red is without a training example"),
        (lambda f: (f / "classes.txt").write_text("blue\nred\ngreen\n"),
         "green is without a training example"),
    ],
)  # fmt: skip
def test_data_that_cannot_be_used(tmp_path, make, match, capsys):
    """In one line, exit status 2."""
    data = tmp_path / "data"
    write_labelled(data, each=2, splits=(".",))
    make(data)
    arguments = dict(data=data, out=tmp_path / "out", init="none", preset="tiny", recipe="small",
                     steps=1, batch_size=2, workers=0, loggers="none", height=16, width=16,
                     frames=4)  # fmt: skip
    command = ["finetune"]
    for name, value in arguments.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    if match is None:
        main(command)
        assert "trained classifier" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        main(command)
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 2 and match in error[-1]


@pytest.mark.parametrize("init", ["nowhere", "empty"])
def test_beginnings_that_are_none(folder, tmp_path, init):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"name a saved model|has no config.json"):
        run(settings(folder, tmp_path / "out", init=str(tmp_path / init)))
    assert not (tmp_path / "out").exists()
