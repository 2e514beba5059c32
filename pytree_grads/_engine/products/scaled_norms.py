"""Norms of rows as scaled squares, which are combined over all leaves at the end.

A loop over one number per row takes longer to compile than to run. So the squares and
scales of leaves stay separate until the norms are needed.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import common_dtype
from .. import thresholds
from ..einsum import times_rows_twice
from ..scaling import not_too_small, power, safe_sqrt


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["squares", "scales", "absolute", "weights"],
    meta_fields=["leaves", "factors", "errors"],
)
@dataclass(frozen=True)
class Norms:
    """The norms of the rows of L leaves, in arrays of shape (*rows, L).

    A norm is sqrt(prod(squares)) / prod(scales)**2 * factor * prod(weights).

    The inner products of T > 1 pairs may have both signs. If the parts of a row nearly
    cancel, its squared norm loses digits. Its error is about eps times `absolute`, the
    sum of the absolute values of the summands, plus tiny for each summand. If the error
    exceeds a thousandth of the squared norm, it is added. So a norm may be too large,
    but never too small.
    """

    squares: tuple[jax.Array, ...] = ()
    scales: tuple[jax.Array, ...] = ()
    absolute: tuple[jax.Array, ...] = ()  # one array, or none
    weights: tuple[jax.Array, ...] = ()
    leaves: tuple[int, ...] = (0,)  # the numbers of the leaves
    factors: tuple[float, ...] = (1.0,)  # of each leaf
    # For each leaf: the error relative to `absolute`, and the least error.
    errors: tuple[tuple[float, float], ...] = ((0.0, 0.0),)

    @property
    def dtype(self) -> Any:
        """The dtype of the norms; scales may be wider."""
        return (*self.squares, *self.weights)[0].dtype

    def scaled(self, weights: Sequence[jax.Array | None]) -> "Norms":
        """The norms of weighted rows; all leaves have weights, or none has."""
        own = [jnp.abs(x) for x in weights if x is not None]
        if not own:
            return self
        return replace(self, weights=(*self.weights, jnp.stack(own, -1)))

    def of(self, leaves: Collection[int]) -> "Norms":
        """The norms of some of the leaves."""
        at = [k for k, leaf in enumerate(self.leaves) if leaf in leaves]
        if len(at) == len(self.leaves):
            return self

        def columns(x: jax.Array) -> jax.Array:
            return jnp.concatenate([x[..., k : k + 1] for k in at], -1)

        return replace(
            jax.tree.map(columns, self),
            leaves=tuple(self.leaves[k] for k in at),
            factors=tuple(self.factors[k] for k in at),
            errors=tuple(self.errors[k] for k in at),
        )

    @property
    def excess(self) -> "Norms":
        """By how much norms may be too large, if the parts of a row nearly cancel."""
        if not self.absolute:
            nothing = jnp.zeros_like((*self.squares, *self.weights)[0])
            return replace(self, squares=(), scales=(), weights=(nothing,))
        # Twice: the error, and the same amount that is added for it.
        square = 2 * self._rounding(self.absolute[0])
        return replace(self, squares=(square, *self.squares[1:]), absolute=())

    def _rounding(self, absolute: jax.Array) -> jax.Array:
        """The approximate error of the squared norms, before scales."""
        columns = zip(*self.errors, strict=True)
        relative, least = (_for_each_leaf(x, absolute) for x in columns)
        return lax.add(lax.mul(absolute, relative), least)

    def value(self, dtype: Any) -> jax.Array:
        """The norms."""
        arrays = jax.tree.leaves(self)
        last = arrays[0].ndim - 1
        if arrays[0].shape[last] == 1:
            # Without the axis of leaves there is less to compile. With it, XLA for
            # GPUs failed to compile some fusions.
            one = jax.tree.map(lambda x: lax.squeeze(x, (x.ndim - 1,)), self)
            return lax.expand_dims(one._value(dtype), (last,))
        return self._value(dtype)

    def _value(self, dtype: Any) -> jax.Array:
        cast = partial(lax.convert_element_type, new_dtype=dtype)
        scales = [lax.integer_pow(cast(x), -1) for x in self.scales]
        numbers = [reduce(lax.mul, scales)] if scales else []
        if self.squares:
            square, *others = map(cast, self.squares)
            for absolute in map(cast, self.absolute):
                square = not_too_small(square, self._rounding(absolute))
            # The roots are multiplied between the two factors 1 / scale: the square of
            # 1 / scale may be out of range, and so may the product of the squares.
            roots = map(safe_sqrt, [square, *others])
            numbers = [*numbers, *roots, *numbers]
        value = reduce(lax.mul, [*numbers, *map(cast, self.weights)])
        if any(x != 1 for x in self.factors):
            value = lax.mul(value, _for_each_leaf(self.factors, value))
        return value


def combined(
    norms: Sequence[Norms], leaves: Collection[int] | None = None
) -> jax.Array:
    """The norms of rows over all leaves, or over some of the leaves."""
    if leaves is not None:
        norms = [x.of(leaves) for x in norms if not set(x.leaves).isdisjoint(leaves)]
    dtype = common_dtype(*(x.dtype for x in jax.tree.leaves(norms)))
    found = common_dtype(*(x.dtype for x in norms))
    if len(norms) > thresholds.MOST_IN_A_LOOP:
        norms = [_stacked(norms, dtype)]
    lengths = [_over_leaves(x.value(dtype)) for x in norms]
    if len(lengths) > 1:
        scale = _scale(reduce(lax.max, lengths))
        squares = [lax.square(times_rows_twice(x, scale, 0)) for x in lengths]
        lengths = [_unscaled(reduce(lax.add, squares), scale)]
    return lax.convert_element_type(lengths[0], found)


def _stacked(norms: Sequence[Norms], dtype: Any) -> Norms:
    """Norms of several groups of leaves as those of one group.

    A group that lacks an array gets one of ones, or of zeros for `absolute`.
    """
    shapes = [jax.tree.leaves(x)[0].shape for x in norms]

    def stacked(name: str, fill: float = 1) -> tuple[jax.Array, ...]:
        columns = []
        for column in zip_longest(*(getattr(x, name) for x in norms)):
            filled = [
                lax.full(shape, fill, dtype)
                if x is None
                else lax.convert_element_type(x, dtype)
                for x, shape in zip(column, shapes, strict=True)
            ]
            columns.append(lax.concatenate(filled, len(shapes[0]) - 1))
        return tuple(columns)

    return Norms(
        squares=stacked("squares"),
        scales=stacked("scales"),
        absolute=stacked("absolute", fill=0),
        weights=stacked("weights"),
        leaves=tuple(i for x in norms for i in x.leaves),
        factors=tuple(factor for x in norms for factor in x.factors),
        errors=tuple(error for x in norms for error in x.errors),
    )


def _over_leaves(lengths: jax.Array) -> jax.Array:
    """The root of the sum of squares over the last axis."""
    last = lengths.ndim - 1
    if lengths.shape[last] == 1:
        return lax.squeeze(lengths, (last,))
    scale = _scale(lax.reduce_max(lengths, (last,)))
    squares = lax.square(times_rows_twice(lengths, scale, 0))
    return _unscaled(lax.reduce_sum(squares, (last,)), scale)


def _scale(largest: jax.Array) -> jax.Array:
    """A scale for norms, from the largest one.

    The norms are not divided by the largest. XLA would turn that into a product with
    its inverse, which may underflow.
    """
    largest = lax.stop_gradient(largest)
    tiny = lax.full_like(largest, float(jnp.finfo(largest.dtype).tiny))
    return power(lax.max(largest, tiny))


def _unscaled(square: jax.Array, scale: jax.Array) -> jax.Array:
    return lax.div(lax.div(safe_sqrt(square), scale), scale)


def _for_each_leaf(numbers: Sequence[float], like: jax.Array) -> jax.Array:
    """One number for each leaf, broadcast over rows."""
    if len(numbers) == 1:
        return lax.full_like(like, numbers[0])
    return jnp.broadcast_to(jnp.asarray(numbers, like.dtype), like.shape)
