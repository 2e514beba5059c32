"""Layouts of convolutions that make the gradient of a kernel: how operands become windows."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax

from . import thresholds
from .graph import Equation
from .layout import Frame
from .terms import Patches
from .views import Reshape, Shape, Tail, Transpose, arranged


@dataclass(frozen=True)
class WindowLayout:
    """How the operands of a convolution become the factors of its windows."""

    left: Shape  # the axes of batch, features and space
    right: Shape  # those of output features, input features and space
    left_shape: Shape
    right_shape: Shape
    padding: tuple[tuple[int, int, int], ...]  # of the image: low, high, interior
    groups: int
    offsets: Shape
    strides: Shape
    dilation: Shape
    precision: Any

    def __call__(self, operands: Sequence[jax.Array], frames: Sequence[Frame]) -> Patches:
        left, right = operands
        return Patches(
            self._arranged(left, self.left, frames[0]),
            self._arranged(right, self.right, frames[1]),
            self.padding,
            self.offsets,
            self.strides,
            self.dilation,
            self.precision,
        )

    def _arranged(self, x: jax.Array, axes: Shape, frame: Frame) -> jax.Array:
        """An operand as (B, *rows, A, *space, m)."""
        wide, depth, *space = (axis + frame.axes for axis in axes)
        each = x.shape[wide] // self.groups
        x = x.reshape(*x.shape[:wide], self.groups, each, *x.shape[wide + 1 :])
        depth, *space = (axis + (axis > wide) for axis in (depth, *space))
        outer, rows, added = frame.parted
        sizes = (
            prod(x.shape[i] for i in (*outer, wide)),
            *(x.shape[i] for i in rows),
            prod(x.shape[i] for i in (*added, depth)),
            *(x.shape[i] for i in space),
            each,
        )
        order = (*outer, wide, *rows, *added, depth, *space, wide + 1)
        return arranged(x, order, sizes)

    def levels(self, left: int, right: int) -> tuple[int, int]:
        """The axes of rows that the term's arrays have, from those of the operands."""
        return left, right

    @property
    def shape(self) -> Shape:
        m, n = self.left_shape[self.left[0]], self.right_shape[self.right[0]]
        return (self.groups, prod(self.offsets) * m // self.groups, n // self.groups)

    @property
    def size(self) -> int:
        return prod(self.left_shape) + prod(self.right_shape)


def window_layout(equation: Equation) -> tuple[WindowLayout, Tail] | None:
    """The windows of a convolution that makes the gradient of a kernel, and its tail."""
    params = equation.params
    numbers, groups = params["dimension_numbers"], params["batch_group_count"]
    left, right = (tuple(atom.aval.shape) for atom in equation.inputs)
    out = tuple(equation.outputs[0].aval.shape)
    offsets = tuple(out[i] for i in numbers.out_spec[2:])
    steps = tuple(right[i] for i in numbers.rhs_spec[2:])
    if params["feature_group_count"] > 1 or prod(offsets) > thresholds.MOST_OFFSETS * prod(steps):
        return None
    if not prod(out) or not prod(left) or not prod(right):
        return None
    strides, dilation = params["window_strides"], params["rhs_dilation"]
    padding = []
    for i, axis in enumerate(numbers.lhs_spec[2:]):
        (low, _), interior = params["padding"][i], params["lhs_dilation"][i] - 1
        used = (offsets[i] - 1) * strides[i] + (steps[i] - 1) * dilation[i] + 1
        wide = (left[axis] - 1) * (interior + 1) + 1
        padding.append((low, used - wide - low, interior))
    layout = WindowLayout(
        tuple(numbers.lhs_spec),
        tuple(numbers.rhs_spec),
        left,
        right,
        tuple(padding),
        groups,
        offsets,
        tuple(strides),
        tuple(dilation),
        params["precision"],
    )
    m, n = left[numbers.lhs_spec[0]] // groups, right[numbers.rhs_spec[0]] // groups
    last = len(offsets) + 1  # the axis of m in (groups, *offsets, m, n)
    places: list[tuple[int, ...]] = [()] * len(out)
    places[numbers.out_spec[0]] = (last,)
    places[numbers.out_spec[1]] = (0, last + 1)
    for i, axis in enumerate(numbers.out_spec[2:]):
        places[axis] = (1 + i,)
    spread = Reshape((groups, *offsets, m, n))
    return layout, (spread, Transpose(tuple(i for own in places for i in own)), Reshape(out))
