"""How well scores predict what retraining without examples does."""

from typing import Any

import jax
import jax.numpy as jnp

from . import _checks


def lds(scores: Any, subsets: Any, losses: Any) -> jax.Array:
    """The linear datamodeling score: the rank correlation over retrained subsets.

    The scores of a query, added up over a subset of the training examples, predict how
    low its loss is when a model is trained on that subset. The result is Spearman's
    correlation of these sums with the negative losses; ties share their mean rank.

    Args:
      scores: (Q, N), of any attribution; positive if an example lowers the loss.
      subsets: (S, N) bools: which examples each of S ≥ 2 models was trained on.
      losses: (S, Q), the losses of the queries in these models, or minus another output
        that the scores predict. Average several trainings on a subset for less noise.

    Returns:
      A correlation for each query, (Q,), from −1 to 1; NaN where all sums or all losses
      of a query are equal.

    Raises:
      TypeError: ``scores`` or ``losses`` does not hold real floating-point numbers, or
        ``subsets`` not bools.
      ValueError: shapes do not fit, or S < 2.

    Source: Park et al., "TRAK: attributing model behavior at scale", 2023, definition
      2.3.

    >>> import jax.numpy as jnp
    >>> from pytree_grads.attribution import lds
    >>> scores = jnp.array([[3.0, 1.0, 0.0]])
    >>> subsets = jnp.array([[True, True, False], [True, False, True], [False] * 3])
    >>> print(lds(scores, subsets, losses=jnp.array([[0.1], [0.2], [0.9]])))
    [1.]
    """
    scores = _checks.floats("scores", scores, "(Q, N)")
    losses = _checks.floats("losses", losses, "(S, Q)")
    subsets = jnp.asarray(subsets)
    if subsets.dtype != jnp.bool_:
        raise TypeError(
            f"subsets must hold bools, got {subsets.dtype}: for indices, write "
            "jnp.zeros((S, N), bool).at[jnp.arange(S)[:, None], indices].set(True)"
        )
    if subsets.ndim != 2 or len(subsets) < 2:
        raise ValueError(f"subsets must be (S, N) with S ≥ 2, got {subsets.shape}")
    _checks.same("training examples", scores=scores.shape[1], subsets=subsets.shape[1])
    _checks.same("subsets", subsets=len(subsets), losses=len(losses))
    _checks.same("queries", scores=len(scores), losses=losses.shape[1])
    sums = scores @ subsets.T.astype(scores.dtype)  # (Q, S)
    predicted, found = jax.lax.map(
        lambda x: (_ranks(x[0]), _ranks(x[1])), (sums, -losses.T)
    )
    return _pearson(predicted, found)


def leave_one_out_correlation(scores: Any, without: Any, losses: Any) -> jax.Array:
    """The correlation of scores with the changes of losses by leaving one example out.

    Args:
      scores: (Q, N), of any attribution; positive if an example lowers the loss.
      without: (N, Q), the losses of the queries in the model trained without example n.
      losses: (Q,), their losses in the model trained on all.

    Returns:
      Pearson's correlation over n for each query, (Q,); NaN where all scores or all
      changes of a query are equal.

    Raises:
      TypeError: an array does not hold real floating-point numbers.
      ValueError: shapes do not fit, or N < 2.

    Source: Koh and Liang, "Understanding black-box predictions via influence
      functions", 2017, section 4.1.

    >>> import jax.numpy as jnp
    >>> from pytree_grads.attribution import leave_one_out_correlation
    >>> without = jnp.array([[0.7], [0.5], [0.4]])
    >>> scores = jnp.array([[2.0, 0.0, -1.0]])
    >>> print(leave_one_out_correlation(scores, without, jnp.array([0.5])).round(3))
    [1.]
    """
    scores = _checks.floats("scores", scores, "(Q, N)")
    without = _checks.floats("without", without, "(N, Q)")
    losses = _checks.floats("losses", losses, "(Q,)")
    _checks.same("training examples", scores=scores.shape[1], without=len(without))
    _checks.same(
        "queries", scores=len(scores), without=without.shape[1], losses=len(losses)
    )
    if scores.shape[1] < 2:
        raise ValueError("a correlation needs at least 2 training examples, got 1")
    return _pearson(scores, without.T - losses[:, None])


def _ranks(values: jax.Array) -> jax.Array:
    """Ranks of (S,) numbers from 1, ties at their mean rank."""
    below = (values[:, None] > values[None, :]).sum(axis=1)
    equal = (values[:, None] == values[None, :]).sum(axis=1)
    ranks = below.astype(values.dtype) + (equal + 1).astype(values.dtype) / 2
    return jnp.where(jnp.isnan(values), jnp.nan, ranks)


def _pearson(x: jax.Array, y: jax.Array) -> jax.Array:
    """The correlations of the rows of two matrices, NaN for a constant row."""
    dtype = jnp.promote_types(x.dtype, y.dtype)
    x, y = (
        z.astype(dtype) - z.astype(dtype).mean(axis=1, keepdims=True) for z in (x, y)
    )
    sizes = jnp.sqrt(jnp.sum(x**2, axis=1) * jnp.sum(y**2, axis=1))
    return jnp.sum(x * y, axis=1) / sizes
