"""Sums of rows and of their squares, the product J v, and the rows, for one leaf."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import thresholds
from ..leaf import Leaf, Summand, over_rows, row, zeros_of
from ..terms.protocol import Term
from ..views import apply, only_reshapes, transposed
from ..weighing import times, weighted_total
from .tiles import over_blocks


def rows(leaf: Leaf, *, carried: bool = False) -> jax.Array:
    """All rows, stacked: (N, *leaf) or (N, K, *leaf).

    They have the leaf's dtype, or its accumulation dtype if `carried`.
    """
    dtype = leaf.carried if carried else leaf.dtype
    return over_rows(lambda terms: row(leaf, terms).astype(dtype), leaf)


def applied(leaf: Leaf, v: jax.Array) -> jax.Array:
    """The directional derivatives J v: real, (N,) or (N, K)."""
    v = v.astype(leaf.carried)
    pulled = [
        transposed(x.view, x.shape, v.astype(x.term.dtype)) for x in leaf.summands
    ]

    def one(terms: Sequence[Term]) -> jax.Array:
        total = jnp.zeros((), leaf.real)
        for summand, term, w in zip(leaf.summands, terms, pulled, strict=True):
            product = jnp.real(term.apply(w)).astype(leaf.real)
            total += times(product, summand.factor)
        return total

    return over_rows(one, leaf)


# ------------------------------------------------------------------------------------
# Sums of squares


def square_sum(leaf: Leaf, weights: jax.Array | None) -> jax.Array:
    """The sum over rows of weight times |entry|**2; real, in the accumulation dtype."""
    if not prod(leaf.shape):
        return jnp.zeros(leaf.shape, leaf.real)
    if _has_squares(leaf):
        squared = _squared(leaf)
        squares = replace(leaf, summands=(squared,), dtype=leaf.real)
        return weighted_sum(squares, weights)

    def add(
        total: jax.Array, block: Leaf, start: jax.Array, is_new: jax.Array
    ) -> jax.Array:
        squares = jnp.abs(rows(block, carried=True)) ** 2
        if leaf.size and leaf.size % block.size:
            mask = is_new.reshape(-1, *[1] * (squares.ndim - 1))
            squares = jnp.where(mask, squares, jnp.zeros_like(squares))
        own = weights
        if weights is not None:
            own = lax.dynamic_slice_in_dim(weights, start, block.size).reshape(-1)
        return total + weighted_total(own, squares.reshape(-1, *leaf.shape), axis=0)

    init = zeros_of(leaf.shape, leaf.real, leaf)
    return over_blocks(add, init, leaf, thresholds.current().squares_at_once)


def _has_squares(leaf: Leaf) -> bool:
    """Whether the squares of all rows are one term that takes little memory."""
    if len(leaf.summands) != 1:
        return False
    (summand,) = leaf.summands
    entries = prod(leaf.rows) * prod(leaf.shape)
    are_many = thresholds.exceeds(entries, thresholds.current().squares_at_once)
    copies_rows = summand.term.is_dense and not summand.is_shared
    return summand.of_one_row.has_squares and not (copies_rows and are_many)


def _squared(leaf: Leaf) -> Summand:
    """The only summand of a leaf, with the squares of its entries."""
    (summand,) = leaf.summands
    term, row_axes = summand.term, summand.row_axes
    if summand.of_one_row.must_merge:
        depth = len(leaf.rows)
        merged = over_rows(lambda terms: terms[0].merged().factors, leaf)
        before = range(summand.axis, summand.axis + depth)
        term = term.with_factors(
            [jnp.moveaxis(x, range(depth), before) for x in merged]
        )
        own = set(summand.factor_positions)
        row_axes = tuple(depth if i in own else n for i, n in enumerate(row_axes))
    return replace(
        summand, term=term.squared(), row_axes=row_axes, factor=summand.factor**2
    )


# ------------------------------------------------------------------------------------
# Weighted sums


def weighted_sum(leaf: Leaf, weights: jax.Array | None) -> jax.Array:
    """The sum of weight times row, in the accumulation dtype; None means ones."""
    # Summands that share a view, but for reshapes, are added up before it. Those that
    # add in place come last.
    totals: dict[Any, jax.Array] = {}
    for summand in sorted(leaf.summands, key=lambda x: x.term.adds_in_place):
        view, shape = summand.view, summand.shape
        if only_reshapes(view):
            view, shape = (), leaf.shape
        key = view, shape, summand.term.dtype
        onto = totals.get(key)
        if onto is not None:
            onto = lax.reshape(onto, summand.shape)
        totals[key] = lax.reshape(_added(summand, leaf, weights, onto), shape)
    parts = [
        lax.convert_element_type(apply(view, total), leaf.carried)
        for (view, *_), total in totals.items()
    ]
    return reduce(lax.add, parts) if parts else jnp.zeros(leaf.shape, leaf.carried)


@dataclass(frozen=True)
class _Rows:
    """The arrays of a term with at most one row axis, and the weights of the rows."""

    arrays: list[jax.Array]
    differs: list[bool]  # whether an array has a row axis; others are shared
    coefficients: list[int]  # arrays that are shared by construction
    weights: jax.Array | None  # (size,)
    axis: int  # of rows
    size: int  # how many rows


def _added(
    summand: Summand, leaf: Leaf, weights: jax.Array | None, onto: jax.Array | None
) -> jax.Array:
    """`onto` plus the weighted sum of the rows of a summand, before its view."""
    if summand.is_total:
        assert weights is None
        total = times(summand.term.materialize(), summand.factor)
        return total if onto is None else onto + total
    treedef = jax.tree.structure(summand.term)
    found = _with_one_axis(summand, leaf, weights)
    own = [i for i, differs in enumerate(found.differs) if differs]
    may_differ = [i for i in range(len(found.arrays)) if i not in found.coefficients]
    is_linear = len(own) <= 1 and set(own) <= set(summand.factor_positions)
    if not is_linear and own != may_differ:
        found = _broadcast(found)
        own = may_differ
    if own == may_differ:
        term = jax.tree.unflatten(treedef, found.arrays)
        return term.add_rows(onto, found.weights, found.axis, summand.factor)
    arrays = list(found.arrays)
    if own:  # the row is linear in the only factor that differs: sum that factor
        (i,) = own
        arrays[i] = weighted_total(found.weights, arrays[i], axis=found.axis)
    total = jax.tree.unflatten(treedef, arrays).materialize()
    if not own:
        count = found.size if found.weights is None else jnp.sum(found.weights)
        total = total * jnp.asarray(count, total.dtype)
    total = times(total, summand.factor)
    return total if onto is None else onto + total


def _with_one_axis(summand: Summand, leaf: Leaf, weights: jax.Array | None) -> _Rows:
    """The arrays of a summand, with N and K reduced to one row axis."""
    arrays, axis, n = jax.tree.leaves(summand.term), summand.axis, leaf.size
    differs = [count > 0 for count in summand.row_axes]
    coefficients = summand.coefficient_positions
    if leaf.outputs is None:
        return _Rows(arrays, differs, coefficients, weights, axis, n)
    k = leaf.outputs
    both = [i for i, count in enumerate(summand.row_axes) if count == 2]
    if not both:  # all rows of an example are the same
        if weights is None:
            weights = jnp.full((n,), k, leaf.real)
        else:
            weights = jnp.sum(weights, axis=1)
        return _Rows(arrays, differs, coefficients, weights, axis, n)
    if len(both) == 1 < len(arrays) and both[0] in summand.factor_positions:
        # A row is linear in the only factor that has outputs: sum over these first.
        (i,) = both
        fold = jax.vmap(partial(weighted_total, axis=axis), (0, axis), axis)
        weights = jnp.ones((n, k), leaf.real) if weights is None else weights
        arrays[i] = fold(weights, arrays[i])
        return _Rows(arrays, differs, coefficients, None, axis, n)
    flat = [
        _flat_rows(x, c, axis, n, k)
        for x, c in zip(arrays, summand.row_axes, strict=True)
    ]
    weights = None if weights is None else weights.reshape(n * k)
    return _Rows(flat, differs, coefficients, weights, axis, n * k)


def _flat_rows(x: jax.Array, row_axes: int, axis: int, n: int, k: int) -> jax.Array:
    """An array with one axis of N*K rows, if it has row axes."""
    if not row_axes:
        return x
    if row_axes == 1:
        return jnp.repeat(x, k, axis, total_repeat_length=n * k)
    return x.reshape(*x.shape[:axis], n * k, *x.shape[axis + 2 :])


def _broadcast(rows: _Rows) -> _Rows:
    """Give every array a row axis."""

    def wide(x: jax.Array) -> jax.Array:
        x = jnp.expand_dims(x, rows.axis)
        shape = (*x.shape[: rows.axis], rows.size, *x.shape[rows.axis + 1 :])
        return jnp.broadcast_to(x, shape)

    narrow = [
        not differs and i not in rows.coefficients
        for i, differs in enumerate(rows.differs)
    ]
    arrays = [wide(x) if n else x for x, n in zip(rows.arrays, narrow, strict=True)]
    differs = [i not in rows.coefficients for i in range(len(arrays))]
    return replace(rows, arrays=arrays, differs=differs)
