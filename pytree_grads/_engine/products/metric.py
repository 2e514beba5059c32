"""Rows times a diagonal in parameter space: D row, for a D of the leaf's shape.

A sum of rows is multiplied by D once. For norms and inner products, D becomes part of
the terms where it can: of the factors if it has one number for a leaf, or one for each
line or column of outer products, else of a weight that all rows share. Since |D a bᵀ|²
is (a∘a)ᵀ D² (b∘b), no rows are built then. What no term can hold, the rows of most
kernels say, multiplies rows that are built some at a time.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import carried_dtype
from .. import thresholds
from ..einsum import dot
from ..leaf import Leaf, Summand, as_arrays, at_output, over_rows, row, zeros_of
from ..tails.axes import Axis, split
from ..terms import Dense, Outer, Patches, Scatter, Weighed
from ..terms.protocol import Term
from ..views import Reshape, Reverse, Shape, Transpose, View, transposed
from . import norms
from .scaled_norms import Norms
from .sums import rows
from .tiles import over_blocks

Diagonal: TypeAlias = tuple[jax.Array | None, ...]


def all_absorbed(
    leaves: Sequence[Leaf], diagonal: Diagonal
) -> tuple[tuple[Leaf, ...], Diagonal | None]:
    """The leaves with a diagonal in their factors, and what is left of it."""
    pairs = zip(leaves, diagonal, strict=True)
    found = [(x, None) if d is None else absorbed(x, d) for x, d in pairs]
    left = tuple(d for _, d in found)
    return tuple(x for x, _ in found), left if any(
        d is not None for d in left
    ) else None


def as_rows(leaf: Leaf, diagonal: jax.Array) -> Leaf:
    """The leaf with its rows as arrays, times a diagonal that no term can hold."""
    stacked = rows(leaf, carried=True)
    entries = diagonal.reshape(*[1] * len(leaf.rows), *diagonal.shape)
    stacked *= entries.astype(stacked.dtype)
    return as_arrays(leaf, stacked, "a diagonal of its shape")


def leaf_norms(leaves: Sequence[Leaf], diagonal: Diagonal | None) -> list[Norms]:
    """The norms of the rows of all leaves times a diagonal."""
    if diagonal is None:
        return norms.leaf_norms(leaves)
    bare = [i for i, d in enumerate(diagonal) if d is None]
    found = norms.leaf_norms([leaves[i] for i in bare])
    found = [replace(x, leaves=tuple(bare[k] for k in x.leaves)) for x in found]
    for i, (leaf, own) in enumerate(zip(leaves, diagonal, strict=True)):
        if own is not None:
            found.append(replace(_leaf_norm(leaf, own), leaves=(i,)))
    return found


def absorbed(leaf: Leaf, diagonal: jax.Array) -> tuple[Leaf, jax.Array | None]:
    """The leaf with a diagonal in its factors, and what is left of the diagonal."""
    if diagonal.size == 1:
        number = diagonal.reshape(())
        return replace(
            leaf, summands=tuple(_times(x, number) for x in leaf.summands)
        ), None
    if not prod(leaf.shape):
        return leaf, None
    found = []
    for summand in leaf.summands:
        scaled = _times_entries(summand, leaf, diagonal)
        if scaled is None:
            return leaf, diagonal
        found.append(scaled)
    return replace(leaf, summands=tuple(found)), None


def _times(summand: Summand, number: jax.Array) -> Summand:
    """A summand times one number, in its last factor."""
    *others, last = summand.term.factors
    last = last.astype(carried_dtype(last.dtype))
    term = summand.term.with_factors([*others, last * number.astype(last.dtype)])
    return replace(summand, term=term)


def _times_entries(summand: Summand, leaf: Leaf, diagonal: jax.Array) -> Summand | None:
    """A summand times a diagonal in its term; None if the term cannot hold it.

    A view moves entries. So the diagonal can move back through it: D view(x) is
    view(D′ x) for D′ = viewᵀ(D), which has the shape of the term.
    """
    view, shape, term = summand.view, summand.shape, summand.term
    whole = jnp.broadcast_to(diagonal, leaf.shape).astype(leaf.real)
    numbers = transposed(view, shape, whole)
    if isinstance(term, Dense):
        return _dense_times(summand, term, numbers)
    groups = _groups(view, shape, diagonal)
    for group, names in (("N", Outer | Weighed | Scatter | Patches), ("M", Outer)):
        if groups <= {"B", group} and isinstance(term, names):
            found = _factor_times(summand, group, numbers)
            if found is not None:
                return found
    if isinstance(term, Outer):
        return _outer_times(summand, term, numbers)
    if isinstance(term, Weighed):
        term = replace(term, weight=term.weight.astype(leaf.real) * numbers)
        return replace(summand, term=term)
    return _scatter_times(summand, term, numbers) if isinstance(term, Scatter) else None


def _groups(view: View, shape: Shape, diagonal: jax.Array) -> set[str]:
    """The axes of a term (B, m, n) along which a diagonal of the leaf may differ.

    They are named "B", "M" and "N".
    """
    if len(shape) != 3:
        return {"B", "M", "N"}
    axes = tuple(map(Axis, shape, "BMN"))
    for step in view:
        pairs = split(axes, step.shape) if isinstance(step, Reshape) else None
        if isinstance(step, Transpose):
            axes = tuple(axes[i] for i in step.permutation)
        elif pairs is not None:
            axes = tuple(axis for _, new in pairs for axis in new)
        elif not isinstance(step, Reverse):
            return {"B", "M", "N"}
    sizes = zip(axes, diagonal.shape, strict=True)
    return {axis.group for axis, size in sizes if size != 1}


def _dense_times(summand: Summand, term: Dense, numbers: jax.Array) -> Summand:
    x, rows = term.materialize(), summand.row_axes[0]
    return replace(summand, term=Dense(x * _with_rows(numbers, summand.axis, rows, x)))


def _with_rows(numbers: jax.Array, axis: int, rows: int, like: jax.Array) -> jax.Array:
    """Numbers with axes of length 1 for axes of rows, in the dtype of an array."""
    return lax.expand_dims(numbers, range(axis, axis + rows)).astype(like.dtype)


def _factor_times(summand: Summand, group: str, numbers: jax.Array) -> Summand | None:
    """A summand whose left or right factor is multiplied, by numbers (B, m, n).

    None if that factor has one entry, which repeats along its axis.
    """
    factors = list(summand.term.factors)
    position = 0 if group == "M" else len(factors) - 1
    x = factors[position].astype(carried_dtype(factors[position].dtype))
    own = numbers[:, :, 0] if group == "M" else numbers[:, 0, :]  # (B, m) or (B, n)
    if x.shape[-1] != own.shape[-1]:
        return None
    factors[position] = x * lax.expand_dims(own, range(1, x.ndim - 1)).astype(x.dtype)
    return replace(summand, term=summand.term.with_factors(factors))


def _outer_times(summand: Summand, term: Outer, numbers: jax.Array) -> Summand:
    """Outer products times numbers (B, m, n), which become a weight of all rows.

    The largest numbers of each line and column multiply the factors, so that norms do
    not underflow: a large number may stand where all rows are zero. They are powers of
    two, and change no digit.
    """
    lines = _sizes(numbers, 2)
    columns = _sizes(numbers / lines, 1)
    weight = numbers / lines / columns
    left, right = (x.astype(carried_dtype(x.dtype)) for x in (term.left, term.right))
    rows = summand.row_axes
    left *= _with_rows(jnp.swapaxes(lines, 1, 2), 1, rows[0], left)
    right *= _with_rows(columns, 1, rows[1], right)
    weighed = Weighed(left, right, weight, term.precision)
    return replace(summand, term=weighed, row_axes=(*rows, 0))


def _sizes(numbers: jax.Array, axis: int) -> jax.Array:
    """Powers of two at most 1, near the largest of some numbers over the largest."""
    own = jnp.max(jnp.abs(lax.stop_gradient(numbers)), axis, keepdims=True, initial=0)
    largest = jnp.max(own, initial=0)
    share = jnp.where(own > 0, own / largest, 1)
    share = jnp.where(jnp.isfinite(share), share, 1)
    share = jnp.maximum(share, float(jnp.finfo(share.dtype).tiny))
    return jnp.exp2(jnp.floor(jnp.log2(share)))


def _scatter_times(summand: Summand, term: Scatter, numbers: jax.Array) -> Summand:
    """A summand whose vectors are multiplied by the lines (B, m, n) of their indices.

    The look-ups that add nothing have a line as well, whichever.
    """
    index, rows = term.index, summand.row_axes
    flat = jnp.minimum(index.reshape(index.shape[0], -1, 1), numbers.shape[1] - 1)
    lines = jnp.take_along_axis(numbers, flat.astype(jnp.int32), 1)
    lines = lines.reshape(*index.shape, numbers.shape[2])
    right = term.right.astype(carried_dtype(term.right.dtype))
    most = max(rows)
    lines = lax.expand_dims(lines, range(1 + rows[0], 1 + most)).astype(right.dtype)
    right = lax.expand_dims(right, range(1 + rows[1], 1 + most)) * lines
    return replace(summand, term=replace(term, right=right), row_axes=(rows[0], most))


def _leaf_norm(leaf: Leaf, diagonal: jax.Array) -> Norms:
    """The norms of rows times a diagonal, from some rows at a time."""

    def of_row(terms: Sequence[Term]) -> jax.Array:
        scaled = row(leaf, terms) * diagonal.astype(leaf.carried)
        return norms.norm(Dense(scaled))

    found = over_rows(of_row, leaf, materializes=True)
    return Norms(weights=(found.astype(leaf.real)[..., None],))


def gram(leaf: Leaf, other: Leaf, diagonal: jax.Array) -> jax.Array:
    """Inner products of all rows of two leaves, times a diagonal, by blocks of rows."""
    shape = (*leaf.rows, *other.rows)
    if not all(map(prod, (leaf.shape, leaf.rows, other.rows))):
        return jnp.zeros(shape, leaf.carried)
    size = prod(leaf.shape)

    def write(
        result: jax.Array, block: Leaf, start: jax.Array, is_new: jax.Array
    ) -> jax.Array:
        mine = rows(block, carried=True).conj().reshape(-1, *leaf.shape)
        mine = (mine * diagonal[None].astype(leaf.carried)).reshape(-1, size)
        products = over_rows(
            lambda terms: dot("ip,p->i", mine, row(other, terms).reshape(size)),
            other,
            materializes=True,
        )
        products = jnp.moveaxis(products, -1, 0).reshape(*block.rows, *other.rows)
        return lax.dynamic_update_slice_in_dim(result, products, start, 0)

    empty = zeros_of(shape, leaf.carried, leaf, other)
    return over_blocks(write, empty, leaf, thresholds.current().entries_at_once)


def traced_gram(leaf: Leaf, other: Leaf, diagonal: jax.Array) -> jax.Array:
    """Inner products times a diagonal, summed over common outputs: (N, N′)."""
    if leaf.outputs is None:
        return gram(leaf, other, diagonal)

    def add(total: jax.Array, k: jax.Array) -> tuple[jax.Array, None]:
        own = at_output(leaf, k), at_output(other, k)
        return total + gram(*own, diagonal), None

    empty = zeros_of((leaf.size, other.size), leaf.carried, leaf, other)
    return lax.scan(add, empty, jnp.arange(leaf.outputs))[0]
