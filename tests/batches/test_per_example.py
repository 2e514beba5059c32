"""``per_example_grad`` and ``per_example_value_and_grad`` against a Python loop of
``jax.grad``.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TraceCounter, tree_allclose

from pytree_grads import per_example_grad, per_example_value_and_grad

N = 7
KEY = jax.random.key(1)
CHUNKS = [None, 1, 3, N - 1, N + 5]


def mlp(params, x, y):
    hidden = jnp.tanh(x @ params["w"] + params["b"])
    return jnp.sum((hidden @ params["v"] - y) ** 2)


def problem(dtype=jnp.float32, n=N):
    keys = jax.random.split(KEY, 5)
    params = {
        "w": jax.random.normal(keys[0], (3, 4), dtype),
        "b": jax.random.normal(keys[1], (4,), dtype),
        "v": jax.random.normal(keys[2], (4,), dtype),
    }
    x, y = (
        jax.random.normal(keys[3], (n, 3), dtype),
        jax.random.normal(keys[4], (n,), dtype),
    )
    return params, x, y


def stack(rows):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *rows)


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_every_row_is_its_own_gradient(chunk_size, x64):
    params, x, y = problem(jnp.float64)
    expected = stack(
        [
            jax.value_and_grad(mlp)(params, *example)
            for example in zip(x, y, strict=True)
        ]
    )
    rows = per_example_value_and_grad(mlp, chunk_size=chunk_size)
    assert tree_allclose(rows(params, x, y), expected)
    assert tree_allclose(jax.jit(rows)(params, x, y), expected)
    assert tree_allclose(
        per_example_grad(mlp, chunk_size=chunk_size)(params, x, y), expected[1]
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_rows_keep_the_dtype_of_the_parameters(dtype):
    args = problem(dtype)
    expected = jax.vmap(jax.grad(mlp), (None, 0, 0))(*args)
    assert tree_allclose(per_example_grad(mlp, chunk_size=3)(*args), expected)


@pytest.mark.parametrize("argnums", [0, 1, -1, (0,), (2, 0), (-2, 0)])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_argnums_as_in_jax_grad(argnums, chunk_size):
    def f(a, x, b):
        return jnp.sum(a["w"] * jnp.sin(x) * b)

    a, x, b = {"w": jnp.float32(2)}, jnp.arange(N, dtype=jnp.float32), jnp.float32(3)
    rows = per_example_grad(f, argnums, in_axes=(None, 0, None), chunk_size=chunk_size)(
        a, x, b
    )
    expected = jax.vmap(jax.grad(f, argnums), (None, 0, None))(a, x, b)
    assert tree_allclose(rows, expected)


@pytest.mark.parametrize("chunk_size", [None, 3])
def test_axes_shared_arguments_and_keywords(chunk_size):
    def f(params, batch, shared, activation, *, scale):
        return activation(params @ batch["x"] + shared["bias"] * batch["t"][0]) * scale

    x = jax.random.normal(KEY, (3, N))
    t = jax.random.normal(KEY, (2, N, 1))
    args = (
        jnp.ones(3),
        {"x": x, "t": (t[0], t[1])},
        {"bias": 2.0, "unused": None},
        jnp.tanh,
    )
    scale = jnp.arange(N, dtype=jnp.float32)
    in_axes = (None, {"x": -1, "t": 0}, None, None)

    def of(i, params):
        batch = {"x": x[:, i], "t": (t[0, i], t[1, i])}
        return f(params, batch, *args[2:], scale=scale[i])[0]

    def scalar(*args, **kwargs):
        return f(*args, **kwargs)[0]

    rows = per_example_grad(scalar, in_axes=in_axes, chunk_size=chunk_size)(
        *args, scale=scale
    )
    expected = stack([jax.grad(lambda p, i=i: of(i, p))(args[0]) for i in range(N)])
    assert tree_allclose(rows, expected)


@pytest.mark.parametrize("chunk_size", [None, 2, 3])
def test_aux_is_stacked(chunk_size):
    def f(p, x):
        return jnp.sum(p * x), {"x": x, "n": jnp.int32(3)}

    p, x = jnp.ones(2), jax.random.normal(KEY, (N, 2))
    aux = {"x": x, "n": jnp.full(N, 3, jnp.int32)}
    got = per_example_value_and_grad(f, has_aux=True, chunk_size=chunk_size)(p, x)
    assert tree_allclose(got, ((x.sum(1), aux), x))
    got = per_example_grad(f, has_aux=True, chunk_size=chunk_size)(p, x)
    assert tree_allclose(got, (x, aux))


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_every_example_sees_its_own_key(make, chunk_size):
    def f(p, key):
        noise = jax.random.normal(key, p.shape)
        return p @ noise, key

    p, keys = jnp.ones(3), jax.random.split(make(7), N)
    noise = stack([jax.random.normal(key, (3,)) for key in keys])
    rows, used = per_example_grad(f, has_aux=True, chunk_size=chunk_size)(p, keys)
    assert tree_allclose(rows, noise, rtol=0)
    assert tree_allclose(jax.random.key_data(used), jax.random.key_data(keys))


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_an_empty_batch(chunk_size):
    params, x, y = problem(n=0)
    values, grads = per_example_value_and_grad(mlp, chunk_size=chunk_size)(params, x, y)
    assert values.shape == (0,)
    assert tree_allclose(
        grads, jax.tree.map(lambda p: jnp.zeros((0, *p.shape)), params)
    )


@pytest.mark.parametrize("chunk_size", CHUNKS)
def test_a_nan_row_stays_alone(chunk_size):
    params, x, y = problem()
    bad = x.at[N - 2].set(jnp.nan)
    rows = per_example_grad(mlp, chunk_size=chunk_size)(params, bad, y)
    expected = per_example_grad(mlp)(params, x, y)
    assert tree_allclose(
        rows, jax.tree.map(lambda r: r.at[N - 2].set(jnp.nan), expected)
    )


def test_complex_parameters_follow_jax_grad():
    def f(p, x):
        return jnp.abs(p["z"] * x) ** 2

    p, x = {"z": jnp.complex64(1 + 2j)}, jnp.array([1.0, 2.0], jnp.complex64)
    rows = per_example_grad(f)(p, x)
    assert tree_allclose(rows, {"z": jnp.array([2 - 4j, 8 - 16j], jnp.complex64)})


def test_tied_parameters():
    shared = jnp.array([1.0, 2.0])

    def f(params, x):
        return jnp.sum(params["a"] * x) * jnp.sum(params["b"])

    rows = per_example_grad(f)({"a": shared, "b": shared}, jnp.ones((2, 2)))
    assert tree_allclose(rows, {"a": jnp.full((2, 2), 3.0), "b": jnp.full((2, 2), 3.0)})


def test_batched_parameters_give_each_its_own():
    p, x = jnp.arange(1.0, N + 1), jnp.ones(N)
    rows = per_example_grad(lambda p, x: p**2 * x, in_axes=0, chunk_size=3)(p, x)
    assert tree_allclose(rows, 2 * p)


@pytest.mark.parametrize("chunk_size", [None, 3])
class TestTransformations:
    def test_vmap(self, chunk_size):
        params, x, y = problem()
        many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        rows = per_example_grad(mlp, chunk_size=chunk_size)
        got = jax.vmap(rows, (0, None, None))(many, x, y)
        expected = stack(
            [rows(jax.tree.map(lambda p, i=i: p[i], many), x, y) for i in range(2)]
        )
        assert tree_allclose(got, expected)

    def test_grad_through_rows(self, chunk_size):
        params, x, y = problem()

        def penalty(rows):
            return lambda p: sum(jnp.sum(r**4) for r in jax.tree.leaves(rows(p, x, y)))

        got = jax.grad(penalty(per_example_grad(mlp, chunk_size=chunk_size)))(params)
        expected = jax.grad(penalty(jax.vmap(jax.grad(mlp), (None, 0, 0))))(params)
        assert tree_allclose(got, expected)

    def test_scan_checkpoint_and_linearize(self, chunk_size):
        params, x, y = problem()
        rows = per_example_grad(mlp, chunk_size=chunk_size)

        def step(p, _):
            mean = jax.tree.map(lambda r: r.mean(0), rows(p, x, y))
            return jax.tree.map(lambda p, g: p - 0.01 * g, p, mean), None

        trained, _ = jax.lax.scan(jax.checkpoint(step), params, length=3)
        expected = params
        for _ in range(3):
            expected, _ = step(expected, None)
        assert tree_allclose(trained, expected)
        _, tangents = jax.jvp(lambda p: rows(p, x, y), (params,), (params,))
        _, wanted = jax.jvp(
            lambda p: jax.vmap(jax.grad(mlp), (None, 0, 0))(p, x, y),
            (params,),
            (params,),
        )
        assert tree_allclose(tangents, wanted)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("chunk_size", [None, 1])
def test_rows_are_not_added_up_over_devices(chunk_size, check_vma):
    """In ``jax.shard_map``, ``jax.grad`` by replicated parameters is a sum over the
    devices.
    """
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    params, x, y = problem(n=16)
    split, whole = jax.P("d"), jax.P()
    rows = jax.shard_map(
        per_example_value_and_grad(mlp, chunk_size=chunk_size),
        mesh=mesh,
        in_specs=(whole, split, split),
        out_specs=(split, split),
        check_vma=check_vma,
    )
    expected = jax.vmap(jax.value_and_grad(mlp), (None, 0, 0))(params, x, y)
    assert tree_allclose(jax.jit(rows)(params, x, y), expected)


@pytest.mark.parametrize("chunk_size", [None, 3, 7])
def test_fun_is_traced_once(chunk_size):
    counter = TraceCounter(mlp)
    rows = jax.jit(per_example_grad(counter, chunk_size=chunk_size))
    params, x, y = problem()
    rows(params, x, y)
    rows(jax.tree.map(lambda p: 2 * p, params), -x, y)
    assert counter.count == 1


def test_chunks_bound_the_memory():
    def f(p, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["v"]))  # (T, 128) twice

    p = {"w": jnp.ones((2, 128)), "v": jnp.ones((128, 2))}
    x = jnp.ones((256, 64, 2))

    def temporary(chunk_size):
        rows = jax.jit(per_example_grad(f, chunk_size=chunk_size))
        return rows.lower(p, x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(8) < temporary(None) / 8


def test_it_keeps_the_name_and_numpy_arguments():
    rows = per_example_grad(mlp)
    assert rows.__name__ == "mlp"
    params, x, y = problem()
    host = jax.tree.map(np.asarray, (params, x, y))
    for chunk_size in (None, 3):
        got = per_example_grad(mlp, chunk_size=chunk_size)(*host)
        assert tree_allclose(got, rows(params, x, y))
