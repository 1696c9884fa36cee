"""The Pallas kernels on torch tensors: of torch_xla (device "xla") and of torch_tpu (device "tpu").

One thin adapter serves every op. An op keeps its checks, its fake rule and its autograd formula.
What runs inside it is a function of its ``pallas_tpu.py``, traced by JAX once for every set of
shapes and options, and handed over as one call. torch_xla 2.9 is the last of its kind, and its pins
are the extra ``xla``; torch_tpu, for torch 2.11 and later, is its successor.
"""

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.export
import jax.numpy as jnp
import torch
from torch import Tensor

from . import backends, settings
from .patch_embed.patchify import patchify, unpatchify

_HEADS_SECOND = {"q", "k", "v", "out", "d_out"}  # (B, T, H, D) in torch, (B, H, T, D) in JAX
# of the results so many, the first ones
_RESULTS_HEADS_SECOND = {("attention", "forward"): 1, ("attention", "backward"): 3}

Results = tuple[Tensor | None, ...]


class Call(NamedTuple):
    """A call of a function of ``pallas_tpu.py`` without its values.

    It holds all that a trace depends on, and so is the key under which the trace is kept.
    """

    op: str
    function: str  # "forward", "backward", "unsupported"
    names: tuple[str, ...]  # of the arrays
    shapes: tuple[tuple[tuple[int, ...], str], ...]  # and dtypes, in torch's layout
    options: tuple[tuple[str, Any], ...]  # everything else that is given
    patch: tuple[int, ...] | None  # of patch_embed's clips; the kernels take rows

    @property
    def title(self) -> str:
        return f"vatt_{self.op}_{self.function}"

    @property
    def specs(self) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in self.shapes]


def bind(
    op: str, function: str, tensors: Sequence[Any], options: Mapping[str, Any]
) -> tuple[Call, tuple[Tensor, ...]]:
    """A backend call's arguments as a Call, and its tensors in the order of ``names``.

    Absent tensors, and what the Pallas function has no parameter for, are left out.
    """
    parameters = inspect.signature(getattr(_kernels(op), function)).parameters
    given = dict(zip(parameters, tensors, strict=False)) | {
        name: value for name, value in options.items() if name in parameters
    }
    given = {name: value for name, value in given.items() if value is not None}
    arrays = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    if "keep" in arrays:
        arrays["keep"] = arrays["keep"].int()  # JAX has no 64 bits unless told so
    shapes = tuple((tuple(x.shape), _name(x.dtype)) for x in arrays.values())
    static = tuple(
        (name, jnp.dtype(_name(value)) if isinstance(value, torch.dtype) else value)
        for name, value in given.items()
        if name not in arrays
    )
    patch = options.get("patch")
    patch = None if patch is None else tuple(patch)
    return Call(op, function, tuple(arrays), shapes, static, patch), tuple(arrays.values())


class Adapter:
    """A backend made of an op's ``pallas_tpu.py``, for torch tensors."""

    def __init__(self, op: str):
        self.op = op
        self.__name__ = _kernels(op).__name__

    def forward(self, *tensors, **options):
        return self._run("forward", tensors, options)

    def backward(self, *tensors, **options):
        return self._run("backward", tensors, options)

    def unsupported(self, *tensors, **options) -> str | None:
        if (device := tensors[0].device.type) not in _LAUNCH:
            return (
                f"tensors are on {device}; from torch its kernels are reached on xla (torch_xla)"
                " and tpu (torch_tpu)"
            )
        tensors = tuple(x.to("meta") if isinstance(x, Tensor) else x for x in tensors)
        options = {
            name: x.to("meta") if isinstance(x, Tensor) else x for name, x in options.items()
        }
        call, arrays = bind(self.op, "unsupported", tensors, options)
        specs = {
            name: jax.ShapeDtypeStruct(tuple(x.shape), _name(x.dtype))
            for name, x in _jax_layout(call, arrays).items()
        }
        return _kernels(self.op).unsupported(**specs, **dict(call.options))

    def _run(self, function: str, tensors, options):
        call, arrays = bind(self.op, function, tensors, options)
        results = _LAUNCH[tensors[0].device.type](call, arrays)
        return results if len(results) > 1 else results[0]


@functools.cache
def adapter(op: str) -> Adapter:
    """The backend "pallas_tpu" of ``op`` for torch tensors."""
    return Adapter(op)


# -- the function that JAX traces ----------------------------------------------------------------


