"""The plan: for each gradient leaf, which summands of it are kept, and in which form.

`rules.decompose` finds the terms of a leaf. The plan compares their
size with the leaf's.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Literal, TypeAlias

from . import thresholds
from .graph import Atom
from .rules import decompose
from .rules.convolutions import PatchesLayout
from .sites import (
    AtNorm,
    AtRow,
    AtScan,
    AtTerm,
    AtValue,
    Site,
    Summand,
    innermost,
    is_dense,
    origin,
)
from .views import Pad, Reshape, Shape, disjoint, isometric

Route: TypeAlias = Literal["auto", "factored", "rows", "norms"]
Summands: TypeAlias = tuple[Summand, ...]


@dataclass(frozen=True)
class LeafPlan:
    """The summands of a leaf: for all products, and for a sum of rows alone.

    A sum alone may cost least from other summands.
    """

    for_rows: Summands
    for_sums: Summands


def plan_leaf(leaf: Atom, varying: Container[Atom], route: Route) -> LeafPlan:
    """The summands of a leaf: its terms, or the leaf itself if those are no smaller.

    A sum alone takes the terms in both cases, unless one of them is made in a scan: the
    sum over its steps then takes less memory. `varying` holds what differs between
    examples.
    """
    if route == "rows":
        rows = (Summand(AtValue(leaf), reason="asked for"),)
        return LeafPlan(rows, rows)
    terms = tuple(map(_with_reason, decompose(leaf)))
    kept = terms
    if route != "factored" and _are_larger(terms, leaf, varying):
        kept = _as_rows(terms, leaf)
    sums_terms = all(isinstance(summand.site, AtTerm) for summand in terms)
    return LeafPlan(
        for_rows=_norms_of(kept) if route == "norms" else kept,
        for_sums=terms if sums_terms else kept,
    )


def _with_reason(summand: Summand) -> Summand:
    """A summand that says where the walk stopped, if its term is dense."""
    if not is_dense(summand.site):
        return summand
    return replace(summand, reason=f"stopped at {origin(summand.site)}")


def _are_larger(terms: Summands, leaf: Atom, varying: Container[Atom]) -> bool:
    """Whether terms take no less memory than the leaf.

    What is the same for all examples is kept once, so its size does not count.
    """
    kept = 0
    for summand in terms:
        site = summand.site
        if not isinstance(site, AtValue) or site.value in varying:
            times = thresholds.DEARER if _is_convolution(site) else 1
            kept += site.size * times
    return thresholds.exceeds(kept, max(1, prod(leaf.aval.shape)) - 1)


def _as_rows(terms: Summands, leaf: Atom) -> Summands:
    """The leaf as an array, and why.

    Convolutions are materialised one by one, since theirs is a faster way than JAX's.
    """
    stops = dict.fromkeys(summand.reason for summand in terms)
    reason = ", ".join(stops) if all(stops) else "factors are larger than the row"
    if all(_is_convolution(summand.site) for summand in terms):
        return tuple(
            replace(summand, site=_row_at(summand.site), reason=reason)
            for summand in terms
        )
    return (Summand(AtValue(leaf), reason=reason),)


def _is_convolution(site: Site) -> bool:
    inner = innermost(site)
    return isinstance(inner, AtTerm) and isinstance(inner.layout, PatchesLayout)


def _row_at(site: Site) -> Site:
    """A row as an array, made where its term arises."""
    if isinstance(site, AtScan):
        return replace(site, site=_row_at(site.site))
    return AtRow(site)


# --------------------------------------------------------------------------------------
# Norms alone


def _norms_of(summands: Summands) -> Summands:
    """Summands whose rows have the same norms, and hold little more than norms.

    They stand side by side in one vector. That is right if the views of the given
    summands keep inner products and write to parts of the leaf that do not meet. If
    not, the given summands are returned.
    """
    views = [summand.view for summand in summands]
    are_apart = all(disjoint(x, y) for x, y in combinations(views, 2))
    if not are_apart or not all(map(isometric, views)):
        return summands
    sites = [_norm_at(summand.site) for summand in summands]
    total = sum(site.size for site in sites)
    start, found = 0, []
    for site, summand in zip(sites, summands, strict=True):
        padded = Pad((start,), (start + site.size,), (total,), (1,))
        view = (Reshape((site.size,)), padded)
        found.append(Summand(site, view, summand.factor))
        start += site.size
    return tuple(found)


def _norm_at(site: Site) -> Site:
    """A norm, taken in the body of a scan if each step is a row of its own."""
    if isinstance(site, AtScan) and site.stacked:
        return replace(site, site=_norm_at(site.site))
    return AtNorm(site)


def shape_of(summands: Sequence[Summand], leaf_shape: Shape) -> Shape:
    """The shape of what summands add up to: the leaf's, unless only norms are left."""
    for summand in summands:
        if isinstance(innermost(summand.site), AtNorm):
            padded = summand.view[-1]
            assert isinstance(padded, Pad)
            return padded.shape
    return leaf_shape
