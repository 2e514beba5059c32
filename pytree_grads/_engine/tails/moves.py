"""Rules of steps that add values, or move their entries, along one axis at a time."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from ..facts import concrete_scalar, is_zero
from ..graph import Equation
from ..rules.structural import pad
from ..views import Pad, Reshape, Slice, Transpose, part_of, simplified
from .axes import Axis, Piece, in_order, oriented, reshaped, wide
from .folding import Folding, Sum, add_to, multiplied, rule

Map: TypeAlias = Callable[[jax.Array, int], jax.Array]  # along an axis of an array


@rule(p.add_p, p.add_jaxvals_p)
def _add(folding: Folding, equation: Equation, index: int) -> Sum | None:
    return _total(folding, equation, (1.0, 1.0))


@rule(p.sub_p)
def _sub(folding: Folding, equation: Equation, index: int) -> Sum | None:
    return _total(folding, equation, (1.0, -1.0))


@rule(p.neg_p)
def _neg(folding: Folding, equation: Equation, index: int) -> Sum | None:
    return _total(folding, equation, (-1.0,))


def _total(folding: Folding, equation: Equation, signs: Sequence[float]) -> Sum | None:
    found: Sum = {}
    for atom, sign in zip(equation.inputs, signs, strict=True):
        value = folding.read(atom)
        if value is None or atom.aval.shape != equation.outputs[0].aval.shape:
            return None
        for piece, factor in value.items():
            add_to(found, piece, multiplied(sign, factor))
    return found


@rule(p.convert_element_type_p, p.copy_p, p.name_p)
def _same(folding: Folding, equation: Equation, index: int) -> Sum | None:
    return folding.read(equation.inputs[0])


@rule(None)
def _barrier(folding: Folding, equation: Equation, index: int) -> Sum | None:
    return folding.read(equation.inputs[index])


@rule(p.transpose_p)
def _transpose(folding: Folding, equation: Equation, index: int) -> Sum | None:
    order = equation.params["permutation"]
    return folding.each(
        equation.inputs[0],
        lambda x: oriented(replace(x, axes=tuple(x.axes[i] for i in order))),
        (Transpose(tuple(order)),),
    )


@rule(p.reshape_p, p.squeeze_p)
def _reshape(folding: Folding, equation: Equation, index: int) -> Sum | None:
    if (
        equation.params.get("dimensions") is not None
        and equation.primitive is p.reshape_p
    ):
        return None
    shape = tuple(equation.outputs[0].aval.shape)
    moved = (Reshape(shape),)
    return folding.each(equation.inputs[0], lambda x: reshaped(x, shape), moved)


@rule(p.broadcast_in_dim_p)
def _broadcast(folding: Folding, equation: Equation, index: int) -> Sum | None:
    shape = tuple(equation.outputs[0].aval.shape)
    places = equation.params["broadcast_dimensions"]

    return folding.each(equation.inputs[0], lambda x: spread(x, shape, places))


def spread(piece: Piece, shape: Sequence[int], places: Sequence[int]) -> Piece | None:
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
    if piece.weight is not None:
        return None
    return replace(piece, axes=tuple(axes), groups=tuple(groups))


# --------------------------------------------------------------------------------------
# Steps along axes


@rule(p.rev_p)
def _rev(folding: Folding, equation: Equation, index: int) -> Sum | None:
    def flip(x: jax.Array, axis: int) -> jax.Array:
        return lax.rev(x, (axis,))

    sizes = equation.outputs[0].aval.shape
    maps = {i: (flip, sizes[i]) for i in equation.params["dimensions"]}
    return folding.each(equation.inputs[0], lambda x: _along_axes(x, maps))


@rule(p.cumsum_p)
def _cumsum(folding: Folding, equation: Equation, index: int) -> Sum | None:
    axis, reverse = equation.params["axis"], equation.params["reverse"]

    def summed(piece: Piece) -> Piece | None:
        return _along(
            piece, axis, lambda x, i: lax.cumsum(x, i, reverse), piece.shape[axis]
        )

    return folding.each(equation.inputs[0], summed)


@rule(p.slice_p)
def _slice(folding: Folding, equation: Equation, index: int) -> Sum | None:
    params, sizes = equation.params, equation.outputs[0].aval.shape
    strides = params["strides"] or (1,) * len(sizes)
    bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    return folding.each(equation.inputs[0], _cutter(list(bounds), sizes))


@rule(lax.split_p)
def _split(folding: Folding, equation: Equation, index: int) -> Sum | None:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    box = part_of(equation.inputs[0].aval.shape, axis, sum(sizes[:index]), sizes[index])
    bounds = zip(box.start, box.limit, box.strides, strict=True)
    shape = equation.outputs[index].aval.shape
    return folding.each(equation.inputs[0], _cutter(list(bounds), shape))


def _cutter(
    bounds: Sequence[tuple[int, int, int]], sizes: Sequence[int]
) -> Callable[[Piece], Piece | None]:
    """A function that slices a piece: start, limit and stride of each axis."""

    def cut(piece: Piece) -> Piece | None:
        maps: dict[int, tuple[Map, int]] = {}
        for i, bound in enumerate(bounds):
            if bound != (0, piece.shape[i], 1):
                maps[i] = (_slice_map(*bound), sizes[i])
        return _along_axes(piece, maps)

    return cut


def _slice_map(start: int, limit: int, stride: int) -> Map:
    return lambda x, axis: lax.slice_in_dim(x, start, limit, stride, axis)


@rule(p.pad_p)
def _pad(folding: Folding, equation: Equation, index: int) -> Sum | None:
    operand, fill = equation.inputs
    if not is_zero(fill):
        return None
    steps = pad(equation, equation.outputs[0])
    moved = None if steps is None else simplified(steps, tuple(operand.aval.shape))
    if moved is not None and any(isinstance(step, Slice) for step in moved):
        moved = None
    config, sizes = equation.params["padding_config"], equation.outputs[0].aval.shape
    return folding.each(operand, _padder(config, sizes), moved)


@rule(p.dynamic_update_slice_p)
def _write(folding: Folding, equation: Equation, index: int) -> Sum | None:
    """An array written into zeros at a known place."""
    operand, update, *starts = equation.inputs
    at = [concrete_scalar(x) for x in starts]
    if not is_zero(operand) or any(x is None for x in at):
        return None
    whole, taken = operand.aval.shape, update.aval.shape
    config = []
    for x, n, own in zip(at, whole, taken, strict=True):
        start = max(0, min(int(x or 0), n - own))  # as JAX clamps it
        config.append((start, n - own - start, 0))
    return folding.each(update, _padder(config, whole))


@rule(p.concatenate_p)
def _concatenate(folding: Folding, equation: Equation, index: int) -> Sum | None:
    axis, whole = equation.params["dimension"], tuple(equation.outputs[0].aval.shape)
    found: Sum = {}
    start = 0
    for atom in equation.inputs:
        size = atom.aval.shape[axis]
        config = [(0, 0, 0)] * len(whole)
        config[axis] = (start, whole[axis] - start - size, 0)
        box = part_of(whole, axis, start, size)
        moved = (Pad(box.start, box.limit, whole, box.strides),)
        made = (
            {} if is_zero(atom) else folding.each(atom, _padder(config, whole), moved)
        )
        if made is None:
            return None
        found |= made
        start += size
    return found


def _padder(
    config: Sequence[tuple[int, int, int]], sizes: Sequence[int]
) -> Callable[[Piece], Piece | None]:
    """A function that pads a piece with zeros: low, high and interior of each axis."""
    maps = {i: (_pad_map(own), sizes[i]) for i, own in enumerate(config) if any(own)}
    return lambda piece: _along_axes(piece, maps)


def _pad_map(own: tuple[int, int, int]) -> Map:
    def padded(x: jax.Array, axis: int) -> jax.Array:
        config = [(0, 0, 0)] * x.ndim
        config[axis] = own
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    return padded


@rule(p.scatter_add_p)
def _scatter(folding: Folding, equation: Equation, index: int) -> Sum | None:
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


def _along_axes(piece: Piece, maps: dict[int, tuple[Map, int]]) -> Piece | None:
    """Apply a map that moves entries or adds zeros along each of some axes.

    Each comes with the size that the axis has afterwards.
    """
    found: Piece | None = piece
    for i, (fun, size) in maps.items():
        if found is not None:
            found = _along(found, i, fun, size, moves=True)
    return found


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
