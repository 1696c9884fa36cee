"""Raw patches to tokens in Pallas: kept rows are fetched by DMA as they lie in HBM, made exact in VMEM and projected there.

Two ways to the rows. Fetched: one DMA a kept row, the next tile's while this one is multiplied. A uint8 row shares its 32-bit words with
three neighbours (bf16 with one), and a word is the least a DMA moves: four rows come, the right byte is shifted out for all rows at once.
Rows laid out one by one would spare that, but to lay them out so is a copy of all patches, several times the product's time. Streamed:
plain blocks, where all rows are wanted (no keep, or gathered by the loader). Narrow float rows are picked by drop_token's kernel, then streamed.

AGG moves every row by one. Fetched rows follow an index that has a row for AGG; streamed ones pass their last token on to the next tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..drop_token import pallas_tpu as drop_token
from ..pallas_common import LANES, call, dot, interpreted, objection, pad, round_up, sublanes
from .flops import flops

# B batch, N patches, K kept, k values a patch; A 1 with AGG, else 0; rows of a tile, columns of a tile of dim

_CENTRE = 128.0  # uint8 0 .. 255 enters the product as -128 .. 127, as exact in bf16
_VMEM_BYTES = 13 << 20  # of all blocks and buffers: the smallest chips have 16 MiB
_MOST_ROWS = 512
_PART = 256  # columns of a product at a time
_NARROW = 512  # values: below, a DMA for every row costs more than the row
_GROUP = 32  # rows made exact at a time: a register's worth of bytes
_FETCHES = jax.__version_info__ >= (
    0,
    10,
)  # torch_xla's libtpu, of the days of jax 0.7.1, compiles no DMA of one row


class _Plan(NamedTuple):
    """How a call is cut: ``tiles`` of ``rows`` rows a clip, ``columns`` of dim at a time."""

    fetched: bool
    tiles: int
    rows: int
    columns: int


def _plan(
    tokens: int, k: int, dim: int, raw: Any, dtype: Any, *, fetched: bool, backward: bool
) -> _Plan | None:
    """``tokens``: rows of a clip, AGG included. None where not even the smallest tile fits."""
    size, raw_size = jnp.dtype(dtype).itemsize, jnp.dtype(raw).itemsize
    resident = k * (4 if backward else size)  # bytes a column
    split = 6 if size == 4 else 0  # an exact product takes fp32 apart, into three bf16
    spare = _VMEM_BYTES - split * k * _PART
    columns = dim
    if dim % LANES == 0:
        columns = max(
            (
                c
                for c in range(LANES, dim + 1, LANES)
                if dim % c == 0 and c * resident <= (spare if split else _VMEM_BYTES) // 2
            ),
            default=LANES,
        )
    row_bytes = (
        k * (4 if fetched else 2 * raw_size)
        + k * (size + split)
        + columns * (2 * size + (12 if backward else 16))
    )
    step = 16 if fetched else max(16, sublanes(raw))
    most = min(_MOST_ROWS, (spare - columns * resident) // row_bytes // step * step)
    if most <= 0:
        return None
    tiles = pl.cdiv(tokens, most)
    return _Plan(fetched, tiles, round_up(pl.cdiv(tokens, tiles), step), columns)


# -- rows of a tile into VMEM ------------------------------------------------------------------------------------------


def _start_fetch(plan: _Plan, raw: Any, b, tile, index, rows, words, arrived) -> None:
    """Start a DMA for every row of a tile: the words of clip b's row index[n], shared with its neighbours in packed dtypes."""
    halvings = _shared(raw).bit_length() - 1
    if rows.dtype not in (jnp.int32, jnp.float32):
        rows = rows.bitcast(jnp.int32)

    def start(group, _):
        for n in range(8):
            at = group * 8 + n
            row = jax.lax.shift_right_logical(index[0, 0, tile * plan.rows + at], halvings)
            pltpu.make_async_copy(
                rows.at[b, pl.ds(row, 1)], words.at[pl.ds(at, 1)], arrived
            ).start()

    jax.lax.fori_loop(0, plan.rows // 8, start, None)


def _fetch(plan: _Plan, raw: Any, index, turn, rows, exact, words, arrived) -> None:
    """exact (rows, k) <- the tile's rows less their centre; the next tile's are on their way when this returns."""
    b, tile = pl.program_id(1), pl.program_id(2)
    pl.when(tile == 0)(lambda: _start_fetch(plan, raw, b, 0, index, rows, words, arrived))
    pltpu.make_async_copy(words, words, arrived).wait()  # as many bytes as all its rows

    def group(at):
        exact[at, :] = _unpack(words[at, :], turn[0, at, :], raw).astype(exact.dtype)

    _in_groups(plan.rows, 16, group)
    pl.when(tile + 1 < plan.tiles)(
        lambda: _start_fetch(plan, raw, b, tile + 1, index, rows, words, arrived)
    )


def _unpack(words, turn, raw: Any):
    """fp32 values, less the centre, of the rows that lie ``turn`` (rows, 1) bits up in their words."""
    if raw == jnp.float32:
        return words
    down = jax.lax.shift_right_logical(words, jnp.broadcast_to(turn, words.shape))
    if raw == jnp.uint8:
        return ((down & 255) - int(_CENTRE)).astype(jnp.float32)
    return jax.lax.bitcast_convert_type(down << 16, jnp.float32)  # bf16 is the upper half of fp32


def _stream(plan: _Plan, rows, exact) -> None:
    """exact (rows, k) <- the block's rows less their centre."""

    def group(at):
        values = rows[0, at, :]
        if values.dtype == jnp.uint8:
            values = (values.astype(jnp.int32) - int(_CENTRE)).astype(jnp.float32)
        exact[at, :] = values.astype(exact.dtype)

    _in_groups(plan.rows, _GROUP if plan.rows % _GROUP == 0 else 16, group)


def _in_groups(count: int, size: int, body: Callable) -> None:
    if count == size:
        return body(pl.ds(0, size))
    jax.lax.fori_loop(
        0, count // size, lambda n, _: body(pl.ds(pl.multiple_of(n * size, size), size)), None
    )


def _in_parts(size: int, body: Callable) -> None:
    """body(slice) over an axis of registers, a part at a time: unrolled whole, a product would be a megabyte of code."""
    part = max((n for n in range(LANES, _PART + 1, LANES) if size % n == 0), default=size)
    _in_groups(size, part, body)


def _rows_of_tile(plan: _Plan, raw: Any, refs: dict, exact, buffers) -> Any:
    """The ref that holds this tile's rows (rows, k) as the product takes them."""
    if plan.fetched:
        _fetch(plan, raw, refs["index"], refs["turn"], refs["rows"], exact, *buffers)
        return exact
    if exact is None:
        return refs["rows"].at[0]
    _stream(plan, refs["rows"], exact)
    return exact


def _shared(dtype: Any) -> int:
    """Rows that share a word."""
    return 4 // jnp.dtype(dtype).itemsize


# -- what both kernels are given ---------------------------------------------------------------------------------------


class _Rows(NamedTuple):
    """A call's rows as the kernels take them, and the index they are fetched by; ``values`` is k, filled up to whole registers."""

    plan: _Plan
    raw: Any
    rows: jax.Array  # (B, N, values), or (B, K, values) when streamed
    rows_at: (
        jax.Array | None
    )  # (1 or B, tiles * rows): the row of every token, a kept one for AGG and beyond the end

    @property
    def values(self) -> int:
        return self.rows.shape[2]

    def operands(self) -> tuple[dict, dict]:
        """Operands and their specs, for a grid (columns, clips, tiles)."""
        plan, rows = self.plan, self.rows
        if self.rows_at is None:
            last = pl.cdiv(rows.shape[1], plan.rows) - 1
            spec = pl.BlockSpec(
                (1, plan.rows, self.values), lambda d, b, t: (b, jnp.minimum(t, last), 0)
            )
            return {"rows": rows}, {"rows": spec}
        if (
            interpreted() and rows.dtype != jnp.float32
        ):  # interpreters know no DMA from a bitcast ref
            groups = rows.reshape(rows.shape[0], -1, _shared(self.raw), self.values).swapaxes(2, 3)
            rows = jax.lax.bitcast_convert_type(groups, jnp.int32)
        per_clip = len(self.rows_at) > 1
        turn = (self.rows_at & (_shared(self.raw) - 1)) * (32 // _shared(self.raw))
        length = self.rows_at.shape[1]
        return {"index": self.rows_at[:, None], "turn": turn[..., None], "rows": rows}, {
            "index": pl.BlockSpec(
                (1, 1, length),
                lambda d, b, t: (b if per_clip else 0, 0, 0),
                memory_space=pltpu.SMEM,
            ),
            "turn": pl.BlockSpec((1, plan.rows, 1), lambda d, b, t: (b if per_clip else 0, t, 0)),
            "rows": pl.BlockSpec(memory_space=pl.ANY),
        }

    def scratch(self, dtype: Any) -> list:
        """exact, then words and their semaphore; empty where the product takes the block as it is."""
        shape = (self.plan.rows, self.values)
        exact = pltpu.VMEM(shape, dtype)
        if self.rows_at is None:
            return [] if self.raw == dtype else [exact]
        word = jnp.float32 if self.raw == jnp.float32 else jnp.int32
        return [exact, pltpu.VMEM(shape, word), pltpu.SemaphoreType.DMA]

    def bytes_read(self, tokens: int) -> int:
        word = 4 if self.plan.fetched else jnp.dtype(self.raw).itemsize
        return len(self.rows) * tokens * self.values * word


def _is_fetched(patches, keep, gathered: bool) -> bool:
    return (
        _FETCHES
        and keep is not None
        and not gathered
        and (patches.dtype == jnp.uint8 or patches.shape[2] >= _NARROW)
    )


def _prepare(patches, weight, keep, agg, gathered: bool, dtype: Any, *, backward: bool) -> _Rows:
    fetched = _is_fetched(patches, keep, gathered)
    if keep is not None and not gathered and not fetched:
        patches = _take_rows(patches, keep)
    first = 0 if agg is None else 1
    tokens = first + (keep.shape[-1] if fetched else patches.shape[1])
    patches = pad(patches, 2, round_up(patches.shape[2], LANES))
    plan = _plan(
        tokens,
        patches.shape[2],
        weight.shape[0],
        patches.dtype,
        dtype,
        fetched=fetched,
        backward=backward,
    )
    assert plan is not None, "unsupported() has let it through"
    index = None
    if fetched:
        keep = jnp.atleast_2d(keep).astype(jnp.int32)
        end = plan.tiles * plan.rows - keep.shape[1] - first
        index = jnp.pad(keep, ((0, 0), (first, end)), mode="edge")  # a dropped row may hold nan
        patches = pad(patches, 1, round_up(patches.shape[1], sublanes(patches.dtype)))
    return _Rows(plan, patches.dtype, patches, index)


def _take_rows(patches, keep):
    if drop_token.unsupported(patches, keep) is None:
        return drop_token.forward(patches, keep)
    return jnp.take_along_axis(patches, jnp.atleast_2d(keep)[..., None], axis=1)


def _fold(weight, bias, scale: float, shift: float, raw: Any, dtype: Any):
    """(row * scale + shift) @ weight.T + bias as (row - centre) @ folded + bias': folded (k, dim), the bias sums the weight as rounded."""
    centre = _CENTRE if raw == jnp.uint8 else 0.0
    folded = (scale * weight.astype(jnp.float32)).astype(dtype)
    return folded.T, bias.astype(jnp.float32) + (shift / scale + centre) * folded.astype(
        jnp.float32
    ).sum(1)


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward_kernel(*refs, names, plan: _Plan, raw: Any):
    """One program: a tile of rows of one clip by a tile of dim; gathers the rows, multiplies them by the resident weight, adds."""
    given, (out, *scratch) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    last = scratch.pop() if "agg" in given and not plan.fetched else None
    exact, *buffers = scratch or [None]
    rows, t = _rows_of_tile(plan, raw, given, exact, buffers), pl.program_id(2)

    def product(at):
        tokens = dot(rows[...], given["weight"][:, at]) + given["bias"][:, at]
        if "position" in given:
            tokens = tokens + given["position"][0, :, at].astype(jnp.float32)
        if "agg" in given:
            first, before = (
                jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 0) == 0,
                given["agg"][:, at],
            )
            if last is None:
                tokens = jnp.where(first & (t == 0), before, tokens)
            else:
                before = jnp.where(t == 0, before, last[:, at])
                last[:, at] = tokens[plan.rows - 1 :]
                tokens = jnp.where(first, before, pltpu.roll(tokens, 1, 0))
        out[0, :, at] = tokens.astype(out.dtype)

    _in_parts(plan.columns, product)


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
    gathered=False,
    dtype,
):
    dim, k = weight.shape
    call_rows = _prepare(patches, weight, keep, agg, gathered, dtype, backward=False)
    plan, B = call_rows.plan, patches.shape[0]
    folded, folded_bias = _fold(weight, bias, scale, shift, call_rows.raw, dtype)
    operands, specs = call_rows.operands()
    operands |= {"weight": pad(folded, 0, call_rows.values), "bias": folded_bias[None]}
    specs |= {
        "weight": pl.BlockSpec(
            (call_rows.values, plan.columns), lambda d, b, t: (0, d), pipeline_mode=pl.Buffered(1)
        ),
        "bias": pl.BlockSpec((1, plan.columns), lambda d, b, t: (0, d)),
    }
    if position is not None:
        rows_at = call_rows.rows_at if plan.fetched else keep
        table = position[None] if rows_at is None else position[jnp.atleast_2d(rows_at)]
        shared, last = len(table) == 1, pl.cdiv(table.shape[1], plan.rows) - 1
        operands["position"] = table
        specs["position"] = pl.BlockSpec(
            (1, plan.rows, plan.columns),
            lambda d, b, t: (0 if shared else b, jnp.minimum(t, last), d),
        )
    scratch = call_rows.scratch(dtype)
    if agg is not None:
        operands["agg"] = agg.astype(jnp.float32)[None]
        specs["agg"] = specs["bias"]
        if not plan.fetched:
            scratch.append(pltpu.VMEM((1, plan.columns), jnp.float32))
    tokens = (keep.shape[-1] if keep is not None else patches.shape[1]) + (agg is not None)
    passes = dim // plan.columns
    size = jnp.dtype(dtype).itemsize
    return call(
        functools.partial(_forward_kernel, names=tuple(operands), plan=plan, raw=call_rows.raw),
        *operands.values(),
        name="vatt_patch_embed_forward",
        grid=(passes, B, plan.tiles),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[specs[name] for name in operands],
        out_specs=pl.BlockSpec((1, plan.rows, plan.columns), lambda d, b, t: (b, t, d)),
        out_shape=jax.ShapeDtypeStruct((B, tokens, dim), dtype),
        scratch=scratch,
        flops=flops("fwd", B, tokens, k, dim),
        bytes_accessed=passes * call_rows.bytes_read(tokens) + size * (k * dim + B * tokens * dim),
    )


