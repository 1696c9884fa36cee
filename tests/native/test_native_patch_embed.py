"""What the battery does not show of patch_embed's C++ passes: memory, threads, chunks, layouts, and
indices that are wrong."""

import pytest
import torch
from native_fixtures import LEVELS, guarded, held_to, needs_guard_pages

from vatt_fast.kernels import patchify
from vatt_fast.kernels.cases import CASES, make
from vatt_fast.kernels.patch_embed import native_cpu, reference

NAMES = (
    "kept_rows",
    "kept_per_clip",
    "gathered_per_clip",
    "only_projected",
    "odd_clip",
    "float_clip",
    "waveform",
    "fp32_rows",
)


@pytest.fixture(params=LEVELS)  # the products of the last two are of bf16
def level(request):
    with held_to(request.param, request):
        yield request.param


def run(module, inputs, dtype=torch.float32):
    """Tokens and every gradient."""
    inputs = dict(inputs)
    tensors = [inputs.pop(name) for name in ("patches", "weight", "bias")]
    tokens = module.forward(*tensors, **inputs, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    d_tokens = torch.randn(tokens.shape, generator=generator).to(dtype)
    grads = module.backward(
        d_tokens, *tensors, **inputs, dtype=dtype, d_patches=tensors[0].is_floating_point()
    )
    return dict(
        zip(
            ("tokens", "d_patches", "d_weight", "d_bias", "d_position", "d_agg"),
            (tokens, *grads),
            strict=True,
        )
    )


def assert_same_bits(results, others):
    for name, value in results.items():
        assert (value is None) == (others[name] is None), name
        assert value is None or torch.equal(value, others[name]), name


def assert_close(results, others, bound):
    for name, value in results.items():
        assert (value is None) == (others[name] is None), name
        if value is not None:
            error = (value.double() - others[name].double()).norm() / others[name].double().norm()
            assert error <= bound, f"{name}: {error:.2e}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_chunks_leave_no_seam(level, monkeypatch, name, dtype):
    """Chunks of 1 to a few rows, which begin and end inside clips."""
    inputs = make(CASES["patch_embed"][name])
    whole = run(native_cpu, inputs, dtype)
    monkeypatch.setattr(native_cpu, "_LONG_CHUNK_BYTES", 3000)
    for most_bytes in (1, 3000):
        monkeypatch.setattr(native_cpu, "_CHUNK_BYTES", most_bytes)
        assert_close(run(native_cpu, inputs, dtype), whole, 4 * torch.finfo(dtype).eps)


# rows a clip, k, dim: short of, at and past the blocks of our own product (32 rows, 64 columns,
# 128 of the longer side, 256 of the depth)
BLOCKS = [(31, 256, 64), (32, 257, 65), (65, 290, 96), (129, 127, 130), (270, 530, 33)]


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", BLOCKS, ids=str)
def test_edges_of_the_products_blocks(level, shape, weights):
    """In bf16, from patches of a strided clip, AGG's rows inside the blocks; a weight with a row
    stride; its gradient is bf16 where it is."""
    K, k, dim = shape
    generator = torch.Generator().manual_seed(K)
    clip = torch.randint(0, 256, (2, K, 2 * k), dtype=torch.uint8, generator=generator)
    inputs = dict(
        patches=clip[:, :, ::2] if k % 2 else clip[:, :, :k],
        weight=(torch.randn(dim, k + 3, generator=generator) / k**0.5).to(weights)[:, :k],
        bias=torch.randn(dim, generator=generator),
        position=torch.randn(K, dim, generator=generator).to(weights),
        keep=torch.stack([torch.randperm(K, generator=generator) for _ in range(2)]),
        agg=torch.randn(dim, generator=generator),
        scale=2 / 255,
        shift=-1.0,
    )
    wide = {
        name: value.double()
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else value
        for name, value in inputs.items()
    }
    expected = run(reference, wide, torch.float64)
    assert_close(run(native_cpu, inputs, torch.bfloat16), expected, 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_share_the_work_and_change_nothing(level, monkeypatch, dtype):
    """The passes give the same bits for any number of threads; torch's product stays on one
    here."""
    inputs = make(CASES["patch_embed"]["kept_per_clip"])
    inputs["patches"] = torch.randint(
        0, 256, (3, 37, 5000), dtype=torch.uint8
    )  # enough for several threads
    inputs["weight"] = torch.randn(200, 5000) / 70
    inputs |= dict(bias=torch.randn(200), position=torch.randn(37, 200), agg=torch.randn(200))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = []
        for threads in (1, 2, 4, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(run(native_cpu, inputs, dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert_same_bits(other, results[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("source", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_every_kind_of_value(level, source, dtype):
    """All values of uint8 and fp16, infinities aside; others at random; lengths that are no
    multiple of a vector."""
    if source == torch.uint8:
        values = torch.arange(256, dtype=torch.int32).to(torch.uint8).repeat(5)[: 3 * 401]
    elif source == torch.float16:
        every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16)
        values = every[every.isfinite()]
        values = values[: len(values) // 401 * 401]
    else:
        values = (torch.randn(5 * 401) * 10.0 ** torch.arange(-30, 30).repeat(40)[: 5 * 401]).to(
            source
        )
    rows = _packed(values.view(1, -1, 401), None, None, dtype)
    expected = values.float() - (128 if source == torch.uint8 else 0)
    assert torch.equal(rows.flatten(), expected.to(rows.dtype))


def test_nan_and_infinity_stay_what_they_are(level):
    values = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 3.4e38, -0.0] * 9)
    values[0] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    )  # rounded up, it would become -0
    rows = _packed(values.view(1, 1, -1), None, None, torch.bfloat16).flatten()
    expected = values.to(rows.dtype)
    assert torch.equal(rows.isnan(), expected.isnan()) and torch.equal(
        rows.nan_to_num(1.5), expected.nan_to_num(1.5)
    )
    halves = torch.tensor([torch.nan, torch.inf, -torch.inf, 1.0] * 9, dtype=torch.float16)
    rows = _packed(halves.view(1, 1, -1), None, None, torch.float32).flatten()
    assert torch.equal(rows.isnan(), halves.isnan()) and torch.equal(
        rows.nan_to_num(1.5), halves.float().nan_to_num(1.5)
    )


def _packed(patches, patch, keep, dtype):
    return torch.cat(
        [
            rows.clone()
            for _, rows in native_cpu._Rows(patches, keep, None, patch, False, dtype).chunks(2**30)
        ]
    )


@pytest.mark.parametrize("kind", [torch.uint8, torch.float32])
def test_clips_of_any_layout(level, kind):
    """Channels first, every second pixel, reversed axes: strides say where values lie; the far end
    is padded with raw zeros."""
    base = torch.randint(0, 256, (2, 3, 10, 22, 70), dtype=torch.uint8).to(kind)
    clips = {
        "channels first": base.permute(0, 2, 3, 4, 1),
        "every second": base.permute(0, 2, 3, 4, 1).contiguous()[:, ::2, ::2, ::2],
        "one channel of many": base.permute(0, 2, 3, 4, 1).contiguous()[..., 1:2],
        "columns and frames swapped": base.permute(0, 4, 3, 2, 1),
        "expanded": base[:1].permute(0, 2, 3, 4, 1).expand(2, -1, -1, -1, -1),
    }
    for name, clip in clips.items():
        rows = patchify(clip, (4, 16, 16))
        keep = torch.tensor([0, rows.shape[1] - 1])
        expected = rows[:, keep].float() - (128 if kind == torch.uint8 else 0)
        packed = _packed(clip, (4, 16, 16), keep, torch.float32)
        assert torch.equal(packed.float().view(expected.shape), expected), name


@pytest.mark.parametrize("keep", [[0, 37], [-1, 3], [[0, 1], [2, 3], [4, 99]], [2**40, 0]])
@pytest.mark.parametrize("agg", [False, True])
def test_an_index_out_of_range_is_an_error_and_not_a_crash(level, keep, agg):
    inputs = make(CASES["patch_embed"]["kept_rows"]) | {"keep": torch.tensor(keep)}
    inputs["agg"] = inputs["agg"] if agg else None
    assert inputs["patches"].shape[:2] == (3, 37)
    tensors = [inputs.pop(name) for name in ("patches", "weight", "bias")]
    d_tokens = torch.randn(3, 2 + agg, 32)[..., : tensors[1].shape[0]]
    with pytest.raises(IndexError, match="keep"):
        native_cpu.forward(*tensors, **inputs, dtype=torch.float32)
    with pytest.raises(IndexError, match="keep"):
        native_cpu.backward(d_tokens, *tensors, **inputs, dtype=torch.float32)


@needs_guard_pages
@pytest.mark.parametrize("at_end", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_touched_beyond_the_tensors(level, monkeypatch, name, dtype, at_end):
    """Inputs, outputs and scratch flush against pages that end the process when touched."""

    def empty(*shape, dtype=torch.float32):
        shape = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        return guarded(shape, dtype, at_end) if 0 not in shape else torch.zeros(shape, dtype=dtype)

    def moved(x):
        return empty(x.shape, dtype=x.dtype).copy_(x) if isinstance(x, torch.Tensor) else x

    inputs = make(CASES["patch_embed"][name])
    expected = run(native_cpu, inputs, dtype)
    inputs = {key: moved(value) for key, value in inputs.items()}
    monkeypatch.setattr(torch, "empty", empty)
    assert_close(run(native_cpu, inputs, dtype), expected, torch.finfo(dtype).eps)


@pytest.mark.parametrize("name", NAMES)
def test_instruction_sets_agree(level, name):
    inputs = make(CASES["patch_embed"][name])
    assert_close(run(native_cpu, inputs), run(reference, inputs), 1e-5)
