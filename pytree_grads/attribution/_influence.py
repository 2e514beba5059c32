"""Influence functions: conjugate gradients on products with a curvature matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .. import Jacobian, Vector
from . import _checks


def influence(
    J_query: Jacobian,
    J_train: Jacobian,
    product: Callable[[Any], Any],
    *,
    damping: Any,
    tolerance: float | None = None,
    max_steps: int = 1000,
    batch_size: int | None = None,
) -> jax.Array:
    """The change of a query's loss when a training example is left out, to first order.

    With the matrix G of ``product``, the scores are J_query (G + λ)⁻¹ J_trainᵀ / N. At
    a minimum of the mean loss with the Hessian G + λ, leaving example n out moves the
    parameters by (G + λ)⁻¹ gₙ / N, up to O(1/N²). Without regularisation, the scores of
    a query add up to 0 there. Conjugate gradients solve the systems, so G is never
    built. Each query takes one product per step, and one ``J_train @ v``.

    Args:
      J_query: the gradients of the losses of Q queries.
      J_train: the gradients of the losses of all N training examples. If training has a
        penalty, each of these losses includes it.
      product: a function v ↦ G v of a tree like the parameters. G is symmetric and
        positive semi-definite, and belongs to the **mean** loss of the training
        examples: ``gauss_newton_product(outer, f)(params, *batch)`` with ``outer`` a
        mean, or ``fisher_product(f)(params, *batch)``.
      damping: λ ≥ 0, a real number. If training has a penalty λ‖p‖²/2 that ``product``
        does not include, pass this λ. If λ = 0 and G is singular, there is a solution
        only for a gradient in the range of G.
      tolerance: the residual at which a system counts as solved, relative to the norm
        of the query's gradient; by default 1e-5 in float32 and 1e-8 in float64.
      max_steps: the largest number of steps of conjugate gradients, an int ≥ 1.
      batch_size: how many queries are solved at a time; all of them by default.

    Returns:
      Scores (Q, N) in float32 or wider. Inside ``jax.jit``, the scores of a query whose
      system was not solved are NaN.

    Raises:
      TypeError: ``J_query`` or ``J_train`` is not a ``Jacobian``, ``product`` not a
        function, or a number of the wrong kind.
      ValueError: a Jacobian does not have one row per example; N = 0; a number is out
        of range; or, outside ``jax.jit``, a system was not solved, as can happen with a
        singular matrix and no damping.

    Complex parameters count as pairs of real ones.

    Source: Koh and Liang, "Understanding black-box predictions via influence
      functions", 2017; with Gauss-Newton products: Martens, 2020 (arXiv:1412.1193).

    >>> import jax.numpy as jnp
    >>> from pytree_grads import jacobian
    >>> from pytree_grads.attribution import influence
    >>> loss = lambda p, x: (p - x) ** 2 / 2
    >>> x = jnp.array([0.0, 1.0, 2.0, 5.0])
    >>> J = jacobian(loss)(x.mean(), x)
    >>> print(influence(J[:1], J, lambda v: v, damping=0.0))
    [[ 1.   0.5  0.  -1.5]]
    """
    _checks.one_row_per_example("J_query", J_query)
    _checks.one_row_per_example("J_train", J_train)
    if not callable(product):
        raise TypeError(
            "product must be a function of a tree v, as gauss_newton_product(outer, f)"
            f"(params, *batch) returns it, got {product!r}"
        )
    damping = _checks.number("damping", damping, low=0.0)
    max_steps = _checks.whole("max_steps", max_steps, low=1)
    queries, count = len(J_query), len(J_train)
    if batch_size is not None:
        batch_size = _checks.whole("batch_size", batch_size, low=1)
    if not count:
        raise ValueError("J_train must have at least one example")

    if not queries:
        return jnp.zeros((0, count), jax.eval_shape(J_train.norms).dtype)

    def one(query: jax.Array) -> tuple[jax.Array, jax.Array]:
        row = J_query[query[None]].sum()
        solution = _solve(product, damping, row, tolerance, max_steps)
        return J_train @ solution.tree / count, solution.residual

    at_once = min(batch_size or queries, queries) or None
    scores, residuals = jax.lax.map(one, jnp.arange(queries), batch_size=at_once)
    limit = _limit(tolerance, residuals.dtype)
    if isinstance(residuals, Tracer):
        return jnp.where((residuals <= limit)[:, None], scores, jnp.nan)
    _check_solved(residuals, limit, damping, max_steps)
    return scores


def _check_solved(
    residuals: jax.Array, limit: float, damping: Any, max_steps: int
) -> None:
    """Raise unless all systems are solved, and say what may help."""
    failed = [i for i, x in enumerate(residuals.tolist()) if not x <= limit]
    if failed:
        zero = " (a matrix without damping may be singular)" if damping == 0 else ""
        raise ValueError(
            f"the systems of queries {failed[:8]} were not solved in {max_steps} "
            f"steps: the relative residual of the first is {residuals[failed[0]]:.1e}, "
            f"above {limit:.0e}. Give a larger damping than {damping}{zero}, a larger "
            "tolerance, or a larger max_steps"
        )


def _limit(tolerance: float | None, dtype: Any) -> float:
    if tolerance is None:
        return 1e-8 if dtype == jnp.float64 else 1e-5
    return float(_checks.number("tolerance", tolerance, low=0.0))


class _Solution(NamedTuple):
    tree: Any
    residual: jax.Array  # relative to the right-hand side


class _State(NamedTuple):
    """Conjugate gradients between two steps."""

    x: Vector
    residual: Vector
    direction: Vector
    square: jax.Array  # of the residual
    best: Vector  # the x with the smallest residual
    least: jax.Array  # the square of that
    step: jax.Array


def _solve(
    product: Callable[[Any], Any],
    damping: Any,
    row: Any,
    tolerance: float | None,
    max_steps: int,
) -> _Solution:
    """Solve (G + λ) x = row by conjugate gradients from zero.

    Where rounding, or a matrix without a solution, keeps the residual from falling, it
    grows in the end: the best x counts. The residual that is reported is computed from
    that x, and is not the one that the recursion carries.
    """
    # A gradient of jax.grad is the conjugate of the direction that it stands for.
    b = Vector(jax.tree.map(jnp.conj, row))
    dtype = _dot(b, b).dtype
    damping = jnp.asarray(damping, dtype)

    def matrix(v: Vector) -> Vector:
        return Vector(jax.tree.map(jnp.conj, product(v.tree))) + damping * v

    goal = _dot(b, b) * jnp.asarray(_limit(tolerance, dtype) ** 2 / 4, dtype)

    def goes_on(state: _State) -> jax.Array:
        return (state.square > goal) & (state.step < max_steps)

    def advance(state: _State) -> _State:
        image = matrix(state.direction)
        curvature = _dot(state.direction, image)
        # A direction without curvature solves nothing: the step is 0, and the residual
        # stays, which the caller reports.
        safe = jnp.where(curvature > 0, curvature, 1)
        size = jnp.where(curvature > 0, state.square / safe, 0)
        residual = state.residual - size * image
        square = _dot(residual, residual)
        ratio = square / state.square
        direction = residual + ratio * state.direction
        x = state.x + size * state.direction
        is_better = square < state.least
        best = jax.tree.map(lambda a, b: jnp.where(is_better, a, b), x, state.best)
        least = jnp.minimum(square, state.least)
        return _State(x, residual, direction, square, best, least, state.step + 1)

    zero, square = 0.0 * b, _dot(b, b)
    start = _State(zero, b, b, square, zero, square, jnp.zeros((), jnp.int32))
    best = jax.lax.while_loop(goes_on, advance, start).best
    norm = b.norm()
    relative = (b - matrix(best)).norm() / jnp.where(norm > 0, norm, 1)
    return _Solution(best.tree, relative)


def _dot(u: Vector, v: Vector) -> jax.Array:
    """The inner product of real and imaginary parts."""
    return jnp.real(u @ v)
