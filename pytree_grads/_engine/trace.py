"""From a function and a batch to the outputs and the leaves of J: trace, cut, map."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import accumulate
from math import prod
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._batches.batch import Batch
from .._batches.functions import Fun
from .._jax.effects import made_pure
from .._jax.sharding import placed_like
from .._trees.checks import check_arrays, describe
from . import evaluate as _evaluate
from . import graph as _graph
from . import keys as _keys
from . import plan as _plan
from . import thresholds
from .leaf import Leaf, Summand
from .sites import AtScan, AtSum, AtTerm, AtValue, Site, innermost, is_dense, size
from .tails.part import Found
from .tails.search import search
from .tails.tail import Program, Tail
from .terms import Term

PyTree = Any
# A route, or "sum": leaves in the cheapest form for a single sum of unscaled rows.
Form: TypeAlias = _plan.Route | Literal["sum"]


# --------------------------------------------------------------------------------------
# Trace: the backward pass of one example as a graph


@jax.tree_util.register_static
@dataclass(frozen=True, eq=False)
class Trace:
    """The forward and backward pass of one example, as a graph.

    Its inputs are the leaves of the differentiated arguments, then the other values of
    the example, then the cotangents of the outputs. A scalar output has the cotangent
    1, which is not an input. Its outputs are the gradient's leaves, then the leaves of
    `(outputs, aux)`.

    It is a pytree without leaves, so that a mapped function can return it.
    """

    fun: Fun
    graph: _graph.Graph
    primal_count: int  # leaves of the differentiated arguments
    value_count: int  # these, and the other values of the example
    leaf_count: int  # leaves of the gradient
    result_tree: Any  # the structure of (outputs, aux)
    output_avals: PyTree  # of one example

    @property
    def leaves(self) -> list[_graph.Atom]:
        """The leaves of the gradient."""
        return self.graph.outputs[: self.leaf_count]

    @property
    def results(self) -> list[_graph.Atom]:
        """The outputs and aux."""
        return self.graph.outputs[self.leaf_count :]

    @property
    def of_one_example(self) -> list[_graph.Atom]:
        """The inputs that may differ between the rows of J."""
        return [*self.graph.inputs[self.primal_count :]]

    @property
    def cotangents(self) -> list[_graph.Atom]:
        """The inputs that may differ between the outputs of one example."""
        return [*self.graph.inputs[self.value_count :]]


def trace(fun: Fun, batch: Batch, *, runs_again: bool) -> Trace:
    """Trace the function of one example, called once, and its backward pass.

    `runs_again` means that each product will evaluate the trace again, so that effects
    must not change results.
    """

    def example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Trace:
        return _trace_example(fun, batch, args, kwargs, runs_again)

    return batch.vmap(example)  # nothing is evaluated: the trace has no arrays


def _trace_example(
    fun: Fun, batch: Batch, args: Any, kwargs: Any, runs_again: bool
) -> Trace:
    flat, treedef = jax.tree.flatten((args, kwargs))
    primal_at, value_at = batch.primal_positions, batch.value_positions

    def backward(primals: Any, values: Any) -> Any:
        def forward(primals: Any) -> Any:
            leaves = list(flat)
            for i, x in zip((*primal_at, *value_at), (*primals, *values), strict=True):
                leaves[i] = x
            args, kwargs = jax.tree.unflatten(treedef, leaves)
            value, aux = fun(*args, **kwargs)
            check_arrays("the output of the function", value)
            check_arrays("aux", aux)
            return value, aux

        outputs, vjp, aux = jax.vjp(forward, primals, has_aux=True)
        check_outputs(outputs)
        if _count(outputs) is None:
            cotangents, inputs = placed_like(jnp.ones_like(outputs), outputs), []
        else:
            cotangents = _placeholders(outputs)
            inputs = jax.tree.leaves(cotangents)
        return vjp(cotangents)[0], (outputs, aux), inputs

    primals, values = [flat[i] for i in primal_at], [flat[i] for i in value_at]
    make = jax.make_jaxpr(backward, return_shape=True)
    jaxpr, (leaves, results, cotangents) = make(primals, values)
    graph = _graph.build(made_pure(jaxpr, runs_again=runs_again))
    return Trace(
        fun=fun,
        graph=_with_inputs(graph, len(cotangents)),
        primal_count=len(primals),
        value_count=len(primals) + len(values),
        leaf_count=len(leaves),
        result_tree=jax.tree.structure(results),
        output_avals=results[0],
    )


def _placeholders(outputs: PyTree) -> PyTree:
    """Arrays like the outputs, which stand for their cotangents during the trace.

    The number of outputs is known only inside the trace, too late to add arguments to
    it. So one equation makes all placeholders. `_with_inputs` later removes that
    equation, and makes them inputs of the graph.
    """
    return jax.lax.optimization_barrier(outputs)


def _with_inputs(graph: _graph.Graph, count: int) -> _graph.Graph:
    """The graph in which the last `count` outputs, of one equation, become inputs."""
    if not count:
        return graph
    kept, made = graph.outputs[:-count], graph.outputs[-count:]
    inputs = [x for x in made if isinstance(x, _graph.Value)]
    source = inputs[0].producer
    for x in inputs:
        x.producer = None
    equations = [x for x in graph.equations if x is not source]
    return _graph.Graph([*graph.inputs, *inputs], equations, kept)


def check_outputs(outputs: PyTree) -> None:
    leaves = jax.tree.leaves_with_path(outputs)
    if not leaves:
        raise TypeError("the function to differentiate returned no arrays")
    for path, leaf in leaves:
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
            where = f"outputs{jax.tree_util.keystr(path)}" if path else "the output"
            mend = (
                "take its real and imaginary parts, or return it with has_aux"
                if jnp.iscomplexobj(leaf)
                else "return it with has_aux, or cast it"
            )
            raise TypeError(
                f"{where} of the function to differentiate must be real and "
                f"floating-point, got {describe(leaf)}: {mend}"
            )


def _count(output_avals: PyTree) -> int | None:
    """K: how many numbers the function returns for one example; None for a scalar."""
    leaves, treedef = jax.tree.flatten(output_avals)
    if jax.tree_util.treedef_is_leaf(treedef) and jnp.shape(leaves[0]) == ():
        return None
    return sum(prod(jnp.shape(leaf)) for leaf in leaves)


def _basis(output_avals: PyTree) -> list[jax.Array] | None:
    """The K unit cotangents, stacked, in flat order; None if the output is a scalar."""
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


# --------------------------------------------------------------------------------------
# Factor: run the cut graph for all examples


class Factors(NamedTuple):
    """The rows of J before their tail, if some leaves have one.

    The sources are the leaves without a tail, and then the values where it begins.
    """

    sources: tuple[Leaf, ...]
    tail: Tail | None = None


@dataclass(frozen=True)
class SumForm:
    """The leaves in the cheapest form for a single sum of unscaled rows.

    A row may be smaller than its factors: the kernel of a convolution, say. Norms take
    rows then, and so does a sum that is computed many times. One sum of unscaled rows
    takes the factors, as an ordinary backward pass does, and needs no rows.

    The leaves are put together when they are asked for. XLA drops what nothing asks
    for.
    """

    make: Callable[[], Factors]
    pulls_back: bool  # whether one vector-Jacobian product costs less, if it is allowed


@dataclass(frozen=True)
class SumForms:
    """The forms for a sum: with a weight for each row, and without weights."""

    weighted: SumForm
    plain: SumForm


@dataclass(frozen=True)
class Factored:
    """What one forward and one backward pass over a batch give."""

    outputs: PyTree  # leaves (N, *k)
    aux: PyTree  # leaves (N, ...)
    rows: Factors
    sums: SumForms | None = None


def factor(
    trace: Trace, batch: Batch, form: Form = "auto", *, with_sums: bool = False
) -> Factored:
    """The outputs, aux and all rows of J, with each leaf in the form asked for.

    `with_sums` also asks for the forms for sums. It acts only inside a trace, since XLA
    then drops the forms that nothing uses.
    """
    varying = trace.graph.downstream(trace.of_one_example)
    route = "auto" if form == "sum" else form
    count = _count(trace.output_avals)
    of_outputs = _outputs(trace, count)
    plans = [_plan.plan_leaf(x, varying, route, of_outputs) for x in trace.leaves]

    make = partial(_form, trace, varying, plans, route)
    own = weighted = plain = make(_for_sums if form == "sum" else _for_rows)
    with_sums = with_sums and any(isinstance(x, Tracer) for x in batch.leaves)
    if with_sums:
        weighted = plain = own.unless_like(make(_for_sums))
    if with_sums and count is None and trace.graph.has_scans:
        in_scans = partial(
            _plan.LeafPlan.for_plain_sums, count=batch.size, varying=varying
        )
        plain = weighted.unless_like(make(in_scans))
    asked = list({id(x): x for x in (own, weighted, plain)}.values())

    cuts = [cut for form in asked for cuts in form.cuts for cut in cuts]
    sites = list(dict.fromkeys(cut.site for cut in cuts))
    shared = [key for form in asked for key in form.shared]
    places = _places(trace, sites, shared)
    arrays, results = _run(trace, batch, places)
    outputs, aux = jax.tree.unflatten(trace.result_tree, results)

    @cache
    def term(site: _plan.Site) -> tuple[Term, tuple[int, ...]]:
        keys = _keys.keys_of(site)
        row_axes = [places[key].row_axes for key in keys]
        return _evaluate.assemble(site, [arrays[key] for key in keys], row_axes)

    @cache
    def leaf(shape: Any, dtype: Any, cuts: _plan.Cuts, joins: bool) -> Leaf:
        made = _leaf(shape, dtype, cuts, term, batch.size, count)
        return _joined(made) if joins else made

    def rows(form: _Form) -> Factors:
        leaves = [
            leaf(x.shape, x.dtype, cuts, joins)
            for x, cuts, joins in zip(form.avals, form.cuts, form.joins, strict=True)
        ]
        if form.found is None:
            return Factors(tuple(leaves))
        values = [arrays[key] for key in form.shared]
        taken = [*form.avals[form.plain :], *values]
        avals = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in taken]
        program = Program.of(form.found, avals)
        return Factors(tuple(leaves), Tail(program, tuple(values)))

    if not with_sums:
        return Factored(outputs, aux, rows(own))
    dense = _are_matrices(weighted, varying)
    sums = SumForms(
        SumForm(partial(rows, weighted), dense or _stacks_anew(weighted)),
        SumForm(partial(rows, plain), dense),
    )
    return Factored(outputs, aux, rows(own), sums)


def _outputs(trace: Trace, count: int | None) -> _plan.Outputs | None:
    """What the plan has to know of the outputs of an example, if there are several."""
    if count is None:
        return None

    def differ(site: _plan.Site) -> list[bool]:
        return _keys.depends_on(_keys.keys_of(site), reached)

    reached = trace.graph.downstream(trace.cotangents)
    return _plan.Outputs(count, differ)


def _stacks_anew(form: "_Form") -> bool:
    """Whether a scan with rematerialisation stacks factors.

    An ordinary backward pass need not keep them, so a sum with weights costs less as
    one vector-Jacobian product of the batch.
    """
    sites = [cut.site for terms in form.terms for cut in terms]
    return any(_rematerializes(site) for site in sites if not is_dense(site))


def _are_matrices(form: "_Form", varying: set[_graph.Atom]) -> bool:
    """Whether most of what is kept are matrices that each example materialises.

    A matrix counts, too, if a scan adds it up behind arrays that all examples share, as
    the covariances of a filter: the scan would multiply by these arrays once for each
    example. Any sum costs less as one vector-Jacobian product then.
    """
    dense = kept = 0
    for terms, cuts in zip(form.terms, form.cuts, strict=True):
        is_row = all(_is_matrix(cut.site) for cut in cuts)
        for site in [cut.site for cut in terms]:
            if isinstance(site, AtValue) and site.value not in varying:
                continue  # all examples share it
            if _is_matrix(site) or (is_row and _has_shared_factor(site, varying)):
                dense += size(site)
            else:
                kept += size(site)
    return thresholds.exceeds(dense, kept)


def _is_matrix(site: Site) -> bool:
    """Whether a site makes a matrix for each example, or an array of more axes."""
    return is_dense(site) and len([n for n in site.shape if n != 1]) > 1


def _has_shared_factor(site: Site, varying: set[_graph.Atom]) -> bool:
    """Whether a term is made in a scan from a factor that all examples share."""
    if not isinstance(site, AtScan):
        return False
    while isinstance(site, AtScan):
        varying = site.equation.reached_inside(varying)
        site = site.site
    return isinstance(site, AtTerm) and not varying.issuperset(site.operands)


def _rematerializes(site: Site) -> bool:
    """Whether a site is in a scan with rematerialisation."""
    while isinstance(site, AtScan):
        if site.equation.rematerializes:
            return True
        site = site.site
    return False


def _for_rows(plan: _plan.LeafPlan) -> _plan.Cuts:
    return plan.for_rows


def _for_sums(plan: _plan.LeafPlan) -> _plan.Cuts:
    return plan.for_sums


def _terms(plan: _plan.LeafPlan) -> _plan.Cuts:
    return plan.terms or plan.for_sums


@dataclass(frozen=True)
class _Form:
    """What is kept of all leaves: the cuts of plain leaves, and those of a tail."""

    avals: list[Any]  # of plain leaves, then of the sources of the tail
    terms: list[_plan.Cuts]  # before sizes were compared
    cuts: list[_plan.Cuts]
    joins: list[bool]  # whether summands of one form become one
    plain: int  # how many leaves have no tail
    found: Found | None

    @property
    def shared(self) -> list[_keys.Key]:
        """The coefficients of the tail."""
        return [] if self.found is None else self.found.shared

    def unless_like(self, other: "_Form") -> "_Form":
        """The other form, or this one if both have the same rows."""
        return self if self._is_like(other) else other

    def _is_like(self, other: "_Form") -> bool:
        if self.found is None and other.found is None:
            return all(x is y for x, y in zip(self.cuts, other.cuts, strict=True))
        if self.found is None or other.found is None:
            return False
        same = self.found.leaves == other.found.leaves and self.cuts == other.cuts
        return same and self.shared == other.shared


def _form(
    trace: Trace,
    varying: set[_graph.Atom],
    plans: Sequence[_plan.LeafPlan],
    route: _plan.Route,
    choice: Callable[[_plan.LeafPlan], _plan.Cuts],
) -> _Form:
    """The cuts of all leaves in one form."""
    found = None
    if route != "rows":
        found = search(
            trace.graph,
            trace.leaves,
            trace.results,
            varying,
            plans,
            # What a scan sums over the examples stands for the terms that it sums.
            choice if choice in (_for_rows, _for_sums) else _terms,
        )
    tailed = set() if found is None else set(found.leaves)
    plain = [i for i in range(len(plans)) if i not in tailed]
    sources = [] if found is None else found.sources
    own = [plans[i] for i in plain] + [x.plan for x in sources]
    avals = [trace.leaves[i].aval for i in plain] + list(sources)
    return _Form(
        avals=avals,
        terms=list(map(_terms, own)),
        cuts=[choice(x) for x in own],
        joins=[choice is _for_rows or choice(x) is x.for_rows for x in own],
        plain=len(plain),
        found=found,
    )


class _Place(NamedTuple):
    """The axes that an array has in front of its own."""

    # 2 if it may differ between outputs, 1 if only between examples, 0 if all rows
    # share it.
    row_axes: int
    depth: int  # how many axes of scan steps it has, in front of the row axes


def _places(
    trace: Trace, sites: Sequence[_plan.Site], others: Sequence[_keys.Key]
) -> dict[_keys.Key, _Place]:
    """The arrays from which the terms at some sites are assembled, with their axes.

    `others` are the keys of more arrays.
    """
    keys = [key for site in sites for key in _keys.keys_of(site)]
    keys = list(dict.fromkeys([*keys, *others]))
    by_output = _keys.depends(keys, trace.graph, trace.cotangents)
    by_example = _keys.depends(keys, trace.graph, trace.of_one_example)
    return {
        key: _Place(2 if own else int(differs), _keys.depth(key))
        for key, own, differs in zip(keys, by_output, by_example, strict=True)
    }


def _run(
    trace: Trace, batch: Batch, places: dict[_keys.Key, _Place]
) -> tuple[dict[_keys.Key, jax.Array], list[jax.Array]]:
    """The arrays that the keys name, and the outputs and aux, for all examples.

    An array has its axes of steps first, then of examples, then of outputs.
    """
    keys, basis = list(places), _basis(trace.output_avals)
    outputs = jax.tree.leaves(trace.output_avals)
    values_at = (*batch.primal_positions, *batch.value_positions)

    def example(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        flat = jax.tree.leaves((args, kwargs))
        values = [flat[i] for i in values_at]
        # The last value is mapped over the examples, if any is: those come last.
        an_example = flat[values_at[-1]]

        def backward(cotangents: Sequence[jax.Array]) -> Any:
            # Laid out, and varying over mesh axes, as the outputs are.
            inputs = [*values, *placed_like(cotangents, outputs if cotangents else [])]
            found = _evaluate.run(
                trace.graph, inputs, [*keys, *trace.results], an_example
            )
            return found[: len(keys)], found[len(keys) :]

        if basis is None:
            return backward([])
        axes = [x.depth if x.row_axes == 2 else None for x in places.values()]
        return jax.vmap(backward, out_axes=(axes, None))(basis)

    axes = [x.depth if x.row_axes else None for x in places.values()]
    arrays, results = batch.vmap(example, out_axes=(axes, 0))
    return dict(zip(keys, arrays, strict=True)), results


def _leaf(
    leaf_shape: tuple[int, ...],
    dtype: Any,
    cuts: Sequence[_plan.Cut],
    term: Callable[[_plan.Site], tuple[Term, tuple[int, ...]]],
    size: int,
    outputs: int | None,
) -> Leaf:
    """The rows of one leaf, from the terms at its cuts."""
    summands = tuple(
        Summand(
            term=term(cut.site)[0],
            shape=cut.site.shape,
            axis=_keys.rows_axis(cut.site),
            view=cut.view,
            factor=cut.factor,
            row_axes=term(cut.site)[1],
            reason=cut.reason,
            is_total=isinstance(innermost(cut.site), AtSum),
        )
        for cut in cuts
    )
    shape = _plan.shape_of(cuts, leaf_shape)
    return Leaf(summands, shape, dtype, size, outputs)


def _joined(leaf: Leaf) -> Leaf:
    """Join summands of one form into one summand, if there are many of them.

    A weight that is used in an unrolled loop has such summands.
    """
    forms: dict[Any, list[Summand]] = {}
    for i, x in enumerate(leaf.summands):
        alike = x.term.form or i
        forms.setdefault((x.shape, x.view, x.factor, x.row_axes, alike), []).append(x)
    found: list[Summand] = []
    for group in forms.values():
        first, *others = (x.term for x in group)
        if len(group) > first.most_apart:
            found.append(replace(group[0], term=first.joined(others)))
        else:
            found += group
    return replace(leaf, summands=tuple(found))
