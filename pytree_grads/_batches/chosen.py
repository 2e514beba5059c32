"""Which examples, or outputs, are chosen: neighbours, or those at some indices."""

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from .._jax import sharding


@dataclass(frozen=True)
class Span:
    """The `size` entries from `start` on, which may be traced."""

    start: Any
    size: int
    of_outputs: bool = False

    def cut(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """The chosen entries of an array, along an axis."""
        return sharding.take(x, self.start, self.size, axis)


@dataclass(frozen=True)
class At:
    """The entries at some indices (k,), which may be traced, and lie in the range."""

    index: jax.Array
    of_outputs: bool = False

    @property
    def size(self) -> int:
        return self.index.shape[0]

    def cut(self, x: jax.Array, axis: int = 0) -> jax.Array:
        """The chosen entries of an array, along an axis."""
        return sharding.chosen(x, self.index, axis)


Chosen: TypeAlias = Span | At


def outputs_of(rows: Chosen, shape: tuple[int, ...]) -> Chosen:
    """The outputs that are chosen along the first axis of an array of some shape."""
    each = prod(shape[1:])
    if isinstance(rows, Span):
        return Span(rows.start * each, rows.size * each, of_outputs=True)
    behind = jnp.arange(each, dtype=rows.index.dtype)
    index = rows.index[:, None] * each + behind[None]
    return At(index.ravel(), of_outputs=True)
