"""What a run shows of itself: values, loggers, retrieval on the way, report.html; torch.compile."""

import dataclasses
import importlib.util
import json
import shutil
import subprocess
import sys
import types
import warnings
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from run_pages import parsed
from training_runs import MODEL, metrics, settings, write_media

from vatt_fast.cli import main
from vatt_fast.config import VATTConfig
from vatt_fast.data.augment import Key, name_of
from vatt_fast.evaluation.search import measure, read_folder
from vatt_fast.model import VATTOutput, create_model
from vatt_fast.training import loggers as loggers_module
from vatt_fast.training import loop as loop_module
from vatt_fast.training import running
from vatt_fast.training.checkpoint import read_standing
from vatt_fast.training.loop import BEST, CHECKPOINT, METRICS, REPORT, pretrain
from vatt_fast.training.metrics import Timer, mean_cosines, read_metrics
from vatt_fast.training.run_page import ticks_over
from vatt_fast.training.settings import PretrainConfig, differences

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def run(config, **options):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup_steps")
        return pretrain(config, model_config=MODEL, progress=False, **options)


@pytest.fixture(scope="module")
def watched(folder, tmp_path_factory):
    """A run of four steps that is evaluated at each second one."""
    out = tmp_path_factory.mktemp("watched")
    run(settings(folder, out, steps=4, eval_data=str(folder), eval_every=2))
    return out


# -- values ----------------------------------------------------------------------------------------


def test_a_step_tells_loss_speed_waiting_gradient_and_spread(watched):
    for line in metrics(watched):
        assert 0 <= line["data_wait_seconds"] < line["step_seconds"]
        assert line["clips_per_second"] > 0 and line["gradient_norm"] > 0
        for name in ("video_va", "audio_va", "video_vt", "text_vt"):
            assert -1 <= line[f"cosine_{name}"] <= 1


def test_mean_cosine_is_that_of_all_pairs():
    z = torch.randn(9, 2, 8, dtype=torch.bfloat16)
    valid = torch.rand(9, 2) > 0.3
    output = VATTOutput(z_video_va=z[:, 0], z_text_vt=z)
    found = mean_cosines(
        output, {"video_valid": valid[:, 0], "text_valid": valid, "audio_valid": None}, xp=torch
    )
    assert set(found) == {"cosine_video_va", "cosine_text_vt"}
    for name, rows in (("cosine_video_va", z[:, 0][valid[:, 0]]), ("cosine_text_vt", z[valid])):
        unit = torch.nn.functional.normalize(rows.double(), dim=-1)
        cosines = unit @ unit.T
        pairs = cosines[~torch.eye(len(unit), dtype=torch.bool)]
        assert float(found[name]) == pytest.approx(float(pairs.mean()), abs=1e-5)


@pytest.mark.parametrize(("rows", "expected"), [(5, 1.0), (1, 0.0), (0, 0.0)])
def test_mean_cosine_of_a_collapsed_batch_and_of_too_few(rows, expected):
    z = torch.ones(5, 8)
    valid = torch.arange(5) < rows
    found = mean_cosines(VATTOutput(z_video_va=z), {"video_valid": valid}, xp=torch)
    assert float(found["cosine_video_va"]) == pytest.approx(expected, abs=1e-6)


def test_cosines_are_computed_at_logged_steps_alone(folder, tmp_path, monkeypatch):
    from vatt_fast.training import step as step_module

    calls = []
    original = step_module.mean_cosines
    monkeypatch.setattr(
        step_module, "mean_cosines", lambda *a, **o: calls.append(1) or original(*a, **o)
    )
    run(settings(folder, tmp_path, steps=5, log_every=2, checkpoint_every=5))
    assert len(calls) == 3  # steps 2, 4 and the last
    assert [line["step"] for line in metrics(tmp_path)] == [2, 4, 5]


def test_a_timer_tells_a_steps_time_and_its_waiting(monkeypatch):
    clock, waited = iter([0.0, 10.0, 10.0]), iter([2.0, 6.0, 6.0])
    monkeypatch.setattr("vatt_fast.training.metrics.time.perf_counter", lambda: next(clock))
    timer = Timer(lambda: next(waited))
    for _ in range(2):
        timer.step(5)
    assert timer.take() == {
        "clips_per_second": 1.0,
        "step_seconds": 5.0,
        "data_wait_seconds": 2.0,
    }