@functools.cache
def traceable(call: Call, platform: str) -> tuple[Callable, tuple[bool, ...]]:
    """arrays -> results, both in torch's layout, with kernels for ``platform``.

    Returns:
        The function, which leaves absent results out, and for every result whether it is present.
    """

    def results_of(*arrays):
        given, options = _jax_layout(call, arrays), dict(call.options)
        if "first" in options:
            options["first"] = jnp.asarray(options["first"], jnp.int32)
        if "lse" in given:
            given.setdefault("d_lse", jnp.zeros_like(given["lse"]))  # nobody has used lse
        with settings.lowering_for(platform):
            results = getattr(_kernels(call.op), call.function)(**given, **options)
        return _torch_layout(call, results if isinstance(results, tuple | list) else (results,))

    present = tuple(x is not None for x in jax.eval_shape(results_of, *call.specs))

    def function(*arrays):
        return tuple(x for x in results_of(*arrays) if x is not None)

    function.__name__ = call.title
    return function, present


def _jax_layout(call: Call, arrays) -> dict[str, Any]:
    """By name and as ``pallas_tpu.py`` takes them: heads before tokens, clips cut into rows.

    For torch and JAX arrays alike.
    """
    given = {
        name: x.swapaxes(1, 2) if name in _HEADS_SECOND else x
        for name, x in zip(call.names, arrays, strict=True)
    }
    if call.patch is not None:
        given["patches"] = patchify(given["patches"], call.patch)
    return given


def _torch_layout(call: Call, results) -> list:
    swapped = _RESULTS_HEADS_SECOND.get((call.op, call.function), 0)
    results = [x.swapaxes(1, 2) if i < swapped else x for i, x in enumerate(results)]
    if call.patch is not None and call.function == "backward" and results[0] is not None:
        clip, _ = call.shapes[call.names.index("patches")]
        results[0] = unpatchify(results[0], call.patch, clip[1:])
    return results


def _filled(results, present: tuple[bool, ...]) -> Results:
    """Results with None where one is absent."""
    left = iter(results if isinstance(results, tuple | list) else (results,))
    return tuple(next(left) if there else None for there in present)


def leave_the_tpu_to_torch() -> None:
    """Keep this process's JAX on the CPU: it only traces, and must not try to claim the TPU."""
    jax.config.update("jax_platforms", "cpu")


# -- torch_xla -----------------------------------------------------------------------------------


def exported(call: Call, platform: str) -> jax.export.Exported:
    """The function lowered for ``platform``.

    By way of jax.export, whose Mosaic kernels an older libtpu than JAX's own reads too.
    """
    function, _ = traceable(call, platform)
    return jax.export.export(jax.jit(function), platforms=[platform])(*call.specs)


@functools.cache
def computation(call: Call, platform: str) -> Callable:
    """tensors -> results: the function as an XLA computation, which torch_xla adds to its graph."""
    import torch_xla.core.xla_builder as xla_builder

    lowered = (
        jax.jit(exported(call, platform).call, keep_unused=True)
        .trace(*call.specs)
        .lower(lowering_platforms=(platform,))
    )
    module = lowered.compiler_ir("hlo").as_serialized_hlo_module_proto()
    return xla_builder.xla_computation_as_func(
        xla_builder.computation_from_module_proto(call.title, module), call.title
    )


def _through_torch_xla(call: Call, tensors: tuple[Tensor, ...]) -> Results:
    platform = "cpu"
    if backends.torch_xla_has_a_tpu():
        platform = "tpu"
        leave_the_tpu_to_torch()
    _, present = traceable(call, platform)
    return _filled(computation(call, platform)(list(tensors)), present)


# -- torch_tpu -----------------------------------------------------------------------------------


@functools.cache
def operator(call: Call) -> Callable:
    """tensors -> results: the function as an operator that torch_tpu registers,
    ``torch.ops.vatt_fast_jax.<title>_<digest>``."""
    from torch.tpu import pallas  # torch_tpu adds it to torch

    function, present = traceable(call, "tpu")
    count = sum(present)

    def wrapped(*arrays):
        results = function(*arrays)
        return results if count > 1 else results[0]

    # torch_tpu reads names, arity and results from the signature
    parameters = [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=jax.Array)
        for name in call.names
    ]
    returns = tuple[(jax.Array,) * count] if count > 1 else jax.Array  # type: ignore[misc]
    signature = inspect.Signature(parameters, return_annotation=returns)
    wrapped.__signature__ = signature  # type: ignore[attr-defined]
    digest = hashlib.blake2b(repr(call).encode(), digest_size=8).hexdigest()
    wrapped.__name__ = f"{call.title}_{digest}"
    return pallas.jax_op(f"vatt_fast_jax::{wrapped.__name__}", wrapped)


def _through_torch_tpu(call: Call, tensors: tuple[Tensor, ...]) -> Results:
    leave_the_tpu_to_torch()
    _, present = traceable(call, "tpu")
    return _filled(operator(call)(*tensors), present)


_LAUNCH: dict[str, Callable[[Call, tuple[Tensor, ...]], Results]] = {
    "xla": _through_torch_xla,
    "tpu": _through_torch_tpu,
}


def _kernels(op: str):
    return backends.load(op, "pallas_tpu", "jax")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
