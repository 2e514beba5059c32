"""Rows that are kept as factors, from which every product is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
from jax.sharding import PartitionSpec

from .._batches.chosen import Chosen
from .._engine.leaf import Leaf, chosen
from .._engine.matrix import Matrix, times_diagonal
from .._engine.products.metric import Diagonal
from .._engine.products.scaled_norms import Norms
from .._engine.tails.tail import Tail
from .._engine.trace import Factors, SumForms
from .._jax.compat import is_outside_traces, trace_state
from .._jax.sharding import in_auto, layout, sum_over
from .._trees.checks import PyTree
from .clip import Clip
from .compiled import compiled_once
from .groups import Members, norms
from .origin import Origin, options


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["origin", "sources", "weights", "valid", "tail", "diagonal"],
    meta_fields=["weight_of"],
    drop_fields=["made_in", "sums"],
)
@dataclass(frozen=True)
class Kept:
    """The rows of J as factors, each row with a weight of its own.

    `sums` is there if J was made inside a trace. It is lost when J leaves its trace,
    for its leaves may be larger than the rows: a J outside `jit` holds the rows alone.
    """

    origin: Origin
    sources: tuple[Leaf, ...]  # see `Matrix`
    weights: tuple[jax.Array, ...] | None = None  # of rows, each once
    valid: jax.Array | None = None  # rows that count; the others are zero
    tail: Tail | None = None
    weight_of: tuple[int, ...] = ()  # the weights of each leaf, by their position
    made_in: Any = None  # the trace in which J was made
    sums: SumForms | None = None
    diagonal: Diagonal | None = None  # in parameter space

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: the rows, but nothing of a trace or of a program."""
        fields = {k: v for k, v in self.__dict__.items() if k != "_norms_once"}
        sources = self.matrix.without_tail().sources
        dropped = dict.fromkeys(("tail", "made_in", "sums"))
        return {**fields, **dropped, "sources": sources}

    @property
    def mode(self) -> str:
        """The options that say how rows are kept, and where they are summed."""
        return options(self.origin, "rows that are kept")

    @property
    def matrix(self) -> Matrix:
        """The rows as the engine takes them."""
        weights = self.weights
        if weights is not None:
            weights = tuple(weights[i] for i in self.weight_of)
        return Matrix(self.sources, weights, self.valid, self.tail, self.diagonal)

    def as_argument(self) -> "Kept":
        """What a compiled product takes in place of these rows."""
        return replace(self, origin=self.origin.without_function())

    def bare(self) -> "Kept":
        """The rows before they were scaled and clipped, in their metric."""
        return replace(self, weights=None, valid=None, weight_of=())

    def chosen(self, rows: Chosen) -> "Kept":
        """The rows of some of the examples."""
        origin = self.origin.chosen(rows)
        cut = self.matrix.chosen(rows)
        sums = self.sums
        if sums is not None:
            whole = sums.weighted.make

            def part() -> Factors:
                sources, tail = whole()
                return Factors(tuple(chosen(x, rows) for x in sources), tail)

            form = replace(sums.weighted, make=part)
            sums = SumForms(form, form)
        return replace(self, origin=origin)._weighted(cut, sums)

    def in_metric(self, diagonal: Diagonal) -> "Kept":
        """The rows times a diagonal in parameter space."""
        self.origin.require_one()
        return replace(self, diagonal=times_diagonal(self.diagonal, diagonal))

    def scaled(self, factors: Sequence[jax.Array]) -> "Kept":
        """The rows times numbers of their own, for each leaf."""
        self.origin.require_one()
        return self._weighted(self.matrix.scaled(factors))

    def clipped(self, clip: Clip) -> "Kept":
        """The clipped rows."""
        return self.clipped_with_norms(clip)[0]

    def clipped_with_norms(self, clip: Clip) -> tuple["Kept", tuple[jax.Array, ...]]:
        """The clipped rows, and for each bound the norms that it was compared with."""
        self.origin.require_one()
        norms = clip.norms(self._leaf_norms())
        return self._weighted(clip(self.matrix, norms)), norms

    def clipped_sum(
        self, clip: Clip, c: jax.Array | None
    ) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        """The sum of the clipped rows times c, and the norms before the clip."""
        clipped, norms = self.clipped_with_norms(clip)
        return clipped.sum(c), norms

    def _weighted(self, matrix: Matrix, sums: SumForms | None = None) -> "Kept":
        """The rows of a matrix; weights that leaves share are stored once."""
        own: dict[int, int] = {}
        weights = matrix.weights or ()
        weight_of = tuple(own.setdefault(id(w), len(own)) for w in weights)
        once = tuple(weights[weight_of.index(i)] for i in range(len(own)))
        return replace(
            self,
            sources=matrix.sources,
            weights=None if matrix.weights is None else once,
            valid=matrix.valid,
            weight_of=weight_of,
            sums=sums,
        )

    def map(
        self, fun: Callable[..., PyTree], *args: PyTree, out: PyTree = None
    ) -> PyTree:
        """`fun(matrix, *args)`, which returns arrays that begin with the axes of rows.

        `out` is a prefix tree of their layouts; by default, that of numbers per row.
        """
        self.origin.require_one()
        return _mapped(
            self, *args, fun=fun, out=self.origin.layout if out is None else out
        )

    def each(self, fun: Callable[[Matrix], PyTree]) -> PyTree:
        """Like `map`, but `fun` handles sharding itself; nothing is compiled here."""
        self.origin.require_one()
        return fun(self.matrix)

    def fold(
        self,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        extra: jax.Array | None,
        dtype: Callable[[Any], Any] | None = None,
    ) -> list[jax.Array]:
        """`fun(matrix, extra)`, which returns sums over rows: arrays like the leaves.

        `dtype` is for rows that are not kept: from a leaf's dtype to that of its sum.
        """
        self.origin.require_one()
        return sum_over(_folded(self, extra, fun=fun), self.origin.axis_name)

    def sum(self, c: jax.Array | None) -> list[jax.Array]:
        """The sum of the rows times c, in the dtypes that sums are carried in.

        What it takes depends on the rows alone, and on where it is called: rows that
        are neither scaled nor clipped, and are used in the trace in which J was made,
        are summed from a form of their own, `sums`. All others are summed from the
        factors that norms take.
        """
        if self.sums is None or not self._is_at_hand:
            return self.fold(Matrix.weighted_sum, c)
        form = self.sums.plain if c is None else self.sums.weighted
        if form.pulls_back and self.diagonal is None and self.origin.may_pull_back:
            found = self.origin.pulled_back(c)
            if found is not None:
                return found
        sources, tail = form.make()
        rows = replace(self, sources=sources, tail=tail, sums=None)
        return rows.fold(Matrix.weighted_sum, c)

    def norms(self, members: Members) -> tuple[jax.Array, ...]:
        """The norms of the rows, over each group of leaves."""
        return norms(self._leaf_norms(), members)

    @property
    def _is_at_hand(self) -> bool:
        """Whether a trace is the one in which J was made.

        Inside a loop body the trace differs, and what is computed there runs at every
        turn.
        """
        return not is_outside_traces() and trace_state() == self.made_in

    def _leaf_norms(self) -> tuple[Norms, ...]:
        return self._norms_once if self._is_at_hand else self.map(_leaf_norms)

    @cached_property
    def _norms_once(self) -> tuple[Norms, ...]:
        """The norms of leaves, written once in the trace in which J was made.

        XLA merges equal expressions, but for loops. A J with other weights is another
        object, with norms of its own.
        """
        return self.map(_leaf_norms)


def _leaf_norms(matrix: Matrix) -> tuple[Norms, ...]:
    return tuple(matrix.leaf_norms())


@compiled_once("fun", "out")
def _mapped(rows: Kept, *args: PyTree, fun: Callable[..., PyTree], out: Any) -> PyTree:
    return in_auto(fun, out)(rows.matrix, *args)


@compiled_once("fun")
def _folded(rows: Kept, extra: Any, *, fun: Callable[..., Any]) -> list[jax.Array]:
    outs: list[PartitionSpec] = [layout(x) for x in rows.origin.primals]
    return in_auto(fun, outs)(rows.matrix, extra)
