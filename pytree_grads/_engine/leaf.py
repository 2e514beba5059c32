"""Leaves in factored form: all rows of one gradient leaf, and how functions map over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.compat import varying_zeros
from .._jax.sharding import take as neighbours
from .._trees.algebra import carried_dtype
from . import terms as _terms
from . import thresholds
from .einsum import times_rows
from .patches import Windows
from .scaling import inverse, power
from .terms import Dense, Term
from .views import Shape, View, apply, disjoint, isometric, transposed


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["term"],
    meta_fields=["shape", "axis", "tail", "factor", "levels", "reason"],
)
@dataclass(frozen=True)
class Piece:
    """`factor * tail(term)` for every row.

    The arrays of the term have up to two axes of rows, N examples and K outputs of each, which
    begin at `axis`. `levels` says which, for each array in flattening order: 2 for both, 1 for N
    alone (the outputs share it), 0 for none (all rows share it).
    """

    term: Term
    shape: Shape  # of one row of the term
    axis: int
    tail: View
    factor: float
    levels: tuple[int, ...]
    reason: str  # why the term is dense, where it is

    @property
    def of_one_row(self) -> Term:
        """The term of one row, abstract: what `_terms` speaks of."""
        arrays, treedef = jax.tree.flatten(self.term)
        own = [
            jax.ShapeDtypeStruct(x.shape[: self.axis] + x.shape[self.axis + level :], x.dtype)
            for x, level in zip(arrays, self.levels, strict=True)
        ]
        return jax.tree.unflatten(treedef, own)

    def in_axes(self, level: int) -> Any:
        """The `in_axes` of the term for `jax.vmap` over N (level 1) or K (level 2)."""
        treedef = jax.tree.structure(self.term)
        return jax.tree.unflatten(treedef, [self.axis if x >= level else None for x in self.levels])


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["pieces"],
    meta_fields=["shape", "dtype", "size", "outputs"],
)
@dataclass(frozen=True)
class Leaf:
    """One gradient leaf of all rows: the sum of its pieces."""

    pieces: tuple[Piece, ...]
    shape: Shape
    dtype: Any
    size: int  # N
    outputs: int | None  # K, or None for a function with scalar output: no axis then

    @property
    def carried(self) -> Any:
        return carried_dtype(self.dtype)

    @property
    def real(self) -> Any:
        return jnp.finfo(self.carried).dtype

    @property
    def rows(self) -> Shape:
        """The shape of one number per row."""
        return (self.size,) if self.outputs is None else (self.size, self.outputs)

    @property
    def terms(self) -> list[Term]:
        return [piece.term for piece in self.pieces]


def zeros_of(shape: Shape, dtype: Any, *leaves: Leaf) -> jax.Array:
    """Zeros to add rows of some leaves to, which inside `jax.shard_map` vary as these do."""
    return varying_zeros(shape, dtype, *jax.tree.leaves(leaves))


def take(leaf: Leaf, start: Any, size: int) -> Leaf:
    """The rows of `size` examples from `start` on, which may be traced."""

    def of(piece: Piece) -> Piece:
        arrays, treedef = jax.tree.flatten(piece.term)
        cut = [
            neighbours(x, start, size, piece.axis) if level else x
            for x, level in zip(arrays, piece.levels, strict=True)
        ]
        return replace(piece, term=jax.tree.unflatten(treedef, cut))

    return replace(leaf, pieces=tuple(map(of, leaf.pieces)), size=size)


def squeezed(x: jax.Array, axis: int, level: int = 1) -> tuple[jax.Array, int]:
    """An array without its axes of size 1, but those of rows, and where these begin.

    What a weight and a bias have in common has one form then, and is worked on once.
    """
    idle = [i for i, n in enumerate(x.shape) if n == 1 and not axis <= i < axis + level]
    return jax.lax.squeeze(x, idle), axis - sum(i < axis for i in idle)


def widened(leaf: Leaf, dtype: Any) -> Leaf:
    """The same rows, kept and carried in a wider dtype."""
    if leaf.carried == dtype:
        return leaf

    def wide(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.inexact) else x

    return replace(leaf, pieces=jax.tree.map(wide, leaf.pieces), dtype=dtype)


def weighted(leaf: Leaf, weights: jax.Array | None) -> tuple[Leaf, jax.Array | None]:
    """The rows times numbers of their own, and the numbers that remain, where rows share factors.

    Each vector of a pair takes about their root, so that its square is near that of its row.
    """
    own = [_unshared(piece, len(leaf.rows)) for piece in leaf.pieces]
    if weights is None or not all(own):
        return leaf, weights
    weights = weights.astype(leaf.real)
    root = power(jax.lax.stop_gradient(abs(weights)))
    pieces = []
    for piece, places in zip(leaf.pieces, own, strict=True):
        arrays, treedef = jax.tree.flatten(piece.term)
        shares = [weights] if len(places) == 1 else [inverse(root), weights * root]
        for i, share in zip(places, shares, strict=True):
            x = arrays[i].astype(carried_dtype(arrays[i].dtype))
            arrays[i] = times_rows(x, share.astype(x.dtype), piece.axis)
        pieces.append(replace(piece, term=jax.tree.unflatten(treedef, arrays)))
    return replace(leaf, pieces=tuple(pieces)), None


def _unshared(piece: Piece, depth: int) -> list[int]:
    """Which arrays of a term are factors that differ from row to row."""
    first = len(piece.levels) - len(piece.term.factors)  # an index stands before them
    return [i for i, level in enumerate(piece.levels) if i >= first and level == depth]


def at_once(leaf: Leaf, entries: int) -> int:
    """Of how many examples the rows have so many entries; 1 where those of one have more."""
    per_example = prod(leaf.shape) * (leaf.outputs or 1)
    return max(1, entries // per_example) if thresholds.exceeds(per_example, 0) else entries


def over_rows(
    fun: Callable[..., Any], leaf: Leaf, *numbers: Any, materializes: bool = False
) -> Any:
    """`fun(terms of one row, *numbers of it)` for each row.

    Trees of numbers have arrays of shape (N, K), (N,) or (), for rows, for examples or for all.
    Where `fun` materialises rows, only some examples are done at a time.
    """
    for level in (2, 1)[leaf.outputs is None :]:
        own = jax.tree.map(lambda x, level=level: 0 if x.ndim >= level else None, numbers)
        axes = [piece.in_axes(level) for piece in leaf.pieces], *own
        size = leaf.size if level == 1 else leaf.outputs
        if level == 1 and materializes:
            fun = _some_at_once(fun, axes, leaf.size, at_once(leaf, thresholds.ENTRIES_AT_ONCE))
        else:
            fun = jax.vmap(fun, in_axes=axes, axis_size=size)
    return fun(leaf.terms, *numbers)


def _some_at_once(
    fun: Callable[..., Any], in_axes: Any, size: int, at_once: int
) -> Callable[..., Any]:
    shared = all(axis is None for axis in jax.tree.leaves(in_axes, is_leaf=lambda x: x is None))
    if shared or not thresholds.exceeds(size, at_once):
        return jax.vmap(fun, in_axes=in_axes, axis_size=size)

    def mapped(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        axes = jax.tree.leaves(in_axes, is_leaf=lambda x: x is None)
        mapped_at = [i for i, axis in enumerate(axes) if axis is not None]

        def one(xs: list[jax.Array]) -> Any:
            values = list(leaves)
            for i, x in zip(mapped_at, xs, strict=True):
                values[i] = x
            return fun(*jax.tree.unflatten(treedef, values))

        rows_first = [jnp.moveaxis(leaves[i], axes[i], 0) for i in mapped_at]
        return jax.lax.map(one, rows_first, batch_size=at_once)

    return mapped


# --------------------------------------------------------------------------------------------------
# One row


def row(leaf: Leaf, terms: Sequence[Term]) -> jax.Array:
    """One row of a leaf as an array, in its carried dtype."""
    total = jnp.zeros(leaf.shape, leaf.carried)
    for piece, term in zip(leaf.pieces, terms, strict=True):
        block = apply(piece.tail, _terms.materialize(term)).astype(leaf.carried)
        total += times(block, piece.factor)
    return total


def times(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def inner(one: Leaf, xs: Sequence[Term], other: Leaf, ys: Sequence[Term]) -> jax.Array:
    """The inner product of two rows; the left one is conjugated."""
    total = jnp.zeros((), one.carried)
    for a, x in zip(one.pieces, xs, strict=True):
        for b, y in zip(other.pieces, ys, strict=True):
            product = _pair(a, x, b, y).astype(one.carried)
            total += times(product, a.factor * b.factor)
    return total


def _pair(a: Piece, x: Term, b: Piece, y: Term) -> jax.Array:
    if disjoint(a.tail, b.tail):
        return jnp.zeros((), _terms.dtype_of(x))
    if are_alike(a, b):
        return _terms.inner(x, y)
    if isinstance(x, Dense):
        return _terms.apply_own(y, _pulled(b, y, _block(a, x).conj()))
    if isinstance(y, Dense):
        return _terms.apply_own(x, _pulled(a, x, _block(b, y).conj())).conj()
    return jnp.sum(_block(a, x).conj() * _block(b, y))


def are_alike(x: Piece, y: Piece) -> bool:
    """Whether inner products of two pieces can be taken before their tails."""
    return x.shape == y.shape and x.tail == y.tail and isometric(x.tail)


def _block(piece: Piece, term: Term) -> jax.Array:
    return apply(piece.tail, _terms.materialize(term))


def _pulled(piece: Piece, term: Term, v: jax.Array) -> jax.Array:
    return transposed(piece.tail, piece.shape, v.astype(_terms.dtype_of(term)))


def materializes(one: Leaf, other: Leaf) -> bool:
    """Whether inner products of rows of two leaves need rows as arrays."""

    def free(a: Piece, b: Piece) -> bool:
        if isinstance(a.term, Dense) or isinstance(b.term, Dense) or disjoint(a.tail, b.tail):
            return True
        windows = isinstance(a.term, Windows) or isinstance(b.term, Windows)
        return are_alike(a, b) and not windows

    return not all(free(a, b) for a in one.pieces for b in other.pieces)
