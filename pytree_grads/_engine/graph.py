"""A jaxpr as a graph that can be walked backwards: each value knows its producer.

Calls are inlined.
"""

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import jax
from jax.extend import core
from jax.extend.core import primitives as p

from .._jax import compat


@dataclass(eq=False)
class Value:
    """An input of the graph, or output number `index` of the equation `producer`."""

    aval: Any
    producer: "Equation | None" = None
    index: int = 0


@dataclass(eq=False)
class Known:
    """A literal or a constant: a value that is known before the graph runs."""

    value: Any

    @property
    def aval(self) -> Any:
        return jax.typeof(self.value)


Atom: TypeAlias = Value | Known


@dataclass(eq=False)
class Equation:
    """`outputs = primitive(inputs)`; a barrier before a remat body has no `source`."""

    source: core.JaxprEqn | None
    inputs: Sequence[Atom]
    outputs: list[Value] = field(default_factory=list)

    @property
    def primitive(self) -> core.Primitive | None:
        return None if self.source is None else self.source.primitive

    @property
    def params(self) -> dict[str, Any]:
        return {} if self.source is None else self.source.params

    @cached_property
    def body(self) -> "Graph":
        """The body of a scan, as a separate graph."""
        return build(self.params["jaxpr"])

    @cached_property
    def rematerializes(self) -> bool:
        """Whether the body of a scan has a part that is computed again."""
        equations = compat.all_equations(self.params["jaxpr"])
        return any(x.primitive is p.remat_p for x in equations)

    @property
    def splits(self) -> tuple[int, int]:
        """Where a scan's inputs split into constants, carry and per-step inputs."""
        consts, carry = compat.scan_counts(self.params)
        return consts, consts + carry

    def reached_inside(self, reached: Container[Atom]) -> set[Atom]:
        """The values in the body of a scan that may depend on some operands."""
        body = self.body
        carry_from, steps_from = self.splits
        pairs = zip(self.inputs, body.inputs, strict=True)
        seeds: set[Atom] = {inner for outer, inner in pairs if outer in reached}
        while True:
            inside = body.downstream(seeds)
            carried = zip(
                body.inputs[carry_from:steps_from], body.outputs, strict=False
            )
            fresh = {i for i, o in carried if o in inside} - seeds
            if not fresh:
                return inside
            seeds |= fresh

    def reached_outputs(self, reached: Container[Atom]) -> list[Value]:
        """The outputs that may depend on some operands."""
        if not any(atom in reached for atom in self.inputs):
            return []
        if self.primitive is None:  # a barrier
            pairs = zip(self.outputs, self.inputs, strict=True)
            return [x for x, atom in pairs if atom in reached]
        if self.primitive is not p.scan_p:
            return self.outputs
        inside, carry_from = self.reached_inside(reached), self.splits[0]
        count = self.splits[1] - carry_from
        carries = [self.body.inputs[carry_from + i] for i in range(count)]
        return [
            x
            for x, inner in zip(self.outputs, self.body.outputs, strict=True)
            if inner in inside or (x.index < count and carries[x.index] in inside)
        ]

    def evaluate(self, operands: Sequence[Any]) -> Sequence[Any]:
        if self.source is None:
            return jax.lax.optimization_barrier(list(operands))
        return compat.bind(self.source, operands)

    def evaluate_here(self, operands: Sequence[Any]) -> Sequence[Any]:
        """Evaluate it in the context that is current, not in that of its trace."""
        if self.source is None:
            return list(operands)
        return compat.bind_here(self.source, operands)


@dataclass(eq=False)
class Graph:
    inputs: list[Value]
    equations: list[Equation]
    outputs: list[Atom]

    @cached_property
    def uses(self) -> dict[Atom, int]:
        """How many equations and outputs read each atom."""
        counts: dict[Atom, int] = {}
        for equation in self.equations:
            for atom in equation.inputs:
                counts[atom] = counts.get(atom, 0) + 1
        for atom in self.outputs:
            counts[atom] = counts.get(atom, 0) + 1
        return counts

    @property
    def has_scans(self) -> bool:
        """Whether there is a scan, outside of the bodies of others."""
        return any(equation.primitive is p.scan_p for equation in self.equations)

    @cached_property
    def position(self) -> dict[Equation, int]:
        """The number of each equation, in the order of evaluation."""
        return {equation: i for i, equation in enumerate(self.equations)}

    def downstream(self, seeds: Iterable[Atom]) -> set[Atom]:
        """Every value that may depend on one of the seeds."""
        reached = set(seeds)
        for equation in self.equations:
            reached.update(equation.reached_outputs(reached))
        return reached


