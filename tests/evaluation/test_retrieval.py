"""Retrieval measures against the recording and an independent brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import recording
from sklearn.metrics.pairwise import cosine_similarity

from vatt_fast.evaluation import retrieval
from vatt_fast.evaluation.retrieval import (
    factor_agreement,
    mean_of_units,
    mean_of_windows,
    retrieval_metrics,
    top_k,
)


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_measures_as_released():
    clips, text = (
        recording()["retr/vid_4win"].astype(np.float64),
        recording()["retr/txt"].astype(np.float64),
    )
    windows = len(clips) // len(text)
    ours = retrieval_metrics(unit(text), mean_of_windows(clips, windows), np.arange(len(text)))
    assert [
        ours["r1"] / 100,
        ours["r5"] / 100,
        ours["r10"] / 100,
        ours["median_rank"],
    ] == pytest.approx(recording()["retr/embd_avg"].tolist())
    # the release's other choice: mean of cosines
    ours = retrieval_metrics(unit(text), mean_of_units(clips, windows), np.arange(len(text)))
    assert [ours["r1"] / 100, ours["r5"] / 100, ours["r10"] / 100, ours["median_rank"]] == (
        pytest.approx(recording()["retr/cos_avg"].tolist())
    )
    averaged = cosine_similarity(text, clips).reshape(len(text), -1, windows).mean(2)
    np.testing.assert_allclose(unit(text) @ mean_of_units(clips, windows).T, averaged)


def brute_rank(similarity, own: int) -> int:
    """Position of the right target in a list sorted best first, among equals the last."""
    order = sorted(range(len(similarity)), key=lambda j: (-similarity[j], j == own))
    return order.index(own) + 1


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_measures_equal_a_brute_force(queries, targets, seed, coarse):
    rng = np.random.default_rng(seed)
    q, t = rng.normal(size=(queries, 3)), rng.normal(size=(targets, 3))
    if coarse:  # many ties
        q, t = np.sign(q), np.sign(t)
    truth = rng.integers(0, targets, queries)
    ranks = np.array(
        [brute_rank([float(a @ b) for b in t], own) for a, own in zip(q, truth, strict=True)]
    )
    ours = retrieval_metrics(q, t, truth)
    expected = {f"r{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10)} | {
        "median_rank": np.median(ranks)
    }
    assert ours == pytest.approx(expected)
    best = top_k(q, t, min(3, targets))
    for row, a in zip(best, q, strict=True):
        similarity = t @ a
        assert (
            list(row)
            == sorted(range(targets), key=lambda j: (-similarity[j], j))[: min(3, targets)]
        )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 12), st.integers(0, 2**32 - 1), st.booleans())
def test_the_best_of_several_right_targets_counts(queries, targets, seed, coarse):
    rng = np.random.default_rng(seed)
    q, t = rng.normal(size=(queries, 3)), rng.normal(size=(targets, 3))
    if coarse:
        q, t = np.sign(q), np.sign(t)
    truth = [rng.choice(targets, rng.integers(1, targets + 1), replace=False).tolist() for _ in q]
    ranks = []
    for a, right in zip(q, truth, strict=True):
        similarity = [float(a @ b) for b in t]
        best = max(right, key=lambda j: similarity[j])
        wrong = [j for j in range(targets) if j not in right]
        ranks.append(brute_rank([similarity[j] for j in (*wrong, best)], len(wrong)))
    assert retrieval.retrieval_ranks(q, t, truth).tolist() == ranks


@pytest.mark.parametrize("elements", [1, 700, 10**6])
def test_size_of_the_pieces_changes_nothing(elements, monkeypatch):
    """One query at a time, three (then the last piece is smaller), or all; coarse values tie."""
    rng = np.random.default_rng(0)
    q, t = rng.integers(-2, 3, (100, 4)).astype(float), rng.integers(-2, 3, (200, 4)).astype(float)
    truth = rng.integers(0, 200, 100)
    seen, whole = [], retrieval._ranks
    monkeypatch.setattr(retrieval, "_ranks", lambda s, own: seen.append(s.shape) or whole(s, own))
    monkeypatch.setattr(retrieval, "_CHUNK_ELEMENTS", elements)
    brute = np.array([brute_rank(t @ a, own) for a, own in zip(q, truth, strict=True)])
    assert retrieval_metrics(q, t, truth)["r10"] == pytest.approx(100 * (brute <= 10).mean())
    assert (
        max(rows * columns for rows, columns in seen) <= max(elements, 200)
        and sum(rows for rows, _ in seen) == 100
    )
    assert (top_k(q, t, 7) == np.argsort(-(q @ t.T), axis=1, kind="stable")[:, :7]).all()


def test_constant_embeddings_score_nothing():
    """A collapsed model must not look perfect: every target ties with the right one."""
    ones = np.ones((50, 4))
    nothing = {"r1": 0.0, "r5": 0.0, "r10": 0.0, "median_rank": 50.0}
    assert retrieval_metrics(ones, ones, np.arange(50)) == nothing
    # Products of equal rows may differ in their last bit, depending on the row's place in the
    # matrix. That must help no more than chance does.
    same = np.tile(unit(np.random.default_rng(0).normal(size=(1, 67))), (203, 1)).astype(np.float32)
    found = retrieval_metrics(same, same, np.arange(203))
    assert (
        all(found[f"r{k}"] <= 100 * k / 203 + 1e-9 for k in (1, 5, 10))
        and found["median_rank"] >= 102
    )


def test_half_precision_is_widened():
    """In half precision these two targets tie, which would cost the right one its rank."""
    q, t = np.array([[1.0, 1.0]], np.float16), np.array([[1.0, 1e-4], [1.0, 0.0]], np.float16)
    assert retrieval_metrics(q, t, np.array([0]))["median_rank"] == 1


def test_windows_are_clip_major_and_averaged():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    np.testing.assert_allclose(mean_of_windows(x, 2), [[0.5**0.5, 0.5**0.5], [0, 1]])


def test_factor_agreement():
    """Three queries about four clips: the hits are clips 3, 2, 0."""
    wanted = {"colour": ["red", "blue", "red"], "shape": ["ring", "ring", "star"]}
    clips = {"colour": ["red", "green", "blue", "red"], "shape": ["ring", "ring", "ring", "star"]}
    assert factor_agreement(np.array([3, 2, 0]), wanted, clips) == {
        "colour": 100.0,
        "shape": pytest.approx(100 / 3),
    }


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: retrieval_metrics(x[:0], x, np.arange(0)), "at least one row"),
        (lambda x: retrieval_metrics(x, x[:, :2], np.arange(4)), "queries are 3 wide, targets 2"),
        (lambda x: retrieval_metrics(x * np.nan, x, np.arange(4)), "4 rows that are not finite"),
        (lambda x: retrieval_metrics(x, x, np.arange(4) + 1), r"there are targets 0 \.\. 3"),
        (lambda x: retrieval_metrics(x, x, np.arange(3)), "one integer for each of 4 queries"),
        (lambda x: retrieval_metrics(x, x, [[0], [1], [2], []]), "4 lists, 1 of them empty"),
        (lambda x: retrieval_metrics(x, x, [[0], [1], [2], [0, 4]]), r"targets 0 \.\. 3"),
        (lambda x: top_k(x, x, 5), "number of targets"),
        (lambda x: mean_of_windows(x, 3), "must divide evenly"),
        (lambda x: factor_agreement(np.arange(0), {}, {}), "one target index a query"),
        (
            lambda x: factor_agreement(
                np.array([2]), {"shape": ["ring"]}, {"shape": ["ring", "star"]}
            ),
            r"given for targets 0 \.\. 1",
        ),
        (
            lambda x: factor_agreement(np.array([0]), {"shape": []}, {"shape": ["ring"]}),
            "has 0 values for 1 queries",
        ),
        (
            lambda x: factor_agreement(np.array([0]), {"shape": ["ring"]}, {"colour": ["red"]}),
            "they must be the same",
        ),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(12.0).reshape(4, 3))
