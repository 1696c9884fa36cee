"""The ops' cases, drawn in torch, run by ``jax_ops``: what the JAX tests share."""

import jax
import jax.numpy as jnp
import torch

from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.patch_embed import patchify

HEADS_FIRST = {
    "q",
    "k",
    "v",
    "out",
    "d_q",
    "d_k",
    "d_v",
}  # (B, T, H, D) in torch, (B, H, T, D) here


def to_jax(tensor: torch.Tensor) -> jax.Array:
    if tensor.dtype == torch.bfloat16:
        return jnp.asarray(tensor.float().numpy()).astype(jnp.bfloat16)  # exact
    return jnp.asarray(tensor.contiguous().numpy())


def to_torch(array: jax.Array) -> torch.Tensor:
    if array.dtype == jnp.bfloat16:
        return torch.tensor(jax.device_get(array.astype(jnp.float32))).bfloat16()
    return torch.tensor(jax.device_get(array))


def translate(op: str, inputs: dict) -> dict:
    """The op's torch arguments as ``jax_ops`` takes them: clips as rows, heads before tokens."""
    inputs = dict(inputs)
    if op == "patch_embed" and (patch := inputs.pop("patch", None)) is not None:
        inputs["patches"] = patchify(inputs["patches"], patch)
    for name in HEADS_FIRST & set(inputs):
        inputs[name] = inputs[name].transpose(1, 2)
    return {
        name: to_jax(value) if isinstance(value, torch.Tensor) else value
        for name, value in inputs.items()
    }


def run(
    op: str, inputs: dict, seeds: list[torch.Tensor], *, without: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    """{output: value, d_input: gradient} of one jitted forward and backward; as ``parity.run``.

    In torch's layout.
    """
    arguments = translate(op, inputs)
    leaves = {
        name: arguments.pop(name)
        for name in OPS[op].differentiable
        if isinstance(arguments.get(name), jax.Array)
        and jnp.issubdtype(arguments[name].dtype, jnp.floating)
    }
    fixed = {
        name: arguments.pop(name)
        for name in list(arguments)
        if isinstance(arguments[name], jax.Array)
    }
    names = OPS[op].outputs
    cotangents = [
        to_jax(seed.transpose(1, 2) if name in HEADS_FIRST else seed)
        for name, seed in zip(names, seeds, strict=True)
    ]

    def both(leaves, fixed, cotangents):
        def call(leaves):
            outputs = OPS[op].jax_function(**leaves, **fixed, **arguments)
            return outputs if isinstance(outputs, tuple) else (outputs,)

        outputs, backward = jax.vjp(call, leaves)
        used = tuple(
            jnp.zeros(o.shape, o.dtype) if name in without else c.astype(o.dtype)
            for name, o, c in zip(names, outputs, cotangents, strict=True)
        )
        return outputs, backward(used)[0]

    outputs, gradients = jax.jit(both)(leaves, fixed, cotangents)
    result = dict(zip(names, outputs, strict=True)) | {
        f"d_{name}": gradient for name, gradient in gradients.items()
    }
    return {
        name: to_torch(jnp.swapaxes(value, 1, 2) if name in HEADS_FIRST else value)
        for name, value in result.items()
    }
