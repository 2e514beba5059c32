"""Windows: terms of convolutions, whose rows correlate an image with the cotangent of another."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._jax.compat import varying_zeros
from .._trees.algebra import common_dtype
from .einsum import dot
from .views import Shape


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right"],
    meta_fields=["padding", "offsets", "strides", "dilation", "precision"],
)
@dataclass(frozen=True)
class Windows:
    """Lines o of block b are the sum over a and t of image[b, a, window o, :] right[b, a, t, :].

    Window o has an entry for each t: it begins at o times the strides, and goes on in steps of the
    dilation. An offset and a position t have a coordinate for each axis of an image. The image is
    the left array, padded with zeros when it is needed.
    """

    left: jax.Array  # (B, A, *image, m)
    right: jax.Array  # (B, A, *T, n)
    padding: tuple[tuple[int, int, int], ...]  # of the image: low, high, interior
    offsets: Shape  # how many along each axis
    strides: Shape
    dilation: Shape
    precision: Any = None  # of sums over rows

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        return (self.left, self.right)

    @property
    def shape(self) -> Shape:
        return (self.left.shape[0], prod(self.offsets) * self.left.shape[-1], self.right.shape[-1])

    @property
    def steps(self) -> Shape:
        """T, along each axis."""
        return self.right.shape[2:-1]

    @property
    def pairs(self) -> int:
        return prod(self.right.shape[1:-1])

    def _starts(self) -> jax.Array:
        places = np.stack(np.unravel_index(range(prod(self.offsets)), self.offsets), -1)
        return jnp.asarray(places * np.array(self.strides), "int32")

    @property
    def _blocks(self) -> Shape:
        """(B,), or () for one block: XLA copies arrays with axes of size 1 before a loop."""
        return _but_ones(self.left.shape[:1])

    def _image(self) -> jax.Array:
        """The image for a loop: (*B, *A, *image, m), where B and A are left out if one."""
        left = self.left.reshape(*_but_ones(self.left.shape[:2]), *self.left.shape[2:])
        outer = left.ndim - len(self.padding) - 1
        config = [*[(0, 0, 0)] * outer, *self.padding, (0, 0, 0)]
        return lax.pad(left, jnp.zeros((), left.dtype), config)

    def _right(self) -> jax.Array:
        """The right array for a loop: (*B, A T, n)."""
        return self.right.reshape(*self._blocks, self.pairs, self.right.shape[-1])

    def _window(self, image: jax.Array, start: jax.Array) -> jax.Array:
        """The window of the image that begins somewhere: (*B, A T, m)."""
        spans = [(t - 1) * step + 1 for t, step in zip(self.steps, self.dilation, strict=True)]
        *lead, m = image.shape[: -len(spans) - 1] + image.shape[-1:]
        zero = jnp.zeros_like(start[0])
        starts = (*[zero] * len(lead), *start, zero)
        taken = lax.dynamic_slice(image, starts, (*lead, *spans, m))
        strides = (*[1] * len(lead), *self.dilation, 1)
        taken = lax.slice(taken, [0] * taken.ndim, taken.shape, strides)
        return taken.reshape(*self._blocks, self.pairs, m)

    def _dot(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """An einsum for every block."""
        b = "b" * len(self._blocks)
        left, right, result = spec.replace("->", ",").split(",")
        return dot(f"{b}{left},{b}{right}->{b}{result}", x, y)

    def at(self, o: jax.Array) -> tuple[jax.Array, jax.Array]:
        """The arrays whose outer products add up to the lines of window o: (B, A T, m or n)."""
        pair = self._window(self._image(), self._starts()[o]), self._right()
        left, right = (x.reshape(self.left.shape[0], *x.shape[-2:]) for x in pair)
        return left, right

    @jax.jit
    def materialize(self) -> jax.Array:
        """The row, one offset after the other: XLA on CPUs is slow at convolutions in groups."""
        lines = self.over_offsets(lambda lines: lines)
        return jnp.moveaxis(lines, 0, 1).reshape(self.shape)

    def over_offsets(self, fun: Callable[[jax.Array], Any]) -> Any:
        """`fun(lines)` for each offset, one of which is there at a time, stacked."""
        image, right = self._image(), self._right()

        def at(start: jax.Array) -> Any:
            lines = self._dot("tm,tn->mn", self._window(image, start), right)
            return fun(lines.reshape(self.left.shape[0], *lines.shape[-2:]))

        return lax.map(at, self._starts())

    def apply(self, v: jax.Array) -> jax.Array:
        """The sum of the products of a row's entries with those of v."""
        image, right = self._image(), self._right()
        lines = v.reshape(*self._blocks, prod(self.offsets), -1, self.shape[-1])
        lines = jnp.moveaxis(lines, len(self._blocks), 0)

        def add(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
            start, line = at
            product = self._dot("tm,mn->tn", self._window(image, start), line)
            return total + product.astype(total.dtype), None

        zeros = varying_zeros(right.shape, v.dtype, self.left, right, v)
        total, _ = lax.scan(add, zeros, (self._starts(), lines))
        return jnp.sum(total * right.astype(v.dtype))

    def summed(self) -> jax.Array:
        """The sum over rows, which both arrays have on their second axis."""
        arrays = [x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (self.left, self.right)]
        term = replace(self, left=arrays[0], right=arrays[1])
        if term.shape[0] > 1:
            return term.materialize()
        last = len(self.offsets) + 1
        numbers = lax.ConvDimensionNumbers(
            (last, *range(last)), (last, *range(last)), (last - 1, last, *range(last - 1))
        )
        dtype = common_dtype(self.left.dtype, self.right.dtype)
        lines = lax.conv_general_dilated(
            term.left[0].astype(dtype),
            term.right[0].astype(dtype),
            self.strides,
            # Not padded before: XLA on CPUs is up to three times as fast at some convolutions so.
            [(low, high) for low, high, _ in self.padding],
            lhs_dilation=[interior + 1 for *_, interior in self.padding],
            rhs_dilation=self.dilation,
            dimension_numbers=numbers,
            precision=self.precision,
        )
        return lines.reshape(term.shape)


def _but_ones(shape: Shape) -> Shape:
    return tuple(n for n in shape if n != 1)
