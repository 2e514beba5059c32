"""TRAK: a kernel machine on sketched gradients, for several models."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from . import _checks


def trak(
    queries: Sequence[Any],
    features: Sequence[Any],
    residuals: Sequence[Any],
    *,
    damping: Any = 0.0,
) -> jax.Array:
    """Scores from sketches of M models: mean Φ_q (ΦᵀΦ + λ)⁻¹ Φᵀ, times mean residuals.

    Φ holds the sketches of the gradients of the model's output, such as the margin
    log(p/(1−p)) of the right class. A residual is minus the derivative of the loss with
    respect to that output, 1 − p for the margin. The kernels and the residuals are each
    averaged over the models, and then multiplied.

    Args:
      queries: M arrays (Q, k): ``J_query.sketch(key, k)`` of each model.
      features: M arrays (N, k): ``J_train.sketch(key, k)``, with the same key as the
        queries of that model. Give each model a key of its own.
      residuals: M arrays (N,): 1 − p of the training examples.
      damping: λ ≥ 0, a real number. Without it, N must be at least k and ΦᵀΦ regular.

    Returns:
      Scores (Q, N), in float32 or wider. Inside ``jax.jit``, they are NaN if a matrix
      is singular.

    Raises:
      TypeError: an array does not hold real floating-point numbers, or ``damping`` is
        not a real number.
      ValueError: there is no model; the three lists differ in length; shapes do not
        fit; ``damping`` is negative; or, outside ``jax.jit``, ΦᵀΦ + λ is singular.

    Source: Park et al., "TRAK: attributing model behavior at scale", 2023, equation 17.

    >>> import jax.numpy as jnp
    >>> from pytree_grads.attribution import trak
    >>> features = jnp.array([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
    >>> residuals = jnp.array([0.5, 0.5, 1.0])
    >>> print(trak([features[:1]], [features], [residuals]))
    [[0.5 0.  0. ]]
    """
    damping = _checks.number("damping", damping, low=0.0)
    counts = {"queries": queries, "features": features, "residuals": residuals}
    _checks.same("models", **{name: len(x) for name, x in counts.items()})
    if not len(features):
        raise ValueError("trak needs the arrays of at least one model")
    kernels, weights = [], []
    for m in range(len(features)):
        phi_q = _checks.floats(f"queries[{m}]", queries[m], "(Q, k)")
        phi = _checks.floats(f"features[{m}]", features[m], "(N, k)")
        own = _checks.floats(f"residuals[{m}]", residuals[m], "(N,)")
        _checks.same(
            "numbers of a sketch", queries=phi_q.shape[1], features=phi.shape[1]
        )
        _checks.same("training examples", features=len(phi), residuals=len(own))
        kernels.append(_kernel(phi_q, phi, damping))
        weights.append(own)
    for name, arrays in (("queries", kernels), ("residuals", weights)):
        shapes = {x.shape for x in arrays}
        if len(shapes) > 1:
            raise ValueError(f"{name} of all models must have one shape, got {shapes}")
    return jnp.stack(kernels).mean(axis=0) * jnp.stack(weights).mean(axis=0)[None, :]


def _kernel(phi_q: jax.Array, phi: jax.Array, damping: Any) -> jax.Array:
    """Φ_q (ΦᵀΦ + λ)⁻¹ Φᵀ, (Q, N)."""
    return solve_moment(phi.T @ phi, damping, phi_q) @ phi.T


def solve_moment(moment: jax.Array, damping: Any, phi_q: jax.Array) -> jax.Array:
    """Φ_q (ΦᵀΦ + λ)⁻¹, (Q, k), from ΦᵀΦ; NaN or an error where it is singular."""
    size = len(moment)
    if not size:
        raise ValueError("sketches must have at least one number, got 0")
    shift = jnp.asarray(damping, moment.dtype)
    factor = jnp.linalg.cholesky(moment + shift * jnp.eye(size, dtype=moment.dtype))
    pivots = jnp.diagonal(factor)
    # Below it, a pivot is what rounding left of zero.
    least = size * jnp.finfo(moment.dtype).eps * jnp.max(pivots**2)
    is_regular = jnp.all(pivots**2 > least)
    if not isinstance(is_regular, Tracer) and not bool(is_regular):
        raise ValueError(
            f"ΦᵀΦ + damping is singular for sketches of {size} numbers and a damping "
            f"of {damping}, or not finite: give a damping above {damping}, or sketches "
            "shorter than the number of training examples"
        )
    solved = jax.scipy.linalg.cho_solve((factor, True), phi_q.T).T
    return jnp.where(is_regular, solved, jnp.nan)
