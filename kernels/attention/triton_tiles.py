"""Tile sizes of the Triton attention kernels: pure functions of architecture, dtype and shape.

``TUNING`` lists the candidates of every kernel for the offline tuner; a tuned table comes first.
"""

import functools

import torch

from ..tiles import Tiles

# T queries, S keys, D head_dim. What depends on a call's shape is remembered: it is asked at every
# call, and must not be changed by the caller.


def family(arch: str) -> int:
    """Major compute capability: 9 of sm_90, 10 of sm_103, 12 of sm_121; 0 of AMD's."""
    return int(arch[3:]) // 10 if arch.startswith("sm_") else 0


def reads_shared(arch: str) -> bool:
    """Products are asynchronous and read their operands from shared memory, not from registers.

    So it is on Hopper and the large Blackwells, which also have the most shared memory.
    """
    return family(arch) in (9, 10, 11)


def roomy(arch: str) -> bool:
    """Two tiles of 64 by 64 scores leave registers for more: AMD's CDNA has twice as many."""
    return reads_shared(arch) or arch.startswith("gfx9")


def dot_size(size: int) -> int:
    """The smallest power of two that covers ``size`` and that tl.dot takes: at least 16."""
    return max(16, 1 << (size - 1).bit_length())


def tail(length: int, block: int) -> int:
    """Width of a walk's last, masked step: 0, or the smallest power of two from 16 on."""
    rest = length % block
    return dot_size(rest) if rest else 0


def last_tile(T: int, block: int) -> int:
    """Rows of the forward's last query tile: 0, 16, or a whole block, masked.

    Half a block would take a whole one's time, because the warps then compute the same rows
    twice, and the registers of the worse of two versions.
    """
    rows = tail(T, block)
    return block if rows >= 32 else rows


def walk(axis: str, length: int, blocks: Tiles) -> dict[str, int | bool]:
    """Compile-time constants of a walk along an axis: any full block, and the width of the tail."""
    block = blocks[f"BLOCK_{axis}"]
    return {f"FULL_{axis}": block <= length, f"TAIL_{axis}": tail(length, block)}


def _covering(length: int, largest: int) -> int:
    """The smallest power of two from 16 on that covers ``length``, at most ``largest``."""
    return min(dot_size(length), largest)


# -- forward -----------------------------------------------------------------------------------


@functools.cache
def forward_tiles(
    arch: str, dtype: torch.dtype, T: int, S: int, D: int, bias: bool, causal: int = 0
) -> Tiles:
    """128 queries where there are many: 64 would read each key twice as often, and wait for L2.

    Causal ones would meet two blocks of keys on the diagonal, with registers for one program only.

    64 keys need few registers. So several programs share a multiprocessor, and the exponentials
    of one overlap with the products of another.
    """
    wide = dot_size(D) > 64
    if dtype == torch.float32:
        rows = _covering(T, 32 if wide else 64)
        return dict(BLOCK_T=rows, BLOCK_S=_covering(S, 32), num_warps=4, num_stages=1)
    columns = _covering(S, 32 if wide and (bias or not roomy(arch)) else 64)
    if T <= 32:  # little more than one read of the keys
        warps = 4 if S > 64 else 2
        large = arch == "sm_80" or reads_shared(arch)
        stages = 4 if large else 2 if arch.startswith("gfx") else 3
        return dict(BLOCK_T=_covering(T, 32), BLOCK_S=columns, num_warps=warps, num_stages=stages)
    many = T >= 256 and not (wide or causal or arch.startswith("gfx"))
    rows, warps = (128, 8) if many else (64, 4)
    # two stages copy nothing ahead where products read from shared memory
    ahead = S >= 256 and columns * dot_size(D) <= 64 * 64 and reads_shared(arch)
    stages = 3 if ahead else 2
    return dict(BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages)


# -- backward ----------------------------------------------------------------------------------


