"""The one place that decides which backend runs an op, and can say why.

A backend is a module ``kernels/<op>/<backend>.py`` with ``forward``, ``backward`` and ``unsupported(*tensors, **options) -> str | None``,
a pure function of shapes, dtypes, device and installed parts. Adding one is that file and its rows in PREFERENCE.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from . import native

OPS = ("attention", "drop_token", "contrastive_lse", "patch_embed")
_FEW_TOKENS = {
    "avx2": 48,
    "avx512": 256,
    "avx512_bf16": 512,
    "amx_bf16": 256,
}  # 512: on Zen 5, where torch's fp32 is slower


class Row(NamedTuple):
    """A backend of an op, and where it is the faster choice: ``when(mode, *tensors, **options)``, mode "fwd" or "bwd"; None: everywhere."""

    op: str
    backend: str
    when: Callable[..., bool] | None = None


def _short(mode, q, k, v, **options) -> bool:
    """Up to the lengths at which the tail of a tile weighs more than its inside; beyond, the libraries' kernels are ahead (NOTES.md)."""
    return k.shape[1] <= 2048


def _backward(mode, *tensors, **options) -> bool:
    """One pass writes gradients and zeros alike; forward, a gather of rows is a gather of rows (predicted, NOTES.md)."""
    return mode == "bwd"


def _not_yet_measured(mode, *tensors, **options) -> bool:
    """No measurement has shown it to be the faster choice: it runs when asked for."""
    return False


def _bf16_or_few_tokens(mode, q, k, v, **options) -> bool:
    """bf16: with AVX-512 BF16 always; on AMX, for a query or two the packing of all keys would be most of the work (predicted). fp32: up to
    where splitting products for the threads costs the libraries more than it gains (measured on two threads). See NOTES.md."""
    if q.dtype == torch.bfloat16:
        return q.shape[1] >= 16 or native.level() == "avx512_bf16"
    return max(q.shape[1], k.shape[1]) <= _FEW_TOKENS.get(native.level(), 0)


def _vectorised(mode, *tensors, **options) -> bool:
    """Its passes are written for wide registers; without them it runs when asked for."""
    return native.level() != "base"


def _queries_fill_lanes(mode, q, k, v, **options) -> bool:
    """A TPU's register has 128 lanes of queries. Scores of a sentence, or of AGG alone, are few: XLA fuses them with what surrounds them, and
    the kernel's order of axes would cost copies (predicted, NOTES.md)."""
    return (q.shape[1] if isinstance(q, torch.Tensor) else q.shape[2]) >= 64


def torch_xla_has_a_tpu() -> bool:
    """What torch_xla runs on; elsewhere it lowers to plain XLA, and these kernels are only interpreted."""
    import torch_xla.runtime

    return torch_xla.runtime.device_type() == "TPU"


def _on_torch_xla(row: Row) -> Row:
    """The row, where torch_xla runs a TPU."""
    return row._replace(
        when=lambda mode, *args, **options: (
            torch_xla_has_a_tpu() and (row.when is None or row.when(mode, *args, **options))
        )
    )


_PALLAS = tuple(
    Row(op, "pallas_tpu", _queries_fill_lanes if op == "attention" else None) for op in OPS
)
_REFERENCES = tuple(Row(op, "reference") for op in OPS)

# (framework, device): best first. What is not listed here still runs when asked for by name.
PREFERENCE: dict[tuple[str, str], tuple[Row, ...]] = {
    ("torch", "cpu"): (
        Row("attention", "native_cpu", _bf16_or_few_tokens),
        Row("attention", "torch_sdpa"),
        Row("drop_token", "native_cpu"),
        Row("contrastive_lse", "native_cpu"),
        Row("patch_embed", "native_cpu", _vectorised),
        *_REFERENCES,
    ),
    ("torch", "cuda"): (
        Row("attention", "triton_gpu", _short),
        Row("attention", "torch_sdpa"),
        Row("attention", "triton_gpu"),
        Row("attention", "torch_cudnn", _not_yet_measured),
        Row("attention", "flash_attn", _not_yet_measured),
        Row("drop_token", "triton_gpu", _backward),
        Row("contrastive_lse", "triton_gpu"),
        Row("patch_embed", "triton_gpu"),
        *_REFERENCES,
    ),
    ("torch", "xla"): (*map(_on_torch_xla, _PALLAS), *_REFERENCES),
    ("torch", "tpu"): (*_PALLAS, *_REFERENCES),
    ("jax", "tpu"): (*_PALLAS, *_REFERENCES),
}


def _backends(framework: str) -> dict[str, tuple[str, ...]]:
    rows = [row for (each, _), rows in PREFERENCE.items() if each == framework for row in rows]
    return {op: tuple(dict.fromkeys(row.backend for row in rows if row.op == op)) for op in OPS}


BACKENDS = _backends("torch")
JAX_BACKENDS = _backends("jax")


def _parse(request: str) -> dict[str, str]:
    """ "name" (every op) or "op=name,op=name" -> {op: name}."""
    asked: dict[str, str] = {}
    for part in filter(None, request.replace(" ", "").split(",")):
        op, equals, name = part.rpartition("=")
        if equals and op not in OPS:
            raise ValueError(
                f"unknown op {op!r} in backend request {request!r}; ops are {', '.join(OPS)}"
            )
        known = tuple(
            dict.fromkeys(
                name for o in ([op] if equals else OPS) for name in (*BACKENDS[o], *JAX_BACKENDS[o])
            )
        )
        if name not in known:
            raise ValueError(
                f"unknown backend {name!r} in request {request!r}; {op or 'the ops'} have {', '.join(known)}"
            )
        asked |= {op: name} if equals else dict.fromkeys(OPS, name)
    return asked


