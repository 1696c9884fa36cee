"""Losses, weights, mixup and schedules of fine-tuning, against the recording and by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from oracle import array, recording

from vatt_fast.finetuning.losses import (
    balanced_weights,
    mixed,
    mixup_draw,
    terms_of,
    weights_of,
)
from vatt_fast.finetuning.settings import RECIPES, FineTuneConfig, rate_of


def config(**changes):
    return FineTuneConfig(**dict(data="d", out="o", init="runs/x") | changes)


def test_the_balanced_loss_as_recorded():
    labels, logits = array("audiocls/labels"), array("audiocls/logits")
    torch.testing.assert_close(
        balanced_weights(labels), array("audiocls/weights").flatten(), rtol=1e-6, atol=0
    )
    weights = weights_of("balanced", labels, torch.ones(len(labels), dtype=torch.bool))
    loss = (weights * terms_of("balanced", logits, labels)).sum()
    torch.testing.assert_close(loss, array("audiocls/loss").reshape(()), rtol=1e-6, atol=0)


def test_balanced_weights_of_absent_classes_and_empty_examples():
    targets = torch.tensor([[1.0, 0, 0], [1, 1, 0], [0, 0, 0]])
    assert balanced_weights(targets).tolist() == pytest.approx([0.5, (0.5 + 1) / 2, 0])


def test_examples_without_the_stream_count_nothing():
    """Loss and gradient are those of the batch without them."""
    torch.manual_seed(0)
    logits, targets = torch.randn(5, 4), (torch.rand(5, 4) < 0.6).float()
    valid = torch.tensor([True, False, True, True, False])
    for loss in ("balanced", "sigmoid", "softmax"):
        whole = weights_of(loss, targets, valid) * terms_of(loss, logits, targets, 0.1)
        alone = weights_of(loss, targets[valid], valid[valid])
        alone = alone * terms_of(loss, logits[valid], targets[valid], 0.1)
        torch.testing.assert_close(whole.sum(), alone.sum())
    nothing = weights_of("softmax", targets, torch.zeros(5, dtype=torch.bool))
    assert nothing.tolist() == [0] * 5


def test_softmax_with_smoothing_is_torchs():
    torch.manual_seed(0)
    logits, classes = torch.randn(6, 5), torch.arange(6) % 5
    terms = terms_of("softmax", logits, F.one_hot(classes, 5).float(), 0.1)
    expected = F.cross_entropy(logits, classes, label_smoothing=0.1, reduction="none")
    torch.testing.assert_close(terms, expected)


def test_the_schedule_as_recorded():
    """The kinetics recipe itself gives the released rates, counted from 0."""
    run = config()
    rates = [rate_of(run, int(step)) for step in recording()["lr/steps"][:6]]
    expected = recording()["lr/finetune_2500_100000_0.005"]
    np.testing.assert_allclose(rates, expected, rtol=1e-6, atol=1e-12)


def test_mixup_draws():
    share, partner = mixup_draw(4000, 5.0, seed=3, step=7)
    assert sorted(partner.tolist()) == list(range(4000))
    assert float(share.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(share.var()) == pytest.approx(1 / 44, rel=0.1)  # of Beta(5, 5)
    again, _ = mixup_draw(4000, 5.0, seed=3, step=7)
    other, _ = mixup_draw(4000, 5.0, seed=3, step=8)
    assert torch.equal(share, again) and not torch.equal(share, other)


def test_mixup_mixes_waveforms_labels_and_frames():
    share, partner = torch.tensor([0.25, 1.0]), torch.tensor([1, 0])
    x = torch.tensor([[1.0, 2.0], [3.0, -2.0]])
    assert mixed(x, share, partner).tolist() == [[2.5, -1.0], [3.0, -2.0]]
    frames = torch.tensor([[0], [255]], dtype=torch.uint8)
    assert mixed(frames, share, partner).flatten().tolist() == pytest.approx([0.5, 1.0])


def test_recipes_have_the_published_numbers():
    video, audio = config(), config(task="audio")
    image = config(task="image").with_steps(1_281_167)
    assert (video.recipe, audio.recipe, image.recipe) == ("kinetics", "audioset", "imagenet")
    assert (video.batch_size, video.steps, video.warmup_steps) == (64, 100_000, 2_500)
    assert (video.learning_rate, video.final_learning_rate, video.momentum) == (0.005, 0, 0.9)
    assert (video.label_smoothing, video.classifier_dropout, video.clip) == (0.1, 0.5, 0.75)
    assert (video.frames, video.height, video.frames_per_second) == (32, 320, 12.5)
    assert (audio.batch_size, audio.steps, audio.warmup_steps) == (1024, 50_000, 5_000)
    assert (audio.learning_rate, audio.mixup, audio.loss) == (0.2, 5.0, "balanced")
    assert audio.samples / audio.sample_rate_hz == 6.4 and audio.sample_rate_hz == 24_000
    assert (image.batch_size, image.learning_rate, image.height) == (512, 0.08, 384)
    assert image.steps == 50 * (1_281_167 // 512) and image.warmup_steps == 0
    for name, recipe in RECIPES.items():  # all can be overridden
        for field, value in recipe.items():
            if isinstance(value, float) and field not in ("frames_per_second", "epochs"):
                changed = config(recipe=name, **{field: value / 2 + 0.001})
                assert getattr(changed, field) == value / 2 + 0.001


def test_steps_of_epochs():
    run = config(recipe="small", batch_size=10, epochs=2.5).with_steps(105)
    assert (run.steps, run.warmup_steps) == (25, 2)
    assert config(recipe="small").with_steps(99, {"steps": 7}).steps == 7  # as a run began


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        (dict(task="text"), "task is 'text'; it is one of video, audio, image"),
        (dict(loss="hinge"), "loss is 'hinge'"),
        (dict(steps=5, epochs=2), "give one of them"),
        (dict(samples=8000), "samples does not belong to task 'video'"),
        (dict(task="image", frames=4), "an image has one"),
        (dict(batch_size=0), "batch_size is 0; it must be at least 1"),
        (dict(label_smoothing=1.0), "label_smoothing is 1.0; it lies in"),
        (dict(learning_rate=float("nan")), "learning_rate is nan"),
        (dict(final_learning_rate=1.0), "take a smaller one"),
        (dict(init="none"), "init none starts from a random model of a preset"),
        (dict(preset="tiny"), "preset belongs to init none"),
        (dict(framework="jax", compile="blocks"), "jax always compiles its step"),
        (dict(framework="jax", recompute="ops"), "jax has 'blocks'"),
        (dict(framework="jax", micro_batch=2), "micro_batch belongs to framework 'torch'"),
        (dict(init="none", preset="tiny", frozen=True), "frozen trains the classifier of a random"),
        (dict(mixup=1.0, drop_rate=0.5, drop_per="clip"), "take drop_per batch"),
        (dict(best_by="score"), "give eval_split"),
        (dict(augment="blur"), "augment is 'blur'"),
        (dict(hold_out=1.0), "hold_out is 1.0"),
    ],
)
def test_settings_out_of_range_are_refused(changes, match):
    with pytest.raises(ValueError, match=match) as error:
        config(**changes)
    assert "\n" not in str(error.value)
