"""All rows of one gradient leaf in factored form, and maps over these rows."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._batches.chosen import Chosen, Span
from .._jax.compat import varying_zeros
from .._trees.algebra import carried_dtype
from . import thresholds
from .einsum import times_rows
from .scaling import inverse, power
from .terms import Dense, Outer, Scatter, pairs
from .terms.protocol import Term
from .views import (
    Shape,
    View,
    apply,
    disjoint,
    isometric,
    only_reshapes,
    transposed,
)
from .weighing import times


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["term"],
    meta_fields=[
        "shape",
        "axis",
        "view",
        "factor",
        "row_axes",
        "reason",
        "folding",
        "is_total",
    ],
)
@dataclass(frozen=True)
class Summand:
    """`factor * view(term)` for every row.

    The arrays of the term have up to two row axes, which begin at `axis`: N examples,
    and K outputs of each. `row_axes` says how many each array has, in flattening order:
    2 for both, 1 for N alone (the outputs share the array), 0 for none (all rows share
    it).
    """

    term: Term
    shape: Shape  # of one row of the term
    axis: int
    view: View
    factor: float
    row_axes: tuple[int, ...]
    reason: str  # why the term is dense, if it is
    folding: int = 0  # multiplications and additions to fold a tail into one row
    is_total: bool = False  # whether the term is the sum over all rows, not a row

    @property
    def of_one_row(self) -> Term:
        """The term of one row, abstract."""
        arrays, treedef = jax.tree.flatten(self.term)
        own = [
            jax.ShapeDtypeStruct(
                x.shape[: self.axis] + x.shape[self.axis + count :], x.dtype
            )
            for x, count in zip(arrays, self.row_axes, strict=True)
        ]
        return jax.tree.unflatten(treedef, own)

    def in_axes(self, count: int) -> Any:
        """The `in_axes` of the term for `jax.vmap` over N (1) or K (2)."""
        treedef = jax.tree.structure(self.term)
        axes = [self.axis if own >= count else None for own in self.row_axes]
        return jax.tree.unflatten(treedef, axes)

    @property
    def factor_positions(self) -> list[int]:
        """The positions of the term's factors among its arrays, in flattening order."""
        factors = self.term.factors
        arrays = enumerate(jax.tree.leaves(self.term))
        return [i for i, x in arrays if any(x is factor for factor in factors)]

    @property
    def coefficient_positions(self) -> list[int]:
        """The positions of the arrays that all rows share by construction."""
        shared = self.term.coefficients
        arrays = enumerate(jax.tree.leaves(self.term))
        return [i for i, x in arrays if any(x is own for own in shared)]

    @property
    def factor_row_axes(self) -> list[int]:
        """How many row axes each factor has."""
        return [self.row_axes[i] for i in self.factor_positions]

    @property
    def is_shared(self) -> bool:
        """Whether all rows share the term."""
        return not any(self.row_axes)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["summands"],
    meta_fields=["shape", "dtype", "size", "outputs"],
)
@dataclass(frozen=True)
class Leaf:
    """One gradient leaf of all rows: the sum of its summands."""

    summands: tuple[Summand, ...]
    shape: Shape
    dtype: Any
    size: int  # N
    outputs: int | None  # K; None for a scalar function, which has no such axis

    @property
    def carried(self) -> Any:
        """The accumulation dtype."""
        return carried_dtype(self.dtype)

    @property
    def real(self) -> Any:
        """The accumulation dtype of norms."""
        return jnp.finfo(self.carried).dtype

    @property
    def rows(self) -> Shape:
        """The shape of an array of one number per row."""
        return (self.size,) if self.outputs is None else (self.size, self.outputs)

    @property
    def terms(self) -> list[Term]:
        return [summand.term for summand in self.summands]


def zeros_of(shape: Shape, dtype: Any, *leaves: Leaf) -> jax.Array:
    """Zeros to which rows of some leaves are added.

    Inside `jax.shard_map`, they vary over the same mesh axes as the leaves.
    """
    return varying_zeros(shape, dtype, *jax.tree.leaves(leaves))


def take(leaf: Leaf, start: Any, size: int) -> Leaf:
    """The rows of `size` examples from `start` on, which may be traced."""
    return chosen(leaf, Span(start, size))


def chosen(leaf: Leaf, rows: Chosen) -> Leaf:
    """The rows of some of the examples, or of some outputs of all examples."""
    behind = int(rows.of_outputs)  # the axis of rows that is cut

    def of(summand: Summand) -> Summand:
        arrays, treedef = jax.tree.flatten(summand.term)
        cut = [
            rows.cut(x, summand.axis + behind) if count > behind else x
            for x, count in zip(arrays, summand.row_axes, strict=True)
        ]
        return replace(summand, term=jax.tree.unflatten(treedef, cut))

    summands = tuple(map(of, leaf.summands))
    if rows.of_outputs:
        return replace(leaf, summands=summands, outputs=rows.size)
    return replace(leaf, summands=summands, size=rows.size)


