"""Habits of XLA that cost time or memory, and ways around them.

Each function names the habit, the releases it was seen on, what the way around it
gains, and the test that shows when it can go.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .convolutions import with_canonical_convolutions

PyTree = Any


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
