"""csrc/short_attention.cpp beyond the battery: every short length, strides, guard pages, threads,
what is not attended."""

import functools

import native_attention_checks as checks
import pytest
import torch
from native_fixtures import held_to, needs_guard_pages

from vatt_fast.kernels import explain, native
from vatt_fast.kernels.attention import native_cpu
from vatt_fast.kernels.cases import AttentionCase

draw = functools.partial(checks.draw, dtype=torch.float32)
BOUND = 1e-6

CASES = [
    AttentionCase(
        "sentence",
        37,
        17,
        17,
        2,
        32,
        bias=True,
        num_keys=tuple(1 + i % 17 for i in range(37)),
        packed=True,
    ),
    AttentionCase("ragged", 2, 37, 70, 2, 40),
    AttentionCase("video", 1, 165, 165, 2, 64, packed=True),
    AttentionCase("masked", 3, 65, 129, 2, 64, num_keys=(129, 0, 70)),
    AttentionCase("bias", 3, 21, 35, 2, 16, bias=True, num_keys=(35, 1, 0)),
    AttentionCase("odd", 2, 19, 13, 3, 21, bias=True),
    AttentionCase("many_biases", 16, 40, 45, 3, 8, bias=True),
    AttentionCase("causal", 2, 77, 77, 2, 64, num_keys=(77, 30), causal=True),
    AttentionCase("causal_bias", 3, 35, 35, 2, 21, bias=True, num_keys=(35, 0), causal=True),
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
    checks.assert_close_to_fp64(*draw(case), BOUND)


@pytest.mark.parametrize(
    "queries",
    [range(first, first + 10) for first in range(1, 41, 10)],
    ids=lambda r: f"{r[0]}_to_{r[-1]}",
)
def test_every_short_length(queries):
    checks.assert_every_length(torch.float32, queries, longest=40, head_dim=20, bound=2 * BOUND)


def test_every_short_causal_length():
    checks.assert_every_causal_length(torch.float32, longest=70, head_dim=20, bound=2 * BOUND)


def test_tiles_after_a_causal_query_are_not_read():
    checks.assert_later_tiles_are_not_read(torch.float32, BOUND)


@every_case
def test_any_strides_give_the_same_bits(case):
    checks.assert_strides_do_not_matter(*draw(case))


@every_case
def test_bits_do_not_depend_on_threads_or_memory(case):
    checks.assert_threads_and_memory_do_not_matter(*draw(case))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.num_keys], ids=lambda case: case.name
)
def test_what_is_not_attended_may_be_anything(case, value):
    checks.assert_hidden_values_do_not_matter(*draw(case), value)


def test_a_query_that_its_bias_hides_everything_from_passes_nothing_on():
    tensors, options = draw(CASES[1])
    q, k, v, d_out, d_lse = tensors
    options["bias"] = torch.zeros(2, 37, 70)
    options["bias"][:, 4] = -torch.inf
    expected = checks.run(native_cpu, *tensors, options)
    for value in (torch.nan, torch.inf):
        loud = (
            d_out.index_fill(1, torch.tensor([4]), value),
            d_lse.index_fill(2, torch.tensor([4]), value),
        )
        checks.assert_bits((q, k, v, *loud), options, expected)
    assert not expected[0][:, 4].any() and not expected[2][:, 4].any()
    deaf, _ = native_cpu.forward(q, k, v.index_fill(1, torch.tensor([0]), torch.nan), **options)
    assert not deaf[:, 4].any() and deaf[:, 3].isnan().all()


@needs_guard_pages
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_case
def test_nothing_is_touched_beyond_the_tensors(monkeypatch, case, at_end):
    checks.assert_nothing_is_touched_beyond(*draw(case), monkeypatch, at_end)


@pytest.mark.parametrize("level", ["avx2", "avx512", "avx512_bf16"], indirect=True)
@pytest.mark.parametrize("biased", [False, True])
def test_automatic_takes_it_for_few_tokens(level, biased):
    for tokens in (17, 48, 49, 256, 257, 512, 513):
        q = torch.zeros(1, tokens, 1, 16)
        bias = torch.zeros(1, tokens, tokens) if biased else None
        verdicts = explain("attention", q, q, q, scale=1.0, bias=bias, bias_grad=biased)
        few = tokens <= {"avx2": 48, "avx512": 256, "avx512_bf16": 512}[level]
        assert (verdicts["native_cpu"] == "preferred (fwd, bwd)") == few, tokens
