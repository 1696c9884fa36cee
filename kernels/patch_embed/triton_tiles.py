"""Tile sizes of the Triton patch_embed kernels: pure functions of architecture and shape.

``TUNING`` lists the candidates of every kernel for the offline tuner; a tuned table comes first.
"""

from collections.abc import Callable
from typing import NamedTuple

import triton

from ..tiles import Tiles, family

# rows of all clips, dim columns of the tokens, k values a patch, raw bytes of a value

_MULTIPROCESSORS = {
    "sm_80": 108,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
}
_SHARED_KIB = {"sm_80": 163, "sm_89": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


# -- what a table's entry says -----------------------------------------------------------------


class ForwardChoice(NamedTuple):
    """How the forward runs: packed, or fused, with the weight folded in the kernel or before."""

    packed: bool
    fold: bool
    blocks: Tiles  # what the fused kernel is launched with

    @classmethod
    def of(cls, entry: Tiles) -> "ForwardChoice":
        blocks = {name: n for name, n in entry.items() if name not in ("PACKED", "FOLD")}
        return cls(bool(entry.get("PACKED")), bool(entry.get("FOLD")), blocks)


class WeightChoice(NamedTuple):
    """How d_weight is summed: packed, or fused, in ``chunks`` parts of the rows."""

    packed: bool
    chunks: int
    blocks: Tiles  # what the fused kernel is launched with

    @classmethod
    def of(cls, entry: Tiles) -> "WeightChoice":
        blocks = {name: n for name, n in entry.items() if name not in ("PACKED", "CHUNKS")}
        return cls(bool(entry.get("PACKED")), entry.get("CHUNKS", 1), blocks)


# -- heuristics --------------------------------------------------------------------------------


def _stages(device: str, bytes_a_stage: int, most: int) -> int:
    """As many stages as shared memory holds, with a margin; AMD keeps one stage less."""
    if device.startswith("gfx"):
        return 2
    return max(2, min(most, _SHARED_KIB[device] * 1024 * 9 // 10 // bytes_a_stage))


def _cheapest(
    shapes: dict[tuple[int, int], float], device: str, rows: int, columns: int
) -> tuple[int, int]:
    """The tile whose waves over the device take least.

    ``shapes`` gives the throughput of each one once the device is full.
    """
    multiprocessors = _MULTIPROCESSORS[device]

    def cost(shape):
        height, width = shape
        programs = triton.cdiv(rows, height) * triton.cdiv(columns, width)
        return triton.cdiv(programs, multiprocessors) * height * width / shapes[shape]

    return min(shapes, key=cost)


def forward_tiles(
    device: str,
    itemsize: int,
    rows: int,
    dim: int,
    k: int,
    raw: int,
    padded: bool = False,
    gather: bool = False,
    position: bool = True,
) -> Tiles:
    """Fused wherever Triton's product comes near cuBLAS's.

    Packing moves 3 bytes a uint8 value, and the tokens twice more. At k 3072 and dim 1024 on an
    H200 that is about a third of the product's time (predicted). A gather with conversion inside
    the product loses as much there: a draw, and fused needs no memory. Packed where Triton has no
    match for the library: fp32 without tensor cores, and Blackwell's. And where the grid passes a
    clip's end: the masks spill in the product's loop (sm_90, triton 3.7.1).
    """
    device = family(device)
    if (itemsize == 4 and dim * k >= 2**16) or (device == "sm_100" and k >= 1024 and dim >= 512):
        return dict(PACKED=1)
    if padded and k > 256:
        return dict(PACKED=1)
    fold = int(k <= 256)  # every program folds its part again: cheaper than a launch
    if itemsize == 4:
        height, width, values, warps, stages = 64, 64, 32, 4, 2
    elif k <= 256:  # bound by memory
        height, width, values, warps, stages = 64, 64 if dim <= 64 else 128, 32, 4, 3
        # masks take the registers of half a tile; on sm_120 it spills without (triton 3.5.1)
        if padded or k % values or device == "sm_120":
            warps = 8
    else:
        throughputs = {(128, 128): 0.9, (64, 128): 0.7, (64, 64): 0.45}
        height, width = _cheapest(throughputs, device, rows, dim)
        # operands that live in registers spill at 64, and without positions sm_90's products would
        # wait for one another (C7515, triton 3.7.1)
        values = 64 if device == "sm_100" or (device == "sm_90" and position) else 32
        stages = _stages(device, height * values * raw + width * values * 2, 4)
        # with four warps the smaller tile spills on sm_120 (triton 3.7.1)
        many = 64 * 128 if device == "sm_120" else 128 * 128
        warps = 8 if height * width >= many else 4
    return dict(
        PACKED=0,
        FOLD=fold,
        BLOCK_ROWS=height,
        BLOCK_DIM=width,
        BLOCK_VALUES=values,
        num_warps=warps,
        num_stages=stages,
    )


def weight_tiles(
    device: str,
    itemsize: int,
    rows: int,
    dim: int,
    k: int,
    raw: int,
    padded: bool = False,
    gather: bool = False,
    position: bool = True,
) -> Tiles:
    """Packed at large k and dim.

    There the converted rows pass through shared memory at every step, and no product overlaps
    that. Otherwise chunks fill the device: each costs a write and a read of (dim, k) in fp32.
    Steps are so short, and stages so many, that copies are in flight beside a product and as many
    programs fit as with two stages. A gather takes two stages more: the indices are on their way
    before the rows.
    """
    device = family(device)
    large = device != "gfx942" and k >= 1024 and dim >= 512
    # tf32's transposed operand would be loaded 4 bytes at a time
    if (itemsize == 4 and dim * k >= 2**14) or large:
        return dict(PACKED=1)
    if itemsize == 4:
        side, height, warps, stages = 64, 32, 4, 2
    elif dim <= 64 or k <= 64 or device == "gfx942":
        side, height, warps, stages = 64, 32 if device == "gfx942" else 64, 4, 2
    else:
        # uint8 and products from shared memory: a step of 64 has fewer instructions a row
        height = 64 if raw == 1 and device in ("sm_90", "sm_100") else 32
        side, warps, stages = 128, 8, 5 if gather else 3
    programs = triton.cdiv(dim, side) * triton.cdiv(k, side)
    most = min(_MULTIPROCESSORS[device] // programs, triton.cdiv(rows, 4 * height), 32)
    return dict(
        PACKED=0,
        CHUNKS=max(1, most),
        BLOCK_DIM=side,
        BLOCK_VALUES=side,
        BLOCK_ROWS=height,
        num_warps=warps,
        num_stages=stages,
    )


def add_tiles(
    device: str,
    itemsize: int,
    rows: int,
    dim: int,
    k: int,
    raw: int,
    padded: bool = False,
    gather: bool = False,
    position: bool = True,
) -> Tiles:
    return dict(BLOCK_ROWS=8, BLOCK_DIM=min(triton.next_power_of_2(dim), 512), num_warps=4)


HEURISTICS: dict[str, Callable[..., Tiles]] = {
    "patch_embed_forward": forward_tiles,
    "patch_embed_weight": weight_tiles,
    "patch_embed_add": add_tiles,
}


def fold_tiles(k: int) -> Tiles:
    values = min(triton.next_power_of_2(k), 1024)
    return dict(BLOCK_DIM=max(1, 1024 // values), BLOCK_VALUES=values, num_warps=4)


def pack_tiles(k: int) -> Tiles:
    """About 4 Ki values a program: at 16 bytes a load, 2 loads of uint8 a thread.

    Rows are long enough to stay in whole sectors.
    """
    values = min(triton.next_power_of_2(k), 1024)
    return dict(BLOCK_ROWS=max(1, 4096 // values), BLOCK_VALUES=values, num_warps=4)


def sums_tiles(rows: int, dim: int) -> Tiles:
    columns = min(triton.next_power_of_2(dim), 128)
    return dict(BLOCK_ROWS=16 if rows > 512 else 4, BLOCK_DIM=columns, num_warps=4)


def finish_tiles(k: int) -> Tiles:
    values = min(triton.next_power_of_2(k), 1024)
    return dict(BLOCK_DIM=max(1, 2048 // values), BLOCK_VALUES=values, num_warps=4)


# -- candidates of the tuner -------------------------------------------------------------------


def _product(rows: int, dim: int, values: int, warps: int, stages: int) -> Tiles:
    return dict(
        BLOCK_ROWS=rows, BLOCK_DIM=dim, BLOCK_VALUES=values, num_warps=warps, num_stages=stages
    )


TUNING: dict[str, list[Tiles]] = {
    "patch_embed_forward": [
        dict(PACKED=1),
        *(
            dict(PACKED=0, FOLD=0) | _product(rows, dim, values, warps, stages)
            for rows, dim, warps in (
                *((128, 256, 8), (128, 128, 8), (128, 128, 4)),
                *((64, 256, 8), (64, 128, 4), (64, 64, 4)),
            )
            for values, stages in ((64, 3), (64, 4), (32, 4))
        ),
        *(
            dict(PACKED=0, FOLD=1) | _product(rows, dim, 64, 4, 2)
            for rows, dim in ((64, 128), (64, 64), (32, 128), (128, 64))
        ),
    ],
    "patch_embed_weight": [
        dict(PACKED=1),
        *(
            dict(PACKED=0, CHUNKS=chunks) | _product(rows, dim, values, warps, stages)
            for rows, dim, values, warps, stages in (
                *((64, 128, 128, 8, 3), (64, 128, 128, 8, 5), (32, 128, 128, 8, 5)),
                *((64, 128, 128, 4, 3), (64, 64, 128, 4, 3), (64, 128, 64, 4, 3)),
            )
            for chunks in (1, 2, 4, 8, 16)
        ),
    ],
    "patch_embed_add": [
        dict(BLOCK_ROWS=rows, BLOCK_DIM=dim, num_warps=warps)
        for rows, dim in ((4, 512), (8, 512), (16, 256), (4, 1024))
        for warps in (4, 8)
    ],
    "patch_embed_fold": [
        dict(BLOCK_DIM=dim, BLOCK_VALUES=values, num_warps=4)
        for dim in (1, 2, 4)
        for values in (512, 1024, 2048)
    ],
    "patch_embed_pack": [
        dict(BLOCK_ROWS=rows, BLOCK_VALUES=values, num_warps=warps)
        for rows, values in ((4, 1024), (8, 512), (16, 256), (2, 1024))
        for warps in (4, 8)
    ],
    "patch_embed_sums": [
        dict(BLOCK_ROWS=rows, BLOCK_DIM=dim, num_warps=4)
        for rows in (4, 8, 16, 32)
        for dim in (64, 128, 256)
    ],
    "patch_embed_finish": [
        dict(BLOCK_DIM=rows, BLOCK_VALUES=values, num_warps=4)
        for rows in (1, 2, 4)
        for values in (512, 1024)
    ],
}
