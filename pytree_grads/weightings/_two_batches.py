"""Weights that follow the products of gradients of two independent batches."""

from typing import Any

import jax

from . import _checks
from ._solvers import projected_on_simplex
from ._stateful import StatefulWeighting, checked_state, uniform_state


def modo(step_size: Any, *, regularization: Any = 0.0) -> StatefulWeighting:
    """MoDo: weights take a projected gradient step of MGDA's problem at each step.

    With the gradients J₁ and J₂ of two independent batches, J₁J₂ᵀw is an unbiased
    estimate of the slope of ½wᵀGw, which the Gramian of one batch is not. The weights
    become the projection of w − η(J₁J₂ᵀw + ρw) on the simplex.

    Args:
      step_size: the number η, a real scalar ≥ 0.
      regularization: the number ρ, a real scalar ≥ 0.

    Returns:
      A ``StatefulWeighting``: ``init(K)`` makes the state, and ``update(gram, state)``
      takes ``J1.gram(J2)``, of shape (K, K), and returns the weights, (K,), and the
      next state. The paper applies the weights to the gradients of a further batch.

    Raises:
      TypeError: a number is not a real scalar; from ``update``, ``gram`` does not hold
        real floating-point numbers.
      ValueError: a number is negative; from ``update``, ``gram`` is not square, or of
        another K than the state.

    Source: Chen et al., "Three-way trade-off in multi-objective learning:
      optimization, generalization and conflict-avoidance", 2023, Algorithm 1.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> double = weightings.modo(step_size=0.1)
    >>> weights, state = double.update(jnp.diag(jnp.array([1.0, 3.0])), double.init(2))
    >>> print(np.asarray(weights).round(4))
    [0.55 0.45]
    """
    rate = _checks.number("step_size", step_size, low=0)
    ridge = _checks.number("regularization", regularization, low=0)

    def update(gram: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        gram = _checks.gramian(gram)
        checked_state(state, gram)
        w = state.astype(gram.dtype)
        slope = gram @ w + ridge.astype(gram.dtype) * w
        w = _descended(w, slope, rate.astype(gram.dtype))
        return w, w.astype(state.dtype)

    return StatefulWeighting(uniform_state, update)


def sdmgrad(
    step_size: Any, direction_weight: Any, *, preference: Any = None
) -> StatefulWeighting:
    """SDMGrad: as MoDo, with a pull towards a preferred combination.

    The weights w follow the slope of ½‖Jᵀw + λJᵀc‖² on the simplex, estimated without
    bias from two batches as J₁J₂ᵀ(w + λc). The result is w + λc: the larger λ, the
    closer the direction to Jᵀc.

    Args:
      step_size: of the step of w, a real scalar ≥ 0.
      direction_weight: the number λ, a real scalar ≥ 0; with 0 it is ``modo``.
      preference: (K,), the numbers c, not negative; 1/K by default.

    Returns:
      A ``StatefulWeighting``: ``init(K)`` makes the state, and ``update(gram, state)``
      takes ``J1.gram(J2)``, of shape (K, K), and returns the weights w + λc, (K,), and
      the next state, which is w. The paper applies the weights to the gradients of a
      further batch.

    Raises:
      TypeError: a number is not a real scalar; from ``update``, ``gram`` does not hold
        real floating-point numbers.
      ValueError: a number is negative; from ``update``, ``gram`` is not square, or of
        another K than the state, or ``preference`` does not have K numbers.

    Source: Xiao et al., "Direction-oriented multi-objective learning: simple and
      provable stochastic algorithms", 2023, Algorithm 1.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> pulled = weightings.sdmgrad(step_size=0.1, direction_weight=1.0)
    >>> weights, state = pulled.update(jnp.diag(jnp.array([1.0, 3.0])), pulled.init(2))
    >>> print(np.asarray(weights).round(4), np.asarray(state).round(4))
    [1.1 0.9] [0.6 0.4]
    """
    rate = _checks.number("step_size", step_size, low=0)
    pull = _checks.number("direction_weight", direction_weight, low=0)

    def update(gram: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        gram = _checks.gramian(gram)
        checked_state(state, gram)
        pulled = pull.astype(gram.dtype) * _checks.preference(preference, gram)
        w = state.astype(gram.dtype)
        w = _descended(w, gram @ (w + pulled), rate.astype(gram.dtype))
        return w + pulled, w.astype(state.dtype)

    return StatefulWeighting(uniform_state, update)


@jax.jit
def _descended(w: jax.Array, slope: jax.Array, rate: jax.Array) -> jax.Array:
    return projected_on_simplex(w - rate * slope)
