"""Multiplications and additions of a traced program, with loops as often as they run.

XLA's own count takes the body of a loop once, so that a program that moves work out of
a scan seems to do more. Counted are products of matrices and convolutions, and what
else computes a number if it is asked for, of equations whose result is used. XLA drops
the others, in the body of a loop as well.
"""

from __future__ import annotations

from math import log2, prod
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.core import primitives as p
from jax.interpreters.partial_eval import dce_jaxpr

MOVES = {
    p.bitcast_convert_type_p,
    p.broadcast_in_dim_p,
    p.concatenate_p,
    p.convert_element_type_p,
    p.copy_p,
    p.dynamic_slice_p,
    p.dynamic_update_slice_p,
    p.gather_p,
    p.iota_p,
    p.pad_p,
    p.reshape_p,
    p.rev_p,
    p.slice_p,
    p.squeeze_p,
    p.transpose_p,
}
MOVES_BY_NAME = {"copy_p", "optimization_barrier", "split"}  # which JAX does not export


def count(jaxpr: Jaxpr, *, everything: bool = False) -> float:
    """Twice the multiplications of products; a `while` counts as one step.

    With `everything`, also one for each entry that is reduced, scattered or computed by
    itself.
    """
    used, _ = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    return sum(_count_equation(equation, everything) for equation in used.eqns)


def _count_equation(equation: Any, everything: bool) -> float:
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
    bodies = [count(body, everything=everything) for body in _bodies(params)]
    if equation.primitive is p.cond_p:
        return max(bodies)
    # The bodies of these are of two numbers.
    is_entrywise = equation.primitive.name.startswith(("scatter", "reduce"))
    if bodies and not is_entrywise:
        return sum(bodies) * (params["length"] if equation.primitive is p.scan_p else 1)
    return _by_entries(equation, shapes) if everything else 0.0


def _by_entries(equation: Any, shapes: list[tuple[int, ...]]) -> float:
    """The operations of what is no product and has no body."""
    name = equation.primitive.name
    made = sum(prod(x.aval.shape) for x in equation.outvars if hasattr(x.aval, "shape"))
    if name == "fft":
        length = equation.params["fft_lengths"][-1]
        of_real = equation.params["fft_type"].name in ("RFFT", "IRFFT")
        return (2.5 if of_real else 5.0) * max(made, prod(shapes[0])) * log2(length)
    if name.startswith("scatter"):
        return float(prod(shapes[2]))
    if name.startswith(("reduce", "arg", "cum", "sort")):
        return float(prod(shapes[0]))
    is_move = equation.primitive in MOVES or name in MOVES_BY_NAME
    return 0.0 if is_move else float(made)


def _bodies(params: dict[str, Any]) -> list[Jaxpr]:
    values = [
        x for v in params.values() for x in (v if isinstance(v, tuple | list) else [v])
    ]
    # JAX 0.12 has one class for both.
    return [
        x.jaxpr if isinstance(x, ClosedJaxpr) else x
        for x in values
        if isinstance(x, Jaxpr | ClosedJaxpr)
    ]
