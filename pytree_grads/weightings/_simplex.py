"""Convex combinations: the shortest, and the one that helps the worst loss most."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks
from ._solvers import (
    minimum_above,
    minimum_on_simplex,
    positive_or_one,
    safe_sqrt,
    unit_trace,
)


def mgda(gram: Any) -> jax.Array:
    """MGDA: the shortest vector in the convex hull of the gradients.

    The weights are not negative, add up to 1, and make wᵀGw smallest. The combined
    gradient conflicts with no loss; it is zero exactly where the losses are Pareto
    stationary. Rows of zeros get all the weight. Equal rows share theirs in any
    proportion. Derivatives hold the set of active bounds fixed.

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
    Pareto stationary or nearly so, or g₀ is zero, the result stays within this ball,
    and is finite. There, or if norms differ by a factor of some hundreds, the direction
    for c ≥ 1 is not exact, and may leave a conflict.

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
    return _shortest_of_two(gram) if len(gram) == 2 else _shortest_of_many(gram)


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


def _products(gram: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """‖J₁‖², ‖J₂‖², J₁·J₂ and ‖J₁ − J₂‖² of two gradients."""
    first, second = jnp.diagonal(gram)
    across = (gram[0, 1] + gram[1, 0]) / 2
    return first, second, across, first + second - 2 * across


def _shortest_of_many(gram: jax.Array) -> jax.Array:
    """The weights of the shortest convex combination.

    The gradients get one more entry, s, and are joined by one that has −s there and
    zeros elsewhere. Of the combinations with weights ≥ 0, and ≥ 1 for the last, the
    shortest has weights in proportion to the solution, for any s. As a problem with
    lower bounds it is solved for any sizes of the gradients. Rows of zeros, which are
    shortest of all, take everything.
    """
    squares = jnp.diagonal(gram)
    is_zero = (squares == 0).astype(gram.dtype)
    smallest = jnp.min(jnp.where(squares > 0, squares, jnp.inf))
    entry = lax.stop_gradient(jnp.where(smallest < jnp.inf, smallest, 1))  # s²
    signs = jnp.append(jnp.ones_like(squares), -1)
    larger = jnp.pad(gram, (0, 1)) + entry * jnp.outer(signs, signs)  # (K + 1, K + 1)
    weights = minimum_above(larger, jnp.maximum(-signs, 0))[:-1]
    total, num_zero = jnp.sum(weights), jnp.sum(is_zero)
    shares = is_zero / positive_or_one(num_zero)
    return jnp.where((num_zero > 0) & ~jnp.isnan(total), shares, weights / total)


def _shortest_of_two(gram: jax.Array) -> jax.Array:
    """The weights of the shortest convex combination; equal rows take halves.

    Each weight has a quotient of its own: 1 − x would lose the digits of a small one.
    """
    first, second, across, apart = _products(gram)
    are_equal = apart <= 4 * jnp.finfo(gram.dtype).eps
    weights = jnp.stack([second - across, first - across])
    weights = jnp.clip(weights / jnp.where(are_equal, 1, apart), 0, 1)
    return jnp.where(are_equal, 0.5, weights)


def _cagrad_of_two(gram: jax.Array, radius: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The w = (x, 1 − x) for which uᵀGw + radius · √(wᵀGw) is smallest, and √(wᵀGw).

    With D = ‖J₁ − J₂‖² and x₀ the shortest combination, wᵀGw = D (x − x₀)² + h, where h
    is its square. The linear part has the slope q = (G₁₁ − G₂₂) / 2. The derivative is
    zero where (x − x₀)² = q² h / (D (radius² D − q²)), on the side where the linear
    part falls. Where radius² D ≤ q², the linear part decides.
    """
    first, second, across, apart = _products(gram)
    slope = (first - second) / 2  # q
    scale = first * second / positive_or_one(apart)  # h, if both are orthogonal
    lowest = jnp.maximum(scale - across**2 / positive_or_one(apart), 0)  # h
    excess = radius**2 * apart - slope**2
    far = safe_sqrt(lowest / positive_or_one(apart * excess))
    middle = _shortest_of_two(gram)  # (x₀, 1 − x₀)
    sides = jnp.asarray([1, -1], gram.dtype)
    inside = jnp.clip(middle - sides * slope * far, 0, 1)
    at_an_end = jnp.where(sides * slope > 0, 0, 1).astype(gram.dtype)
    w = jnp.where((excess > 0) | (slope == 0), inside, at_an_end)
    # Each form adds up numbers that are not negative. What cancels is h, which is
    # known up to roundings of its terms: the norm is no smaller than these.
    eps = jnp.finfo(gram.dtype).eps
    moved = (w - middle)[jnp.argmin(middle)]  # the smaller weight has more digits
    conflicting = apart * moved**2 + lowest + 4 * eps * scale
    square = jnp.where(across < 0, conflicting, w @ gram @ w)
    return w, jnp.sqrt(square + eps**2)


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
