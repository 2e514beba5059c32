"""The rule for contractions: outer terms.

If a contraction is followed by transposes and slices, these are moved into the factors.
So a weight that is also used transposed has terms of one layout, and a slice never
needs the whole leaf.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
from jax.extend.core import primitives as p

from ..facts import same_along
from ..graph import Atom, Equation, Value
from ..layout import Frame, Side
from ..sites import AtTerm, Cut
from ..terms import Outer
from ..views import Reshape, Shape, Slice, Transpose, View, slice_length
from .table import rule


@rule(p.dot_general_p)
def dot(equation: Equation, value: Value, view: View) -> Sequence[Cut]:
    layout, view = dot_layout(equation, view)
    return [Cut(AtTerm(equation, layout, tuple(equation.inputs)), view)]


@dataclass(frozen=True)
class DotLayout:
    """How the operands of a contraction become the factors of outer products."""

    left: Side
    right: Side
    swapped: bool  # the equation's right operand makes the left factor
    precision: Any = None

    def __call__(self, operands: Sequence[jax.Array], frames: Sequence[Frame]) -> Outer:
        sides = (self.right, self.left) if self.swapped else (self.left, self.right)
        triples = zip(sides, operands, frames, strict=True)
        factors = [side(x, frame) for side, x, frame in triples]
        left, right = reversed(factors) if self.swapped else factors
        return Outer(left, right, self.precision)

    def row_axes(self, *counts: int) -> tuple[int, ...]:
        """How many row axes the term's arrays have, given the operands' row axes."""
        return counts[::-1] if self.swapped else counts

    @property
    def shape(self) -> Shape:
        blocks, _, m = self.left.sizes
        return (blocks, m, self.right.sizes[2])

    @property
    def sizes(self) -> tuple[int, ...]:
        return prod(self.left.sizes), prod(self.right.sizes)


@dataclass(frozen=True)
class _Axis:
    """An axis of the output of a contraction, and the part of it that is needed."""

    group: str  # "B": from both operands, "M": from the left, "N": from the right
    own: tuple[int, ...]  # its number in the operand; for "B", in each operand
    start: int
    limit: int
    stride: int = 1

    @property
    def size(self) -> int:
        return slice_length(self.start, self.limit, self.stride)

    def sliced(self, start: int, limit: int, stride: int) -> "_Axis":
        """The axis after a slice of the part that is needed."""
        return replace(
            self,
            start=self.start + start * self.stride,
            limit=min(self.start + limit * self.stride, self.limit),
            stride=self.stride * stride,
        )


def dot_layout(equation: Equation, view: View) -> tuple[DotLayout, View]:
    """The layout of a contraction, and the rest of the view.

    The layout takes as many steps from the front of the view as it can. The rest begins
    with an array (B, m, n).
    """
    axes, view = _take_steps(_output_axes(equation), view)
    swapped = _begins_with_right(axes)
    order = "BNM" if swapped else "BMN"
    canonical = sorted(axes, key=lambda axis: order.index(axis.group))

    left, right = _sides(equation, canonical)
    if swapped:
        left, right = right, left
    precision = equation.params["precision"]
    if swapped and isinstance(precision, tuple):
        precision = precision[::-1]
    layout = DotLayout(left, right, swapped, precision)
    return layout, _from_canonical(canonical, axes) + view


def _output_axes(equation: Equation) -> list[_Axis]:
    """The axes of the output: blocks, then the left operand's, then the right one's."""
    contracted, batched = equation.params["dimension_numbers"]
    shapes = [atom.aval.shape for atom in equation.inputs]
    pairs = zip(*batched, strict=True)
    axes = [_Axis("B", pair, 0, shapes[0][pair[0]]) for pair in pairs]
    for i, group in enumerate("MN"):
        taken = {*contracted[i], *batched[i]}
        sizes = enumerate(shapes[i])
        axes += [_Axis(group, (j,), 0, n) for j, n in sizes if j not in taken]
    return axes


def _take_steps(axes: list[_Axis], view: View) -> tuple[list[_Axis], View]:
    """Apply the transposes and slices at the front of a view to axes.

    Returns the axes and the rest of the view.
    """
    while view and isinstance(step := view[0], Transpose | Slice):
        view = view[1:]
        if isinstance(step, Transpose):
            axes = [axes[i] for i in step.permutation]
        else:
            bounds = zip(axes, step.start, step.limit, step.strides, strict=True)
            axes = [axis.sliced(*bound) for axis, *bound in bounds]
    return axes, view


def _begins_with_right(axes: Sequence[_Axis]) -> bool:
    """Whether the right operand has the first axis of size > 1, apart from blocks.

    The right operand then becomes the left factor.
    """
    wide = [axis.group for axis in axes if axis.size != 1 and axis.group != "B"]
    return wide[:1] == ["N"]


def _from_canonical(canonical: Sequence[_Axis], axes: Sequence[_Axis]) -> View:
    """The view from (B, m, n) to an array with the axes `axes`, in this order."""
    if [x for x in canonical if x.size != 1] == [x for x in axes if x.size != 1]:
        return (Reshape(tuple(axis.size for axis in axes)),)  # only axes of size 1 move
    unfolded = Reshape(tuple(axis.size for axis in canonical))
    return unfolded, Transpose(tuple(canonical.index(axis) for axis in axes))


def _sides(equation: Equation, axes: Sequence[_Axis]) -> tuple[Side, Side]:
    """The sides of the left and the right operand.

    If one operand repeats its entries along a contracted axis, its first entry is
    taken, and the other operand is summed over that axis: Σₜ a bₜᵀ = a (Σₜ bₜ)ᵀ.
    """
    contracted, _ = equation.params["dimension_numbers"]
    left, right = equation.inputs
    left_repeats = _repeats(left, contracted[0])
    right_repeats = _repeats(right, contracted[1]) - left_repeats
    return (
        _side(equation, 0, axes, left_repeats, right_repeats),
        _side(equation, 1, axes, right_repeats, left_repeats),
    )


def _repeats(operand: Atom, contracted: Shape) -> set[int]:
    """The numbers of the contracted axes along which an operand repeats its entries."""
    axes = same_along(operand)
    return {j for j, axis in enumerate(contracted) if axis in axes}


def _side(
    equation: Equation,
    i: int,
    axes: Sequence[_Axis],
    repeats: set[int],
    other_repeats: set[int],
) -> Side:
    """The side of operand number `i`; the sets hold numbers of contracted axes."""
    shape = tuple(equation.inputs[i].aval.shape)
    contracted = equation.params["dimension_numbers"][0][i]
    # The axes of the output that this operand has, by its own axes.
    blocks = {axis.own[i]: axis for axis in axes if axis.group == "B"}
    free = {axis.own[0]: axis for axis in axes if axis.group == "MN"[i]}

    start, limit, strides = [0] * len(shape), list(shape), [1] * len(shape)
    for own, axis in (blocks | free).items():
        start[own], limit[own], strides[own] = axis.start, axis.limit, axis.stride
    for j in repeats:
        limit[contracted[j]] = 1
    return Side(
        start=tuple(start),
        limit=tuple(limit),
        strides=tuple(strides),
        blocks=tuple(blocks),
        steps=tuple(contracted),
        free=tuple(free),
        summed=tuple(contracted[j] for j in other_repeats),
    )
