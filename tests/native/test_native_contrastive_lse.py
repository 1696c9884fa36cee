"""The C++ log-sums beyond the battery: edges of chunks and tiles, any thread count, memory, large
scores; on every instruction set."""

import gc
import math
import mmap

import pytest
import torch
from native_fixtures import LEVELS, held_to, using
from torch.utils._python_dispatch import TorchDispatchMode

from vatt_fast.kernels import contrastive_lse, native, use_backend
from vatt_fast.kernels.contrastive_lse import native_cpu, reference

# M clips of x, N clips in all, P texts a clip, D dimensions

NAMES = ("row", "col", "pos", "d_x", "d_y", "d_scale")


@pytest.fixture(params=LEVELS)
def level(request):
    """Each set's kernel: this machine's, or what it lacks written out in AVX-512."""
    with held_to(request.param, request):
        yield request.param


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(native_cpu, "_CHUNK", (32, 64))
    monkeypatch.setattr(native_cpu, "_CHUNK_OF_TILES", (32, 64))


def draw(M, N, P=1, D=40, dtype=torch.float32, scale=14.0, bound=14.5, first=0, masked=False):
    """x, y and the op's options."""
    generator = torch.Generator().manual_seed(M + 1000 * N + P)

    def unit(count):
        return torch.nn.functional.normalize(torch.randn(count, D, generator=generator), dim=1).to(
            dtype
        )

    valid = dict(x_valid=None, y_valid=None)
    if masked:
        valid = {
            name: torch.rand(count, generator=generator) < 0.7
            for name, count in (("x_valid", M), ("y_valid", N * P))
        }
    return (
        unit(M),
        unit(N * P),
        dict(scale=torch.tensor(scale), texts_per_clip=P, first=first, bound=bound, **valid),
    )


def run(module, x, y, options):
    """row, col, pos, d_x, d_y, d_scale."""
    outputs = module.forward(x, y, **options)
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(output.shape, generator=generator).to(output.dtype) for output in outputs]
    return [*outputs, *module.backward(*seeds, x, y, *outputs, **options)]


def assert_close_to_fp64(x, y, options, bound):
    exact = run(reference, x.double(), y.double(), options | {"scale": options["scale"].double()})
    for name, ours, wanted in zip(NAMES, run(native_cpu, x, y, options), exact, strict=True):
        assert torch.equal(ours == -math.inf, wanted == -math.inf), name
        finite = wanted.isfinite()
        assert ours[finite].isfinite().all(), name
        error = (ours.double() - wanted)[finite].norm() / wanted[finite].norm()
        assert error <= (bound if name.startswith("d_") else 1e-6), f"{name}: {error:.1e}"


DTYPES = pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 5e-6), (torch.bfloat16, 8e-3)], ids=["fp32", "bf16"]
)


@DTYPES
@pytest.mark.parametrize("given", [14.5, None], ids=["bounded", "running"])
@pytest.mark.parametrize(
    ("M", "N", "P"), [(32, 64, 1), (31, 63, 1), (33, 65, 1), (64, 129, 1), (65, 70, 5), (97, 97, 3)]
)
def test_edges_of_chunks(level, small_chunks, M, N, P, given, dtype, bound):
    for masked in (False, True):
        assert_close_to_fp64(
            *draw(M, N, P, dtype=dtype, bound=given, first=N - M, masked=masked), bound
        )


@DTYPES
@pytest.mark.parametrize("given", [14.5, None], ids=["bounded", "running"])
@pytest.mark.parametrize(("M", "N"), [(127, 511), (128, 512), (129, 513), (257, 1030)])
def test_edges_of_tiles(level, monkeypatch, M, N, given, dtype, bound):
    monkeypatch.setattr(native_cpu, "_FEW_SCORES", 1 << 30)  # no bound: a running maximum
    assert_close_to_fp64(*draw(M, N, D=33, dtype=dtype, bound=given, first=N - M), bound)


@DTYPES
def test_many_texts_of_a_clip_lie_in_several_chunks(level, small_chunks, dtype, bound):
    assert_close_to_fp64(*draw(3, 5, 150, dtype=dtype, first=1, masked=True), bound)


SHAPES = [(700, 1100, 80), (32, 64, 512), (100, 2048, 256)]


