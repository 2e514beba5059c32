"""Convolutions inside loops and branches, in the layout that is fast on CPUs.

Habit: XLA for CPU has fast convolutions for images (N, *space, features) and kernels
  (*space, in, out). Outside of loops and branches it transposes the operands of other
  convolutions into this layout. Inside them it writes plain loops, which take about ten
  times as long. Gradients of kernels never have this layout, so functions that run
  chunk by chunk are rewritten here. Elsewhere XLA would fold the transposes back.
Seen on: jax 0.10.2, XLA for CPU.
Gain: time about 0.1 for such convolutions.
May go when: `benchmarks/per_example.py --only conv` shows recomputed rows, and rows in
  chunks, that are as fast without it.
"""

import operator
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.extend import core
from jax.extend.core import primitives

from . import compat


def with_canonical_convolutions(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Like `fun`, but with every convolution in the fast layout."""

    def rewritten(*args: Any) -> Any:
        jaxpr, avals = jax.make_jaxpr(fun, return_shape=True)(*args)
        outputs = core.jaxpr_as_fun(_rewritten(jaxpr))(*jax.tree.leaves(args))
        return jax.tree.unflatten(jax.tree.structure(avals), outputs)

    return rewritten


def _rewritten(jaxpr: Any) -> Any:
    """Rewrite the convolutions of an open or closed jaxpr; itself if it has none."""
    opened, _ = compat.open_jaxpr(jaxpr)
    equations = [_rewritten_equation(equation) for equation in opened.eqns]
    if all(map(operator.is_, equations, opened.eqns)):
        return jaxpr
    changed = opened.replace(eqns=equations)
    return changed if opened is jaxpr else jaxpr.replace(jaxpr=changed)


def _rewritten_equation(equation: core.JaxprEqn) -> core.JaxprEqn:
    if equation.primitive is primitives.conv_general_dilated_p:
        return _rewritten_convolution(equation)
    params = {name: _with_rewritten(value) for name, value in equation.params.items()}
    same = all(params[name] is value for name, value in equation.params.items())
    return equation if same else equation.replace(params=params)


def _with_rewritten(value: Any) -> Any:
    """Rewrite a parameter of an equation if it is a body or a tuple of branches.

    The functions of a linear solver stay as they are: they stand in a named tuple, and
    must stay consistent.
    """
    if isinstance(value, core.Jaxpr | core.ClosedJaxpr):
        return _rewritten(value)
    if type(value) is tuple and all(isinstance(x, core.ClosedJaxpr) for x in value):
        branches = tuple(map(_rewritten, value))
        return value if all(map(operator.is_, branches, value)) else branches
    return value


def _rewritten_convolution(equation: core.JaxprEqn) -> core.JaxprEqn:
    """A call that replaces a convolution, with the same operands."""
    numbers = equation.params["dimension_numbers"]
    rank = len(numbers.lhs_spec)
    features_last = (0, rank - 1, *range(1, rank - 1))
    kernel = (rank - 1, rank - 2, *range(rank - 2))
    canonical = lax.ConvDimensionNumbers(features_last, kernel, features_last)
    if numbers == canonical:
        return equation
    outputs, inputs, *space = numbers.rhs_spec
    params = equation.params | {"dimension_numbers": canonical}

    @jax.jit
    def call(image: jax.Array, kernel: jax.Array) -> jax.Array:
        image = lax.transpose(image, _features_last(numbers.lhs_spec))
        kernel = lax.transpose(kernel, (*space, inputs, outputs))
        result = primitives.conv_general_dilated_p.bind(image, kernel, **params)
        return lax.transpose(result, np.argsort(_features_last(numbers.out_spec)))

    # Mesh axes may be Auto for this equation, although they are Explicit around it.
    with equation.ctx.manager:
        (made,) = jax.make_jaxpr(call)(*(var.aval for var in equation.invars)).eqns
    return made.replace(invars=equation.invars, outvars=equation.outvars)


def _features_last(spec: tuple[int, ...]) -> tuple[int, ...]:
    batch, features, *space = spec
    return (batch, *space, features)
