"""The interpretation of a tail on pieces, and the table of its rules.

A rule is a function `fun(folding, equation, index)`. It gives the pieces of output
number `index`, or None if the equation does not fold.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from ..facts import is_zero
from ..graph import Atom, Equation, Known
from ..views import View
from .axes import Piece
from .tail import Tail

# A number that all rows share: one that is known, or computed from parameters.
Number: TypeAlias = float | jax.Array
Sum: TypeAlias = dict[Piece, Number]  # pieces that add up, each with a number


def multiplied(x: Number, y: Number) -> Number:
    x, y = _alike(x, y)
    return x * y


def add_to(total: Sum, piece: Piece, number: Number) -> None:
    """Add a piece with a number to a sum, which may have the piece already."""
    if piece in total:
        before, number = _alike(total[piece], number)
        number = before + number
    total[piece] = number


def _alike(x: Number, y: Number) -> tuple[Any, Any]:
    """Two numbers, in the wider dtype if both are arrays."""
    if isinstance(x, jax.Array) and isinstance(y, jax.Array):
        dtype = jnp.promote_types(x.dtype, y.dtype)
        return x.astype(dtype), y.astype(dtype)
    return x, y


MOST_PIECES = 8  # of a leaf; inner products take all pairs


class Folding:
    """The values of a program as sums of pieces; None for those that do not fold.

    Values without pieces are shared.
    """

    def __init__(self, tail: Tail):
        self.program = tail.program
        inputs = self.program.graph.inputs[self.program.source_count :]
        self.shared: dict[Atom, Any] = dict(zip(inputs, tail.shared, strict=True))
        self.values: dict[Atom, Sum | None] = {}
        # Numbers that are a sum over a weighed piece, by the identity of their array:
        # the number, the piece, and the axes. If more of them add up, one sum will do.
        self.totals: dict[int, tuple[Piece, Piece, tuple[int, ...]]] = {}
        # Products that were made, so that equal ones are the same piece.
        self.scaled: dict[tuple[Piece, Atom, bool], Piece | None] = {}

    def read(self, atom: Atom) -> Sum | None:
        """The pieces of a value; None for a shared one that is not zero."""
        if atom in self.values:
            return self.values[atom]
        if is_zero(atom):
            return {}
        return None

    def coefficient(self, atom: Atom) -> jax.Array:
        return jnp.asarray(atom.value if isinstance(atom, Known) else self.shared[atom])

    def step(self, equation: Equation) -> None:
        """Interpret one equation."""
        if not any(x in self.values for x in equation.inputs):
            operands = [
                x.value if isinstance(x, Known) else self.shared[x]
                for x in equation.inputs
            ]
            found = equation.evaluate_here(operands)
            self.shared.update(zip(equation.outputs, found, strict=True))
            return
        rule = RULES.get(equation.primitive)
        for value in equation.outputs:
            folds = rule is not None and all(value.aval.shape)
            made = rule(self, equation, value.index) if rule and folds else None
            if made is not None and len(made) > 4 * MOST_PIECES:
                made = None
            self.values[value] = made

    def each(
        self,
        atom: Atom,
        fun: Callable[[Piece], Piece | None],
        moves: View | None = None,
    ) -> Sum | None:
        """Apply a function to each piece of a value.

        If it does not apply, steps that only move entries are put behind the piece.
        """
        value = self.read(atom)
        if value is None:
            return None
        found: Sum = {}
        for piece, factor in value.items():
            made = None if piece.after else fun(piece)
            if made is None and moves is not None:
                made = replace(piece, after=piece.after + moves)
            if made is None:
                return None
            add_to(found, made, factor)
        return found


Rule: TypeAlias = Callable[[Folding, Equation, int], Sum | None]
RULES: dict[Primitive | None, Rule] = {}


def rule(*primitives: Primitive | None) -> Callable[[Rule], Rule]:
    def register(fun: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, fun))
        return fun

    return register