@pytest.mark.parametrize("bound", [14.5, None], ids=["bounded", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bits_do_not_depend_on_threads(level, monkeypatch, shape, dtype, bound):
    """Everything that our kernel computes, which includes the weights that enter the library's
    products. d_x and d_y are those products: of fp32 they are cut so that the library gives the
    same bits for any number of threads; of bf16 they do where the library's product does.

    At dims that are multiples of 16: at others MKL's products on AMD processors are cut differently
    for another number of threads.
    """
    M, N, D = shape
    x, y, options = draw(M, N, D=D, dtype=dtype, bound=bound, masked=True)
    multiply, factors = native_cpu._multiply, []

    def recorded(sums, a, b, begin):
        factors.append((a.clone(), b.clone()))
        multiply(sums, a, b, begin)

    monkeypatch.setattr(native_cpu, "_multiply", recorded)
    before = torch.get_num_threads()
    runs = []
    try:
        for threads in (1, 1, 2, 4):
            torch.set_num_threads(threads)
            factors.clear()
            results = dict(zip(NAMES, run(native_cpu, x, y, options), strict=True))
            products = [a @ b for a, b in factors if a.dtype == torch.bfloat16]
            runs.append((results, list(factors), products))
    finally:
        torch.set_num_threads(before)
    expected, expected_factors, expected_products = runs[0]
    for results, these_factors, products in runs[1:]:
        for (a, b), (c, d) in zip(these_factors, expected_factors, strict=True):
            assert torch.equal(a, c) and torch.equal(b, d)
        library_agrees = all(map(torch.equal, products, expected_products))
        for name in NAMES:
            if library_agrees or name not in ("d_x", "d_y"):
                assert torch.equal(results[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_kernels_threads_change_no_bit(level, monkeypatch, shape, dtype):
    """With the library's products held to one thread, nothing depends on the number of ours."""
    M, N, D = shape
    x, y, options = draw(M, N, D=D, dtype=dtype, masked=True)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = []
        for threads in (1, 2, 4, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            results.append(run(native_cpu, x, y, options))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for name, ours, wanted in zip(NAMES, other, results[0], strict=True):
            assert torch.equal(ours, wanted), name


@pytest.mark.parametrize("bound", [None, 210.0])
def test_large_scores(level, bound):
    """exp(200) is beyond fp32: whatever bound is given, a maximum is subtracted."""
    assert_close_to_fp64(*draw(50, 60, scale=200.0, bound=bound), 5e-5)
    x, _, options = draw(50, 60, scale=200.0, bound=bound)
    assert_close_to_fp64(
        x, x.repeat(2, 1)[:60].contiguous(), options, 5e-5
    )  # scores of exactly 200


def test_a_bound_is_found_where_none_is_given(level, monkeypatch):
    monkeypatch.setattr(native_cpu, "_FEW_SCORES", 0)
    x, y, _ = draw(20, 30)
    assert not native_cpu._running(x, y, 40.0, None, None) and not native_cpu._running(
        x, y, -40.0, None, 1e9
    )
    assert native_cpu._running(x, y, 60.0, None, None)
    assert not native_cpu._running(5 * x, y, 60.0, None, 45.0)  # a bound that is given is believed
    y[7] *= 100
    assert native_cpu._running(x, y, 14.0, None, None)
    assert not native_cpu._running(x, y, 14.0, torch.arange(30) != 7, None)
    y[7] = math.nan
    assert native_cpu._running(x, y, 14.0, None, None)


@pytest.mark.parametrize("given", [14.5, None], ids=["bounded", "running"])
def test_nan_is_seen(level, given):
    """A nan among the vectors reaches what depends on it, and nothing else; a text taken out may
    hold anything."""
    x, y, options = draw(40, 40, bound=given)
    clean = native_cpu.forward(x, y, **options)
    x[3], y[9] = math.nan, math.nan
    valid = torch.arange(40) != 9
    row, col, pos = native_cpu.forward(x, y, **options | {"y_valid": valid})
    assert row[3].isnan() and pos[3].isnan() and col[valid].isnan().all()
    others = torch.arange(40) != 3
    assert row[others].isfinite().all() and torch.equal(
        pos[others & valid], clean[2][others & valid]
    )
    assert col[9] == -math.inf and pos[9] == -math.inf


class Allocated(TorchDispatchMode):
    """The most bytes that tensors made inside held at one time."""

    def __init__(self):
        super().__init__()
        self.live, self.now, self.most = {}, 0, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return result

    def _note(self, storage):
        import weakref

        key = storage._cdata
        if key not in self.live and storage.nbytes():
            self.live[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key):
        self.now -= self.live.pop(key, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_is_that_of_a_chunk(level, monkeypatch, dtype):
    """Twice the clips: vectors twice, scores no more."""
    monkeypatch.setattr(native_cpu, "_CHUNK", (128, 256))
    monkeypatch.setattr(native_cpu, "_CHUNK_OF_TILES", (128, 256))
    peaks = {}
    for N in (1024, 2048):
        x, y, options = draw(N, N, D=32, dtype=dtype)
        gc.collect()
        with Allocated() as allocated:
            run(native_cpu, x, y, options)
        peaks[N] = allocated.most
    threads, tile = torch.get_num_threads(), 4 * native.extension.contrastive_lse_tile_floats()
    chunk = 4 * 128 * 256 + threads * tile + 8 * 256 * 1024
    assert peaks[2048] <= chunk + 40 * 2048 * 32 + 200 * 2048
    assert peaks[2048] - peaks[1024] <= 40 * 1024 * 32 + 200 * 1024  # far from 3 * 4 * 1024**2 more


class Computed:
    """Counts the products x @ y^T that a run computes, by its chunks."""

    def __init__(self, monkeypatch):
        self.count = 0
        chunks = native_cpu._Scores.chunks

        def counted(scores):
            for chunk in chunks(scores):
                self.count += scores.computed
                yield chunk

        monkeypatch.setattr(native_cpu._Scores, "chunks", counted)


def through_the_op(x, y, options):
    """Outputs and gradients of the public op, as training calls it."""
    leaves = [each.clone().requires_grad_() for each in (x, y, options["scale"])]
    with use_backend(contrastive_lse="native_cpu"):
        outputs = contrastive_lse(*leaves[:2], **options | {"scale": leaves[2]})
    generator = torch.Generator().manual_seed(0)
    seeds = [torch.randn(output.shape, generator=generator) for output in outputs]
    return [*outputs, *torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)]


@pytest.mark.parametrize("given", [14.5, None], ids=["bounded", "running"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("M", "N", "P"), [(33, 65, 1), (65, 70, 5), (130, 520, 1)])
def test_kept_products_change_no_bit(level, small_chunks, monkeypatch, M, N, P, dtype, given):
    """The backward of a forward that kept them computes none, and the same."""
    x, y, options = draw(M, N, P, dtype=dtype, bound=given, first=N - M, masked=True)
    computed = Computed(monkeypatch)
    kept = through_the_op(x, y, options)
    forward = computed.count
    monkeypatch.setattr(native_cpu, "KEPT_BYTES", 0)
    computed.count = 0
    again = through_the_op(x, y, options)
    assert forward == -(-M // 32) * -(-N * P // 64) and computed.count == 2 * forward
    for name, ours, wanted in zip(NAMES, kept, again, strict=True):
        assert torch.equal(ours, wanted), name


def test_a_second_backward_finds_the_kept_products_unharmed(level, monkeypatch):
    x, y, options = draw(40, 50, masked=True)
    x.requires_grad_()
    outputs = native_cpu.forward(x, y, **options)
    computed = Computed(monkeypatch)
    seeds = [torch.ones_like(output) for output in outputs]
    first, second = (native_cpu.backward(*seeds, x, y, *outputs, **options) for _ in range(2))
    assert computed.count == 0 and all(map(torch.equal, first, second))


def test_kept_products_are_used_for_their_vectors_alone(level, monkeypatch):
    """Another x, or the same one changed: computed once more."""
    x, y, options = draw(40, 50)
    outputs = native_cpu.forward(x.clone().requires_grad_(), y, **options)
    seeds = [torch.ones_like(output) for output in outputs]
    computed = Computed(monkeypatch)
    native_cpu.backward(*seeds, x, y, *outputs, **options)
    assert computed.count == 1
    x.requires_grad_()
    outputs = native_cpu.forward(x, y, **options)
    with torch.no_grad():
        x += 0.5
    computed.count = 0
    native_cpu.backward(*seeds, x, y, *outputs, **options)
    assert computed.count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_kept_products_stay_within_their_bound(level, small_chunks, monkeypatch, dtype):
    """All of them or none; without a gradient to come, none; gone with the outputs."""
    x, y, options = draw(200, 300, dtype=dtype)
    # 7 blocks of at most 32 clips, 5 of at most 64 texts, each row 32 texts longer
    need = 4 * 7 * 32 * (320 + 5 * 32)
    for bound, wanted, keeps in (
        (need, True, True),
        (need - 1, True, False),
        (need, False, False),
    ):
        monkeypatch.setattr(native_cpu, "KEPT_BYTES", bound)
        x.requires_grad_(wanted)
        gc.collect()
        with torch.no_grad(), Allocated() as allocated:
            outputs = native_cpu.forward(x, y, **options)
        assert (allocated.now >= need) == keeps, bound
        assert allocated.now < 1.25 * need
        del outputs
        gc.collect()
        assert allocated.now < need // 2


def guarded(values, at_end):
    """The same values flush against a page that may not be touched, before them or behind."""
    import ctypes

    size = values.nbytes
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + 2 * mmap.PAGESIZE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (address, address + mmap.PAGESIZE + pages):
        assert libc.mprotect(ctypes.c_void_p(page), mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE + (pages - size if at_end else 0)
    inside = torch.frombuffer(memory, dtype=values.dtype, count=values.numel(), offset=offset).view(
        values.shape
    )
    return inside.copy_(values)


@pytest.mark.parametrize("at_end", [True, False], ids=["end", "start"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_nothing_is_read_beyond_the_vectors(level, dtype, at_end):
    for M, N, D in ((64, 96, 64), (37, 41, 40)):
        x, y, options = draw(M, N, D=D, dtype=dtype, masked=True)
        expected = run(native_cpu, x, y, options)
        options |= {name: guarded(options[name], at_end) for name in ("x_valid", "y_valid")}
        for ours, wanted in zip(
            run(native_cpu, guarded(x, at_end), guarded(y, at_end), options), expected, strict=True
        ):
            torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-6)


def test_what_it_refuses(level):
    x, y, options = draw(4, 4)
    assert native_cpu.unsupported(x, y, **options) is None
    assert "float64" in native_cpu.unsupported(x.double(), y.double(), **options)
    assert "not on the CPU" in native_cpu.unsupported(x.to("meta"), y.to("meta"), **options)
    with using(None):
        assert "not built" in native_cpu.unsupported(x, y, **options)
