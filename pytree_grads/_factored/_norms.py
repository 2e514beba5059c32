"""Norms of the rows of leaves, from their factors, without overflow or underflow on the way.

Factors are divided by about their norm, or by their largest entry in a row, before they are
squared, and the norms of leaves by the largest of them before theirs are added up; see
`_norm_parts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from .._tree import carried_dtype, common_dtype
from . import _costs
from ._dot import times_rows_twice
from ._leaves import Leaf, Piece, inner, materializes, over_rows, row, squeezed, times
from ._norm_parts import Norms, combined, power, root_of, safe_sqrt
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


def norm(term: Term) -> jax.Array:
    """The norm of one row of one term."""
    square, absolute, scale = squared_norm(term)
    return combined([_of_sum(square, absolute, scale, _count(term), square.dtype)])


@jax.jit
def _size(x: jax.Array) -> jax.Array:
    """The largest absolute value over the last axis, or the smallest normal number."""
    dtype = jnp.finfo(carried_dtype(x.dtype)).dtype
    x = lax.convert_element_type(lax.abs(lax.stop_gradient(x)), dtype)
    least, last = jnp.asarray(jnp.finfo(dtype).tiny, dtype), x.ndim - 1
    if x.shape[last] == 1:  # XLA drops the start of the reduction then
        return lax.max(lax.squeeze(x, (last,)), least)
    return lax.reduce(x, least, lax.max, (last,))


# --------------------------------------------------------------------------------------------------
# All rows


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=["first", "level"])
@dataclass(frozen=True)
class _Factor:
    """An array of a term, `squeezed`, with its axes of rows from `first` on."""

    value: jax.Array
    first: int
    level: int

    @classmethod
    def of(cls, x: jax.Array, axis: int, level: int) -> "_Factor":
        x, first = squeezed(x, axis, level)
        rows = x.shape[: first + level]
        if x.ndim > len(rows) and x.shape[-1] < _costs.SHORT_AXIS:
            x = lax.reshape(x, (*rows, prod(x.shape[len(rows) :])))
        return cls(x.astype(carried_dtype(x.dtype)), first, level)

    @property
    def form(self) -> Any:
        return self.value.shape, self.value.dtype, self.first, self.level

    @property
    def others(self) -> tuple[int, ...]:
        rows = range(self.first, self.first + self.level)
        return tuple(i for i in range(self.value.ndim) if i not in rows)

    @property
    def plain_square(self) -> jax.Array:
        """The sum of squares of each row, as it is."""
        x = lax.abs(self.value) if jnp.iscomplexobj(self.value) else self.value
        return lax.reduce_sum(lax.square(x), self.others)

    @property
    def square(self) -> jax.Array:
        """The sum of squares of each row, whose entries are multiplied twice by its scale."""
        return self._square_and_scale[0]

    @property
    def scale(self) -> jax.Array:
        """What rows are multiplied with, twice, before they are squared."""
        return self._square_and_scale[1]

    @cached_property
    def _square_and_scale(self) -> tuple[jax.Array, jax.Array]:
        if self.value.size < _costs.LARGE_FACTOR:
            return _scaled(self)
        return lax.platform_dependent(self, cpu=_scaled_if_needed, default=_scaled)


@jax.jit
def _scaled(factor: _Factor) -> tuple[jax.Array, jax.Array]:
    """The squares of its rows, and their scales.

    These come from plain squares: XLA on CPUs takes twice as long for largest entries.
    """
    scale = root_of(lax.stop_gradient(factor.plain_square))
    value = times_rows_twice(factor.value, scale, factor.first)
    return replace(factor, value=value).plain_square, scale


def _scaled_if_needed(factor: _Factor) -> tuple[jax.Array, jax.Array]:
    """The plain squares, where none is near the ends of the range of float32."""
    limits = jnp.finfo(jnp.float32)
    ends = float(limits.tiny) * 2.0 ** (2 * limits.nmant), float(limits.max) / 4
    square = factor.plain_square
    least, most = (lax.full((), x, square.dtype) for x in ends)
    fixed = lax.stop_gradient(square)
    are_safe = lax.bitwise_and(lax.ge(fixed, least), lax.le(fixed, most))
    is_safe = lax.reduce_and(are_safe, range(square.ndim))
    return lax.cond(is_safe, lambda _: (square, lax.full_like(square, 1)), _scaled, factor)


def _stacked(factors: Sequence[_Factor]) -> _Factor:
    """Factors of one form as one, with an axis of leaves behind those of rows."""
    first, level = factors[0].first, factors[0].level
    if len(factors) == 1:
        return factors[0]
    return _Factor(jnp.stack([x.value for x in factors], first + level), first, level + 1)


def leaf_norms(leaves: Sequence[Leaf]) -> list[Norms]:
    """The norms of the rows of all leaves. Many small vectors of one form are worked on as one."""
    vectors = [_vectors(leaf) for leaf in leaves]
    groups: dict[Any, list[int]] = {}
    for i, (leaf, own) in enumerate(zip(leaves, vectors, strict=True)):
        is_small = own and all(x.value.size <= _costs.SMALL for x in own)
        form = (leaf.real, *(x.form for x in own)) if is_small else i
        groups.setdefault(form, []).append(i)
    found = []
    for group in groups.values():
        # Of few, a weight and its bias may rather have a vector in common.
        for part in [group] if len(group) >= _costs.MANY else [[i] for i in group]:
            own = [leaves[i] for i in part]
            factors = [vectors[i] for i in part]
            norms = _of_vectors(own, factors) if factors[0] else _of_terms(*own)
            found.append(replace(norms, leaves=tuple(part)))
    return found


def _factors(piece: Piece) -> list[_Factor]:
    factors = piece.term.factors
    levels = piece.levels[-len(factors) :]  # an index stands before them
    return [_Factor.of(x, piece.axis, level) for x, level in zip(factors, levels, strict=True)]


def _is_one_block(leaf: Leaf) -> bool:
    """Whether the norm of a row is that of the term of its only piece."""
    return len(leaf.pieces) == 1 and isometric(leaf.pieces[0].tail)


def _vectors(leaf: Leaf) -> list[_Factor]:
    """The factors of a leaf, if the norm of a row is the product of theirs."""
    if not _is_one_block(leaf):
        return []
    (piece,) = leaf.pieces
    term = piece.term
    is_vectors = isinstance(term, Dense) or (pair_count(term) <= 1 and term.shape[0] == 1)
    return _factors(piece) if is_vectors else []


def _of_vectors(leaves: Sequence[Leaf], factors: Sequence[Sequence[_Factor]]) -> Norms:
    """Those of leaves of one form."""

    def aligned(x: jax.Array) -> jax.Array:
        return _aligned(_column(x) if len(leaves) == 1 else x, leaves[0])

    alike = [_stacked(x) for x in zip(*factors, strict=True)]
    squares = (lax.convert_element_type(x.square, leaves[0].real) for x in alike)
    return Norms(
        squares=tuple(map(aligned, squares)),
        scales=tuple(aligned(x.scale) for x in alike),
        factors=tuple(abs(leaf.pieces[0].factor) for leaf in leaves),
        errors=((0.0, 0.0),) * len(leaves),
    )


def _of_terms(leaf: Leaf) -> Norms:
    """Those of one leaf."""
    if not leaf.pieces:
        return Norms(weights=(jnp.zeros((*leaf.rows, 1), leaf.real),))
    by_piece = _is_one_block(leaf)
    if not by_piece and materializes(leaf, leaf):
        found = over_rows(lambda terms: norm(Dense(row(leaf, terms))), leaf, materializes=True)
        return Norms(weights=(_column(found.astype(leaf.real)),))
    if by_piece:
        square, absolute, scale = over_rows(lambda terms: squared_norm(terms[0]), leaf)
        count = _count(leaf.pieces[0].of_one_row)
        norms = _of_sum(square, absolute, scale, count, leaf.real)
        return replace(norms, factors=(abs(leaf.pieces[0].factor),))
    square, absolute, scale = over_rows(partial(_squared_sum, leaf), leaf)
    count = prod(leaf.shape) * sum(pair_count(x.of_one_row) for x in leaf.pieces) ** 2
    return _of_sum(square, absolute, scale, count, leaf.real)


def _of_sum(
    square: jax.Array, absolute: jax.Array | None, scale: jax.Array, count: int, dtype: Any
) -> Norms:
    """Those of one leaf, whose squares add up so many products."""
    limits = jnp.finfo(square.dtype)
    error = float(8 * limits.eps), count * float(8 * limits.tiny)
    cast = partial(lax.convert_element_type, new_dtype=dtype)
    return Norms(
        squares=(_column(cast(square)),),
        scales=(_column(scale),),
        absolute=() if absolute is None else (_column(cast(lax.stop_gradient(absolute))),),
        errors=(error,),
    )


def _column(x: jax.Array) -> jax.Array:
    """With an axis for one leaf."""
    return lax.expand_dims(x, (x.ndim,))


def _aligned(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Numbers for the rows, or for the examples, or for all, as one for each row.

    The axis of leaves is the last.
    """
    axes = (*range(x.ndim - 1), len(leaf.rows))
    return lax.broadcast_in_dim(x, (*leaf.rows, x.shape[-1]), axes)


