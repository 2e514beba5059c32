"""Every product, with a kind of term that the engine does not know, beside its own
kinds.
"""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from routes import few_at_once

from pytree_grads import jacobian
from pytree_grads._engine.leaf import Leaf, Summand
from pytree_grads._engine.matrix import Matrix
from pytree_grads._engine.products.gram import gram
from pytree_grads._engine.products.norms import leaf_norms
from pytree_grads._engine.products.routes import norm_route, sum_flops
from pytree_grads._engine.products.scaled_norms import combined
from pytree_grads._engine.products.sums import applied, rows, square_sum, weighted_sum
from pytree_grads._engine.terms import Dense, Outer, Patches, Scatter
from pytree_grads._engine.terms.by_row import ByRow
from pytree_grads._engine.views import Reshape

N, T, M = 5, 3, 4


@partial(jax.tree_util.register_dataclass, data_fields=["numbers"], meta_fields=[])
@dataclass(frozen=True)
class Diagonal(ByRow):
    """A block with numbers on its diagonal: the least that a kind must say."""

    numbers: jax.Array  # (B, m)

    @property
    def shape(self):
        return (self.numbers.shape[0], M, M)

    @property
    def dtype(self):
        return self.numbers.dtype

    def materialize(self):
        return jax.vmap(jnp.diag)(self.numbers)


class LinearDiagonal(Diagonal):
    """A diagonal that names the array in which its row is linear."""

    factor_names = ("numbers",)


jax.tree_util.register_dataclass(LinearDiagonal, ["numbers"], [])


def normal(*shape):
    rng = np.random.default_rng(sum(shape))
    return jnp.asarray(rng.standard_normal(shape))


# For each kind a term of N rows; all arrays have the axis of rows at 1 but dense ones,
# at 0.
KINDS = {
    "diagonal": lambda n: Diagonal(normal(1, n, M)),
    "linear diagonal": lambda n: LinearDiagonal(normal(1, n, M)),
    "dense": lambda n: Dense(normal(1, n, M, M)),
    "outer": lambda n: Outer(normal(1, n, T, M), normal(1, n, T, M)),
    "outer of vectors": lambda n: Outer(normal(1, n, 1, M), normal(1, n, 1, M)),
    "scatter": lambda n: Scatter(
        jnp.arange(n * T).reshape(1, n, T) % M, normal(1, n, T, M), M
    ),
    "scatter of one": lambda n: Scatter(
        jnp.arange(n * T).reshape(1, n, T) ** 2 % M, normal(1, n, 1, M), M
    ),
    "patches": lambda n: Patches(
        normal(1, n, 1, 6, 2), normal(1, n, 1, T, M), ((0, 0, 0),), (2,), (2,), (1,)
    ),
}


def summand(kind, n=N, factor=1.0, shared=False):
    term = KINDS[kind](1 if shared else n)
    if shared:
        term = jax.tree.map(lambda x: x[:, 0], term)
    count = len(jax.tree.leaves(term))
    view = (Reshape((M, M)),)
    return Summand(term, (1, M, M), 1, view, factor, (0 if shared else 1,) * count, "")


def leaf_of(*summands, n=N):
    return Leaf(summands, (M, M), jnp.dtype(float), n, None)


def plain(leaf):
    return np.asarray(rows(leaf)).reshape(leaf.size, -1)


def assert_close(got, want):
    want = np.asarray(want)
    assert got.shape == want.shape
    np.testing.assert_allclose(
        got, want, rtol=0, atol=1e-12 * max(1, np.max(np.abs(want)))
    )


def check_products(leaf):
    c = jnp.linspace(-1, 2, leaf.size)
    v = normal(M, M)
    r = plain(leaf)
    (norms,) = leaf_norms([leaf])
    assert_close(combined([norms]), np.linalg.norm(r, axis=1))
    assert_close(gram(leaf, leaf), r @ r.T)
    for weights in (None, c):
        w = np.ones(leaf.size) if weights is None else np.asarray(c)
        assert_close(weighted_sum(leaf, weights).ravel(), w @ r)
        assert_close(square_sum(leaf, weights).ravel(), w @ r**2)
    assert_close(applied(leaf, v), r @ np.ravel(v))
    scaled = Matrix((leaf,), (c,))
    s = r * np.asarray(c)[:, None]
    assert_close(scaled.rows()[0].reshape(leaf.size, -1), s)
    (found,) = scaled.gram(scaled, [range(len(scaled.leaves))])
    assert_close(found, s @ s.T)
    assert_close(scaled.square_sum(None)[0].ravel(), np.sum(s**2, 0))
    assert_close(combined(scaled.leaf_norms()), np.linalg.norm(s, axis=1))
    valid = scaled.only(c > 0)
    assert_close(valid.weighted_sum(None)[0].ravel(), np.sum(s[np.asarray(c) > 0], 0))
    assert norm_route(leaf).flops >= 0 <= sum_flops(leaf)


