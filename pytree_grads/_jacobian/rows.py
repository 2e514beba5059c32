"""The rows of J: kept as factors, or recomputed for each product."""

from typing import TypeAlias

import jax
from jax.sharding import PartitionSpec

from .._engine.matrix import Matrix
from .._jax.sharding import layout, without
from .kept import Kept
from .streamed import Streamed

Rows: TypeAlias = Kept | Streamed


def stacked(rows: Rows) -> tuple[jax.Array, ...]:
    """The rows as arrays, one for each leaf."""
    origin = rows.origin
    names = origin.source.batch.mesh_axes
    lead = (names, *[None] * (len(origin.shape) - 1))
    layouts = [without(layout(x), names) for x in origin.primals]
    return rows.map(_stacked, out=tuple(PartitionSpec(*lead, *x) for x in layouts))


def _stacked(matrix: Matrix) -> tuple[jax.Array, ...]:
    return tuple(matrix.rows())
