"""Gramians of rows that are too large to be there at once, against those of plain
rows.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from routes import factors_kept, few_at_once, leaves_of, with_thresholds

from pytree_grads import jacobian
from pytree_grads._engine.products.tiles import Tiles

pytestmark = pytest.mark.any_release

N, T = 6, 9


def dense(p, x):
    return jnp.sum(jnp.tanh(x @ p) ** 2)


def used_twice(p, x):
    return jnp.sum(jnp.tanh(x @ p) ** 2) + jnp.sum(jnp.sin(x[:7] @ p))


def of_two_outputs(p, x):
    return jnp.tanh(x @ p).sum(0)[:2]


def of_complex_numbers(p, x):
    return jnp.sum(jnp.abs(x.astype(p.dtype) @ p) ** 3)


def scanned(p, x):
    return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p)[0] ** 2)


def convolution(p, x):
    return jnp.sum(jnp.tanh(lax.conv_general_dilated(x[None], p, (1, 1), "SAME")) ** 2)


def grouped_convolution(p, x):
    y = lax.conv_general_dilated(x[None], p, (2, 1), "SAME", feature_group_count=2)
    return jnp.sum(jnp.tanh(y) ** 2)


# name: function, shapes of the parameter and of an example, and (offsets, blocks, m) of
# a row
CASES = {
    "dense": (dense, (7, 5), (T, 7), (1, 1, 7)),
    "used twice": (used_twice, (7, 5), (T, 7), (1, 1, 7)),
    "two outputs": (of_two_outputs, (7, 5), (T, 7), (1, 1, 7)),
    "complex": (of_complex_numbers, (7, 5), (T, 7), (1, 1, 7)),
    "scan over layers": (scanned, (3, 6, 6), (T, 6), (1, 3, 6)),
    "convolution": (convolution, (6, 4, 3, 3), (4, 6, 6), (9, 1, 4)),
    "grouped convolution": (grouped_convolution, (6, 2, 3, 2), (4, 6, 6), (6, 2, 2)),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request, x64):
    """`(fun, p, batch, other batch, how a row is cut)`"""
    fun, shape, example, layout = request.param
    rng = np.random.default_rng(0)
    p = jnp.asarray(rng.standard_normal(shape))
    if fun is of_complex_numbers:
        p = lax.complex(p, p[::-1])
    x, y = (jnp.asarray(rng.standard_normal((n, *example))) for n in (N, N - 2))
    return fun, p, x, y, layout


def plain_rows(fun, p, x):
    outputs = 2 if fun is of_two_outputs else 1

    def one(p, x):
        return jnp.stack(
            [
                jax.grad(lambda p, i=i: jnp.ravel(fun(p, x))[i])(p)
                for i in range(outputs)
            ]
        )

    return jax.vmap(one, (None, 0))(p, x).reshape(-1, p.size)


def assert_close(got, want):
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.max(np.abs(want)))


@pytest.fixture(
    params=[1, 60]
)  # few lines in a part, of which some were in the part before
def few_entries(request):
    with few_at_once(request.param):
        yield


def test_gramians_by_parts(case, few_entries):
    fun, p, x, y, layout = case

    @jax.jit
    def grams(p, x, y):
        J, other = jacobian(fun)(p, x), jacobian(fun)(p, y)
        (leaf,), (theirs,) = leaves_of(J), leaves_of(other)
        tiles = Tiles.of(leaf, theirs)
        assert (tiles.offsets, tiles.blocks, tiles.m) == layout
        return J.gram(), J.gram(other)

    with factors_kept():
        own, both = grams(p, x, y)
    rows, others = plain_rows(fun, p, x), plain_rows(fun, p, y)
    assert_close(own.reshape(len(rows), -1), rows.conj() @ rows.T)
    assert_close(both.reshape(len(rows), -1), rows.conj() @ others.T)


def test_a_gramian_by_parts_has_derivatives(case, few_entries):
    fun, p, x, _, _ = case

    def of_rows(p):
        rows = plain_rows(fun, p, x)
        return jnp.sum(jnp.abs(rows.conj() @ rows.T) ** 2)

    def of_parts(p):
        return jnp.sum(jnp.abs(jacobian(fun)(p, x).gram()) ** 2)

    with factors_kept():
        got = jax.jit(jax.grad(of_parts))(p)
    assert_close(got, jax.jit(jax.grad(of_rows))(p))


def test_gramians_with_no_rows(few_entries):
    fun, shape, example, _ = CASES["dense"]
    with factors_kept():
        J, none = (
            jacobian(fun)(jnp.ones(shape), jnp.ones((n, *example))) for n in (N, 0)
        )
        assert J.gram(none).shape == (N, 0)
        assert none.gram(J).shape == (0, N)


def test_rows_that_fit_or_differ_in_kind_are_not_cut(case):
    fun, p, x, _, _ = case
    (leaf,) = leaves_of(jacobian(fun)(p, x))
    assert Tiles.of(leaf) is None


def test_each_entry_is_made_once():
    """A program has as many products of matrices where rows are cut as where they are
    not.
    """
    p, x = jnp.ones((64, 32)), jnp.ones((N, 16, 64))

    def products(entries):
        with with_thresholds(entries_at_once=entries):
            compiled = (
                jax.jit(lambda p, x: jacobian(dense)(p, x).gram()).lower(p, x).compile()
            )
        return len(
            [line for line in compiled.as_text().splitlines() if " dot(" in line]
        )

    assert products(N * 32 * 16) == products(1 << 22)


def mean_of_words(p, words, target):
    return jnp.sum(jnp.mean(p[words], axis=0) * target)


def test_rows_that_share_no_word_have_no_inner_product_however_large_they_are():
    words, target = jnp.array([[0, 1], [2, 3], [0, 2]]), jnp.full((3, 3), 1e20)
    gram = jacobian(mean_of_words)(jnp.zeros((40, 3)), words, target).gram()
    assert gram[0, 1] == gram[1, 0] == 0
    assert np.all(np.isinf(np.delete(np.ravel(gram), [1, 3])))


@pytest.mark.parametrize("entries", [50, 1 << 22])
@pytest.mark.parametrize("sizes", [(2, 7), (7, 2), (7, 7), (1, 7), (7, 1)])
def test_gramians_by_counts_of_the_fewer_rows(sizes, entries, x64):
    keys = jax.random.split(jax.random.key(0), 4)
    p = jax.random.normal(keys[0], (40, 3))
    batches = [
        (
            jax.random.randint(keys[i], (n, 4 + i), 0, 40),
            jax.random.normal(keys[i + 2], (n, 3)),
        )
        for i, n in enumerate(sizes)
    ]
    mine, theirs = (jacobian(mean_of_words)(p, *batch) for batch in batches)
    rows = [
        jax.vmap(jax.grad(mean_of_words), (None, 0, 0))(p, *batch) for batch in batches
    ]
    want = np.einsum("imn,jmn->ij", *rows)
    with with_thresholds(entries_at_once=entries):
        got = mine.gram(theirs)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-12 * np.max(np.abs(want)))
