"""Norms of rows in parts: numbers for each row, which are put together for all leaves at once.

A loop over one number for each row costs more time to compile than to run, so nothing is done to
these but at the end. Scales are what a factor is multiplied with, twice, before it is squared, for
no overflow or underflow on the way to a norm that is representable. They are constants to
derivatives. (Once would not do: the inverse of a large float is not a normal number.)

This is written in `lax`, for there is much of it, and `jnp` takes several times as long to trace.
What is called for every factor or leaf is a `jit` of its own, traced and lowered once for a shape.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from itertools import zip_longest
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._trees.algebra import common_dtype
from . import thresholds
from .einsum import times_rows_twice


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["squares", "scales", "absolute", "weights"],
    meta_fields=["leaves", "factors", "errors"],
)
@dataclass(frozen=True)
class Norms:
    """The norms of the rows of L leaves, in arrays of shape (*rows, L).

    A norm is sqrt(the product of squares) / (the product of scales)**2 * factor * the product of
    weights.

    Inner products of T > 1 pairs subtract, and lose the digits of a row whose parts nearly cancel:
    the squared norm is off by the order of eps times the sum of the `absolute` values of what it
    adds up, and by tiny for each. Where that is more than a thousandth of it, it is added.
    """

    squares: tuple[jax.Array, ...] = ()
    scales: tuple[jax.Array, ...] = ()
    absolute: tuple[jax.Array, ...] = ()  # one, or none
    weights: tuple[jax.Array, ...] = ()
    leaves: tuple[int, ...] = (0,)  # which these are
    factors: tuple[float, ...] = (1.0,)  # of each leaf
    errors: tuple[tuple[float, float], ...] = ((0.0, 0.0),)  # of each: relative to absolute, least

    @property
    def dtype(self) -> Any:
        """That of the norms; scales may have a wider one."""
        return (*self.squares, *self.weights)[0].dtype

    def scaled(self, weights: Sequence[jax.Array | None]) -> "Norms":
        """Those of rows times numbers of their own, for each leaf; None is one, for all."""
        own = [jnp.abs(x) for x in weights if x is not None]
        return replace(self, weights=(*self.weights, jnp.stack(own, -1))) if own else self

    def of(self, leaves: Collection[int]) -> "Norms":
        """Those of some of the leaves."""
        at = [k for k, leaf in enumerate(self.leaves) if leaf in leaves]
        if len(at) == len(self.leaves):
            return self
        some = jax.tree.map(lambda x: jnp.concatenate([x[..., k : k + 1] for k in at], -1), self)
        return replace(
            some,
            leaves=tuple(self.leaves[k] for k in at),
            factors=tuple(self.factors[k] for k in at),
            errors=tuple(self.errors[k] for k in at),
        )

    @property
    def excess(self) -> "Norms":
        """What the norms may be too large by, where the parts of a row nearly cancel."""
        if not self.absolute:
            nothing = jnp.zeros_like((*self.squares, *self.weights)[0])
            return replace(self, squares=(), scales=(), weights=(nothing,))
        square = 2 * self._rounding(self.absolute[0])  # its own, and what is added for it
        return replace(self, squares=(square, *self.squares[1:]), absolute=())

    def _rounding(self, absolute: jax.Array) -> jax.Array:
        """About the error of the squared norms, before scales."""
        relative, least = (_of_leaves(x, absolute) for x in zip(*self.errors, strict=True))
        return lax.add(lax.mul(absolute, relative), least)

    def value(self, dtype: Any) -> jax.Array:
        """The norms."""
        arrays = jax.tree.leaves(self)
        if arrays[0].shape[-1] == 1:  # an axis less: to compile, and for XLA's fusions on GPUs
            one = jax.tree.map(lambda x: lax.squeeze(x, (x.ndim - 1,)), self)
            return lax.expand_dims(one._value(dtype), (arrays[0].ndim - 1,))
        return self._value(dtype)

    def _value(self, dtype: Any) -> jax.Array:
        cast = partial(lax.convert_element_type, new_dtype=dtype)
        scales = [lax.integer_pow(cast(x), -1) for x in self.scales]
        parts = [reduce(lax.mul, scales)] if scales else []
        if self.squares:
            square, *others = map(cast, self.squares)
            for absolute in map(cast, self.absolute):
                square = not_too_small(square, self._rounding(absolute))
            # Between the two of its factors, for their square alone may be too small or too large,
            # and so may the product of the squares.
            parts = [*parts, *map(safe_sqrt, [square, *others]), *parts]
        value = reduce(lax.mul, [*parts, *map(cast, self.weights)])
        if any(x != 1 for x in self.factors):
            value = lax.mul(value, _of_leaves(self.factors, value))
        return value


def combined(norms: Sequence[Norms], leaves: Collection[int] | None = None) -> jax.Array:
    """The norms of rows from those of their leaves, or of some of these."""
    if leaves is not None:
        norms = [x.of(leaves) for x in norms if not set(x.leaves).isdisjoint(leaves)]
    dtype = common_dtype(*(x.dtype for x in jax.tree.leaves(norms)))
    found = common_dtype(*(x.dtype for x in norms))
    if len(norms) > thresholds.FEW_PARTS:
        norms = [_joined(norms, dtype)]
    lengths = [_of_all_leaves(x.value(dtype)) for x in norms]
    if len(lengths) > 1:
        scale = _scale(reduce(lax.max, lengths))
        squares = [lax.square(times_rows_twice(x, scale, 0)) for x in lengths]
        lengths = [_unscaled(reduce(lax.add, squares), scale)]
    return lax.convert_element_type(lengths[0], found)


def as_numbers(norms: Sequence[Norms]) -> Norms:
    """The same as a number for each row and leaf: of one form, however many rows there are."""
    dtype = common_dtype(*(x.dtype for x in jax.tree.leaves(norms)))
    found = common_dtype(*(x.dtype for x in norms))
    values = [x.value(dtype) for x in norms]
    leaves = [i for x in norms for i in x.leaves]
    columns = lax.concatenate(values, values[0].ndim - 1)[..., np.argsort(leaves)]
    return Norms(
        weights=(lax.convert_element_type(columns, found),),
        leaves=tuple(sorted(leaves)),
        factors=(1.0,) * len(leaves),
        errors=((0.0, 0.0),) * len(leaves),
    )


def _of_all_leaves(lengths: jax.Array) -> jax.Array:
    """The root of the sum of squares over the last axis."""
    last = lengths.ndim - 1
    if lengths.shape[last] == 1:
        return lax.squeeze(lengths, (last,))
    scale = _scale(lax.reduce_max(lengths, (last,)))
    squares = lax.square(times_rows_twice(lengths, scale, 0))
    return _unscaled(lax.reduce_sum(squares, (last,)), scale)


def _scale(largest: jax.Array) -> jax.Array:
    """What lengths are multiplied with, twice, before they are squared.

    (They are not divided by the largest, for XLA makes this a product with an inverse, which may be
    too small.)
    """
    largest = lax.stop_gradient(largest)
    return power(lax.max(largest, lax.full_like(largest, float(jnp.finfo(largest.dtype).tiny))))


def _unscaled(square: jax.Array, scale: jax.Array) -> jax.Array:
    return lax.div(lax.div(safe_sqrt(square), scale), scale)


def _joined(norms: Sequence[Norms], dtype: Any) -> Norms:
    """All norms as one."""
    shapes = [jax.tree.leaves(x)[0].shape for x in norms]

    def joined(name: str, fill: float = 1) -> tuple[jax.Array, ...]:
        columns = zip_longest(*(getattr(x, name) for x in norms))
        filled = (
            [
                lax.full(shape, fill, dtype) if x is None else lax.convert_element_type(x, dtype)
                for x, shape in zip(column, shapes, strict=True)
            ]
            for column in columns
        )
        return tuple(lax.concatenate(column, len(shapes[0]) - 1) for column in filled)

    return Norms(
        squares=joined("squares"),
        scales=joined("scales"),
        absolute=joined("absolute", fill=0),
        weights=joined("weights"),
        leaves=tuple(i for x in norms for i in x.leaves),
        factors=tuple(factor for x in norms for factor in x.factors),
        errors=tuple(error for x in norms for error in x.errors),
    )


def _of_leaves(numbers: Sequence[float], like: jax.Array) -> jax.Array:
    """A number for each leaf, for all rows."""
    if len(numbers) == 1:
        return lax.full_like(like, numbers[0])
    return jnp.broadcast_to(jnp.asarray(numbers, like.dtype), like.shape)


# --------------------------------------------------------------------------------------------------
# Numbers


@jax.jit
def power(size: jax.Array) -> jax.Array:
    """About 1 / the root of a positive normal number, or of zero: a power of two.

    Multiplied by it twice, the number is from 1 up to 4, or zero. It is made of operations that are
    cheap enough for XLA to make them where they are used.
    """
    limits = jnp.finfo(size.dtype)
    return _power_of_two(size, 1, ((3 * limits.maxexp - 1) << (limits.nmant - 1)) - 1)


@jax.jit
def root_of(square: jax.Array) -> jax.Array:
    """About 1 / the root of a norm, from its square: a power of two, so that it adds no rounding.

    Multiplied by it twice, the norm is from 1/2 to 2. A square that is too small is taken for the
    smallest: the square of every entry that is a normal number is in range then. One that is too
    large is that of a norm which may be no number itself, for it adds up many entries, though the
    other factor may make the norm of the row one.
    """
    limits = jnp.finfo(square.dtype)
    scale = _power_of_two(square, 2, (5 * limits.maxexp - 3) << (limits.nmant - 2))
    beyond = 2.0 ** -(limits.maxexp // 4 + 10)
    return lax.select(lax.is_finite(square), scale, lax.full_like(scale, beyond))


def inverse(power: jax.Array) -> jax.Array:
    """That of a normal power of two, exactly. XLA does not keep it, as it keeps quotients."""
    limits = jnp.finfo(power.dtype)
    bits = lax.bitcast_convert_type(power, f"int{limits.bits}")
    twice_one = lax.full_like(bits, (2 * limits.maxexp - 2) << limits.nmant)
    return lax.bitcast_convert_type(lax.sub(twice_one, bits), power.dtype)


def _power_of_two(x: jax.Array, halvings: int, start: int) -> jax.Array:
    """The power of two at or below the float with the bits `start` - (the bits of x >> halvings).

    The bits of x > 0 are about (log2(x) + bias) * 2**nmant, with bias = maxexp - 1: those of 1/√x
    are 3/2 of the bits of one, less half of those of x, and of 1/x**(1/4) 5/4 less a quarter. A
    `start` that is up to one exponent more sets which multiples of the next power are rounded down.
    """
    bits = lax.bitcast_convert_type(x, f"int{jnp.finfo(x.dtype).bits}")
    halved = lax.shift_right_arithmetic(bits, lax.full_like(bits, halvings))
    inverse = lax.sub(lax.full_like(bits, start), halved)
    exponent = np.array(np.inf, x.dtype).view(bits.dtype)  # the bits that hold it
    rounded = lax.bitwise_and(inverse, lax.full_like(bits, exponent))
    return lax.bitcast_convert_type(rounded, x.dtype)


def not_too_small(square: jax.Array, rounding: jax.Array) -> jax.Array:
    """A squared norm plus its rounding error, if that is of weight; see `Norms`."""
    is_small = lax.gt(rounding, lax.mul(square, lax.full_like(square, 1e-3)))
    more = lax.add(lax.max(square, lax.full_like(square, 0)), rounding)
    return lax.select(is_small, more, square)


@jax.jit
def safe_sqrt(x: jax.Array) -> jax.Array:
    """The square root of x, 0 where x is not positive, with derivative 0 there; keeps NaN."""
    zeros = lax.full_like(x, 0)
    idle = lax.le(x, zeros)
    root = lax.sqrt(lax.select(idle, lax.full_like(x, 1), x))
    return lax.select(idle, zeros, root)
