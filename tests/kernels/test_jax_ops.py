"""The battery of test_ops.py on the JAX side, by the same rule.

Every op, backend and parity case, outputs and every gradient.
Pallas kernels are interpreted where there is no TPU.
"""

import zlib

import pytest
import torch
from op_battery import PARITY

pytest.importorskip("jax", reason="the JAX ops need jax")

import jax_calls

from vatt_fast.kernels import use_backend
from vatt_fast.kernels.backends import JAX_BACKENDS
from vatt_fast.kernels.cases import make
from vatt_fast.kernels.ops import OPS
from vatt_fast.kernels.parity import (
    assert_as_good_as_plain,
    cancelled_rows,
    draw_seeds,
    expected,
)
from vatt_fast.kernels.patch_embed import patchify

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
BATTERY = [
    pytest.param(op, backend, case, id=f"{op}-{backend}-{case.name}")
    for op in OPS
    for backend in JAX_BACKENDS[op]
    for case in PARITY[op]
]


def judged(op, backend, case, dtype, *, without=()):
    """Hold the op on one draw against plain torch, in the same dtype and in fp64."""
    inputs = make(case, dtype, seed=zlib.crc32(case.name.encode()))
    if op == "patch_embed" and inputs["patch"] is not None:  # the JAX op takes rows
        inputs |= {"patches": patchify(inputs["patches"], inputs["patch"]), "patch": None}
    yardstick, truth = expected(op, inputs, dtype, without=without)
    seeds = draw_seeds([yardstick[name] for name in OPS[op].outputs], dtype)
    with use_backend(**{op: backend}):  # the kernels take every case: a refusal fails
        result = jax_calls.run(op, inputs, seeds, without=without)
    slack = 3.0 if dtype == torch.float32 else 0.5  # XLA adds one by one on a CPU, torch in a tree
    assert_as_good_as_plain(
        result, yardstick, truth, dtype, cancelled_rows(op, inputs), slack_eps=slack
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "backend", "case"), BATTERY)
def test_gradients(op, backend, case, dtype):
    judged(op, backend, case, DTYPES[dtype])


@pytest.mark.parametrize("backend", JAX_BACKENDS["attention"])
def test_attention_whose_lse_nobody_uses(backend):
    judged("attention", backend, PARITY["attention"][0], torch.float32, without=("lse",))
