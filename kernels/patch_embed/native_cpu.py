"""Raw patches to tokens on the CPU, in C++ (csrc/patch_embed).

bf16 with AVX-512 BF16 or AMX: our own product. Kept rows go from where they lie into a core's
cache, a block at a time, and sums become tokens, or the weight's gradient, before they leave it.

Otherwise: passes around torch's product. Kept rows are written out in the product's dtype, straight
from where they lie. One pass reads the weight; one adds bias, position and AGG as the tokens are
written, and applies the scale there. Rows are packed a chunk at a time: memory that is used again
costs no page faults, which on some machines cost more than the product. The product is in the
compute dtype where torch multiplies it. bf16 on others is multiplied in fp32, which is several
times faster there than torch's emulation, and is rounded once, at the end.

Either backward packs the rows again and sums d_tokens once for d_bias, d_position and d_agg.

Ours and the passes give the same bits for any number of threads; the library's product, and what is
made of it, as far as it does.
"""

from collections.abc import Iterator

import torch

from .. import native
from ..dispatch import native_bf16
from ..native import address
from ..numerics import put_rows
from .dtypes import unsupported_dtypes
from .patchify import unpatchify

# B batch, N patches, K kept, k values a patch; A 1 with AGG, else 0;
# R = B (A + K) rows of all clips, AGG's among them

_ELEMENTS = {
    torch.uint8: "uint8",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
}
# of packed rows: a product reads all of the weight for every chunk; glibc gives blocks of 32 MiB
# and more back at once
_CHUNK_BYTES = 24 * 2**20
_LONG_CHUNK_BYTES = 31 * 2**20  # where a chunk costs a pass over d_weight


def forward(
    patches,
    weight,
    bias,
    *,
    position=None,
    keep=None,
    agg=None,
    scale,
    shift,
    patch=None,
    gathered=False,
    dtype,
):
    rows = _Rows(patches, keep, agg, patch, gathered, dtype)
    weight, bias = _readable(weight), _vector(bias)
    position, agg = _readable(position), _vector(agg)
    tokens = torch.empty((patches.shape[0] * (rows.A + rows.K), weight.shape[0]), dtype=dtype)
    added = dict(
        _place(position),
        agg=address(agg),
        keep=address(rows.keep),
        keep_stride=rows.keep_stride,
        K=rows.K,
        dim=weight.shape[0],
        scale=scale,
        threads=torch.get_num_threads(),
    )
    run = _project if rows.multiplied_here else _project_by_library
    run(rows, weight, bias, tokens, scale * (shift / scale + rows.centre), added)
    return tokens.view(patches.shape[0], rows.A + rows.K, -1)


def _project(rows, weight, bias, tokens, factor, added):
    sizes = dict(dim=weight.shape[0], k=rows.k, threads=added["threads"])
    scratch = _scratch(native.extension.patch_embed_project_scratch(**sizes))
    native.extension.patch_embed_project(
        patches=rows.native,
        weight=address(weight),
        weight_element=_ELEMENTS[weight.dtype],
        weight_stride=weight.stride(0),
        bias=address(bias),
        factor=factor,
        tokens=address(tokens),
        B=rows.patches.shape[0],
        scratch=address(scratch),
        **added,
    )


def _project_by_library(rows, weight, bias, tokens, factor, added):
    weight, whole_bias = _weight(weight, bias, factor, rows.product_dtype)
    for first, packed in rows.chunks(_CHUNK_BYTES):
        part = tokens[first : first + packed.shape[0]]
        product = torch.nn.functional.linear(packed, weight)
        native.extension.patch_embed_finish(
            product=address(product),
            product_element=_ELEMENTS[product.dtype],
            tokens=address(part),
            element=_ELEMENTS[tokens.dtype],
            bias=address(whole_bias),
            first=first,
            count=packed.shape[0],
            **added,
        )


def backward(
    d_tokens,
    patches,
    weight,
    bias,
    *,
    position=None,
    keep=None,
    agg=None,
    scale,
    shift,
    patch=None,
    gathered=False,
    dtype,
    d_patches=False,
):
    """d_patches (None unless asked for), d_weight, d_bias, d_position, d_agg (None where
    absent)."""
    rows = _Rows(patches, keep, agg, patch, gathered, dtype)
    d_tokens = d_tokens.contiguous()
    d_bias, d_position, d_agg = _sums(d_tokens, position, rows)

    run = _weigh if rows.multiplied_here else _weigh_by_library
    d_weight = run(rows, d_tokens, weight, d_bias, scale, shift + rows.centre * scale)

    d_input = None
    if d_patches:  # rare: patches are data
        wide = rows.product_dtype
        d_input = d_tokens[:, rows.A :].to(wide) @ weight.to(wide)
        d_input = d_input if scale == 1 else d_input * scale
        if keep is not None and not gathered:
            d_input = put_rows(torch, d_input, keep, rows.N)
        if patch is not None:
            d_input = unpatchify(d_input, patch, tuple(patches.shape[1:]))
    return d_input, d_weight, d_bias, d_position, d_agg


