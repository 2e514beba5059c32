"""Gradients that are corrected by each other, pair by pair, in a random order."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from . import _checks
from ._solvers import positive_or_one, safe_sqrt
from ._stateful import StatefulWeighting


def pcgrad(gram: Any, key: Any) -> jax.Array:
    """PCGrad: each gradient loses its part against every other that it conflicts with.

    A copy of each gradient meets every other gradient, in a random order. If the copy,
    as corrected so far, has a negative inner product with the other gradient, it is
    projected on the plane normal to that gradient. The weights are those of the sum of
    the copies. For two losses, the combined gradient is twice that of ``upgrad``, and
    conflicts with none; for more losses, it may conflict with some.

    Args:
      gram: (K, K), the inner products of K gradients, as ``J.gram()``.
      key: one PRNG key for the order, another at every step.

    Returns:
      The weights, (K,), in float32 or wider; 1 for a single loss.

    Raises:
      TypeError: ``gram`` does not hold real floating-point numbers, or ``key`` is not
        one PRNG key.
      ValueError: ``gram`` is not square, or K = 0.

    Source: Yu et al., "Gradient surgery for multi-task learning", 2020.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weights = weightings.pcgrad(rows @ rows.T, jax.random.key(0))
    >>> print(np.asarray(weights @ rows).round(4))
    [0.5848 3.8012 3.8012]
    """
    return _pcgrad(_checks.gramian(gram), _checks.one_key(key))


def gradvac(key: Any, *, decay: Any = 0.99) -> StatefulWeighting:
    """GradVac: raises the cosine of each pair of gradients to its moving average.

    If the cosine of a pair is below its moving average, a multiple of the other
    gradient is added that raises the cosine to the average. Averages start at 0, so the
    first step is that of ``pcgrad``. The state holds the averages and the key.

    Args:
      key: one PRNG key for the orders of all steps.
      decay: how much of an average stays at a step, from 0 to 1.

    Returns:
      A ``StatefulWeighting``: ``init(K)`` makes the state, and ``update(gram, state)``
      returns the weights, (K,), and the next state.

    Raises:
      TypeError: ``key`` is not one PRNG key, or ``decay`` is not a real scalar; from
        ``update``, ``gram`` does not hold real floating-point numbers.
      ValueError: ``decay`` is not from 0 to 1; from ``update``, ``gram`` is not square,
        or of another K than the state.

    Source: Wang et al., "Gradient vaccine: investigating and improving multi-task
      optimization in massively multilingual models", 2021.

    >>> import jax, jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> vaccine = weightings.gradvac(jax.random.key(0))
    >>> rows = jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]])
    >>> weights, state = vaccine.update(rows @ rows.T, vaccine.init(2))
    >>> print(np.asarray(weights @ rows).round(4))
    [0.5848 3.8012 3.8012]
    """
    first, kept = _checks.one_key(key), _checks.fraction("decay", decay)

    def init(num_losses: int) -> GradVacState:
        count = _checks.whole("num_losses", num_losses, low=1)
        return GradVacState(jnp.zeros((count, count), jnp.float32), first)

    def update(gram: Any, state: GradVacState) -> tuple[jax.Array, GradVacState]:
        gram = _checks.gramian(gram)
        if state.cosines.shape != gram.shape:
            raise ValueError(
                f"the state is for {len(state.cosines)} losses, and gram has shape "
                f"{gram.shape}: make the state with init({len(gram)})"
            )
        key, now = jax.random.split(state.key)
        cosines = state.cosines.astype(gram.dtype)
        weights, cosines = _gradvac(gram, now, cosines, kept.astype(gram.dtype))
        return weights, GradVacState(cosines.astype(state.cosines.dtype), key)

    return StatefulWeighting(init, update)


class GradVacState(NamedTuple):
    """What GradVac keeps."""

    cosines: jax.Array  # (K, K), the moving averages
    key: jax.Array


# What is added of gradient j, and the next average of the pair: from the inner product
# of the corrected gradient with gradient j, the norms of both, and the average so far.
Correction = Callable[..., tuple[jax.Array, jax.Array]]


@jax.jit
def _pcgrad(gram: jax.Array, key: jax.Array) -> jax.Array:
    def correct(product, _, other, average):
        against, length = jnp.minimum(product, 0), positive_or_one(other)
        return -against / length / length, average

    return _corrected(gram, key, jnp.zeros_like(gram), correct)[0]


@jax.jit
def _gradvac(
    gram: jax.Array, key: jax.Array, cosines: jax.Array, kept: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def correct(product, norm, other, average):
        cosine = product / positive_or_one(norm) / positive_or_one(other)
        sine = safe_sqrt(1 - cosine**2)
        goal = positive_or_one(safe_sqrt(1 - average**2))
        added = norm * (average * sine / goal - cosine) / positive_or_one(other)
        applies = (cosine < average) & (other > 0)
        return jnp.where(applies, added, 0), kept * average + (1 - kept) * cosine

    return _corrected(gram, key, cosines, correct)


def _corrected(
    gram: jax.Array, key: jax.Array, averages: jax.Array, correct: Correction
) -> tuple[jax.Array, jax.Array]:
    """The weights of the sum of all corrected gradients, and the next averages."""
    count = len(gram)
    norms = safe_sqrt(jnp.diagonal(gram))
    orders = jax.vmap(lambda key: jax.random.permutation(key, count))(
        jax.random.split(key, count)
    )  # (K, K)

    def one(i, order, averages):
        """The weights of the corrected gradient i, and its averages, (K,) each."""

        def step(carry, j):
            weights, averages = carry
            norm = safe_sqrt(weights @ gram @ weights)
            added, average = correct(weights @ gram[j], norm, norms[j], averages[j])
            added = jnp.where(j == i, 0, added)
            average = jnp.where(j == i, averages[j], average)
            return (weights.at[j].add(added), averages.at[j].set(average)), None

        start = jnp.zeros(count, gram.dtype).at[i].set(1)
        return lax.scan(step, (start, averages), order)[0]

    weights, averages = jax.vmap(one)(jnp.arange(count), orders, averages)
    return jnp.sum(weights, axis=0), averages
