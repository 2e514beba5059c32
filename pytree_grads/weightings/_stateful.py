"""Weightings with a state: a pair of functions, as optax has it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from . import _checks


@dataclass(frozen=True)
class StatefulWeighting:
    """A pair of pure functions, ``init`` and ``update``, as in optax.

    Attributes:
      init: makes the first state, from the number of losses (``excess_mtl``: from
        stacked rows).
      update: takes what the weighting looks at (a Gramian, say) and the state, and
        returns the weights and the next state.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> smooth = weightings.cr_mogm(weightings.mgda, decay=0.5)
    >>> state = smooth.init(2)
    >>> weights, state = smooth.update(jnp.diag(jnp.array([1.0, 3.0])), state)
    >>> print(weights)
    [0.625 0.375]
    """

    init: Callable[..., Any]
    update: Callable[..., Any]


def cr_mogm(
    weighting: Callable[[Any], jax.Array], *, decay: Any = 0.9
) -> StatefulWeighting:
    """CR-MOGM: the moving average of the weights that another weighting gives.

    The average makes weights nearly independent of the noise of one batch, which biases
    the expected direction. It starts at 1/K.

    Args:
      weighting: a function from a Gramian to weights, such as ``mgda``.
      decay: how much of the average stays at a step, from 0 to 1.

    Returns:
      A ``StatefulWeighting``: ``init(K)`` makes the state, and ``update(gram, state)``
      returns the weights, (K,), and the next state, which is the weights.

    Raises:
      TypeError: ``weighting`` is not callable, or ``decay`` is not a real scalar; from
        ``update``, what ``weighting`` raises.
      ValueError: ``decay`` is not from 0 to 1; from ``update``, ``gram`` has another K
        than the state.

    Source: Zhou et al., "On the convergence of stochastic multi-objective gradient
      manipulation and beyond", 2022.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> smooth = weightings.cr_mogm(weightings.mgda, decay=0.9)
    >>> weights, state = smooth.update(jnp.diag(jnp.array([1.0, 3.0])), smooth.init(2))
    >>> print(np.asarray(weights).round(4))
    [0.525 0.475]
    """
    if not callable(weighting):
        raise TypeError(
            f"weighting must be a function of a Gramian, such as mgda, got "
            f"{weighting!r}"
        )
    kept = _checks.fraction("decay", decay)

    def update(gram: Any, state: jax.Array) -> tuple[jax.Array, jax.Array]:
        now = weighting(gram)
        checked_state(state, now)
        share = kept.astype(now.dtype)
        weights = share * state.astype(now.dtype) + (1 - share) * now
        return weights, weights.astype(state.dtype)

    return StatefulWeighting(uniform_state, update)


def uniform_state(num_losses: int) -> jax.Array:
    """Weights 1/K in float32."""
    count = _checks.whole("num_losses", num_losses, low=1)
    return jnp.full(count, 1 / count, jnp.float32)


def checked_state(state: jax.Array, like: jax.Array) -> None:
    """Raise if the state has weights for another number of losses."""
    if state.shape != like.shape[:1]:
        raise ValueError(
            f"the state is for {len(state)} losses, and there are {len(like)}: make "
            f"the state with init({len(like)})"
        )
