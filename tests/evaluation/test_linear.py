"""Linear evaluation: the low-rank classifier against loops, the others against scikit-learn."""

import dataclasses
import json

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from vatt_fast.evaluation.linear import (
    LowRankClassifier,
    LowRankSettings,
    linear_scores,
    train_low_rank,
)


def test_low_rank_logits_are_a_double_loop():
    rng = np.random.default_rng(0)
    x, u, v, b = (rng.normal(size=s) for s in ((5, 7), (7, 4), (4, 3), (3,)))
    model = LowRankClassifier(*map(torch.from_numpy, (u, v, b)))
    for chosen in (None, [2, 0]):
        expected = np.zeros((5, 3))
        for i in range(5):
            for c in range(3):
                total = 0.0
                for k in range(4) if chosen is None else chosen:
                    for d in range(7):
                        total += x[i, d] * u[d, k] * v[k, c]
                expected[i, c] = total * (1 if chosen is None else 4 / 2) + b[c]
        at = None if chosen is None else torch.tensor(chosen)
        np.testing.assert_allclose(model.logits(torch.from_numpy(x), at), expected)


def test_a_step_trains_a_tenth_of_the_components_by_adam():
    """Two steps written out: softmax, gradients as sums over examples and classes, Adam."""
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(6, 5)).astype(np.float32), np.array([0, 1, 2, 1, 0, 2])
    settings = LowRankSettings(rank=20, batch_size=4, steps=2, learning_rate=0.01, seed=3)
    assert settings.components == 2 and LowRankSettings().components == 13
    ours = train_low_rank(x, y, 3, settings)

    draw = torch.Generator().manual_seed(3)
    u, v = (
        (torch.randn(*size, generator=draw).double() * (2 / sum(size)) ** 0.5).numpy()
        for size in ((5, 20), (20, 3))
    )
    weights = [u, v, np.zeros(3)]
    first, second = ([np.zeros_like(w) for w in weights] for _ in range(2))
    moved = np.zeros(20, bool)
    for step in (1, 2):  # of six examples the second batch of four begins anew
        rows = torch.randperm(6, generator=draw)[:4].numpy()
        chosen = torch.randperm(20, generator=draw)[:2].numpy()
        moved[chosen] = True
        u, v, b = weights
        gradients = [np.zeros_like(w) for w in weights]
        for i in rows:
            logits = np.array(
                [10 * sum(x[i] @ u[:, k] * v[k, c] for k in chosen) + b[c] for c in range(3)]
            )
            p = np.exp(logits) / np.exp(logits).sum()
            for c in range(3):
                error = (p[c] - (y[i] == c)) / 4
                gradients[2][c] += error
                for k in chosen:
                    gradients[0][:, k] += 10 * error * v[k, c] * x[i]
                    gradients[1][k, c] += 10 * error * (x[i] @ u[:, k])
        for w, g, m, s in zip(weights, gradients, first, second, strict=True):
            m += 0.1 * (g - m)
            s += 0.001 * (g * g - s)
            w -= 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(s / (1 - 0.999**step)) + 1e-8)
    for mine, expected in zip(ours, weights, strict=True):
        np.testing.assert_allclose(mine.numpy(), expected, atol=2e-5)
    start = torch.randn(5, 20, generator=torch.Generator().manual_seed(3)) * (2 / 25) ** 0.5
    assert ((ours.u - start).abs().max(0).values > 0).numpy().tolist() == moved.tolist()


@pytest.fixture(scope="module")
def blobs():
    rng = np.random.default_rng(0)
    means = rng.normal(size=(4, 12)) * 1.5
    classes = rng.integers(0, 4, 400)
    x = (means[classes] + rng.normal(size=(400, 12))).astype(np.float32)
    return x, classes


QUICK = LowRankSettings(steps=1500, learning_rate=5e-3)


@pytest.mark.parametrize("kind", ["lrc", "svm", "logistic"])
def test_every_classifier_reads_what_is_linear(blobs, kind):
    x, classes = blobs
    scores, _ = linear_scores(kind, x[:300], classes[:300], x[300:, None], 5, settings=QUICK)
    assert scores.shape == (100, 5)
    best_possible = 100 * (scores.argmax(1) == classes[300:]).mean()
    assert best_possible > 85
    shuffled = np.random.default_rng(1).permutation(classes[:300])
    scores, _ = linear_scores(kind, x[:300], shuffled, x[300:, None], 5, settings=QUICK)
    assert 100 * (scores.argmax(1) == classes[300:]).mean() < 50


