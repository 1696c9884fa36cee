"""Measures of classification: top-k, average precision, area under ROC, d', confusion.

Plain NumPy, so that a training run can measure itself without scikit-learn.

Shapes: N examples, C classes.
"""

import math
from statistics import NormalDist
from typing import Any

import numpy as np

_MOST_CONFUSED = 3


def top_k_accuracy(scores: np.ndarray, classes: np.ndarray, k: int) -> float:
    """Share, in percent, of examples whose class is among the k highest scores.

    Ties go against the model: constant scores are right only where k is C.

    Args:
        scores: (N, C) float.
        classes: (N,) integers.
    """
    scores, classes = _checked(scores, classes)
    return 100 * float((ranks(scores, classes) <= k).mean())


def ranks(scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(N,) place of each example's class among its scores, 1 the highest, the last of equals."""
    own = scores[np.arange(len(scores)), classes]
    return (scores >= own[:, None]).sum(1)


def average_precision(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(C,) area under each class's precision by recall, as steps (no interpolation).

    Equal scores are one threshold. nan for a class without an example.

    Args:
        scores: (N, C) float. targets: (N, C) of 0 and 1.
    """
    scores, targets = _checked(scores, targets)
    found = np.full(scores.shape[1], np.nan)
    for number in range(scores.shape[1]):
        thresholds, right = _by_threshold(scores[:, number], targets[:, number])
        if right[-1]:
            gained = np.diff(right, prepend=0)
            found[number] = float((gained * right / thresholds).sum() / right[-1])
    return found


def roc_area(scores: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(C,) probability that an example of the class scores higher than another one; ties half.

    nan where all examples, or none, are of the class. Arguments as ``average_precision``.
    """
    scores, targets = _checked(scores, targets)
    found = np.full(scores.shape[1], np.nan)
    for number in range(scores.shape[1]):
        above, right = _by_threshold(scores[:, number], targets[:, number])
        wrong = above - right
        if right[-1] and wrong[-1]:
            heights = right - np.diff(right, prepend=0) / 2  # of the trapezia
            area = (np.diff(wrong, prepend=0) * heights).sum()
            found[number] = float(area / (right[-1] * wrong[-1]))
    return found


def _by_threshold(scores: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many examples score at least each different score, from the highest; and the right ones.

    Both float64.
    """
    order = np.argsort(-scores, kind="stable")
    ordered = scores[order]
    ends = np.append(np.flatnonzero(np.diff(ordered)), len(ordered) - 1)
    return (ends + 1).astype(float), np.cumsum(targets[order], dtype=float)[ends]


def d_prime(area: float) -> float:
    """How far apart two unit normal distributions lie whose area under ROC is this."""
    if math.isnan(area) or area in (0.0, 1.0):
        return math.nan if math.isnan(area) else math.copysign(math.inf, area - 0.5)
    return math.sqrt(2) * NormalDist().inv_cdf(area)


def confusion(scores: np.ndarray, classes: np.ndarray) -> np.ndarray:
    """(C, C) int64: examples of each class (row) by the class with the highest score (column)."""
    scores, classes = _checked(scores, classes)
    count = scores.shape[1]
    pairs = classes.astype(np.int64) * count + scores.argmax(1)
    return np.bincount(pairs, minlength=count * count).reshape(count, count)


def one_class_scores(scores: np.ndarray, classes: np.ndarray) -> dict[str, Any]:
    """top1 and top5 in percent, of examples with one class each, and mean_class: top1 by class."""
    scores, classes = _checked(scores, classes)
    matrix = confusion(scores, classes)
    present = matrix.sum(1) > 0
    recall = matrix.diagonal()[present] / matrix.sum(1)[present]
    found = {"top1": top_k_accuracy(scores, classes, 1)}
    if scores.shape[1] > 5:
        found["top5"] = top_k_accuracy(scores, classes, 5)
    return found | {"mean_class": 100 * float(recall.mean())}


def several_classes_scores(scores: np.ndarray, targets: np.ndarray) -> dict[str, Any]:
    """mAP and AUC in percent and d_prime, each the mean over classes that can be measured.

    d_prime is the mean of the classes' own values, as the released evaluation takes it: that of
    the mean AUC is smaller. Of classes without a mistake, whose d' is infinite, it is null, and
    ``classes_without_a_mistake`` counts them.
    """
    scores, targets = _checked(scores, targets)
    precision, area = average_precision(scores, targets), roc_area(scores, targets)
    measured = area[~np.isnan(area)]
    primes = [d_prime(value) for value in measured]
    found: dict[str, Any] = {
        "mAP": _mean_percent(precision[~np.isnan(precision)]),
        "AUC": _mean_percent(measured),
        "d_prime": float(np.mean(primes)) if primes and np.isfinite(primes).all() else None,
        "classes_measured": len(measured),
    }
    if perfect := int((measured == 1).sum()):
        found["classes_without_a_mistake"] = perfect
    return found


def class_table(
    scores: np.ndarray, targets: np.ndarray, names: list[str]
) -> list[dict[str, str | int | float | None]]:
    """A row a class: examples, and what can be said of it.

    Where every example has one class: top1 and the classes it is mostly taken for. Else: average
    precision, AUC in percent and d'.
    """
    scores, targets = _checked(scores, targets)
    examples = targets.sum(1)
    rows: list[dict[str, str | int | float | None]] = [
        {"class": name, "examples": int(count)}
        for name, count in zip(names, targets.sum(0), strict=True)
    ]
    if (examples == 1).all():
        matrix = confusion(scores, targets.argmax(1))
        for number, row in enumerate(rows):
            taken, total = matrix[number], matrix[number].sum()
            row["top1"] = 100 * float(taken[number] / total) if total else None
            others = [i for i in np.argsort(-taken, kind="stable") if i != number and taken[i]]
            row["taken_for"] = ", ".join(
                f"{names[i]} ({taken[i]})" for i in others[:_MOST_CONFUSED]
            )
        return rows
    precision, area = average_precision(scores, targets), roc_area(scores, targets)
    for row, own, under in zip(rows, precision, area, strict=True):
        row["AP"] = None if math.isnan(own) else 100 * float(own)
        row["AUC"] = None if math.isnan(under) else 100 * float(under)
        prime = d_prime(float(under))
        row["d_prime"] = prime if math.isfinite(prime) else None
    return rows


def _mean_percent(values: np.ndarray) -> float | None:
    return 100 * float(values.mean()) if len(values) else None


def _checked(scores: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As arrays. Raises ValueError: other shapes, classes out of range, scores not finite."""
    scores, truth = np.asarray(scores), np.asarray(truth)
    if scores.ndim != 2 or 0 in scores.shape:
        raise ValueError(f"scores are {scores.shape}; they must be (N, C), N and C above 0")
    if truth.shape not in ((len(scores),), scores.shape):
        raise ValueError(
            f"classes are {truth.shape} for scores {scores.shape}; they must be (N,) or (N, C)"
        )
    if truth.ndim == 1 and (truth.min() < 0 or truth.max() >= scores.shape[1]):
        raise ValueError(
            f"classes are {truth.min()} .. {truth.max()}; there are {scores.shape[1]} scores"
        )
    if not np.isfinite(scores).all():
        row = int(np.flatnonzero(~np.isfinite(scores).all(1))[0])
        raise ValueError(f"scores of example {row} are not finite; look at the model or the file")
    return scores, truth
