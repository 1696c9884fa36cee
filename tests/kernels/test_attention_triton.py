"""Attention's Triton kernels: tile rules, and what the battery's small cases do not reach."""

import mmap

import pytest
import torch
from op_battery import DEVICES, DTYPES, judged

from vatt_fast.kernels import attention, use_backend
from vatt_fast.kernels.cases import AttentionCase, make
from vatt_fast.kernels.settings import force_tiles

pytest.importorskip("triton", reason="the kernels import triton, which is not installed")
from vatt_fast.kernels.attention import triton_gpu, triton_small, triton_tiles

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
            triton_tiles.backward_plan(name, HALF, *shape),
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
        ("gfx1100", 64, False, 0),
        ("sm_80", 32, False, 1),
        ("sm_80", 64, False, 0),
        ("sm_89", 64, False, 0),
        ("sm_121", 64, False, 0),
        ("sm_90", 128, False, 0),
        ("sm_90", 64, True, 0),
    ],
)
def test_the_backward_takes_one_pass_only_where_registers_hold_it(arch, head_dim, bias, one_pass):
    plan = triton_tiles.backward_plan(arch, HALF, 785, 785, head_dim, bias)
    assert plan == {"ONE_PASS": one_pass}


@pytest.mark.parametrize(
    ("length", "rows"), [(785, 128), (1569, 128), (393, 16), (256, 0), (160, 128)]
)
def test_the_last_query_tile_is_narrow_or_whole(length, rows):
    assert triton_tiles.last_tile(length, 128) == rows


@pytest.mark.parametrize(
    ("arch", "queries", "keys", "bias", "fits"),
    [
        ("sm_90", 64, 64, False, True),
        ("sm_90", 65, 17, False, False),
        ("sm_80", 17, 64, False, True),
        ("sm_80", 64, 17, False, False),
        ("sm_80", 33, 33, False, False),
        ("gfx942", 33, 33, False, True),
        ("sm_90", 17, 17, True, True),
        ("sm_90", 17, 33, True, False),
    ],
)
def test_one_program_takes_the_scores_that_its_registers_hold(arch, queries, keys, bias, fits):
    case = AttentionCase("short", 1, queries, keys, 1, 64, bias=bias)
    inputs = make(case, HALF)
    assert triton_small.fits(arch, inputs["q"], inputs["k"], inputs["bias"]) == fits


@pytest.mark.parametrize(
    ("dtype", "queries", "keys", "head_dim", "warps"),
    [
        (torch.bfloat16, 5, 5, 64, 2),
        (torch.bfloat16, 17, 17, 64, 4),
        (torch.float32, 17, 17, 64, 8),
        (torch.bfloat16, 17, 17, 128, 8),
        (torch.bfloat16, 64, 64, 64, 8),
    ],
)
def test_one_programs_warps_grow_with_its_tiles(dtype, queries, keys, head_dim, warps):
    assert triton_tiles.backward_small_tiles(dtype, queries, keys, head_dim)["num_warps"] == warps


@pytest.mark.parametrize(
    ("arch", "head_dim", "bias", "stages"),
    [
        ("sm_90", 64, False, 3),
        ("sm_103", 64, True, 3),
        ("sm_90", 128, False, 2),  # a third stage would leave shared memory for one program
        ("sm_100", 128, True, 3),
        ("sm_80", 64, False, 2),
    ],
)
def test_the_forward_copies_ahead_where_shared_memory_allows(arch, head_dim, bias, stages):
    tiles = triton_tiles.forward_tiles(arch, HALF, 785, 785, head_dim, bias)
    assert tiles["num_stages"] == stages


def test_a_call_asks_the_driver_for_its_architecture_once(monkeypatch):
    """The answer costs some microseconds, and a text's attention runs for no more than ten."""
    asked = []
    monkeypatch.setattr(triton_gpu, "arch", lambda: asked.append(1) or "sm_90")
    inputs = make(AttentionCase("two_passes", 1, 5, 37, 1, 72))
    out, lse = triton_gpu.forward(**inputs)
    assert len(asked) == 1
    q, k, v = (inputs.pop(name) for name in "qkv")
    triton_gpu.backward(out, None, q, k, v, out, lse, **inputs | {"deterministic": True})
    assert len(asked) == 2


