"""Factored projections: one map for each key, without bias, with stated variances."""

from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS

from pytree_grads import jacobian
from pytree_grads._engine.products import factored_sketch

any_release = pytest.mark.any_release  # the tests that take longest

KINDS = ["kronecker", "tensor"]
KEY = jax.random.key(7)


def inner(params, row):
    """A function whose gradient is the row itself: its terms are dense."""
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(row), strict=True)
    return sum(jnp.sum(p * r).real for p, r in pairs)


def of_rows(rows, params, kind, dim):
    """The sketches of given rows."""
    return jacobian(inner)(params, rows).sketch(KEY, dim, kind=kind)


def table(kind, dim, key, *shapes):
    """R itself, (P, dim): the sketches of all unit vectors."""
    size = sum(map(prod, shapes))
    ends = np.cumsum([prod(shape) for shape in shapes])[:-1]
    parts = jnp.split(jnp.eye(size), ends, axis=1)
    rows = [x.reshape(size, *shape) for x, shape in zip(parts, shapes, strict=True)]
    params = [jnp.zeros(shape) for shape in shapes]
    return jacobian(inner)(params, rows).sketch(key, dim, kind=kind)


# -------------------------------------------------------------------- one map for a key


# A quarter of the models, of every kind of term.
@any_release
@pytest.mark.parametrize("name", list(MODELS)[::4])
def test_factors_and_rows_have_one_sketch(name, x64, monkeypatch):
    """Whatever terms a row is made of, it is projected as the row in full is.

    Factors are taken wherever a term has them, also where rows cost less.
    """

    def always(_, summand, shape):
        split = factored_sketch.split_of(shape)
        return factored_sketch._orientation(summand, shape, split)

    monkeypatch.setattr(factored_sketch, "_by_factors", always)
    model = MODELS[name]
    with jax.numpy_dtype_promotion("standard" if model.promotes else "strict"):
        fun, params, batch = model()

        @jax.jit
        def both(params, *batch):
            J = jacobian(fun)(params, *batch)
            rows = J.to_rows()
            return [
                (J.sketch(KEY, 16, kind=kind), of_rows(rows, params, kind, 16))
                for kind in KINDS
            ]

        for got, want in both(params, *batch):
            tolerance = 1e-5 if name == "attention_as_jax_has_it" else 1e-10
            size = np.abs(want).max()
            np.testing.assert_allclose(got, want, atol=tolerance * max(size, 1e-30))


def network(params, x):
    hidden = jnp.tanh(x @ params["w"] + params["b"][None])
    return jnp.sum(jnp.tanh(hidden @ params["v"]) ** 2)


PARAMS = {
    "w": jnp.linspace(-1.0, 1.0, 6 * 8).reshape(6, 8),
    "b": jnp.linspace(0.0, 1.0, 8),
    "v": jnp.linspace(1.0, -1.0, 8 * 5).reshape(8, 5),
}
XS = jax.random.normal(jax.random.key(0), (7, 3, 6))


@pytest.mark.parametrize("kind", KINDS)
def test_modes_and_weights(kind):
    J = jacobian(network)(PARAMS, XS)
    sketch = J.sketch(KEY, 16, kind=kind)
    assert sketch.shape == (7, 16)
    assert sketch.dtype == jnp.float32
    for options in ({"chunk_size": 3}, {"recompute": True}):
        other = jacobian(network, **options)(PARAMS, XS).sketch(KEY, 16, kind=kind)
        np.testing.assert_allclose(other, sketch, rtol=1e-4, atol=1e-5)
    s = jnp.linspace(-1.0, 2.0, 7)
    scaled = J.scale(s).sketch(KEY, 16, kind=kind)
    np.testing.assert_allclose(scaled, s[:, None] * sketch, rtol=1e-4, atol=1e-5)
    few = jacobian(network)(PARAMS, XS[2:4]).sketch(KEY, 16, kind=kind)
    np.testing.assert_allclose(few, sketch[2:4], rtol=1e-4, atol=1e-5)
    other_key = J.sketch(jax.random.key(8), 16, kind=kind)
    assert not np.allclose(other_key, sketch)


