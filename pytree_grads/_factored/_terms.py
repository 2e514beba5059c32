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

from .._tree import carried_dtype

_register = jax.tree_util.register_dataclass


def dot(spec: str, *operands: jax.Array, precision: Any = lax.Precision.HIGHEST) -> jax.Array:
    """An einsum that is carried in float32 or wider."""
    dtype = carried_dtype(jnp.promote_types(*(x.dtype for x in operands)))
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
        return (self.left.shape[-3], self.left.shape[-1], self.right.shape[-1])


@partial(_register, data_fields=["index", "right"], meta_fields=["length"])
@dataclass(frozen=True)
class Scatter:
    """An outer whose left vectors are one-hot: right[b, t] is added to line index[b, t] of m."""

    index: jax.Array  # (B, T), within 0:length
    right: jax.Array  # (B, T, n)
    length: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.index.shape[-2], self.length, self.right.shape[-1])


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
    """Add lines (..., B, T, n) to the places (B, index) of a block (B, m, n)."""
    if block.shape[0] == 1:
        flat = lines.reshape(-1, lines.shape[-1])
        return block.at[0, index.reshape(-1)].add(flat, mode="drop")
    blocks = lax.broadcasted_iota(index.dtype, index.shape, index.ndim - 2)
    return block.at[blocks, index].add(lines, mode="drop")


def inner(x: Term, y: Term) -> jax.Array:
    """<x, y> of two rows in one block layout; the left one conjugated."""
    match x, y:
        case Outer(), Outer():
            if x.left.shape[-2] == 1 == y.left.shape[-2]:
                lefts = dot("bm,bm->b", x.left[:, 0].conj(), y.left[:, 0])
                rights = dot("bn,bn->b", x.right[:, 0].conj(), y.right[:, 0])
            else:
                lefts = dot("btm,bsm->bts", x.left.conj(), y.left)
                rights = dot("btn,bsn->bts", x.right.conj(), y.right)
            return jnp.sum(lefts * rights)
        case Scatter(), Scatter():
            same = x.index[:, :, None] == y.index[:, None, :]
            rights = dot("btn,bsn->bts", x.right.conj(), y.right)
            return jnp.sum(jnp.where(same, rights, 0))
        case Outer(), Scatter():
            lefts = _lines(jnp.swapaxes(x.left, -1, -2).conj(), y.index)  # (B, s, t)
            rights = dot("bsn,btn->bst", y.right, x.right.conj())
            return jnp.sum(lefts * rights)
        case Scatter(), Outer():
            return inner(y, x).conj()
        case Dense(value), _:
            return apply_row(y, value.conj())
        case _, Dense(value):
            return apply_row(x, value.conj()).conj()
    raise AssertionError((x, y))


def _lines(block: jax.Array, index: jax.Array) -> jax.Array:
    """The lines (B, index) of a block (B, m, n): shape (B, T, n)."""
    return jnp.take_along_axis(block, index[:, :, None], axis=1, mode="clip")


def apply_row(term: Term, v: jax.Array) -> jax.Array:
    """The sum of the products of a row's entries with those of v (no conjugate)."""
    match term:
        case Dense(value):
            return jnp.sum(value.astype(dtype_of(term)) * v)
        case Outer(left, right):
            return jnp.sum(dot("btm,bmn->btn", left, v) * right.astype(dtype_of(term)))
        case Scatter(index, right):
            return jnp.sum(_lines(v, index) * right.astype(dtype_of(term)))


def mass(term: Term) -> jax.Array:
    """The sum of the norms of a row's parts: what bounds the rounding of an inner product."""
    match term:
        case Dense(value):
            return _length(value.reshape(-1))
        case Outer(left, right):
            return jnp.sum(_length(left) * _length(right))
        case Scatter(_, right):
            return jnp.sum(_length(right))


def _length(x: jax.Array) -> jax.Array:
    x = x.astype(carried_dtype(x.dtype))
    return jnp.sqrt(jnp.sum(jnp.real(x * x.conj()), axis=-1))


def cannot_cancel(term: Term) -> bool:
    """Whether the squared norm of a row is a sum of squares, which cannot cancel."""
    return isinstance(term, Dense) or term.right.shape[-2] <= 1


