"""Products of arrays, accumulated in float32 or wider, and quick to trace."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.algebra import common_dtype


def dot(
    spec: str, x: jax.Array, y: jax.Array, *, precision: Any = lax.Precision.HIGHEST
) -> jax.Array:
    """An einsum of two arrays; axes that only the operands have are summed over."""
    dtype = common_dtype(x.dtype, y.dtype)
    if x.dtype != y.dtype:  # equal narrow dtypes need no cast: products are exact
        x, y = (lax.convert_element_type(operand, dtype) for operand in (x, y))
    operands, result = spec.split("->")
    left, right = operands.split(",")
    batch = [c for c in left if c in right and c in result]
    summed = [c for c in left if c in right and c not in result]

    def places(letters: list[str]) -> tuple[list[int], list[int]]:
        return [left.index(c) for c in letters], [right.index(c) for c in letters]

    numbers = places(summed), places(batch)
    product = lax.dot_general(
        x, y, numbers, precision=precision, preferred_element_type=dtype
    )
    found = [*batch, *(c for c in left + right if c not in batch and c not in summed)]
    order = [found.index(c) for c in result]
    return product if order == sorted(order) else lax.transpose(product, order)


def times_rows(x: jax.Array, numbers: jax.Array, first: int) -> jax.Array:
    """An array times numbers along its axes from `first` on, of the same dtype."""
    return lax.mul(x, _of_rows(numbers, x, first))


def times_rows_twice(x: jax.Array, scale: jax.Array, first: int) -> jax.Array:
    """An array multiplied twice by numbers whose squares may overflow or underflow."""
    factors = _of_rows(lax.convert_element_type(scale, x.dtype), x, first)
    return lax.mul(lax.mul(x, factors), factors)


def times_counts(counts: jax.Array, products: jax.Array) -> jax.Array:
    """Products times counts: a count of 0 gives 0, even if the product is NaN."""
    zeros = jnp.zeros_like(products)
    return jnp.where(counts == 0, zeros, counts.astype(products.dtype) * products)


def _of_rows(numbers: jax.Array, x: jax.Array, first: int) -> jax.Array:
    return lax.broadcast_in_dim(numbers, x.shape, range(first, first + numbers.ndim))
