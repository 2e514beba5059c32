"""The rows of J, kept as factors or made again for each product, with a weight for each row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import PyTree
from ._clip import Clip
from ._compat import trace_state
from ._factored._leaves import Leaf
from ._factored._matrix import Matrix
from ._factored._plan import Route
from ._source import Source
from ._tree import carried_dtype


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "leaves", "weights", "valid", "clip"],
    meta_fields=["shape", "one_pass", "uniform"],
)
@dataclass(frozen=True)
class Rows:
    """Numbers per row are arrays of `shape` here: (N,), or (N, K) where an example has K outputs.

    Where `leaves` is None nothing is kept: each product makes the rows again, chunk by chunk. With
    `one_pass`, a clip then waits for the product, which takes the norms of a chunk as it goes.
    """

    source: Source
    leaves: tuple[Leaf, ...] | None
    shape: tuple[int, ...]
    one_pass: bool = False
    weights: tuple[jax.Array, ...] | None = None  # of rows, for each leaf
    valid: jax.Array | None = None  # rows that count; the others are zero
    uniform: bool = True  # whether the weights are the same for all leaves
    clip: Clip | None = None  # of the weighted rows, waiting

    @property
    def params(self) -> PyTree:
        """The differentiated arguments: a tuple where argnums was a sequence."""
        primals = self.source.batch.primals
        return primals if self.source.many else primals[0]

    @property
    def primals(self) -> list[jax.Array]:
        return jax.tree.leaves(self.params)

    def like_params(self, leaves: list[jax.Array]) -> PyTree:
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

    def taken(self, start: int, size: int) -> "Rows":
        """The rows of `size` examples from `start` on."""
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
        rows = self._settled()
        return rows._weighted(rows._matrix.scaled([factors] * len(self.primals)), alike=True)

    def clipped(self, clip: Clip) -> "Rows":
        """The rows clipped: at once where that is free or norms are there, else in each product."""
        rows = self._settled()
        waits = rows.leaves is None and rows.one_pass and rows._norms_in_this_trace() is None
        return replace(rows, clip=clip) if waits else rows._clipped_now(clip)

    def _settled(self) -> "Rows":
        """The same with no clip that waits."""
        return self if self.clip is None else replace(self, clip=None)._clipped_now(self.clip)

    def _clipped_now(self, clip: Clip) -> "Rows":
        clipped = clip.with_norms(self._matrix, self.leaf_norms())
        return self._weighted(clipped, alike=len(clip.members) == 1)

    def _weighted(self, matrix: Matrix, *, alike: bool) -> "Rows":
        uniform = self.uniform and alike
        return replace(self, weights=matrix.weights, valid=matrix.valid, uniform=uniform)

    @property
    def _matrix(self) -> Matrix:
        return Matrix(self.leaves or (), self.weights, self.valid)

    def map(self, fun: Callable[[Matrix], PyTree], route: Route = "auto") -> PyTree:
        """`fun` of the rows, which gives arrays that begin with a row each."""
        if self.leaves is not None:
            return fun(self._matrix)
        clip = self.clip or (lambda matrix: matrix)
        return self.source.map(lambda m: fun(clip(m)), self.weights, self.valid, route)

    def fold(
        self,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        extra: jax.Array | None,
        dtype: Callable[[Any], Any] = lambda dtype: dtype,
    ) -> list[jax.Array]:
        """`fun` of the rows, which gives sums over them: arrays like the leaves, carried."""
        if self.leaves is not None:
            return fun(self._matrix, extra)
        clip = self.clip or (lambda matrix: matrix)
        zeros = [jnp.zeros(x.shape, dtype(carried_dtype(x.dtype))) for x in self.primals]
        return self.source.fold(
            lambda matrix, extra: fun(clip(matrix), extra), zeros, self.weights, self.valid, extra
        )

    def sum(self, c: jax.Array | None) -> PyTree:
        """The sum of the rows times c: a tree like the parameters, in their dtypes."""
        if self._can_pull_back:
            ones = jnp.ones(self.shape) if c is None else c
            own = ones if self.weights is None else ones * self.weights[0].astype(ones.dtype)
            return self.like_params(self.source.pull_back(own))
        sums = self.fold(lambda matrix, c: matrix.weighted_sum(c), c)
        return self.like_params(
            [x.astype(p.dtype) for x, p in zip(sums, self.primals, strict=True)]
        )

    @property
    def _can_pull_back(self) -> bool:
        """Whether a sum of rows that are not kept may be one backward pass in their own dtype."""
        wide = all(carried_dtype(x.dtype) == x.dtype for x in self.primals)
        alike = self.uniform and self.valid is None and self.clip is None
        return self.leaves is None and len(self.shape) == 1 and wide and alike

    def leaf_norms(self) -> tuple[jax.Array, ...]:
        """The norms of each leaf's rows, made once for all products in one trace that need them."""
        norms = self._norms_in_this_trace()
        if norms is None:
            rows = self._settled()
            norms = rows.map(lambda matrix: tuple(matrix.leaf_norms()), route="norms")
            self.__dict__["_norms"] = (trace_state(), norms)
        return norms

    def _norms_in_this_trace(self) -> tuple[jax.Array, ...] | None:
        made_in, norms = self.__dict__.get("_norms", (None, None))
        return norms if made_in == trace_state() else None
