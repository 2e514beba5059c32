"""The parts of a tail, which run on arrays at its sources."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..facts import is_zero
from ..graph import Atom, Equation, Known, Value
from ..keys import Key, Stacked
from ..plan import LeafPlan


@dataclass(frozen=True)
class Source:
    """A value at which a tail begins."""

    plan: LeafPlan
    shape: tuple[int, ...]
    dtype: Any


class Loop(NamedTuple):
    """A scan around a source, whose values are stacked, or added up over its steps."""

    equation: Equation
    stacked: bool


@dataclass(eq=False)
class Part:
    """The part of a tail inside one graph: the graph itself, or the body of a scan."""

    equations: list[Equation] = field(default_factory=list)  # in order
    sources: dict[Atom, None] = field(default_factory=dict)
    shared: dict[Atom, None] = field(default_factory=dict)
    scans: dict[Equation, "Part"] = field(default_factory=dict)  # stacked over steps
    totals: dict[Equation, "Totals"] = field(default_factory=dict)
    broadcasts: dict[Equation, None] = field(default_factory=dict)  # of coefficients

    def run(
        self, sources: Iterator[jax.Array], shared: Iterator[jax.Array]
    ) -> dict[Atom, jax.Array]:
        """The values of this part, from its sources and coefficients.

        Those of scans come after its own, stacked over the steps.
        """
        env: dict[Atom, Any] = {x: next(sources) for x in self.sources}
        env |= {x: next(shared) for x in self.shared}

        def read(atom: Atom) -> Any:
            return env[atom] if atom in env else number(atom)

        for equation in self.equations:
            if equation in self.scans:
                env.update(self._run_scan(equation, sources, shared))
            if equation in self.totals:
                env.update(self.totals[equation].run(equation, sources, read))
            if equation not in self.scans and equation not in self.totals:
                found = [read(x) for x in equation.inputs]
                if equation.primitive is not None:  # a barrier is not needed here
                    found = equation.evaluate(found)
                env.update(zip(equation.outputs, found, strict=True))
        return env

    def _run_scan(
        self,
        equation: Equation,
        sources: Iterator[jax.Array],
        shared: Iterator[jax.Array],
    ) -> dict[Atom, jax.Array]:
        part, wanted = self.scans[equation], self._from_scan(equation)

        def step(sources: list[jax.Array], shared: list[jax.Array]) -> list[jax.Array]:
            env = part.run(iter(sources), iter(shared))
            return [env[inner] for _, inner in wanted]

        counts = len(part.all_sources), len(part.all_shared)
        pairs = zip((sources, shared), counts, strict=True)
        own = [[next(x) for _ in range(n)] for x, n in pairs]
        found = jax.vmap(step, axis_size=equation.params["length"])(*own)
        return dict(zip((outer for outer, _ in wanted), found, strict=True))

    @cached_property
    def made(self) -> set[Atom]:
        """The linear values, and the sources."""
        made = set[Atom](self.sources)
        for equation in self.equations:
            if equation in self.totals:
                made |= self.totals[equation].addends.keys()
            elif equation not in self.scans:
                made.update(equation.outputs)
            if equation in self.scans:
                made.update(outer for outer, _ in self._from_scan(equation))
        return made

    def _from_scan(self, equation: Equation) -> list[tuple[Value, Atom]]:
        """The outputs of a scan that are linear, each with the body's output."""
        made = self.scans[equation].made
        pairs = zip(equation.outputs, equation.body.outputs, strict=True)
        return [(outer, inner) for outer, inner in pairs if inner in made]

    @cached_property
    def all_sources(self) -> list[tuple[tuple[Loop, ...], Atom]]:
        """The sources, each with the scans around it, in the order of `run`."""
        found: list[Any] = [((), x) for x in self.sources]
        for equation in self.equations:
            if equation in self.scans:
                own = self.scans[equation].all_sources
                found += [((Loop(equation, True), *loops), x) for loops, x in own]
            if equation in self.totals:
                own = self.totals[equation].part.all_sources
                found += [((Loop(equation, False), *loops), x) for loops, x in own]
        return found

    @cached_property
    def all_shared(self) -> list[Key]:
        """The keys of the coefficients, in the order of `run`."""
        found: list[Key] = list(self.shared)
        for equation in self.equations:
            if equation in self.scans:
                keys = self.scans[equation].all_shared
                found += [Stacked(equation, key) for key in keys]
        return found


@dataclass(eq=False)
class Totals:
    """What the carries of a scan add up, by a map that is the same at each step.

    The sources are added up over the steps, and go through the map once.
    """

    part: Part  # in the body; its coefficients are constants of the scan
    addends: dict[Value, list[Atom]]  # for each output of the scan, in the body

    def run(
        self,
        equation: Equation,
        sources: Iterator[jax.Array],
        read: Callable[[Atom], Any],
    ) -> dict[Atom, jax.Array]:
        outer = dict(zip(equation.body.inputs, equation.inputs, strict=True))
        consts = (read(outer[x]) for x in self.part.shared if isinstance(x, Value))
        env = self.part.run(sources, consts)
        carry_from, _ = equation.splits
        found: dict[Atom, jax.Array] = {}
        for output, addends in self.addends.items():
            start = equation.inputs[carry_from + output.index]
            terms = [env[x] for x in addends]
            if not is_zero(start):
                terms.append(read(start))
            found[output] = reduce(jnp.add, terms)
        return found


@dataclass(frozen=True)
class Found:
    """The tail of all leaves that have one."""

    leaves: tuple[int, ...]  # their positions
    roots: tuple[Atom, ...]  # the leaves themselves
    part: Part
    sources: tuple[Source, ...]

    @property
    def shared(self) -> list[Key]:
        return self.part.all_shared

    def run(self, sources: Sequence[Any], shared: Sequence[Any]) -> list[jax.Array]:
        """The leaves, from arrays at the sources and the coefficients."""
        env = self.part.run(iter(sources), iter(shared))
        return [env[root] for root in self.roots]


def number(atom: Atom) -> Any:
    """A known scalar as a number of NumPy, which is part of a program; else None."""
    if not isinstance(atom, Known) or isinstance(atom.value, Tracer):
        return None
    value = np.asarray(atom.value) if np.ndim(atom.value) == 0 else None
    return None if value is None else value[()]
