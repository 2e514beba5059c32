"""The rule of scans: terms of the body, stacked over the steps or added up."""

from collections.abc import Sequence
from dataclasses import replace

from jax.extend.core import primitives as p

from ..graph import Equation, Value
from ..sites import AtScan, AtValue, Summand
from ..views import Reshape, View, mapped
from .table import rule, through
from .walk import decompose


@rule(p.scan_p)
def scan(equation: Equation, value: Value, view: View) -> Sequence[Summand] | None:
    """Two uses: a gradient added up in the carry, and one that leaves every step."""
    carry_from, steps_from = equation.splits
    output = equation.body.outputs[value.index]
    if not isinstance(output, Value):
        return None  # a constant
    summands = decompose(output)
    if value.index < steps_from - carry_from:
        return _added_up(equation, value.index, summands, view)
    return _stacked(equation, summands, view)


def _added_up(
    equation: Equation, index: int, summands: Sequence[Summand], view: View
) -> list[Summand] | None:
    """The initial carry and the total of each term, if steps only add to the carry."""
    carry_at = equation.splits[0] + index
    carry = Summand(AtValue(equation.body.inputs[carry_at]))
    if carry not in summands:
        return None
    found = [through(equation.inputs[carry_at], view)]
    for summand in summands:
        if summand != carry:
            total = AtScan(equation, summand.site, stacked=False)
            found.append(replace(summand, site=total, view=summand.view + view))
    return found


def _stacked(
    equation: Equation, summands: Sequence[Summand], view: View
) -> list[Summand]:
    """The stacks of terms, and the operands that go through the scan step by step."""
    body, length = equation.body, equation.params["length"]
    _, steps_from = equation.splits
    found: list[Summand] = []
    for summand in summands:
        site = summand.site
        by_step = Reshape((length, *site.shape))  # a stack of terms has blocks in front
        whole_view = (by_step, *mapped(summand.view, length), *view)
        if isinstance(site, AtValue) and site.value in body.inputs[steps_from:]:
            operand = equation.inputs[body.inputs.index(site.value)]
            found.append(through(operand, whole_view, summand.factor))
        else:
            stack = AtScan(equation, site, stacked=True)
            found.append(replace(summand, site=stack, view=whole_view))
    return found
