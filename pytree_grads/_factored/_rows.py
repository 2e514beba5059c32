"""From a function and a batch to its outputs and the leaves of J: trace one example, cut, map."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._batch import Batch
from .._checks import describe
from . import _execute, _graph, _plan
from ._leaves import Leaf, Piece

PyTree = Any


@dataclass(frozen=True)
class Factored:
    """What one forward and one backward pass over a batch give."""

    outputs: PyTree  # leaves (N, *k)
    aux: PyTree  # leaves (N, ...)
    leaves: tuple[Leaf, ...]
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
    fun: Callable[..., Any], batch: Batch, *, has_aux: bool, route: _plan.Route = "auto"
) -> Factored:
    """Outputs, aux and all rows of J, each leaf in the form that its route asks for."""
    known: dict[str, Any] = {}  # what one example's trace says, apart from arrays

    def example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        trace = _trace(fun, batch, args, kwargs, has_aux)
        varying = trace.graph.downstream(trace.graph.inputs[len(batch.primal_positions) :])
        plan = [_plan.plan_leaf(leaf, varying, route) for leaf in trace.leaves]
        sites = list(dict.fromkeys(piece.site for pieces in plan for piece in pieces))
        levels = _levels(trace, batch, sites)
        known.update(trace=trace, plan=plan, sites=sites, levels=levels)

        def backward(cotangents: Sequence[jax.Array]) -> Any:
            inputs = [*trace.values, *cotangents]
            keys = list(dict.fromkeys(key for site in sites for key in _execute.keys_of(site)))
            values = _execute.run(trace.graph, inputs, [*keys, *trace.results])
            found, results = dict(zip(keys, values, strict=False)), values[len(keys) :]
            terms = [
                _execute.assemble(site, [found[key] for key in _execute.keys_of(site)])
                for site in sites
            ]
            flat, known["terms"] = jax.tree.flatten(terms)
            return [[x for x, n in zip(flat, levels, strict=True) if n == i] for i in range(3)] + [
                results
            ]

        basis = _basis(trace.output_avals)
        if basis is None:
            none, shared, own, results = backward([])
        else:
            none, shared, own, results = jax.vmap(backward, out_axes=[None, None, 0, None])(basis)
        return [none, [shared, own, results]]

    none, (shared, own, results) = batch.vmap(example, out_axes=[None, 0])
    trace, levels = known["trace"], known["levels"]
    sources = [iter(none), iter(shared), iter(own)]
    terms = jax.tree.unflatten(known["terms"], [next(sources[level]) for level in levels])
    placed = dict(zip(known["sites"], zip(terms, _split(levels, terms), strict=True), strict=True))
    primals = jax.tree.leaves(batch.primals)
    outputs, aux = jax.tree.unflatten(trace.result_tree, results)
    leaves = tuple(
        _leaf(primal, pieces, placed, batch.size, _count(trace.output_avals))
        for primal, pieces in zip(primals, known["plan"], strict=True)
    )
    return Factored(outputs, aux, leaves, trace.output_avals)


def _leaf(
    primal: jax.Array,
    pieces: Sequence[_plan.Piece],
    placed: dict[_plan.Site, tuple[Any, tuple[int, ...]]],
    size: int,
    outputs: int | None,
) -> Leaf:
    found = tuple(
        Piece(
            term=placed[piece.site][0],
            shape=piece.site.shape,
            tail=piece.tail,
            factor=piece.factor,
            levels=placed[piece.site][1],
            origin=_plan.origin(piece.site),
        )
        for piece in pieces
    )
    return Leaf(found, _plan.shape_of(pieces, primal.shape), primal.dtype, size, outputs)


def _trace(fun: Callable[..., Any], batch: Batch, args: Any, kwargs: Any, has_aux: bool) -> _Trace:
    flat, treedef = jax.tree.flatten((args, kwargs))
    primal_at = batch.primal_positions
    mapped_at = [i for i, axis in enumerate(batch.axes) if axis is not None and i not in primal_at]

    def backward(primals: Any, mapped: Any, cotangents: Any) -> Any:
        def forward(primals: Any) -> Any:
            leaves = list(flat)
            for i, x in zip((*primal_at, *mapped_at), (*primals, *mapped), strict=True):
                leaves[i] = x
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            return fun(*args, **kwargs)

        if has_aux:
            outputs, vjp, aux = jax.vjp(forward, primals, has_aux=True)
        else:
            (outputs, vjp), aux = jax.vjp(forward, primals), None
        check_outputs(outputs)
        if cotangents is None:
            if not isinstance(outputs, jax.Array) or outputs.shape != ():
                raise _NotScalar(jax.tree.map(jax.typeof, outputs))
            cotangents = jnp.ones_like(outputs)
        return vjp(cotangents)[0], (outputs, aux)

    values = [flat[i] for i in primal_at], [flat[i] for i in mapped_at]
    make = jax.make_jaxpr(backward, return_shape=True)
    try:
        jaxpr, (leaves, results) = make(*values, None)
    except _NotScalar as error:
        (avals,) = error.args
        jaxpr, (leaves, results) = make(*values, jax.tree.map(_zeros, avals))
    graph = _graph.build(jaxpr)
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
            raise TypeError(
                f"{where} of the function to differentiate must be real and floating-point, got "
                f"{describe(leaf)}: take its real and imaginary parts, or return it with has_aux"
            )


def _count(output_avals: PyTree) -> int | None:
    """K: how many numbers the function returns for one example; None for a scalar."""
    leaves, treedef = jax.tree.flatten(output_avals)
    if jax.tree_util.treedef_is_leaf(treedef) and leaves[0].shape == ():
        return None
    return sum(prod(leaf.shape) for leaf in leaves)


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


def _levels(trace: _Trace, batch: Batch, sites: Sequence[_plan.Site]) -> list[int]:
    """For each array of the terms: 2 if it may differ between outputs, 1 between examples, or 0."""
    inputs = trace.graph.inputs
    primal_count = len(batch.primal_positions)
    cotangents = inputs[len(trace.values) :]
    by_output = _execute.depends(sites, trace.graph, cotangents)
    by_example = _execute.depends(sites, trace.graph, inputs[primal_count:])
    return [
        2 if own else int(differs)
        for site in zip(by_output, by_example, strict=True)
        for own, differs in zip(*site, strict=True)
    ]


def _split(levels: Sequence[int], terms: Sequence[Any]) -> list[tuple[int, ...]]:
    """The levels of each term's arrays."""
    rest = iter(levels)
    return [tuple(next(rest) for _ in jax.tree.leaves(term)) for term in terms]
