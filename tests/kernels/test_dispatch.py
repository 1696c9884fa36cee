"""Which backend runs, why, how one asks for another; what the package imports; bad input."""

import ast
import importlib
import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import vatt_fast.kernels
from vatt_fast.kernels import (
    attention,
    backends,
    contrastive_lse,
    explain,
    native,
    patch_embed,
    settings,
    use_backend,
)
from vatt_fast.kernels.attention import reference, torch_cudnn, torch_sdpa
from vatt_fast.kernels.backends import OP_NAMES, Row
from vatt_fast.kernels.cases import CASES, make
from vatt_fast.kernels.dispatch import choose
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.settings import requested

# -- choosing --------------------------------------------------------------------------------------


def attention_inputs(name="ragged_17", **changes):
    inputs = make(CASES["attention"][name]) | changes
    return [inputs.pop(key) for key in "qkv"], inputs


class Ran:
    """Which backend's forward and backward ran."""

    def __init__(self, monkeypatch):
        self.calls = []
        for module in (reference, torch_sdpa):
            for name in ("forward", "backward"):
                monkeypatch.setattr(module, name, self.wrap(module, name))

    def wrap(self, module, name):
        original = getattr(module, name)

        def run(*args, **kwargs):
            self.calls.append(f"{module.__name__.rpartition('.')[2]}.{name}")
            return original(*args, **kwargs)

        return run


@pytest.fixture
def without_cpp(monkeypatch):
    """As on a machine without a C++ compiler: the preference does not depend on the processor."""
    monkeypatch.setattr(native, "extension", None)


@pytest.fixture
def ran(monkeypatch, without_cpp):
    return Ran(monkeypatch).calls


@pytest.fixture
def table(monkeypatch):
    """Replace the preference of (torch, cpu) and register the backends it names, for one test."""

    def replace(*rows):
        monkeypatch.setitem(backends.PREFERENCE, ("torch", "cpu"), rows)
        for row in rows:
            if row.backend not in backends.BACKENDS[row.op]:
                monkeypatch.setitem(
                    backends.BACKENDS, row.op, (row.backend, *backends.BACKENDS[row.op])
                )

    yield replace
    backends.load.cache_clear()


def add_backend(monkeypatch, op, name, objection=None):
    module = types.ModuleType(f"vatt_fast.kernels.{op}.{name}")
    module.unsupported = lambda *args, **kwargs: objection
    module.forward = lambda q, k, v, **options: reference.forward(q, k, v, **options)
    module.backward = lambda *args, **options: reference.backward(*args, **options)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def test_automatic_takes_the_preferred_backend(ran):
    (q, k, v), options = attention_inputs()
    attention(q.requires_grad_(), k, v, **options)[0].sum().backward()
    assert ran == ["torch_sdpa.forward", "torch_sdpa.backward"]


def test_automatic_falls_to_the_reference_where_the_preferred_objects(ran):
    (q, k, v), options = attention_inputs("bias")
    attention(q.requires_grad_(), k, v, **options)[
        0
    ].sum().backward()  # a bias without gradient is no obstacle
    options["bias"].requires_grad_()
    attention(q, k, v, **options)[0].sum().backward()
    assert ran == [
        "torch_sdpa.forward",
        "torch_sdpa.backward",
        "reference.forward",
        "reference.backward",
    ]
    with torch.no_grad():
        attention(q, k, v, **options)
    assert ran[-1] == "torch_sdpa.forward"


def test_sdpa_hands_over_to_the_reference_when_lse_has_a_gradient(ran):
    (q, k, v), options = attention_inputs()
    for name in ("", "torch_sdpa"):
        with use_backend(attention=name):
            out, lse = attention(q.requires_grad_(), k, v, **options)
        (out.sum() + lse.sum()).backward()
    chosen, asked_for = ran[:2], ran[2:]
    assert chosen == ["torch_sdpa.forward", "reference.backward"]
    assert asked_for == ["torch_sdpa.forward", "torch_sdpa.backward", "reference.backward"]


