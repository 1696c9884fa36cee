"""Every op as torch sees it: opaque to the compiler, sound under opcheck, counted, exportable.

It runs on the backend asked for.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import vatt_fast.kernels
from vatt_fast.kernels import attention, backends, dispatch, use_backend
from vatt_fast.kernels.cases import CASES, make
from vatt_fast.kernels.ops import OPS

CASE = {
    "attention": "text",
    "drop_token": "ragged_per_clip",
    "contrastive_lse": "masked",
    "patch_embed": "kept_rows",
}


def inputs_of(op, *, gradients=True, seed=0):
    inputs = make(CASES[op][CASE[op]], seed=seed)
    for name in OPS[op].differentiable if gradients else ():
        if isinstance(inputs.get(name), torch.Tensor) and inputs[name].is_floating_point():
            inputs[name] = inputs[name].detach().clone().requires_grad_()
    return inputs


def outputs_of(op, **inputs):
    out = OPS[op].function(**inputs)
    return out if isinstance(out, tuple) else (out,)


def gradients_of(function, op, **inputs):
    out = function(**inputs)
    out = out if isinstance(out, tuple) else (out,)
    leaves = {
        name: value
        for name, value in inputs.items()
        if isinstance(value, torch.Tensor) and value.requires_grad
    }
    total = sum(value.masked_fill(~value.isfinite(), 0).square().sum() for value in out)
    return [value.detach() for value in out], dict(
        zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True)
    )


def calls_of(op, **inputs):
    """The low-level calls that a public call makes, forward and backward, with their arguments."""
    recorded = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "vatt_fast":
                recorded.append((function, args, kwargs or {}))
            return function(*args, **kwargs or {})

    with Recorder():
        gradients_of(OPS[op].function, op, **inputs)
    assert [function._schema.name for function, _, _ in recorded] == [
        f"vatt_fast::{op}",
        f"vatt_fast::{op}_backward",
    ]
    return recorded


@pytest.mark.parametrize("op", OPS)
def test_the_public_name_is_the_function(op):
    assert OPS[op].function is getattr(vatt_fast.kernels, op)


@pytest.mark.parametrize("op", OPS)
def test_opcheck(op):
    (forward, args, kwargs), (backward, backward_args, backward_kwargs) = calls_of(
        op, **inputs_of(op)
    )
    args = [
        value.detach().clone().requires_grad_(value.requires_grad)
        if isinstance(value, torch.Tensor)
        else value
        for value in args
    ]
    torch.library.opcheck(forward, args, kwargs)
    detached = [
        value.detach() if isinstance(value, torch.Tensor) else value for value in backward_args
    ]
    torch.library.opcheck(backward, detached, backward_kwargs)


@pytest.mark.parametrize(
    ("backend", "asked"), [("aot_eager", ""), ("inductor", ""), ("aot_eager", "triton_gpu")]
)
@pytest.mark.parametrize("op", OPS)
def test_compiles_as_one_graph_without_recompiling(op, backend, asked):
    try:
        with use_backend(asked):
            OPS[op].function(**inputs_of(op))
    except ValueError as error:
        if "cannot run this" in str(error):
            pytest.skip(str(error))
        raise
    torch._dynamo.reset()
    compiled = torch.compile(OPS[op].function, fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(error_on_recompile=True), use_backend(asked):
        for seed in range(2):
            inputs = inputs_of(op, seed=seed)
            out, grads = gradients_of(compiled, op, **inputs)
            eager, eager_grads = gradients_of(OPS[op].function, op, **inputs)
            torch.testing.assert_close(out, eager)
            torch.testing.assert_close(grads, eager_grads)


@pytest.mark.parametrize("op", OPS)
def test_export(op):
    class Module(torch.nn.Module):
        def forward(self, **tensors):
            return outputs_of(op, **{**constants, **tensors})

    inputs = inputs_of(op, gradients=False)
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    constants = {name: value for name, value in inputs.items() if name not in tensors}
    program = torch.export.export(Module(), (), tensors)
    assert any(f"vatt_fast.{op}" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(**tensors), outputs_of(op, **inputs))


@pytest.mark.parametrize("op", OPS)
def test_flops_are_counted(op):
    """The reference's own matmuls must not be counted beside the op's formula."""
    case, inputs = CASES[op][CASE[op]], inputs_of(op)
    if op == "attention":
        forward = 4 * case.batch * case.heads * case.queries * case.keys * case.head_dim
        expected = forward + 5 * forward // 2
    elif op == "contrastive_lse":
        expected = 8 * case.batch * case.clips * case.texts_per_clip * case.dim
    elif op == "patch_embed":
        products = 2 if inputs["patches"].dtype == torch.uint8 else 3
        expected = products * 2 * case.batch * case.kept * case.values * case.dim
    else:
        expected = 0
    with FlopCounterMode(display=False) as counter:
        gradients_of(OPS[op].function, op, **inputs)
    assert counter.get_total_flops() == expected


@pytest.mark.parametrize("op", OPS)
def test_shapes_on_a_device_that_is_not_there(op):
    """Fake CUDA tensors: forward's and backward's rules need no card and no kernel.

    Autograd itself would ask the absent device.
    """
    for function, args, kwargs in calls_of(op, **inputs_of(op)):
        detached = [value.detach() if isinstance(value, torch.Tensor) else value for value in args]
        expected = function(*detached, **kwargs)
        with FakeTensorMode(), torch.no_grad():
            fake = [
                torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")
                if isinstance(value, torch.Tensor)
                else value
                for value in detached
            ]
            out = function(*fake, **kwargs)
        pairs = zip(
            *(value if isinstance(value, tuple | list) else (value,) for value in (out, expected)),
            strict=True,
        )
        for ours, real in pairs:
            assert (ours.shape, ours.dtype, ours.stride(), ours.device.type) == (
                real.shape,
                real.dtype,
                real.stride(),
                "cuda",
            )


@pytest.mark.parametrize("op", OPS)
def test_no_second_derivative(op):
    inputs = inputs_of(op)
    leaf = next(
        value
        for value in inputs.values()
        if isinstance(value, torch.Tensor) and value.requires_grad
    )
    out = sum(
        value.masked_fill(~value.isfinite(), 0).square().sum() for value in outputs_of(op, **inputs)
    )
    (gradient,) = torch.autograd.grad(out, leaf, create_graph=True)
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        gradient.sum().backward()


def differentiable_inputs(op):
    """Tensors that have a gradient, the other arguments, and a scalar function of the former."""
    inputs = inputs_of(op, gradients=False)
    names = [
        name
        for name in OPS[op].differentiable
        if isinstance(inputs[name], torch.Tensor) and inputs[name].is_floating_point()
    ]
    fixed = {name: value for name, value in inputs.items() if name not in names}

    def loss(*tensors):
        outputs = outputs_of(op, **fixed, **dict(zip(names, tensors, strict=True)))
        return sum(out.masked_fill(~out.isfinite(), 0).square().sum() for out in outputs)

    return tuple(inputs[name] for name in names), loss


@pytest.mark.parametrize("op", OPS)
def test_forward_mode_is_refused(op):
    """An opaque operator gives no tangent, and must not pass off a zero for one."""
    tensors, loss = differentiable_inputs(op)
    message = f"{op} has no forward-mode derivative"
    with pytest.raises(NotImplementedError, match=message):
        torch.func.jvp(loss, tensors, tensors)
    for trained in (False, True):
        with torch.autograd.forward_ad.dual_level():
            duals = [torch.autograd.forward_ad.make_dual(x, x) for x in tensors]
            first = [x.clone().requires_grad_(trained) for x in duals[:1]]
            with pytest.raises(NotImplementedError, match=message):
                loss(*first, *duals[1:])
            loss(*tensors)  # without a tangent there is nothing to refuse


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("op", OPS)
def test_functional_gradients(op):
    """torch.func.grad, and vmap over it, give what autograd gives."""
    tensors, loss = differentiable_inputs(op)
    leaves = [x.detach().requires_grad_() for x in tensors]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    every = tuple(range(len(tensors)))
    torch.testing.assert_close(torch.func.grad(loss, argnums=every)(*tensors), expected)
    first = lambda x: loss(x, *tensors[1:])  # noqa: E731
    found = torch.func.vmap(torch.func.grad(first))(torch.stack([tensors[0]] * 2))
    torch.testing.assert_close(found, torch.stack([expected[0]] * 2))
    with pytest.raises(NotImplementedError, match="has no second derivative"):
        torch.func.grad(lambda x: torch.func.grad(first)(x).sum())(tensors[0])


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_the_backend_asked_for_runs_forward_and_backward(compiled, monkeypatch):
    """Asked for outside or inside of compiled code.

    The backward keeps the forward's choice after the request has ended.
    """
    torch._dynamo.reset()
    ran = []
    q = torch.randn(2, 5, 2, 8, requires_grad=True)
    able = [
        name
        for name, verdict in dispatch.explain("attention", q, q, q, scale=0.3).items()
        if "preferred" in verdict or "runs" in verdict
    ]
    assert {"reference", "torch_sdpa"} <= set(able)
    for name in able:
        module = backends.load("attention", name)
        for mode in ("forward", "backward"):
            original = getattr(module, mode)
            monkeypatch.setattr(
                module,
                mode,
                lambda *a, _f=original, _r=(name, mode), **k: ran.append(_r) or _f(*a, **k),
            )
    function = lambda q: attention(q, q, q, scale=0.3)[0].sum()  # noqa: E731
    function = (
        torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
    )
    for name in able:
        ran.clear()
        with use_backend(attention=name):
            loss = function(q)
        loss.backward()
        assert ran == [(name, "forward"), (name, "backward")]


def test_use_backend_inside_compiled_code():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def function(q):
        with use_backend(attention="reference"):
            return attention(q, q, q, scale=0.3)[0]

    q = torch.randn(2, 5, 2, 8)
    torch.testing.assert_close(function(q), attention(q, q, q, scale=0.3)[0])
