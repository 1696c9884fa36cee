"""Attention for TPUs in Pallas, on (B, H, T, head_dim).

Scores are held transposed, keys down the sublanes and queries along the lanes. So a row's maximum
and sum are plain vector operations, the statistics are lane vectors that are stored without waste,
and the accumulators of out, d_q (head_dim, queries), d_k and d_v (head_dim, keys) fill their
registers at head_dim 64. All
keys of a (clip, head) pair lie in VMEM, so the softmax is single-pass. T and S need no padding: a
block that covers an axis has its exact length, and what is left of a walk over chunks is a smaller
chunk of its own. Nothing beyond an array's end is ever read.

Causal: the chunks of queries are unrolled, each with the keys up to its end; of them only those of
its own positions are masked.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..pallas_common import (
    LANES,
    LP_SCHEDULER,
    call,
    divide,
    dot,
    round_up,
    sublanes,
    unsupported_operands,
)
from .flops import flops

# B batch, T queries, S keys, H heads, D head_dim; t queries of a chunk, s keys of a chunk. Inside
# a kernel, scores are in base 2.

_LOG2E, _LN2 = math.log2(math.e), math.log(2)
_BIAS_SIDE = 512  # queries and keys of a bias: it and its gradient lie in VMEM whole
_BLOCK_BYTES = 6 << 20  # of a program's blocks, double buffered; 16 MiB is what every chip has
_VMEM_BYTES = 13 << 20  # of keys and scores
_SCORE_BYTES = 6 << 20  # of a chunk's scores
_SUBLANES = 8
_LP_QUERIES = 512  # from which libtpu schedules the forward pass better by linear programming
_KEY_CHUNK = 512  # keys that the backward pass takes at a time
# queries that causal attention takes at a time, and keys that it masks; with 256, fewer of them
# masked, libtpu's schedules take a fifth more cycles
_CAUSAL_CHUNK = 512
_KEY_BYTES = 10 << 20  # of the blocks and accumulators that hold all keys


class _Plan(NamedTuple):
    """How a call is cut.

    A program has ``batch`` x ``heads`` (clip, head) pairs, ``unroll`` heads of them at a time, and
    ``rows`` of the T queries.
    """

    queries: int
    keys: int
    batch: int
    heads: int
    unroll: int
    rows: int
    query_chunk: int
    key_chunk: int

    @property
    def blocks(self) -> int:
        return -(-self.queries // self.rows)


def _plan(
    shape: tuple[int, int, int, int],
    keys: int,
    dtype: Any,
    *,
    backward: bool,
    bias: bool = False,
    mask: bool = False,
    causal: bool = False,
) -> _Plan:
    B, H, T, D = shape
    cut = dict(backward=backward, mask=mask, causal=causal)
    chunk, rows = _cut_queries(T, keys, D, dtype, **cut)
    width = round_up(D, LANES) * jnp.dtype(dtype).itemsize
    queries_bytes, keys_bytes = (round_up(size, sublanes(dtype)) * width for size in (rows, keys))
    pair_bytes = 2 * (4 if backward else 2) * (queries_bytes + keys_bytes)
    if mask:
        pair_bytes += 2 * 4 * _SUBLANES * keys
    bias_bytes = 0  # of a head's bias and its gradient, whatever the number of clips
    if bias:
        bias_bytes = 2 * (2 if backward else 1) * round_up(keys, _SUBLANES) * 4
        bias_bytes *= round_up(T, LANES)
    heads = batch = 1
    if rows == T:  # accumulators across blocks of queries belong to one pair
        heads = _divisor(H, min(8, _BLOCK_BYTES // (pair_bytes + bias_bytes)))
        if heads == H:
            spare = _BLOCK_BYTES - heads * bias_bytes
            batch = _divisor(B, min(64 // heads, spare // (pair_bytes * heads)))
    unroll = _divisor(heads, max(1, 256 // round_up(min(T, chunk), 32)))
    return _Plan(T, keys, batch, heads, unroll, rows, chunk, _KEY_CHUNK)


def _cut_queries(
    T: int, keys: int, D: int, dtype: Any, *, backward: bool, mask: bool, causal: bool
) -> tuple[int, int]:
    """(queries of a chunk, queries of a block).

    A chunk is as long as its scores fit: by libtpu's schedules a quarter fewer bundles than chunks
    of 256 (docs/notes/jax_tpu.md).
    """
    if dtype == jnp.float32:
        # its products split their operands in three and fill the matrix unit anyway
        most, longest_block = 128 if keys > 1024 else 256, 1024
    else:
        key_bytes = keys * _bytes_a_key(D, dtype, backward=backward, mask=mask)
        score_bytes = min(_SCORE_BYTES, _VMEM_BYTES - key_bytes)
        query_bytes = 8 * min(keys, _KEY_CHUNK) if backward else 4 * keys
        most, longest_block = max(LANES, score_bytes // query_bytes // LANES * LANES), 1280
    if longest_block < T:
        most = min(most, 1024)
    if causal:
        most = min(most, _CAUSAL_CHUNK)
    chunk = T if most >= T else round_up(-(-T // -(-T // most)), LANES)
    return chunk, T if longest_block >= T else chunk * max(1, 1024 // chunk)


def _divisor(size: int, limit: int) -> int:
    """The largest divisor of ``size`` up to ``limit``, at least 1."""
    return max((n for n in range(1, min(size, limit) + 1) if size % n == 0), default=1)


def _keys_at_once(D: int, dtype: Any, *, backward: bool, mask: bool) -> int:
    return _KEY_BYTES // _bytes_a_key(D, dtype, backward=backward, mask=mask) // LANES * LANES


def _bytes_a_key(D: int, dtype: Any, *, backward: bool, mask: bool) -> int:
    """Of VMEM: in and out double buffered, beside fp32 accumulators of their gradients.

    The forward pass also holds the mask as a column, which is a register wide.
    """
    itemsize = jnp.dtype(dtype).itemsize
    bytes_a_key = round_up(D, LANES) * (8 * itemsize + 8 if backward else 4 * itemsize + 8)
    return bytes_a_key + (4 * LANES if mask and not backward else 0)


# -- walks over a program's pairs, queries and keys --------------------------------------------


def _for_pairs(plan: _Plan, body: Callable) -> None:
    """body(b, h) for the first of every ``unroll`` heads."""
    groups = plan.heads // plan.unroll

    def step(n, _):
        b, group = divide(n, groups)
        body(b, group * plan.unroll)

    _loop(plan.batch * groups, step)


def _for_queries(plan: _Plan, i: Any, body: Callable, *, causal: bool) -> None:
    """body(start, size) over the queries of block i in chunks.

    What is left of the last block is a chunk of its own size. Causal: body(start, size, position),
    with the chunk's first query among all, which is known when the kernel is traced.
    """
    if causal:
        _for_positions(plan, i, body)
        return
    chunk = plan.query_chunk
    inside: Any = plan.queries
    if plan.blocks > 1:
        inside = jnp.minimum(plan.rows, plan.queries - i * plan.rows)
    _loop(divide(inside, chunk)[0], lambda n, _: body(_start_of(n, chunk), chunk))
    if left := plan.queries % chunk:
        start = (plan.queries - 1) % plan.rows // chunk * chunk
        if plan.blocks == 1:
            body(start, left)
        else:
            pl.when(i == plan.blocks - 1)(lambda: body(start, left))


def _for_positions(plan: _Plan, i: Any, body: Callable) -> None:
    for block in range(plan.blocks):
        first = block * plan.rows
        last = min(first + plan.rows, plan.queries)

        def chunks(first=first, last=last):
            for position in range(first, last, plan.query_chunk):
                body(position - first, min(plan.query_chunk, last - position), position)

        if plan.blocks == 1:
            chunks()
        else:
            pl.when(i == block)(chunks)


def _for_keys(plan: _Plan, body: Callable, carry: Any) -> Any:
    """carry = body(start, size, carry) over all keys in chunks."""
    chunk = plan.key_chunk
    full = plan.keys // chunk
    carry = _loop(full, lambda n, carry: body(_start_of(n, chunk), chunk, carry), carry)
    if left := plan.keys % chunk:
        carry = body(full * chunk, left, carry)
    return carry


def _start_of(n: Any, chunk: int) -> Any:
    return n * chunk if isinstance(n, int) else pl.multiple_of(n * chunk, chunk)


def _loop(count: Any, body: Callable, carry: Any = None) -> Any:
    if isinstance(count, int) and count <= 1:
        return body(0, carry) if count else carry
    return jax.lax.fori_loop(0, count, body, carry)


# -- forward -----------------------------------------------------------------------------------


def _forward_kernel(*refs, plan: _Plan, scale: float, has_bias: bool, has_mask: bool, causal: bool):
    """One program: some (clip, head) pairs and a block of their queries.

    Walks the queries in chunks, each against all keys at once.
    """
    q_ref, k_ref, v_ref, *extra, out_ref, lse_ref = refs
    bias_ref, mask_ref = _take(extra, has_bias), _take(extra, has_mask)
    may_be_empty = has_bias or has_mask  # a query may have no key
    i = pl.program_id(2)  # read here: jax 0.7.1 interprets no program_id inside a loop

    def pair(b, first):
        attended = _column(mask_ref[b]) if has_mask else None

        def chunk(start, size, position=None):
            at = pl.ds(start, size)
            parts = [slice(None)]  # of the keys; causal: those before the chunk, and its own
            if causal:
                parts = [slice(position), slice(position, position + size)][position == 0 :]
            for h in (first + j for j in range(plan.unroll)):
                scores = []  # (s, t) of each part
                for part in parts:
                    bias = bias_ref[h, part, at] if has_bias else None
                    k, q = k_ref[b, h, part], q_ref[b, h, at, :]
                    seen = attended[part] if causal and attended is not None else attended
                    diagonal = causal and part.start == position
                    scores.append(_scores(k, q, scale, bias, seen, diagonal))
                row_max = functools.reduce(jnp.maximum, [x.max(0, keepdims=True) for x in scores])
                if may_be_empty:  # a query without any key would give nan
                    row_max = jnp.where(row_max == -jnp.inf, 0.0, row_max)
                p = [jnp.exp2(x - row_max) for x in scores]
                row_sum = functools.reduce(jnp.add, [x.sum(0, keepdims=True) for x in p])
                v = [v_ref[b, h, part] for part in parts]
                products = [dot(x, y.astype(x.dtype), (0, 0)) for x, y in zip(v, p, strict=True)]
                out = functools.reduce(jnp.add, products)  # (D, t)
                out = out / (jnp.where(row_sum == 0, 1.0, row_sum) if may_be_empty else row_sum)
                out_ref[b, h, at, :] = out.T.astype(out_ref.dtype)
                lse = row_max * _LN2 + jnp.log(row_sum)
                lse_ref[b, h, :, at] = (
                    jnp.where(row_sum == 0, -jnp.inf, lse) if may_be_empty else lse
                )

        _for_queries(plan, i, chunk, causal=causal)

    _for_pairs(plan, pair)


def _scores(k, q, scale, bias, attended, diagonal=False):
    """(S, t) in base 2, so that exp2 is all that is left of the softmax; masked keys are -inf.

    ``diagonal``: keys and queries are of the same positions, and a later key is masked too.
    """
    scores = dot(k, q, (1, 1)) * (scale * _LOG2E)
    if bias is not None:
        scores = scores + bias
    if diagonal:
        key, query = (jax.lax.broadcasted_iota(jnp.int32, scores.shape, axis) for axis in (0, 1))
        scores = jnp.where(key <= query, scores, -jnp.inf)
    return scores if attended is None else jnp.where(attended > 0, scores, -jnp.inf)


def _column(row):
    """A clip's mask, a row (1, S) in memory, as the column (S, 1) that lies along the keys."""
    return jnp.broadcast_to(row, (8, row.shape[1])).T[:, :1]


