"""Norms that are products of the norms of vectors, for many leaves at once.

A row of a dense layer is one outer product, so its norm is the product of two norms.
Small vectors of one form are stacked over leaves, which takes less time to compile.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._jax import xla
from ..._trees.algebra import carried_dtype
from ..einsum import times_rows_twice
from ..leaf import Leaf
from ..scaling import root_of
from ..weighing import squeezed
from .scaled_norms import Norms


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["value"],
    meta_fields=["first", "row_axes"],
)
@dataclass(frozen=True)
class Vectors:
    """A factor of all rows as vectors: `row_axes` row axes from `first` on, and one."""

    value: jax.Array
    first: int
    row_axes: int

    @classmethod
    def of(cls, x: jax.Array, axis: int, row_axes: int) -> "Vectors":
        x, first = squeezed(x, axis, row_axes)
        rows = x.shape[: first + row_axes]
        if x.ndim > len(rows):
            x = lax.reshape(x, (*rows, prod(x.shape[len(rows) :])))
        return cls(x.astype(carried_dtype(x.dtype)), first, row_axes)

    @property
    def form(self) -> Any:
        """A key that vectors share if they can be stacked."""
        return self.value.shape, self.value.dtype, self.first, self.row_axes

    @property
    def plain_square(self) -> jax.Array:
        """The sum of squares of each row, which may overflow."""
        rows = range(self.first, self.first + self.row_axes)
        others = [i for i in range(self.value.ndim) if i not in rows]
        return xla.sum_of_squares(self.value, others)

    @cached_property
    def square_and_scale(self) -> tuple[jax.Array, jax.Array]:
        """The sum of squares of each row, multiplied twice by a scale; the scale."""
        return _square_and_scale(self)


@jax.jit
def _square_and_scale(vectors: Vectors) -> tuple[jax.Array, jax.Array]:
    """Scales come from plain sums of squares: largest entries would cost more."""
    scale = root_of(lax.stop_gradient(vectors.plain_square))
    value = times_rows_twice(vectors.value, scale, vectors.first)
    return replace(vectors, value=value).plain_square, scale


def vectors_of(leaf: Leaf) -> list[Vectors]:
    """The factors of the only summand of a leaf."""
    (summand,) = leaf.summands
    pairs = zip(summand.term.factors, summand.factor_row_axes, strict=True)
    return [Vectors.of(x, summand.axis, row_axes) for x, row_axes in pairs]


def norms_of_vectors(
    leaves: Sequence[Leaf], vectors: Sequence[Sequence[Vectors]]
) -> Norms:
    """The norms of the rows of leaves whose vectors have one form."""

    def aligned(x: jax.Array) -> jax.Array:
        return _for_each_row(column(x) if len(leaves) == 1 else x, leaves[0])

    alike = [_stacked(x) for x in zip(*vectors, strict=True)]
    found = [x.square_and_scale for x in alike]
    squares = (lax.convert_element_type(x, leaves[0].real) for x, _ in found)
    return Norms(
        squares=tuple(map(aligned, squares)),
        scales=tuple(aligned(scale) for _, scale in found),
        factors=tuple(abs(leaf.summands[0].factor) for leaf in leaves),
        errors=((0.0, 0.0),) * len(leaves),
    )


def column(x: jax.Array) -> jax.Array:
    """Numbers of one leaf, with an axis of leaves added at the end."""
    return lax.expand_dims(x, (x.ndim,))


def _stacked(vectors: Sequence[Vectors]) -> Vectors:
    """Vectors of one form as one array, with an axis of leaves after the row axes."""
    first, row_axes = vectors[0].first, vectors[0].row_axes
    if len(vectors) == 1:
        return vectors[0]
    value = jnp.stack([x.value for x in vectors], first + row_axes)
    return Vectors(value, first, row_axes + 1)


def _for_each_row(x: jax.Array, leaf: Leaf) -> jax.Array:
    """Broadcast numbers for examples, or for all rows, to rows; leaves come last."""
    axes = (*range(x.ndim - 1), len(leaf.rows))
    return lax.broadcast_in_dim(x, (*leaf.rows, x.shape[-1]), axes)