def test_low_rank_finds_what_logistic_regression_does(blobs):
    x, classes = blobs
    found = {
        kind: linear_scores(kind, x[:300], classes[:300], x[300:, None], 4, settings=QUICK)[0]
        for kind in ("lrc", "logistic")
    }
    assert (found["lrc"].argmax(1) == found["logistic"].argmax(1)).mean() > 0.9


def test_svm_and_logistic_regression_are_those_of_scikit_learn(blobs):
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    x, classes = blobs
    scaled = StandardScaler().fit(x[:300])
    for kind, make, score in (
        ("svm", lambda c: LinearSVC(C=c, max_iter=10_000), "decision_function"),
        ("logistic", lambda c: LogisticRegression(C=c, max_iter=2000), "predict_proba"),
    ):
        ours, chosen = linear_scores(kind, x[:300], classes[:300], x[300:, None], 4)
        theirs = make(chosen["C"]).fit(scaled.transform(x[:300]), classes[:300])
        expected = getattr(theirs, score)(scaled.transform(x[300:]))
        np.testing.assert_allclose(ours, expected, atol=1e-3)


def test_scores_are_the_mean_over_the_windows_that_are_there(blobs):
    x, classes = blobs
    windows = np.stack((x[300:], x[200:300], np.full_like(x[300:], np.nan)), 1)
    windows[3, 1] = np.nan
    call = lambda test: linear_scores("logistic", x[:300], classes[:300], test, 4)[0]  # noqa: E731
    one, two = call(x[300:, None]), call(x[200:300, None])
    expected = (one + two) / 2
    expected[3] = one[3]
    np.testing.assert_allclose(call(windows), expected)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: linear_scores("lda", x, y, x[:, None], 2), "lrc, svm, logistic"),
        (lambda x, y: linear_scores("lrc", x, y[1:], x[:, None], 2), "for classes"),
        (lambda x, y: linear_scores("lrc", x * np.nan, y, x[:, None], 2), "not finite"),
        (lambda x, y: linear_scores("lrc", x, y, x[:, None] * np.nan, 2), "without a window"),
        (lambda x, y: linear_scores("lrc", x, y, x[:, None, 1:], 2), "4 wide in training, 3"),
        (lambda x, y: linear_scores("svm", x, y * 0, x[:, None], 2), "all of one class"),
        (lambda x, y: linear_scores("lrc", x, y + 1, x[:, None], 2), "there are 2"),
        (lambda x, y: LowRankSettings(share=0.0), r"lies in \(0, 1\]"),
        (lambda x, y: LowRankSettings(rank=0), "must be positive"),
    ],
)
def test_bad_input(call, message):
    x, y = np.eye(6, 4, dtype=np.float32), np.array([0, 1] * 3)
    with pytest.raises(ValueError, match=message):
        call(x, y)


# -- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    pytest.importorskip("av")
    from labelled_media import write_labelled

    return write_labelled(tmp_path_factory.mktemp("labelled") / "data", each=6)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from small_model import small_model

    folder = tmp_path_factory.mktemp("model") / "run"
    small_model().save_pretrained(folder)
    return folder


