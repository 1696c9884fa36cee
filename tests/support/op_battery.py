"""The battery's parameters, and its check: what a backend cannot run is skipped with its reason."""

import contextlib

import pytest
import torch

from vatt_fast.kernels import parity, use_backend
from vatt_fast.kernels.backends import BACKENDS as BACKENDS_OF
from vatt_fast.kernels.cases import CASES, tag
from vatt_fast.kernels.ops import OPS

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
PARITY = {
    op: [case for case in cases.values() if tag(case) == "parity"] for op, cases in CASES.items()
}
BACKENDS = [(op, backend) for op in OPS for backend in BACKENDS_OF[op]]


def battery(ops=tuple(OPS), cases=PARITY):
    """Parameters (op, backend, case, device), ids op-backend-case."""
    return pytest.mark.parametrize(
        ("op", "backend", "case", "device"),
        [
            pytest.param(
                op,
                backend,
                case,
                device,
                id="-".join((op, backend, case.name, *(() if device == "cpu" else (device,)))),
            )
            for op, backend in BACKENDS
            if op in ops
            for case in cases[op]
            for device in DEVICES
        ],
    )


@contextlib.contextmanager
def on_backend(op, backend):
    """Force the backend. What it cannot run is skipped, with its reason."""
    with skipping_what_cannot_run(), use_backend(**{op: backend}):
        yield


@contextlib.contextmanager
def skipping_what_cannot_run():
    try:
        yield
    except ValueError as error:
        if "cannot run this" in str(error):
            pytest.skip(str(error))
        raise


def judged(op, backend, case, device, dtype, **options):
    """``parity.check``; what the backend cannot run is skipped, with its reason."""
    with skipping_what_cannot_run():
        return parity.check(op, backend, case, dtype, device, **options)
