"""The rows of J, kept as factors or made again for each product, with a weight for each row."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from ._checks import PyTree
from ._compat import trace_state
from ._factored._leaves import Leaf
from ._factored._matrix import Matrix
from ._factored._plan import Route
from ._source import Source
from ._tree import carried_dtype


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["source", "leaves", "weights", "valid"],
    meta_fields=["shape", "uniform"],
)
@dataclass(frozen=True)
class Rows:
    """Numbers per row are arrays of `shape` here: (N,), or (N, K) where an example has K outputs.

    Where `leaves` is None nothing is kept: each product makes the rows again, chunk by chunk.
    """

    source: Source
    leaves: tuple[Leaf, ...] | None
    shape: tuple[int, ...]
    weights: tuple[jax.Array, ...] | None = None  # of rows, for each leaf
    valid: jax.Array | None = None  # rows that count; the others are zero
    uniform: bool = True  # whether the weights are the same for all leaves

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

    def scaled(self, factors: list[jax.Array], *, uniform: bool) -> "Rows":
        """The rows times numbers of their own, for each leaf."""
        if self.weights is not None:
            factors = [f * w.astype(f.dtype) for f, w in zip(factors, self.weights, strict=True)]
        return replace(self, weights=tuple(factors), uniform=self.uniform and uniform)

    def only(self, valid: jax.Array) -> "Rows":
        """The rows, with zero for those that are not valid."""
        return replace(self, valid=valid if self.valid is None else valid & self.valid)

    def map(self, fun: Callable[[Matrix], PyTree], route: Route = "auto") -> PyTree:
        """`fun` of the rows, which gives arrays that begin with a row each."""
        if self.leaves is not None:
            return fun(Matrix(self.leaves, self.weights, self.valid))
        return self.source.map(fun, self.weights, self.valid, route)

    def fold(
        self,
        fun: Callable[[Matrix, Any], list[jax.Array]],
        extra: jax.Array | None,
        dtype: Callable[[Any], Any] = lambda dtype: dtype,
    ) -> list[jax.Array]:
        """`fun` of the rows, which gives sums over them: arrays like the leaves, carried."""
        if self.leaves is not None:
            return fun(Matrix(self.leaves, self.weights, self.valid), extra)
        zeros = [jnp.zeros(x.shape, dtype(carried_dtype(x.dtype))) for x in self.primals]
        return self.source.fold(fun, zeros, self.weights, self.valid, extra)

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
        alike = self.uniform and self.valid is None
        return self.leaves is None and len(self.shape) == 1 and wide and alike

    def leaf_norms(self) -> tuple[jax.Array, ...]:
        """The norms of each leaf's rows, made once for all products in one trace that need them."""
        trace = trace_state()
        made_in, norms = self.__dict__.get("_norms_made", (None, ()))
        if made_in != trace:
            norms = self.map(lambda matrix: tuple(matrix.leaf_norms()), route="norms")
            self.__dict__["_norms_made"] = (trace, norms)
        return norms