def statistics_tiles(D: int) -> Tiles:
    return dict(BLOCK_T=max(16, 4096 // dot_size(D)), num_warps=4)


@functools.cache
def backward_plan(arch: str, dtype: torch.dtype, T: int, S: int, D: int, bias: bool) -> Tiles:
    """ONE_PASS adds to d_q with atomics: two of seven products fewer, for a pass over d_q in fp32.

    Where one or two key tiles cover everything, that gains nothing. Where registers are short, for
    a bias, wide heads or operands that lie in them, it spills within the loop.
    """
    long = T > 64 and S > 256
    return dict(ONE_PASS=int(long and not bias and dot_size(D) <= (64 if roomy(arch) else 32)))


@functools.cache
def backward_keys_tiles(arch: str, dtype: torch.dtype, T: int, S: int, D: int, bias: bool) -> Tiles:
    rows, columns, warps, stages = _backward_block(arch, dtype, S, T, D, bias)
    return dict(BLOCK_S=rows, BLOCK_T=columns, num_warps=warps, num_stages=stages)


@functools.cache
def backward_queries_tiles(
    arch: str, dtype: torch.dtype, T: int, S: int, D: int, bias: bool
) -> Tiles:
    rows, columns, warps, stages = _backward_block(arch, dtype, T, S, D, bias)
    return dict(BLOCK_T=rows, BLOCK_S=columns, num_warps=warps, num_stages=stages)


def _backward_block(
    arch: str, dtype: torch.dtype, owned: int, walked: int, D: int, bias: bool
) -> tuple[int, int, int, int]:
    """Rows a program owns, columns a step takes, warps, stages.

    Two tiles of scores live at once: the registers hold 64 by 64, half of it for wide heads, and
    half of it again beside a bias.
    """
    wide = dot_size(D) > 64
    if dtype == torch.float32:
        return _covering(owned, 32), _covering(walked, 16 if wide else 32), 4, 1
    columns = 64 >> (wide + bias)
    return _covering(owned, 64), _covering(walked, columns), 4, 1 if arch.startswith("gfx") else 2


@functools.cache
def backward_bias_tiles(arch: str, dtype: torch.dtype, T: int, S: int, D: int, bias: bool) -> Tiles:
    largest = 32 if dtype == torch.float32 or dot_size(D) > 64 else 64
    rows, columns = _covering(T, largest), _covering(S, largest)
    return dict(BLOCK_T=rows, BLOCK_S=columns, num_warps=4, num_stages=1)


def backward_small_tiles(dtype: torch.dtype, T: int, S: int, D: int) -> Tiles:
    """The tile itself is given: all queries by all keys. Eight warps where four would spill."""
    scores = dot_size(T) * dot_size(S)
    large = scores * dot_size(D) * dtype.itemsize >= 32 * 32 * 64 * 4
    warps = 8 if large else 4 if scores > 16 * 16 else 2
    return dict(num_warps=warps, num_stages=1)


# -- candidates of the tuner -------------------------------------------------------------------


def _candidates(rows: str, columns: str, choices: list[tuple[int, int, int, int]]) -> list[Tiles]:
    return [
        {rows: r, columns: c, "num_warps": warps, "num_stages": stages}
        for r, c, warps, stages in choices
    ]


_BACKWARD = [
    *((64, columns, 4, stages) for columns in (32, 64, 128) for stages in (1, 2, 3)),
    *((128, columns, 8, stages) for columns in (32, 64, 128) for stages in (1, 2, 3)),
]

TUNING: dict[str, list[Tiles]] = {
    "attention_forward": _candidates(
        "BLOCK_T",
        "BLOCK_S",
        [
            # 128 rows of four warps are left out: they want more registers than there are
            *((128, columns, 8, stages) for columns in (128, 64) for stages in (2, 3)),
            *((64, columns, 4, stages) for columns in (64, 128, 32) for stages in (3, 2, 4, 1)),
            (16, 64, 4, 4),
            (16, 128, 4, 3),
            (32, 32, 1, 1),
            (32, 32, 2, 1),
        ],
    ),
    "attention_backward": [dict(ONE_PASS=0), dict(ONE_PASS=1)],
    "attention_backward_keys": _candidates(
        "BLOCK_S", "BLOCK_T", [*_BACKWARD, (32, 64, 4, 2), (64, 16, 4, 2)]
    ),
    "attention_backward_queries": _candidates(
        "BLOCK_T", "BLOCK_S", [*_BACKWARD, (16, 64, 4, 3), (32, 64, 4, 2)]
    ),
    "attention_backward_bias": _candidates(
        "BLOCK_T",
        "BLOCK_S",
        [(n, m, warps, 1) for n in (32, 64, 128) for m in (32, 64) for warps in (4, 8)],
    ),
    "attention_backward_small": [
        dict(num_warps=warps, num_stages=stages) for warps in (1, 2, 4, 8) for stages in (1, 2)
    ],
}
