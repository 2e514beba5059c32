"""Through terms: rows that go through a tail that does not fold into factors."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from ..leaf import Leaf, Summand, row
from ..terms.by_row import ByRow
from ..terms.protocol import Shape, Term
from .tail import Program, Tail


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["terms", "scale", "shared"],
    meta_fields=["program", "index", "sources"],
)
@dataclass(frozen=True)
class Through(ByRow):
    """Output number `index` of a tail, for one row of its sources, times a number."""

    terms: tuple[tuple[Term, ...], ...]  # of each source
    scale: jax.Array  # (), which weights of rows multiply
    shared: tuple[jax.Array, ...]  # the coefficients of the tail
    program: Program
    index: int
    sources: tuple[Leaf, ...]  # without their terms

    factor_names: ClassVar = ("scale",)

    @property
    def coefficients(self) -> tuple[jax.Array, ...]:
        return self.shared

    @property
    def shape(self) -> Shape:
        return tuple(self.program.avals[self.index].shape)

    @property
    def dtype(self) -> Any:
        return self._leaf.carried

    @property
    def _leaf(self) -> Leaf:
        aval = self.program.avals[self.index]
        return Leaf((), self.shape, aval.dtype, 0, None)

    def describe(self) -> str:
        made = (term.describe() for terms in self.terms for term in terms)
        return " + ".join(dict.fromkeys(made))

    def materialize(self) -> jax.Array:
        rows = [
            row(leaf, terms)
            for leaf, terms in zip(self.sources, self.terms, strict=True)
        ]
        found = Tail(self.program, self.shared)(rows)[self.index]
        return found * self.scale.astype(found.dtype)

    @property
    def row_cost(self) -> int:
        made = sum(term.row_cost for terms in self.terms for term in terms)
        return made + self.program.flops

    @property
    def row_size(self) -> int:
        return max(self.program.largest, *(prod(leaf.shape) for leaf in self.sources))


def through(tail: Tail, index: int, sources: Sequence[Leaf]) -> Leaf:
    """One leaf of a tail, as rows that are built when they are needed."""
    aval = tail.program.avals[index]
    first = sources[0]
    terms = tuple(tuple(map(_rows_first, leaf.summands)) for leaf in sources)
    bare = tuple(
        replace(
            leaf,
            summands=tuple(replace(x, term=None, row_axes=()) for x in leaf.summands),
        )
        for leaf in sources
    )
    scale = jnp.ones(first.rows, first.real)
    term = Through(terms, scale, tail.shared, tail.program, index, bare)
    row_axes = [n for leaf in sources for x in leaf.summands for n in x.row_axes]
    row_axes.append(len(first.rows))
    summand = Summand(
        term=term,
        shape=tuple(aval.shape),
        axis=0,
        view=(),
        factor=1.0,
        row_axes=(*row_axes, *(0 for _ in tail.shared)),
        reason="",
    )
    return Leaf((summand,), tuple(aval.shape), aval.dtype, first.size, first.outputs)


def _rows_first(summand: Summand) -> Term:
    """The term of a summand, with its row axes in front of all others."""
    arrays, treedef = jax.tree.flatten(summand.term)
    moved = [
        jnp.moveaxis(x, range(summand.axis, summand.axis + n), range(n))
        for x, n in zip(arrays, summand.row_axes, strict=True)
    ]
    return jax.tree.unflatten(treedef, moved)
