"""Random projections of rows whose matrix is made as it is used."""

import operator

import jax
import jax.numpy as jnp

from ._factored._leaves import ENTRIES_AT_ONCE
from ._factored._matrix import Matrix


def checked_dim(dim: int) -> int:
    """`dim` as a positive int."""
    try:
        number = operator.index(dim)
    except TypeError:
        raise TypeError(f"argument dim must be an int (it is static), got {dim!r}") from None
    if number < 1:
        raise ValueError(f"argument dim must be at least 1, got {number}")
    return number


def project(matrix: Matrix, key: jax.Array, dim: int) -> jax.Array:
    """Rows times a matrix of ±1/√dim: shape (*rows, dim)."""
    at_once = max(1, ENTRIES_AT_ONCE // max(1, sum(_size(leaf.shape) for leaf in matrix.leaves)))
    scale = jnp.asarray(dim, matrix.dtype) ** -0.5

    def column(j: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, j)
        signs = [
            jax.random.rademacher(jax.random.fold_in(own, i), leaf.shape, leaf.real)
            for i, leaf in enumerate(matrix.leaves)
        ]
        return matrix.apply(
            [s.astype(leaf.carried) for s, leaf in zip(signs, matrix.leaves, strict=True)]
        )

    columns = jax.lax.map(column, jnp.arange(dim, dtype=jnp.uint32), batch_size=min(at_once, dim))
    return jnp.moveaxis(columns, 0, -1) * scale


def _size(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size
