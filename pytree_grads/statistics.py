"""Statistics of the gradients of examples, from products with J and without its rows.

=========================  =============================================================
what you want              call
=========================  =============================================================
the gradient noise scale   ``noise_scale(J)``, a ``NoiseScale``
the variance of an entry   ``variance(J)``
mean² over variance        ``signal_to_noise(J)``
the Fisher diagonal        ``fisher_diagonal(J)``; of the model's own labels:
                           ``sampled_fisher_diagonal(logits, key)``
sampling by norms          ``sampling_weights(norms)``
=========================  =============================================================

J must have one row per example: its function returns one loss.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from . import Jacobian, jacobian

__all__ = [
    "NoiseScale",
    "fisher_diagonal",
    "noise_scale",
    "sampled_fisher_diagonal",
    "sampling_weights",
    "signal_to_noise",
    "variance",
]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["trace", "squared_norm"],
    meta_fields=[],
)
@dataclass(frozen=True)
class NoiseScale:
    """The two parts of the gradient noise scale, tr Σ and ‖G‖².

    Both are noisy, and ``squared_norm`` may be negative, so average each over steps and
    divide last. It is a pytree, so ``jax.tree.map`` averages both parts at once.

    Attributes:
      trace: tr Σ, of the covariance of the gradients of examples; a scalar, or a tree
        of scalars.
      squared_norm: ‖G‖², of the expected gradient, in the same form.

    >>> import jax
    >>> from pytree_grads.statistics import NoiseScale
    >>> steps = [NoiseScale(8.0, 3.0), NoiseScale(10.0, -1.0)]
    >>> average = jax.tree.map(lambda a, b: (a + b) / 2, *steps)
    >>> average.ratio()
    9.0
    """

    trace: Any
    squared_norm: Any

    def ratio(self) -> Any:
        """The noise scale tr Σ / ‖G‖²: larger batches than this help little.

        Returns:
          A scalar, or a tree of scalars. It is negative if ``squared_norm`` is. Then
          the noise hides the gradient: average over more steps.

        >>> from pytree_grads.statistics import NoiseScale
        >>> NoiseScale(8.0, 2.0).ratio()
        4.0
        """
        return jax.tree.map(lambda a, b: a / b, self.trace, self.squared_norm)


def noise_scale(
    J: Jacobian, *, labels: Any = None, per_leaf: bool = False, unbiased: bool = True
) -> NoiseScale:
    """The parts of the gradient noise scale: tr Σ, and ‖G‖² of the expected gradient.

    With the gradients gᵢ of N examples and their mean g, tr Σ is estimated without bias
    as (mean ‖gᵢ‖² − ‖g‖²)·N/(N−1), and ‖G‖² as ‖g‖² − tr Σ/N. One number for all
    parameters takes norms and a mean; numbers for parts take ``J.square_sum()`` and a
    mean.

    Args:
      J: a row per example, N ≥ 2 of them.
      labels: a prefix tree of the parameters, with a string for each part, as optax
        takes it: the result has a number for each label. None for one number.
      per_leaf: whether the result has a number for each leaf of the parameters.
      unbiased: whether to subtract tr Σ/N from ‖g‖², as averages over steps need.
        Otherwise ``squared_norm`` is ‖g‖².

    Returns:
      A ``NoiseScale`` of two scalars, or with ``labels`` of two dicts, or with
      ``per_leaf`` of two trees like the parameters; in float32 or wider.

    Raises:
      TypeError: ``J`` is not a ``Jacobian``.
      ValueError: it does not have one row per example, or N < 2; ``labels`` is not a
        prefix of the parameters; or both ``labels`` and ``per_leaf`` are given.

    Source: McCandlish et al., "An empirical model of large-batch training", 2018,
      equation 2.8 and appendix A.1.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> from pytree_grads.statistics import noise_scale
    >>> f = lambda p, x: jnp.dot(p["w"], x)
    >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [5.0, 4.0]]))
    >>> noise_scale(J)
    NoiseScale(trace=Array(2., dtype=float32), squared_norm=Array(31., dtype=float32))
    """
    count = _check(J, at_least=2)
    if labels is None and not per_leaf:
        second = J.squared_norms().mean()
        return _parts(second, _squares(J.mean()), count, unbiased)
    if labels is not None and per_leaf:
        raise ValueError("noise_scale takes labels or per_leaf=True, not both")
    second = jax.tree.map(lambda x: _wide(x).sum() / count, J.square_sum())
    first = jax.tree.map(_squares, J.mean())
    if labels is not None:
        second, first = (_by_label(labels, tree) for tree in (second, first))

    def part(name: str) -> Any:
        return jax.tree.map(
            lambda a, b: getattr(_parts(a, b, count, unbiased), name), second, first
        )

    return NoiseScale(part("trace"), part("squared_norm"))


def variance(J: Jacobian) -> Any:
    """The variance of the gradients of examples, entry by entry and without bias.

    It is (Σ gᵢ²/N − g²)·N/(N−1), and 0 where rounding would make it negative. Where the
    mean is large compared with the deviation, this difference loses digits.

    Args:
      J: a row per example, N ≥ 2 of them.

    Returns:
      A tree like the parameters, with real leaves of the same precision.

    Raises:
      TypeError: ``J`` is not a ``Jacobian``.
      ValueError: it does not have one row per example, or N < 2.

    Source: the unbiased sample variance.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> from pytree_grads.statistics import variance
    >>> f = lambda p, x: jnp.dot(p["w"], x)
    >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [5.0, 4.0]]))
    >>> variance(J)
    {'w': Array([2., 0.], dtype=float32)}
    """
    count = _check(J, at_least=2)

    def of_leaf(square_sum: jax.Array, mean: jax.Array) -> jax.Array:
        centred = _wide(square_sum) / count - _square(mean)
        return jnp.maximum(centred * count / (count - 1), 0).astype(square_sum.dtype)

    return jax.tree.map(of_leaf, J.square_sum(), J.mean())


def signal_to_noise(J: Jacobian) -> Any:
    """The ratio of squared mean and variance of the gradients, entry by entry.

    Entries with a large ratio generalise well. The ratio is 0 where the mean is 0, and
    infinite where only the variance is.

    Args:
      J: a row per example, N ≥ 2 of them.

    Returns:
      A tree like the parameters, with real leaves of the same precision.

    Raises:
      TypeError: ``J`` is not a ``Jacobian``.
      ValueError: it does not have one row per example, or N < 2.

    Source: Liu et al., "Understanding why neural networks generalize well through
      GSNR of parameters", 2020.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> from pytree_grads.statistics import signal_to_noise
    >>> f = lambda p, x: jnp.dot(p["w"], x)
    >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [5.0, 4.0]]))
    >>> signal_to_noise(J)
    {'w': Array([ 8., inf], dtype=float32)}
    """

    def of_leaf(mean: jax.Array, var: jax.Array) -> jax.Array:
        signal = _square(mean).astype(var.dtype)
        return jnp.where(signal == 0, 0, signal / var)

    return jax.tree.map(of_leaf, J.mean(), variance(J))


def fisher_diagonal(J: Jacobian) -> Any:
    """The diagonal of the empirical Fisher matrix: the mean of the squared gradients.

    With the loss −log p(label), it is what elastic weight consolidation and similar
    methods use. The gradients are squared one by one. The square of their mean, which
    ``fisher_diag`` of optax computed for a batch (up to release 0.2.8), is another
    quantity: it is zero at a minimum.

    Args:
      J: a row per example, with N ≥ 1.

    Returns:
      A tree like the parameters, with real leaves of the same precision.

    Raises:
      TypeError: ``J`` is not a ``Jacobian``.
      ValueError: it does not have one row per example, or N = 0.

    Source: Kunstner et al., "Limitations of the empirical Fisher approximation", 2019.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> from pytree_grads.statistics import fisher_diagonal
    >>> f = lambda p, x: jnp.dot(p["w"], x)
    >>> J = jacobian(f)({"w": jnp.zeros(2)}, jnp.array([[3.0, 4.0], [5.0, -4.0]]))
    >>> fisher_diagonal(J)
    {'w': Array([17., 16.], dtype=float32)}
    """
    count = _check(J, at_least=1)
    return jax.tree.map(lambda x: x / count, J.square_sum())


def sampled_fisher_diagonal(
    logits: Callable[..., Any], key: Any, *, num_samples: int = 1
) -> Callable[..., Any]:
    """The diagonal of the Fisher matrix, with labels drawn from the model.

    It is an unbiased estimate of the mean over examples of E ∇log p(y)², with y drawn
    from the softmax of the logits. The true labels do not enter.

    Args:
      logits: a function ``logits(params, *example)`` of one example that returns an
        array (C,) of scores.
      key: one PRNG key.
      num_samples: labels for each example, an int ≥ 1; static. Samples are drawn one
        after the other, so the memory is that of one.

    Returns:
      A function of ``params`` and a batch, stacked along axis 0. It returns a tree like
      the parameters, with real leaves of the same precision.

    Raises:
      TypeError: ``logits`` is not callable, ``key`` is not a PRNG key, or
        ``num_samples`` is not an int.
      ValueError: ``num_samples`` < 1, there is no example, or the logits of an example
        do not have one axis.

    Source: Kunstner et al., "Limitations of the empirical Fisher approximation", 2019.

    >>> import jax, jax.numpy as jnp
    >>> from pytree_grads.statistics import sampled_fisher_diagonal
    >>> logits = lambda p, x: p * x
    >>> fisher = sampled_fisher_diagonal(logits, jax.random.key(0), num_samples=4)
    >>> fisher(jnp.zeros(2), jnp.ones(8))
    Array([0.25, 0.25], dtype=float32)
    """
    _check_sampling(logits, key, num_samples)

    def surprise(params: Any, label: jax.Array, example: Any) -> jax.Array:
        return -jax.nn.log_softmax(logits(params, *example))[label]

    def of_batch(params: Any, *batch: Any) -> Any:
        if not batch:
            raise ValueError("pass a batch of examples after the parameters, got none")
        axes = (None, *(0 for _ in batch))
        scores = jax.vmap(logits, axes)(params, *batch)
        if scores.ndim != 2:
            raise ValueError(
                "logits must return an array (C,) for one example, got shape "
                f"{scores.shape[1:]}"
            )

        def diagonal(key: jax.Array) -> Any:
            labels = jax.random.categorical(key, scores)
            return fisher_diagonal(jacobian(surprise)(params, labels, batch))

        def one(total: Any, key: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, diagonal(key)), None

        zero = optax.tree.zeros_like(jax.eval_shape(diagonal, key))
        total, _ = jax.lax.scan(one, zero, jax.random.split(key, num_samples))
        return jax.tree.map(lambda x: x / num_samples, total)

    return of_batch


def sampling_weights(norms: Any, *, uniform: Any = 0.1) -> tuple[jax.Array, jax.Array]:
    """Importance sampling by gradient norms: probabilities, and weights without bias.

    With probabilities pᵢ = (1 − u)·‖gᵢ‖/Σ‖gⱼ‖ + u/N and weights wᵢ = 1/(N pᵢ), the mean
    of wᵢgᵢ over drawn examples is an unbiased estimate of the mean gradient. With u = 0
    and up-to-date norms, its variance is the smallest possible. If the norms are older,
    a share u of uniform sampling bounds the weights by 1/u.

    Args:
      norms: (N,), not negative, as ``J.norms()``. With u > 0, old or inexact norms
        only raise the variance.
      uniform: the share u, from 0 to 1.

    Returns:
      ``(probabilities, weights)``, (N,) each, in float32 or wider. Probabilities are
      uniform if all norms are zero. An example of probability 0 has weight 0. Draw
      indices with ``jax.random.choice(key, N, (B,), p=probabilities)``; with J of the
      drawn batch, the estimate is ``J.weighted_sum(weights[indices] / B)``.

    Raises:
      TypeError: ``norms`` does not hold real floating-point numbers, or ``uniform`` is
        not a real scalar.
      ValueError: it does not have one axis of N ≥ 1 numbers, or one is negative; or
        ``uniform`` is not from 0 to 1.

    Source: Zhao and Zhang, "Stochastic optimization with importance sampling for
      regularized loss minimization", 2015; Katharopoulos and Fleuret, "Not all samples
      are created equal", 2018.

    >>> import jax.numpy as jnp
    >>> from pytree_grads.statistics import sampling_weights
    >>> probabilities, weights = sampling_weights(jnp.array([1.0, 3.0]), uniform=0.0)
    >>> print(probabilities, probabilities * weights)
    [0.25 0.75] [0.5 0.5]
    """
    norms = jnp.asarray(norms)
    if not jnp.issubdtype(norms.dtype, jnp.floating):
        raise TypeError(
            f"norms must hold real floating-point numbers, got {norms.dtype}: use "
            "J.norms()"
        )
    if norms.ndim != 1 or not norms.size:
        raise ValueError(f"norms must have shape (N,) with N ≥ 1, got {norms.shape}")
    if not isinstance(norms, Tracer) and bool(jnp.any(norms < 0)):
        raise ValueError(f"norms must not be negative, the smallest is {norms.min()}")
    part = _fraction(uniform).astype(_wide(norms).dtype)
    # The largest first, so that no sum overflows.
    largest = jnp.max(norms)
    relative = _wide(norms) / _wide(jnp.where(largest > 0, largest, 1))
    total, count = jnp.sum(relative), len(norms)
    shares = jnp.where(
        total == 0, 1 / count, relative / jnp.where(total == 0, 1, total)
    )
    probabilities = (1 - part) * shares + part / count
    safe = jnp.where(probabilities == 0, 1, probabilities)
    return probabilities, jnp.where(probabilities == 0, 0, 1 / (count * safe))


def _fraction(uniform: Any) -> jax.Array:
    """A user's part of uniform sampling."""
    found = uniform if isinstance(uniform, jax.Array) else np.asarray(uniform)
    kinds = jnp.floating, jnp.integer
    if found.shape or not any(jnp.issubdtype(found.dtype, kind) for kind in kinds):
        raise TypeError(f"uniform must be a real scalar, got {uniform!r}")
    if not isinstance(found, Tracer) and not 0 <= found <= 1:
        raise ValueError(f"uniform must be from 0 to 1, got {uniform}")
    return jnp.asarray(found)


