"""How norms, sums and Gramians of a leaf are computed, and what they cost.

The products choose their routes here, and `J.explain()` prints the choice. A cost is
the number of multiplications and additions for one more row. A term that all rows
share, such as the gradient of a penalty on the parameters, is computed once. It costs
nothing here.
"""

from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from math import prod
from typing import Literal, TypeAlias

from .. import thresholds
from ..leaf import Leaf, Summand, inner_cost, needs_rows
from ..views import isometric
from .kernels import cost_of_shared, shares_pairs

Kind: TypeAlias = Literal["zero", "vectors", "term", "summands", "rows"]


@dataclass(frozen=True)
class Route:
    """How the norm of a row is computed."""

    kind: Kind
    way: str  # in words for users
    flops: int


def norm_route(leaf: Leaf) -> Route:
    """The route to the norms of the rows of a leaf.

    - zero: no summand depends on the parameter, or it has no entries.
    - vectors: the norm is the product of the norms of the factors.
    - term: the only summand has a method for its norm.
    - summands: inner products of all pairs of summands.
    - rows: each row is materialised.
    """
    route = _norm_route(leaf)
    folding = sum(x.folding for x in leaf.summands)
    return replace(route, flops=route.flops + folding) if folding else route


def _norm_route(leaf: Leaf) -> Route:
    if not leaf.summands or not prod(leaf.shape):
        return Route("zero", "zero", 0)
    if len(leaf.summands) == 1 and isometric(leaf.summands[0].view):
        return _route_of_one(leaf.summands[0])
    if needs_rows(leaf, leaf):
        return rows_route(leaf)
    pairs = combinations_with_replacement(leaf.summands, 2)
    products = sum(inner_cost(x, y) for x, y in pairs if not _are_shared(x, y))
    masses = sum(2 * sum(_own_sizes(x)) for x in leaf.summands)
    return Route("summands", "inner products", products + masses)


def rows_route(leaf: Leaf) -> Route:
    """The route that materialises each row."""
    made = sum(x.of_one_row.row_cost for x in leaf.summands if not x.is_shared)
    return Route("rows", "rows", made + 2 * prod(leaf.shape))


def _route_of_one(summand: Summand) -> Route:
    term = summand.of_one_row
    if term.norm_is_product:
        return Route("vectors", "squares", 2 * sum(_own_sizes(summand)))
    way, flops = term.norm_cost
    kind = "rows" if way == "rows" else "term"
    return Route(kind, way, 0 if summand.is_shared else flops)


def _are_shared(*summands: Summand) -> bool:
    return all(x.is_shared for x in summands)


def _own_sizes(summand: Summand) -> list[int]:
    """The sizes of the factors that differ between rows."""
    factors = summand.of_one_row.factors
    pairs = zip(factors, summand.factor_row_axes, strict=True)
    return [x.size for x, row_axes in pairs if row_axes]


def sum_flops(leaf: Leaf) -> int:
    """The cost of one more row in a weighted sum."""
    return sum(map(_sum_flops, leaf.summands))


def _sum_flops(summand: Summand) -> int:
    if summand.is_shared:
        return 0
    own = [i for i, count in enumerate(summand.row_axes) if count]
    if len(own) < len(summand.row_axes) and set(own) <= set(summand.factor_positions):
        return sum(_own_sizes(summand))  # one factor is summed over rows
    return summand.of_one_row.sum_cost


def gram_prefers_rows(leaf: Leaf, other: Leaf, *, trace: bool = False) -> bool:
    """Whether a Gramian is cheaper from materialised rows than from factors.

    With `trace`, it is one that is summed over common outputs.
    """
    if needs_rows(leaf, other):
        return True
    pairs = prod(leaf.rows) * prod(other.rows)
    if trace:
        pairs = leaf.size * prod(other.rows)
    if shares_pairs(leaf, other):
        by_factors = leaf.size * other.size * cost_of_shared(leaf, other, trace=trace)
    else:
        by_factors = pairs * sum(
            inner_cost(x, y) for x in leaf.summands for y in other.summands
        )
    made = sum(
        prod(each.rows) * x.of_one_row.row_cost
        for each in (leaf, other)
        for x in each.summands
    )
    return thresholds.exceeds(by_factors, made + 2 * pairs * prod(leaf.shape) - 1)
