"""Every switch of the kernels, each with the context manager that sets it.

Backend, platform of JAX code, interpreter of Pallas kernels, tiles of GPU kernels.

They are plain module globals. ``torch.compile`` can guard on those, and not on a ContextVar.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

from .backends import BACKENDS, JAX_BACKENDS, OP_NAMES

PLAIN = "plain"  # the name under which every op runs its ``plain.py``

# -- backend -------------------------------------------------------------------------------------


def _checked(name: str, by_op: dict[str, str]) -> dict[str, str]:
    """{op: backend} of a request: ``name`` for every op ("" for none), then ``by_op``.

    Raises:
        ValueError: unknown op or backend.
    """
    for op in by_op:
        if op not in OP_NAMES:
            raise ValueError(
                f"unknown op {op!r} in backend request {_written(name, by_op)!r};"
                f" ops are {', '.join(OP_NAMES)}"
            )
    for op, backend in (("", name), *by_op.items()):
        known: list[str] = []
        for each in [op] if op else OP_NAMES:
            known += [*BACKENDS[each], *JAX_BACKENDS[each]]
        if backend and backend not in (*known, PLAIN):
            raise ValueError(
                f"unknown backend {backend!r} in request {_written(name, by_op)!r};"
                f" {op or 'the ops'} have {', '.join(dict.fromkeys([*known, PLAIN]))}"
            )
    return (dict.fromkeys(OP_NAMES, name) if name else {}) | by_op


def _written(name: str, by_op: dict[str, str]) -> str:
    """A request in the form that VATT_FAST_BACKEND takes."""
    return ",".join([*filter(None, [name]), *(f"{op}={by_op[op]}" for op in by_op)])


def _parsed(request: str) -> dict[str, str]:
    """{op: backend} of a request as VATT_FAST_BACKEND holds it: "name" or "op=name,op=name"."""
    name, by_op = "", {}
    for part in filter(None, request.replace(" ", "").split(",")):
        op, equals, backend = part.rpartition("=")
        if equals:
            by_op[op] = backend
        else:
            name = backend
    return _checked(name, by_op)


# read once: code compiled under one request stays valid
_requests = _parsed(os.environ.get("VATT_FAST_BACKEND", ""))


def requested(op: str) -> str:
    """The backend asked for ``op`` by ``use_backend`` or the environment, "" for automatic."""
    return _requests.get(op, "")


@contextlib.contextmanager
def use_backend(name: str = "", /, **by_op: str) -> Iterator[None]:
    """Run ops on the backends asked for. One that cannot run a call raises its reason; no other
    backend takes its place.

        with use_backend("reference"): ...
        with use_backend(attention="torch_sdpa", contrastive_lse="reference"): ...

    Args:
        name: a backend for every op. An op that has no such backend raises when it is called.
            "" chooses automatically. "plain" runs each op's ``plain.py``, on torch's own ops.
        **by_op: a backend for some ops; the others follow ``name``. The environment variable
            VATT_FAST_BACKEND says the same as "name" or "op=name,op=name", and is read when the
            package is imported.

    Raises:
        ValueError: unknown op or backend.
    """
    global _requests
    before, _requests = _requests, _checked(name, by_op)
    try:
        yield
    finally:
        _requests = before


# -- platform of JAX code ------------------------------------------------------------------------

_platform = ""


def jax_platform() -> str:
    """What JAX code traced now will run on: "tpu", "cpu" or "gpu".

    JAX's default backend, unless ``lowering_for`` says otherwise.
    """
    if _platform:
        return _platform
    import jax

    return jax.default_backend()


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Trace JAX code for another platform, e.g. "tpu" to compile ahead of time on a CPU.

    Backends are chosen when a function is traced, so give ``jax.jit`` a function that was not
    traced before.
    """
    global _platform
    before, _platform = _platform, platform
    try:
        yield
    finally:
        _platform = before


# -- interpreter of Pallas kernels ---------------------------------------------------------------

_interpreter: Any = None


def interpreter() -> Any:
    """What ``interpreting_with`` gave, or None."""
    return _interpreter


@contextlib.contextmanager
def interpreting_with(params: Any) -> Iterator[None]:
    """Interpret Pallas kernels by ``params``, e.g. ``pltpu.InterpretParams(random_seed=1)``.

    Has no effect on a TPU. For tests.
    """
    global _interpreter
    before, _interpreter = _interpreter, params
    try:
        yield
    finally:
        _interpreter = before


# -- tiles of GPU kernels ------------------------------------------------------------------------

_tiles: dict[str, dict[str, int]] = {}


def forced_tiles(kernel: str) -> dict[str, int] | None:
    """The tiles that ``force_tiles`` gave a kernel, or None."""
    return _tiles.get(kernel)


@contextlib.contextmanager
def force_tiles(**by_kernel: dict[str, int]) -> Iterator[None]:
    """Run the kernels named with these tiles, whatever the shape. For tuning and for tests.

    with force_tiles(attention_backward={"ONE_PASS": 1}): ...
    """
    global _tiles
    before, _tiles = _tiles, _tiles | by_kernel
    try:
        yield
    finally:
        _tiles = before