# -- numerics --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
@pytest.mark.parametrize("device", DEVICES)
def test_full_and_last_query_tiles_share_one_masked_code(dtype, device):
    case = AttentionCase("half_a_tile_left", 1, 100, 17, 2, 16, num_keys=(9,))
    tiles = dict(BLOCK_T=64, BLOCK_S=16, num_warps=4, num_stages=2)
    assert triton_tiles.last_tile(100, 64) == 64
    with force_tiles(attention_forward=tiles):
        judged("attention", "triton_gpu", case, device, DTYPES[dtype])


@pytest.mark.parametrize(
    ("rows", "columns", "one_pass"), [(32, 16, 0), (16, 32, 1), (64, 64, 1)], ids=str
)
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias_mask"])
def test_causal_walks_meet_the_diagonal_in_any_tiles(rows, columns, one_pass, bias):
    """Several blocks of keys to a tile of queries, several tiles to a block, a tail beyond both."""
    keys = (75, 40) if bias else None
    case = AttentionCase("", 2, 75, 75, 1, 16, bias=bias, num_keys=keys, causal=True)
    tiles = dict(BLOCK_T=rows, BLOCK_S=columns, num_warps=4, num_stages=1)
    kernels = ("forward", "backward_keys", "backward_queries", "backward_bias")
    forced = {f"attention_{name}": tiles for name in kernels}
    with force_tiles(**forced, attention_backward={"ONE_PASS": one_pass}):
        judged("attention", "triton_gpu", case, "cpu", torch.float32)


def test_causal_queries_are_taken_64_at_a_time():
    """128 of them would meet two blocks on the diagonal, with registers for one program."""
    shape = ("sm_90", HALF, 785, 785, 64, False)
    assert triton_tiles.forward_tiles(*shape)["BLOCK_T"] == 128
    assert triton_tiles.forward_tiles(*shape, causal=1)["BLOCK_T"] == 64


ROW = 2**27  # elements between two rows: 16 rows on, an offset of 32 bits is negative


def far_apart(memory, tensor, place):
    """A copy of ``tensor`` in the middle of ``memory``, its rows (axis 1) ROW elements apart.

    Where a row's offset overflows, it still lies in the memory, which holds zeros there.
    """
    view = memory.view(tensor.dtype)
    strides = [ROW if axis == 1 else stride for axis, stride in enumerate(tensor.stride())]
    first = view.numel() // 2 + 4096 * place // tensor.itemsize  # no two share a byte
    return view.as_strided(tensor.shape, strides, first).copy_(tensor)


@pytest.mark.parametrize(
    ("length", "head_dim"), [(17, 16), (33, 72)], ids=["small_backward", "two_passes"]
)
def test_rows_may_lie_further_apart_than_32_bits_reach(length, head_dim):
    """In address space that no page backs, except under the rows."""
    case = AttentionCase("far", 1, length, 17, 1, head_dim, bias=True, num_keys=(16,))
    inputs = make(case, torch.float16)
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = torch.frombuffer(
        mmap.mmap(-1, 2 * (length + 1) * ROW * 4, flags=flags), dtype=torch.uint8
    )
    names = ("q", "k", "v", "bias", "key_mask")
    far = inputs | {name: far_apart(memory, inputs[name], i) for i, name in enumerate(names)}

    def results(given):
        leaves = {name: given[name].detach().requires_grad_() for name in ("q", "k", "v", "bias")}
        out, lse = attention(**given | leaves, deterministic=True)
        loss = (out.float() * torch.arange(head_dim)).sum() + lse.sum()
        return out, lse, *torch.autograd.grad(loss, list(leaves.values()))

    with use_backend(attention="triton_gpu"):
        for near, distant in zip(results(inputs), results(far), strict=True):
            torch.testing.assert_close(distant, near, rtol=0, atol=0)
