"""Scales: powers of two from the bits of floats, and roots with safe derivatives.

A squared norm overflows in float32 if a row's norm exceeds 1e19, and underflows below
1e-19, although the norm itself is representable up to 1e38 and down to 1e-38. That
is what scales are worth: norms of rows beyond 1e±19. A scale is a power of two, so it
adds no rounding. A number is multiplied by it twice, since the inverse of a large
float is not a normal number.

How a power of two comes from bits. A float x > 0 with exponent e and mantissa 1 + f
has, read as an integer, the bits (e + bias + f) * 2**nmant. That is about

    bits(x) = (log2(x) + bias) * 2**nmant,    bias = maxexp - 1

so the bits of x**(-p) are about (1 + p) * bias * 2**nmant - p * bits(x). For p = 1/2
these are 3/2 of the bits of one, less half of the bits of x; for p = 1/4, 5/4 of
them, less a quarter. Keeping the exponent alone rounds the result down to a power of
two. A start that is up to one exponent higher sets which multiples of the next power
are rounded down.

This is written in `lax`: there is much of it, and `jnp` takes several times as long to
trace. What is called for every factor or leaf is a `jit` of its own, traced and
lowered once for a shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.jit
def power(size: jax.Array) -> jax.Array:
    """About 1 / the root of a positive normal number, or of zero: a power of two.

    Multiplied by it twice, the number is from 1 up to 4, or zero. The operations are
    cheap enough to be computed again wherever the scale is used.
    """
    limits = jnp.finfo(size.dtype)
    return _power_of_two(size, 1, ((3 * limits.maxexp - 1) << (limits.nmant - 1)) - 1)


@jax.jit
def root_of(square: jax.Array) -> jax.Array:
    """About 1 / the root of a norm, from its square: a power of two.

    Multiplied by it twice, the norm is from 1/2 to 2. A square that underflowed counts
    as the smallest number: then the square of every entry that is a normal number is
    in range. A square that overflowed has a scale of its own: the norm may overflow as
    well, since it adds up many entries, and the other factor may still make the norm of
    the row finite.
    """
    limits = jnp.finfo(square.dtype)
    scale = _power_of_two(square, 2, (5 * limits.maxexp - 3) << (limits.nmant - 2))
    beyond = 2.0 ** -(limits.maxexp // 4 + 10)
    return lax.select(lax.is_finite(square), scale, lax.full_like(scale, beyond))


def inverse(power: jax.Array) -> jax.Array:
    """The inverse of a normal power of two, exactly and without a division."""
    limits = jnp.finfo(power.dtype)
    bits = lax.bitcast_convert_type(power, f"int{limits.bits}")
    twice_one = lax.full_like(bits, (2 * limits.maxexp - 2) << limits.nmant)
    return lax.bitcast_convert_type(lax.sub(twice_one, bits), power.dtype)


def _power_of_two(x: jax.Array, halvings: int, start: int) -> jax.Array:
    """The power of two at or below the float with bits `start - (bits(x) >> halvings)`.

    The module's docstring derives which powers of x these are.
    """
    bits = lax.bitcast_convert_type(x, f"int{jnp.finfo(x.dtype).bits}")
    halved = lax.shift_right_arithmetic(bits, lax.full_like(bits, halvings))
    inverse = lax.sub(lax.full_like(bits, start), halved)
    exponent = np.array(np.inf, x.dtype).view(bits.dtype)  # the bits that hold it
    rounded = lax.bitwise_and(inverse, lax.full_like(bits, exponent))
    return lax.bitcast_convert_type(rounded, x.dtype)


def not_too_small(square: jax.Array, rounding: jax.Array) -> jax.Array:
    """A squared norm plus its rounding error, if that is significant.

    It is if it exceeds a thousandth of the square; see `Norms`.
    """
    is_small = lax.gt(rounding, lax.mul(square, lax.full_like(square, 1e-3)))
    more = lax.add(lax.max(square, lax.full_like(square, 0)), rounding)
    return lax.select(is_small, more, square)


@jax.jit
def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of x; 0, with derivative 0, if x is not positive; keeps NaN."""
    zeros = lax.full_like(x, 0)
    idle = lax.le(x, zeros)
    root = lax.sqrt(lax.select(idle, lax.full_like(x, 1), x))
    return lax.select(idle, zeros, root)
