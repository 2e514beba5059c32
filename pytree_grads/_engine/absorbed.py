"""Rows whose weights become part of their factors."""

from dataclasses import replace

import jax
from jax import lax

from .._trees.algebra import carried_dtype
from .einsum import times_rows
from .leaf import Leaf, Summand, weighted


def absorbed(leaf: Leaf, weights: jax.Array | None) -> Leaf:
    """The weighted rows: the weights become part of the factors."""
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
