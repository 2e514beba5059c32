"""Norms of rows, without overflow or underflow on the way to one that is representable.

Factors are divided by about their largest entry in a row before they are squared, and the norms of
leaves by the largest of them before theirs are added up.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import zip_longest
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._tree import carried_dtype, common_dtype
from ._leaves import Leaf, Piece, inner, materializes, over_rows, row, squeezed, times
from ._tails import isometric
from ._terms import (
    Dense,
    Outer,
    Scatter,
    Term,
    collapsed,
    equal_places,
    pair_count,
    pair_factors,
    scaled,
)
from ._windows import Windows

FEW = 1 << 19  # entries of factors: the roots of so many take little time
FEW_LEAVES = 16  # norms of so many are one loop; one of more takes XLA on CPUs long to compile
LARGE_BLOCK = 1 << 13  # entries of factors: enough work to make the turns of a loop cheap


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["scales", "squares", "size"],
    meta_fields=["factor"],
)
@dataclass(frozen=True)
class Norms:
    """The norms of rows in parts, which are put together for all leaves at once.

    A norm is factor * size * sqrt(the product of squares) / (the product of scales)**2; the arrays
    have a number for each row: shape (N,) or (N, K).

    Inner products of T > 1 pairs subtract, and lose the digits of a row whose parts nearly cancel:
    the squared norm is rounded by the order of eps times the sum of the absolute values of what it
    adds up. Where that is more than a thousandth of the squared norm, it is added.
    """

    scales: tuple[jax.Array, ...] = ()
    squares: tuple[jax.Array, ...] = ()
    size: jax.Array | None = None
    factor: float = 1.0

    def scaled(self, weight: jax.Array | None) -> "Norms":
        """Those of rows times numbers of their own."""
        if weight is None:
            return self
        size = jnp.abs(weight)
        return replace(self, size=size if self.size is None else self.size * size)

    def value(self, dtype: Any) -> jax.Array:
        """The norms."""
        own = jax.tree.map(lambda x: x.astype(dtype), self)
        parts = [(1 / x) ** 2 for x in own.scales]
        if own.squares:
            parts.append(safe_sqrt(reduce(jnp.multiply, own.squares)))
        if own.size is not None:
            parts.append(own.size)
        return times(reduce(jnp.multiply, parts), self.factor)


def combined(norms: Sequence[Norms]) -> jax.Array:
    """The norms of rows from those of their leaves.

    Parts of many leaves are stacked before anything is done to them: XLA on CPUs would compile a
    loop for each, or one that holds them all.
    """
    dtype = common_dtype(*(x.dtype for x in jax.tree.leaves(norms)))
    lengths: Any
    if len(norms) <= FEW_LEAVES:
        lengths = [x.value(dtype) for x in norms]
        most, total = partial(reduce, jnp.maximum), partial(reduce, jnp.add)
    else:
        lengths = _stacked(norms, dtype).value(dtype)
        most, total = partial(jnp.max, axis=0), partial(jnp.sum, axis=0)
    limits = jnp.finfo(dtype)
    size = jnp.clip(lax.stop_gradient(most(lengths)), float(limits.tiny), float(limits.max))
    shares = jax.tree.map(lambda x: x / jnp.broadcast_to(size, x.shape), lengths)
    return size * safe_sqrt(total(jax.tree.map(jnp.square, shares)))


def _stacked(norms: Sequence[Norms], dtype: Any) -> Norms:
    """The norms of many leaves, with an axis of leaves in front."""
    ones = jnp.ones_like(jax.tree.leaves(norms)[0], dtype)

    def stacked(parts: Iterable[Sequence[jax.Array]]) -> tuple[jax.Array, ...]:
        columns = zip_longest(*parts, fillvalue=ones)
        return tuple(jnp.stack([x.astype(dtype) for x in column]) for column in columns)

    scales, squares = stacked(x.scales for x in norms), stacked(x.squares for x in norms)
    sizes = [times(ones if x.size is None else x.size.astype(dtype), x.factor) for x in norms]
    return Norms(scales, squares, jnp.stack(sizes))


def norm(term: Term) -> jax.Array:
    """The norm of one row of one term."""
    scales = [_scale(x) for x in term.factors]
    return combined([Norms(tuple(scales), (squared_norm(term, scales),))])


def _scale(x: jax.Array, axes: Sequence[int] | None = None) -> jax.Array:
    """1 / the root of the largest absolute value over some axes, or of the smallest normal number.

    A constant to derivatives. To multiply twice by the inverse root is right for all floats: 1 / x
    of large ones is not a normal number. Of a maximum it would be one more loop that XLA on CPUs
    compiles, so that the root comes first where it takes little time.
    """
    x = lax.stop_gradient(jnp.abs(x)).astype(jnp.finfo(carried_dtype(x.dtype)).dtype)
    limits = jnp.finfo(x.dtype)
    axes = tuple(range(x.ndim)) if axes is None else axes
    if axes and x.size < FEW:
        # Not a start of `lax.reduce`, which XLA drops where all axes have size 1.
        root = jnp.min(lax.rsqrt(x), axis=axes, initial=float(limits.tiny) ** -0.5)
    else:
        root = lax.rsqrt(jnp.max(x, axis=axes, initial=float(limits.tiny)))
    return jnp.maximum(root, (float(limits.max) / 4) ** -0.5)  # infinite norms remain so


# --------------------------------------------------------------------------------------------------
# All rows of a leaf


@dataclass(frozen=True)
class _Factor:
    """An array of a term, `squeezed`, with its axes of rows from `first` on."""

    value: jax.Array
    first: int
    level: int

    @classmethod
    def of(cls, x: jax.Array, axis: int, level: int) -> "_Factor":
        x, first = squeezed(x, axis, level)
        return cls(x.astype(carried_dtype(x.dtype)), first, level)

    @property
    def others(self) -> tuple[int, ...]:
        rows = range(self.first, self.first + self.level)
        return tuple(i for i in range(self.value.ndim) if i not in rows)

    def scale(self) -> jax.Array:
        return _scale(self.value, self.others)

    def square(self, scale: jax.Array) -> jax.Array:
        """The sum of squares of each row, times the square of a number of its own."""
        scales = lax.expand_dims(scale, self.others).astype(self.value.dtype)
        return jnp.sum(jnp.abs(self.value * scales * scales) ** 2, axis=self.others)


def _factors(piece: Piece) -> list[_Factor]:
    factors = piece.term.factors
    levels = piece.levels[-len(factors) :]  # an index stands before them
    return [_Factor.of(x, piece.axis, level) for x, level in zip(factors, levels, strict=True)]


def leaf_norms(leaf: Leaf) -> Norms:
    """The norms of the rows of a leaf."""
    if not leaf.pieces:
        return Norms(size=jnp.zeros(leaf.rows, leaf.real))
    by_piece = len(leaf.pieces) == 1 and isometric(leaf.pieces[0].tail)
    if not by_piece and materializes(leaf, leaf):
        found = over_rows(lambda terms: norm(Dense(row(leaf, terms))), leaf, materializes=True)
        return Norms(size=found.astype(leaf.real))
    factors = [_factors(piece) for piece in leaf.pieces]
    scales = [[x.scale() for x in own] for own in factors]
    if by_piece:
        (piece,), (own,), (units,) = leaf.pieces, factors, scales
        if _is_vectors(piece.term):
            squares = [x.square(y) for x, y in zip(own, units, strict=True)]
        else:
            squares = [over_rows(lambda terms, x: squared_norm(terms[0], x), leaf, units)]
        of_rows = partial(_aligned, leaf=leaf)
        factor = abs(piece.factor)
        return Norms(tuple(map(of_rows, units)), tuple(map(of_rows, squares)), factor=factor)
    # All pieces are divided by the size of the largest.
    sizes = [prod((1 / _aligned(x, leaf)) ** 2 for x in own) for own in scales]
    size = jnp.maximum(reduce(jnp.maximum, sizes), float(jnp.finfo(leaf.real).tiny))
    shares = [
        [*others, _aligned(last, leaf) * jnp.sqrt(x / size)]
        for (*others, last), x in zip(scales, sizes, strict=True)
    ]
    square = over_rows(lambda terms, x: _squared_sum(leaf, terms, x), leaf, shares)
    return Norms(squares=(square,), size=size)


def _is_vectors(term: Term) -> bool:
    """Whether the squared norm of a row is the product of those of its factors."""
    if isinstance(term, Dense):
        return True
    return pair_count(term) <= 1 and term.shape[0] == 1


def _aligned(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Numbers for the rows, or for the examples, or for all, as one for each row."""
    missing = range(x.ndim, len(leaf.rows))
    x = lax.expand_dims(x, missing) if x.ndim else x
    return jnp.broadcast_to(x.astype(leaf.real), leaf.rows)


