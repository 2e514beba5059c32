"""`J.check()`: compare the rows with those of plain `jax.grad`."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._batches.batch import Batch
from .._engine.matrix import Matrix
from .._engine.products.scaled_norms import combined
from .._jax.compat import all_equations
from .._trees.algebra import carried_dtype, common_dtype
from .._trees.checks import PyTree, located
from .added import Sum
from .kept import Kept
from .origin import Origin
from .outputs import Outputs
from .rows import Rows
from .source import Source
from .streamed import Streamed


def check(rows: Rows, outputs: Outputs) -> None:
    """The comparison of `Jacobian.check`, for rows without weights, in their metric."""
    shape = rows.origin.shape
    weights = np.linspace(-1, 1, prod(shape)).reshape(shape)
    c = jnp.asarray(weights, jnp.zeros(()).dtype)
    got, (norms, excess), *sums, squares = _products(rows, c)
    # The rows, and the sum of the absolute values of what they add up.
    plain, mass, rounding = _plain_rows(rows.origin, outputs)
    plain = [_in_metric(rows, i, x) for i, x in enumerate(plain)]
    mass = [np.abs(_in_metric(rows, i, x)) for i, x in enumerate(mass)]
    axes = tuple(range(len(shape)))

    def lengths_of(rows: list[np.ndarray]) -> list[np.ndarray]:
        flat = [x.reshape(*shape, prod(x.shape[len(shape) :])) for x in rows]
        return [np.linalg.norm(x, axis=-1) for x in flat]

    sizes = [np.tensordot(np.abs(weights), x, len(axes)) for x in mass]
    totals = [np.sum(np.abs(x) ** 2, axis=axes) for x in plain]
    squared_sizes = [np.sum(x**2, axis=axes) for x in mass]
    signed = [np.tensordot(weights, x, len(axes)) for x in plain]
    # Error allowed when parts of a row nearly cancel, for norms and for entries.
    excess = [_largest(_wide(x)) for x in excess]
    left = [
        16 * float(jnp.finfo(x.dtype).eps) ** 0.5 * y
        for x, y in zip(got, excess, strict=True)
    ]
    in_sums = [np.sum(np.abs(weights)) * x for x in left]
    in_squares = [
        weights.size * x * (2 * _largest(y) + x)
        for x, y in zip(left, plain, strict=True)
    ]
    compare = partial(_compare, rows.origin.params, rounding)
    compare("to_rows", got, plain, mass, left)
    compare("norms", norms, lengths_of(plain), lengths_of(mass), excess)
    for found in sums:
        compare("weighted_sum", found, signed, sizes, in_sums)
    compare("square_sum", squares, totals, squared_sizes, in_squares)


_LARGE = 2.0**10


@jax.jit
def _products(rows: Rows, c: jax.Array) -> tuple[Any, ...]:
    def of_rows(matrix: Matrix) -> tuple[Any, Any]:
        norms = matrix.leaf_norms()
        both = norms, [x.excess for x in norms]
        leaves = range(len(matrix.leaves))
        return tuple(matrix.rows()), tuple(
            tuple(combined(x, [i]) for i in leaves) for x in both
        )

    stacked, norms = rows.map(of_rows)

    def summed(rows: Rows, c: jax.Array) -> tuple[jax.Array, ...]:
        return tuple(jax.tree.leaves(rows.origin.rounded(rows.sum(c))))

    sums = summed(rows, c)
    # The same sum from rows that are recomputed only for it.
    again = Streamed(rows.origin, diagonal=rows.diagonal)
    alone = summed(again, c) if isinstance(rows, Kept) else sums
    # A custom rule that clips cotangents shows if weights are large. A power of two
    # changes no digit of a backward pass that is linear.
    large = tuple(x / _LARGE for x in summed(rows, _LARGE * c))
    squares = rows.fold(
        lambda matrix, c: matrix.square_sum(c), None, lambda d: jnp.finfo(d).dtype
    )
    return stacked, norms, sums, alone, large, squares


def _wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x).astype(np.result_type(np.float64, carried_dtype(x.dtype)))


def _largest(x: np.ndarray) -> float:
    return float(np.max(np.abs(x), where=np.isfinite(x), initial=0.0))


def _compare(
    params: PyTree,
    rounding: float,
    product: str,
    found: Sequence[jax.Array],
    right: Sequence[np.ndarray],
    summands: Sequence[np.ndarray],
    left: Sequence[float],
) -> None:
    """Raise if a leaf is off by more than rounding of its summands or of other leaves.

    `rounding` is the eps of the narrowest numbers in the function. Also allowed are
    `left`, the rounding that is left when the parts of a row cancel, and what XLA
    flushes to zero. A leaf's true gradient may be zero, leaving only rounding from
    other leaves (a bias that is subtracted again).
    """
    scales = list(map(_largest, summands))
    paths = jax.tree.leaves_with_path(params)
    for (path, leaf), x, y, scale, own in zip(
        paths, found, right, scales, left, strict=True
    ):
        eps = max(rounding, float(jnp.finfo(leaf.dtype).eps))
        allowed = (
            min(8 * eps**0.5, 1 / 4) * scale + min(64 * eps, 1 / 16) * max(scales) + own
        )
        allowed += 64 * float(jnp.finfo(x.dtype).tiny)
        both = np.isfinite(x) & np.isfinite(y)
        error = np.max(np.abs(_wide(x) - y), where=both, initial=0.0)
        if error > allowed or not np.array_equal(np.isfinite(x), np.isfinite(y)):
            raise ValueError(
                f"{located('params', path)}: {product} differs from plain "
                f"jax.grad by {error:.3g}, where the largest entry is {scale:.3g}: "
                "please report the function, with J.explain()"
            )


def _plain_rows(
    origin: Origin, outputs: Outputs
) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """The rows of each leaf, the absolute values that they add up, and the largest eps.

    Only rows that are sums of several functions' add up anything.
    """
    if not isinstance(origin.source, Sum):
        found, rounding = _rows_of_one(origin, outputs)
        rows = list(map(_wide, found))
        return rows, list(map(np.abs, rows)), rounding
    parts = []
    for part in origin.source.parts:
        rows, mass, rounding = _plain_rows(part.origin, outputs)
        weighted = [_weighted(part, i, x) for i, x in enumerate(rows)]
        heavy = [np.abs(_weighted(part, i, x)) for i, x in enumerate(mass)]
        parts.append((weighted, heavy, rounding))
    rows, mass, roundings = zip(*parts, strict=True)
    return (
        [reduce(np.add, x) for x in zip(*rows, strict=True)],
        [reduce(np.add, x) for x in zip(*mass, strict=True)],
        max(roundings),
    )


def _weighted(part: Streamed, i: int, rows: np.ndarray) -> np.ndarray:
    """The rows of leaf i times their weights; zeros for those that do not count."""
    shape = part.origin.shape
    ones = (1,) * (rows.ndim - len(shape))
    if part.weights is not None:
        rows = rows * np.reshape(_wide(part.weights[i]), (*shape, *ones))
    rows = _in_metric(part, i, rows)
    if part.valid is not None:
        rows = np.where(np.reshape(part.valid, (*shape, *ones)), rows, 0)
    return rows


def _in_metric(rows: Rows, i: int, plain: np.ndarray) -> np.ndarray:
    """The rows of leaf i times the diagonal in parameter space."""
    diagonal = None if rows.diagonal is None else rows.diagonal[i]
    return plain if diagonal is None else plain * _wide(diagonal)


def _rows_of_one(origin: Origin, outputs: Outputs) -> tuple[list[jax.Array], float]:
    """The rows of each leaf by `jax.grad` or `jax.jacrev`, one example at a time.

    The second result is the largest eps of all floats that are computed, or 0.
    """
    source = origin.source
    row = partial(_plain_row, is_scalar=outputs.is_scalar)
    count = origin.shape[0]
    examples = [replace(source, batch=source.batch.chunk(i, 1)) for i in range(count)]
    with source.note:
        equations = all_equations(jax.make_jaxpr(row)(examples[0]))
    made = [v.aval for equation in equations for v in equation.outvars]
    kinds = {getattr(aval, "dtype", jnp.dtype(int)) for aval in made}
    dtypes = [kind for kind in kinds if jnp.issubdtype(kind, jnp.inexact)]
    stacked = [jnp.stack(leaf) for leaf in zip(*map(row, examples), strict=True)]
    if source.outputs_at is not None:
        stacked = [x[:, source.outputs_at] for x in stacked]
    return stacked, max((float(jnp.finfo(dtype).eps) for dtype in dtypes), default=0.0)


@partial(jax.jit, static_argnames="is_scalar")
def _plain_row(one: Source, *, is_scalar: bool) -> list[jax.Array]:
    def outputs(primals: PyTree) -> jax.Array:
        result = _call(one, one.batch.with_primals(primals))
        if is_scalar:
            return result
        flat = [jnp.ravel(x) for x in jax.tree.leaves(result)]
        dtype = common_dtype(*(x.dtype for x in flat))
        return jnp.concatenate([x.astype(dtype) for x in flat])

    differentiate = jax.grad if is_scalar else jax.jacrev
    return jax.tree.leaves(differentiate(outputs)(one.batch.primals))


def _call(source: Source, one: Batch) -> PyTree:
    """The output for a batch of one example."""
    leaves = [
        x if axis is None else jax.lax.index_in_dim(x, 0, axis, keepdims=False)
        for x, axis in zip(one.leaves, one.axes, strict=True)
    ]
    args, kwargs = jax.tree.unflatten(one.treedef, leaves)
    return source.of_one(*args, **kwargs)[0]