# -- loggers ---------------------------------------------------------------------------------------


def test_loggers_get_every_line_and_the_file_stays_the_truth(folder, tmp_path, monkeypatch):
    class Kept:
        def __init__(self, out, start, settings):
            self.lines = []
            made.append((start, settings["steps"], self))

        def write(self, step, values):
            self.lines.append({"step": step, **values})

        def close(self):
            self.lines.append("closed")

    made = []
    monkeypatch.setitem(loggers_module.LOGGERS, "kept", (Kept, "json", "pip install json"))
    run(settings(folder, tmp_path, steps=3, loggers="kept"))
    ((start, steps, kept),) = made
    assert (start, steps) == (0, 3) and kept.lines == [*metrics(tmp_path), "closed"]
    assert not list(tmp_path.glob("events*"))


def test_wandb_continues_the_run_that_it_began(folder, tmp_path, monkeypatch):
    begun, logged = [], []

    class Run:
        def define_metric(self, *names, **options):
            assert options == {"step_metric": "step"}

        def log(self, values):
            logged.append(values["step"])

        def finish(self):
            pass

    def init(**options):
        begun.append(options)
        return Run()

    fake = types.ModuleType("wandb")
    fake.__spec__ = importlib.util.spec_from_loader("wandb", None)
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = settings(folder, tmp_path, steps=4, loggers="wandb,tensorboard")
    stopping, calls = running.save, []

    def save_once(*args):
        stopping(*args)
        calls.append(1)
        raise KeyboardInterrupt

    monkeypatch.setattr(running, "save", save_once)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    monkeypatch.setattr(running, "save", stopping)
    run(config)
    assert len(begun) == 2 and begun[0]["id"] == begun[1]["id"] and begun[0]["resume"] == "allow"
    assert begun[0]["config"]["batch_size"] == 4 and logged == [1, 2, 3, 4]
    assert list(tmp_path.glob("events*"))


def test_loggers_that_are_absent_or_unknown_are_refused(monkeypatch, capsys, tmp_path, folder):
    if importlib.util.find_spec("wandb") is None:
        with pytest.raises(SystemExit):
            main(["pretrain", "--data", str(folder), "--out", str(tmp_path / "a"), "--loggers",
                  "wandb"])  # fmt: skip
        assert "not installed: pip install wandb" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'comet' is none of tensorboard, wandb"):
        settings(folder, tmp_path, loggers="comet")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert loggers_module.names_of(None) == () and loggers_module.names_of("none") == ()
    with pytest.raises(ValueError, match=r"pip install 'vatt_fast\[train\]'"):
        settings(folder, tmp_path, loggers="tensorboard")


# -- evaluation ------------------------------------------------------------------------------------


def test_retrieval_on_the_way_is_what_the_command_measures(watched, folder):
    lines = {line["step"]: line for line in metrics(watched)}
    assert [step for step, line in lines.items() if "text_to_video_r1" in line] == [2, 4]
    model = create_model(watched)
    found = measure(model, folder, read_folder(model, folder))
    for kind in ("text_to_video", "audio_to_video"):
        for name in ("r1", "r5", "r10", "median_rank"):
            assert lines[4][f"{kind}_{name}"] == pytest.approx(found[kind][name])


def test_evaluation_changes_nothing_of_the_training(watched, folder, tmp_path):
    run(settings(folder, tmp_path, steps=4))
    plain = create_model(tmp_path).state_dict()
    for name, value in create_model(watched).state_dict().items():
        assert torch.equal(value, plain[name]), name
    losses = [[line["loss"] for line in metrics(out)] for out in (watched, tmp_path)]
    assert losses[0] == losses[1]


def test_the_best_by_retrieval_is_kept(folder, tmp_path, monkeypatch):
    scores = iter([10.0, 40.0, 30.0, 20.0, 35.0])
    weights = {}

    def scored(model, *data):
        score = next(scores)
        weights[score] = model.text_tokens.agg.detach().clone()
        return {"text_to_video_r10": score}

    monkeypatch.setattr(loop_module, "evaluate", scored)
    config = settings(
        folder, tmp_path, steps=3, eval_data=str(folder), eval_every=1, checkpoint_every=100
    )
    config = dataclasses.replace(config, best_by="text_to_video")
    run(config)
    assert torch.equal(create_model(tmp_path / BEST).text_tokens.agg, weights[40.0])
    assert not torch.equal(create_model(tmp_path).text_tokens.agg, weights[40.0])
    assert read_standing(tmp_path / CHECKPOINT).best_score == 40.0


