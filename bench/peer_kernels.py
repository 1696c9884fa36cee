"""Kernels as a Triton user writes them first: what the compiled code of ours is read beside.

Attention has the shape of Triton's tutorial: 128 queries by 64 keys, one loop, keys past the end
masked in every step. The contrastive log-sums take a tile of scores and a running maximum, a
direction at a time. Neither has bias or masks, nor any trick of our own kernels.
"""

import functools
import importlib.util
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def fused_attention(
    q, k, v, out, lse, scale, H, T, S,
    q_b, q_t, q_h, k_b, k_s, k_h, v_b, v_s, v_h,
    HEAD_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_T queries of one head. Writes out (B, T, H, HEAD_DIM), lse (B, H, T)."""
    b, h = tl.program_id(1) // H, tl.program_id(1) % H
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    s, d = tl.arange(0, BLOCK_S), tl.arange(0, HEAD_DIM)
    inside = (t < T)[:, None]
    queries = tl.load(q + b * q_b + h * q_h + t[:, None] * q_t + d[None, :], mask=inside, other=0.0)
    k += b * k_b + h * k_h + d[:, None]
    v += b * v_b + h * v_h + d[None, :]
    top = tl.full([BLOCK_T], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_T], tl.float32)
    acc = tl.zeros([BLOCK_T, HEAD_DIM], tl.float32)
    factor = scale * LOG2E
    for start in range(0, S, BLOCK_S):
        key = start + s
        keys = tl.load(k + key[None, :] * k_s, mask=(key < S)[None, :], other=0.0)
        scores = tl.where((key < S)[None, :], tl.dot(queries, keys), -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        p = tl.exp2(scores * factor - new_top[:, None])
        rescale = tl.exp2(top - new_top)
        values = tl.load(v + key[:, None] * v_s, mask=(key < S)[:, None], other=0.0)
        acc = tl.dot(p.to(values.dtype), values, acc * rescale[:, None])
        total = total * rescale + tl.sum(p, 1)
        top = new_top
    at = ((b * T + t) * H + h)[:, None] * HEAD_DIM + d[None, :]
    tl.store(out + at, (acc / total[:, None]).to(out.dtype.element_ty), mask=inside)
    tl.store(lse + (b * H + h) * T + t, (top + tl.log2(total)) / LOG2E, mask=t < T)


def attention(q, k, v, *, scale, **absent):
    """(out, lse) as the op gives them; head_dim a power of two."""
    B, T, H, D = q.shape
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    strides = [stride for x in (q, k, v) for stride in x.stride()[:3]]
    blocks = dict(HEAD_DIM=D, BLOCK_T=128, BLOCK_S=64, num_warps=8, num_stages=3)
    fused_attention[(triton.cdiv(T, 128), B * H)](
        *(q, k, v, out, lse, scale, H, T, k.shape[1]), *strides, **blocks
    )
    return out, lse


@triton.jit
def row_log_sums(
    x, y, scale, row, M, T, stride_x, stride_y,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program: row[m] = log sum_n exp(scale x[m] . y[n]) of BLOCK_M clips, over all texts."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    factor = tl.load(scale)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for first in range(0, T, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        scores = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, D, BLOCK_D):
            at_x = x + m[:, None] * stride_x + start + d[None, :]
            at_y = y + n[None, :] * stride_y + start + d[:, None]
            clips = tl.load(at_x, mask=(m < M)[:, None], other=0.0)
            texts = tl.load(at_y, mask=(n < T)[None, :], other=0.0)
            scores = tl.dot(clips, texts, scores)
        scores = tl.where((n < T)[None, :], scores * factor, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        total = total * tl.exp(top - new_top)
        total += tl.sum(tl.exp(scores - new_top[:, None]), 1)
        top = new_top
    tl.store(row + m, top + tl.log(total), mask=m < M)


def contrastive_lse(x, y, *, scale, **ignored):
    """(row, col) as the op gives them, without pos; D a multiple of 64."""
    sums = []
    for mine, others in ((x, y), (y, x)):
        (M, D), T = mine.shape, len(others)
        sums.append(torch.empty(M, dtype=torch.float32, device=x.device))
        sizes = (M, T, mine.stride(0), others.stride(0))
        blocks = dict(D=D, BLOCK_M=128, BLOCK_N=128, BLOCK_D=64, num_warps=8, num_stages=3)
        row_log_sums[(triton.cdiv(M, 128),)](mine, others, scale, sums[-1], *sizes, **blocks)
    return tuple(sums)


def flex_attention(q, k, v, *, scale, **absent):
    """(out, lse in base 2) by FlexAttention's kernel, as torch.compile makes it for an H200.

    Rendered from torch's own template, with the tiles that torch chooses there when it does not
    tune, and neither a change of the scores nor a block mask.
    """
    # torch's own parts, which another release of it may keep elsewhere
    from torch._inductor.template_heuristics.triton import CUDAConfigHeuristic

    B, T, H, D = q.shape
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.empty((B, T, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)
    lse = torch.empty((B, H, T), dtype=torch.float32, device=q.device)
    # one block, number 0, of all keys
    count = torch.ones((1, 1, 1), dtype=torch.int32, device=q.device)
    index = torch.zeros((1, 1, 1, 1), dtype=torch.int32, device=q.device)
    tiles = CUDAConfigHeuristic().h100_default_flex_config[q.dtype, D]
    given = dict(Q=q, K=k, V=v, LSE=lse, MAX=lse, KV_NUM_BLKS=count, KV_IDX=index, OUT=out)
    shapes = tuple((name, tuple(x.shape), x.stride()) for name, x in given.items())
    kernel = _rendered(shapes, scale, tiles.block_m, tiles.block_n)
    grid = (triton.cdiv(T, tiles.block_m), B, H)
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    kernel[grid](*given.values(), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, **options)
    return out.transpose(1, 2), lse


@functools.cache
def _rendered(
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...],
    scale: float,
    block_m: int,
    block_n: int,
) -> Any:
    """torch's template with what inductor would fill in for these shapes and strides."""
    from torch._inductor.kernel.flex.flex_attention import flex_attention_template

    sizes = {name: size for name, size, _ in shapes}
    strides = {name: stride for name, _, stride in shapes}
    arguments = ", ".join(f"arg_{name}" for name in sizes)
    T, D = sizes["Q"][2:]
    constants: dict[str, Any] = dict(BLOCK_M=block_m, BLOCK_N=block_n, SM_SCALE=scale)
    blocks = ", ".join(f"{name}: tl.constexpr" for name in list(constants)[:2])
    constants |= dict.fromkeys(("SPARSE_Q_BLOCK_SIZE", "SPARSE_KV_BLOCK_SIZE"), 1 << 30)
    constants |= dict.fromkeys(("QK_HEAD_DIM", "QK_HEAD_DIM_ROUNDED"), D)
    constants |= dict.fromkeys(("V_HEAD_DIM", "V_HEAD_DIM_ROUNDED"), D)
    constants |= dict(GQA_SHARED_HEADS=1, SAFE_HEAD_DIM=True, INDEX_DTYPE="tl.int32")
    constants |= dict(IS_DIVISIBLE=T % 128 == 0 and sizes["K"][2] % 128 == 0)
    constants |= dict(OUTPUT_LOGSUMEXP=True, FLOAT32_PRECISION="'ieee'")
    for off in ("PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "OUTPUT_MAX"):
        constants[off] = False
    constants["HAS_FULL_BLOCKS"] = False
    defines = "\n".join(f"{name}: tl.constexpr = {value}" for name, value in constants.items())
    head = ["import triton", "import triton.language as tl", "", "@triton.jit"]
    head += [f"def flex_attention({arguments}, {blocks}):"]
    head += [f"    {name} = arg_{name}" for name in sizes]
    head += [f"    {line}" for line in defines.splitlines()[2:]]

    def store(indices, value, mask, **_) -> str:
        at = " + ".join(f"{i} * {n}" for i, n in zip(indices, strides["OUT"], strict=True))
        return f"tl.store(OUT + {at}, {value}.to(OUT.dtype.element_ty), {mask})"

    def modification(subgraph_number: int, output_name: str, score: str, **_) -> str:
        return f"{output_name} = {('tl.full([1], True, tl.int1)', score)[subgraph_number == 0]}"

    text = flex_attention_template.template.render(
        def_kernel=lambda *_: "\n".join(head),
        gen_argdefs=lambda: arguments,
        gen_defines=lambda: defines,
        size=lambda name, axis: sizes[name][axis],
        stride=lambda name, axis=None: (
            ", ".join(map(str, strides[name])) if axis is None else strides[name][axis]
        ),
        modification=modification,
        store_output=store,
        USE_TMA=False,
        HAS_FULL_BLOCKS=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "flex.py")
        path.write_text(text)
        spec = importlib.util.spec_from_file_location("flex", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)  # triton.jit reads the source here
    return module.flex_attention


FORWARD: dict[str, tuple[Callable, ...]] = {
    "attention": (attention, flex_attention),
    "contrastive_lse": (contrastive_lse,),
}


def can_run(op: str, inputs: dict[str, Any]) -> bool:
    masks = ("bias", "key_mask", "x_valid", "y_valid")
    return op in FORWARD and all(inputs.get(name) is None for name in masks)
