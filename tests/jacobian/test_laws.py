"""The laws of a vector space and of the chain rule, over random trees, dtypes and
coefficients.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from hypothesis import given
from hypothesis import strategies as st

from pytree_grads import (
    Vector,
    chain_rule_value_and_grad,
    linear_combination,
    per_example_grad,
    per_example_value_and_grad,
    reassemble,
)

pytestmark = pytest.mark.any_release

# Entries and coefficients are small dyadic numbers: every sum and product of them is
# exact in float32, so that laws hold without a tolerance wherever nothing is rounded on
# the way.
DYADIC = st.integers(-16, 16).map(lambda n: n / 4)
SHAPES = st.sampled_from([(), (1,), (3,), (0,), (2, 1), (1, 2)])
DTYPES = st.sampled_from(["float32", "bfloat16", "float16", "complex64"])
EXACT_DTYPES = st.sampled_from(["float32", "complex64"])


def leaves(dtypes):
    return st.builds(jax.ShapeDtypeStruct, SHAPES, dtypes.map(jnp.dtype))


def structures(dtypes=DTYPES):
    """Trees of shapes and dtypes: dicts, lists, tuples and None, nested."""
    return st.recursive(
        leaves(dtypes) | st.none(),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.lists(inner, max_size=3).map(tuple)
            | st.dictionaries(st.sampled_from("abcd"), inner, max_size=3)
        ),
        max_leaves=5,
    )


@st.composite
def filled(draw, structure):
    """A tree of the given structure with dyadic entries."""

    def fill(aval):
        size = int(np.prod(aval.shape))
        entries = np.array(draw(st.lists(DYADIC, min_size=size, max_size=size)))
        if jnp.issubdtype(aval.dtype, jnp.complexfloating):
            entries = entries + 1j * entries[::-1]
        return jnp.asarray(entries.reshape(aval.shape)).astype(aval.dtype)

    return jax.tree.map(fill, structure)


@st.composite
def families(draw, count=None, dtypes=DTYPES):
    """Coefficients and as many trees of one structure."""
    structure = draw(structures(dtypes))
    count = draw(st.integers(1, 4)) if count is None else count
    coefficients = draw(st.lists(DYADIC, min_size=count, max_size=count))
    return coefficients, [draw(filled(structure)) for _ in range(count)]


def stack(trees):
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


@given(families())
def test_a_combination_is_the_sum_entry_by_entry(family):
    coefficients, trees = family

    def combine(*xs):
        wide = np.complex128 if jnp.iscomplexobj(xs[0]) else np.float64
        total = sum(
            c * np.asarray(x).astype(wide)
            for c, x in zip(coefficients, xs, strict=True)
        )
        return jnp.asarray(total).astype(xs[0].dtype)

    expected = jax.tree.map(combine, *trees)
    assert tree_allclose(linear_combination(coefficients, trees), expected, rtol=0)
    if trees[0] is not None and not isinstance(trees[0], list | tuple):
        assert tree_allclose(
            linear_combination(coefficients, stack(trees)), expected, rtol=0
        )


@given(families(count=3))
def test_order_does_not_matter(family):
    coefficients, trees = family
    expected = linear_combination(coefficients, trees)
    assert tree_allclose(
        linear_combination(coefficients[::-1], trees[::-1]), expected, rtol=0
    )


@given(families(dtypes=EXACT_DTYPES), DYADIC, DYADIC, st.data())
def test_linearity_in_the_coefficients(family, a, b, data):
    first, trees = family
    second = data.draw(st.lists(DYADIC, min_size=len(first), max_size=len(first)))
    mixed = [a * x + b * y for x, y in zip(first, second, strict=True)]
    apart = [linear_combination(first, trees), linear_combination(second, trees)]
    assert tree_allclose(
        linear_combination(mixed, trees), linear_combination([a, b], apart), rtol=0
    )


@given(families(count=2, dtypes=EXACT_DTYPES), DYADIC)
def test_linearity_in_the_trees(family, a):
    coefficients, trees = family
    scaled = [linear_combination([a], [t]) for t in trees]
    outside = linear_combination([a], [linear_combination(coefficients, trees)])
    assert tree_allclose(linear_combination(coefficients, scaled), outside, rtol=0)


@given(families(count=3))
def test_a_unit_coefficient_picks_a_tree(family):
    _, trees = family
    for k, tree in enumerate(trees):
        assert tree_allclose(linear_combination(np.eye(3)[k], trees), tree, rtol=0)


@given(families())
def test_vectors_do_what_combinations_do(family):
    coefficients, trees = family
    by_operators = sum(c * Vector(t) for c, t in zip(coefficients, trees, strict=True))
    assert tree_allclose(
        by_operators.tree, linear_combination(coefficients, trees), rtol=0
    )
    assert tree_allclose(
        (by_operators - by_operators).tree, (0 * by_operators).tree, rtol=0
    )
    assert tree_allclose((-by_operators).tree, (by_operators * -1).tree, rtol=0)


@given(families(count=3, dtypes=EXACT_DTYPES))
def test_the_inner_product_is_sesquilinear_and_gives_the_norm(family):
    (a, b, _), trees = family
    u, v, w = map(Vector, trees)
    assert tree_allclose(w @ (a * u + b * v), a * (w @ u) + b * (w @ v))
    assert tree_allclose((a * u + b * v) @ w, a * (u @ w) + b * (v @ w))
    assert tree_allclose(u @ v, jnp.conj(v @ u))
    assert tree_allclose(u.norm() ** 2, jnp.real(u @ u))


@given(families(dtypes=EXACT_DTYPES))
def test_the_gradient_by_a_coefficient_is_an_inner_product(family):
    coefficients, trees = family
    direction = Vector(trees[-1])

    def loss(c):
        return jnp.real(direction @ Vector(linear_combination(c, trees)))

    got = jax.grad(loss)(jnp.array(coefficients))
    expected = jnp.stack([jnp.real(direction @ Vector(t)) for t in trees])
    assert tree_allclose(got, expected)


def model(params, x):
    """A smooth scalar of whatever leaves there are."""
    return sum((jnp.sum(jnp.sin(x * p)) for p in params), start=x * x)


@st.composite
def problems(draw):
    """Real parameters, a batch, a chunk size and a permutation of the examples."""
    avals = draw(st.lists(leaves(st.just("float32")), max_size=3))
    n = draw(st.integers(0, 6))
    x = jnp.array(draw(st.lists(DYADIC, min_size=n, max_size=n)), jnp.float32)
    order = np.array(draw(st.permutations(range(n))), int)
    return draw(filled(avals)), x, draw(st.integers(1, 8)), order


def outer(outputs):
    return jnp.sum(jnp.tanh(outputs)) * jnp.sum(jnp.cos(outputs))


@given(problems())
def test_rows_go_with_their_examples_and_chunks_do_not_matter(problem):
    params, x, chunk_size, order = problem

    @jax.jit
    def of(params, x, permuted):
        return (
            jax.vmap(jax.value_and_grad(model), (None, 0))(params, x),
            per_example_value_and_grad(model, chunk_size=chunk_size)(params, x),
            per_example_grad(model, chunk_size=chunk_size)(params, permuted),
        )

    expected, got, permuted = of(params, x, x[order])
    terms = 4 * len(x)  # |x| ≤ 4
    assert_close_to_terms(got, expected, terms)
    assert_close_to_terms(
        permuted, jax.tree.map(lambda r: r[order], expected[1]), terms
    )


@given(problems())
def test_the_chain_rule_has_one_result(problem):
    params, x, chunk_size, order = problem

    def loss(params, x):
        return outer(jax.vmap(model, (None, 0))(params, x))

    @jax.jit
    def of(params, x, permuted):
        chain_rules = [
            chain_rule_value_and_grad(outer, model, chunk_size=k)(params, batch)
            for k, batch in ((None, x), (chunk_size, x), (chunk_size, permuted))
        ]
        outputs, rows = per_example_value_and_grad(model)(params, x)
        return (
            jax.value_and_grad(loss)(params, x),
            chain_rules,
            reassemble(outer, outputs, rows),
        )

    (value, grads), chain_rules, reassembled = of(params, x, x[order])
    terms = 8 * len(x) ** 2  # |∂L/∂f| ≤ 2 N and |x| ≤ 4
    for got in chain_rules:
        assert_close_to_terms(got, (value, grads), terms)
    assert_close_to_terms(reassembled, grads, terms)


def assert_close_to_terms(got, expected, terms):
    """Compare sums that may cancel: relative to the size of their terms, not to the
    sum.
    """
    shift = 1.0 + terms
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    assert tree_allclose(
        jax.tree.map(lambda g: g + shift, got),
        jax.tree.map(lambda e: e + shift, expected),
    )
