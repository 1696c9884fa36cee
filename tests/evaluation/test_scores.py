"""Measures of classification against scikit-learn and SciPy, ties and missing classes included."""

import warnings

import numpy as np
import pytest

from vatt_fast.evaluation.scores import (
    average_precision,
    class_table,
    confusion,
    d_prime,
    one_class_scores,
    roc_area,
    several_classes_scores,
    top_k_accuracy,
)

metrics = pytest.importorskip("sklearn.metrics", reason="compares with scikit-learn")


def drawn(seed, ties):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(60, 7))
    targets = (rng.random((60, 7)) < 0.3).astype(np.float32)
    targets[:, 2] = 0  # a class without an example
    return (scores.round(0 if ties else 9), targets)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_as_scikit_learn_measures(seed, ties):
    scores, targets = drawn(seed, ties)
    measured = [c for c in range(7) if c != 2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision = metrics.average_precision_score(
            targets[:, measured], scores[:, measured], average=None
        )
        area = metrics.roc_auc_score(targets[:, measured], scores[:, measured], average=None)
    np.testing.assert_allclose(average_precision(scores, targets)[measured], precision, atol=1e-12)
    np.testing.assert_allclose(roc_area(scores, targets)[measured], area, atol=1e-12)
    assert np.isnan(average_precision(scores, targets)[2]) and np.isnan(
        roc_area(scores, targets)[2]
    )
    found = several_classes_scores(scores, targets)
    stats = pytest.importorskip("scipy.stats")
    assert found["mAP"] == pytest.approx(100 * precision.mean())
    assert found["AUC"] == pytest.approx(100 * area.mean())
    assert found["d_prime"] == pytest.approx((np.sqrt(2) * stats.norm.ppf(area)).mean())
    assert found["classes_measured"] == 6


@pytest.mark.parametrize("k", [1, 3, 5])
def test_top_k_and_confusion_as_scikit_learn(k):
    rng = np.random.default_rng(k)
    scores, classes = rng.normal(size=(80, 9)), rng.integers(0, 9, 80)
    theirs = metrics.top_k_accuracy_score(classes, scores, k=k, labels=range(9))
    assert top_k_accuracy(scores, classes, k) == pytest.approx(100 * theirs)
    matrix = metrics.confusion_matrix(classes, scores.argmax(1), labels=range(9))
    np.testing.assert_array_equal(confusion(scores, classes), matrix)
    found = one_class_scores(scores, classes)
    balanced = metrics.balanced_accuracy_score(classes, scores.argmax(1))
    assert found["mean_class"] == pytest.approx(100 * balanced)


def test_constant_scores_are_never_right():
    scores, classes = np.zeros((5, 4)), np.arange(5) % 4
    assert top_k_accuracy(scores, classes, 1) == top_k_accuracy(scores, classes, 3) == 0
    assert top_k_accuracy(scores, classes, 4) == 100
    np.testing.assert_array_equal(roc_area(scores, np.eye(4)[classes]), 0.5)


def test_d_prime_is_a_mean_over_classes():
    """The paper reports 2.895 beside an AUC of 97.1, whose own d' would be 2.68."""
    assert d_prime(0.971) == pytest.approx(2.68, abs=0.005)
    assert d_prime(0.5) == 0 and d_prime(1.0) == np.inf and np.isnan(d_prime(np.nan))
    scores = np.array([[2.0, 0.1], [1.0, 0.3], [-1.0, 0.2], [-2.0, 0.0]])
    targets = np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    found = several_classes_scores(scores, targets)
    assert found["d_prime"] is None and found["classes_without_a_mistake"] == 1


def test_the_table_of_classes():
    scores = np.array([[2.0, 1, 0], [0, 2, 1], [2, 1, 0], [0, 1, 2]])
    table = class_table(scores, np.eye(3)[[0, 1, 1, 1]], ["ant", "bee", "cow"])
    assert table[1] == {
        "class": "bee",
        "examples": 3,
        "top1": pytest.approx(100 / 3),
        "taken_for": "ant (1), cow (1)",
    }
    assert table[2]["top1"] is None and table[0]["taken_for"] == ""
    several = np.array([[1, 1, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]])
    row = class_table(scores, several, ["ant", "bee", "cow"])[0]
    assert row["AP"] == row["AUC"] == 100 and row["d_prime"] is None


@pytest.mark.parametrize(
    ("scores", "classes", "match"),
    [
        (np.zeros((0, 3)), np.zeros(0, int), r"scores are \(0, 3\)"),
        (np.zeros((2, 3)), np.zeros(3, int), r"classes are \(3,\) for scores \(2, 3\)"),
        (np.zeros((2, 3)), np.array([0, 3]), "classes are 0 .. 3; there are 3 scores"),
        (np.array([[0.0, 1], [np.nan, 0]]), np.array([0, 1]), "scores of example 1 are not finite"),
    ],
)
def test_what_cannot_be_measured_is_refused(scores, classes, match):
    with pytest.raises(ValueError, match=match):
        top_k_accuracy(scores, classes, 1)
