"""csrc/attention.cpp beyond the battery: every short length, strides, guard pages, threads, the matrix unit shared with torch."""

import math

import pytest
import torch
from native_fixtures import guarded, needs_guard_pages, using

from vatt_fast.kernels import native
from vatt_fast.kernels.attention import native_cpu, reference
from vatt_fast.kernels.cases import AttentionCase, make

CASES = [
    AttentionCase("ragged", 2, 37, 70, 2, 40),
    AttentionCase("video", 1, 165, 165, 2, 64, packed=True),
    AttentionCase("masked", 3, 65, 129, 2, 64, num_keys=(129, 0, 70)),
    AttentionCase("bias", 3, 21, 35, 2, 16, bias=True, num_keys=(35, 1, 0)),
    AttentionCase("wide", 1, 33, 65, 2, 128),
    AttentionCase("sharp", 1, 33, 150, 2, 64, scale=2.0),  # no length promises anything: the largest score is looked for
    AttentionCase("chunks", 1, 70, 1090, 1, 32),  # the backward takes keys 1024 at a time
    AttentionCase("one_query", 2, 1, 37, 2, 64),
    AttentionCase("one_key", 2, 40, 1, 2, 64),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(params=["real", "emulated"])
def amx(request):
    """The kernels on this machine's matrix unit, and on one written out in AVX-512."""
    if request.param == "emulated":
        with using(request.getfixturevalue("emulated_extension")):
            yield
    elif native.level() != "amx_bf16":
        pytest.skip(f"no matrix unit: {native.explain()}")
    else:
        yield


def draw(case, seed=0, dtype=torch.bfloat16):
    """q, k, v, d_out, d_lse of a case, and its options."""
    inputs = make(case, dtype, seed=seed)
    q, k, v = (inputs.pop(name) for name in "qkv")
    generator = torch.Generator().manual_seed(seed + 1)
    d_out = torch.randn(q.shape, generator=generator).to(dtype)
    d_lse = torch.randn((q.shape[0], q.shape[2], q.shape[1]), generator=generator)
    return (q, k, v, d_out, d_lse), inputs


def run(module, q, k, v, d_out, d_lse, options):
    """out, lse, d_q, d_k, d_v and, where there is a bias, d_bias."""
    out, lse = module.forward(q, k, v, **options)
    grads = module.backward(d_out, d_lse, q, k, v, out, lse, **options, bias_grad=options["bias"] is not None)
    return [x for x in (out, lse, *grads) if x is not None]


def assert_close_to_fp64(result, tensors, options, bound=0.012):
    """bf16 rounds to 0.002 of a value on average; what is 0 or -inf is so exactly."""
    truth = run(reference, *(x.double() for x in tensors), options)
    unit = max(x[x.isfinite()].norm() for x in truth)
    for got, exact in zip(result, truth, strict=True):
        empty = exact == -math.inf
        assert torch.equal(got == -math.inf, empty)
        got, exact = (x.double().masked_fill(empty, 0) for x in (got, exact))
        assert (got - exact).norm() <= bound * max(exact.norm(), 0.05 * unit)


def test_what_it_refuses(emulated_extension):
    (q, k, v, _, _), options = draw(CASES[0])
    with using(None):
        assert "not built" in native_cpu.unsupported(q, k, v, **options)
    with using(emulated_extension):
        assert native_cpu.unsupported(q, k, v, **options) is None
        assert "float16" in native_cpu.unsupported(q.half(), k.half(), v.half(), **options)
        assert "contiguous" in native_cpu.unsupported(q.transpose(1, 3), k, v, **options)
        wide = torch.zeros(1, 2, 1, 144, dtype=torch.bfloat16)
        assert "head_dim 144" in native_cpu.unsupported(wide, wide, wide, **options)


@every_case
def test_against_fp64(amx, case):
    tensors, options = draw(case)
    assert_close_to_fp64(run(native_cpu, *tensors, options), tensors, options)


@pytest.mark.parametrize("queries", [range(first, first + 10) for first in range(1, 71, 10)], ids=lambda r: f"{r[0]}_to_{r[-1]}")
def test_every_short_length(amx, queries):
    (q, k, v, d_out, d_lse), options = draw(AttentionCase("", 1, 70, 70, 1, 16))
    for T in queries:
        for S in range(1, 71):
            tensors = q[:, :T], k[:, :S], v[:, :S], d_out[:, :T], d_lse[..., :T]
            assert_close_to_fp64(run(native_cpu, *tensors, options), tensors, options, bound=0.02)


@every_case
def test_any_strides_give_the_same_bits(amx, case):
    """Slices of a packed qkv, of heads before tokens, and rows apart in memory that holds nan."""
    tensors, options = draw(case)
    expected = run(native_cpu, *(x.contiguous() for x in tensors), options)
    B, T, H, D = tensors[0].shape
    views = []
    for x in tensors[:4]:
        apart = torch.full((B, H, x.shape[1] * 3, D + 5), torch.nan, dtype=x.dtype)[..., 1::3, 2 : D + 2]
        views.append(apart.copy_(x.transpose(1, 2)).transpose(1, 2))
    for got, exact in zip(run(native_cpu, *views, tensors[4], options), expected, strict=True):
        assert torch.equal(got, exact)
    sums = [tensors[3][:1, :1, :1, :].expand(B, T, H, D), tensors[4][:1, :1, :1].expand(B, H, T)]  # what .sum().backward() sends
    contiguous = run(native_cpu, *tensors[:3], *(x.contiguous() for x in sums), options)
    for got, exact in zip(run(native_cpu, *tensors[:3], *sums, options), contiguous, strict=True):
        assert torch.equal(got, exact)


@every_case
def test_bits_do_not_depend_on_threads_or_memory(amx, case):
    """Threads 1, 2, 4; repeats; outputs and working memory full of nan."""
    tensors, options = draw(case)
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(1)
        expected = run(native_cpu, *tensors, options)
        for count, poisoned in ((1, True), (2, False), (4, True), (4, True)):
            torch.set_num_threads(count)
            torch.use_deterministic_algorithms(poisoned)  # makes torch.empty give nan
            for got, exact in zip(run(native_cpu, *tensors, options), expected, strict=True):
                assert torch.equal(got, exact), count
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("threads", [2, 3, 5, 16])
def test_a_head_cut_into_several_tasks_has_the_same_bits(amx, threads):
    tensors, options = draw(AttentionCase("", 1, 1000, 90, 1, 64))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = run(native_cpu, *tensors, options)
        torch.set_num_threads(threads)
        for got, exact in zip(run(native_cpu, *tensors, options), expected, strict=True):
            assert torch.equal(got, exact)
    finally:
        torch.set_num_threads(before)


def test_what_is_not_attended_may_be_anything(amx):
    """Neither a masked key, nor the gradients of a query without any, reach a result, whatever they hold."""
    tensors, options = draw(CASES[2])
    expected = run(native_cpu, *tensors, options)
    hidden = ~options["key_mask"][..., None, None]
    empty = ~options["key_mask"].any(1)
    q, k, v, d_out, d_lse = tensors
    for value in (math.nan, math.inf, 1e30):
        loud = [x.masked_fill(hidden, value) for x in (k, v)]
        d_loud = d_out.masked_fill(empty[:, None, None, None], value), d_lse.masked_fill(empty[:, None, None], value)
        for got, exact in zip(run(native_cpu, q, *loud, *d_loud, options), expected, strict=True):
            assert torch.equal(got, exact), value


def test_large_scores(amx):
    """Far beyond what the powers' range holds: the largest score is subtracted, and far smaller ones are 0."""
    for size in (30.0, 1e3, 1e5):
        tensors, options = draw(CASES[1])
        q, k, v, d_out, d_lse = tensors
        tensors = (q * size, k, v, d_out, d_lse)
        out, lse = native_cpu.forward(*tensors[:3], **options)
        exact, exact_lse = reference.forward(*(x.double() for x in tensors[:3]), **options)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=2e-5, atol=0)
        assert (out - exact).norm() <= 0.01 * exact.norm()
        assert all(x.isfinite().all() for x in run(native_cpu, *tensors, options))


