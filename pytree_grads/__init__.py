"""Gradients as vectors: combinations, per-example rows and the chain rule on plain pytrees."""

from importlib import metadata as _metadata

from ._accumulator import Accumulator as Accumulator
from ._chain_rule import chain_rule_grad as chain_rule_grad
from ._chain_rule import chain_rule_value_and_grad as chain_rule_value_and_grad
from ._combine import linear_combination as linear_combination
from ._jacobian import Jacobian as Jacobian
from ._jacobian_of import jacobian as jacobian
from ._jacobian_of import value_and_jacobian as value_and_jacobian
from ._per_example import per_example_grad as per_example_grad
from ._per_example import per_example_value_and_grad as per_example_value_and_grad
from ._reassemble import reassemble as reassemble
from ._second_order import fisher_product as fisher_product
from ._second_order import gauss_newton_product as gauss_newton_product
from ._vector import Vector as Vector

try:
    __version__ = _metadata.version("pytree_grads")
except _metadata.PackageNotFoundError:  # a checkout on the path that was never installed
    __version__ = "0+unknown"
