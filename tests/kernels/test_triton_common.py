"""What the Triton kernels share: where they can run, for which architecture, at which precision."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels import triton, which is not installed")

from vatt_fast.kernels import triton_common


@pytest.fixture
def compiled_for(monkeypatch):
    """As where kernels are compiled, for the architecture named."""

    def target(arch):
        monkeypatch.setattr(triton_common, "interpreted", lambda: False)
        monkeypatch.setattr(triton_common, "arch", lambda: arch)

    return target


@pytest.fixture
def matmul():
    """torch's switch, as it was before the test afterwards."""
    switch = torch.backends.cuda.matmul
    before = switch.fp32_precision
    yield switch
    switch.fp32_precision = before


@pytest.mark.parametrize(
    "switch",
    [
        lambda matmul: setattr(matmul, "fp32_precision", "tf32"),
        lambda matmul: setattr(matmul, "allow_tf32", True),
        lambda matmul: torch.set_float32_matmul_precision("high"),
    ],
    ids=["fp32_precision", "allow_tf32", "set_float32_matmul_precision"],
)
@pytest.mark.parametrize(
    ("arch", "precision"),
    [
        *((f"sm_{number}", "tf32") for number in (80, 90, 103, 121)),
        ("gfx942", "tf32"),
        *((name, "ieee") for name in ("gfx90a", "gfx950", "gfx1100", "gfx1201")),
    ],
)
def test_products_round_to_tf32_where_torch_does_and_the_device_can(
    compiled_for, matmul, switch, arch, precision
):
    compiled_for(arch)
    assert triton_common.dot_precision(torch.float32) == "ieee"
    switch(matmul)
    try:
        assert triton_common.dot_precision(torch.float32) == precision
        assert triton_common.dot_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision("highest")
