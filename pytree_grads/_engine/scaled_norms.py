"""Norms of one row, from its factors: `jax.vmap` maps these over examples and outputs.

Factors are divided by about their size before they are multiplied and squared, every pair of
vectors by sizes of its own; see `_norm_parts`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.algebra import carried_dtype, common_dtype
from . import thresholds
from .einsum import times_rows_twice
from .leaf import Leaf, inner, times
from .patches import Windows
from .scaling import inverse, power, root_of, safe_sqrt
from .terms import (
    Dense,
    Outer,
    Scatter,
    Term,
    collapsed,
    equal_places,
    has_many_pairs,
    pair_count,
    pair_factors,
    scaled,
)

Squared: TypeAlias = tuple[jax.Array, jax.Array | None, jax.Array]


def squared_norm(term: Term) -> Squared:
    """The squared norm of a row that is multiplied twice by a scale, and that scale, the last.

    Between them, where it is a sum that subtracts, that of the absolute values.
    """
    if _has_large_blocks(term):
        # One block after the other: what is scaled here need not be held for all blocks at once.
        arrays, treedef = jax.tree.flatten(term)

        def one(block: list[jax.Array]) -> Squared:
            return squared_norm(jax.tree.unflatten(treedef, [x[None] for x in block]))

        return _of_parts(*lax.map(one, arrays))
    if isinstance(term, Windows):
        return _of_windows(term)
    if isinstance(term, Scatter) and term.right.shape[1] > 1:
        term = Dense(collapsed(term).right)
    unit, scale = _unit(term)
    if isinstance(unit, Dense):
        return jnp.sum(jnp.abs(unit.value) ** 2), None, scale
    if isinstance(unit, Scatter):  # of one vector
        square = jnp.sum(jnp.abs(unit.right) ** 2, axis=(1, 2))
        return jnp.sum(equal_places(unit) * square), None, scale
    pairs = pair_factors(unit, unit)
    dtype = common_dtype(*(x.dtype for x in pairs))
    lefts, rights = (lax.convert_element_type(x, dtype) for x in pairs)
    products = lax.mul(lefts, rights)
    square = lax.reduce_sum(
        lax.real(products) if jnp.iscomplexobj(products) else products, (0, 1, 2)
    )
    if not has_many_pairs(unit):
        return square, None, scale
    # Not abs(lefts * rights): XLA on CPUs would keep the products for both sums.
    absolute = lax.reduce_sum(lax.mul(lax.abs(lefts), lax.abs(rights)), (0, 1, 2))
    return square, absolute, scale


@jax.jit
def _of_windows(term: Windows) -> Squared:
    return _of_parts(*term.over_offsets(lambda lines: squared_norm(Dense(lines))))


def _of_parts(squares: jax.Array, absolutes: jax.Array | None, scales: jax.Array) -> Squared:
    """Those of a row from those of its parts, which have scales of their own."""
    scale = jnp.min(scales)
    shares = scale / scales

    def total(x: jax.Array) -> jax.Array:
        return jnp.sum(times_rows_twice(times_rows_twice(x, shares, 0), shares, 0))

    return total(squares), None if absolutes is None else total(absolutes), scale


@jax.jit
def _size(x: jax.Array) -> jax.Array:
    """The largest absolute value over the last axis."""
    dtype = jnp.finfo(carried_dtype(x.dtype)).dtype
    x = lax.convert_element_type(lax.abs(lax.stop_gradient(x)), dtype)
    return lax.reduce(x, jnp.zeros((), dtype), lax.max, (x.ndim - 1,))


def _unit(term: Term, *, by_largest: bool = False) -> tuple[Term, jax.Array]:
    """A row multiplied twice by a scale that brings it near one, and that scale.

    By the largest entry, the smallest rows come near one too. XLA on CPUs takes twice as long.
    """
    if isinstance(term, Outer):
        scales, scale = _pair_scales(*map(_size, term.factors))
        return scaled(term, scales), scale
    (x,) = term.factors
    x = lax.convert_element_type(x, carried_dtype(x.dtype))
    if by_largest:
        scale = power(_size(lax.reshape(x, (x.size,))))
    else:
        scale = root_of(lax.stop_gradient(jnp.sum(jnp.abs(x) ** 2)))
    return scaled(term, [scale]), scale


@jax.jit
def _pair_scales(left: jax.Array, right: jax.Array) -> tuple[list[jax.Array], jax.Array]:
    """Scales for the vectors of pairs, from their sizes, and the scale of the row that these make.

    No product of a pair is too small or too large on the way, however the two share its size: one
    is brought near one, and the other takes what the pair has of the largest.
    """
    dtype = common_dtype(left.dtype, right.dtype)
    sizes = [lax.convert_element_type(x, dtype) for x in (left, right)]
    limits = jnp.finfo(dtype)
    least, most = (lax.full((), float(x), dtype) for x in (limits.tiny, 1 / limits.tiny))
    left, right = map(power, sizes)
    is_zero = lax.eq(lax.min(*sizes), lax.full_like(left, 0))
    # Not the scale, which XLA would keep as one more array.
    products = lax.max(lax.mul(left, right), lax.full_like(left, least))
    products = lax.select(is_zero, lax.full_like(left, most), products)
    scale = lax.reduce(products, most, lax.min, range(products.ndim))
    # Beyond the range only for pairs that are zero, and below it for those of no weight.
    of_row = lax.broadcast(scale, left.shape)
    return [left, lax.min(lax.mul(of_row, inverse(left)), right)], scale


def _shrunk(term: Term, share: jax.Array) -> Term:
    """A row multiplied twice by a number, which its last factor takes."""
    name = "value" if isinstance(term, Dense) else "right"
    return replace(term, **{name: times_rows_twice(getattr(term, name), share, 0)})


def product_count(term: Term) -> int:
    """How many products the squared norm of a row adds up; each may be too small for its dtype."""
    return prod(term.shape) * pair_count(term) ** 2


def squared_sum(leaf: Leaf, terms: Sequence[Term]) -> Squared:
    """The same for a row of several pieces."""
    units, own = zip(*(_unit(x, by_largest=True) for x in terms), strict=True)
    dtype = common_dtype(*(x.dtype for x in own))
    scales = [x.astype(dtype) for x in own]
    scale = reduce(jnp.minimum, scales)
    units = [_shrunk(unit, scale / x) for unit, x in zip(units, scales, strict=True)]
    square = jnp.real(inner(leaf, units, leaf, units)).astype(leaf.real)
    masses = [times(mass(x), abs(p.factor)) for x, p in zip(units, leaf.pieces, strict=True)]
    total = jnp.sum(jnp.stack([x.astype(leaf.real) for x in masses]))
    return square, total**2, scale


def _has_large_blocks(term: Term) -> bool:
    if isinstance(term, Dense | Windows) or not has_many_pairs(term) or term.right.shape[0] <= 1:
        return False
    size = sum(x.size for x in jax.tree.leaves(term)) // term.right.shape[0]
    return thresholds.exceeds(size, thresholds.LARGE_BLOCK - 1)


def mass(term: Term) -> jax.Array:
    """The sum of the norms of the parts of a row; its square bounds what `not_too_small` asks."""
    if isinstance(term, Dense):
        return safe_sqrt(jnp.sum(jnp.abs(term.value) ** 2))
    lengths = [safe_sqrt(jnp.sum(jnp.abs(x) ** 2, axis=-1)) for x in term.factors]
    match term:
        case Outer():
            return jnp.sum(lengths[0] * lengths[1])
        case Scatter(index, _, _):
            return jnp.sum(jnp.broadcast_to(lengths[0], index.shape))
    raise TypeError(f"no parts of {type(term).__name__}")
