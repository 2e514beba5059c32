"""Habits of XLA that the package works around, one function each.

Each docstring says what XLA does, on which releases that was seen, what the workaround
gains, and which test or benchmark shows when it can go. The results are the same
without them.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .convolutions import with_canonical_convolutions

PyTree = Any


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


def not_merged(fun: Callable[[], PyTree], other: PyTree, primals: PyTree) -> PyTree:
    """``fun()``, which shares no computation with the program around it when compiled.

    The habit: XLA merges equal computations. Of two passes through a model it makes
    one, and holds for the second what the first has computed. XLA for CPU drops
    ``optimization_barrier`` before it merges. Seen on jax 0.10.2 and 0.12.0, CPU.

    The way out: the call is a branch that is always taken, which XLA cannot know. The
    other branch returns ``other``, of the same types. It is a ``cond`` on a number that
    is computed from ``primals``.

    The gain: a clipped sum with ``recompute=True`` takes 1.0 times the memory of an
    ordinary gradient. Without, it holds the factors of all layers as well.

    It can go when ``test_recomputing_keeps_no_factors_of_a_scan`` in
    ``tests/test_jacobian_report.py`` passes with ``return fun()`` in place of the
    branch.
    """
    leaves = [x for x in jax.tree.leaves(primals) if x.size]
    if not any(isinstance(x, Tracer) for x in leaves):
        return fun()
    top = jnp.max(jnp.real(min(leaves, key=lambda x: x.size)))
    always = jnp.logical_or(top == top, jnp.isnan(top))
    return lax.cond(always, with_canonical_convolutions(fun), lambda: other)
