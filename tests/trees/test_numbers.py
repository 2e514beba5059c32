"""Numbers that a user gives: of any dtype, they become floats of the width of what they
meet.
"""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import CompilationCounter, tree_allclose

from pytree_grads import (
    Accumulator,
    Vector,
    fisher_product,
    gauss_newton_product,
    jacobian,
    linear_combination,
)

N = 5
P = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(3, 2), "v": jnp.ones(2)}
X = jnp.sin(jnp.arange(15.0)).reshape(N, 3)


def f(p, x):
    return jnp.tanh(x @ p["w"]) @ p["v"]


J = jacobian(f)(P, X)
BIG = 10**12  # JAX would take its lowest 32 bits
LARGE = [
    np.int64(BIG),
    np.array(BIG),
    np.uint64(BIG),
    3 * 10**9,
    BIG,
    2**100,
    np.uint8(200),
    200,
    np.float64(1e12),
    np.float16(200),
    ml_dtypes.bfloat16(200),
    jnp.bfloat16(200),
    jnp.uint8(200),
    jnp.int32(200),
    jnp.array(200),
    float("inf"),
    np.float32("inf"),
]


@pytest.mark.parametrize("bound", LARGE, ids=repr)
@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_bound_of_any_dtype(bound, chunk_size):
    rows = jacobian(f, chunk_size=chunk_size)(P, X)
    assert tree_allclose(rows.clip(bound).norms(), J.norms())
    assert tree_allclose(jax.jit(lambda J: J.clip({"w": bound, "v": 1}).sum())(rows),
                         J.clip({"w": 1e6, "v": 1.0}).sum())  # fmt: skip


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int32", "uint32", "bfloat16", "float16"]
)
def test_a_traced_bound_of_any_dtype(dtype):
    clipped = jax.jit(lambda bound: J.clip(bound).norms())(jnp.asarray(1, dtype))
    assert tree_allclose(clipped, J.clip(1.0).norms())


def test_with_x64(x64):
    for bound in (np.int64(BIG), jnp.int64(BIG), jnp.uint64(BIG), jnp.float64(1e12)):
        assert tree_allclose(J.clip(bound).norms(), J.norms())
        assert tree_allclose(
            jax.jit(lambda J, b: J.clip(b).norms())(J, bound), J.norms()
        )
    wide = jax.tree.map(lambda x: x.astype("float64"), (P, X))
    assert tree_allclose(
        jacobian(f)(*wide).clip(10**40).norms(), jacobian(f)(*wide).norms()
    )
    with pytest.raises(ValueError, match="argument max_norm must fit float32"):
        J.clip(10**40)
    with pytest.raises(ValueError, match="argument coefficients must fit float32"):
        linear_combination([1e40], [P])
    assert float(linear_combination([10**40], [jnp.float64(1)])) == 1e40
    with pytest.raises(ValueError, match="must fit float32"):
        linear_combination([1e40], [{"narrow": jnp.float32(1), "wide": jnp.float64(1)}])