@pytest.mark.parametrize(
    ("dtype", "tokens", "options", "forward", "backward"),
    [
        (torch.float16, 785, {}, "triton_gpu", "triton_gpu"),
        (torch.float16, 2100, {}, "torch_sdpa", "torch_sdpa"),
        (torch.float16, 2100, dict(lse_grad=True), "torch_sdpa", "triton_gpu"),
        (torch.float32, 785, {}, "torch_sdpa", "torch_sdpa"),
        (torch.float32, 785, dict(lse_grad=True), "torch_sdpa", "triton_gpu"),
        # torch has no gradient of a bias, and no backward without atomics
        (torch.float32, 17, dict(bias_grad=True), "triton_gpu", "triton_gpu"),
        (torch.float32, 785, dict(deterministic=True), "triton_gpu", "triton_gpu"),
    ],
)
def test_what_attention_runs_on_cuda(dtype, tokens, options, forward, backward):
    pytest.importorskip("triton", reason="without triton all of it is torch's")
    lse_grad = options.pop("lse_grad", False)
    with FakeTensorMode():
        q = torch.empty(2, tokens, 3, 64, dtype=dtype, device="cuda")
        if "bias_grad" in options:
            options["bias"] = torch.empty(3, tokens, tokens, device="cuda")
        found = [
            choose("attention", mode, "", q, q, q, scale=1.0, **grads, **options)
            for mode, grads in (("fwd", {}), ("bwd", dict(lse_grad=lse_grad)))
        ]
    assert [module.__name__.rpartition(".")[2] for module in found] == [forward, backward]


def test_the_backend_of_the_forward_is_that_of_the_backward(ran):
    (q, k, v), options = attention_inputs()
    with use_backend("reference"):
        out, _ = attention(q.requires_grad_(), k, v, **options)
    out.sum().backward()
    assert ran == ["reference.forward", "reference.backward"]


def test_a_row_with_when_applies_where_it_is_the_faster_choice(monkeypatch, table):
    add_backend(monkeypatch, "attention", "long_only")
    seen = []

    def when(mode, q, *_, **options):
        seen.append(mode)
        return q.shape[1] > 20

    table(Row("attention", "long_only", when), Row("attention", "reference"))
    short, long = attention_inputs("ragged_17"), attention_inputs("ragged_37_by_70")
    name = [
        choose("attention", mode, "", *tensors, **options).__name__
        for tensors, options in (short, long)
        for mode in ("fwd", "bwd")
    ]
    assert [n.rpartition(".")[2] for n in name] == [
        "reference",
        "reference",
        "long_only",
        "long_only",
    ] and seen == ["fwd", "bwd"] * 2
    assert explain("attention", *short[0], **short[1])["long_only"] == "runs when asked for"
    with use_backend(attention="long_only"):
        assert attention(*short[0], **short[1])[0].shape == short[0][0].shape


def test_choice_never_fails_while_the_reference_can_run(monkeypatch, table):
    add_backend(monkeypatch, "attention", "picky", objection="it is Sunday")
    table(Row("attention", "picky"))  # the table does not even list the reference
    tensors, options = attention_inputs()
    assert choose("attention", "fwd", "", *tensors, **options) is reference


def test_a_backend_asked_for_runs_or_raises_its_objection(monkeypatch, table, ran):
    add_backend(monkeypatch, "attention", "picky", objection="it is Sunday")
    table(Row("attention", "picky"), Row("attention", "reference"))
    tensors, options = attention_inputs()
    with (
        use_backend(attention="picky"),
        pytest.raises(ValueError, match="attention: backend 'picky' cannot run this: it is Sunday"),
    ):
        attention(*tensors, **options)
    assert not ran


def test_a_missing_part_is_an_objection_and_a_bug_is_not(monkeypatch, table):
    table(Row("attention", "on_top_of_it"), Row("attention", "reference"))
    tensors, options = attention_inputs()
    real = backends.importlib.import_module

    def import_module(name, missing):
        if name.endswith("on_top_of_it"):
            raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)
        return real(name)

    monkeypatch.setattr(
        backends.importlib, "import_module", lambda name: import_module(name, "triton")
    )
    assert choose("attention", "fwd", "", *tensors, **options) is reference
    assert (
        explain("attention", *tensors, **options)["on_top_of_it"]
        == "it needs triton, which is not installed"
    )
    with (
        use_backend(attention="on_top_of_it"),
        pytest.raises(ValueError, match="it needs triton, which is not installed"),
    ):
        attention(*tensors, **options)
    monkeypatch.setattr(
        backends.importlib,
        "import_module",
        lambda name: import_module(name, "vatt_fast.kernels.attention.tiles"),
    )
    with pytest.raises(ModuleNotFoundError):
        choose("attention", "fwd", "", *tensors, **options)


@pytest.mark.parametrize(
    ("inputs", "objection"),
    [
        (
            lambda q: dict(q=q.transpose(1, 3).contiguous().transpose(1, 3)),
            "the last axis of q, k and v must be contiguous",
        ),
        (
            lambda q: dict(bias=torch.zeros(3, 17, 17, requires_grad=True)),
            "a trainable bias has no gradient here",
        ),
    ],
    ids=["strides", "bias"],
)
def test_objections_of_sdpa_on_cpu(inputs, objection):
    (q, k, v), options = attention_inputs()
    changes = inputs(q)
    with use_backend(attention="torch_sdpa"), pytest.raises(ValueError, match=objection):
        attention(changes.pop("q", q), k, v, **options | changes)


