"""Rows of which nothing is kept: each product recomputes them, chunk by chunk."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from .._batches.chosen import Chosen
from .._engine.matrix import Matrix, product, times_diagonal
from .._engine.products.metric import Diagonal
from .._engine.products.scaled_norms import Norms
from .._engine.trace import Form, Trace
from .._jax.sharding import in_auto, layout, sum_over, zeros
from .._trees.algebra import carried_dtype
from .._trees.checks import PyTree
from .clip import Clip
from .compiled import compiled_once
from .groups import Members, norms
from .origin import Origin, options


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["origin", "weights", "valid", "clip", "diagonal"],
    meta_fields=["one_pass", "pulls_back", "uniform"],
    drop_fields=["trace"],
)
@dataclass(frozen=True)
class Streamed:
    """The rows of J, to be recomputed for each product, each with a weight of its own.

    With `one_pass`, a clip waits for the product that follows. That product takes the
    norms of a chunk, clips its rows and uses them, in one pass over the chunks.
    """

    origin: Origin
    one_pass: bool = False
    pulls_back: bool = False  # whether a sum may be one vector-Jacobian product
    weights: tuple[jax.Array, ...] | None = None  # of rows, for each leaf
    valid: jax.Array | None = None  # rows that count; the others are zero
    uniform: bool = True  # whether the weights are the same for all leaves
    clip: Clip | None = None  # of the weighted rows, waiting
    # How one example is differentiated, if this J is still where it was made. Elsewhere
    # the function is traced again.
    trace: Trace | None = None
    diagonal: Diagonal | None = None  # in parameter space

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: everything except the trace, which is not portable."""
        return {**self.__dict__, "trace": None}

    @property
    def mode(self) -> str:
        """The options that say how rows are recomputed, and where they are summed."""
        chunk_size = self.origin.source.chunk_size
        made = f"recompute={not self.one_pass}, chunk_size={chunk_size}"
        return options(self.origin, made)

    def as_argument(self) -> "Streamed":
        """What a compiled product takes in place of these rows."""
        return self

    def bare(self) -> "Streamed":
        """The rows before they were scaled and clipped, in their metric."""
        return replace(self, weights=None, valid=None, uniform=True, clip=None)

    def in_metric(self, diagonal: Diagonal) -> "Streamed":
        """The rows times a diagonal in parameter space."""
        self.origin.require_one()
        rows = self.settled()
        return replace(rows, diagonal=times_diagonal(rows.diagonal, diagonal))

    def chosen(self, rows: Chosen) -> "Streamed":
        """The rows of some of the examples."""
        cut = self._weights.chosen(rows)
        origin = self.origin.chosen(rows)
        return replace(
            self, origin=origin, weights=cut.weights, valid=cut.valid, trace=None
        )

    def scaled(self, factors: Sequence[jax.Array]) -> "Streamed":
        """The rows times numbers of their own, for each leaf."""
        self.origin.require_one()
        rows = self.settled()
        alike = all(x is factors[0] for x in factors)
        return rows._weighted(rows._weights.scaled(factors), alike=alike)

    def clipped(self, clip: Clip) -> "Streamed":
        """The clipped rows. With `one_pass`, each product takes their norms itself."""
        self.origin.require_one()
        if self.one_pass:
            return replace(self.settled(), clip=clip)
        return self.clipped_with_norms(clip)[0]

    def clipped_with_norms(
        self, clip: Clip
    ) -> tuple["Streamed", tuple[jax.Array, ...]]:
        """The clipped rows, and for each bound the norms that it was compared with.

        The norms take a pass of their own. Later products need no norms.
        """
        self.origin.require_one()
        rows = self.settled()
        norms = clip.norms(rows._leaf_norms())
        alike = sum(map(bool, clip.members)) == 1
        return rows._weighted(clip(rows._weights, norms), alike=alike), norms

    def clipped_sum(
        self, clip: Clip, c: jax.Array | None
    ) -> tuple[list[jax.Array], tuple[jax.Array, ...]]:
        """The sum of the clipped rows times c, and the norms before the clip.

        With `one_pass`, both come from one pass over the chunks, if the rows have no
        weights; for weighted rows, the norms came from an earlier, separate pass.
        """
        self.origin.require_one()
        rows = self.settled()
        if not rows.one_pass or rows.weights is not None:
            clipped, norms = rows.clipped_with_norms(clip)
            return clipped.sum(c), norms
        waiting = replace(rows, clip=clip)
        sums, norms = _folded(
            waiting, c, fun=Matrix.weighted_sum, dtype=_same, with_norms=True
        )
        return sum_over(sums, self.origin.axis_name), norms

    def settled(self) -> "Streamed":
        """The rows with no clip that waits: its norms are taken now."""
        if self.clip is None:
            return self
        return replace(self, clip=None).clipped_with_norms(self.clip)[0]

    @property
    def _weights(self) -> Matrix:
        """A matrix of the weights alone."""
        return Matrix((), self.weights, self.valid)

    def _weighted(self, matrix: Matrix, *, alike: bool) -> "Streamed":
        uniform = self.uniform and alike
        return replace(
            self, weights=matrix.weights, valid=matrix.valid, uniform=uniform
        )

    def of_a_chunk(self) -> Matrix:
        """The rows of the first chunk, abstract."""
        source, size = self.origin.source, self.origin.shape[0]
        batch = source.joint.chunk(0, min(source.chunk_size or size, size))
        trace = self.trace or source.trace()

        def matrix() -> Matrix:
            made = source.factors(trace, batch)
            return Matrix(made.sources, tail=made.tail)

        return jax.eval_shape(matrix)

    def map(
        self,
        fun: Callable[..., PyTree],
        *args: PyTree,
        out: PyTree = None,
        form: Form = "auto",
    ) -> PyTree:
        """`fun(matrix, *args)` of each chunk, which returns arrays of its rows.

        `out` is a prefix tree of their layouts; by default, that of numbers per row.
        """
        self.origin.require_one()
        out = self.origin.layout if out is None else out
        return _mapped(self, *args, fun=fun, form=form, out=out)

    def each(self, fun: Callable[[Matrix], PyTree], form: Form = "auto") -> PyTree:
        """Like `map`, but `fun` handles sharding itself; nothing is compiled here."""
        self.origin.require_one()
        source = self.origin.source
        trace = self.trace or source.trace()

        def of_chunk(matrix: Matrix) -> PyTree:
            return fun(self._clip(matrix)[0])

        form = self._form(form)
        return source.map(of_chunk, trace, self.weights, self.valid, form)

    def _form(self, form: Form) -> Form:
        """The form of leaves: norms alone cannot be multiplied by a diagonal."""
        return "auto" if form == "norms" and self.diagonal is not None else form

    def _clip(self, matrix: Matrix) -> tuple[Matrix, tuple[jax.Array, ...]]:
        """Rows of a chunk, clipped if a clip waits, and the norms that this took."""
        matrix = replace(matrix, diagonal=self.diagonal)
        if self.clip is None:
            return matrix, ()

        def factors(matrix: Matrix, clip: Clip) -> Any:
            norms = clip.norms(_leaf_norms(matrix))
            clipped = clip(matrix, norms)
            return clipped.weights, clipped.valid, norms

        of_chunk = in_auto(factors, self.origin.layout)
        weights, valid, norms = of_chunk(matrix, self.clip)
        return replace(matrix, weights=weights, valid=valid), norms

    def fold(
        self,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        extra: jax.Array | None,
        dtype: Callable[[Any], Any] | None = None,
        *,
        form: Form = "auto",
    ) -> list[jax.Array]:
        """`fun(matrix, extra)` of each chunk, which returns sums over rows, added up.

        `dtype` gives the dtype of a sum from that in which sums of a leaf are carried.
        """
        self.origin.require_one()
        sums, _ = _folded(self, extra, fun=fun, dtype=dtype or _same, form=form)
        return sum_over(sums, self.origin.axis_name)

    def _fold(
        self,
        extra: Any,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        dtype: Callable[[Any], Any],
        form: Form,
        *,
        with_norms: bool,
    ) -> tuple[list[jax.Array], Any]:
        """The sums on this device, and the norms of a waiting clip if asked for."""
        primals, source = self.origin.primals, self.origin.source
        own = in_auto(fun, [layout(x) for x in primals])

        def of_chunk(matrix: Matrix, extra: Any) -> tuple[list[jax.Array], Any]:
            clipped, norms = self._clip(matrix)
            return own(clipped, extra), norms if with_norms else None

        init = [zeros(x, x.shape, dtype(carried_dtype(x.dtype))) for x in primals]
        trace = self.trace or source.trace()
        rows = (self.weights, self.valid, extra)
        return source.fold(of_chunk, init, trace, rows, self._form(form))

    def sum(self, c: jax.Array | None) -> list[jax.Array]:
        """The sum of the rows times c, in the dtypes that sums are carried in.

        Rows that are neither scaled nor clipped take the form that a sum alone costs
        least from. All others take the rows that their norms take, or, if that is
        allowed, one backward pass.
        """
        self.origin.require_one()
        if self._can_pull_back:
            ones = jnp.ones(self.origin.shape) if c is None else c
            own = ones if self.weights is None else product(ones, self.weights[0])
            sums = _pulled_back(self, own, alone=self.weights is not None)
            return sum_over(sums, self.origin.axis_name)
        is_bare = self.weights is None and self.valid is None and self.clip is None
        return self.fold(Matrix.weighted_sum, c, form="sum" if is_bare else "auto")

    @property
    def _can_pull_back(self) -> bool:
        """Whether a sum may be one backward pass in the dtypes of the parameters."""
        alike = self.uniform and self.valid is None and self.clip is None
        alike = alike and self.diagonal is None
        return self.pulls_back and alike and self.origin.may_pull_back

    def norms(self, members: Members) -> tuple[jax.Array, ...]:
        """The norms of the rows, over each group of leaves."""
        return norms(self._leaf_norms(), members)

    def _leaf_norms(self) -> tuple[Norms, ...]:
        return self.map(_leaf_norms, form="norms")


def _same(dtype: Any) -> Any:
    return dtype


def _leaf_norms(matrix: Matrix) -> tuple[Norms, ...]:
    return tuple(matrix.leaf_norms())


@compiled_once("fun", "form", "out")
def _mapped(rows: Streamed, *args: PyTree, fun: Any, form: Form, out: Any) -> PyTree:
    own = in_auto(fun, out)
    return rows.each(lambda matrix: own(matrix, *args), form)


@compiled_once("fun", "dtype", "form", "with_norms")
def _folded(
    rows: Streamed,
    extra: Any,
    *,
    fun: Callable[..., Any],
    dtype: Callable[[Any], Any],
    form: Form = "auto",
    with_norms: bool = False,
) -> tuple[list[jax.Array], Any]:
    return rows._fold(extra, fun, dtype, form, with_norms=with_norms)


@compiled_once("alone")
def _pulled_back(rows: Streamed, weights: jax.Array, *, alone: bool) -> list[jax.Array]:
    fun = rows.trace.fun if rows.trace else None
    return rows.origin.source.pull_back(weights, fun, alone=alone)
