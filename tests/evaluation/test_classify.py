"""Views of a file by hand, what cannot be read, and results that another run repeats."""

import csv
import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from labelled_media import CLASSES, write_labelled
from processes import in_processes
from training_runs import MODEL

from vatt_fast.classifier import Classifier, ClassifierConfig
from vatt_fast.cli import main
from vatt_fast.data.labels import open_labels
from vatt_fast.data.media import MediaError, read_audio, read_video
from vatt_fast.data.media_writer import write_clip
from vatt_fast.evaluation.classify import (
    ahead,
    covering_size,
    crop_corners,
    evaluate,
    predict,
    read_views,
    write_evaluation,
)
from vatt_fast.evaluation.scores import one_class_scores
from vatt_fast.finetuning.settings import clip_spec
from vatt_fast.training.distributed import Ranks

VIDEO = dict(frames=4, height=16, width=16, frames_per_second=10.0)
AUDIO = dict(samples=1280, sample_rate_hz=8000)


def classifier(modality="video", classes=2):
    torch.manual_seed(0)
    return Classifier(ClassifierConfig(MODEL, modality, classes)).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Wide pictures of 20 x 32, so that crops along the longer side differ."""
    return write_labelled(tmp_path_factory.mktemp("media"), splits=("test",), each=2, size=(20, 32))


@pytest.mark.parametrize("workers", [0, 3])
def test_twelve_views_are_averaged(folder, workers):
    """By hand: each view alone through the model, and the mean of the logits."""
    model, source = classifier(), open_labels(folder).source("test", "video")
    spec = clip_spec("video", VIDEO, MODEL)
    options = dict(windows=4, crops=3, batch_size=3, workers=workers)
    found = predict(model, source, spec, **options)
    assert found.files == [source.name(i) for i in range(4)]
    for number, name in enumerate(found.files):
        logits = []
        for start in (0.0, 0.1, 0.3, 0.4):  # 0.8 s, of which 0.4 s is a window: 5 places
            whole = read_video(
                folder / name, start=start, num_frames=4, frames_per_second=10, height=16,
                width=26, box=(0, 0, 1, 1),
            )  # fmt: skip
            for left in (0, 5, 10):
                view = torch.from_numpy(whole[:, :, left : left + 16].copy())
                with torch.no_grad():
                    logits.append(model(view[None])[0])
        assert len(logits) == 12
        expected = torch.stack(logits).mean(0).numpy()
        np.testing.assert_allclose(found.logits[number], expected, rtol=1e-5, atol=1e-6)
        assert np.ptp([float(one[0]) for one in logits]) > 1e-4  # the views differ


def test_windows_of_sound_are_averaged(folder):
    model, source = classifier("audio"), open_labels(folder).source("test", "audio")
    found = predict(model, source, clip_spec("audio", AUDIO, MODEL), windows=2, crops=1)
    for number, name in enumerate(found.files):
        logits = []
        for start in (0.0, 0.64):
            sound = read_audio(folder / name, start=start, num_samples=1280, sample_rate_hz=8000)
            with torch.no_grad():
                logits.append(model(torch.from_numpy(sound)[None])[0])
        expected = torch.stack(logits).mean(0).numpy()
        np.testing.assert_allclose(found.logits[number], expected, rtol=1e-5, atol=1e-6)


def test_crops_of_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="writes a picture")
    pixels = np.random.default_rng(0).integers(0, 256, (16, 26, 3), dtype=np.uint8)
    (tmp_path / "x").mkdir()
    image.fromarray(pixels).save(tmp_path / "x" / "a.png")
    spec = clip_spec("image", VIDEO | dict(frames=1), MODEL)
    views = read_views(open_labels(tmp_path).source("train", "video"), 0, spec, 1, 3)
    expected = [pixels[None, :, left : left + 16] for left in (0, 5, 10)]
    np.testing.assert_array_equal(views, expected)


def test_views_lie_within_a_segment(tmp_path):
    """Each frame's grey is its number."""
    frames = np.repeat(np.arange(20, dtype=np.uint8) * 12, 16 * 16 * 3).reshape(20, 16, 16, 3)
    write_clip(tmp_path / "a.mp4", frames, None, frames_per_second=10, sample_rate_hz=8000)
    for end, seen in ((1.4, [[5, 6, 7, 8], [10, 11, 12, 13]]), (0.7, [[5, 6, 0, 0]] * 2)):
        (tmp_path / "labels.csv").write_text(f"file,class,split,start,end\na,x,test,0.5,{end}\n")
        source = open_labels(tmp_path).source("test", "video")
        views = read_views(source, 0, clip_spec("video", VIDEO, MODEL), 2, 1)
        assert np.rint(views.mean((2, 3, 4)) / 12).astype(int).tolist() == seen


