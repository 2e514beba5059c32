"""Arrays with a row axis: multiply them by weights, and sum over rows."""

import jax
import jax.numpy as jnp
from jax import lax

from .._jax import xla
from .._trees.algebra import carried_dtype
from . import thresholds
from .einsum import times_rows


def times(x: jax.Array, factor: float) -> jax.Array:
    """An array times a number that is known at trace time; 1 costs nothing."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def squeezed(x: jax.Array, axis: int, row_axes: int = 1) -> tuple[jax.Array, int]:
    """Drop the axes of size 1, except row axes; return also where these begin.

    A computation that a weight and its bias have in common then has the same form for
    both, and XLA does it once.
    """
    rows = range(axis, axis + row_axes)
    idle = [i for i, n in enumerate(x.shape) if n == 1 and i not in rows]
    return lax.squeeze(x, idle), axis - sum(i < axis for i in idle)


def times_weights(weights: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """An array times weights (N,) along one axis, in the accumulation dtype."""
    dtype = carried_dtype(x.dtype)
    y, first = squeezed(lax.convert_element_type(x, dtype), axis)
    product = times_rows(y, lax.convert_element_type(weights, dtype), first)
    return lax.reshape(product, x.shape)


def weighted_total(weights: jax.Array | None, x: jax.Array, *, axis: int) -> jax.Array:
    """The weighted sum over one axis, in the accumulation dtype; None means ones."""
    x = lax.convert_element_type(x, carried_dtype(x.dtype))
    y, first = squeezed(x, axis)
    if y.ndim - first <= 2:
        if weights is None:
            return lax.reduce_sum(x, (axis,))
        if not thresholds.exceeds(x.size, thresholds.current().large_product - 1):
            return lax.reduce_sum(times_weights(weights, x, axis), (axis,))
    if weights is None:
        weights = jnp.ones(x.shape[axis], x.dtype)
    total = xla.total_by_product(weights.astype(x.dtype), y, first)
    return lax.reshape(total, x.shape[:axis] + x.shape[axis + 1 :])
