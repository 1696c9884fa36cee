"""The contrastive log-sums in Pallas: a tile of scores lives in VMEM only, feeds row, col and pos, and is gone.

Forward: one kernel. With a promised bound that keeps exp(S) and its sums inside fp32 no maximum is subtracted and a score costs one exp;
without, rows, columns and own texts each keep a running maximum. Backward: one kernel, run twice with the sides exchanged: it recomputes a
tile of scores, weighs it and multiplies it with the side it walks, for d_x (walks texts, and leaves d_scale) and for d_y (walks clips).
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..pallas_common import LANES, call, dot, objection, pad, round_up
from .flops import flops

# M clips of x, N clips in all, P texts a clip, T = N * P texts, D dimensions, C chunks of texts, E = M * T scores

_MAX_BOUND = 48.0  # exp(-48) / a million clips keeps all its bits in fp32, as does exp(48) * a million; temperatures from 1/48 up
_MAX_CHUNK_TEXTS = 1 << 16  # of which the forward holds col, and its maximum, in VMEM
_VMEM_BYTES = (
    12 << 20
)  # of blocks, accumulators and tiles of scores; the smallest chips give a kernel 16 MiB
_TILES = (
    (1024, 2048),
    (512, 2048),
    (512, 1024),
    (512, 512),
    (256, 512),
    (256, 256),
    (128, 256),
    (128, 128),
)  # most flop a byte first
# scores of a loop's turn within a tile, by bytes a number: one code for all of a tile, a turn long enough to hide its ends
_STRIPS = {2: (256, 512), 4: (256, 256)}  # a product of fp32 is six of bf16
_SUBLANES = 8

# what a clip, or a text, brings to a kernel beside its vector: lines of an (8, M) or (8, T) fp32 array
_COUNTS, _GRADIENT, _LSE, _OWN_GRADIENT, _OWN_LSE = range(5)


# -- one tile of scores ------------------------------------------------------------------------------------------------


def _own(first, clips, texts, P):
    """text belongs to clip; clips counts within x, whose first clip is ``first``."""
    start = (first + clips) * P
    return (texts >= start) & (texts < start + P)


def _reaches_own(first, clip, clips: int, text, texts: int, P: int):
    """Some of the clips' own texts may lie in the tile of ``clips`` x ``texts`` that starts at (clip, text)."""
    return (text < (first + clip + clips) * P) & (text + texts > (first + clip) * P)


def _lanes(tile, join):
    """(rows, columns) -> (rows, 128), each lane over its own columns: no lane crosses another before the walk ends."""
    return functools.reduce(
        join, (tile[:, at : at + LANES] for at in range(0, tile.shape[1], LANES))
    )


def _strips(rows: int, columns: int, strip: tuple[int, int], take):
    """take(rows, columns), two slices, for all strips of a tile."""

    def turn_row(r, carry):
        here = pl.ds(pl.multiple_of(r * strip[0], strip[0]), strip[0])

        def turn(c, carry):
            take(here, pl.ds(pl.multiple_of(c * strip[1], strip[1]), strip[1]))
            return carry

        return jax.lax.fori_loop(0, columns // strip[1], turn, carry)

    jax.lax.fori_loop(0, rows // strip[0], turn_row, 0)


def _positions(start, size: int, axis: int):
    return start + jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _safe(peak):
    return jnp.where(peak == -jnp.inf, 0.0, peak)  # nothing seen yet: -inf less -inf would be nan


def _log(total, peak=0.0):
    empty = total == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, total)) + peak)


# -- forward -----------------------------------------------------------------------------------------------------------


