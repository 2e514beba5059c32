"""Run a backward pass up to its terms, and evaluate nothing that no term needs.

Keys name the arrays that are needed: an atom of the graph, or an array inside the body
of a scan, stacked or added up over the steps. A scan runs only with the carries and
steps that the keys need. So it no longer carries the gradients that factors replace.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec

from .._jax.compat import varying_zeros
from .._jax.sharding import in_auto
from .._trees.algebra import common_dtype
from . import lookups as _lookups
from .graph import Atom, Equation, Graph, Known, Value
from .keys import (
    Key,
    Looked,
    Norm,
    Places,
    Rest,
    Row,
    Stacked,
    Sum,
    Total,
    atom_of,
    keys_of,
    rows_axis,
)
from .layout import Frame
from .leaf import Leaf, Summand
from .products.norms import norm
from .products.sums import weighted_sum
from .sites import AtScan, AtTerm, Lookups, Site, is_dense
from .terms import Dense, Term


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
        atom = atom_of(key)
        if atom is not None:
            atoms.add(atom)
            continue
        match key:
            case Places(lookups):
                todo += _outside(lookups)
            case Stacked(equation, inner) | Total(equation, inner):
                own = asked.setdefault(equation, _Asked())
                into = own.stacks if isinstance(key, Stacked) else own.totals
                into[inner] = None
                looked_up = _looks_up(inner)
                todo += [] if looked_up is None else _outside(looked_up)
            case Value() | Known():
                raise AssertionError("atoms were taken above")
            case _:
                todo += keys_of(key.site)
    return atoms, asked


def _outside(lookups: Lookups) -> list[Atom]:
    """The atoms from which the indices of look-ups are made."""
    return [x for own in lookups.indices for x in own]


def _looks_up(key: Key) -> Lookups | None:
    """The look-ups whose lines a key in the body of a scan needs."""
    return key.lookups if isinstance(key, Rest | Looked) else None


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


# The values of atoms; and for look-ups what `_placed` returns, or in the body of a scan
# the lines that they name there.
_Env: TypeAlias = dict[Any, Any]


def run(
    graph: Graph, inputs: Sequence[Any], keys: Sequence[Key], example: Any = None
) -> list[Any]:
    """Evaluate the arrays that some keys name, for one example.

    A key `Sum` needs `example`: any array over which `jax.vmap` maps, if it maps over
    the examples.
    """
    env: _Env = dict(zip(graph.inputs, inputs, strict=True))
    return _run(graph, env, keys, needs_of(graph, keys), example)


def _run(
    graph: Graph, env: _Env, keys: Sequence[Key], needs: Needs, example: Any
) -> list[Any]:
    def read(key: Key) -> Any:
        atom = atom_of(key)
        match key if atom is None else atom:
            case Known(value):
                return jnp.asarray(value)
            case Places(lookups, number):
                return _placed(lookups, env)[1][number]
            case Norm(site) | Row(site) | Sum(site) | Rest(site) | Looked(site):
                arrays = [read(x) for x in keys_of(site)]
                return _made(key, arrays, example, env.get(_looks_up(key)))
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
    equation: Equation, needs: ScanNeeds, env: _Env, example: Any
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
    consts: _Env = {body.inputs[i]: read(i) for i in consts_at}
    lines = _lines_by_step(equation, needs, env)

    def step(carry: Any, xs: Any) -> Any:
        (state, totals), (values, named) = carry, xs
        inner = {**consts, **dict(zip(lines, named, strict=True))}
        inner.update(zip([body.inputs[i] for i in carries_at], state, strict=True))
        inner.update(zip([body.inputs[i] for i in steps_at], values, strict=True))
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
        (over_steps, list(lines.values())),
        length=None if steps_at or lines else params["length"],  # which may be symbolic
        reverse=params["reverse"],
        unroll=params["unroll"],
    )
    names: list[Key] = [equation.outputs[i] for i in (*needs.carries, *needs.steps)]
    names += [Total(equation, key) for key in needs.totals]
    names += [Stacked(equation, key) for key in needs.stacks]
    return dict(zip(names, [*state, *steps, *totals, *stacks], strict=True))


def _made(
    key: Any, arrays: Sequence[jax.Array], example: Any = None, lines: Any = None
) -> jax.Array:
    """What a key names of the term at its site: its norm, say.

    The arrays are those of one example. `lines` are the lines that look-ups name, in
    the part of a table that a step of a scan reads.
    """
    if isinstance(key, Sum):
        return _sum_of_rows(key.site, arrays, example)

    def of_one(arrays: Sequence[jax.Array], lines: Any) -> jax.Array:
        term, _ = assemble(key.site, arrays, [0] * len(arrays))
        match key:
            case Norm():
                return norm(term)
            case Rest():
                return _lookups.norm_of_rest(term, lines)
            case Looked():
                return _lookups.left_at(term, lines)
        return term.materialize()

    return in_auto(of_one, PartitionSpec())(arrays, lines)


def _placed(lookups: Lookups, env: _Env) -> tuple[jax.Array, list[jax.Array]]:
    """The lines of a small table, and the places of the look-ups in it."""

    def value(atom: Atom) -> Any:
        """The value of an atom, which is computed now if its turn has not come."""
        if isinstance(atom, Known):
            return jnp.asarray(atom.value)
        made = atom.producer
        if atom not in env and made is not None:
            found = made.evaluate([value(x) for x in made.inputs])
            env.update(zip(made.outputs, found, strict=True))
        return env[atom]

    if lookups not in env:
        pairs = zip(lookups.sites, lookups.indices, strict=True)
        env[lookups] = _lookups.places_of(
            [_lookups.index_of(site, [value(x) for x in own]) for site, own in pairs]
        )
    return env[lookups]


def _lines_by_step(equation: Equation, needs: ScanNeeds, env: _Env) -> _Env:
    """The lines that look-ups name, for each step of a scan."""
    found = {}
    for key in (*needs.stacks, *needs.totals):
        if isinstance(key, Rest | Looked) and key.lookups not in found:
            line, _ = _placed(key.lookups, env)
            length, m = equation.params["length"], key.site.shape[1]
            found[key.lookups] = _lookups.lines_by_step(line, length, m)
    return found


def _sum_of_rows(
    site: AtTerm, arrays: Sequence[jax.Array], example: jax.Array
) -> jax.Array:
    """The sum of a term's rows over all examples, from the arrays of one example.

    `jax.vmap` over the examples calls `of_all`, which adds up their rows. So a scan
    need not stack factors. `of_all` has to run also if the examples share all arrays of
    the term, since the row then counts N times. So `example` is an operand, too.
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


def _type_of(key: Row | Looked) -> Any:
    """The shape and dtype of what a key makes of a term."""
    arrays = [jax.ShapeDtypeStruct(*_shape_dtype(x)) for x in keys_of(key.site)]
    lines = None
    if isinstance(key, Looked):
        lines = jax.ShapeDtypeStruct((key.lookups.count,), jnp.int32)
    return jax.eval_shape(partial(_made, key), arrays, lines=lines)


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
            return site.shape, _type_of(Row(site)).dtype
        case Looked():
            made = _type_of(key)
            return made.shape, made.dtype
        case Norm() | Rest() | Places():
            raise AssertionError(f"{key} is not added up over the steps of a scan")
    return tuple(key.aval.shape), key.aval.dtype
