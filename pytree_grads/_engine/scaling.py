"""Scales: powers of two from the bits of floats, and roots with safe derivatives.

In float32, a squared norm overflows if the norm exceeds 1e19, and underflows if it is
below 1e-19. The norm itself is representable up to 1e38 and down to 1e-38. Scales make
the norms between these limits right. A scale is a power of two, so it adds no rounding.
A number is multiplied by its scale twice, since the inverse of a large float is not a
normal number.

How to compute a power of two from bits. Take a float x > 0 with exponent e and mantissa
1 + f. Its bits, read as an integer, are (e + bias + f) * 2**nmant. That is about

    bits(x) = (log2(x) + bias) * 2**nmant,    bias = maxexp - 1

so the bits of x**(-p) are about (1 + p) * bias * 2**nmant - p * bits(x). The bits of
1.0 are bias * 2**nmant. For p = 1/2, the result is 3/2 of the bits of 1.0, less half
the bits of x; for p = 1/4, it is 5/4 of them, less a quarter of the bits of x. Dropping
the mantissa rounds the result down to a power of two. Adding up to one exponent to the
constant shifts the rounding threshold.

The code uses `lax`, since `jnp` takes several times as long to trace. Functions that
run for every factor or leaf are jitted, so each is traced and lowered once per shape.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


@jax.jit
def power(size: jax.Array) -> jax.Array:
    """A power of two near 1 / sqrt(size), for a positive normal number or zero.

    Multiplied by it twice, the number is at least 1 and below 4, or zero. The
    operations are so cheap that XLA may repeat them wherever the scale is used.
    """
    limits = jnp.finfo(size.dtype)
    return _power_of_two(size, 1, ((3 * limits.maxexp - 1) << (limits.nmant - 1)) - 1)


@jax.jit
def root_of(square: jax.Array) -> jax.Array:
    """A power of two near 1 / sqrt(norm), from the square of the norm.

    Multiplied by it twice, the norm is between 1/2 and 2.

    A square that underflowed counts as the smallest number. The squares of all entries
    that are normal numbers are then in range. A square that overflowed gets a fixed
    scale. The norm of this factor may overflow too, since many entries add up to it,
    while the other factor still makes the norm of the row finite.
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
    """Round down to a power of two: the float of bits `start - (bits(x) >> halvings)`.

    The module's docstring derives which powers of x these are.
    """
    bits = lax.bitcast_convert_type(x, f"int{jnp.finfo(x.dtype).bits}")
    halved = lax.shift_right_arithmetic(bits, lax.full_like(bits, halvings))
    inverse = lax.sub(lax.full_like(bits, start), halved)
    exponent = np.array(np.inf, x.dtype).view(bits.dtype)  # the bits that hold it
    rounded = lax.bitwise_and(inverse, lax.full_like(bits, exponent))
    return lax.bitcast_convert_type(rounded, x.dtype)


def not_too_small(square: jax.Array, rounding: jax.Array) -> jax.Array:
    """A squared norm, plus its rounding error if that is significant.

    It is significant if it exceeds a thousandth of the square; see `Norms`.
    """
    is_small = lax.gt(rounding, lax.mul(square, lax.full_like(square, 1e-3)))
    more = lax.add(lax.max(square, lax.full_like(square, 0)), rounding)
    return lax.select(is_small, more, square)


@jax.jit
def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of x: 0 with derivative 0 if x <= 0, and NaN if x is NaN."""
    zeros = lax.full_like(x, 0)
    idle = lax.le(x, zeros)
    root = lax.sqrt(lax.select(idle, lax.full_like(x, 1), x))
    return lax.select(idle, zeros, root)