def _forward_kernel(
    first, scale, x, y, x_lines, y_lines, row, pos, col, x_columns, row_total, own_total, *peaks,
    strip: tuple[int, int], texts_per_clip: int, clips_masked: bool, texts_masked: bool,
):  # fmt: skip
    """One program: a tile of clips against a tile of texts, strip by strip; each score is computed once.

    The grid is (C, clip tiles, text tiles): within a chunk of texts the last axis completes row and pos of a clip tile, kept by lane until
    its end; the axis before completes col, a line of its (text tiles, texts) block a tile. peaks, if any: row, own, col, for a running maximum.
    """
    m, n = pl.program_id(1), pl.program_id(2)
    clip, text = m * x.shape[0], (pl.program_id(0) * pl.num_programs(2) + n) * y.shape[0]
    first, running = first[0], bool(peaks)
    col, line = col.at[0], pl.ds(n, 1)
    row_peak, own_peak, col_peak = peaks or (None,) * 3

    @pl.when(n == 0)
    def _():
        for total in (row_total, own_total):
            total[...] = jnp.zeros_like(total)
        if running:
            for peak in (row_peak, own_peak):
                peak[...] = jnp.full_like(peak, -jnp.inf)
        if clips_masked:
            x_columns[...] = x_lines[...].T

    @pl.when(m == 0)
    def _():
        col[line, :] = jnp.zeros((1, col.shape[1]), jnp.float32)
        if running:
            col_peak[line, :] = jnp.full((1, col.shape[1]), -jnp.inf, jnp.float32)

    def fold(total, peak, rows, scores):
        """A running log-sum by lane, peak + log(total), takes in scores; -inf counts as absent."""
        before = peak[rows, :]
        higher = jnp.maximum(before, _lanes(scores, jnp.maximum))
        safe = _safe(higher)
        terms = (
            jnp.exp(scores[:, at : at + LANES] - safe) for at in range(0, scores.shape[1], LANES)
        )
        total[rows, :] = functools.reduce(jnp.add, terms, total[rows, :] * jnp.exp(before - safe))
        peak[rows, :] = higher

    def counted(rows, values, otherwise):
        """Of x_valid clips; the others' values are ``otherwise``."""
        return (
            jnp.where(x_columns[rows, _COUNTS : _COUNTS + 1] > 0, values, otherwise)
            if clips_masked
            else values
        )

    def take(rows, columns):
        scores = dot(x[rows, :], y[columns, :], (1, 1)) * scale[0]
        if texts_masked:
            scores = jnp.where(y_lines[_COUNTS : _COUNTS + 1, columns] > 0, scores, -jnp.inf)
        if running:
            fold(row_total, row_peak, rows, scores)
            counting = counted(rows, scores, -jnp.inf)
            before = col_peak[line, columns]
            higher = jnp.maximum(before, jnp.max(counting, 0, keepdims=True))
            safe = _safe(higher)
            col[line, columns] = col[line, columns] * jnp.exp(before - safe) + jnp.sum(
                jnp.exp(counting - safe), 0, keepdims=True
            )
            col_peak[line, columns] = higher
            terms = scores
        else:
            terms = jnp.exp(scores)
            row_total[rows, :] += _lanes(terms, jnp.add)
            col[line, columns] += jnp.sum(counted(rows, terms, 0.0), 0, keepdims=True)

        (clips, texts) = scores.shape
        first_clip, first_text = clip + rows.start, text + columns.start

        @pl.when(_reaches_own(first, first_clip, clips, first_text, texts, texts_per_clip))
        def _():
            own = _own(
                first,
                _positions(first_clip, clips, 0),
                _positions(first_text, texts, 1),
                texts_per_clip,
            )
            if running:
                fold(own_total, own_peak, rows, jnp.where(own, scores, -jnp.inf))
            else:
                own_total[rows, :] += _lanes(jnp.where(own, terms, 0.0), jnp.add)

    _strips(x.shape[0], y.shape[0], strip, take)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        for lse, total, peak in ((row, row_total, row_peak), (pos, own_total, own_peak)):
            by_lane = total[...].T  # clips along lanes, as the result has them
            if running:
                peaks_by_lane = peak[...].T
                highest = jnp.max(peaks_by_lane, 0, keepdims=True)
                by_lane *= jnp.exp(peaks_by_lane - _safe(highest))
                lse[0] = _log(jnp.sum(by_lane, 0, keepdims=True), highest)
            else:
                lse[0] = _log(jnp.sum(by_lane, 0, keepdims=True))

    @pl.when(m == pl.num_programs(1) - 1)
    def _():
        col[line, :] = _log(col[line, :], col_peak[line, :] if running else 0.0)


