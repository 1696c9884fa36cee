"""The contrastive log-sums on a CPU: a chunk of clips is multiplied by a chunk of texts, one C++
pass (csrc/contrastive_lse.cpp) does the rest.

Forward: the pass sums exp(S) by rows, columns and own texts; where |S| is known to be small no
maximum is subtracted and a score costs one exp. Backward: the pass turns the products into weights
d loss / d S and sums d_scale; two products with the weights follow, torch's.

A forward that a backward follows keeps its products for it where all of them take no more than
KEPT_BYTES; elsewhere the backward computes them once more.

The products are fp32 whatever the inputs (rounded to bf16, a cosine near 1 would shift its score by
0.03 at a scale of 14): torch's fp32 ones, or, of bf16 vectors where the processor multiplies them
(AVX-512 BF16, AMX), computed by the pass itself, a tile at a time.

Bits do not depend on the number of threads: those of row, col, pos, d_scale and the weights, nor
those of d_x and d_y where the weights are fp32. Where they are bf16, d_x and d_y are the library's
bf16 products, and the promise holds as far as the library keeps it: oneDNN on AMX does not for
every shape.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from .. import native
from ..native import address
from .bound import needs_running_max

# M clips of x, N clips in all, P texts a clip, T = N * P texts, D dimensions

# clips, texts: 8 MiB of products; they come back from the cache, and torch is near its full speed
_CHUNK = (1024, 2048)
# 16 MiB of bf16 weights; the products, where they are kept, just below the 32 MiB at which glibc
# takes fresh pages for a block
_CHUNK_OF_TILES = (2048, 4032)
KEPT_BYTES = 256 * 2**20  # of 8192 x 8192 products
_ALIGNMENT = 32  # of clips, texts and dimensions, as tiles are read
_FEW_SCORES = 1 << 18


def forward(x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None):
    scores = _Scores(x, y, scale, texts_per_clip, first, x_valid, y_valid, bound)
    M, T = x.shape[0], y.shape[0]
    if any(getattr(each, "requires_grad", False) for each in (x, y, scale)):
        scores.keep_products()
    totals = [torch.zeros(size, dtype=torch.float64) for size in (M, T, M)]  # row, col, pos
    peaks = [torch.full((size,), -math.inf) for size in (M, T, M)] if scores.running else None
    for chunk in scores.chunks():
        row, col, pos = chunk.addresses(totals)
        row_peak, col_peak, pos_peak = chunk.addresses(peaks) if peaks else (0, 0, 0)
        native.extension.contrastive_lse_forward(
            chunk=chunk.native,
            row=row,
            col=col,
            pos=pos,
            row_peak=row_peak,
            col_peak=col_peak,
            pos_peak=pos_peak,
            scratch=address(scores.scratch),
        )
    lses = [total.log_() for total in totals]  # of an empty set -inf
    if peaks:
        lses = [lse.add_(peak) for lse, peak in zip(lses, peaks, strict=True)]
    results = tuple(lse.float() for lse in lses)
    if scores.kept:
        # the memory of row lives for as long as something holds row, as what differentiates it does
        memory: Any = results[0].untyped_storage()
        memory.kept_products = _Kept.of(x, y, scores.kept)
    return results


class _Kept(NamedTuple):
    """Products that a forward left for its backward, and of which vectors they are."""

    vectors: tuple
    products: list[torch.Tensor]  # of each chunk

    @classmethod
    def of(cls, x, y, products):
        return cls(tuple((each.data_ptr(), each.shape, each._version) for each in (x, y)), products)

    @classmethod
    def found(cls, row, x, y) -> list[torch.Tensor]:
        """Those of x and y that came with row; none where there are no such."""
        kept = getattr(row.untyped_storage(), "kept_products", None)
        return kept.products if kept and kept == cls.of(x, y, kept.products) else []


def backward(
    d_row,
    d_col,
    d_pos,
    x,
    y,
    row,
    col,
    pos,
    *,
    scale,
    texts_per_clip,
    first,
    x_valid=None,
    y_valid=None,
    bound=None,
):
    scores = _Scores(x, y, scale, texts_per_clip, first, x_valid, y_valid, bound)
    scores.weigh(_Kept.found(row, x, y))
    pairs = [
        _gradient(d_lse, lse, scores.running)
        for d_lse, lse in ((d_row, row), (d_col, col), (d_pos, pos))
    ]
    gradients, lses = zip(*pairs, strict=True)
    d_scale = torch.zeros((), dtype=torch.float64)
    dtype = scores.weights.dtype
    d_x = torch.empty(x.shape, dtype=dtype if scores.texts == y.shape[0] else torch.float32)
    d_y = torch.empty(y.shape, dtype=y.dtype)
    in_place = dtype == y.dtype and (scores.clips == x.shape[0] or dtype == torch.float32)
    d_y_part = None if in_place else torch.empty((scores.texts, y.shape[1]), dtype=torch.float32)
    for chunk in scores.chunks():
        row_g, col_g, pos_g = chunk.addresses(gradients)
        row_lse, col_lse, pos_lse = chunk.addresses(lses)
        native.extension.contrastive_lse_backward(
            chunk=chunk.native,
            row=row_g,
            col=col_g,
            pos=pos_g,
            row_lse=row_lse,
            col_lse=col_lse,
            pos_lse=pos_lse,
            d_scale=address(d_scale),
            scratch=address(scores.scratch),
        )
        weights = scores.weights[: chunk.x.shape[0], : chunk.y.shape[0]]
        _multiply(d_x[chunk.clips], weights, chunk.y, chunk.texts.start == 0)
        sums = d_y[chunk.texts] if d_y_part is None else d_y_part[: chunk.y.shape[0]]
        _multiply(sums, weights.t(), chunk.x, chunk.clips.start == 0)
        if d_y_part is not None and chunk.clips.stop == x.shape[0]:
            d_y[chunk.texts] = sums
    return d_x, d_y, d_scale.float()


def _multiply(sums, a, b, begin: bool):
    """sums = a @ b to begin with, later sums += a @ b; a bf16 one is a chunk's weights."""
    if a.dtype == torch.float32:
        # of long sums into few results the library gives its threads a part each: bits would depend
        # on their number
        step = 512 if sums.numel() >= 1 << 16 else 256
        for d in range(0, a.shape[1], step):
            part = slice(d, d + step)
            sums.addmm_(a[:, part], b[part], beta=float(d > 0 or not begin))
        return
    b = b if b.stride(1) == 1 else b.contiguous()
    transposed, threads = a.stride(1) != 1, torch.get_num_threads()
    sizes = dict(depth=a.shape[1], dim=b.shape[1], threads=threads)
    size = native.extension.contrastive_lse_product_scratch(**sizes)
    scratch = torch.empty(size, dtype=torch.uint8)
    native.extension.contrastive_lse_product(
        weights=address(a),
        stride=a.stride(0) if not transposed else a.stride(1),
        transposed=transposed,
        rows=a.shape[0],
        vectors=address(b),
        vectors_stride=b.stride(0),
        sums=address(sums),
        sums_stride=sums.stride(0),
        bf16_sums=sums.dtype == torch.bfloat16,
        grows=not begin,
        scratch=address(scratch),
        **sizes,
    )


