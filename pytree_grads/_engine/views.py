"""Tails: the linear steps between a term and its gradient leaf that know nothing of the example.

A tail is a tuple of steps, applied in order. All steps but `Slice` keep inner products as they are
(they move entries, or add zeros), so a norm may be taken before the tail.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.extend.core import primitives as p

from .._jax.compat import abstract_like
from .graph import Atom, Equation, Known, Value

Shape: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Reshape:
    shape: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.reshape(x, self.shape)


@dataclass(frozen=True)
class Transpose:
    permutation: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.transpose(x, self.permutation)


@dataclass(frozen=True)
class Slice:
    start: Shape
    limit: Shape
    strides: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.slice(x, self.start, self.limit, self.strides)


@dataclass(frozen=True)
class Place:
    """Put the array at `start:limit:strides` of zeros of `shape`: the transpose of a slice."""

    start: Shape
    limit: Shape
    shape: Shape
    strides: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        spaces = zip(self.start, self.limit, self.shape, self.strides, strict=True)
        config = [(start, size - limit, stride - 1) for start, limit, size, stride in spaces]
        return lax.pad(x, jnp.zeros((), x.dtype), config)

    def misses(self, other: "Place") -> bool:
        """Whether the boxes around the two have no entry in common."""
        pairs = zip(self.start, self.limit, other.start, other.limit, strict=True)
        return any(start >= end or begin >= limit for start, limit, begin, end in pairs)


@dataclass(frozen=True)
class Reverse:
    dimensions: Shape

    def __call__(self, x: jax.Array) -> jax.Array:
        return lax.rev(x, self.dimensions)


Step: TypeAlias = Reshape | Transpose | Slice | Place | Reverse
Tail: TypeAlias = tuple[Step, ...]


def apply(tail: Tail, x: jax.Array) -> jax.Array:
    for step in tail:
        x = step(x)
    return x


def arranged(x: jax.Array, order: Sequence[int], shape: Shape) -> jax.Array:
    """An array with its axes in another order, then in another shape.

    Axes of size 1 are not moved: for XLA that is another layout, which loops want copied.
    """
    idle = [i for i, n in enumerate(x.shape) if n == 1]
    left = [i for i in range(x.ndim) if i not in idle]
    x = lax.squeeze(x, idle)
    return lax.transpose(x, [left.index(i) for i in order if i in left]).reshape(shape)


def transposed(tail: Tail, shape: Sequence[int], v: jax.Array) -> jax.Array:
    """The transpose of a tail that takes arrays of `shape`, applied to `v`."""
    if not tail:
        return v
    taken = abstract_like(v, tuple(shape))
    (x,) = jax.linear_transpose(lambda x: apply(tail, x), taken)(v)
    return x


def isometric(tail: Tail) -> bool:
    """Whether the tail keeps inner products."""
    return not any(isinstance(step, Slice) for step in tail)


def mapped(tail: Tail, length: int) -> Tail:
    """The tail that acts on every entry of a new leading axis (the steps of a scan)."""
    return tuple(_mapped_step(step, length) for step in tail)


def _mapped_step(step: Step, length: int) -> Step:
    match step:
        case Reshape(shape):
            return Reshape((length, *shape))
        case Transpose(permutation):
            return Transpose((0, *(axis + 1 for axis in permutation)))
        case Slice(start, limit, strides):
            return Slice((0, *start), (length, *limit), (1, *strides))
        case Place(start, limit, shape, strides):
            return Place((0, *start), (length, *limit), (length, *shape), (1, *strides))
        case Reverse(dimensions):
            return Reverse(tuple(axis + 1 for axis in dimensions))


def disjoint(one: Tail, other: Tail) -> bool:
    """Whether the two tails write to places that cannot meet."""
    if one and other and isinstance(one[-1], Place) and isinstance(other[-1], Place):
        return one[-1].misses(other[-1])
    return False


def simplified(tail: Tail, shape: Shape) -> Tail:
    """The same tail, for inputs of `shape`, without idle or repeated reshapes."""
    steps: list[Step] = []
    before = [shape]  # before[i] enters steps[i]
    for step in tail:
        if isinstance(step, Reshape) and steps and isinstance(steps[-1], Reshape):
            steps.pop()
            before.pop()
        if isinstance(step, Reshape) and step.shape == before[-1]:
            continue
        steps.append(step)
        entering = jax.ShapeDtypeStruct(before[-1], jnp.float32)
        before.append(jax.eval_shape(step, entering).shape)
    return tuple(steps)


# --------------------------------------------------------------------------------------------------
# Which equations are steps. Each reader takes the value that the equation makes, and returns the
# steps to it from the first operand, or None where the equation is none.


def is_zero(atom: Atom) -> bool:
    """Whether an atom is known to hold only zeros."""
    if isinstance(atom, Known):
        return concrete_scalar(atom) == 0
    made = atom.producer
    return made is not None and made.primitive is p.broadcast_in_dim_p and is_zero(made.inputs[0])


_ELEMENTWISE = {
    p.mul_p, p.div_p, p.neg_p, p.add_p, p.add_jaxvals_p, p.sub_p, p.select_n_p,
    p.convert_element_type_p, p.copy_p, p.name_p, p.stop_gradient_p,
}  # fmt: skip


def same_along(atom: Atom) -> frozenset[int]:
    """The axes along which an array is known to repeat its entries, as a broadcast does."""
    same = _same_along(atom, {}, 16)  # also along axes of size 0, which have none to repeat
    return frozenset(i for i in same if atom.aval.shape[i])


def _same_along(atom: Atom, known: dict[Atom, frozenset[int]], depth: int) -> frozenset[int]:
    made = atom.producer if isinstance(atom, Value) else None
    if made is None or not depth:
        return frozenset()
    if atom in known:
        return known[atom]
    shape, same = atom.aval.shape, frozenset[int]()
    if made.primitive is p.broadcast_in_dim_p:
        operand, axes = made.inputs[0], made.params["broadcast_dimensions"]
        inner, sizes = _same_along(operand, known, depth - 1), operand.aval.shape
        differs = {i for j, i in enumerate(axes) if j not in inner and sizes[j] == shape[i]}
        same = frozenset(range(len(shape))) - differs
    elif made.primitive is p.transpose_p:
        inner = _same_along(made.inputs[0], known, depth - 1)
        same = frozenset(i for i, j in enumerate(made.params["permutation"]) if j in inner)
    elif made.primitive in _ELEMENTWISE:
        same = frozenset(range(len(shape)))
        for x in made.inputs:
            if sizes := x.aval.shape:  # a scalar is the same everywhere, as is an axis of size 1
                spread = {i for i, size in enumerate(sizes) if size != shape[i]}
                same &= _same_along(x, known, depth - 1) | spread
    known[atom] = same
    return same


def concrete_scalar(atom: Atom) -> float | None:
    """The value of a real scalar that is known while tracing, else None."""
    if not isinstance(atom, Known) or isinstance(atom.value, Tracer):
        return None
    if atom.aval.shape != () or not jnp.issubdtype(atom.aval.dtype, jnp.number):
        return None
    return None if jnp.iscomplexobj(atom.value) else float(atom.value)


def _reshape(equation: Equation, value: Value) -> Tail | None:
    old, new = equation.inputs[0].aval, value.aval
    return (Reshape(tuple(new.shape)),) if prod(old.shape) == prod(new.shape) else None


def _reordered(equation: Equation, value: Value) -> Tail:
    """That of a reshape which may take the entries in another order, as `order="F"` does."""
    order, reshape = equation.params["dimensions"], Reshape(tuple(value.aval.shape))
    return (reshape,) if order is None else (Transpose(tuple(order)), reshape)


def _convert(equation: Equation, value: Value) -> Tail | None:
    old, new = equation.inputs[0].aval, value.aval
    for kind in (jnp.floating, jnp.complexfloating):
        if jnp.issubdtype(old.dtype, kind) and jnp.issubdtype(new.dtype, kind):
            return (Reshape(tuple(new.shape)),)
    return None


def _transpose(equation: Equation, value: Value) -> Tail:
    return (Transpose(tuple(equation.params["permutation"])),)


def _slice(equation: Equation, value: Value) -> Tail:
    start, strides = equation.params["start_indices"], equation.params["strides"]
    step = Slice(
        tuple(map(int, start)),
        tuple(map(int, equation.params["limit_indices"])),
        tuple(map(int, strides or (1,) * len(start))),
    )
    return (step,)


def _part(shape: Shape, axis: int, start: int, size: int) -> Slice:
    """The slice that takes `size` entries of one axis."""
    starts, limits = [0] * len(shape), list(shape)
    starts[axis], limits[axis] = start, start + size
    return Slice(tuple(starts), tuple(limits), (1,) * len(shape))


def _split(equation: Equation, value: Value) -> Tail:
    axis, sizes = equation.params["axis"], equation.params["sizes"]
    start = sum(sizes[: value.index])
    return (_part(equation.inputs[0].aval.shape, axis, start, sizes[value.index]),)


def _unstack(equation: Equation, value: Value) -> Tail:
    part = _part(equation.inputs[0].aval.shape, equation.params["axis"], value.index, 1)
    return part, Reshape(tuple(value.aval.shape))


def _pad(equation: Equation, value: Value) -> Tail | None:
    operand, fill = equation.inputs
    shape = operand.aval.shape
    config = [tuple(map(int, sides)) for sides in equation.params["padding_config"]]
    padded = list(zip(shape, config, strict=True))
    is_empty = any(n + min(low, 0) + min(high, 0) <= 0 for n, (low, high, _) in padded)
    is_odd = any(inner and min(low, high) < 0 for low, high, inner in config)
    if is_empty or is_odd or not is_zero(fill):
        return None
    # Negative padding takes entries away.
    cut = Slice(
        tuple(max(-low, 0) for low, _, _ in config),
        tuple(n + min(high, 0) for n, (_, high, _) in padded),
        (1,) * len(shape),
    )
    start = tuple(max(low, 0) for low, _, _ in config)
    strides = tuple(inner + 1 for _, _, inner in config)
    ends = zip(cut.start, cut.limit, start, strides, strict=True)
    limit = tuple(at + (end - begin - 1) * stride + 1 for begin, end, at, stride in ends)
    return cut, Place(start, limit, tuple(value.aval.shape), strides)


def _reverse(equation: Equation, value: Value) -> Tail:
    return (Reverse(tuple(equation.params["dimensions"])),)


_READERS = {
    p.reshape_p: _reordered,
    p.squeeze_p: _reshape,
    p.broadcast_in_dim_p: _reshape,
    p.reduce_sum_p: _reshape,  # over axes of size 1
    p.copy_p: _reshape,
    p.name_p: _reshape,
    p.convert_element_type_p: _convert,
    p.transpose_p: _transpose,
    p.slice_p: _slice,
    lax.split_p: _split,
    lax.unstack_p: _unstack,
    p.pad_p: _pad,
    p.rev_p: _reverse,
}


def read_steps(equation: Equation, value: Value) -> tuple[Tail, Value] | None:
    """The steps to one output of an equation, and the value that they start from."""
    reader = _READERS.get(equation.primitive) if equation.primitive else None
    operand = equation.inputs[0] if equation.inputs else None
    if reader is None or not isinstance(operand, Value):
        return None
    steps = reader(equation, value)
    return None if steps is None else (steps, operand)


def read_parts(equation: Equation) -> list[tuple[Atom, Tail]]:
    """The operands that an equation puts side by side, each with its place."""
    if equation.primitive not in (p.concatenate_p, lax.stack_p):
        return []
    axis = equation.params["axis" if equation.primitive is lax.stack_p else "dimension"]
    shape = tuple(equation.outputs[0].aval.shape)
    parts: list[tuple[Atom, Tail]] = []
    end = 0
    for operand in equation.inputs:
        size = operand.aval.shape[axis] if equation.primitive is p.concatenate_p else 1
        box = _part(shape, axis, end, size)
        widened = Reshape((*shape[:axis], size, *shape[axis + 1 :]))
        parts.append((operand, (widened, Place(box.start, box.limit, shape, box.strides))))
        end += size
    return parts


def read_scale(equation: Equation) -> tuple[float, Value] | None:
    """`(factor, operand)` of an equation that multiplies by a number known while tracing."""
    if equation.primitive is p.neg_p and isinstance(equation.inputs[0], Value):
        return -1.0, equation.inputs[0]
    if equation.primitive not in (p.mul_p, p.div_p):
        return None
    left, right = equation.inputs
    if isinstance(left, Value) and (factor := concrete_scalar(right)) is not None:
        if equation.primitive is p.mul_p:
            return factor, left
        return (1 / factor, left) if factor else None
    if equation.primitive is p.mul_p and isinstance(right, Value):
        factor = concrete_scalar(left)
        return None if factor is None else (factor, right)
    return None
