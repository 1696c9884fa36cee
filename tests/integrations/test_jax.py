"""Our ops behind JAX's, Flax's and tokamax's own signatures."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_fast.integrations.jax import (
    contrastive_loss,
    dot_product_attention,
    flax_attention_fn,
    tokamax_implementation,
)

rng = np.random.default_rng(0)
Q, K, V = (jnp.asarray(rng.standard_normal((2, 6, 3, 8)), jnp.float32) for _ in range(3))
KEYS = jnp.arange(6) < jnp.array([[6], [3]])
BIAS = jnp.asarray(rng.standard_normal((3, 6, 6)), jnp.float32)


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(is_causal=True),
        dict(mask=KEYS[:, None, None], scale=0.3),
        dict(bias=BIAS[None]),
        dict(key_value_seq_lengths=jnp.array([6, 2])),
        dict(return_residual=True),
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_values_and_gradients_are_jaxs(options):
    def total(function, *tensors):
        out, *residual = jax.tree.leaves(function(*tensors, **options))
        # JAX's residual passes no gradient
        value = (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum()
        return value + sum(jax.lax.stop_gradient(x).sum() for x in residual)

    (ours, gradients), (theirs, expected) = (
        jax.value_and_grad(lambda *z, f=f: total(f, *z), (0, 1, 2))(Q, K, V)
        for f in (dot_product_attention, jax.nn.dot_product_attention)
    )
    np.testing.assert_allclose(ours, theirs, rtol=2e-5)
    for gradient, exact in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=2e-5)


def test_without_a_batch_and_under_jit():
    out = jax.jit(dot_product_attention)(Q[0], K[0], V[0])
    np.testing.assert_allclose(out, jax.nn.dot_product_attention(Q, K, V)[0], rtol=1e-4, atol=1e-6)


def test_flax_calls_it_with_its_own_arguments():
    flax_own = dict(broadcast_dropout=True, dropout_rng=None, dtype=None, precision=None)
    out = flax_attention_fn(Q, K, V, mask=KEYS[:, None, None], deterministic=True, **flax_own)
    expected = jax.nn.dot_product_attention(Q, K, V, mask=KEYS[:, None, None])
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(NotImplementedError, match="no dropout"):
        flax_attention_fn(Q, K, V, dropout_rate=0.1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (dict(mask=jnp.ones((2, 1, 6, 6), bool)), "one of keys"),
        (dict(bias=jnp.ones((2, 3, 6, 6))), "one of all clips"),
        (dict(local_window_size=2), "no windows"),
        (dict(implementation="cudnn"), "chooses its own"),
    ],
)
def test_what_ours_does_not_have_is_refused(options, reason):
    with pytest.raises(NotImplementedError, match=reason):
        dot_product_attention(Q, K, V, **options)


# -- tokamax -------------------------------------------------------------------------------------


class Mask(types.SimpleNamespace):
    """What tokamax hands to an implementation, where tokamax is not installed."""

    def __init__(self, bool_mask=None, is_causal=False, **ends):
        absent = dict.fromkeys(("q_start", "q_end", "k_start", "k_end"))
        super().__init__(bool_mask=bool_mask, is_causal=is_causal, **absent | ends)


def test_an_implementation_for_tokamax():
    lengths = jnp.array([6, 2])[:, None, None]
    mask = Mask(KEYS[:, None, None], is_causal=True, k_end=lengths)
    out = tokamax_implementation(Q, K, V, mask=mask, logits_scale=object, bias=BIAS[None])
    allowed = (jnp.arange(6) < lengths)[:, None] & KEYS[:, None, None]
    expected = jax.nn.dot_product_attention(Q, K, V, BIAS[None], allowed, is_causal=True)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=2e-6)
    plain = tokamax_implementation(Q, K, V, mask=Mask(), logits_scale=0.3)
    expected = jax.nn.dot_product_attention(Q, K, V, scale=0.3)
    np.testing.assert_allclose(plain, expected, rtol=1e-4, atol=2e-6)
    for options, reason in (
        (dict(mask=Mask(k_start=jnp.zeros((1, 1, 6), int))), "no windows"),
        (dict(mask=Mask(k_end=jnp.ones((1, 1, 6), int))), "lengths are those of clips"),
        (dict(logits_soft_cap=3.0), "no soft cap"),
        (dict(precision=jax.lax.Precision.HIGHEST), "precision is"),
        (dict(value=V[..., :4]), "not of the keys' shape"),
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


@pytest.mark.parametrize("api", ["nnx", "linen"])
def test_flax_layers_give_the_same(api):
    pytest.importorskip("flax", reason="flax is not installed")
    from flax import linen, nnx

    x, mask = jnp.asarray(rng.standard_normal((2, 6, 12)), jnp.float32), KEYS[:, None, None]
    outs = []
    for function in ({"attention_fn": flax_attention_fn}, {}):
        if api == "nnx":
            layer = nnx.MultiHeadAttention(3, 12, decode=False, rngs=nnx.Rngs(0), **function)
            outs.append(layer(x, mask=mask, deterministic=True))
        else:
            layer = linen.MultiHeadAttention(3, **function)
            params = layer.init(jax.random.key(0), x)
            outs.append(layer.apply(params, x, mask=mask, deterministic=True))
    np.testing.assert_allclose(*outs, rtol=1e-4, atol=2e-6)


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
