"""Fine-tuning in JAX is fine-tuning in torch, to rounding: single steps, and runs that change."""

import dataclasses
import shutil

import pytest
import torch
from labelled_media import settings, write_labelled
from safetensors.torch import load_file
from test_finetune import run
from test_step import AGNOSTIC, CLASSES, batch, targets
from training_runs import MODEL, metrics

from vatt_fast.classifier import Classifier, ClassifierConfig
from vatt_fast.data.clips import DropToken
from vatt_fast.finetuning.step import FineTuner
from vatt_fast.training.checkpoint import CHECKPOINT

pytest.importorskip("jax", reason="the twin needs JAX")
pytest.importorskip("optax", reason="the twin needs optax")

from vatt_fast.on_jax.finetuning import JaxFineTuner

CASES = {
    "video": dict(clip=0.3, dropout=0.0),
    "audio": dict(task="audio", loss="balanced", mixup=5.0, clip=0.3),
    "frozen": dict(frozen=True, init="runs/x", momentum=0.0, clip=0.0, loss="sigmoid"),
    "agnostic": dict(clip=0.3),
    "spectrogram": dict(task="audio", loss="balanced", mixup=5.0, clip=0.3),
}
MODELS = {
    "agnostic": AGNOSTIC,
    # 1280 samples of 16 kHz are four frames of 16 patches
    "spectrogram": dataclasses.replace(
        MODEL, audio_input="spectrogram", sample_rate_hz=16000, spectrogram_patch=(1, 5)
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_three_steps_are_those_of_torch(name):
    """Losses, norms, what is right, weights; one clip lacks the stream."""
    config = settings("d", "o", device="cpu", **CASES[name]).with_steps(10)
    modality = "audio" if config.task == "audio" else "video"
    whole = ClassifierConfig(MODELS.get(name, MODEL), modality, CLASSES)
    torch.manual_seed(0)
    tower = Classifier(whole).state_dict() if config.frozen else None
    trainers = [kind(config, whole, tower) for kind in (FineTuner, JaxFineTuner)]
    valid = torch.arange(6) != 2
    for step, rate in enumerate((0.1, 0.05, 0.2)):
        clips = dataclasses.replace(batch(seed=step), **{f"{modality}_valid": valid})
        ours, theirs = (each.step(clips, targets(), step, rate) for each in reversed(trainers))
        assert float(ours.loss) == pytest.approx(float(theirs.loss), rel=1e-5)
        assert float(ours.gradient_norm) == pytest.approx(float(theirs.gradient_norm), rel=1e-4)
        assert (ours.right is None) == (config.loss != "softmax")
        if ours.right is not None:
            assert int(ours.right) == int(theirs.right)
    expected = trainers[0].model().state_dict()
    for key, value in trainers[1].model().state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
        moved = tower is None or not torch.equal(value, tower[key])
        assert moved == (not config.frozen or key.startswith("classifier.")), key


def test_a_run_may_change_its_framework(tmp_path):
    """With a draw of DropToken for all clips: two steps in one framework, two in the other."""
    folder = write_labelled(tmp_path / "media")
    changes = dict(steps=4, drop_rate=0.5, eval_split="test")
    expected = run(settings(folder, tmp_path / "torch", keep_last=2, **changes)).state_dict()
    (tmp_path / "changed").mkdir()
    for name in ("checkpoint_00000002.safetensors", "metrics.jsonl"):
        shutil.copy(tmp_path / "torch" / name, tmp_path / "changed")
    (tmp_path / "changed" / "checkpoint_00000002.safetensors").rename(
        tmp_path / "changed" / CHECKPOINT
    )
    found = run(settings(folder, tmp_path / "changed", framework="jax", device="cpu", **changes))
    for key, value in found.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5, msg=key)
    a, b = (load_file(tmp_path / name / CHECKPOINT) for name in ("torch", "changed"))
    assert a.keys() == b.keys()
    for key, value in a.items():
        torch.testing.assert_close(b[key], value, rtol=1e-3, atol=1e-4, msg=key)
    for x, y in zip(metrics(tmp_path / "torch"), metrics(tmp_path / "changed"), strict=True):
        assert x.keys() == y.keys()
        for key in ("loss", "gradient_norm", "train_top1", "eval_top1"):
            if key in x:
                assert y[key] == pytest.approx(x[key], rel=1e-3), key
    assert Classifier.from_pretrained(tmp_path / "changed").labels == ["blue", "red"]


def test_clips_may_have_their_own_draws_of_droptoken():
    config = settings("d", "o", device="cpu", drop_rate=0.5, drop_per="clip").with_steps(10)
    whole, clips = ClassifierConfig(MODEL, "video", CLASSES), batch()
    keep = DropToken(MODEL, 0.5, "clip").draw(6, seed=0, step=0)["video_keep"]
    rows = torch.rand(6, keep.shape[-1], MODEL.video_patch_values) * 2 - 1
    dropped = dataclasses.replace(clips, video=rows, video_keep=torch.as_tensor(keep))
    found = [
        kind(config, whole, None).step(dropped, targets(), 0, 0.1)
        for kind in (FineTuner, JaxFineTuner)
    ]
    assert float(found[0].loss) == pytest.approx(float(found[1].loss), rel=1e-5)
