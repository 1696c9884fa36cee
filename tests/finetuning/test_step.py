"""One step: the released optimizer by hand, parts of a batch, what is trained and what is not."""

import dataclasses
import math

import pytest
import torch
from labelled_media import settings
from training_runs import MODEL

from vatt_fast.classifier import ClassifierConfig
from vatt_fast.data.clips import Batch
from vatt_fast.finetuning.losses import mixed, mixup_draw, terms_of, weights_of
from vatt_fast.finetuning.step import FineTuner, initial_classifier

CLASSES = 5
AGNOSTIC = dataclasses.replace(MODEL, kind="modality_agnostic", text=MODEL.video, post_proj_dim=48)


def batch(modality="video", clips=6, seed=0):
    torch.manual_seed(seed)
    video = torch.randint(0, 256, (clips, 4, 16, 16, 3), dtype=torch.uint8)
    audio = torch.rand(clips, 1280) * 2 - 1
    there = torch.ones(clips, dtype=torch.bool)
    text = torch.zeros(clips, 1, 1, dtype=torch.int32)
    names = tuple(map(str, range(clips)))
    return Batch(video, audio, text, there, there, there[:, None], torch.zeros(clips), names)


def targets(clips=6):
    return torch.eye(CLASSES)[torch.arange(clips) % CLASSES]


def tuner(config=MODEL, modality="video", **changes):
    run = settings("d", "o", task=modality, **changes).with_steps(10)
    return FineTuner(run, ClassifierConfig(config, modality, CLASSES), None)


def weights(trainer):
    return {name: value.clone() for name, value in trainer.model().state_dict().items()}


def test_updates_are_those_of_keras():
    """The rate is in the velocity, and the gradient of the tower alone is clipped by its norm."""
    trainer, clips = tuner(clip=0.3), batch()
    velocity: dict[str, torch.Tensor] = {}
    for step, rate in enumerate((0.1, 0.05, 0.2)):
        model = trainer.model()
        names = dict(model.named_parameters())
        logits = model(clips.video)
        loss = terms_of("softmax", logits, targets(), 0.1).mean()
        gradients = dict(zip(names, torch.autograd.grad(loss, names.values()), strict=True))
        tower = [g for name, g in gradients.items() if not name.startswith("classifier.")]
        norm = torch.stack([g.square().sum() for g in tower]).sum().sqrt()
        assert norm > 0.3  # or nothing is clipped
        expected = {}
        for name, gradient in gradients.items():
            if not name.startswith("classifier."):
                gradient = gradient * (0.3 / norm)
            velocity[name] = 0.9 * velocity.get(name, 0) - rate * gradient
            expected[name] = names[name].detach() + velocity[name]
        update = trainer.step(clips, targets(), step, rate)
        torch.testing.assert_close(update.loss, loss.detach())
        for name, value in expected.items():
            torch.testing.assert_close(names[name].detach(), value, rtol=1e-5, atol=1e-6)


def test_gradients_below_the_clip_stay():
    some, clips = tuner(clip=1e6), batch()
    none = tuner(clip=0.0)
    for trainer in (some, none):
        trainer.step(clips, targets(), 0, 0.1)
    for name, value in weights(none).items():
        assert torch.equal(value, weights(some)[name]), name


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("loss", ["softmax", "balanced"])
def test_parts_of_a_batch_add_up_to_it(modality, loss):
    changes = dict(loss=loss, mixup=5.0)
    whole, parts = tuner(modality=modality, **changes), tuner(modality=modality, micro_batch=4,
                                                              **changes)  # fmt: skip
    found = [trainer.step(batch(), targets(), 3, 0.1) for trainer in (whole, parts)]
    torch.testing.assert_close(found[0].loss, found[1].loss)
    torch.testing.assert_close(found[0].gradient_norm, found[1].gradient_norm)
    for name, value in weights(whole).items():
        torch.testing.assert_close(value, weights(parts)[name], rtol=1e-4, atol=1e-6, msg=name)


def test_mixup_reaches_clips_and_labels():
    trainer, clips = tuner(modality="audio", loss="balanced", mixup=5.0), batch()
    share, partner = mixup_draw(6, 5.0, seed=0, step=2)
    x, y = mixed(clips.audio, share, partner), mixed(targets(), share, partner)
    with torch.no_grad():
        terms = terms_of("balanced", trainer.model()(x), y)
    expected = (weights_of("balanced", y, torch.ones(6, dtype=torch.bool)) * terms).sum()
    found = trainer.step(clips, targets(), 2, 0.0)
    torch.testing.assert_close(found.loss, expected)
    assert found.right is None


def test_a_clip_without_the_stream_teaches_nothing():
    clips = batch()
    valid = torch.arange(6) != 2
    other = dataclasses.replace(clips, video_valid=valid, video=clips.video.clone())
    changed = dataclasses.replace(other, video=other.video.clone())
    changed.video[2] = 0
    a, b = tuner(), tuner()
    a.step(other, targets(), 0, 0.1)
    b.step(changed, targets(), 0, 0.1)
    for name, value in weights(a).items():
        torch.testing.assert_close(value, weights(b)[name], rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("config", [MODEL, AGNOSTIC], ids=["specific", "agnostic"])
@pytest.mark.parametrize("modality", ["video", "audio"])
def test_everything_of_the_tower_is_trained_unless_it_is_frozen(config, modality):
    run = settings("d", "o", task=modality).with_steps(10)
    whole = ClassifierConfig(config, modality, CLASSES)
    tower = {
        name: value
        for name, value in initial_classifier(whole, run, None).state_dict().items()
        if not name.startswith("classifier.")
    }
    assert any(name.startswith("post_proj.") for name in tower) == config.agnostic
    for frozen in (False, True):
        changes = dict(frozen=frozen, init="runs/x", classifier_dropout=0.5, task=modality)
        trainer = FineTuner(settings("d", "o", **changes).with_steps(10), whole, tower)
        before = weights(trainer)
        trainer.step(batch(), targets(), 0, 0.1)
        moved = {n for n, value in weights(trainer).items() if not torch.equal(value, before[n])}
        head = {"classifier.weight", "classifier.bias"}
        assert moved == (head if frozen else set(before))
        assert trainer.model().training and trainer.model().classifier_dropout == 0.5
        if frozen:  # nothing of the tower is drawn at random
            assert not any(part.training for part in trainer.model().children())


def test_dropout_before_the_classifier_is_of_training_alone():
    trainer = tuner(classifier_dropout=0.9)
    model, clips = trainer.model(), batch().video
    with torch.no_grad():
        assert not torch.equal(model(clips), model(clips))
        model.eval()
        assert torch.equal(model(clips), model(clips))


def test_the_last_layer_begins_as_released():
    run = settings("d", "o", task="audio", loss="balanced")
    config = ClassifierConfig(MODEL, "audio", 527)
    model = initial_classifier(config, run.with_steps(1), None)
    layer, inputs = model.classifier, MODEL.audio.dim
    assert torch.allclose(layer.bias, torch.full((527,), -math.log(526)))
    assert float(layer.weight.detach().abs().max()) <= math.sqrt(6 / (inputs + 527))
    assert float(layer.weight.detach().var()) == pytest.approx(2 / (inputs + 527), rel=0.05)
    softmax = initial_classifier(config, settings("d", "o").with_steps(1), None).classifier
    assert not softmax.bias.any()
    assert float(softmax.weight.detach().var()) == pytest.approx(2 / (inputs + 527), rel=0.05)
    assert float(softmax.weight.detach().abs().max()) > math.sqrt(6 / (inputs + 527))  # normal