# -- backward ----------------------------------------------------------------------------------------------------------


def _weight_kernel(*refs, names, plan: _Plan, raw: Any, first: int, count: int):
    """One program: adds a tile's rows times their gradients to d_weight (columns, k), which stays in VMEM until the last clip is done.

    first: the token of the first row, 1 with AGG; count: rows of a clip.
    """
    given, (d_weight, total, done, *scratch) = (
        dict(zip(names, refs, strict=False)),
        refs[len(names) :],
    )
    d, b, t = (pl.program_id(axis) for axis in range(3))
    exact, *buffers = scratch or [None]
    rows = _rows_of_tile(plan, raw, given, exact, buffers)
    place = (
        jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0) + t * plan.rows
    )  # of each row among its clip's
    gradient = given["d_tokens"][0].astype(jnp.float32)
    if plan.fetched:
        inside = (place >= first) & (place < first + count)
    else:
        inside = place < count
        if first:  # the last row's token is the next tile's first
            at_end = jax.lax.broadcasted_iota(jnp.int32, gradient.shape, 0) == plan.rows - 1
            following = given["following"][0, :1].astype(jnp.float32)
            gradient = jnp.where(at_end, following, pltpu.roll(gradient, plan.rows - 1, 0))
    gradient = jnp.where(inside, gradient, 0.0).astype(given["d_tokens"].dtype)
    beyond = not plan.fetched and count % plan.rows and raw != jnp.uint8  # 0 * nan

    @pl.when((b == 0) & (t == 0))
    def _():
        total[...] = jnp.zeros_like(total)

    def product(at):
        values = rows[:, at]
        if beyond:
            values = jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)
        total[:, at] += dot(gradient, values, (0, 0))

    _in_parts(total.shape[1], product)

    @pl.when((b == pl.num_programs(1) - 1) & (t == plan.tiles - 1))
    def _():
        column = pl.multiple_of(d * plan.columns, plan.columns)
        copy = pltpu.make_async_copy(total, d_weight.at[pl.ds(column, plan.columns)], done)
        copy.start()
        copy.wait()


