"""Pieces: terms whose axes are known, so that steps of a tail fold into them.

A piece is a value of the tail, for all rows. Each axis of the value belongs to a group:
"B" to blocks, "M" to the left factor, "N" to the right one. In `groups`, the axes of
each group are in the order in which they are flattened.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from ..._trees.algebra import carried_dtype
from ..leaf import Summand
from ..terms import Dense, Outer, Scatter, Weighed
from ..views import Pad, Reshape, Reverse, Shape, Slice, Transpose, View, simplified

Group: TypeAlias = str  # "B", "M" or "N"


@dataclass(frozen=True, eq=False)
class Axis:
    """An axis of a value; two axes are the same if they are the same object."""

    size: int
    group: Group


@dataclass(frozen=True, eq=False)
class Piece:
    """A value of all rows: Σₜ leftₜ rightₜᵀ in each block, times a weight.

    The arrays are those of a term, with row axes behind the blocks. A left factor of
    length 1 repeats along the axes of "M"; likewise the right one.
    """

    axes: tuple[Axis, ...]  # of the value, in its order
    left: jax.Array | None  # (B, *rows, T, m) or (B, *rows, T, 1); None for a scatter
    right: jax.Array  # (B, *rows, T, n) or (B, *rows, T, 1)
    left_rows: int  # how many row axes the left factor has
    right_rows: int
    groups: tuple[Axis, ...]  # the axes in flattening order: of B, of M, of N
    weight: jax.Array | None = None  # (B, m, n), the same for all rows
    index: jax.Array | None = None  # (B, *rows, T) of a scatter
    precision: Any = None
    flops: int = 0  # to fold the tail so far, for one row
    # Steps that only move the entries of the value, after which nothing folds.
    after: View = ()

    @property
    def shape(self) -> Shape:
        return tuple(axis.size for axis in self.axes)

    def of(self, group: Group) -> list[Axis]:
        """The axes of a group, in flattening order."""
        return [axis for axis in self.groups if axis.group == group]

    def size(self, group: Group) -> int:
        return prod(axis.size for axis in self.of(group))

    @property
    def sizes(self) -> tuple[int, int, int]:
        """(B, m, n)."""
        return self.size("B"), self.size("M"), self.size("N")

    def with_factor(self, group: Group, factor: jax.Array, flops: int = 0) -> "Piece":
        """The piece with another factor, which took some operations for each row."""
        name = "left" if group == "M" else "right"
        changes: dict[str, Any] = {name: factor, "flops": self.flops + flops}
        return replace(self, **changes)

    def entries(self, group: Group) -> int:
        """How many entries a factor has for one row."""
        factor = self.left if group == "M" else self.right
        return 0 if factor is None else factor.shape[0] * prod(factor.shape[-2:])

    @property
    def is_scatter(self) -> bool:
        return self.index is not None

    @property
    def is_dense(self) -> bool:
        """Whether the value is no larger than its right factor."""
        return (
            self.weight is None
            and not self.is_scatter
            and self.size("M") == 1
            and self.right.shape[-2] == 1
            and self.left_rows == 0
            and self.size("B") == 1
        )

    def canonical(self, x: jax.Array) -> jax.Array:
        """An array like the value, as (B, m, n)."""
        order = [self.axes.index(axis) for axis in self.groups]
        return lax.transpose(x, order).reshape(self.sizes)

    def repeats(self, group: Group) -> bool:
        """Whether a factor has length 1 and repeats along its axes."""
        factor = self.left if group == "M" else self.right
        return factor is not None and factor.shape[-1] == 1 < self.size(group)


def pieces_of(summand: Summand) -> Piece | None:
    """The piece of a summand of a source, or None if its axes are not clear."""
    term, view = summand.term, summand.view
    if isinstance(term, Dense):
        return _of_dense(summand, term)
    if not isinstance(term, Outer | Scatter):
        return None
    axes = tuple(map(Axis, summand.shape, "BMN"))
    begin = {axis: [axis] for axis in axes}
    found = _after(view, axes, begin)
    if found is None:
        return None
    axes, inner = found
    groups = tuple(axis for own in inner.values() for axis in own)
    if isinstance(term, Outer):
        rows = summand.row_axes
        left, right = map(_carried, (term.left, term.right))
        return Piece(
            axes, left, right, rows[0], rows[1], groups, precision=term.precision
        )
    index_rows, rows = summand.row_axes
    right = _carried(term.right)
    return Piece(axes, None, right, index_rows, rows, groups, index=term.index)


def _carried(x: jax.Array) -> jax.Array:
    return x.astype(carried_dtype(x.dtype))


def _of_dense(summand: Summand, term: Dense) -> Piece | None:
    """A dense term as a right factor, which all axes belong to."""
    if summand.view:
        return None
    (rows,) = summand.row_axes
    at = range(summand.axis, summand.axis + rows)
    value = jnp.moveaxis(term.value, at, range(rows))
    right = _carried(value).reshape(1, *value.shape[:rows], 1, prod(summand.shape))
    axes = tuple(Axis(size, "N") for size in summand.shape)
    ones = jnp.ones((1, 1, 1), right.dtype)
    return Piece(axes, ones, right, 0, rows, axes)


def _after(
    view: View, axes: tuple[Axis, ...], inner: dict[Axis, list[Axis]]
) -> tuple[tuple[Axis, ...], dict[Axis, list[Axis]]] | None:
    """The axes after a view that splits axes and moves them, else None.

    `inner` maps each axis of the term to the axes that it was split into.
    """
    for step in view:
        match step:
            case Transpose(permutation):
                axes = tuple(axes[i] for i in permutation)
            case Reshape(shape):
                found = split(axes, shape)
                if found is None:
                    return None
                for old, new in found:
                    _replace(inner, old, new)
                axes = tuple(axis for _, new in found for axis in new)
            case Slice() | Pad() | Reverse():
                return None
    return axes, inner


def _replace(inner: dict[Axis, list[Axis]], old: list[Axis], new: list[Axis]) -> None:
    """Put axes in the place of others, in the group that they belong to."""
    group = new[0].group if new else old[0].group if old else "B"
    own = next(x for key, x in inner.items() if key.group == group)
    at = own.index(old[0]) if old and old[0] in own else len(own)
    for axis in old:
        for members in inner.values():
            if axis in members:
                members.remove(axis)
    own[at:at] = new


def split(
    axes: Sequence[Axis], shape: Shape
) -> list[tuple[list[Axis], list[Axis]]] | None:
    """Pair the axes before a reshape with new axes after it, else None.

    The axes on each side of a pair have the same number of entries. Several axes are
    merged only if they are of one group; whether they are neighbours in it is for the
    caller to check.
    """
    pairs: list[tuple[list[Axis], list[Axis]]] = []
    for mine, sizes in _of_equal_size([axis.size for axis in axes], list(shape)):
        own = list(axes[mine.start : mine.stop])
        wide = {x.group for x in own if x.size != 1}
        if len(wide) > 1:
            return None
        group = next(iter(wide), own[0].group if own else "N")
        pairs.append(
            (own, [Axis(size, group) for size in shape[sizes.start : sizes.stop]])
        )
    return pairs


def _of_equal_size(old: list[int], new: list[int]) -> list[tuple[range, range]]:
    """The shortest runs of sizes before and after a reshape that have equal products.

    Sizes of 1 make runs of their own, beside an empty run.
    """
    runs, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        first, other = i, j
        if i < len(old) and (old[i] == 1 or j == len(new)):
            i += 1
        elif j < len(new) and (new[j] == 1 or i == len(old)):
            j += 1
        else:
            i, j = i + 1, j + 1
        while prod(old[first:i]) != prod(new[other:j]):
            if prod(old[first:i]) < prod(new[other:j]):
                i += 1
            else:
                j += 1
        runs.append((range(first, i), range(other, j)))
    return runs


def reshaped(piece: Piece, shape: Shape) -> Piece | None:
    """The piece after a reshape of the value, or None."""
    pairs = split(piece.axes, shape)
    if pairs is None:
        return None
    groups = list(piece.groups)
    for old, new in pairs:
        wide = [x for x in old if x.size != 1]
        if not _are_neighbours(wide, groups):
            return None
        start = groups.index(wide[0]) if wide else len(groups)
        if not wide and new:
            start = _end_of(groups, new[0].group)
        kept = [x for x in groups if x not in old]
        before = sum(x not in old for x in groups[:start])
        groups = [*kept[:before], *new, *kept[before:]]
    axes = tuple(axis for _, new in pairs for axis in new)
    return replace(piece, axes=axes, groups=in_order(groups))


def _are_neighbours(axes: Sequence[Axis], groups: Sequence[Axis]) -> bool:
    """Whether axes are flattened one after another, in this order."""
    wide = [x for x in groups if x.size != 1]
    places = [wide.index(x) for x in axes]
    return places == list(range(places[0], places[0] + len(axes))) if axes else True


def oriented(piece: Piece) -> Piece:
    """The piece with the first axis of the value in its left factor, if possible.

    Arrays that multiply the value then need no transpose.
    """
    wide = [axis for axis in piece.axes if axis.size != 1 and axis.group != "B"]
    groups = [axis.group for axis in wide]
    if piece.is_scatter or piece.weight is not None or "M" not in groups:
        return piece
    if groups[0] == "M":
        return piece
    assert piece.left is not None
    swapped = {x: Axis(x.size, _SWAPPED[x.group]) for x in piece.groups}
    return replace(
        piece,
        axes=tuple(swapped[x] for x in piece.axes),
        groups=in_order([swapped[x] for x in piece.groups]),
        left=piece.right,
        right=piece.left,
        left_rows=piece.right_rows,
        right_rows=piece.left_rows,
        precision=_swapped_precision(piece.precision),
    )


_SWAPPED = {"B": "B", "M": "N", "N": "M"}


def _swapped_precision(precision: Any) -> Any:
    return precision[::-1] if isinstance(precision, tuple) else precision


def _end_of(groups: Sequence[Axis], group: Group) -> int:
    at = [i for i, x in enumerate(groups) if "BMN".index(x.group) <= "BMN".index(group)]
    return at[-1] + 1 if at else 0


def in_order(groups: Sequence[Axis]) -> tuple[Axis, ...]:
    """Axes by group, with the order inside each group unchanged."""
    return tuple(sorted(groups, key=lambda axis: "BMN".index(axis.group)))


# --------------------------------------------------------------------------------------
# Back to summands


def summand_of(piece: Piece, factor: float) -> Summand:
    """The summand of a piece."""
    unfolded = Reshape(tuple(axis.size for axis in piece.groups))
    back = Transpose(tuple(piece.groups.index(axis) for axis in piece.axes))
    in_place = tuple(range(len(piece.axes)))
    view: View = (unfolded,) if back.permutation == in_place else (unfolded, back)
    if piece.is_dense:
        return _dense_summand(piece, factor)
    sizes = piece.sizes
    if piece.is_scatter:
        assert piece.index is not None
        term: Any = Scatter(piece.index, piece.right, sizes[1])
        row_axes = (piece.left_rows, piece.right_rows)
    elif piece.weight is None:
        term = Outer(wide(piece, "M"), wide(piece, "N"), piece.precision)
        row_axes = (piece.left_rows, piece.right_rows)
    else:
        assert piece.left is not None
        term = Weighed(piece.left, piece.right, piece.weight, piece.precision)
        row_axes = (piece.left_rows, piece.right_rows, 0)
    return Summand(
        term=term,
        shape=sizes,
        axis=1,
        view=simplified(view + piece.after, sizes),
        factor=factor,
        row_axes=row_axes,
        reason="",
        folding=piece.flops,
    )


def _dense_summand(piece: Piece, factor: float) -> Summand:
    assert piece.left is not None
    right = wide(piece, "N") * piece.left[..., 0, 0].reshape(())
    rows = right.shape[1 : 1 + piece.right_rows]
    own = tuple(axis.size for axis in piece.groups)
    back = Transpose(tuple(piece.groups.index(axis) for axis in piece.axes))
    return Summand(
        term=Dense(right.reshape(*rows, *own)),
        shape=own,
        axis=0,
        view=simplified((back, *piece.after), own),
        factor=factor,
        row_axes=(piece.right_rows,),
        reason="the example enters last",
        folding=piece.flops,
    )


def wide(piece: Piece, group: Group) -> jax.Array:
    """A factor in full length."""
    factor = piece.left if group == "M" else piece.right
    assert factor is not None
    return jnp.broadcast_to(factor, (*factor.shape[:-1], piece.size(group)))
