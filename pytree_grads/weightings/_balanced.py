"""Closed forms that balance the gradients: equal projections, or equal scales."""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from . import _checks
from ._solvers import positive_or_one, safe_sqrt, unit_trace

SCALES = ("min", "median", "rmse")


def imtl_g(gram: Any) -> jax.Array:
    """IMTL-G: a combination with equal projections on all unit gradients.

    The weights are G⁺n divided by their sum, with n the norms of the gradients. They
    add up to 1 and may be negative, so a loss may rise. Multiplying a gradient by a
    positive number does not change the direction. A loss whose gradient is zero has
    weight 0. If the sum is zero, as for opposite gradients, the weights are 1/K.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.

    Returns:
      The weights, (K,), in float32 or wider; 1 for a single loss.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, or K = 0.

    Source: Liu et al., "Towards impartial multi-task learning", 2021.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> print(np.asarray(weightings.imtl_g(jnp.diag(jnp.array([1.0, 9.0])))).round(4))
    [0.75 0.25]
    """
    return _imtl_g(_checks.gramian(gram))


def config(gram: Any, *, preference: Any = None) -> jax.Array:
    """ConFIG: a direction with equal cosines to all gradients, as long as they agree.

    The direction is C⁺c applied to the unit gradients, with C their inner products and
    c the preference. Its length is the sum of the projections of all gradients on it.
    If the gradients are linearly independent, it conflicts with none of them. A loss
    whose gradient is zero has weight 0. Opposite gradients have weights 0.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      preference: (K,), not negative: the proportions of the cosines; equal by default.

    Returns:
      The weights, (K,), in float32 or wider; 1 for a single loss that is not zero.

    Raises:
      TypeError: an argument does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, K = 0, or ``preference`` does not have K
        numbers, or has a negative one.

    Source: Liu et al., "ConFIG: towards conflict-free training of physics informed
      neural networks", 2024.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> print(np.asarray(weightings.config(rows @ rows.T) @ rows).round(4))
    [0.1588 2.0706 2.0706]
    """
    gram = _checks.gramian(gram)
    return _config(gram, _checks.preference(preference, gram))


def aligned_mtl(
    gram: Any,
    *,
    preference: Any = None,
    scale_mode: Literal["min", "median", "rmse"] = "min",
) -> jax.Array:
    """Aligned-MTL: the principal axes of the gradients get one common scale.

    With the eigenvalues λ and eigenvectors V of the Gramian, the weights are
    V √(s/λ) Vᵀ c, over the eigenvalues that are not zero. Then the gradients are
    replaced by the nearest ones that are orthogonal and of one length. The common s is
    the smallest eigenvalue, their median or their mean. Derivatives are NaN where
    eigenvalues coincide.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      preference: (K,), the numbers c, not negative; 1/K by default.
      scale_mode: ``"min"``, ``"median"`` or ``"rmse"``; static.

    Returns:
      The weights, (K,), in float32 or wider; the preference for a single loss that is
      not zero. All are zero if the Gramian is.

    Raises:
      TypeError: an argument does not hold real floating-point numbers.
      ValueError: ``gram`` is not square, K = 0, ``preference`` does not have K numbers,
        or has a negative one; or ``scale_mode`` is another one.

    Source: Senushkin et al., "Independent component alignment for multi-task learning",
      2023.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> print(weightings.aligned_mtl(jnp.diag(jnp.array([4.0, 1.0]))))
    [0.25 0.5 ]
    """
    gram = _checks.gramian(gram)
    if scale_mode not in SCALES:
        raise ValueError(f"scale_mode must be one of {SCALES}, got {scale_mode!r}")
    return _ALIGNED[scale_mode](gram, _checks.preference(preference, gram))


@jax.jit
def _imtl_g(gram: jax.Array) -> jax.Array:
    norms = safe_sqrt(jnp.diagonal(gram))
    unit = positive_or_one(norms)
    cosines = gram / unit[:, None] / unit[None, :]
    raw = jnp.linalg.pinv(cosines, hermitian=True) @ (norms > 0).astype(gram.dtype)
    raw = raw / unit
    total, rounding = jnp.sum(raw), 1e3 * jnp.finfo(gram.dtype).eps
    has_sum = ~(jnp.abs(total) <= rounding * jnp.sum(jnp.abs(raw)))  # true for NaN
    return jnp.where(has_sum, raw / jnp.where(has_sum, total, 1), 1 / len(gram))


@jax.jit
def _config(gram: jax.Array, preferred: jax.Array) -> jax.Array:
    norms = safe_sqrt(jnp.diagonal(gram))
    unit = positive_or_one(norms)
    cosines = gram / unit[:, None] / unit[None, :]
    raw = jnp.linalg.pinv(cosines, hermitian=True) @ preferred
    raw = jnp.where(norms == 0, 0, raw / unit)
    # The square of the direction's length, and its products with all gradients.
    square, products = raw @ gram @ raw, gram @ raw
    return raw * jnp.sum(products) / positive_or_one(square)


def _aligned(gram: jax.Array, preferred: jax.Array, scale_of: Any) -> jax.Array:
    values, vectors = jnp.linalg.eigh(unit_trace(gram))
    cutoff = len(gram) * jnp.finfo(gram.dtype).eps * values[-1]
    counts = values > cutoff
    safe = jnp.where(counts, values, 1)
    scale = scale_of(jnp.where(counts, values, jnp.nan))
    ratios = jnp.where(
        counts, jnp.sqrt(scale / safe), jnp.where(values != values, values, 0)
    )
    return vectors @ (ratios * (vectors.T @ preferred))


_ALIGNED = {
    "min": jax.jit(lambda gram, c: _aligned(gram, c, jnp.nanmin)),
    "median": jax.jit(lambda gram, c: _aligned(gram, c, jnp.nanmedian)),
    "rmse": jax.jit(lambda gram, c: _aligned(gram, c, jnp.nanmean)),
}