@pytest.mark.parametrize(
    ("dtype", "head_dim", "masked", "deterministic", "objection"),
    [
        (torch.bfloat16, 64, False, False, None),
        (torch.float32, 64, True, False, None),
        (torch.float64, 64, False, False, "float64 is for the reference"),
        (torch.bfloat16, 60, False, False, "head_dim 60 is no multiple of 8"),
        (torch.bfloat16, 320, False, False, "head_dim 320 is beyond flash attention's 256"),
        (torch.float32, 320, False, False, None),
        (torch.float32, 64, False, True, "the memory-efficient backward is not deterministic"),
        (torch.bfloat16, 64, True, True, "the memory-efficient backward is not deterministic"),
        (
            torch.bfloat16,
            64,
            False,
            True,
            "deterministic only under torch.use_deterministic_algorithms",
        ),
    ],
)
def test_objections_of_sdpa_on_cuda(dtype, head_dim, masked, deterministic, objection):
    with FakeTensorMode():
        q = torch.empty(
            2, 2100, 3, head_dim, dtype=dtype, device="cuda"
        )  # a length at which it comes first
        key_mask = torch.ones(2, 2100, dtype=torch.bool, device="cuda") if masked else None
        reason = torch_sdpa.unsupported(
            q, q, q, scale=1.0, key_mask=key_mask, deterministic=deterministic
        )
        verdicts = explain(
            "attention", q, q, q, scale=1.0, key_mask=key_mask, deterministic=deterministic
        )
    assert (reason is None) if objection is None else (objection in reason)
    assert verdicts["torch_sdpa"] == (reason or "preferred (fwd, bwd)")
    assert torch_sdpa.unsupported(
        torch.empty(1, 1, 1, 8, device="meta"), *[torch.empty(1)] * 2, scale=1.0
    ).startswith("tensors are on meta")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_cuda_calls_of_sdpa_fit_atens_schemas(dtype, masked, biased):
    """Shapes and arguments only, on fake tensors: no CUDA device is needed, no value is checked."""
    with FakeTensorMode():
        q, k, v = torch.empty(2, 37, 3, 4, 64, device="cuda", dtype=dtype).unbind(2)
        key_mask = torch.ones(2, 37, dtype=torch.bool, device="cuda") if masked else None
        bias = torch.empty(4, 37, 37, device="cuda") if biased else None
        options = dict(scale=0.125, key_mask=key_mask, bias=bias)
        out, lse = torch_sdpa.forward(q, k, v, **options)
        grads = torch_sdpa.backward(out, None, q, k, v, out, lse, **options)
    assert (
        out.shape == q.shape
        and out.dtype == dtype
        and lse.shape == (2, 4, 37)
        and lse.dtype == torch.float32
    )
    assert [g.shape for g in grads[:3]] == [q.shape] * 3 and all(
        g.dtype == dtype for g in grads[:3]
    )
    assert grads[3] is None and {t.device.type for t in (out, lse, *grads[:3])} == {"cuda"}


def test_the_calls_of_cudnn_fit_atens_schemas():
    with FakeTensorMode():
        q, k, v = torch.empty(2, 37, 3, 4, 64, device="cuda", dtype=torch.bfloat16).unbind(2)
        assert torch_cudnn.unsupported(q, k, v, scale=0.125) is None
        out, lse = torch_cudnn.forward(q, k, v, scale=0.125)
        grads = torch_cudnn.backward(out, None, q, k, v, out, lse, scale=0.125)
    assert out.shape == q.shape and lse.shape == (2, 4, 37) and lse.dtype == torch.float32
    assert [g.shape for g in grads[:3]] == [q.shape] * 3 and grads[3] is None


@pytest.mark.parametrize(
    ("changes", "objection"),
    [
        (dict(dtype=torch.float32), "takes fp16 and bf16, not torch.float32"),
        (dict(head_dim=136), "no multiple of 8 up to 128"),
        (dict(head_dim=60), "head_dim 60"),
        (dict(key_mask=True), "without bias and key_mask"),
        (dict(deterministic=True), "no fixed order"),
        (dict(device="cpu"), "on cpu"),
    ],
)
def test_objections_of_cudnn(changes, objection):
    case = (
        dict(dtype=torch.bfloat16, head_dim=64, key_mask=False, deterministic=False, device="cuda")
        | changes
    )
    with FakeTensorMode():
        q = torch.empty(2, 17, 3, case["head_dim"], dtype=case["dtype"], device=case["device"])
        key_mask = (
            torch.ones(2, 17, dtype=torch.bool, device=case["device"]) if case["key_mask"] else None
        )
        assert objection in torch_cudnn.unsupported(
            q, q, q, scale=1.0, key_mask=key_mask, deterministic=case["deterministic"]
        )


