"""Gradients chosen by their distances from each other."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks


def krum(gram: Any, num_byzantine: int, num_selected: int = 1) -> jax.Array:
    """Multi-Krum: the mean of the gradients that lie closest to others.

    The score of a gradient is the sum of its K − f − 2 smallest squared distances from
    others; f of the gradients may be arbitrary. The m gradients with the smallest
    scores get weight 1/m each, the others 0. Ties go to the first.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      num_byzantine: the number f, an int ≥ 0; K must be at least f + 3.
      num_selected: the number m, an int from 1 to K; static.

    Returns:
      The weights, (K,), in float32 or wider. They have no useful derivative.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers, or a number is not
        an int.
      ValueError: ``gram`` is not square, or K < f + 3, or m is not from 1 to K.

    Source: Blanchard et al., "Machine learning with adversaries: Byzantine tolerant
      gradient descent", 2017.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[1.0], [1.1], [0.9], [50.0]])
    >>> print(weightings.krum(rows @ rows.T, num_byzantine=1))
    [1. 0. 0. 0.]
    """
    gram = _checks.gramian(gram)
    wrong = _checks.whole("num_byzantine", num_byzantine, low=0)
    chosen = _checks.whole("num_selected", num_selected, low=1)
    if len(gram) < wrong + 3:
        raise ValueError(
            f"num_byzantine = {wrong} needs at least {wrong + 3} losses, gram has "
            f"{len(gram)}"
        )
    if chosen > len(gram):
        raise ValueError(f"num_selected must be at most {len(gram)}, got {chosen}")
    return _krum(gram, len(gram) - wrong - 2, chosen)


@partial(jax.jit, static_argnums=(1, 2))
def _krum(gram: jax.Array, neighbours: int, chosen: int) -> jax.Array:
    squares = jnp.diagonal(gram)
    distances = squares[:, None] + squares[None, :] - 2 * gram  # (K, K)
    distances = jnp.where(jnp.eye(len(gram), dtype=bool), jnp.inf, distances)
    scores = jnp.sum(jnp.sort(distances, axis=1)[:, :neighbours], axis=1)
    best = jnp.argsort(scores)[:chosen]
    return jnp.zeros_like(squares).at[best].set(1 / chosen) + 0 * jnp.sum(gram)
