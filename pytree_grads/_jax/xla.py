"""Ways around habits of XLA: each function names the habit, and when it may go.

All were seen with jax 0.10.2 and XLA for CPUs, unless a function says otherwise. The
results do not depend on them, beyond rounding.
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


def narrow_product(
    left: jax.Array, right: jax.Array, *, precision: Any, dtype: Any
) -> jax.Array:
    """The product leftᵀ right of (z, m) and (z, n), taken as (rightᵀ left)ᵀ.

    Habit: a product with few columns takes up to six times as long as one with few
    lines. Gain: 3.2 times at 8 columns, 1.25 at 128 (`NARROW` in the tables of
    `benchmarks/README.md`); none on a GPU. It may go when `benchmarks/constants.py
    --only narrow` shows quotients of 1. The barrier stops XLA from turning the
    product back.
    """
    numbers = ((0,), (0,)), ((), ())
    lines = lax.dot_general(
        right, left, numbers, precision=precision, preferred_element_type=dtype
    )
    return lax.optimization_barrier(lines).T


def merge_contracted(x: jax.Array) -> jax.Array:
    """(B, N, T, m) to (B, N*T, m): one contracted axis instead of two.

    Habit: operands of a product that have two contracted axes are copied first. An
    ordinary backward pass has one. The memory columns of `benchmarks/per_example.py`
    (weighted sums of sequences) show whether it may go.
    """
    blocks, rows, pairs, size = x.shape
    return lax.reshape(x, (blocks, rows * pairs, size))


def total_by_product(weights: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """The weighted sum over one axis, as a product of a vector and a matrix.

    Habit: a sum over the leading one of several axes takes up to a hundred times as
    long as the product. Gain: 0.55 of the time at 2**20 entries, 0.01 and less at
    2**23 (`LARGE_PRODUCT` in the tables of `benchmarks/README.md`), for 1.3 times
    the compile time. It may go when `benchmarks/constants.py --only large_product`
    shows quotients of 1; `test_sums_of_many_narrow_rows_do_not_stall` stalls without
    it.
    """
    numbers = ((0,), (axis,)), ((), ())
    return lax.dot_general(weights, x, numbers, precision=lax.Precision.HIGHEST)


def sum_of_squares(x: jax.Array, axes: Sequence[int]) -> jax.Array:
    """The plain sum of squares over some axes, from which a scale comes.

    Habit: a maximum over an axis takes twice as long as a sum of squares, so scales
    come from these where their overflow does no harm. `benchmarks/per_example.py
    --products clipped` (MLPs) shows whether largest entries may take their place.
    """
    x = lax.abs(x) if jnp.iscomplexobj(x) else x
    return lax.reduce_sum(lax.square(x), axes)


def sum_of_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """The sum of x * y over all axes, entry by entry.

    Habit: under `jax.vmap` a contraction of all three axes of a block is rewritten
    into a form that XLA then rejects. `tests/test_jacobian_outputs.py` (rows that are
    sums of an array and outer products) fails if this becomes a contraction.
    """
    return jnp.sum(x * y)


def absolute_products(x: jax.Array, y: jax.Array) -> jax.Array:
    """|x| |y| instead of |x y|.

    Habit: if the sum of x y is taken as well, the products are kept in memory for
    both sums: one more array of T * T numbers per row. The memory column of
    `benchmarks/per_example.py` (transformers, clipped) shows whether it may go.
    """
    return lax.mul(lax.abs(x), lax.abs(y))


def in_turn(fun: Callable[[jax.Array], Any], xs: Any) -> Any:
    """`fun` of each of xs, one after the other.

    Habit: the gradient of a kernel for each example is one convolution in groups,
    which runs in plain loops, some ten times as long as a product for each offset of
    the kernel. `benchmarks/per_example.py --only conv` shows whether it may go.
    """
    return lax.map(fun, xs)


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the axes of size 1.

    Habit: an array with axes of size 1 is copied before a loop, since that is
    another layout. Gain: residual networks run 5 % faster. `benchmarks/per_example.py
    --only residual` shows whether it may go.
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

    Habit: a convolution of an image that `lax.pad` padded takes up to three times as
    long as one that pads it. So padding is left to the convolution.
    `benchmarks/per_example.py --products weighted --only conv` shows whether it may
    go.
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
