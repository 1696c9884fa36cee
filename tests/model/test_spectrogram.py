"""Spectrogram input against loops and SciPy, in torch, JAX and training; waveforms stay."""

import dataclasses
import json
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.signal import stft
from torch.utils.flop_counter import FlopCounterMode

from vatt_fast import VATT, preset
from vatt_fast.config import TowerConfig, VATTConfig
from vatt_fast.flops import true_flops
from vatt_fast.inputs import audio_input
from vatt_fast.model import audio_rows
from vatt_fast.parameters import model_parameters
from vatt_fast.spectrogram import log_mel, patch_rows, window_and_mel

TINY = dataclasses.replace(preset("tiny"), audio_input="spectrogram", vocab_size=16)


def sound(batch, samples, rate=16000, seed=0):
    rng = np.random.default_rng(seed)
    time = np.arange(samples) / rate
    tones = np.sin(2 * np.pi * rng.uniform(100, 6000, (batch, 1)) * time)
    return (0.4 * tones + rng.normal(0, 0.05, (batch, samples))).astype(np.float32)


def by_hand(waveform, rate, bins=80):
    """SciPy's STFT, the mel triangles of each bin one by one: (F, M) float64."""
    hop = round(rate * 1024 / 48000)
    frames = math.ceil(len(waveform) / hop)
    padded = np.concatenate([waveform.astype(float), np.zeros((frames + 1) * hop - len(waveform))])
    _, _, spectrum = stft(
        padded, rate, window="hann", nperseg=2 * hop, noverlap=hop, boundary=None, padded=False
    )
    magnitude = np.abs(spectrum.T) * hop  # SciPy divides by the window's sum, which is hop
    assert len(magnitude) == frames

    def mel(hertz):
        return 1127 * math.log(1 + hertz / 700)

    step = (mel(7600) - mel(80)) / (bins + 1)
    found = np.zeros((frames, bins))
    for m in range(bins):
        low = mel(80) + m * step
        for k in range(1, hop + 1):
            at = (mel(k * rate / (2 * hop)) - low) / step  # 1 at the triangle's top
            found[:, m] += max(0.0, min(at, 2 - at)) * magnitude[:, k]
    found = np.log(1 + 1e4 * found)
    return (found - found.min()) / (found.max() - found.min())


@pytest.mark.parametrize(("rate", "samples"), [(16000, 25600), (24000, 9001), (48000, 20480)])
def test_log_mel_is_scipys_stft_under_triangles(rate, samples):
    x = sound(2, samples, rate)
    config = dataclasses.replace(TINY, sample_rate_hz=rate, samples=samples)
    hop = config.spectrogram_hop
    assert abs(hop / rate - 0.02133) < 3e-5 and abs(2 * hop / rate - 0.04267) < 6e-5
    constants = [torch.from_numpy(part) for part in window_and_mel(hop, rate, 80)]
    ours = log_mel(torch.from_numpy(x), *constants, xp=torch)
    for row, one in zip(ours.numpy(), x, strict=True):
        np.testing.assert_allclose(row, by_hand(one, rate), atol=2e-4)


def test_a_tone_lies_where_it_should():
    """1000 Hz: between 80 and 7600 on the mel scale at 34 %; and sound in the second half only."""
    time = np.arange(48000) / 48000
    x = np.sin(2 * np.pi * 1000 * time).astype(np.float32)
    x[:24000] = 0
    mel = log_mel(x[None], *window_and_mel(1024, 48000, 80), xp=np)[0]
    expected = np.log(1.0 + 1000 / 700) - np.log(1 + 80 / 700)
    expected /= np.log(1 + 7600 / 700) - np.log(1 + 80 / 700)
    assert abs(mel[40].argmax() - (expected * 81 - 1)) <= 1
    assert mel[:21].max() < 0.01 and mel[30].max() > 0.9


def test_silence_is_zero_and_patches_are_time_major():
    constants = window_and_mel(341, 16000, 80)
    assert (log_mel(np.zeros((1, 12000), np.float32), *constants, xp=np) == 0).all()
    x = np.arange(2 * 40 * 10).reshape(2, 40, 10)
    rows = patch_rows(x, (16, 5), xp=np)
    assert rows.shape == (2, 4, 80)  # 2 x 2, the last 8 frames fill none
    for t in range(2):
        for m in range(2):
            expected = x[1, 16 * t : 16 * t + 16, 5 * m : 5 * m + 5].ravel()
            assert (rows[1, 2 * t + m] == expected).all()


