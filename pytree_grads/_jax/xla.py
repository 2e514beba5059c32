"""Habits of XLA that the package works around, one function each.

Each docstring says what XLA does, on which release that was seen, what the workaround
gains, and which test or benchmark shows when it can go. The results are the same
without them.
"""

from collections.abc import Sequence

import jax
from jax import lax


def arranged(x: jax.Array, order: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """An array with its axes in another order, then in another shape.

    Habit: XLA gives an array whose axes of size 1 were moved another layout, and copies
    it before every loop that reads it. Here such axes are dropped, not moved.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: programs with convolutions compile in 5 to 12 % less time and residual
    networks run 5 % faster, together with what `patches` does for its loops.
    Can go when `benchmarks/per_example.py --only residual` shows no loss, in time and
    in compile time, with a plain `lax.transpose(x, order).reshape(shape)`.
    """
    idle = [i for i, n in enumerate(x.shape) if n == 1]
    left = [i for i in range(x.ndim) if i not in idle]
    x = lax.squeeze(x, idle)
    x = lax.transpose(x, [left.index(i) for i in order if i in left])
    return x.reshape(shape)