WEIGHTS = {
    "weighted_sum": lambda c: J.weighted_sum(c),
    "square_sum": lambda c: J.square_sum(c),
    "scale": lambda c: J.scale(c).sum(),
    "J.T @ c": lambda c: J.T @ c,
    "coefficients": lambda c: linear_combination(c, J.to_rows()),
    "coefficients of a list": lambda c: linear_combination(list(c), [P] * N),
    "mixed coefficients": lambda c: linear_combination(
        [jnp.float32(1), *c], [P] * (N + 1)
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("dtype", ["int64", "uint64", "float64", "object"])
def test_weights_of_the_host(name, dtype):
    weights = [BIG, 1, 0, 7, 3 * 10**9]
    given = np.array(weights, dtype)
    if dtype == "object":
        if "list" not in name and "mixed" not in name:
            pytest.skip("an array of objects is no array of numbers")
        given = weights
    found = WEIGHTS[name](given)
    assert tree_allclose(found, WEIGHTS[name](np.array(weights, np.float32)))


@pytest.mark.parametrize("name", ["weighted_sum", "square_sum", "scale", "J.T @ c"])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int32", "bfloat16", "float16"])
def test_weights_of_jax(name, dtype):
    weights = jnp.arange(N).astype(dtype)
    expected = WEIGHTS[name](jnp.arange(N, dtype="float32"))
    assert tree_allclose(WEIGHTS[name](weights), expected)
    assert tree_allclose(jax.jit(WEIGHTS[name])(weights), expected)


@pytest.mark.parametrize(
    "number", [np.int64(BIG), BIG, 2**70, np.uint64(BIG), np.float64(2e12)]
)
def test_scalars(number):
    tree, factor = (
        {"w": jnp.ones(2), "half": jnp.full(2, 2**-30, jnp.bfloat16)},
        float(number),
    )
    expected = jax.tree.map(
        lambda x: (x.astype("float32") * factor).astype(x.dtype), tree
    )
    assert tree_allclose((number * Vector(tree)).tree, expected)
    assert tree_allclose((Vector(tree) / (1 / factor)).tree, expected)
    total = Accumulator.zeros_like(tree).add(tree, number)
    assert tree_allclose(total.sum(), expected)
    assert float(total.weight) == np.float32(factor)


@pytest.mark.parametrize(
    "leaf", [np.array([BIG, 0]), [BIG, 0.0]], ids=["array", "list"]
)
def test_directions(leaf):
    params = (
        [jnp.ones(()), jnp.zeros(())]
        if isinstance(leaf, list)
        else jnp.array([1.0, 0.0])
    )
    fun = lambda p, x: x * (p[0] + 0 * p[1])  # noqa: E731
    x = jnp.array([1.0, 2.0])
    assert tree_allclose(jacobian(fun)(params, x) @ leaf, 1e12 * x)
    expected = jax.tree.map(
        lambda y: jnp.float32(2.5) * y, jax.tree.map(jnp.float32, leaf)
    )
    assert tree_allclose(fisher_product(fun)(params, x)(leaf), expected)
    products = gauss_newton_product(lambda f: jnp.mean(f**2) / 2, fun)(params, x)(leaf)
    assert tree_allclose(products, expected)


def test_directions_of_narrow_parameters(x64):
    params, x = jnp.ones(3, jnp.bfloat16), jnp.ones((2, 3), jnp.bfloat16)
    product = fisher_product(lambda p, x: p @ x)(params, x)
    assert product(np.arange(3)).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match=r"expected bfloat16.3., got float32.3."):
        product(jnp.ones(3, jnp.float32))
    J = jacobian(lambda p, x: p @ x)(params, x)
    assert tree_allclose(
        J @ np.array([1, 1, 1 << 40]), jnp.full(2, 2.0**40, jnp.float32), 1e-2
    )


TOO_LARGE = {
    "max_norm": lambda x: J.clip(x),
    "max_norm['w']": lambda x: J.clip({"w": x, "v": 1.0}),
    "coefficients": lambda x: linear_combination([x, 1.0], [P, P]),
    "coefficients mixed": lambda x: linear_combination([x, jnp.float32(1)], [P, P]),
    "coefficients of a stack": lambda x: linear_combination(
        [x], {"w": jnp.ones((1, 2))}
    ),
    "the scalar": lambda x: x * Vector(P),
    "the scalar, divided by": lambda x: Vector(P) / x,
    "weight": lambda x: Accumulator.zeros_like(P).add(P, x),
    "v['v'][0]": lambda x: (
        jacobian(lambda p, x: p["v"][0] * x)({"v": [1.0]}, X[:, 0]) @ {"v": [x]}
    ),
    "v": lambda x: fisher_product(lambda p, x: p * x)(1.0, X[:, 0])(x),
}


@pytest.mark.parametrize("name", TOO_LARGE)
@pytest.mark.parametrize("number", [10**400, 10**39, 1e39, np.float64(1e300)], ids=str)
def test_what_does_not_fit_raises(name, number):
    words = name.split(",")[0].removesuffix(" mixed").removesuffix(" of a stack")
    with pytest.raises(ValueError, match=re.escape(words) + " must fit"):
        TOO_LARGE[name](number)


@pytest.mark.parametrize("name", ["weighted_sum", "square_sum", "scale", "J.T @ c"])
def test_weights_that_do_not_fit(name):
    with pytest.raises(ValueError, match=r"must fit float32, .* got 1e\+39"):
        WEIGHTS[name](np.array([1e39, *[0.0] * (N - 1)]))


def test_infinite_weights_are_what_they_are():
    assert np.isinf((float("inf") * Vector({"w": jnp.ones(2)})).tree["w"]).all()
    assert not np.isfinite(J.weighted_sum(np.full(N, np.inf))["w"]).any()


def test_a_number_of_another_dtype_does_not_compile_again():
    def calls(number):
        J.clip(number).sum(), J.scale(np.full(N, number)).sum(), number * Vector(P)
        linear_combination([number], [P])
        Accumulator.zeros_like(P).add(P, number)

    calls(2.0)
    with CompilationCounter() as counter:
        for number in (
            3,
            np.int64(BIG),
            np.uint8(3),
            np.float64(2),
            np.float16(1),
            2**40,
        ):
            calls(number)
    assert counter.count == 0
