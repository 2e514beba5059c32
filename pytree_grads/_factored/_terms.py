"""Terms: what one row of a gradient leaf is made of, and what is computed from it without the leaf.

Functions here speak of one row; `jax.vmap` maps them over examples and outputs. A row is a block of
shape (B, m, n), or of any shape where it is dense. B counts blocks (scanned layers, experts), T the
vector pairs whose outer products add up in a block (positions of a sequence, uses of a weight).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from .._tree import carried_dtype, common_dtype

LARGE_BLOCK = 1 << 13  # entries of factors: enough work to make the turns of a loop cheap

_register = jax.tree_util.register_dataclass


def dot(spec: str, *operands: jax.Array, precision: Any = lax.Precision.HIGHEST) -> jax.Array:
    """An einsum that is carried in float32 or wider."""
    dtype = common_dtype(*(x.dtype for x in operands))
    if len({x.dtype for x in operands}) > 1:  # else products of narrow floats are exact as they are
        operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=dtype)


@partial(_register, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """The row itself."""

    value: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape


@partial(_register, data_fields=["left", "right"], meta_fields=[])
@dataclass(frozen=True)
class Outer:
    """Block b is the sum over t of the outer products of left[b, t] and right[b, t]."""

    left: jax.Array  # (B, T, m)
    right: jax.Array  # (B, T, n)

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
    def shape(self) -> tuple[int, ...]:
        return (self.index.shape[0], self.length, self.right.shape[-1])


Term: TypeAlias = Dense | Outer | Scatter


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
        return apply_row(y, materialize(x).conj())
    if isinstance(y, Dense):
        return apply_row(x, materialize(y).conj()).conj()
    return jnp.sum(pairs(x, y))


def pairs(x: Outer | Scatter, y: Outer | Scatter) -> jax.Array:
    """<x, y> pair by pair: entry (b, t, s) is the inner product of outer products t and s."""
    match x, y:
        case Outer(), Outer():
            lefts = dot("btm,bsm->bts", x.left.conj(), y.left)
        case Scatter(), Scatter():
            lefts = _same_index(x, y)
        case Outer(), Scatter():
            lefts = _columns(x.left, y.index).conj()
        case Scatter(), Outer():
            lefts = jnp.swapaxes(_columns(y.left, x.index), 1, 2)
    rights = dot("btn,bsn->bts", x.right.conj(), y.right)
    return jnp.where(lefts, rights, 0) if lefts.dtype == bool else lefts * rights


def _columns(left: jax.Array, index: jax.Array) -> jax.Array:
    """left[b, t, index[b, s]], shape (B, T, S)."""
    places = index[:, None, :]
    return jnp.take_along_axis(left, places, axis=2, mode="fill", fill_value=0)


def _lines(block: jax.Array, index: jax.Array) -> jax.Array:
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
            return jnp.sum(_lines(v, index) * right.astype(dtype_of(term)))


def pair_count(term: Term) -> int:
    """T: how many outer products add up in a block; one where the row is an array."""
    match term:
        case Dense():
            return 1
        case Outer(left, _):
            return left.shape[-2]
        case Scatter(index, _, _):
            return index.shape[-1]


def cannot_cancel(term: Term) -> bool:
    """Whether the squared norm of a row is a sum of squares, or of numbers of one sign."""
    return isinstance(term, Dense | Scatter) or pair_count(term) <= 1


def collapsed(term: Scatter) -> Scatter:
    """The same row with each line at the first of the places that share its index, else zeros."""
    same = _same_index(term, term)
    t, s = (lax.broadcasted_iota(jnp.int32, same.shape, axis) for axis in (1, 2))
    is_first = jnp.logical_not(jnp.any(same & (s < t), axis=2))
    dtype = dtype_of(term)
    if term.right.shape[1] == 1:
        right = jnp.sum(same, axis=2, dtype=dtype)[..., None] * term.right.astype(dtype)
    else:
        right = dot("bts,bsn->btn", same.astype(dtype), term.right)
    right = jnp.where(is_first[..., None], right, jnp.zeros((), dtype))
    return Scatter(term.index, right, term.length)


def _same_index(x: Scatter, y: Scatter) -> jax.Array:
    """Whether places t of x and s of y are the same line: shape (B, T, S)."""
    others = jnp.where(y.index < y.length, y.index, jnp.full_like(y.index, -1))
    return x.index[:, :, None] == others[:, None, :]


def normalized(term: Term) -> tuple[Term, jax.Array]:
    """`(x, size)`: the row is `size * x`, and no entry of the factors of x is above 4."""
    match term:
        case Dense(value):
            value, size = _normalized(value)
            return Dense(value), size
        case Outer(left, right):
            left, one = _normalized(left)
            right, other = _normalized(right)
            return Outer(left, right), one * other
        case Scatter(index, right, length):
            right, size = _normalized(right)
            return Scatter(index, right, length), size


def _normalized(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(carried_dtype(x.dtype))
    size = magnitude(jnp.max(jnp.abs(x), initial=0))
    return x * (1 / size).astype(x.dtype), size


def magnitude(x: jax.Array) -> jax.Array:
    """x > 0, moved to where its reciprocal is a normal number; a constant to derivatives."""
    limits = jnp.finfo(x.dtype)
    return lax.stop_gradient(jnp.clip(x, float(limits.tiny), float(limits.max) / 4))


def scaled(term: Term, factor: jax.Array) -> Term:
    """The row times a real scalar."""
    factor = factor.astype(dtype_of(term))
    match term:
        case Dense(value):
            return Dense(value.astype(dtype_of(term)) * factor)
        case Outer(left, right):
            return Outer(left, right.astype(dtype_of(term)) * factor)
        case Scatter(index, right, length):
            return Scatter(index, right.astype(dtype_of(term)) * factor, length)


def norm(term: Term) -> jax.Array:
    """The norm of one row, without overflow or underflow on the way to it, and not too small.

    Inner products of T > 1 pairs subtract, and lose the digits of a row whose parts nearly cancel:
    the squared norm is rounded by the order of eps times the sum of the absolute values of what it
    adds up. Where that is more than a thousandth of the squared norm, it is added.
    """
    if _has_large_blocks(term):
        # One block after the other: what is scaled here need not be held for all blocks at once.
        arrays, treedef = jax.tree.flatten(term)

        def one(block: list[jax.Array]) -> jax.Array:
            return norm(jax.tree.unflatten(treedef, [x[None] for x in block]))

        return norm(Dense(lax.map(one, arrays)))
    if isinstance(term, Scatter) and term.right.shape[1] > 1:
        term = Dense(collapsed(term).right)
    unit, size = normalized(term)
    if isinstance(unit, Dense):
        square = jnp.sum(jnp.abs(unit.value) ** 2)
    else:
        products = jnp.real(pairs(unit, unit))
        square = jnp.sum(products)
        if not cannot_cancel(term):
            square = not_too_small(square, jnp.sum(jnp.abs(products)))
    return size.astype(square.dtype) * safe_sqrt(square)


def _has_large_blocks(term: Term) -> bool:
    if isinstance(term, Dense) or pair_count(term) <= 1 or term.right.shape[0] == 1:
        return False
    return sum(x.size for x in jax.tree.leaves(term)) // term.right.shape[0] >= LARGE_BLOCK


def not_too_small(square: jax.Array, absolute: jax.Array) -> jax.Array:
    """A squared norm plus its rounding error, if that is of weight; see `norm`.

    `absolute` is the sum of the absolute values of the summands of the squared norm.
    """
    rounding = lax.stop_gradient(absolute) * float(8 * jnp.finfo(square.dtype).eps)
    return jnp.where(rounding > square * 1e-3, jnp.maximum(square, 0) + rounding, square)


def mass(term: Term) -> jax.Array:
    """The sum of the norms of the parts of a row; its square bounds what `not_too_small` asks."""
    if isinstance(term, Dense):
        return safe_sqrt(jnp.sum(jnp.abs(materialize(term)) ** 2))
    products = jnp.real(pairs(term, term))
    t, s = (lax.broadcasted_iota(jnp.int32, products.shape, axis) for axis in (1, 2))
    squares = jnp.sum(jnp.where(t == s, products, jnp.zeros_like(products)), axis=2)
    return jnp.sum(safe_sqrt(squares))


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of x, 0 where x is not positive, with derivative 0 there; keeps NaN."""
    idle = x <= 0
    root = jnp.sqrt(jnp.where(idle, jnp.ones_like(x), x))
    return jnp.where(idle, jnp.zeros_like(x), root)


