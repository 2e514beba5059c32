"""Terms: what one row of a gradient leaf is made of, and what is computed from it without the leaf.

Functions here speak of one row; `jax.vmap` maps them over examples and outputs. A row is a block of
shape (B, m, n), or of any shape where it is dense. B counts blocks (scanned layers, experts), T the
vector pairs whose outer products add up in a block (positions of a sequence, uses of a weight).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, TypeAlias, TypeGuard

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.algebra import carried_dtype
from . import thresholds
from .einsum import dot, times_counts, times_rows_twice
from .patches import Windows

_register = jax.tree_util.register_dataclass


@partial(_register, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """The row itself."""

    value: jax.Array

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        return (self.value,)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@partial(_register, data_fields=["left", "right"], meta_fields=["precision"])
@dataclass(frozen=True)
class Outer:
    """Block b is the sum over t of the outer products of left[b, t] and right[b, t]."""

    left: jax.Array  # (B, T, m)
    right: jax.Array  # (B, T, n)
    precision: Any = None  # in which sums of rows are contracted, as the user's own was asked for

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        return (self.left, self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.left.shape[0], self.left.shape[-1], self.right.shape[-1])


@partial(_register, data_fields=["index", "right"], meta_fields=["length"])
@dataclass(frozen=True)
class Scatter:
    """An outer whose left vectors are one-hot: right[b, t] is added to line index[b, t] of m."""

    index: jax.Array  # (B, T), within 0:length, or length for what is added to no line
    right: jax.Array  # (B, T, n), or (B, 1, n) where one vector is added to all lines
    length: int

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        return (self.right,)

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.index.shape[0], self.length, self.right.shape[-1])


Term: TypeAlias = Dense | Outer | Scatter | Windows


def dtype_of(term: Term) -> Any:
    """The carried dtype of the entries of a row."""
    return carried_dtype(term.value.dtype if isinstance(term, Dense) else term.right.dtype)


def materialize(term: Term) -> jax.Array:
    """The row as one array, in its carried dtype."""
    match term:
        case Dense(value):
            return value.astype(dtype_of(term))
        case Outer(left, right):
            return dot("btm,btn->bmn", left, right)
        case Scatter(index, right):
            empty = jnp.zeros(term.shape, dtype_of(term))
            return add_lines(empty, index, right.astype(empty.dtype))
        case Windows():
            return term.materialize()


def at_offset(term: Outer | Windows, o: jax.Array) -> Outer:
    """The lines of one window, as outer products; all lines of what has no windows."""
    return Outer(*term.at(o)) if isinstance(term, Windows) else term


def add_lines(block: jax.Array, index: jax.Array, lines: jax.Array) -> jax.Array:
    """Add lines (B, ..., n) to the places index (B, ...) of each block of (B, m, n)."""
    lines = jnp.broadcast_to(lines, (*index.shape, lines.shape[-1]))
    if block.shape[0] == 1:
        flat = lines.reshape(-1, lines.shape[-1])
        return block.at[0, index.reshape(-1)].add(flat, mode="drop")
    blocks = lax.broadcasted_iota(index.dtype, index.shape, 0)
    return block.at[blocks, index].add(lines, mode="drop")


def inner(x: Term, y: Term) -> jax.Array:
    """<x, y> of two rows in one block layout; the left one conjugated."""
    if isinstance(x, Dense):
        return apply_own(y, materialize(x).conj())
    if isinstance(y, Dense):
        return apply_own(x, materialize(y).conj()).conj()
    if adds_one(x) and adds_one(y):
        rights = dot("bn,bn->b", x.right[:, 0].conj(), y.right[:, 0])
        return jnp.sum(times_counts(_equal_lines(x, y), rights))
    lefts, rights = pair_factors(x, y)
    return jnp.sum(jnp.where(lefts, rights, 0) if lefts.dtype == bool else lefts * rights)


def pair_factors(x: Term, y: Term) -> tuple[jax.Array, jax.Array]:
    """The inner products of the left vectors t and s, and of the right ones: (b, t, s)."""
    match x, y:
        case Outer(), Outer():
            lefts = dot("btm,bsm->bts", _conjugated(x.left), y.left)
        case Scatter(), Scatter():
            lefts = _same_index(x, y)
        case Outer(), Scatter():
            lefts = _columns(x.left, y.index).conj()
        case Scatter(), Outer():
            lefts = jnp.swapaxes(_columns(y.left, x.index), 1, 2)
        case _:
            raise TypeError(f"no pairs of {type(x).__name__} and {type(y).__name__}")
    return lefts, dot("btn,bsn->bts", _conjugated(x.right), y.right)


def _conjugated(x: jax.Array) -> jax.Array:
    return lax.conj(x) if jnp.iscomplexobj(x) else x


def _columns(left: jax.Array, index: jax.Array) -> jax.Array:
    """left[b, t, index[b, s]], shape (B, T, S)."""
    places = index[:, None, :]
    return jnp.take_along_axis(left, places, axis=2, mode="fill", fill_value=0)


def lines_at(block: jax.Array, index: jax.Array) -> jax.Array:
    """The lines (B, index) of a block (B, m, n): shape (B, T, n)."""
    places = index[:, :, None]
    return jnp.take_along_axis(block, places, axis=1, mode="fill", fill_value=0)


def apply_row(term: Term, v: jax.Array) -> jax.Array:
    """The sum of the products of a row's entries with those of v (no conjugate)."""
    match term:
        case Dense(value):
            return jnp.sum(value.astype(dtype_of(term)) * v)
        case Outer(left, right):
            return jnp.sum(dot("btm,bmn->btn", left, v) * right.astype(dtype_of(term)))
        case Scatter(index, right):
            return jnp.sum(lines_at(v, index) * right.astype(dtype_of(term)))
        case Windows():
            return term.apply(v)


