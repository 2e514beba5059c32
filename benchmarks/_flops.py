"""Multiplications and additions of a traced program, with loops as often as they run.

XLA's own count takes the body of a loop once, so that a program that moves work out of
a scan seems to do more. Counted are products of matrices and convolutions, of equations
whose result is used.
"""

from __future__ import annotations

from math import prod
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core import primitives as p


def count(jaxpr: Jaxpr) -> float:
    """Twice the multiplications; a `while` of unknown length counts as one step."""
    total, needed = 0.0, {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars) and not equation.effects:
            continue
        needed.update(x for x in equation.invars if not isinstance(x, Literal))
        total += _count_equation(equation)
    return total


def _count_equation(equation: Any) -> float:
    shapes = [x.aval.shape for x in equation.invars if hasattr(x.aval, "shape")]
    params = equation.params
    if equation.primitive is p.dot_general_p:
        (contracted, _), _ = params["dimension_numbers"]
        return (
            2.0
            * prod(equation.outvars[0].aval.shape)
            * prod(shapes[0][i] for i in contracted)
        )
    if equation.primitive is p.conv_general_dilated_p:
        kernel = prod(shapes[1]) // shapes[1][params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * prod(equation.outvars[0].aval.shape) * kernel
    bodies = [count(body) for body in _bodies(params)]
    if equation.primitive is p.cond_p:
        return max(bodies)
    return (
        params.get("length", 1) * sum(bodies)
        if equation.primitive is p.scan_p
        else sum(bodies)
    )


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    values = [
        x for v in params.values() for x in (v if isinstance(v, tuple | list) else [v])
    ]
    closed = [x.jaxpr for x in values if isinstance(x, ClosedJaxpr)]
    return closed + [x for x in values if isinstance(x, Jaxpr)]
