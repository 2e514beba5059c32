"""The rule for scans: the terms of the body, stacked or added up over the steps."""

from collections.abc import Sequence
from dataclasses import replace

from jax.extend.core import primitives as p

from ..graph import Equation, Value
from ..sites import AtScan, AtValue, Cut
from ..views import Reshape, View, mapped
from .table import rule, through
from .walk import decompose


@rule(p.scan_p)
def scan(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    """Two cases: a gradient that the carry adds up, and one that each step returns."""
    carry_from, steps_from = equation.splits
    output = equation.body.outputs[value.index]
    if not isinstance(output, Value):
        return None  # a constant
    cuts = decompose(output)
    if value.index < steps_from - carry_from:
        return _added_up(equation, value.index, cuts, view)
    return stacked(equation, cuts, view)


def _added_up(
    equation: Equation, index: int, cuts: Sequence[Cut], view: View
) -> list[Cut] | None:
    """The initial carry, and the total of each term; None if steps do more than add."""
    carry_at = equation.splits[0] + index
    carry = Cut(AtValue(equation.body.inputs[carry_at]))
    if carry not in cuts:
        return None
    found = [through(equation.inputs[carry_at], view)]
    for cut in cuts:
        if cut != carry:
            total = AtScan(equation, cut.site, stacked=False)
            found.append(replace(cut, site=total, view=cut.view + view))
    return found


def stacked(equation: Equation, cuts: Sequence[Cut], view: View) -> list[Cut]:
    """The stack of each term; the walk goes on from operands that are read by steps."""
    body, length = equation.body, equation.params["length"]
    _, steps_from = equation.splits
    found: list[Cut] = []
    for cut in cuts:
        site = cut.site
        by_step = Reshape((length, *site.shape))  # a stack of terms has blocks in front
        whole_view = (by_step, *mapped(cut.view, length), *view)
        if isinstance(site, AtValue) and site.value in body.inputs[steps_from:]:
            operand = equation.inputs[body.inputs.index(site.value)]
            found.append(through(operand, whole_view, cut.factor))
        else:
            stack = AtScan(equation, site, stacked=True)
            found.append(replace(cut, site=stack, view=whole_view))
    return found