def apply_own(term: Term, v: jax.Array) -> jax.Array:
    """`apply_row` for a v that each row has its own of, as large as the row: memory is no matter.

    (XLA on CPUs fails at the contraction of `apply_row` with three axes that both operands have.)
    """
    return jnp.sum(materialize(term) * v) if isinstance(term, Outer) else apply_row(term, v)


def has_many_pairs(term: Term) -> bool:
    """Whether T > 1; a symbolic T, which may be anything, counts as many."""
    count = pair_count(term)
    return not isinstance(count, int) or count > 1


def pair_count(term: Term) -> int:
    """T: how many outer products add up in a block; one where the row is an array."""
    match term:
        case Dense():
            return 1
        case Outer(left, _):
            return left.shape[-2]
        case Scatter(index, _, _):
            return index.shape[-1]
        case Windows():
            return term.pairs


def form(term: Term) -> Any:
    """Equal for terms that can be `joined`, apart from their T; None for those that cannot."""
    match term:
        case Outer(left, right, precision):
            return left.dtype, right.dtype, precision
        case Scatter(index, right, length) if index.shape[-1] == right.shape[-2]:
            return index.dtype, right.dtype, length
    return None


def joined(terms: Sequence[Term]) -> Term:
    """The sum of terms of one form, as one that has the outer products of all."""
    arrays = zip(*map(jax.tree.leaves, terms), strict=True)
    first = terms[0]
    axes = (-1, -2) if isinstance(first, Scatter) else (-2, -2)
    whole = [jnp.concatenate(x, axis) for x, axis in zip(arrays, axes, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(first), whole)


def collapsed(term: Scatter) -> Scatter:
    """The same row with each line at one of the places that share its index, and zeros else."""
    if not _has_few_pairs(term):
        return _collapsed_by_lines(term)
    dtype = dtype_of(term)
    same = _same_index(term, term)
    t, s = (lax.broadcasted_iota(jnp.int32, same.shape, axis) for axis in (1, 2))
    is_first = jnp.logical_not(jnp.any(same & (s < t), axis=2))
    if term.right.shape[1] == 1:
        right = jnp.sum(same, axis=2, dtype=dtype)[..., None] * term.right.astype(dtype)
    else:
        right = dot("bts,bsn->btn", same.astype(dtype), term.right)
    right = jnp.where(is_first[..., None], right, jnp.zeros((), dtype))
    return Scatter(term.index, right, term.length)


def _collapsed_by_lines(term: Scatter) -> Scatter:
    """The same by an array in which each line of the row has one, any, of its places."""
    count = pair_count(term)
    blocks, places = (lax.broadcasted_iota(jnp.int32, term.index.shape, i) for i in (0, 1))
    kept = jnp.zeros(term.shape[:2], places.dtype)
    kept = kept.at[blocks, term.index].set(places, mode="drop")
    index = kept.at[blocks, term.index].get(mode="fill", fill_value=count)
    return replace(term, right=materialize(Scatter(index, term.right, count)))


def _same_index(x: Scatter, y: Scatter) -> jax.Array:
    """Whether places t of x and s of y are the same line: shape (B, T, S)."""
    others = jnp.where(y.index < y.length, y.index, jnp.full_like(y.index, -1))
    return x.index[:, :, None] == others[:, None, :]


def equal_places(term: Scatter) -> jax.Array:
    """How many pairs of its places are the same line: real, shape (B,)."""
    dtype = jnp.finfo(dtype_of(term)).dtype
    if _has_few_pairs(term):
        return jnp.sum(_same_index(term, term), axis=(1, 2), dtype=dtype)
    return jnp.sum(_counts(term, dtype) ** 2, axis=(1, 2))


def _has_few_pairs(term: Scatter) -> bool:
    """Whether to compare all pairs of places costs less than an array of a number for each line."""
    return not thresholds.exceeds(_pairs_cost(term), thresholds.PAIRS * term.shape[0] * term.length)


def _pairs_cost(term: Scatter) -> int:
    """What it takes to add up, for each place, the lines of all places with its index.

    In multiplications: a comparison takes as long as 16.
    """
    entries = 0 if term.right.shape[1] == 1 else term.right.shape[-1]
    return term.shape[0] * pair_count(term) ** 2 * (16 + entries)


def meeting_cost(term: Term) -> int:
    """Operations that find the look-ups of one row that share an index."""
    if not isinstance(term, Scatter) or not has_many_pairs(term):
        return 0
    return _pairs_cost(term) if _has_few_pairs(term) else prod(term.shape[:2]) + term.right.size


def _counts(term: Scatter, dtype: Any) -> jax.Array:
    """How many places go to each line: shape (B, m, 1)."""
    empty = jnp.zeros((*term.shape[:2], 1), dtype)
    return add_lines(empty, term.index, jnp.ones((1, 1, 1), dtype))


def adds_one(term: Term) -> TypeGuard[Scatter]:
    """Whether a row adds one vector to many lines."""
    return isinstance(term, Scatter) and term.right.shape[1] == 1 and has_many_pairs(term)


def _equal_lines(x: Scatter, y: Scatter) -> jax.Array:
    """How many pairs of places of x and y are the same line: shape (B,)."""
    return jnp.sum(lines_at(_counts(x, dtype_of(x)), y.index), axis=(1, 2))


def scaled(term: Term, scales: Sequence[jax.Array]) -> Term:
    """The row with each factor multiplied by the square of a real number, carried."""
    first, *rest = map(_scaled, term.factors, scales)
    match term:
        case Dense():
            return Dense(first)
        case Outer():
            return replace(term, left=first, right=rest[0])
        case Scatter(index, _, length):
            return Scatter(index, first, length)
        case Windows():
            return replace(term, left=first, right=rest[0])


def _scaled(x: jax.Array, scale: jax.Array) -> jax.Array:
    return times_rows_twice(lax.convert_element_type(x, carried_dtype(x.dtype)), scale, 0)


def squared(term: Term) -> Term:
    """The row with each entry's |entry|**2, where T = 1 or, in a scatter, no two lines meet."""
    match term:
        case Dense(value):
            return Dense(_square(value))
        case Outer(left, right):
            return Outer(_square(left), _square(right))
        case Scatter(index, right, length):
            return Scatter(index, _square(right), length)
    raise TypeError(f"no squares of {type(term).__name__}")


def has_squares(term: Term) -> bool:
    """Whether squares of entries are cheaper as a term of the same kind than from the row."""
    return isinstance(term, Scatter) or not (has_many_pairs(term) or isinstance(term, Windows))


def _square(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(carried_dtype(x.dtype))) ** 2


def row_cost(term: Term) -> int:
    """Multiplications and additions that materialise one row."""
    if isinstance(term, Outer | Windows):
        blocks, m, n = term.shape
        return 2 * blocks * pair_count(term) * m * n
    return term.value.size if isinstance(term, Dense) else term.right.size


def inner_cost(x: Term, y: Term) -> int:
    """Multiplications and additions of one inner product of two rows."""
    if isinstance(x, Dense) or isinstance(y, Dense):
        return 2 * max(row_cost(x), row_cost(y))
    blocks, m, n = x.shape
    if adds_one(x) and adds_one(y):
        return 2 * blocks * (pair_count(y) + n)
    m = m if isinstance(x, Outer) and isinstance(y, Outer) else 1
    return 2 * blocks * pair_count(x) * pair_count(y) * (m + n)