def _d_folded(d_tokens, patches, weight, keep, agg, gathered: bool, dtype: Any):
    """Gradient of the folded weight, (dim, k) fp32."""
    dim, k = weight.shape
    B, tokens, _ = d_tokens.shape
    call_rows = _prepare(patches, weight, keep, agg, gathered, dtype, backward=True)
    plan, first = call_rows.plan, 0 if agg is None else 1
    operands, specs = call_rows.operands()
    tiles = (
        plan.tiles if plan.fetched else pl.cdiv(tokens - first, plan.rows)
    )  # AGG alone has no row
    plan = plan._replace(tiles=tiles)
    last = pl.cdiv(tokens, plan.rows) - 1
    operands["d_tokens"] = d_tokens
    specs["d_tokens"] = pl.BlockSpec(
        (1, plan.rows, plan.columns), lambda d, b, t: (b, jnp.minimum(t, last), d)
    )
    if first and not plan.fetched:
        groups, end = plan.rows // 16, pl.cdiv(tokens, 16) - 1
        operands["following"] = d_tokens
        specs["following"] = pl.BlockSpec(
            (1, 16, plan.columns), lambda d, b, t: (b, jnp.minimum((t + 1) * groups, end), d)
        )
    passes, size = dim // plan.columns, jnp.dtype(dtype).itemsize
    d_folded = call(
        functools.partial(
            _weight_kernel,
            names=tuple(operands),
            plan=plan,
            raw=call_rows.raw,
            first=first,
            count=tokens - first,
        ),
        *operands.values(),
        name="vatt_patch_embed_weight",
        grid=(passes, B, tiles),
        semantics=("parallel", "arbitrary", "arbitrary"),
        in_specs=[specs[name] for name in operands],
        out_specs=pl.BlockSpec(memory_space=pl.ANY),
        out_shape=jax.ShapeDtypeStruct((dim, call_rows.values), jnp.float32),
        scratch=[
            pltpu.VMEM((plan.columns, call_rows.values), jnp.float32),
            pltpu.SemaphoreType.DMA,
            *call_rows.scratch(dtype),
        ],
        flops=flops("bwd", B, tokens, k, dim),
        bytes_accessed=passes * call_rows.bytes_read(tokens)
        + size * B * tokens * dim
        + 4 * k * dim,
    )
    return d_folded[:, :k]


