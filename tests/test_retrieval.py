"""Retrieval measures against the recording and an independent brute force; the probe; the report's pictures."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import recording
from sklearn.metrics.pairwise import cosine_similarity

from vatt_fast.evaluation.probe import linear_probe
from vatt_fast.evaluation.report import contact_sheet, plot_curves, retrieval_table
from vatt_fast.evaluation.retrieval import factor_agreement, mean_of_windows, retrieval_metrics, top_k


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def test_measures_as_released():
    clips, text = recording()["retr/vid_4win"].astype(np.float64), recording()["retr/txt"].astype(np.float64)
    windows = len(clips) // len(text)
    ours = retrieval_metrics(unit(text), mean_of_windows(clips, windows), np.arange(len(text)))
    assert [ours["r1"] / 100, ours["r5"] / 100, ours["r10"] / 100, ours["median_rank"]] == pytest.approx(
        recording()["retr/embd_avg"].tolist()
    )
    averaged = cosine_similarity(text, clips).reshape(len(text), -1, windows).mean(2)  # the release's other choice: mean of cosines
    ranks = np.array([brute_rank(row, i) for i, row in enumerate(averaged)])
    assert [(ranks <= k).mean() for k in (1, 5, 10)] + [np.median(ranks)] == pytest.approx(recording()["retr/cos_avg"].tolist())


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
    ranks = np.array([brute_rank([float(a @ b) for b in t], own) for a, own in zip(q, truth, strict=True)])
    ours = retrieval_metrics(q, t, truth)
    expected = {f"r{k}": 100 * np.mean(ranks <= k) for k in (1, 5, 10)} | {"median_rank": np.median(ranks)}
    assert ours == pytest.approx(expected)
    best = top_k(q, t, min(3, targets))
    for row, a in zip(best, q, strict=True):
        similarity = t @ a
        assert list(row) == sorted(range(targets), key=lambda j: (-similarity[j], j))[: min(3, targets)]


def test_large_sets_are_walked_in_chunks():
    rng = np.random.default_rng(0)
    t = unit(rng.normal(size=(2500, 8)))
    assert retrieval_metrics(t, t, np.arange(2500)) == {"r1": 100.0, "r5": 100.0, "r10": 100.0, "median_rank": 1.0}


def test_constant_embeddings_score_nothing():
    ones = np.ones((50, 4))
    assert retrieval_metrics(ones, ones, np.arange(50)) == {"r1": 0.0, "r5": 0.0, "r10": 0.0, "median_rank": 50.0}


def test_windows_are_clip_major_and_averaged():
    x = np.array([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0], [0.0, 4.0]])
    np.testing.assert_allclose(mean_of_windows(x, 2), [[0.5**0.5, 0.5**0.5], [0, 1]])


def test_factor_agreement():
    factors = {"colour": ["red", "blue", "red"], "shape": ["ring", "ring", "star"]}
    assert factor_agreement(np.array([0, 2, 0]), factors, factors) == {"colour": pytest.approx(200 / 3), "shape": pytest.approx(100 / 3)}


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: retrieval_metrics(x[:0], x, np.arange(0)), "at least one row"),
        (lambda x: retrieval_metrics(x, x[:, :2], np.arange(4)), "queries are 3 wide, targets 2"),
        (lambda x: retrieval_metrics(x * np.nan, x, np.arange(4)), "4 rows that are not finite"),
        (lambda x: retrieval_metrics(x, x, np.arange(4) + 1), r"there are targets 0 \.\. 3"),
        (lambda x: retrieval_metrics(x, x, np.arange(3)), "one integer for each of 4 queries"),
        (lambda x: top_k(x, x, 5), "number of targets"),
        (lambda x: mean_of_windows(x, 3), "must divide evenly"),
        (lambda x: linear_probe(x, [0, 1, 0], x, [0] * 4), "for 3 labels"),
        (lambda x: linear_probe(x, [0] * 4, x, [0] * 4), "all alike"),
        (lambda x: linear_probe(x, [0, 1, 0, 1], x[:, :2], [0] * 4), "3 wide in training, 2 in the test"),
        (lambda x: linear_probe(x + np.inf, [0, 1, 0, 1], x, [0] * 4), "not finite"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(np.arange(12.0).reshape(4, 3))


def test_linear_probe_reads_what_is_linear_and_only_that():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1400, 16)) * np.logspace(-3, 3, 16)  # scales that only standardising evens out
    linear = np.digitize(x[:, 0], np.quantile(x[:, 0], [0.33, 0.67])).tolist()
    exclusive = ((x[:, 1] > 0) ^ (x[:, 2] > 0)).tolist()
    assert linear_probe(x[:1200], linear[:1200], x[1200:], linear[1200:]) > 85
    assert linear_probe(x[:1200], exclusive[:1200], x[1200:], exclusive[1200:]) < 65
    assert linear_probe(x[:1200], linear[:1200], x[1200:], linear[1200:]) == linear_probe(x[:1200], linear[:1200], x[1200:], linear[1200:])


def test_pictures_and_table(tmp_path):
    from matplotlib.image import imread

    lines = [
        {"step": s, "loss_va": 4 - s / 100, "loss_vt": 4.0, "learning_rate": 1e-3, "clips_per_second": 90.0} for s in range(10, 110, 10)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    red, blue = (np.tile(np.array(colour, np.uint8), (4, 64, 64, 1)) for colour in ([220, 0, 0], [0, 0, 220]))
    contact_sheet(
        ["a red ring going left", "a blue star"], [[red, blue], [blue, red]], [[True, False], [False, False]], tmp_path / "sheet.png"
    )
    assert imread(tmp_path / "curves.png").std() > 0.05
    sheet = (imread(tmp_path / "sheet.png")[..., :3] * 255).round().astype(int)
    pure = [(abs(sheet - colour).sum(-1) < 12).sum() for colour in ([220, 0, 0], [0, 0, 220], [0, 158, 115])]
    assert pure[0] > 5000 and pure[1] > 5000 and pure[2] > 500  # both clips, and the green frame of the right one
    table = retrieval_table(*({"r1": v, "r5": v, "r10": v, "median_rank": v} for v in (1, 2, 0.5)))
    assert table.splitlines()[2] == "| R@1 (%) | 0.5 | 1.0 | 2.0 |"
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no step"):
        plot_curves(tmp_path / "metrics.jsonl", tmp_path / "c.png")
    with pytest.raises(ValueError, match="there must be one of each"):
        contact_sheet(["a"], [], [], tmp_path / "s.png")
