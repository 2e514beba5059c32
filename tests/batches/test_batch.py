"""``Batch`` and its chunks, on which rows, the engine and the chain rule stand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads._batches import loops
from pytree_grads._batches.batch import resolve
from pytree_grads._batches.chunks import Chunks, Place

N = 7
KEYS = jax.random.split(jax.random.key(0), N)


def fun(params, batch, activation, *, weight):
    noise = jax.random.normal(batch["key"])
    return activation(params["w"] @ batch["x"]) * weight + noise


def resolved(in_axes=(None, {"x": -1, "key": 0}, None)):
    params = {"w": jnp.arange(3.0), "none": None}
    batch = {"x": np.arange(3.0 * N, dtype=np.float32).reshape(3, N), "key": KEYS}
    weight = jnp.arange(N, dtype=jnp.float32)
    return resolve(
        fun, (params, batch, jnp.tanh), {"weight": weight}, 0, in_axes, shared=True
    )


def call(args, kwargs):
    return fun(*args, **kwargs)


def test_what_resolve_finds():
    batch = resolved()
    assert batch.size == N
    assert batch.argnums == (0,)
    assert batch.in_axes == ({"w": None, "none": None}, {"x": 1, "key": 0}, None)
    assert batch.primal_axes == (None,)
    assert tree_allclose(batch.primals, ({"w": jnp.arange(3.0), "none": None},))


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
def test_every_row_is_folded_once(chunk_size):
    batch = resolved()
    rows = batch.vmap(call)
    for apart in (False, True):
        mapped = loops.map_chunks(
            lambda c: c.vmap(call), batch, chunk_size, apart=apart
        )
        assert tree_allclose(mapped, rows)

    def step(total, chunk, place):
        own = chunk.vmap(call)
        total = {
            "sum": total["sum"] + jnp.sum(own),
            "seen": place.put(total["seen"], place.cut(total["seen"]) + 1),
        }
        return total, own

    init = {"sum": jnp.zeros(()), "seen": jnp.zeros(N, jnp.int32)}
    total, folded = loops.fold_chunks(step, init, batch, chunk_size)
    assert tree_allclose(folded, rows)
    assert tree_allclose(total, {"sum": jnp.sum(rows), "seen": jnp.ones(N, jnp.int32)})


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_rows_of_chunks_are_joined_in_their_order(devices):
    for total, size in itertools.product([4, 12, 20], [1, 2, 3, 4, 6, 8, 12]):
        chunks = Chunks.of(total, min(size, total), devices)
        starts, rest = chunks.apart
        rows = jnp.arange(2 * total).reshape(total, 2)
        full = jnp.stack([Place(chunks, start).cut(rows) for start in starts])
        assert tree_allclose(
            chunks.joined(full, *([rest.cut(rows)] if rest else [])), rows
        )


def test_parameters_that_differ_by_example():
    batch = resolve(fun, ({"w": jnp.ones((3, N))}, jnp.ones(N)), {}, 0, ({"w": -1}, 0))
    assert batch.primal_axes == (1,)
    with pytest.raises(
        ValueError, match=r"argument p\['w'\] is differentiated and mapped"
    ):
        resolve(lambda p, x: 0.0, batch.args, {}, 0, ({"w": -1}, 0), shared=True)


@pytest.mark.parametrize(
    "total, chunk_size", [(12, 4), (12, 8), (12, 9), (8, 8), (9, 1), (7, 5)]
)
@pytest.mark.parametrize("axis", [0, 1])
def test_chunks_of_several_groups(total, chunk_size, axis):
    """Every row goes back to where it was cut from, and is in one chunk of those
    apart.
    """
    chunks = Chunks.of(total, chunk_size)
    assert chunks.size == chunk_size
    x = jnp.moveaxis(jnp.arange(2 * total).reshape(total, 2), 0, axis)
    starts, rest = chunks.apart
    apart = [*(Place(chunks, start) for start in starts), *([rest] if rest else [])]
    for places in ([Place(chunks, start) for start in chunks.starts], apart):
        back = jnp.zeros_like(x)
        for place in places:
            back = place.put(back, place.cut(x, axis), axis)
        assert tree_allclose(back, x)
    rows = np.concatenate([place.cut(jnp.arange(total)) for place in apart])
    assert sorted(rows) == list(range(total))


@pytest.mark.parametrize(
    "chunk_size, width", [(8, 1), (9, 1), (3, 1), (16, 2), (31, 3)]
)
def test_chunks_are_shared_out_evenly_to_devices(chunk_size, width):
    chunks = Chunks.of(32, chunk_size, devices=8)
    assert chunks.size == 8 * width
    assert chunks.groups % 8 == 0
