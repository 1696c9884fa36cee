"""Attention's Triton kernels: tile rules, and what the battery's small cases do not reach."""

import pytest
import torch
from op_battery import DEVICES, DTYPES, judged

from vatt_fast.kernels.cases import AttentionCase
from vatt_fast.kernels.settings import force_tiles

pytest.importorskip("triton", reason="the kernels import triton, which is not installed")
from vatt_fast.kernels.attention import triton_tiles

HALF = torch.bfloat16


# -- tiles -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "like"), [("sm_103", "sm_100"), ("sm_110", "sm_100"), ("sm_121", "sm_120")]
)
@pytest.mark.parametrize("length", [1, 17, 393, 785])
@pytest.mark.parametrize("head_dim", [32, 64, 128])
@pytest.mark.parametrize("bias", [False, True])
def test_an_architecture_takes_the_tiles_of_its_family(arch, like, length, head_dim, bias):
    def chosen(name):
        shape = (length, 785, head_dim, bias)
        return (
            triton_tiles.forward_tiles(name, HALF, *shape),
            triton_tiles.backward_plan(name, *shape),
            triton_tiles.backward_keys_tiles(name, HALF, *shape),
            triton_tiles.backward_queries_tiles(name, HALF, *shape),
        )

    assert chosen(arch) == chosen(like)


@pytest.mark.parametrize(
    ("arch", "head_dim", "bias", "one_pass"),
    [
        ("sm_90", 64, False, 1),
        ("sm_103", 64, False, 1),
        ("gfx942", 64, False, 1),
        ("sm_80", 32, False, 1),
        ("sm_80", 64, False, 0),
        ("sm_89", 64, False, 0),
        ("sm_121", 64, False, 0),
        ("sm_90", 128, False, 0),
        ("sm_90", 64, True, 0),
    ],
)
def test_the_backward_takes_one_pass_only_where_registers_hold_it(arch, head_dim, bias, one_pass):
    plan = triton_tiles.backward_plan(arch, 785, 785, head_dim, bias)
    assert plan == {"ONE_PASS": one_pass}


@pytest.mark.parametrize(
    ("length", "rows"), [(785, 128), (1569, 128), (393, 16), (256, 0), (160, 128)]
)
def test_the_last_query_tile_is_narrow_or_whole(length, rows):
    assert triton_tiles.last_tile(length, 128) == rows


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_full_and_last_query_tiles_share_one_masked_code(dtype, device):
    case = AttentionCase("half_a_tile_left", 1, 100, 17, 2, 16, num_keys=(9,))
    tiles = dict(BLOCK_T=64, BLOCK_S=16, num_warps=4, num_stages=2)
    assert triton_tiles.last_tile(100, 64) == 64
    with force_tiles(attention_forward=tiles):
        judged("attention", "triton_gpu", case, device, DTYPES[dtype])
