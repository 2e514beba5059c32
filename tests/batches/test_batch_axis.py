"""A name for the axis of examples: batch norm in training mode, exact for the batch."""

import re

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import tree_allclose

from pytree_grads import (
    chain_rule_grad,
    chain_rule_value_and_grad,
    fisher_product,
    gauss_newton_product,
    jacobian,
    per_example_grad,
    per_example_value_and_grad,
    value_and_jacobian,
)

N = 6
KEY = jax.random.key(0)


def normalised(p, x):
    h = jnp.tanh(x @ p["w"])
    mean = jax.lax.pmean(h, "batch")
    var = jax.lax.pmean((h - mean) ** 2, "batch")
    return ((h - mean) / jnp.sqrt(var + 0.1)) @ p["v"]


def with_statistics(p, x):
    h = jnp.tanh(x @ p["w"])
    aux = {"mean": jax.lax.pmean(h, "batch"), "own": h.sum(), "two": 2}
    return normalised(p, x), aux


def problem():
    p = {"w": jax.random.normal(KEY, (4, 3), float), "v": jnp.arange(3.0) - 1}
    return p, jax.random.normal(jax.random.key(1), (N, 4), float)


def outer(outputs):
    return jax.nn.logsumexp(outputs**2)


def whole(p, x):
    return outer(jax.vmap(normalised, (None, 0), axis_name="batch")(p, x))


class TestTheChainRule:
    def test_value_and_gradient(self, x64):
        p, x = problem()
        grad = chain_rule_grad(outer, normalised, batch_axis_name="batch")
        both = chain_rule_value_and_grad(outer, normalised, batch_axis_name="batch")
        want = jax.value_and_grad(whole)(p, x)
        assert tree_allclose(both(p, x), want)
        assert tree_allclose(jax.jit(grad)(p, x), want[1])

    def test_inside_grad_vmap_and_scan(self, x64):
        p, x = problem()
        ours = chain_rule_grad(outer, normalised, batch_axis_name="batch")
        plain = jax.grad(whole)

        def square(grad):
            return lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(grad(p, x)))

        assert tree_allclose(jax.grad(square(ours))(p), jax.grad(square(plain))(p))
        xs = jnp.stack([x, x / 2])
        want = jax.vmap(plain, (None, 0))(p, xs)
        assert tree_allclose(jax.vmap(ours, (None, 0))(p, xs), want)
        _, found = jax.lax.scan(lambda p, x: (p, ours(p, x)), p, xs)
        assert tree_allclose(found, want)

    def test_what_is_the_same_for_all_examples_comes_once(self, x64):
        p, x = problem()
        (_, aux), _ = chain_rule_value_and_grad(
            outer, with_statistics, has_aux=True, batch_axis_name="batch"
        )(p, x)
        h = jnp.tanh(x @ p["w"])
        want = {"mean": h.mean(0), "own": h.sum(1), "two": jnp.asarray(2)}
        assert tree_allclose(aux, want)

    def test_and_once_for_each_of_several_batches(self, x64):
        p, x = problem()
        xs = jnp.stack([x, x / 2])
        of = chain_rule_grad(
            outer, with_statistics, has_aux=True, batch_axis_name="batch"
        )
        _, aux = jax.vmap(of, (None, 0))(p, xs)
        assert aux["mean"].shape == (2, 3)
        assert aux["own"].shape == (2, N)

    def test_curvature(self, x64):
        p, x = problem()
        v = jax.tree.map(jnp.cos, p)

        def outputs(p):
            return jax.vmap(normalised, (None, 0), axis_name="batch")(p, x)

        f, tangent = jax.jvp(outputs, (p,), (v,))
        _, curved = jax.jvp(jax.grad(outer), (f,), (tangent,))
        (want,) = jax.vjp(outputs, p)[1](curved)
        product = gauss_newton_product(outer, normalised, batch_axis_name="batch")
        assert tree_allclose(product(p, x)(v), want)


def test_the_batch_as_one_example_with_a_row_for_each_output(x64):
    """The way out that the errors name."""
    p, x = problem()
    fun = jax.vmap(normalised, (None, 0), axis_name="batch")
    J = jacobian(fun, batched=False)(p, x)
    assert tree_allclose(J.to_rows(), jax.jacrev(fun)(p, x))
    c = jax.grad(outer)(fun(p, x))
    assert tree_allclose(J.weighted_sum(c), jax.grad(whole)(p, x))


