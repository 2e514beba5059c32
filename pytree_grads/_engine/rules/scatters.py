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
    found = scatter_layout(equation)
    if found is None:
        return None
    layout, axes = found
    operand, *rest = equation.inputs
    lines_first = _from_lines(operand.aval.shape, axes)
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
    # The axes of the indices along which index i goes to line i, one for each of the
    # first `lengths`.
    batch_at: Shape = ()
    # Which numbers of an index the other lengths have; None for all of several arrays.
    numbers_at: Shape | None = None
    # Numbers of an index that must be zero: a line has all entries along that axis.
    zeros_at: Shape = ()

    def __call__(
        self, operands: Sequence[jax.Array], frames: Sequence[Frame]
    ) -> Scatter:
        triples = zip(self._sides, operands, frames, strict=True)
        *indices, lines = (side(x, frame) for side, x, frame in triples)
        index_rows = max(frame.rows for frame in frames[:-1])
        # (B, *rows, T) for each number of an index
        given = [
            _with_rows(_wide(x[..., i]), index_rows, 1)
            for x in indices
            for i in range(x.shape[-1])
        ]
        named = range(len(given)) if self.numbers_at is None else self.numbers_at
        numbers = [self._own_line(axis, given[0]) for axis in self.batch_at]
        numbers += [given[i] for i in named]
        zeros = [given[i] for i in self.zeros_at]
        lines = _a_line_for_each_step(lines, numbers[0].shape[-1])
        if self.clips:
            return Scatter(self._clipped(numbers), lines, self.length)
        rows = max(index_rows, frames[-1].rows)
        index, lines = self._without_outside(numbers, zeros, lines, rows)
        return Scatter(index, lines, self.length)

    def _own_line(self, axis: int, like: jax.Array) -> jax.Array:
        """The position of each look-up along an axis of the indices."""
        shape = self.index.limit[:-1]
        steps = lax.broadcasted_iota(like.dtype, shape, axis).reshape(-1)
        repeats = like.shape[-1] // max(1, steps.size)  # steps of scans come first
        return jnp.broadcast_to(jnp.tile(steps, repeats), like.shape)

    def _clipped(self, numbers: Sequence[jax.Array]) -> jax.Array:
        """The flat index of the nearest line."""
        pairs = zip(numbers, self.lengths, strict=True)
        return self._flat([jnp.clip(x, 0, length - 1) for x, length in pairs])

    def _without_outside(
        self,
        numbers: Sequence[jax.Array],
        zeros: Sequence[jax.Array],
        lines: jax.Array,
        rows: int,
    ) -> tuple[jax.Array, jax.Array]:
        """The flat index, and the lines, which are zero if their index is out of range.

        This holds also in the mode in which the user promises that no index is.
        """
        pairs = zip(numbers, self.lengths, strict=True)
        inside = [(x >= 0) & (x < length) for x, length in pairs]
        inside += [x == 0 for x in zeros]
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
        if self.numbers_at is not None:
            return [self.index, self.lines]
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
    def sizes(self) -> tuple[int, ...]:
        return prod(self.index.sizes[:2]), prod(self.lines.sizes)


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


def scatter_layout(equation: Equation) -> tuple[ScatterLayout, Shape] | None:
    """The layout of a `scatter-add`, or None unless it adds whole lines.

    The second result has the axes of the operand that index the lines. Along each of
    them, an update has one entry; along all others, it has all entries.
    """
    operand, indices, updates = (atom.aval for atom in equation.inputs)
    numbers = equation.params["dimension_numbers"]
    named = tuple(numbers.scatter_dims_to_operand_dims)
    batched = tuple(numbers.operand_batching_dims)
    free = tuple(numbers.update_window_dims)
    gone = {*numbers.inserted_window_dims, *batched}
    windows = dict(zip(_others(operand.shape, gone), free, strict=True))
    # The axes of an update with one entry; those with all entries need no index.
    axes = [i for i in named if i in gone or operand.shape[i] != 1]
    axes = [i for i in axes if i in gone or updates.shape[windows[i]] == 1]
    lengths = tuple(operand.shape[i] for i in (*batched, *axes))
    whole = [i for i in windows if i not in axes]
    if not lengths or not _fits_an_index(lengths):
        return None
    if any(updates.shape[windows[i]] != operand.shape[i] for i in whole):
        return None
    if gone - {*axes, *batched}:
        return None

    ones = [windows[i] for i in axes if i in windows]
    steps = _others(updates.shape, free)
    lines = whole_side(updates.shape, [*steps, *ones], [windows[i] for i in whole])
    if same_along(equation.inputs[2]).issuperset(steps):  # one line goes to all
        sizes = enumerate(updates.shape)
        lines = replace(lines, limit=tuple(1 if i in steps else n for i, n in sizes))
    last = len(indices.shape) - 1  # the axis of the numbers of an index
    layout = ScatterLayout(
        lengths,
        index=whole_side(indices.shape, range(last), (last,)),
        lines=lines,
        clips=equation.params["mode"] is lax.GatherScatterMode.CLIP,
        batch_at=tuple(numbers.scatter_indices_batching_dims),
        numbers_at=tuple(named.index(i) for i in axes),
        zeros_at=tuple(j for j, i in enumerate(named) if i not in axes),
    )
    return layout, (*batched, *axes)


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
