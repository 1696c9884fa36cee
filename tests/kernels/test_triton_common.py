"""What the Triton kernels share: where they can run, for which architecture, at which precision."""

import re
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton", reason="the kernels import triton, which is not installed")

import triton

from vatt_fast.kernels import contrastive_lse, dispatch, triton_common, use_backend
from vatt_fast.kernels.cases import CASES, NCECase, make
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.parity import run
from vatt_fast.kernels.settings import force_tiles


@pytest.fixture
def compiled_for(monkeypatch):
    """As where kernels are compiled, for the architecture named."""

    def target(arch):
        monkeypatch.setattr(triton_common, "interpreted", lambda: False)
        monkeypatch.setattr(triton_common, "arch", lambda: arch)

    return target


@pytest.fixture
def matmul():
    """torch's switch, as it was before the test afterwards."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


@pytest.mark.parametrize(
    "switch",
    [
        lambda matmul: setattr(matmul, "fp32_precision", "tf32"),
        lambda matmul: setattr(matmul, "allow_tf32", True),
        lambda matmul: torch.set_float32_matmul_precision("high"),
    ],
    ids=["fp32_precision", "allow_tf32", "set_float32_matmul_precision"],
)
@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        *((f"sm_{number}", "tf32") for number in (80, 90, 103, 121)),
        ("gfx942", "tf32"),
        *((name, "ieee") for name in ("gfx90a", "gfx950", "gfx1100", "gfx1201")),
    ],
)
def test_products_round_to_tf32_where_torch_does_and_the_device_can(
    compiled_for, matmul, switch, arch, precision
):
    compiled_for(arch)
    assert triton_common.dot_precision(torch.float32) == "ieee"
    switch(matmul)
    try:
        assert triton_common.dot_precision(torch.float32) == precision
        assert triton_common.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_the_driver_is_asked_once_for_each_device(monkeypatch):
    """It asks the CUDA runtime in turn, and an op asks for the architecture up to seven times."""
    asked, devices = [], iter((0, 0, 1, 0))

    class Driver:
        def get_current_device(self):
            self.device = next(devices)
            return self.device

        def get_current_target(self):
            asked.append(self.device)
            return SimpleNamespace(backend="cuda", arch=(90, 120)[self.device])

    monkeypatch.setattr(triton_common, "interpreted", lambda: False)
    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    triton_common._arch.cache_clear()
    assert [triton_common.arch() for _ in range(4)] == ["sm_90", "sm_90", "sm_120", "sm_90"]
    triton_common._arch.cache_clear()
    assert asked == [0, 1]


# -- what keeps Triton from running ----------------------------------------------------------------


def without_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setattr(triton_common, "shutil", SimpleNamespace(which=lambda name: None))


def without_pythons_headers(monkeypatch, tmp_path):
    python = SimpleNamespace(get_paths=lambda: {"include": str(tmp_path)})
    monkeypatch.setattr(triton_common, "sysconfig", python)


def with_an_old_triton(monkeypatch, tmp_path):
    monkeypatch.setattr(triton, "__version__", "3.4.0")


def with_an_old_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))


@pytest.fixture
def machine(monkeypatch, tmp_path, compiled_for):
    """Change the machine; what was found out about it is forgotten before and after."""
    caches = triton_common.unsupported_machine, triton_common._unsupported_gpu

    def change(how):
        how(monkeypatch, tmp_path)
        for each in caches:
            each.cache_clear()

    compiled_for("sm_90")
    monkeypatch.setenv("CC", "cc_of_the_test")
    path = SimpleNamespace(which=lambda name: name if name == "cc_of_the_test" else None)
    monkeypatch.setattr(triton_common, "shutil", path)
    (tmp_path / "include").mkdir()
    (tmp_path / "include" / "Python.h").touch()
    python = SimpleNamespace(get_paths=lambda: {"include": str(tmp_path / "include")})
    monkeypatch.setattr(triton_common, "sysconfig", python)
    change(lambda *_: None)
    yield change
    monkeypatch.undo()
    for each in caches:
        each.cache_clear()


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (without_a_compiler, "Triton needs a C compiler and finds no cc_of_the_test"),
        (without_pythons_headers, "Python's headers and finds no .*/Python.h"),
        (with_an_old_triton, "triton 3.4.0 is older than 3.5"),
        (with_an_old_gpu, "the GPU has compute capability 7.5; Triton needs 8.0"),
    ],
)
@pytest.mark.parametrize("op", OPS)
def test_what_keeps_triton_from_running_is_an_objection(machine, op, how, reason):
    """Without one the choice falls on Triton, and the first call raises from inside it."""
    cases = {"attention": "text", "drop_token": "ragged"}
    case = CASES[op].get(cases.get(op, ""), next(iter(CASES[op].values())))
    inputs = make(case, torch.float16)
    with FakeTensorMode():
        options = {
            name: torch.empty(value.shape, dtype=value.dtype, device="cuda")
            if isinstance(value, torch.Tensor)
            else value
            for name, value in inputs.items()
        }
        tensors = [options.pop(name) for name in OPS[op].tensors]

        def chosen():
            module = dispatch.choose(op, "bwd", "", *tensors, **options)
            return module.__name__.rpartition(".")[2]

        assert chosen() == "triton_gpu"
        machine(how)
        assert chosen() in ("reference", "torch_sdpa")
        found = dispatch.explain(op, *tensors, **options)["triton_gpu"]
    assert re.search(reason, found), found


# -- shapes at the edge of what a launch or an address can hold ------------------------------------


def test_a_grid_holds_more_clips_than_its_second_axis(monkeypatch):
    """The bound of 65535 is CUDA's; the interpreter has none, so the grid itself is looked at."""
    from vatt_fast.kernels.patch_embed import triton_gpu

    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    for name in ("_inverse_kernel", "_sums_kernel", "_weight_kernel", "_finish_kernel"):
        monkeypatch.setattr(triton_gpu, name, Kernel())
    clips = 70_000
    tensors = (torch.empty(clips, 4, 16, device="meta"), torch.empty(8, 16), torch.empty(8))
    options = dict(position=torch.empty(4, 8), keep=torch.empty(clips, 2, dtype=torch.int32))
    d_tokens = torch.empty(clips, 2, 8, device="meta")
    options |= dict(scale=1.0, shift=0.0, dtype=torch.float32)
    triton_gpu.backward(d_tokens, *tensors, **options)
    assert any(clips in grid for grid in grids)
    assert all(size <= 65535 for grid in grids for size in grid[1:]), grids


