"""The plan: for each gradient leaf, which cuts of it are kept, and in which form.

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
    Cut,
    Site,
    innermost,
    is_dense,
    origin,
)
from .views import Pad, Reshape, Shape, disjoint, isometric

Route: TypeAlias = Literal["auto", "factored", "rows", "norms"]
Cuts: TypeAlias = tuple[Cut, ...]


@dataclass(frozen=True)
class LeafPlan:
    """The cuts of a leaf: for all products, and for a sum of rows alone.

    A sum alone may cost least from other cuts.
    """

    for_rows: Cuts
    for_sums: Cuts


def plan_leaf(leaf: Atom, varying: Container[Atom], route: Route) -> LeafPlan:
    """The cuts of a leaf: its terms, or the leaf itself if those are no smaller.

    A sum alone takes the terms in both cases, unless one of them is made in a scan: the
    sum over its steps then takes less memory. `varying` holds what differs between
    examples.
    """
    if route == "rows":
        rows = (Cut(AtValue(leaf), reason="asked for"),)
        return LeafPlan(rows, rows)
    terms = tuple(map(_with_reason, decompose(leaf)))
    kept = terms
    if route != "factored" and _are_larger(terms, leaf, varying):
        kept = _as_rows(terms, leaf, varying)
    sums_terms = all(isinstance(cut.site, AtTerm) for cut in terms)
    return LeafPlan(
        for_rows=_norms_of(kept) if route == "norms" else kept,
        for_sums=terms if sums_terms else kept,
    )


def _with_reason(cut: Cut) -> Cut:
    """A cut that says where the walk stopped, if its term is dense."""
    if not is_dense(cut.site):
        return cut
    return replace(cut, reason=f"stopped at {origin(cut.site)}")


def _differs(cut: Cut, varying: Container[Atom]) -> bool:
    """Whether what a cut keeps differs between examples."""
    site = cut.site
    return not isinstance(site, AtValue) or site.value in varying


def _are_larger(terms: Cuts, leaf: Atom, varying: Container[Atom]) -> bool:
    """Whether terms take no less memory than the leaf.

    What is the same for all examples is kept once, so its size does not count.
    """
    kept = 0
    for cut in terms:
        if _differs(cut, varying):
            is_dearer = _is_convolution(cut.site)
            times = thresholds.current().dearer if is_dearer else 1
            kept += cut.site.size * times
    return thresholds.exceeds(kept, max(1, prod(leaf.aval.shape)) - 1)


def _as_rows(terms: Cuts, leaf: Atom, varying: Container[Atom]) -> Cuts:
    """The leaf as an array, and why.

    Convolutions are materialised one by one, since theirs is a faster way than JAX's.
    """
    differ = [x for x in terms if x.reason and _differs(x, varying)]
    stops = dict.fromkeys(x.reason for x in differ)
    reason = ", ".join(stops) or "factors are larger than the row"
    if all(_is_convolution(cut.site) for cut in terms):
        return tuple(
            replace(cut, site=_row_at(cut.site), reason=reason) for cut in terms
        )
    return (Cut(AtValue(leaf), reason=reason),)


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


def _norms_of(cuts: Cuts) -> Cuts:
    """Cuts whose rows have the same norms, and hold little more than norms.

    They stand side by side in one vector. That is right if the views of the given
    cuts keep inner products and write to parts of the leaf that do not meet. If
    not, the given cuts are returned.
    """
    views = [cut.view for cut in cuts]
    are_apart = all(disjoint(x, y) for x, y in combinations(views, 2))
    if not are_apart or not all(map(isometric, views)):
        return cuts
    sites = [_norm_at(cut.site) for cut in cuts]
    total = sum(site.size for site in sites)
    start, found = 0, []
    for site, cut in zip(sites, cuts, strict=True):
        padded = Pad((start,), (start + site.size,), (total,), (1,))
        view = (Reshape((site.size,)), padded)
        found.append(Cut(site, view, cut.factor))
        start += site.size
    return tuple(found)


def _norm_at(site: Site) -> Site:
    """A norm, taken in the body of a scan if each step is a row of its own."""
    if isinstance(site, AtScan) and site.stacked:
        return replace(site, site=_norm_at(site.site))
    return AtNorm(site)


def shape_of(cuts: Sequence[Cut], leaf_shape: Shape) -> Shape:
    """The shape of what cuts add up to: the leaf's, unless only norms are left."""
    for cut in cuts:
        if isinstance(innermost(cut.site), AtNorm):
            padded = cut.view[-1]
            assert isinstance(padded, Pad)
            return padded.shape
    return leaf_shape
