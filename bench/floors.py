"""What a case costs at least: its bytes, and the time at given ceilings. Pure functions of cases.

``python -m bench floors`` prints the sheet. Bytes count every input once and every output once;
FLOPs are the op's own (``ops.OPS[op].flops``).
"""

import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple

from vatt_fast.kernels.cases import (
    CASES,
    AttentionCase,
    Case,
    DropTokenCase,
    NCECase,
    PatchEmbedCase,
    tag,
)
from vatt_fast.kernels.ops import OPS

from .lines import markdown_table
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

    def ms(self, ceilings: Ceilings) -> float:
        """The longer of what products and bytes need: in a floor they overlap perfectly."""
        return max(self.flops / ceilings.tflops / 1e9, self.bytes / ceilings.gb_per_s / 1e6)

    def bound(self, ceilings: Ceilings) -> Literal["compute", "memory"]:
        products, copies = self.flops / ceilings.tflops / 1e9, self.bytes / ceilings.gb_per_s / 1e6
        return "compute" if products >= copies else "memory"


def op_of(case: Case) -> str:
    """The op that a case belongs to."""
    kinds = {AttentionCase: "attention", DropTokenCase: "drop_token", NCECase: "contrastive_lse"}
    return kinds.get(type(case), "patch_embed")


def work(case: Case, mode: Mode, itemsize: int = 2) -> Work:
    """Least work of an op on a case, whose compute dtype has ``itemsize`` bytes."""
    parts = ("fwd", "bwd") if mode == "fwd+bwd" else (mode,)
    size = sum(_bytes(case, part == "bwd", itemsize) for part in parts)
    return Work(OPS[op_of(case)].flops(case, mode), size)


def _bytes(case: Case, backward: bool, itemsize: int) -> int:
    if isinstance(case, AttentionCase):
        B, T, S, H, D = case.batch, case.queries, case.keys, case.heads, case.head_dim
        operands = (B * T * H * D + B * S * H * D) * itemsize
        bias = H * T * S * itemsize if case.bias else 0
        # backward: reads q, k, v, out, d_out, lse; writes d_q, d_k, d_v
        return (4 if backward else 2) * operands + (1 + backward) * bias + B * H * T * _STATISTIC
    if isinstance(case, DropTokenCase):
        kept = case.batch * case.kept * case.dim * itemsize
        whole = case.batch * case.tokens * case.dim * itemsize
        index = case.kept * (case.batch if case.per == "clip" else 1) * _INDEX
        return kept + (whole if backward else kept) + index
    if isinstance(case, NCECase):
        texts = case.clips * case.texts_per_clip
        embeddings = (case.batch + texts) * case.dim * itemsize
        statistics = (2 * case.batch + texts) * _STATISTIC  # row, pos, col
        return (1 + backward) * (embeddings + statistics)  # each statistic has a gradient
    return _patch_embed_bytes(case, backward, itemsize)


def _patch_embed_bytes(case: PatchEmbedCase, backward: bool, itemsize: int) -> int:
    rows = case.kept or case.patches
    value = case.patch_dtype.itemsize if case.patch_dtype else itemsize
    patches = case.batch * rows * case.values * value
    tokens = case.batch * (rows + case.agg) * case.dim * itemsize
    weights = (case.values + 1 + case.agg) * case.dim * itemsize
    # forward: the positions that are read; backward: d_position is written for all
    distinct = case.patches if case.per == "clip" or backward else rows
    position = distinct * case.dim * itemsize if case.position else 0
    index = 0 if case.kept is None else rows * (case.batch if case.per == "clip" else 1) * _INDEX
    return patches + tokens + weights + position + index


# -- sheet ------------------------------------------------------------------------------------


def sheet(ops: Sequence[str], dtype: str) -> str:
    """Markdown: every primary case's floor in each mode, by an H200's ceilings."""
    headings = ["op", "case", "mode", "GFLOP", "MB", "floor ms", "bound"]
    title = f"Floors in {dtype} at {H200.tflops:g} TFLOP/s and {H200.gb_per_s:g} GB/s; "
    title += "predicted, not measured."
    rows = []
    primary = ((op, each) for op in ops for each in CASES[op].values() if tag(each) == "primary")
    for (op, case), mode in itertools.product(primary, MODES):
        least = work(case, mode, DTYPES[dtype].itemsize)
        sizes = (f"{least.flops / 1e9:.4g}", f"{least.bytes / 1e6:.4g}", f"{least.ms(H200):.3g}")
        rows.append((op, case.name, mode, *sizes, least.bound(H200)))
    return f"{title}\n\n{markdown_table(headings, rows)}"