_forced = _parse(
    os.environ.get("VATT_FAST_BACKEND", "")
)  # read once, so that compiled graphs stay valid


def requested(op: str) -> str:
    """Name asked for by ``use_backend`` or the environment, "" for automatic; ops pass it on as a plain string argument."""
    return _forced.get(op, "")


@contextlib.contextmanager
def use_backend(request: str) -> Iterator[None]:
    """Run ops on the backends asked for, or raise their objection; never a silent substitute.

    Args:
        request: a backend for every op ("reference"), or for some ("attention=torch_sdpa,contrastive_lse=reference"; the others choose
            automatically). A bare name that an op does not have makes that op raise. "" chooses automatically.
            The environment variable VATT_FAST_BACKEND takes the same form and is read when the package is imported.

    Raises:
        ValueError: unknown op or backend.
    """
    global _forced
    before, _forced = _forced, _parse(request)
    try:
        yield
    finally:
        _forced = before


def choose(op: str, mode: str, name: str, *tensors, **options):
    """The module that runs ``op``: ``name`` if given, else the first preferred one without objection, at last the reference."""
    if name:
        if reason := _objection(op, name, *tensors, **options):
            raise ValueError(f"{op}: backend {name!r} cannot run this: {reason}")
        return _backend(op, name, tensors[0])
    for row in _rows(op, tensors[0]):
        preferred = row.when is None or row.when(mode, *tensors, **options)
        if preferred and not _objection(op, row.backend, *tensors, **options):
            return _backend(op, row.backend, tensors[0])
    return _module(op, "reference")


def explain(op: str, *tensors, **options) -> dict[str, str]:
    """For every backend of the framework what would happen to this call: its objection, where it is preferred, or "runs when asked for".

    ``op`` is a folder's name ; tensors and options are the op's own.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; ops are {', '.join(OPS)}")
    chosen = {
        mode: choose(op, mode, "", *tensors, **options).__name__.rpartition(".")[2]
        for mode in ("fwd", "bwd")
    }
    verdicts = {}
    for backend in (BACKENDS if _framework(tensors[0]) == "torch" else JAX_BACKENDS)[op]:
        modes = [mode for mode, name in chosen.items() if name == backend]
        verdicts[backend] = _objection(op, backend, *tensors, **options) or (
            f"preferred ({', '.join(modes)})" if modes else "runs when asked for"
        )
    return verdicts


_jax_platform = ""


def jax_platform() -> str:
    """What JAX code traced now will run on: "tpu", "cpu" or "gpu"; JAX's default backend unless ``lowering_for`` says otherwise."""
    if _jax_platform:
        return _jax_platform
    import jax

    return jax.default_backend()


@contextlib.contextmanager
def lowering_for(platform: str) -> Iterator[None]:
    """Trace JAX code for another platform than this machine's, e.g. "tpu" to compile ahead of time on a CPU.

    Backends are chosen when a function is traced: give ``jax.jit`` a function that was not traced before.
    """
    global _jax_platform
    before, _jax_platform = _jax_platform, platform
    try:
        yield
    finally:
        _jax_platform = before


def native_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 in hardware; elsewhere autocast would only slow it down."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and (
        torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype asked for by an active autocast; None outside one, and on devices that know none (meta)."""
    if torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type):
        return torch.get_autocast_dtype(device.type)
    return None


def check_one_device(**tensors) -> None:
    """Raise ValueError where the given tensors, None ones aside, lie on more than one device: a kernel would read foreign memory."""
    if len({tensor.device for tensor in tensors.values() if tensor is not None}) > 1:
        devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
        raise ValueError(
            f"{', '.join(f'{name} is on {device}' for name, device in devices.items())}; move them to one device"
        )


def without_autocast(implementation):
    """Inside an op the caller's autocast is off: the wrapper has cast what should be cast, backends choose the rest. And the tensors' GPU
    is the current one: Triton launches there, whichever the tensors are on."""

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


def _framework(tensor) -> str:
    return "torch" if isinstance(tensor, torch.Tensor) else "jax"


def _rows(op: str, tensor) -> tuple[Row, ...]:
    framework = _framework(tensor)
    device = tensor.device.type if framework == "torch" else jax_platform()
    return tuple(row for row in PREFERENCE.get((framework, device), _REFERENCES) if row.op == op)


def _objection(op: str, name: str, *tensors, **options) -> str | None:
    known = (BACKENDS if _framework(tensors[0]) == "torch" else JAX_BACKENDS)[op]
    if name not in known:
        return f"{op} has no such backend; it has {', '.join(known)} (ask per op: VATT_FAST_BACKEND={op}=...)"
    try:
        module = _backend(op, name, tensors[0])
    except ModuleNotFoundError as error:
        if (error.name or __package__).startswith(
            __package__
        ):  # ours is missing: a bug, not a part to install
            raise
        return f"it needs {error.name}, which is not installed"
    return module.unsupported(*tensors, **options)


def _backend(op: str, name: str, tensor):
    """The backend's module; torch tensors reach the JAX kernels through an adapter with the same three functions."""
    if name == "pallas_tpu" and _framework(tensor) == "torch":
        from . import xla

        return xla.adapter(op)
    return _module(op, name)


@functools.cache
def _module(op: str, name: str):
    return importlib.import_module(f"{__package__}.{op}.{name}")
