"""DropToken's C++ rows: any dtype and strides, nothing beyond the tensors, the same for any number of threads."""

import pytest
import torch
from native_fixtures import guarded, needs_guard_pages

from vatt_fast.kernels import drop_token, native, use_backend
from vatt_fast.kernels.drop_token import native_cpu, reference

pytestmark = pytest.mark.skipif(
    native.extension is None, reason=f"the extension is {native.explain()}"
)

KEEPS = {
    "batch": torch.tensor([30, 2, 7], dtype=torch.int32),
    "clip": torch.tensor([[0, 36], [5, 4], [36, 1]]),
}
ONE = {"batch": KEEPS["batch"], "clip": KEEPS["clip"][:1]}  # of a batch of one clip


def tokens_of(dtype=torch.float32, B=3, N=37, dim=5):
    return torch.arange(B * N * dim).view(B, N, dim).to(dtype)


@pytest.mark.parametrize(
    "dtype", [torch.bool, torch.int8, torch.bfloat16, torch.float64, torch.complex128]
)
@pytest.mark.parametrize("per", KEEPS)
def test_any_dtype_is_copied_as_it_is(dtype, per):
    tokens, keep = tokens_of(dtype), KEEPS[per]
    kept = native_cpu.forward(tokens, keep)
    assert kept.dtype == dtype and torch.equal(kept, reference.forward(tokens, keep))
    scattered = native_cpu.backward(kept, keep, 37)
    assert scattered.dtype == dtype and torch.equal(scattered, reference.backward(kept, keep, 37))


@pytest.mark.parametrize("per", ONE)
def test_one_clip(per):
    tokens, keep = tokens_of(B=1), ONE[per]
    kept = native_cpu.forward(tokens, keep)
    assert torch.equal(kept, reference.forward(tokens, keep))
    assert torch.equal(native_cpu.backward(kept, keep, 37), reference.backward(kept, keep, 37))


@pytest.mark.parametrize("per", KEEPS)
def test_strides(per):
    keep = KEEPS[per]
    views = {
        "a part of each token": tokens_of(dim=9)[..., 2:7],
        "every other token": tokens_of(N=74)[:, ::2],
        "one clip for all": tokens_of(B=1).expand(3, -1, -1),
        "tokens side by side": tokens_of().transpose(1, 2).contiguous().transpose(1, 2),
    }
    for name, tokens in views.items():
        assert torch.equal(native_cpu.forward(tokens, keep), reference.forward(tokens, keep)), name
    d_kept = torch.randn(3, 5, keep.shape[-1]).transpose(1, 2)
    assert torch.equal(
        native_cpu.backward(d_kept, keep.repeat_interleave(2, -1)[..., ::2], 37),
        reference.backward(d_kept, keep, 37),
    )


@needs_guard_pages
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("per", KEEPS)
def test_nothing_is_touched_beyond_the_tensors(monkeypatch, per, at_end):
    def walled(x):
        return guarded(x.shape, x.dtype, at_end).copy_(x)

    monkeypatch.setattr(
        torch.Tensor,
        "new_empty",
        lambda x, shape, dtype=None: guarded(shape, dtype or x.dtype, at_end),
    )
    tokens, keep = tokens_of(), KEEPS[per].long()
    kept = native_cpu.forward(walled(tokens), walled(keep))
    assert torch.equal(kept, reference.forward(tokens, keep))
    part = tokens[..., 1:4]  # from a row's second value to its fourth
    assert torch.equal(
        native_cpu.forward(walled(tokens)[..., 1:4], walled(keep)), reference.forward(part, keep)
    )
    scattered = native_cpu.backward(walled(kept), walled(keep), 37)
    monkeypatch.undo()
    assert torch.equal(scattered, reference.backward(kept, keep, 37))


@pytest.mark.parametrize("keep", [[0, 37], [-1, 3], [[0, 1], [2, 3], [4, 99]], [2**40, 0]])
def test_an_index_out_of_range_is_an_error_and_not_a_crash(keep):
    keep = torch.tensor(keep)
    with pytest.raises(IndexError, match="keep has the index"):
        native_cpu.forward(tokens_of(), keep)
    with pytest.raises(IndexError, match="keep has the index"):
        native_cpu.backward(torch.zeros(3, 2, 5), keep, 37)


@pytest.mark.parametrize("per", KEEPS)
def test_any_number_of_threads_copies_the_same(per):
    """Large enough that every thread has a part."""
    tokens, keep = torch.randn(3, 37, 40_000), KEEPS[per]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            kept = native_cpu.forward(tokens, keep)
            assert torch.equal(kept, reference.forward(tokens, keep))
            assert torch.equal(
                native_cpu.backward(kept, keep, 37), reference.backward(kept, keep, 37)
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("lazy", [torch.conj, torch._neg_view])
def test_values_that_memory_does_not_hold_are_copied_all_the_same(lazy):
    """torch marks a conjugate or a negative instead of computing it, and computes it before it calls an op of somebody else's."""
    tokens = torch.complex(tokens_of(), tokens_of()).requires_grad_()
    keep = KEEPS["clip"]
    with use_backend(drop_token="native_cpu"):
        kept = drop_token(lazy(tokens.detach()), keep)
        assert torch.equal(kept, reference.forward(lazy(tokens.detach()), keep))
        weights = torch.randn_like(kept)
        (gradient,) = torch.autograd.grad(drop_token(tokens, keep), tokens, lazy(weights))
    assert torch.equal(
        gradient, reference.backward(lazy(weights).resolve_conj().resolve_neg(), keep, 37)
    )
