"""csrc/attention/ in bf16 beyond the battery: every short length, strides, guard pages, threads,
the matrix unit shared with torch."""

import functools
import math

import native_attention_checks as checks
import pytest
import torch
from native_fixtures import held_to, needs_guard_pages, using

from vatt_fast.kernels import dispatch, native
from vatt_fast.kernels.attention import native_cpu, reference
from vatt_fast.kernels.cases import AttentionCase

CASES = [
    AttentionCase("ragged", 2, 37, 70, 2, 40),
    AttentionCase("video", 1, 165, 165, 2, 64, packed=True),
    AttentionCase("masked", 3, 65, 129, 2, 64, num_keys=(129, 0, 70)),
    AttentionCase("bias", 3, 21, 35, 2, 16, bias=True, num_keys=(35, 1, 0)),
    AttentionCase("wide", 1, 33, 65, 2, 128),
    # lengths bound nothing: the largest score is looked for
    AttentionCase("sharp", 1, 33, 150, 2, 64, scale=2.0),
    AttentionCase("chunks", 1, 1090, 70, 1, 64),  # the backward takes queries 1024 at a time
    AttentionCase("many_keys", 1, 70, 1090, 1, 32),
    # the backward's blocks of 128 queries: sums of one are added up while the next goes on
    AttentionCase("blocks", 1, 385, 64, 1, 128),
    AttentionCase("blocks_of_few_keys", 1, 385, 97, 1, 64),
    AttentionCase("causal", 2, 150, 150, 2, 64, num_keys=(150, 70), causal=True),
    AttentionCase("causal_bias", 1, 97, 97, 2, 40, bias=True, causal=True),
    AttentionCase("causal_sharp", 1, 161, 161, 1, 64, scale=2.0, causal=True),
    AttentionCase("causal_chunks", 1, 1090, 1090, 1, 16, causal=True),
    AttentionCase("one_query", 2, 1, 37, 2, 64),
    AttentionCase("one_key", 2, 40, 1, 2, 64),
]
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@pytest.fixture(params=["avx512_bf16", "amx_bf16"])
def level(request):
    """The kernels in each form that they have: this machine's, or what it lacks written out in
    AVX-512."""
    with held_to(request.param, request):
        yield request.param


draw = functools.partial(checks.draw, dtype=torch.bfloat16)
BOUND = 0.012  # bf16 rounds to 0.002 of a value on average


def test_what_it_refuses(emulated_extension, request):
    (q, k, v, _, _), options = draw(CASES[0])
    with using(None):
        assert "not built" in native_cpu.unsupported(q, k, v, **options)
    with held_to("avx512", request):
        assert "it needs AVX-512 BF16" in native_cpu.unsupported(q, k, v, **options)
    with using(emulated_extension):
        assert native_cpu.unsupported(q, k, v, **options) is None
        assert "float16" in native_cpu.unsupported(q.half(), k.half(), v.half(), **options)
        assert "contiguous" in native_cpu.unsupported(q.transpose(1, 3), k, v, **options)
        wide = torch.zeros(1, 2, 1, 144, dtype=torch.bfloat16)
        assert "head_dim 144" in native_cpu.unsupported(wide, wide, wide, **options)


def test_automatic_takes_it(level):
    """On AMX not for a query or two, for which the packing of all keys would be most of the
    work."""
    for queries in (1, 15, 16, 300):
        q, k = (torch.zeros(1, tokens, 1, 16, dtype=torch.bfloat16) for tokens in (queries, 300))
        verdict = dispatch.explain("attention", q, k, k, scale=1.0)["native_cpu"]
        assert (verdict == "preferred (fwd, bwd)") == (queries >= 16 or level == "avx512_bf16"), (
            queries,
            verdict,
        )


@every_case
def test_against_fp64(level, case):
    checks.assert_close_to_fp64(*draw(case), BOUND)


@pytest.mark.parametrize(
    "queries",
    [range(first, first + 10) for first in range(1, 71, 10)],
    ids=lambda r: f"{r[0]}_to_{r[-1]}",
)
def test_every_short_length(level, queries):
    checks.assert_every_length(torch.bfloat16, queries, longest=70, head_dim=16, bound=0.02)


def test_every_short_causal_length(level):
    checks.assert_every_causal_length(torch.bfloat16, longest=70, head_dim=16, bound=0.02)


@every_case
def test_any_strides_give_the_same_bits(level, case):
    checks.assert_strides_do_not_matter(*draw(case))


