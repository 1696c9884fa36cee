"""csrc/short_attention.cpp beyond the battery: every short length, strides, guard pages, threads, what is not attended."""

import functools

import pytest
import torch
from native_fixtures import guarded, held_to, needs_guard_pages
from test_native_attention import assert_close_to_fp64, draw, run

from vatt_fast.kernels import explain, native
from vatt_fast.kernels.attention import native_cpu
from vatt_fast.kernels.cases import AttentionCase

draw = functools.partial(draw, dtype=torch.float32)
BOUND = 1e-6

CASES = [
    AttentionCase("sentence", 37, 17, 17, 2, 32, bias=True, num_keys=tuple(1 + i % 17 for i in range(37)), packed=True),
    AttentionCase("ragged", 2, 37, 70, 2, 40),
    AttentionCase("video", 1, 165, 165, 2, 64, packed=True),
    AttentionCase("masked", 3, 65, 129, 2, 64, num_keys=(129, 0, 70)),
    AttentionCase("bias", 3, 21, 35, 2, 16, bias=True, num_keys=(35, 1, 0)),
    AttentionCase("odd", 2, 19, 13, 3, 21, bias=True),
    AttentionCase("many_biases", 16, 40, 45, 3, 8, bias=True),
    AttentionCase("one_query", 2, 1, 37, 2, 64),
    AttentionCase("one_key", 2, 40, 1, 2, 64),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(params=["avx2", "avx512"], autouse=True)
def level(request):
    with held_to(request.param, request):
        yield request.param


def test_what_it_refuses():
    (q, k, v, _, _), options = draw(CASES[1])
    assert native_cpu.unsupported(q, k, v, **options) is None
    assert "float64" in native_cpu.unsupported(q.double(), k.double(), v.double(), **options)
    assert "contiguous" in native_cpu.unsupported(q.transpose(1, 3), k, v, **options)
    long = torch.zeros(1, 513, 1, 16)
    assert "513 tokens" in native_cpu.unsupported(long, long, long, **options)
    before = native.extension.level()
    native.extension.hold_to("base")
    try:
        assert "AVX2" in native_cpu.unsupported(q, k, v, **options)
    finally:
        native.extension.hold_to(before)


@every_case
def test_against_fp64(case):
    tensors, options = draw(case)
    assert_close_to_fp64(run(native_cpu, *tensors, options), tensors, options, BOUND)


@pytest.mark.parametrize("queries", [range(first, first + 10) for first in range(1, 41, 10)], ids=lambda r: f"{r[0]}_to_{r[-1]}")
def test_every_short_length(queries):
    (q, k, v, d_out, d_lse), options = draw(AttentionCase("", 1, 40, 40, 1, 20))
    for T in queries:
        for S in range(1, 41):
            tensors = q[:, :T], k[:, :S], v[:, :S], d_out[:, :T], d_lse[..., :T]
            assert_close_to_fp64(run(native_cpu, *tensors, options), tensors, options, 2 * BOUND)


@every_case
def test_any_strides_give_the_same_bits(case):
    tensors, options = draw(case)
    expected = run(native_cpu, *(x.contiguous() for x in tensors), options)
    B, T, H, D = tensors[0].shape
    views = []
    for x in tensors[:4]:
        apart = torch.full((B, H, x.shape[1] * 3, D + 5), torch.nan)[..., 1::3, 2 : D + 2]
        views.append(apart.copy_(x.transpose(1, 2)).transpose(1, 2))
    for got, exact in zip(run(native_cpu, *views, tensors[4], options), expected, strict=True):
        assert torch.equal(got, exact)
    sums = [tensors[3][:1, :1, :1, :].expand(B, T, H, D), tensors[4][:1, :1, :1].expand(B, H, T)]  # what .sum().backward() sends
    contiguous = run(native_cpu, *tensors[:3], *(x.contiguous() for x in sums), options)
    for got, exact in zip(run(native_cpu, *tensors[:3], *sums, options), contiguous, strict=True):
        assert torch.equal(got, exact)


@every_case
def test_bits_do_not_depend_on_threads_or_memory(case):
    """Threads 1, 2, 4; repeats; outputs and working memory full of nan."""
    tensors, options = draw(case)
    threads, before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        torch.set_num_threads(1)
        expected = run(native_cpu, *tensors, options)
        for count, poisoned in ((1, True), (2, False), (3, True), (4, True), (4, True)):
            torch.set_num_threads(count)
            torch.use_deterministic_algorithms(poisoned)  # makes torch.empty give nan
            for got, exact in zip(run(native_cpu, *tensors, options), expected, strict=True):
                assert torch.equal(got, exact), count
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(before)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("case", [case for case in CASES if case.num_keys], ids=lambda case: case.name)
def test_what_is_not_attended_may_be_anything(case, value):
    """Neither a masked key, nor the gradients of a query without any, reach a result, whatever they hold."""
    tensors, options = draw(case)
    expected = run(native_cpu, *tensors, options)
    hidden = ~options["key_mask"][..., None, None]
    empty = ~options["key_mask"].any(1)
    q, k, v, d_out, d_lse = tensors
    loud = [x.masked_fill(hidden, value) for x in (k, v)]
    d_loud = d_out.masked_fill(empty[:, None, None, None], value), d_lse.masked_fill(empty[:, None, None], value)
    for got, exact in zip(run(native_cpu, q, *loud, *d_loud, options), expected, strict=True):
        assert torch.equal(got, exact)


def test_a_query_that_its_bias_hides_everything_from_passes_nothing_on():
    tensors, options = draw(CASES[1])
    q, k, v, d_out, d_lse = tensors
    options["bias"] = torch.zeros(2, 37, 70)
    options["bias"][:, 4] = -torch.inf
    expected = run(native_cpu, *tensors, options)
    for value in (torch.nan, torch.inf):
        loud = d_out.index_fill(1, torch.tensor([4]), value), d_lse.index_fill(2, torch.tensor([4]), value)
        for got, exact in zip(run(native_cpu, q, k, v, *loud, options), expected, strict=True):
            assert torch.equal(got, exact)
    assert not expected[0][:, 4].any() and not expected[2][:, 4].any()
    deaf, _ = native_cpu.forward(q, k, v.index_fill(1, torch.tensor([0]), torch.nan), **options)
    assert not deaf[:, 4].any() and deaf[:, 3].isnan().all()


@needs_guard_pages
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_case
def test_nothing_is_touched_beyond_the_tensors(monkeypatch, case, at_end):
    """Inputs, outputs and working memory lie flush against pages that end the process when touched."""
    tensors, options = draw(case)
    expected = run(native_cpu, *tensors, options)

    def moved(x):
        return None if x is None else guarded(x.shape, x.dtype, at_end).copy_(x)

    def empty(*shape, dtype):
        return guarded(shape[0] if isinstance(shape[0], tuple | torch.Size) else shape, dtype, at_end)

    tensors = [moved(x) for x in tensors]
    options |= {"key_mask": moved(options["key_mask"])}
    pad = torch.nn.functional.pad
    monkeypatch.setattr(torch.nn.functional, "pad", lambda x, padding: moved(pad(x, padding)))
    monkeypatch.setattr(torch, "empty", empty)
    results = run(native_cpu, *tensors, options)
    monkeypatch.undo()
    for got, exact in zip(results, expected, strict=True):
        assert torch.equal(got, exact)


@pytest.mark.parametrize("biased", [False, True])
def test_automatic_takes_it_for_few_tokens(level, biased):
    for tokens in (17, 48, 49, 256, 257):
        q = torch.zeros(1, tokens, 1, 16)
        bias = torch.zeros(1, tokens, tokens) if biased else None
        verdicts = explain("attention", q, q, q, scale=1.0, bias=bias, bias_grad=biased)
        few = tokens <= {"avx2": 48, "avx512": 256}[level]
        assert (verdicts["native_cpu"] == "preferred (fwd, bwd)") == few, tokens