# --------------------------------------------------------------------------------------------------
# One row


def squared_norm(term: Term, scales: Sequence[jax.Array]) -> jax.Array:
    """The squared norm of a row whose factors are multiplied by the squares of some numbers."""
    if _has_large_blocks(term):
        # One block after the other: what is scaled here need not be held for all blocks at once.
        arrays, treedef = jax.tree.flatten(term)

        def one(block: list[jax.Array]) -> jax.Array:
            return squared_norm(jax.tree.unflatten(treedef, [x[None] for x in block]), scales)

        return jnp.sum(lax.map(one, arrays))
    if isinstance(term, Scatter) and term.right.shape[1] > 1:
        term = Dense(collapsed(term).right)
    term = scaled(term, scales)
    if isinstance(term, Dense):
        return jnp.sum(jnp.abs(term.value) ** 2)
    if isinstance(term, Windows):
        return term.squared_norm()
    if isinstance(term, Scatter):  # of one vector
        square = jnp.sum(jnp.abs(term.right) ** 2, axis=(1, 2))
        return jnp.sum(equal_places(term) * square)
    lefts, rights = pair_factors(term, term)
    square = jnp.sum(jnp.real(lefts * rights))
    if pair_count(term) <= 1:
        return square
    # Not abs(lefts * rights): XLA on CPUs would keep the products for both sums.
    absolute = jnp.sum(jnp.abs(lefts) * jnp.abs(rights))
    return not_too_small(square, absolute, prod(term.shape) * pair_count(term) ** 2)


def _squared_sum(
    leaf: Leaf, terms: Sequence[Term], scales: Sequence[Sequence[jax.Array]]
) -> jax.Array:
    """That of a row of several pieces, their factors multiplied by the squares of some numbers."""
    units = [scaled(term, own) for term, own in zip(terms, scales, strict=True)]
    square = jnp.real(inner(leaf, units, leaf, units)).astype(leaf.real)
    masses = [times(mass(x), abs(p.factor)) for x, p in zip(units, leaf.pieces, strict=True)]
    total = jnp.sum(jnp.stack([x.astype(leaf.real) for x in masses]))
    count = prod(leaf.shape) * sum(map(pair_count, terms)) ** 2
    return not_too_small(square, total**2, count)


def _has_large_blocks(term: Term) -> bool:
    if isinstance(term, Dense | Windows) or pair_count(term) <= 1 or term.right.shape[0] <= 1:
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
