"""Layouts: how the operands of a contraction or a scatter become the factors of a term.

Transposes and slices right behind the contraction are moved into its factors, so that a weight and
its transposed twin have terms in one layout, and a slice never meets the whole leaf.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._trees.algebra import carried_dtype
from . import thresholds
from .graph import Atom, Equation
from .terms import Outer, Scatter
from .views import Reshape, Shape, Slice, Tail, Transpose, arranged, is_zero, same_along


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
        return _length(self.start, self.limit, self.stride)

    def sliced(self, start: int, limit: int, stride: int) -> "_Dim":
        end = min(self.start + limit * self.stride, self.limit)
        begin, stride = self.start + start * self.stride, self.stride * stride
        return replace(self, start=begin, limit=end, stride=stride)


def _length(start: int, limit: int, stride: int) -> int:
    """How many entries a slice takes; its bounds may be symbolic."""
    return -((start - limit) // stride)


@dataclass(frozen=True)
class Frame:
    """The axes that stand before those of an operand: steps of scans around it, then rows.

    `stacked` says of each scan, from the outside in, whether its steps are blocks of their own, or
    add up. There are up to two axes of rows, N and K.
    """

    stacked: tuple[bool, ...] = ()
    rows: int = 0

    @property
    def axes(self) -> int:
        return len(self.stacked) + self.rows

    @property
    def parted(self) -> tuple[list[int], range, list[int]]:
        """The axes of steps that are blocks, those of rows, and those of steps that add up."""
        outer = [i for i, stacked in enumerate(self.stacked) if stacked]
        added = [i for i, stacked in enumerate(self.stacked) if not stacked]
        return outer, range(len(self.stacked), self.axes), added


@dataclass(frozen=True)
class Side:
    """How one operand becomes a factor: slices, then three groups of its axes."""

    start: Shape
    limit: Shape
    strides: Shape
    blocks: Shape
    steps: Shape
    free: Shape
    summed: Shape = ()  # the other factor is the same along these, so this one is added up

    @property
    def sizes(self) -> Shape:
        """(B, T, m), without the steps of scans."""
        bounds = zip(self.start, self.limit, self.strides, strict=True)
        sizes = [1 if i in self.summed else _length(*b) for i, b in enumerate(bounds)]
        return tuple(
            prod(sizes[i] for i in group) for group in (self.blocks, self.steps, self.free)
        )

    def __call__(self, x: jax.Array, frame: Frame) -> jax.Array:
        """The factor (B, *rows, T, m) of an operand that has the axes of a frame before its own."""
        start, strides = (0,) * frame.axes + self.start, (1,) * frame.axes + self.strides
        limit = x.shape[: frame.axes] + self.limit
        if limit != x.shape or any(start) or any(stride > 1 for stride in strides):
            x = lax.slice(x, start, limit, strides)
        if self.summed:
            axes = tuple(i + frame.axes for i in self.summed)
            x = jnp.sum(x, axes, carried_dtype(x.dtype), keepdims=True)
        outer, rows, added = frame.parted
        blocks, steps, free = (
            [i + frame.axes for i in group] for group in (self.blocks, self.steps, self.free)
        )
        shape = (
            prod(x.shape[i] for i in outer + blocks),
            *(x.shape[i] for i in rows),
            prod(x.shape[i] for i in added + steps),
            prod(x.shape[i] for i in free),
        )
        return arranged(x, (*outer, *blocks, *rows, *added, *steps, *free), shape)


@dataclass(frozen=True)
class DotLayout:
    left: Side
    right: Side
    swapped: bool  # the equation's right operand makes the left factor
    precision: Any = None

    def __call__(self, operands: Sequence[jax.Array], frames: Sequence[Frame]) -> Outer:
        sides = (self.right, self.left) if self.swapped else (self.left, self.right)
        factors = [side(x, f) for side, x, f in zip(sides, operands, frames, strict=True)]
        left, right = reversed(factors) if self.swapped else factors
        return Outer(left, right, self.precision)

    def levels(self, left: int, right: int) -> tuple[int, int]:
        """The axes of rows that the term's arrays have, from those of the operands."""
        return (right, left) if self.swapped else (left, right)

    @property
    def shape(self) -> Shape:
        blocks, _, m = self.left.sizes
        return (blocks, m, self.right.sizes[2])

    @property
    def size(self) -> int:
        return prod(self.left.sizes) + prod(self.right.sizes)