def backward(
    d_tokens, patches, weight, bias, *, position=None, keep=None, agg=None, scale, shift, gathered=False, dtype, d_patches=False
):  # fmt: skip
    """d_patches (None unless asked for), d_weight, d_bias, d_position, d_agg (None where absent)."""
    centre = _CENTRE if patches.dtype == jnp.uint8 else 0.0
    d_folded = _d_folded(d_tokens, patches, weight, keep, agg, gathered, dtype)
    d_agg = None
    if agg is not None:
        d_agg, d_tokens = d_tokens[:, 0].astype(jnp.float32).sum(0), d_tokens[:, 1:]
    over_clips = d_tokens.astype(jnp.float32).sum(0)
    d_bias = over_clips.sum(0)
    d_weight = scale * d_folded + (shift + centre * scale) * d_bias[:, None]
    d_position = None
    if position is not None:
        d_position = over_clips
        if keep is not None and keep.ndim == 1:
            d_position = _put_rows(over_clips[None], keep, position.shape[0])[0]
        elif keep is not None:
            d_position = _put_rows(d_tokens, keep, position.shape[0]).astype(jnp.float32).sum(0)
    d_input = None
    if d_patches:
        folded, _ = _fold(weight, bias, scale, shift, patches.dtype, dtype)
        precision = jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None
        d_input = jnp.einsum("bkd,vd->bkv", d_tokens, folded, precision=precision)
        if keep is not None and not gathered:
            d_input = _put_rows(d_input, keep, patches.shape[1])
    return d_input, d_weight, d_bias, d_position, d_agg


