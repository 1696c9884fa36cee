"""Pallas kernels on JAX's simulated TPU.

Memory starts as nan, a read outside a buffer raises, parallel steps run in random order on two
cores. A step takes some 10 ms here: tiles are made small instead of inputs large. Whole ops at
their own tiles are test_jax_ops.py's business.
"""

import dataclasses

import pytest
import torch

jax = pytest.importorskip("jax", reason="the Pallas kernels need jax")

import jax.numpy as jnp  # noqa: E402
import jax_calls  # noqa: E402
from jax.experimental.pallas import tpu as pltpu  # noqa: E402

from vatt_fast.kernels import jax_ops, use_backend  # noqa: E402
from vatt_fast.kernels.attention import pallas_tpu as attention  # noqa: E402
from vatt_fast.kernels.cases import (  # noqa: E402
    AttentionCase,
    DropTokenCase,
    NCECase,
    PatchEmbedCase,
    make,
)
from vatt_fast.kernels.contrastive_lse import pallas_tpu as nce  # noqa: E402
from vatt_fast.kernels.drop_token import pallas_tpu as drop_token  # noqa: E402
from vatt_fast.kernels.ops import OPS  # noqa: E402
from vatt_fast.kernels.parity import draw_seeds  # noqa: E402
from vatt_fast.kernels.patch_embed import pallas_tpu as patch_embed  # noqa: E402
from vatt_fast.kernels.settings import interpreting_with  # noqa: E402

_CORES = {"num_cores_or_threads", "num_cores_per_device"} & {
    field.name for field in dataclasses.fields(pltpu.InterpretParams)
}
TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def _fresh_device():
    yield
    pltpu.reset_tpu_interpret_mode_state()


def simulated(order):
    """order: a seed; None: interpreted plainly."""
    if order is None:
        return interpreting_with(None)
    return interpreting_with(pltpu.InterpretParams(random_seed=order, **dict.fromkeys(_CORES, 2)))


def assert_runs_as_the_reference(op, inputs, order, dtype=torch.float32):
    """Outputs and gradients."""
    arguments = jax_calls.translate(op, inputs)
    with use_backend(**{op: "reference"}):
        outputs = OPS[op].jax_function(**arguments)
        named = zip(
            OPS[op].outputs,
            outputs if isinstance(outputs, tuple) else (outputs,),
            strict=True,
        )
        outputs = [
            jnp.swapaxes(value, 1, 2) if name in jax_calls.HEADS_FIRST else value
            for name, value in named
        ]  # as torch has them
        seeds = draw_seeds([jax_calls.to_torch(output) for output in outputs], dtype)
        expected = jax_calls.run(op, inputs, seeds)
    with use_backend(**{op: "pallas_tpu"}), simulated(order):
        result = jax_calls.run(op, inputs, seeds)
    for name, value in expected.items():
        largest = value[value.isfinite()].abs().max().item() if value.isfinite().any() else 0
        allowed = dict(rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype] * max(largest, 1))
        torch.testing.assert_close(
            result[name], value, **allowed, msg=lambda text, name=name: f"{name}: {text}"
        )


# -- drop_token ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("per", "dtype", "order"), [("batch", torch.float32, 1), ("clip", torch.bfloat16, 2)], ids=str
)
def test_drop_token_column_by_column(per, dtype, order, monkeypatch):
    """And backward row by row."""
    monkeypatch.setattr(drop_token, "_VMEM_BYTES", 150_000)  # some columns at a time
    monkeypatch.setattr(drop_token, "_MAX_ROWS", 32)
    case = DropTokenCase("", 2, 45, 23, 300, per)
    assert drop_token._columns(45, 300, jnp.dtype(str(dtype)[6:])) < 300
    assert_runs_as_the_reference("drop_token", make(case, dtype), order, dtype)


@pytest.mark.parametrize(("dtype", "integers"), [("float32", "int32"), ("bfloat16", "int16")])
def test_drop_token_moves_bits(dtype, integers):
    """Whatever they mean, nan and inf among them, and whatever lies beside them.

    What is dropped has a zero gradient.
    """
    bits = jax.random.bits(jax.random.key(0), (2, 21, 128), integers.replace("int", "uint"))
    keep = jnp.array([0, 1, 4, 5, 8, 20], jnp.int32)

    def as_bits(x):
        return jax.lax.bitcast_convert_type(x, bits.dtype)

    tokens = jax.lax.bitcast_convert_type(bits, dtype)
    with use_backend(drop_token="pallas_tpu"), simulated(1):
        kept, backward = jax.vjp(lambda tokens: jax_ops.drop_token(tokens, keep), tokens)
        (d_tokens,) = backward(tokens[:, keep])
    expected = jnp.zeros_like(bits).at[:, keep].set(bits[:, keep])
    for result, value in ((kept, bits[:, keep]), (d_tokens, expected)):
        nan = jnp.isnan(
            jax.lax.bitcast_convert_type(value, dtype)
        )  # XLA on a CPU makes bf16 ones quiet
        assert ((as_bits(result) == value) | (jnp.isnan(result) & nan)).all()


