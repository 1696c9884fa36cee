"""``encode`` refuses what has two readings, converts what has one, and reads files as ``embed``."""

import warnings

import numpy as np
import pytest
import torch

pytest.importorskip("av")

from media_files import noise, numbered
from small_model import small_model
from tried import tried

from vatt_fast import encoding
from vatt_fast.data.clips import ClipSpec
from vatt_fast.data.loader import evaluation_clips
from vatt_fast.data.media_writer import write_clip
from vatt_fast.encoding import embed_batches, embed_sentences

ARRAYS = "arrays in another range or layout"
QUERIES = "queries"
FILES = "files given to encode"


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def frames():
    return np.random.default_rng(0).integers(0, 256, (16, 64, 64, 3)).astype(np.uint8)


def sine():
    return (0.3 * np.sin(np.arange(25600) * 0.17)).astype(np.float32)


@tried(ARRAYS, "int16, int32, int8, uint8 and float64 sound", "scaled: the same embedding")
@pytest.mark.parametrize(
    ("convert", "at_least"),
    [
        (lambda x: np.round(x * 32768).astype(np.int16), 0.9999),
        (lambda x: np.round(x * 2.0**31).astype(np.int32), 0.9999),
        (lambda x: np.round(x * 128).astype(np.int8), 0.99),
        (lambda x: np.round(x * 128 + 128).astype(np.uint8), 0.99),
        (lambda x: x.astype(np.float64), 0.9999),
        (lambda x: torch.from_numpy(x)[None], 0.9999),
    ],
)
def test_integers_of_sound_are_scaled(model, convert, at_least):
    expected = model.encode(audio=sine())["z_audio_va"][0]
    found = model.encode(audio=convert(sine()))["z_audio_va"][0]
    assert float(found @ expected) > at_least


@tried(ARRAYS, "int64 and float32 frames", "as uint8")
@pytest.mark.parametrize(
    "convert",
    [
        lambda v: v.astype(int),
        lambda v: v.astype(np.int32)[None],
        lambda v: v.astype(np.uint16),
        lambda v: v / 127.5 - 1,
        torch.from_numpy,
    ],
)
def test_frames_of_other_types(model, frames, convert):
    expected = model.encode(video=frames)["z_video_vt"][0]
    assert float(model.encode(video=convert(frames))["z_video_vt"][0] @ expected) > 0.9999


@tried(
    ARRAYS,
    "floats 0..1 and 0..255, ints beyond 255, nan, channels first; stereo, int64, floats of "
    "16 bits, 16-bit samples in int32, two or three axes too many, bool",
    "ValueError with rule and remedy",
)
@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        ("video", lambda v: v / 255, r"range 0 \.\. 1.*2 \* x - 1"),
        ("video", lambda v: v.astype(np.float32), r"floats 0 to 255.*\[-1, 1\].*uint8"),
        ("video", lambda v: v.astype(int) * 2, r"integers 0 to 510"),
        ("video", lambda v: v.astype(int) - 5, r"integers -5 to 250"),
        ("video", lambda v: np.where(v == 3, np.nan, v / 127.5 - 1), r"\[-1, 1\]"),
        ("video", lambda v: v.transpose(0, 3, 1, 2), "channels first: permute"),
        ("video", lambda v: v.transpose(3, 0, 1, 2), "last axis is the 3 colours"),
        ("video", lambda v: v[..., :1], "last axis is the 3 colours"),
        ("video", lambda v: v[0], r"it takes \(T, H, W, 3\)"),
        ("video", lambda v: v[:0], r"it takes \(T, H, W, 3\)"),
        ("video", lambda v: v > 3, "give numbers"),
        ("video", lambda v: [["x"]], "give numbers"),
        ("audio", lambda v: np.zeros((200, 2), np.float32), r"\(S, C\) with 2 channels: average"),
        ("audio", lambda v: np.zeros((1, 2, 25600), np.float32), r"mono \(S,\) or \(B, S\)"),
        ("audio", lambda v: 9000 * sine(), "pass int16 samples as they are"),
        ("audio", lambda v: np.where(sine() > 0.29, np.inf, sine()), r"floats lie in \[-1, 1\]"),
        ("audio", lambda v: np.where(sine() > 0.29, np.nan, sine()), r"floats lie in \[-1, 1\]"),
        ("audio", lambda v: (9000 * sine()).astype(np.int64), "full scale nobody knows"),
        ("audio", lambda v: (9000 * sine()).astype(np.int32), "pass them as int16"),
        ("audio", lambda v: np.zeros(4, np.float32), "which is no sound"),
        ("audio", lambda v: sine() > 0, "give numbers"),
        ("audio", lambda v: sine().astype(complex), "give numbers"),
    ],
)
def test_arrays_that_are_refused(model, frames, name, make, message):
    with pytest.raises(ValueError, match=message):
        model.encode(**{name: make(frames)})


