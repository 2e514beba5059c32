"""What explain says of a leaf is what its products do: the operations in their
programs.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal
from jax.extend.core import primitives as p
from models import MODELS
from routes import factors_kept, leaves_of, matrix_of

from pytree_grads import jacobian
from pytree_grads._engine.products.routes import norm_route, sum_flops

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from _flops import _bodies, _count_equation

pytestmark = pytest.mark.any_release


def count(jaxpr):
    """Products as the benchmarks count them, and one addition per entry of sums and
    scatters.

    Norms read vectors twice, for the scale and for the square: two per entry, as
    explain says.
    """
    total, needed = 0.0, {x for x in jaxpr.outvars if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars):
            continue
        needed.update(x for x in equation.invars if not isinstance(x, Literal))
        bodies = [count(body) for body in _bodies(equation.params)]
        if equation.primitive is p.reduce_sum_p:
            total += equation.invars[0].aval.size
        elif equation.primitive is p.eq_p:  # of look-ups: each as long as 16 products
            total += 16 * equation.outvars[0].aval.size
        elif equation.primitive is p.scatter_add_p:
            total += equation.invars[2].aval.size
        elif bodies:
            total += equation.params.get("length", 1) * sum(bodies)
        else:
            total += _count_equation(equation, everything=False)
    return total


def per_row(fun, params, batch, product):
    """The operations that a row more takes: what all rows share cancels."""

    def counted(batch):
        J = jax.eval_shape(jacobian(fun), params, *batch)
        return count(jax.make_jaxpr(product)(J).jaxpr), J

    few, J = counted(batch)
    many, _ = counted(jax.tree.map(lambda x: jnp.concatenate([x, x]), batch))
    return (many - few) / len(jax.tree.leaves(batch)[0]), J


# Models in which the two differ by more than half, and why.
EXCEPTIONS = {
    (
        "einsums_with_blocks",
        "norms",
    ): "vectors of one entry: the bound of their rounding "
    "takes as many operations as their inner products",
}


@pytest.mark.parametrize("kept", [False, True], ids=["auto", "factors"])
@pytest.mark.parametrize("product", ["norms", "sum"])
@pytest.mark.parametrize("name", MODELS)
def test_costs_are_those_of_the_programs(name, product, kept):
    fun, params, batch = MODELS[name]()
    with factors_kept() if kept else nullcontext():
        found, J = per_row(fun, params, batch, lambda J: getattr(J, product)())
    leaves = leaves_of(J)
    if product == "norms":
        said = sum(norm_route(leaf).flops for leaf in leaves)
    else:
        said = sum(matrix_of(J).by_leaf(sum_flops))
    if (name, product) not in EXCEPTIONS:
        # A few operations for each leaf put norms together.
        slack = 8 * len(leaves)
        assert said <= 1.5 * found + slack, (said, found)
        assert found <= 1.5 * said + slack, (said, found)