def build(jaxpr: Any) -> Graph:
    """The graph of a jaxpr, open or closed."""
    opened, consts = compat.open_jaxpr(jaxpr)
    inputs = [Value(var.aval) for var in opened.invars]
    equations: list[Equation] = []
    outputs = _inline(opened, [Known(c) for c in consts], inputs, equations.append)
    graph = Graph(inputs, equations, outputs)
    _add_broadcasts_first(graph)
    return graph


def _add_broadcasts_first(graph: Graph) -> None:
    """Add a broadcast to the last summand of a sum: (a + b) + c becomes a + (b + c).

    Habit: XLA treats an array plus a broadcast as if it were as cheap as the array. It
      computes the sum again at each use, with all such sums inside it. The cotangents
      of a residual stream of normalised layers then cost the square of its depth.
    Seen on: jax 0.10.2, XLA for CPU.
    Gain: time 0.96 to 0.98, and compile time down to 0.75, for clipped sums of
      transformers whose layers stand in a list.
    May go when: `test_a_cotangent_of_a_residual_stream_is_made_once` passes without it.
    """
    add, broadcast = p.add_jaxvals_p, p.broadcast_in_dim_p
    ordered: dict[Equation, None] = {}

    def made_by(primitive: core.Primitive, atom: Atom) -> bool:
        return _producer(primitive, atom) is not None

    for equation in graph.equations:
        if equation.primitive is add:
            total, last = sorted(equation.inputs, key=lambda x: made_by(broadcast, x))
            inner = _producer(add, total)
            if inner and made_by(broadcast, last) and graph.uses[total] == 1:
                other, summand = sorted(inner.inputs, key=lambda x: not made_by(add, x))
                inner.inputs, equation.inputs = [summand, last], [other, total]
                del ordered[inner]  # moved behind the equations that make its inputs
                ordered[inner] = None
        ordered[equation] = None
    graph.equations = list(ordered)


def _producer(primitive: core.Primitive, atom: Atom) -> Equation | None:
    """The equation that makes an atom, if it is one of this primitive."""
    producer = atom.producer if isinstance(atom, Value) else None
    return producer if producer and producer.primitive is primitive else None


def _inline(
    jaxpr: core.Jaxpr,
    consts: Sequence[Atom],
    inputs: Sequence[Atom],
    emit: Callable[[Equation], None],
) -> list[Atom]:
    env: dict[core.Var, Atom] = dict(zip(jaxpr.constvars, consts, strict=True))
    env.update(zip(jaxpr.invars, inputs, strict=True))

    def read(atom: Any) -> Atom:
        return Known(atom.val) if isinstance(atom, core.Literal) else env[atom]

    for source in jaxpr.eqns:
        operands = [read(atom) for atom in source.invars]
        if source.primitive in compat.INLINED_CALLS or source.primitive is p.remat_p:
            if source.primitive is p.remat_p and source.params["prevent_cse"]:
                operands = _barrier(operands, emit)
            body, values = compat.open_jaxpr(compat.call_jaxpr(source))
            outputs = _inline(body, [Known(c) for c in values], operands, emit)
        else:
            equation = Equation(source, operands)
            outputs = [Value(v.aval, equation, i) for i, v in enumerate(source.outvars)]
            equation.outputs = outputs
            emit(equation)
        env.update(zip(source.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _barrier(operands: Sequence[Atom], emit: Callable[[Equation], None]) -> list[Atom]:
    """Keep XLA from merging what a remat body recomputes with its first computation."""
    values = [a for a in operands if isinstance(a, Value)]
    equation = Equation(None, values)
    equation.outputs = [Value(v.aval, equation, i) for i, v in enumerate(values)]
    emit(equation)
    fenced = dict(zip(values, equation.outputs, strict=True))
    return [fenced[a] if isinstance(a, Value) else a for a in operands]
