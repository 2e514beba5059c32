"""Norms of the rows of leaves, from their factors, without overflow or underflow on the way.

Factors are divided by about their norm, or as in `_row_norms`, before they are squared, and the
norms of leaves by the largest of them before theirs are added up; see `_norm_parts`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.algebra import carried_dtype
from . import thresholds
from .einsum import times_rows_twice
from .leaf import Leaf, Piece, materializes, over_rows, row, squeezed
from .scaled_norms import product_count, squared_norm, squared_sum
from .scaling import Norms, combined, root_of
from .terms import Dense, Term, has_many_pairs, pair_count
from .views import isometric


def norm(term: Term) -> jax.Array:
    """The norm of one row of one term."""
    square, absolute, scale = squared_norm(term)
    return combined([_of_sum(square, absolute, scale, product_count(term), square.dtype)])


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
        if x.ndim > len(rows):
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
        if not thresholds.exceeds(self.value.size, thresholds.LARGE_FACTOR - 1):
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
        is_small = own and not any(thresholds.exceeds(x.value.size, thresholds.SMALL) for x in own)
        form = (leaf.real, *(x.form for x in own)) if is_small else i
        groups.setdefault(form, []).append(i)
    found = []
    for group in groups.values():
        # Of few, a weight and its bias may rather have a vector in common.
        for part in [group] if len(group) >= thresholds.MANY else [[i] for i in group]:
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
    is_vectors = isinstance(term, Dense) or (not has_many_pairs(term) and term.shape[0] == 1)
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
        count = product_count(leaf.pieces[0].of_one_row)
        norms = _of_sum(square, absolute, scale, count, leaf.real)
        return replace(norms, factors=(abs(leaf.pieces[0].factor),))
    square, absolute, scale = over_rows(partial(squared_sum, leaf), leaf)
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