@every_case
def test_bits_do_not_depend_on_threads_or_memory(level, case):
    checks.assert_threads_and_memory_do_not_matter(*draw(case))


def test_a_head_cut_into_several_tasks_has_the_same_bits(level):
    checks.assert_threads_and_memory_do_not_matter(
        *draw(AttentionCase("", 1, 1000, 90, 1, 64)), counts=(2, 3, 5, 16)
    )


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_what_is_not_attended_may_be_anything(level, value):
    checks.assert_hidden_values_do_not_matter(*draw(CASES[2]), value)


def test_tiles_after_a_causal_query_are_not_read(level):
    checks.assert_later_tiles_are_not_read(torch.bfloat16, BOUND)


def test_large_scores(level):
    """Far beyond what the powers' range holds: the largest score is subtracted, and far smaller
    ones are 0."""
    for size in (30.0, 1e3, 1e5):
        tensors, options = draw(CASES[1])
        q, k, v, d_out, d_lse = tensors
        tensors = (q * size, k, v, d_out, d_lse)
        out, lse = native_cpu.forward(*tensors[:3], **options)
        exact, exact_lse = reference.forward(*(x.double() for x in tensors[:3]), **options)
        torch.testing.assert_close(lse, exact_lse.float(), rtol=2e-5, atol=0)
        assert (out - exact).norm() <= 0.01 * exact.norm()
        assert all(x.isfinite().all() for x in checks.run(native_cpu, *tensors, options))


def test_powers_of_bounded_scores(level):
    """Powers are taken to 1e-4 of themselves where lengths bound the scores, and lse shows it: from
    one key that outweighs the others to keys all alike."""
    for size in (0.0, 0.3, 1.0, 1.9):
        tensors, options = draw(AttentionCase("", 1, 70, 131, 1, 64))
        q, k, v = tensors[0] * size, *tensors[1:3]
        _, lse = native_cpu.forward(q, k, v, **options)
        _, exact = reference.forward(*(x.double() for x in (q, k, v)), **options)
        assert (lse - exact).abs().max() < 1e-4, size


def test_nan_stays_nan_and_where_it_is(level):
    """A query's reaches its own row only, a visible key's or value's all rows."""
    tensors, options = draw(CASES[1])
    q, k, v = tensors[:3]
    first = torch.tensor([0])
    expected, lse = native_cpu.forward(q, k, v, **options)
    out, with_nan = native_cpu.forward(q.index_fill(1, first, math.nan), k, v, **options)
    assert out[:, 0].isnan().all() and with_nan[..., 0].isnan().all()
    others = out[:, 1:].double() - expected[:, 1:].double()
    assert others.norm() < BOUND * expected.double().norm()
    assert (with_nan - lse)[..., 1:].abs().max() < 1e-4
    assert native_cpu.forward(q, k.index_fill(1, first, math.nan), v, **options)[0].isnan().all()
    assert native_cpu.forward(q, k, v.index_fill(1, first, math.nan), **options)[0].isnan().all()


@pytest.mark.parametrize("keys", [40, 150])
def test_a_bias_of_minus_infinity_hides_a_key(level, keys):
    (q, k, v, *_), options = draw(AttentionCase("", 2, 37, keys, 2, 40))
    hidden = torch.arange(keys) % 3 == 1
    options["bias"] = torch.zeros(2, 37, keys).masked_fill(hidden, -math.inf)
    out, lse = native_cpu.forward(q, k, v, **options)
    options["bias"] = None
    few, few_lse = native_cpu.forward(
        q, k[:, ~hidden].contiguous(), v[:, ~hidden].contiguous(), **options
    )
    assert (out.double() - few.double()).norm() < BOUND * few.double().norm()
    assert (lse - few_lse).abs().max() < 1e-4


@needs_guard_pages
@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@every_case
def test_nothing_is_touched_beyond_the_tensors(level, monkeypatch, case, at_end):
    checks.assert_nothing_is_touched_beyond(*draw(case), monkeypatch, at_end)


@pytest.mark.skipif(native.level() != "amx_bf16", reason="torch has no matrix unit to use here")
def test_torchs_own_use_of_the_matrix_unit_is_undisturbed():
    """Its tile shapes are other ones, and its threads are the same."""
    tensors, options = draw(CASES[1])
    x, y = (
        torch.randn(300, 300, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for seed in (0, 1)
    )
    expected, product = checks.run(native_cpu, *tensors, options), x @ y
    for _ in range(200):
        assert torch.equal(x @ y, product)
        checks.assert_bits(tensors, options, expected)