@tried(QUERIES, "an empty sentence, one of unknown words; one of three", "a warning names them")
@pytest.mark.parametrize("text", ["", "xyzzy plugh", "...", ["red star", "xyzzy", "a dog"]])
def test_unknown_words_are_said(model, text):
    with pytest.warns(UserWarning, match="the model knows no word") as seen:
        model.encode(text=text)
    assert len(seen) == 1
    if isinstance(text, list):
        assert "of 1 of 3 sentences" in str(seen[0].message) and "'xyzzy'" in str(seen[0].message)
    with pytest.warns(UserWarning, match="the model knows no word"):
        embed_sentences(model, [text] if isinstance(text, str) else text)


def test_known_words_are_not_warned_of(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.encode(text=["a red star xyzzy", "dog"])


@tried(QUERIES, "word ids of -1, and beyond the vocabulary, as tensors and arrays", "ValueError")
@pytest.mark.parametrize("bad", [-1, 7, 1000])
def test_word_ids_out_of_range(model, bad):
    ids = torch.ones(2, 1, 6, dtype=torch.int32)
    model(text=ids)
    ids[1, 0, 3] = bad
    with pytest.raises(ValueError, match=r"text holds ids .*vocabulary has 7 words, 0 is padding"):
        model(text=ids)
    with pytest.raises(ValueError, match="text holds ids"):
        model(text=ids[:, 0].long())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Clips longer than a window, whose picture and sound end at their own times."""
    folder = tmp_path_factory.mktemp("encode")
    for number, seconds in enumerate((2.0, 4.3, 1.2)):
        frames = numbered(round(seconds * 10))[number:]
        write_clip(folder / f"{number}.mp4", frames, noise(seconds, 16000, seed=number))
    return folder


@tried(FILES, "the same folder by encode and by embed, one window or four", "the same numbers")
@pytest.mark.parametrize("windows", [1, 4])
def test_encode_is_embed(model, folder, windows):
    spec = ClipSpec.from_config(model.config)
    batches = evaluation_clips(folder, spec, vocabulary=model.vocabulary, windows=windows)
    found, files = embed_batches(model, batches, windows=windows)
    assert files == ["0.mp4", "1.mp4", "2.mp4"]
    paths = [folder / name for name in files]
    out = model.encode(video=paths, audio=paths, windows=windows)
    for name in ("z_video_va", "z_video_vt", "z_audio_va"):
        np.testing.assert_allclose(out[name].numpy(), found[name], atol=2e-5)


@tried(FILES, "sound longer than the model's picture", "the window is that of the longer one")
def test_windows_of_a_model_whose_sound_is_longer(model, tmp_path):
    """0.8 s of picture, 1.6 s of sound, a file of 1.6 s: all of it is heard."""
    import dataclasses

    from vatt_fast import VATT

    config = dataclasses.replace(model.config, frames=8)
    short = VATT(config).eval()
    short.vocabulary = model.vocabulary
    values = noise(1.6, 16000)
    write_clip(tmp_path / "a.wav", None, values)
    expected = short.encode(audio=np.round(values * 32767).astype(np.int16))["z_audio_va"][0]
    found = short.encode(audio=tmp_path / "a.wav")["z_audio_va"][0]
    assert float(expected @ found) > 0.99999


@tried(FILES, "70 files", "decoded as they are embedded, 32 windows at a time")
def test_files_are_decoded_in_batches(model, folder, monkeypatch):
    sizes, open_now = [], []
    original = encoding._embed

    def watched(model, **inputs):
        sizes.append(len(inputs["video"]))
        return original(model, **inputs)

    monkeypatch.setattr(encoding, "_embed", watched)
    reader = encoding.MediaReader

    class Counting(reader):
        def __init__(self, path):
            open_now.append(len(sizes))
            super().__init__(path)

    monkeypatch.setattr(encoding, "MediaReader", Counting)
    out = model.encode(video=[folder / "0.mp4", folder / "1.mp4"] * 35)
    assert out["z_video_vt"].shape[0] == 70 and sizes == [32, 32, 6]
    assert open_now.index(1) == 32  # the 33rd file was opened after the first batch
    again = model.encode(video=folder / "1.mp4")["z_video_vt"][0]
    np.testing.assert_allclose(out["z_video_vt"][69], again, atol=2e-5)


@tried(FILES, "a window without a picture; four windows, one of them with", "ValueError; read")
def test_windows_without_a_picture(model, tmp_path):
    path = tmp_path / "late.mp4"
    write_clip(path, numbered(12), noise(10.0, 16000))
    with pytest.raises(ValueError, match=r"late\.mp4 has no video in the windows embedded"):
        model.encode(video=path)
    four = model.encode(video=path, windows=4)["z_video_vt"]
    assert four.isfinite().all()
    with pytest.raises(ValueError, match="windows is 0"):
        model.encode(video=path, windows=0)


@tried(FILES, "a picture asked for its sound, a sound for its picture", "ValueError")
def test_streams_that_are_not_there(model, tmp_path):
    write_clip(tmp_path / "a.wav", None, noise(1.0, 16000))
    with pytest.raises(ValueError, match=r"a\.wav has no video stream.*leave video out"):
        model.encode(video=tmp_path / "a.wav")
