"""One real layer of each framework: rows and the chain rule without a wrapper of
ours.
"""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import tree_allclose

from pytree_grads import (
    Vector,
    chain_rule_value_and_grad,
    jacobian,
    linear_combination,
    per_example_grad,
    per_example_value_and_grad,
)

X = jax.random.normal(jax.random.key(0), (5, 3))


def plain_dict():
    params = {"w": jnp.ones((3, 2)), "b": [jnp.zeros(2), None]}
    return params, lambda params, x: jnp.tanh(x @ params["w"] + params["b"][0])


def flax_linen():
    layer = nn.Sequential([nn.Dense(4), nn.LayerNorm(), nn.tanh, nn.Dense(2)])
    return layer.init(jax.random.key(1), X[0]), layer.apply


def flax_nnx():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model, nnx.Param)
    return params, lambda params, x: nnx.merge(graph, params)(x)


def equinox_partitioned():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(1))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    return params, lambda params, x: eqx.combine(params, static)(x)


def equinox_module_of_arrays():
    return eqx.nn.Linear(3, 2, key=jax.random.key(1)), lambda model, x: model(x)


def haiku():
    layer = hk.without_apply_rng(
        hk.transform(lambda x: jnp.tanh(hk.nets.MLP([4, 2])(x)))
    )
    return layer.init(jax.random.key(1), X[0]), layer.apply


@pytest.mark.parametrize(
    "make",
    [
        plain_dict,
        flax_linen,
        flax_nnx,
        equinox_partitioned,
        equinox_module_of_arrays,
        haiku,
    ],
)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_real_layer(make, chunk_size):
    params, apply = make()

    def loss(params, x):
        outputs = apply(params, x)
        return jnp.sum(jnp.exp(outputs) * jnp.arange(1.0, outputs.size + 1))

    values, rows = jax.jit(per_example_value_and_grad(loss, chunk_size=chunk_size))(
        params, X
    )
    expected = jax.vmap(jax.value_and_grad(loss), (None, 0))(params, X)
    assert tree_allclose((values, rows), expected)

    def outer(outputs):
        return jnp.sum(jnp.exp(outputs @ jnp.roll(outputs, 1, 0).T))

    got = chain_rule_value_and_grad(outer, apply, chunk_size=chunk_size)(params, X)
    composed = jax.value_and_grad(lambda p: outer(jax.vmap(apply, (None, 0))(p, X)))(
        params
    )
    assert tree_allclose(got, composed)

    weighted = linear_combination(jnp.arange(5.0), rows)
    assert tree_allclose(
        weighted, jax.tree.map(lambda r: jnp.tensordot(jnp.arange(5.0), r, 1), rows)
    )
    assert tree_allclose((2 * Vector(weighted) - Vector(weighted)).tree, weighted)


class _LinenNormed(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(2)(nn.tanh(x))


def linen_batch_norm():
    net = _LinenNormed()
    start = net.init(jax.random.key(1), X)
    _, updated = net.apply(start, X, train=True, mutable=["batch_stats"])

    def apply(params, statistics, x):
        return net.apply({"params": params, **statistics}, x)

    return start["params"], updated, apply


def nnx_batch_norm():
    def dense(inputs, outputs, seed):
        return nnx.Linear(inputs, outputs, rngs=nnx.Rngs(seed))

    model = nnx.Sequential(
        dense(3, 4, 0), nnx.BatchNorm(4, rngs=nnx.Rngs(1)), dense(4, 2, 2)
    )
    model(X)  # updates the running statistics
    model.eval()
    graph, params, statistics = nnx.split(model, nnx.Param, ...)
    return (
        params,
        statistics,
        lambda p, statistics, x: nnx.merge(graph, p, statistics)(x),
    )


@pytest.mark.parametrize("make", [linen_batch_norm, nnx_batch_norm])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"recompute": True}])
def test_batch_norm_with_statistics_that_all_examples_share(make, options):
    """In evaluation mode rows are those of `vmap(grad)`, and no example has the row of
    another.
    """
    params, statistics, apply = make()

    def loss(params, statistics, x):
        return jnp.sum(jnp.sin(apply(params, statistics, x)))

    J = jax.jit(jacobian(loss, in_axes=(None, None, 0), **options))(
        params, statistics, X
    )
    rows = jax.vmap(jax.grad(loss), (None, None, 0))(params, statistics, X)
    assert tree_allclose(J.to_rows(), rows)
    assert tree_allclose(J.sum(), jax.tree.map(lambda x: x.sum(0), rows))
    flat = jnp.concatenate(
        [x.reshape(len(X), -1) for x in jax.tree.leaves(rows)], axis=1
    )
    assert tree_allclose(J.norms(), jnp.linalg.norm(flat, axis=1))
    assert jnp.linalg.matrix_rank(flat) == len(X)


def test_an_equinox_module_with_static_leaves_says_how_to_split_it():
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(1))
    with pytest.raises(
        TypeError, match=r"argument model\.activation is .*eqx\.partition.*eqx\.combine"
    ):
        per_example_grad(lambda model, x: jnp.sum(model(x)))(model, X)
    params = eqx.filter(model, eqx.is_inexact_array)
    doubled = linear_combination([1, 1], [params, params])
    assert tree_allclose(doubled, jax.tree.map(lambda x: 2 * x, params))
