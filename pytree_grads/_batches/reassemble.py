"""The chain rule with rows in hand, weighted by the outer gradient."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.sharding import in_auto, rest
from .._trees import algebra
from .._trees.checks import (
    PyTree,
    check_callable,
    check_matching,
    check_no_factors,
    check_outer_value,
    describe,
    describe_node,
    is_float0,
    is_inexact,
    located,
)
from .notes import note_of_outer


def reassemble(outer: Callable[[PyTree], Any], outputs: PyTree, rows: PyTree) -> PyTree:
    """The gradient of ``outer(outputs)`` from per-example gradients that you have.

    With L = outer(f), it is Σᵢ (∂L/∂fᵢ) ∂fᵢ/∂p, and equals the gradient of the
    composition to rounding. ``outer`` may couple the examples. If you do not have the
    rows, use :func:`chain_rule_grad`, which needs none.

    Args:
      outer: a function of ``outputs`` that returns a real scalar.
      outputs: the outputs of the inner function, an array of shape (N,), or any pytree
        of real floating-point arrays of shape ``(N, *k)``.
      rows: their gradients. For one array of outputs, a tree like the parameters with
        leaves of shape ``(N, *k, *p)``; for a tree of outputs, such a tree in the place
        of each output, as ``jax.vmap(jax.jacrev(f))`` gives it.

    Returns:
      A tree like the parameters: leaves of shape p, in the dtype of the rows, the sum
      carried in float32 or wider.

    Raises:
      TypeError: outputs are not real floating-point arrays, ``outer`` is not real, or a
        leaf of ``rows`` cannot be summed.
      ValueError: ``outer`` is not a scalar, or ``outputs`` and ``rows`` do not fit
        together.

    =========================================  =========================================
    case                                       result
    =========================================  =========================================
    N = 0                                      zeros
    a NaN or inf in a row                      NaN or inf in the entries it touches,
                                               even if its weight is zero (0 * NaN is
                                               NaN)
    complex rows (complex parameters)          ``jax.grad``'s convention
    complex outputs                            TypeError: use :func:`chain_rule_grad`
    =========================================  =========================================

    >>> import jax.numpy as jnp
    >>> # f(x) = m x + b at 0.25 and 1.5, with m = 2 and b = -1
    >>> outputs = jnp.array([-0.5, 2.0])
    >>> rows = {"m": jnp.array([0.25, 1.5]), "b": jnp.array([1.0, 1.0])}
    >>> grads = reassemble(lambda f: (f**2).sum(), outputs, rows)
    >>> print(grads["m"], grads["b"])
    5.75 3.0
    """
    check_callable(outer, "outer")
    check_no_factors("rows", rows)
    outputs = jax.tree.map(jnp.asarray, outputs)
    _check_outputs(outputs)
    try:
        parts = jax.tree.structure(outputs).flatten_up_to(rows)
    except ValueError:
        raise ValueError(
            "argument rows must hold a tree of gradients in the place of each output: "
            "outputs is "
            f"{describe_node(outputs)}, rows is {describe_node(rows)}, and they do not "
            "branch alike"
        ) from None
    _check_rows(outputs, parts)

    def loss(outputs: PyTree) -> Any:
        value = outer(outputs)
        check_outer_value(value)
        return value

    with note_of_outer(outputs):
        weights = jax.tree.leaves(jax.grad(loss)(outputs))
    return _contracted(weights, parts)


@jax.jit
def _contracted(weights: Sequence[jax.Array], parts: Sequence[PyTree]) -> PyTree:
    """The sum over outputs and examples of weight times row, rounded once."""

    def contract(*rows: Any) -> Any:
        first = rows[0].shape[weights[0].ndim :]  # p
        if is_float0(rows[0]):
            return np.zeros(first, rows[0].dtype)

        def summed(
            weights: Sequence[jax.Array], rows: Sequence[jax.Array]
        ) -> jax.Array:
            terms = [
                algebra.contract(weight.reshape(-1), row.reshape(weight.size, *first))
                for weight, row in zip(weights, rows, strict=True)
            ]
            return sum(terms[1:], start=terms[0])

        out = rest(rows[0], weights[0].ndim)
        return in_auto(summed, out)(weights, rows).astype(rows[0].dtype)

    return jax.tree.map(contract, *parts)


def _check_outputs(outputs: PyTree) -> None:
    leaves = jax.tree.leaves_with_path(outputs)
    if not leaves:
        raise ValueError(
            "argument outputs holds no arrays: there is nothing to differentiate"
        )
    count = None
    for path, leaf in leaves:
        where = located("outputs", path)
        if not is_inexact(leaf):
            raise TypeError(
                f"{where} must be a floating-point array, got {describe(leaf)}"
            )
        if jnp.iscomplexobj(leaf):
            raise TypeError(
                f"{where} is complex ({describe(leaf)}), and rows of a complex "
                "function are not "
                "gradients: chain_rule_grad takes complex outputs"
            )
        if not leaf.ndim:
            raise ValueError(
                f"{where} must have a leading axis of examples, got {describe(leaf)}"
            )
        count = leaf.shape[0] if count is None else count
        if leaf.shape[0] != count:
            raise ValueError(
                f"{where} must hold {count} examples as others do: {describe(leaf)}"
            )


def _check_rows(outputs: PyTree, parts: Sequence[PyTree]) -> None:
    params = []
    for (prefix, output), part in zip(
        jax.tree.leaves_with_path(outputs), parts, strict=True
    ):
        name = f"rows{jax.tree_util.keystr(prefix)}"
        algebra.check_summable(name, part)
        for path, row in jax.tree.leaves_with_path(part):
            if jnp.shape(row)[: output.ndim] != output.shape:
                raise ValueError(
                    f"{located(name, path)} must have the leading axes {output.shape} "
                    "of its "
                    f"output, got {describe(row)}"
                )
        drop = output.ndim
        params.append(
            jax.tree.map(
                lambda r, d=drop: jax.ShapeDtypeStruct(r.shape[d:], r.dtype), part
            )
        )
        check_matching(params[0], params[-1], "the rows of the first output", name)