pytestmark = [pytest.mark.usefixtures("x64"), pytest.mark.any_release]


def test_rows_of_a_new_kind():
    leaf = leaf_of(summand("diagonal", factor=-2.0))
    want = [-2 * np.diag(x) for x in np.asarray(leaf.terms[0].numbers[0])]
    assert_close(rows(leaf), want)


@pytest.mark.parametrize("entries", [1 << 22, 1, 40])
@pytest.mark.parametrize("kind", KINDS)
def test_products_of_one_kind(kind, entries):
    with few_at_once(entries):
        check_products(leaf_of(summand(kind, factor=-2.0)))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", ["diagonal", "linear diagonal"])
def test_products_of_a_new_kind_and_another(new, kind, shared):
    check_products(leaf_of(summand(kind), summand(new, factor=3.0, shared=shared)))
    check_products(leaf_of(summand(new, shared=True), summand(kind, factor=3.0)))


@pytest.mark.parametrize("other", KINDS)
@pytest.mark.parametrize("kind", KINDS)
def test_gramians_between_kinds(kind, other):
    one, two = leaf_of(summand(kind)), leaf_of(summand(other, 7), n=7)
    assert_close(gram(one, two), plain(one) @ plain(two).T)


@pytest.mark.parametrize("kind", ["diagonal", "linear diagonal"])
def test_a_new_kind_with_several_outputs(kind):
    own = summand(kind, N * 2)
    term = jax.tree.map(lambda x: x.reshape(1, N, 2, M), own.term)
    leaf = replace(leaf_of(replace(own, term=term, row_axes=(2,))), outputs=2)
    r = np.asarray(rows(leaf)).reshape(N, 2, -1)
    c = normal(N, 2)
    assert_close(weighted_sum(leaf, c).ravel(), np.einsum("nk,nkp->p", c, r))
    assert_close(square_sum(leaf, c).ravel(), np.einsum("nk,nkp->p", c, r**2))
    assert_close(gram(leaf, leaf), np.einsum("nkp,mlp->nkml", r, r))
    assert_close(combined(leaf_norms([leaf])), np.linalg.norm(r, axis=2))


def test_a_new_kind_in_words():
    assert summand("diagonal").of_one_row.describe() == "diagonal 1x4x4"


@pytest.mark.parametrize("kind", KINDS)
def test_one_row_of_every_kind(kind):
    """What no product asks of some kinds is right for these too."""
    term = jax.tree.map(lambda x: x[:, 0], KINDS[kind](1))
    row, v = np.asarray(term.materialize()), normal(1, M, M)
    assert_close(term.apply(v), np.sum(row * v))
    assert_close(term.apply_own(v), np.sum(row * v))
    unit, scale = term.near_one()
    assert_close(unit.materialize(), row * scale**2)
    assert term.mass() >= np.linalg.norm(row) * (1 - 1e-12)
    assert_close(term.merged().materialize(), row)
    if term.has_squares:
        assert_close(term.merged().squared().materialize(), row**2)
    assert_close(term.joined([term]).materialize(), 2 * row)
    assert min(term.row_cost, term.sum_cost, term.apply_cost, term.norm_cost.flops) >= 0


def test_a_single_row_whose_kernel_skips_pixels():
    """One position, one example: pixels between those of the kernel do not count."""

    def fun(p, x):
        numbers = ("NHC", "HIO", "NHC")
        y = jax.lax.conv_general_dilated(
            x[None], p, (1,), "VALID", rhs_dilation=(2,), dimension_numbers=numbers
        )
        return jnp.sum(jnp.sin(y))

    p, x = normal(3, 32, 32), normal(1, 5, 32)
    rows = jax.vmap(jax.grad(fun), (None, 0))(p, x)
    assert_close(
        jacobian(fun)(p, x).norms(), np.linalg.norm(rows.reshape(1, -1), axis=1)
    )