def test_drop_token_says_what_does_not_fit():
    with (
        use_backend(drop_token="pallas_tpu"),
        pytest.raises(ValueError, match="100000 tokens of a clip do not fit"),
    ):
        jax.eval_shape(
            jax_ops.drop_token,
            jax.ShapeDtypeStruct((1, 100_000, 128), jnp.float32),
            jax.ShapeDtypeStruct((10,), jnp.int32),
        )


# -- contrastive_lse -------------------------------------------------------------------------------

NCE = {
    "whole_tiles": NCECase("", 256, 256, 2, 24),
    "ragged_shard": NCECase("", 150, 170, 2, 40, first=15),
    "masked": NCECase(
        "", 150, 155, 2, 16, first=5, x_invalid=(0, 7, 149), y_invalid=(*range(120, 126), 200, 309)
    ),
    "empty": NCECase(
        "", 140, 150, 2, 16, first=10, x_invalid=tuple(range(140)), y_invalid=tuple(range(300))
    ),
}


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(nce, "_TILES", ((128, 256),))
    monkeypatch.setattr(nce, "_STRIPS", {2: (128, 128), 4: (128, 128)})


@pytest.mark.parametrize(
    ("name", "bound", "dtype"),
    [
        ("whole_tiles", True, torch.bfloat16),
        ("ragged_shard", False, torch.float32),
        ("masked", True, torch.float32),
        ("masked", False, torch.float32),
        ("empty", False, torch.float32),
    ],
    ids=lambda value: (
        {True: "bounded", False: "running"}.get(value, str(value))
        if isinstance(value, bool)
        else str(value)
    ),
)
def test_nce_tile_by_tile(name, bound, dtype, small_tiles):
    assert_runs_as_the_reference(
        "contrastive_lse", make(dataclasses.replace(NCE[name], bound=bound), dtype), 1, dtype
    )


def test_nce_chunk_by_chunk(small_tiles, monkeypatch):
    monkeypatch.setattr(nce, "_MAX_CHUNK_TEXTS", 128)
    assert_runs_as_the_reference("contrastive_lse", make(NCECase("", 130, 150, 3, 16, first=11)), 2)


@pytest.mark.parametrize("scale", [200.0, 0.01])
def test_nce_subtracts_a_maximum_where_nothing_is_promised(scale):
    assert_runs_as_the_reference(
        "contrastive_lse", make(NCECase("", 130, 150, 1, 16, first=3, scale=scale)), None
    )


def test_nce_tiles_waste_little():
    """Whole strips, few of them empty, and no tile beyond memory."""
    for size in (1, 17, 128, 256, 600, 1000, 2048, 5120, 10_240, 65_536):
        for tile, strip in ((1024, 256), (2048, 512), (512, 512), (128, 128)):
            whole, part = nce._cut(size, tile, strip)
            assert whole % part == part % 128 == 0 and part <= strip and whole <= tile
            assert -(-size // whole) * whole - size < max(128, 0.25 * size) + part * (
                size > part
            ), (size, tile, strip)


# -- attention -------------------------------------------------------------------------------------

