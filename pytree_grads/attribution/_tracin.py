"""TracIn: what the steps on an example did to the loss of another."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .. import Jacobian
from . import _checks


def tracin(
    pairs: Iterable[tuple[Jacobian, Jacobian]], step_sizes: Sequence[Any]
) -> jax.Array:
    """Sums of inner products of gradients over checkpoints: Σₖ ηₖ J_query J_trainᵀ.

    A step of size η along the gradient of one example lowers the loss of a query by η
    times the inner product of both gradients, up to O(η²). TracIn adds that up over the
    checkpoints of a training.

    Args:
      pairs: ``(J_query, J_train)`` for each of K ≥ 1 checkpoints, as a list or a
        generator that makes one pair at a time. The functions may differ, if their
        parameters are the same.
      step_sizes: K real numbers: the learning rate at each checkpoint, divided by the
        size of a batch if the step took the mean of a batch. If a checkpoint stands for
        many steps, give the sum of their sizes.

    Returns:
      Scores (Q, N), real, in float32 or wider.

    Raises:
      TypeError: an entry of ``pairs`` is not a pair of Jacobians, or a step size is not
        a real number.
      ValueError: there is no pair; there are not as many step sizes as pairs; a
        Jacobian does not have one row per example; or pairs differ in Q or N.

    Source: Pruthi et al., "Estimating training data influence by tracing gradient
      descent", 2020, TracInCP.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> from pytree_grads.attribution import tracin
    >>> f = lambda p, x: jnp.dot(p, x)
    >>> J = jacobian(f)(jnp.zeros(2), jnp.array([[3.0, 4.0], [1.0, 0.0]]))
    >>> print(tracin([(J[:1], J), (J[:1], J)], [0.5, 0.1]))
    [[15.   1.8]]
    """
    try:
        sizes = list(step_sizes)
    except TypeError:
        raise TypeError(
            f"step_sizes must hold a number for each pair, got {step_sizes!r}"
        ) from None
    total = None
    count = 0
    for number, pair in enumerate(pairs):
        if count == len(sizes):
            raise ValueError(f"there are more pairs than step_sizes, {len(sizes)}")
        scores = _scores(number, pair)
        size = _checks.number(f"step_sizes[{number}]", sizes[number], low=-float("inf"))
        if total is not None and scores.shape != total.shape:
            raise ValueError(
                f"pairs[{number}] has scores of shape {scores.shape}, the pairs before "
                f"{total.shape}: use the same examples at each checkpoint"
            )
        share = scores * jnp.asarray(size, scores.dtype)
        total = share if total is None else total + share
        count += 1
    if total is None or count != len(sizes):
        raise ValueError(
            f"step_sizes has {len(sizes)} numbers for {count} pairs: give at least one "
            "pair, and a number for each"
        )
    return total


def _scores(number: int, pair: Any) -> jax.Array:
    """The inner products of one checkpoint, (Q, N)."""
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise TypeError(f"pairs[{number}] must be (J_query, J_train), got {pair!r}")
    for name, J in zip(("J_query", "J_train"), pair, strict=True):
        _checks.one_row_per_example(f"{name} of pairs[{number}]", J)
    return jnp.real(pair[0].gram(pair[1]))
