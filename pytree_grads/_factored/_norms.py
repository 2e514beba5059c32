"""Norms of rows, without overflow or underflow on the way to one that is representable.

Factors are divided by their largest entry in a row before they are squared, and the root is taken
only once all leaves are added up.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from .._tree import carried_dtype, common_dtype
from ._leaves import Leaf, Piece, inner, materializes, over_rows, row, times
from ._tails import isometric
from ._terms import Dense, Outer, Scatter, Term, collapsed, divided, pair_count, pairs
from ._windows import Windows

LARGE_BLOCK = 1 << 13  # entries of factors: enough work to make the turns of a loop cheap


@partial(jax.tree_util.register_dataclass, data_fields=["size", "square"], meta_fields=[])
@dataclass(frozen=True)
class Norms:
    """The numbers size * sqrt(square), one for each row: shape (N,) or (N, K).

    Inner products of T > 1 pairs subtract, and lose the digits of a row whose parts nearly cancel:
    the squared norm is rounded by the order of eps times the sum of the absolute values of what it
    adds up. Where that is more than a thousandth of the squared norm, it is added.
    """

    size: jax.Array
    square: jax.Array

    @property
    def value(self) -> jax.Array:
        return self.size * safe_sqrt(self.square)

    def scaled(self, weight: jax.Array | None) -> "Norms":
        """Those of rows times numbers of their own."""
        return self if weight is None else replace(self, size=self.size * jnp.abs(weight))


def combined(norms: Sequence[Norms]) -> Norms:
    """The norms of rows from those of their leaves."""
    dtype = common_dtype(*(x.size.dtype for x in norms))
    sizes = jnp.stack([x.size.astype(dtype) for x in norms])
    squares = jnp.stack([x.square.astype(dtype) for x in norms])
    size = _invertible(_sum(sizes * float(1 / len(norms))) + float(jnp.finfo(dtype).tiny))
    return Norms(size, _sum((sizes / size[None]) ** 2 * squares))


def _sum(x: jax.Array) -> jax.Array:
    """The sum over the first axis, as a product of matrices.

    XLA on CPUs would find a sum of many numbers again in every loop that uses it.
    """
    ones = jnp.ones(len(x), x.dtype)
    return jnp.tensordot(ones, x, 1, precision=lax.Precision.HIGHEST)


def norm(term: Term) -> jax.Array:
    """The norm of one row of one term."""
    sizes = [_largest(x) for x in term.factors]
    square = squared_norm(term, sizes)
    return prod(size.astype(square.dtype) for size in sizes) * safe_sqrt(square)


def _largest(x: jax.Array, axes: tuple[int, ...] | None = None) -> jax.Array:
    """The largest absolute value over some axes, within the numbers whose reciprocal is normal.

    A constant to derivatives.
    """
    tiny = float(jnp.finfo(x.dtype).tiny)
    return lax.stop_gradient(_invertible(jnp.max(jnp.abs(x), axis=axes, initial=tiny)))


def _invertible(size: jax.Array) -> jax.Array:
    """A number no larger than 1 / tiny: beyond that its reciprocal, by which XLA divides, is 0."""
    return jnp.minimum(size, float(1 / jnp.finfo(size.dtype).tiny))


# --------------------------------------------------------------------------------------------------
# All rows of a leaf


@dataclass(frozen=True)
class _Factor:
    """An array of a term with its axes of rows, from `first` on, and no others of size 1.

    What a weight and a bias have in common has one form then, and is worked on once.
    """

    value: jax.Array
    first: int
    level: int

    @classmethod
    def of(cls, x: jax.Array, axis: int, level: int) -> "_Factor":
        idle = [i for i, n in enumerate(x.shape) if n == 1 and not axis <= i < axis + level]
        x = lax.squeeze(x, idle).astype(carried_dtype(x.dtype))
        return cls(x, axis - sum(i < axis for i in idle), level)

    @property
    def others(self) -> tuple[int, ...]:
        rows = range(self.first, self.first + self.level)
        return tuple(i for i in range(self.value.ndim) if i not in rows)

    def largest(self) -> jax.Array:
        return _largest(self.value, self.others)

    def square(self, size: jax.Array) -> jax.Array:
        """The sum of squares of each row, divided by a number of its own."""
        sizes = lax.expand_dims(size, self.others).astype(self.value.dtype)
        return jnp.sum(jnp.abs(self.value / sizes) ** 2, axis=self.others)


def _factors(piece: Piece) -> list[_Factor]:
    factors = piece.term.factors
    levels = piece.levels[-len(factors) :]  # an index stands before them
    return [_Factor.of(x, piece.axis, level) for x, level in zip(factors, levels, strict=True)]


def leaf_norms(leaf: Leaf) -> Norms:
    """The norms of the rows of a leaf."""
    if not leaf.pieces:
        return Norms(jnp.zeros(leaf.rows, leaf.real), jnp.zeros(leaf.rows, leaf.real))
    by_piece = len(leaf.pieces) == 1 and isometric(leaf.pieces[0].tail)
    if not by_piece and materializes(leaf, leaf):
        found = over_rows(lambda terms: norm(Dense(row(leaf, terms))), leaf, materializes=True)
        return Norms(found.astype(leaf.real), jnp.ones(leaf.rows, leaf.real))
    factors = [_factors(piece) for piece in leaf.pieces]
    sizes = [[x.largest() for x in own] for own in factors]
    products = [_product(leaf, own) for own in sizes]
    if by_piece:
        (piece,), (own,), (size,), (product,) = leaf.pieces, factors, sizes, products
        if _is_vectors(piece.term):
            square = _product(leaf, [x.square(y) for x, y in zip(own, size, strict=True)])
        else:
            square = over_rows(lambda terms, x: squared_norm(terms[0], x), leaf, size)
        return Norms(times(product, abs(piece.factor)), square.astype(leaf.real))
    size = jnp.maximum(reduce(jnp.maximum, products), float(jnp.finfo(leaf.real).tiny))
    shares = [
        [*others, _aligned(last, leaf) * (size / x).astype(last.dtype)]
        for (*others, last), x in zip(sizes, products, strict=True)
    ]
    return Norms(size, over_rows(lambda terms, x: _squared_sum(leaf, terms, x), leaf, shares))


def _is_vectors(term: Term) -> bool:
    """Whether the squared norm of a row is the product of those of its factors."""
    if isinstance(term, Dense):
        return True
    return pair_count(term) <= 1 and term.shape[0] == 1


def _product(leaf: Leaf, numbers: Sequence[jax.Array]) -> jax.Array:
    """The product of numbers for the rows, or for the examples, or for all: one for each row."""
    total = prod(_aligned(x, leaf).astype(leaf.real) for x in numbers)
    return jnp.broadcast_to(total, leaf.rows)


def _aligned(x: jax.Array, leaf: Leaf) -> jax.Array:
    return lax.expand_dims(x, range(x.ndim, len(leaf.rows))) if x.ndim else x


# --------------------------------------------------------------------------------------------------
# One row


def squared_norm(term: Term, sizes: Sequence[jax.Array]) -> jax.Array:
    """The squared norm of a row whose factors are divided by some numbers."""
    if _has_large_blocks(term):
        # One block after the other: what is scaled here need not be held for all blocks at once.
        arrays, treedef = jax.tree.flatten(term)

        def one(block: list[jax.Array]) -> jax.Array:
            return squared_norm(jax.tree.unflatten(treedef, [x[None] for x in block]), sizes)

        return jnp.sum(lax.map(one, arrays))
    if isinstance(term, Scatter) and term.right.shape[1] > 1:
        term = Dense(collapsed(term).right)
    term = divided(term, sizes)
    if isinstance(term, Dense):
        return jnp.sum(jnp.abs(term.value) ** 2)
    if isinstance(term, Windows):
        return term.squared_norm()
    products = jnp.real(pairs(term, term))
    square = jnp.sum(products)
    if isinstance(term, Scatter) or pair_count(term) <= 1:  # summands of one sign
        return square
    count = prod(term.shape) * pair_count(term) ** 2
    return not_too_small(square, jnp.sum(jnp.abs(products)), count)


def _squared_sum(
    leaf: Leaf, terms: Sequence[Term], sizes: Sequence[Sequence[jax.Array]]
) -> jax.Array:
    """The squared norm of a row of several pieces, their factors divided by some numbers."""
    units = [divided(term, own) for term, own in zip(terms, sizes, strict=True)]
    square = jnp.real(inner(leaf, units, leaf, units)).astype(leaf.real)
    masses = [times(mass(x), abs(p.factor)) for x, p in zip(units, leaf.pieces, strict=True)]
    total = jnp.sum(jnp.stack([x.astype(leaf.real) for x in masses]))
    count = prod(leaf.shape) * sum(map(pair_count, terms)) ** 2
    return not_too_small(square, total**2, count)


def _has_large_blocks(term: Term) -> bool:
    if isinstance(term, Dense | Windows) or pair_count(term) <= 1 or term.right.shape[0] == 1:
        return False
    return sum(x.size for x in jax.tree.leaves(term)) // term.right.shape[0] >= LARGE_BLOCK


def mass(term: Term) -> jax.Array:
    """The sum of the norms of the parts of a row; its square bounds what `not_too_small` asks."""
    if isinstance(term, Dense):
        return safe_sqrt(jnp.sum(jnp.abs(term.value) ** 2))
    lengths = [safe_sqrt(jnp.sum(jnp.abs(x) ** 2, axis=-1)) for x in term.factors]
    match term:
        case Outer():
            return jnp.sum(lengths[0] * lengths[1])
        case Scatter(index, _, _):
            return jnp.sum(jnp.broadcast_to(lengths[0], index.shape))
    raise TypeError(f"no parts of {type(term).__name__}")


# --------------------------------------------------------------------------------------------------
# Numbers


def not_too_small(square: jax.Array, absolute: jax.Array, count: int) -> jax.Array:
    """A squared norm plus its rounding error, if that is of weight; see `Norms`.

    `absolute` is the sum of the absolute values of the summands of the squared norm, and `count`
    the number of products that were added up, each of which may have been too small for its dtype.
    """
    limits = jnp.finfo(square.dtype)
    rounding = lax.stop_gradient(absolute) * float(8 * limits.eps) + count * float(8 * limits.tiny)
    return jnp.where(rounding > square * 1e-3, jnp.maximum(square, 0) + rounding, square)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of x, 0 where x is not positive, with derivative 0 there; keeps NaN."""
    idle = x <= 0
    root = jnp.sqrt(jnp.where(idle, jnp.ones_like(x), x))
    return jnp.where(idle, jnp.zeros_like(x), root)