@any_release
@pytest.mark.parametrize("kind", ["dense", *KINDS])
def test_a_diagonal_in_parameter_space(kind):
    """Whether factors absorb it, as a number for each line, or rows are built."""
    J = jacobian(network)(PARAMS, XS)
    full = jax.tree.map(lambda x: jnp.cos(x) + 2, PARAMS)
    for diagonal in (full, full | {"w": full["w"][:, :1]}):
        scaled = J.scale_params(diagonal)
        want = of_rows(scaled.to_rows(), PARAMS, kind, 16)
        np.testing.assert_allclose(
            scaled.sketch(KEY, 16, kind=kind), want, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize("kind", KINDS)
def test_no_rows_no_entries_and_half_precision(kind):
    none = jacobian(network)(PARAMS, XS[:0]).sketch(KEY, 16, kind=kind)
    assert none.shape == (0, 16)
    empty = {"w": jnp.zeros((3, 0)), "v": jnp.ones(2)}
    J = jacobian(lambda p, x: p["v"] @ x + jnp.sum(p["w"]))(empty, jnp.ones((4, 2)))
    assert jnp.abs(J.sketch(KEY, 16, kind=kind)).max() > 0
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (PARAMS, XS))
    found = jacobian(network)(*half).sketch(KEY, 64, kind=kind)
    exact = jacobian(network)(PARAMS, XS).sketch(KEY, 64, kind=kind)
    assert found.dtype == jnp.float32
    size = jnp.abs(exact).max()
    np.testing.assert_allclose(found, exact, atol=0.1 * float(size))


@any_release
@pytest.mark.parametrize("kind", KINDS)
def test_outputs(kind):
    def outputs(params, x):
        hidden = jnp.tanh(x @ params["w"] + params["b"][None])
        return {"a": jnp.sum(hidden), "b": hidden[:2, 0]}

    J = jacobian(outputs)(PARAMS, XS)
    got, rows = J.sketch(KEY, 16, kind=kind), J.to_rows()
    assert got["b"].shape == (7, 2, 16)
    want = of_rows(rows["a"], PARAMS, kind, 16)
    np.testing.assert_allclose(got["a"], want, rtol=1e-4, atol=1e-5)
    second = jax.tree.map(lambda x: x[:, 1], rows["b"])
    want = of_rows(second, PARAMS, kind, 16)
    np.testing.assert_allclose(got["b"][:, 1], want, rtol=1e-4, atol=1e-5)


@any_release
def test_no_row_is_built():
    """Beyond what norms take, less memory than one row of 512 x 512 numbers."""
    params, x = jnp.zeros((512, 512)), jnp.ones((4, 512))

    def fun(w, x):
        return jnp.sum(jnp.tanh(x @ w))

    def memory(product):
        compiled = jax.jit(lambda w, x: product(jacobian(fun)(w, x))).lower(params, x)
        return compiled.compile().memory_analysis().temp_size_in_bytes

    least = memory(lambda J: J.norms())
    for kind in KINDS:
        own = memory(lambda J, kind=kind: J.sketch(KEY, 1024, kind=kind))
        assert own - least < 4 * 512 * 512 / 2, kind


# ------------------------------------------------------------------- mean and variance


SHAPES = [(6, 9), (5,), (3, 2, 4)]


@any_release
@pytest.mark.parametrize("kind", KINDS)
def test_inner_products_are_unbiased(kind):
    """The mean of R Rᵀ over 1,000 keys is the identity, across leaves too."""
    keys = jax.random.split(jax.random.key(0), 1000)

    def products(key):
        R = table(kind, 16, key, *SHAPES)
        return R @ R.T

    def add(total, key):
        found = products(key)
        return (total[0] + found, total[1] + found**2), None

    size = sum(map(prod, SHAPES))
    zeros = jnp.zeros((size, size))
    (first, second), _ = jax.jit(lambda k: jax.lax.scan(add, (zeros, zeros), k))(keys)
    mean = first / len(keys)
    error = jnp.sqrt(jnp.maximum(second / len(keys) - mean**2, 0) / len(keys))
    away = jnp.abs(mean - jnp.eye(size))
    assert (away < 6 * error + 1e-5).all()
    assert error.max() < 0.06


def spread(kind, dim, x, y):
    """The variance of the inner product of two matrices over 400 keys."""
    rows = jnp.stack([x, y])

    def product(key):
        a, b = jacobian(inner)(jnp.zeros(x.shape), rows).sketch(key, dim, kind=kind)
        return a @ b

    keys = jax.random.split(jax.random.key(1), 400)
    found = jax.jit(lambda keys: jax.lax.map(product, keys, batch_size=100))(keys)
    exact = jnp.sum(x * y)
    return float(jnp.mean((found - exact) ** 2) / jnp.sum(x**2) / jnp.sum(y**2))


