"""Layouts: how the operands of a contraction or a scatter become the factors of a term.

Transposes and slices right behind the contraction are moved into its factors, so that a weight and
its transposed twin have terms in one layout, and a slice never meets the whole leaf.
"""

from dataclasses import dataclass, replace
from math import prod

import jax
import jax.numpy as jnp
from jax import lax

from ._graph import Equation
from ._tails import Reshape, Shape, Slice, Tail, Transpose
from ._terms import Outer, Scatter


@dataclass(frozen=True)
class _Dim:
    """One dimension of a contraction's output: its group, its axis in each operand, its slice."""

    group: str  # "B": in both operands, "M": in the left one, "N": in the right one
    axes: tuple[int, ...]
    start: int
    limit: int
    stride: int = 1

    @property
    def size(self) -> int:
        return len(range(self.start, self.limit, self.stride))

    def sliced(self, start: int, limit: int, stride: int) -> "_Dim":
        end = min(self.start + limit * self.stride, self.limit)
        begin, stride = self.start + start * self.stride, self.stride * stride
        return replace(self, start=begin, limit=end, stride=stride)


@dataclass(frozen=True)
class Side:
    """How one operand becomes a factor of shape (B, T, m): slice, transpose, reshape."""

    start: tuple[int, ...]
    limit: tuple[int, ...]
    strides: tuple[int, ...]
    permutation: tuple[int, ...]
    shape: tuple[int, int, int]

    def __call__(self, x: jax.Array) -> jax.Array:
        x = lax.slice(x, self.start, self.limit, self.strides)
        return lax.transpose(x, self.permutation).reshape(self.shape)


@dataclass(frozen=True)
class DotLayout:
    left: Side
    right: Side
    swapped: bool  # the equation's right operand makes the left factor

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> Outer:
        if self.swapped:
            lhs, rhs = rhs, lhs
        return Outer(self.left(lhs), self.right(rhs))

    @property
    def shape(self) -> Shape:
        blocks, _, m = self.left.shape
        return (blocks, m, self.right.shape[2])

    @property
    def size(self) -> int:
        return prod(self.left.shape) + prod(self.right.shape)


def dot_layout(equation: Equation, tail: Tail) -> tuple[DotLayout, Tail]:
    """The factors of a `dot_general`, with as much of its tail as they can take."""
    contracted, batched = equation.params["dimension_numbers"]
    shapes = [tuple(atom.aval.shape) for atom in equation.inputs]
    dims = [_Dim("B", axes, 0, shapes[0][axes[0]]) for axes in zip(*batched, strict=True)]
    for side, group in enumerate("MN"):
        taken = {*contracted[side], *batched[side]}
        free = [axis for axis in range(len(shapes[side])) if axis not in taken]
        dims += [_Dim(group, (axis,), 0, shapes[side][axis]) for axis in free]
    while tail and isinstance(tail[0], Transpose | Slice):
        step, *rest = tail
        tail = tuple(rest)
        if isinstance(step, Transpose):
            dims = [dims[axis] for axis in step.permutation]
        else:
            bounds = zip(dims, step.start, step.limit, step.strides, strict=True)
            dims = [dim.sliced(*bound) for dim, *bound in bounds]
    wide = [dim.group for dim in dims if dim.size != 1 and dim.group != "B"]
    swapped = wide[:1] == ["N"]
    order = "BNM" if swapped else "BMN"
    canonical = sorted(dims, key=lambda dim: order.index(dim.group))
    sides = [_side(shapes[i], canonical, contracted[i], "MN"[i], i) for i in (0, 1)]
    left, right = reversed(sides) if swapped else sides
    if [d for d in canonical if d.size != 1] == [d for d in dims if d.size != 1]:
        unfold: Tail = (Reshape(tuple(dim.size for dim in dims)),)  # only dimensions of size 1 move
    else:
        spread = Reshape(tuple(dim.size for dim in canonical))
        unfold = (spread, Transpose(tuple(canonical.index(dim) for dim in dims)))
    return DotLayout(left, right, swapped), unfold + tail


def _side(
    shape: tuple[int, ...], dims: list[_Dim], contracted: tuple[int, ...], group: str, i: int
) -> Side:
    start, limit, strides = [0] * len(shape), list(shape), [1] * len(shape)
    blocks = [dim for dim in dims if dim.group == "B"]
    free = [dim for dim in dims if dim.group == group]
    axes = {"B": i, group: 0}
    for dim in blocks + free:
        axis = dim.axes[axes[dim.group]]
        start[axis], limit[axis], strides[axis] = dim.start, dim.limit, dim.stride
    permutation = (
        *(dim.axes[i] for dim in blocks),
        *contracted,
        *(dim.axes[0] for dim in free),
    )
    sizes = (
        prod(dim.size for dim in blocks),
        prod(shape[axis] for axis in contracted),
        prod(dim.size for dim in free),
    )
    return Side(tuple(start), tuple(limit), tuple(strides), permutation, sizes)


@dataclass(frozen=True)
class ScatterLayout:
    """A `scatter-add` of whole lines along one axis of its operand."""

    length: int
    positions: int
    width: int
    window: tuple[int, ...]  # permutation of the updates: positions first
    mode: lax.GatherScatterMode

    def __call__(self, indices: jax.Array, updates: jax.Array) -> Scatter:
        index = indices.reshape(1, self.positions)
        lines = lax.transpose(updates, self.window).reshape(1, self.positions, self.width)
        if self.mode is lax.GatherScatterMode.CLIP:
            index = jnp.clip(index, 0, self.length - 1)
        elif self.mode is lax.GatherScatterMode.FILL_OR_DROP:
            inside = (index >= 0) & (index < self.length)
            lines = jnp.where(inside[:, :, None], lines, jnp.zeros((), lines.dtype))
            index = jnp.where(inside, index, jnp.zeros((), index.dtype))
        return Scatter(index, lines, self.length)

    @property
    def shape(self) -> Shape:
        return (1, self.length, self.width)

    @property
    def size(self) -> int:
        return self.positions * (1 + self.width)


def scatter_layout(equation: Equation) -> tuple[ScatterLayout, Tail] | None:
    """The factors and tail of a `scatter-add`, or None unless it adds whole lines of an axis."""
    operand, indices, updates = (atom.aval for atom in equation.inputs)
    numbers = equation.params["dimension_numbers"]
    window = numbers.update_window_dims
    if numbers.operand_batching_dims or len(numbers.scatter_dims_to_operand_dims) != 1:
        return None
    if numbers.inserted_window_dims != numbers.scatter_dims_to_operand_dims:
        return None
    (axis,) = numbers.scatter_dims_to_operand_dims
    rest = [i for i in range(len(operand.shape)) if i != axis]
    if [updates.shape[i] for i in window] != [operand.shape[i] for i in rest]:
        return None
    positions = [i for i in range(len(updates.shape)) if i not in window]
    layout = ScatterLayout(
        operand.shape[axis],
        prod(updates.shape[i] for i in positions),
        prod(operand.shape[i] for i in rest),
        (*positions, *window),
        lax.GatherScatterMode.from_any(equation.params["mode"]),
    )
    lines_first = (axis, *rest)
    unfold: Tail = (Reshape(tuple(operand.shape[i] for i in lines_first)),)
    if axis:
        unfold += (Transpose(tuple(lines_first.index(i) for i in range(len(lines_first)))),)
    return layout, unfold