class TestRefusals:
    ROWS = (jacobian, value_and_jacobian, per_example_grad, per_example_value_and_grad)

    @pytest.mark.parametrize("call", ROWS)
    def test_rows_take_no_name(self, call):
        with pytest.raises(ValueError, match="two exact ways out: evaluation mode"):
            call(normalised, batch_axis_name="batch")

    @pytest.mark.parametrize("call", [*ROWS, fisher_product])
    def test_rows_of_a_function_that_uses_a_name(self, call):
        words = (
            "fun uses the axis 'batch', which has no name here. If it is an axis of a "
            "mesh, make the call inside jax.shard_map. If it is the axis of the "
            "examples (batch norm): the row of an example is"
        )
        p, x = problem()
        with pytest.raises(NameError, match=re.escape(words)) as caught:
            call(normalised)(p, x)
        assert "jacobian(jax.vmap(fun, (None, 0), axis_name='batch')" in str(
            caught.value
        )

    @pytest.mark.parametrize("call", [chain_rule_grad, gauss_newton_product])
    def test_the_chain_rule_says_that_it_can_name_the_axis(self, call):
        with pytest.raises(NameError, match="give batch_axis_name='batch'"):
            call(outer, normalised)(*problem())

    @pytest.mark.parametrize(
        "call", [chain_rule_grad, chain_rule_value_and_grad, gauss_newton_product]
    )
    def test_there_is_no_exact_answer_in_chunks(self, call):
        with pytest.raises(ValueError, match="no exact answer in chunks"):
            call(outer, normalised, batch_axis_name="batch", chunk_size=2)

    def test_a_name_is_a_str(self):
        with pytest.raises(TypeError, match="batch_axis_name must be a str, got"):
            chain_rule_grad(outer, normalised, batch_axis_name=("batch",))

    def test_other_errors_of_names_are_left_alone(self):
        with pytest.raises(NameError, match="name 'undefined' is not defined"):
            jacobian(lambda p, x: undefined)(*problem())  # noqa: F821


class TestTrainingSteps:
    """Two steps with batch norm, against `jax.grad` of the whole batch."""

    def test_flax_nnx(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.hidden = nnx.Linear(4, 8, rngs=rngs)
                self.norm = nnx.BatchNorm(8, axis_name="batch", rngs=rngs)
                self.head = nnx.Linear(8, 1, rngs=rngs)

            def __call__(self, x):
                return self.head(jax.nn.relu(self.norm(self.hidden(x))))[0]

        graph, params, statistics = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
        x, y = jax.random.normal(KEY, (N, 4)), jnp.arange(1.0 * N) % 2

        def predict(params, statistics, x):
            net = nnx.merge(graph, params, statistics, copy=True)
            return net(x), nnx.state(net, nnx.BatchStat)

        def loss(predictions, y):
            return jnp.mean((predictions - y) ** 2)

        def plain(params, statistics, x, y):
            net = jax.vmap(
                predict, (None, None, 0), out_axes=(0, None), axis_name="batch"
            )
            predictions, updated = net(params, statistics, x)
            return loss(predictions, y), updated

        optimizer = optax.sgd(0.1)

        @jax.jit
        def step(params, statistics, state):
            (value, updated), grads = chain_rule_value_and_grad(
                loss,
                predict,
                in_axes=(None, None, 0),
                has_aux=True,
                batch_axis_name="batch",
            )(params, statistics, x, outer_args=(y,))
            (want, also), plainly = jax.value_and_grad(plain, has_aux=True)(
                params, statistics, x, y
            )
            updates, state = optimizer.update(grads, state, params)
            both = (value, grads, updated), (want, plainly, also)
            return optax.apply_updates(params, updates), updated, state, both

        state = optimizer.init(params)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for _ in range(2):
                params, new, state, (found, want) = step(params, statistics, state)
                assert tree_allclose(found, want)
                statistics = nnx.merge_state(statistics, new)

    def test_equinox(self):
        class Net(eqx.Module):
            hidden: eqx.nn.Linear
            norm: eqx.nn.BatchNorm
            head: eqx.nn.Linear

            def __init__(self, key):
                keys = jax.random.split(key)
                self.hidden = eqx.nn.Linear(4, 8, key=keys[0])
                self.norm = eqx.nn.BatchNorm(8, axis_name="batch", mode="batch")
                self.head = eqx.nn.Linear(8, "scalar", key=keys[1])

            def __call__(self, x, state):
                h, state = self.norm(self.hidden(x), state)
                return self.head(jax.nn.relu(h)), state

        model, statistics = eqx.nn.make_with_state(Net)(KEY)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        x, y = jax.random.normal(KEY, (N, 4)), jnp.arange(1.0 * N) % 2

        def predict(params, statistics, x):
            return eqx.combine(params, static)(x, statistics)

        def loss(predictions, y):
            return jnp.mean((predictions - y) ** 2)

        def plain(params, statistics):
            net = jax.vmap(
                predict, (None, None, 0), out_axes=(0, None), axis_name="batch"
            )
            predictions, updated = net(params, statistics, x)
            return loss(predictions, y), updated

        of = chain_rule_value_and_grad(
            loss,
            predict,
            in_axes=(None, None, 0),
            has_aux=True,
            batch_axis_name="batch",
        )
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            for _ in range(2):
                (value, updated), grads = of(params, statistics, x, outer_args=(y,))
                want = jax.value_and_grad(plain, has_aux=True)(params, statistics)
                (plain_value, plain_updated), plain_grads = want
                assert tree_allclose((value, grads), (plain_value, plain_grads))
                arrays = [jax.tree.leaves(s) for s in (updated, plain_updated)]
                assert tree_allclose(*arrays)
                params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
                statistics = updated