def at_output(leaf: Leaf, k: jax.Array) -> Leaf:
    """The rows of one of the outputs, which may be traced."""

    def of(summand: Summand) -> Summand:
        arrays, treedef = jax.tree.flatten(summand.term)
        axis, pairs = summand.axis + 1, zip(arrays, summand.row_axes, strict=True)
        cut = [
            jax.lax.dynamic_index_in_dim(x, k, axis, keepdims=False)
            if count == 2
            else x
            for x, count in pairs
        ]
        row_axes = tuple(min(count, 1) for count in summand.row_axes)
        term = jax.tree.unflatten(treedef, cut)
        return replace(summand, term=term, row_axes=row_axes)

    return replace(leaf, summands=tuple(map(of, leaf.summands)), outputs=None)


def as_arrays(leaf: Leaf, stacked: jax.Array, reason: str) -> Leaf:
    """The leaf whose rows are the arrays (*rows, *shape), for a reason."""
    summand = Summand(
        term=Dense(stacked),
        shape=leaf.shape,
        axis=0,
        view=(),
        factor=1.0,
        row_axes=(len(leaf.rows),),
        reason=reason,
    )
    return replace(leaf, summands=(summand,))


def widened(leaf: Leaf, dtype: Any) -> Leaf:
    """The rows in a wider dtype, in which they are also accumulated."""
    if leaf.carried == dtype:
        return leaf

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return replace(leaf, summands=jax.tree.map(wide, leaf.summands), dtype=dtype)


def weighted(leaf: Leaf, weights: jax.Array | None) -> tuple[Leaf, jax.Array | None]:
    """Multiply factors by the weights of their rows, if no two rows share a factor.

    Each factor of a pair takes about the square root of the weight, so that its square
    is scaled by about the weight, like the row.

    Returns:
      The leaf, and the weights that remain: None, or all of them if rows share factors.
    """
    own = [_factors_of_each_row(x, len(leaf.rows)) for x in leaf.summands]
    if weights is None or not all(own):
        return leaf, weights
    weights = weights.astype(leaf.real)
    root = power(jax.lax.stop_gradient(abs(weights)))
    summands = []
    for summand, positions in zip(leaf.summands, own, strict=True):
        arrays, treedef = jax.tree.flatten(summand.term)
        one = len(positions) == 1
        shares = [weights] if one else [inverse(root), weights * root]
        for i, share in zip(positions, shares, strict=False):
            x = arrays[i].astype(carried_dtype(arrays[i].dtype))
            arrays[i] = times_rows(x, share.astype(x.dtype), summand.axis)
        term = jax.tree.unflatten(treedef, arrays)
        summands.append(replace(summand, term=term))
    return replace(leaf, summands=tuple(summands)), None


def _factors_of_each_row(summand: Summand, depth: int) -> list[int]:
    """The positions of the factors that differ from row to row."""
    return [i for i in summand.factor_positions if summand.row_axes[i] == depth]


# ------------------------------------------------------------------------------------
# Maps over rows


