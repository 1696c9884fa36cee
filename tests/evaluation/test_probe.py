"""The linear probe: what it reads, what it must not read, and bad input."""

import sys

import numpy as np
import pytest

from vatt_fast.evaluation.probe import linear_probe


def test_linear_probe_reads_what_is_linear_and_only_that():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1400, 16)) * np.logspace(
        -3, 3, 16
    )  # scales that only standardising evens out
    linear = np.digitize(x[:, 0], np.quantile(x[:, 0], [0.33, 0.67])).tolist()
    exclusive = ((x[:, 1] > 0) ^ (x[:, 2] > 0)).tolist()
    assert linear_probe(x[:1200], linear[:1200], x[1200:], linear[1200:]) > 85
    assert linear_probe(x[:1200], exclusive[:1200], x[1200:], exclusive[1200:]) < 65
    assert linear_probe(x[:1200], linear[:1200], x[1200:], linear[1200:]) == linear_probe(
        x[:1200], linear[:1200], x[1200:], linear[1200:]
    )


def test_scores_held_out_features_and_not_those_it_was_fitted_to():
    """Labels unrelated to the 128 features: near chance on new clips, however good the fit."""
    rng = np.random.default_rng(1)
    x, labels = rng.normal(size=(1400, 128)), rng.integers(0, 8, 1400)
    assert linear_probe(x[:1200], labels[:1200], x[1200:], labels[1200:]) < 25
    told = x + 5.0 * (labels[:, None] == np.arange(128))  # a feature for each class tells
    assert linear_probe(told[:1200], labels[:1200], told[1200:], labels[1200:]) > 90


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: linear_probe(x, [0, 1, 0], x, [0] * 4), "for 3 labels"),
        (lambda x: linear_probe(x[:0], [], x, [0] * 4), "n > 0"),
        (lambda x: linear_probe(x, [0] * 4, x, [0] * 4), "all alike"),
        (
            lambda x: linear_probe(x, [0, 1, 0, 1], x[:, :2], [0] * 4),
            "3 wide in training, 2 in the test",
        ),
        (lambda x: linear_probe(x + np.inf, [0, 1, 0, 1], x, [0] * 4), "not finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(12.0).reshape(4, 3))


def test_without_scikit_learn_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(ImportError, match="pip install"):
        linear_probe(np.zeros((2, 1)), [0, 1], np.zeros((2, 1)), [0, 1])


def test_the_training_folds_choose_the_penalty():
    """A strong penalty hides a weak feature among loud ones; a weak penalty fits noise.

    The folds find which of the two costs less.
    """
    rng = np.random.default_rng(2)
    labels = rng.integers(0, 8, 1400)
    x = np.concatenate(
        [
            rng.normal(size=(1400, 64)),
            0.8 * (labels[:, None] == np.arange(8)) + 0.3 * rng.normal(size=(1400, 8)),
        ],
        axis=1,
    )
    split = (x[:1200], labels[:1200], x[1200:], labels[1200:])
    weak, strong = linear_probe(*split, strengths=(1e-5,)), linear_probe(*split, strengths=(1.0,))
    assert strong > weak + 5
    assert linear_probe(*split, strengths=(1e-5, 1.0)) == strong


def test_labels_may_be_tuples():
    """Any hashable value is a label, also one that training never saw."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4))
    labels = [("red", "ring") if row[0] > 0 else ("blue", "star") for row in features]
    assert linear_probe(features[:40], labels[:40], features[40:], labels[40:]) > 80
    assert linear_probe(features[:40], labels[:40], features[40:], [("new",)] * 20) == 0