ATTENTION = {
    # one pair a program; the third block of queries is a chunk of 16 and one of 6, the second of
    # keys one of 13
    "blocks": (
        AttentionCase("", 2, 70, 45, 2, 16),
        dict(batch=1, heads=1, unroll=1, rows=32, query_chunk=16, key_chunk=32),
    ),
    "pairs": (
        AttentionCase("", 4, 21, 17, 4, 8),
        dict(batch=2, heads=4, unroll=2, rows=21, query_chunk=8, key_chunk=16),
    ),
    "one_query": (AttentionCase("", 2, 1, 37, 2, 16), dict(batch=1, heads=2, unroll=2)),
    "bias_and_mask": (
        AttentionCase("", 4, 13, 11, 2, 8, bias=True, num_keys=(11, 4, 0, 1)),
        dict(batch=2, heads=1, unroll=1, rows=13, query_chunk=8, key_chunk=8),
    ),
    # a second block of one chunk of 16 and one of 6, after two chunks of keys and half a one
    "causal": (
        AttentionCase("", 2, 54, 54, 2, 16, causal=True),
        dict(batch=1, heads=1, unroll=1, rows=32, query_chunk=16, key_chunk=32),
    ),
    "causal_bias_and_mask": (
        AttentionCase("", 2, 21, 21, 2, 8, bias=True, num_keys=(21, 4), causal=True),
        dict(batch=2, heads=2, unroll=2, rows=21, query_chunk=8, key_chunk=16),
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("blocks", torch.float32),
        ("blocks", torch.bfloat16),
        ("pairs", torch.float32),
        ("one_query", torch.bfloat16),
        ("bias_and_mask", torch.float32),
        ("causal", torch.bfloat16),
        ("causal_bias_and_mask", torch.float32),
    ],
    ids=str,
)
def test_attention_block_by_block(name, dtype, monkeypatch):
    case, cut = ATTENTION[name]
    plan = attention._plan
    monkeypatch.setattr(
        attention, "_plan", lambda *args, **kwargs: plan(*args, **kwargs)._replace(**cut)
    )
    assert_runs_as_the_reference("attention", make(case, dtype), 1, dtype)


