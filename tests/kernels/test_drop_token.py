"""sample_keep: the one source of DropToken's randomness; drop_token: taking what it drew."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_fast.kernels import drop_token, sample_keep
from vatt_fast.kernels.drop_token import check_keep, num_kept

DRAW = dict(seed=0, step=0, stream="video/0")


@pytest.mark.parametrize(
    ("num_tokens", "drop_rate", "kept"),
    [
        (1568, 0.5, 784),
        (1200, 0.5, 600),
        (1200, 0.9, 120),
        (1200, 0.1, 1080),
        (10, 0.25, 7),
        (3, 1 / 3, 2),
        (7, 0.0, 7),
        (1, 0.0, 1),
    ],
)
def test_k_is_n_less_the_ceiling_of_what_is_dropped(num_tokens, drop_rate, kept):
    """(1 - .9) * 1200 is 119.99 in floating point; and 10 * .25 = 2.5 drops 3."""
    assert num_kept(num_tokens, drop_rate) == kept
    assert sample_keep(num_tokens, drop_rate, **DRAW).shape == (kept,)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 400),
    st.floats(0, 0.99),
    st.integers(-(2**63), 2**63),
    st.integers(0, 10**9),
    st.text(max_size=8),
    st.integers(1, 4),
)
def test_indices_are_distinct_sorted_and_in_range(num_tokens, drop_rate, seed, step, stream, batch):
    if num_tokens * (1 - drop_rate) < 1:
        return
    options = dict(seed=seed, step=step, stream=stream)
    for keep in (
        sample_keep(num_tokens, drop_rate, **options),
        sample_keep(num_tokens, drop_rate, **options, per="clip", batch=batch),
    ):
        assert keep.dtype == np.int32 and keep.shape[-1] == num_kept(num_tokens, drop_rate)
        assert (np.diff(keep, axis=-1) > 0).all() and keep.min() >= 0 and keep.max() < num_tokens
        check_keep(keep, num_tokens)


def test_golden_values():
    """The same on every platform and for ever: a resumed run, another rank and the JAX twin draw
    these."""
    expected = {
        "video/0": [0, 1, 3, 6, 7, 9, 11, 15, 18, 19],
        "audio/3": [3, 4, 6, 7, 9, 10, 11, 15, 16, 19],
    }
    for stream, keep in expected.items():
        assert sample_keep(20, 0.5, seed=1, step=2, stream=stream).tolist() == keep
    assert sample_keep(6, 0.5, seed=1, step=2, stream="video/0", per="clip", batch=3).tolist() == [
        [0, 1, 3],
        [0, 2, 4],
        [1, 2, 4],
    ]
    assert (
        int(sample_keep(1568, 0.5, seed=2**40, step=10**6, stream="video/7").astype(np.int64).sum())
        == 601988
    )


def test_the_same_in_another_process():
    code = """
