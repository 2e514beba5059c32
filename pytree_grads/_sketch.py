"""Random projections of rows whose matrix is made as it is used."""

from math import prod

import jax
import jax.numpy as jnp

from ._factored import _costs
from ._factored._leaves import Leaf
from ._factored._matrix import Matrix


def project(matrix: Matrix, key: jax.Array, dim: int) -> jax.Array:
    """Rows times a matrix of ±1/√dim: shape (*rows, dim)."""
    entries = sum(prod(leaf.shape) for leaf in matrix.leaves)
    at_once = max(1, _costs.ENTRIES_AT_ONCE // max(1, entries))
    scale = jnp.asarray(dim, matrix.dtype) ** -0.5

    def column(j: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, j)
        return matrix.apply(
            [_signs(jax.random.fold_in(own, i), leaf) for i, leaf in enumerate(matrix.leaves)]
        )

    if not prod(matrix.leaves[0].rows):
        return jnp.zeros((*matrix.leaves[0].rows, dim), matrix.dtype)
    columns = jax.lax.map(column, jnp.arange(dim, dtype=jnp.uint32), batch_size=min(at_once, dim))
    return jnp.moveaxis(columns, 0, -1) * scale


def _signs(key: jax.Array, leaf: Leaf) -> jax.Array:
    """Entries ±1 for a leaf; ±1±i for a complex one, so that imaginary parts count as well."""
    if not jnp.issubdtype(leaf.carried, jnp.complexfloating):
        return jax.random.rademacher(key, leaf.shape, leaf.carried)
    return jax.lax.complex(*jax.random.rademacher(key, (2, *leaf.shape), leaf.real))
