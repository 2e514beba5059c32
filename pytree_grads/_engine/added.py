"""The sum of two matrices of rows: the summands of both, row by row."""

from dataclasses import replace

import jax

from .._trees.algebra import carried_dtype
from .absorbed import absorbed
from .leaf import Leaf, Summand, as_arrays
from .matrix import Matrix
from .products.sums import rows as rows_of
from .terms.dense import Dense
from .weighing import times


def added(one: Matrix, other: Matrix) -> tuple[Leaf, ...]:
    """The leaves of the sum; weights of rows become part of the factors."""
    pairs = zip(_unweighted(one), _unweighted(other), strict=True)
    return tuple(
        replace(x, summands=_joined([*x.summands, *y.summands])) for x, y in pairs
    )


def _unweighted(matrix: Matrix) -> list[Leaf]:
    """The leaves of a matrix, with weights and diagonal in their terms."""
    rows = matrix.selected()
    found = []
    for i, leaf in enumerate(rows.leaves):
        entries = rows.entries(i)
        if entries is not None:  # a diagonal that no factor can hold
            stacked = rows_of(leaf, carried=True)
            stacked *= entries.reshape(*[1] * len(leaf.rows), *entries.shape)
            leaf = as_arrays(leaf, stacked, "a diagonal of its shape")
        found.append(absorbed(leaf, rows.weight(i)))
    return found


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
