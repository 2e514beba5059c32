"""Run a backward pass up to its terms, and evaluate nothing that no term needs.

Keys name the arrays that are needed: an atom of the graph, or an array inside the body
of a scan, stacked or added up over the steps. A scan runs only with the carries and
steps that the keys need. So it no longer carries the gradients that factors replace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from .._jax.compat import varying_zeros
from .._jax.sharding import in_auto
from .._trees.algebra import common_dtype
from .graph import Atom, Equation, Graph, Known, Value
from .layout import Frame
from .leaf import Leaf, Summand
from .products.norms import norm
from .products.sums import weighted_sum
from .sites import AtNorm, AtRow, AtScan, AtSum, AtTerm, Site, is_dense
from .terms import Dense, Term


@dataclass(frozen=True)
class Stacked:
    """An array in the body of a scan, stacked over the steps."""

    equation: Equation
    key: "Key"


@dataclass(frozen=True)
class Total:
    """An array in the body of a scan, added up over the steps."""

    equation: Equation
    key: "Key"


@dataclass(frozen=True)
class Norm:
    """The norm of a row of the term at a site."""

    site: Site


@dataclass(frozen=True)
class Row:
    """A row of the term at a site, as an array."""

    site: Site


@dataclass(frozen=True)
class Sum:
    """The sum of the rows of the term at a site, over all examples."""

    site: AtTerm


Key: TypeAlias = Value | Known | Stacked | Total | Norm | Row | Sum


def keys_of(site: Site) -> tuple[Key, ...]:
    """The keys of the arrays from which the term at a site is assembled."""
    match site:
        case AtNorm(inner):
            return (Norm(inner),)
        case AtRow(inner):
            return (Row(inner),)
        case AtSum(inner):
            return (Sum(inner),)
        case AtScan(equation, inner, stacked):
            make = Stacked if stacked or not is_dense(inner) else Total
            return tuple(make(equation, key) for key in keys_of(inner))
    return site.operands


def _went_in(key: Key) -> Atom | None:
    """The atom that holds what a key names, if one does.

    A stack of what a scan reads step by step is an operand of the scan.
    """
    match key:
        case Stacked(equation, inner):
            value, (_, steps_from) = _went_in(inner), equation.splits
            if value in equation.body.inputs[steps_from:]:
                return equation.inputs[equation.body.inputs.index(value)]
            return None
        case Value() | Known():
            return key
    return None


def depth(key: Key) -> int:
    """How many axes of scan steps the array of a key has in front."""
    return 1 + depth(key.key) if isinstance(key, Stacked) else 0


def rows_axis(site: Site) -> int:
    """The first row axis of a term's arrays: behind the steps, or behind the blocks."""
    return depth(keys_of(site)[0]) if is_dense(site) else 1


def assemble(
    site: Site, arrays: Sequence[jax.Array], row_axes: Sequence[int]
) -> tuple[Term, tuple[int, ...]]:
    """The term at a site, from the arrays that `keys_of` names.

    Each array has its axes of scan steps first, then as many row axes as `row_axes`
    says. The factors of outer and scatter terms become (B, *rows, T, ...). The second
    result is the number of row axes of each array of the term.
    """
    stacked: tuple[bool, ...] = ()
    while isinstance(site, AtScan) and not is_dense(site):
        stacked += (site.stacked,)
        site = site.site
    if isinstance(site, AtTerm):
        frames = [Frame(stacked, count) for count in row_axes]
        return site.layout(arrays, frames), site.layout.row_axes(*row_axes)
    (value,) = arrays
    return Dense(value), tuple(row_axes)


# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """What must be evaluated in a graph for some keys."""

    atoms: set[Atom]
    scans: dict[Equation, "ScanNeeds"]


@dataclass(frozen=True)
class ScanNeeds:
    stacks: list[Key]  # arrays of the body to stack
    totals: list[Key]  # arrays of the body to add up
    carries: list[int]  # the carries that run
    steps: list[int]  # the per-step outputs that are read
    body: Needs


@dataclass(frozen=True)
class _Asked:
    """What is asked of the body of a scan: each key once, in order."""

    stacks: dict[Key, None] = field(default_factory=dict)
    totals: dict[Key, None] = field(default_factory=dict)


def needs_of(graph: Graph, keys: Iterable[Key]) -> Needs:
    """Walk back from the keys, into the bodies of the scans that they name."""
    atoms, asked = _seeds(keys)
    scans: dict[Equation, ScanNeeds] = {}
    for equation in reversed(graph.equations):
        if equation in asked:
            own = asked[equation]
            scans[equation] = needs = _scan_needs(
                equation, list(own.stacks), list(own.totals), atoms
            )
            operands = zip(equation.inputs, equation.body.inputs, strict=True)
            atoms.update(
                outer for outer, inner in operands if inner in needs.body.atoms
            )
        elif any(output in atoms for output in equation.outputs):
            atoms.update(equation.inputs)
    return Needs(atoms, scans)


