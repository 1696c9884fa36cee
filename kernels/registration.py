"""Operators of torch from plain functions: what ``torch.library.custom_op`` makes of them, with less work a call (figures in NOTES.md).

Its registration of gradients reads the operator's schema anew at every call, and every call is checked for results that share memory with
inputs or each other, as tests do here (``tests/test_ops.py``). Here the same parts are put together once: an implementation for any device, a
fake one for shapes, and one function for autograd.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch

from .dispatch import autocast_dtype

_library = torch.library.Library("vatt_fast", "FRAGMENT")


def operator(
    name: str,
    implementation: Callable,
    fake: Callable,
    differentiate: Callable[..., tuple],
    save: Callable[[Any, tuple, Any], None] = lambda ctx, inputs, output: None,
):
    """``torch.ops.vatt_fast.<name>``, opaque to the compiler, differentiable.

    Args:
        implementation: takes tensors, None and plain values by position, no defaults; its annotations are the schema. It returns new tensors.
            The caller's autocast is off inside.
        fake: the same on tensors without values.
        differentiate, save: ``backward(ctx, *gradients)`` and ``setup_context(ctx, inputs, output)`` as of ``torch.autograd.Function``.
    """
    _library.define(
        name + torch.library.infer_schema(implementation, mutates_args=()),
        tags=(torch.Tag.pt2_compliant_tag,),
    )
    _library.impl(
        name, torch._disable_dynamo(without_autocast(implementation)), "CompositeExplicitAutograd"
    )
    torch.library.register_fake(f"vatt_fast::{name}", fake, lib=_library)
    overload = getattr(torch.ops.vatt_fast, name).default

    def below_autograd(*inputs_and_keys):
        *inputs, keys = inputs_and_keys
        with torch._C._AutoDispatchBelowAutograd():
            return overload.redispatch(keys & torch._C._after_autograd_keyset, *inputs)

    def forward(ctx, *inputs_and_keys):
        output = below_autograd(*inputs_and_keys)
        save(ctx, inputs_and_keys[:-1], output)
        return output

    def backward(ctx, *gradients):
        return *differentiate(ctx, *gradients), None

    function: Any = type(
        name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(backward)},
    )

    def autograd(keys, *inputs):
        wanted = torch.is_grad_enabled() and torch._C._any_requires_grad(*inputs)
        return function.apply(*inputs, keys) if wanted else below_autograd(*inputs, keys)

    _library.impl(name, autograd, "Autograd", with_keyset=True)
    return overload


def without_autocast(implementation):
    """Inside an op the caller's autocast is off, and the tensors' GPU is the current one.

    The public wrapper has cast what should be cast, and backends choose the rest. Triton launches
    on the current GPU, whichever the tensors are on.
    """

    @functools.wraps(implementation)
    def run(*args, **kwargs):
        device = args[0].device
        autocast = autocast_dtype(device) is not None
        if not autocast and device.type != "cuda":
            return implementation(*args, **kwargs)
        with contextlib.ExitStack() as stack:
            if autocast:
                stack.enter_context(torch.autocast(device.type, enabled=False))
            if device.type == "cuda":
                stack.enter_context(torch.cuda.device(device))
            return implementation(*args, **kwargs)

    return run
