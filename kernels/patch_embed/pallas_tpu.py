"""Raw patches to tokens in Pallas: kept rows go to VMEM by DMA, and are projected there.

There are two ways to the rows. Fetched: one DMA a kept row; those of the next tile run while this
one is multiplied. A uint8 row shares its 32-bit words with three neighbours (bf16 with one), and a
word is the least a DMA moves: four rows come, and the right byte is shifted out for all rows at
once. Rows laid out one by one would spare that, but to lay them out so is a copy of all patches,
several times the product's time. Streamed: plain blocks, where all rows are wanted (no keep, or
gathered by the loader). Narrow float rows are picked by drop_token's kernel, then streamed.

AGG moves every row by one. Fetched rows follow an index that has a row for AGG; a tile of streamed
rows passes its last token on to the next tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..drop_token import pallas_tpu as drop_token
from ..pallas_common import (
    LANES,
    call,
    dot,
    interpreted,
    pad,
    round_up,
    sublanes,
    unsupported_operands,
)
from .flops import flops

# B batch, N patches, K kept, k values a patch; A 1 with AGG, else 0; rows of a tile, columns of a
# tile of dim. "exact": rows in the compute dtype, which holds them without rounding

_CENTRE = 128.0  # uint8 0 .. 255 enters the product as -128 .. 127, as exact in bf16
_VMEM_BYTES = 13 << 20  # of all blocks and buffers: the smallest chips have 16 MiB
_MOST_ROWS = 512
_PART = 256  # columns of a product at a time
_NARROW = 512  # values: below it, a DMA for every row costs more than the row
_STARTS = 64  # DMAs that start beside a part of a product
_GROUP = 32  # rows made exact at a time: a register's worth of bytes
# torch_xla's libtpu, as old as jax 0.7.1, compiles no DMA of one row
_FETCHES = jax.__version_info__ >= (0, 10)


class _Plan(NamedTuple):
    """How a call is cut: ``tiles`` of ``rows`` rows a clip, ``columns`` of dim at a time."""

    fetched: bool
    tiles: int
    rows: int
    columns: int


def _plan(
    tokens: int, k: int, dim: int, raw: Any, dtype: Any, *, fetched: bool, backward: bool
) -> _Plan | None:
    """A plan for ``tokens`` rows a clip, AGG included; None if not even the smallest tile fits."""
    size, raw_size = jnp.dtype(dtype).itemsize, jnp.dtype(raw).itemsize
    column_bytes = k * (4 if backward else size)  # that stay in VMEM
    split = 6 if size == 4 else 0  # an exact product takes fp32 apart, into three bf16
    spare = _VMEM_BYTES - split * k * _PART
    columns = dim
    if dim % LANES == 0:
        budget = (spare if split else _VMEM_BYTES) // 2
        widths = (c for c in range(LANES, dim + 1, LANES) if dim % c == 0)
        columns = max((c for c in widths if c * column_bytes <= budget), default=LANES)
    row_bytes = k * (4 if fetched else 2 * raw_size) + k * (size + split)
    row_bytes += columns * (2 * size + (12 if backward else 16))
    step = 16 if fetched else max(16, sublanes(raw))
    most = min(_MOST_ROWS, (spare - columns * column_bytes) // row_bytes // step * step)
    if most <= 0:
        return None
    tiles = pl.cdiv(tokens, most)
    return _Plan(fetched, tiles, round_up(pl.cdiv(tokens, tiles), step), columns)


# -- rows of a tile into VMEM ------------------------------------------------------------------


class _Fetch(NamedTuple):
    """The DMAs that bring a tile's kept rows to VMEM, one a row.

    In packed dtypes a row shares its words with its neighbours, and they come along.
    """

    plan: _Plan
    raw: Any
    index: Any  # (1, 1, tiles * rows) in SMEM: which row of words
    turn: Any  # (1, rows, 1): how far up in them
    rows: Any  # all patches, in HBM
    words: Any  # (rows, k) in VMEM: of the tile that is on its way
    arrived: Any
    b: Any  # read outside of loops: interpreters know no program_id within
    tile: Any

    def start(self, tile, at) -> None:
        rows = self.rows
        if rows.dtype not in (jnp.int32, jnp.float32):
            rows = rows.bitcast(jnp.int32)
        row = self.index[0, 0, tile * self.plan.rows + at]
        source, target = rows.at[self.b, pl.ds(row, 1)], self.words.at[pl.ds(at, 1)]
        pltpu.make_async_copy(source, target, self.arrived).start()

    def start_from(self, tile, first: int) -> None:
        """All rows of a tile from ``first``, a multiple of 8."""

        def group(n, _):
            for m in range(8):
                self.start(tile, first + n * 8 + m)

        jax.lax.fori_loop(0, (self.plan.rows - first) // 8, group, None)

    def take(self, exact) -> None:
        """exact (rows, k) <- this tile's rows less their centre; ``words`` are free then."""
        pl.when(self.tile == 0)(lambda: self.start_from(0, 0))
        # as many bytes as all its rows
        pltpu.make_async_copy(self.words, self.words, self.arrived).wait()

        def group(at):
            values = _unpack(self.words[at, :], self.turn[0, at, :], self.raw)
            exact[at, :] = values.astype(exact.dtype)

        _in_groups(self.plan.rows, 16, group)


