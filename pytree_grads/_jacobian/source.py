"""Where the rows of J come from: a function and a batch, from which they can be made again."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp

from .._batches.batch import Batch, fold_chunks, map_chunks
from .._batches.chunks import Place
from .._batches.notes import Note, note_of_fun
from .._engine import trace as _rows
from .._engine.matrix import Matrix
from .._engine.plan import Route
from .._jax import compat
from .._jax.effects import made_pure
from .._jax.sharding import placed_like, zeros
from .._trees.algebra import carried_dtype
from .._trees.checks import PyTree, split_aux


@dataclass(frozen=True)
class _Static:
    """A function or another object without arrays, compared by identity inside a treedef.

    A method is a new object wherever it is looked up: its object and its function are compared.
    """

    value: Any

    @property
    def _identity(self) -> tuple[int, ...]:
        if isinstance(self.value, MethodType):
            return id(self.value.__self__), id(self.value.__func__)
        return (id(self.value),)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Static) and self._identity == other._identity

    def __hash__(self) -> int:
        return hash(self._identity)


@dataclass(frozen=True)
class Source:
    """The function of one example and the batch, with the chunks in which rows are made."""

    fun: Callable[..., Any]
    batch: Batch
    has_aux: bool
    chunk_size: int | None
    many: bool  # whether argnums is a sequence: trees like the parameters are then tuples
    runs_again: bool  # whether each product makes the rows it needs, since none are kept
    traced: tuple[bool, ...]  # which leaves of the batch are children of the pytree, the arrays

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        batch: Batch,
        has_aux: bool,
        chunk_size: int | None,
        *,
        many: bool,
        runs_again: bool,
    ) -> "Source":
        """Record which leaves are arrays now: after unflattening they may be placeholders."""
        traced = tuple(isinstance(x, jax.Array) for x in batch.leaves)
        return cls(fun, batch, has_aux, chunk_size, many, runs_again, traced)

    @property
    def note(self) -> Note:
        """What an error says where the function is evaluated or differentiated."""
        return note_of_fun(self.fun, self.batch)

    def factor(self, batch: Batch, route: Route = "auto") -> _rows.Factored:
        with self.note:
            return _rows.factor(
                self.fun, batch, has_aux=self.has_aux, route=route, runs_again=self.runs_again
            )

    def matrix(
        self,
        batch: Batch,
        weights: Any,
        valid: Any,
        route: Route = "auto",
        *,
        needs_rows: bool = True,
    ) -> Matrix:
        factored = self.factor(batch, route)
        summands = None if needs_rows or not factored.summands else factored.summands()
        return Matrix(factored.leaves, weights, valid, summands)

    def map(
        self,
        fun: Callable[[Matrix], PyTree],
        weights: Any,
        valid: Any,
        route: Route = "auto",
    ) -> PyTree:
        """`fun(matrix)`, which gives arrays of a row each, chunk by chunk."""

        def of_chunk(chunk: Batch, rows: Any) -> PyTree:
            return fun(self.matrix(chunk, *rows, route=route))

        return map_chunks(of_chunk, self.batch.localized(), self.chunk_size, (weights, valid))

    def fold(
        self,
        fun: Callable[[Matrix, Any], tuple[list[jax.Array], PyTree]],
        init: list[jax.Array],
        weights: Any,
        valid: Any,
        extra: Any,
        *,
        needs_rows: bool = True,
    ) -> tuple[list[jax.Array], PyTree]:
        """`sums, numbers = fun(matrix, extra)` of each chunk: added up, and put together.

        `extra` and the numbers are trees of arrays of a row each. Rows that have weights have had
        a pass before, for their norms: this one shares nothing with it, and gives no numbers.
        """

        def step(carry: Any, chunk: Batch, place: Place) -> Any:
            rows = jax.tree.map(place.cut, (weights, valid, extra))
            own_weights, own_valid, own_extra = rows
            matrix = self.matrix(chunk, own_weights, own_valid, needs_rows=needs_rows)
            sums, numbers = fun(matrix, own_extra)
            return jax.tree.map(jnp.add, carry, sums), numbers

        batch = self.batch.localized()
        return fold_chunks(step, init, batch, self.chunk_size, alone=weights is not None)

    def pull_back(self, weights: jax.Array, *, alone: bool) -> list[jax.Array]:
        """The sum of the rows of a scalar function times weights: one ordinary gradient."""
        primals = jax.tree.leaves(self.batch.primals)

        def step(carry: Any, chunk: Batch, place: Place) -> Any:
            own = place.cut(weights)
            values, vjp, *_ = jax.vjp(
                lambda primals: self._values(chunk.with_primals(primals)), chunk.primals
            )
            (sums,) = vjp(placed_like(own.astype(values.dtype), values))
            return jax.tree.map(jnp.add, carry, placed_like(jax.tree.leaves(sums), primals)), None

        init = [zeros(x, x.shape) for x in primals]
        with self.note:
            return fold_chunks(step, init, self.batch.localized(), self.chunk_size, alone=alone)[0]

    def _of_one(self, args: Any, kwargs: Any) -> tuple[PyTree, PyTree]:
        """The output and aux of one example."""
        return split_aux(self.fun(*args, **kwargs), self.has_aux, "the result of the function")

    def _values(self, batch: Batch) -> jax.Array:
        values = batch.vmap(lambda args, kwargs: self._of_one(args, kwargs)[0])
        return values.astype(carried_dtype(values.dtype))

    def outputs(self) -> tuple[PyTree, PyTree]:
        """Outputs and aux of all examples, by forward passes alone."""

        def of_chunk(chunk: Batch) -> Any:
            return chunk.vmap(self._of_one)

        with self.note:
            return map_chunks(of_chunk, self.batch.localized(), self.chunk_size)

    def examined(self) -> tuple[PyTree, bool]:
        """The output of one example, abstract, and whether sums may be a vjp of the whole batch.

        They may not where a custom rule or a reference makes the gradient of the mapped function
        fail, or differ from the mapped gradient.
        """
        found: list[tuple[PyTree, bool]] = []

        def one(args: Any, kwargs: Any) -> None:
            trace = jax.make_jaxpr(lambda: self._of_one(args, kwargs)[0], return_shape=True)
            jaxpr, avals = trace()
            _rows.check_outputs(avals)
            pure = made_pure(jaxpr, runs_again=self.runs_again)
            found.append((avals, pure is jaxpr and compat.custom_rule(pure) is None))

        with self.note:
            jax.eval_shape(lambda: self.batch.localized().vmap(one))
        return found[0]


def _flatten(source: Source) -> tuple[list[Any], Any]:
    batch, traced = source.batch, source.traced
    arrays = [x for x, yes in zip(batch.leaves, traced, strict=True) if yes]
    rest = tuple(None if yes else _Static(x) for x, yes in zip(batch.leaves, traced, strict=True))
    static = (batch.axes, batch.treedef, batch.argnums, batch.size, batch.gathered, rest)
    settings = (source.has_aux, source.chunk_size, source.many, source.runs_again, traced)
    return arrays, (_Static(source.fun), settings, static)


def _unflatten(meta: Any, arrays: Any) -> Source:
    fun, settings, (axes, treedef, argnums, size, gathered, rest) = meta
    given = iter(arrays)
    leaves = tuple(next(given) if x is None else x.value for x in rest)
    return Source(fun.value, Batch(leaves, axes, treedef, argnums, size, gathered), *settings)


jax.tree_util.register_pytree_node(Source, _flatten, _unflatten)
