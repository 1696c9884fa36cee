"""What a case costs at least: FLOPs of its products, bytes that must move, the time both need at given ceilings. Pure functions of cases.

``python -m bench.floors`` prints the sheet. Bytes count every input once and every output once; FLOPs count a multiply-add as 2 and are
those the ops register. Attention's sheet also says which share of the scores that a kernel's tiles compute is asked for: lengths such as
393, 785 and 1569 sit just past a tile's edge.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Literal, NamedTuple

from vatt_fast.config import VATTConfig
from vatt_fast.flops import true_flops
from vatt_fast.kernels.cases import (
    CASES,
    AttentionCase,
    Case,
    DropTokenCase,
    NCECase,
    PatchEmbedCase,
    tag,
)
from vatt_fast.kernels.drop_token import num_kept

from .machine import DTYPES, H200, Ceilings

Mode = Literal["fwd", "bwd", "fwd+bwd"]
MODES: tuple[Mode, ...] = ("fwd", "bwd", "fwd+bwd")
_STATISTIC = 4  # bytes of an lse
_INDEX = 4  # bytes of a kept index

# B batch, T queries, S keys, H heads, N patches or clips, K kept, M clips of x


class Work(NamedTuple):
    """FLOPs and bytes of one call."""

    flops: int
    bytes: int

    def __add__(self, other: "Work") -> "Work":  # type: ignore[override]
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def ms(self, ceilings: Ceilings) -> float:
        """The longer of what the products and the bytes need; overlap is perfect in a floor."""
        return max(self.flops / ceilings.tflops / 1e9, self.bytes / ceilings.gb_per_s / 1e6)

    def bound(self, ceilings: Ceilings) -> Literal["compute", "memory"]:
        return (
            "compute"
            if self.flops / ceilings.tflops / 1e9 >= self.bytes / ceilings.gb_per_s / 1e6
            else "memory"
        )


def work(case: Case, mode: Mode, itemsize: int = 2, *, deterministic: bool = False) -> Work:
    """Least work of an op on a case.

    Args:
        itemsize: bytes of the compute dtype.
        deterministic: the backward without atomics, which computes scores once more (attention 14 instead of 10 T S D, nce 8 instead of 6
            E D): what a two-pass kernel does, not what the result needs.
    """
    if mode == "fwd+bwd":
        options = dict(itemsize=itemsize, deterministic=deterministic)
        return work(case, "fwd", **options) + work(case, "bwd", **options)  # type: ignore[arg-type]
    backward = mode == "bwd"
    if isinstance(case, AttentionCase):
        return _attention(case, backward, itemsize, deterministic)
    if isinstance(case, DropTokenCase):
        return _drop_token(case, backward, itemsize)
    if isinstance(case, NCECase):
        return _nce(case, backward, itemsize, deterministic)
    return _patch_embed(case, backward, itemsize)


def _attention(case: AttentionCase, backward: bool, itemsize: int, deterministic: bool) -> Work:
    B, T, S, H, D = case.batch, case.queries, case.keys, case.heads, case.head_dim
    queries, keys = B * T * H * D * itemsize, B * S * H * D * itemsize
    bias = H * T * S * itemsize if case.bias else 0
    statistics = B * H * T * _STATISTIC
    if not backward:
        return Work(4 * B * H * T * S * D, 2 * queries + 2 * keys + bias + statistics)
    # reads q, k, v, out, d_out, lse; writes d_q, d_k, d_v
    return Work(
        (14 if deterministic else 10) * B * H * T * S * D,
        4 * queries + 4 * keys + 2 * bias + statistics,
    )


def _drop_token(case: DropTokenCase, backward: bool, itemsize: int) -> Work:
    kept = case.batch * case.kept * case.dim * itemsize
    whole = case.batch * case.tokens * case.dim * itemsize
    index = case.kept * (case.batch if case.per == "clip" else 1) * _INDEX
    return Work(0, kept + (whole if backward else kept) + index)


def _nce(case: NCECase, backward: bool, itemsize: int, deterministic: bool) -> Work:
    texts = case.clips * case.texts_per_clip
    products = case.batch * texts * case.dim
    embeddings = (case.batch + texts) * case.dim * itemsize
    statistics = (2 * case.batch + texts) * _STATISTIC  # row, pos, col
    if not backward:
        return Work(2 * products, embeddings + statistics)
    return Work(
        (8 if deterministic else 6) * products, 2 * embeddings + 2 * statistics
    )  # each statistic has a gradient


def _patch_embed(case: PatchEmbedCase, backward: bool, itemsize: int) -> Work:
    rows = case.kept or case.patches
    products = case.batch * rows * case.values * case.dim
    value = case.patch_dtype.itemsize if case.patch_dtype else itemsize
    patches = case.batch * rows * case.values * value
    tokens = case.batch * (rows + case.agg) * case.dim * itemsize
    weights = (case.values + 1 + case.agg) * case.dim * itemsize
    distinct = case.patches if case.per == "clip" else rows  # positions read
    position = distinct * case.dim * itemsize if case.position else 0
    index = 0 if case.kept is None else rows * (case.batch if case.per == "clip" else 1) * _INDEX
    if backward:
        position = case.patches * case.dim * itemsize if case.position else 0  # written for all
    return Work(
        2 * products, patches + tokens + weights + position + index
    )  # backward: d_weight, as training asks for


# -- whole training steps ----------------------------------------------------------------------------------------------


MODALITIES = ("video", "audio", "text")


def step_flops(
    config: VATTConfig,
    batch: int,
    drop_rate: float,
    *,
    features: bool,
    mode: Mode = "fwd+bwd",
    modalities: tuple[str, ...] = MODALITIES,
) -> int:
    """Model FLOPs of one training step, three times the forward pass, or of inference (mode fwd).

    Without features the last blocks work for AGG alone. A classifier behind a single tower is not counted.
    """
    forward = sum(true_flops(config, drop_rate, modalities=modalities).values())
    if not features:
        counts = {"video": config.num_video_patches, "audio": config.num_audio_patches}
        for modality in modalities:
            tower = getattr(config, modality)
            others = (
                config.words if modality == "text" else num_kept(counts[modality], drop_rate)
            )  # all tokens but AGG
            inner = tower.num_heads * tower.head_dim
            saved = others * (
                4 * tower.dim * inner + 4 * tower.dim * tower.mlp_dim + 4 * (others + 1) * inner
            )
            saved += 2 * others * tower.dim * config.pooled_dim(modality) if config.agnostic else 0
            forward -= saved * (config.texts_per_clip if modality == "text" else 1)
    return {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[mode] * forward * batch


# -- tiles -------------------------------------------------------------------------------------------------------------

Padding = Callable[[int], int]  # length -> length that is computed


class Tiling(NamedTuple):
    """How far a kernel pads the queries and the keys."""

    name: str
    queries: Padding
    keys: Padding


def padded_to(block: int) -> Padding:
    return lambda length: -(-length // block) * block


TILINGS: tuple[Tiling, ...] = (
    Tiling("192x192 (FA3)", padded_to(192), padded_to(192)),
    Tiling("128x128 (FA2, Triton tutorial)", padded_to(128), padded_to(128)),
    Tiling("64x64, key tail by 16", padded_to(64), padded_to(16)),
)


def useful_share(queries: int, keys: int, tiling: Tiling) -> float:
    """Scores asked for / scores computed."""
    return queries * keys / (tiling.queries(queries) * tiling.keys(keys))


def our_tilings() -> list[Tiling]:
    """Tiles that the Triton backend offers the tuner for its forward kernel; none where Triton is absent."""
    try:
        from vatt_fast.kernels.attention import triton_tiles
    except ImportError:
        return []

    def ours(block: int, tail: Callable[..., int], *arch: str) -> Padding:
        return lambda length: length // block * block + tail(length, block, *arch)

    candidates = triton_tiles.TUNING["attention_forward"]
    sizes = {(each["BLOCK_T"], each["BLOCK_S"]) for each in candidates}
    return [
        Tiling(
            f"ours {rows}x{columns}",
            ours(rows, triton_tiles.last_tile, "sm_90"),
            ours(columns, triton_tiles.tail),
        )
        for rows, columns in sorted(sizes)
    ]


# -- sheet -------------------------------------------------------------------------------------------------------------


def sheet(
    ops: tuple[str, ...] = tuple(CASES), ceilings: Ceilings = H200, dtype: str = "bf16"
) -> str:
    """Markdown: every primary case's floor in each mode, then attention's tiles."""
    lines = [
        f"Floors in {dtype} at {ceilings.tflops:g} TFLOP/s and {ceilings.gb_per_s:g} GB/s; predicted, not measured.",
        "",
        "| op | case | mode | GFLOP | MB | compute ms | memory ms | floor ms | bound | deterministic ms |",
        "|---|---|---|---|---|---|---|---|---|---|",
        *_floor_rows(ops, ceilings, DTYPES[dtype].itemsize),
    ]
    if "attention" in ops:
        lines += ["", *_tile_rows()]
    return "\n".join(lines)


def _floor_rows(ops: tuple[str, ...], ceilings: Ceilings, itemsize: int) -> Iterator[str]:
    for op in ops:
        for name, case in CASES[op].items():
            if tag(case) != "primary":
                continue
            for mode in MODES:
                least, fixed = (work(case, mode, itemsize, deterministic=d) for d in (False, True))
                compute, memory = (
                    least.flops / ceilings.tflops / 1e9,
                    least.bytes / ceilings.gb_per_s / 1e6,
                )
                yield (
                    f"| {op} | {name} | {mode} | {least.flops / 1e9:.4g} | {least.bytes / 1e6:.4g} | {compute:.3g} | {memory:.3g} "
                    f"| {least.ms(ceilings):.3g} | {least.bound(ceilings)} | {fixed.ms(ceilings):.3g} |"
                )


def _tile_rows() -> Iterator[str]:
    tilings = [*TILINGS, *our_tilings()]
    yield "Useful share of the computed scores."
    yield ""
    yield "| queries x keys | " + " | ".join(name for name, *_ in tilings) + " |"
    yield "|---" * (1 + len(tilings)) + "|"
    lengths = {
        (case.queries, case.keys)
        for case in CASES["attention"].values()
        if isinstance(case, AttentionCase) and case.origin
    }
    for queries, keys in sorted(lengths):
        yield (
            f"| {queries} x {keys} | "
            + " | ".join(f"{useful_share(queries, keys, tiling):.0%}" for tiling in tilings)
            + " |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="print the floor sheet as markdown")
    parser.add_argument("--op", choices=[*CASES, "all"], default="all")
    parser.add_argument("--dtype", choices=[*DTYPES], default="bf16")
    parser.add_argument("--tflops", type=float, default=H200.tflops, help="matmul ceiling")
    parser.add_argument("--gb-per-s", type=float, default=H200.gb_per_s, help="copy ceiling")
    given = parser.parse_args()
    if not (math.isfinite(given.tflops) and given.tflops > 0 and given.gb_per_s > 0):
        parser.error("ceilings must be positive")
    print(
        sheet(
            tuple(CASES) if given.op == "all" else (given.op,),
            Ceilings(given.tflops, given.gb_per_s),
            given.dtype,
        )
    )


if __name__ == "__main__":
    main()