def test_evaluation_needs_clips(folder, tmp_path):
    with pytest.raises(ValueError, match="eval_every needs held-out clips"):
        settings(folder, tmp_path, eval_every=5)
    with pytest.raises(ValueError, match="best_by 'text_to_video' needs held-out clips"):
        settings(folder, tmp_path, best_by="text_to_video")
    with pytest.raises(ValueError, match="nowhere"):
        run(settings(folder, tmp_path / "out", eval_data="nowhere"))
    assert not (tmp_path / "out").exists()
    assert settings(folder, tmp_path, eval_data="x", checkpoint_every=7).eval_every == 7


# -- report.html -----------------------------------------------------------------------------------


def test_the_report_holds_curves_retrieval_clips_settings_and_versions(watched):
    page = parsed(watched / REPORT)
    text = " ".join(page.text)
    for part in ("Step 4 of 4", "Loss", "Gradient norm", "collapsed", "waiting for data",
                 "Text to video", "median rank", "clip number 0", "crop,flip,colour",
                 "batch_size", torch.__version__):  # fmt: skip
        assert part in text, part
    assert len(page.images) == 12  # six clips, and the same augmented
    assert page.tags.count("svg") == 8


def test_curves_are_drawn_where_their_values_are(watched):
    text = (watched / REPORT).read_text()
    chart = text[text.index("<svg") : text.index("</svg>") + 6]
    root = ElementTree.fromstring(chart)
    losses = [line["loss"] for line in metrics(watched)]
    points = root.find("polyline").get("points").split()
    xs, ys = np.array([point.split(",") for point in points], float).T
    assert len(xs) == 4 and np.all(np.diff(xs) > 0)
    slope, shift = np.polyfit(losses, ys, 1)
    assert slope < 0  # up is more
    np.testing.assert_allclose(slope * np.array(losses) + shift, ys, atol=0.11)
    # the axis says the same
    labels = [each for each in root.iter("text") if each.get("text-anchor") == "end"][:-1]
    values = np.array([float(each.text) for each in labels])
    np.testing.assert_allclose(
        slope * values + shift, [float(each.get("y")) - 4 for each in labels], atol=0.6
    )


def test_a_report_of_odd_names_and_values(folder, tmp_path):
    media = tmp_path / 'a <b> & "c"'
    media.mkdir()
    shutil.copy(folder / "0.mp4", media / "<i>0 & 1.mp4")
    shutil.copy(folder / "1.mp4", media / "1.mp4")
    out = tmp_path / "<script>"
    run(settings(media, out, steps=2, batch_size=2))
    lines = (out / METRICS).read_text().splitlines()
    (out / METRICS).write_text("".join(
        line.replace(f'"loss": {json.loads(line)["loss"]}', '"loss": null') + "\n"
        for line in lines
    ) + '{"step": 3, "lo')  # fmt: skip
    assert read_metrics(out / METRICS)[0]["loss"] is None
    page = parsed(out / REPORT)
    assert "<i>0 & 1.mp4" in "".join(page.text) and "no caption" in "".join(page.text)
    # a run that goes on reads what is left of a nan and half a line
    with pytest.raises(ValueError, match="another run"):
        run(settings(media, out, steps=4, batch_size=2))


def test_the_report_is_written_whole_and_counts_on(folder, tmp_path, monkeypatch):
    config = settings(folder, tmp_path, steps=6, eval_data=str(folder), eval_every=6)
    stopping, saves = running.save, []

    def save(*args):
        stopping(*args)
        saves.append(args)
        if len(saves) == 2:  # of step 4
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "save", save)
    with pytest.raises(KeyboardInterrupt):
        run(config)
    assert "Step 2 of 6" in "".join(parsed(tmp_path / REPORT).text)
    assert "Not measured" in "".join(parsed(tmp_path / REPORT).text)
    monkeypatch.setattr(running, "save", stopping)
    run(config)
    text = "".join(parsed(tmp_path / REPORT).text)
    assert "Step 6 of 6" in text and "Not measured" not in text
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1), (0, 7.3), (-0.2, 0.9), (5e-5, 1e-4), (3, 3), (0, 0), (0, 12345)]
)
def test_ticks_are_round_and_span_the_values(low, high):
    ticks = ticks_over(low, high)
    assert ticks[0] <= low + 1e-9 and ticks[-1] >= high * (1 - 1e-9) and 2 <= len(ticks) <= 7
    assert all(float(f"{tick:.3g}") == pytest.approx(tick) for tick in ticks)


