"""Linear combinations of trees: K of them in one compiled call."""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from .._jax.sharding import in_auto, rest
from . import algebra
from .checks import PyTree, describe, is_array, is_float0, located

_NAME = "argument coefficients"


def linear_combination(coefficients: Any, trees: PyTree) -> PyTree:
    """The linear combination Σₖ cₖ tₖ of K trees, in one compiled call.

    The sum of a leaf is carried in its accumulation dtype (float32, or the leaf's own
    dtype if that is wider) and rounded once to the leaf's dtype. Coefficients never
    change the dtype of a leaf. They are traced, so a new value, or an int in place of a
    float, does not compile again. ``optax.tree.add_scale`` also adds two trees that are
    known to agree, in the dtype that JAX's promotion gives.

    Args:
      coefficients: K scalars, as a sequence or as an array of shape (K,); or a matrix
        of shape (M, K), for M combinations at once. Numbers of any real dtype are
        converted to the accumulation dtype.
      trees: a ``list`` or ``tuple`` of K trees; or one tree of any other kind, whose
        leaves are stacked along a leading axis of length K. (If a stacked tree is
        itself a list or a tuple, give it as ``Vector(tree)``; the result is a
        ``Vector``.)

    Returns:
      A tree like each of the K, with their dtypes. With a matrix, every leaf has a
      leading axis of length M.

    Raises:
      TypeError: a leaf is not a real or complex floating-point array, or a complex
        coefficient meets a real leaf.
      ValueError: the trees disagree in structure, shape or dtype, there are not K of
        them, or a coefficient is too large for the accumulation dtype.

    ===================================  ==============================================
    case                                 result
    ===================================  ==============================================
    a leaf of dtype ``float0``           stays ``float0``
    an integer, bool or PRNG-key leaf    TypeError that names the leaf
    a real coefficient, a complex leaf   both parts are scaled
    a zero coefficient, a NaN or inf     NaN, as in IEEE arithmetic
    K = 0                                ValueError for a sequence, zeros for a stack
    ===================================  ==============================================

    >>> import jax.numpy as jnp
    >>> g1, g2 = {"w": jnp.array([1.0, 2.0])}, {"w": jnp.array([10.0, 20.0])}
    >>> print(linear_combination([2, 0.5], [g1, g2])["w"])
    [ 7. 14.]
    >>> stacked = {"w": jnp.array([[1.0, 2.0], [10.0, 20.0]])}
    >>> print(linear_combination(jnp.array([[2.0, 0.5], [1.0, 1.0]]), stacked)["w"])
    [[ 7. 14.]
     [11. 22.]]
    """
    is_sequence = type(trees) in (list, tuple)
    is_leaf = jax.tree_util.all_leaves([trees]) and not is_array(trees)
    if (
        is_leaf and not is_sequence and isinstance(trees, Iterable)
    ):  # a generator, say, or a deque
        raise TypeError(
            "argument trees must be a list or a tuple of K trees, or one tree whose "
            "leaves are "
            f"stacked, got {describe(trees)}: give list(trees)"
        )
    coefficients = _as_coefficients(coefficients, algebra.carried_reals(trees))
    combine = _combine_sequence if is_sequence else _combine_stacked
    return algebra.call(combine, coefficients, trees=trees)


@functools.partial(jax.jit, inline=True)
def _combine_sequence(coefficients: Any, trees: Sequence[PyTree]) -> PyTree:
    if not trees:
        raise ValueError(
            "argument trees is empty: a combination of no trees has no structure to "
            "give zeros in"
        )
    algebra.check_all_matching("trees", trees)
    array = _coefficient_array(coefficients, len(trees))
    algebra.check_real_leaves(array, "trees[0]", trees[0], _NAME)
    columns = [
        jax.lax.index_in_dim(array, k, -1, keepdims=False) for k in range(len(trees))
    ]
    lead = array.shape[:-1]  # () or (M,)

    def combine(*leaves: Any) -> Any:
        if is_float0(leaves[0]):
            return np.zeros(lead + leaves[0].shape, leaves[0].dtype)
        total = None
        for column, leaf in zip(columns, algebra.carry(leaves), strict=True):
            if lead:  # (M, 1, ...) times (1, ...)
                column, leaf = column.reshape(lead + (1,) * leaf.ndim), leaf[None]
            term = algebra.scale(column, leaf)
            total = term if total is None else total + term
        assert total is not None
        return total.astype(leaves[0].dtype)

    return jax.tree.map(combine, *trees)


@functools.partial(jax.jit, inline=True)
def _combine_stacked(coefficients: Any, trees: PyTree) -> PyTree:
    algebra.check_summable("trees", trees)
    array = _coefficient_array(coefficients, None)
    algebra.check_real_leaves(array, "trees", trees, _NAME)

    def combine(path: Any, leaf: Any) -> Any:
        if leaf.ndim == 0 or leaf.shape[0] != array.shape[-1]:
            raise ValueError(
                f"{located('trees', path)} must be stacked on a leading axis of length "
                f"{array.shape[-1]}, one entry per coefficient, got {describe(leaf)}"
            )
        if is_float0(leaf):
            return np.zeros(array.shape[:-1] + leaf.shape[1:], leaf.dtype)
        out = PartitionSpec(*[None] * (array.ndim - 1), *rest(leaf, 1))
        return in_auto(algebra.contract, out)(array, leaf).astype(leaf.dtype)

    return jax.tree.map_with_path(combine, trees)


def _as_coefficients(coefficients: Any, meets: set[np.dtype]) -> Any:
    """One floating array, or a list of them if some scalars are JAX arrays."""
    is_sequence = isinstance(coefficients, list | tuple)
    if is_sequence and any(isinstance(c, jax.Array) for c in coefficients):
        return [algebra.floating(_NAME, c, meets) for c in coefficients]
    return algebra.floating(_NAME, coefficients, meets)


def _coefficient_array(coefficients: Any, count: int | None) -> jax.Array:
    """The coefficients as an array (K,) or (M, K).

    ``count`` is K for a sequence of trees, and None for a stacked tree.
    """
    if isinstance(coefficients, list):
        for k, c in enumerate(coefficients):
            if c.shape:
                raise ValueError(
                    f"argument coefficients[{k}] must be a scalar, got {describe(c)}: "
                    "give a "
                    "matrix of coefficients as one array of shape (M, K)"
                )
        dtype = np.result_type(
            np.float32, *(algebra.widened(c.dtype) for c in coefficients)
        )
        coefficients = jnp.stack([c.astype(dtype) for c in coefficients])
    if coefficients.ndim not in (1, 2):
        raise ValueError(
            "argument coefficients must be K scalars, or an array of shape (K,) or (M, "
            "K), "
            f"got {describe(coefficients)}"
        )
    if count is not None and coefficients.shape[-1] != count:
        raise ValueError(
            f"argument coefficients holds {coefficients.shape[-1]} scalars per "
            "combination for "
            f"{count} trees, got {describe(coefficients)}"
        )
    return coefficients
