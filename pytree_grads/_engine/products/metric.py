"""Rows times a diagonal in parameter space: D row, for a D of the leaf's shape.

D is part of the factors where it can be: one number for a leaf, or one for each line or
column of outer products. What is left multiplies a sum of rows once, and for norms and
inner products it multiplies rows that are built some at a time.
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
from ..leaf import Leaf, Summand, at_output, over_rows, row, zeros_of
from ..terms.dense import Dense
from ..terms.outer import Outer
from ..terms.protocol import Term
from ..views import Reshape, Shape, Transpose, View
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
    found = []
    for summand in leaf.summands:
        scaled = _times_entries(summand, diagonal)
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


def _times_entries(summand: Summand, diagonal: jax.Array) -> Summand | None:
    """A summand times a diagonal in its factors; None if these cannot hold it.

    Rows that are kept as they are can. So can outer terms, if one axis of the leaf has
    numbers, and the view does no more than move axes.
    """
    if summand.term.is_dense and not summand.view:
        (x,) = summand.term.factors
        x = x.astype(carried_dtype(x.dtype))
        before, after = diagonal.shape[: summand.axis], diagonal.shape[summand.axis :]
        shape = *before, *[1] * summand.row_axes[0], *after
        return replace(summand, term=Dense(x * diagonal.reshape(shape).astype(x.dtype)))
    axes = [i for i, n in enumerate(diagonal.shape) if n != 1]
    origins = _origins(summand.view, summand.shape)
    if len(axes) != 1 or origins is None or not isinstance(summand.term, Outer):
        return None
    origin = origins[axes[0]]
    if origin is None or origin == 0:
        return None
    return _times_vectors(summand, origin - 1, axes[0], diagonal)


def _origins(view: View, shape: Shape) -> list[int | None] | None:
    """For each axis behind a view, the axis of the term that it is.

    None for axes of length 1 that a reshape adds; no list if axes do not stay whole.
    """
    origins: list[int | None] = list(range(len(shape)))
    for step in view:
        if isinstance(step, Transpose):
            origins = [origins[i] for i in step.permutation]
        elif isinstance(step, Reshape):
            whole = [i for i, n in zip(origins, shape, strict=True) if n != 1]
            if [n for n in shape if n != 1] != [n for n in step.shape if n != 1]:
                return None
            left = iter(whole)
            origins = [None if n == 1 else next(left) for n in step.shape]
        else:
            return None
        shape = step.shape_from(shape)
    return origins


def _times_vectors(
    summand: Summand, position: int, axis: int, diagonal: jax.Array
) -> Summand:
    """A summand whose left or right vectors are multiplied entry by entry."""
    factors = list(summand.term.factors)
    x = factors[position].astype(carried_dtype(factors[position].dtype))
    numbers = diagonal.reshape(diagonal.shape[axis]).astype(x.dtype)
    factors[position] = x * lax.broadcast_in_dim(numbers, x.shape, (x.ndim - 1,))
    return replace(summand, term=summand.term.with_factors(factors))


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