@pytest.mark.parametrize("order", [None, 1], ids=["plainly", "simulated"])
def test_attention_joins_keys_that_do_not_fit_at_once(order, monkeypatch):
    monkeypatch.setattr(attention, "_keys_at_once", lambda *args, **kwargs: 128)
    case = AttentionCase(
        "", 3, 5, 150, 1, 8, num_keys=(150, 3, 0)
    )  # the second part is empty for a clip, both for another
    assert_runs_as_the_reference("attention", make(case, torch.float32), order)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        *((1, 785), (17, 17), (384, 384), (512, 512), (785, 785), (1201, 1201), (1400, 1400)),
        *((3201, 1664), (20_000, 17)),
    ],
)
@pytest.mark.parametrize("mask", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_attention_plans_stay_within_vmem(queries, keys, dtype, backward, head_dim, bias, mask):
    """Blocks cover the arrays, and what a program holds fits the smallest VMEM.

    It holds blocks, double buffered, accumulators, a chunk's scores, the bias and its gradient, and
    the mask as a column.
    """
    bias = bias and max(queries, keys) <= attention._BIAS_SIDE
    if mask and keys > attention._keys_at_once(head_dim, dtype, backward=backward, mask=True):
        keys = attention._keys_at_once(head_dim, dtype, backward=backward, mask=True)
    plan = attention._plan(
        (8, 12, queries, head_dim), keys, dtype, backward=backward, bias=bias, mask=mask
    )
    assert 12 % plan.heads == 0 and 8 % plan.batch == 0 and plan.heads % plan.unroll == 0
    assert plan.rows == queries or (
        plan.rows % plan.query_chunk == plan.query_chunk % 128 == 0
        and plan.heads == plan.batch == 1
    )
    assert keys <= attention._keys_at_once(head_dim, dtype, backward=backward, mask=mask)
    row_bytes, pairs = 128 * jnp.dtype(dtype).itemsize, plan.batch * plan.heads
    blocks = (
        2 * pairs * row_bytes * (4 * plan.rows + 4 * keys if backward else 2 * plan.rows + 2 * keys)
    )
    sums = 2 * plan.unroll * keys * 128 * 4 if backward else 0
    scores = 4 * plan.query_chunk * (min(keys, plan.key_chunk) if backward else keys)
    padded = -(-queries // 128) * 128
    biases = 2 * (2 if backward else 1) * plan.heads * keys * padded * 4 if bias else 0
    rows = 2 * plan.batch * keys * 8 * 4 if mask else 0
    column = 4 * 128 * (min(keys, plan.key_chunk) if backward else keys) if mask else 0
    assert blocks + sums + scores + biases + rows + column <= 16 << 20


# -- patch_embed -----------------------------------------------------------------------------------

FLOATS = dict(scale=0.5, shift=0.25)
PATCH_EMBED = {
    "bytes_fetched": PatchEmbedCase("", 2, 37, 128, 256, kept=34),
    "bytes_fetched_per_clip": PatchEmbedCase("", 3, 21, 256, 128, kept=17, per="clip", agg=False),
    "bf16_fetched_per_clip": PatchEmbedCase(
        "", 2, 37, 512, 128, kept=19, per="clip", patch_dtype=torch.bfloat16, **FLOATS
    ),
    "fp32_fetched": PatchEmbedCase(
        "", 2, 21, 512, 128, kept=15, patch_dtype=torch.float32, position=False, **FLOATS
    ),
    "bytes_streamed": PatchEmbedCase("", 2, 37, 128, 256),
    "floats_streamed": PatchEmbedCase("", 2, 37, 128, 128, patch_dtype=torch.float32, **FLOATS),
    "a_last_tile_of_one_token": PatchEmbedCase("", 2, 32, 128, 128, patch_dtype=None, **FLOATS),
    "gathered": PatchEmbedCase(
        "",
        2,
        37,
        128,
        128,
        kept=19,
        per="clip",
        gathered=True,
        agg=False,
        patch_dtype=None,
        **FLOATS,
    ),
    "narrow": PatchEmbedCase(
        "", 2, 37, 16, 128, kept=19, per="clip", patch_dtype=torch.float32, **FLOATS
    ),
}


@pytest.fixture
def small_patch_tiles(monkeypatch):
    plan = patch_embed._plan

    def small(tokens, *args, **kwargs):
        return plan(tokens, *args, **kwargs)._replace(rows=16, tiles=-(-tokens // 16), columns=128)

    monkeypatch.setattr(patch_embed, "_plan", small)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.bfloat16 if i % 2 else torch.float32) for i, name in enumerate(PATCH_EMBED)],
    ids=str,
)
def test_patch_embed_tile_by_tile(name, dtype, small_patch_tiles):
    assert_runs_as_the_reference("patch_embed", make(PATCH_EMBED[name], dtype), 1, dtype)


@pytest.mark.parametrize("tiles", ["whole", "small"])
def test_patch_embed_reads_inside_whatever_keep_holds(tiles, request):
    """An index out of range reads the last row: no DMA checks its bounds."""
    if tiles == "small":
        request.getfixturevalue("small_patch_tiles")
    inputs = make(PATCH_EMBED["bytes_fetched"], torch.float32)
    inputs["keep"][-1] = 10_000
    arguments = jax_calls.translate("patch_embed", inputs)
    with use_backend(patch_embed="pallas_tpu"), simulated(1):
        tokens = jax_ops.patch_embed(**arguments)
        arguments["keep"] = arguments["keep"].at[-1].set(36)
        expected = jax_ops.patch_embed(**arguments)
    assert (tokens[:, :-1] == expected[:, :-1]).all() and jnp.isfinite(tokens).all()


@pytest.mark.parametrize("name", ["bf16_fetched_per_clip", "fp32_fetched", "narrow"])
def test_patch_embed_feels_nothing_of_dropped_patches(name, small_patch_tiles):
    inputs = make(PATCH_EMBED[name])
    B, N, _ = inputs["patches"].shape
    kept = torch.zeros(B, N).scatter(1, inputs["keep"].long().expand(B, -1), 1.0).bool()
    inputs["patches"] = torch.where(kept[..., None], inputs["patches"], torch.nan)
    assert_runs_as_the_reference("patch_embed", inputs, None, inputs["patches"].dtype)


@pytest.mark.parametrize("fetched", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("raw", "dtype"),
    [("uint8", "bfloat16"), ("uint8", "float32"), ("float32", "bfloat16"), ("float32", "float32")],
)
def test_patch_embed_plans_stay_within_vmem(raw, dtype, backward, fetched):
    """Tiles cover the tokens with little waste, and the weight or its gradient stays resident."""
    for tokens in (65, 393, 785, 1569, 3201):
        for k, dim in ((3072, 1024), (3072, 768), (768, 128), (128, 768)):
            plan = patch_embed._plan(tokens, k, dim, raw, dtype, fetched=fetched, backward=backward)
            assert dim % plan.columns == 0 and plan.columns % 128 == 0 and plan.rows % 16 == 0
            assert 0 <= plan.tiles * plan.rows - tokens < 32 * plan.tiles
            assert plan.columns * k * (4 if backward else jnp.dtype(dtype).itemsize) < 7 << 20


def test_patch_embed_says_what_does_not_fit():
    patches, weight, bias = (
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((1, 4, 200_000), (128, 200_000), (128,))
    )
    with (
        use_backend(patch_embed="pallas_tpu"),
        pytest.raises(ValueError, match="200064 values a patch"),
    ):
        jax.eval_shape(
            lambda *args: jax_ops.patch_embed(*args, scale=1.0, shift=0.0), patches, weight, bias
        )