def _weigh(rows, d_tokens, weight, d_bias, scale, factor):
    dim, threads = weight.shape[0], torch.get_num_threads()
    parts = rows.parts(_LONG_CHUNK_BYTES)
    # several chunks add up in fp32
    d_weight = torch.empty((dim, rows.k), dtype=torch.float32 if len(parts) > 1 else weight.dtype)
    sizes = dict(rows=parts[0].stop, dim=dim, k=rows.k, threads=threads)
    scratch = _scratch(native.extension.patch_embed_weigh_scratch(**sizes))
    for part in parts:
        native.extension.patch_embed_weigh(
            patches=rows.native,
            d_tokens=address(d_tokens.view(-1, dim)[part]),
            d_weight=address(d_weight),
            element=_ELEMENTS[d_weight.dtype],
            d_bias=address(d_bias),
            scale=scale,
            factor=factor,
            grows=part.start > 0,
            first=part.start,
            count=part.stop - part.start,
            K=rows.K,
            A=rows.A,
            dim=dim,
            scratch=address(scratch),
            threads=threads,
        )
    return d_weight


def _weigh_by_library(rows, d_tokens, weight, d_bias, scale, factor):
    dim = weight.shape[0]
    d_weight = torch.empty((dim, rows.k))
    fp32 = rows.product_dtype == torch.float32
    for first, packed in rows.chunks(_CHUNK_BYTES if fp32 else _LONG_CHUNK_BYTES):
        d_rows = d_tokens.view(-1, dim)[first : first + packed.shape[0]].to(packed.dtype)
        if fp32:  # the product itself adds up
            torch.addmm(d_weight, d_rows.T, packed, beta=int(first > 0), out=d_weight)
        else:
            product = torch.mm(d_rows.T, packed)
            _finish_weight(product, d_weight, d_bias, scale, factor, grows=first > 0)
    if fp32:
        _finish_weight(d_weight, d_weight, d_bias, scale, factor)
    return d_weight