def test_a_browser_shows_the_report(watched, tmp_path):
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,3000",
         f"--user-data-dir={tmp_path}", f"--screenshot={tmp_path / 'page.png'}",
         (watched / REPORT).as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shown = imread(tmp_path / "page.png")[..., :3]
    for colour in ((0, 114, 178), (213, 94, 0), (0, 158, 115)):  # curves
        near = np.abs(shown * 255 - colour).max(-1) < 40
        assert near.sum() > 100, colour


# -- settings --------------------------------------------------------------------------------------


def test_a_run_augments_by_its_recipe_and_says_so(folder, tmp_path):
    def recorded(name, **options):
        given = options.pop("augment", None)
        extra = {} if not callable(given) else {"augment": given}
        out = tmp_path / name
        changes = {} if given is None or callable(given) else {"augment": given}
        run(settings(folder, out, steps=1, warmup_steps=0, **changes), **extra)
        return read_standing(out / CHECKPOINT).run["augment"], metrics(out)[0]["loss"]

    def dim(key: Key, frames: np.ndarray) -> np.ndarray:
        return frames // 2

    paper = recorded("paper")
    plain = recorded("none", augment="none")
    dimmed = recorded("dimmed", augment=dim)
    assert paper[0] == "crop,flip,colour" and plain[0] == "none"
    assert dimmed[0] == name_of(dim) and "dim" in dimmed[0]
    assert len({paper[1], plain[1], dimmed[1]}) == 3
    with pytest.raises(ValueError, match="augment was 'crop,flip,colour', now 'flip'"):
        run(settings(folder, tmp_path / "paper", steps=1, warmup_steps=0, augment="flip"))


def test_a_checkpoint_from_before_augmentation_was_without():
    was = {"steps": 5, "model": {}}
    now = {"augment": "none", "steps": 5, "model": json.loads(VATTConfig().to_json())}
    assert differences(was, now) == []
    told = differences(was, now | {"augment": "crop,flip,colour"})
    assert told == ["augment was 'none', now 'crop,flip,colour'"]


# -- torch.compile ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones_do(folder, tmp_path):
    from torch._dynamo.utils import counters

    found, names = {}, []
    one = dataclasses.replace(MODEL.video, depth=1)
    small = dataclasses.replace(MODEL, video=dataclasses.replace(one, depth=2), audio=one, text=one)
    for how in ("off", "blocks"):
        counters.clear()
        config = settings(
            folder, tmp_path / how, steps=40, batch_size=7, checkpoint_every=40, warmup_steps=4,
            compile=how, augment="none", eval_data=str(folder), eval_every=40,
        )  # fmt: skip
        model = pretrain(config, model_config=small, progress=False)
        found[how] = np.array([line["loss"] for line in metrics(tmp_path / how)])
        graphs = counters["stats"]["unique_graphs"]
        # four blocks; those of one size and kind share a graph, and evaluation has none
        assert graphs == 0 if how == "off" else 2 <= graphs <= 4
        assert all(block._compiled_call_impl is None for block in model.video_encoder.blocks)
        names.append(list(model.state_dict()))
    np.testing.assert_allclose(found["blocks"][0], found["off"][0], rtol=1e-5)
    # Adam makes much of a rounding
    np.testing.assert_allclose(found["blocks"][:4], found["off"][:4], rtol=5e-3)
    for losses in found.values():
        assert losses[-5:].mean() < losses[:5].mean() - 0.3
    assert names[0] == names[1]


def test_jax_refuses_the_switch():
    with pytest.raises(ValueError, match="compile belongs to framework 'torch'"):
        PretrainConfig("a", "b", framework="jax", compile="blocks")
