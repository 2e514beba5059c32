"""Linear algebra on gradients: combine them, take them per example, apply a chain rule.

Parameters and gradients are plain pytrees; ``f(params, *example)`` is a function of one
example. J is the matrix whose row i is the gradient of ``f`` at example i.

================================  ======================================================
what you want                     call
================================  ======================================================
a sum of gradients that you hold  ``linear_combination(coefficients, trees)``
the same, written with + and *    ``(2 * Vector(g1) - Vector(g2)).tree``
a mean of gradients in turn       ``Accumulator.zeros_like(g).add(g, weight).mean()``
each example's gradient, stacked  ``per_example_grad(f)(params, *batch)``
J, without its rows as arrays     ``J = jacobian(f)(params, *batch)``
the norms of the rows             ``J.norms()``
their clipped sum, and the norms  ``J.clipped_sum(max_norm)``
a gradient through all outputs    ``chain_rule_grad(outer, f)(params, *batch)``
the same, from rows you hold      ``reassemble(outer, outputs, rows)``
products: Gauss-Newton matrix     ``gauss_newton_product(outer, f)(params, *batch)(v)``
products: empirical Fisher        ``fisher_product(f)(params, *batch)(v)``
================================  ======================================================

``per_example_value_and_grad``, ``value_and_jacobian`` and
``chain_rule_value_and_grad`` return the outputs, or the loss, in addition.
``help(Jacobian)`` lists what J computes; ``J.to_rows()`` returns its rows as arrays.
Uses are modules of their own, as in ``from pytree_grads import weightings``:
``weightings`` has rules for several losses, ``statistics`` the gradient noise scale,
``privacy`` clipped gradients that know their sensitivity, ``attribution`` the influence
of training examples.
"""

from importlib import metadata as _metadata

from ._batches.chain_rule import chain_rule_grad as chain_rule_grad
from ._batches.chain_rule import chain_rule_value_and_grad as chain_rule_value_and_grad
from ._batches.curvature import fisher_product as fisher_product
from ._batches.curvature import gauss_newton_product as gauss_newton_product
from ._batches.per_example import per_example_grad as per_example_grad
from ._batches.per_example import (
    per_example_value_and_grad as per_example_value_and_grad,
)
from ._batches.reassemble import reassemble as reassemble
from ._jacobian.call import jacobian as jacobian
from ._jacobian.call import value_and_jacobian as value_and_jacobian
from ._jacobian.jacobian import Jacobian as Jacobian
from ._trees.accumulator import Accumulator as Accumulator
from ._trees.combine import linear_combination as linear_combination
from ._trees.vector import Vector as Vector

# ``help(pytree_grads)`` shows these names, although other modules define them.
__all__ = [
    "Accumulator",
    "Jacobian",
    "Vector",
    "chain_rule_grad",
    "chain_rule_value_and_grad",
    "fisher_product",
    "gauss_newton_product",
    "jacobian",
    "linear_combination",
    "per_example_grad",
    "per_example_value_and_grad",
    "reassemble",
    "value_and_jacobian",
]

try:
    __version__ = _metadata.version("pytree_grads")
except (
    _metadata.PackageNotFoundError
):  # a checkout on the path that was never installed
    __version__ = "0+unknown"
