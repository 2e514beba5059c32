"""Fair bargains: the minimum of ½wᵀGw less the utilities of all losses."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks
from ._solvers import positive_or_one, safe_sqrt

# Newton steps with a line search, and plain ones at the end.
DAMPED, PLAIN = 30, 4


def nash_mtl(gram: Any, *, max_norm: Any = None) -> jax.Array:
    """Nash-MTL: the weights of the Nash bargain, G w = 1/w.

    The weights minimise ½wᵀGw − Σ log w, which maximises the sum of the logarithms of
    what the losses gain. If a gradient is multiplied by a positive number, its weight
    is divided by this number, so the direction does not change. The combined gradient
    conflicts with no loss, and its squared norm is K. A loss whose gradient is zero has
    weight 0, and does not count in K. Where the losses are Pareto stationary, no such
    weights exist; a ridge of the size of rounding errors keeps the result finite there.
    The weights are differentiable.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      max_norm: a bound for the norm of the combined gradient: the weights are scaled
        down to it. None for no bound. TorchJD uses 1.

    Returns:
      The weights, (K,), in float32 or wider; 1/‖J₁‖ for a single loss.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers, or ``max_norm`` is
        not a real scalar.
      ValueError: ``gram`` is not square, K = 0, or ``max_norm`` is not positive.

    Source: Navon et al., "Multi-task learning as a bargaining game", 2022.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> print(np.asarray(weightings.nash_mtl(jnp.diag(jnp.array([1.0, 4.0])))).round(4))
    [1.  0.5]
    """
    gram = _checks.gramian(gram)
    weights = _bargain(gram, jnp.ones((), gram.dtype))
    if max_norm is None:
        return weights
    bound = _checks.number("max_norm", max_norm, low=0, open_=True).astype(gram.dtype)
    norm = safe_sqrt(weights @ gram @ weights)
    return weights * jnp.minimum(1, bound / positive_or_one(norm))


def fairgrad(gram: Any, alpha: Any) -> jax.Array:
    """FairGrad: α-fair weights, (G w)ᵅ = 1/w.

    The weights minimise ½wᵀGw − Σ w^(1−1/α)/(1−1/α). As α tends to 0, only the sum of
    the gains counts; α = 1 is ``nash_mtl``; the larger α, the more the worst loss
    counts. The combined gradient conflicts with no loss. A loss whose gradient is zero
    has weight 0. Weights are finite where the losses are Pareto stationary, and
    differentiable.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      alpha: the number α, a real scalar > 0, traced.

    Returns:
      The weights, (K,), in float32 or wider.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers, or ``alpha`` is not
        a real scalar.
      ValueError: ``gram`` is not square, K = 0, or ``alpha`` is not positive.

    Source: Ban and Ji, "Fair resource allocation in multi-task learning", 2024.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> weights = weightings.fairgrad(jnp.diag(jnp.array([1.0, 4.0])), alpha=1.0)
    >>> print(np.asarray(weights).round(4))
    [1.  0.5]
    """
    gram = _checks.gramian(gram)
    alpha = _checks.number("alpha", alpha, low=0, open_=True)
    return _bargain(gram, alpha.astype(gram.dtype))


@jax.jit
def _bargain(gram: jax.Array, alpha: jax.Array) -> jax.Array:
    """The w > 0 with G w = w^(-1/α); 0 for a row of zeros."""
    power = 1 / alpha
    # Any size scales the weights likewise, so it needs no derivative.
    size = lax.stop_gradient(positive_or_one(jnp.trace(gram) / len(gram)))
    is_zero = jnp.diagonal(gram) == 0
    # A row of zeros has the equation w = w^(-1/α), and changes no other.
    squares = jnp.diagonal(gram) / size
    ridge = 2 * len(gram) * jnp.finfo(gram.dtype).eps * squares
    scaled = gram / size + jnp.diag(jnp.where(is_zero, 1, ridge))
    w = jnp.diagonal(scaled) ** (-1 / (1 + power))
    w = lax.fori_loop(0, DAMPED, lambda _, w: _damped_step(scaled, power, w), w)
    w = lax.fori_loop(0, PLAIN, lambda _, w: _plain_step(scaled, power, w), w)
    w = _plain_step(scaled, power, lax.stop_gradient(w))
    return jnp.where(is_zero, 0, w * size ** (-1 / (1 + power)))


def _newton_direction(gram: jax.Array, power: jax.Array, w: jax.Array) -> jax.Array:
    slope = gram @ w - w**-power
    return -jnp.linalg.solve(gram + jnp.diag(power * w ** (-power - 1)), slope)


def _damped_step(gram: jax.Array, power: jax.Array, w: jax.Array) -> jax.Array:
    """The best of several parts of a Newton step, by the value."""
    step = _newton_direction(gram, power, w)
    shrinks = step < 0
    to_zero = jnp.min(jnp.where(shrinks, -w / jnp.where(shrinks, step, 1), jnp.inf))
    longest = jnp.minimum(1, 0.95 * to_zero)
    parts = longest * jnp.append(0.5 ** jnp.arange(16, dtype=w.dtype), 0)
    points = w[None, :] + parts[:, None] * step[None, :]
    values = jax.vmap(lambda w: _value(gram, power, w))(points)
    return points[jnp.argmin(values)]


def _plain_step(gram: jax.Array, power: jax.Array, w: jax.Array) -> jax.Array:
    """A whole Newton step, which near the solution removes what the values hide."""
    following = w + _newton_direction(gram, power, w)
    return jnp.where(jnp.all(following > 0), following, w)


def _value(gram: jax.Array, power: jax.Array, w: jax.Array) -> jax.Array:
    """½wᵀGw − Σ u(w), with u′(w) = w^(-1/α); infinite outside w > 0."""
    safe = positive_or_one(w)
    is_log = power == 1
    rest = jnp.where(is_log, 1, 1 - power)
    utilities = jnp.where(is_log, jnp.log(safe), safe**rest / rest)
    value = w @ gram @ w / 2 - jnp.sum(utilities)
    return jnp.where(jnp.all(w > 0), value, jnp.inf)