def _check_sampling(logits: Any, key: Any, num_samples: Any) -> None:
    if not callable(logits):
        raise TypeError(f"logits must be a function of one example, got {logits!r}")
    dtype, ndim = getattr(key, "dtype", None), np.ndim(key)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not ((typed and ndim == 0) or (dtype == jnp.uint32 and ndim == 1)):
        raise TypeError(f"key must be one PRNG key, as jax.random.key(0), got {key!r}")
    if isinstance(num_samples, bool) or not isinstance(num_samples, int):
        raise TypeError(f"num_samples must be an int, got {num_samples!r}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")


def _check(J: Any, at_least: int) -> int:
    """The number of rows of a J with one row per example."""
    if not isinstance(J, Jacobian):
        raise TypeError(
            f"J must be a Jacobian, as jacobian(f)(params, *batch) makes it, got "
            f"{type(J).__name__}"
        )
    if len(J.shape) != 2:
        raise ValueError(
            f"J must have one row per example, of shape (N, P), got {J.shape}: "
            "differentiate a function that returns one loss"
        )
    if len(J) < at_least:
        raise ValueError(f"J must have at least {at_least} examples, got {len(J)}")
    return len(J)


def _parts(
    second: jax.Array, first: jax.Array, count: int, unbiased: bool
) -> NoiseScale:
    """From the mean of squared norms, and the squared norm of the mean."""
    trace = (second - first) * count / (count - 1)
    return NoiseScale(trace, first - trace / count if unbiased else first)


