"""Gramians from products of vectors: of rows of one pair, and of several outputs.

The inner product of a bᵀ and a′ b′ᵀ is (a·a′)(b·b′). So the Gramian of such rows is one
product of all left vectors, one of all right vectors, and their product entry by entry.
Outputs of an example that share its left vector share the inner products of that, too.

If a row has T pairs, and outputs share the T vectors of one side, the inner products
(T, T′) of these multiply the vectors of the other side of one row first. For K outputs
of N examples, that takes N²·(T²·m + K·T²·n + K²·T·n) multiplications.
"""

from collections.abc import Callable
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from .. import thresholds
from ..einsum import dot
from ..leaf import Leaf, Summand, are_alike, zeros_of
from ..terms.outer import Outer, conjugated
from ..terms.protocol import Shape
from ..weighing import times
from .tiles import over_blocks

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


def share_one_side(leaf: Leaf, other: Leaf) -> bool:
    """Whether outputs share the vectors of an example on one side, in both leaves."""
    axes = [x.summands[0].row_axes for x in (leaf, other)]
    return axes[0] == axes[1] and axes[0] in ((1, 2), (2, 1))


def gram_of_pairs(leaf: Leaf, other: Leaf) -> jax.Array:
    """Inner products of all rows of two leaves: shape (*leaf.rows, *other.rows)."""

    def of_block(mine: Vectors, yours: Vectors) -> jax.Array:
        lefts, rights = map(_inner_products, mine, yours)
        return lefts * rights

    return _over_blocks(of_block, leaf, other, (*leaf.rows, *other.rows))


def traced_gram_of_pairs(leaf: Leaf, other: Leaf) -> jax.Array:
    """The sum over k of inner products of rows (i, k) and (j, k): shape (N, N′).

    The outputs of an example share its vectors on one side, in both leaves.
    """
    shape = leaf.size, other.size

    def of_block(mine: Vectors, yours: Vectors) -> jax.Array:
        # The vectors of all outputs are one vector, (N, K*n), or the only one, (N, m).
        lefts, rights = (
            _inner_products(*(x.reshape(len(x), -1) for x in both))
            for both in zip(mine, yours, strict=True)
        )
        return lefts * rights

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


# ------------------------------------------------------------------------------------
# Rows of several pairs, of which outputs share one side


def shares_pairs(leaf: Leaf, other: Leaf) -> bool:
    """Whether all rows are sums of outer products of which outputs share one side."""
    if len(leaf.summands) != 1 or len(other.summands) != 1:
        return False
    (one,), (two,) = leaf.summands, other.summands
    are_outer = isinstance(one.term, Outer) and isinstance(two.term, Outer)
    return are_outer and are_alike(one, two) and share_one_side(leaf, other)


def cost_of_shared(leaf: Leaf, other: Leaf, *, trace: bool = False) -> int:
    """Multiplications and additions of `gram_of_shared`, for one pair of examples."""
    (one,), (two,) = leaf.summands, other.summands
    blocks, *free = one.shape
    shared = one.row_axes.index(1)
    m, n = free[shared], free[1 - shared]
    t, s = one.of_one_row.pair_count, two.of_one_row.pair_count
    outputs = other.outputs or 1
    of_own = t * s * n * outputs
    if not trace:
        of_own += (leaf.outputs or 1) * outputs * t * n
    return 2 * blocks * (t * s * m + of_own)


def gram_of_shared(leaf: Leaf, other: Leaf, *, trace: bool = False) -> jax.Array:
    """Inner products of rows with T pairs; with `trace` summed over common outputs.

    The shape is (N, K, N′, K′), or (N, N′) with `trace`.
    """
    (one,), (two,) = leaf.summands, other.summands
    shape = (leaf.size, other.size) if trace else (*leaf.rows, *other.rows)
    theirs = _sides(two)
    of_block = _traced_block if trace else _block

    def write(
        total: jax.Array, block: Leaf, start: jax.Array, is_new: jax.Array
    ) -> jax.Array:
        mine = _sides(block.summands[0])

        def add(found: jax.Array, both: tuple[Vectors, Vectors]) -> Any:
            return found + of_block(*both).astype(leaf.carried), None

        if one.shape[0] == 1:
            mine, yours = jax.tree.map(lambda x: lax.squeeze(x, (0,)), (mine, theirs))
            found = of_block(mine, yours).astype(leaf.carried)
        else:
            own = zeros_of((block.size, *shape[1:]), leaf.carried, leaf, other)
            found, _ = lax.scan(add, own, (mine, theirs))
        return lax.dynamic_update_slice_in_dim(total, found, start, 0)

    empty = zeros_of(shape, leaf.carried, leaf, other)
    total = over_blocks(write, empty, leaf, _entries(leaf, other, theirs))
    return times(total, one.factor * two.factor)


def _entries(leaf: Leaf, other: Leaf, theirs: Vectors) -> int:
    """How many entries the rows of a block of examples of `gram_of_shared` have.

    For one example, products are as large as what the rows of the other leaf keep.
    """
    own = prod(leaf.shape) * (leaf.outputs or 1)
    if not isinstance(other.size, int):
        return own
    made = sum(x.size for x in theirs)
    return own * max(1, thresholds.current().entries_at_once // max(1, made))


def _sides(summand: Summand) -> Vectors:
    """The shared vectors of a term (B, N, T, m), and those of outputs (B, N, K, T, n).

    They are the left and right factors, or the right and left ones.
    """
    arrays = zip(jax.tree.leaves(summand.term), summand.row_axes, strict=True)
    return [
        jnp.moveaxis(x, range(summand.axis, summand.axis + n), range(1, 1 + n))
        for x, n in sorted(arrays, key=lambda pair: pair[1])
    ]


def _block(mine: Vectors, yours: Vectors) -> jax.Array:
    """Inner products (N, K, N′, K′)."""
    (left, right), (others, theirs) = mine, yours
    lefts = dot("itm,jsm->itjs", conjugated(left), others)
    carried = dot("itjs,jlsn->jitln", lefts, theirs)
    return dot("iktn,jitln->ikjl", conjugated(right), carried)


def _traced_block(mine: Vectors, yours: Vectors) -> jax.Array:
    """Inner products (N, N′), summed over outputs."""
    (left, right), (others, theirs) = mine, yours
    lefts = dot("itm,jsm->ijts", conjugated(left), others)
    rights = dot("iktn,jksn->ijts", conjugated(right), theirs)
    return jnp.sum(lefts * rights, (2, 3))
