"""The defaults of the protocol: every product is computed from the row as an array."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, ClassVar, Self

import jax

from ..._jax import xla
from . import scales
from .dense import Dense
from .protocol import NormCost, Shape, Squared


class ByRow(ABC):
    """A kind of term that defines its shape, dtype and row; all else has defaults.

    Override the methods that have a cheaper form. If the row is linear in some arrays
    of the dataclass, name them in `factor_names`. Weights of rows then multiply these.
    Arrays that all rows share by construction are named in `coefficient_names`.
    """

    factor_names: ClassVar[tuple[str, ...]] = ()
    coefficient_names: ClassVar[tuple[str, ...]] = ()

    @property
    def is_dense(self) -> bool:
        return False

    @property
    @abstractmethod
    def shape(self) -> Shape: ...

    @property
    @abstractmethod
    def dtype(self) -> Any: ...

    @abstractmethod
    def materialize(self) -> jax.Array: ...

    @property
    def pair_count(self) -> int:
        return 1

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, name) for name in self.factor_names)

    @property
    def coefficients(self) -> tuple[jax.Array, ...]:
        return tuple(getattr(self, name) for name in self.coefficient_names)

    def with_factors(self, factors: Sequence[jax.Array]) -> Self:
        # `self` is a dataclass, although this abstract class is not.
        named = dict(zip(self.factor_names, factors, strict=True))
        return replace(self, **named)  # pyright: ignore[reportArgumentType]

    def describe(self) -> str:
        size = "x".join(map(str, self.shape))
        return f"{type(self).__name__.lower()} {size}"

    # ------------------------------------------------------------------------------

    @property
    def row_cost(self) -> int:
        return prod(self.shape)

    @property
    def row_size(self) -> int:
        return prod(self.shape)

    def apply(self, v: jax.Array) -> jax.Array:
        return self.apply_own(v)

    def apply_own(self, v: jax.Array) -> jax.Array:
        return xla.sum_of_products(self.materialize(), v)

    @property
    def apply_cost(self) -> int:
        return self.row_cost + 2 * prod(self.shape)

    @property
    def shared_apply_cost(self) -> int:
        return self.apply_cost

    # ------------------------------------------------------------------------------

    @property
    def norm_is_product(self) -> bool:
        return False

    def squared_norm(self) -> Squared:
        return scales.squared_norm(self.materialize())

    @property
    def norm_cost(self) -> NormCost:
        return NormCost("rows", self.row_cost + 2 * prod(self.shape))

    def near_one(self) -> tuple[Any, jax.Array]:
        return Dense(self.materialize()).near_one()

    def mass(self) -> jax.Array:
        return Dense(self.materialize()).mass()

    # ------------------------------------------------------------------------------

    @property
    def has_squares(self) -> bool:
        return False

    @property
    def must_merge(self) -> bool:
        return False

    def merged(self) -> Self:
        return self

    def squared(self) -> Any:
        return Dense(self.materialize()).squared()

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
        shared = {id(x) for x in self.coefficients}
        axes = jax.tree.map(lambda x: None if id(x) in shared else axis, self)
        rows = jax.vmap(type(self).materialize, in_axes=(axes,))(self)  # (N, *shape)
        return Dense(rows).add_rows(onto, weights, 0, factor)

    @property
    def sum_cost(self) -> int:
        return self.row_cost

    # ------------------------------------------------------------------------------

    @property
    def form(self) -> Any:
        return None

    @property
    def most_apart(self) -> int:
        return 1

    def joined(self, others: Sequence[Any]) -> Any:
        return Dense(self.materialize()).joined(
            [Dense(x.materialize()) for x in others]
        )

    @property
    def line_offsets(self) -> Shape | None:
        return None

    def lines_at(self, offset: jax.Array) -> Any:
        return None
