"""Norms of the rows of leaves, from their factors.

Factors are multiplied by scales before they are squared, so that squaring neither
overflows nor underflows when the norm itself is representable. The norms of leaves are
scaled likewise before they are combined; see `scaled_norms`.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial, reduce
from itertools import combinations_with_replacement
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import common_dtype
from .. import thresholds
from ..leaf import Leaf, inner_of_summands, over_rows, row
from ..terms.dense import Dense
from ..terms.protocol import Squared, Term
from ..weighing import times
from .routes import Route, norm_route
from .scaled_norms import Norms, combined
from .vectors import Vectors, column, norms_of_vectors, vectors_of


def norm(term: Term) -> jax.Array:
    """The norm of one row of one term."""
    squared = term.squared_norm()
    count = _product_count(term)
    return combined([_norms_of_squares(squared, count, squared.square.dtype)])


def leaf_norms(leaves: Sequence[Leaf]) -> list[Norms]:
    """The norms of the rows of all leaves.

    If many leaves have small vectors of one form, these are stacked. A few are not, so
    that XLA can share a vector between a weight and its bias.
    """
    routes = list(map(norm_route, leaves))
    pairs = zip(leaves, routes, strict=True)
    vectors = [vectors_of(x) if r.kind == "vectors" else [] for x, r in pairs]
    groups: dict[Any, list[int]] = {}
    for i, own in enumerate(vectors):
        form = (leaves[i].real, *(x.form for x in own)) if _are_small(own) else i
        groups.setdefault(form, []).append(i)
    norms = []
    for group in groups.values():
        stacks = (
            [group] if len(group) >= thresholds.current().many else [[i] for i in group]
        )
        for stack in stacks:
            own = [leaves[i] for i in stack]
            if vectors[stack[0]]:
                found = norms_of_vectors(own, [vectors[i] for i in stack])
            else:
                found = _norms_of_leaf(own[0], routes[stack[0]])
            norms.append(replace(found, leaves=tuple(stack)))
    return norms


def _are_small(vectors: Sequence[Vectors]) -> bool:
    if not vectors:
        return False
    return not any(
        thresholds.exceeds(x.value.size, thresholds.current().small) for x in vectors
    )


def _norms_of_leaf(leaf: Leaf, route: Route) -> Norms:
    """The norms of the rows of one leaf, by any route except `vectors`."""
    if route.kind == "zero":
        return Norms(weights=(jnp.zeros((*leaf.rows, 1), leaf.real),))
    if route.kind == "rows":
        return _norms_of_rows(leaf)
    terms = [x.of_one_row for x in leaf.summands]
    if route.kind == "term":
        squared = over_rows(lambda terms: terms[0].squared_norm(), leaf)
        norms = _norms_of_squares(squared, _product_count(terms[0]), leaf.real)
        return replace(norms, factors=(abs(leaf.summands[0].factor),))
    squared = over_rows(partial(_squared_norm_of_summands, leaf), leaf)
    count = prod(leaf.shape) * sum(x.pair_count for x in terms) ** 2
    return _norms_of_squares(squared, count, leaf.real)


def _norms_of_rows(leaf: Leaf) -> Norms:
    """The norms of rows as arrays, for some examples at a time."""

    def of_row(terms: Sequence[Term]) -> jax.Array:
        return norm(Dense(row(leaf, terms)))

    found = over_rows(of_row, leaf, materializes=True)
    return Norms(weights=(column(found.astype(leaf.real)),))


def _squared_norm_of_summands(leaf: Leaf, terms: Sequence[Term]) -> Squared:
    """The squared norm of a row that is the sum of several terms.

    Each term is brought near one, and its inner products are multiplied by numbers that
    restore the proportions: all terms then have the scale of the largest one. The
    square of the sum of their masses bounds the sum of the absolute inner products.
    """
    units, scales = zip(*(term.near_one() for term in terms), strict=True)
    dtype = common_dtype(*(x.dtype for x in scales))
    scales = [x.astype(dtype) for x in scales]
    scale = reduce(jnp.minimum, scales)
    shares = [
        times(((scale / x) ** 2).astype(leaf.real), summand.factor)
        for x, summand in zip(scales, leaf.summands, strict=True)
    ]
    square = jnp.zeros((), leaf.real)
    for i, j in combinations_with_replacement(range(len(units)), 2):
        product = inner_of_summands(
            leaf.summands[i], units[i], leaf.summands[j], units[j]
        )
        both = shares[i] * shares[j] * jnp.real(product).astype(leaf.real)
        square += both if i == j else 2 * both
    masses = [
        unit.mass().astype(leaf.real) * abs(share)
        for unit, share in zip(units, shares, strict=True)
    ]
    total = jnp.sum(jnp.stack(masses))
    return Squared(square, total**2, scale)


def _product_count(term: Term) -> int:
    """How many products the squared norm of a row adds up; each may underflow."""
    return prod(term.shape) * term.pair_count**2


def _norms_of_squares(squared: Squared, count: int, dtype: Any) -> Norms:
    """The norms of one leaf, from squares that are sums of `count` products."""
    square, absolute, scale = squared
    limits = jnp.finfo(square.dtype)
    error = float(8 * limits.eps), count * float(8 * limits.tiny)
    cast = partial(lax.convert_element_type, new_dtype=dtype)
    if absolute is not None:
        absolute = column(cast(lax.stop_gradient(absolute)))
    return Norms(
        squares=(column(cast(square)),),
        scales=(column(scale),),
        absolute=() if absolute is None else (absolute,),
        errors=(error,),
    )
