"""The training steps of the uses with models of flax nnx and equinox."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import tree_allclose

from pytree_grads import jacobian, privacy, statistics, weightings

pytestmark = pytest.mark.any_release

XS = jax.random.normal(jax.random.key(0), (12, 5))
YS = jnp.arange(12.0) % 2


def flax_model():
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(5, 8, rngs=rngs), jnp.tanh, nnx.Linear(8, 2, rngs=rngs)
    )
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    return params, lambda params, x: nnx.merge(graph, params, rest, copy=True)(x)


def equinox_model():
    model = eqx.nn.MLP(5, 2, 8, 1, key=jax.random.key(0))
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: eqx.combine(params, rest)(x)


def plain_model():
    params = {"w": jnp.linspace(-1.0, 1.0, 10).reshape(5, 2), "b": jnp.zeros(2)}
    return params, lambda params, x: jnp.tanh(x @ params["w"]) + params["b"]


MODELS = {"flax": flax_model, "equinox": equinox_model, "plain": plain_model}


@pytest.fixture(params=MODELS)
def model(request):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield MODELS[request.param]()


def test_many_losses(model):
    params, apply = model

    def losses(params, xs, ys):
        out = jax.vmap(apply, (None, 0))(params, xs)
        return jnp.stack(
            [((out[:, 0] - ys) ** 2).mean(), ((out[:, 1] + ys) ** 2).mean()]
        )

    step = weightings.combined_value_and_grad(losses, weightings.upgrad)
    values, grads = jax.jit(step)(params, XS, YS)
    rows = jax.jacrev(losses)(params, XS, YS)
    flat = jnp.concatenate([x.reshape(2, -1) for x in jax.tree.leaves(rows)], axis=1)
    weights = weightings.upgrad(flat @ flat.T)
    expected = jax.tree.map(lambda x: jnp.tensordot(weights, x, 1), rows)
    tree_allclose(grads, expected, rtol=1e-4)
    tree_allclose(values, losses(params, XS, YS))


def test_a_private_step(model):
    params, apply = model

    def loss(params, x, y):
        return ((apply(params, x)[0] - y) ** 2).sum()

    clipped = privacy.clipped_grad(
        loss,
        l2_clip_norm=0.1,
        normalize_by=12.0,
        batch_argnums=(1, 2),
        keep_batch_dim=False,
    )
    noise = privacy.gaussian(clipped, 1.0, jax.random.key(0))
    optimizer = optax.chain(noise, optax.adam(1e-2))

    @jax.jit
    def step(params, state):
        updates, state = optimizer.update(clipped(params, XS, YS), state, params)
        return optax.apply_updates(params, updates), state

    after, _ = step(params, optimizer.init(params))
    assert jax.tree.structure(after) == jax.tree.structure(params)
    rows = jax.vmap(jax.grad(loss), (None, 0, 0))(params, XS, YS)
    scales = jnp.minimum(1, 0.1 / jax.vmap(optax.tree.norm)(rows)) / 12
    expected = jax.tree.map(lambda x: jnp.tensordot(scales, x, 1), rows)
    tree_allclose(clipped(params, XS, YS), expected, rtol=1e-5)


def test_statistics(model):
    params, apply = model

    def loss(params, x, y):
        return ((apply(params, x)[0] - y) ** 2).sum()

    pair = jax.jit(
        lambda params: statistics.noise_scale(jacobian(loss)(params, XS, YS))
    )(params)
    rows = jax.vmap(jax.grad(loss), (None, 0, 0))(params, XS, YS)
    trace = sum(x.var(axis=0, ddof=1).sum() for x in jax.tree.leaves(rows))
    np.testing.assert_allclose(pair.trace, trace, rtol=1e-4)
