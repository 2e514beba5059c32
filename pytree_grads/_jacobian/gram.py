"""Inner products of the rows of two Jacobians, each kept or recomputed."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from .._engine.matrix import Matrix
from .._jax.sharding import in_auto
from .compiled import compiled_once
from .rows import Rows


@compiled_once()
def gram(mine: Rows, theirs: Rows | None = None) -> jax.Array:
    """Shape (*rows, *their rows); without others, of the rows with themselves."""
    others = mine if theirs is None else theirs
    depth, width = len(mine.origin.shape), len(others.origin.shape)
    theirs_first = [*range(depth, depth + width), *range(depth)]
    out = PartitionSpec(*[None] * width, *mine.origin.layout)

    def products(theirs: Matrix, mine: Matrix) -> jax.Array:
        return mine.gram(theirs).transpose(theirs_first)

    def against(mine: Matrix) -> jax.Array:
        found = others.each(lambda theirs: in_auto(products, out)(theirs, mine))
        return found.transpose(np.argsort(theirs_first))

    return mine.each(against)
