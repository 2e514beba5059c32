"""``Batch`` and its chunks, on which rows, the engine and the chain rule stand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads import _batch

N = 7
KEYS = jax.random.split(jax.random.key(0), N)


def fun(params, batch, activation, *, weight):
    noise = jax.random.normal(batch["key"])
    return activation(params["w"] @ batch["x"]) * weight + noise


def resolved(in_axes=(None, {"x": -1, "key": 0}, None)):
    params = {"w": jnp.arange(3.0), "none": None}
    batch = {"x": np.arange(3.0 * N, dtype=np.float32).reshape(3, N), "key": KEYS}
    weight = jnp.arange(N, dtype=jnp.float32)
    return _batch.resolve(fun, (params, batch, jnp.tanh), {"weight": weight}, 0, in_axes)


def call(args, kwargs):
    return fun(*args, **kwargs)


def test_what_resolve_finds():
    batch = resolved()
    assert batch.size == N
    assert batch.argnums == (0,)
    assert batch.in_axes == ({"w": None, "none": None}, {"x": 1, "key": 0}, None)
    assert batch.primal_axes == (None,)
    assert tree_allclose(batch.primals, ({"w": jnp.arange(3.0), "none": None},))
    batch.require_shared()


def test_one_example_in_the_abstract():
    (params, example, activation), kwargs = resolved().example_avals()
    assert params["w"].shape == (3,)
    assert params["none"] is None
    assert example["x"].shape == (3,)
    assert example["key"].shape == ()
    assert example["key"].dtype == KEYS.dtype
    assert kwargs["weight"].shape == ()
    assert activation is jnp.tanh
    weight = kwargs["weight"]
    value = jax.eval_shape(lambda p, e, w: fun(p, e, activation, weight=w), params, example, weight)
    assert value.shape == ()


def test_a_chunk_is_a_batch():
    batch = resolved()
    rows = batch.vmap(call)
    for start in (0, 2, N - 3):
        chunk = batch.chunk(start, 3)
        assert chunk.size == 3
        assert tree_allclose(chunk.vmap(call), rows[start : start + 3])
    doubled = batch.with_primals(jax.tree.map(lambda p: 2 * p, batch.primals))
    assert tree_allclose(doubled.primals[0]["w"], 2 * jnp.arange(3.0))
    assert tree_allclose(doubled.kwargs, batch.kwargs)


@pytest.mark.parametrize("chunk_size", [None, 1, 2, 3, N - 1, N, N + 1])
def test_every_row_is_fresh_once(chunk_size):
    batch = resolved()
    rows = batch.vmap(call)
    assert tree_allclose(_batch.map_chunks(lambda chunk: chunk.vmap(call), batch, chunk_size), rows)

    def step(total, chunk, start, fresh):
        seen = jax.lax.dynamic_slice_in_dim(total["seen"], start, chunk.size)
        written = jax.lax.dynamic_update_slice_in_dim(
            total["seen"], seen + fresh.astype(jnp.int32), start, 0
        )
        return {
            "sum": total["sum"] + jnp.sum(jnp.where(fresh, chunk.vmap(call), 0.0)),
            "seen": written,
        }

    init = {"sum": jnp.zeros(()), "seen": jnp.zeros(N, jnp.int32)}
    total = _batch.fold_chunks(step, init, batch, chunk_size)
    assert tree_allclose(total, {"sum": jnp.sum(rows), "seen": jnp.ones(N, jnp.int32)})


def test_parameters_that_differ_by_example():
    batch = _batch.resolve(fun, ({"w": jnp.ones((3, N))}, jnp.ones(N)), {}, 0, ({"w": -1}, 0))
    assert batch.primal_axes == (1,)
    with pytest.raises(ValueError, match=r"argument args\[0\]\['w'\] is differentiated and mapped"):
        batch.require_shared()