def at_once(leaf: Leaf, entries: int) -> int:
    """How many examples have rows of at most `entries` numbers together; at least 1.

    What a row is made from counts if it is larger than the row.
    """
    largest = prod(leaf.shape)
    for summand in leaf.summands:
        made = summand.of_one_row.row_size
        largest = made if thresholds.exceeds(made, largest) else largest
    per_example = largest * (leaf.outputs or 1)
    if not thresholds.exceeds(per_example, 0):
        return entries
    return max(1, entries // per_example)


def over_rows(
    fun: Callable[..., Any], leaf: Leaf, *numbers: Any, materializes: bool = False
) -> Any:
    """Map `fun(terms, *numbers)` over rows.

    The terms are those of one row. Trees of numbers have arrays of shape (N, K), (N,)
    or (): a number for each row, for each example, or for all. If `fun` materializes
    rows, it runs for some examples at a time.
    """
    for count in (2, 1)[leaf.outputs is None :]:
        own = jax.tree.map(lambda x, n=count: 0 if x.ndim >= n else None, numbers)
        axes = [summand.in_axes(count) for summand in leaf.summands], *own
        size = leaf.size if count == 1 else leaf.outputs
        if count == 1 and materializes:
            most = at_once(leaf, thresholds.current().entries_at_once)
            fun = _some_at_once(fun, axes, leaf.size, most)
        else:
            fun = jax.vmap(fun, in_axes=axes, axis_size=size)
    return fun(leaf.terms, *numbers)


def _some_at_once(
    fun: Callable[..., Any], in_axes: Any, size: int, at_once: int
) -> Callable[..., Any]:
    """Like `jax.vmap` of a function, but for `at_once` examples at a time."""
    flat_axes = jax.tree.leaves(in_axes, is_leaf=lambda x: x is None)
    mapped_at = [i for i, axis in enumerate(flat_axes) if axis is not None]
    if not mapped_at or not thresholds.exceeds(size, at_once):
        return jax.vmap(fun, in_axes=in_axes, axis_size=size)

    def mapped(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)

        def one(xs: list[jax.Array]) -> Any:
            values = list(leaves)
            for i, x in zip(mapped_at, xs, strict=True):
                values[i] = x
            return fun(*jax.tree.unflatten(treedef, values))

        rows_first = [jnp.moveaxis(leaves[i], flat_axes[i], 0) for i in mapped_at]
        return jax.lax.map(one, rows_first, batch_size=at_once)

    return mapped


# ------------------------------------------------------------------------------------
# One row


def row(leaf: Leaf, terms: Sequence[Term]) -> jax.Array:
    """One row of a leaf as an array, in its accumulation dtype."""
    total = jnp.zeros(leaf.shape, leaf.carried)
    for summand, term in zip(leaf.summands, terms, strict=True):
        total += times(_block(summand, term).astype(leaf.carried), summand.factor)
    return total


def inner(one: Leaf, xs: Sequence[Term], other: Leaf, ys: Sequence[Term]) -> jax.Array:
    """The inner product of two rows; the first is conjugated."""
    total = jnp.zeros((), one.carried)
    for a, x in zip(one.summands, xs, strict=True):
        for b, y in zip(other.summands, ys, strict=True):
            product = inner_of_summands(a, x, b, y).astype(one.carried)
            total += times(product, a.factor * b.factor)
    return total


def inner_of_summands(a: Summand, x: Term, b: Summand, y: Term) -> jax.Array:
    """<x, y> behind the views of two summands, without their factors."""
    if disjoint(a.view, b.view):
        return jnp.zeros((), x.dtype)
    if x.is_dense and a.is_shared:
        return y.apply(_pulled(b, y, _block(a, x).conj()))
    if y.is_dense and b.is_shared:
        return x.apply(_pulled(a, x, _block(b, y).conj())).conj()
    if are_alike(a, b) or _share_lines(a, b):
        return pairs.inner(x, y)
    if x.is_dense:
        return y.apply_own(_pulled(b, y, _block(a, x).conj()))
    if y.is_dense:
        return x.apply_own(_pulled(a, x, _block(b, y).conj())).conj()
    return jnp.sum(_block(a, x).conj() * _block(b, y))


def inner_cost(a: Summand, b: Summand) -> int:
    """Multiplications and additions of the inner product of two summands."""
    x, y = a.of_one_row, b.of_one_row
    if disjoint(a.view, b.view):
        return 0
    if x.is_dense and a.is_shared:
        return y.shared_apply_cost
    if y.is_dense and b.is_shared:
        return x.shared_apply_cost
    if are_alike(a, b) or _share_lines(a, b):
        return pairs.inner_cost(x, y)
    if x.is_dense:
        return y.apply_cost
    if y.is_dense:
        return x.apply_cost
    return x.row_cost + y.row_cost + 2 * prod(x.shape)


def are_alike(x: Summand, y: Summand) -> bool:
    """Whether inner products of two summands can be taken before their views."""
    return x.shape == y.shape and x.view == y.view and isometric(x.view)


def _share_lines(x: Summand, y: Summand) -> bool:
    """Whether one is a stack of outer products, the other look-ups of its lines."""
    stack, table = (x, y) if isinstance(y.term, Scatter) else (y, x)
    if not (isinstance(stack.term, Outer) and isinstance(table.term, Scatter)):
        return False
    blocks, m, n = stack.shape
    in_order = only_reshapes(x.view) and only_reshapes(y.view)
    return in_order and table.shape == (1, blocks * m, n)


def needs_rows(one: Leaf, other: Leaf) -> bool:
    """Whether inner products of rows of two leaves need rows that must be built."""

    def needs(a: Summand, b: Summand) -> bool:
        if a.term.is_dense or b.term.is_dense or disjoint(a.view, b.view):
            return False
        if _share_lines(a, b):
            return False
        return not are_alike(a, b) or pairs.needs_rows(a.term, b.term)

    return any(needs(a, b) for a in one.summands for b in other.summands)


def _block(summand: Summand, term: Term) -> jax.Array:
    """The term as an array, behind its view."""
    return apply(summand.view, term.materialize())


def _pulled(summand: Summand, term: Term, v: jax.Array) -> jax.Array:
    """Pull an array back through the view of a summand."""
    return transposed(summand.view, summand.shape, v.astype(term.dtype))
