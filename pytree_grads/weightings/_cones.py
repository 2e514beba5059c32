"""Projections onto the directions that no gradient opposes."""

from typing import Any

import jax
import jax.numpy as jnp

from . import _checks
from ._solvers import minimum_above


def upgrad(
    gram: Any, *, preference: Any = None, regularization: Any = 0.0
) -> jax.Array:
    """UPGrad: each gradient is projected on the dual cone, then they are averaged.

    The dual cone holds the directions d with Jd ≥ 0, along which no loss rises to
    first order. The projection of cᵢJᵢ on it is Jᵀv, with the v ≥ cᵢeᵢ for which vᵀGv
    is smallest; the weights are the sum of these v.

    The combined gradient conflicts with no loss. It is linear in each loss: if one
    gradient is multiplied by a positive number, so is its part of the result. Without
    conflict, the weights are the preference. A single loss has its preference as
    weight. Where the Gramian is singular, the weights need not be unique, but the
    combined gradient is. Derivatives with respect to the Gramian hold the set of active
    bounds fixed.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      preference: (K,), the numbers c, not negative; 1/K by default.
      regularization: a number r ≥ 0; the Gramian is replaced by G/tr G + r·I. TorchJD
        uses 1e-4.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: an argument does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, K = 0, or ``preference`` does not have K
        numbers, or has a negative one; ``regularization`` is negative.

    Source: Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weights = weightings.upgrad(rows @ rows.T)
    >>> print(np.asarray(weights).round(4), np.asarray(weights @ rows).round(4))
    [1.1111 0.7895] [0.2924 1.9006 1.9006]
    """
    gram = _checks.gramian(gram)
    preferred = _checks.preference(preference, gram)
    return _upgrad(
        gram, preferred, _checks.number("regularization", regularization, low=0)
    )


def dualproj(
    gram: Any, *, preference: Any = None, regularization: Any = 0.0
) -> jax.Array:
    """DualProj: the mean of the gradients, projected on the dual cone.

    The weights are the v ≥ c for which vᵀGv is smallest. The combined gradient is the
    direction nearest to Jᵀc among those that conflict with no loss. Unlike that of
    ``upgrad`` it is not linear in each loss. Without conflict, the weights are the
    preference. A single loss has its preference as weight.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      preference: (K,), the numbers c, not negative; 1/K by default.
      regularization: a number r ≥ 0; the Gramian is replaced by G/tr G + r·I. TorchJD
        uses 1e-4.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: an argument does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, K = 0, or ``preference`` does not have K
        numbers, or has a negative one; ``regularization`` is negative.

    Source: Lopez-Paz and Ranzato, "Gradient episodic memory for continual learning",
      2017, equation 11.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weights = weightings.dualproj(rows @ rows.T)
    >>> print(np.asarray(weights @ rows).round(4))
    [0.5556 1.1111 1.1111]
    """
    gram = _checks.gramian(gram)
    preferred = _checks.preference(preference, gram)
    return _dualproj(
        gram, preferred, _checks.number("regularization", regularization, low=0)
    )


@jax.jit
def _upgrad(gram: jax.Array, preferred: jax.Array, added: jax.Array) -> jax.Array:
    above = jax.vmap(minimum_above, (None, 0))
    return jnp.sum(above(_regularized(gram, added), jnp.diag(preferred)), axis=0)


@jax.jit
def _dualproj(gram: jax.Array, preferred: jax.Array, added: jax.Array) -> jax.Array:
    return minimum_above(_regularized(gram, added), preferred)


def _regularized(gram: jax.Array, added: jax.Array) -> jax.Array:
    diagonal = added.astype(gram.dtype) * jnp.trace(gram)
    return gram + diagonal * jnp.eye(len(gram), dtype=gram.dtype)
