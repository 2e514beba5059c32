"""Leaves in factored form: all rows of one gradient leaf, and how functions map over them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._tree import carried_dtype
from . import _terms
from ._tails import Shape, Tail, apply, disjoint, isometric
from ._terms import Dense, Term

ENTRIES_AT_ONCE = 1 << 22  # of materialised rows, in loops that materialise some rows at a time


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["term"],
    meta_fields=["shape", "tail", "factor", "levels", "origin"],
)
@dataclass(frozen=True)
class Piece:
    """`factor * tail(term)` for every row.

    The arrays of the term have up to two leading axes, N examples and K outputs of each. `levels`
    says which, for each array in flattening order: 2 for both, 1 for N alone (the outputs share
    it), 0 for none (all rows share it).
    """

    term: Term
    shape: Shape  # of one row of the term
    tail: Tail
    factor: float
    levels: tuple[int, ...]
    origin: str  # the primitive that made the term

    def in_axes(self, level: int) -> Any:
        """The `in_axes` of the term for `jax.vmap` over N (level 1) or K (level 2)."""
        treedef = jax.tree.structure(self.term)
        return jax.tree.unflatten(treedef, [0 if x >= level else None for x in self.levels])


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


def take(leaf: Leaf, start: Any, size: int) -> Leaf:
    """The rows of `size` examples from `start` on, which may be traced."""

    def of(piece: Piece) -> Piece:
        arrays, treedef = jax.tree.flatten(piece.term)
        cut = [
            jax.lax.dynamic_slice_in_dim(x, start, size) if level else x
            for x, level in zip(arrays, piece.levels, strict=True)
        ]
        return replace(piece, term=jax.tree.unflatten(treedef, cut))

    return replace(leaf, pieces=tuple(map(of, leaf.pieces)), size=size)


def over_rows(
    fun: Callable[..., Any], leaf: Leaf, *arrays: jax.Array, materializes: bool = False
) -> Any:
    """`fun(terms of one row, *entries of arrays)` for each row; arrays begin like `leaf.rows`.

    Where `fun` materialises rows, only some examples are done at a time.
    """
    for level in (2, 1)[leaf.outputs is None :]:
        axes = [piece.in_axes(level) for piece in leaf.pieces], *([0] * len(arrays))
        size = leaf.size if level == 1 else leaf.outputs
        if level == 1 and materializes:
            at_once = ENTRIES_AT_ONCE // max(1, prod(leaf.shape) * (leaf.outputs or 1))
            fun = _some_at_once(fun, axes, size, max(1, at_once))
        else:
            fun = jax.vmap(fun, in_axes=axes, axis_size=size)
    return fun(leaf.terms, *arrays)


def _some_at_once(
    fun: Callable[..., Any], in_axes: Any, size: int, at_once: int
) -> Callable[..., Any]:
    if size <= at_once:
        return jax.vmap(fun, in_axes=in_axes, axis_size=size)

    def mapped(*args: Any) -> Any:
        leaves, treedef = jax.tree.flatten(args)
        axes = jax.tree.leaves(in_axes, is_leaf=lambda x: x is None)
        mapped_at = [i for i, axis in enumerate(axes) if axis == 0]

        def one(xs: list[jax.Array]) -> Any:
            values = list(leaves)
            for i, x in zip(mapped_at, xs, strict=True):
                values[i] = x
            return fun(*jax.tree.unflatten(treedef, values))

        return jax.lax.map(one, [leaves[i] for i in mapped_at], batch_size=at_once)

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


def shares_layout(x: Piece, y: Piece) -> bool:
    """Whether inner products of two pieces can be taken before their tails."""
    return x.shape == y.shape and x.tail == y.tail and isometric(x.tail)


def materializes(one: Leaf, other: Leaf) -> bool:
    """Whether inner products of rows of two leaves need rows as arrays."""
    pairs = ((x, y) for x in one.pieces for y in other.pieces)
    return not all(disjoint(x.tail, y.tail) or shares_layout(x, y) for x, y in pairs)


def inner(one: Leaf, xs: Sequence[Term], other: Leaf, ys: Sequence[Term]) -> jax.Array:
    """The inner product of two rows; the left one is conjugated."""
    total = jnp.zeros((), one.carried)
    for a, x in zip(one.pieces, xs, strict=True):
        for b, y in zip(other.pieces, ys, strict=True):
            if disjoint(a.tail, b.tail):
                continue
            if shares_layout(a, b):
                product = _terms.inner(x, y)
            else:
                left, right = (
                    apply(piece.tail, _terms.materialize(term)).astype(one.carried)
                    for piece, term in ((a, x), (b, y))
                )
                product = jnp.sum(left.conj() * right)
            total += times(product, a.factor * b.factor).astype(one.carried)
    return total


def length(leaf: Leaf, terms: Sequence[Term], *, bounded: bool) -> jax.Array:
    """The norm of one row, without overflow or underflow on the way to it.

    The inner product of T > 1 pairs subtracts, and loses the digits of a row whose parts nearly
    cancel: its rounding is of order eps * mass**2. With `bounded`, where that is more than a
    thousandth of the squared norm, it is added, and the result is not too small.
    """
    if not terms:
        return jnp.zeros((), leaf.real)
    if len(terms) > 1 and materializes(leaf, leaf):
        terms, pieces = [Dense(row(leaf, terms))], ()
    else:
        pieces = leaf.pieces
    normal, sizes = zip(*map(_terms.normalized, terms), strict=True)
    size = jnp.max(jnp.stack(sizes))
    if len(terms) > 1:
        normal = [_terms.scaled(x, s / size) for x, s in zip(normal, sizes, strict=True)]
    if not pieces:
        return size * safe_sqrt(jnp.sum(jnp.abs(normal[0].value) ** 2))
    square = jnp.real(inner(leaf, normal, leaf, normal)).astype(leaf.real)
    square = jnp.where(square < 0, jnp.zeros_like(square), square)  # keeps NaN
    if bounded and not (len(terms) == 1 and _terms.cannot_cancel(terms[0])):
        masses = [times(_terms.mass(x), abs(p.factor)) for x, p in zip(normal, pieces, strict=True)]
        mass = jax.lax.stop_gradient(jnp.sum(jnp.stack(masses)))
        rounding = times(mass**2, 4 * float(jnp.finfo(leaf.real).eps))
        square = jnp.where(rounding > times(square, 1e-3), square + rounding, square)
    return size * safe_sqrt(square)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root, with derivative 0 at 0."""
    root = jnp.sqrt(jnp.where(x == 0, jnp.ones_like(x), x))
    return jnp.where(x == 0, jnp.zeros_like(x), root)
