"""The plan: for each gradient leaf, which cuts are kept, and in which form.

`rules.decompose` finds the terms of a leaf. The plan compares their size with the size
of the leaf.
"""

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Literal, TypeAlias

from . import thresholds
from .graph import Atom
from .lookups import apart
from .rules import decompose
from .rules.convolutions import PatchesLayout
from .rules.scatters import ScatterLayout
from .sites import (
    AtNorm,
    AtRest,
    AtRow,
    AtScan,
    AtSum,
    AtTerm,
    AtValue,
    Cut,
    Site,
    innermost,
    is_dense,
    origin,
    size,
)
from .views import Pad, Reshape, Shape, disjoint, isometric

Route: TypeAlias = Literal["auto", "factored", "rows", "norms"]
Cuts: TypeAlias = tuple[Cut, ...]


@dataclass(frozen=True)
class Outputs:
    """The outputs of an example: how many, and which arrays of a site differ by them.

    Outputs share the inputs of a layer, say.
    """

    count: int
    differ: Callable[[Site], Sequence[bool]]


@dataclass(frozen=True)
class LeafPlan:
    """The cuts of a leaf: for all products, and for a single sum of rows.

    A single sum may cost less from other cuts. `terms` are the cuts that were found,
    before sizes were compared.
    """

    for_rows: Cuts
    for_sums: Cuts
    terms: Cuts = ()

    def for_plain_sums(self, count: int, varying: Container[Atom]) -> Cuts:
        """The cuts for a sum over `count` examples without weights.

        What a scan would stack is summed over the examples in its body, as an ordinary
        backward pass does. Other terms stay as they are. If several of them are dense,
        rows may take less memory.
        """
        summed = tuple(_summed(cut, count) for cut in self.terms)
        if summed == self.terms:
            return self.for_sums
        kept = [x.site for x in summed if is_dense(x.site) and _differs(x, varying)]
        dense = sum(size(x) for x in kept if not isinstance(innermost(x), AtSum))
        rows = sum(size(cut.site) for cut in self.for_sums)
        return self.for_sums if thresholds.exceeds(dense, rows) else summed


def plan_leaf(
    leaf: Atom,
    varying: Container[Atom],
    route: Route,
    outputs: Outputs | None = None,
) -> LeafPlan:
    """The cuts of a leaf: its terms, or the leaf itself if the terms are no smaller.

    A single sum takes the terms in either case, unless one of them is made in a scan.
    The sum over the steps then takes less memory. `varying` holds the atoms that differ
    between examples. `outputs` is None for a scalar function.
    """
    if route == "rows":
        rows = (Cut(AtValue(leaf), reason="asked for"),)
        return LeafPlan(rows, rows)
    terms = tuple(map(_with_reason, decompose(leaf)))
    kept = terms
    if route != "factored" and _are_larger(terms, leaf, varying, outputs):
        kept = _as_rows(terms, leaf, varying)
    sums_terms = all(isinstance(cut.site, AtTerm) for cut in terms)
    return LeafPlan(
        for_rows=_norms_of(kept) if route == "norms" else kept,
        for_sums=terms if sums_terms else kept,
        terms=terms,
    )


def _with_reason(cut: Cut) -> Cut:
    """The cut with a reason, if its term is dense: where the walk stopped."""
    if not is_dense(cut.site):
        return cut
    return replace(cut, reason=f"stopped at {origin(cut.site)}")


def _differs(cut: Cut, varying: Container[Atom]) -> bool:
    """Whether the term of a cut differs between examples."""
    site = cut.site
    return not isinstance(site, AtValue) or site.value in varying


def _are_larger(
    terms: Cuts, leaf: Atom, varying: Container[Atom], outputs: Outputs | None
) -> bool:
    """Whether the terms of an example take at least as much memory as its rows.

    A term that all examples share is kept once, so its size does not count. An array
    that the outputs of an example share counts once.
    """
    kept = 0
    for cut in terms:
        if _differs(cut, varying):
            is_dearer = _is_convolution(cut.site)
            times = thresholds.current().dearer if is_dearer else 1
            kept += _size(cut.site, outputs) * times
    count = 1 if outputs is None else outputs.count
    return thresholds.exceeds(kept, count * max(1, prod(leaf.aval.shape)) - 1)


