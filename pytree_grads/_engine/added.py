"""The sum of two matrices of rows: the summands of both, row by row."""

from dataclasses import replace

import jax
from jax import lax

from .._trees.algebra import carried_dtype
from .einsum import times_rows
from .leaf import Leaf, Summand, weighted
from .matrix import Matrix
from .terms.dense import Dense
from .weighing import times


def added(one: Matrix, other: Matrix) -> tuple[Leaf, ...]:
    """The leaves of the sum; weights of rows become part of the factors."""
    pairs = zip(_unweighted(one), _unweighted(other), strict=True)
    return tuple(
        replace(x, summands=_joined([*x.summands, *y.summands])) for x, y in pairs
    )


def _unweighted(matrix: Matrix) -> list[Leaf]:
    """The same rows as leaves alone."""
    rows = matrix.selected()
    return [_weighed(leaf, rows.weight(i)) for i, leaf in enumerate(rows.leaves)]


def _weighed(leaf: Leaf, weights: jax.Array | None) -> Leaf:
    leaf, left = weighted(leaf, weights)
    if left is None:
        return leaf
    # Rows share factors: one factor of each summand gets all axes of rows.
    return replace(leaf, summands=tuple(_times(x, left) for x in leaf.summands))


def _times(summand: Summand, weights: jax.Array) -> Summand:
    """The summand of weighted rows, for weights (N,) or (N, K)."""
    arrays, treedef = jax.tree.flatten(summand.term)
    row_axes, axis = list(summand.row_axes), summand.axis
    i = max(summand.factor_positions, key=lambda i: row_axes[i])
    x, count = arrays[i], row_axes[i]
    shape = (*x.shape[:axis], *weights.shape, *x.shape[axis + count :])
    new = range(axis + count, axis + weights.ndim)
    own = [k for k in range(len(shape)) if k not in new]
    x = lax.broadcast_in_dim(x.astype(carried_dtype(x.dtype)), shape, own)
    arrays[i] = times_rows(x, weights.astype(x.dtype), axis)
    row_axes[i] = weights.ndim
    term = jax.tree.unflatten(treedef, arrays)
    return replace(summand, term=term, row_axes=tuple(row_axes))


def _joined(summands: list[Summand]) -> tuple[Summand, ...]:
    """The summands, of which arrays behind one view are added up."""
    found: dict[object, Summand] = {}
    for i, x in enumerate(summands):
        key = (x.shape, x.axis, x.view, x.row_axes) if x.term.is_dense else i
        if key in found:
            total = _value(found[key]) + _value(x)
            x = replace(x, term=Dense(total), factor=1.0)
        found[key] = x
    return tuple(found.values())


def _value(summand: Summand) -> jax.Array:
    (x,) = summand.term.factors
    return times(x.astype(carried_dtype(x.dtype)), summand.factor)