class _FlashAttn(types.ModuleType):
    """The two functions of flash-attn 2.7 that the backend calls, with their published parameters.

    They compute plainly.
    """

    @staticmethod
    def _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
    ):
        assert (dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes) == (
            0.0,
            False,
            -1,
            -1,
            0.0,
            None,
        )
        return *reference.forward(q, k, v, scale=softmax_scale), None, None

    @staticmethod
    def _flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
    ):
        assert (dropout_p, causal, window_size_left, window_size_right, softcap, alibi_slopes) == (
            0.0,
            False,
            -1,
            -1,
            0.0,
            None,
        )
        for target, grad in zip(
            (dq, dk, dv),
            reference.backward(dout, None, q, k, v, out, softmax_lse, scale=softmax_scale),
            strict=False,
        ):
            target.copy_(grad)


def test_flash_attn_is_called_by_its_published_parameters(monkeypatch):
    """Held against a module of the same interface; the package itself runs on GPUs only."""
    monkeypatch.setitem(sys.modules, "flash_attn", types.ModuleType("flash_attn"))
    monkeypatch.setitem(
        sys.modules,
        "flash_attn.flash_attn_interface",
        _FlashAttn("flash_attn.flash_attn_interface"),
    )
    sys.modules.pop("vatt_fast.kernels.attention.flash_attn", None)
    backend = importlib.import_module("vatt_fast.kernels.attention.flash_attn")
    del sys.modules[backend.__name__]  # nobody else shall meet the stand-in
    q, k, v = torch.randn(2, 9, 3, 2, 16).unbind(2)
    d_out, d_lse = torch.randn(2, 9, 2, 16), torch.randn(2, 2, 9)
    out, lse = backend.forward(q, k, v, scale=0.25)
    expected_out, expected_lse = reference.forward(q, k, v, scale=0.25)
    assert torch.equal(out, expected_out) and torch.equal(lse, expected_lse)
    for gradient in (None, d_lse):
        grads = backend.backward(d_out, gradient, q, k, v, out, lse, scale=0.25)
        expected = reference.backward(d_out, gradient, q, k, v, out, lse, scale=0.25)
        assert all(
            torch.equal(ours, theirs) for ours, theirs in zip(grads[:3], expected[:3], strict=True)
        )
    assert "on cpu" in backend.unsupported(q, k, v, scale=1.0)


def test_flash_attn_says_when_it_is_not_installed():
    if importlib.util.find_spec("flash_attn"):
        pytest.skip("flash-attn is installed here")
    q = torch.randn(1, 3, 1, 8)
    with (
        pytest.raises(ValueError, match="it needs flash_attn, which is not installed"),
        use_backend(attention="flash_attn"),
    ):
        attention(q, q, q, scale=1.0)


# -- asking ----------------------------------------------------------------------------------------


def test_use_backend_nests_and_restores():
    assert requested("attention") == ""
    with use_backend("reference"):
        assert {requested(op) for op in OP_NAMES} == {"reference"}
        with use_backend(attention="torch_sdpa", contrastive_lse="reference"):
            assert (
                requested("attention"),
                requested("contrastive_lse"),
                requested("drop_token"),
            ) == ("torch_sdpa", "reference", "")
            with use_backend(""):
                assert requested("attention") == ""
        assert requested("attention") == "reference"
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert requested("attention") == ""


def test_a_bare_name_that_an_op_does_not_have_makes_that_op_raise():
    inputs = make(CASES["contrastive_lse"]["square"])
    with use_backend("torch_sdpa"):
        tensors, options = attention_inputs()
        attention(*tensors, **options)
        with pytest.raises(
            ValueError,
            match=r"contrastive_lse: backend 'torch_sdpa' cannot run this.*it has native_cpu, "
            r"reference, triton_gpu, pallas_tpu \(ask per op: VATT_FAST_BACKEND=contrastive_lse=",
        ):
            contrastive_lse(**inputs)


@pytest.mark.parametrize(
    ("name", "by_op", "written", "message"),
    [
        ("triton", {}, "triton", "unknown backend 'triton' in request 'triton'; the ops have "),
        (
            "",
            {"attention": "triton"},
            "attention=triton",
            "unknown backend 'triton' in request 'attention=triton';"
            " attention have native_cpu, torch_sdpa, reference",
        ),
        (
            "",
            {"atention": "reference"},
            "atention=reference",
            "unknown op 'atention' in backend request 'atention=reference';"
            " ops are attention, drop_token, contrastive_lse",
        ),
        (
            "reference",
            {"contrastive_lse": "torch_sdpa"},
            "reference, contrastive_lse=torch_sdpa",
            "unknown backend 'torch_sdpa' in request 'reference,contrastive_lse=torch_sdpa'",
        ),
    ],
    ids=["bare", "per_op", "op", "both"],
)
def test_unknown_requests(name, by_op, written, message):
    """In Python and, by the same words, in the environment variable's form."""
    with pytest.raises(ValueError, match=message), use_backend(name, **by_op):
        raise AssertionError("the request was accepted")
    with pytest.raises(ValueError, match=message):
        settings._parsed(written)
    assert requested("attention") == ""