def _size(site: Site, outputs: Outputs | None) -> int:
    """How many entries are kept for all outputs of an example."""
    if outputs is None:
        return size(site)
    differ = outputs.differ(site)
    inner = innermost(site)
    if isinstance(inner, AtTerm):
        # By arrays of the term, which may be made of several operands.
        differ = [n > 1 for n in inner.layout.row_axes(*(1 + x for x in differ))]
    pairs = zip(site.sizes, differ, strict=True)
    return sum(n * outputs.count if own else n for n, own in pairs)


def _as_rows(terms: Cuts, leaf: Atom, varying: Container[Atom]) -> Cuts:
    """The leaf as an array, with the reason.

    If all terms are convolutions, each is materialised on its own. That is faster than
    JAX's gradient of a kernel.
    """
    differ = [x for x in terms if x.reason and _differs(x, varying)]
    stops = dict.fromkeys(x.reason for x in differ)
    reason = ", ".join(stops) or "factors are larger than the row"
    if all(_is_convolution(cut.site) for cut in terms):
        rows = [_with_innermost(cut, AtRow(innermost(cut.site))) for cut in terms]
        return tuple(replace(cut, reason=reason) for cut in rows)
    return (Cut(AtValue(leaf), reason=reason),)


def _is_convolution(site: Site) -> bool:
    inner = innermost(site)
    return isinstance(inner, AtTerm) and isinstance(inner.layout, PatchesLayout)


def _summed(cut: Cut, count: int) -> Cut:
    """The cut in a scan whose term is summed over the examples, if that is better.

    A table that is looked up in the body may be larger than the lines of all examples.
    These are stacked then, and added to the table once.
    """
    inner = innermost(cut.site)
    if not isinstance(cut.site, AtScan) or not isinstance(inner, AtTerm):
        return cut
    if isinstance(inner.layout, ScatterLayout):
        stacked = count * size(inner)
        if not thresholds.exceeds(stacked, prod(inner.shape)):
            return cut
    return _with_innermost(cut, AtSum(inner))


def _with_innermost(cut: Cut, inner: Site) -> Cut:
    """The cut with another site in the same scans; its stack may have other axes."""

    def within(site: Site) -> Site:
        if isinstance(site, AtScan):
            return replace(site, site=within(site.site))
        return inner

    site, shape = within(cut.site), cut.site.shape
    view = cut.view if site.shape == shape else (Reshape(shape), *cut.view)
    return replace(cut, site=site, view=view)


# --------------------------------------------------------------------------------------
# Norms alone


def _norms_of(cuts: Cuts) -> Cuts:
    """Cuts whose rows have the same norms but hold only the norms of terms.

    These norms stand side by side in one vector. That is right if the given views
    preserve inner products and write to separate parts of the leaf. The terms of a
    table that a scan reads by parts and that is also looked up overlap; `lookups` takes
    them apart. Otherwise, the given cuts are returned.
    """
    views = [cut.view for cut in cuts]
    if not all(map(isometric, views)):
        return cuts
    if all(disjoint(x, y) for x, y in combinations(views, 2)):
        return _side_by_side([[replace(x, site=_norm_at(x.site))] for x in cuts])
    found = apart(cuts)
    if found is None:
        return cuts
    rest, small_table = found
    return _side_by_side([[rest], small_table])


def _side_by_side(groups: Sequence[Sequence[Cut]]) -> Cuts:
    """Cuts that write to one vector; those of a group write to the same part of it."""
    lengths = [prod(group[0].site.shape) for group in groups]
    start, found = 0, []
    for group, length in zip(groups, lengths, strict=True):
        padded = Pad((start,), (start + length,), (sum(lengths),), (1,))
        view = (Reshape((length,)), padded)
        found += [Cut(cut.site, view, cut.factor) for cut in group]
        start += length
    return tuple(found)


def _norm_at(site: Site) -> Site:
    """A site for the norm, inside the scan if the steps are stacked."""
    if isinstance(site, AtScan) and site.stacked:
        return replace(site, site=_norm_at(site.site))
    return AtNorm(site)


def shape_of(cuts: Sequence[Cut], leaf_shape: Shape) -> Shape:
    """The shape that the cuts add up to: the leaf's, unless only norms are kept."""
    for cut in cuts:
        if isinstance(innermost(cut.site), AtNorm | AtRest):
            padded = cut.view[-1]
            assert isinstance(padded, Pad)
            return padded.shape
    return leaf_shape
