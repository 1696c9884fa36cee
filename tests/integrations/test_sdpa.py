"""Our attention in the place of torch's flash attention: a dry run on the CPU's dispatch key.

On a CPU torch never chooses flash attention of CUDA, so its operator is called by name.
"""

import functools

import pytest
import torch
import torch.nn.functional as F

from vatt_fast.integrations import sdpa

# torch says once that the stand-in is replaced
pytestmark = pytest.mark.filterwarnings("ignore:Warning only once for all operators")
flash = torch.ops.aten._scaled_dot_product_flash_attention
if not hasattr(torch.nn.attention, "register_flash_attention_impl"):
    pytest.skip(f"torch {torch.__version__} has no registry", allow_module_level=True)


class Torchs:
    """Stands for torch's own CUDA kernels, which no CPU build has."""

    def __init__(self):
        self.calls = 0
        self.library = torch.library.Library("aten", "IMPL", "CPU")
        for name in (sdpa._FORWARD, sdpa._BACKWARD):
            self.library.impl(name, self.run, "CPU")

    def run(self, query, key, value, *others, **options):
        self.calls += 1
        if len(others) > 5:  # backward: gradient, query, key, value
            return key, value, others[0]
        lse = query.new_zeros(query.shape[:3])
        aux = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return query * 2, lse, None, None, query.shape[2], key.shape[2], *aux, query.new_empty(0)


@pytest.fixture
def torchs():
    stand_in = Torchs()
    yield stand_in
    stand_in.library._destroy()


@pytest.fixture(params=["reference", "triton_gpu"])
def installed(torchs, request):
    if request.param == "triton_gpu":
        pytest.importorskip("triton", reason="triton is not installed")
    handle = sdpa._install("CPU", request.param)
    yield torchs
    handle.remove()


def tensors(T=9, S=9, heads=2, packed=True, dtype=torch.float32):
    torch.manual_seed(0)
    sizes = zip((T, S, S), (2, heads, heads), strict=True)
    rows = [torch.randn(2, n, h, 16).to(dtype) for n, h in sizes]
    views = [x.transpose(1, 2) for x in rows]
    return [(x if packed else x.contiguous()).detach().requires_grad_() for x in views]


def differentiated(attend, given):
    """Output and gradients of a sum that weighs each value otherwise."""
    out = attend(*given)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return out, *torch.autograd.grad((out.float() * weights).sum(), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("packed", [True, False], ids=["BTHD", "BHTD"])
@pytest.mark.parametrize("keys", [9, 5])
def test_values_and_gradients_are_sdpas(installed, keys, packed, dtype, request):
    if dtype == torch.bfloat16 and "triton_gpu" in request.node.callspec.id:
        pytest.skip("Triton's interpreter multiplies the raw bits of bfloat16")
    given = tensors(S=keys, packed=packed, dtype=dtype)
    sdpas = functools.partial(F.scaled_dot_product_attention, scale=0.3)
    found = differentiated(lambda *z: flash(*z, scale=0.3)[0], given)
    assert found[0].stride() == given[0].stride() and found[0].dtype == dtype
    assert flash(*given, scale=0.3)[1].shape == (2, 2, 9) and not installed.calls
    exact = differentiated(sdpas, [x.detach().float().requires_grad_() for x in given])
    theirs = differentiated(sdpas, given)
    for ours, own, full in zip(found, theirs, exact, strict=True):
        scale = full.norm()
        allowed = 3e-6
        if dtype != torch.float32:
            allowed = 2 * (own - full).norm() / scale + torch.finfo(dtype).eps / 2
        assert (ours - full).norm() / scale < allowed


@pytest.mark.parametrize(
    ("sizes", "options"),
    [
        ({}, dict(dropout_p=0.5)),
        (dict(heads=1), {}),
        (dict(S=5), dict(is_causal=True)),
        ({}, dict(return_debug_mask=True)),
    ],
    ids=["dropout", "grouped", "causal", "debug"],
)
def test_the_rest_goes_to_torchs_own_there_and_back(installed, sizes, options):
    given = tensors(**sizes)
    out = flash(*given, **options)[0]
    torch.testing.assert_close(out, given[0] * 2)
    assert installed.calls == 1
    if "return_debug_mask" not in options:
        out.sum().backward()
        assert installed.calls == 2


def test_causal_is_taken_where_the_backend_takes_it(torchs):
    handle = sdpa._install("CPU", "reference")
    given = tensors()
    out = flash(*given, is_causal=True)[0]
    expected = F.scaled_dot_product_attention(*given, is_causal=True)
    torch.testing.assert_close(out, expected)
    assert not torchs.calls
    handle.remove()
    assert torch.equal(flash(*given)[0], given[0] * 2)  # torch's own is back


def test_compiled_it_is_one_graph(torchs):
    handle = sdpa._install("CPU", "reference")
    given = tensors()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(q, k, v):
        return flash(q, k, v)[0].sin()

    out = run(*given)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(*given).sin())
    out.sum().backward()
    assert given[0].grad.isfinite().all() and not torchs.calls
    handle.remove()


def test_it_must_be_asked_for(torchs, monkeypatch):
    from torch.nn import attention

    with pytest.raises(ValueError, match="no GPU has measured"):
        sdpa.activate()
    monkeypatch.setattr(sdpa._install, "__defaults__", ("CPU", "reference"))
    sdpa.activate(unmeasured=True)
    assert attention.current_flash_attention_impl() == "vatt_fast"
    given = tensors()
    torch.testing.assert_close(flash(*given)[0], F.scaled_dot_product_attention(*given))
    attention.restore_flash_attention_impl()
    assert attention.current_flash_attention_impl() is None and not torchs.calls
    assert torch.equal(flash(*given)[0], given[0] * 2)
