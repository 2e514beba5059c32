"""``linear_combination``: values, dtypes, transformations, and one compiled call."""

import functools
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CompilationCounter, equations, tree_allclose

from pytree_grads import Vector, linear_combination

KEYS = jax.random.split(jax.random.key(0), 8)


def tree(key, dtype=jnp.float32):
    a, b, c = jax.random.split(key, 3)
    return {
        "w": jax.random.normal(a, (3, 4), dtype),
        "rest": [
            jax.random.normal(b, (), dtype),
            (jax.random.normal(c, (2, 0), dtype), None),
        ],
    }


def oracle(coefficients, trees):
    """The sum in float64 (or complex128), rounded once to the dtype of the leaf."""

    def combine(*leaves):
        wide = np.complex128 if jnp.iscomplexobj(leaves[0]) else np.float64
        total = sum(
            np.asarray(c).astype(wide) * np.asarray(x).astype(wide)
            for c, x in zip(coefficients, leaves, strict=True)
        )
        return jnp.asarray(total).astype(leaves[0].dtype)

    return jax.tree.map(combine, *trees)


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


@pytest.mark.parametrize(
    "dtype", [jnp.float32, jnp.bfloat16, jnp.float16, jnp.complex64]
)
@pytest.mark.parametrize("count", [1, 2, 5])
def test_sequence_and_stacked_equal_the_wide_sum(dtype, count):
    trees = [tree(key, dtype) for key in KEYS[:count]]
    coefficients = [0.5, -2, 3.25, 0, 1][:count]
    expected = oracle(coefficients, trees)
    assert tree_allclose(linear_combination(coefficients, trees), expected)
    assert tree_allclose(
        linear_combination(jnp.array(coefficients), tuple(trees)), expected
    )
    assert tree_allclose(linear_combination(coefficients, stack(trees)), expected)


def test_double_precision(x64):
    trees = [tree(key, jnp.float64) for key in KEYS[:3]]
    coefficients = [0.1, -2.5, 3]
    assert tree_allclose(
        linear_combination(coefficients, trees), oracle(coefficients, trees)
    )
    # A float64 coefficient does not widen a float32 leaf.
    narrow = [{"w": jnp.ones(2, jnp.float32)}]
    assert tree_allclose(
        linear_combination(jnp.array([3.0]), narrow),
        {"w": jnp.full(2, 3.0, jnp.float32)},
    )


def test_a_matrix_makes_many_combinations():
    trees = [tree(key) for key in KEYS[:3]]
    matrix = jax.random.normal(KEYS[3], (2, 3))
    expected = stack([linear_combination(row, trees) for row in matrix])
    assert tree_allclose(linear_combination(matrix, trees), expected)
    assert tree_allclose(linear_combination(matrix, stack(trees)), expected)
    assert tree_allclose(
        linear_combination(np.asarray(matrix).tolist(), trees), expected
    )


def test_complex_coefficients_of_complex_leaves():
    trees = [tree(key, jnp.complex64) for key in KEYS[:2]]
    coefficients = [1 + 2j, -0.5j]
    expected = oracle(coefficients, trees)
    assert tree_allclose(linear_combination(coefficients, trees), expected)
    assert tree_allclose(linear_combination(coefficients, stack(trees)), expected)


def test_a_real_coefficient_keeps_the_infinities_of_a_complex_leaf():
    leaf = jnp.array([complex(np.inf, 1.0), complex(2.0, -np.inf)], jnp.complex64)
    expected = {
        "z": jnp.array([complex(np.inf, 2.0), complex(4.0, -np.inf)], jnp.complex64)
    }
    assert tree_allclose(linear_combination([2], [{"z": leaf}]), expected)


def test_the_sum_is_carried_wide():
    ones = {"w": jnp.ones(3, jnp.bfloat16)}
    expected = {"w": jnp.full(3, 1000, jnp.bfloat16)}
    assert tree_allclose(
        linear_combination([1] * 1000, [ones] * 1000), expected, rtol=0
    )
    stacked = {"w": jnp.ones((1000, 3), jnp.bfloat16)}
    assert tree_allclose(linear_combination(jnp.ones(1000), stacked), expected, rtol=0)


def test_what_optax_does_without_a_word():
    """Why there is a sum of ours beside it, as the README says."""
    tall, wide = {"w": jnp.ones((3, 1))}, {"w": jnp.ones((1, 4))}
    with jax.numpy_rank_promotion("allow"):
        assert optax.tree.add(tall, wide)["w"].shape == (3, 4)
    with pytest.raises(
        ValueError, match=r"expected float32\[3,1\], got float32\[1,4\]"
    ):
        linear_combination([1, 1], [tall, wide])
    one = {"w": jnp.ones((), jnp.bfloat16)}
    total = jax.lax.fori_loop(0, 1000, lambda _, total: optax.tree.add(total, one), one)
    assert float(total["w"]) == 256


def test_coefficients_of_every_kind_never_change_the_dtype():
    one = {"w": jnp.ones(2, jnp.bfloat16)}
    for c in (
        2,
        2.0,
        True,
        np.float64(2),
        np.int32(2),
        jnp.float32(2),
        jnp.int32(2),
        jnp.array(True),
        2**70,
    ):
        got = linear_combination([c], [one])
        assert tree_allclose(got, {"w": jnp.full(2, float(c), jnp.bfloat16)}, rtol=0)
    mixed = linear_combination(
        [jnp.float32(2), 3, np.float64(4), jnp.bfloat16(1)], [one] * 4
    )
    assert tree_allclose(mixed, {"w": jnp.full(2, 10, jnp.bfloat16)}, rtol=0)


