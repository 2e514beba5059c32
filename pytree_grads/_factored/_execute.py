"""Running a backward pass up to its terms: the cut graph, with nothing evaluated that is not asked.

A scan runs with only the carries and steps that the rest needs. What a term inside it needs leaves
the loop stacked; the accumulators that it replaces are gone.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from ._graph import Atom, Equation, Graph, Known, Value
from ._plan import AtDot, AtNorm, AtScan, AtScatter, AtValue, Site, is_dense, scans_of
from ._terms import Dense, Outer, Scatter, Term, norm


@dataclass(frozen=True)
class _Needs:
    """What a graph must evaluate for some sites and values."""

    values: set[Atom]
    scans: dict[Equation, "_ScanNeeds"]


@dataclass(frozen=True)
class _ScanNeeds:
    sites: list[Site]  # in the body
    stacked: list[bool]  # one per site
    carries: list[int]  # carries that run
    steps: list[int]  # per-step outputs that are read
    body: _Needs


def _needs(graph: Graph, sites: Sequence[Site], values: Iterable[Atom]) -> _Needs:
    in_scans = scans_of(sites)
    needed = {*values, *(x for s in sites if not isinstance(s, AtScan) for x in s.operands)}
    scans: dict[Equation, _ScanNeeds] = {}
    for equation in reversed(graph.equations):
        if equation in in_scans:
            scans[equation] = needs = _scan_needs(equation, in_scans[equation], needed)
            body_inputs = zip(equation.inputs, equation.body.inputs, strict=True)
            needed.update(outer for outer, inner in body_inputs if inner in needs.body.values)
        elif any(output in needed for output in equation.outputs):
            needed.update(equation.inputs)
    return _Needs(needed, scans)


def _scan_needs(equation: Equation, sites: Sequence[AtScan], needed: set[Atom]) -> _ScanNeeds:
    body = equation.body
    carry_from, steps_from = equation.splits
    count = steps_from - carry_from
    read = [i for i, output in enumerate(equation.outputs) if output in needed]
    carries = {i for i in read if i < count}
    steps = [i for i in read if i >= count]
    inner = [site.site for site in sites]
    while True:
        needs = _needs(body, inner, [body.outputs[i] for i in [*carries, *steps]])
        used = {i for i in range(count) if body.inputs[carry_from + i] in needs.values}
        if used <= carries:
            break
        carries |= used
    stacked = [site.stacked for site in sites]
    return _ScanNeeds(inner, stacked, sorted(carries), steps, needs)


def run(
    graph: Graph, inputs: Sequence[Any], sites: Sequence[Site], values: Sequence[Atom]
) -> tuple[list[Term], list[Any]]:
    """The terms at some sites of a graph, and the values of some of its atoms."""
    given = dict(zip(graph.inputs, inputs, strict=True))
    return _run(graph, given, sites, values, _needs(graph, sites, values))


def _run(
    graph: Graph,
    env: dict[Value, Any],
    sites: Sequence[Site],
    values: Sequence[Atom],
    needs: _Needs,
) -> tuple[list[Term], list[Any]]:
    terms: dict[Site, Term] = {}
    in_scans = scans_of(sites)

    def read(atom: Atom) -> Any:
        return jnp.asarray(atom.value) if isinstance(atom, Known) else env[atom]

    for equation in graph.equations:
        if equation in needs.scans:
            found, outputs = _run_scan(equation, needs.scans[equation], read)
            terms.update(zip(in_scans[equation], found, strict=True))
            env.update(outputs)
        elif any(output in needs.values for output in equation.outputs):
            operands = [a.value if isinstance(a, Known) else env[a] for a in equation.inputs]
            env.update(zip(equation.outputs, equation.evaluate(operands), strict=True))

    def term(site: Site) -> Term:
        match site:
            case AtValue(value):
                return Dense(read(value))
            case AtDot(_, layout) | AtScatter(_, layout):
                return layout(*map(read, site.operands))
            case AtNorm(inner):
                return Dense(norm(term(inner)))
        return terms[site]

    return [term(site) for site in sites], [read(atom) for atom in values]


def _run_scan(
    equation: Equation, needs: _ScanNeeds, read: Callable[[Atom], Any]
) -> tuple[list[Term], dict[Value, Any]]:
    """The terms that a scan's body makes, and those of the scan's own outputs that are read."""
    body, params = equation.body, equation.params
    carry_from, steps_from = equation.splits
    used = [i for i, value in enumerate(body.inputs) if value in needs.body.values]
    consts = {body.inputs[i]: read(equation.inputs[i]) for i in used if i < carry_from}
    xs_at = [i for i in used if i >= steps_from]
    carries_at = [carry_from + i for i in needs.carries]
    kinds = zip(needs.sites, needs.stacked, strict=True)
    sums = [is_dense(site) and not stacked for site, stacked in kinds]
    wanted = [body.outputs[i] for i in [*needs.carries, *needs.steps]]

    def step(carry: Any, xs: Any) -> Any:
        state, totals = carry
        inner = dict(consts)
        inner.update(zip([body.inputs[i] for i in carries_at], state, strict=True))
        inner.update(zip([body.inputs[i] for i in xs_at], xs, strict=True))
        terms, values = _run(body, inner, needs.sites, wanted, needs.body)
        state, steps = values[: len(state)], values[len(state) :]
        summands = [term for term, is_sum in zip(terms, sums, strict=True) if is_sum]
        stacks = [term for term, is_sum in zip(terms, sums, strict=True) if not is_sum]
        return (state, jax.tree.map(jnp.add, totals, summands)), (steps, stacks)

    zeros = [
        Dense(jnp.zeros(site.shape, _dtype(site)))
        for site, is_sum in zip(needs.sites, sums, strict=True)
        if is_sum
    ]
    init = [read(equation.inputs[i]) for i in carries_at], zeros
    xs = [read(equation.inputs[i]) for i in xs_at]
    (state, totals), (steps, stacks) = jax.lax.scan(
        step, init, xs, length=params["length"], reverse=params["reverse"], unroll=params["unroll"]
    )
    terms: list[Term] = []
    rest, whole = iter(stacks), iter(totals)
    for stacked, is_sum in zip(needs.stacked, sums, strict=True):
        terms.append(next(whole) if is_sum else _joined(next(rest), stacked))
    outputs = dict(zip([equation.outputs[i] for i in needs.carries], state, strict=True))
    outputs.update(zip([equation.outputs[i] for i in needs.steps], steps, strict=True))
    return terms, outputs


def _dtype(site: Site) -> Any:
    return _dtype(site.site) if isinstance(site, AtScan) else site.operands[0].aval.dtype


def _joined(term: Term, stacked: bool) -> Term:
    """A term with a leading axis of steps: the steps become blocks, or more pairs of each block."""
    if isinstance(term, Dense):
        return term

    def join(x: jax.Array) -> jax.Array:  # (L, B, T, ...)
        if stacked:
            return x.reshape(-1, *x.shape[2:])
        x = jnp.swapaxes(x, 0, 1)
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    match term:
        case Outer(left, right):
            return Outer(join(left), join(right))
        case Scatter(index, right, length):
            return Scatter(join(index), join(right), length)


def depends(sites: Sequence[Site], graph: Graph, seeds: Iterable[Atom]) -> list[tuple[bool, ...]]:
    """For each site, which arrays of its term may depend on one of the seeds."""
    reached = graph.downstream(seeds)
    return [_depends(site, reached) for site in sites]


def _depends(site: Site, reached: set[Atom]) -> tuple[bool, ...]:
    match site:
        case AtScan(equation, inner, _):
            return _depends(inner, _reached_in_body(equation, reached))
        case AtNorm(inner):
            return (any(_depends(inner, reached)),)
        case AtDot(equation, layout):
            sides = tuple(atom in reached for atom in equation.inputs)
            return sides[::-1] if layout.swapped else sides
    return tuple(atom in reached for atom in site.operands)


def _reached_in_body(equation: Equation, reached: set[Atom]) -> set[Atom]:
    body = equation.body
    carry_from, steps_from = equation.splits
    pairs = zip(equation.inputs, body.inputs, strict=True)
    seeds: set[Atom] = {inner for outer, inner in pairs if outer in reached}
    while True:
        inside = body.downstream(seeds)
        carried = zip(body.inputs[carry_from:steps_from], body.outputs, strict=False)
        fresh = {i for i, o in carried if o in inside} - seeds
        if not fresh:
            return inside
        seeds |= fresh