def test_probe_measures_labelled_media_with_cached_features(labelled, run, tmp_path, capsys):
    pytest.importorskip("tyro")
    from small_model import small_model

    from vatt_fast.cli import main
    from vatt_fast.data.labels import open_labels
    from vatt_fast.evaluation import features as module
    from vatt_fast.evaluation.embed import model_digest
    from vatt_fast.model import create_model

    out = tmp_path / "out"
    command = ["probe", "--model", run, "--data", labelled, "--out", out, "--windows", "2",
               "--classifier", "lrc", "svm", "logistic", "--lrc.steps", "300"]  # fmt: skip
    for modality in ("video", "audio"):
        main(list(map(str, [*command, "--modality", modality])))
        found = json.loads((out / "probe.json").read_text())
        for kind in ("lrc", "svm", "logistic"):
            assert found[kind]["top1"] == 100, (modality, kind)
        assert found["examples"] == {"train": 12, "test": 12} and found["classes"] == 2
        assert found["features_cached"] == {"train": False, "test": False}
    main(list(map(str, command)))
    assert json.loads((out / "probe.json").read_text())["features_cached"] == {
        "train": True,
        "test": True,
    }
    assert "top1: 100" in capsys.readouterr().out
    told = found["settings"]
    sources = {name: open_labels(labelled).source(name, "audio") for name in ("train", "test")}
    assert told["labels_sha256"] == {name: each.label_digest for name, each in sources.items()}
    assert told["versions"]["torch"] == torch.__version__ and told["split"] == "test"
    assert told["model_sha256"] == model_digest(create_model(run)) and told["device"]
    # what is cached is what the model computes
    model = small_model()
    source = open_labels(labelled).source("test", "video")
    cached = module.window_features(model, source, windows=2, cache=out / "features")
    anew = module.window_features(model, source, windows=2, batch_size=5)
    assert cached.cached and not anew.cached and cached.names == anew.names
    np.testing.assert_allclose(cached.values, anew.values, atol=1e-5)
    # another model or other media are not mistaken for these
    with torch.no_grad():
        model.video_tokens.agg[:5] += 1
    other = module.window_features(model, source, windows=2, cache=out / "features")
    assert not other.cached and np.abs(other.values - anew.values).max() > 1e-3
    for path in (out / "features").glob("video_2_*.npz"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        module.window_features(model, source, windows=2, cache=out / "features")


def test_features_go_on_behind_the_last_batch_after_a_kill(labelled, tmp_path, monkeypatch):
    """And two probes at the same features do not disturb each other."""
    from small_model import small_model

    from vatt_fast.data.labels import open_labels
    from vatt_fast.evaluation import features as module
    from vatt_fast.files import only_writer

    model, source = small_model(), open_labels(labelled).source("test", "video")
    options = dict(windows=2, batch_size=2)
    expected = module.window_features(model, source, **options)
    original, computed = module.embed_batch, []

    def interrupted(model, batch, **more):
        if len(computed) == 4:
            raise KeyboardInterrupt
        computed.append(batch.files[0])
        return original(model, batch, **more)

    monkeypatch.setattr(module, "embed_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        module.window_features(model, source, cache=tmp_path, **options)
    assert not list(tmp_path.glob("*.npz")) and len(computed) == 4
    computed.clear()
    found = module.window_features(model, source, cache=tmp_path, **options)
    assert len(computed) == 2  # of six batches
    assert found.names == expected.names and np.array_equal(found.values, expected.values)
    (path,) = tmp_path.iterdir()
    path.unlink()
    parts = tmp_path / f"{path.name}.parts"
    parts.mkdir()
    monkeypatch.undo()
    with only_writer(parts):
        again = module.window_features(model, source, cache=tmp_path, **options)
    assert np.array_equal(again.values, expected.values)


def test_a_changed_file_is_computed_anew(labelled, tmp_path):
    import os

    from small_model import small_model

    from vatt_fast.data.labels import open_labels
    from vatt_fast.evaluation.features import window_features

    model, source = small_model(), open_labels(labelled).source("test", "audio")
    for cached in (False, True):
        found = window_features(model, source, windows=1, cache=tmp_path)
        assert found.cached is cached
    os.utime(source.place(0).path, (1, 1))
    assert not window_features(model, source, windows=1, cache=tmp_path).cached


def test_a_probe_names_what_does_not_fit(labelled, run, tmp_path):
    from vatt_fast.evaluation.probing import ProbeConfig, probe

    config = ProbeConfig(str(run), str(labelled), str(tmp_path / "out"))
    with pytest.raises(ValueError, match="no examples of split 'val'"):
        probe(dataclasses.replace(config, split="val"))
    with pytest.raises(ValueError, match="classifier is"):
        dataclasses.replace(config, classifier=())
    table = tmp_path / "labels.csv"
    table.write_text("file,class,split\ntrain/red/0.mp4,red,train\ntrain/red/0.mp4,blue,train\n"
                     "train/red/1.mp4,red,test\n")  # fmt: skip
    with pytest.raises(ValueError, match="several classes"):
        probe(dataclasses.replace(config, data=str(table), media=str(labelled)))
