"""Our ops behind JAX's, Flax's and tokamax's own signatures."""

import json
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_fast.integrations.jax import (
    contrastive_loss,
    dot_product_attention,
    flax_attention_fn,
    sharded_attention,
    tokamax_implementation,
)
from vatt_fast.kernels import jax_ops

rng = np.random.default_rng(0)
Q, K, V = (jnp.asarray(rng.standard_normal((2, 6, 3, 8)), jnp.float32) for _ in range(3))
KEYS = jnp.arange(6) < jnp.array([[6], [3]])
BIAS = jnp.asarray(rng.standard_normal((3, 6, 6)), jnp.float32)
DTYPES = pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["fp32", "bf16"])


def differentiated(function, *tensors):
    """Output, as fp32, and the gradients of all, of a product that weighs each value otherwise."""

    def total(*tensors):
        out, *residual = (x.astype(jnp.float32) for x in jax.tree.leaves(function(*tensors)))
        # JAX's residual passes no gradient
        rest = sum(jax.lax.stop_gradient(x).sum() for x in residual)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum() + rest, out

    arguments = tuple(range(len(tensors)))
    gradients, out = jax.grad(total, arguments, has_aux=True)(*tensors)
    return [np.asarray(x, np.float32) for x in (out, *jax.tree.leaves(gradients))]


def relative(x, exact):
    return np.linalg.norm(x - exact) / np.linalg.norm(exact)


def same(ours, theirs, *tensors, dtype):
    """Of values and gradients: equal in fp32; in bf16 with at most twice the library's error."""
    half = jnp.dtype(dtype) == jnp.bfloat16
    exact = differentiated(theirs, *jax.tree.map(lambda x: x.astype(jnp.float32), tensors))
    tensors = jax.tree.map(lambda x: x.astype(dtype), tensors)
    if half:
        own = [
            relative(*pair) for pair in zip(differentiated(theirs, *tensors), exact, strict=True)
        ]
    for i, found in enumerate(differentiated(ours, *tensors)):
        allowed = 2 * own[i] + float(jnp.finfo(dtype).eps) / 2 if half else 3e-6
        assert relative(found, exact[i]) < allowed, i


@DTYPES
@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(is_causal=True),
        dict(mask=KEYS[:, None, None], scale=0.3),
        dict(bias=BIAS[None]),
        dict(bias=BIAS[None, :1]),
        dict(bias=BIAS[None, :, :1]),
        dict(key_value_seq_lengths=jnp.array([6, 2])),
        dict(return_residual=True),
    ],
    ids=lambda options: (
        "-".join(
            f"{name}{list(value.shape)}" if name == "bias" else name
            for name, value in options.items()
        )
        or "plain"
    ),
)
def test_values_and_gradients_are_jaxs(options, dtype):
    options = dict(options)
    bias = {"bias": options.pop("bias")} if "bias" in options else {}
    ours, theirs = (
        lambda q, k, v, bias, f=f: f(q, k, v, **bias, **options)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    same(ours, theirs, Q, K, V, bias, dtype=dtype)


def test_without_a_batch_and_under_jit():
    out = jax.jit(dot_product_attention)(Q[0], K[0], V[0])
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(Q, K, V)[0], rtol=1e-4, atol=1e-6)


