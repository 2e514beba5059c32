"""Rules for equations that move entries, pad, scale by a known number, or add."""

from collections.abc import Sequence
from math import prod

import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from ..facts import concrete_scalar, is_zero
from ..graph import Equation, Value
from ..sites import Cut
from ..views import Pad, Reshape, Reverse, Shape, Slice, Transpose, View, part_of
from .table import rule, steps_rule, through


def _shape(value: Value) -> Shape:
    return tuple(value.aval.shape)


# --------------------------------------------------------------------------------------
# A view of one operand


@steps_rule(p.squeeze_p, p.broadcast_in_dim_p, p.reduce_sum_p, p.copy_p, p.name_p)
def same_size(equation: Equation, value: Value) -> View | None:
    """A reshape, if the number of entries stays the same.

    A sum over axes of size 1 is a reshape, and so is a broadcast that adds such axes.
    """
    shape = _shape(value)
    same = prod(equation.inputs[0].aval.shape) == prod(shape)
    return (Reshape(shape),) if same else None


@steps_rule(p.reshape_p)
def reshape(equation: Equation, value: Value) -> View:
    """A reshape, after a transpose if it reads the entries in another order."""
    order = equation.params["dimensions"]
    reshaped = Reshape(_shape(value))
    return (reshaped,) if order is None else (Transpose(tuple(order)), reshaped)


@steps_rule(p.convert_element_type_p)
def convert(equation: Equation, value: Value) -> View | None:
    """No step, if both dtypes are real or both are complex."""
    old, new = equation.inputs[0].aval.dtype, value.aval.dtype
    for kind in (jnp.floating, jnp.complexfloating):
        if jnp.issubdtype(old, kind) and jnp.issubdtype(new, kind):
            return ()
    return None


@steps_rule(p.transpose_p)
def transpose(equation: Equation, value: Value) -> View:
    return (Transpose(tuple(equation.params["permutation"])),)


@steps_rule(p.rev_p)
def rev(equation: Equation, value: Value) -> View:
    return (Reverse(tuple(equation.params["dimensions"])),)


@steps_rule(p.slice_p)
def slices(equation: Equation, value: Value) -> View:
    start, limit, strides = (
        equation.params[name] for name in ("start_indices", "limit_indices", "strides")
    )
    strides = strides or (1,) * len(start)
    return (
        Slice(tuple(map(int, start)), tuple(map(int, limit)), tuple(map(int, strides))),
    )


@steps_rule(lax.split_p)
def split(equation: Equation, value: Value) -> View:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    start, size = sum(sizes[: value.index]), sizes[value.index]
    return (part_of(equation.inputs[0].aval.shape, axis, start, size),)


@steps_rule(lax.unstack_p)
def unstack(equation: Equation, value: Value) -> View:
    axis = equation.params["axis"]
    part = part_of(equation.inputs[0].aval.shape, axis, value.index, 1)
    return part, Reshape(_shape(value))


@steps_rule(p.pad_p)
def pad(equation: Equation, value: Value) -> View | None:
    """A slice, since negative padding removes entries, and then padding with zeros."""
    operand, fill = equation.inputs
    shape = tuple(operand.aval.shape)
    config = [tuple(map(int, own)) for own in equation.params["padding_config"]]
    lows, highs, interiors = ([own[i] for own in config] for i in range(3))

    cut = Slice(
        tuple(max(-low, 0) for low in lows),
        tuple(n + min(high, 0) for n, high in zip(shape, highs, strict=True)),
        (1,) * len(shape),
    )
    kept = cut.shape_from(shape)
    is_empty = any(size <= 0 for size in kept)
    # With interior padding, negative padding would remove zeros between the entries.
    is_odd = any(inner and min(low, high) < 0 for low, high, inner in config)
    if is_empty or is_odd or not is_zero(fill):
        return None

    start = tuple(max(low, 0) for low in lows)
    strides = tuple(interior + 1 for interior in interiors)
    spans = zip(start, kept, strides, strict=True)
    limit = tuple(at + (size - 1) * stride + 1 for at, size, stride in spans)
    return cut, Pad(start, limit, _shape(value), strides)


# --------------------------------------------------------------------------------------
# Operands side by side


@rule(p.concatenate_p)
def concatenate(equation: Equation, value: Value, view: View) -> Sequence[Cut]:
    axis = equation.params["dimension"]
    sizes = [operand.aval.shape[axis] for operand in equation.inputs]
    return _side_by_side(equation, value, view, axis, sizes)


@rule(lax.stack_p)
def stack(equation: Equation, value: Value, view: View) -> Sequence[Cut]:
    sizes = [1] * len(equation.inputs)
    return _side_by_side(equation, value, view, equation.params["axis"], sizes)


def _side_by_side(
    equation: Equation, value: Value, view: View, axis: int, sizes: Sequence[int]
) -> list[Cut]:
    """Each operand, padded with zeros in place of the others."""
    shape = _shape(value)
    found: list[Cut] = []
    start = 0
    for operand, size in zip(equation.inputs, sizes, strict=True):
        box = part_of(shape, axis, start, size)
        with_axis = Reshape(box.shape_from(shape))  # a stack adds an axis
        padded = Pad(box.start, box.limit, shape, box.strides)
        found.append(through(operand, (with_axis, padded, *view)))
        start += size
    return found


# --------------------------------------------------------------------------------------
# Sums, and products with a number that is known at trace time


@rule(p.add_p, p.add_jaxvals_p)
def add(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    return _sum(equation, value, view, (1, 1))


@rule(p.sub_p)
def sub(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    return _sum(equation, value, view, (1, -1))


def _sum(
    equation: Equation, value: Value, view: View, signs: Sequence[int]
) -> list[Cut] | None:
    shape = value.aval.shape
    if any(operand.aval.shape != shape for operand in equation.inputs):
        return None  # a scalar operand is broadcast
    pairs = zip(equation.inputs, signs, strict=True)
    return [through(operand, view, sign) for operand, sign in pairs]


@rule(p.neg_p)
def neg(equation: Equation, value: Value, view: View) -> Sequence[Cut]:
    return [through(equation.inputs[0], view, -1.0)]


@rule(p.mul_p)
def mul(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    left, right = equation.inputs
    for operand, other in ((left, right), (right, left)):
        factor = concrete_scalar(other)
        if factor is not None:
            return [through(operand, view, factor)]
    return None


@rule(p.div_p)
def div(equation: Equation, value: Value, view: View) -> Sequence[Cut] | None:
    operand, divisor = equation.inputs
    number = concrete_scalar(divisor)
    return [through(operand, view, 1 / number)] if number else None
