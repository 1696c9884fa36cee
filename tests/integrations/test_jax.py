"""Our attention behind JAX's and Flax's own signatures."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vatt_fast.integrations.jax import dot_product_attention, flax_attention_fn

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
