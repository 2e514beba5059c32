"""Workarounds for habits of XLA. Results do not depend on them, beyond rounding.

Each function says what the habit is, the release that it was seen on, what the
workaround gains, and what shows that it may go. Ratios of time and memory are those
with the workaround over those without.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from .convolutions import with_canonical_convolutions
from .sharding import reshaped

PyTree = Any


def arranged(x: jax.Array, order: Sequence[int], shape: Sequence[int]) -> jax.Array:
    """Reorder the axes of an array, then reshape it.

    Habit: if axes of size 1 are moved, XLA gives the array another layout and copies
      it before every loop that reads it. So such axes are dropped here, not moved.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: compile time 0.88 to 0.95 for programs with convolutions; time 0.95 for
      residual networks, together with `without_ones`.
    May go when: `benchmarks/per_example.py --only residual` is as fast, and compiles
      as fast, with `lax.transpose(x, order).reshape(shape)`.
    """
    idle = [i for i, n in enumerate(x.shape) if n == 1]
    left = [i for i in range(x.ndim) if i not in idle]
    x = lax.squeeze(x, idle)
    x = lax.transpose(x, [left.index(i) for i in order if i in left])
    return reshaped(x, tuple(shape))


def not_merged(fun: Callable[[], PyTree], other: PyTree, primals: PyTree) -> PyTree:
    """Evaluate `fun()` so that it shares no computation with the program around it.

    The call becomes a branch that is always taken, on a condition that XLA cannot
    know: a `cond` on a number computed from `primals`. The other branch returns
    `other`, of the same types.

    Habit: XLA merges equal computations. It merges the forward passes of two passes
      over a model, and then holds the intermediate values of the first for the second.
      `optimization_barrier` does not help: XLA for CPU drops it before it merges.
    Seen on: jax 0.10.2 and 0.12.0, XLA for CPU.
    Gain: memory 0.75 to 0.92 for clipped sums with `recompute=True` of dense layers, in
      a list or in a scan over sequences; the forward pass runs twice.
    May go when: such sums take as little memory with `return fun()`.
    """
    leaves = [x for x in jax.tree.leaves(primals) if x.size]
    if not any(isinstance(x, Tracer) for x in leaves):
        return fun()
    top = jnp.max(jnp.real(min(leaves, key=lambda x: x.size)))
    always = jnp.logical_or(top == top, jnp.isnan(top))
    return lax.cond(always, with_canonical_convolutions(fun), lambda: other)


def narrow_product(
    left: jax.Array, right: jax.Array, *, precision: Any, dtype: Any
) -> jax.Array:
    """Compute leftᵀ right of (z, m) and (z, n) as (rightᵀ left)ᵀ.

    The barrier keeps XLA from turning the product back.

    Habit: a product with few columns takes up to six times as long as one with few
      lines.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time 0.31 at 8 columns and 0.80 at 128; none on a GPU.
    May go when: `benchmarks/constants.py --only narrow` shows ratios of 1.
    """
    numbers = ((0,), (0,)), ((), ())
    lines = lax.dot_general(
        right, left, numbers, precision=precision, preferred_element_type=dtype
    )
    return lax.optimization_barrier(lines).T


def merge_contracted(x: jax.Array) -> jax.Array:
    """Merge two contracted axes into one: (B, N, T, m) to (B, N*T, m).

    Habit: XLA copies an operand of a product that contracts two of its axes. The
      products of an ordinary backward pass contract one.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: one copy of the left operand; memory 0.43 for the weighted sum of 64 rows of
      128 pairs, 256×192.
    May go when: `benchmarks/per_example.py --products weighted` shows no more memory
      for models of sequences without it.
    """
    blocks, rows, pairs, size = x.shape
    return lax.reshape(x, (blocks, rows * pairs, size))


def total_by_product(weights: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """Sum an array over one axis with weights, as a product of a vector and a matrix.

    Habit: a sum over the first of several axes takes up to a hundred times as long as
      the product.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time 0.55 at 2**20 entries, and less than 0.01 at 2**23; compile time 1.3.
    May go when: `benchmarks/constants.py --only large_product` shows ratios of 1, and
      `test_sums_of_many_narrow_rows_do_not_stall` ends without it.
    """
    numbers = ((0,), (axis,)), ((), ())
    return lax.dot_general(weights, x, numbers, precision=lax.Precision.HIGHEST)


def sum_of_squares(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """Sum the squares over some axes, to compute a scale from the sum.

    Habit: a maximum over an axis takes twice as long as a sum of squares. So the scale
      comes from this sum wherever its overflow does no harm.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time 0.54 for each of 512 rows of 1,024 entries.
    May go when: `benchmarks/per_example.py --products clipped` is as fast for MLPs
      with a scale that comes from the largest entry.
    """
    x = lax.abs(x) if jnp.iscomplexobj(x) else x
    return lax.reduce_sum(lax.square(x), axes)


def sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sum x * y over all axes, entry by entry.

    Habit: under `jax.vmap`, XLA rewrites a contraction of all three axes of a block
      into a form that it then rejects.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: the program compiles.
    May go when: `tests/jacobian/test_outputs.py` passes with a contraction here. It
      has rows that are sums of an array and outer products.
    """
    return jnp.sum(x * y)


def in_turn(fun: Callable[[jax.Array], Any], xs: Any) -> Any:
    """Apply `fun` to each entry of `xs`, one after the other.

    Habit: XLA computes the gradients of a kernel for all examples as one grouped
      convolution, in plain loops.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time about 0.1 for products offset by offset, compared with that convolution.
    May go when: `benchmarks/per_example.py --only conv` is as fast with the grouped
      convolution.
    """
    return lax.map(fun, xs)


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Drop the axes of size 1 from a shape.

    Habit: an array with axes of size 1 has another layout, so XLA copies it before a
      loop.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time 0.95 for residual networks, together with `arranged`.
    May go when: `benchmarks/per_example.py --only residual` is as fast with the whole
      shape.
    """
    return tuple(n for n in shape if n != 1)


def correlate(
    image: jax.Array,
    kernel: jax.Array,
    *,
    padding: Sequence[tuple[int, int, int]],
    strides: Sequence[int],
    dilation: Sequence[int],
    precision: Any,
) -> jax.Array:
    """Correlate images (A, *space, m) with cotangents (A, *steps, n): (*offsets, m, n).

    Habit: a convolution of an image that `lax.pad` has padded takes up to three times
      as long as a convolution that pads it. So the convolution pads it here.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time down to 0.33.
    May go when: `benchmarks/per_example.py --products weighted --only conv` is as fast
      with an image that is padded first.
    """
    last = len(padding) + 1
    numbers = lax.ConvDimensionNumbers(
        (last, *range(last)),
        (last, *range(last)),
        (last - 1, last, *range(last - 1)),
    )
    return lax.conv_general_dilated(
        image,
        kernel,
        strides,
        [(low, high) for low, high, _ in padding],
        lhs_dilation=[interior + 1 for *_, interior in padding],
        rhs_dilation=dilation,
        dimension_numbers=numbers,
        precision=precision,
    )