def normalized(term: Term) -> tuple[Term, jax.Array]:
    """`(x, size)`: the row is `size * x`, and the factors of x have entries of order one.

    `size` is a power of two, so scaling does not round; derivatives pass through x alone.
    """
    match term:
        case Dense(value):
            value, size = _unit_entries(value)
            return Dense(value), size
        case Outer(left, right):
            left, one = _unit_entries(left)
            right, other = _unit_entries(right)
            return Outer(left, right), one * other
        case Scatter(index, right, length):
            right, size = _unit_entries(right)
            return Scatter(index, right, length), size


def _unit_entries(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    x = x.astype(carried_dtype(x.dtype))
    size = power_of_two(jnp.max(jnp.abs(x), initial=0))
    return x * (1 / size), size


def power_of_two(x: jax.Array) -> jax.Array:
    """The power of two at or below x > 0, within the normal range; 1 for zero, NaN and infinity."""
    limits = jnp.finfo(x.dtype)
    # One short of each end of the range, so that the reciprocal is normal as well.
    exponent = jnp.clip(jnp.floor(jnp.log2(x)), limits.minexp + 1, limits.maxexp - 2)
    usable = (x > 0) & jnp.isfinite(x)
    return lax.stop_gradient(jnp.exp2(jnp.where(usable, exponent, 0)).astype(x.dtype))


def scaled(term: Term, factor: jax.Array) -> Term:
    """The row times a scalar."""
    match term:
        case Dense(value):
            return Dense(value.astype(dtype_of(term)) * factor)
        case Outer(left, right):
            return Outer(left, right.astype(dtype_of(term)) * factor)
        case Scatter(index, right, length):
            return Scatter(index, right.astype(dtype_of(term)) * factor, length)


def norm(term: Term, *, bounded: bool) -> jax.Array:
    """The norm of one row, without overflow or underflow on the way to it."""
    unit, size = normalized(term)
    square = jnp.real(inner(unit, unit))
    if bounded and not cannot_cancel(term):
        square = not_too_small(square, mass(unit))
    return size.astype(square.dtype) * safe_sqrt(square)


def not_too_small(square: jax.Array, mass: jax.Array) -> jax.Array:
    """A squared norm that is no smaller than the true one, for a row with parts of total `mass`.

    The inner product of T > 1 pairs subtracts, and loses the digits of a row whose parts nearly
    cancel: it is rounded by the order of eps * mass**2. Where that is more than a thousandth of
    the squared norm, it is added.
    """
    mass = lax.stop_gradient(mass.astype(square.dtype))
    rounding = mass**2 * jnp.asarray(4 * jnp.finfo(square.dtype).eps, square.dtype)
    square = jnp.where(square < 0, jnp.zeros_like(square), square)  # keeps NaN
    in_doubt = rounding > square * jnp.asarray(1e-3, square.dtype)
    return jnp.where(in_doubt, square + rounding, square)


def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of x, 0 where x is not positive, with derivative 0 there; keeps NaN."""
    idle = x <= 0
    root = jnp.sqrt(jnp.where(idle, jnp.ones_like(x), x))
    return jnp.where(idle, jnp.zeros_like(x), root)


def squared(term: Term) -> Term:
    """The row with each entry's |entry|**2, for a term that cannot cancel."""
    match term:
        case Dense(value):
            return Dense(_square(value))
        case Outer(left, right):
            return Outer(_square(left), _square(right))
        case Scatter(index, right, length):
            return Scatter(index, _square(right), length)


def _square(x: jax.Array) -> jax.Array:
    return jnp.abs(x.astype(carried_dtype(x.dtype))) ** 2


def row_cost(term: Term) -> int:
    """Multiplications and additions that materialise one row."""
    if isinstance(term, Outer):
        blocks, m, n = term.shape
        return 2 * blocks * term.left.shape[-2] * m * n
    return term.value.size if isinstance(term, Dense) else term.right.size


def inner_cost(x: Term, y: Term) -> int:
    """Multiplications and additions of one inner product of two rows."""
    if isinstance(x, Dense) or isinstance(y, Dense):
        return 2 * max(row_cost(x), row_cost(y))
    blocks, m, n = x.shape
    m = m if isinstance(x, Outer) and isinstance(y, Outer) else 1
    return 2 * blocks * x.right.shape[-2] * y.right.shape[-2] * (m + n)