def _take(refs: list, given: bool):
    return refs.pop(0) if given else None


def forward(q, k, v, *, scale, bias=None, key_mask=None, causal=False):
    masked = key_mask is not None
    keys = _keys_at_once(q.shape[3], q.dtype, backward=False, mask=masked)
    if k.shape[2] <= keys:
        return _forward(q, k, v, scale, bias, key_mask, causal, q.dtype)
    # more keys than VMEM holds: in parts, joined by their log-sums
    parts = []
    for at in _parts(k.shape[2], keys):
        mask = None if key_mask is None else key_mask[:, at]
        parts.append(_forward(q, k[:, :, at], v[:, :, at], scale, None, mask, False, jnp.float32))
    lse = jax.nn.logsumexp(jnp.stack([part for _, part in parts]), axis=0)
    shift = jnp.where(lse == -jnp.inf, 0.0, lse)
    out = sum(jnp.exp(part - shift)[..., None] * out for out, part in parts)
    return out.astype(q.dtype), lse


def _forward(q, k, v, scale, bias, key_mask, causal, dtype):
    (B, H, T, D), S = q.shape, k.shape[2]
    given = dict(bias=bias is not None, mask=key_mask is not None, causal=causal)
    plan = _plan(q.shape, S, q.dtype, backward=False, **given)
    specs = _specs(plan, D)
    operands, extra_specs = _extras(plan, bias, key_mask)
    kernel = functools.partial(
        _forward_kernel,
        plan=plan,
        scale=scale,
        has_bias=bias is not None,
        has_mask=key_mask is not None,
        causal=causal,
    )
    out, lse = call(
        kernel,
        *(q, k, v, *operands),
        name="vatt_attention_forward",
        grid=(H // plan.heads, B // plan.batch, plan.blocks),
        semantics=("parallel", "parallel", "parallel"),
        in_specs=[specs.queries, specs.keys, specs.keys, *extra_specs],
        out_specs=[specs.queries, specs.statistics],
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, dtype),
            jax.ShapeDtypeStruct((B, H, 1, T), jnp.float32),
        ],
        flops=flops("fwd", B, H, T, S, D),
        exps=B * H * T * S,
        flags=LP_SCHEDULER if T >= _LP_QUERIES and q.dtype == jnp.bfloat16 else {},
    )
    return out, lse[:, :, 0]


