"""Outer terms: sums of outer products, from dense layers for example."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..._jax import xla
from ..._trees.algebra import carried_dtype, common_dtype
from .. import thresholds
from ..einsum import dot
from ..scaling import safe_sqrt
from ..weighing import times, times_weights
from . import scales
from .by_row import ByRow
from .protocol import NormCost, Shape, Squared


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["left", "right"],
    meta_fields=["precision"],
)
@dataclass(frozen=True)
class Outer(ByRow):
    """A row whose block b is the sum over t of left[b, t] right[b, t]ᵀ."""

    left: jax.Array  # (B, T, m)
    right: jax.Array  # (B, T, n)
    precision: Any = None  # of sums over rows: the precision of the user's product

    factor_names: ClassVar = ("left", "right")

    @property
    def shape(self) -> Shape:
        return (self.left.shape[0], self.left.shape[-1], self.right.shape[-1])

    @property
    def dtype(self) -> Any:
        return carried_dtype(self.right.dtype)

    @property
    def pair_count(self) -> int:
        return self.left.shape[-2]

    def describe(self) -> str:
        blocks, m, n = self.shape
        steps = "" if self.pair_count == 1 else f", T={self.pair_count}"
        return f"{repeated(blocks)}outer {m}x{n}{steps}"

    # ------------------------------------------------------------------------------

    def materialize(self) -> jax.Array:
        return dot("btm,btn->bmn", self.left, self.right)

    @property
    def row_cost(self) -> int:
        blocks, m, n = self.shape
        return 2 * blocks * self.pair_count * m * n

    def apply(self, v: jax.Array) -> jax.Array:
        images = dot("btm,bmn->btn", self.left, v)
        return jnp.sum(images * self.right.astype(self.dtype))

    @property
    def shared_apply_cost(self) -> int:
        return self.row_cost + 2 * self.right.size

    # ------------------------------------------------------------------------------

    @property
    def norm_is_product(self) -> bool:
        return self.left.shape[0] == 1 and not has_many(self.pair_count)

    def squared_norm(self) -> Squared:
        """The sum over pairs t and s of (left_t . left_s) (right_t . right_s)."""
        unit, scale = self.near_one()
        lefts, rights = left_products(unit, unit), right_products(unit, unit)
        dtype = common_dtype(lefts.dtype, rights.dtype)
        lefts, rights = (lax.convert_element_type(x, dtype) for x in (lefts, rights))
        products = lax.mul(lefts, rights)  # (B, T, T)
        is_complex = jnp.iscomplexobj(products)
        square = lax.real(products) if is_complex else products
        square = lax.reduce_sum(square, (0, 1, 2))
        if not has_many(self.pair_count):
            return Squared(square, None, scale)
        absolute = lax.reduce_sum(lax.abs(products), (0, 1, 2))
        return Squared(square, absolute, scale)

    @property
    def norm_cost(self) -> NormCost:
        if self.norm_is_product:
            return NormCost("squares", 2 * (self.left.size + self.right.size))
        return NormCost("inner products", outer_cost(self, self))

    def near_one(self) -> tuple["Outer", jax.Array]:
        sizes = [scales.largest(x) for x in self.factors]
        own, scale = scales.pair_scales(*sizes)
        return self.with_factors(
            list(map(scales.times_twice, self.factors, own))
        ), scale

    def mass(self) -> jax.Array:
        left, right = (vector_norms(x) for x in self.factors)
        return jnp.sum(left * right)

    # ------------------------------------------------------------------------------

    @property
    def has_squares(self) -> bool:
        return not has_many(self.pair_count)

    def squared(self) -> "Outer":
        return Outer(scales.square(self.left), scales.square(self.right))

    # ------------------------------------------------------------------------------

    def add_rows(
        self,
        onto: jax.Array | None,
        weights: jax.Array | None,
        axis: int,
        factor: float,
    ) -> jax.Array:
        total = sum_of_outer_products(self.left, self.right, weights, self.precision)
        total = times(total, factor)
        return total if onto is None else onto + total

    # ------------------------------------------------------------------------------

    @property
    def form(self) -> Any:
        return Outer, self.left.dtype, self.right.dtype, self.precision

    @property
    def most_apart(self) -> int:
        return thresholds.current().apart

    def joined(self, others: Sequence["Outer"]) -> "Outer":
        terms = [self, *others]
        left = jnp.concatenate([x.left for x in terms], -2)
        right = jnp.concatenate([x.right for x in terms], -2)
        return Outer(left, right, self.precision)

    @property
    def line_offsets(self) -> Shape:
        return ()

    def lines_at(self, offset: jax.Array) -> "Outer":
        return self


# ------------------------------------------------------------------------------------
# One row


def repeated(blocks: int) -> str:
    """The beginning of a description: the number of blocks, if there are several."""
    return "" if blocks == 1 else f"{blocks} x "


def has_many(pair_count: Any) -> bool:
    """Whether T > 1; a symbolic T counts as many."""
    return not isinstance(pair_count, int) or pair_count > 1


def vector_norms(x: jax.Array) -> jax.Array:
    """The norms over the last axis."""
    return safe_sqrt(jnp.sum(jnp.abs(x) ** 2, axis=-1))


def left_products(x: Outer, y: Outer) -> jax.Array:
    """The inner products of the left vectors t of x and s of y: (B, T, S)."""
    return dot("btm,bsm->bts", conjugated(x.left), y.left)


def right_products(x: Any, y: Any) -> jax.Array:
    """The inner products of the right vectors t of x and s of y: (B, T, S)."""
    return dot("btn,bsn->bts", conjugated(x.right), y.right)


def conjugated(x: jax.Array) -> jax.Array:
    """The complex conjugate; no operation for real arrays."""
    return lax.conj(x) if jnp.iscomplexobj(x) else x


def outer_cost(x: Outer, y: Outer) -> int:
    """Multiplications and additions of the inner products of all pairs."""
    blocks, m, n = x.shape
    return 2 * blocks * x.pair_count * y.pair_count * (m + n)


# ------------------------------------------------------------------------------------
# All rows


def sum_of_outer_products(
    left: jax.Array, right: jax.Array, weights: jax.Array | None, precision: Any
) -> jax.Array:
    """Sum the rows: Σₙ wₙ Σₜ leftₙₜ rightₙₜᵀ in each block.

    Args:
      left: (B, N, T, m), the left vectors.
      right: (B, N, T, n), the right vectors.
      weights: (N,), or None for ones.
      precision: of the contraction: the precision of the user's product.

    Returns:
      An array (B, m, n).
    """
    if weights is not None:
        if _weighs_left(left, right):
            left = times_weights(weights, left, 1)
        else:
            right = times_weights(weights, right, 1)
    left, right = map(xla.merge_contracted, (left, right))  # (B, N*T, m), (B, N*T, n)
    if left.shape[0] != 1:
        return dot("bzm,bzn->bmn", left, right, precision=precision)
    left, right = (lax.squeeze(x, (0,)) for x in (left, right))
    if _is_narrow(left, right):
        dtype = common_dtype(left.dtype, right.dtype)
        if left.dtype != right.dtype:
            left, right = (x.astype(dtype) for x in (left, right))
        total = xla.narrow_product(left, right, precision=precision, dtype=dtype)
    else:
        total = dot("zm,zn->mn", left, right, precision=precision)
    return lax.expand_dims(total, (0,))


def _weighs_left(left: jax.Array, right: jax.Array) -> bool:
    """Whether the weights multiply the left vectors, which are much shorter.

    If each row has one pair, and the lengths are similar, the weights multiply the
    right vectors. The sum for the bias of the same layer needs that product as well.
    """
    times_as_long = thresholds.current().shared if left.shape[2] == 1 else 1
    return thresholds.exceeds(right.shape[-1], left.shape[-1] * times_as_long)


def _is_narrow(left: jax.Array, right: jax.Array) -> bool:
    """Whether (z, m) and (z, n) are better multiplied by `xla.narrow_product`."""
    (z, m), n = left.shape, right.shape[-1]
    most = min(thresholds.current().narrow, m // thresholds.current().fewer)
    is_long = not thresholds.exceeds(n, most) and thresholds.exceeds(
        z // thresholds.current().fewer, n - 1
    )
    return is_long and thresholds.exceeds(
        z * m * n, thresholds.current().large_narrow - 1
    )
