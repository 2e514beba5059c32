"""The table of rules: for each primitive, the cuts that add up to its output.

A rule is a function `fun(equation, value, view)`. The value is one of the equation's
outputs, and the view leads from it to the leaf. The rule returns cuts that add up to
`view(value)`, each with a view that leads to the leaf; or None, if it does not apply to
this equation. The walk goes on from a cut `through(operand, view)`. At any other cut
there is a term, and the walk ends.
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
    """Register a function as the rule for some primitives."""

    def register(fun: Rule) -> Rule:
        for primitive in primitives:
            assert primitive not in RULES, f"{primitive} has two rules"
            RULES[primitive] = fun
        return fun

    return register


def steps_rule(*primitives: Primitive) -> Callable[[Steps], Steps]:
    """Register a rule for primitives whose output is a view of the first operand.

    The function takes `(equation, value)` and returns the steps from the operand to the
    value, or None if it does not apply.
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
