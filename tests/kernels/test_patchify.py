"""Clips to patch rows and back, in torch, NumPy and JAX."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vatt_fast.kernels import patchify, unpatchify


def test_rows_are_row_major_and_values_t_h_w_c():
    clip = torch.arange(4 * 4 * 6 * 3).reshape(1, 4, 4, 6, 3)
    rows = patchify(clip, (2, 2, 3))
    assert rows.shape == (1, 2 * 2 * 2, 2 * 2 * 3 * 3)
    for n, (t, h, w) in enumerate((t, h, w) for t in (0, 2) for h in (0, 2) for w in (0, 3)):
        expected = [
            clip[0, t + a, h + b, w + c, d].item()
            for a in range(2)
            for b in range(2)
            for c in range(3)
            for d in range(3)
        ]
        assert rows[0, n].tolist() == expected


def test_the_paper_sizes():
    assert patchify(torch.zeros(1, 32, 224, 224, 3, dtype=torch.uint8), (4, 16, 16)).shape == (
        1,
        1568,
        3072,
    )
    assert patchify(torch.zeros(1, 153600), (128,)).shape == (1, 1200, 128)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(*[st.integers(1, 7)] * 3),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.integers(1, 3),
    st.sampled_from(["uint8", "float32"]),
    st.data(),
)
def test_unpatchify_inverts_and_padding_is_at_the_far_end(sizes, patch, channels, dtype, data):
    pad_value = data.draw(st.sampled_from([0, 1]))
    clip = np.random.default_rng(0).integers(2, 200, (2, *sizes, channels)).astype(dtype)
    rows = patchify(torch.from_numpy(clip), patch, pad_value=pad_value)
    assert torch.equal(unpatchify(rows, patch, (*sizes, channels)), torch.from_numpy(clip))
    whole = unpatchify(
        rows, patch, (*(-(-s // p) * p for s, p in zip(sizes, patch, strict=True)), channels)
    )
    inside = torch.zeros(whole.shape, dtype=torch.bool)
    inside[:, : sizes[0], : sizes[1], : sizes[2]] = True
    assert (whole[~inside] == pad_value).all() and torch.equal(
        whole[inside].view(clip.shape), torch.from_numpy(clip)
    )


@pytest.mark.parametrize(("shape", "patch"), [((3, 5, 7, 3), (2, 4, 4)), ((37,), (8,))])
def test_numpy_and_jax_agree_with_torch(shape, patch):
    clip = np.random.default_rng(1).random((2, *shape), dtype=np.float32)
    expected = patchify(torch.from_numpy(clip), patch, pad_value=-1).numpy()
    rows = patchify(clip, patch, pad_value=-1)
    assert isinstance(rows, np.ndarray) and np.array_equal(rows, expected)
    assert np.array_equal(unpatchify(rows, patch, shape), clip)
    jax = pytest.importorskip("jax", reason="patchify takes JAX arrays too; jax is not installed")
    rows = patchify(jax.numpy.asarray(clip), patch, pad_value=-1)
    assert isinstance(rows, jax.Array) and np.array_equal(rows, expected)
    assert np.array_equal(unpatchify(rows, patch, shape), clip)


def test_gradients_pass():
    clip = torch.rand(1, 3, 5, 5, 2, requires_grad=True, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: patchify(x, (2, 2, 3)), clip)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: patchify(torch.zeros(2, 4, 8, 8), (2, 4, 4)),
            r"takes a clip \(B, T, H, W, C\) with a patch of 3 sizes.*got \(2, 4, 8, 8\)",
        ),
        (lambda: patchify(torch.zeros(2, 16), (2, 4, 4)), r"got \(2, 16\) and \(2, 4, 4\)"),
        (lambda: patchify(torch.zeros(2, 16), (0,)), r"and \(0,\)"),
        (lambda: patchify(torch.zeros(2, 16, 2), (4, 4)), r"or \(B, S\) with one"),
        (lambda: patchify(torch.zeros(2, 0, 8, 8, 3), (2, 4, 4)), "empty"),
        (
            lambda: unpatchify(torch.zeros(2, 4, 5), (4,), (16,)),
            r"patches \(2, 4, 5\) are not those of clips \(16,\) cut by \(4,\)",
        ),
        (lambda: unpatchify(torch.zeros(2, 3, 4), (4,), (16,)), "are not those of clips"),
        (lambda: unpatchify(torch.zeros(2, 4, 4), (4, 4), (4, 4)), "patch of 3 sizes or 1"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
