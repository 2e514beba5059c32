"""Fold a tail into factors: the terms of leaves from the terms of its sources.

The program of a tail is interpreted on pieces (see `axes`) in place of arrays. Each
value is a sum of pieces with numbers. An equation that acts on one factor alone is
applied to that factor. An array that multiplies entry by entry becomes the weight of a
piece. If an equation fits none of these, the leaves behind it do not fold; their rows
go through the tail.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from .. import thresholds
from ..einsum import dot
from ..facts import concrete_scalar, is_zero, same_along
from ..graph import Atom, Equation, Known
from ..leaf import Leaf
from ..products.routes import norm_route
from ..rules.structural import pad
from ..views import Pad, Reshape, Slice, Transpose, View, part_of, simplified
from .axes import (
    Axis,
    Group,
    Piece,
    in_order,
    oriented,
    pieces_of,
    reshaped,
    summand_of,
    wide,
)
from .tail import Tail
from .through import through

Sum: TypeAlias = dict[Piece, float]  # pieces that add up, each with a number

_MOST_PIECES = 8  # of a leaf; inner products take all pairs


def fold(tail: Tail, sources: Sequence[Leaf]) -> list[Leaf]:
    """The leaves of a tail: folded into terms where that is possible and cheaper."""
    folding = _Folding(tail)
    for atom, source in zip(tail.program.sources, sources, strict=True):
        folding.values[atom] = _pieces(source)
    for equation in tail.program.graph.equations:
        folding.step(equation)
    found = []
    for i, atom in enumerate(tail.program.graph.outputs):
        rows = through(tail, i, sources)
        folded = _leaf(folding.read(atom), rows)
        found.append(folded if folded is not None else rows)
    return found


def _pieces(source: Leaf) -> Sum | None:
    if not prod(source.shape):
        return None
    found: Sum = {}
    for summand in source.summands:
        piece = pieces_of(summand)
        if piece is None:
            return None
        found[piece] = summand.factor
    return found


def _leaf(value: Sum | None, rows: Leaf) -> Leaf | None:
    """A leaf that is a sum of pieces, if that takes fewer operations than rows."""
    if value is None:
        return None
    value = _joined(value)
    if len(value) > _MOST_PIECES:
        return None
    aligned = _aligned(list(value))
    summands = tuple(map(summand_of, aligned, value.values()))
    leaf = replace(rows, summands=summands)
    if thresholds.exceeds(norm_route(leaf).flops, norm_route(rows).flops):
        return None
    return leaf


def _joined(value: Sum) -> Sum:
    """Add the weights of pieces that have the same factors."""
    groups: dict[Any, list[Piece]] = {}
    for piece in value:
        own = id(piece.left), id(piece.right), piece.axes, piece.groups, piece.after
        groups.setdefault(own if not piece.is_scatter else id(piece), []).append(piece)
    found: Sum = {}
    for pieces in groups.values():
        first = pieces[0]
        if len(pieces) == 1 or not any(x.weight is not None for x in pieces):
            found |= {piece: value[piece] for piece in pieces}
            continue
        weights = [
            value[x]
            * (jnp.ones(x.sizes, x.right.dtype) if x.weight is None else x.weight)
            for x in pieces
        ]
        total = reduce(jnp.add, weights)
        flops = max(x.flops for x in pieces)
        found[replace(first, weight=total, flops=flops)] = 1.0
    return found


def _weight(piece: Piece) -> jax.Array:
    if piece.weight is None:
        return jnp.ones(piece.sizes, piece.right.dtype)
    return piece.weight


def _aligned(pieces: list[Piece]) -> list[Piece]:
    """The pieces, with the axes of the leaf in the groups of the largest piece.

    Inner products of pieces can then be taken factor by factor.
    """
    full = [x for x in pieces if not x.is_dense and x.left_rows and x.right_rows]
    if not full:
        return pieces
    guide = max(full, key=lambda x: min(x.size("M"), x.size("N")))
    return [x if x is guide else _like(x, guide) for x in pieces]


def _like(piece: Piece, guide: Piece) -> Piece:
    """A piece whose left factor repeats, with the groups of another if possible."""
    piece = _with_shared_weight(piece)
    if piece.is_scatter or piece.left is None or not piece.repeats("M"):
        return piece
    places = {
        group: [guide.axes.index(x) for x in guide.of(group) if x.size != 1]
        for group in "BMN"
    }
    own = [piece.axes.index(x) for x in piece.of("N") if x.size != 1]
    if places["B"] or piece.size("B") != 1 or own not in ([], places["M"], places["N"]):
        return piece
    axes = tuple(
        Axis(x.size, "M" if i in places["M"] else "N") for i, x in enumerate(piece.axes)
    )
    order = [*places["M"], *places["N"]]
    order += [i for i in range(len(axes)) if i not in order]
    groups = in_order([axes[i] for i in order])
    left, right, counts = piece.left, piece.right, (piece.left_rows, piece.right_rows)
    if own and own == places["M"]:
        left, right, counts = right, left, counts[::-1]
    weight = piece.weight
    if weight is not None:
        whole = weight.reshape([x.size for x in piece.groups])
        back = [piece.groups.index(x) for x in piece.axes]
        whole = lax.transpose(whole, back)
        sizes = (1, prod(axes[i].size for i in places["M"]), -1)
        weight = lax.transpose(whole, [axes.index(x) for x in groups]).reshape(sizes)
    return replace(
        piece,
        axes=axes,
        groups=groups,
        left=left,
        right=right,
        left_rows=counts[0],
        right_rows=counts[1],
        weight=weight,
    )


def _with_shared_weight(piece: Piece) -> Piece:
    """A piece whose left factor is shared, with that factor in its weight."""
    if piece.is_scatter or piece.left is None or piece.left_rows:
        return piece
    if piece.size("M") == 1 or piece.left.shape[-1] == 1 or piece.left.shape[-2] != 1:
        return piece
    weight = jnp.broadcast_to(piece.left[:, 0, :, None], piece.sizes)
    weight = weight if piece.weight is None else weight * piece.weight
    ones = jnp.ones((piece.left.shape[0], 1, 1), piece.left.dtype)
    return replace(piece, left=ones, weight=weight)


class _Folding:
    """The values of a program as sums of pieces; None for those that do not fold.

    Values without pieces are shared.
    """

    def __init__(self, tail: Tail):
        self.program = tail.program
        inputs = self.program.graph.inputs[self.program.source_count :]
        self.shared: dict[Atom, Any] = dict(zip(inputs, tail.shared, strict=True))
        self.values: dict[Atom, Sum | None] = {}
        self._scaled: dict[tuple[Piece, Atom, bool], Piece | None] = {}

    def read(self, atom: Atom) -> Sum | None:
        """The pieces of a value; None for a shared one that is not zero."""
        if atom in self.values:
            return self.values[atom]
        if is_zero(atom):
            return {}
        return None

    def coefficient(self, atom: Atom) -> jax.Array:
        return jnp.asarray(atom.value if isinstance(atom, Known) else self.shared[atom])

    def step(self, equation: Equation) -> None:
        """Interpret one equation."""
        if not any(x in self.values for x in equation.inputs):
            operands = [
                x.value if isinstance(x, Known) else self.shared[x]
                for x in equation.inputs
            ]
            found = equation.evaluate(operands)
            self.shared.update(zip(equation.outputs, found, strict=True))
            return
        rule = _RULES.get(equation.primitive)
        for value in equation.outputs:
            folds = rule is not None and all(value.aval.shape)
            made = rule(self, equation, value.index) if rule and folds else None
            if made is not None and len(made) > 4 * _MOST_PIECES:
                made = None
            self.values[value] = made

    def each(
        self,
        atom: Atom,
        fun: Callable[[Piece], Piece | None],
        moves: View | None = None,
    ) -> Sum | None:
        """Apply a function to each piece of a value.

        If it does not apply, steps that only move entries are put behind the piece.
        """
        value = self.read(atom)
        if value is None:
            return None
        found: Sum = {}
        for piece, factor in value.items():
            made = None if piece.after else fun(piece)
            if made is None and moves is not None:
                made = replace(piece, after=piece.after + moves)
            if made is None:
                return None
            found[made] = found.get(made, 0.0) + factor
        return found

    def scaled(self, piece: Piece, atom: Atom, *, inverse: bool) -> Piece | None:
        """A piece times a shared array, or divided by it, entry by entry."""
        key = piece, atom, inverse
        if key not in self._scaled:
            x = self.coefficient(atom).astype(piece.right.dtype)
            x = 1 / x if inverse else x
            same = same_along(atom)
            if x.ndim:
                same |= {i for i, size in enumerate(x.shape) if size == 1}
                x = jnp.broadcast_to(x, piece.shape)
            self._scaled[key] = _times(piece, x, same)
        return self._scaled[key]


Rule: TypeAlias = Callable[[_Folding, Equation, int], Sum | None]
_RULES: dict[Primitive | None, Rule] = {}


def _rule(*primitives: Primitive | None) -> Callable[[Rule], Rule]:
    def register(fun: Rule) -> Rule:
        _RULES.update(dict.fromkeys(primitives, fun))
        return fun

    return register


# --------------------------------------------------------------------------------------
# Sums, numbers, arrays that multiply entry by entry


@_rule(p.add_p, p.add_jaxvals_p)
def _add(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    return _total(folding, equation, (1.0, 1.0))


@_rule(p.sub_p)
def _sub(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    return _total(folding, equation, (1.0, -1.0))


@_rule(p.neg_p)
def _neg(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    return _total(folding, equation, (-1.0,))


def _total(folding: _Folding, equation: Equation, signs: Sequence[float]) -> Sum | None:
    found: Sum = {}
    for atom, sign in zip(equation.inputs, signs, strict=True):
        value = folding.read(atom)
        if value is None or atom.aval.shape != equation.outputs[0].aval.shape:
            return None
        for piece, factor in value.items():
            found[piece] = found.get(piece, 0.0) + sign * factor
    return found


@_rule(p.convert_element_type_p, p.copy_p, p.name_p)
def _same(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    return folding.read(equation.inputs[0])


@_rule(None)
def _barrier(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    return folding.read(equation.inputs[index])


@_rule(p.mul_p)
def _mul(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    left, right = equation.inputs
    own, other = (left, right) if left in folding.values else (right, left)
    return _by(folding, own, other, inverse=False)


@_rule(p.div_p)
def _div(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    return _by(folding, *equation.inputs, inverse=True)


def _by(folding: _Folding, own: Atom, other: Atom, *, inverse: bool) -> Sum | None:
    number = concrete_scalar(other)
    value = folding.read(own)
    if value is None:
        return None
    if number is not None and (number or not inverse):
        times = 1 / number if inverse else number
        return {piece: factor * times for piece, factor in value.items()}
    shapes = own.aval.shape, other.aval.shape
    if shapes[1] and len(shapes[0]) != len(shapes[1]):
        return None
    shape = tuple(max(pair) for pair in zip(*shapes, strict=True)) if shapes[1] else ()

    def product(piece: Piece) -> Piece | None:
        if shape and shape != piece.shape:
            wider = _spread(piece, shape, range(len(shape)))
            if wider is None:
                return None
            piece = wider
        return folding.scaled(piece, other, inverse=inverse)

    return folding.each(own, product)


@_rule(p.select_n_p)
def _select(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    which, *cases = equation.inputs
    found: Sum = {}
    for i, case in enumerate(cases):
        if is_zero(case):
            continue
        cases_at = folding.coefficient(which)
        chosen = cases_at == jnp.asarray(i, cases_at.dtype)

        def keep(piece: Piece, chosen: jax.Array = chosen) -> Piece | None:
            return _times(piece, chosen.astype(piece.right.dtype), frozenset())

        made = folding.each(case, keep)
        if made is None:
            return None
        found |= made
    return found


def _times(piece: Piece, x: jax.Array, same: frozenset[int]) -> Piece | None:
    """A piece times a shared array, which repeats its entries along some axes."""
    if x.ndim == 0:
        return piece.with_factor("N", piece.right * x, piece.entries("N"))
    axes = [a for i, a in enumerate(piece.axes) if a.size != 1 and i not in same]
    groups = {axis.group for axis in axes}
    if piece.is_scatter:
        return _scatter_times(piece, piece.canonical(x))
    if not groups >= {"M", "N"}:
        group = "M" if "M" in groups else "N"
        return _factor_times(piece, group, piece.canonical(x))
    x = piece.canonical(x)
    return replace(piece, weight=x if piece.weight is None else piece.weight * x)


def _factor_times(piece: Piece, group: Group, x: jax.Array) -> Piece:
    """Multiply one factor by numbers (B, m, n) that differ along its axes only."""
    numbers = x[:, :, 0] if group == "M" else x[:, 0, :]
    factor = piece.left if group == "M" else piece.right
    rows = piece.left_rows if group == "M" else piece.right_rows
    assert factor is not None
    numbers = numbers.reshape(numbers.shape[0], *[1] * (rows + 1), numbers.shape[1])
    return piece.with_factor(group, factor * numbers, piece.entries(group))


def _scatter_times(piece: Piece, x: jax.Array) -> Piece:
    """Multiply each line of a scatter by the line (B, m, n) of its index."""
    assert piece.index is not None
    rows = piece.index.shape[1:-1]
    index = jnp.clip(piece.index, 0, x.shape[1] - 1)
    flat = index.reshape(index.shape[0], -1, 1)
    lines = jnp.take_along_axis(x, flat, axis=1)
    lines = lines.reshape(index.shape[0], *rows, index.shape[-1], x.shape[2])
    lines, right = _with_equal_rows(
        lines, piece.left_rows, piece.right, piece.right_rows
    )
    most = max(piece.left_rows, piece.right_rows)
    flops = piece.flops + piece.entries("N")
    return replace(piece, right=right * lines, right_rows=most, flops=flops)


def _with_equal_rows(
    x: jax.Array, x_rows: int, y: jax.Array, y_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Two arrays (B, *rows, ...), with axes of size 1 for row axes that one lacks."""

    def wide(z: jax.Array, rows: int) -> jax.Array:
        return lax.expand_dims(z, range(1 + rows, 1 + max(x_rows, y_rows)))

    return wide(x, x_rows), wide(y, y_rows)