def test_no_trees_but_a_stack():
    stacked = {"w": jnp.ones((0, 3), jnp.bfloat16), "b": jnp.ones((0,))}
    expected = {"w": jnp.zeros(3, jnp.bfloat16), "b": jnp.zeros(())}
    assert tree_allclose(linear_combination([], stacked), expected)
    assert tree_allclose(linear_combination([1.0], [{}]), {})


def test_float0_leaves_stay_float0():
    def f(p):
        return p["w"] ** 2 * p["n"].astype(jnp.float32)

    grads = jax.grad(f, allow_int=True)({"w": jnp.float32(3), "n": jnp.int32(2)})
    got = linear_combination([1, 2], [grads, grads])
    expected = {"w": jnp.float32(36), "n": np.zeros((), jax.dtypes.float0)}
    assert tree_allclose(got, expected)
    matrix = linear_combination(np.ones((3, 2)), [grads, grads])
    assert matrix["n"].shape == (3,)
    assert matrix["n"].dtype == jax.dtypes.float0
    stacked = {"w": jnp.ones((2, 4)), "n": np.zeros((2, 5), jax.dtypes.float0)}
    expected = {"w": jnp.full(4, 2.0), "n": np.zeros(5, jax.dtypes.float0)}
    assert tree_allclose(linear_combination([1, 1], stacked), expected)


def test_zero_times_nan_is_nan():
    bad = {"w": jnp.array([jnp.nan, jnp.inf, 1.0])}
    got = linear_combination([0.0, 1.0], [bad, {"w": jnp.ones(3)}])
    assert tree_allclose(got, {"w": jnp.array([jnp.nan, jnp.nan, 1.0])})


def test_a_stacked_list_goes_in_as_a_vector():
    got = linear_combination([1, 2], Vector([jnp.ones((2, 3))]))
    assert isinstance(got, Vector)
    assert tree_allclose(got.tree, [jnp.full(3, 3.0)])


def test_a_named_tuple_is_one_stacked_tree():
    Params = namedtuple("Params", ["w", "b"])
    got = linear_combination([1, 2], Params(jnp.ones((2, 3)), jnp.ones(2)))
    assert tree_allclose(got, Params(jnp.full(3, 3.0), jnp.float32(3)))


@pytest.mark.parametrize("form", ["sequence", "stacked"])
def test_transformations(form):
    trees = [tree(key) for key in KEYS[:3]]
    held = trees if form == "sequence" else stack(trees)
    coefficients = jnp.array([0.5, -2.0, 3.0])
    expected = oracle(coefficients, trees)
    assert tree_allclose(jax.jit(linear_combination)(coefficients, held), expected)

    many = jnp.stack([coefficients, 2 * coefficients])
    batched = jax.vmap(linear_combination, in_axes=(0, None))(many, held)
    assert tree_allclose(batched, linear_combination(many, held))

    axis = 0 if form == "sequence" else 1
    doubled = jax.tree.map(lambda x: jnp.stack([x, 2 * x], axis), held)
    batched = jax.vmap(linear_combination, in_axes=(None, axis))(coefficients, doubled)
    assert tree_allclose(
        batched, jax.tree.map(lambda x: jnp.stack([x, 2 * x]), expected)
    )

    def square(coefficients, held):
        leaves = jax.tree.leaves(linear_combination(coefficients, held))
        return sum(jnp.sum(x**2) for x in leaves) / 2

    by_coefficients, by_trees = jax.grad(square, (0, 1))(coefficients, held)
    inner = [
        sum(
            jnp.sum(x * y)
            for x, y in zip(*map(jax.tree.leaves, (t, expected)), strict=True)
        )
        for t in trees
    ]
    assert tree_allclose(by_coefficients, jnp.stack(inner))
    scaled = [jax.tree.map(lambda x, c=c: c * x, expected) for c in coefficients]
    assert tree_allclose(by_trees, scaled if form == "sequence" else stack(scaled))

    def body(total, c):
        return linear_combination([1, c], [total, trees[0]]), None

    total, _ = jax.lax.scan(body, trees[1], coefficients)
    assert tree_allclose(total, oracle([1, 1.5], [trees[1], trees[0]]))


def test_a_new_value_does_not_compile_again():
    trees = [{"a_name_of_its_own": jnp.ones((3, 5, 7))}] * 2
    with CompilationCounter() as first:
        linear_combination([1.0, 2.0], trees)
    with CompilationCounter() as others:
        for c in (
            [3, 4],
            (5.5, 6),
            np.array([7, 8]),
            np.float32([9, 1]),
            [np.float64(1), 2],
        ):
            linear_combination(c, trees)
    assert (first.count, others.count) == (1, 0)


def test_a_thousand_leaves_are_one_flat_program():
    trees = [
        {f"layer{i}": jnp.full(2, i + k, jnp.float32) for i in range(1000)}
        for k in range(3)
    ]
    eqns = list(equations(jax.make_jaxpr(linear_combination)(jnp.ones(3), trees)))
    assert (
        max(v.aval.size for eqn in eqns for v in eqn.outvars) <= 3
    )  # no ravel and no stack
    assert len(eqns) <= 5 * 1000 + 10  # 3 products and 2 sums a leaf
    got = linear_combination(jnp.ones(3), trees)
    assert tree_allclose(
        got, {f"layer{i}": jnp.full(2, 3.0 * i + 3) for i in range(1000)}
    )


def test_a_donated_tree_is_reused():
    first, second = (tree(key) for key in KEYS[:2])
    expected = oracle([1, 2], [first, second])

    @functools.partial(jax.jit, donate_argnums=0)
    def accumulate(total, other):
        return linear_combination([1, 2], [total, other])

    assert tree_allclose(accumulate(first, second), expected)
    assert first["w"].is_deleted()
