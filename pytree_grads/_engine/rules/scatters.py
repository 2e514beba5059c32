"""Rules for equations that add lines to an array at indices: scatter terms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from .. import thresholds
from ..facts import is_zero, same_along
from ..graph import Equation, Value
from ..layout import Frame, Side, whole_side
from ..sites import AtTerm, Cut
from ..terms import Scatter
from ..views import Reshape, Shape, Transpose, View
from .table import rule, through


@rule(p.scatter_add_p)
def scatter_add(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    """A scatter term of the lines, and the array to which they are added."""
    layout = scatter_layout(equation)
    if layout is None:
        return None
    operand, *rest = equation.inputs
    numbers = equation.params["dimension_numbers"]
    lines_first = _from_lines(operand.aval.shape, numbers.scatter_dims_to_operand_dims)
    scattered = Cut(AtTerm(equation, layout, tuple(rest)), lines_first + view)
    return [scattered, through(operand, view)]


@rule(p.dynamic_update_slice_p)
def dynamic_update_slice(
    equation: Equation, value: Value, view: View
) -> Sequence[Cut] | None:
    """A scatter term of one line, if it is written into zeros."""
    operand, update, *starts = equation.inputs
    shape = tuple(operand.aval.shape)
    taken = tuple(update.aval.shape)
    axes = [i for i, size in enumerate(shape) if size != taken[i]]
    lengths = tuple(shape[i] for i in axes)
    if not axes or not is_zero(operand) or any(taken[i] != 1 for i in axes):
        return None
    if not _fits_an_index(lengths):
        return None
    layout = ScatterLayout(
        lengths,
        index=whole_side((), (), ()),  # one number for each axis
        lines=whole_side(taken, axes, _others(shape, axes)),
        clips=True,
    )
    operands = (*(starts[i] for i in axes), update)
    site = AtTerm(equation, layout, operands)
    return [Cut(site, _from_lines(shape, axes) + view)]


@dataclass(frozen=True)
class ScatterLayout:
    """How indices and whole lines become a scatter term.

    An index has one number for each of some axes of an array. These axes are flattened
    into one.
    """

    lengths: Shape  # of these axes, in the order of the numbers of an index
    index: Side
    lines: Side
    clips: bool  # whether an index out of range means the nearest line, not none

    def __call__(
        self, operands: Sequence[jax.Array], frames: Sequence[Frame]
    ) -> Scatter:
        triples = zip(self._sides, operands, frames, strict=True)
        *indices, lines = (side(x, frame) for side, x, frame in triples)
        index_rows = max(frame.rows for frame in frames[:-1])
        # (B, *rows, T) for each axis in `lengths`
        numbers = [
            _with_rows(_wide(x[..., i]), index_rows, 1)
            for x in indices
            for i in range(x.shape[-1])
        ]
        lines = _a_line_for_each_step(lines, numbers[0].shape[-1])
        if self.clips:
            return Scatter(self._clipped(numbers), lines, self.length)
        rows = max(index_rows, frames[-1].rows)
        return Scatter(*self._without_outside(numbers, lines, rows), self.length)

    def _clipped(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """The flat index of the nearest line."""
        pairs = zip(numbers, self.lengths, strict=True)
        return self._flat([jnp.clip(x, 0, length - 1) for x, length in pairs])

    def _without_outside(
        self, numbers: Sequence[jax.Array], lines: jax.Array, rows: int
    ) -> tuple[jax.Array, jax.Array]:
        """The flat index, and the lines, which are zero if their index is out of range.

        This holds also in the mode in which the user promises that no index is.
        """
        pairs = zip(numbers, self.lengths, strict=True)
        inside = [(x >= 0) & (x < length) for x, length in pairs]
        is_inside = reduce(jnp.bitwise_and, inside)
        index = self._flat(numbers)
        index = jnp.where(is_inside, index, jnp.asarray(self.length, index.dtype))
        # Either may lack row axes, always the last ones.
        is_inside, lines = _with_rows(is_inside, rows, 1), _with_rows(lines, rows, 2)
        if lines.shape[-2] == 1:  # one line goes to the index of every step
            is_inside = jnp.any(is_inside, axis=-1, keepdims=True)
        zero = jnp.zeros((), lines.dtype)
        return index, jnp.where(is_inside[..., None], lines, zero)

    def _flat(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """The flat index, from the several numbers of an index."""
        line, *others = numbers
        for x, length in zip(others, self.lengths[1:], strict=True):
            line = line * length + x
        return line

    @property
    def length(self) -> int:
        return prod(self.lengths)

    @property
    def _sides(self) -> list[Side]:
        """One side for each operand: first the indices, then the lines."""
        count = self.index.sizes[2]
        return [self.index] * (len(self.lengths) // count) + [self.lines]

    def row_axes(self, *counts: int) -> tuple[int, int]:
        """How many row axes the term's arrays have, given the operands' row axes."""
        *indices, lines = counts
        index = max(indices)
        return index, lines if self.clips else max(index, lines)

    @property
    def shape(self) -> Shape:
        return (1, self.length, self.lines.sizes[2])

    @property
    def size(self) -> int:
        return prod(self.lines.sizes) + prod(self.index.sizes[:2])


def _wide(index: jax.Array) -> jax.Array:
    """An index in a dtype wide enough for any length."""
    return index.astype("int32") if index.dtype.itemsize < 4 else index


def _with_rows(x: jax.Array, rows: int, own: int) -> jax.Array:
    """An array (B, *rows, ...) with axes of size 1 for the row axes that it lacks.

    `own` axes come after the row axes.
    """
    missing = rows + 1 + own - x.ndim
    return lax.expand_dims(x, range(x.ndim - own, x.ndim - own + missing))


def _a_line_for_each_step(lines: jax.Array, steps: int) -> jax.Array:
    """Repeat lines so that there is one for each index, unless one line goes to all.

    If each step of a scan has one line, it goes to all indices of that step.
    """
    count = lines.shape[-2]
    if count == 1 or not thresholds.exceeds(steps, count):
        return lines
    return jnp.repeat(lines, steps // count, axis=-2)


def scatter_layout(equation: Equation) -> ScatterLayout | None:
    """The layout of a `scatter-add`, or None unless it adds whole lines."""
    operand, indices, updates = (atom.aval for atom in equation.inputs)
    numbers = equation.params["dimension_numbers"]
    axes = tuple(numbers.scatter_dims_to_operand_dims)
    free = tuple(numbers.update_window_dims)
    lengths = tuple(operand.shape[axis] for axis in axes)
    line = [operand.shape[i] for i in _others(operand.shape, axes)]
    if not axes or numbers.operand_batching_dims or not _fits_an_index(lengths):
        return None
    if tuple(numbers.inserted_window_dims) != tuple(sorted(axes)):
        return None
    if [updates.shape[i] for i in free] != line:
        return None

    steps = _others(updates.shape, free)
    lines = whole_side(updates.shape, steps, free)
    if same_along(equation.inputs[2]).issuperset(steps):  # one line goes to all
        sizes = enumerate(updates.shape)
        lines = replace(lines, limit=tuple(1 if i in steps else n for i, n in sizes))
    last = len(indices.shape) - 1  # the axis of the numbers of an index
    return ScatterLayout(
        lengths,
        index=whole_side(indices.shape, range(last), (last,)),
        lines=lines,
        clips=equation.params["mode"] is lax.GatherScatterMode.CLIP,
    )


def _fits_an_index(lengths: Shape) -> bool:
    """Whether a flat index fits into an int32."""
    return prod(lengths) <= jnp.iinfo(jnp.int32).max


def _others(shape: Sequence[int], axes: Iterable[int]) -> list[int]:
    """The axes of an array of this shape that are not in `axes`."""
    taken = set(axes)
    return [i for i in range(len(shape)) if i not in taken]


def _from_lines(shape: Sequence[int], axes: Sequence[int]) -> View:
    """The view from (1, length, n) to an array in which `axes` index the lines."""
    lines_first = (*axes, *_others(shape, axes))
    unfolded = Reshape(tuple(shape[i] for i in lines_first))
    if lines_first == tuple(range(len(shape))):
        return (unfolded,)
    back = tuple(lines_first.index(i) for i in range(len(lines_first)))
    return unfolded, Transpose(back)