def test_crops_go_along_the_longer_side():
    assert covering_size(240, 426, 320, 320) == (320, 568)
    assert covering_size(426, 240, 320, 320) == (568, 320)
    assert crop_corners(320, 568, 320, 320, 3) == [(0, 0), (0, 124), (0, 248)]
    assert crop_corners(568, 320, 320, 320, 3) == [(0, 0), (124, 0), (248, 0)]
    assert crop_corners(320, 568, 320, 320, 1) == [(0, 124)]
    assert crop_corners(320, 320, 320, 320, 3) == [(0, 0)] * 3


def test_what_cannot_be_read_is_listed(folder, tmp_path):
    for name in ("red/0.mp4", "blue/0.mp4"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes((folder / "test" / name).read_bytes())
    (tmp_path / "red" / "broken.mp4").write_bytes(b"no video")
    frames = np.zeros((8, 16, 16, 3), np.uint8)
    silent = tmp_path / "blue" / "silent.mp4"
    write_clip(silent, frames, None, frames_per_second=10, sample_rate_hz=8000)
    source = open_labels(tmp_path).source("train", "audio")
    spec = clip_spec("audio", AUDIO, MODEL)
    found = predict(classifier("audio"), source, spec, windows=1, crops=1)
    assert found.files == ["blue/0.mp4", "red/0.mp4"]
    assert set(found.skipped) == {"blue/silent.mp4", "red/broken.mp4"}
    assert "no audio" in found.skipped["blue/silent.mp4"]
    (tmp_path / "red" / "0.mp4").unlink()
    (tmp_path / "blue" / "0.mp4").unlink()
    with pytest.raises(MediaError, match=r"no example of .* can be read; the first one"):
        predict(classifier("audio"), open_labels(tmp_path).source("train", "audio"), spec,
                windows=1, crops=1)  # fmt: skip


def test_the_model_stays_as_it_is(folder):
    model, source = classifier(), open_labels(folder).source("test", "video")
    model.train()
    model.video_encoder.eval()  # as with a frozen tower
    before = [module.training for module in model.modules()]
    predict(model, source, clip_spec("video", VIDEO, MODEL), windows=1, crops=1)
    assert [module.training for module in model.modules()] == before


def test_reading_ahead_keeps_the_order_and_raises():
    assert list(ahead(lambda x: x * x, range(20), 3)) == [x * x for x in range(20)]
    with pytest.raises(ZeroDivisionError):
        list(ahead(lambda x: 1 / x, [2, 1, 0, 3], 2))


@pytest.fixture
def saved(tmp_path):
    """A classifier as convert writes it, without a record of a training."""
    model = classifier()
    model.labels = list(CLASSES)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_what_is_written_tells_all_again(folder, saved, tmp_path):
    found = evaluate(saved, folder)
    assert write_evaluation(found, tmp_path / "out") == []
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    settings = result["settings"]
    assert (settings["windows"], settings["crops"], settings["split"]) == (4, 3, "test")
    assert settings["input"] == VIDEO and settings["precision"] == "fp32"
    with np.load(tmp_path / "out" / "scores.npz") as file:
        scores = one_class_scores(file["logits"], file["targets"].argmax(1))
        assert list(file["files"]) == found.predictions.files
    assert {name: result[name] for name in scores} == scores
    rows = list(csv.DictReader((tmp_path / "out" / "classes.csv").open()))
    assert [row["class"] for row in rows] == list(CLASSES) and rows[0]["examples"] == "2"
    counts = list(csv.reader((tmp_path / "out" / "confusion.csv").open()))
    assert sum(int(count) for row in counts[1:] for count in row[1:]) == 4
    picture = (tmp_path / "out" / "confusion.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    again = evaluate(
        settings["model"], settings["data"], split=settings["split"], windows=settings["windows"],
        crops=settings["crops"], batch_size=settings["batch_size"], workers=0,
        precision=settings["precision"], **settings["input"],
    )  # fmt: skip
    np.testing.assert_array_equal(again.predictions.logits, found.predictions.logits)
    assert again.result == found.result


def test_a_result_takes_the_place_of_an_earlier_one(folder, saved, tmp_path, monkeypatch):
    """Classes may have any name, and what an earlier result drew goes."""
    found = dataclasses.replace(evaluate(saved, folder), labels=["class", "red"])
    write_evaluation(found, tmp_path / "out")
    header, *counts = csv.reader((tmp_path / "out" / "confusion.csv").open())
    assert header == ["class", "class", "red"] and [row[0] for row in counts] == ["class", "red"]
    assert [len(row) for row in counts] == [3, 3]
    several = dataclasses.replace(found, targets=np.ones_like(found.targets))
    write_evaluation(several, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"result.json", "classes.csv", "scores.npz"}
    write_evaluation(found, tmp_path / "out")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    write_evaluation(found, tmp_path / "out")
    assert not (tmp_path / "out" / "confusion.png").exists()


def test_another_input_size_is_taken(folder, saved):
    found = evaluate(saved, folder, height=24, width=24, windows=1, crops=1)
    assert found.result["settings"]["input"] == VIDEO | dict(height=24, width=24)
    usual = evaluate(saved, folder, windows=1, crops=1)
    assert not np.allclose(found.predictions.logits, usual.predictions.logits)


def test_the_command(folder, saved, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # not installed
    main(["evaluate", "--model", str(saved), "--data", str(folder), "--out", str(tmp_path / "o")])
    out, err = capsys.readouterr()
    assert "top1: " in out and "pip install 'vatt_fast[eval]'" in err
    assert (tmp_path / "o" / "confusion.csv").exists()
    assert not (tmp_path / "o" / "confusion.png").exists()
    main(["evaluate", "--model", str(saved), "--data", str(folder), "--windows", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["examples"] == 4 and result["settings"]["windows"] == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda model: (model / "labels.txt").unlink(), "has no labels.txt; write its classes"),
        (lambda model: (model / "labels.txt").write_text("blue\ngreen\n"),
         "has the class 'red', which is none of the model's 2 classes"),
        (lambda model: (model / "finetune.json").write_text("{}"), "finetune.json is damaged"),
    ],
)  # fmt: skip
def test_models_that_do_not_fit_are_refused(folder, saved, change, match, capsys):
    change(saved)
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--model", str(saved), "--data", str(folder)])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and error.count("\n") == 1
    assert match in error


def divided(rank, world, model, other, folder):
    """What a rank found with the other one, what alone, and what it says of another model."""
    ranks, options = (
        Ranks(rank, world),
        dict(batch_size=2, windows=1, crops=1, device="cpu", workers=1),
    )
    both = [evaluate(model, folder, **options, **more) for more in (dict(ranks=ranks), {})]
    try:
        evaluate(other if rank else model, folder, ranks=ranks, **options)
    except ValueError as error:
        return [(one.result, one.table, one.predictions, one.targets) for one in both], str(error)


def test_ranks_divide_the_files_and_are_one(folder, saved, tmp_path):
    """To the last bit, with a file that cannot be read."""
    data = tmp_path / "data"
    shutil.copytree(folder, data)
    (data / "test" / "red" / "broken.mp4").write_bytes(b"no video")
    other = classifier()
    other.labels = list(CLASSES)
    other.classifier.bias.data += 1
    other.save_pretrained(tmp_path / "other")
    for (shared, alone), told in in_processes(2, divided, saved, tmp_path / "other", data):
        assert shared[:2] == alone[:2] and shared[2].files == alone[2].files
        assert np.array_equal(shared[2].logits, alone[2].logits)
        assert np.array_equal(shared[3], alone[3])
        assert shared[0]["examples"] == 4 and list(shared[0]["skipped"]) == ["test/red/broken.mp4"]
        assert "rank 1" in told and "has model_sha256" in told


def test_crops_of_sound_are_refused(folder, tmp_path):
    model = classifier("audio")
    model.labels = list(CLASSES)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="crops is 3, and sound has none"):
        evaluate(tmp_path, folder, crops=3)
    found = evaluate(tmp_path, folder)
    assert {"top1", "mAP", "AUC", "d_prime"} <= found.result.keys()
    settings = found.result["settings"]
    assert settings["input"] == AUDIO and (settings["windows"], settings["crops"]) == (4, 1)


def test_one_modality_is_read():
    """Of the other modality as little as can be is asked for."""
    spec = clip_spec("audio", AUDIO, dataclasses.replace(MODEL, height=64))
    assert (spec.frames, spec.height, spec.width) == (1, 1, 1) and spec.seconds == 0.16
    assert clip_spec("video", VIDEO, MODEL).samples == 1
