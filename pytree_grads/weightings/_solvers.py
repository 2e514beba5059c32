"""Small convex problems: a few hundred cheap steps of optax, then one Newton step.

The first-order steps find which bounds are active. One Newton step on the others
removes the remaining error, which is large for Gramians that are nearly singular, and
carries the derivative of the solution: the steps before it are not differentiated.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

# Of 400 random Gramians, many of them singular and with rows of far sizes, the worst is
# off by 5e-6 after 1000 steps and the last one, and by 5e-4 after 300.
STEPS = 1000

Value = Callable[[jax.Array, Any], jax.Array]


def unit_trace(gram: jax.Array) -> jax.Array:
    """The Gramian divided by its trace, unless that is zero.

    It is for what no common factor changes: so the trace needs no derivative, whose
    square would underflow.
    """
    return gram / lax.stop_gradient(positive_or_one(jnp.trace(gram)))


def unit_diagonal(gram: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The cosines of the gradients, (K, K), and their norms, (K,).

    A row of zeros has cosines of zero, and the norm 1.
    """
    norms = jnp.sqrt(positive_or_one(jnp.diagonal(gram)))
    return gram / norms[:, None] / norms[None, :], norms


def positive_or_one(x: jax.Array) -> jax.Array:
    """The numbers, with 1 in place of those that are not positive: a safe divisor."""
    return jnp.where(x > 0, x, jnp.where(jnp.isnan(x), x, 1.0))


def safe_sqrt(squares: jax.Array) -> jax.Array:
    """Square roots; zero, with derivative zero, where a square is not positive."""
    return jnp.where(squares <= 0, 0, jnp.sqrt(positive_or_one(squares)))


def ridge(gram: jax.Array) -> jax.Array:
    """What keeps a system solvable and changes a solution by no more than rounding."""
    size = positive_or_one(jnp.trace(gram))
    return 4 * len(gram) * jnp.finfo(gram.dtype).eps * size


def minimum_above(gram: jax.Array, low: jax.Array) -> jax.Array:
    """The v ≥ low with the smallest vᵀGv.

    It is solved for the norms of the gradients times v, with the cosines of the
    gradients in place of their products, which makes any sizes equally easy.

    Args:
      gram: (K, K).
      low: (K,).

    Returns:
      An array (K,).
    """
    cosines, norms = unit_diagonal(gram)
    low = norms * low
    size = positive_or_one(jnp.max(jnp.abs(low)))
    return _minimum_above(cosines, low / size) * size / norms


def _minimum_above(gram: jax.Array, low: jax.Array) -> jax.Array:
    root, target = _least_squares(*lax.stop_gradient((gram, low)))
    above = optax.nnls(root, target, STEPS)

    def error(x: jax.Array) -> jax.Array:
        """Zero where x solves the problem."""
        return jnp.max(jnp.abs(jnp.minimum(x, gram @ (x + low))))

    refined = jnp.maximum(_newton_step(gram, gram @ (above + low), above), 0)
    is_better = error(refined) <= error(above) + ridge(gram)
    return low + jnp.where(is_better, refined, above)


def _least_squares(gram: jax.Array, low: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A and b for which ‖A x − b‖² = (x + low)ᵀ G (x + low)."""
    values, vectors = jnp.linalg.eigh(gram)
    root = jnp.sqrt(jnp.maximum(values, 0))[:, None] * vectors.T  # (K, K)
    return root, -root @ low


def _newton_step(hessian: jax.Array, slope: jax.Array, x: jax.Array) -> jax.Array:
    """One step in the entries of x that are positive; the others stay."""
    free = x > 0
    system = jnp.where(free[:, None] & free[None, :], hessian, 0)
    system += jnp.diag(jnp.where(free, ridge(hessian), 1))
    return x - jnp.linalg.solve(system, jnp.where(free, slope, 0))


def minimum_on_simplex(
    value: Value, curvature: Value, start: jax.Array, problem: Any
) -> jax.Array:
    """The w ≥ 0 with Σ w = 1 at which a convex function is smallest.

    Args:
      value: a function of an array (K,) and of what defines the problem.
      curvature: of both too; a bound of the second derivative of a majorant at w.
      start: (K,), on the simplex.
      problem: a tree of arrays, with respect to which the result is differentiable.

    Returns:
      An array (K,).
    """
    w = _accelerated(value, curvature, start, lax.stop_gradient(problem))
    slope, hessian = jax.grad(value)(w, problem), jax.hessian(value)(w, problem)
    refined = _newton_step_on_face(hessian, slope, w)
    before, after = value(w, problem), value(refined, problem)
    rounding = 8 * jnp.finfo(w.dtype).eps * jnp.abs(before)
    is_better = jnp.all(refined >= 0) & (after <= before + rounding)
    return jnp.where(is_better, refined, w)


def _accelerated(
    value: Value, curvature: Value, start: jax.Array, problem: Any
) -> jax.Array:
    """Projected gradient steps with momentum, which starts anew if the value rises."""

    def step(carry: tuple, _: None) -> tuple[tuple, None]:
        w, ahead, momentum = carry
        slope = jax.grad(value)(ahead, problem)
        following = projected_on_simplex(ahead - slope / curvature(ahead, problem))
        grown = (1 + jnp.sqrt(1 + 4 * momentum**2)) / 2
        beyond = following + (momentum - 1) / grown * (following - w)
        rises = value(following, problem) > value(w, problem)
        ahead = jnp.where(rises, following, beyond)
        return (following, ahead, jnp.where(rises, 1, grown)), None

    carry = start, start, jnp.ones((), start.dtype)
    return lax.scan(step, carry, length=STEPS)[0][0]


def projected_on_simplex(x: jax.Array) -> jax.Array:
    """The nearest point with entries that are not negative and add up to 1."""
    # optax divides by integers, which strict promotion of dtypes refuses.
    with jax.numpy_dtype_promotion("standard"):
        return optax.projections.projection_simplex(x).astype(x.dtype)


def _newton_step_on_face(
    hessian: jax.Array, slope: jax.Array, w: jax.Array
) -> jax.Array:
    """One step in the positive entries of w that keeps their sum."""
    free = w > 0
    ones = free.astype(w.dtype)
    system = jnp.where(free[:, None] & free[None, :], hessian, 0)
    system += jnp.diag(jnp.where(free, ridge(hessian), 1))
    bordered = jnp.block(
        [[system, ones[:, None]], [ones[None, :], jnp.zeros((1, 1), w.dtype)]]
    )
    step = jnp.linalg.solve(bordered, jnp.append(-ones * slope, 0))
    return w + step[:-1]
