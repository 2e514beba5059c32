"""From a function and a batch to its outputs and the leaves of J: trace one example, cut, map."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._batches.batch import Batch
from .._jax.effects import made_pure
from .._jax.sharding import placed_like
from .._trees.checks import check_arrays, describe, split_aux
from . import evaluate as _execute
from . import graph as _graph
from . import plan as _plan
from .leaf import Leaf, Summand
from .terms import Term

PyTree = Any


@dataclass(frozen=True)
class Factored:
    """What one forward and one backward pass over a batch give."""

    outputs: PyTree  # leaves (N, *k)
    aux: PyTree  # leaves (N, ...)
    leaves: tuple[Leaf, ...]
    summands: Callable[[], tuple[Leaf, ...]] | None  # makes the same for a sum of rows alone
    output_avals: PyTree  # of one example


@dataclass(frozen=True)
class _Trace:
    """The backward pass of one example as a graph; its inputs are values, then cotangents."""

    graph: _graph.Graph
    values: Sequence[jax.Array]
    leaf_count: int
    result_tree: Any  # of (outputs, aux), which the graph returns after the leaves
    output_avals: PyTree

    @property
    def leaves(self) -> list[_graph.Atom]:
        return self.graph.outputs[: self.leaf_count]

    @property
    def results(self) -> list[_graph.Atom]:
        return self.graph.outputs[self.leaf_count :]


class _NotScalar(Exception):
    """Carries the avals of an output that needs cotangents of its own."""


def factor(
    fun: Callable[..., Any],
    batch: Batch,
    *,
    has_aux: bool,
    route: _plan.Route = "auto",
    runs_again: bool = False,
) -> Factored:
    """Outputs, aux and all rows of J, each leaf in the form that its route asks for.

    `runs_again` says that each product of J calls this, so that effects must not change results.
    """
    known: dict[str, Any] = {}  # what one example's trace says, apart from arrays
    has_sums = route == "auto" and any(isinstance(x, Tracer) for x in batch.leaves)

    def example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace = _trace(fun, batch, args, kwargs, has_aux, runs_again)
        varying = trace.graph.downstream(trace.graph.inputs[len(batch.primal_positions) :])
        plan = [_plan.plan_leaf(leaf, varying, route) for leaf in trace.leaves]
        asked = [own.pieces + own.summands if has_sums else own.pieces for own in plan]
        sites = list(dict.fromkeys(piece.site for pieces in asked for piece in pieces))
        keys = list(dict.fromkeys(key for site in sites for key in _execute.keys_of(site)))
        places = dict(zip(keys, _places(trace, batch, keys), strict=True))
        known.update(trace=replace(trace, values=()), plan=plan, places=places)

        def backward(cotangents: Sequence[jax.Array]) -> Any:
            inputs = [*trace.values, *cotangents]
            values = _execute.run(trace.graph, inputs, [*keys, *trace.results])
            return _by_place(dict(zip(keys, values, strict=False)), places), values[len(keys) :]

        basis = _basis(trace.output_avals)
        if basis is None:
            return backward([])
        axes = [place.depth if place.level == 2 else None for place in _PLACES]
        return jax.vmap(backward, out_axes=(axes, None))(basis)

    axes = [place.depth if place.level else None for place in _PLACES]
    found, results = batch.vmap(example, out_axes=(axes, 0))
    trace = known["trace"]
    arrays = _by_key(found, known["places"])
    outputs, aux = jax.tree.unflatten(trace.result_tree, results)
    count = _count(trace.output_avals)

    @cache
    def term(site: _plan.Site) -> tuple[Term, tuple[int, ...]]:
        keys = _execute.keys_of(site)
        levels = [known["places"][key].level for key in keys]
        return _execute.assemble(site, [arrays[key] for key in keys], levels)

    primals, plan = jax.tree.leaves(batch.primals), known["plan"]
    leaves = tuple(
        _joined(_leaf(primal, own.pieces, term, batch.size, count))
        for primal, own in zip(primals, plan, strict=True)
    )

    def summands() -> tuple[Leaf, ...]:
        return tuple(
            leaf
            if own.summands is own.pieces
            else _leaf(primal, own.summands, term, batch.size, count)
            for leaf, primal, own in zip(leaves, primals, plan, strict=True)
        )

    return Factored(outputs, aux, leaves, summands if has_sums else None, trace.output_avals)


def _leaf(
    primal: jax.Array,
    pieces: Sequence[_plan.Piece],
    term: Callable[[_plan.Site], tuple[Term, tuple[int, ...]]],
    size: int,
    outputs: int | None,
) -> Leaf:
    found = tuple(
        Summand(
            term=term(piece.site)[0],
            shape=piece.site.shape,
            axis=_execute.rows_axis(piece.site),
            tail=piece.tail,
            factor=piece.factor,
            row_axes=term(piece.site)[1],
            reason=piece.reason,
        )
        for piece in pieces
    )
    shape = _plan.shape_of(pieces, primal.shape)
    return Leaf(found, shape, primal.dtype, size, outputs)


def _joined(leaf: Leaf) -> Leaf:
    """The same with many pieces of one form as one: a weight that is used in an unrolled loop."""
    forms: dict[Any, list[Summand]] = {}
    for i, x in enumerate(leaf.summands):
        alike = x.term.form or i
        forms.setdefault((x.shape, x.tail, x.factor, x.row_axes, alike), []).append(x)
    found: list[Summand] = []
    for group in forms.values():
        first, *others = (x.term for x in group)
        if len(group) > first.most_apart:
            found.append(replace(group[0], term=first.joined(others)))
        else:
            found += group
    return replace(leaf, summands=tuple(found))


def _trace(
    fun: Callable[..., Any],
    batch: Batch,
    args: Any,
    kwargs: Any,
    has_aux: bool,
    runs_again: bool,
) -> _Trace:
    flat, treedef = jax.tree.flatten((args, kwargs))
    primal_at = batch.primal_positions
    mapped_at = [i for i, axis in enumerate(batch.axes) if axis is not None and i not in primal_at]

    def backward(primals: Any, mapped: Any, cotangents: Any) -> Any:
        def forward(primals: Any) -> Any:
            leaves = list(flat)
            for i, x in zip((*primal_at, *mapped_at), (*primals, *mapped), strict=True):
                leaves[i] = x
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            value, aux = split_aux(fun(*args, **kwargs), has_aux, "the result of the function")
            check_arrays("the output of the function", value)
            check_arrays("aux", aux)
            return (value, aux) if has_aux else value

        if has_aux:
            outputs, vjp, aux = jax.vjp(forward, primals, has_aux=True)
        else:
            (outputs, vjp), aux = jax.vjp(forward, primals), None
        check_outputs(outputs)
        if cotangents is None:
            if _count(outputs) is not None:
                raise _NotScalar(jax.tree.map(jax.typeof, outputs))
            cotangents = jnp.ones_like(outputs)
        return vjp(placed_like(cotangents, outputs))[0], (outputs, aux)

    values = [flat[i] for i in primal_at], [flat[i] for i in mapped_at]
    make = jax.make_jaxpr(backward, return_shape=True)
    try:
        jaxpr, (leaves, results) = make(*values, None)
    except _NotScalar as error:
        (avals,) = error.args
        jaxpr, (leaves, results) = make(*values, jax.tree.map(_zeros, avals))
    graph = _graph.build(made_pure(jaxpr, runs_again=runs_again))
    inputs = [*values[0], *values[1]]
    return _Trace(graph, inputs, len(leaves), jax.tree.structure(results), results[0])


def _zeros(aval: Any) -> jax.Array:
    return jnp.zeros(aval.shape, aval.dtype)


def check_outputs(outputs: PyTree) -> None:
    leaves = jax.tree.leaves_with_path(outputs)
    if not leaves:
        raise TypeError("the function to differentiate returned no arrays")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            where = f"outputs{jax.tree_util.keystr(path)}" if path else "the output"
            mend = "take its real and imaginary parts" if jnp.iscomplexobj(leaf) else "cast it"
            raise TypeError(
                f"{where} of the function to differentiate must be real and floating-point, got "
                f"{describe(leaf)}: {mend}, or return it with has_aux"
            )


def _count(output_avals: PyTree) -> int | None:
    """K: how many numbers the function returns for one example; None for a scalar."""
    leaves, treedef = jax.tree.flatten(output_avals)
    if jax.tree_util.treedef_is_leaf(treedef) and jnp.shape(leaves[0]) == ():
        return None
    return sum(prod(jnp.shape(leaf)) for leaf in leaves)


def _basis(output_avals: PyTree) -> list[jax.Array] | None:
    """The K unit cotangents, stacked, in flat order; None where the output is a scalar."""
    count = _count(output_avals)
    if count is None:
        return None
    leaves = jax.tree.leaves(output_avals)
    ends = list(accumulate(prod(leaf.shape) for leaf in leaves))
    return [
        jnp.eye(count, dtype=leaf.dtype)[:, end - prod(leaf.shape) : end].reshape(
            count, *leaf.shape
        )
        for leaf, end in zip(leaves, ends, strict=True)
    ]


class _Place(NamedTuple):
    """Where an array leaves the maps over outputs and examples."""

    level: int  # 2: it may differ between outputs, 1: between examples only, 0: not at all
    depth: int  # its axes of scan steps, which stay in front of those of rows


_PLACES = [_Place(level, depth) for level in range(3) for depth in range(32)]


def _places(trace: _Trace, batch: Batch, keys: Sequence[_execute.Key]) -> list[_Place]:
    inputs = trace.graph.inputs
    by_output = _execute.depends(keys, trace.graph, inputs[len(trace.values) :])
    by_example = _execute.depends(keys, trace.graph, inputs[len(batch.primal_positions) :])
    return [
        _Place(2 if own else int(differs), _execute.depth(key))
        for key, own, differs in zip(keys, by_output, by_example, strict=True)
    ]


def _by_place(
    arrays: dict[_execute.Key, jax.Array], places: dict[_execute.Key, _Place]
) -> list[list[jax.Array]]:
    return [[arrays[key] for key, own in places.items() if own == place] for place in _PLACES]


def _by_key(
    arrays: list[list[jax.Array]], places: dict[_execute.Key, _Place]
) -> dict[_execute.Key, jax.Array]:
    rest = {place: iter(group) for place, group in zip(_PLACES, arrays, strict=True)}
    return {key: next(rest[place]) for key, place in places.items()}