# --------------------------------------------------------------------------------------------------
# One row


Squared: TypeAlias = tuple[jax.Array, jax.Array | None, jax.Array]


def squared_norm(term: Term) -> Squared:
    """The squared norm of a row that is multiplied twice by a scale, and that scale, the last.

    Between them, where it is a sum that subtracts, that of the absolute values.
    """
    if _has_large_blocks(term):
        # One block after the other: what is scaled here need not be held for all blocks at once.
        arrays, treedef = jax.tree.flatten(term)

        def one(block: list[jax.Array]) -> Squared:
            return squared_norm(jax.tree.unflatten(treedef, [x[None] for x in block]))

        return _of_parts(*lax.map(one, arrays))
    if isinstance(term, Windows):
        return _of_parts(*term.over_offsets(lambda lines: squared_norm(Dense(lines))))
    if isinstance(term, Scatter) and term.right.shape[1] > 1:
        term = Dense(collapsed(term).right)
    unit, scale = _unit(term)
    if isinstance(unit, Dense):
        return jnp.sum(jnp.abs(unit.value) ** 2), None, scale
    if isinstance(unit, Scatter):  # of one vector
        square = jnp.sum(jnp.abs(unit.right) ** 2, axis=(1, 2))
        return jnp.sum(equal_places(unit) * square), None, scale
    pairs = pair_factors(unit, unit)
    dtype = common_dtype(*(x.dtype for x in pairs))
    lefts, rights = (lax.convert_element_type(x, dtype) for x in pairs)
    products = lax.mul(lefts, rights)
    square = lax.reduce_sum(
        lax.real(products) if jnp.iscomplexobj(products) else products, (0, 1, 2)
    )
    if pair_count(unit) <= 1:
        return square, None, scale
    # Not abs(lefts * rights): XLA on CPUs would keep the products for both sums.
    absolute = lax.reduce_sum(lax.mul(lax.abs(lefts), lax.abs(rights)), (0, 1, 2))
    return square, absolute, scale


