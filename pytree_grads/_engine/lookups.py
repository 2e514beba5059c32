"""Norms of a table that a scan reads part by part, and that is also looked up.

A softmax over many words is computed by parts of the vocabulary, so that the scores of
all words are never kept. The table's gradient adds up outer products, a stack of them
over the steps of the scan, and lines at a few indices: those of an embedding, or of the
targets' scores. The stack would keep the cotangents of all scores.

Norms need less. The lines that some index names are put together in a small table,
which has a line for each look-up. Each step of the scan takes the norm of the other
lines of its part. The norm of the row is that of the small table and of these norms,
put into one vector.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from . import thresholds
from .graph import Atom, Equation, Known, Value
from .keys import Looked, Places, Total
from .layout import Frame, Side
from .products.norms import norm
from .rules.dots import DotLayout
from .rules.scatters import ScatterLayout
from .sites import AtRest, AtScan, AtTerm, Cut, Lookups, Site
from .terms import Outer, Scatter, Term
from .terms.scatter import columns_at
from .views import Shape, only_reshapes

# --------------------------------------------------------------------------------------
# The plan


def apart(cuts: Sequence[Cut]) -> tuple[Cut, list[Cut]] | None:
    """The cut of the steps' norms, and the cuts that add up to the small table.

    The small table has the shape (1, S, n). The cuts have no views yet. None if the
    given cuts are not a stack of outer products and look-ups of its lines, or if the
    small table takes more memory than the stack.
    """
    stacks = [cut for cut in cuts if isinstance(cut.site, AtScan)]
    others = [cut for cut in cuts if not isinstance(cut.site, AtScan)]
    table = _lookups(others)
    if len(stacks) != 1 or table is None or not _are_of_one_table(cuts):
        return None
    (stack,) = stacks
    found = _read_by_parts(stack.site)
    if found is None:
        return None
    scan, site, right = found
    left = Total(scan, Looked(site, table))
    outer = AtTerm(site.equation, SmallOuter(site.layout, table.count), (left, right))
    scatters = [_small_scatter(table, i) for i in range(len(others))]
    size = sum(n for own in (outer, *scatters) for n in own.sizes)
    if not thresholds.exceeds(sum(stack.site.sizes), size):
        return None
    rest = AtScan(scan, AtRest(site, table), stacked=True)
    pairs = zip((stack, *others), (outer, *scatters), strict=True)
    small = [replace(cut, site=own, view=()) for cut, own in pairs]
    return replace(stack, site=rest, view=()), small


def _lookups(cuts: Sequence[Cut]) -> Lookups | None:
    """The look-ups of some cuts, if their indices can be known before any scan."""
    sites = [cut.site for cut in cuts if isinstance(cut.site, AtTerm)]
    are_lookups = all(isinstance(x.layout, ScatterLayout) for x in sites)
    if not sites or len(sites) < len(cuts) or not are_lookups:
        return None
    indices = [atom for site in sites for atom in site.operands[:-1]]
    return None if any(map(_is_behind_a_scan, indices)) else Lookups(tuple(sites))


def _is_behind_a_scan(atom: Atom) -> bool:
    """Whether a value is computed from what a scan makes."""
    seen, todo = set[Equation](), [atom]
    while todo:
        value = todo.pop()
        made = value.producer if isinstance(value, Value) else None
        if made is not None and made not in seen:
            if made.primitive is p.scan_p:
                return True
            seen.add(made)
            todo += made.inputs
    return False


def _are_of_one_table(cuts: Sequence[Cut]) -> bool:
    """Whether all terms have the lines of one table, in order, behind their views."""
    shapes = [cut.site.shape for cut in cuts]
    lines = {(blocks * m, n) for blocks, m, n in shapes}
    return len(lines) == 1 and all(only_reshapes(cut.view) for cut in cuts)


def _read_by_parts(site: Site) -> tuple[Equation, AtTerm, Atom] | None:
    """The scan, the outer product of a step, and the right factor that all steps share.

    None if a site is no stack of such products.
    """
    if not isinstance(site, AtScan) or not site.stacked:
        return None
    scan, inner = site.equation, site.site
    if not isinstance(inner, AtTerm) or not isinstance(inner.layout, DotLayout):
        return None
    right = _from_outside(scan, inner.operands[0 if inner.layout.swapped else 1])
    if right is None or inner.shape[0] != 1:
        return None
    return scan, inner, right


def _from_outside(scan: Equation, atom: Atom) -> Atom | None:
    """The operand of a scan that is this value at every step, if there is one."""
    while isinstance(atom, Value) and atom.producer is not None:
        if atom.producer.primitive is not None:
            return None
        atom = atom.producer.inputs[atom.index]  # behind a barrier
    if isinstance(atom, Known):
        return atom
    at = scan.body.inputs.index(atom)
    return scan.inputs[at] if at < scan.splits[0] else None


def _small_scatter(table: Lookups, number: int) -> AtTerm:
    """The small table's part of a scatter term: the same lines, at other places."""
    site = table.sites[number]
    operands = (*site.operands, Places(table, number))
    return replace(
        site, layout=SmallScatter(site.layout, table.count), operands=operands
    )


