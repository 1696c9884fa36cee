"""What kernels.xla is asked for when an op runs forward and backward, from shapes alone.

For the checks of tests/xla and tests/torch_tpu.
"""

import torch

from vatt_fast.kernels import xla
from vatt_fast.kernels.cases import CASES, make
from vatt_fast.kernels.ops import OPS

TINY = {
    "attention": "video_tiny_drop50",
    "drop_token": "video_tiny_drop50",
    "contrastive_lse": "vt_tiny",
    "patch_embed": "video_tiny_drop50",
}


def inputs_of(op, dtype, device="meta"):
    """The public op's arguments, tensors without values; an absent device needs FakeTensorMode."""
    inputs = make(CASES[op][TINY[op]], dtype, "meta")
    return {
        name: torch.empty(x.shape, dtype=x.dtype, device=device)
        if isinstance(x, torch.Tensor)
        else x
        for name, x in inputs.items()
    }


def outputs_of(op, inputs):
    outputs = OPS[op].function(**inputs)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def arguments(op, function, dtype, device="meta"):
    """Of a backend's forward or backward: its tensors, and its options."""
    inputs = inputs_of(op, dtype, device)
    tensors, options = (
        [inputs[name] for name in OPS[op].tensors],
        {name: value for name, value in inputs.items() if name not in OPS[op].tensors},
    )
    if op == "patch_embed":
        options |= {"dtype": dtype}
    if function == "forward":
        return tensors, options
    outputs = outputs_of(op, inputs)
    gradients = [torch.empty_like(x) for x in outputs]
    if op == "attention":
        return [*gradients, *tensors, *outputs], options | {"bias_grad": inputs["bias"] is not None}
    if op == "drop_token":
        return [*gradients, inputs["keep"], inputs["tokens"].shape[1]], options
    if op == "contrastive_lse":
        return [*gradients, *tensors, *outputs], options
    return [*gradients, *tensors], options | {"d_patches": inputs["patches"].is_floating_point()}


def call_of(op, function, dtype):
    """The adapter's Call."""
    return xla.bind(op, function, *arguments(op, function, dtype))[0]
