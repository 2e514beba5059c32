"""Scatter terms: lines that are added at indices, from embeddings for example."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import carried_dtype
from .. import thresholds
from ..weighing import times, times_weights
from . import scales
from .by_row import ByRow
from .outer import has_many, repeated, vector_norms
from .protocol import NormCost, Shape, Squared

# How many multiplications take as long as one comparison of two look-ups.
_COMPARISON = 16


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["index", "right"],
    meta_fields=["length"],
)
@dataclass(frozen=True)
class Scatter(ByRow):
    """A row of `length` lines, in which right[b, t] is added to line index[b, t].

    It is an outer term whose left vectors are one-hot.
    """

    index: jax.Array  # (B, T); an index of `length` adds nothing
    right: jax.Array  # (B, T, n), or (B, 1, n) if each index adds the same vector
    length: int

    factor_names: ClassVar = ("right",)

    @property
    def shape(self) -> Shape:
        return (self.index.shape[0], self.length, self.right.shape[-1])

    @property
    def dtype(self) -> Any:
        return carried_dtype(self.right.dtype)

    @property
    def pair_count(self) -> int:
        return self.index.shape[-1]

    def describe(self) -> str:
        lines = f"scatter {self.pair_count} of {self.length} lines"
        return repeated(self.index.shape[0]) + lines

    # ------------------------------------------------------------------------------

    def materialize(self) -> jax.Array:
        empty = jnp.zeros(self.shape, self.dtype)
        return add_lines(empty, self.index, self.right.astype(self.dtype))

    @property
    def row_cost(self) -> int:
        return self.right.size

    def apply(self, v: jax.Array) -> jax.Array:
        return jnp.sum(lines_at(v, self.index) * self.right.astype(self.dtype))

    def apply_own(self, v: jax.Array) -> jax.Array:
        return self.apply(v)

    @property
    def apply_cost(self) -> int:
        blocks, _, n = self.shape
        return 2 * blocks * self.pair_count * n

    # ------------------------------------------------------------------------------

    @property
    def norm_is_product(self) -> bool:
        return self.index.shape[0] == 1 and not has_many(self.pair_count)

    def squared_norm(self) -> Squared:
        if has_many(self.right.shape[1]):
            return scales.squared_norm(self.merged().right)
        # Each index adds the same vector: count the pairs of equal indices.
        scale = scales.rough_scale(self.right)
        unit = scales.times_twice(self.right, scale)
        square = jnp.sum(jnp.abs(unit) ** 2, axis=(1, 2))  # (B,)
        return Squared(jnp.sum(equal_pairs(self) * square), None, scale)

    @property
    def norm_cost(self) -> NormCost:
        return NormCost("squares", 2 * self.right.size + self._merge_cost)

    def near_one(self) -> tuple["Scatter", jax.Array]:
        scale = scales.scale_of_largest(self.right)
        return self.with_factors([scales.times_twice(self.right, scale)]), scale

    def mass(self) -> jax.Array:
        lengths = vector_norms(self.right)
        return jnp.sum(jnp.broadcast_to(lengths, self.index.shape))

    # ------------------------------------------------------------------------------

    @property
    def has_squares(self) -> bool:
        return True

    @property
    def must_merge(self) -> bool:
        return has_many(self.pair_count)

    def merged(self) -> "Scatter":
        """One look-up of each index gets the sum of its vectors; others get zeros."""
        if not self.has_few_pairs:
            return _merged_by_lines(self)
        if self.right.shape[1] == 1 or not self._is_long:
            return _merged_by_pairs(self)
        return _merged_by_sorting(self)

    def squared(self) -> "Scatter":
        return self.with_factors([scales.square(self.right)])

    @property
    def has_few_pairs(self) -> bool:
        """Whether comparing all pairs of look-ups costs less than a number per line."""
        most = thresholds.current().pairs * self.index.shape[0] * self.length
        return not thresholds.exceeds(self.pairs_cost, most)

    @property
    def pairs_cost(self) -> int:
        """The cost, in multiplications, to compare all pairs of look-ups."""
        return self.index.shape[0] * self.pair_count**2 * _COMPARISON

    @property
    def _is_long(self) -> bool:
        """Whether sorting the look-ups costs less than comparing all pairs."""
        return thresholds.exceeds(self.pair_count, thresholds.current().compared)

    @property
    def _merge_cost(self) -> int:
        """The cost to find the look-ups that share an index."""
        if not self.must_merge:
            return 0
        if self.right.shape[1] == 1:
            return self.pairs_cost if self.has_few_pairs else prod(self.shape[:2])
        if not self.has_few_pairs:
            return prod(self.shape[:2]) + self.right.size
        return (0 if self._is_long else self.pairs_cost) + self.right.size

    # ------------------------------------------------------------------------------

    @property
    def adds_in_place(self) -> bool:
        return True

    def add_rows(
        self,
        onto: jax.Array | None,
        weights: jax.Array | None,
        axis: int,
        factor: float,
    ) -> jax.Array:
        right = self.right  # (B, N, T, n)
        if weights is not None:
            right = times_weights(weights, right, axis)
        block = jnp.zeros(self.shape, self.dtype) if onto is None else onto
        return add_lines(block, self.index, times(right.astype(block.dtype), factor))

    # ------------------------------------------------------------------------------

    @property
    def form(self) -> Any:
        if self.index.shape[-1] != self.right.shape[-2]:
            return None
        return Scatter, self.index.dtype, self.right.dtype, self.length

    def joined(self, others: Sequence["Scatter"]) -> "Scatter":
        terms = [self, *others]
        index = jnp.concatenate([x.index for x in terms], -1)
        right = jnp.concatenate([x._right_of_each for x in terms], -2)
        return Scatter(index, right, self.length)

    @property
    def _right_of_each(self) -> jax.Array:
        """A vector for each look-up, even if all look-ups share one."""
        *lead, _, n = self.right.shape
        return jnp.broadcast_to(self.right, (*lead, self.pair_count, n))


# ------------------------------------------------------------------------------------
# Lines of blocks


def add_lines(block: jax.Array, index: jax.Array, lines: jax.Array) -> jax.Array:
    """Add lines (B, ..., n) to the blocks (B, m, n) at the indices (B, ...)."""
    lines = jnp.broadcast_to(lines, (*index.shape, lines.shape[-1]))
    if block.shape[0] == 1:
        flat = lines.reshape(-1, lines.shape[-1])
        return block.at[0, index.reshape(-1)].add(flat, mode="drop")
    blocks = lax.broadcasted_iota(index.dtype, index.shape, 0)
    return block.at[blocks, index].add(lines, mode="drop")


def lines_at(block: jax.Array, index: jax.Array) -> jax.Array:
    """The lines of blocks (B, m, n) at the indices (B, T): shape (B, T, n)."""
    where = index[:, :, None]
    return jnp.take_along_axis(block, where, axis=1, mode="fill", fill_value=0)


def columns_at(left: jax.Array, index: jax.Array) -> jax.Array:
    """left[b, t, index[b, s]], shape (B, T, S)."""
    where = index[:, None, :]
    return jnp.take_along_axis(left, where, axis=2, mode="fill", fill_value=0)


# ------------------------------------------------------------------------------------
# Look-ups that share an index


def adds_one(term: Scatter) -> bool:
    """Whether a row adds the same vector at many indices."""
    return term.right.shape[1] == 1 and has_many(term.pair_count)


def same_index(x: Scatter, y: Scatter) -> jax.Array:
    """Whether look-ups t of x and s of y share a line: bool, (B, T, S)."""
    others = jnp.where(y.index < y.length, y.index, jnp.full_like(y.index, -1))
    return x.index[:, :, None] == others[:, None, :]


def equal_pairs(term: Scatter) -> jax.Array:
    """How many pairs of look-ups of a row share a line: real, (B,)."""
    dtype = jnp.finfo(term.dtype).dtype
    if term.has_few_pairs:
        return jnp.sum(same_index(term, term), axis=(1, 2), dtype=dtype)
    return jnp.sum(counts(term, dtype) ** 2, axis=(1, 2))


def counts(term: Scatter, dtype: Any) -> jax.Array:
    """How many look-ups go to each line: (B, m, 1)."""
    empty = jnp.zeros((*term.shape[:2], 1), dtype)
    return add_lines(empty, term.index, jnp.ones((1, 1, 1), dtype))


def _merged_by_pairs(term: Scatter) -> Scatter:
    """Merge look-ups that share an index, by comparing all pairs."""
    same = same_index(term, term)  # (B, T, T)
    if term.right.shape[1] == 1:
        t, s = (lax.broadcasted_iota(jnp.int32, same.shape, axis) for axis in (1, 2))
        is_first = jnp.logical_not(jnp.any(same & (s < t), axis=2))  # (B, T)
        count = jnp.sum(same, axis=2, dtype=term.dtype)
        right = count[..., None] * term.right.astype(term.dtype)
        right = jnp.where(is_first[..., None], right, jnp.zeros((), term.dtype))
        return term.with_factors([right])
    first = lax.argmax(same, 2, jnp.int32)  # (B, T); a line out of range is zero
    return term.with_factors([_added_at(first, term)])


def _merged_by_sorting(term: Scatter) -> Scatter:
    """Merge look-ups that share an index, which stand side by side in sorted order."""
    own = lax.broadcasted_iota(jnp.int32, term.index.shape, 1)
    index, order = lax.sort((term.index, own), dimension=1, num_keys=1)
    begins = jnp.pad(index[:, 1:] != index[:, :-1], ((0, 0), (1, 0)))
    where = order[:, :, None]
    lines = jnp.take_along_axis(term._right_of_each, where, axis=1)
    runs = Scatter(jnp.cumsum(begins, axis=1, dtype=jnp.int32), lines, term.pair_count)
    # Run number r gets the sum of its lines, and the place of its first look-up.
    starts = lax.cummax(jnp.where(begins, own, jnp.zeros_like(own)), axis=1)
    at = jnp.take_along_axis(order, starts, axis=1)
    total = jnp.take_along_axis(runs.materialize(), runs.index[:, :, None], axis=1)
    is_start = starts == own
    total = jnp.where(is_start[..., None], total, jnp.zeros((), total.dtype))
    return term.with_factors([_added_at(at, replace(term, right=total))])


def _added_at(place: jax.Array, term: Scatter) -> jax.Array:
    """The vectors of a term, each added to the one at its place: (B, T, n)."""
    return Scatter(place, term.right, term.pair_count).materialize()


def _merged_by_lines(term: Scatter) -> Scatter:
    """Merge look-ups that share an index, by an array that picks one for each line."""
    count = term.pair_count
    blocks, own = (lax.broadcasted_iota(jnp.int32, term.index.shape, i) for i in (0, 1))
    chosen = jnp.zeros(term.shape[:2], own.dtype)  # (B, m)
    chosen = chosen.at[blocks, term.index].set(own, mode="drop")
    index = chosen.at[blocks, term.index].get(mode="fill", fill_value=count)
    return term.with_factors([Scatter(index, term.right, count).materialize()])
