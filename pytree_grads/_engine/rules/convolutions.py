"""The rule for convolutions that compute the gradient of a kernel: patches terms."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import jax
from jax.extend.core import primitives as p

from ..._jax.xla import arranged
from .. import thresholds
from ..graph import Equation, Value
from ..layout import Frame
from ..sites import AtTerm, Cut
from ..terms import Patches
from ..views import Reshape, Shape, Transpose, View
from .table import rule


@rule(p.conv_general_dilated_p)
def convolution(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    layout = patches_layout(equation)
    if layout is None:
        return None
    site = AtTerm(equation, layout, tuple(equation.inputs))
    return [Cut(site, _to_output(equation, layout) + view)]


@dataclass(frozen=True)
class PatchesLayout:
    """How the operands of a convolution become the factors of a patches term."""

    left: Shape  # the image's axes: batch, features and space
    right: Shape  # the cotangent's axes: output features, input features and space
    left_shape: Shape
    right_shape: Shape
    padding: tuple[tuple[int, int, int], ...]  # of the image: low, high, interior
    groups: int
    offsets: Shape
    strides: Shape
    dilation: Shape
    precision: Any

    def __call__(
        self, operands: Sequence[jax.Array], frames: Sequence[Frame]
    ) -> Patches:
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

    def row_axes(self, *counts: int) -> tuple[int, ...]:
        """How many row axes the term's arrays have, given the operands' row axes."""
        return counts

    @property
    def shape(self) -> Shape:
        m, n = self.left_shape[self.left[0]], self.right_shape[self.right[0]]
        return (self.groups, prod(self.offsets) * m // self.groups, n // self.groups)

    @property
    def sizes(self) -> tuple[int, ...]:
        return prod(self.left_shape), prod(self.right_shape)


def patches_layout(equation: Equation) -> PatchesLayout | None:
    """The layout of a convolution if it computes the gradient of a kernel, else None.

    In that form, the image is the left operand and the cotangent is the kernel. The
    output's space axes run over the offsets of the kernel. The cotangent's space axes
    run over the positions of a patch.
    """
    params = equation.params
    numbers = params["dimension_numbers"]
    left, right = (tuple(atom.aval.shape) for atom in equation.inputs)
    out = tuple(equation.outputs[0].aval.shape)
    offsets = tuple(out[i] for i in numbers.out_spec[2:])
    steps = tuple(right[i] for i in numbers.rhs_spec[2:])
    if params["feature_group_count"] > 1:
        return None
    if prod(offsets) > thresholds.MOST_OFFSETS * prod(steps):
        return None
    if not prod(out) or not prod(left) or not prod(right):
        return None
    return PatchesLayout(
        left=tuple(numbers.lhs_spec),
        right=tuple(numbers.rhs_spec),
        left_shape=left,
        right_shape=right,
        padding=_padding(equation, offsets, steps),
        groups=params["batch_group_count"],
        offsets=offsets,
        strides=tuple(params["window_strides"]),
        dilation=tuple(params["rhs_dilation"]),
        precision=params["precision"],
    )


def _padding(
    equation: Equation, offsets: Shape, steps: Shape
) -> tuple[tuple[int, int, int], ...]:
    """The padding of the image along each space axis: low, high, interior.

    The high end has what the last patch needs, which may be less than in the equation.
    """
    params = equation.params
    image = equation.inputs[0].aval.shape
    found: list[tuple[int, int, int]] = []
    for i, axis in enumerate(params["dimension_numbers"].lhs_spec[2:]):
        low, _ = params["padding"][i]
        interior = params["lhs_dilation"][i] - 1
        last_start = (offsets[i] - 1) * params["window_strides"][i]
        span = (steps[i] - 1) * params["rhs_dilation"][i] + 1
        size = (image[axis] - 1) * (interior + 1) + 1  # of the image, dilated
        found.append((low, last_start + span - size - low, interior))
    return tuple(found)


def _to_output(equation: Equation, layout: PatchesLayout) -> View:
    """The view from (groups, offsets * m, n) to the kernel's gradient."""
    out_spec = equation.params["dimension_numbers"].out_spec
    groups, offsets = layout.groups, layout.offsets
    m = layout.left_shape[layout.left[0]] // groups
    n = layout.right_shape[layout.right[0]] // groups
    last = len(offsets) + 1  # the axis of m in (groups, *offsets, m, n)

    # The axes of (groups, *offsets, m, n) that make each axis of the output.
    sources: list[tuple[int, ...]] = [()] * len(out_spec)
    sources[out_spec[0]] = (last,)
    sources[out_spec[1]] = (0, last + 1)
    for i, axis in enumerate(out_spec[2:]):
        sources[axis] = (1 + i,)
    return (
        Reshape((groups, *offsets, m, n)),
        Transpose(tuple(i for own in sources for i in own)),
        Reshape(tuple(equation.outputs[0].aval.shape)),
    )
