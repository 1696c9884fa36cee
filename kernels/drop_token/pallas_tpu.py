"""DropToken in Pallas: a clip's tokens stream through VMEM at full bandwidth; rows are picked.

Backward picks likewise, and writes the zeros of dropped tokens itself. Fetching single rows from
HBM would need them laid out one by one: a copy of all tokens before and after. Streaming all of
them costs less. A row moves as 32-bit words. Two bf16 rows share a word, the even row its low
half, so bf16 rows are picked and packed two at a time.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..pallas_common import LANES, call, pad, round_up, sublanes, unsupported_operands

# B batch, N tokens, K kept

_GROUP = 8  # words a loop's turn takes: as many rows as a register has
_MAX_ROWS = 1024  # of a program's picked ones
_VMEM_BYTES = 12 << 20  # of blocks; the smallest chips give a kernel 16 MiB


def _pick_kernel(index, source, picked, *words):
    """One program: some columns of some rows of one clip.

    picked[n] = source[index[n]], 0 where index[n] < 0. index (1, 1, 1, rows) in SMEM, source
    (1, tokens, columns), picked (1, rows, columns). words, for packed dtypes: both as 32-bit
    words. The last axis of the grid walks a clip's rows; source stays where it is meanwhile.
    """
    packed = len(words) == 2
    source, picked = source.at[0], picked.at[0]
    words_from, words_to = words if packed else (source, picked)

    def unpack(turn):
        words_from[_words(turn), :] = pltpu.bitcast(source[_rows(turn), :], jnp.int32)

    def pick(n):
        """Row index[n], 0 where there is none; a packed one in the low half of words."""
        at = index[0, 0, 0, n]
        row = jnp.maximum(at, 0)
        if not packed:
            return jnp.where(at >= 0, words_from[pl.ds(row, 1), :], 0.0)
        word = words_from[pl.ds(row >> 1, 1), :]
        half = jax.lax.shift_right_logical(word, jnp.full_like(word, (row & 1) << 4))
        return half & jnp.where(at >= 0, 0xFFFF, 0)

    def turn_pick(turn):
        for n in range(_GROUP):
            word = turn * _GROUP + n
            words_to[pl.ds(word, 1), :] = (
                pick(2 * word) | (pick(2 * word + 1) << 16) if packed else pick(word)
            )
        if packed:
            picked[_rows(turn), :] = pltpu.bitcast(words_to[_words(turn), :], picked.dtype)

    if packed:
        pl.when(pl.program_id(2) == 0)(lambda: _repeat(words_from.shape[0] // _GROUP, unpack))
    _repeat(words_to.shape[0] // _GROUP, turn_pick)


def _words(turn):
    return pl.ds(pl.multiple_of(turn * _GROUP, _GROUP), _GROUP)


def _rows(turn):
    """The packed rows of ``_words(turn)``."""
    return pl.ds(pl.multiple_of(turn * 2 * _GROUP, 2 * _GROUP), 2 * _GROUP)


def _repeat(turns: int, body):
    jax.lax.fori_loop(0, turns, lambda turn, carry: (body(turn), carry)[1], 0)


def _pick(source, index, name: str):
    """(B, N, dim), (1 or B, K) -> (B, K, dim), zeros where index < 0."""
    (B, N, dim), K = source.shape, index.shape[-1]
    columns = _columns(N, dim, source.dtype)
    tile, packed = sublanes(source.dtype), source.dtype.itemsize == 2
    parts = pl.cdiv(K, _MAX_ROWS)
    tokens, rows = round_up(N, tile), round_up(pl.cdiv(K, parts), tile)
    index = pad(index, -1, parts * rows, -1).reshape(-1, parts, 1, rows)
    per_clip = 0 if len(index) == 1 else 1
    index_spec = pl.BlockSpec(
        (1, 1, 1, rows), lambda b, c, r: (b * per_clip, r, 0, 0), memory_space=pltpu.SMEM
    )
    words = [pltpu.VMEM((size // 2, columns), jnp.int32) for size in (tokens, rows)]
    return call(
        _pick_kernel,
        index,
        source,
        name=name,
        grid=(B, pl.cdiv(dim, columns), parts),
        semantics=("parallel", "parallel", "arbitrary"),
        in_specs=[
            index_spec,
            pl.BlockSpec((1, tokens, columns), lambda b, c, r: (b, 0, c)),
        ],
        out_specs=pl.BlockSpec((1, rows, columns), lambda b, c, r: (b, r, c)),
        out_shape=jax.ShapeDtypeStruct((B, K, dim), source.dtype),
        scratch=words if packed else [],
        flops=0,
    )


def forward(tokens, keep):
    return _pick(tokens, jnp.atleast_2d(keep).astype(jnp.int32), "vatt_drop_token_forward")


def backward(d_kept, keep, num_tokens):
    keep, places = jnp.atleast_2d(keep), jnp.arange(keep.shape[-1], dtype=jnp.int32)
    # every token is looked up in the whole of keep: comparisons fused into a reduction, where a
    # scatter would take the indices one by one
    hits = keep[:, None] == jnp.arange(num_tokens, dtype=keep.dtype)[:, None]
    return _pick(d_kept, jnp.max(jnp.where(hits, places, -1), -1), "vatt_drop_token_backward")


def _columns(source_rows: int, dim: int, dtype) -> int:
    """Columns of a block: all, or as many registers' widths as fit; 0 where not even one does."""
    itemsize = jnp.dtype(dtype).itemsize
    buffers = 3 if itemsize == 2 else 2  # blocks are held twice, and packed ones as words too
    column_bytes = buffers * (round_up(source_rows, sublanes(dtype)) + _MAX_ROWS) * itemsize
    fit = _VMEM_BYTES // column_bytes // LANES * LANES
    if round_up(dim, LANES) <= fit:
        return dim
    parts = pl.cdiv(dim, fit) if fit else 0
    return round_up(pl.cdiv(dim, parts), LANES) if fit else 0


def unsupported(tokens, keep) -> str | None:
    if reason := unsupported_operands(tokens):
        return reason
    if tokens.dtype not in (jnp.float32, jnp.bfloat16):
        return f"tokens is {tokens.dtype}; it moves float32 and bfloat16"
    if not _columns(tokens.shape[1], LANES, tokens.dtype):
        return f"{tokens.shape[1]} tokens of a clip do not fit a core's memory; it holds them all"
    return None
