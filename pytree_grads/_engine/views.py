"""Views: the linear steps from a term to its gradient leaf, the same for all examples.

A view is a tuple of steps, applied in order. All steps except `Slice` preserve inner
products: they move entries or add zeros. So a norm can be taken before such a view.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.compat import abstract_like

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    shape: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.reshape(x, self.shape)

    def shape_from(self, shape: Shape) -> Shape:
        return self.shape

    def mapped(self, length: int) -> "Reshape":
        return Reshape((length, *self.shape))


@dataclass(frozen=True)
class Transpose:
    permutation: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.transpose(x, self.permutation)

    def shape_from(self, shape: Shape) -> Shape:
        return tuple(shape[axis] for axis in self.permutation)

    @property
    def is_idle(self) -> bool:
        """Whether no axis moves."""
        return self.permutation == tuple(range(len(self.permutation)))

    def mapped(self, length: int) -> "Transpose":
        return Transpose((0, *(axis + 1 for axis in self.permutation)))


@dataclass(frozen=True)
class Slice:
    start: Shape
    limit: Shape
    strides: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.slice(x, self.start, self.limit, self.strides)

    def shape_from(self, shape: Shape) -> Shape:
        bounds = zip(self.start, self.limit, self.strides, strict=True)
        return tuple(slice_length(*bound) for bound in bounds)

    def is_whole(self, shape: Shape) -> bool:
        """Whether all of an array of this shape is taken."""
        return not any(self.start) and self.limit == shape and set(self.strides) <= {1}

    def mapped(self, length: int) -> "Slice":
        return Slice((0, *self.start), (length, *self.limit), (1, *self.strides))


def slice_length(start: int, limit: int, stride: int) -> int:
    """How many entries a slice takes; its bounds may be symbolic."""
    return -((start - limit) // stride)


@dataclass(frozen=True)
class Pad:
    """Put an array at `start:limit:strides` of zeros: the transpose of a slice."""

    start: Shape
    limit: Shape
    shape: Shape  # of the zeros
    strides: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        spaces = zip(self.start, self.limit, self.shape, self.strides, strict=True)
        config = [
            (start, size - limit, stride - 1) for start, limit, size, stride in spaces
        ]
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    def shape_from(self, shape: Shape) -> Shape:
        return self.shape

    def mapped(self, length: int) -> "Pad":
        return Pad(
            (0, *self.start),
            (length, *self.limit),
            (length, *self.shape),
            (1, *self.strides),
        )

    def misses(self, other: "Pad") -> bool:
        """Whether the two write to boxes that have no entry in common."""
        pairs = zip(self.start, self.limit, other.start, other.limit, strict=True)
        return any(start >= end or begin >= limit for start, limit, begin, end in pairs)


@dataclass(frozen=True)
class Reverse:
    dimensions: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.rev(x, self.dimensions)

    def shape_from(self, shape: Shape) -> Shape:
        return shape

    def mapped(self, length: int) -> "Reverse":
        return Reverse(tuple(axis + 1 for axis in self.dimensions))


Step: TypeAlias = Reshape | Transpose | Slice | Pad | Reverse
View: TypeAlias = tuple[Step, ...]


def part_of(shape: Shape, axis: int, start: int, size: int) -> Slice:
    """The slice that takes `size` entries of one axis."""
    starts, limits = [0] * len(shape), list(shape)
    starts[axis], limits[axis] = start, start + size
    return Slice(tuple(starts), tuple(limits), (1,) * len(shape))


def apply(view: View, x: jax.Array) -> jax.Array:
    for step in view:
        x = step(x)
    return x


def shape_after(view: View, shape: Shape) -> Shape:
    """The shape of `apply(view, x)` for an array x of some shape."""
    for step in view:
        shape = step.shape_from(shape)
    return shape


def transposed(view: View, shape: Sequence[int], v: jax.Array) -> jax.Array:
    """Apply the transpose of a view to `v`; the view takes arrays of `shape`."""
    if not view:
        return v
    taken = abstract_like(v, tuple(shape))
    (x,) = jax.linear_transpose(lambda x: apply(view, x), taken)(v)
    return x


def only_reshapes(view: View) -> bool:
    """Whether a view keeps all entries in their order."""
    return all(isinstance(step, Reshape) for step in view)


def isometric(view: View) -> bool:
    """Whether the view preserves inner products."""
    return not any(isinstance(step, Slice) for step in view)


def mapped(view: View, length: int) -> View:
    """The view that acts on every entry of a new leading axis (the steps of a scan)."""
    return tuple(step.mapped(length) for step in view)


def disjoint(one: View, other: View) -> bool:
    """Whether two views are known to write to separate parts of the leaf."""
    if one and other and isinstance(one[-1], Pad) and isinstance(other[-1], Pad):
        return one[-1].misses(other[-1])
    return False


def simplified(view: View, shape: Shape) -> View:
    """An equal view of arrays of `shape`, without steps that do nothing."""
    steps: list[Step] = []
    before = [shape]  # steps[i] takes an array of shape before[i]
    for step in view:
        if isinstance(step, Reshape):
            if steps and isinstance(steps[-1], Reshape):
                steps.pop()
                before.pop()
            if step.shape == before[-1]:
                continue
        if isinstance(step, Slice) and step.is_whole(before[-1]):
            continue
        if isinstance(step, Transpose) and step.is_idle:
            continue
        steps.append(step)
        before.append(step.shape_from(before[-1]))
    return tuple(steps)
