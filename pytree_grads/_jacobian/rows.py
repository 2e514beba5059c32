"""The rows of J, kept as factors or made again for each product, with a weight for each row."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, fields, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._engine.leaf import Leaf
from .._engine.matrix import Matrix, product
from .._engine.plan import Route
from .._engine.products.scaled_norms import Norms, as_numbers, combined
from .._jax.compat import trace_state
from .._jax.sharding import AxisName, device_count, in_auto, layout, sum_over, without, zeros
from .._trees.algebra import carried_dtype
from .._trees.checks import PyTree
from .clip import Clip
from .compiled import compiled_once
from .source import Source


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "leaves", "weights", "valid", "clip"],
    meta_fields=["shape", "param_shapes", "one_pass", "pulls_back", "axis_name", "uniform"],
)
@dataclass(frozen=True)
class Rows:
    """Numbers per row are arrays of `shape` here: (N,), or (N, K) where an example has K outputs.

    Where `leaves` is None nothing is kept: each product makes the rows again, chunk by chunk. With
    `one_pass`, a clip then waits for the product, which takes the norms of a chunk as it goes.
    Sums over rows are those over all devices along the mesh axes `axis_name`.
    """

    source: Source
    leaves: tuple[Leaf, ...] | None
    shape: tuple[int, ...]
    param_shapes: tuple[tuple[int, ...], ...]  # of the parameters' leaves: of one J, in a stack too
    one_pass: bool = False
    pulls_back: bool = False  # whether sums may be one vector-Jacobian product
    axis_name: AxisName = None
    weights: tuple[jax.Array, ...] | None = None  # of rows, for each leaf
    valid: jax.Array | None = None  # rows that count; the others are zero
    uniform: bool = True  # whether the weights are the same for all leaves
    clip: Clip | None = None  # of the weighted rows, waiting

    @classmethod
    def of(
        cls,
        source: Source,
        leaves: tuple[Leaf, ...] | None,
        shape: tuple[int, ...],
        *,
        summands: Callable[[], tuple[Leaf, ...]] | None = None,
        one_pass: bool = False,
        pulls_back: bool = False,
        axis_name: AxisName = None,
    ) -> "Rows":
        """The rows of one J, with what a sum takes if it is the first product."""
        params = _shapes(source.batch.primals)
        rows = cls(source, leaves, shape, params, one_pass, pulls_back, axis_name)
        rows.__dict__["_summands"] = summands
        return rows

    def __post_init__(self) -> None:
        self.__dict__["_made_in"] = trace_state()

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle holds: the fields, and nothing that belongs to a trace."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def params(self) -> PyTree:
        """The differentiated arguments: a tuple where argnums was a sequence."""
        primals = self.source.batch.primals
        return primals if self.source.many else primals[0]

    @property
    def primals(self) -> list[jax.Array]:
        return jax.tree.leaves(self.params)

    @property
    def is_stack(self) -> bool:
        """Whether these are the rows of several Jacobians, as they leave `jax.vmap`."""
        ranks = zip(map(jnp.ndim, self.primals), map(len, self.param_shapes), strict=False)
        return any(rank > own for rank, own in ranks)

    def require_one(self) -> None:
        if self.is_stack:
            raise ValueError(
                "this is a stack of Jacobians, as jax.vmap returns it, and products are those of "
                "one: map them, as in jax.vmap(lambda J: J.norms())(stack)"
            )

    @property
    def count(self) -> int:
        """How many rows there are on all devices along `axis_name`."""
        return prod(self.shape) * device_count(self.axis_name)

    @property
    def layout(self) -> PartitionSpec:
        """How numbers per row are laid out: as the examples are."""
        return PartitionSpec(self.source.batch.mesh_axes)

    def as_argument(self) -> "Rows":
        """What a compiled product takes: rows that are kept have no need of their function."""
        if self.leaves is None:
            return self
        source = self.source
        pairs = zip(source.batch.leaves, source.traced, strict=True)
        batch = replace(source.batch, leaves=tuple(x if traced else None for x, traced in pairs))
        return replace(self, source=replace(source, fun=_not_needed, batch=batch))

    def like_params(self, leaves: list[jax.Array]) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

    def taken(self, start: int, size: int) -> "Rows":
        """The rows of `size` examples from `start` on."""
        self.require_one()
        cut = Matrix(self.leaves or (), self.weights, self.valid).taken(start, size)
        return replace(
            self,
            source=replace(self.source, batch=self.source.batch.chunk(start, size)),
            leaves=None if self.leaves is None else cut.leaves,
            shape=(size, *self.shape[1:]),
            weights=cut.weights,
            valid=cut.valid,
        )

    def scaled(self, factors: jax.Array) -> "Rows":
        """The rows times numbers of their own."""
        self.require_one()
        rows = self._settled()
        return rows._weighted(rows._matrix().scaled([factors] * len(self.primals)), alike=True)

    def clipped(self, clip: Clip) -> "Rows":
        """The rows clipped: at once where that is free or norms are there, else in each product."""
        self.require_one()
        rows = self._settled()
        if rows.leaves is not None or not rows.one_pass or rows._norms_in_this_trace() is not None:
            return rows._clipped_now(clip)
        waiting = replace(rows, clip=clip)
        waiting.__dict__["_before"] = rows
        return waiting

    @property
    def _unclipped(self) -> "Rows":
        """The rows before the clip that waits, which may know their norms."""
        return self.__dict__.get("_before") or replace(self, clip=None)

    def _settled(self) -> "Rows":
        """The same with no clip that waits."""
        return self if self.clip is None else self._unclipped._clipped_now(self.clip)

    def _clipped_now(self, clip: Clip) -> "Rows":
        clipped = clip(self._matrix(), self.norms)
        return self._weighted(clipped, alike=len(clip.members) == 1)

    def _weighted(self, matrix: Matrix, *, alike: bool) -> "Rows":
        uniform = self.uniform and alike
        return replace(self, weights=matrix.weights, valid=matrix.valid, uniform=uniform)

    def _matrix(self, *, needs_rows: bool = True) -> Matrix:
        """What is kept, for a product. The first one may be a sum that needs no rows.

        Later ones share the rows, as the turns of a loop do, which is another trace.
        """
        summands = self.__dict__.pop("_summands", None)
        is_here = trace_state() == self.__dict__["_made_in"]
        own = summands() if summands and is_here and not needs_rows else None
        return Matrix(self.leaves or (), self.weights, self.valid, own)

    def map(
        self,
        fun: Callable[..., PyTree],
        *args: PyTree,
        route: Route = "auto",
        out: PyTree = None,
    ) -> PyTree:
        """`fun` of the rows, and of trees of arrays, which gives arrays that begin with a row each.

        `out` is a prefix tree of their layouts, if that is not the one of numbers per row.
        """
        self.require_one()
        return _mapped(self, *args, fun=fun, route=route, out=self.layout if out is None else out)

    def each(self, fun: Callable[[Matrix], PyTree], route: Route = "auto") -> PyTree:
        """`fun` of the rows, where it sees to layouts by itself; it is not compiled here."""
        self.require_one()
        if self.leaves is not None:
            return fun(self._matrix())
        return self.source.map(lambda m: fun(self._clip(m)[0]), self.weights, self.valid, route)

    def stacked(self) -> tuple[jax.Array, ...]:
        """The rows as arrays, one for each leaf."""
        names = self.source.batch.mesh_axes
        lead = (names, *[None] * (len(self.shape) - 1))
        out = tuple(PartitionSpec(*lead, *without(layout(x), names)) for x in self.primals)
        return self.map(_stacked, out=out)

    def _clip(self, matrix: Matrix) -> tuple[Matrix, tuple[Norms, ...]]:
        """Some of the rows, clipped if a clip waits, and the norms that this took."""
        if self.clip is None:
            return matrix, ()

        def factors(matrix: Matrix, clip: Clip) -> Any:
            parts = tuple(matrix.leaf_norms())
            clipped = clip(matrix, partial(combined, parts))
            return clipped.weights, clipped.valid, (as_numbers(parts),)

        weights, valid, norms = in_auto(factors, self.layout)(matrix, self.clip)
        return replace(matrix, weights=weights, valid=valid), norms

    def fold(
        self,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        extra: jax.Array | None,
        dtype: Callable[[Any], Any] = lambda dtype: dtype,
        *,
        needs_rows: bool = True,
    ) -> list[jax.Array]:
        """`fun` of the rows, which gives sums over them: arrays like the leaves, carried."""
        self.require_one()
        # Rows that had weights before the clip take a pass that gives no norms; see `Source.fold`.
        before = self.__dict__.get("_before") if self.weights is None else None
        sums, norms = _folded(
            self, extra, fun=fun, dtype=dtype, needs_rows=needs_rows, with_norms=before is not None
        )
        if before is not None:
            before._remember_norms(norms)
        return sum_over(sums, self.axis_name)

    def _fold(
        self,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        extra: jax.Array | None,
        dtype: Callable[[Any], Any],
        *,
        needs_rows: bool,
        with_norms: bool,
    ) -> tuple[list[jax.Array], Any]:
        """The sums on this device, and the norms that a waiting clip has taken, if asked for."""
        own = in_auto(fun, [layout(x) for x in self.primals])
        if self.leaves is not None:
            return own(self._matrix(needs_rows=needs_rows), extra), None

        def of_chunk(matrix: Matrix, extra: Any) -> tuple[list[jax.Array], Any]:
            clipped, norms = self._clip(matrix)
            return own(clipped, extra), norms if with_norms else None

        init = [zeros(x, x.shape, dtype(carried_dtype(x.dtype))) for x in self.primals]
        return self.source.fold(
            of_chunk, init, self.weights, self.valid, extra, needs_rows=needs_rows
        )

    def sum(self, c: jax.Array | None, count: int | None = None) -> PyTree:
        """The sum of the rows times c, over a count: like the parameters, in their dtypes."""
        sums = self._carried_sum(c)
        if count is not None:
            sums = [x / jnp.asarray(count, x.dtype) for x in sums]
        return self.like_params(
            [x.astype(p.dtype) for x, p in zip(sums, self.primals, strict=True)]
        )

    def _carried_sum(self, c: jax.Array | None) -> list[jax.Array]:
        self.require_one()
        if self._can_pull_back:
            ones = jnp.ones(self.shape) if c is None else c
            own = ones if self.weights is None else product(ones, self.weights[0])
            sums = _pulled_back(self, own, alone=self.weights is not None)
            return sum_over(sums, self.axis_name)
        needs_rows = any(x is not None for x in (self.weights, self.valid, self.clip))
        return self.fold(Matrix.weighted_sum, c, needs_rows=needs_rows)

    @property
    def _can_pull_back(self) -> bool:
        """Whether a sum of rows that are not kept may be one backward pass in their own dtype."""
        wide = all(carried_dtype(x.dtype) == x.dtype for x in self.primals)
        alike = self.uniform and self.valid is None and self.clip is None
        recomputed = self.leaves is None and self.pulls_back
        return recomputed and len(self.shape) == 1 and wide and alike

    def norms(self, leaves: Collection[int] | None = None) -> jax.Array:
        """The norms of the rows, or of their parts in some leaves, made once for all products."""
        kept = self._norms_in_this_trace()
        if kept is None:
            rows = self._settled()
            parts = rows.map(_leaf_norms, route="norms")
            kept = self._remember_norms(parts)
        parts, found = kept
        key = frozenset(range(len(self.primals)) if leaves is None else leaves)
        if key not in found:
            found[key] = combined(parts, key)
        return found[key]

    def _remember_norms(self, parts: tuple[Norms, ...]) -> Any:
        kept = parts, {}
        if trace_state() == self.__dict__["_made_in"]:  # else tracers would outlive their trace
            self.__dict__["_norms"] = kept
        return kept

    def _norms_in_this_trace(self) -> tuple[tuple[Norms, ...], dict[Any, jax.Array]] | None:
        is_here = trace_state() == self.__dict__["_made_in"]
        return self.__dict__.get("_norms") if is_here else None


def _shapes(tree: PyTree) -> tuple[tuple[int, ...], ...]:
    return tuple(x.shape for x in jax.tree.leaves(tree))


def _not_needed(*args: Any, **kwargs: Any) -> Any:
    """The function of rows that are kept, in a product of them."""
    raise AssertionError("rows that are kept are not made again")


def _leaf_norms(matrix: Matrix) -> tuple[Norms, ...]:
    return tuple(matrix.leaf_norms())


def _stacked(matrix: Matrix) -> tuple[jax.Array, ...]:
    return tuple(matrix.rows())


@compiled_once("fun", "route", "out")
def _mapped(rows: Rows, *args: PyTree, fun: Any, route: Route, out: PyTree) -> PyTree:
    own = in_auto(fun, out)
    return rows.each(lambda matrix: own(matrix, *args), route)


@compiled_once("fun", "dtype", "needs_rows", "with_norms")
def _folded(rows: Rows, extra: Any, **settings: Any) -> tuple[list[jax.Array], Any]:
    return rows._fold(settings.pop("fun"), extra, settings.pop("dtype"), **settings)


@compiled_once("alone")
def _pulled_back(rows: Rows, weights: jax.Array, *, alone: bool) -> list[jax.Array]:
    return rows.source.pull_back(weights, alone=alone)