def forward(x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None):
    (M, D), T, running = x.shape, y.shape[0], _running(bound)
    C = max(
        pl.cdiv(T, _MAX_CHUNK_TEXTS), min(2, pl.cdiv(T, _STRIPS[x.dtype.itemsize][1]))
    )  # col of a chunk stays in VMEM; a chip's two cores take one each
    (clips, texts), strip = _tile(M, pl.cdiv(T, C), D, x.dtype, "forward")
    clip_tiles, text_tiles = pl.cdiv(M, clips), pl.cdiv(pl.cdiv(T, C), texts)
    padded_M, padded_T = clip_tiles * clips, C * text_tiles * texts
    row, pos, col = call(
        functools.partial(
            _forward_kernel,
            strip=strip,
            texts_per_clip=texts_per_clip,
            clips_masked=x_valid is not None or padded_M > M,
            texts_masked=y_valid is not None or padded_T > T,
        ),
        first.reshape(1),
        scale.reshape(1),
        pad(x, 0, padded_M),
        pad(y, 0, padded_T),
        pad(_lines(_counts(x_valid, M)), 1, padded_M),
        pad(_lines(_counts(y_valid, T)), 1, padded_T),
        name="vatt_contrastive_lse_forward",
        prefetched=2,
        grid=(C, clip_tiles, text_tiles),
        semantics=("parallel", "arbitrary", "arbitrary"),
        in_specs=[
            pl.BlockSpec((clips, D), lambda c, m, n, *_: (m, 0)),
            pl.BlockSpec((texts, D), lambda c, m, n, *_: (c * text_tiles + n, 0)),
            pl.BlockSpec((_SUBLANES, clips), lambda c, m, n, *_: (0, m)),
            pl.BlockSpec((_SUBLANES, texts), lambda c, m, n, *_: (0, c * text_tiles + n)),
        ],
        out_specs=(
            pl.BlockSpec((1, 1, clips), lambda c, m, n, *_: (c, 0, m)),
            pl.BlockSpec((1, 1, clips), lambda c, m, n, *_: (c, 0, m)),
            pl.BlockSpec((1, text_tiles, texts), lambda c, m, n, *_: (c, 0, 0)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((C, 1, padded_M), jnp.float32),
            jax.ShapeDtypeStruct((C, 1, padded_M), jnp.float32),
            jax.ShapeDtypeStruct((C, text_tiles, texts), jnp.float32),
        ),
        scratch=[
            pltpu.VMEM((clips, _SUBLANES), jnp.float32),
            *[pltpu.VMEM((clips, LANES), jnp.float32)] * (4 if running else 2),
            *[pltpu.VMEM((text_tiles, texts), jnp.float32)] * running,
        ],
        flops=flops("fwd", M, T, D),
        exps=M * T * (2 if running else 1),
        bytes_accessed=(C * M + clip_tiles * T) * D * x.dtype.itemsize,
    )
    row, pos = (jax.nn.logsumexp(lse[:, 0, :M], axis=0) for lse in (row, pos))
    return row, col.reshape(-1)[:T], pos


# -- backward ----------------------------------------------------------------------------------------------------------


def _backward_kernel(
    first, scale, here, there, here_lines, there_lines, gradient, d_scales, total, here_columns, d_scale,
    *, strip: tuple[int, int], here_clips: bool, texts_per_clip: int, running: bool, clips_masked: bool, texts_masked: bool,
):  # fmt: skip
    """One program: a tile of ``here`` against a tile of ``there``, strip by strip; one are clips and one are texts (here_clips: here).

    Weighs the scores, weight = d loss / d score, and adds weights @ there to total, of which the walk over there's tiles makes ``gradient``.
    d_scales receives the column sums of weights * products where here are clips.
    """
    i, j = pl.program_id(0), pl.program_id(1)
    first, factor = first[0], scale[0]

    @pl.when(j == 0)
    def _():
        total[...] = jnp.zeros_like(total)
        d_scale[...] = jnp.zeros_like(d_scale)
        here_columns[...] = here_lines[...].T

    def weigh(rows, columns, first_clip, first_text, with_own: bool):
        def here_line(line):
            return here_columns[rows, line : line + 1]

        def there_line(line):
            return there_lines[line : line + 1, columns]

        clip_line, text_line = (here_line, there_line) if here_clips else (there_line, here_line)
        clip_size, text_size = (
            (rows.size, columns.size) if here_clips else (columns.size, rows.size)
        )
        products = dot(here[rows, :], there[columns, :], (1, 1))
        scores = products * factor
        if texts_masked:
            scores = jnp.where(text_line(_COUNTS) > 0, scores, -jnp.inf)
        if with_own:
            axis = 0 if here_clips else 1
            own = _own(
                first,
                _positions(first_clip, clip_size, axis),
                _positions(first_text, text_size, 1 - axis),
                texts_per_clip,
            )
        if running:
            weights = jnp.exp(scores - text_line(_LSE)) * text_line(_GRADIENT)
            if clips_masked:
                weights = jnp.where(clip_line(_COUNTS) > 0, weights, 0.0)
            weights += jnp.exp(scores - clip_line(_LSE)) * clip_line(_GRADIENT)
            if with_own:
                weights += jnp.where(
                    own, jnp.exp(scores - clip_line(_OWN_LSE)) * clip_line(_OWN_GRADIENT), 0.0
                )
        else:
            gradients = text_line(_GRADIENT)
            if clips_masked:
                gradients = jnp.where(clip_line(_COUNTS) > 0, gradients, 0.0)
            gradients = gradients + clip_line(_GRADIENT)
            if with_own:
                gradients += jnp.where(own, clip_line(_OWN_GRADIENT), 0.0)
            weights = jnp.exp(scores) * gradients
        if here_clips:
            d_scale[:, columns] += jnp.sum(weights * products, 0, keepdims=True)
        total[rows, :] += dot(weights.astype(there.dtype), there[columns, :])

    def take(rows, columns):
        starts = i * here.shape[0] + rows.start, j * there.shape[0] + columns.start
        (clip, text), (clips, texts) = (
            (starts, strip) if here_clips else (starts[::-1], strip[::-1])
        )
        own_here = _reaches_own(first, clip, clips, text, texts, texts_per_clip)
        # few strips hold clips' own texts; a way of their own spares the others the time
        pl.when(own_here)(lambda: weigh(rows, columns, clip, text, True))
        pl.when(jnp.logical_not(own_here))(lambda: weigh(rows, columns, clip, text, False))

    _strips(here.shape[0], there.shape[0], strip, take)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        gradient[...] = (total[...] * factor).astype(gradient.dtype)
        d_scales[0] = d_scale[...]


def _gradient(
    first, scale, here, there, here_lines, there_lines, *, name, here_clips: bool, masked, **options
):
    """The gradient of here in its dtype, and d_scale by column. ``masked``: whether invalid ones are among here, among there."""
    (size, D), others = here.shape, there.shape[0]
    (heres, theres), strip = _tile(size, others, D, here.dtype, "backward")
    padded, padded_others = round_up(size, heres), round_up(others, theres)
    masked = (masked[0] or padded > size, masked[1] or padded_others > others)
    clips_masked, texts_masked = masked if here_clips else masked[::-1]
    tiles = padded // heres
    gradient, d_scales = call(
        functools.partial(
            _backward_kernel,
            strip=strip,
            here_clips=here_clips,
            clips_masked=clips_masked,
            texts_masked=texts_masked,
            **options,
        ),
        first.reshape(1),
        scale.reshape(1),
        pad(here, 0, padded),
        pad(there, 0, padded_others),
        pad(here_lines, 1, padded),
        pad(there_lines, 1, padded_others),
        name=name,
        prefetched=2,
        grid=(tiles, padded_others // theres),
        semantics=("parallel", "arbitrary"),
        in_specs=[
            pl.BlockSpec((heres, D), lambda i, j, *_: (i, 0)),
            pl.BlockSpec((theres, D), lambda i, j, *_: (j, 0)),
            pl.BlockSpec((_SUBLANES, heres), lambda i, j, *_: (0, i)),
            pl.BlockSpec((_SUBLANES, theres), lambda i, j, *_: (0, j)),
        ],
        out_specs=(
            pl.BlockSpec((heres, D), lambda i, j, *_: (i, 0)),
            pl.BlockSpec((1, 1, theres), lambda i, j, *_: (i, 0, 0)),
        ),
        out_shape=(
            jax.ShapeDtypeStruct((padded, D), here.dtype),
            jax.ShapeDtypeStruct((tiles, 1, theres), jnp.float32),
        ),
        scratch=[
            pltpu.VMEM((heres, D), jnp.float32),
            pltpu.VMEM((heres, _SUBLANES), jnp.float32),
            pltpu.VMEM((1, theres), jnp.float32),
        ],
        flops=2 * flops("fwd", size, others, D),  # the scores once more, and one gradient
        exps=size * others * (2 if options["running"] else 1),
        bytes_accessed=(2 * size + tiles * others) * D * here.dtype.itemsize,
    )
    return gradient[:size], d_scales


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
    running = _running(bound)
    clips = (
        x,
        _lines(
            _counts(x_valid, len(x)), *_share(d_row, row, running), *_share(d_pos, pos, running)
        ),
        x_valid is not None,
    )
    texts = y, _lines(_counts(y_valid, len(y)), *_share(d_col, col, running)), y_valid is not None

    def gradient(name, here, there, here_clips):
        (here, here_lines, here_masked), (there, there_lines, there_masked) = here, there
        return _gradient(
            first, scale, here, there, here_lines, there_lines, name=name, masked=(here_masked, there_masked),
            here_clips=here_clips, texts_per_clip=texts_per_clip, running=running,
        )  # fmt: skip

    d_x, d_scales = gradient("vatt_contrastive_lse_d_x", clips, texts, True)
    d_y, _ = gradient("vatt_contrastive_lse_d_y", texts, clips, False)
    return d_x, d_y, d_scales.sum()


def _share(d_lse, lse, running: bool):
    """Gradient g and log-sum l such that a score's weight is g exp(S - l), or g exp(S) unless running; an empty set's g is 0, its l inf."""
    empty = lse == -jnp.inf
    gradient = jnp.where(empty, 0.0, d_lse.astype(jnp.float32))
    lse = jnp.where(empty, jnp.inf, lse)
    return (gradient, lse) if running else (gradient * jnp.exp(-lse), lse)


# -- both --------------------------------------------------------------------------------------------------------------


def _running(bound) -> bool:
    return bound is None or not bound <= _MAX_BOUND


def _counts(valid, size: int):
    """(size,) fp32: 1 where valid."""
    return jnp.ones(size, jnp.float32) if valid is None else valid.astype(jnp.float32)


def _lines(*lines):
    """(8, size) fp32 of the given lines, the missing ones 0: a register's rows, turned to columns in one transposition."""
    return jnp.stack([*lines, *[jnp.zeros_like(lines[0])] * (_SUBLANES - len(lines))])


def _tile(
    rows: int, columns: int, dim: int, dtype, mode: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """A tile of scores (rows, columns), the largest that fits, and its strips."""
    tile = next(
        (tile for tile in _TILES if _bytes(tile, dim, dtype, mode) <= _VMEM_BYTES), _TILES[-1]
    )
    cuts = [
        _cut(*sizes)
        for sizes in zip((rows, columns), tile, _STRIPS[jnp.dtype(dtype).itemsize], strict=True)
    ]
    return (cuts[0][0], cuts[1][0]), (cuts[0][1], cuts[1][1])


def _cut(size: int, tile: int, strip: int) -> tuple[int, int]:
    """Tile and strip, multiples of 128, that leave little beyond ``size`` and take few steps; a step costs some quarter of a strip."""
    strip = min(tile, strip)
    strip = round_up(pl.cdiv(size, pl.cdiv(size, strip)), LANES)
    strips = pl.cdiv(size, strip)
    together = min(
        range(1, tile // strip + 1),
        key=lambda count: round_up(strips, count) + pl.cdiv(strips, count) / 4,
    )
    return together * strip, strip


def _bytes(tile: tuple[int, int], dim: int, dtype, mode: str) -> int:
    """Of VMEM, about: vectors held twice; the gradient; a strip's scores and weights, its fp32 vectors split in parts for the product."""
    rows, columns = tile
    size = jnp.dtype(dtype).itemsize
    strip = [min(sizes) for sizes in zip(tile, _STRIPS[size], strict=True)]
    dim = round_up(dim, LANES)
    total = (
        2 * (rows + columns) * dim * size
        + (2 if mode == "forward" else 4) * strip[0] * strip[1] * 4
    )
    if mode == "backward":
        total += rows * dim * (4 + 2 * size)
    return total + (0 if size == 2 else 2 * sum(strip) * dim * size)


def unsupported(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> str | None:
    if reason := objection(x, y, scale):
        return reason
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x.dtype} is for the reference; the kernels take float32 and bfloat16"
    if _bytes(_TILES[-1], x.shape[1], x.dtype, "backward") > _VMEM_BYTES:
        return f"vectors of {x.shape[1]} dimensions do not fit its tiles"
    return None