def _put_rows(rows, keep, count: int):
    """Inverse of ``_take_rows``: zeros elsewhere; indices are distinct, so the same bits every time."""
    if (
        drop_token.unsupported(
            jax.ShapeDtypeStruct((len(rows), count, rows.shape[2]), rows.dtype), keep
        )
        is None
    ):
        return drop_token.backward(rows, keep, count)
    clips = jnp.arange(len(rows))[:, None]
    return (
        jnp.zeros((len(rows), count, rows.shape[2]), rows.dtype)
        .at[clips, jnp.atleast_2d(keep)]
        .set(rows, unique_indices=True)
    )


def unsupported(
    patches,
    weight,
    bias,
    position=None,
    keep=None,
    *,
    agg=None,
    scale,
    shift,
    gathered=False,
    dtype=None,
) -> str | None:
    dtype = weight.dtype if dtype is None else dtype
    if reason := objection(patches, weight, bias, position, agg, jax.ShapeDtypeStruct((), dtype)):
        return reason
    fetched = _is_fetched(patches, keep, gathered)
    k = round_up(patches.shape[2], LANES)
    for backward in (False, True):
        if (
            _plan(
                _MOST_ROWS,
                k,
                weight.shape[0],
                patches.dtype,
                dtype,
                fetched=fetched,
                backward=backward,
            )
            is None
        ):
            return f"a tile of {k} values a patch by {weight.shape[0]} dimensions does not fit a core's memory; the reference accepts any"
    return None
