"""Where the rows of J come from: a function and a batch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from math import prod
from types import MethodType
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from .._batches.batch import Batch
from .._batches.chosen import At, Chosen
from .._batches.chunks import Place
from .._batches.functions import Fun
from .._batches.loops import fold_chunks, map_chunks
from .._batches.notes import Note, note_of_fun
from .._engine import trace as _trace
from .._engine.leaf import chosen
from .._engine.matrix import Matrix
from .._engine.trace import Factored, Factors, Form, Trace
from .._jax import compat
from .._jax.effects import made_pure
from .._jax.sharding import placed_like, zeros
from .._trees.algebra import carried_dtype
from .._trees.checks import PyTree, check_arrays


@jax.tree_util.register_static
@dataclass(frozen=True)
class _Static:
    """A function or an object without arrays, compared by identity in a treedef.

    A method is a new object wherever it is looked up: its object and its function are
    compared.
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
    """The function of one example, the batch, and the chunks in which rows are made."""

    fun: Callable[..., Any]
    batch: Batch
    has_aux: bool
    chunk_size: int | None
    many: (
        bool  # whether argnums is a sequence: trees like the parameters are then tuples
    )
    runs_again: (
        bool  # whether each product makes the rows it needs, since none are kept
    )
    traced: tuple[
        bool, ...
    ]  # which leaves of the batch are children of the pytree, the arrays
    # The outputs that have rows, by their numbers (k,); None for all of them.
    outputs_at: jax.Array | None = None

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
        """Record which leaves are arrays now; later they may be placeholders."""
        traced = tuple(isinstance(x, jax.Array) for x in batch.leaves)
        return cls(fun, batch, has_aux, chunk_size, many, runs_again, traced)

    @property
    def note(self) -> Note:
        """What an error in the function says."""
        return note_of_fun(self.fun, self.batch)

    @property
    def of_one(self) -> Fun:
        """The function of one example, which returns its output and aux."""
        return Fun(self.fun, self.has_aux)

    def trace(self, fun: Fun | None = None) -> Trace:
        """Trace the function, or what was made of it, and its backward pass."""
        with self.note:
            batch = self.batch.localized()
            return _trace.trace(fun or self.of_one, batch, runs_again=self.runs_again)

    @property
    def joint(self) -> Batch:
        """The batch that is cut into chunks."""
        return self.batch

    def factors(self, trace: Trace, chunk: Batch, form: Form = "auto") -> Factors:
        """The rows of a chunk of the joint batch."""
        made = self.factor(trace, chunk, form).rows
        if self.outputs_at is None:
            return made
        rows = At(self.outputs_at, of_outputs=True)
        return Factors(tuple(chosen(x, rows) for x in made.sources), made.tail)

    def chosen(self, rows: Chosen) -> "Source":
        """The source of some of the examples, or of some outputs of all examples."""
        if not rows.of_outputs:
            return replace(self, batch=self.batch.chosen(rows))
        if self.outputs_at is not None:
            return replace(self, outputs_at=rows.cut(self.outputs_at))
        if isinstance(rows, At):
            return replace(self, outputs_at=rows.index)
        return replace(self, outputs_at=rows.start + jnp.arange(rows.size))

    def without_function(self) -> "Source":
        """What a compiled product of kept rows takes: nothing is recomputed."""
        pairs = zip(self.batch.leaves, self.traced, strict=True)
        leaves = tuple(x if traced else None for x, traced in pairs)
        return replace(self, fun=_not_needed, batch=replace(self.batch, leaves=leaves))

    def factor(
        self,
        trace: Trace,
        batch: Batch,
        form: Form = "auto",
        *,
        with_sums: bool = False,
    ) -> Factored:
        """Outputs, aux and rows of the examples of a batch."""
        with self.note:
            return _trace.factor(trace, batch, form, with_sums=with_sums)

    def map(
        self,
        fun: Callable[[Matrix], PyTree],
        trace: Trace,
        weights: Any,
        valid: Any,
        form: Form = "auto",
    ) -> PyTree:
        """`fun(matrix)`, which returns arrays of rows, chunk by chunk."""

        def of_chunk(chunk: Batch, rows: Any) -> PyTree:
            made = self.factors(trace, chunk, form)
            return fun(Matrix(made.sources, *rows, tail=made.tail))

        rows = (weights, valid)
        return map_chunks(of_chunk, self.joint.localized(), self.chunk_size, rows)

    def fold(
        self,
        fun: Callable[[Matrix, Any], tuple[list[jax.Array], PyTree]],
        init: list[jax.Array],
        trace: Trace,
        rows: tuple[Any, Any, Any],
        form: Form = "auto",
    ) -> tuple[list[jax.Array], PyTree]:
        """`sums, numbers = fun(matrix, extra)` of each chunk: added up, and joined.

        `rows` are weights, valid and extra, trees of arrays of rows, as the numbers
        are. If rows have weights, an earlier pass computed their norms. This pass must
        not share work with that one, and returns no numbers.
        """

        def step(carry: Any, chunk: Batch, place: Place) -> Any:
            weights, valid, extra = jax.tree.map(place.cut, rows)
            made = self.factors(trace, chunk, form)
            matrix = Matrix(made.sources, weights, valid, made.tail)
            sums, numbers = fun(matrix, extra)
            return jax.tree.map(jnp.add, carry, sums), numbers

        alone = rows[0] is not None
        return fold_chunks(
            step, init, self.joint.localized(), self.chunk_size, alone=alone
        )

    def pull_back(
        self, weights: jax.Array, fun: Fun | None = None, *, alone: bool
    ) -> list[jax.Array]:
        """The weighted sum of the rows: one ordinary gradient.

        The weights are (N,), or (N, K) if an example has K outputs.
        """
        fun = fun or self.of_one
        primals = jax.tree.leaves(self.batch.primals)

        def values_of(chunk: Batch) -> PyTree:
            values, _ = fun.mapped(chunk)
            return jax.tree.map(lambda x: x.astype(carried_dtype(x.dtype)), values)

        def step(carry: Any, chunk: Batch, place: Place) -> Any:
            own = place.cut(weights)
            values, vjp, *_ = jax.vjp(
                lambda primals: values_of(chunk.with_primals(primals)), chunk.primals
            )
            if self.outputs_at is not None:
                count = sum(prod(x.shape[1:]) for x in jax.tree.leaves(values))
                zeros_of_all = jnp.zeros((*own.shape[:1], count), own.dtype)
                own = zeros_of_all.at[:, self.outputs_at].add(own)
            (sums,) = vjp(placed_like(_like(values, own), values))
            sums = placed_like(jax.tree.leaves(sums), primals)
            return jax.tree.map(jnp.add, carry, sums), None

        init, batch = [zeros(x, x.shape) for x in primals], self.batch.localized()
        with self.note:
            return fold_chunks(step, init, batch, self.chunk_size, alone=alone)[0]

    def outputs(self) -> tuple[PyTree, PyTree]:
        """Outputs and aux of all examples, by forward passes alone."""
        with self.note:
            return map_chunks(
                self.of_one.mapped, self.batch.localized(), self.chunk_size
            )

    def examined(self) -> "Examined":
        """Call the function for one example, and see what may be made of it."""

        def one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Examined:
            return _examine(self.of_one, args, kwargs, self.batch, self.runs_again)

        with self.note:
            return self.batch.localized().vmap(one)