def test_rows_may_lie_further_apart_than_32_bits_count():
    """66 rows with 2 ** 25 elements between them; only their own pages are ever touched."""
    stride, rows = 2**25, 66
    far = torch.empty((rows - 1) * stride + 16, dtype=torch.float16).as_strided(
        (rows, 16), (stride, 1)
    )
    inputs = make(NCECase("far", rows, rows, 1, 16), torch.float16)
    far.copy_(inputs["x"])
    tiles = dict(BLOCK_M=128, BLOCK_N=128, BLOCK_D=16, num_warps=4)
    blocks = dict(contrastive_lse_forward=tiles, contrastive_lse_weights=tiles)
    with use_backend(contrastive_lse="triton_gpu"), force_tiles(**blocks):
        near, distant = (
            run(contrastive_lse, "contrastive_lse", inputs | {"x": x, "y": x}, dtype=torch.float16)
            for x in (inputs["x"], far)
        )
    for name, value in near.items():
        assert torch.equal(distant[name], value), name


@pytest.mark.parametrize(("arch", "refused"), [("gfx942", False), ("gfx1100", True)])
def test_column_sums_need_a_barrier_that_orders_memory(monkeypatch, compiled_for, arch, refused):
    from vatt_fast.kernels.contrastive_lse import triton_gpu

    compiled_for(arch)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    monkeypatch.setattr(triton_gpu, "interpreted", lambda: False)
    monkeypatch.setattr(triton_gpu, "arch", triton_common.arch)
    monkeypatch.setattr(triton_common, "unsupported_machine", lambda: None)
    with FakeTensorMode():
        x = torch.empty(4, 16, dtype=torch.bfloat16, device="cuda")
        reason = triton_gpu.unsupported(x, x, scale=1.0)
    assert (reason is not None and "RDNA" in reason) if refused else reason is None


@pytest.mark.gpu
@pytest.mark.parametrize("bound", [15.0, None], ids=["bounded", "running"])
def test_column_sums_of_many_row_tiles_repeat_bit_for_bit(bound):
    """Each program adds its row tiles' columns to memory that its own other threads wrote."""
    x, y = (
        torch.nn.functional.normalize(torch.randn(8192, 64, device="cuda"), dim=-1).bfloat16()
        for _ in range(2)
    )
    scores = 14.0 * x.double() @ y.double().T
    with use_backend(contrastive_lse="triton_gpu"):
        first = contrastive_lse(x, y, scale=14.0, bound=bound)
        torch.testing.assert_close(first[1].double(), scores.logsumexp(0), rtol=1e-4, atol=1e-4)
        for _ in range(100):
            again = contrastive_lse(x, y, scale=14.0, bound=bound)
            assert all(map(torch.equal, again, first))