def test_a_request_for_one_op_comes_before_one_for_all():
    with use_backend("reference", attention="torch_sdpa"):
        assert (requested("attention"), requested("drop_token")) == ("torch_sdpa", "reference")
    assert settings._parsed("reference, attention=torch_sdpa") == {
        **dict.fromkeys(OP_NAMES, "reference"),
        "attention": "torch_sdpa",
    }


@pytest.mark.parametrize("op", OP_NAMES)
def test_plain_is_the_op_on_torchs_own_ops(op):
    """Outputs and gradients; nothing opaque runs, so that torch.compile sees what a user writes."""
    case = next(iter(case for case in CASES[op].values() if case.name not in ("one_of_one",)))
    inputs = make(case)
    called = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            called.append(function.namespace)
            return function(*args, **kwargs or {})

    def without_lse(function):
        def call(**inputs):
            out = function(**inputs)
            return out[0] if op == "attention" else out

        return call

    def gradients(function):
        leaves = {
            name: value.detach().requires_grad_()
            for name, value in inputs.items()
            if name in OPS[op].differentiable
            and isinstance(value, torch.Tensor)
            and value.is_floating_point()
        }
        out = without_lse(function)(**inputs | leaves)
        out = out if isinstance(out, tuple) else (out,)
        total = sum(each.square().sum() for each in out)
        return [*out, *torch.autograd.grad(total, list(leaves.values()))]

    expected = gradients(OPS[op].function)
    with use_backend("plain"), Recorder():
        found = gradients(OPS[op].function)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert "vatt_fast" not in called and "aten" in called
    with use_backend(**{op: "plain"}):
        compiled = torch.compile(without_lse(OPS[op].function), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(**inputs), without_lse(OPS[op].function)(**inputs))


def test_plain_computes_in_the_autocast_dtype():
    for op, name in (("attention", "text"), ("patch_embed", "kept_rows")):
        with use_backend("plain"), torch.autocast("cpu", torch.bfloat16):
            out = OPS[op].function(**make(CASES[op][name]))
        out = out[0] if isinstance(out, tuple) else out
        assert out.dtype == torch.bfloat16


def test_plain_attention_has_no_lse():
    tensors, options = attention_inputs("text")
    with use_backend(attention="plain"):
        out, lse = attention(*tensors, **options)
    assert lse is None and out.shape == tensors[0].shape


@pytest.mark.parametrize("op", OP_NAMES)
def test_the_jax_kernels_do_not_take_tensors_of_a_cpu(op):
    pytest.importorskip("jax", reason="without jax the objection is another one")
    inputs = list(make(next(iter(CASES[op].values()))).items())
    tensors, options = [value for _, value in inputs[:2]], dict(inputs[2:])
    with pytest.raises(
        ValueError,
        match=r"tensors are on cpu; from torch its kernels are reached on xla \(torch_xla\) and tpu"
        r" \(torch_tpu\)",
    ):
        choose(op, "fwd", "pallas_tpu", *tensors, **options)


def test_the_jax_kernels_need_jax():
    code = """
import sys
sys.modules["jax"] = None  # importing it raises
import torch
from vatt_fast.kernels import attention, explain, use_backend
q = torch.ones(1, 2, 1, 8)
print(explain("attention", q, q, q, scale=1.0)["pallas_tpu"])
with use_backend(attention="pallas_tpu"):
    try:
        attention(q, q, q, scale=1.0)
    except ValueError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    reason = "it needs jax, which is not installed"
    assert done.stdout.splitlines() == [
        reason,
        f"attention: backend 'pallas_tpu' cannot run this: {reason}",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ["", ""]),
        ("reference", ["reference"] * 2),
        ("attention=torch_sdpa", ["torch_sdpa", ""]),
        ("nonsense", None),
    ],
)
def test_the_environment_variable_is_read_at_import(value, expected):
    code = """
from vatt_fast.kernels.settings import requested
print([requested(op) for op in ("attention", "contrastive_lse")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"VATT_FAST_BACKEND": value},
    )
    if expected is None:
        assert done.returncode and "ValueError: unknown backend 'nonsense'" in done.stderr
    else:
        assert done.stdout.strip() == str(expected), done.stderr


