"""What needs the entries of the gradients: these take stacked rows, not a Gramian."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import Jacobian
from . import _checks
from ._stateful import StatefulWeighting


def graddrop(rows: Any, key: Any) -> Any:
    """GradDrop: entry by entry, only gradients of one sign, drawn by their weight.

    In each entry, P = ½(1 + Σg/Σ|g|) is the probability that the positive parts are
    kept and the negative ones dropped; otherwise it is the other way round. The kept
    parts are added up.

    Args:
      rows: K gradients, stacked: a tree of real floating-point leaves (K, ...), as
        ``J.to_rows()``.
      key: one PRNG key, another at every step.

    Returns:
      The combined gradient: a tree like one row, in the dtypes of its leaves. An entry
      where all rows are zero is zero.

    Raises:
      TypeError: a leaf does not hold real floating-point numbers, or ``key`` is not one
        PRNG key.
      ValueError: the leaves do not all have the same first axis, or K = 0.

    Source: Chen et al., "Just pick a sign: optimizing deep multitask models with
      gradient sign dropout", 2020.

    >>> import jax, jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> rows = {"w": jnp.array([[1.0, 2.0], [3.0, 0.0]])}
    >>> print(weightings.graddrop(rows, jax.random.key(0))["w"])
    [4. 2.]
    """
    _count(rows)
    leaves, treedef = jax.tree.flatten(rows)
    keys = jax.random.split(_checks.one_key(key), len(leaves))
    dropped = [_drop(x, k) for x, k in zip(leaves, keys, strict=True)]
    return jax.tree.unflatten(treedef, dropped)


def trimmed_mean(rows: Any, num_trimmed: int) -> Any:
    """Entry by entry, the mean without the largest and the smallest values.

    Args:
      rows: K gradients, stacked: a tree of real floating-point leaves (K, ...), as
        ``J.to_rows()``.
      num_trimmed: how many values are left out at each end, an int ≥ 0 with
        2·num_trimmed < K; static.

    Returns:
      The combined gradient: a tree like one row, in the dtypes of its leaves.

    Raises:
      TypeError: a leaf does not hold real floating-point numbers, or ``num_trimmed`` is
        not an int.
      ValueError: the leaves do not all have the same first axis, K = 0, or nothing is
        left.

    Source: Yin et al., "Byzantine-robust distributed learning: towards optimal
      statistical rates", 2018.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import weightings
    >>> rows = jnp.array([[1.0], [2.0], [3.0], [90.0]])
    >>> print(weightings.trimmed_mean(rows, num_trimmed=1))
    [2.5]
    """
    count = _count(rows)
    trimmed = _checks.whole("num_trimmed", num_trimmed, low=0)
    if 2 * trimmed >= count:
        raise ValueError(
            f"num_trimmed = {trimmed} at each end leaves nothing of {count} rows"
        )

    def middle(x: jax.Array) -> jax.Array:
        kept = jnp.sort(x, axis=0)[trimmed : count - trimmed]
        return jnp.mean(kept, axis=0, dtype=_accumulation(x)).astype(x.dtype)

    return jax.tree.map(middle, rows)


def excess_mtl(step_size: Any) -> StatefulWeighting:
    """ExcessMTL: weights that grow with the estimated excess risk of each loss.

    The excess risk of loss i is estimated as Σ g²/√(Σₜ g²), over the entries of its
    gradient, with the sum of the squares of all steps so far in place of the Hessian.
    It is divided by its value at the first step; then wᵢ becomes
    wᵢ·exp(step_size·riskᵢ), and the weights are scaled so that they add up to K. The
    weights of the first step are 1.

    Args:
      step_size: a real scalar ≥ 0.

    Returns:
      A ``StatefulWeighting``: ``init(rows)`` makes the state, and ``update(rows,
      state)`` returns the weights, (K,), in float32, and the next state. ``rows`` are K
      gradients, stacked: a tree of real floating-point leaves (K, ...), as
      ``J.to_rows()``. The state holds as many numbers as the rows.

    Raises:
      TypeError: ``step_size`` is not a real scalar; from the two functions, a leaf does
        not hold real floating-point numbers.
      ValueError: ``step_size`` is negative; from the two functions, the leaves do not
        all have the same first axis, or K = 0; from ``update``, the rows are not like
        those of the state.

    Source: He et al., "Robust multi-task learning with excess risks", 2024.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> excess = weightings.excess_mtl(step_size=1.0)
    >>> rows = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    >>> weights, state = excess.update(rows, excess.init(rows))
    >>> weights, state = excess.update(rows * jnp.array([[1.0], [0.1]]), state)
    >>> print(np.asarray(weights).round(3))
    [1.335 0.665]
    """
    rate = _checks.number("step_size", step_size, low=0).astype(jnp.float32)

    def init(rows: Any) -> ExcessState:
        count = _count(rows)
        return ExcessState(
            jnp.ones(count, jnp.float32),
            jax.tree.map(lambda x: jnp.zeros(x.shape, _accumulation(x)), rows),
            jnp.zeros(count, jnp.float32),
        )

    def update(rows: Any, state: ExcessState) -> tuple[jax.Array, ExcessState]:
        _count(rows)
        shapes = jax.tree.map(jnp.shape, rows)
        known = jax.tree.map(jnp.shape, state.square_sums)
        if shapes != known:
            raise ValueError(
                f"the state is for rows of shapes {known}, got {shapes}: make the "
                "state with init(rows)"
            )
        return _excess(rows, state, rate)

    return StatefulWeighting(init, update)


class ExcessState(NamedTuple):
    """What ExcessMTL keeps."""

    weights: jax.Array  # (K,)
    square_sums: Any  # a tree like the rows
    first: jax.Array  # (K,), the risks at the first step; zero before it


@jax.jit
def _drop(x: jax.Array, key: jax.Array) -> jax.Array:
    wide = x.astype(_accumulation(x))
    size = jnp.sum(jnp.abs(wide), axis=0)
    purity = 0.5 * (1 + jnp.sum(wide, axis=0) / jnp.where(size > 0, size, 1))
    is_positive = jax.random.uniform(key, purity.shape, purity.dtype) < purity
    signed = jnp.where(is_positive[None], jnp.maximum(wide, 0), jnp.minimum(wide, 0))
    return jnp.sum(signed, axis=0).astype(x.dtype)


@jax.jit
def _excess(
    rows: Any, state: ExcessState, rate: jax.Array
) -> tuple[jax.Array, ExcessState]:
    wide = jax.tree.map(lambda x: x.astype(_accumulation(x)), rows)
    sums = jax.tree.map(lambda s, x: s + x**2, state.square_sums, wide)
    risks = jnp.zeros_like(state.first)
    for x, s in zip(jax.tree.leaves(wide), jax.tree.leaves(sums), strict=True):
        part = x**2 / jnp.sqrt(jnp.where(s > 0, s, 1))
        risks += jnp.sum(part, axis=tuple(range(1, x.ndim))).astype(risks.dtype)
    is_first = jnp.all(state.first == 0)
    first = jnp.where(is_first, risks, state.first)
    # As powers of e, of which the largest may be beyond all numbers.
    powers = jnp.log(state.weights) + rate * risks / jnp.where(first > 0, first, 1)
    scaled = len(powers) * jax.nn.softmax(powers)
    weights = jnp.where(is_first, state.weights, scaled)
    return weights, ExcessState(weights, sums, first)


def _accumulation(x: jax.Array) -> Any:
    return x.dtype if x.dtype.itemsize >= 4 else jnp.float32


def _count(rows: Any) -> int:
    """The number K of stacked rows."""
    if isinstance(rows, Jacobian):
        raise TypeError("rows must be stacked, got a Jacobian: write J.to_rows()")
    sizes = {}
    for path, x in jax.tree.leaves_with_path(rows):
        where = f"rows{jax.tree_util.keystr(path)}"
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"{where} must hold real floating-point numbers, got "
                f"{jnp.result_type(x)}: this weighting takes stacked rows, as "
                "J.to_rows() gives them"
            )
        if not jnp.ndim(x):
            raise ValueError(
                f"{where} is a scalar, and rows are stacked along a first axis, as "
                "J.to_rows() gives them"
            )
        sizes[where] = x.shape[0]
    if len(set(sizes.values())) != 1 or not min(sizes.values()):
        raise ValueError(
            f"all leaves of rows must have one first axis, of K > 0 rows, got {sizes}"
        )
    return next(iter(sizes.values()))