def _not_needed(*args: Any, **kwargs: Any) -> Any:
    """Stand in for the function in a product of rows that are kept."""
    raise AssertionError("rows that are kept are not recomputed")


def _like(values: PyTree, numbers: jax.Array) -> PyTree:
    """Numbers (N,) or (N, K) as a tree of outputs (N, *k), in their dtypes."""
    leaves, treedef = jax.tree.flatten(values)
    if numbers.ndim == 1:  # scalar outputs
        return jax.tree.unflatten(treedef, [numbers.astype(leaves[0].dtype)])
    ends = list(accumulate(prod(x.shape[1:]) for x in leaves))
    starts = [0, *ends[:-1]]
    shaped = [
        numbers[:, start:end].reshape(x.shape).astype(x.dtype)
        for start, end, x in zip(starts, ends, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, shaped)


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Examined:
    """What one call of a function has shown. It is a pytree without leaves."""

    # The function as a jaxpr, so that it is not called again. If it has custom rules,
    # it is the function itself: rules may hold values of the trace in which it was
    # called.
    fun: Fun
    # Whether a sum of rows may be one vector-Jacobian product of the whole batch. It
    # may not if a custom rule or a reference makes the gradient of the mapped function
    # fail, or differ from the mapped gradient.
    pulls_back: bool


def _examine(
    fun: Fun, args: Any, kwargs: Any, batch: Batch, runs_again: bool
) -> Examined:
    flat, treedef = jax.tree.flatten((args, kwargs))
    inputs_at = (*batch.primal_positions, *batch.value_positions)

    def outputs(inputs: Sequence[Any]) -> tuple[PyTree, PyTree]:
        leaves = list(flat)
        for i, x in zip(inputs_at, inputs, strict=True):
            leaves[i] = x
        args, kwargs = jax.tree.unflatten(treedef, leaves)
        value, aux = fun(*args, **kwargs)
        check_arrays("the output of the function", value)
        check_arrays("aux", aux)
        return value, aux

    make = jax.make_jaxpr(outputs, return_shape=True)
    jaxpr, avals = make([flat[i] for i in inputs_at])
    pure = made_pure(jaxpr, runs_again=runs_again)
    pulls_back = pure is jaxpr and compat.custom_rule(jaxpr) is None
    if jaxpr.effects or compat.has_custom_calls(jaxpr):
        return Examined(fun, pulls_back)

    def evaluate(*args: Any, **kwargs: Any) -> Any:
        leaves = jax.tree.leaves((args, kwargs))
        found = core.jaxpr_as_fun(jaxpr)(*(leaves[i] for i in inputs_at))
        return jax.tree.unflatten(jax.tree.structure(avals), found)

    return Examined(Fun(evaluate, has_aux=True), pulls_back)


def _flatten(source: Source) -> tuple[list[Any], Any]:
    batch, traced = source.batch, source.traced
    arrays = [x for x, yes in zip(batch.leaves, traced, strict=True) if yes]
    arrays = [source.outputs_at, *arrays]
    rest = tuple(
        None if yes else _Static(x) for x, yes in zip(batch.leaves, traced, strict=True)
    )
    static = (
        batch.axes,
        batch.treedef,
        batch.argnums,
        batch.size,
        batch.gathered,
        batch.is_whole,
        rest,
    )
    settings = (
        source.has_aux,
        source.chunk_size,
        source.many,
        source.runs_again,
        traced,
    )
    return arrays, (_Static(source.fun), settings, static)


def _unflatten(meta: Any, arrays: Any) -> Source:
    fun, settings, (*static, rest) = meta
    axes, treedef, argnums, size, gathered, is_whole = static
    outputs_at, *arrays = arrays
    given = iter(arrays)
    leaves = tuple(next(given) if x is None else x.value for x in rest)
    batch = Batch(leaves, axes, treedef, argnums, size, gathered, is_whole)
    return Source(fun.value, batch, *settings, outputs_at=outputs_at)


jax.tree_util.register_pytree_node(Source, _flatten, _unflatten)
