"""Weighed terms: outer products times an array that all rows share, entry by entry."""

from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import carried_dtype
from ..einsum import dot
from ..scaling import power
from ..weighing import times
from . import scales
from .by_row import ByRow
from .outer import (
    Outer,
    conjugated,
    has_many,
    repeated,
    sum_of_outer_products,
    vector_norms,
)
from .protocol import NormCost, Shape, Squared


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right", "weight"],
    meta_fields=["precision"],
)
@dataclass(frozen=True)
class Weighed(ByRow):
    """A row whose block b is weight[b] times the sum of left[b, t] right[b, t]ᵀ.

    The gradient of a masked weight has this form. A factor of length 1 repeats along
    its axis: the gradient of the columns' scales, spread over a weight.
    """

    left: jax.Array  # (B, T, m) or (B, T, 1)
    right: jax.Array  # (B, T, n) or (B, T, 1)
    weight: jax.Array  # (B, m, n), the same for all rows
    precision: Any = None

    factor_names: ClassVar = ("left", "right")
    coefficient_names: ClassVar = ("weight",)

    @property
    def shape(self) -> Shape:
        return self.weight.shape

    @property
    def dtype(self) -> Any:
        return carried_dtype(self.right.dtype)

    @property
    def pair_count(self) -> int:
        return self.left.shape[-2]

    @property
    def is_one_pair(self) -> bool:
        """Whether T = 1."""
        return not has_many(self.pair_count)

    def describe(self) -> str:
        blocks, m, n = self.shape
        steps = "" if self.is_one_pair else f", T={self.pair_count}"
        return f"{repeated(blocks)}outer {m}x{n}{steps}"

    # ------------------------------------------------------------------------------

    def materialize(self) -> jax.Array:
        return self.weight.astype(self.dtype) * dot(
            "btm,btn->bmn", self.left, self.right
        )

    @property
    def row_cost(self) -> int:
        lines, columns = self.left.shape[-1], self.right.shape[-1]
        made = 2 * self.left.shape[0] * self.pair_count * lines * columns
        return made + prod(self.shape)

    def apply(self, v: jax.Array) -> jax.Array:
        v = self._reduced(self.weight.astype(self.dtype) * v)
        images = dot("btm,bmn->btn", self.left, v)
        return jnp.sum(images * self.right.astype(self.dtype))

    def _reduced(self, v: jax.Array) -> jax.Array:
        """Sum an array (B, m, n) over the axes along which a factor repeats."""
        axes = (self.left.shape[-1], self.right.shape[-1])
        idle = tuple(i + 1 for i, size in enumerate(axes) if size != v.shape[i + 1])
        return jnp.sum(v, idle, keepdims=True) if idle else v

    @property
    def shared_apply_cost(self) -> int:
        return self.row_cost + 2 * self.right.size

    # ------------------------------------------------------------------------------

    def squared_norm(self) -> Squared:
        if not self.is_one_pair:
            return super().squared_norm()
        unit, scale = self.near_one()
        return Squared(jnp.real(inner(unit, unit)), None, scale)

    @property
    def norm_cost(self) -> NormCost:
        if not self.is_one_pair:
            return super().norm_cost
        return NormCost("squares", inner_cost(self, self))

    def near_one(self) -> tuple["Weighed", jax.Array]:
        pair, scale = Outer(self.left, self.right).near_one()
        # Not `scales.scale_of_largest`: a flat weight would be a copy.
        largest = jnp.max(jnp.abs(lax.stop_gradient(self.weight)), initial=0)
        own = power(largest.astype(scale.dtype))
        weight = scales.times_twice(self.weight.astype(scale.dtype), own)
        dtype = scale.dtype
        return (
            Weighed(pair.left, pair.right, weight, self.precision),
            scale * own.astype(dtype),
        )

    def mass(self) -> jax.Array:
        sizes = self.left.shape[-1], self.right.shape[-1]
        repeats = prod(
            size for size, own in zip(self.shape[1:], sizes, strict=True) if own != size
        )
        lengths = vector_norms(self.left) * vector_norms(self.right)
        largest = jnp.max(jnp.abs(self.weight), initial=0).astype(lengths.dtype)
        return jnp.sum(lengths) * largest * float(repeats) ** 0.5

    # ------------------------------------------------------------------------------

    @property
    def has_squares(self) -> bool:
        return self.is_one_pair

    def squared(self) -> "Weighed":
        return Weighed(*map(scales.square, (self.left, self.right, self.weight)))

    # ------------------------------------------------------------------------------

    def add_rows(
        self,
        onto: jax.Array | None,
        weights: jax.Array | None,
        axis: int,
        factor: float,
    ) -> jax.Array:
        total = sum_of_outer_products(self.left, self.right, weights, self.precision)
        total = times(total * self.weight.astype(total.dtype), factor)
        return total if onto is None else onto + total


def inner(x: Outer | Weighed, y: Outer | Weighed) -> jax.Array:
    """The inner product of two rows of one pair each; the first is conjugated."""
    left = conjugated(x.left.astype(x.dtype)) * y.left.astype(y.dtype)
    right = conjugated(x.right.astype(x.dtype)) * y.right.astype(y.dtype)
    weights = [z.weight.astype(z.dtype) for z in (x, y) if isinstance(z, Weighed)]
    weight = weights[0] if len(weights) == 1 else weights[0] * weights[1]
    return Weighed(left, right, weight).apply(jnp.ones((), weight.dtype))


def inner_cost(x: Outer | Weighed, y: Outer | Weighed) -> int:
    """Multiplications and additions of `inner`."""
    lines, columns = (
        max(one.shape[-1], two.shape[-1])
        for one, two in ((x.left, y.left), (x.right, y.right))
    )
    blocks = x.left.shape[0]
    products = 2 * blocks * lines * columns if min(lines, columns) > 1 else 0
    return products + 4 * blocks * (lines + columns)