def _by_label(labels: Any, tree: Any) -> dict[str, jax.Array]:
    """Sums of the scalars of a tree for each label, in the order of the labels."""
    try:
        spread = jax.tree.map(
            lambda label, part: jax.tree.map(lambda _: label, part), labels, tree
        )
    except ValueError as error:
        raise ValueError(
            "labels must be a prefix tree of the parameters, with a string for each "
            f"part: {error}"
        ) from error
    sums: dict[str, jax.Array] = {}
    for label, x in zip(jax.tree.leaves(spread), jax.tree.leaves(tree), strict=True):
        sums[label] = sums[label] + x if label in sums else x
    return sums


def _wide(x: jax.Array) -> jax.Array:
    return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def _square(x: jax.Array) -> jax.Array:
    """The squared absolute values, in float32 or wider."""
    wide = _wide(x)
    return jnp.real(wide * jnp.conj(wide))


def _squares(tree: Any) -> jax.Array:
    """The squared norm of a tree, in the widest of its dtypes, at least float32."""
    squares = [jnp.sum(_square(x)) for x in jax.tree.leaves(tree)]
    widest = max((x.dtype for x in squares), key=lambda dtype: dtype.itemsize)
    return jnp.sum(jnp.stack([x.astype(widest) for x in squares]))
