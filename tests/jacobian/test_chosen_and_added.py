"""Rows chosen by an index, Jacobians times numbers and added, against plain rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CompilationCounter, tree_allclose

from pytree_grads import jacobian

pytestmark = pytest.mark.any_release

N = 7
MODES = [
    {},
    {"recompute": True},
    {"chunk_size": 3},
]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


PARAMS = {"w": (4, 3), "b": (3,), "table": (5, 3)}


def params():
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(PARAMS.items())}


def loss(p, x, token):
    h = jnp.tanh(x @ p["w"] + p["b"]) * p["table"][token]
    return jnp.sum(h**2)


def penalized(p, example):
    """Of another batch; its rows have a part that all examples share."""
    h = jnp.sin(example["x"] @ p["w"])  # (2, 3): T = 2
    return jnp.sum(h) + jnp.sum(p["table"] ** 2) * 0.1


def outputs(p, x, token):
    return {"h": jnp.tanh(x @ p["w"] + p["b"]), "t": jnp.sum(p["table"][token])}


def other_outputs(p, example):
    h = jnp.sin(example["x"] @ p["w"]).sum(0)
    return {"h": h + p["b"], "t": jnp.sum(p["table"]) * jnp.sum(h)}


def batch():
    return normal(3, N, 4), jnp.arange(N) % 5


def other_batch():
    return ({"x": normal(4, N, 2, 4)},)


FUNCTIONS = {"loss": (loss, penalized), "outputs": (outputs, other_outputs)}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def plain(fun, p, batch):
    """The rows, with one axis for all outputs: leaves (N, *leaf) or (N, K, *leaf)."""

    def flat(p, *example):
        leaves = jax.tree.leaves(fun(p, *example))
        if len(leaves) == 1:
            return leaves[0]
        return jnp.concatenate([jnp.ravel(x) for x in leaves])

    return jax.vmap(jax.jacrev(flat), (None, *[0] * len(batch)))(p, *batch)


def products(J):
    """Each product of the rows once."""
    flat = jax.tree.leaves(J.norms())
    return {
        "norms": jnp.concatenate([x.reshape(len(x), -1) for x in flat], axis=1),
        "sum": J.sum(),
        "mean": J.mean(),
        "squares": J.square_sum(),
        "applied": sum(
            jnp.sum(x, axis=range(1, x.ndim)) for x in jax.tree.leaves(J @ params())
        ),
    }


def expected(rows):
    leaves = jax.tree.leaves(rows)
    depth = leaves[0].ndim - 1  # b, the first leaf, is a vector
    axes = tuple(range(depth))
    lead = leaves[0].shape[:depth]
    flat = jnp.concatenate([x.reshape(*lead, -1) for x in leaves], axis=-1)
    v = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(params())])
    return {
        "norms": jnp.linalg.norm(flat, axis=-1).reshape(lead[0], -1),
        "sum": jax.tree.map(lambda x: jnp.sum(x, axes), rows),
        "mean": jax.tree.map(lambda x: jnp.mean(x, axes), rows),
        "squares": jax.tree.map(lambda x: jnp.sum(x**2, axes), rows),
        "applied": jnp.sum((flat @ v).reshape(lead[0], -1), axis=1),
    }


def compare(J, rows):
    assert tree_allclose(jax.jit(products)(J), expected(rows), rtol=1e-11)
    assert J.shape[:-1] == jax.tree.leaves(rows)[0].shape[:-1]


def taken(rows, index):
    return jax.tree.map(lambda x: x[index], rows)


def scaled(rows, s):
    def times(x):
        return x * s.reshape(*s.shape, *[1] * (x.ndim - s.ndim))

    return jax.tree.map(times, rows)


def plus(one, other):
    return jax.tree.map(jnp.add, one, other)


def rows_and_sum(J):
    return plain_of(J, params()), J.sum()


def of_rows(rows):
    depth = jax.tree.leaves(rows)[0].ndim - 1
    return rows, jax.tree.map(lambda x: jnp.sum(x, tuple(range(depth))), rows)


INDICES = {
    "one": (3, slice(3, 4)),
    "from the end": (np.int8(-1), slice(6, 7)),
    "a slice": (slice(2, 5), slice(2, 5)),
    "a step": (slice(None, None, 2), slice(None, None, 2)),
    "backwards": (slice(None, None, -3), slice(None, None, -3)),
    "indices": (jnp.array([5, -1, 5, 0]), np.array([5, 6, 5, 0])),
    "a list": ([1, -2], np.array([1, 5])),
    "a mask": (jnp.arange(N) % 3 == 0, np.array([0, 3, 6])),
    "unsigned": (np.array([6, 2], np.uint8), np.array([6, 2])),
}


@each_mode
@each_function
def test_rows_chosen_by_an_index(name, mode, x64):
    fun = FUNCTIONS[name][0]
    p, (x, token) = params(), batch()
    J, rows = jacobian(fun, **mode)(p, x, token), plain(fun, p, (x, token))
    for index, places in INDICES.values():
        assert tree_allclose(rows_and_sum(J[index]), of_rows(taken(rows, places)))


@each_mode
def test_no_rows_may_be_chosen(mode, x64):
    J = jacobian(loss, **mode)(params(), *batch())
    for index in ([], jnp.zeros(N, bool), slice(4, 2)):
        assert J[index].norms().shape == (0,)
        assert tree_allclose(J[index].sum(), jax.tree.map(jnp.zeros_like, params()))


@each_mode
def test_weights_and_clips_stay_with_the_rows_that_are_chosen(mode, x64):
    J = jacobian(loss, **mode)(params(), *batch())
    bounds = {"w": 0.3, "b": 0.2, "table": 0.1}
    index = jnp.array([5, 0, 5])
    for new in (
        J.scale(jnp.arange(1.0, N + 1)),
        J.clip(0.3),
        J.clip(bounds, nan_safe=True),
    ):
        rows = taken(new.to_rows(), index)
        assert tree_allclose(rows_and_sum(new[index]), of_rows(rows))


@each_mode
def test_a_traced_index_is_clamped(mode, x64):
    J = jacobian(loss, **mode)(params(), *batch())
    rows = J.to_rows()
    of = jax.jit(lambda J, i: J[i].to_rows())
    for dtype in (jnp.int32, jnp.int64, jnp.int8):
        index = jnp.array([2, 99, -1, -99], dtype)
        assert tree_allclose(of(J, index), taken(rows, np.array([2, 6, 6, 0])))
    assert tree_allclose(of(J, jnp.uint32(99)), taken(rows, slice(6, 7)))


@each_mode
def test_rows_chosen_inside_vmap_grad_and_scan(mode, x64):
    p, (x, token) = params(), batch()

    def chosen(p, i):
        return jacobian(loss, **mode)(p, x, token)[i].norms()[0]

    def plainly(p, i):
        row = jax.grad(loss)(p, x[i], token[i])
        return jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(row)))

    at = jnp.arange(N)
    assert tree_allclose(
        jax.vmap(chosen, (None, 0))(p, at), jax.vmap(plainly, (None, 0))(p, at)
    )
    assert tree_allclose(jax.grad(chosen)(p, 2), jax.grad(plainly)(p, 2))
    J = jacobian(loss, **mode)(p, x, token)
    _, found = jax.lax.scan(lambda c, i: (c, J[i].norms()[0]), None, at)
    assert tree_allclose(found, J.norms())


@each_mode
@each_function
def test_a_jacobian_times_a_number(name, mode, x64):
    fun = FUNCTIONS[name][0]
    J, rows = jacobian(fun, **mode)(params(), *batch()), plain(fun, params(), batch())
    for found, factor in (
        (2 * J, 2.0),
        (J * np.float32(-0.5), -0.5),
        (-J, -1.0),
        (J / 3, 1 / 3),
        (jax.jit(lambda c: c * J)(jnp.float64(0.1)), 0.1),
    ):
        want = jax.tree.map(lambda x, c=factor: c * x, rows)
        assert tree_allclose(rows_and_sum(found), of_rows(want))


@each_mode
@each_function
def test_jacobians_are_added(name, mode, x64):
    (fun, other), p = FUNCTIONS[name], params()
    J, K = (
        jacobian(fun, **mode)(p, *batch()),
        jacobian(other, **mode)(p, *other_batch()),
    )
    a, b = plain(fun, p, batch()), plain(other, p, other_batch())
    compare(J + K, plus(a, b))
    difference = jax.tree.map(jnp.subtract, a, b)
    assert tree_allclose(rows_and_sum(J - K), of_rows(difference))
    kernel = sum(
        np.tensordot(
            x.reshape(*J.shape[:-1], -1), x.reshape(*J.shape[:-1], -1), (-1, -1)
        )
        for x in jax.tree.leaves(plus(a, b))
    )
    found = jax.tree.leaves((J + K).gram())
    assert np.isclose(sum(map(jnp.sum, found)), kernel.sum())
    twice = taken(plus(plus(a, b), a), slice(1, 4))
    assert tree_allclose(rows_and_sum(((J + K) + J)[1:4]), of_rows(twice))


@each_mode
@each_function
def test_rows_are_added_with_their_weights_and_clips(name, mode, x64):
    (fun, other), p = FUNCTIONS[name], params()
    bounds = {"w": 0.3, "b": 0.2, "table": 0.1}
    J = jacobian(fun, **mode)(p, *batch()).clip(bounds, nan_safe=True)
    K = jacobian(other, **mode)(p, *other_batch())
    K = 3 * K.scale(jax.tree.map(jnp.sqrt, K.norms()))
    rows = plus(
        *(plain_of(x, p) for x in (J, K)),
    )
    total = J + K
    compare(total, rows)
    total.check()
    assert "['w']" in total.explain()


def plain_of(J, p):
    """The rows of J as `plain` has them: an axis for all outputs."""
    rows = J.to_rows()
    if jax.tree.structure(rows) == jax.tree.structure(p):
        return rows

    def joined(like, *parts):
        flat = [x.reshape(len(x), -1, *like.shape) for x in parts]
        return jnp.concatenate(flat, axis=1)

    return jax.tree.map(joined, p, *(rows[name] for name in ("h", "t")))


@each_mode
def test_rows_at_two_values_of_the_parameters(mode, x64):
    """As in variance reduction: each part has the parameters it was made with."""
    p, old = params(), jax.tree.map(jnp.sin, params())
    made = jacobian(loss, **mode)
    rows = [plain(loss, x, batch()) for x in (p, old)]
    change = made(p, *batch()) - made(old, *batch())
    want = jax.tree.map(jnp.subtract, *rows)
    assert tree_allclose(rows_and_sum(change), of_rows(want))
    change.check()


@each_mode
def test_sums_are_differentiated_and_mapped(mode, x64):
    p = params()

    def squares(p):
        total = jacobian(loss, **mode)(p, *batch()) + 2 * jacobian(penalized, **mode)(
            p, *other_batch()
        )
        return jnp.sum(total.squared_norms() * jnp.arange(1.0 * N))

    def plainly(p):
        a, b = plain(loss, p, batch()), plain(penalized, p, other_batch())
        total = jax.tree.map(lambda x, y: x + 2 * y, a, b)
        axes = [tuple(range(1, x.ndim)) for x in jax.tree.leaves(total)]
        squares = zip(jax.tree.leaves(total), axes, strict=True)
        return sum(jnp.sum(x**2, axis) for x, axis in squares) @ jnp.arange(1.0 * N)

    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), p)
    assert tree_allclose(jax.vmap(squares)(many), jax.vmap(plainly)(many), rtol=1e-11)
    assert tree_allclose(jax.grad(squares)(p), jax.grad(plainly)(p), rtol=1e-11)


def test_a_row_that_does_not_count_adds_nothing():
    x, token = batch()
    bad = x.at[2].set(jnp.nan)
    J = jacobian(loss)(params(), bad, token).clip(1.0, nan_safe=True)
    K = jacobian(loss)(params(), x, token)
    assert tree_allclose((J + K)[2].to_rows(), K[2].to_rows())


def test_equal_rows_that_cancel_pass_the_check():
    J = jacobian(loss)(params(), *batch())
    (J - J).check()
    (J + -1.001 * J).check()


@pytest.mark.parametrize("mode", MODES[1:3], ids=str)
def test_products_of_a_sum_are_compiled_once(mode):
    made, p = jacobian(loss, **mode), params()
    other = jacobian(penalized, **mode)

    def norms():
        return (made(p, *batch()) + 2 * other(p, *other_batch()))[::2].norms()

    norms()
    with CompilationCounter() as counter:
        norms()
    assert counter.count == 0