def _of_parts(squares: jax.Array, absolutes: jax.Array | None, scales: jax.Array) -> Squared:
    """Those of a row from those of its parts, which have scales of their own."""
    scale = jnp.min(scales)
    shares = scale / scales

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(times_rows_twice(times_rows_twice(x, shares, 0), shares, 0))

    return total(squares), None if absolutes is None else total(absolutes), scale


def _unit(term: Term) -> tuple[Term, jax.Array]:
    """A row multiplied twice by a scale that brings it near one, and that scale."""
    if isinstance(term, Outer):
        scales, scale = _pair_scales(*map(_size, term.factors))
        return scaled(term, scales), scale
    (x,) = (lax.convert_element_type(x, carried_dtype(x.dtype)) for x in term.factors)
    scale = root_of(lax.stop_gradient(jnp.sum(jnp.abs(x) ** 2)))
    return scaled(term, [scale]), scale


@jax.jit
def _pair_scales(left: jax.Array, right: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Scales for the vectors of pairs, from their sizes, and the scale of the row that these make.

    No product of a pair is too small or too large on the way, however the two share its size: one
    is brought near one, and the other takes what the pair has of the largest.
    """
    dtype = common_dtype(left.dtype, right.dtype)
    sizes = [lax.convert_element_type(x, dtype) for x in (left, right)]
    limits = jnp.finfo(dtype)
    least, most = (lax.full((), float(x), dtype) for x in (limits.tiny, 1 / limits.tiny))
    left, right = map(power, sizes)
    is_zero = lax.le(lax.min(*sizes), lax.full_like(left, least))
    products = lax.select(is_zero, lax.full_like(left, most), lax.mul(left, right))
    scale = lax.max(lax.reduce(products, most, lax.min, range(products.ndim)), least)
    of_row = lax.broadcast(scale, left.shape)
    return [left, lax.min(lax.div(of_row, left), right)], scale


def _weighted(term: Term, numbers: jax.Array) -> Term:
    """A row, or its pairs, multiplied twice by some numbers."""
    name = "value" if isinstance(term, Dense) else "right"
    return replace(term, **{name: times_rows_twice(getattr(term, name), numbers, 0)})


def _count(term: Term) -> int:
    """How many products the squared norm of a row adds up; each may be too small for its dtype."""
    return prod(term.shape) * pair_count(term) ** 2


def _squared_sum(leaf: Leaf, terms: Sequence[Term]) -> Squared:
    """The same for a row of several pieces."""
    units, own = zip(*map(_unit, terms), strict=True)
    dtype = common_dtype(*(x.dtype for x in own))
    scales = [x.astype(dtype) for x in own]
    scale = reduce(jnp.minimum, scales)
    units = [_weighted(unit, scale / x) for unit, x in zip(units, scales, strict=True)]
    square = jnp.real(inner(leaf, units, leaf, units)).astype(leaf.real)
    masses = [times(mass(x), abs(p.factor)) for x, p in zip(units, leaf.pieces, strict=True)]
    total = jnp.sum(jnp.stack([x.astype(leaf.real) for x in masses]))
    return square, total**2, scale


def _has_large_blocks(term: Term) -> bool:
    if isinstance(term, Dense | Windows) or pair_count(term) <= 1 or term.right.shape[0] <= 1:
        return False
    return sum(x.size for x in jax.tree.leaves(term)) // term.right.shape[0] >= _costs.LARGE_BLOCK


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
