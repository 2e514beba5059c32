"""Squared norms of factors, with scales that prevent overflow and underflow.

A factor is multiplied twice by a power of two before it is squared. Once would not be
enough, since the inverse of a large float is not a normal number. Derivatives treat
scales as constants. `scaling` derives them from bits, and says which norms need them.
"""

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import carried_dtype, common_dtype
from ..einsum import times_rows_twice
from ..scaling import inverse, power, root_of
from .protocol import Squared


def widened(x: jax.Array) -> jax.Array:
    """An array in its accumulation dtype."""
    return lax.convert_element_type(x, carried_dtype(x.dtype))


def times_twice(x: jax.Array, scale: jax.Array) -> jax.Array:
    """An array times the square of a scale, or of scales along its first axes."""
    return times_rows_twice(widened(x), scale, 0)


def square(x: jax.Array) -> jax.Array:
    """|entry|**2 for each entry, in the accumulation dtype."""
    return jnp.abs(x.astype(carried_dtype(x.dtype))) ** 2


def squared_norm(x: jax.Array) -> Squared:
    """The squared norm of an array."""
    scale = rough_scale(x)
    return Squared(jnp.sum(jnp.abs(times_twice(x, scale)) ** 2), None, scale)


def rough_scale(x: jax.Array) -> jax.Array:
    """A scale from the plain sum of squares, for a norm that is not combined."""
    return root_of(lax.stop_gradient(jnp.sum(jnp.abs(widened(x)) ** 2)))


def scale_of_largest(x: jax.Array) -> jax.Array:
    """A scale from the largest entry, which brings even the smallest rows near one."""
    x = widened(x)
    return power(largest(lax.reshape(x, (x.size,))))


@jax.jit
def largest(x: jax.Array) -> jax.Array:
    """The largest absolute value over the last axis, in the accumulation dtype."""
    dtype = jnp.finfo(carried_dtype(x.dtype)).dtype
    x = lax.convert_element_type(lax.abs(lax.stop_gradient(x)), dtype)
    return lax.reduce(x, jnp.zeros((), dtype), lax.max, (x.ndim - 1,))


@jax.jit
def pair_scales(left: jax.Array, right: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Scales for the vectors of pairs, and the resulting scale of the row.

    With them, no product of a pair overflows or underflows, even if one vector is large
    and the other is small. The left vector is brought near one. The right one keeps the
    size of the pair relative to the largest pair.

    Args:
      left: (B, T), the largest entries of the left vectors.
      right: (B, T), the largest entries of the right vectors.
    """
    dtype = common_dtype(left.dtype, right.dtype)
    sizes = [lax.convert_element_type(x, dtype) for x in (left, right)]
    limits = jnp.finfo(dtype)
    least, most = (
        lax.full((), float(x), dtype) for x in (limits.tiny, 1 / limits.tiny)
    )
    left, right = map(power, sizes)
    is_zero = lax.eq(lax.min(*sizes), lax.full_like(left, 0))
    # The minimum reads a separate copy: otherwise XLA would keep one more array.
    products = lax.max(lax.mul(left, right), lax.full_like(left, least))
    products = lax.select(is_zero, lax.full_like(left, most), products)
    scale = lax.reduce(products, most, lax.min, range(products.ndim))
    # A scale is above the range only if a pair is zero, and below it only if a pair is
    # not significant.
    of_row = lax.broadcast(scale, left.shape)
    return [left, lax.min(lax.mul(of_row, inverse(left)), right)], scale


def combine(parts: Squared) -> Squared:
    """Combine the squared norms of parts of a row that were scaled separately.

    Args:
      parts: the squared norms, in arrays with one axis of parts.
    """
    scale = jnp.min(parts.scale)
    shares = scale / parts.scale

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(times_rows_twice(times_rows_twice(x, shares, 0), shares, 0))

    absolute = None if parts.absolute is None else total(parts.absolute)
    return Squared(total(parts.square), absolute, scale)
