"""The contrastive log-sums in Pallas: a tile of scores lives in VMEM only, feeds row, col and pos.

The matrix of scores is never stored. Forward: one kernel. With a bound that keeps exp(S) and its
sums inside fp32, no maximum is subtracted and a score costs one exp. Without it, rows, columns and
own texts each keep a running maximum. Backward: one kernel, run twice with the sides exchanged. It
recomputes a tile of scores, turns it into weights and multiplies these with the side it walks: for
d_x (walks texts, and writes d_scale too) and for d_y (walks clips).
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from ..pallas_common import LANES, call, dot, pad, round_up, unsupported_operands
from .bound import needs_running_max
from .flops import flops

# M clips of x, N clips in all, P texts a clip, T = N * P texts, D dimensions, C chunks of texts,
# E = M * T scores. Inside a kernel, scores and maxima are in base 2: an exponential is one exp2.

_LOG2E, _LN2 = math.log2(math.e), math.log(2)

_MAX_CHUNK_TEXTS = 1 << 16  # of which the forward holds col, and its maximum, in VMEM
# of blocks, accumulators and tiles of scores; the smallest chips give a kernel 16 MiB
_VMEM_BYTES = 12 << 20
_TILES = (  # most flop a byte first
    *((1024, 2048), (512, 2048), (512, 1024), (512, 512)),
    *((256, 512), (256, 256), (128, 256), (128, 128)),
)
# a strip: scores of one turn of the loop within a tile, by bytes a number. The code is the same for
# a whole tile; a turn is long enough to hide its ends. A product of fp32 is six of bf16.
_STRIPS = {2: (256, 512), 4: (256, 256)}
_SUBLANES = 8

# what comes with a clip's, or a text's, vector: lines of an (8, M) or (8, T) fp32 array
_COUNTS, _GRADIENT, _LSE, _OWN_GRADIENT, _OWN_LSE = range(5)


# -- one tile of scores ------------------------------------------------------------------------


def _own(first, clips, texts, P):
    """Whether the text belongs to the clip. Clips count within x, whose first is ``first``."""
    start = (first + clips) * P
    return (texts >= start) & (texts < start + P)


def _reaches_own(first, clip, clips: int, text, texts: int, P: int):
    """Whether own texts may lie in the ``clips`` x ``texts`` tile that starts at (clip, text)."""
    return (text < (first + clip + clips) * P) & (text + texts > (first + clip) * P)


def _lanes(tile, join):
    """(rows, columns) -> (rows, 128), each lane over its own columns.

    Lanes are joined with each other only when the walk ends.
    """
    return functools.reduce(join, _by_lane(tile))


def _by_lane(tile):
    return (tile[:, at : at + LANES] for at in range(0, tile.shape[1], LANES))


def _for_strips(rows: int, columns: int, strip: tuple[int, int], body):
    """body(rows, columns), two slices, for all strips of a tile."""

    def turn_row(r, carry):
        here = pl.ds(pl.multiple_of(r * strip[0], strip[0]), strip[0])

        def turn(c, carry):
            body(here, pl.ds(pl.multiple_of(c * strip[1], strip[1]), strip[1]))
            return carry

        return jax.lax.fori_loop(0, columns // strip[1], turn, carry)

    jax.lax.fori_loop(0, rows // strip[0], turn_row, 0)


def _positions(start, size: int, axis: int):
    return start + jax.lax.broadcasted_iota(jnp.int32, (size, 1) if axis == 0 else (1, size), axis)


def _finite(m):
    return jnp.where(m == -jnp.inf, 0.0, m)  # nothing seen yet: -inf less -inf would be nan


def _log(l, m=0.0):
    """The natural log-sum of l * 2^m; an empty one is -inf."""
    empty = l == 0
    return jnp.where(empty, -jnp.inf, jnp.log(jnp.where(empty, 1.0, l)) + m * _LN2)


# -- forward -----------------------------------------------------------------------------------

# l and m: refs of a running sum l * 2^m, where m is the maximum so far


def _add_to_rows(l, m, rows, scores):
    """Add scores to the log-sums of rows, lane by lane; -inf adds 0."""
    before = m[rows, :]
    new_m = jnp.maximum(before, _lanes(scores, jnp.maximum))
    finite_m = _finite(new_m)
    terms = (jnp.exp2(part - finite_m) for part in _by_lane(scores))
    l[rows, :] = functools.reduce(jnp.add, terms, l[rows, :] * jnp.exp2(before - finite_m))
    m[rows, :] = new_m


def _add_to_columns(l, m, line, columns, scores):
    """Add scores to the log-sums of columns, which lie in one line of l and m; -inf adds 0."""
    before = m[line, columns]
    new_m = jnp.maximum(before, jnp.max(scores, 0, keepdims=True))
    finite_m = _finite(new_m)
    rescaled = l[line, columns] * jnp.exp2(before - finite_m)
    l[line, columns] = rescaled + jnp.sum(jnp.exp2(scores - finite_m), 0, keepdims=True)
    m[line, columns] = new_m


def _finish_rows(lse, l, m):
    """lse (1, 1, rows) <- the log-sums of rows, their lanes joined; m None: no maximum."""
    l_by_lane = l[...].T  # clips along lanes, as the result has them
    if m is None:
        lse[0] = _log(jnp.sum(l_by_lane, 0, keepdims=True))
    else:
        m_by_lane = m[...].T
        highest = jnp.max(m_by_lane, 0, keepdims=True)
        l_by_lane *= jnp.exp2(m_by_lane - _finite(highest))
        lse[0] = _log(jnp.sum(l_by_lane, 0, keepdims=True), highest)


def _forward_kernel(
    first,
    scale,
    x,
    y,
    x_lines,
    y_lines,
    row,
    pos,
    col,
    x_columns,
    row_l,
    own_l,
    *maxima,  # of row, own and col, if a running maximum is kept
    strip: tuple[int, int],
    texts_per_clip: int,
    clips_masked: bool,
    texts_masked: bool,
):
    """One program: a tile of clips by a tile of texts, strip by strip; each score is computed once.

    The grid is (C, clip tiles, text tiles). Within a chunk of texts the last axis completes row and
    pos of a clip tile, which are kept by lane until its end. The axis before completes col, a line
    of its (text tiles, texts) block a tile.
    """
    m, n = pl.program_id(1), pl.program_id(2)
    clip, text = m * x.shape[0], (pl.program_id(0) * pl.num_programs(2) + n) * y.shape[0]
    first, running = first[0], bool(maxima)
    col, line = col.at[0], pl.ds(n, 1)
    row_m, own_m, col_m = maxima or (None,) * 3

    @pl.when(n == 0)
    def _():
        for l in (row_l, own_l):
            l[...] = jnp.zeros_like(l)
        for row_maxima in (row_m, own_m) if running else ():
            row_maxima[...] = jnp.full_like(row_maxima, -jnp.inf)
        if clips_masked:
            x_columns[...] = x_lines[...].T

    @pl.when(m == 0)
    def _():
        col[line, :] = jnp.zeros((1, col.shape[1]), jnp.float32)
        if running:
            col_m[line, :] = jnp.full((1, col.shape[1]), -jnp.inf, jnp.float32)

    def of_valid_clips(rows, values, otherwise):
        """The values of x_valid clips; those of the others are ``otherwise``."""
        if not clips_masked:
            return values
        return jnp.where(x_columns[rows, _COUNTS : _COUNTS + 1] > 0, values, otherwise)

    def add_strip(rows, columns):
        scores = dot(x[rows, :], y[columns, :], (1, 1)) * scale[0]
        if texts_masked:
            scores = jnp.where(y_lines[_COUNTS : _COUNTS + 1, columns] > 0, scores, -jnp.inf)
        if running:
            _add_to_rows(row_l, row_m, rows, scores)
            _add_to_columns(col, col_m, line, columns, of_valid_clips(rows, scores, -jnp.inf))
            terms = scores
        else:
            terms = jnp.exp2(scores)
            row_l[rows, :] += _lanes(terms, jnp.add)
            col[line, columns] += jnp.sum(of_valid_clips(rows, terms, 0.0), 0, keepdims=True)

        (clips, texts) = scores.shape
        first_clip, first_text = clip + rows.start, text + columns.start

        @pl.when(_reaches_own(first, first_clip, clips, first_text, texts, texts_per_clip))
        def _():
            clip_positions = _positions(first_clip, clips, 0)
            text_positions = _positions(first_text, texts, 1)
            own = _own(first, clip_positions, text_positions, texts_per_clip)
            if running:
                _add_to_rows(own_l, own_m, rows, jnp.where(own, scores, -jnp.inf))
            else:
                own_l[rows, :] += _lanes(jnp.where(own, terms, 0.0), jnp.add)

    _for_strips(x.shape[0], y.shape[0], strip, add_strip)

    @pl.when(n == pl.num_programs(2) - 1)
    def _():
        _finish_rows(row, row_l, row_m)
        _finish_rows(pos, own_l, own_m)

    @pl.when(m == pl.num_programs(1) - 1)
    def _():
        col[line, :] = _log(col[line, :], col_m[line, :] if running else 0.0)


def forward(x, y, *, scale, texts_per_clip, first, x_valid=None, y_valid=None, bound=None):
    (M, D), T, running = x.shape, y.shape[0], needs_running_max(bound)
    # col of a chunk stays in VMEM; a chip's two cores take one chunk each
    C = max(pl.cdiv(T, _MAX_CHUNK_TEXTS), min(2, pl.cdiv(T, _STRIPS[x.dtype.itemsize][1])))
    (clips, texts), strip = _tile(M, pl.cdiv(T, C), D, x.dtype, "forward")
    clip_tiles, text_tiles = pl.cdiv(M, clips), pl.cdiv(pl.cdiv(T, C), texts)
    padded_M, padded_T = clip_tiles * clips, C * text_tiles * texts
    kernel = functools.partial(
        _forward_kernel,
        strip=strip,
        texts_per_clip=texts_per_clip,
        clips_masked=x_valid is not None or padded_M > M,
        texts_masked=y_valid is not None or padded_T > T,
    )
    row, pos, col = call(
        kernel,
        *(first.reshape(1), _base_2(scale)),
        *(pad(x, 0, padded_M), pad(y, 0, padded_T)),
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


# -- backward ----------------------------------------------------------------------------------


def _backward_kernel(
    first,
    scale,
    here,
    there,
    here_lines,
    there_lines,
    gradient,
    d_scales,
    acc,
    here_columns,
    d_scale,
    *,
    strip: tuple[int, int],
    here_clips: bool,
    texts_per_clip: int,
    running: bool,
    clips_masked: bool,
    texts_masked: bool,
):
    """One program: a tile of ``here`` by a tile of ``there``, strip by strip.

    One are clips and the other are texts; here_clips: here are. Computes weight = d loss / d score
    and adds weights @ there to acc; the walk over there's tiles makes ``gradient`` of it. d_scales
    gets the column sums of weights * products where here are clips.
    """
    i, j = pl.program_id(0), pl.program_id(1)
    first, factor = first[0], scale[0]

    @pl.when(j == 0)
    def _():
        acc[...] = jnp.zeros_like(acc)
        d_scale[...] = jnp.zeros_like(d_scale)
        here_columns[...] = here_lines[...].T

    def accumulate(rows, columns, first_clip, first_text, with_own: bool):
        def here_line(line):
            return here_columns[rows, line : line + 1]

        def there_line(line):
            return there_lines[line : line + 1, columns]

        clip_line, text_line = (here_line, there_line) if here_clips else (there_line, here_line)
        products = dot(here[rows, :], there[columns, :], (1, 1))
        scores = products * factor
        if texts_masked:
            scores = jnp.where(text_line(_COUNTS) > 0, scores, -jnp.inf)
        own = None
        if with_own:
            axis = 0 if here_clips else 1
            clips = _positions(first_clip, scores.shape[axis], axis)
            texts = _positions(first_text, scores.shape[1 - axis], 1 - axis)
            own = _own(first, clips, texts, texts_per_clip)
        weights = _weights(scores, clip_line, text_line, own, clips_masked, running)
        if here_clips:
            d_scale[:, columns] += jnp.sum(weights * products, 0, keepdims=True)
        acc[rows, :] += dot(weights.astype(there.dtype), there[columns, :])

    def accumulate_strip(rows, columns):
        starts = i * here.shape[0] + rows.start, j * there.shape[0] + columns.start
        (clip, text), (clips, texts) = (
            (starts, strip) if here_clips else (starts[::-1], strip[::-1])
        )
        own_here = _reaches_own(first, clip, clips, text, texts, texts_per_clip)
        # few strips hold clips' own texts; a branch of their own spares the others the time
        pl.when(own_here)(lambda: accumulate(rows, columns, clip, text, True))
        pl.when(jnp.logical_not(own_here))(lambda: accumulate(rows, columns, clip, text, False))

    _for_strips(here.shape[0], there.shape[0], strip, accumulate_strip)

    @pl.when(j == pl.num_programs(1) - 1)
    def _():
        gradient[...] = (acc[...] * (factor * _LN2)).astype(gradient.dtype)
        d_scales[0] = d_scale[...]


def _weights(scores, clip_line, text_line, own, clips_masked: bool, running: bool):
    """d loss / d scores. own None: no text is its clip's own.

    clip_line and text_line give a line, _GRADIENT for instance, along the clips or the texts.
    """
    if running:
        weights = jnp.exp2(scores - text_line(_LSE)) * text_line(_GRADIENT)
        if clips_masked:
            weights = jnp.where(clip_line(_COUNTS) > 0, weights, 0.0)
        weights += jnp.exp2(scores - clip_line(_LSE)) * clip_line(_GRADIENT)
        if own is not None:
            own_weights = jnp.exp2(scores - clip_line(_OWN_LSE)) * clip_line(_OWN_GRADIENT)
            weights += jnp.where(own, own_weights, 0.0)
        return weights
    gradients = text_line(_GRADIENT)
    if clips_masked:
        gradients = jnp.where(clip_line(_COUNTS) > 0, gradients, 0.0)
    gradients = gradients + clip_line(_GRADIENT)
    if own is not None:
        gradients += jnp.where(own, clip_line(_OWN_GRADIENT), 0.0)
    return jnp.exp2(scores) * gradients


def _gradient(
    first, scale, here, there, here_lines, there_lines, *, name, here_clips: bool, masked, **options
):
    """The gradient of here in its dtype, and d_scale by column.

    ``masked``: whether invalid ones are among here, among there.
    """
    (size, D), others = here.shape, there.shape[0]
    (heres, theres), strip = _tile(size, others, D, here.dtype, "backward")
    padded, padded_others = round_up(size, heres), round_up(others, theres)
    masked = (masked[0] or padded > size, masked[1] or padded_others > others)
    clips_masked, texts_masked = masked if here_clips else masked[::-1]
    tiles = padded // heres
    kernel = functools.partial(
        _backward_kernel,
        strip=strip,
        here_clips=here_clips,
        clips_masked=clips_masked,
        texts_masked=texts_masked,
        **options,
    )
    gradient, d_scales = call(
        kernel,
        *(first.reshape(1), _base_2(scale)),
        *(pad(here, 0, padded), pad(there, 0, padded_others)),
        *(pad(here_lines, 1, padded), pad(there_lines, 1, padded_others)),
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
    running = needs_running_max(bound)
    clip_lines = _lines(
        _counts(x_valid, len(x)),
        *_prepare_gradients(d_row, row, running),
        *_prepare_gradients(d_pos, pos, running),
    )
    text_lines = _lines(_counts(y_valid, len(y)), *_prepare_gradients(d_col, col, running))
    clips = x, clip_lines, x_valid is not None
    texts = y, text_lines, y_valid is not None

    def gradient(name, here, there, here_clips):
        (here, here_lines, here_masked), (there, there_lines, there_masked) = here, there
        return _gradient(
            *(first, scale, here, there, here_lines, there_lines),
            name=name,
            masked=(here_masked, there_masked),
            here_clips=here_clips,
            texts_per_clip=texts_per_clip,
            running=running,
        )

    d_x, d_scales = gradient("vatt_contrastive_lse_d_x", clips, texts, True)
    d_y, _ = gradient("vatt_contrastive_lse_d_y", texts, clips, False)
    return d_x, d_y, d_scales.sum()


def _prepare_gradients(d_lse, lse, running: bool):
    """Gradient g and log-sum l of a set, such that a score's weight is g 2^(S - l) in base 2.

    Unless running it is g 2^S. An empty set has g = 0 and l = inf.
    """
    empty = lse == -jnp.inf
    gradient = jnp.where(empty, 0.0, d_lse.astype(jnp.float32))
    lse = jnp.where(empty, jnp.inf, lse)
    return (gradient, lse * _LOG2E) if running else (gradient * jnp.exp(-lse), lse)


# -- both --------------------------------------------------------------------------------------


def _base_2(scale):
    """(1,) fp32, which makes products scores in base 2."""
    return (scale * _LOG2E).reshape(1)


def _counts(valid, size: int):
    """(size,) fp32: 1 where valid."""
    return jnp.ones(size, jnp.float32) if valid is None else valid.astype(jnp.float32)


def _lines(*lines):
    """(8, size) fp32 of the given lines, the missing ones 0.

    They fill a register's rows, so one transposition turns them to columns.
    """
    return jnp.stack([*lines, *[jnp.zeros_like(lines[0])] * (_SUBLANES - len(lines))])


def _tile(
    rows: int, columns: int, dim: int, dtype, mode: str
) -> tuple[tuple[int, int], tuple[int, int]]:
    """A tile of scores (rows, columns), the largest that fits, and its strips."""
    fitting = (tile for tile in _TILES if _bytes(tile, dim, dtype, mode) <= _VMEM_BYTES)
    tile, strip = next(fitting, _TILES[-1]), _STRIPS[jnp.dtype(dtype).itemsize]
    cut_rows = _cut(rows, tile[0], strip[0])
    cut_columns = _cut(columns, tile[1], strip[1])
    return (cut_rows[0], cut_columns[0]), (cut_rows[1], cut_columns[1])


def _cut(size: int, tile: int, strip: int) -> tuple[int, int]:
    """Tile and strip, multiples of 128, that leave little beyond ``size`` and take few steps.

    A step costs about a quarter of a strip.
    """
    strip = min(tile, strip)
    strip = round_up(pl.cdiv(size, pl.cdiv(size, strip)), LANES)
    strips = pl.cdiv(size, strip)
    together = min(
        range(1, tile // strip + 1),
        key=lambda count: round_up(strips, count) + pl.cdiv(strips, count) / 4,
    )
    return together * strip, strip


def _bytes(tile: tuple[int, int], dim: int, dtype, mode: str) -> int:
    """Of VMEM, about: vectors, held twice; the gradient; a strip's scores and weights.

    In fp32 also the strip's vectors, split in parts for the product.
    """
    rows, columns = tile
    size = jnp.dtype(dtype).itemsize
    strip = [min(sizes) for sizes in zip(tile, _STRIPS[size], strict=True)]
    dim = round_up(dim, LANES)
    total = 2 * (rows + columns) * dim * size
    total += (2 if mode == "forward" else 4) * strip[0] * strip[1] * 4
    if mode == "backward":
        total += rows * dim * (4 + 2 * size)
    return total + (0 if size == 2 else 2 * sum(strip) * dim * size)


def unsupported(
    x, y, *, scale, texts_per_clip=1, first=0, x_valid=None, y_valid=None, bound=None
) -> str | None:
    if reason := unsupported_operands(x, y, scale):
        return reason
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"{x.dtype} is for the reference; the kernels take float32 and bfloat16"
    if _bytes(_TILES[-1], x.shape[1], x.dtype, "backward") > _VMEM_BYTES:
        return f"vectors of {x.shape[1]} dimensions do not fit its tiles"
    return None