def test_explain_covers_every_backend(without_cpp):
    tensors, options = attention_inputs("bias")
    verdicts = explain("attention", *tensors, **options)
    assert (
        set(verdicts)
        == set(backends.BACKENDS["attention"])
        == {
            "native_cpu",
            "triton_gpu",
            "torch_sdpa",
            "torch_cudnn",
            "flash_attn",
            "pallas_tpu",
            "reference",
        }
    )
    assert (
        verdicts["torch_sdpa"] == "preferred (fwd, bwd)"
        and verdicts["reference"] == "runs when asked for"
    )
    assert verdicts["torch_cudnn"] == "tensors are on cpu; cuDNN is reached on NVIDIA GPUs"
    trained = explain("attention", *tensors, **options, bias_grad=True)
    assert (
        trained["torch_sdpa"] == "a trainable bias has no gradient here"
        and trained["reference"] == "preferred (fwd, bwd)"
    )
    for op in ("drop_token", "contrastive_lse", "patch_embed"):
        inputs = make(next(iter(CASES[op].values())))
        assert explain(op, *[inputs.pop(key) for key in list(inputs)[:2]], **inputs)
    with pytest.raises(ValueError, match="unknown op 'softmax'; ops are"):
        explain("softmax", *tensors)


def test_explain_takes_a_call_with_the_ops_own_defaults():
    z, weight = torch.randn(4, 8), torch.randn(3, 8)
    assert set(explain("contrastive_lse", z, z, scale=1.0)) == set(
        backends.BACKENDS["contrastive_lse"]
    )
    assert set(
        explain("patch_embed", z[None], weight, weight[:, 0], None, None, scale=1.0, shift=0.0)
    ) == set(backends.BACKENDS["patch_embed"])


# -- imports ---------------------------------------------------------------------------------------


def test_the_public_names_are_the_functions_not_their_folders():
    from vatt_fast.kernels import attention as imported
    from vatt_fast.kernels import drop_token as taken

    assert isinstance(imported, types.FunctionType) and isinstance(taken, types.FunctionType)
    for name in vatt_fast.kernels.__all__:
        kind = list if name == "SAVE_OPS" else types.FunctionType
        assert isinstance(getattr(vatt_fast.kernels, name), kind), name


def test_importing_is_light():
    """Beside torch: no compiler, no Triton, no JAX, and few megabytes."""
    code = """
import sys, torch
before = set(sys.modules)
import vatt_fast
print(*{name.split(".")[0] for name in set(sys.modules) - before})
print([name for name in ("torch._dynamo", "torch.distributed.nn", "sympy") if name in sys.modules])
from torch.utils.flop_counter import FlopCounterMode
from vatt_fast.kernels import patch_embed
with FlopCounterMode(display=False) as counter:
    patch_embed(torch.rand(1, 4, 6), torch.rand(8, 6), torch.rand(8), scale=1.0, shift=0.0)
print(counter.get_total_flops())
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    packages = set(done[0].split()) - {"torch"}
    assert packages <= {"vatt_fast", "safetensors", "numpy", "google_crc32c"}, packages
    assert done[1] == "[]"
    # the formulas are there although the counter was imported last
    assert int(done[2]) == 2 * 4 * 6 * 8


def test_kernels_import_nothing_of_the_model():
    """Only their own relative modules, torch, numpy, and lazily jax."""
    folder = Path(vatt_fast.kernels.__file__).parent
    for path in folder.rglob("*.py"):
        depth = len(path.relative_to(folder).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= depth, f"{path.name}:{node.lineno} reaches out of the package"
                names = [] if node.level else [node.module]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert not [name for name in names if name.split(".")[0] in ("vatt_fast", "kernels")], (
                f"{path.name}:{node.lineno}"
            )


def test_no_module_of_kernels_imports_itself_through_others():
    """Whole modules, imports inside functions too; the loaders go by name."""
    folder = Path(vatt_fast.kernels.__file__).parent
    paths = {
        ".".join(path.relative_to(folder).with_suffix("").parts): path
        for path in folder.rglob("*.py")
    }
    paths = {name.removesuffix("__init__").rstrip("."): path for name, path in paths.items()}
    imports = {name: set() for name in paths if name}
    for name in imports:
        package = name if paths[name].name == "__init__.py" else name.rpartition(".")[0]
        for node in ast.walk(ast.parse(paths[name].read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package.split(".") if package else []
            base = base[: len(base) - node.level + 1] + (
                node.module.split(".") if node.module else []
            )
            for alias in node.names:
                for target in (".".join([*base, alias.name]), ".".join(base)):
                    if target in imports:
                        imports[name].add(target)
                        break
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for each in sorted(imports[name]):
                visit(each)
            done.add(path.pop())

    for name in imports:
        visit(name)


def test_importing_kernels_loads_neither_jax_nor_triton():
    code = """
