"""Weights that do not look at the gradients."""

from typing import Any

import jax
import jax.numpy as jnp

from . import _checks


def mean(gram: Any) -> jax.Array:
    """Weights 1/K: the mean of the K gradients.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, or K = 0.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> print(weightings.mean(jnp.eye(2)))
    [0.5 0.5]
    """
    gram = _checks.gramian(gram)
    return jnp.full(gram.shape[:1], 1 / len(gram), gram.dtype)


def sum(gram: Any) -> jax.Array:
    """Weights 1: the sum of the K gradients.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, or K = 0.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> print(weightings.sum(jnp.eye(2)))
    [1. 1.]
    """
    gram = _checks.gramian(gram)
    return jnp.ones(gram.shape[:1], gram.dtype)


def constant(gram: Any, weights: Any) -> jax.Array:
    """The weights that are given, after a check of their number.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      weights: (K,), real floating-point numbers.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: an argument does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, K = 0, or there are not K weights.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> print(weightings.constant(jnp.eye(2), jnp.array([0.25, 0.75])))
    [0.25 0.75]
    """
    return _checks.per_loss("weights", weights, _checks.gramian(gram))


def random(gram: Any, key: Any) -> jax.Array:
    """Random positive weights that add up to 1: the softmax of normal numbers.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      key: one PRNG key, another at every step.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers, or ``key`` is not
        one PRNG key.
      ValueError: ``gram`` is not square, or K = 0.

    Source: Lin et al., "Reasonable effectiveness of random weighting", 2022.

    >>> import jax, jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> print(weightings.random(jnp.eye(4), jax.random.key(0)).shape)
    (4,)
    """
    gram = _checks.gramian(gram)
    normal = jax.random.normal(_checks.one_key(key), gram.shape[:1], gram.dtype)
    return jax.nn.softmax(normal)
