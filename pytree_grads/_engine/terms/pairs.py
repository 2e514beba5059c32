"""Inner products of two terms, and their costs.

If two kinds have a cheaper form than their rows, they have an entry in a table.
Otherwise, both rows are materialised. A new kind needs no entry.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..einsum import dot, times_counts
from . import weighed
from .outer import (
    Outer,
    conjugated,
    has_many,
    left_products,
    outer_cost,
    right_products,
)
from .protocol import Term
from .scatter import (
    Scatter,
    adds_one,
    columns_at,
    counts,
    lines_at,
    same_index,
)
from .weighed import Weighed


def inner(x: Term, y: Term) -> jax.Array:
    """<x, y> for two rows of one shape; x is conjugated.

    One may be a stack of outer products, the other look-ups of its lines.
    """
    if x.is_dense:
        return y.apply_own(x.materialize().conj())
    if y.is_dense:
        return x.apply_own(y.materialize().conj()).conj()
    rule = _rule(x, y)
    if rule is not None:
        return rule.inner(x, y)
    return jnp.sum(x.materialize().conj() * y.materialize())


def inner_cost(x: Term, y: Term) -> int:
    """Multiplications and additions of one inner product."""
    if x.is_dense:
        return y.apply_cost
    if y.is_dense:
        return x.apply_cost
    rule = _rule(x, y)
    if rule is not None:
        return rule.cost(x, y)
    return x.row_cost + y.row_cost + 2 * prod(x.shape)


def needs_rows(x: Term, y: Term) -> bool:
    """Whether the inner product must build a row as an array."""
    if x.is_dense or y.is_dense:
        return False
    return _rule(x, y) is None


# ------------------------------------------------------------------------------------
# Pairs of kinds: inner products of rows, from the inner products of their vectors


@dataclass(frozen=True)
class _Rule:
    inner: Callable[[Any, Any], jax.Array]
    cost: Callable[[Any, Any], int]
    most_pairs: float = inf  # the most pairs of a row for which it is cheaper than rows


def _outer_outer(x: Outer, y: Outer) -> jax.Array:
    return jnp.sum(left_products(x, y) * right_products(x, y))


def _outer_scatter(x: Outer, y: Scatter) -> jax.Array:
    if len(x.left) != len(y.index):
        return _stack_scatter(x, y)
    return jnp.sum(columns_at(x.left, y.index).conj() * right_products(x, y))


def _stack_scatter(x: Outer, y: Scatter) -> jax.Array:
    """<x, y> for outer products (B, m, n) and look-ups of their lines (1, B*m, n)."""
    rights = dot("btn,sn->bts", conjugated(x.right), y.right[0])
    index = y.index[0]  # (S,)
    m = x.shape[1]
    columns = lax.iota(index.dtype, index.shape[0])
    if not has_many(y.right.shape[1]):  # one vector for all look-ups
        columns = jnp.zeros_like(index)
    at_lines = x.left.at[index // m, :, index % m].get(mode="fill", fill_value=0)
    own = rights.at[index // m, :, columns].get(mode="fill", fill_value=0)  # (S, T)
    return jnp.sum(conjugated(at_lines) * own)


def _scatter_outer(x: Scatter, y: Outer) -> jax.Array:
    if len(x.index) != len(y.left):
        return _stack_scatter(y, x).conj()
    lefts = jnp.swapaxes(columns_at(y.left, x.index), 1, 2)
    return jnp.sum(lefts * right_products(x, y))


def _scatter_scatter(x: Scatter, y: Scatter) -> jax.Array:
    if adds_one(x) and adds_one(y):
        rights = dot("bn,bn->b", x.right[:, 0].conj(), y.right[:, 0])
        if x.has_few_pairs:
            found = same_index(x, y)  # (B, T, S)
        else:
            found = lines_at(counts(x, x.dtype), y.index)  # (B, S, 1)
        count = jnp.sum(found, axis=(1, 2), dtype=jnp.finfo(x.dtype).dtype)
        return jnp.sum(times_counts(count, rights))
    return jnp.sum(jnp.where(same_index(x, y), right_products(x, y), 0))


def _scatter_cost(x: Scatter, y: Scatter) -> int:
    if adds_one(x) and adds_one(y):
        blocks, _, n = x.shape
        count = x.pairs_cost if x.has_few_pairs else 2 * blocks * y.pair_count
        return count + 2 * blocks * n
    return _mixed_cost(x, y)


def _mixed_cost(x: Term, y: Term) -> int:
    """The cost of pairs whose left products take no multiplications."""
    blocks, n = max(x.shape[0], y.shape[0]), x.shape[2]
    return 2 * blocks * x.pair_count * y.pair_count * (1 + n)


_RULES: dict[tuple[type, type], _Rule] = {
    (Outer, Outer): _Rule(_outer_outer, outer_cost),
    (Outer, Scatter): _Rule(_outer_scatter, _mixed_cost),
    (Scatter, Outer): _Rule(_scatter_outer, _mixed_cost),
    (Scatter, Scatter): _Rule(_scatter_scatter, _scatter_cost),
    (Weighed, Weighed): _Rule(weighed.inner, weighed.inner_cost, 1),
    (Outer, Weighed): _Rule(weighed.inner, weighed.inner_cost, 1),
    (Weighed, Outer): _Rule(weighed.inner, weighed.inner_cost, 1),
}


def _rule(x: Term, y: Term) -> _Rule | None:
    rule = _RULES.get((type(x), type(y)))
    if rule is None or rule.most_pairs == inf:
        return rule
    are_few = all(z.pair_count <= rule.most_pairs for z in (x, y))
    return rule if are_few else None


# ------------------------------------------------------------------------------------
# All rows of two terms at once


def gram_of_counts(x: Term, y: Term) -> Callable[[Any, Any], jax.Array] | None:
    """How to compute all inner products, if rows add one vector to many lines.

    Args:
      x: one row of the left term.
      y: one row of the right term.

    Returns:
      A function of both terms with all their rows, (B, N, ...) and (B, N', ...); or
      None if the rows are not of this form.
    """
    if (
        isinstance(x, Scatter)
        and isinstance(y, Scatter)
        and adds_one(x)
        and adds_one(y)
    ):
        return _gram_of_counts
    return None


def _gram_of_counts(x: Scatter, y: Scatter) -> jax.Array:
    """Inner products (N, N'), from how often each row of x adds to each line."""
    size, others = x.index.shape[1], y.index.shape[1]
    blocks, rows = (lax.broadcasted_iota(jnp.int32, x.index.shape, i) for i in (0, 1))
    dtype = jnp.finfo(x.dtype).dtype
    found = jnp.zeros((x.index.shape[0], x.length, size), dtype)  # (B, m, N)
    found = found.at[blocks, x.index, rows].add(1, mode="drop")

    def common(index: jax.Array) -> jax.Array:
        """How many pairs of look-ups, of each row of x and of this row, share a line.

        The shape is (B, N).
        """
        return jnp.sum(lines_at(found, index), axis=1)

    index = jnp.moveaxis(y.index, 1, 0)
    # Few enough rows at a time that the gathered counts stay small beside `found`.
    at_once = found.size // (4 * max(1, index[0].size * size))
    pairs = lax.map(common, index, batch_size=max(1, min(others, at_once)))
    rights = dot("bin,bjn->bij", x.right[:, :, 0].conj(), y.right[:, :, 0])
    return jnp.sum(times_counts(jnp.moveaxis(pairs, 0, 2), rights), axis=0)