@needs_guard_pages
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_case
def test_nothing_is_touched_beyond_the_tensors(amx, monkeypatch, case, at_end):
    """Inputs, outputs and working memory lie flush against pages that end the process when touched."""
    tensors, options = draw(case)
    expected = run(native_cpu, *tensors, options)

    def moved(x):
        return None if x is None else guarded(x.shape, x.dtype, at_end).copy_(x)

    def empty(*shape, dtype=torch.float32):
        return guarded(shape[0] if isinstance(shape[0], tuple | torch.Size) else shape, dtype, at_end)

    tensors = [moved(x) for x in tensors]
    options |= {"bias": moved(options["bias"]), "key_mask": moved(options["key_mask"])}
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "zeros", lambda *shape, dtype: empty(*shape, dtype=dtype).zero_())
    results = run(native_cpu, *tensors, options)
    monkeypatch.undo()
    for got, exact in zip(results, expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.skipif(native.level() != "amx_bf16", reason="torch has no matrix unit to use here")
def test_torchs_own_use_of_the_matrix_unit_is_undisturbed():
    """Its tile shapes are other ones, and its threads are the same."""
    tensors, options = draw(CASES[1])
    x, y = (torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)).bfloat16() for seed in (0, 1))
    expected, product = run(native_cpu, *tensors, options), x @ y
    for _ in range(200):
        assert torch.equal(x @ y, product)
        for got, exact in zip(run(native_cpu, *tensors, options), expected, strict=True):
            assert torch.equal(got, exact)