from vatt_fast.kernels import sample_keep
print(sample_keep(50, .8, seed=5, step=6, stream='x').tolist())
"""
    env = os.environ | {"PYTHONHASHSEED": "77"}
    printed = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    ).stdout
    assert eval(printed) == sample_keep(50, 0.8, seed=5, step=6, stream="x").tolist()


def test_every_token_is_kept_equally_often_and_independently():
    """Chi-square over tokens and over pairs of tokens: 4000 steps of 40 tokens, half kept."""
    steps, N = 4000, 40
    kept = np.zeros((steps, N))
    for step in range(steps):
        kept[step, sample_keep(N, 0.5, seed=3, step=step, stream="video/0")] = 1
    # sampling 20 of 40 without replacement: variance 1/4, covariance -1/4 / 39
    chi_square = ((kept.sum(0) - steps / 2) ** 2 / (steps / 4)).sum() * (N - 1) / N
    assert 15 < chi_square < 75  # 39 degrees of freedom, far beyond 1e-3 on both sides
    together = kept.T @ kept / steps
    expected = 20 / 40 * 19 / 39
    assert (
        np.abs(together[~np.eye(N, dtype=bool)] - expected).max()
        < 5 * (expected * (1 - expected) / steps) ** 0.5
    )


@pytest.mark.parametrize(
    "change", [dict(step=1), dict(seed=1), dict(stream="audio/0"), dict(stream="video/1")]
)
def test_steps_seeds_streams_and_ranks_draw_independently(change):
    overlaps = []
    for step in range(200):
        a = sample_keep(100, 0.5, seed=0, step=2 * step, stream="video/0")
        b = sample_keep(
            100,
            0.5,
            **(
                dict(seed=0, step=2 * step, stream="video/0")
                | {k: v + 2 * step if k == "step" else v for k, v in change.items()}
            ),
        )
        overlaps.append(len(np.intersect1d(a, b)))
    assert np.mean(overlaps) == pytest.approx(
        25, abs=1.0
    )  # hypergeometric: mean 25, deviation 2.5 / sqrt(200) of the mean


def test_clips_draw_independently_and_do_not_depend_on_the_batch():
    four = sample_keep(200, 0.5, **DRAW, per="clip", batch=4)
    assert np.array_equal(sample_keep(200, 0.5, **DRAW, per="clip", batch=2), four[:2])
    assert all(30 < len(np.intersect1d(four[i], four[j])) < 70 for i in range(4) for j in range(i))


def test_per_batch_is_one_draw_for_all():
    assert sample_keep(200, 0.5, **DRAW, batch=9).shape == (100,)


@pytest.mark.parametrize("keep_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("per", ["batch", "clip"])
def test_drop_token_is_a_gather_with_a_scatter_back(per, keep_dtype):
    keep = torch.from_numpy(sample_keep(11, 0.5, **DRAW, per=per, batch=3)).to(keep_dtype)
    tokens = torch.randn(3, 11, 5, requires_grad=True, dtype=torch.float64)
    index = keep.long().expand(3, -1)[..., None].expand(-1, -1, 5)
    assert torch.equal(drop_token(tokens, keep), tokens.gather(1, index))
    seed = torch.randn(3, keep.shape[-1], 5, dtype=torch.float64)
    drop_token(tokens, keep).backward(seed)
    assert torch.equal(
        tokens.grad, torch.zeros(3, 11, 5, dtype=torch.float64).scatter(1, index, seed)
    )
    assert torch.autograd.gradcheck(lambda x: drop_token(x, keep), tokens)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_drop_token_takes_any_dtype(dtype):
    tokens = torch.randint(0, 2, (2, 6, 3)).to(dtype)
    assert torch.equal(drop_token(tokens, torch.tensor([1, 4])), tokens[:, [1, 4]])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: sample_keep(10, 1.0, **DRAW),
            r"drop_rate is 1.0; it is the fraction removed and lies in \[0, 1\)",
        ),
        (lambda: sample_keep(10, -0.1, **DRAW), "drop_rate is -0.1"),
        (lambda: sample_keep(10, float("nan"), **DRAW), "drop_rate is nan"),
        (
            lambda: sample_keep(10, 0.95, **DRAW),
            "drop_rate 0.95 keeps none of 10 tokens; take at most 0.9",
        ),
        (lambda: sample_keep(0, 0.5, **DRAW), "num_tokens is 0; there must be at least one"),
        (
            lambda: sample_keep(10, 0.5, **DRAW, per="token"),
            "per is 'token'; it is 'batch' or 'clip'",
        ),
        (lambda: sample_keep(10, 0.5, **DRAW, per="clip"), "batch is None; give at least 1"),
        (lambda: sample_keep(10, 0.5, **DRAW, per="clip", batch=0), "batch is 0; give at least 1"),
        (lambda: check_keep(np.array([0, 10]), 10), r"keep spans 0 .. 10; indices lie in 0 .. 9"),
        (lambda: check_keep(np.array([-1, 3]), 10, name="video_keep"), r"video_keep spans -1 .. 3"),
        (lambda: check_keep(torch.tensor([3, 3]), 10), "repeats an index or is not sorted"),
        (lambda: check_keep(np.array([[0, 1], [2, 1]]), 10), "repeats an index or is not sorted"),
        (
            lambda: check_keep(np.array([0.0, 1.0]), 10),
            r"keep is \(2,\) float64; it takes at least one integer index",
        ),
        (lambda: check_keep(np.zeros((0,), np.int32), 10), r"keep is \(0,\) int32"),
        (lambda: check_keep(np.array(3), 10), r"keep is \(\) int64"),
        (
            lambda: drop_token(torch.zeros(3, 4), torch.tensor([0])),
            r"tokens is \(3, 4\); drop_token takes \(B, N, dim\)",
        ),
        (
            lambda: drop_token(torch.zeros(0, 4, 2), torch.tensor([0])),
            r"tokens is \(0, 4, 2\).*no axis empty",
        ),
        (
            lambda: drop_token(torch.zeros(3, 4, 2), torch.tensor([0.0])),
            r"keep is \(1,\) torch.float32; it must be int32 or int64",
        ),
        (
            lambda: drop_token(torch.zeros(3, 4, 2), torch.tensor([[0], [1]])),
            r"keep is \(2, 1\).*\(B, K\) with B = 3",
        ),
        (
            lambda: drop_token(torch.zeros(3, 4, 2), torch.tensor([], dtype=torch.int32)),
            "at least one index",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