# --------------------------------------------------------------------------------------
# Layouts of the small table's terms


@dataclass(frozen=True)
class SmallOuter:
    """A left factor of some lines (T, S), and the right factor of an outer product."""

    dot: Any  # a `DotLayout`
    count: int  # S

    @property
    def _right(self) -> Side:
        return self.dot.right

    def __call__(self, operands: Sequence[jax.Array], frames: Sequence[Frame]) -> Outer:
        left, right = operands
        factor = self._right(right, frames[1])
        return Outer(lax.expand_dims(left, (0,)), factor, self.dot.precision)

    def row_axes(self, *counts: int) -> tuple[int, ...]:
        return counts

    @property
    def shape(self) -> Shape:
        return (1, self.count, self._right.sizes[2])

    @property
    def sizes(self) -> tuple[int, ...]:
        _, steps, n = self._right.sizes
        return steps * self.count, steps * n


@dataclass(frozen=True)
class SmallScatter:
    """The lines of a scatter term, and their places (1, T) in the small table."""

    scatter: Any  # a `ScatterLayout`
    count: int  # S

    def __call__(
        self, operands: Sequence[jax.Array], frames: Sequence[Frame]
    ) -> Scatter:
        *given, places = operands
        lines = self.scatter(given, frames[:-1]).right
        return Scatter(lax.expand_dims(places, (0,)), lines, self.count)

    def row_axes(self, *counts: int) -> tuple[int, ...]:
        *given, places = counts
        return places, self.scatter.row_axes(*given)[1]

    @property
    def shape(self) -> Shape:
        return (1, self.count, self.scatter.shape[2])

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.scatter.sizes


# --------------------------------------------------------------------------------------
# What runs, for one example


def index_of(site: AtTerm, operands: Sequence[jax.Array]) -> jax.Array:
    """The lines (T,) that a scatter term adds to, from its operands but the lines."""
    lines = site.operands[-1].aval
    empty = jnp.zeros(lines.shape, lines.dtype)
    frames = [Frame()] * len(site.operands)
    term = site.layout([*operands, empty], frames)
    assert isinstance(term, Scatter)
    return term.index[0]


def places_of(indices: Sequence[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """Where look-ups go in the small table, and which line each of its places holds.

    Look-ups of one line go to one place, that of the first of them.

    Args:
      indices: the lines of each scatter term, (T,).

    Returns:
      The line (S,) at each place, or -1 if nothing goes there; and for each scatter
      term the places of its look-ups, (T,).
    """
    index = jnp.concatenate([x.astype(jnp.int32) for x in indices])
    order = jnp.argsort(index)
    ordered = index[order]
    begins = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    numbers = lax.iota(jnp.int32, index.shape[0])
    first = lax.cummax(jnp.where(begins, numbers, 0))
    places = jnp.zeros_like(index).at[order].set(order[first].astype(jnp.int32))
    line = jnp.where(places == numbers, index, -1)
    ends = [0, *accumulate(x.shape[0] for x in indices)]  # which may be symbolic
    parts = [lax.slice_in_dim(places, *x) for x in pairwise(ends)]
    return line, parts


def lines_by_step(line: jax.Array, steps: int, m: int) -> jax.Array:
    """The lines (steps, S) in the part of the table, of m lines, that each step reads.

    m stands for a line in another part.
    """
    own = line[None] - m * jnp.arange(steps, dtype=line.dtype)[:, None]
    return jnp.where((own >= 0) & (own < m), own, m)


def norm_of_rest(term: Term, lines: jax.Array) -> jax.Array:
    """The norm of an outer product without some of its lines."""
    assert isinstance(term, Outer)
    m = term.left.shape[-1]
    is_named = jnp.zeros(m, bool).at[lines].set(True, mode="drop")
    left = jnp.where(is_named[None, None], jnp.zeros_like(term.left), term.left)
    return norm(replace(term, left=left))


def left_at(term: Term, lines: jax.Array) -> jax.Array:
    """The left factor (T, S) of an outer product at some lines."""
    assert isinstance(term, Outer)
    return columns_at(term.left, lines[None])[0]