def _multiply(plan: _Plan, size: int, product: Callable, fetch: _Fetch | None) -> None:
    """product(slice) over an axis in parts, while the next tile's rows are on their way.

    Starting a DMA is scalar work. In the same straight line as a product it costs nothing; in a
    loop of its own the matrix unit would stand idle.
    """
    if fetch is None or plan.tiles == 1:
        return _in_groups(size, _part(size), product)
    parts = size // _part(size)
    most = min(_STARTS, plan.rows // parts)
    each = max(n for n in range(most + 1) if (plan.rows - parts * n) % 8 == 0)
    following = fetch.tile + 1

    def with_next():
        fetch.start_from(following, parts * each)

        def turn(n, at):
            for m in range(each):
                fetch.start(following, n * each + m)
            product(at)

        _in_turns(size, _part(size), turn)

    pl.when(following < plan.tiles)(with_next)
    pl.when(following == plan.tiles)(lambda: _in_groups(size, _part(size), product))


def _unpack(words, turn, raw: Any):
    """fp32 values, less the centre, of rows that lie ``turn`` (rows, 1) bits up in their words."""
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
    _in_turns(count, size, lambda n, at: body(at))


def _in_turns(count: int, size: int, body: Callable) -> None:
    """body(n, slice) over an axis, ``size`` at a time."""
    if count == size:
        return body(0, pl.ds(0, size))

    def turn(n, _):
        return body(n, pl.ds(pl.multiple_of(n * size, size), size))

    jax.lax.fori_loop(0, count // size, turn, None)


def _part(size: int) -> int:
    """How much of an axis a product takes at a time.

    Unrolled as a whole, a product would be a megabyte of code.
    """
    return max((n for n in range(LANES, _PART + 1, LANES) if size % n == 0), default=size)


def _rows_of_tile(plan: _Plan, raw: Any, refs: dict, exact, buffers) -> tuple[Any, _Fetch | None]:
    """The ref that holds this tile's rows (rows, k) as the product takes them.

    And, where rows are fetched, what starts the next tile's.
    """
    if plan.fetched:
        words, arrived = buffers
        b, tile = pl.program_id(1), pl.program_id(2)
        given = refs["index"], refs["turn"], refs["rows"]
        fetch = _Fetch(plan, raw, *given, words, arrived, b, tile)
        fetch.take(exact)
        return exact, fetch
    if exact is None:
        return refs["rows"].at[0], None
    _stream(plan, refs["rows"], exact)
    return exact, None


def _shared(dtype: Any) -> int:
    """Rows that share a word."""
    return 4 // jnp.dtype(dtype).itemsize


# -- what both kernels are given ---------------------------------------------------------------


class _Rows(NamedTuple):
    """A call's rows as the kernels take them, and the index they are fetched by.

    ``values`` is k, filled up to whole registers.
    """

    plan: _Plan
    raw: Any
    rows: jax.Array  # (B, N, values), or (B, K, values) when streamed
    # (1 or B, tiles * rows): the row of every token, a kept one for AGG and beyond the end
    rows_at: jax.Array | None

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
        if interpreted() and rows.dtype != jnp.float32:
            # interpreters know no DMA from a bitcast ref
            groups = rows.reshape(rows.shape[0], -1, _shared(self.raw), self.values).swapaxes(2, 3)
            rows = jax.lax.bitcast_convert_type(groups, jnp.int32)
        per_clip, shared = len(self.rows_at) > 1, _shared(self.raw)
        turn = (self.rows_at & (shared - 1)) * (32 // shared)
        length = self.rows_at.shape[1]
        index = self.rows_at[:, None] >> (shared.bit_length() - 1)
        operands = {"index": index, "turn": turn[..., None], "rows": rows}
        index_spec = pl.BlockSpec(
            (1, 1, length), lambda d, b, t: (b if per_clip else 0, 0, 0), memory_space=pltpu.SMEM
        )
        turn_spec = pl.BlockSpec((1, plan.rows, 1), lambda d, b, t: (b if per_clip else 0, t, 0))
        rows_spec = pl.BlockSpec(memory_space=pltpu.HBM)
        return operands, {"index": index_spec, "turn": turn_spec, "rows": rows_spec}

    def scratch(self, dtype: Any) -> list:
        """exact, then words and their semaphore; empty if the product takes the block as it is."""
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
    if not _FETCHES or keep is None or gathered:
        return False
    return patches.dtype == jnp.uint8 or patches.shape[2] >= _NARROW


def _prepare(patches, weight, keep, agg, gathered: bool, dtype: Any, *, backward: bool) -> _Rows:
    fetched = _is_fetched(patches, keep, gathered)
    if keep is not None and not gathered and not fetched:
        patches = _take_rows(patches, keep)
    first = 0 if agg is None else 1
    tokens = first + (keep.shape[-1] if fetched else patches.shape[1])
    patches = pad(patches, 2, round_up(patches.shape[2], LANES))
    k, dim, raw = patches.shape[2], weight.shape[0], patches.dtype
    plan = _plan(tokens, k, dim, raw, dtype, fetched=fetched, backward=backward)
    assert plan is not None, "unsupported() has let it through"
    index = None
    if fetched:
        # no DMA's bounds are checked: what is out of range must not reach one
        keep = jnp.clip(jnp.atleast_2d(keep).astype(jnp.int32), 0, patches.shape[1] - 1)
        end = plan.tiles * plan.rows - keep.shape[1] - first
        index = jnp.pad(keep, ((0, 0), (first, end)), mode="edge")  # a dropped row may hold nan
        patches = pad(patches, 1, round_up(patches.shape[1], sublanes(patches.dtype)))
    return _Rows(plan, patches.dtype, patches, index)


def _take_rows(patches, keep):
    if drop_token.unsupported(patches, keep) is None:
        return drop_token.forward(patches, keep)
    return jnp.take_along_axis(patches, jnp.atleast_2d(keep)[..., None], axis=1)


def _fold(weight, bias, scale: float, shift: float, raw: Any, dtype: Any):
    """(row * scale + shift) @ weight.T + bias as (row - centre) @ folded + folded_bias.

    folded (k, dim); folded_bias sums the folded weight after its rounding.
    """
    folded = (scale * weight.astype(jnp.float32)).astype(dtype)
    factor = shift / scale + _centre(raw)
    return folded.T, bias.astype(jnp.float32) + factor * folded.astype(jnp.float32).sum(1)


def _centre(raw: Any) -> float:
    return _CENTRE if raw == jnp.uint8 else 0.0


# -- forward -----------------------------------------------------------------------------------


def _forward_kernel(*refs, names, plan: _Plan, raw: Any):
    """One program: a tile of rows of one clip by a tile of dim.

    Gathers the rows, multiplies them by the weight, which stays in VMEM, and adds.
    """
    given, (out, *scratch) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    last = scratch.pop() if "agg" in given and not plan.fetched else None
    exact, *buffers = scratch or [None]
    rows, fetch = _rows_of_tile(plan, raw, given, exact, buffers)
    t = pl.program_id(2)

    def product(at):
        tokens = dot(rows[...], given["weight"][:, at]) + given["bias"][:, at]
        if "position" in given:
            tokens = tokens + given["position"][0, :, at].astype(jnp.float32)
        if "agg" in given:
            first = jax.lax.broadcasted_iota(jnp.int32, tokens.shape, 0) == 0
            before = given["agg"][:, at]
            if last is None:
                tokens = jnp.where(first & (t == 0), before, tokens)
            else:
                before = jnp.where(t == 0, before, last[:, at])
                last[:, at] = tokens[plan.rows - 1 :]
                tokens = jnp.where(first, before, pltpu.roll(tokens, 1, 0))
        out[0, :, at] = tokens.astype(out.dtype)

    _multiply(plan, plan.columns, product, fetch)


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
    specs["weight"] = pl.BlockSpec(
        (call_rows.values, plan.columns), lambda d, b, t: (0, d), pipeline_mode=pl.Buffered(1)
    )
    specs["bias"] = pl.BlockSpec((1, plan.columns), lambda d, b, t: (0, d))
    if position is not None:
        rows_at = call_rows.rows_at if plan.fetched else keep
        table = position[None] if rows_at is None else position[jnp.atleast_2d(rows_at)]
        operands["position"], specs["position"] = table, _position_spec(table, plan)
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
        disable_bounds_checks=plan.fetched,
        flops=flops("fwd", B, tokens, k, dim),
        bytes_accessed=passes * call_rows.bytes_read(tokens) + size * (k * dim + B * tokens * dim),
    )


def _position_spec(table, plan: _Plan) -> pl.BlockSpec:
    shared, last = len(table) == 1, pl.cdiv(table.shape[1], plan.rows) - 1
    return pl.BlockSpec(
        (1, plan.rows, plan.columns),
        lambda d, b, t: (0 if shared else b, jnp.minimum(t, last), d),
    )


# -- backward ----------------------------------------------------------------------------------


def _weight_kernel(*refs, names, plan: _Plan, raw: Any, first: int, count: int):
    """One program: adds a tile's rows times their gradients to acc (columns, k).

    acc stays in VMEM until the last clip is done, and is then copied to d_weight. first: the token
    of the first row, 1 with AGG; count: rows of a clip.
    """
    given, (d_weight, acc, done, *scratch) = (
        dict(zip(names, refs, strict=False)),
        refs[len(names) :],
    )
    d, b, t = (pl.program_id(axis) for axis in range(3))
    exact, *buffers = scratch or [None]
    rows, fetch = _rows_of_tile(plan, raw, given, exact, buffers)
    # of each row among its clip's
    place = jax.lax.broadcasted_iota(jnp.int32, (plan.rows, 1), 0) + t * plan.rows
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
        acc[...] = jnp.zeros_like(acc)

    def product(at):
        values = rows[:, at]
        if beyond:
            values = jnp.where(inside, values.astype(jnp.float32), 0.0).astype(values.dtype)
        acc[:, at] += dot(gradient, values, (0, 0))

    _multiply(plan, acc.shape[1], product, fetch)

    @pl.when((b == pl.num_programs(1) - 1) & (t == plan.tiles - 1))
    def _():
        column = pl.multiple_of(d * plan.columns, plan.columns)
        copy = pltpu.make_async_copy(acc, d_weight.at[pl.ds(column, plan.columns)], done)
        copy.start()
        copy.wait()


def _d_folded(d_tokens, patches, weight, keep, agg, gathered: bool, dtype: Any):
    """Gradient of the folded weight, (dim, k) fp32."""
    dim, k = weight.shape
    B, tokens, _ = d_tokens.shape
    call_rows = _prepare(patches, weight, keep, agg, gathered, dtype, backward=True)
    plan, first = call_rows.plan, 0 if agg is None else 1
    operands, specs = call_rows.operands()
    # AGG alone has no row
    tiles = plan.tiles if plan.fetched else pl.cdiv(tokens - first, plan.rows)
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
    kernel = functools.partial(
        _weight_kernel,
        names=tuple(operands),
        plan=plan,
        raw=call_rows.raw,
        first=first,
        count=tokens - first,
    )
    d_folded = call(
        kernel,
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
        disable_bounds_checks=plan.fetched,
        flops=flops("bwd", B, tokens, k, dim),
        bytes_accessed=passes * call_rows.bytes_read(tokens)
        + size * B * tokens * dim
        + 4 * k * dim,
    )
    return d_folded[:, :k]


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
    gathered=False,
    dtype,
    d_patches=False,
):
    """d_patches (None unless asked for), d_weight, d_bias, d_position, d_agg (None if absent)."""
    d_folded = _d_folded(d_tokens, patches, weight, keep, agg, gathered, dtype)
    d_agg = None
    if agg is not None:
        d_agg, d_tokens = d_tokens[:, 0].astype(jnp.float32).sum(0), d_tokens[:, 1:]
    over_clips = d_tokens.astype(jnp.float32).sum(0)
    d_bias = over_clips.sum(0)
    d_weight = scale * d_folded + (shift + _centre(patches.dtype) * scale) * d_bias[:, None]
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
    """Inverse of ``_take_rows``: zeros elsewhere.

    Indices are distinct, so it gives the same bits every time.
    """
    shape = (len(rows), count, rows.shape[2])
    if drop_token.unsupported(jax.ShapeDtypeStruct(shape, rows.dtype), keep) is None:
        return drop_token.backward(rows, keep, count)
    index = jnp.arange(len(rows))[:, None], jnp.atleast_2d(keep)
    return jnp.zeros(shape, rows.dtype).at[index].set(rows, unique_indices=True)


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
    if reason := unsupported_operands(
        patches, weight, bias, position, agg, jax.ShapeDtypeStruct((), dtype)
    ):
        return reason
    fetched = _is_fetched(patches, keep, gathered)
    k, dim, raw = round_up(patches.shape[2], LANES), weight.shape[0], patches.dtype
    for backward in (False, True):
        if _plan(_MOST_ROWS, k, dim, raw, dtype, fetched=fetched, backward=backward) is None:
            return (
                f"a tile of {k} values a patch by {dim} dimensions does not fit a core's memory; "
                "the reference accepts any"
            )
    return None
