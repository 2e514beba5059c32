"""Weighted sums of gradients that arrive one after another, divided once at the end."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.compat import is_outside_traces
from . import algebra
from .checks import PyTree, check_matching, describe, is_array

# What optax has for this keeps no weights and sums in the dtype of the gradient: a thousand ones in
# bfloat16 are 256 to `optax.microbatching` (its SUM, MEAN and RUNNING_MEAN accumulators), and
# `optax.MultiSteps` takes the mean of means. So nothing of it stands underneath.


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=["dtypes"]
)
@dataclass(frozen=True, eq=False)
class Accumulator:
    """A weighted sum of gradients, Σ w g, beside the sum of their weights, Σ w.

    The mean Σ w g / Σ w is divided once, at the end. The mean of means of uneven microbatches is
    another number, and not the one that is wanted: add each microbatch's mean gradient with what it
    is the mean of (examples, or tokens that no mask hides) as its weight.

    Both sums are carried in float32 or wider, in a pytree that crosses ``jax.jit`` and the carry of
    ``jax.lax.scan`` as it is. Every method is one compiled call. Two accumulators merge by addition
    of what they hold, so ``jax.lax.psum(accumulator, axis_name)`` merges those of many devices.
    (Inside ``jax.shard_map``, the carry of a scan has to vary as the gradients do, from the start
    on: ``jax.lax.pcast(accumulator, axis_name, to="varying")``.)

    Attributes:
      total: Σ w g, in the carried dtypes; a tree like the gradients.
      weight: Σ w, a real scalar. In float32 it counts without rounding to 2²⁴.
      dtypes: the dtypes of the gradients, leaf by leaf, which ``sum`` and ``mean`` return.

    =========================================  =====================================================
    case                                       result
    =========================================  =====================================================
    weight 0                                   the gradient is left out, whatever it holds: NaN too
    no gradient yet, or all weights 0          ``sum`` is zero, ``mean`` is NaN
    a leaf of dtype ``float0``                 stays ``float0``
    a negative weight                          subtracts
    the order of merging                       no weight is lost: sums differ by rounding alone, and
                                               not at all where they are representable
    =========================================  =====================================================

    >>> import jax.numpy as jnp
    >>> per_token = [{"w": jnp.array([1.0, 4.0])}, {"w": jnp.array([3.0, 0.0])}]  # two means,
    >>> accumulator = Accumulator.zeros_like(per_token[0])
    >>> for grads, tokens in zip(per_token, [300, 100]):  # of so many tokens each
    ...     accumulator = accumulator.add(grads, tokens)
    >>> print(accumulator.mean()["w"], accumulator.weight)
    [1.5 3. ] 400.0
    """

    total: PyTree
    weight: jax.Array
    dtypes: tuple[np.dtype, ...]

    @classmethod
    def zeros_like(cls, grads: PyTree) -> "Accumulator":
        """Nothing yet, for gradients like these, or like the parameters they belong to.

        Raises:
          TypeError: a leaf is not a real or complex floating-point array.
        """
        empty = algebra.call(_zeros_like, grads=grads)
        empty.__dict__["_is_start"] = is_outside_traces()
        return empty

    def add(self, grads: PyTree, weight: Any = 1) -> "Accumulator":
        """With one more gradient, multiplied by its weight: another accumulator.

        This one stays as it is. If it is the empty one of ``zeros_like``, its ``sum`` and ``mean``
        raise afterwards, outside ``jit``: the result has been thrown away, most likely.

        Args:
          grads: a tree like the others, in structure, shapes and dtypes.
          weight: a real scalar, traced: a new value does not compile again.

        Raises:
          TypeError: the weight is not a real number, or a leaf cannot be summed.
          ValueError: the weight is not a scalar, or the trees disagree.
        """
        if not (is_array(weight) or isinstance(weight, int | float | complex)):
            raise TypeError(f"argument weight must be a real scalar, got {describe(weight)}")
        meets = algebra.carried_reals(self.total, self.weight)
        weight = algebra.floating("argument weight", weight, meets)
        added = algebra.call(_added, self, weight, grads=grads)
        if self.__dict__.get("_is_start") and is_outside_traces():
            self.__dict__["_was_added_to"] = True
        return added

    def merge(self, other: "Accumulator") -> "Accumulator":
        """What both hold, as if all had been added to one.

        Raises:
          TypeError: the other is not an accumulator.
          ValueError: the trees disagree.
        """
        if not isinstance(other, Accumulator):
            raise TypeError(f"argument other must be an Accumulator, got {describe(other)}")
        return _merged(self, other)

    def sum(self) -> PyTree:
        """Σ w g, rounded once to the dtypes of the gradients."""
        self._check_not_forgotten()
        return _rounded(self, _undivided)

    def mean(self) -> PyTree:
        """Σ w g / Σ w, rounded once to the dtypes of the gradients; NaN if the weights sum to 0."""
        self._check_not_forgotten()
        return _rounded(self, _divided)

    def _check_not_forgotten(self) -> None:
        """Raise if this is still what ``zeros_like`` made, and something was added to it."""
        if self.__dict__.get("_was_added_to"):
            raise ValueError(
                "this accumulator is empty, though something was added to it: add returns another "
                "and leaves this one as it is, so write accumulator = accumulator.add(grads)"
            )

    def _declared(self) -> PyTree:
        """The shapes and dtypes of the gradients."""
        leaves, treedef = jax.tree.flatten(self.total)
        pairs = zip(leaves, self.dtypes, strict=True)
        return jax.tree.unflatten(treedef, [jax.ShapeDtypeStruct(x.shape, d) for x, d in pairs])


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
            f"argument weight must be a scalar, got {describe(weight)}: for gradients that are "
            "stacked, jacobian(...).weighted_sum(weights) or linear_combination(weights, grads)"
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
