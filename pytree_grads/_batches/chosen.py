"""Which rows of a batch are chosen: neighbours, or those at some indices."""

from dataclasses import dataclass
from typing import Any, TypeAlias

import jax

from .._jax import sharding


@dataclass(frozen=True)
class Span:
    """The `size` rows from `start` on, which may be traced."""

    start: Any
    size: int

    def cut(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """The chosen rows of an array of all rows."""
        return sharding.take(x, self.start, self.size, axis)


@dataclass(frozen=True)
class At:
    """The rows at some indices (k,), which may be traced, and lie in the range."""

    index: jax.Array

    @property
    def size(self) -> int:
        return self.index.shape[0]

    def cut(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """The chosen rows of an array of all rows."""
        return sharding.chosen(x, self.index, axis)


Chosen: TypeAlias = Span | At
