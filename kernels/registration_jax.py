"""Differentiable functions of JAX arrays from one declaration; the twin of registration.py."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from .backends import load
from .checks import is_float
from .dispatch import choose
from .settings import requested

Arrays = dict[str, Any]  # of jax.Array, absent ones None


class Reference:
    """An op's reference on JAX arrays, whose ``xp`` is jax.numpy."""

    def __init__(self, op: str):
        self.module = load(op, "reference", "jax")

    def forward(self, *tensors: Any, **options: Any) -> Any:
        return self.module.forward(*tensors, **options, xp=jnp)

    def backward(self, *tensors: Any, **options: Any) -> Any:
        return self.module.backward(*tensors, **options, xp=jnp)


class _Static(NamedTuple):
    """What a trace depends on beside the arrays."""

    backend: str
    options: tuple[tuple[str, Any], ...]
    sizes: tuple[int, ...]


class Operator:
    """An op on JAX arrays, with a gradient, run by the backend chosen when it is traced.

    ``call(arrays, **options)`` takes all arrays by name, absent ones None.

    Args:
        tensors: the arrays that a backend takes by position; it takes the others by name.
        gradients: the arrays that have a gradient, in the order in which backends return them.
        saves_outputs: a backend's backward takes the outputs, after the tensors.
        wanted: {array: the option that tells a backend's backward whether its gradient is wanted}.
        sized: {array: axis}: of these a backward needs nothing but the size of an axis. They are
            not saved, and a backend's backward takes the size after the tensors.
        checkpoint: the name of the outputs for policies of ``jax.checkpoint``.
        reference: in place of ``Reference(name)``.
    """

    def __init__(
        self,
        name: str,
        *,
        tensors: Sequence[str],
        gradients: Sequence[str],
        saves_outputs: bool = False,
        wanted: Mapping[str, str] | None = None,
        sized: Mapping[str, int] | None = None,
        checkpoint: str = "",
        reference: Any = None,
    ):
        self.name, self.tensors, self.gradients = name, tensors, gradients
        self.saves_outputs, self.checkpoint = saves_outputs, checkpoint
        self.wanted, self.sized = dict(wanted or {}), dict(sized or {})
        self.reference = reference or Reference(name)
        self._run = jax.custom_vjp(
            lambda static, arrays: self._forward(static, arrays)[0], nondiff_argnums=(0,)
        )
        self._run.defvjp(self._forward, self._backward)

    def call(self, arrays: Arrays, **options: Any) -> Any:
        sizes = tuple(arrays[each].shape[axis] for each, axis in self.sized.items())
        static = _Static(requested(self.name), tuple(options.items()), sizes)
        return self._run(static, arrays)

    def _forward(self, static: _Static, arrays: Arrays):
        tensors, options = self._split(static, arrays)
        results = self._module("fwd", static, tensors, options).forward(*tensors, **options)
        if self.checkpoint:
            results = jax.tree.map(
                functools.partial(checkpoint_name, name=self.checkpoint), results
            )
        kept = {name: x for name, x in arrays.items() if name not in self.sized}
        return results, (kept, results if self.saves_outputs else ())

    def _backward(self, static: _Static, saved, d_outputs):
        arrays, outputs = saved
        d_outputs = d_outputs if isinstance(d_outputs, tuple | list) else (d_outputs,)
        # in place of an array that was not saved, its result's gradient tells dtype and device
        like = dict.fromkeys(self.sized, d_outputs[0]) | arrays
        tensors, options = self._split(static, like)
        module = self._module("bwd", static, tensors, options)
        options |= {flag: _has_gradient(arrays[each]) for each, flag in self.wanted.items()}
        tensors = [arrays[each] for each in self.tensors if each not in self.sized]
        found = module.backward(*d_outputs, *tensors, *outputs, *static.sizes, **options)
        found = found if isinstance(found, tuple | list) else (found,)
        results: Arrays = dict.fromkeys(like)
        for each, gradient in zip(self.gradients, found, strict=True):
            if gradient is not None and _has_gradient(like[each]):
                results[each] = gradient.astype(like[each].dtype)
        return (results,)

    def _split(self, static: _Static, arrays: Arrays) -> tuple[list, dict[str, Any]]:
        """A backend's tensors and options."""
        named = {name: x for name, x in arrays.items() if name not in self.tensors}
        return [arrays[name] for name in self.tensors], named | dict(static.options)

    def _module(self, mode: str, static: _Static, tensors, options) -> Any:
        module = choose(self.name, mode, static.backend, *tensors, **options)
        return self.reference if module is load(self.name, "reference", "jax") else module


def _has_gradient(x: Any) -> bool:
    return x is not None and is_float(x)
