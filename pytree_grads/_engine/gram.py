"""Gramians: inner products of all rows of two leaves, by factors, counts, parts or rows."""

from collections.abc import Callable, Sequence
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from . import terms as _terms
from . import thresholds
from .einsum import dot, times_counts
from .leaf import Leaf, are_alike, inner, materializes, over_rows, row, times, zeros_of
from .sums import over_blocks, rows
from .terms import Dense, Scatter, Term
from .tiles import Part, Parts


def gram(leaf: Leaf, other: Leaf) -> jax.Array:
    """Inner products of all rows of two leaves: shape (*leaf.rows, *other.rows)."""
    if not all(map(prod, (leaf.shape, leaf.rows, other.rows))):
        return jnp.zeros((*leaf.rows, *other.rows), leaf.carried)
    if _adds_one(leaf) and _adds_one(other) and are_alike(leaf.pieces[0], other.pieces[0]):
        return _gram_of_counts(leaf, other)
    if _prefers_rows(leaf, other):
        parts = Parts.of(leaf, other)
        return _gram_of_parts(leaf, other, parts) if parts else _gram_of_rows(leaf, other)

    def against(terms: Sequence[Term]) -> jax.Array:
        return over_rows(lambda others: inner(leaf, terms, other, others), other)

    return over_rows(against, leaf)


def _adds_one(leaf: Leaf) -> bool:
    """Whether each row, of one output, adds one vector to many lines, and shares neither."""
    if len(leaf.pieces) != 1 or leaf.pieces[0].levels != (1, 1) or leaf.outputs is not None:
        return False
    return _terms.adds_one(leaf.pieces[0].of_one_row)


def _gram_of_counts(leaf: Leaf, other: Leaf) -> jax.Array:
    """The Gramian of rows that add one vector to many lines, from how often two rows share one."""
    if thresholds.exceeds(leaf.size, other.size):
        return _gram_of_counts(other, leaf).conj().T

    # There are as many numbers of a row at once as it has lines, not entries.
    most = thresholds.ENTRIES_AT_ONCE * leaf.pieces[0].shape[2]
    return _gram_of_blocks(lambda block: _counted(block, other), leaf, other, most)


def _counted(leaf: Leaf, other: Leaf) -> jax.Array:
    """The same with an array of how often each line is in each row of the first leaf."""
    (one,), (two,) = leaf.pieces, other.pieces
    assert isinstance(one.term, Scatter)
    assert isinstance(two.term, Scatter)
    blocks, rows = (lax.broadcasted_iota(jnp.int32, one.term.index.shape, i) for i in (0, 1))
    counts = jnp.zeros((one.shape[0], one.shape[1], leaf.size), leaf.real)
    counts = counts.at[blocks, one.term.index, rows].add(1, mode="drop")

    def common(index: jax.Array) -> jax.Array:
        """How many pairs of places of each row and of this one are the same line: (B, N)."""
        return jnp.sum(_terms.lines_at(counts, index), axis=1)

    index = jnp.moveaxis(two.term.index, 1, 0)
    # What is looked up of some rows at a time takes little place beside the counts.
    at_once = counts.size // (4 * max(1, index[0].size * leaf.size))
    pairs = lax.map(common, index, batch_size=max(1, min(other.size, at_once)))
    rights = dot("bin,bjn->bij", one.term.right[:, :, 0].conj(), two.term.right[:, :, 0])
    products = jnp.sum(times_counts(jnp.moveaxis(pairs, 0, 2), rights), axis=0)
    return times(products.astype(leaf.carried), one.factor * two.factor)


def _prefers_rows(leaf: Leaf, other: Leaf) -> bool:
    """Whether a Gramian is cheaper from materialised rows than from factors."""
    if materializes(leaf, other):
        return True
    pairs = prod(leaf.rows) * prod(other.rows)
    size = prod(leaf.shape)
    terms, others = ([piece.of_one_row for piece in x.pieces] for x in (leaf, other))
    by_factors = sum(pairs * _terms.inner_cost(x, y) for x in terms for y in others)
    make = prod(leaf.rows) * sum(_terms.row_cost(x) for x in terms if not isinstance(x, Dense))
    make += prod(other.rows) * sum(_terms.row_cost(y) for y in others if not isinstance(y, Dense))
    return thresholds.exceeds(by_factors, make + 2 * pairs * size - 1)


def _gram_of_parts(leaf: Leaf, other: Leaf, parts: Parts) -> jax.Array:
    def add(total: jax.Array, part: Part) -> jax.Array:
        mine = part.new(part.entries(leaf)).reshape(prod(leaf.rows), -1)
        theirs = mine if other is leaf else part.entries(other).reshape(prod(other.rows), -1)
        return total + dot("ip,jp->ij", mine.conj(), theirs)

    empty = zeros_of((prod(leaf.rows), prod(other.rows)), leaf.carried, leaf, other)
    return parts.fold(add, empty).reshape(*leaf.rows, *other.rows)


def _gram_of_rows(leaf: Leaf, other: Leaf) -> jax.Array:
    """The same from rows as arrays, some rows of either leaf at a time."""
    size = prod(leaf.shape)

    def against(block: Leaf) -> jax.Array:  # (*block.rows, *other.rows)
        mine = rows(block, carried=True).reshape(-1, size).conj()
        if not thresholds.exceeds(prod(other.rows) * size, thresholds.ENTRIES_AT_ONCE):
            theirs = rows(other, carried=True).reshape(-1, size)
            products = dot("ip,jp->ij", mine, theirs)
        else:
            products = over_rows(
                lambda terms: dot("ip,p->i", mine, row(other, terms).reshape(size)),
                other,
                materializes=True,
            )
            products = jnp.moveaxis(products, -1, 0)
        return products.reshape(*block.rows, *other.rows)

    return _gram_of_blocks(against, leaf, other, thresholds.ENTRIES_AT_ONCE)


def _gram_of_blocks(
    against: Callable[[Leaf], jax.Array], leaf: Leaf, other: Leaf, entries: int
) -> jax.Array:
    """A Gramian from those of some rows of the first leaf, of at most so many entries."""

    def write(result: jax.Array, block: Leaf, start: jax.Array, _: jax.Array) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(result, against(block), start, 0)

    empty = zeros_of((*leaf.rows, *other.rows), leaf.carried, leaf, other)
    return over_blocks(write, empty, leaf, entries)