def _seeds(keys: Iterable[Key]) -> tuple[set[Atom], dict[Equation, _Asked]]:
    """The atoms of a graph that keys name, and the keys inside each of its scans."""
    atoms: set[Atom] = set()
    asked: dict[Equation, _Asked] = {}
    todo = list(keys)
    while todo:
        key = todo.pop()
        atom = _went_in(key)
        if atom is not None:
            atoms.add(atom)
            continue
        match key:
            case Norm(site) | Row(site) | Sum(site):
                todo += keys_of(site)
            case Stacked(equation, inner):
                asked.setdefault(equation, _Asked()).stacks[inner] = None
            case Total(equation, inner):
                asked.setdefault(equation, _Asked()).totals[inner] = None
    return atoms, asked


def _scan_needs(
    equation: Equation, stacks: list[Key], totals: list[Key], atoms: set[Atom]
) -> ScanNeeds:
    body = equation.body
    carry_from, steps_from = equation.splits
    count = steps_from - carry_from
    read = [i for i, output in enumerate(equation.outputs) if output in atoms]
    steps = [i for i in read if i >= count]
    carries = {i for i in read if i < count}
    while True:
        outputs = [body.outputs[i] for i in [*carries, *steps]]
        needs = needs_of(body, [*stacks, *totals, *outputs])
        used = {i for i in range(count) if body.inputs[carry_from + i] in needs.atoms}
        if used <= carries:
            return ScanNeeds(stacks, totals, sorted(carries), steps, needs)
        carries |= used


def run(
    graph: Graph, inputs: Sequence[Any], keys: Sequence[Key], example: Any = None
) -> list[Any]:
    """Evaluate the arrays that some keys name, for one example.

    A key `Sum` needs `example`: any array that has an axis of examples if this is
    mapped over them.
    """
    env: dict[Key, Any] = dict(zip(graph.inputs, inputs, strict=True))
    return _run(graph, env, keys, needs_of(graph, keys), example)


def _run(
    graph: Graph, env: dict[Key, Any], keys: Sequence[Key], needs: Needs, example: Any
) -> list[Any]:
    def read(key: Key) -> Any:
        atom = _went_in(key)
        match key if atom is None else atom:
            case Known(value):
                return jnp.asarray(value)
            case Norm(site) | Row(site) | Sum(site):
                return _made(key, [read(x) for x in keys_of(site)], example)
        return env[key if atom is None else atom]

    for equation in graph.equations:
        if equation in needs.scans:
            env.update(_run_scan(equation, needs.scans[equation], env, example))
        elif any(output in needs.atoms for output in equation.outputs):
            operands = [
                a.value if isinstance(a, Known) else env[a] for a in equation.inputs
            ]
            env.update(zip(equation.outputs, equation.evaluate(operands), strict=True))
    return [read(key) for key in keys]


