"""Gramians of rows of one pair each, and Gramians that are traced over outputs.

The inner product of a bᵀ and a′ b′ᵀ is (a·a′)(b·b′). So the Gramian of such rows is one
product of all left vectors, one of all right vectors, and their product entry by entry.
Outputs of an example that share its left vector share the inner products of that, too.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ..einsum import dot
from ..leaf import Leaf, Summand, are_alike, zeros_of
from ..terms.outer import Outer, conjugated
from ..terms.protocol import Shape
from ..weighing import times

# The left and the right vectors of all rows.
Vectors: TypeAlias = list[jax.Array]


def is_of_pairs(leaf: Leaf, other: Leaf) -> bool:
    """Whether all rows of two leaves are single outer products behind one view."""
    if len(leaf.summands) != 1 or len(other.summands) != 1:
        return False
    (one,), (two,) = leaf.summands, other.summands
    return are_alike(one, two) and _has_one_pair(one) and _has_one_pair(two)


def _has_one_pair(summand: Summand) -> bool:
    term = summand.of_one_row
    return isinstance(term, Outer) and term.pair_count == 1


def shares_left(leaf: Leaf) -> bool:
    """Whether outputs share the left vector of an example, and have right ones."""
    return leaf.summands[0].row_axes == (1, 2)


def gram_of_pairs(leaf: Leaf, other: Leaf) -> jax.Array:
    """Inner products of all rows of two leaves: shape (*leaf.rows, *other.rows)."""

    def of_block(mine: Vectors, yours: Vectors) -> jax.Array:
        lefts, rights = map(_inner_products, mine, yours)
        return lefts * rights

    return _over_blocks(of_block, leaf, other, (*leaf.rows, *other.rows))


def traced_gram_of_pairs(leaf: Leaf, other: Leaf) -> jax.Array:
    """The sum over k of inner products of rows (i, k) and (j, k): shape (N, N′).

    The outputs of an example share its left vector, in both leaves.
    """
    shape = leaf.size, other.size

    def of_block(mine: Vectors, yours: Vectors) -> jax.Array:
        lefts = _inner_products(mine[0], yours[0]).reshape(shape)
        # The vectors of all outputs are one vector.
        rights = [x[1].reshape(len(x[1]), -1) for x in (mine, yours)]  # (N, K*n)
        return lefts * _inner_products(*rights)

    return _over_blocks(of_block, leaf, other, shape)


def _inner_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Inner products of vectors (*rows, n) and (*others, n): shape (*rows, *others).

    The product has the form that rows as arrays have. XLA then computes those of the
    right vectors of a weight, and of its bias, once.
    """
    size = x.shape[-1]
    products = dot("ip,jp->ij", conjugated(x).reshape(-1, size), y.reshape(-1, size))
    return products.reshape(*x.shape[:-1], *y.shape[:-1])


def _over_blocks(
    of_block: Callable[[Vectors, Vectors], jax.Array],
    leaf: Leaf,
    other: Leaf,
    shape: Shape,
) -> jax.Array:
    """The sum of a Gramian of some shape over the blocks of two leaves."""
    (one,), (two,) = leaf.summands, other.summands
    both = _vectors(one, len(leaf.rows)), _vectors(two, len(other.rows))

    def of(both: tuple[Vectors, Vectors]) -> jax.Array:
        return jnp.broadcast_to(of_block(*both).astype(leaf.carried), shape)

    def add(total: jax.Array, both: tuple[Vectors, Vectors]) -> tuple[jax.Array, None]:
        return total + of(both), None

    if one.shape[0] == 1:
        total = of(jax.tree.map(lambda x: lax.squeeze(x, (0,)), both))
    else:
        total, _ = lax.scan(add, zeros_of(shape, leaf.carried, leaf, other), both)
    return times(total, one.factor * two.factor)


def _vectors(summand: Summand, depth: int) -> Vectors:
    """The vectors of all rows, block by block: (B, *rows, n), `depth` axes of rows.

    An axis of rows that share a vector has length 1.
    """
    found = []
    for x, count in zip(jax.tree.leaves(summand.term), summand.row_axes, strict=True):
        own = range(summand.axis, summand.axis + count)
        x = jnp.moveaxis(x, own, range(count))  # (*own rows, B, 1, n)
        rows, (blocks, _, n) = x.shape[:count], x.shape[count:]
        x = jnp.moveaxis(x.reshape(*rows, blocks, n), count, 0)
        found.append(x.reshape(blocks, *rows, *[1] * (depth - count), n))
    return found
