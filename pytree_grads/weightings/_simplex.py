"""Convex combinations: the shortest, and the one that helps the worst loss most."""

from typing import Any

import jax
import jax.numpy as jnp

from . import _checks
from ._solvers import minimum_on_simplex, positive_or_one, safe_sqrt, unit_trace


def mgda(gram: Any) -> jax.Array:
    """MGDA: the shortest vector in the convex hull of the gradients.

    The weights are not negative, add up to 1, and make wᵀGw smallest. The combined
    gradient conflicts with no loss; it is zero exactly where the losses are Pareto
    stationary. A row of zeros gets all the weight. Equal rows share theirs in any
    proportion. Derivatives are those of the active bounds.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.

    Returns:
      The weights, (K,), in float32 or wider; 1 for a single loss.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, or K = 0.

    Source: Désidéri, "Multiple-gradient descent algorithm (MGDA) for multiobjective
      optimization", 2012.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> print(np.asarray(weightings.mgda(jnp.diag(jnp.array([1.0, 3.0])))).round(4))
    [0.75 0.25]
    """
    return _mgda(_checks.gramian(gram))


def cagrad(gram: Any, c: Any = 0.5) -> jax.Array:
    """CAGrad: near the mean gradient, the direction that helps the worst loss most.

    With g₀ the mean of the gradients, it is the d with ‖d − g₀‖ ≤ c‖g₀‖ for which the
    smallest Jᵢ·d is largest. With c = 0 it is the mean; with c ≥ 1 it conflicts with no
    loss; as c grows, the direction tends to that of ``mgda``. Where the losses are
    Pareto stationary, or g₀ is zero, the result stays within this ball, and is finite.
    There, with c ≥ 1 and norms that differ by some hundreds, the direction is not
    exact, and may leave a conflict.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      c: the radius, a real scalar ≥ 0, traced.

    Returns:
      The weights, (K,), in float32 or wider; 1 + c for a single loss that is not zero.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers, or ``c`` is not a
        real scalar.
      ValueError: ``gram`` is not square, K = 0, or ``c`` is negative.

    Source: Liu et al., "Conflict-averse gradient descent for multi-task learning",
      2021.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> print(np.asarray(weightings.cagrad(rows @ rows.T, c=0.5) @ rows).round(4))
    [0.1835 1.2041 1.2041]
    """
    gram = _checks.gramian(gram)
    return _cagrad(gram, _checks.number("c", c, low=0).astype(gram.dtype))


@jax.jit
def _mgda(gram: jax.Array) -> jax.Array:
    gram = unit_trace(gram)
    if len(gram) == 2:
        return _pair(_shortest_of_two(gram))

    def value(w: jax.Array, gram: jax.Array) -> jax.Array:
        return w @ gram @ w / 2

    def curvature(_: jax.Array, gram: jax.Array) -> jax.Array:
        return _largest_eigenvalue(gram)

    return minimum_on_simplex(value, curvature, _uniform(gram), gram)


@jax.jit
def _cagrad(gram: jax.Array, c: jax.Array) -> jax.Array:
    gram = unit_trace(gram)
    uniform = _uniform(gram)
    square = uniform @ gram @ uniform
    radius = c * safe_sqrt(square)
    if len(gram) == 2:
        w, norm = _cagrad_of_two(gram, radius)
        return uniform + radius / norm * w

    def value(w: jax.Array, problem: tuple[jax.Array, jax.Array]) -> jax.Array:
        """The dual problem: its minimum leads to the best direction."""
        gram, radius = problem
        return uniform @ gram @ w + radius * _norm(gram, w)

    def curvature(w: jax.Array, problem: tuple[jax.Array, jax.Array]) -> jax.Array:
        # radius·‖Jᵀw‖ lies below a parabola with this curvature that touches it at w.
        gram, radius = problem
        bound = radius * _largest_eigenvalue(gram) / _norm(gram, w)
        return jnp.maximum(bound, jnp.finfo(gram.dtype).eps)

    w = minimum_on_simplex(value, curvature, uniform, (gram, radius))
    return uniform + radius / _norm(gram, w) * w


def _pair(x: jax.Array) -> jax.Array:
    """The weights (x, 1 − x), with x put between 0 and 1."""
    x = jnp.clip(x, 0, 1)
    return jnp.stack([x, 1 - x])


def _shortest_of_two(gram: jax.Array) -> jax.Array:
    """The x for which x J₁ + (1 − x) J₂ is shortest; equal rows take halves."""
    across = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]  # ‖J₁ − J₂‖²
    are_equal = across <= 4 * jnp.finfo(gram.dtype).eps
    x = (gram[1, 1] - gram[0, 1]) / jnp.where(are_equal, 1, across)
    return jnp.where(are_equal, 0.5, x)


def _cagrad_of_two(gram: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The w = (x, 1 − x) for which uᵀGw + radius · √(wᵀGw) is smallest, and √(wᵀGw).

    With D = ‖J₁ − J₂‖² and x₀ the shortest combination, wᵀGw = D (x − x₀)² + h, where h
    is its square. The linear part has the slope q = (G₁₁ − G₂₂) / 2. The derivative is
    zero where (x − x₀)² = q² h / (D (radius² D − q²)), on the side where the linear
    part falls. Where radius² D ≤ q², the linear part decides.
    """
    across = gram[0, 0] + gram[1, 1] - 2 * gram[0, 1]  # D
    slope = (gram[0, 0] - gram[1, 1]) / 2  # q
    determinant = gram[0, 0] * gram[1, 1] - gram[0, 1] ** 2
    lowest = jnp.maximum(determinant, 0) / positive_or_one(across)  # h
    excess = radius**2 * across - slope**2
    far = safe_sqrt(lowest / positive_or_one(across * excess))
    middle = _shortest_of_two(gram)  # x₀
    inside = middle - slope * far
    at_an_end = jnp.where(slope > 0, 0.0, 1.0).astype(gram.dtype)
    w = _pair(jnp.where((excess > 0) | (slope == 0), inside, at_an_end))
    # Each form adds up numbers that are not negative, so nothing cancels.
    conflicting = across * (w[0] - middle) ** 2 + lowest
    square = jnp.where(gram[0, 1] < 0, conflicting, w @ gram @ w)
    return w, jnp.sqrt(square + jnp.finfo(gram.dtype).eps ** 2)


def _norm(gram: jax.Array, w: jax.Array) -> jax.Array:
    """The norm of Jᵀw, smoothed where the shortest combination is nearly zero."""
    return jnp.sqrt(jnp.maximum(w @ gram @ w, 0) + jnp.finfo(gram.dtype).eps)


def _uniform(gram: jax.Array) -> jax.Array:
    return jnp.full(gram.shape[:1], 1 / len(gram), gram.dtype)


def _largest_eigenvalue(gram: jax.Array) -> jax.Array:
    """An upper bound of it; positive also for a Gramian of zeros."""
    frobenius = jnp.sqrt(jnp.sum(gram**2))
    columns = jnp.max(jnp.sum(jnp.abs(gram), axis=0))
    bound = jnp.minimum(frobenius, columns)
    return jnp.where(bound > 0, bound, 1)