def dot_layout(equation: Equation, tail: Tail) -> tuple[DotLayout, Tail]:
    """The factors of a `dot_general`, with as much of its tail as they can take."""
    contracted, batched = equation.params["dimension_numbers"]
    shapes = [tuple(atom.aval.shape) for atom in equation.inputs]
    dims = [_Dim("B", axes, 0, shapes[0][axes[0]]) for axes in zip(*batched, strict=True)]
    for side, group in enumerate("MN"):
        taken = {*contracted[side], *batched[side]}
        free = [axis for axis in range(len(shapes[side])) if axis not in taken]
        dims += [_Dim(group, (axis,), 0, shapes[side][axis]) for axis in free]
    while tail and isinstance(step := tail[0], Transpose | Slice):
        tail = tail[1:]
        if isinstance(step, Transpose):
            dims = [dims[axis] for axis in step.permutation]
        else:
            bounds = zip(dims, step.start, step.limit, step.strides, strict=True)
            dims = [dim.sliced(*bound) for dim, *bound in bounds]
    wide = [dim.group for dim in dims if dim.size != 1 and dim.group != "B"]
    swapped = wide[:1] == ["N"]
    order = "BNM" if swapped else "BMN"
    canonical = sorted(dims, key=lambda dim: order.index(dim.group))
    same = [_same_steps(equation.inputs[i], contracted[i]) for i in (0, 1)]
    same[1] -= same[0]
    sides = [
        _side(shapes[i], canonical, contracted[i], "MN"[i], i, same[i], same[1 - i]) for i in (0, 1)
    ]
    left, right = reversed(sides) if swapped else sides
    if [d for d in canonical if d.size != 1] == [d for d in dims if d.size != 1]:
        unfold: Tail = (Reshape(tuple(dim.size for dim in dims)),)  # only dimensions of size 1 move
    else:
        spread = Reshape(tuple(dim.size for dim in canonical))
        unfold = (spread, Transpose(tuple(canonical.index(dim) for dim in dims)))
    precision = equation.params["precision"]
    if swapped and isinstance(precision, tuple):
        precision = precision[::-1]
    return DotLayout(left, right, swapped, precision), unfold + tail


def _same_steps(operand: Atom, contracted: Shape) -> set[int]:
    """Which of the contracted axes an operand is the same along."""
    axes = same_along(operand)
    return {j for j, axis in enumerate(contracted) if axis in axes}


def _side(
    shape: Shape,
    dims: list[_Dim],
    contracted: Shape,
    group: str,
    i: int,
    same: set[int],
    summed: set[int],
) -> Side:
    """One side of a contraction; `same` and `summed` count among the contracted axes."""
    start, limit, strides = [0] * len(shape), list(shape), [1] * len(shape)
    blocks = [(dim, dim.axes[i]) for dim in dims if dim.group == "B"]
    free = [(dim, dim.axes[0]) for dim in dims if dim.group == group]
    for dim, axis in blocks + free:
        start[axis], limit[axis], strides[axis] = dim.start, dim.limit, dim.stride
    for j in same:
        limit[contracted[j]] = 1
    return Side(
        tuple(start),
        tuple(limit),
        tuple(strides),
        tuple(axis for _, axis in blocks),
        tuple(contracted),
        tuple(axis for _, axis in free),
        tuple(contracted[j] for j in summed),
    )