def test_the_released_sizes():
    config = VATTConfig(audio_input="spectrogram")
    assert config.audio_grid == (9, 16) and config.num_audio_patches == 144
    assert config.audio_patch_values == 80 and config.spectrogram_hop == 1024
    shapes = {k: tuple(v.shape) for k, v in VATT(TINY).state_dict().items()}
    assert shapes["audio_tokens.project.weight"] == (128, 80)
    assert shapes["audio_tokens.position.tables.0"] == (4, 128)  # time
    assert shapes["audio_tokens.position.tables.1"] == (16, 128)  # mel


def test_a_waveform_models_weights_are_what_they_were():
    before = preset("tiny")
    names = {k for k in VATT(before).state_dict() if k.startswith("audio_tokens")}
    assert "audio_tokens.position.tables.1" not in names
    assert VATT(before).audio_tokens.project.weight.shape == (128, 128)
    # a config of an older version has no such keys
    values = json.loads(before.to_json())
    for name in ("audio_input", "mel_bins", "spectrogram_patch"):
        del values[name]
    assert VATTConfig.from_dict(values) == before
    assert VATTConfig.from_json(TINY.to_json()) == TINY


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VATT(TINY).eval()


@torch.no_grad()
def test_tokens_have_their_own_time_and_pitch(model):
    """Each token: its patch projected, plus the norm of its time's and its pitch's rows."""
    x = torch.from_numpy(sound(2, TINY.samples))
    rows = audio_rows(TINY, x)
    tokens = model.audio_tokens
    time, pitch = tokens.position.tables
    got = tokens(rows, audio_input(TINY, x), None)
    assert got.shape == (2, 65, 128)
    for t, m in ((0, 0), (1, 7), (3, 15)):
        n = 16 * t + m
        expected = tokens.project(rows[:, n]) + tokens.position.norm(time[t] + pitch[m])
        torch.testing.assert_close(got[:, 1 + n], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_dropped_patches_are_dropped_after_the_spectrogram(model):
    x = torch.from_numpy(sound(2, TINY.samples))
    keep = model.sample_keep(0.5, seed=1, step=2)["audio_keep"]
    assert len(keep) == 32
    rows = audio_rows(TINY, x)
    from_waveform = model(audio=x, audio_keep=keep).audio_pooled
    from_rows = model(audio=rows, audio_keep=keep).audio_pooled
    from_kept = model(audio=rows[:, keep.long()], audio_keep=keep).audio_pooled
    torch.testing.assert_close(from_waveform, from_rows)
    torch.testing.assert_close(from_waveform, from_kept, atol=1e-5, rtol=1e-5)
    assert (model(audio=x).audio_pooled - from_waveform).abs().max() > 1e-3


@torch.no_grad()
def test_another_length_resamples_the_time_alone(model):
    out = model(audio=torch.from_numpy(sound(1, 2 * TINY.samples)), features=True)
    assert out.audio_features.shape == (1, 1 + 9 * 16, 128)
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.from_numpy(sound(1, TINY.samples))
        assert audio_rows(TINY, x).dtype == torch.float32
        low = model(audio=x).audio_pooled
    assert torch.nn.functional.cosine_similarity(low.float(), model(audio=x).audio_pooled) > 0.99


def test_jax_is_torchs_twin(model):
    jax = pytest.importorskip("jax")
    from vatt_fast.on_jax import model as jax_model
    from vatt_fast.on_jax import weights

    params, statistics = weights.on_host(model)
    x = sound(2, TINY.samples)
    np.testing.assert_allclose(
        jax_model.audio_rows(TINY, x), audio_rows(TINY, torch.from_numpy(x)), atol=1e-4
    )
    keep = model.sample_keep(0.5, seed=1, step=2)["audio_keep"]
    for kept in (None, keep):
        ours = model(audio=torch.from_numpy(x), audio_keep=kept, features=True)
        theirs, _ = jax.jit(
            lambda a, k: jax_model.forward(
                params, statistics, audio=a, config=TINY, audio_keep=k, features=True
            )
        )(x, None if kept is None else kept.numpy())
        np.testing.assert_allclose(theirs.audio_features, ours.audio_features.detach(), atol=2e-4)


def test_flops_and_parameters_are_counted(model):
    x = torch.from_numpy(sound(1, TINY.samples))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(audio=x, features=True, heads=False)
    assert counter.get_total_flops() == true_flops(TINY, modalities=("audio",))["audio"]
    counted = sum(model_parameters(TINY).values()) + 1
    assert counted == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(audio_input="mfcc"), "audio_input is 'mfcc'; it is one of waveform, spectrogram"),
        (dict(spectrogram_patch=(16, 7)), "divides mel_bins, 80"),
        (dict(sample_rate_hz=8000), "takes at least 15200"),
        (dict(samples=4000), "takes at least 5116"),
    ],
)
def test_configs_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **changes)


