"""A tail as a program: the linear map from the rows at its sources to leaves."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from ..._jax.compat import abstract_like
from ..._trees.algebra import carried_dtype
from ..facts import concrete_scalar
from ..graph import Atom, Equation, Graph, Known, build
from .part import Found


@dataclass(frozen=True)
class Program:
    """The equations of a tail.

    Two programs are equal if they print alike. So equal calls of `jacobian` have equal
    treedefs, and compiled products are used again.
    """

    text: str
    leaves: tuple[int, ...]  # the positions of its outputs among all leaves
    source_count: int
    graph: Graph = field(compare=False, repr=False)

    @classmethod
    def of(cls, found: Found, avals: Sequence[Any]) -> "Program":
        """The program of a tail, for sources and coefficients of some shapes."""
        count = len(found.sources)
        jaxpr = jax.make_jaxpr(found.run)(avals[:count], avals[count:])
        assert not jaxpr.consts, "coefficients are inputs: the text does not show them"
        return cls(str(jaxpr), found.leaves, count, build(jaxpr))

    def of_leaves(self, leaves: Sequence[int]) -> "Program":
        """The program of some of its outputs."""
        at = [self.leaves.index(i) for i in leaves]
        outputs = [self.graph.outputs[k] for k in at]
        graph = Graph(self.graph.inputs, self.graph.equations, outputs)
        text = f"{self.text}: {at}"
        return Program(text, tuple(leaves), self.source_count, graph)

    @cached_property
    def needed(self) -> list[bool]:
        """Which sources the outputs need."""
        return [x in self._needed for x in self.sources]

    @cached_property
    def _needed(self) -> set[Atom]:
        found = set(self.graph.outputs)
        for equation in reversed(self.graph.equations):
            if any(x in found for x in equation.outputs):
                found.update(equation.inputs)
        return found

    @property
    def avals(self) -> list[Any]:
        """The shapes and dtypes of the leaves."""
        return [x.aval for x in self.graph.outputs]

    @property
    def sources(self) -> list[Any]:
        return self.graph.inputs[: self.source_count]

    @cached_property
    def varying(self) -> set[Atom]:
        """The values that differ between examples."""
        return self.graph.downstream(self.sources)

    def run(
        self, sources: Sequence[jax.Array], shared: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """The leaves, in their accumulation dtypes."""
        env: dict[Atom, Any] = dict(
            zip(self.graph.inputs, map(_carried, [*sources, *shared]), strict=True)
        )
        for equation in self.graph.equations:
            if not any(x in self._needed for x in equation.outputs):
                continue
            operands = [_read(env, x) for x in equation.inputs]
            env.update(
                zip(equation.outputs, _evaluate(equation, operands), strict=True)
            )
        return [_carried(jnp.asarray(_read(env, x))) for x in self.graph.outputs]

    def words(self, leaf: int) -> list[str]:
        """What happens between the sources and a leaf, in words for users."""
        graph = self.of_leaves([leaf]).graph
        needed, found = set(graph.outputs), list[str]()
        for equation in reversed(graph.equations):
            if any(x in needed for x in equation.outputs):
                needed.update(equation.inputs)
                found += self._words(equation)
        return list(dict.fromkeys(reversed(found)))

    def _words(self, equation: Equation) -> list[str]:
        primitive, own = equation.primitive, equation.inputs
        if not any(x in self.varying for x in own):
            return []
        if primitive in (p.mul_p, p.div_p):
            is_number = any(concrete_scalar(x) is not None for x in own)
            return [] if is_number else ["times a shared array"]
        word = _WORDS.get(primitive)
        return [] if word is None else [word]

    @cached_property
    def flops(self) -> int:
        """Multiplications and additions of one run, where values differ by example."""
        return sum(map(self._flops, self.graph.equations))

    @cached_property
    def largest(self) -> int:
        """Entries of the largest array of one run that differs by example."""
        made = [x for e in self.graph.equations for x in e.outputs if x in self.varying]
        return max([prod(x.aval.shape) for x in made], default=0)

    def _flops(self, equation: Equation) -> int:
        if not any(x in self.varying for x in equation.inputs):
            return 0
        made = sum(prod(x.aval.shape) for x in equation.outputs)
        if equation.primitive is p.dot_general_p:
            (contracted, _), _ = equation.params["dimension_numbers"]
            shape = equation.inputs[0].aval.shape
            return 2 * made * prod(shape[i] for i in contracted)
        if equation.primitive in (p.reduce_sum_p, p.scatter_add_p):
            return max(prod(x.aval.shape) for x in equation.inputs)
        return 0  # cheap next to products, as in the other costs


# What steps of a tail are called; those that only move entries are not worth a word.
_WORDS: dict[Primitive | None, str] = {
    p.dot_general_p: "through a shared matrix",
    p.select_n_p: "times a shared mask",
    p.reduce_sum_p: "summed",
    p.cumsum_p: "summed cumulatively",
    p.gather_p: "at shared indices",
    p.scatter_add_p: "at shared indices",
    p.triangular_solve_p: "solved with a shared matrix",
    p.linear_solve_p: "solved with a shared matrix",
    p.conv_general_dilated_p: "through a shared convolution",
    p.scan_p: "through a shared loop",
}


def _read(env: dict[Atom, Any], atom: Atom) -> Any:
    return _carried(atom.value) if isinstance(atom, Known) else env[atom]


def _carried(x: Any) -> Any:
    """A value in its accumulation dtype, if it is a floating-point array."""
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
        return x
    return lax.convert_element_type(x, carried_dtype(jnp.result_type(x)))


def _evaluate(equation: Equation, operands: Sequence[Any]) -> Sequence[Any]:
    """Evaluate an equation whose operands are in their accumulation dtypes."""
    if all(_is_carried(x.aval.dtype) for x in (*equation.inputs, *equation.outputs)):
        return equation.evaluate_here(operands)
    params, dtype = equation.params, carried_dtype(equation.outputs[0].aval.dtype)
    if equation.primitive is p.convert_element_type_p:
        return [_carried(lax.convert_element_type(operands[0], dtype))]
    if equation.primitive is p.dot_general_p:
        left, right = (lax.convert_element_type(x, dtype) for x in operands)
        product = lax.dot_general(
            left,
            right,
            params["dimension_numbers"],
            precision=params["precision"],
            preferred_element_type=dtype,
        )
        return [product]
    if equation.primitive is p.scatter_add_p:
        operand, indices, updates = operands
        return [
            lax.scatter_add(
                operand,
                indices,
                updates,
                params["dimension_numbers"],
                indices_are_sorted=params["indices_are_sorted"],
                unique_indices=params["unique_indices"],
                mode=params["mode"],
            )
        ]
    return [_carried(x) for x in equation.evaluate_here(operands)]


def _is_carried(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jnp.floating) or carried_dtype(dtype) == dtype


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["shared"],
    meta_fields=["program"],
)
@dataclass(frozen=True)
class Tail:
    """A program with its coefficients."""

    program: Program
    shared: tuple[jax.Array, ...]

    @property
    def leaves(self) -> tuple[int, ...]:
        """The positions of its outputs among all leaves."""
        return self.program.leaves

    def of(self, leaves: Sequence[int]) -> "Tail":
        """The tail of some of its leaves."""
        if list(leaves) == list(self.leaves):
            return self
        return Tail(self.program.of_leaves(leaves), self.shared)

    @property
    def first_needed(self) -> list[tuple[int, list[bool]]]:
        """For each leaf, which sources it needs and no leaf before it does."""
        found, seen = [], [False] * self.program.source_count
        for i in self.leaves:
            needed = self.program.of_leaves([i]).needed
            found.append((i, [x and not y for x, y in zip(needed, seen, strict=True)]))
            seen = [x or y for x, y in zip(needed, seen, strict=True)]
        return found

    def __call__(self, sources: Sequence[jax.Array]) -> list[jax.Array]:
        """The leaves of a row, or of a sum of rows, from the values at the sources."""
        return self.program.run(sources, self.shared)

    def transposed(
        self,
        vectors: Sequence[jax.Array],
        shapes: Sequence[tuple[tuple[int, ...], Any]],
    ) -> list[jax.Array]:
        """Pull vectors like the leaves back to the sources, of given shapes."""
        taken = [
            abstract_like(vectors[0].astype(carried_dtype(dtype)), shape)
            for shape, dtype in shapes
        ]
        (found,) = jax.linear_transpose(self.__call__, taken)(list(vectors))
        return found