@dataclass(frozen=True)
class ScatterLayout:
    """A `scatter-add` of whole lines along some axes of its operand, which count as one."""

    lengths: Shape  # of these axes, in the order of the numbers of an index
    index: Side
    lines: Side
    clips: bool  # what lies outside goes to the nearest line, and else to none

    def __call__(self, operands: Sequence[jax.Array], frames: Sequence[Frame]) -> Scatter:
        *indices, lines = (
            side(x, frame) for side, x, frame in zip(self._sides, operands, frames, strict=True)
        )
        rows = max(frame.rows for frame in frames[:-1])
        numbers = [
            _with_rows(_wide(x[..., i]), rows, 1) for x in indices for i in range(x.shape[-1])
        ]
        pairs = list(zip(numbers, self.lengths, strict=True))
        # One line goes to all places of a step.
        if lines.shape[-2] != 1 and thresholds.exceeds(numbers[0].shape[-1], lines.shape[-2]):
            lines = jnp.repeat(lines, numbers[0].shape[-1] // lines.shape[-2], axis=-2)
        if self.clips:
            index = self._flat([jnp.clip(x, 0, length - 1) for x, length in pairs])
        else:  # what is outside is dropped, also where it was promised not to be
            inside = reduce(jnp.bitwise_and, [(x >= 0) & (x < length) for x, length in pairs])
            index = self._flat(numbers)
            index = jnp.where(inside, index, jnp.asarray(self.length, index.dtype))
            # Either may lack axes of rows, always the last ones.
            rows = max(rows, frames[-1].rows)
            inside, lines = _with_rows(inside, rows, 1), _with_rows(lines, rows, 2)
            if lines.shape[-2] == 1:  # one line goes to all places
                inside = jnp.any(inside, axis=-1, keepdims=True)
            lines = jnp.where(inside[..., None], lines, jnp.zeros((), lines.dtype))
        return Scatter(index, lines, self.length)

    @property
    def length(self) -> int:
        return prod(self.lengths)

    def _flat(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """The line that an index of several numbers speaks of."""
        line, *others = numbers
        for x, length in zip(others, self.lengths[1:], strict=True):
            line = line * length + x
        return line

    @property
    def _sides(self) -> list[Side]:
        """Those of the operands: indices of one number each, or one of all numbers; then lines."""
        count = self.index.sizes[2]
        return [self.index] * (len(self.lengths) // count) + [self.lines]

    def levels(self, *levels: int) -> tuple[int, int]:
        """The axes of rows that the term's arrays have, from those of the operands."""
        *indices, lines = levels
        index = max(indices)
        return index, lines if self.clips else max(index, lines)

    @property
    def shape(self) -> Shape:
        return (1, self.length, self.lines.sizes[2])

    @property
    def size(self) -> int:
        return prod(self.lines.sizes) + prod(self.index.sizes[:2])


def _wide(index: jax.Array) -> jax.Array:
    """An index in a dtype that is not too narrow for the length."""
    return index.astype("int32") if index.dtype.itemsize < 4 else index


def _with_rows(x: jax.Array, rows: int, own: int) -> jax.Array:
    """An array (B, *rows, ...) with `own` axes at the end and axes of size 1 for missing rows."""
    missing = rows + 1 + own - x.ndim
    return lax.expand_dims(x, range(x.ndim - own, x.ndim - own + missing))


def scatter_layout(equation: Equation) -> tuple[ScatterLayout, Tail] | None:
    """The factors and tail of a `scatter-add`, or None unless it adds whole lines."""
    operand, indices, updates = (atom.aval for atom in equation.inputs)
    numbers = equation.params["dimension_numbers"]
    window = numbers.update_window_dims
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    lengths = tuple(operand.shape[axis] for axis in axes)
    if numbers.operand_batching_dims or prod(lengths) > jnp.iinfo(jnp.int32).max:
        return None
    if not axes or tuple(numbers.inserted_window_dims) != tuple(sorted(axes)):
        return None
    rest = [i for i in range(len(operand.shape)) if i not in axes]
    if [updates.shape[i] for i in window] != [operand.shape[i] for i in rest]:
        return None
    positions = [i for i in range(len(updates.shape)) if i not in window]
    last = len(indices.shape) - 1  # the axis of index vectors
    lines = _whole(updates.shape, positions, window)
    if same_along(equation.inputs[2]).issuperset(positions):
        limit = tuple(1 if i in positions else size for i, size in enumerate(updates.shape))
        lines = replace(lines, limit=limit)
    layout = ScatterLayout(
        lengths,
        _whole(indices.shape, range(last), (last,)),
        lines,
        clips=equation.params["mode"] is lax.GatherScatterMode.CLIP,
    )
    return layout, _axes_from_front(operand.shape, axes)


def line_layout(equation: Equation) -> tuple[ScatterLayout, Tail, tuple[Atom, ...]] | None:
    """The same of a `dynamic_update_slice` that puts one line into zeros, and its operands."""
    operand, update, *starts = equation.inputs
    shape, taken = operand.aval.shape, update.aval.shape
    axes = [i for i, (size, part) in enumerate(zip(shape, taken, strict=True)) if size != part]
    lengths = tuple(shape[axis] for axis in axes)
    if not is_zero(operand) or not axes or any(taken[axis] != 1 for axis in axes):
        return None
    if prod(lengths) > jnp.iinfo(jnp.int32).max:
        return None
    layout = ScatterLayout(
        lengths,
        _whole((), (), ()),
        _whole(taken, axes, [i for i in range(len(shape)) if i not in axes]),
        clips=True,
    )
    return layout, _axes_from_front(shape, axes), (*(starts[axis] for axis in axes), update)


def _axes_from_front(shape: Shape, axes: Sequence[int]) -> Tail:
    """From (1, length, rest) to an array of some shape."""
    lines_first = (*axes, *(i for i in range(len(shape)) if i not in axes))
    unfold: Tail = (Reshape(tuple(shape[i] for i in lines_first)),)
    if lines_first != tuple(range(len(shape))):
        unfold += (Transpose(tuple(lines_first.index(i) for i in range(len(lines_first)))),)
    return unfold


def _whole(shape: Shape, steps: Iterable[int], free: Iterable[int]) -> Side:
    ones = (1,) * len(shape)
    return Side((0,) * len(shape), tuple(shape), ones, (), tuple(steps), tuple(free))
