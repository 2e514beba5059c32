"""Patches terms: an image correlated with a cotangent, from convolutions."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._jax import xla
from ..._jax.compat import varying_zeros
from ..._trees.algebra import carried_dtype, common_dtype
from ..einsum import dot
from ..weighing import times, times_weights
from . import scales
from .by_row import ByRow
from .outer import Outer, repeated
from .protocol import NormCost, Shape, Squared


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right"],
    meta_fields=["padding", "offsets", "strides", "dilation", "precision"],
)
@dataclass(frozen=True)
class Patches(ByRow):
    """A row whose lines for offset o are Σₐₜ patch[a, o, t] right[a, t]ᵀ.

    The entries of a kernel are its offsets. The patch of offset o holds the pixels that
    this entry is multiplied by, one for each position t of the output. It begins at o
    times the strides, and goes on in steps of the dilation. Offsets and positions have
    a coordinate for each space axis. The left array holds the images, which are padded
    with zeros when they are needed.
    """

    left: jax.Array  # (B, A, *image, m)
    right: jax.Array  # (B, A, *T, n)
    padding: tuple[tuple[int, int, int], ...]  # of the image: low, high, interior
    offsets: Shape  # how many along each axis
    strides: Shape
    dilation: Shape
    precision: Any = None  # of sums over rows

    factor_names: ClassVar = ("left", "right")

    @property
    def shape(self) -> Shape:
        m, n = self.left.shape[-1], self.right.shape[-1]
        return (self.left.shape[0], prod(self.offsets) * m, n)

    @property
    def dtype(self) -> Any:
        return carried_dtype(self.right.dtype)

    @property
    def pair_count(self) -> int:
        """A * T: how many outer products add up to the lines of an offset."""
        return prod(self.right.shape[1:-1])

    @property
    def _steps(self) -> Shape:
        """T along each space axis."""
        return self.right.shape[2:-1]

    def describe(self) -> str:
        kernel = "x".join(map(str, self.offsets))
        m, n = self.left.shape[-1], self.right.shape[-1]
        return f"{repeated(self.left.shape[0])}patches {kernel} of {m}x{n}"

    # ------------------------------------------------------------------------------
    # One row, offset by offset

    @jax.jit
    def materialize(self) -> jax.Array:
        lines = self._over_offsets(lambda lines: lines)  # (O, B, m, n)
        return jnp.moveaxis(lines, 0, 1).reshape(self.shape)

    @property
    def row_cost(self) -> int:
        blocks, m, n = self.shape
        return 2 * blocks * self.pair_count * m * n

    def apply(self, v: jax.Array) -> jax.Array:
        image, right = self._image(), self._right()
        lines = v.reshape(*self._blocks, prod(self.offsets), -1, self.shape[-1])
        lines = jnp.moveaxis(lines, len(self._blocks), 0)  # (O, *B, m, n)

        def add(total: jax.Array, at: tuple[jax.Array, jax.Array]) -> Any:
            start, line = at
            product = self._dot("tm,mn->tn", self._patch(image, start), line)
            return total + product.astype(total.dtype), None

        zeros = varying_zeros(right.shape, v.dtype, self.left, right, v)
        total, _ = lax.scan(add, zeros, (self._starts(), lines))
        return jnp.sum(total * right.astype(v.dtype))

    def apply_own(self, v: jax.Array) -> jax.Array:
        return self.apply(v)

    def squared_norm(self) -> Squared:
        return _squared_norm(self)

    @property
    def norm_cost(self) -> NormCost:
        return NormCost("patches", self.row_cost + 2 * prod(self.shape))

    # ------------------------------------------------------------------------------
    # All rows

    def add_rows(
        self,
        onto: jax.Array | None,
        weights: jax.Array | None,
        axis: int,
        factor: float,
    ) -> jax.Array:
        right = self.right
        if weights is not None:
            right = times_weights(weights, right, axis)
        # Sum over rows as over the A images of one row: (B, N, A, ...) to (B, N*A, ...)
        left, right = (
            x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (self.left, right)
        )
        total = times(replace(self, left=left, right=right)._correlated(), factor)
        return total if onto is None else onto + total

    def _correlated(self) -> jax.Array:
        """The row, by one convolution, or offset by offset if there are blocks."""
        if self.shape[0] > 1:
            return self.materialize()
        dtype = common_dtype(self.left.dtype, self.right.dtype)
        lines = xla.correlate(
            self.left[0].astype(dtype),
            self.right[0].astype(dtype),
            padding=self.padding,
            strides=self.strides,
            dilation=self.dilation,
            precision=self.precision,
        )
        return lines.reshape(self.shape)

    # ------------------------------------------------------------------------------
    # Tiles

    @property
    def line_offsets(self) -> Shape:
        return self.offsets

    def lines_at(self, offset: jax.Array) -> Outer:
        start = self._starts()[offset]
        pair = self._patch(self._image(), start), self._right()  # (*B, A*T, m or n)
        left, right = (x.reshape(self.left.shape[0], *x.shape[-2:]) for x in pair)
        return Outer(left, right)

    # ------------------------------------------------------------------------------

    def _over_offsets(self, fun: Callable[[jax.Array], Any]) -> Any:
        """Map `fun(lines)` over offsets, one at a time; lines have shape (B, m, n)."""
        image, right = self._image(), self._right()

        def at(start: jax.Array) -> Any:
            lines = self._dot("tm,tn->mn", self._patch(image, start), right)
            return fun(lines.reshape(self.left.shape[0], *lines.shape[-2:]))

        return xla.in_turn(at, self._starts())

    def _starts(self) -> jax.Array:
        """Where the patch of each offset begins in the padded image: (O, axes)."""
        numbers = np.unravel_index(range(prod(self.offsets)), self.offsets)
        return jnp.asarray(np.stack(numbers, -1) * np.array(self.strides), "int32")

    @property
    def _blocks(self) -> Shape:
        """(B,), or () for one block."""
        return xla.without_ones(self.left.shape[:1])

    def _image(self) -> jax.Array:
        """The padded image: (*B, *A, *image, m), without B or A if they are 1."""
        lead = xla.without_ones(self.left.shape[:2])
        left = self.left.reshape(*lead, *self.left.shape[2:])
        config = [*[(0, 0, 0)] * len(lead), *self.padding, (0, 0, 0)]
        return lax.pad(left, jnp.zeros((), left.dtype), config)

    def _right(self) -> jax.Array:
        """The right array: (*B, A*T, n)."""
        return self.right.reshape(*self._blocks, self.pair_count, self.right.shape[-1])

    def _patch(self, image: jax.Array, start: jax.Array) -> jax.Array:
        """The patch of the image that begins at `start`: (*B, A*T, m)."""
        pairs = zip(self._steps, self.dilation, strict=True)
        spans = [(t - 1) * step + 1 for t, step in pairs]
        *lead, m = image.shape[: -len(spans) - 1] + image.shape[-1:]
        zero = jnp.zeros_like(start[0])
        starts = (*[zero] * len(lead), *start, zero)
        taken = lax.dynamic_slice(image, starts, (*lead, *spans, m))
        strides = (*[1] * len(lead), *self.dilation, 1)
        taken = lax.slice(taken, [0] * taken.ndim, taken.shape, strides)
        return taken.reshape(*self._blocks, self.pair_count, m)

    def _dot(self, spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
        """An einsum, mapped over blocks."""
        b = "b" * len(self._blocks)
        left, right, result = spec.replace("->", ",").split(",")
        return dot(f"{b}{left},{b}{right}->{b}{result}", x, y)


@jax.jit
def _squared_norm(term: Patches) -> Squared:
    return scales.combine(term._over_offsets(scales.squared_norm))