@DTYPES
def test_flax_calls_it_with_its_own_arguments(dtype):
    flax_own = dict(broadcast_dropout=True, dropout_rng=None, precision=None, module=None)
    same(
        lambda *z: flax_attention_fn(
            *z, mask=KEYS[:, None, None], deterministic=True, dtype=None, **flax_own
        ),
        lambda *z: jax.nn.dot_product_attention(*z, mask=KEYS[:, None, None]),
        Q, K, V, dtype=dtype,
    )  # fmt: skip
    half = flax_attention_fn(Q, K.astype(jnp.bfloat16), V, dtype=jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    assert flax_attention_fn(Q, K.astype(jnp.bfloat16), V).dtype == jnp.float32
    for options, reason in (
        (dict(dropout_rate=0.1), "no dropout"),
        (dict(precision="highest"), "precision is highest"),
        (dict(module=object()), "no probabilities to sow"),
        (dict(qk_attn_weights_einsum=jnp.einsum), "products are ours"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            flax_attention_fn(Q, K, V, **options)


REFUSED = [
    (dict(mask=jnp.ones((2, 1, 6, 6), bool)), "one of keys"),
    (dict(bias=jnp.ones((2, 3, 6, 6))), "one of all clips"),
    (dict(bias=jnp.ones((1, 2, 6, 6))), "one of all clips"),
    (dict(bias=jnp.ones((1, 3, 6, 6), int)), "one of all clips"),
    (dict(key=K[:, :4], value=V[:, :4], is_causal=True), "as many queries as keys, not 6 and 4"),
    (dict(key=K[:, :, :1], value=V[:, :, :1]), r"grouped heads \(3 and 1\); repeat keys"),
    (dict(key=K.astype(jnp.bfloat16)), "cast them to one dtype"),
    (dict(value=V[..., :4]), "alike"),
]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        *REFUSED,
        (dict(local_window_size=2), "no windows"),
        (dict(implementation="cudnn"), "chooses its own"),
    ],
)
def test_what_ours_does_not_have_is_refused(options, reason):
    given = dict(query=Q, key=K, value=V) | options
    with pytest.raises(NotImplementedError, match=reason):
        dot_product_attention(**given)


def test_the_ops_refusal_of_grouped_heads_names_the_remedy():
    q, k = (jnp.swapaxes(x, 1, 2) for x in (Q, K[:, :, :1]))
    with pytest.raises(
        ValueError, match=r"no grouped heads, .*; repeat k and v, jnp.repeat\(k, 3, 1"
    ):
        jax_ops.attention(q, k, k, scale=1.0)
    k = jnp.repeat(k, 3, 1)
    assert jax_ops.attention(q, k, k, scale=1.0)[0].shape == q.shape


# -- tokamax -------------------------------------------------------------------------------------


class Mask(types.SimpleNamespace):
    """What tokamax hands to an implementation, where tokamax is not installed."""

    def __init__(self, bool_mask=None, is_causal=False, **ends):
        absent = dict.fromkeys(("q_start", "q_end", "k_start", "k_end"))
        super().__init__(bool_mask=bool_mask, is_causal=is_causal, **absent | ends)


@DTYPES
def test_tokamax_values_and_gradients(dtype):
    lengths, keys = jnp.array([6, 2])[:, None, None], KEYS[:, None, None]
    mask = Mask(keys, is_causal=True, k_end=lengths)
    same(
        lambda q, k, v, bias: tokamax_implementation(q, k, v, bias=bias, mask=mask),
        lambda q, k, v, bias: jax.nn.dot_product_attention(
            q, k, v, bias, (jnp.arange(6) < lengths)[:, None] & keys, is_causal=True
        ),
        *(Q, K, V, BIAS[None]),
        dtype=dtype,
    )


@pytest.mark.parametrize(("options", "reason"), REFUSED)
def test_tokamax_goes_on_at_what_ours_does_not_have(options, reason):
    given = dict(query=Q, key=K, value=V) | options
    mask = Mask(given.pop("mask", None), is_causal=given.pop("is_causal", False))
    with pytest.raises(NotImplementedError, match=reason):
        tokamax_implementation(**given, mask=mask)


def test_an_implementation_for_tokamax():
    lengths = jnp.array([6, 2])[:, None, None]
    mask = Mask(KEYS[:, None, None], is_causal=True, k_end=lengths)
    out = tokamax_implementation(Q, K, V, mask=mask, logits_scale=object, bias=BIAS[None])
    allowed = (jnp.arange(6) < lengths)[:, None] & KEYS[:, None, None]
    expected = jax.nn.dot_product_attention(Q, K, V, BIAS[None], allowed, is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-6)
    plain = tokamax_implementation(Q, K, V, mask=Mask(k_end=6), logits_scale=0.3)
    expected = jax.nn.dot_product_attention(Q, K, V, scale=0.3)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=2e-6)
    for options, reason in (
        (dict(mask=Mask(k_start=jnp.zeros((1, 1, 6), int))), "no windows"),
        (dict(mask=Mask(k_end=jnp.ones((1, 1, 6), int))), "lengths are those of clips"),
        (dict(logits_soft_cap=3.0), "no soft cap"),
        (dict(precision=jax.lax.Precision.HIGHEST), "precision is"),
        (dict(mask=Mask(k_end=jnp.ones(3, int))), "lengths are those of clips"),
    ):
        with pytest.raises(NotImplementedError, match=reason):
            tokamax_implementation(Q, K, **{"value": V} | options)


