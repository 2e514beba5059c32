"""The table of rules: for each primitive, what its equations add up.

A rule is `fun(equation, value, view)`. The value is one of the equation's outputs, and
the view leads from it to the leaf. The rule returns cuts that add up to
`view(value)`, each with its view to the leaf, or None if the equation tells nothing.
`through(operand, view)` is a cut from which the walk goes on; a cut at any site
but a value is a term, at which it ends.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

from jax.extend.core import Primitive

from ..graph import Atom, Equation, Value
from ..sites import AtValue, Cut
from ..views import View

Rule: TypeAlias = Callable[[Equation, Value, View], Sequence[Cut] | None]
Steps: TypeAlias = Callable[[Equation, Value], View | None]

RULES: dict[Primitive, Rule] = {}


def rule(*primitives: Primitive) -> Callable[[Rule], Rule]:
    """Put a function into the table as the rule of some primitives."""

    def register(fun: Rule) -> Rule:
        for primitive in primitives:
            assert primitive not in RULES, f"{primitive} has two rules"
            RULES[primitive] = fun
        return fun

    return register


def steps_rule(*primitives: Primitive) -> Callable[[Steps], Steps]:
    """Put the rule into the table of primitives that are a view of their first operand.

    The function takes `(equation, value)` and returns the steps from the operand to the
    value, or None.
    """

    def register(fun: Steps) -> Steps:
        @rule(*primitives)
        def as_rule(
            equation: Equation, value: Value, view: View
        ) -> Sequence[Cut] | None:
            steps = fun(equation, value)
            if steps is None:
                return None
            return [through(equation.inputs[0], steps + view)]

        return fun

    return register


def through(operand: Atom, view: View, factor: float = 1.0) -> Cut:
    """The cut `factor * view(operand)`, from which the walk goes on."""
    return Cut(AtValue(operand), view, factor)