class _Rows:
    """What the products multiply: kept rows less the centre, (R, k), zeros where tokens have AGG.

    So tokens and rows match as matrices, without a copy of either; only an infinite gradient of AGG
    would be felt in d_weight, as nan.
    """

    def __init__(self, patches, keep, agg, patch, gathered, dtype):
        self.patches, layout = _layout(patches, patch)
        self.k = layout["frames"] * layout["lines"] * layout["columns"] * layout["channels"]
        self.N = _num_patches(layout)
        self.K, self.A = self.N if keep is None else keep.shape[-1], int(agg is not None)
        # the step from a clip's indices to the next clip's: 0 where all clips share one line
        self.keep, self.keep_stride = None, 0
        if keep is not None:
            self.keep = keep.to(torch.int64).contiguous()
            self.keep_stride = self.K if keep.ndim == 2 else 0
        self.native = native.extension.Patches(
            data=address(self.patches),
            element=_ELEMENTS[self.patches.dtype],
            **layout,
            keep=0 if gathered else address(self.keep),
            keep_stride=self.keep_stride,
        )
        self.centre = 128.0 if patches.dtype == torch.uint8 else 0.0
        # the second is what tests also emulate
        multiplied = native_bf16(patches.device) or native.multiplies_bf16()
        self.product_dtype = dtype if multiplied else torch.float32
        self.multiplied_here = dtype == torch.bfloat16 and native.multiplies_bf16()

    def parts(self, most_bytes: int) -> list[slice]:
        """The rows in chunks of equal length."""
        R = self.patches.shape[0] * (self.A + self.K)
        chunks = -(-R * self.k * self.product_dtype.itemsize // most_bytes)
        count = -(-R // chunks)
        return [slice(first, min(first + count, R)) for first in range(0, R, count)]

    def chunks(self, most_bytes: int) -> Iterator[tuple[int, torch.Tensor]]:
        """The first row of each chunk, and its rows; the next one lies in the same memory."""
        parts = self.parts(most_bytes)
        memory = torch.empty((parts[0].stop, self.k), dtype=self.product_dtype)
        for part in parts:
            packed = memory[: part.stop - part.start]
            native.extension.patch_embed_pack(
                patches=self.native,
                packed=address(packed),
                element=_ELEMENTS[packed.dtype],
                first=part.start,
                count=packed.shape[0],
                K=self.K,
                A=self.A,
                threads=torch.get_num_threads(),
            )
            yield part.start, packed


def _weight(weight, bias, factor, product_dtype):
    """The weight as the library's product takes it, and the bias with the shift:
    (row * scale + shift) @ weight.T + bias is scale * (row - centre) @ weight.T + whole bias."""
    dim, k = weight.shape
    whole_bias = torch.empty(dim)
    copy = None if weight.dtype == product_dtype else torch.empty((dim, k), dtype=product_dtype)
    native.extension.patch_embed_weight(
        weight=address(weight),
        weight_element=_ELEMENTS[weight.dtype],
        weight_stride=weight.stride(0),
        bias=address(bias),
        copy=address(copy),
        whole_bias=address(whole_bias),
        factor=factor,
        dim=dim,
        k=k,
        threads=torch.get_num_threads(),
    )
    return weight if copy is None else copy, whole_bias


def _sums(d_tokens, position, rows: _Rows):
    """d_bias, d_position and d_agg in fp32, from one pass over d_tokens."""
    B, _, dim = d_tokens.shape
    # without a position only which token it is counts
    keep, keep_stride = (None, 0) if position is None else (rows.keep, rows.keep_stride)
    count = rows.K if position is None else position.shape[0]
    inverse = None
    if keep is not None:
        inverse = torch.empty((B if keep_stride else 1, count), dtype=torch.int32)
    d_bias, d_agg = torch.empty(dim), torch.empty(dim) if rows.A else None
    d_position = None if position is None else torch.empty((count, dim))
    parts = torch.empty((-(-count // native.extension.patch_embed_rows_a_part), 2, dim))
    native.extension.patch_embed_sums(
        d_tokens=address(d_tokens),
        element=_ELEMENTS[d_tokens.dtype],
        keep=address(keep),
        keep_stride=keep_stride,
        inverse=address(inverse),
        d_position=address(d_position),
        parts=address(parts),
        d_bias=address(d_bias),
        d_agg=address(d_agg),
        B=B,
        K=rows.K,
        dim=dim,
        rows=count,
        threads=torch.get_num_threads(),
    )
    return d_bias, d_position, d_agg


def _finish_weight(product, d_weight, d_bias, scale, factor, grows=False):
    """d_weight = scale * product + factor * d_bias of its row, or grows by scale * product."""
    dim, k = product.shape
    native.extension.patch_embed_finish_weight(
        product=address(product),
        element=_ELEMENTS[product.dtype],
        d_weight=address(d_weight),
        d_bias=address(d_bias),
        scale=scale,
        factor=factor,
        grows=grows,
        dim=dim,
        k=k,
        threads=torch.get_num_threads(),
    )


def _layout(patches, patch):
    """Patches as the kernels take them, and where their values lie: of Patches in
    csrc/patch_embed/patch_embed.h."""
    if patch is None:  # every row a frame of one pixel
        if patches.stride(-1) != 1:
            patches = patches.contiguous()
        N, k = patches.shape[1:]
        strides, sizes, block = (*patches.stride()[:2], 0, k, 1), (N, 1, 1), (1, 1, 1, k)
    else:
        # a waveform is one line of one frame
        clip = patches[:, None, None, :, None] if len(patch) == 1 else patches
        *strides, stride_c = clip.stride()
        *sizes, channels = clip.shape[1:]
        strides.append(1 if channels == 1 else stride_c)
        block = (*(1,) * (3 - len(patch)), *patch, channels)
    names = "stride_b stride_t stride_h stride_w stride_c T H W frames lines columns channels"
    layout = dict(zip(names.split(), (*strides, *sizes, *block), strict=True))
    return patches, layout


def _num_patches(layout: dict[str, int]) -> int:
    across, down = -(-layout["W"] // layout["columns"]), -(-layout["H"] // layout["lines"])
    return -(-layout["T"] // layout["frames"]) * down * across


def _place(position):
    """Of a position's rows, or of none."""
    if position is None:
        return dict(position=0, position_element="fp32", position_stride=0, positions=0)
    return dict(
        position=address(position),
        position_element=_ELEMENTS[position.dtype],
        position_stride=position.stride(0),
        positions=position.shape[0],
    )


def _scratch(count: int) -> torch.Tensor:
    return torch.empty(count, dtype=torch.uint8)


def _readable(matrix):
    """fp32 or bf16 with dense rows; others are converted first."""
    if matrix is None:
        return None
    matrix = matrix if matrix.dtype in (torch.float32, torch.bfloat16) else matrix.float()
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def _vector(vector):
    return None if vector is None else vector.float().contiguous()


def unsupported(
    patches,
    weight,
    bias,
    position=None,
    keep=None,
    *,
    scale,
    shift,
    agg=None,
    patch=None,
    gathered=False,
    dtype=None,
) -> str | None:
    if native.extension is None:
        return f"the extension is {native.explain()}"
    if patches.device.type != "cpu":
        return f"tensors are on {patches.device.type}; it runs on the CPU"
    if dtype not in (None, torch.float32, torch.bfloat16):
        return f"the compute dtype is {dtype}; it takes float32 and bfloat16"
    return unsupported_dtypes(patches, weight, bias, position, agg)
