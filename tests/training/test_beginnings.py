"""What a run starts from: word vectors with their vocabulary, or another run's weights."""

import dataclasses
import pickle
import warnings

import numpy as np
import pytest
import torch
from training_runs import MODEL, settings, write_media

from vatt_fast.data.word_vectors import RELEASED_WORDS, read_word_vectors
from vatt_fast.model import create_model
from vatt_fast.positions import resample_matrix
from vatt_fast.training.loop import pretrain

WORDS = ["clip", "number", "the", "end", "of", "New_York", "Clip", "0", "überall"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("media"))


def run(config, model=MODEL):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="warmup_steps")
        return pretrain(config, model_config=model, progress=False)


def write(path, form: str) -> np.ndarray:
    vectors = np.random.default_rng(0).standard_normal((len(WORDS), 12)).astype(np.float32)
    header = f"{len(WORDS)} 12\n".encode()
    if form == "released":
        path.write_bytes(pickle.dumps({"word_embeddings": vectors}))
        path.with_name(RELEASED_WORDS).write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    elif form == "released, numbered":
        path.write_bytes(pickle.dumps({"word_embeddings": vectors}))
        lines = [f"{number} {word}" for number, word in enumerate(WORDS)]
        path.with_name(RELEASED_WORDS).write_text("\n".join(lines[::-1]), encoding="utf-8")
    elif form == "binary":
        rows = (
            word.encode() + b" " + row.tobytes() + b"\n"
            for word, row in zip(WORDS, vectors, strict=True)
        )
        path.write_bytes(header + b"".join(rows))
    else:
        rows = (
            f"{w} {' '.join(map(repr, r.tolist()))}\n" for w, r in zip(WORDS, vectors, strict=True)
        )
        path.write_bytes((header if form == "text" else b"") + "".join(rows).encode())
    return vectors


@pytest.mark.parametrize("form", ["text", "glove", "binary", "released", "released, numbered"])
def test_word_vectors_are_read_with_their_vocabulary(tmp_path, form):
    path = tmp_path / ("word2vec.pkl" if form.startswith("released") else "vectors")
    vectors = write(path, form)
    vocabulary, table = read_word_vectors(path)
    kept = [0, 1, 2, 3, 4, 7, 8]  # no caption holds "New_York" or "Clip"
    assert vocabulary.words == ("<pad>", "<unk>", *(WORDS[i] for i in kept))
    np.testing.assert_allclose(table[2:], vectors[kept], rtol=1e-6)
    assert not table[0].any()
    np.testing.assert_allclose(table[1], vectors[kept].mean(0), rtol=1e-5)
    assert read_word_vectors(path, 4)[0].words == ("<pad>", "<unk>", "clip", "number")


def test_what_is_no_word_vectors_is_said(tmp_path):
    path = tmp_path / "vectors"
    write(path, "binary")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(ValueError, match="header promises 9 words of 12, it has 8"):
        read_word_vectors(path)
    path.write_text("3 2\na 1 2\nb 1\n")
    with pytest.raises(ValueError, match="line 3 has 1 numbers, not 2"):
        read_word_vectors(path)
    path.write_text("a 1 nan\n")
    with pytest.raises(ValueError, match="not finite"):
        read_word_vectors(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no word"):
        read_word_vectors(path)
    with pytest.raises(ValueError, match="No such file"):
        read_word_vectors(tmp_path / "missing")
    danger = tmp_path / "word2vec.pkl"
    (tmp_path / RELEASED_WORDS).write_text("a\n")
    danger.write_bytes(pickle.dumps({"word_embeddings": print}))
    with pytest.raises(ValueError, match=r"builtins\.print, which is not loaded"):
        read_word_vectors(danger)


def test_the_released_recipe_trains_on_frozen_vectors_and_refuses_random_ones(folder, tmp_path):
    released = dataclasses.replace(MODEL.with_recipe("released"), dropout=0.0)
    config = settings(folder, tmp_path / "run", steps=4, recipe="released")
    with pytest.raises(ValueError, match="give word vectors with --words FILE"):
        run(config, released)
    assert not (tmp_path / "run").exists()
    write(tmp_path / "vectors", "text")
    config = dataclasses.replace(config, words=str(tmp_path / "vectors"))
    run(dataclasses.replace(config, checkpoint_every=2), released)
    _, table = read_word_vectors(tmp_path / "vectors")
    trained = create_model(tmp_path / "run")
    assert trained.config.word_dim == 12 and trained.vocabulary.words[2] == "clip"
    assert torch.equal(trained.text_tokens.table.weight, torch.from_numpy(table))
    run(config, released)  # finished, and still itself


def test_a_run_starts_from_another_at_other_sizes(folder, tmp_path):
    first = run(settings(folder, tmp_path / "first", steps=2))
    begun = settings(
        folder, tmp_path / "second", steps=1, init=str(tmp_path / "first"), frames=8, samples=2560
    )
    still = dict(learning_rate=0.0, final_learning_rate=0.0)  # the weights stay what they were
    begun = dataclasses.replace(begun, **still)
    second = run(begun, None)
    assert (second.config.frames, second.config.samples) == (8, 2560)
    was, now = first.state_dict(), second.state_dict()
    for name, value in now.items():
        if "running" in name:
            continue
        if ".position.tables." in name and value.shape != was[name].shape:
            matrix = torch.from_numpy(resample_matrix(len(was[name]), len(value))).float()
            torch.testing.assert_close(value, matrix @ was[name])
        else:
            assert torch.equal(value, was[name]), name
    assert second.vocabulary.words == first.vocabulary.words


def test_a_beginning_has_one_source_of_words(folder):
    with pytest.raises(ValueError, match="init brings its own words"):
        settings(folder, "out", init="a", words="b")