A, B = jax.random.normal(KEY, (2, 20))
RANK_ONE = jnp.outer(A, B)
FULL = jax.random.normal(KEY, (20, 20))


@any_release
@pytest.mark.parametrize("x", [RANK_ONE, FULL], ids=["rank one", "full"])
def test_variances_keep_their_bounds(x):
    dim, side = 64, 8
    slack = 1.4  # 400 keys
    kronecker = spread("kronecker", dim, x, x)
    assert kronecker < slack * ((1 + 2 / side) ** 2 - 1)
    assert spread("tensor", dim, x, x) < slack * 8 / dim
    assert spread("dense", dim, x, x) < slack * 2 / dim


@any_release
def test_rank_one_rows_need_the_larger_bound():
    """Signs of both sides: their norms have variance near (1 + 2/√dim)² − 1."""
    found = spread("kronecker", 64, RANK_ONE, RANK_ONE)
    assert found > 0.6 * ((1 + 2 / 8) ** 2 - 1)


@any_release
@pytest.mark.parametrize("kind", KINDS)
def test_leaves_share_the_numbers_evenly(kind):
    """Small leaves too: what two of them have in common has variance near 1/dim."""
    dim, shapes = 64, [(3, 3), (3, 3)]

    def product(key):
        R = table(kind, dim, key, *shapes)
        return R[:9] @ R[9:].T

    keys = jax.random.split(jax.random.key(1), 400)
    found = jax.jit(lambda keys: jax.lax.map(product, keys, batch_size=100))(keys)
    assert 0.7 / dim < float(jnp.mean(found**2)) < 1.4 / dim
    assert float(jnp.mean(found**2, axis=0).max()) < 4 / dim  # no entries always meet


@any_release
@pytest.mark.parametrize("kind", KINDS)
def test_complex_rows_keep_the_real_part(kind):
    x, y = (
        jax.lax.complex(*jax.random.normal(key, (2, 6, 7)))
        for key in jax.random.split(KEY)
    )
    params = jnp.zeros((6, 7), jnp.complex64)
    rows = jnp.stack([x, y])

    def product(key):
        a, b = jacobian(inner)(params, rows).sketch(key, 64, kind=kind)
        return a @ b

    keys = jax.random.split(jax.random.key(1), 1000)
    found = jax.lax.map(product, keys, batch_size=100)
    error = found.std() / len(keys) ** 0.5
    assert jnp.abs(found.mean() - jnp.sum(x * y.conj()).real) < 5 * error


def test_explain_says_how_each_leaf_is_taken():
    def gated(params, x):
        return network(params, x) + jnp.sum(jnp.tanh(params["gate"] * x[:2]))

    params = PARAMS | {"gate": jnp.ones((2, 6)), "unused": jnp.zeros((2, 2))}
    J = jacobian(gated)(params, XS[:, :1])
    said = J.explain(sketch_dim=16).removeprefix(J.explain())
    lines = {line.split(" ")[0]: line for line in said.splitlines()}
    assert "row in full: a vector" in lines["['b']"]
    assert "factors, 4x4" in lines["['w']"]
    assert "row in full" in lines["['gate']"]
    assert "zero" in lines["['unused']"]
    full = J.scale_params(jax.tree.map(jnp.ones_like, params)).explain(sketch_dim=16)
    assert "factors, 4x4" not in full
    with pytest.raises(ValueError, match="sketch_dim"):
        J.explain(sketch_dim=0)


def test_any_number_is_divided_well():
    """Also a prime one, which has no factors."""
    assert factored_sketch.side_dims((300, 400), 257) == (16, 16)
    assert factored_sketch.side_dims((400, 300), 512) == (23, 22)
    assert factored_sketch.side_dims((10, 784), 512) == (10, 51)
    assert factored_sketch.side_dims((3, 2), 512) == (3, 2)
    assert factored_sketch.side_dims((3, 2), 1) == (1, 1)


def test_small_matrices_are_kept_whole():
    """Both sides fit: inner products within a leaf are exact."""
    x, y = jax.random.normal(KEY, (2, 4, 4))
    a, b = jacobian(inner)(jnp.zeros((4, 4)), jnp.stack([x, y])).sketch(
        KEY, 16, kind="kronecker"
    )
    np.testing.assert_allclose(a @ b, jnp.sum(x * y), rtol=1e-5)


def test_another_kind_is_an_error():
    J = jacobian(network)(PARAMS, XS)
    with pytest.raises(ValueError, match="'dense', 'kronecker', 'tensor'"):
        J.sketch(KEY, 16, kind="sparse")