def squared(term: Term) -> Term:
    """The row with each entry's |entry|**2, where T = 1 or, in a scatter, no two lines meet."""
    match term:
        case Dense(value):
            return Dense(_square(value))
        case Outer(left, right):
            return Outer(_square(left), _square(right))
        case Scatter(index, right, length):
            return Scatter(index, _square(right), length)


def has_squares(term: Term) -> bool:
    """Whether squares of entries are cheaper as a term of the same kind than from the row."""
    if isinstance(term, Scatter):
        return pair_count(term) ** 2 <= max(1, term.length)
    return pair_count(term) <= 1


def _square(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(carried_dtype(x.dtype))) ** 2


def row_cost(term: Term) -> int:
    """Multiplications and additions that materialise one row."""
    if isinstance(term, Outer):
        blocks, m, n = term.shape
        return 2 * blocks * pair_count(term) * m * n
    return term.value.size if isinstance(term, Dense) else term.right.size


def inner_cost(x: Term, y: Term) -> int:
    """Multiplications and additions of one inner product of two rows."""
    if isinstance(x, Dense) or isinstance(y, Dense):
        return 2 * max(row_cost(x), row_cost(y))
    blocks, m, n = x.shape
    m = m if isinstance(x, Outer) and isinstance(y, Outer) else 1
    return 2 * blocks * pair_count(x) * pair_count(y) * (m + n)