import sys
# importing one raises; torch itself looks for triton and does without
for name in ("jax", "triton", "torchvision", "av"):
    sys.modules[name] = None
import vatt_fast.kernels
ours = sorted(name for name in sys.modules if name.startswith("vatt_fast."))
print([name for name in ours if "kernels" in name and ("triton" in name or "pallas" in name)])
heavy = ("data.dataset", "data.loader", "training", "evaluation", "cli", "demo")
print([name for name in ours if name.removeprefix("vatt_fast.").startswith(heavy)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["[]", "[]"]


def test_kernels_are_not_importable_at_top_level(tmp_path):
    """Another published package owns the name; setup.py's map keeps ours inside vatt_fast."""
    root = Path(vatt_fast.kernels.__file__).parent.parent
    setup = (
        ast.parse((root / "setup.py").read_text())
        if (root / "setup.py").exists()
        else pytest.skip("not a checkout")
    )
    calls = [
        node
        for node in ast.walk(setup)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
    ]
    package_dir = next(
        ast.literal_eval(k.value) for k in calls[0].keywords if k.arg == "package_dir"
    )
    assert package_dir == {"vatt_fast.kernels": "kernels"}
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode and "No module named 'kernels'" in done.stderr


def test_from_the_root_the_name_is_an_empty_package():
    """transformers looks there for the other package's version and must find none.

    Our ops must not be registered twice.
    """
    code = """
import kernels, vatt_fast.kernels
print(getattr(kernels, "__version__", "none"), vatt_fast.kernels.attention.__module__)
kernels.attention
"""
    root = Path(vatt_fast.kernels.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert (
        done.stdout == "none vatt_fast.kernels.attention.op\n"
        and "this folder is the source of vatt_fast.kernels" in done.stderr
    )


# -- bad input -------------------------------------------------------------------------------------

Q = torch.zeros(2, 5, 3, 8)
ROWS, WEIGHT, BIAS = torch.zeros(2, 6, 12, dtype=torch.uint8), torch.zeros(4, 12), torch.zeros(4)
PIXELS = dict(scale=2 / 255, shift=-1.0)
X, Y = torch.zeros(3, 8), torch.zeros(6, 8)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: attention(Q[0], Q, Q, scale=1.0),
            r"takes q \(B, T, H, head_dim\), k and v \(B, S, H, head_dim\), got \(5, 3, 8\)",
        ),
        (
            lambda: attention(Q, Q, Q[:, :4], scale=1.0),
            r"got \(2, 5, 3, 8\), \(2, 5, 3, 8\), \(2, 4, 3, 8\)",
        ),
        (lambda: attention(Q, Q[..., :4], Q[..., :4], scale=1.0), r"k and v \(B, S, H, head_dim\)"),
        (lambda: attention(Q[:1], Q, Q, scale=1.0), r"got \(1, 5, 3, 8\)"),
        (
            lambda: attention(Q[:0], Q[:0], Q[:0], scale=1.0),
            "empty; every axis needs at least one element",
        ),
        (lambda: attention(Q, Q[:, :0], Q[:, :0], scale=1.0), r"k \(2, 0, 3, 8\) is empty"),
        (
            lambda: attention(Q.long(), Q.long(), Q.long(), scale=1.0),
            "q is torch.int64; attention takes floating point",
        ),
        (
            lambda: attention(Q, Q.half(), Q.half(), scale=1.0),
            "they must share one dtype: cast them, or use autocast",
        ),
        (
            lambda: attention(Q, Q, Q, scale=1.0, bias=torch.zeros(5, 5)),
            r"bias is \(5, 5\).*it must be float \(H, T, S\) = \(3, 5, 5\)",
        ),
        (
            lambda: attention(Q, Q, Q, scale=1.0, bias=torch.zeros(3, 5, 5).int()),
            "it must be float",
        ),
        (
            lambda: attention(Q, Q, Q, scale=1.0, key_mask=torch.ones(2, 5)),
            r"key_mask is \(2, 5\) torch.float32; it must be bool",
        ),
        (
            lambda: attention(Q, Q, Q, scale=1.0, key_mask=torch.ones(5).bool()),
            r"\(B, S\) = \(2, 5\), True = attend",
        ),
        (
            lambda: attention(Q, Q.to("meta"), Q.to("meta"), scale=1.0),
            "q is on cpu, k is on meta, v is on meta; move them to one device",
        ),
        (
            lambda: patch_embed(ROWS[0], WEIGHT, BIAS, **PIXELS),
            r"patches is \(6, 12\); patch_embed takes rows \(B, N, k\)",
        ),
        (
            lambda: patch_embed(ROWS.int(), WEIGHT, BIAS, **PIXELS),
            "patches is torch.int32; it must be uint8 or floating point",
        ),
        (
            lambda: patch_embed(ROWS[:0], WEIGHT, BIAS, **PIXELS),
            "every axis needs at least one element",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT[:, :9], BIAS, **PIXELS),
            r"weight is \(4, 9\) torch.float32; it must be float \(dim, k\) with k = 12",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT.int(), BIAS, **PIXELS),
            "weight is .* torch.int32; it must be float",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS[:3], **PIXELS),
            r"bias is \(3,\) torch.float32; it must be float \(4,\)",
        ),
        (lambda: patch_embed(ROWS, WEIGHT, BIAS.int(), **PIXELS), "bias is .* torch.int32"),
        (
            lambda: patch_embed(ROWS, WEIGHT, None, **PIXELS),
            r"bias is None; it must be float \(4,\), zeros for none",
        ),
        (lambda: patch_embed(ROWS, WEIGHT, BIAS, agg=BIAS[:3], **PIXELS), r"agg is \(3,\)"),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, torch.zeros(5, 4), **PIXELS),
            r"position is \(5, 4\).*\(N, dim\) = \(6, 4\)",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, torch.zeros(6, 4).int(), **PIXELS),
            "position is .* torch.int32; it must be float",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, scale=0.0, shift=1.0),
            "scale is 0.0 and shift 1.0; both must be finite and scale not 0",
        ),
        (lambda: patch_embed(ROWS, WEIGHT, BIAS, scale=1.0, shift=float("nan")), "shift nan"),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, None, torch.zeros(3, 2).int(), **PIXELS),
            r"keep is \(3, 2\).*\(B, K\) with B = 2",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, None, torch.zeros(0).int(), **PIXELS),
            "at least one index",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, None, torch.arange(4), gathered=True, **PIXELS),
            "gathered patches have 6 rows, keep has 4 indices",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, torch.zeros(9, 4), gathered=True, **PIXELS),
            r"\(N, dim\) = \(6, 4\)",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, patch=(1, 2, 2), gathered=True, **PIXELS),
            "give one of the two",
        ),
        (
            lambda: patch_embed(ROWS, WEIGHT, BIAS, patch=(1, 2, 2), **PIXELS),
            r"a clip \(B, T, H, W, C\) takes a patch of 3 positive sizes",
        ),
        (
            lambda: patch_embed(ROWS[:, 0], WEIGHT, BIAS, patch=(0,), **PIXELS),
            r"a waveform \(B, S\) of 1, got \(2, 12\) and \(0,\)",
        ),
        (
            lambda: contrastive_lse(X[0], Y, scale=1.0),
            r"y \(N \* P \+ extra_texts, D\), none empty, got \(8,\) and \(6, 8\)",
        ),
        (lambda: contrastive_lse(X[:, :4], Y, scale=1.0), r"got \(3, 4\) and \(6, 8\)"),
        (lambda: contrastive_lse(X[:0], Y, scale=1.0), r"none empty, got \(0, 8\)"),
        (
            lambda: contrastive_lse(X, Y.half(), scale=1.0),
            "x is torch.float32 and y torch.float16; they must share one floating point dtype",
        ),
        (
            lambda: contrastive_lse(X.int(), Y.int(), scale=1.0),
            "they must share one floating point dtype",
        ),
        (
            lambda: contrastive_lse(X, Y, scale=1.0, texts_per_clip=4),
            "y has 6 rows; they must be a multiple of texts_per_clip = 4",
        ),
        (lambda: contrastive_lse(X, Y, scale=1.0, texts_per_clip=0), "texts_per_clip = 0"),
        (
            lambda: contrastive_lse(X, Y, scale=1.0, first=4),
            r"x holds clips 4 .. 6, but y has texts of 6 clips; check first and texts_per_clip",
        ),
        (lambda: contrastive_lse(X, Y, scale=1.0, first=-1), "x holds clips -1 .. 1"),
        (
            lambda: contrastive_lse(X, Y, scale=torch.ones(2)),
            r"scale has shape \(2,\); it must be a float or a tensor \(\) or \(1,\)",
        ),
        (
            lambda: contrastive_lse(X, Y, scale=1.0, x_valid=torch.ones(6).bool()),
            r"x_valid is \(6,\) torch.bool; it must be bool \(3,\)",
        ),
        (
            lambda: contrastive_lse(X, Y, scale=1.0, y_valid=torch.ones(6)),
            r"y_valid is \(6,\) torch.float32; it must be bool \(6,\)",
        ),
        (
            lambda: contrastive_lse(X, Y, scale=torch.ones((), device="meta")),
            "x is on cpu, y is on cpu, scale is on meta; move them",
        ),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()
