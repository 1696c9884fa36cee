"""What every C++ attention must do beyond the battery, whatever its dtype: its test files bring
cases, levels and bounds."""

import math

import torch
from native_fixtures import guarded

from vatt_fast.kernels.attention import native_cpu, reference
from vatt_fast.kernels.cases import AttentionCase, make


def draw(case, dtype):
    """q, k, v, d_out, d_lse of a case, and its options."""
    inputs = make(case, dtype, seed=0)
    q, k, v = (inputs.pop(name) for name in "qkv")
    generator = torch.Generator().manual_seed(1)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    d_lse = torch.randn((q.shape[0], q.shape[2], q.shape[1]), generator=generator)
    return (q, k, v, d_out, d_lse), inputs


def run(module, q, k, v, d_out, d_lse, options):
    """out, lse, d_q, d_k, d_v and, where there is a bias, d_bias."""
    out, lse = module.forward(q, k, v, **options)
    grads = module.backward(
        d_out, d_lse, q, k, v, out, lse, **options, bias_grad=options["bias"] is not None
    )
    return [x for x in (out, lse, *grads) if x is not None]


def assert_bits(tensors, options, expected):
    """The kernel gives these bits."""
    for got, exact in zip(run(native_cpu, *tensors, options), expected, strict=True):
        assert torch.equal(got, exact)


def assert_close_to_fp64(tensors, options, bound):
    """The kernel is within ``bound`` of fp64 in the norm; what is 0 or -inf is so exactly."""
    truth = run(reference, *(x.double() for x in tensors), options)
    unit = max(x[x.isfinite()].norm() for x in truth)
    for got, exact in zip(run(native_cpu, *tensors, options), truth, strict=True):
        empty = exact == -math.inf
        assert torch.equal(got == -math.inf, empty)
        got, exact = (x.double().masked_fill(empty, 0) for x in (got, exact))
        assert (got - exact).norm() <= bound * max(exact.norm(), 0.05 * unit)


def assert_every_length(dtype, queries, longest, head_dim, bound):
    """All of these numbers of queries with 1 to ``longest`` keys."""
    (q, k, v, d_out, d_lse), options = draw(
        AttentionCase("", 1, longest, longest, 1, head_dim), dtype
    )
    for T in queries:
        for S in range(1, longest + 1):
            assert_close_to_fp64(
                (q[:, :T], k[:, :S], v[:, :S], d_out[:, :T], d_lse[..., :T]), options, bound
            )


def assert_every_causal_length(dtype, longest, head_dim, bound):
    """All sequences of 1 to ``longest`` tokens."""
    case = AttentionCase("", 1, longest, longest, 1, head_dim, causal=True)
    (*tensors, d_lse), options = draw(case, dtype)
    for T in range(1, longest + 1):
        few = [x[:, :T] for x in tensors]
        assert_close_to_fp64((*few, d_lse[..., :T]), options, bound)


def assert_strides_do_not_matter(tensors, options):
    """Slices of a packed qkv, of heads before tokens, and rows apart in memory that holds nan."""
    expected = run(native_cpu, *(x.contiguous() for x in tensors), options)
    B, T, H, D = tensors[0].shape
    views = []
    for x in tensors[:4]:
        apart = torch.full((B, H, x.shape[1] * 3, D + 5), torch.nan, dtype=x.dtype)[
            ..., 1::3, 2 : D + 2
        ]
        views.append(apart.copy_(x.transpose(1, 2)).transpose(1, 2))
    assert_bits((*views, tensors[4]), options, expected)
    sums = [
        tensors[3][:1, :1, :1, :].expand(B, T, H, D),
        tensors[4][:1, :1, :1].expand(B, H, T),
    ]  # what .sum().backward() sends
    contiguous = run(native_cpu, *tensors[:3], *(x.contiguous() for x in sums), options)
    assert_bits((*tensors[:3], *sums), options, contiguous)


def assert_threads_and_memory_do_not_matter(tensors, options, counts=(2, 3, 4)):
    """Threads from 1 up; repeats; outputs and working memory full of nan."""
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(1)
        expected = run(native_cpu, *tensors, options)
        for count in (1, *counts):
            torch.set_num_threads(count)
            for poisoned in (True, False, True):
                torch.use_deterministic_algorithms(poisoned)  # makes torch.empty give nan
                assert_bits(tensors, options, expected)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


def assert_hidden_values_do_not_matter(tensors, options, value):
    """Neither a masked key, nor the gradients of a query without any, reach a result, whatever they
    hold."""
    expected = run(native_cpu, *tensors, options)
    hidden = ~options["key_mask"][..., None, None]
    empty = ~options["key_mask"].any(1)
    q, k, v, d_out, d_lse = tensors
    loud = [x.masked_fill(hidden, value) for x in (k, v)]
    d_loud = (
        d_out.masked_fill(empty[:, None, None, None], value),
        d_lse.masked_fill(empty[:, None, None], value),
    )
    assert_bits((q, *loud, *d_loud), options, expected)


def assert_later_tiles_are_not_read(dtype, bound):
    """Causal queries give what they give alone, though whole tiles of nan follow them."""
    (q, k, v, _, _), options = draw(AttentionCase("", 2, 160, 160, 2, 32, causal=True), dtype)
    later = torch.arange(160)[:, None, None] >= 96
    out, lse = native_cpu.forward(*(x.masked_fill(later, math.nan) for x in (q, k, v)), **options)
    alone = reference.forward(*(x[:, :96].double() for x in (q, k, v)), **options)
    for got, exact in zip((out[:, :96], lse[..., :96]), alone, strict=True):
        assert (got - exact).norm() <= bound * exact.norm()


def assert_nothing_is_touched_beyond(tensors, options, monkeypatch, at_end):
    """Inputs, outputs and working memory lie flush against pages that end the process when
    touched."""
    expected = run(native_cpu, *tensors, options)

    def moved(x):
        return None if x is None else guarded(x.shape, x.dtype, at_end).copy_(x)

    def empty(*shape, dtype=torch.float32):
        return guarded(
            shape[0] if isinstance(shape[0], tuple | torch.Size) else shape, dtype, at_end
        )

    tensors = [moved(x) for x in tensors]
    options = options | {"bias": moved(options["bias"]), "key_mask": moved(options["key_mask"])}
    pad = torch.nn.functional.pad
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        patch.setattr(torch, "empty_like", lambda x, memory_format: empty(x.shape, dtype=x.dtype))
        patch.setattr(torch, "zeros", lambda *shape, dtype: empty(*shape, dtype=dtype).zero_())
        patch.setattr(torch.nn.functional, "pad", lambda x, padding: moved(pad(x, padding)))
        results = run(native_cpu, *tensors, options)
    for got, exact in zip(results, expected, strict=True):
        assert torch.equal(got, exact)
