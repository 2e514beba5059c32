"""Inner products of the rows of two Jacobians, each kept or recomputed."""

import jax
import numpy as np
from jax.sharding import PartitionSpec

from .._engine.matrix import Matrix
from .._jax.sharding import in_auto
from .compiled import compiled_once
from .groups import Members
from .rows import Rows


@compiled_once("members", "trace")
def gram(
    mine: Rows, theirs: Rows | None = None, *, members: Members, trace: bool
) -> list[jax.Array]:
    """Shape (*rows, *their rows), or (N, N′) with a trace, for each group of leaves.

    Without others, the products are of the rows with themselves.
    """
    others = mine if theirs is None else theirs
    depth, width = len(mine.origin.shape), len(others.origin.shape)
    if trace:
        depth = width = 1
    theirs_first = [*range(depth, depth + width), *range(depth)]
    out = PartitionSpec(*[None] * width, *mine.origin.layout)

    def products(theirs: Matrix, mine: Matrix) -> list[jax.Array]:
        found = mine.gram(theirs, members, trace=trace)
        return [x.transpose(theirs_first) for x in found]

    def against(mine: Matrix) -> list[jax.Array]:
        found = others.each(lambda theirs: in_auto(products, out)(theirs, mine))
        return [x.transpose(np.argsort(theirs_first)) for x in found]

    return mine.each(against)