def test_inputs_that_do_not_fit(model):
    with pytest.raises(ValueError, match="takes at least 5116 samples"):
        model(audio=torch.zeros(1, 5115))
    model(audio=torch.zeros(1, 5116))
    with pytest.raises(ValueError, match=r"patches are \(1, 64, 128\)"):
        model(audio=torch.zeros(1, 64, 128))


# -- training --------------------------------------------------------------------------------------


def test_a_run_trains_on_spectrograms(tmp_path):
    pytest.importorskip("av")
    from media_files import noise, numbered

    from vatt_fast.data.media_writer import write_clip
    from vatt_fast.training.loop import PretrainConfig, pretrain

    data = tmp_path / "clips"
    data.mkdir()
    said = {}
    for i in range(4):
        write_clip(data / f"{i}.mp4", np.roll(numbered(20), i, 2), noise(2.0, 16000, seed=i))
        said[f"{i}.mp4"] = [{"start": 0, "end": 2, "text": ["a dog", "the star"][i % 2]}]
    (data / "captions.json").write_text(json.dumps(said))
    tower = TowerConfig(depth=1, dim=16, mlp_dim=16, num_heads=1, head_dim=16)
    sizes = dict(frames=4, height=16, width=16, samples=6000, texts_per_clip=1, d_va=8, d_vt=8)
    config = dataclasses.replace(preset("tiny"), video=tower, audio=tower, text=tower, **sizes)
    run = PretrainConfig(
        str(data), str(tmp_path / "run"), steps=2, batch_size=4, warmup_steps=0, workers=0,
        device="cpu", precision="fp32", log_every=1, audio_input="spectrogram",
        video_patch=(2, 8, 8),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pretrain(run, model_config=config, progress=False)
    trained = VATT.from_pretrained(tmp_path / "run")
    assert trained.config.audio_input == "spectrogram"
    assert trained.config.video_grid == (2, 2, 2)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(math.isfinite(line["loss"]) for line in lines)
    assert "z_audio_va" in trained.encode(audio=data / "0.mp4")


@pytest.mark.parametrize(("task", "drop_rate"), [("audio", 0.5), ("video", 0.5), ("audio", 0.0)])
def test_towers_of_a_spectrogram_model_are_fine_tuned(tmp_path, model, task, drop_rate):
    pytest.importorskip("av")
    from labelled_media import settings, write_labelled

    from vatt_fast.evaluation.classify import evaluate
    from vatt_fast.finetuning.loop import finetune

    data = write_labelled(tmp_path / "data", each=2)
    model.save_pretrained(tmp_path / "start")
    options = dict(init=str(tmp_path / "start"), task=task, steps=1, drop_rate=drop_rate)
    if task == "audio" and not drop_rate:
        options |= dict(samples=24000, sample_rate_hz=24000)  # 46 frames where training had 76
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned = finetune(settings(data, tmp_path / "out", **options), progress=False)
    if task == "audio":
        assert tuned.audio_tokens.position.tables[1].shape[0] == 16
        assert tuned.audio_tokens.position.tables[0].shape[0] == (4 if drop_rate else 2)
    assert evaluate(tmp_path / "out", data).result["top1"] in (0.0, 25.0, 50.0, 75.0, 100.0)


@pytest.mark.parametrize("drop_per", ["batch", "clip"])
def test_loaders_leave_waveforms_whole_for_torch_and_jax(tmp_path, drop_per):
    pytest.importorskip("av")
    pytest.importorskip("jax")
    pytest.importorskip("optax")
    from media_files import noise, numbered

    from vatt_fast.data.clips import ClipSpec, DropToken
    from vatt_fast.data.dataset import ClipDataset
    from vatt_fast.data.media_writer import write_clip
    from vatt_fast.on_jax.training import batch_shapes, host_batch
    from vatt_fast.plan import empty_batch

    for i in range(2):
        write_clip(tmp_path / f"{i}.mp4", numbered(20), noise(2.0, 16000, seed=i))
    drop = DropToken(TINY, 0.5, drop_per)
    options = dict(vocabulary=None, batch_size=2, seed=0)
    spec = ClipSpec.from_config(TINY)
    batch = ClipDataset(tmp_path, spec, drop_token=drop, **options)[0]
    whole = ClipDataset(tmp_path, spec, **options)[0]
    assert torch.equal(batch.audio, whole.audio) and batch.audio.shape == (2, TINY.samples)
    assert batch.video.shape == (2, 128, 768) and batch.audio_keep.shape[-1] == 32
    assert empty_batch(TINY, 2, 0.5)["audio"].shape == batch.audio.shape
    arrays = host_batch(batch)
    wanted = batch_shapes(TINY, 2, 0.5, 1, drop_per)
    assert {n: (v.shape, v.dtype) for n, v in arrays.items()} == {
        n: (v.shape, v.dtype) for n, v in wanted.items()
    }