class _Chunk(NamedTuple):
    """Some clips against some texts."""

    clips: slice
    texts: slice
    x: torch.Tensor  # in the dtype of the weights
    y: torch.Tensor
    native: Any  # LseChunk in csrc/contrastive_lse.h

    def addresses(self, vectors) -> tuple[int, int, int]:
        """Where this chunk's parts of (row, col, pos) begin."""
        row, col, pos = vectors
        return address(row[self.clips]), address(col[self.texts]), address(pos[self.clips])


class _Scores:
    """The products of clips and texts, a chunk at a time; for every chunk of texts all clips."""

    def __init__(self, x, y, scale, texts_per_clip, first, x_valid, y_valid, bound):
        self.x, self.y, self.scale = x, y, float(scale)
        self.texts_per_clip, self.first = texts_per_clip, first
        self.x_valid = None if x_valid is None else x_valid.contiguous()
        self.y_counts = torch.zeros(_padded(y.shape[0]), dtype=torch.int32)
        self.y_counts[: y.shape[0]] = -1 if y_valid is None else -y_valid.int()
        self.running = _running(x, y, self.scale, y_valid, bound)
        self.tiles = x.dtype == torch.bfloat16 and native.multiplies_bf16()
        most = _CHUNK_OF_TILES if self.tiles else _CHUNK
        self.clips, self.texts = min(x.shape[0], most[0]), min(y.shape[0], most[1])
        floats = native.extension.contrastive_lse_scratch_floats(
            rows=self.clips, columns=self.texts
        )
        self.scratch = torch.empty(floats)
        self.kept: list[torch.Tensor] = []
        self.computed = True  # here, not before
        self.weights = torch.empty(0, 0)
        if self.tiles:  # a thread's tile
            tile = native.extension.contrastive_lse_tile_floats()
            self.products = torch.empty((torch.get_num_threads(), tile))
        else:
            self.products = torch.empty((self.clips, _padded(self.texts)))

    def keep_products(self) -> None:
        """Have them stay in memory, if they may."""
        shapes = [
            # tiles end at whole units; a row more than its length apart, they share no cache sets
            (_padded(clips.stop - clips.start), _padded(texts.stop - texts.start) + _ALIGNMENT)
            for texts, clips in self._places()
        ]
        if 4 * sum(map(math.prod, shapes)) <= KEPT_BYTES:
            self.kept = [torch.empty(shape) for shape in shapes]

    def weigh(self, kept: list[torch.Tensor]) -> None:
        """Have chunks with room for weights; of products that were kept, if any."""
        self.kept, self.computed = kept, not kept
        if kept or self.tiles:
            dtype = torch.bfloat16 if self.tiles else torch.float32
            shape = _padded(self.clips), _padded(self.texts) + _ALIGNMENT  # as in keep_products
            self.weights = torch.empty(shape, dtype=dtype)
        else:
            self.weights = self.products  # the one becomes the other

    def _places(self) -> Iterator[tuple[slice, slice]]:
        """Of each chunk its texts and clips."""
        M, T = self.x.shape[0], self.y.shape[0]
        for j in range(0, T, self.texts):
            for i in range(0, M, self.clips):
                yield slice(j, min(j + self.texts, T)), slice(i, min(i + self.clips, M))

    def chunks(self) -> Iterator[_Chunk]:
        panels = None
        for number, (texts, clips) in enumerate(self._places()):
            if clips.start == 0:
                y = self.y[texts] if self.tiles else self.y[texts].float()
                panels = _panels(y) if self.tiles and self.computed else None
            x = self.x[clips] if self.tiles else self.x[clips].float()
            products = self.kept[number] if self.kept else self.products
            if self.computed and not self.tiles:
                _multiply(products[: x.shape[0], : y.shape[0]], x, y.t(), True)
            rows = None if panels is None else _aligned(x)
            x_counts = None if self.x_valid is None else self.x_valid[clips]
            chunk = native.extension.ContrastiveLseChunk(
                products=address(products),
                products_stride=products.stride(0) if self.kept or not self.tiles else 0,
                rows=x.shape[0],
                columns=y.shape[0],
                x_counts=address(x_counts),
                y_counts=address(self.y_counts[texts]),
                first_own=(self.first + clips.start) * self.texts_per_clip - texts.start,
                texts_per_clip=self.texts_per_clip,
                scale=self.scale,
                running=self.running,
                threads=torch.get_num_threads(),
                x=address(rows),
                y_panels=address(panels),
                dim=0 if rows is None else rows.shape[1],
                weights=address(self.weights),
                stride=self.weights.stride(0),
                bf16_weights=self.tiles,
            )
            yield _Chunk(clips, texts, x, y, chunk)


