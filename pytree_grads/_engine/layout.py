"""Layouts: how the operands of an equation become the factors of a term.

Each rule that makes a term has a layout, next to the rule. This file has what the
layouts share: their protocol, the axes in front of an operand, and the way in which one
operand becomes a factor.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.xla import arranged
from .._trees.algebra import carried_dtype
from .terms import Term
from .views import Shape, slice_length


@dataclass(frozen=True)
class Frame:
    """The axes in front of an operand's own: steps of the scans around it, then rows.

    `stacked` has an entry for each scan, the outermost first: whether its steps become
    blocks. Otherwise they add up. `rows` counts the row axes: none, N, or N and K.
    """

    stacked: tuple[bool, ...] = ()
    rows: int = 0

    @property
    def axes(self) -> int:
        return len(self.stacked) + self.rows

    @property
    def parted(self) -> tuple[list[int], range, list[int]]:
        """The axes of steps that become blocks, of rows, and of steps that add up."""
        outer = [i for i, stacked in enumerate(self.stacked) if stacked]
        added = [i for i, stacked in enumerate(self.stacked) if not stacked]
        return outer, range(len(self.stacked), self.axes), added


class Layout(Protocol):
    """How the operands of an equation become the factors of a term; hashable."""

    def __call__(self, operands: Sequence[jax.Array], frames: Sequence[Frame]) -> Term:
        """The term, from operands that have the axes of their frames in front."""
        ...

    def row_axes(self, *counts: int) -> tuple[int, ...]:
        """How many row axes the term's arrays have, given the operands' row axes."""
        ...

    @property
    def shape(self) -> Shape:
        """The shape of one row of the term: (B, m, n)."""
        ...

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many entries each array of the term has for one row."""
        ...


@dataclass(frozen=True)
class Side:
    """How one operand becomes a factor: sliced, then with its axes in three groups."""

    start: Shape
    limit: Shape
    strides: Shape
    blocks: Shape  # axes that become B
    steps: Shape  # axes that become T
    free: Shape  # axes that become m
    summed: Shape = ()  # axes to sum over, since the other factor repeats along them

    @property
    def sizes(self) -> Shape:
        """(B, T, m), not counting the steps of scans."""
        bounds = zip(self.start, self.limit, self.strides, strict=True)
        sizes = [
            1 if axis in self.summed else slice_length(*bound)
            for axis, bound in enumerate(bounds)
        ]
        groups = self.blocks, self.steps, self.free
        return tuple(prod(sizes[axis] for axis in group) for group in groups)

    def __call__(self, x: jax.Array, frame: Frame) -> jax.Array:
        """The factor (B, *rows, T, m), from an operand with the axes of a frame."""
        x = self._added_up(self._sliced(x, frame), frame)
        outer, rows, added = frame.parted
        blocks, steps, free = (
            [axis + frame.axes for axis in group]
            for group in (self.blocks, self.steps, self.free)
        )
        shape = (
            prod(x.shape[i] for i in outer + blocks),
            *(x.shape[i] for i in rows),
            prod(x.shape[i] for i in added + steps),
            prod(x.shape[i] for i in free),
        )
        return arranged(x, (*outer, *blocks, *rows, *added, *steps, *free), shape)

    def _sliced(self, x: jax.Array, frame: Frame) -> jax.Array:
        start = (0,) * frame.axes + self.start
        limit = x.shape[: frame.axes] + self.limit
        strides = (1,) * frame.axes + self.strides
        is_whole = limit == x.shape and not any(start) and all(s == 1 for s in strides)
        return x if is_whole else lax.slice(x, start, limit, strides)

    def _added_up(self, x: jax.Array, frame: Frame) -> jax.Array:
        if not self.summed:
            return x
        axes = tuple(axis + frame.axes for axis in self.summed)
        return jnp.sum(x, axes, carried_dtype(x.dtype), keepdims=True)


def whole_side(shape: Shape, steps: Iterable[int], free: Iterable[int]) -> Side:
    """The side of an operand that is taken whole, as one block."""
    zeros, ones = (0,) * len(shape), (1,) * len(shape)
    return Side(zeros, tuple(shape), ones, (), tuple(steps), tuple(free))
