"""Gramians: inner products of all rows of two leaves, from factors, counts or rows."""

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import thresholds
from ..einsum import dot
from ..leaf import Leaf, are_alike, at_output, inner, over_rows, row, zeros_of
from ..terms import Weighed
from ..terms.pairs import gram_of_counts
from ..terms.protocol import Term
from ..weighing import times
from .kernels import (
    gram_of_pairs,
    gram_of_shared,
    is_of_pairs,
    share_one_side,
    shares_pairs,
    traced_gram_of_pairs,
)
from .routes import gram_prefers_rows
from .sums import rows
from .tiles import Tile, Tiles, over_blocks


def gram(leaf: Leaf, other: Leaf) -> jax.Array:
    """Inner products of all rows of two leaves: shape (*leaf.rows, *other.rows)."""
    if not all(map(prod, (leaf.shape, leaf.rows, other.rows))):
        return jnp.zeros((*leaf.rows, *other.rows), leaf.carried)
    if (by_counts := _by_counts(leaf, other)) is not None:
        return _gram_of_counts(leaf, other, by_counts)
    if gram_prefers_rows(leaf, other):
        tiles = Tiles.of(leaf, other)
        if tiles is None:
            return _gram_of_rows(leaf, other)
        return _gram_of_tiles(leaf, other, tiles)

    if is_of_pairs(leaf, other):
        return gram_of_pairs(leaf, other)
    if shares_pairs(leaf, other):
        return gram_of_shared(leaf, other)

    return _gram_of_inner_products(leaf, other)


def _gram_of_inner_products(leaf: Leaf, other: Leaf) -> jax.Array:
    """The Gramian from inner products of all pairs of rows, by their factors."""

    def against(block: Leaf) -> jax.Array:
        def of_row(terms: Sequence[Term]) -> jax.Array:
            return over_rows(lambda others: inner(block, terms, other, others), other)

        return over_rows(of_row, block)

    made = prod(other.rows) * _entries_of_pair(leaf, other)
    if not isinstance(made, int) or not made:
        return against(leaf)
    most = max(1, thresholds.current().entries_at_once // made)  # rows of the leaf
    return _gram_of_blocks(against, leaf, other, most * prod(leaf.shape))


def _entries_of_pair(leaf: Leaf, other: Leaf) -> int:
    """The entries of the vectors that an inner product makes, if they are long.

    Weighed terms multiply two vectors for each pair of rows, entry by entry.
    """
    summands = [*leaf.summands, *other.summands]
    shapes = [x.shape for x in summands if isinstance(x.term, Weighed)]
    return max((b * (m + n) for b, m, n in shapes), default=0)


def traced_gram(leaf: Leaf, other: Leaf) -> jax.Array:
    """The sum over outputs k of inner products of rows (i, k) and (j, k): (N, N′).

    For a scalar function, there is nothing to sum over.
    """
    if leaf.outputs is None:
        return gram(leaf, other)
    shape = leaf.size, other.size
    if not all(map(prod, (leaf.shape, leaf.rows, other.rows))):
        return jnp.zeros(shape, leaf.carried)
    if is_of_pairs(leaf, other) and share_one_side(leaf, other):
        return traced_gram_of_pairs(leaf, other)
    if shares_pairs(leaf, other) and not gram_prefers_rows(leaf, other, trace=True):
        return gram_of_shared(leaf, other, trace=True)
    if _are_arrays(leaf) and _are_arrays(other):
        mine, theirs = (
            rows(x, carried=True).reshape(x.size, -1) for x in (leaf, other)
        )
        return dot("ip,jp->ij", mine.conj(), theirs)  # over outputs and entries

    def add(total: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        return total + gram(at_output(leaf, k), at_output(other, k)), None

    empty = zeros_of(shape, leaf.carried, leaf, other)
    return lax.scan(add, empty, jnp.arange(leaf.outputs))[0]


def _are_arrays(leaf: Leaf) -> bool:
    """Whether the rows of a leaf are kept as they are."""
    return all(x.term.is_dense and not x.view for x in leaf.summands)


def _by_counts(leaf: Leaf, other: Leaf) -> Callable[[Any, Any], jax.Array] | None:
    """How to compute a Gramian from counts, if rows add one vector to many lines."""
    for own in (leaf, other):
        if len(own.summands) != 1 or own.outputs is not None:
            return None
        if own.summands[0].row_axes != (1, 1):
            return None
    (one,), (two,) = leaf.summands, other.summands
    return (
        gram_of_counts(one.of_one_row, two.of_one_row) if are_alike(one, two) else None
    )


def _gram_of_counts(
    leaf: Leaf, other: Leaf, by_counts: Callable[[Any, Any], jax.Array]
) -> jax.Array:
    """The Gramian from how often two rows share a line.

    The leaf with fewer rows is counted.
    """
    if thresholds.exceeds(leaf.size, other.size):
        return _gram_of_counts(other, leaf, by_counts).conj().T

    def against(block: Leaf) -> jax.Array:
        (one,), (two,) = block.summands, other.summands
        products = by_counts(one.term, two.term).astype(block.carried)
        return times(products, one.factor * two.factor)

    # The counts of a row are as many as its lines, not its entries.
    most = thresholds.current().entries_at_once * leaf.summands[0].shape[2]
    return _gram_of_blocks(against, leaf, other, most)


def _gram_of_tiles(leaf: Leaf, other: Leaf, tiles: Tiles) -> jax.Array:
    """The Gramian, from some lines of all rows at a time."""

    def add(total: jax.Array, tile: Tile) -> jax.Array:
        mine = tile.new(tile.entries(leaf)).reshape(prod(leaf.rows), -1)
        if other is leaf:
            theirs = mine
        else:
            theirs = tile.entries(other).reshape(prod(other.rows), -1)
        return total + dot("ip,jp->ij", mine.conj(), theirs)

    shape = (prod(leaf.rows), prod(other.rows))
    empty = zeros_of(shape, leaf.carried, leaf, other)
    return tiles.fold(add, empty).reshape(*leaf.rows, *other.rows)


def _gram_of_rows(leaf: Leaf, other: Leaf) -> jax.Array:
    """The Gramian from rows as arrays, for some rows of each leaf at a time."""
    size = prod(leaf.shape)
    are_many = thresholds.exceeds(
        prod(other.rows) * size, thresholds.current().entries_at_once
    )

    def against(block: Leaf) -> jax.Array:  # (*block.rows, *other.rows)
        mine = rows(block, carried=True).reshape(-1, size).conj()
        if are_many:
            products = over_rows(
                lambda terms: dot("ip,p->i", mine, row(other, terms).reshape(size)),
                other,
                materializes=True,
            )
            products = jnp.moveaxis(products, -1, 0)
        else:
            theirs = rows(other, carried=True).reshape(-1, size)
            products = dot("ip,jp->ij", mine, theirs)
        return products.reshape(*block.rows, *other.rows)

    return _gram_of_blocks(against, leaf, other, thresholds.current().entries_at_once)


def _gram_of_blocks(
    against: Callable[[Leaf], jax.Array], leaf: Leaf, other: Leaf, entries: int
) -> jax.Array:
    """A Gramian, from blocks of rows of the first leaf of at most `entries` entries."""

    def write(
        result: jax.Array, block: Leaf, start: jax.Array, is_new: jax.Array
    ) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(result, against(block), start, 0)

    empty = zeros_of((*leaf.rows, *other.rows), leaf.carried, leaf, other)
    return over_blocks(write, empty, leaf, entries)
