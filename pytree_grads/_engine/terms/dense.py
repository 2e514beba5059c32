"""Dense terms: the row itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp

from ..._trees.algebra import carried_dtype
from ..scaling import safe_sqrt
from ..weighing import times, weighted_total
from . import scales
from .protocol import NormCost, Shape, Squared


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=[])
@dataclass(frozen=True)
class Dense:
    """The row itself."""

    value: jax.Array

    @property
    def is_dense(self) -> bool:
        return True

    @property
    def shape(self) -> Shape:
        return self.value.shape

    @property
    def dtype(self) -> Any:
        return carried_dtype(self.value.dtype)

    @property
    def pair_count(self) -> int:
        return 1

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        return (self.value,)

    @property
    def coefficients(self) -> tuple[()]:
        return ()

    def with_factors(self, factors: Sequence[jax.Array]) -> "Dense":
        (value,) = factors
        return Dense(value)

    def describe(self) -> str:
        return "dense"

    # ------------------------------------------------------------------------------

    def materialize(self) -> jax.Array:
        return self.value.astype(self.dtype)

    @property
    def row_size(self) -> int:
        return self.value.size

    @property
    def row_cost(self) -> int:
        return 0

    def apply(self, v: jax.Array) -> jax.Array:
        return jnp.sum(self.materialize() * v)

    def apply_own(self, v: jax.Array) -> jax.Array:
        return self.apply(v)

    @property
    def apply_cost(self) -> int:
        return 2 * self.value.size

    @property
    def shared_apply_cost(self) -> int:
        return self.apply_cost

    # ------------------------------------------------------------------------------

    @property
    def norm_is_product(self) -> bool:
        return True

    def squared_norm(self) -> Squared:
        return scales.squared_norm(self.value)

    @property
    def norm_cost(self) -> NormCost:
        return NormCost("squares", 2 * self.value.size)

    def near_one(self) -> tuple["Dense", jax.Array]:
        scale = scales.scale_of_largest(self.value)
        return Dense(scales.times_twice(self.value, scale)), scale

    def mass(self) -> jax.Array:
        return safe_sqrt(jnp.sum(jnp.abs(self.value) ** 2))

    # ------------------------------------------------------------------------------

    @property
    def has_squares(self) -> bool:
        return True

    @property
    def must_merge(self) -> bool:
        return False

    def merged(self) -> Self:
        return self

    def squared(self) -> "Dense":
        return Dense(scales.square(self.value))

    # ------------------------------------------------------------------------------

    @property
    def adds_in_place(self) -> bool:
        return False

    def add_rows(
        self,
        onto: jax.Array | None,
        weights: jax.Array | None,
        axis: int,
        factor: float,
    ) -> jax.Array:
        total = times(weighted_total(weights, self.value, axis=axis), factor)
        return total if onto is None else onto + total

    @property
    def sum_cost(self) -> int:
        # A sum of arrays with several axes is a product; see `weighted_total`.
        is_product = sum(n != 1 for n in self.shape) > 1
        return self.value.size * (2 if is_product else 1)

    # ------------------------------------------------------------------------------

    @property
    def form(self) -> None:
        return None

    @property
    def most_apart(self) -> int:
        return 1

    def joined(self, others: Sequence["Dense"]) -> "Dense":
        return Dense(sum((other.value for other in others), self.value))

    @property
    def line_offsets(self) -> None:
        return None

    def lines_at(self, offset: jax.Array) -> Any:
        return self