class _Specs(NamedTuple):
    queries: pl.BlockSpec
    keys: pl.BlockSpec
    statistics: pl.BlockSpec


def _specs(plan: _Plan, D: int) -> _Specs:
    """Blocks on the grid (heads, batch, queries)."""
    return _Specs(
        pl.BlockSpec((plan.batch, plan.heads, plan.rows, D), lambda h, b, i: (b, h, i, 0)),
        pl.BlockSpec((plan.batch, plan.heads, plan.keys, D), lambda h, b, i: (b, h, 0, 0)),
        pl.BlockSpec((plan.batch, plan.heads, 1, plan.rows), lambda h, b, i: (b, h, 0, i)),
    )


def _extras(plan: _Plan, bias, key_mask) -> tuple[list, list]:
    """bias (H, S, T) in base 2 and key_mask (B, 1, S) as kernels take them, and their blocks.

    Only those that are given.
    """
    operands, specs = [], []
    if bias is not None:
        operands.append(jnp.swapaxes(bias, 1, 2).astype(jnp.float32) * _LOG2E)
        specs.append(pl.BlockSpec((plan.heads, plan.keys, plan.rows), lambda h, b, i: (h, 0, i)))
    if key_mask is not None:
        operands.append(key_mask.astype(jnp.float32)[:, None])
        specs.append(pl.BlockSpec((plan.batch, 1, plan.keys), lambda h, b, i: (b, 0, 0)))
    return operands, specs


