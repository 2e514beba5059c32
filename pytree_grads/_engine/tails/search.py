"""Find tails: the largest shared linear map behind each leaf, and where it begins.

A value of the backward pass is of one of four kinds:

- shared: it is the same for all examples.
- term: the example enters here, and the value has terms that are smaller than itself.
- array: it is evaluated for each example anyway, or is as small as what made it.
- linear: a shared linear map of terms, or of arrays that are smaller than it.

A tail consists of the equations that make linear values. It begins at its sources:
terms, arrays, and shared values that are added.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import Literal, TypeAlias

from jax.extend.core import primitives as p

from .. import evaluate, thresholds
from .. import plan as _plan
from ..facts import is_zero
from ..graph import Atom, Equation, Graph, Value
from ..keys import Key, keys_of
from ..plan import Cuts, LeafPlan
from ..rules.scans import stacked
from ..sites import AtRow, AtScan, AtTerm, AtValue, Site, is_dense
from .linear import added, is_linear
from .part import Found, Loop, Part, Source, Totals, number

Kind: TypeAlias = Literal["shared", "term", "array", "linear"]
# Which cuts of a value to take: those for all products, or for a single sum.
Choice: TypeAlias = Callable[[LeafPlan], Cuts]


def search(
    graph: Graph,
    leaves: Sequence[Atom],
    results: Sequence[Atom],
    varying: set[Atom],
    plans: Sequence[LeafPlan],
    choice: Choice,
) -> Found | None:
    """The tail of the leaves that have one, or None.

    `varying` are the values that differ between examples, `results` what is evaluated
    in any case, and `plans` the plans of the leaves without a tail.
    """
    level = _Level(graph, varying, choice)
    if not any(level.may_have_tail(x.terms) for x in plans):
        return None
    keys = [key for x in plans for site in level.sound(x.terms) for key in site]
    level.set_evaluated(evaluate.needs_of(graph, [*keys, *results]))
    at = [
        i
        for i, x in enumerate(plans)
        if level.has_tail(x.terms, leaves[i]) and level.is_worth_it(leaves[i])
    ]
    if not at:
        return None
    roots = tuple(leaves[i] for i in at)
    part = level.part(roots)
    sources = tuple(level.source(*x) for x in part.all_sources)
    return Found(tuple(at), roots, part, sources)


class _Level:
    """One graph, with what is known of its values."""

    def __init__(self, graph: Graph, varying: set[Atom], choice: Choice):
        self.graph = graph
        self.varying = varying
        self.choice = choice
        self.evaluated: set[Atom] = set()
        self.needs: evaluate.Needs | None = None
        self._kinds: dict[Atom, Kind] = {}
        self._plans: dict[Atom, LeafPlan] = {}
        self._bodies: dict[Equation, _Level] = {}
        self._linear_scans: dict[Equation, bool] = {}

    def body(self, equation: Equation) -> "_Level":
        """The body of a scan."""
        if equation not in self._bodies:
            varying = equation.reached_inside(self.varying)
            level = _Level(equation.body, varying, self.choice)
            if self.needs is not None and equation in self.needs.scans:
                level.set_evaluated(self.needs.scans[equation].body)
            self._bodies[equation] = level
        return self._bodies[equation]

    def set_evaluated(self, needs: "evaluate.Needs") -> None:
        """Record what is evaluated whether there is a tail or not."""
        self.needs, self.evaluated = needs, needs.atoms
        self._bodies.clear()
        self._kinds.clear()

    # ------------------------------------------------------------------------------
    # Cuts: does a cut materialise what a tail need not?

    def may_have_tail(self, cuts: Cuts) -> bool:
        """Whether a cut could be a shared linear map of terms; a quick look."""
        return any(self._is_open(*self._inside(cut.site)) for cut in cuts)

    def _is_open(self, level: "_Level", site: Site) -> bool:
        match site:
            case AtValue(value):
                made = value.producer if isinstance(value, Value) else None
                return (
                    value in level.varying
                    and made is not None
                    and (made.primitive is p.scan_p or level.is_linear(made))
                )
            case AtTerm(equation):
                return level.is_linear(equation)
        return False

    def sound(self, cuts: Cuts) -> list[tuple[Key, ...]]:
        """The keys of the cuts at which two values of the example meet."""
        found = []
        for cut in cuts:
            level, site = self._inside(cut.site)
            if isinstance(site, AtTerm) and not level.is_linear(site.equation):
                found.append(keys_of(cut.site))
        return found

    def has_tail(self, cuts: Cuts, leaf: Atom) -> bool:
        """Whether some cut materialises what a tail need not, and none is in doubt."""
        stacks = any(isinstance(x.site, AtScan) and is_dense(x.site) for x in cuts)
        opened = [self._inside(cut.site) for cut in cuts]
        if not stacks and not any(self._materializes(*x) for x in opened):
            return False
        return self.kind(leaf) == "linear"

    def is_worth_it(self, leaf: Atom) -> bool:
        """Whether the arrays at which a leaf's tail begins are no larger than the leaf.

        A smaller leaf is kept as it is: the arrays are evaluated in any case, and an
        ordinary backward pass also adds the terms to them.
        """
        size = 0
        for source in [self.source(*x) for x in self.part([leaf]).all_sources]:
            sites = [cut.site for cut in self.choice(source.plan)]
            if any(is_dense(x) and self._differs(x) for x in sites):
                size += prod(source.shape)
        return not thresholds.exceeds(size, prod(leaf.aval.shape))

    def _materializes(self, level: "_Level", site: Site) -> bool:
        match site:
            case AtValue(value):
                return level.kind(value) == "linear"
            case AtTerm(equation, _, operands):
                if not level.is_linear(equation):
                    return False
                return any(level.kind(x) in ("term", "linear") for x in operands)
        return False

    def _inside(self, site: Site) -> tuple["_Level", Site]:
        """A site without the scans around it, and the level where it is."""
        level = self
        while isinstance(site, AtScan | AtRow):
            if isinstance(site, AtScan):
                level = level.body(site.equation)
            site = site.site
        return level, site

    # ------------------------------------------------------------------------------
    # Kinds of values

    def is_linear(self, equation: Equation) -> bool:
        if equation.primitive is p.scan_p:
            return self._is_linear_scan(equation)
        return is_linear(equation, self.varying)

    def _is_linear_scan(self, equation: Equation) -> bool:
        """Whether a scan is one linear map of what differs between examples."""
        if equation not in self._linear_scans:
            level = self.body(equation)
            carry_from, steps_from = equation.splits
            starts = zip(equation.inputs, equation.body.inputs, strict=True)
            self._linear_scans[equation] = all(
                x in self.varying or inner not in level.varying or is_zero(x)
                for x, inner in list(starts)[carry_from:steps_from]
            ) and all(map(level.keeps_linear, equation.body.equations))
        return self._linear_scans[equation]

    def keeps_linear(self, equation: Equation) -> bool:
        """Whether an equation is linear, with nothing added, in what differs."""
        if not any(x in self.varying for x in equation.inputs):
            return True
        others = [x for x in added(equation) if x not in self.varying]
        is_plain = equation.primitive is not p.scan_p
        return is_plain and self.is_linear(equation) and all(map(is_zero, others))

    def kind(self, atom: Atom) -> Kind:
        """The kind of a value; see the module's docstring."""
        if atom not in self._kinds:
            for value in self._back_from(atom):
                self._kinds[value] = self._kind(value)
        return self._kinds[atom]

    def _back_from(self, atom: Atom) -> list[Atom]:
        """What the kind of a value depends on, and the value itself, in order."""
        reached: dict[Atom, None] = {}
        todo = [atom]
        while todo:
            value = todo.pop()
            if value in reached or value in self._kinds:
                continue
            reached[value] = None
            made = self._producer(value)
            if made is not None and self.is_linear(made):
                todo += [x for x in made.inputs if x in self.varying]
        return sorted(reached, key=self._position)

    def _position(self, atom: Atom) -> int:
        made = atom.producer if isinstance(atom, Value) else None
        return -1 if made is None else self.graph.position[made]

    def _producer(self, atom: Atom) -> Equation | None:
        """The equation that makes a value, unless it is evaluated in any case."""
        if atom not in self.varying or atom in self.evaluated:
            return None
        return atom.producer if isinstance(atom, Value) else None

    def _kind(self, atom: Atom) -> Kind:
        if atom not in self.varying:
            return "shared"
        made = self._producer(atom)
        if made is None or not isinstance(atom, Value):
            return "array"
        own = [x for x in made.inputs if x in self.varying]
        if not self.is_linear(made):
            if self._has_terms(atom):
                return "term"
            return self._kind_of_scanned(made, atom)
        if any(self._kinds[x] in ("term", "linear") for x in own):
            return "linear"
        if self._has_terms(atom):
            return "term"
        size = sum(prod(x.aval.shape) for x in own)
        grows = thresholds.exceeds(prod(atom.aval.shape), size)
        return "linear" if grows else "array"

    def _has_terms(self, atom: Atom) -> bool:
        """Whether terms of a value are smaller than the value itself."""
        sites = [cut.site for cut in self.choice(self.plan(atom))]
        if any(is_dense(x) and self._differs(x) for x in sites):
            return False
        if any(self._materializes(*self._inside(x)) for x in sites):
            return False
        return not all(map(is_dense, sites))

    def _differs(self, site: Site) -> bool:
        level, inner = self._inside(site)
        return not isinstance(inner, AtValue) or inner.value in level.varying

    def _kind_of_scanned(self, made: Equation, atom: Value) -> Kind:
        """The kind of a scan's output: that of the body's output, if it is stacked."""
        carry_from, steps_from = made.splits if made.primitive is p.scan_p else (0, 0)
        if made.primitive is not p.scan_p:
            return "array"
        if atom.index < steps_from - carry_from:
            return "array" if self._addends(made, atom.index) is None else "linear"
        inner = made.body.outputs[atom.index]
        return "linear" if self.body(made).kind(inner) == "linear" else "array"

    def _addends(self, equation: Equation, index: int) -> list[Atom] | None:
        """What a carry adds at each step, if that is a map of terms that never changes.

        None if steps do more than add, or if the map differs between steps.
        """
        body, level = equation.body, self.body(equation)
        carry_from, steps_from = equation.splits
        if index >= steps_from - carry_from:
            return None
        carry = body.inputs[carry_from + index]
        todo, found = [body.outputs[index]], list[Atom]()
        while todo:
            atom = todo.pop()
            made = atom.producer if isinstance(atom, Value) else None
            if made is not None and made.primitive in (p.add_p, p.add_jaxvals_p):
                todo += made.inputs
            else:
                found.append(atom)
        if found.count(carry) != 1 or body.uses[carry] != 1:
            return None
        found.remove(carry)
        if not any(level.kind(x) == "linear" for x in found):
            return None
        part = level.part(found)
        changing = body.downstream(body.inputs[carry_from:])
        has_loops = part.scans or part.totals
        is_same = not has_loops and changing.isdisjoint(part.shared)
        return found if is_same else None

    def plan(self, atom: Atom) -> LeafPlan:
        if atom not in self._plans:
            self._plans[atom] = _plan.plan_leaf(atom, self.varying, "auto")
        return self._plans[atom]

    # ------------------------------------------------------------------------------
    # The tail itself

    def part(self, roots: Sequence[Atom]) -> Part:
        """The part of the tail that leads to some linear values of this graph."""
        part, reached = Part(), set[Equation]()
        stacks: dict[Equation, dict[Atom, None]] = {}
        totals: dict[Equation, dict[Value, list[Atom]]] = {}
        todo, seen = list(roots), set[Atom]()
        while todo:
            atom = todo.pop()
            if atom in seen:
                continue
            seen.add(atom)
            made = atom.producer if isinstance(atom, Value) else None
            if made is None or self.kind(atom) != "linear":
                part.sources[atom] = None
                continue
            reached.add(made)
            if made.primitive is not p.scan_p or self.is_linear(made):
                todo += self._operands(made, part)
                continue
            assert isinstance(atom, Value)
            addends = self._addends(made, atom.index)
            if addends is None:
                inner = made.body.outputs[atom.index]
                stacks.setdefault(made, {})[inner] = None
            else:
                start = made.inputs[made.splits[0] + atom.index]
                todo += [] if is_zero(start) else [start]
                totals.setdefault(made, {})[atom] = addends
        for equation, own in totals.items():
            part.totals[equation] = self._totals(equation, own, part)
        for equation, inner in stacks.items():
            part.scans[equation] = self.body(equation).part(list(inner))
        position = self.graph.position.__getitem__
        part.equations = sorted({*reached, *part.broadcasts}, key=position)
        return part

    def _totals(
        self, equation: Equation, addends: dict[Value, list[Atom]], outer: Part
    ) -> Totals:
        """What carries add up; the coefficients come from constants of the scan."""
        level, body = self.body(equation), equation.body
        part = level.part([x for own in addends.values() for x in own])
        makers: dict[Equation, None] = {}
        consts: dict[Atom, None] = {}  # those of the scan
        todo = list(part.shared)
        while todo:
            atom = todo.pop()
            made = atom.producer if isinstance(atom, Value) else None
            if made is not None:
                makers[made] = None
                todo += [x for x in made.inputs if number(x) is None]
            else:
                consts[atom] = None
        part.equations = sorted(
            {*part.equations, *makers}, key=body.position.__getitem__
        )
        part.shared = consts
        for i, atom in enumerate(body.inputs):
            if atom in consts:
                self._add_coefficient(equation.inputs[i], outer)
        return Totals(part, addends)

    def _operands(self, equation: Equation, part: Part) -> list[Atom]:
        """The operands that the walk goes on from; the others are coefficients."""
        extra = set(added(equation))
        found: list[Atom] = []
        for x in equation.inputs:
            if x in self.varying or (x in extra and not is_zero(x)):
                found.append(x)
            else:
                self._add_coefficient(x, part)
        return found

    def _add_coefficient(self, x: Atom, part: Part) -> None:
        """A coefficient; if it is a broadcast, the broadcast is part of the tail."""
        made = x.producer if isinstance(x, Value) else None
        if made is not None and made.primitive is p.broadcast_in_dim_p:
            part.broadcasts[made] = None
            self._add_coefficient(made.inputs[0], part)
        elif number(x) is None:
            part.shared[x] = None

    def source(self, loops: tuple[Loop, ...], atom: Atom) -> Source:
        """A source of the tail, which may be inside scans of this graph."""
        shape, dtype = tuple(atom.aval.shape), atom.aval.dtype
        if not loops:
            return Source(self.plan(atom), shape, dtype)
        (equation, stacks), *rest = loops
        inner = self.body(equation).source(tuple(rest), atom)

        def outside(cuts: Cuts) -> Cuts:
            if stacks:
                return tuple(stacked(equation, cuts, ()))
            return tuple(
                replace(x, site=AtScan(equation, x.site, stacked=False)) for x in cuts
            )

        own = inner.plan
        plan = LeafPlan(*map(outside, (own.for_rows, own.for_sums, own.terms)))
        steps = (equation.params["length"],) if stacks else ()
        return Source(plan, (*steps, *inner.shape), dtype)
