"""The sum of two matrices of rows: the summands of both, row by row.

If leaves of either have a tail, the sum has a tail too: both maps, and an addition.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax

from .._trees.algebra import carried_dtype
from .absorbed import absorbed
from .graph import build
from .leaf import Leaf, Summand
from .matrix import Matrix
from .products import metric as _metric
from .tails.tail import Program, Tail
from .terms.dense import Dense
from .weighing import times


def added(one: Matrix, other: Matrix) -> Matrix:
    """The sum of two matrices; weights of rows become part of the factors."""
    parts = _Part.of(one), _Part.of(other)
    tailed = sorted({*parts[0].tailed, *parts[1].tailed})
    plain = [i for i in range(parts[0].count) if i not in tailed]
    sums = [_sum(*(x.leaf(i) for x in parts)) for i in plain]
    if not tailed:
        return Matrix(tuple(sums))
    sources = [part.sources(tailed) for part in parts]
    shared = [part.shared for part in parts]

    def run(sources: Any, shared: Any) -> list[jax.Array]:
        first, second = (
            part.run(tailed, *own)
            for part, *own in zip(parts, sources, shared, strict=True)
        )
        pairs = zip(tailed, first, second, strict=True)
        return [(x + y).astype(parts[0].dtype(i)) for i, x, y in pairs]

    avals = [[jax.ShapeDtypeStruct(x.shape, x.carried) for x in own] for own in sources]
    jaxpr = jax.make_jaxpr(run)(avals, shared)
    flat = [x for own in sources for x in own]
    program = Program(str(jaxpr), tuple(tailed), len(flat), build(jaxpr))
    tail = Tail(program, tuple(jax.tree.leaves(shared)))
    return Matrix((*sums, *flat), tail=tail)


@dataclass(frozen=True)
class _Part:
    """One of two matrices, in which all rows count.

    It keeps its tail if the leaves that have one share their weights.
    """

    matrix: Matrix

    @classmethod
    def of(cls, matrix: Matrix) -> "_Part":
        diagonal = matrix.diagonal
        matrix = replace(matrix, diagonal=None).selected()
        if len(matrix.tailed) > 1:
            matrix = replace(matrix, sources=matrix.leaves, tail=None)
        return cls(replace(matrix, diagonal=diagonal))

    @property
    def count(self) -> int:
        return self.matrix.count

    @property
    def tailed(self) -> tuple[int, ...]:
        """The positions of the leaves with a tail."""
        tail = self.matrix.tail
        return () if tail is None else tail.leaves

    @cached_property
    def _plain(self) -> dict[int, Leaf]:
        pairs = zip(self.matrix.plain, self.matrix.sources, strict=False)
        return dict(pairs)

    def dtype(self, i: int) -> Any:
        """The dtype of leaf i."""
        if i in self._plain:
            return self._plain[i].dtype
        assert self.matrix.tail is not None
        return self.matrix.tail.program.avals[self.tailed.index(i)].dtype

    def leaf(self, i: int) -> Leaf:
        """A leaf without a tail, with weights and diagonal in its terms."""
        leaf, diagonal = self._plain[i], self.matrix.diagonal_of(i)
        weight = self.matrix.weight(i, None, leaf)
        if diagonal is not None:
            leaf, diagonal = _metric.absorbed(leaf, diagonal)
        if diagonal is not None:  # no term can hold it
            leaf = _metric.as_rows(leaf, diagonal)
        return absorbed(leaf, weight)

    def sources(self, tailed: Sequence[int]) -> list[Leaf]:
        """The leaves where the tail begins, and those of `tailed` that have none."""
        found = []
        if self.matrix.tail is not None:
            for leaf in self.matrix.tail_sources:
                weight = self.matrix.weight(self.tailed[0], None, leaf)
                found.append(absorbed(leaf, weight))
        return found + [self.leaf(i) for i in tailed if i in self._plain]

    @property
    def shared(self) -> Any:
        """The coefficients of the tail, and the diagonal of the leaves that have it."""
        tail = self.matrix.tail
        return (
            () if tail is None else tail.shared,
            [self.matrix.diagonal_of(i) for i in self.tailed],
        )

    def run(self, tailed: Sequence[int], sources: Any, shared: Any) -> list[jax.Array]:
        """The rows of the leaves in `tailed`, for one row of all sources."""
        tail, (own, diagonal) = self.matrix.tail, shared
        begin, found = 0, dict[int, jax.Array]()
        if tail is not None:
            begin = tail.program.source_count
            ends = Tail(tail.program, tuple(own))(sources[:begin])
            for i, x, d in zip(self.tailed, ends, diagonal, strict=True):
                found[i] = x if d is None else x * d.astype(x.dtype)
        plain = [i for i in tailed if i in self._plain]
        found |= zip(plain, sources[begin:], strict=True)
        return [found[i] for i in tailed]


def _sum(x: Leaf, y: Leaf) -> Leaf:
    return replace(x, summands=_joined([*x.summands, *y.summands]))


def _joined(summands: list[Summand]) -> tuple[Summand, ...]:
    """The summands, of which arrays behind one view are added up."""
    found: dict[object, Summand] = {}
    for i, x in enumerate(summands):
        key = (x.shape, x.axis, x.view, x.row_axes) if x.term.is_dense else i
        if key in found:
            total = _value(found[key]) + _value(x)
            x = replace(x, term=Dense(total), factor=1.0)
        found[key] = x
    return tuple(found.values())


def _value(summand: Summand) -> jax.Array:
    (x,) = summand.term.factors
    return times(x.astype(carried_dtype(x.dtype)), summand.factor)