# --------------------------------------------------------------------------------------
# Steps that move axes


@_rule(p.transpose_p)
def _transpose(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    order = equation.params["permutation"]
    return folding.each(
        equation.inputs[0],
        lambda x: oriented(replace(x, axes=tuple(x.axes[i] for i in order))),
        (Transpose(tuple(order)),),
    )


@_rule(p.reshape_p, p.squeeze_p)
def _reshape(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    if (
        equation.params.get("dimensions") is not None
        and equation.primitive is p.reshape_p
    ):
        return None
    shape = tuple(equation.outputs[0].aval.shape)
    moved = (Reshape(shape),)
    return folding.each(equation.inputs[0], lambda x: reshaped(x, shape), moved)


@_rule(p.broadcast_in_dim_p)
def _broadcast(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    shape = tuple(equation.outputs[0].aval.shape)
    places = equation.params["broadcast_dimensions"]

    def spread(piece: Piece) -> Piece | None:
        return _spread(piece, shape, places)

    return folding.each(equation.inputs[0], spread)


def _spread(piece: Piece, shape: Sequence[int], places: Sequence[int]) -> Piece | None:
    """Repeat a piece along new axes, which join the left group.

    The left factor must repeat already, or have one entry.
    """
    kept = {place: axis for axis, place in zip(piece.axes, places, strict=True)}
    axes = [
        kept[i] if i in kept and kept[i].size == size else Axis(size, "M")
        for i, size in enumerate(shape)
    ]
    new = [axis for axis in axes if axis not in piece.axes]
    dropped = [axis for axis in piece.axes if axis not in axes]  # of size 1
    groups = [axis for axis in piece.groups if axis not in dropped]
    groups = list(in_order([*groups, *new]))
    if prod(x.size for x in new) == 1:
        return replace(piece, axes=tuple(axes), groups=tuple(groups))
    if piece.is_scatter or piece.left is None or piece.left.shape[-1] != 1:
        return None
    weight = piece.weight
    if weight is not None:
        return None
    return replace(piece, axes=tuple(axes), groups=tuple(groups))


@_rule(p.rev_p)
def _rev(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    dimensions = equation.params["dimensions"]

    def flip(x: jax.Array, axis: int) -> jax.Array:
        return lax.rev(x, (axis,))

    def flipped(piece: Piece) -> Piece | None:
        for i in dimensions:
            made = _along(
                piece,
                i,
                lambda x, axis: lax.rev(x, (axis,)),
                piece.shape[i],
                moves=True,
            )
            if made is None:
                return None
            piece = made
        return piece

    return folding.each(equation.inputs[0], flipped)


@_rule(p.cumsum_p)
def _cumsum(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    axis, reverse = equation.params["axis"], equation.params["reverse"]

    def summed(piece: Piece) -> Piece | None:
        return _along(
            piece, axis, lambda x, i: lax.cumsum(x, i, reverse), piece.shape[axis]
        )

    return folding.each(equation.inputs[0], summed)


@_rule(p.slice_p)
def _slice(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    params, sizes = equation.params, equation.outputs[0].aval.shape
    strides = params["strides"] or (1,) * len(sizes)

    def cut(piece: Piece) -> Piece | None:
        bounds = zip(
            params["start_indices"], params["limit_indices"], strides, strict=True
        )
        for i, (start, limit, stride) in enumerate(bounds):
            if (start, limit, stride) == (0, piece.shape[i], 1):
                continue

            def part(
                x: jax.Array, axis: int, bound: Any = (start, limit, stride)
            ) -> Any:
                return lax.slice_in_dim(x, *bound, axis=axis)

            made = _along(piece, i, part, sizes[i], moves=True)
            if made is None:
                return None
            piece = made
        return piece

    return folding.each(equation.inputs[0], cut)


@_rule(p.pad_p)
def _pad(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    operand, fill = equation.inputs
    config, sizes = equation.params["padding_config"], equation.outputs[0].aval.shape
    if not is_zero(fill):
        return None

    def padded(piece: Piece) -> Piece | None:
        for i, own in enumerate(config):
            if not any(own):
                continue

            def more(x: jax.Array, axis: int, own: Any = own) -> jax.Array:
                pads = [(0, 0, 0)] * x.ndim
                pads[axis] = own
                return lax.pad(x, jnp.zeros((), x.dtype), pads)

            made = _along(piece, i, more, sizes[i], moves=True)
            if made is None:
                return None
            piece = made
        return piece

    steps = pad(equation, equation.outputs[0])
    moved = None if steps is None else simplified(steps, tuple(operand.aval.shape))
    is_cut = moved is None or any(isinstance(step, Slice) for step in moved)
    return folding.each(operand, padded, None if is_cut else moved)


@_rule(lax.split_p)
def _split(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    start = sum(sizes[:index])

    def part(x: jax.Array, i: int) -> jax.Array:
        return lax.slice_in_dim(x, start, start + sizes[index], axis=i)

    def cut(piece: Piece) -> Piece | None:
        return _along(piece, axis, part, sizes[index], moves=True)

    return folding.each(equation.inputs[0], cut)


@_rule(p.dynamic_update_slice_p)
def _write(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    """An array written into zeros at a known place."""
    operand, update, *starts = equation.inputs
    at = [concrete_scalar(x) for x in starts]
    if not is_zero(operand) or any(x is None for x in at):
        return None
    whole, taken = operand.aval.shape, update.aval.shape
    first = [
        max(0, min(int(x), n - own))  # as JAX clamps it
        for x, n, own in zip((x or 0 for x in at), whole, taken, strict=True)
    ]

    def placed(piece: Piece) -> Piece | None:
        for i, (start, own, n) in enumerate(zip(first, taken, whole, strict=True)):
            if own == n:
                continue

            def more(x: jax.Array, axis: int, pads: Any = (start, n - own - start, 0)):
                config = [(0, 0, 0)] * x.ndim
                config[axis] = pads
                return lax.pad(x, jnp.zeros((), x.dtype), config)

            made = _along(piece, i, more, n, moves=True)
            if made is None:
                return None
            piece = made
        return piece

    return folding.each(update, placed)


@_rule(p.concatenate_p)
def _concatenate(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    axis, total = equation.params["dimension"], equation.outputs[0].aval.shape
    start, found = 0, {}
    for atom in equation.inputs:
        size = atom.aval.shape[axis]
        own = (start, total[axis] - start - size, 0)
        box = part_of(total, axis, start, size)
        moved = (Pad(box.start, box.limit, tuple(total), box.strides),)

        def placed(piece: Piece, own: Any = own) -> Piece | None:
            def more(x: jax.Array, i: int) -> jax.Array:
                pads = [(0, 0, 0)] * x.ndim
                pads[i] = own
                return lax.pad(x, jnp.zeros((), x.dtype), pads)

            return _along(piece, axis, more, total[axis], moves=True)

        made = folding.each(atom, placed, moved)
        if made is None:
            return None
        found |= made
        start += size
    return found


@_rule(p.scatter_add_p)
def _scatter(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    """Add entries along one axis to zeros, at shared indices."""
    operand, indices, updates = equation.inputs
    numbers = equation.params["dimension_numbers"]
    shape, sizes = operand.aval.shape, updates.aval.shape
    axes = numbers.scatter_dims_to_operand_dims
    if len(axes) != 1 or tuple(numbers.inserted_window_dims) != tuple(axes):
        return None
    if numbers.operand_batching_dims or not is_zero(operand):
        return None
    at = [i for i in range(len(sizes)) if i not in numbers.update_window_dims]
    if len(at) != 1 or [sizes[i] for i in numbers.update_window_dims] != [
        n for i, n in enumerate(shape) if i != axes[0]
    ]:
        return None
    clips = equation.params["mode"] is lax.GatherScatterMode.CLIP
    where = folding.coefficient(indices).reshape(-1)
    where = jnp.clip(where, 0, shape[axes[0]] - 1) if clips else where
    where = jnp.where(where < 0, shape[axes[0]], where)

    def moved(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.moveaxis(x, axis, 0)
        empty = jnp.zeros((shape[axes[0]], *x.shape[1:]), x.dtype)
        return jnp.moveaxis(empty.at[where].add(x, mode="drop"), 0, axis)

    def placed(piece: Piece) -> Piece | None:
        made = _along(piece, at[0], moved, shape[axes[0]])
        if made is None:
            return None
        order = list(made.axes)
        order.insert(axes[0], order.pop(at[0]))
        return replace(made, axes=tuple(order))

    return folding.each(updates, placed)


def _along(
    piece: Piece,
    i: int,
    fun: Callable[[jax.Array, int], jax.Array],
    size: int,
    *,
    moves: bool = False,
) -> Piece | None:
    """Apply a linear map along one axis of a value to the factor that it belongs to.

    `fun(x, axis)` maps an array along an axis; afterwards the axis has `size` entries.
    If it only moves entries or adds zeros, it acts on a weight as well.
    """
    axis = piece.axes[i]
    piece, axis = _with_own_group(piece, axis)
    if axis.group == "B" or (piece.is_scatter and axis.group == "M"):
        return None
    if piece.weight is not None and not moves:
        return None
    group, own = axis.group, piece.of(axis.group)
    new = Axis(size, group)
    swapped = replace(
        piece,
        axes=tuple(new if x is axis else x for x in piece.axes),
        groups=tuple(new if x is axis else x for x in piece.groups),
    )
    if piece.weight is not None:
        whole = piece.weight.reshape([x.size for x in piece.groups])
        weight = fun(whole, piece.groups.index(axis)).reshape(swapped.sizes)
        swapped = replace(swapped, weight=weight)
        if piece.repeats(group):
            return swapped
    factor = wide(piece, group)
    lead = factor.shape[:-1]
    tensor = factor.reshape(*lead, *(x.size for x in own))
    made = fun(tensor, len(lead) + own.index(axis)).reshape(*lead, -1)
    return swapped.with_factor(group, made, piece.entries(group))


def _with_own_group(piece: Piece, axis: Axis) -> tuple[Piece, Axis]:
    """An axis of size 1 of a dense piece, moved to the left factor.

    If it becomes longer, the piece stays as small as it is.
    """
    if axis.size != 1 or not piece.is_dense or len(piece.axes) == 1:
        return piece, axis
    own = Axis(1, "M")
    groups = in_order([own if x is axis else x for x in piece.groups])
    axes = tuple(own if x is axis else x for x in piece.axes)
    return replace(piece, axes=axes, groups=groups), own


# --------------------------------------------------------------------------------------
# Contractions


@_rule(p.reduce_sum_p)
def _reduce(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    axes = equation.params["axes"]
    return folding.each(equation.inputs[0], lambda x: _summed(x, axes))


def _summed(piece: Piece, axes: Sequence[int]) -> Piece | None:
    """The sum of a piece over some axes of the value."""
    gone = [piece.axes[i] for i in axes]
    if piece.is_scatter:
        return _summed_scatter(piece, gone)
    if any(axis.group == "B" and axis.size != 1 for axis in gone):
        return None
    if piece.weight is not None:
        contracted = _contracted(piece, gone)
        if contracted is None:
            return None
        piece = contracted
    for group in "MN":
        piece = _factor_summed(piece, group, [x for x in gone if x.group == group])
    left = tuple(x for x in piece.axes if x not in gone)
    groups = tuple(x for x in piece.groups if x not in gone)
    return _collapsed(replace(piece, axes=left, groups=groups))


def _factor_summed(piece: Piece, group: Group, gone: list[Axis]) -> Piece:
    if not gone:
        return piece
    own = piece.of(group)
    factor = piece.left if group == "M" else piece.right
    assert factor is not None
    if piece.repeats(group):
        count = float(prod(x.size for x in gone))
        return piece.with_factor(group, factor * count, piece.entries(group))
    lead = factor.shape[:-1]
    tensor = factor.reshape(*lead, *(x.size for x in own))
    places = [len(lead) + own.index(x) for x in gone]
    total = jnp.sum(tensor, places).reshape(*lead, -1)
    return piece.with_factor(group, total, piece.entries(group))


def _contracted(piece: Piece, gone: list[Axis]) -> Piece | None:
    """A weighed piece, summed over all axes of one factor: the weight goes with it.

    Σₘ weightₘₙ aₘ bₙ = (aᵀ weight)ₙ bₙ
    """
    wide_axes = {group: [x for x in piece.of(group) if x.size != 1] for group in "MN"}
    whole = [g for g in "MN" if wide_axes[g] and set(wide_axes[g]) <= set(gone)]
    if not whole:
        return None
    group = whole[0]
    weight = piece.weight
    assert weight is not None
    assert piece.left is not None
    factor, other = piece.left, piece.right
    counts = piece.left_rows, piece.right_rows
    if group == "N":
        factor, other, counts = other, factor, counts[::-1]
        weight = jnp.swapaxes(weight, 1, 2)
    if factor.shape[-1] == 1 < weight.shape[1]:
        weight = jnp.sum(weight, 1, keepdims=True)
    lead = factor.shape[:-1]
    flat = factor.reshape(lead[0], -1, factor.shape[-1])
    images = dot("bzm,bmn->bzn", flat, weight).reshape(*lead, -1)
    images, other = _with_equal_rows(images, counts[0], other, counts[1])
    made = images * other  # (B, *rows, T, n)
    # All that is left is in one factor. The other is a number; its axes are summed
    # over once more below, so it is divided by how many entries it has.
    count = prod(x.size for x in wide_axes[group])
    one = jnp.full((1, 1, 1), 1 / count, made.dtype)
    one = jnp.broadcast_to(one, (made.shape[0], made.shape[-2], 1))
    rows = max(counts)
    pairs = piece.left.shape[0] * piece.left.shape[-2]
    flops = piece.flops + pairs * (2 * prod(weight.shape[1:]) + made.shape[-1])
    bare = replace(piece, weight=None, flops=flops)
    if group == "M":
        return replace(bare, left=one, right=made, left_rows=0, right_rows=rows)
    return replace(bare, left=made, right=one, left_rows=rows, right_rows=0)


def _collapsed(piece: Piece) -> Piece:
    """Add up the pairs of a piece that has one line or one column."""
    if piece.size("M") != 1 and piece.size("N") != 1:
        return piece
    if piece.is_dense or piece.weight is not None or piece.size("B") != 1:
        return piece
    assert piece.left is not None
    left, right = _with_equal_rows(
        wide(piece, "M"), piece.left_rows, wide(piece, "N"), piece.right_rows
    )
    total = jnp.sum(left * right, axis=-2, keepdims=True)
    renamed = {x: Axis(x.size, "N") for x in piece.groups}
    return replace(
        piece,
        axes=tuple(renamed[x] for x in piece.axes),
        groups=tuple(renamed[x] for x in piece.groups),
        left=jnp.ones((1, 1, 1), total.dtype),
        right=total,
        left_rows=0,
        right_rows=max(piece.left_rows, piece.right_rows),
        flops=piece.flops
        + 2 * piece.left.shape[-2] * piece.size("M") * piece.size("N"),
    )


def _summed_scatter(piece: Piece, gone: list[Axis]) -> Piece | None:
    """The sum of a scatter over all its lines, or over columns."""
    lines = [x for x in piece.of("M") if x.size != 1]
    if set(lines) & set(gone) and not set(lines) <= set(gone):
        return None
    if any(axis.group == "B" and axis.size != 1 for axis in gone):
        return None
    piece = _factor_summed(piece, "N", [x for x in gone if x.group == "N"])
    axes = tuple(x for x in piece.axes if x not in gone)
    groups = tuple(x for x in piece.groups if x not in gone)
    if not set(lines) <= set(gone) or not lines:
        return replace(piece, axes=axes, groups=groups)
    if piece.size("B") != 1:
        return None
    assert piece.index is not None
    inside = (piece.index < prod(x.size for x in lines))[..., None]
    inside, right = _with_equal_rows(
        inside, piece.left_rows, piece.right, piece.right_rows
    )
    total = jnp.sum(jnp.where(inside, right, jnp.zeros_like(right)), -2, keepdims=True)
    return replace(
        piece,
        axes=axes,
        groups=groups,
        left=jnp.ones((1, 1, 1), total.dtype),
        right=total,
        left_rows=0,
        right_rows=max(piece.left_rows, piece.right_rows),
        index=None,
        flops=piece.flops + piece.entries("N"),
    )


@_rule(p.dot_general_p)
def _dot(folding: _Folding, equation: Equation, index: int) -> Sum | None:
    at = 0 if equation.inputs[0] in folding.values else 1
    matrix = folding.coefficient(equation.inputs[1 - at])
    contracted, batched = equation.params["dimension_numbers"]

    def product(piece: Piece) -> Piece | None:
        return _times_matrix(
            piece,
            matrix.astype(piece.right.dtype),
            own=(contracted[at], batched[at]),
            other=(contracted[1 - at], batched[1 - at]),
            own_first=at == 0,
        )

    return folding.each(equation.inputs[at], product)


def _times_matrix(
    piece: Piece,
    matrix: jax.Array,
    own: tuple[Sequence[int], Sequence[int]],
    other: tuple[Sequence[int], Sequence[int]],
    *,
    own_first: bool,
) -> Piece | None:
    """The contraction of a piece with a shared array, applied to one factor.

    `own` has the contracted and batch axes of the value, `other` those of the array.
    """
    if not own[0] and not own[1] and piece.left_rows == 0 and not piece.is_scatter:
        return _outer_with(piece, matrix, own_first=own_first)
    involved = [piece.axes[i] for i in (*own[0], *own[1])]
    groups = {x.group for x in involved if x.size != 1}
    if len(groups) > 1 or piece.weight is not None or "B" in groups:
        return None
    group = next(iter(groups), "N")
    if any(x.group != group for x in involved) or (piece.is_scatter and group == "M"):
        return None
    members, factor = piece.of(group), wide(piece, group)
    lead = factor.shape[:-1]
    tensor = factor.reshape(*lead, *(x.size for x in members))

    def places(axes: Sequence[int]) -> list[int]:
        return [len(lead) + members.index(piece.axes[i]) for i in axes]

    numbers = (places(own[0]), list(other[0])), (places(own[1]), list(other[1]))
    made = lax.dot_general(
        tensor, matrix, numbers, precision=lax.Precision.HIGHEST
    )  # (batch, lead, kept, new)
    count = len(own[1])
    made = jnp.moveaxis(made, range(count), range(len(lead), len(lead) + count))
    batch = [piece.axes[i] for i in own[1]]
    kept = [x for x in members if x not in involved]
    new = [
        Axis(size, group)
        for i, size in enumerate(matrix.shape)
        if i not in (*other[0], *other[1])
    ]
    free = [x for x in piece.axes if x not in involved]
    others = [x for x in piece.groups if x not in members]
    order = [*batch, *free, *new] if own_first else [*batch, *new, *free]
    changed = replace(
        piece,
        axes=tuple(order),
        groups=in_order([*others, *batch, *kept, *new]),
    )
    count = prod(matrix.shape[i] for i in other[0])
    flops = 2 * count * lead[0] * lead[-1] * prod(x.size for x in [*batch, *kept, *new])
    return changed.with_factor(group, made.reshape(*lead, -1), flops)


def _outer_with(piece: Piece, x: jax.Array, *, own_first: bool) -> Piece | None:
    """The outer product with a shared array, which goes to a shared left factor.

    So the piece stays as small as it was.
    """
    if piece.weight is not None or piece.size("B") != 1 or piece.left is None:
        return None
    left = wide(piece, "M").reshape(-1, 1) * x.reshape(1, -1)  # (m, new)
    new = [Axis(size, "M") for size in x.shape]
    axes = [*piece.axes, *new] if own_first else [*new, *piece.axes]
    pairs = piece.left.shape[-2]
    if pairs != 1:
        return None
    return replace(
        piece,
        axes=tuple(axes),
        groups=in_order([*piece.groups, *new]),
        left=left.reshape(1, 1, -1),
    )
