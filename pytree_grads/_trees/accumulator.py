"""Weighted sums of gradients that arrive one after another, divided once at the end."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.compat import is_outside_traces
from . import algebra
from .checks import PyTree, check_matching, describe, is_array

# Nothing of optax is used here. Its accumulators keep no weights and sum in the dtype
# of the gradient: to `optax.microbatching` a thousand ones in bfloat16 are 256, and
# `optax.MultiSteps` takes the mean of means.


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["total", "weight"],
    meta_fields=["dtypes"],
)
@dataclass(frozen=True, eq=False)
class Accumulator:
    """The weighted sum of gradients, Σ w g, and the sum of their weights, Σ w.

    The mean Σ w g / Σ w is divided once, at the end. For uneven microbatches it differs
    from the mean of their means. Add the mean gradient of each microbatch, and give as
    its weight the number that it is the mean of: examples, or tokens that are not
    masked.

    Both sums are carried in the accumulation dtype: float32, or wider where a leaf is.
    An accumulator is a pytree, so it crosses ``jax.jit`` and the carry of
    ``jax.lax.scan`` without rounding. Every method is one compiled call. Two
    accumulators merge by addition, so ``jax.lax.psum(accumulator, axis_name)`` merges
    those of many devices. (Inside ``jax.shard_map``, the carry of a scan must vary over
    devices from the start, as the gradients do: ``jax.lax.pcast(accumulator, axis_name,
    to="varying")``.)

    Attributes:
      total: Σ w g, a tree like the gradients, in the accumulation dtypes.
      weight: Σ w, a real scalar of shape (). In float32 it counts to 2²⁴ without
          rounding.
      dtypes: the dtypes of the gradients, leaf by leaf, which ``sum`` and ``mean``
          return.

    =============================  =====================================================
    case                           result
    =============================  =====================================================
    weight 0                       the gradient is left out, even if it holds a NaN
    no gradient, or all weights 0  ``sum`` is zero, ``mean`` is NaN
    a leaf of dtype ``float0``     stays ``float0``
    a negative weight              subtracts
    another order of merging       differs by rounding at most
    =============================  =====================================================

    >>> import jax.numpy as jnp
    >>> per_token = [{"w": jnp.array([1.0, 4.0])}, {"w": jnp.array([3.0, 0.0])}]
    >>> accumulator = Accumulator.zeros_like(per_token[0])
    >>> for grads, tokens in zip(per_token, [300, 100]):
    ...     accumulator = accumulator.add(grads, tokens)
    >>> print(accumulator.mean()["w"], accumulator.weight)
    [1.5 3. ] 400.0
    """

    total: PyTree
    weight: jax.Array
    dtypes: tuple[np.dtype, ...]

    @classmethod
    def zeros_like(cls, grads: PyTree) -> "Accumulator":
        """An empty accumulator.

        Args:
          grads: a tree like the gradients to come, or like their parameters: real or
            complex floating-point arrays of any shapes. Its values are not read.

        Returns:
          An ``Accumulator`` whose ``total`` and ``weight`` are zero.

        Raises:
          TypeError: a leaf is not a real or complex floating-point array.

        >>> import jax.numpy as jnp
        >>> empty = Accumulator.zeros_like({"w": jnp.ones(2, jnp.bfloat16)})
        >>> print(empty.total["w"].dtype, empty.sum()["w"].dtype, empty.weight)
        float32 bfloat16 0.0
        """
        empty = algebra.call(_zeros_like, grads=grads)
        empty.__dict__["_is_start"] = is_outside_traces()
        return empty

    def add(self, grads: PyTree, weight: Any = 1) -> "Accumulator":
        """Add a gradient with its weight.

        Args:
          grads: a tree with the structure, shapes and dtypes of the others.
          weight: a real scalar, shape (). It is traced, so a new value does not compile
              again.

        Returns:
          Another accumulator. This one does not change.

        Raises:
          TypeError: the weight is not a real number, or a leaf cannot be summed.
          ValueError: the weight is not a scalar, or the trees disagree. Later, by
            ``sum`` and ``mean`` of an accumulator from ``zeros_like`` outside ``jit``:
            something was added to it, so the result of ``add`` was most likely thrown
            away.

        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([1.0, 2.0])}
        >>> accumulator = Accumulator.zeros_like(grads).add(grads).add(grads, 3)
        >>> print(accumulator.total["w"], accumulator.weight)
        [4. 8.] 4.0
        """
        if not (is_array(weight) or isinstance(weight, int | float | complex)):
            raise TypeError(
                f"argument weight must be a real scalar, got {describe(weight)}"
            )
        meets = algebra.carried_reals(self.total, self.weight)
        weight = algebra.floating("argument weight", weight, meets)
        added = algebra.call(_added, self, weight, grads=grads)
        if self.__dict__.get("_is_start") and is_outside_traces():
            self.__dict__["_was_added_to"] = True
        return added

    def merge(self, other: "Accumulator") -> "Accumulator":
        """Combine two accumulators.

        Args:
          other: an accumulator of trees with the same structure, shapes and dtypes.

        Returns:
          The accumulator to which all gradients of both had been added.

        Raises:
          TypeError: ``other`` is not an accumulator.
          ValueError: the trees disagree.

        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([1.0, 2.0])}
        >>> one = Accumulator.zeros_like(grads).add(grads, 2)
        >>> print(one.merge(one.add(grads)).weight)
        5.0
        """
        if not isinstance(other, Accumulator):
            raise TypeError(
                f"argument other must be an Accumulator, got {describe(other)}"
            )
        return _merged(self, other)

    def sum(self) -> PyTree:
        """The weighted sum Σ w g.

        Returns:
          A tree like the gradients, rounded once to their dtypes; zero if it is empty.

        Raises:
          ValueError: something was added to this empty accumulator: see ``add``.

        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([1.0, 2.0])}
        >>> print(Accumulator.zeros_like(grads).add(grads, 0.5).sum()["w"])
        [0.5 1. ]
        """
        self._check_not_forgotten()
        return _rounded(self, _undivided)

    def mean(self, default: PyTree = None) -> PyTree:
        """The weighted mean Σ w g / Σ w.

        Args:
          default: what the mean is if Σ w is 0, as in a window without a token: a real
            number for every entry, or a tree like the gradients.

        Returns:
          A tree like the gradients, rounded once to their dtypes; if Σ w is 0,
          ``default``, or NaN without one.

        Raises:
          TypeError: ``default`` is a number that is not real.
          ValueError: something was added to this empty accumulator: see ``add``; or
            ``default`` is a tree that is not like the gradients.

        >>> import jax.numpy as jnp
        >>> grads = {"w": jnp.array([1.0, 2.0])}
        >>> print(Accumulator.zeros_like(grads).add(grads, 0.5).mean()["w"])
        [1. 2.]
        >>> print(Accumulator.zeros_like(grads).mean(default=0.0)["w"])
        [0. 0.]
        """
        self._check_not_forgotten()
        if default is None:
            return _rounded(self, _divided)
        return _mean_or(self, _filled(default, self._declared()))

    def _check_not_forgotten(self) -> None:
        """Raise if something was added to this empty accumulator."""
        if self.__dict__.get("_was_added_to"):
            raise ValueError(
                "this accumulator is empty, though something was added to it: add "
                "returns another "
                "and leaves this one as it is, so write accumulator = "
                "accumulator.add(grads)"
            )

    def _declared(self) -> PyTree:
        """The shapes and dtypes of the gradients."""
        leaves, treedef = jax.tree.flatten(self.total)
        pairs = zip(leaves, self.dtypes, strict=True)
        return jax.tree.unflatten(
            treedef, [jax.ShapeDtypeStruct(x.shape, d) for x, d in pairs]
        )


@functools.partial(jax.jit, inline=True)
def _zeros_like(grads: PyTree) -> Accumulator:
    algebra.check_summable("grads", grads)
    total = algebra.map_inexact(
        lambda x: jax.lax.full_like(x, 0, dtype=algebra.carried_dtype(x.dtype)), grads
    )
    dtypes = tuple(leaf.dtype for leaf in jax.tree.leaves(grads))
    return Accumulator(total, jnp.zeros((), float), dtypes)


@functools.partial(jax.jit, inline=True)
def _added(accumulator: Accumulator, weight: jax.Array, grads: PyTree) -> Accumulator:
    if weight.shape:
        raise ValueError(
            f"argument weight must be a scalar, got {describe(weight)}: for gradients "
            "that are "
            "stacked, jacobian(...).weighted_sum(weights) or "
            "linear_combination(weights, grads)"
        )
    if jnp.iscomplexobj(weight):
        raise TypeError(f"argument weight must be real, got {describe(weight)}")
    algebra.check_summable("grads", grads)
    check_matching(accumulator._declared(), grads, "total", "grads")
    weight = weight.astype(accumulator.weight.dtype)

    def add(total: jax.Array, grad: jax.Array) -> jax.Array:
        # Left out by selection: 0 * NaN is NaN.
        counted = jnp.where(weight == 0, jnp.zeros_like(grad), grad)
        return total + algebra.scale(weight, counted.astype(total.dtype))

    total = algebra.map_inexact(add, accumulator.total, grads)
    return Accumulator(total, accumulator.weight + weight, accumulator.dtypes)


@functools.partial(jax.jit, inline=True)
def _merged(left: Accumulator, right: Accumulator) -> Accumulator:
    check_matching(left._declared(), right._declared(), "self.total", "other.total")
    total = algebra.map_inexact(jnp.add, left.total, right.total)
    return Accumulator(total, left.weight + right.weight, left.dtypes)


def _filled(default: PyTree, like: PyTree) -> PyTree:
    """The default of a mean as a tree: given as one, or as a number."""
    if not jax.tree_util.all_leaves([default]) or np.ndim(default):
        check_matching(like, default, "total", "default")
        return default
    meets = algebra.carried_reals(like)
    number = jnp.asarray(algebra.floating("default", default, meets, real=True))
    return jax.tree.map(lambda x: jnp.broadcast_to(number, x.shape), like)


@functools.partial(jax.jit, inline=True)
def _mean_or(accumulator: Accumulator, default: PyTree) -> PyTree:
    """The mean, or a tree if the sum of the weights is 0."""
    is_empty = accumulator.weight == 0
    # Never divided by 0: the derivative of what is not selected would be NaN.
    weight = jnp.where(is_empty, jnp.ones_like(accumulator.weight), accumulator.weight)
    mean = _rounded(replace(accumulator, weight=weight), _divided)
    return algebra.map_inexact(
        lambda x, y: jnp.where(is_empty, y.astype(x.dtype), x), mean, default
    )


def _undivided(total: jax.Array, weight: jax.Array) -> jax.Array:
    return total


def _divided(total: jax.Array, weight: jax.Array) -> jax.Array:
    return algebra.scale(weight, total, op=algebra.divide_by)


@functools.partial(jax.jit, inline=True, static_argnums=1)
def _rounded(accumulator: Accumulator, of: Callable[..., jax.Array]) -> PyTree:
    return algebra.map_inexact(
        lambda total, like: of(total, accumulator.weight).astype(like.dtype),
        accumulator.total,
        accumulator._declared(),
    )
