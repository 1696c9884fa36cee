"""torch_tpu without a TPU: the adapter's operators on fake tensors of its device.

Also the ops' autograd wiring there, and the kernels compiled by the libtpu that torch_tpu brings.
Nothing runs: that needs a TPU. See run.sh.
"""

import sys
from pathlib import Path

import jax
import pytest
import torch
import torch_tpu._loader
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from adapter_calls import arguments, call_of, inputs_of, outputs_of

from vatt_fast.kernels import explain, xla
from vatt_fast.kernels.ops import OPS

DEVICE = "tpu:0"
CALLS = [(op, function) for op in OPS for function in ("forward", "backward")]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])


@pytest.fixture(scope="module", autouse=True)
def named_device():
    """torch knows the device's name only where torch_tpu finds a TPU, or is told to go ahead."""
    torch_tpu._loader._init_device("tpu")


@pytest.mark.parametrize("op", OPS)
def test_the_kernels_are_preferred(op):
    with FakeTensorMode():
        tensors, options = arguments(op, "forward", torch.bfloat16, DEVICE)
        assert explain(op, *tensors, **options)["pallas_tpu"] == "preferred (fwd, bwd)"


@DTYPES
@pytest.mark.parametrize(("op", "function"), CALLS)
def test_an_operator_is_registered_and_knows_its_results(op, function, dtype):
    """Its fake rule, torch_tpu's, lowers the kernels for a TPU: Mosaic's own checks run."""
    with FakeTensorMode():
        inputs = inputs_of(op, dtype, DEVICE)
        tensors, options = arguments(op, function, dtype, DEVICE)
        results = getattr(xla.adapter(op), function)(*tensors, **options)
        results = results if isinstance(results, tuple) else (results,)
        expected = (
            outputs_of(op, inputs)
            if function == "forward"
            else [gradient_of(inputs[name]) for name in OPS[op].differentiable]
        )
        call, _ = xla.bind(op, function, tensors, options)
    namespace, _, name = xla.operator(call)._opoverload._schema.name.partition("::")
    assert name.startswith(f"vatt_{op}_{function}_") and hasattr(
        getattr(torch.ops, namespace), name
    )
    for result, like in zip(results, expected, strict=True):
        assert (result is None) == (like is None)
        if result is not None:
            assert (result.shape, result.device.type) == (like.shape, "tpu")
            assert result.dtype == like.dtype or (
                function == "backward" and result.dtype == torch.float32
            )  # the op casts


@DTYPES
@pytest.mark.parametrize("op", OPS)
def test_gradients_are_wired(op, dtype):
    """The public op's node, called by hand: autograd's engine has no queue for an absent device."""
    with FakeTensorMode():
        inputs = inputs_of(op, dtype, DEVICE)
        leaves = {
            name: inputs[name].requires_grad_()
            for name in OPS[op].differentiable
            if gradient_of(inputs[name]) is not None
        }
        outputs = outputs_of(op, inputs)
        assert all(x.device.type == "tpu" for x in outputs)
        gradients = [
            x
            for x in outputs[0].grad_fn.apply(*(torch.ones_like(x) for x in outputs))
            if x is not None
        ]
    got, wanted = (
        [(x.shape, x.dtype, x.device) for x in tensors] for tensors in (gradients, leaves.values())
    )
    assert sorted(got, key=str) == sorted(wanted, key=str) and leaves


def test_autocast_reaches_the_kernels():
    with FakeTensorMode(), torch.autocast("tpu", torch.bfloat16):
        out, lse = outputs_of("attention", inputs_of("attention", torch.float32, DEVICE))
    assert (out.dtype, lse.dtype) == (torch.bfloat16, torch.float32)


@DTYPES
@pytest.mark.parametrize(("op", "function"), CALLS)
def test_its_libtpu_compiles_the_kernels(op, function, dtype):
    call = call_of(op, function, dtype)
    chip = SingleDeviceSharding(
        topologies.get_topology_desc(platform="tpu", topology_name="v6e:2x2").devices[0]
    )
    there = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=chip) for x in call.specs]
    compiled = jax.jit(xla.exported(call, "tpu").call).lower(*there).compile()
    assert 'custom_call_target="tpu_custom_call"' in compiled.as_text()


def gradient_of(x):
    """Like which its gradient is; None where it has none."""
    return x if isinstance(x, torch.Tensor) and x.is_floating_point() else None