def _panels(y) -> torch.Tensor:
    """Texts in the order in which products read them (csrc/common/bf16_panels.h)."""
    rows = _aligned(y)
    panels = torch.empty_like(rows)
    texts, dim = rows.shape
    native.extension.contrastive_lse_pack(
        y=address(rows),
        texts=texts,
        dim=dim,
        panels=address(panels),
        threads=torch.get_num_threads(),
    )
    return panels


def _aligned(vectors) -> torch.Tensor:
    """Contiguous, rows and dimensions filled up with zeros to whole tiles."""
    missing = [-size % _ALIGNMENT for size in vectors.shape]
    if not any(missing):
        return vectors.contiguous()
    return torch.nn.functional.pad(vectors, (0, missing[1], 0, missing[0]))


def _running(x, y, scale: float, y_valid, bound: float | None) -> bool:
    """Whether a running maximum is needed.

    Where no helpful bound is given, the longest vectors tell, and to look for them takes less time
    than the maxima of many scores.
    """
    if not needs_running_max(bound):
        return False
    if x.shape[0] * y.shape[0] < _FEW_SCORES:
        return True
    longest = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).max()
    lengths = torch.linalg.vector_norm(y, dim=1, dtype=torch.float32)
    lengths = lengths if y_valid is None else torch.where(y_valid, lengths, 0.0)
    return needs_running_max(abs(scale) * float(longest * lengths.max()))


def _gradient(d_lse, lse, running: bool):
    """g and l such that a score's weight is g exp(S - l), or g exp(S) unless running; g is 0 for an
    empty set, whatever comes in."""
    empty = lse == -math.inf
    g = torch.where(
        empty, 0.0, d_lse.double() if running else d_lse.double() * torch.exp(-lse.double())
    )
    padding = (0, _padded(len(lse)) - len(lse))
    pad = torch.nn.functional.pad
    return pad(g.float(), padding), pad(torch.where(empty, math.inf, lse.float()), padding)


def _padded(texts: int) -> int:
    return -(-texts // _ALIGNMENT) * _ALIGNMENT


def unsupported(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> str | None:
    if native.extension is None:
        return native.explain()
    if x.device.type != "cpu":
        return f"tensors are on {x.device.type}, not on the CPU"
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype} is for the reference"
    return None