def _run_scan(
    equation: Equation, needs: ScanNeeds, env: dict[Key, Any], example: Any
) -> dict[Key, Any]:
    """Run a scan: the outputs that are read, and the keys inside its body.

    Only the carries and steps that are needed run. The scan also carries the totals,
    and stacks what is asked for at each step.
    """
    body, params = equation.body, equation.params
    carry_from, steps_from = equation.splits
    used = [i for i, value in enumerate(body.inputs) if value in needs.body.atoms]
    # The inputs of the scan that are needed, by kind.
    consts_at = [i for i in used if i < carry_from]
    carries_at = [carry_from + i for i in needs.carries]
    steps_at = [i for i in used if i >= steps_from]

    def read(i: int) -> Any:
        atom = equation.inputs[i]
        return jnp.asarray(atom.value) if isinstance(atom, Known) else env[atom]

    # What a step evaluates, in the order of its destinations.
    carried = [body.outputs[i] for i in needs.carries]
    per_step = [body.outputs[i] for i in needs.steps]
    asked = [*carried, *per_step, *needs.totals, *needs.stacks]
    counts = [len(carried), len(per_step), len(needs.totals)]
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    consts: dict[Key, Any] = {body.inputs[i]: read(i) for i in consts_at}

    def step(carry: Any, xs: Any) -> Any:
        state, totals = carry
        inner = dict(consts)
        inner.update(zip([body.inputs[i] for i in carries_at], state, strict=True))
        inner.update(zip([body.inputs[i] for i in steps_at], xs, strict=True))
        values = _run(body, inner, asked, needs.body, example)
        state, steps = values[: ends[0]], values[ends[0] : ends[1]]
        added, stacks = values[ends[1] : ends[2]], values[ends[2] :]
        totals = [total + x for total, x in zip(totals, added, strict=True)]
        return (state, totals), (steps, stacks)

    start, over_steps = ([read(i) for i in own] for own in (carries_at, steps_at))
    reached = [*start, *over_steps, *consts.values(), example]
    zeros = [varying_zeros(*_shape_dtype(key), *reached) for key in needs.totals]
    (state, totals), (steps, stacks) = jax.lax.scan(
        step,
        (start, zeros),
        over_steps,
        length=None if steps_at else params["length"],  # which may be symbolic
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    names: list[Key] = [equation.outputs[i] for i in (*needs.carries, *needs.steps)]
    names += [Total(equation, key) for key in needs.totals]
    names += [Stacked(equation, key) for key in needs.stacks]
    return dict(zip(names, [*state, *steps, *totals, *stacks], strict=True))


def _made(key: Any, arrays: Sequence[jax.Array], example: Any) -> jax.Array:
    """What a key says of the term at a site, from the arrays of one example."""
    if isinstance(key, Sum):
        return _sum_of_rows(key.site, arrays, example)

    def of_one(arrays: Sequence[jax.Array]) -> jax.Array:
        term, _ = assemble(key.site, arrays, [0] * len(arrays))
        return norm(term) if isinstance(key, Norm) else term.materialize()

    return in_auto(of_one, PartitionSpec())(arrays)


def _sum_of_rows(
    site: AtTerm, arrays: Sequence[jax.Array], example: jax.Array
) -> jax.Array:
    """The sum over all examples of the rows of a term, whose arrays are those of one.

    `jax.vmap` calls the rule below, which sums over the examples: their axis is one of
    `example`, even if no array of the term has it. So a scan need not stack factors.
    """

    def total(
        size: int, row_axes: Sequence[int], arrays: Sequence[jax.Array]
    ) -> jax.Array:
        term, own = assemble(site, arrays, row_axes)
        summand = Summand(term, site.shape, rows_axis(site), (), 1.0, own, "")
        leaf = Leaf((summand,), site.shape, term.dtype, size, None)
        return in_auto(weighted_sum, PartitionSpec())(leaf, None)

    @custom_vmap
    def of_one(example: jax.Array, *arrays: jax.Array) -> jax.Array:
        return total(1, [0] * len(arrays), arrays)

    @of_one.def_vmap
    def of_all(
        size: int, batched: Sequence[bool], example: jax.Array, *arrays: jax.Array
    ) -> tuple[jax.Array, bool]:
        return total(size, list(map(int, batched[1:])), arrays), False

    return of_one(example, *arrays)


def _dtype_of(site: AtTerm) -> Any:
    """The accumulation dtype of the term at a site."""

    def row(arrays: Sequence[jax.Array]) -> jax.Array:
        return assemble(site, arrays, [0] * len(arrays))[0].materialize()

    arrays = [jax.ShapeDtypeStruct(*_shape_dtype(key)) for key in keys_of(site)]
    return jax.eval_shape(row, arrays).dtype


def _shape_dtype(key: Key) -> tuple[tuple[int, ...], Any]:
    match key:
        case Stacked(equation, inner):
            shape, dtype = _shape_dtype(inner)
            return (equation.params["length"], *shape), dtype
        case Total(_, inner):
            return _shape_dtype(inner)
        case Row(site):
            kinds = [_shape_dtype(own)[1] for own in keys_of(site)]
            return site.shape, common_dtype(*kinds)
        case Sum(site):
            return site.shape, _dtype_of(site)
        case Norm():
            raise AssertionError("norms of the steps of a scan are not added up")
    return tuple(key.aval.shape), key.aval.dtype


# --------------------------------------------------------------------------------------


def depends(keys: Sequence[Key], graph: Graph, seeds: Iterable[Atom]) -> list[bool]:
    """For each key, whether its array may depend on one of the seeds."""
    return depends_on(keys, graph.downstream(seeds))


def depends_on(keys: Sequence[Key], reached: set[Atom]) -> list[bool]:
    """For each key, whether its array may depend on atoms that were reached."""
    return [_depends(key, reached) for key in keys]


def _depends(key: Key, reached: set[Atom]) -> bool:
    match key:
        case Stacked(equation, inner) | Total(equation, inner):
            return _depends(inner, equation.reached_inside(reached))
        case Sum():
            return False  # all examples share it
        case Norm(site) | Row(site):
            return any(_depends(own, reached) for own in keys_of(site))
    return key in reached