def test_tokamax_calls_it_and_goes_on_to_its_own():
    tokamax = pytest.importorskip("tokamax", reason="tokamax does not import", exc_type=Exception)
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # tokamax reads its own of the command line
    calls = []

    def ours(*tensors, **options):
        calls.append(options)
        return tokamax_implementation(*tensors, **options)

    for options in (dict(is_causal=True), dict(key_value_seq_lengths=jnp.array([6, 2])),
                    dict(mask=KEYS[:, None, None]), dict(logits_soft_cap=5.0)):  # fmt: skip
        given = dict(implementation=(ours, "xla"), **options)
        out = tokamax.dot_product_attention(Q, K, V, **given)
        expected = tokamax.dot_product_attention(Q, K, V, **given | dict(implementation="xla"))
        np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-6)
    assert len(calls) == 4


# -- flax ----------------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_flax_layers_give_the_same(api, dtype):
    pytest.importorskip("flax", reason="flax is not installed")
    from flax import linen, nnx

    x, mask = jnp.asarray(rng.standard_normal((2, 6, 12)), jnp.float32), KEYS[:, None, None]

    def layer(x, **function):
        if api == "nnx":
            options = dict(decode=False, dtype=x.dtype, rngs=nnx.Rngs(0))
            return nnx.MultiHeadAttention(3, 12, **options, **function)(
                x, mask=mask, deterministic=True
            )
        made = linen.MultiHeadAttention(3, dtype=x.dtype, **function)
        params = made.init(jax.random.key(0), x)
        return made.apply(params, x, mask=mask, deterministic=True)

    same(lambda x: layer(x, attention_fn=flax_attention_fn), layer, x, dtype=dtype)


# -- the loss over a mesh: on 8 devices in tests/on_jax ------------------------------------------


def test_the_contrastive_loss_is_clips():
    mesh = jax.make_mesh((1,), ("batch",))
    x, y = jnp.asarray(rng.standard_normal((2, 5, 8)), jnp.float32)
    along = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("batch"))
    loss = contrastive_loss(mesh, "batch")(*(jax.device_put(z, along) for z in (x, y)), 9.0)
    unit = [z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in (x, y)]
    logits = 9.0 * unit[0] @ unit[1].T
    both = [-jnp.diag(jax.nn.log_softmax(part)).mean() for part in (logits, logits.T)]
    np.testing.assert_allclose(loss, sum(both), rtol=1e-5)
    with pytest.raises(ValueError, match="the mesh has 'batch'"):
        contrastive_loss(mesh, "data")


def test_sharded_attention_on_eight_devices():
    flags = (
        "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
        " --xla_llvm_disable_expensive_passes=true"
    )
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": "1"}
    program = Path(__file__).parents[1] / "support" / "jax_sharded.py"
    command = [sys.executable, str(program), "attention"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    for name, found in json.loads(done.stdout.splitlines()[-1]).items():
        allowed = 1e-5 if name.startswith("fp32") else 2e-2
        assert max(found["out"], found["gradient"]) < allowed, (name, found)


def test_sharded_attention_refuses_in_a_sentence():
    with pytest.raises(ValueError, match="the mesh has 'data'"):
        sharded_attention(jax.make_mesh((1,), ("data",)), batch="batch")
    mesh = types.SimpleNamespace(shape={"data": 4})
    with pytest.raises(ValueError, match="3 heads do not divide into 4 devices"):
        sharded_attention(mesh, heads="data")(Q, K, V)