def _parts(size: int, limit: int) -> list[slice]:
    """``size`` in as few parts of at most ``limit`` as will do, about equal."""
    count = -(-size // limit)
    step = round_up(-(-size // count), LANES)
    return [slice(start, min(start + step, size)) for start in range(0, size, step)]


# -- backward ----------------------------------------------------------------------------------


def _backward_kernel(
    *refs,
    plan: _Plan,
    scale: float,
    has_bias: bool,
    has_mask: bool,
    causal: bool,
    bias_grad: bool,
):
    """One program: some (clip, head) pairs and a block of their queries.

    Walks the queries in chunks, and for each chunk the keys: five products a tile. d_k and d_v are
    summed in fp32, transposed, over the blocks of a pair, d_bias in its output over all clips.
    """
    d_out_ref, q_ref, k_ref, v_ref, out_ref, lse_ref, d_lse_ref, *extra = refs
    bias_ref, mask_ref = _take(extra, has_bias), _take(extra, has_mask)
    d_q_ref, d_k_ref, d_v_ref, *extra = extra
    d_bias_ref = _take(extra, bias_grad)
    d_k_sum, d_v_sum = extra
    i = pl.program_id(2)

    if bias_grad:

        @pl.when(pl.program_id(1) == 0)
        def _():
            d_bias_ref[...] = jnp.zeros_like(d_bias_ref)

    def pair(b, first):
        @pl.when(i == 0)
        def _():
            d_k_sum[...] = jnp.zeros_like(d_k_sum)
            d_v_sum[...] = jnp.zeros_like(d_v_sum)

        def chunk(start, size, position=None):
            for j in range(plan.unroll):
                one_head(start, size, position, first + j, j)

        def one_head(start, size, position, h, j):
            at = pl.ds(start, size)
            q, d_out = q_ref[b, h, at, :], d_out_ref[b, h, at, :]
            lse = lse_ref[b, h, :, at]  # (1, t)
            keyless = lse == -jnp.inf
            # (D, t): p and d_s then stay in the matrix unit while D rows stream past them, and
            # delta is a sum down the sublanes
            d_out = d_out.T
            out = out_ref[b, h, at, :].T
            delta = (d_out.astype(jnp.float32) * out.astype(jnp.float32)).sum(0, keepdims=True)
            # without a key there is no gradient, whatever comes in
            delta = delta - jnp.where(keyless, 0.0, d_lse_ref[b, h, :, at])
            lse = jnp.where(keyless, 0.0, lse * _LOG2E)

            def keys(start, size, d_q, diagonal=False):
                here = pl.ds(start, size)
                k, v = k_ref[b, h, here, :], v_ref[b, h, here, :]
                bias = bias_ref[h, here, at] if has_bias else None
                attended = _column(mask_ref[b, :, here]) if has_mask else None
                p = jnp.exp2(_scores(k, q, scale, bias, attended, diagonal) - lse)  # (s, t)
                d_v_sum[j, :, here] += dot(d_out, p.astype(d_out.dtype), (1, 1))
                d_s = p * (dot(v, d_out) - delta)
                if bias_grad:
                    d_bias_ref[h, here, at] += d_s
                d_s = d_s.astype(q.dtype)
                d_k_sum[j, :, here] += dot(q, d_s, (0, 1))
                return d_q + dot(k, d_s, (0, 0))  # (D, t)

            d_q = jnp.zeros((q.shape[1], size), jnp.float32)
            if causal:
                d_q = _for_keys(plan._replace(keys=position), keys, d_q)
                d_q = keys(position, size, d_q, diagonal=True)
            else:
                d_q = _for_keys(plan, keys, d_q)
            d_q_ref[b, h, at, :] = (d_q * scale).T.astype(d_q_ref.dtype)

        _for_queries(plan, i, chunk, causal=causal)

        @pl.when(i == plan.blocks - 1)
        def _():
            for j in range(plan.unroll):
                d_k_ref[b, first + j] = (d_k_sum[j] * scale).T.astype(d_k_ref.dtype)
                d_v_ref[b, first + j] = d_v_sum[j].T.astype(d_v_ref.dtype)

    _for_pairs(plan, pair)


def backward(
    d_out,
    d_lse,
    q,
    k,
    v,
    out,
    lse,
    *,
    scale,
    bias=None,
    key_mask=None,
    causal=False,
    bias_grad=False,
):
    masked = key_mask is not None
    keys = _keys_at_once(q.shape[3], q.dtype, backward=True, mask=masked)
    if k.shape[2] <= keys:
        options = (scale, bias, key_mask, causal, bias_grad, q.dtype)
        return _backward(d_out, d_lse, q, k, v, out, lse, *options)
    # lse and out are of all keys: gradients of the parts only have to be put together
    parts = []
    for at in _parts(k.shape[2], keys):
        mask = None if key_mask is None else key_mask[:, at]
        tensors = (d_out, d_lse, q, k[:, :, at], v[:, :, at], out, lse)
        parts.append(_backward(*tensors, scale, None, mask, False, False, jnp.float32))
    d_q, d_k, d_v, _ = zip(*parts, strict=True)
    return sum(d_q).astype(q.dtype), jnp.concatenate(d_k, 2), jnp.concatenate(d_v, 2), None


def _backward(d_out, d_lse, q, k, v, out, lse, scale, bias, key_mask, causal, bias_grad, d_q_dtype):
    (B, H, T, D), S = q.shape, k.shape[2]
    given = dict(bias=bias is not None, mask=key_mask is not None, causal=causal)
    plan = _plan(q.shape, S, q.dtype, backward=True, **given)
    specs = _specs(plan, D)
    operands, extra_specs = _extras(plan, bias, key_mask)
    results = [
        (specs.queries, q.shape, d_q_dtype),
        (specs.keys, k.shape, k.dtype),
        (specs.keys, v.shape, v.dtype),
    ]
    if bias_grad:
        d_bias_spec = pl.BlockSpec((plan.heads, S, T), lambda h, b, i: (h, 0, 0))
        results.append((d_bias_spec, (H, S, T), jnp.float32))
    kernel = functools.partial(
        _backward_kernel,
        plan=plan,
        scale=scale,
        has_bias=bias is not None,
        has_mask=key_mask is not None,
        causal=causal,
        bias_grad=bias_grad,
    )
    d_q, d_k, d_v, *d_bias = call(
        kernel,
        *(d_out, q, k, v, out, lse[:, :, None], d_lse[:, :, None], *operands),
        name="vatt_attention_backward",
        grid=(H // plan.heads, B // plan.batch, plan.blocks),
        semantics=("parallel", "arbitrary" if bias_grad else "parallel", "arbitrary"),
        in_specs=[
            *(specs.queries, specs.queries, specs.keys, specs.keys, specs.queries),
            *(specs.statistics, specs.statistics, *extra_specs),
        ],
        out_specs=[spec for spec, _, _ in results],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in results],
        scratch=[pltpu.VMEM((plan.unroll, D, S), jnp.float32)] * 2,
        flops=flops("bwd", B, H, T, S, D),
        exps=B * H * T * S,
    )
    return d_q, d_k, d_v, jnp.swapaxes(d_bias[0], 1, 2) if bias_grad else None


def unsupported(
    q, k, v, *, scale, bias=None, key_mask=None, causal=False, bias_grad=False
) -> str | None:
    (_, _, T, D), S = q.shape, k.shape[2]
    if reason := unsupported_operands(q, k, v):
        return reason
    if D % 8 or D > LANES:
        return f"head_dim {D} is not a multiple of 8 up to {LANES}"
    longest = _keys_at_once(D, q.dtype, backward=True, mask=key_mask is not None)
    if causal and longest < S:
        return f"causal attention of {S} tokens does not fit; up to {longest} do"
    if bias is not None and max(T, S) > _BIAS_SIDE:
        return (
            f"a bias of {T} x {S} does not fit beside its gradient; "
            f"up to {_BIAS_SIDE} x {_BIAS_SIDE} do"
        )
    return None
