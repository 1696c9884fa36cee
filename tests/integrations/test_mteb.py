"""A model in MTEB's own loop, on a task of a few rendered clips that lies here."""

import numpy as np
import pytest
import torch
from small_model import WORDS, small_model

pytest.importorskip("mteb", reason="mteb is not installed")

import mteb
from datasets import Dataset, DatasetDict
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.abstasks.zeroshot_classification import AbsTaskZeroShotClassification

from vatt_fast.integrations.mteb import VATTEncoder

LABELS = list(WORDS[:3])


def videos(count=6):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 5, 12, 16, 3), np.uint8)


class Task(AbsTaskZeroShotClassification):
    metadata = TaskMetadata(
        name="LocalClips", description="random clips", reference=None,
        dataset={"path": "local/clips", "revision": "1"}, type="ZeroShotClassification",
        category="v2t", modalities=["video", "text"], eval_splits=["test"], eval_langs=["eng-Latn"],
        main_score="accuracy", date=None, domains=None, task_subtypes=None, license=None,
        annotations_creators=None, dialect=None, sample_creation=None, bibtex_citation=None,
    )  # fmt: skip
    input_column_name = "video"
    label_column_name = "label"

    def load_data(self, num_proc=None, **_):
        rows = dict(video=videos().tolist(), label=[0, 1, 2, 0, 1, 2])
        self.dataset = DatasetDict(test=Dataset.from_dict(rows))
        self.data_loaded = True

    def get_candidate_labels(self):
        return LABELS


def test_a_task_of_video_and_text_scores_as_the_model_does(tmp_path):
    model = small_model()
    encoder = VATTEncoder(model)
    result = mteb.evaluate(encoder, Task(), cache=None)
    (score,) = result.task_results[0].scores["test"]
    frames = torch.stack([encoder._frames(clip) for clip in videos()])
    assert frames.shape == (6, 16, 64, 64, 3) and frames.dtype == torch.uint8
    z = model.encode(video=frames, text=LABELS)
    guessed = (z["z_video_vt"] @ z["z_text_vt"].T).argmax(1)
    expected = (guessed == torch.tensor([0, 1, 2, 0, 1, 2])).float().mean()
    assert score["accuracy"] == pytest.approx(float(expected))


class Metadata:
    def __init__(self, *modalities):
        self.modalities = list(modalities)


def test_audio_is_resampled_and_the_middle_is_taken():
    model = small_model()
    encoder = VATTEncoder(model)
    samples, rate = model.config.samples, model.config.sample_rate_hz
    time = np.arange(3 * samples) / (rate / 2)
    wave = np.sin(2 * np.pi * 440 * time).astype(np.float32)
    clips = [
        {"array": wave, "sampling_rate": rate // 2},
        {"array": wave[:50], "sampling_rate": rate},
    ]
    found = encoder.encode([{"audio": clips}], task_metadata=Metadata("audio"))
    assert found.shape == (2, model.config.d_va)
    middle = encoder._waveform(clips[0])
    first = (6 * samples - samples) // 2
    exact = np.sin(2 * np.pi * 440 * (first + np.arange(samples)) / rate)
    assert np.abs(middle - exact).max() < 1e-2
    np.testing.assert_allclose(found[0], model.encode(audio=middle)["z_audio_va"][0], atol=1e-5)
    assert not encoder._waveform(clips[1])[50:].any()


def test_what_shares_no_space_is_refused():
    encoder = VATTEncoder(small_model())
    with pytest.raises(ValueError, match="audio and text share no space"):
        encoder.encode([], task_metadata=Metadata("audio", "text"))
    with pytest.raises(ValueError, match="has no image"):
        encoder.encode([], task_metadata=Metadata("image"))
    with pytest.raises(ValueError, match="video and audio; the model embeds one"):
        encoder.encode([dict(video=[0], audio=[0])], task_metadata=Metadata("video", "audio"))
    with pytest.raises(ValueError, match=r"a video is \(2, 3\)"):
        encoder.encode([dict(video=[np.zeros((2, 3))])], task_metadata=Metadata("video"))
