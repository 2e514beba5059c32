"""What is known of a value before anything runs: zeros, numbers, repeated entries."""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jax.core import Tracer
from jax.extend.core import primitives as p

from .graph import Atom, Equation, Known, Value


def is_zero(atom: Atom) -> bool:
    """Whether an atom is known to hold only zeros."""
    if isinstance(atom, Known):
        return concrete_scalar(atom) == 0
    made = atom.producer
    if made is None or made.primitive is not p.broadcast_in_dim_p:
        return False
    return is_zero(made.inputs[0])


def concrete_scalar(atom: Atom) -> float | None:
    """The value of a real scalar that is known while tracing, else None."""
    if not isinstance(atom, Known) or isinstance(atom.value, Tracer):
        return None
    if atom.aval.shape != () or not jnp.issubdtype(atom.aval.dtype, jnp.number):
        return None
    return None if jnp.iscomplexobj(atom.value) else float(atom.value)


# --------------------------------------------------------------------------------------
# Axes along which an array repeats its entries

Axes: TypeAlias = frozenset[int]

_DEPTH = 16  # how many equations the walk goes back at most
_ELEMENTWISE = {
    p.mul_p, p.div_p, p.neg_p, p.add_p, p.add_jaxvals_p, p.sub_p, p.select_n_p,
    p.convert_element_type_p, p.copy_p, p.name_p, p.stop_gradient_p,
}  # fmt: skip


def same_along(atom: Atom) -> Axes:
    """The axes along which an array is known to repeat its entries."""
    axes = _same_along(atom, {}, _DEPTH)
    # The walk also counts axes of size 0, which have no entries to repeat.
    return frozenset(axis for axis in axes if atom.aval.shape[axis])


def _same_along(atom: Atom, known: dict[Atom, Axes], depth: int) -> Axes:
    """Walk back from an atom; `known` remembers what was found on the way."""
    made = atom.producer if isinstance(atom, Value) else None
    if made is None or not depth:
        return frozenset()
    if atom not in known:

        def along(operand: Atom) -> Axes:
            return _same_along(operand, known, depth - 1)

        known[atom] = _same_along_output(made, along)
    return known[atom]


def _same_along_output(made: Equation, along: Callable[[Atom], Axes]) -> Axes:
    """The axes along which an output repeats its entries, given those of operands."""
    if made.primitive is p.broadcast_in_dim_p:
        return _same_along_broadcast(made, along)
    if made.primitive is p.transpose_p:
        inner = along(made.inputs[0])
        permutation = made.params["permutation"]
        return frozenset(i for i, j in enumerate(permutation) if j in inner)
    if made.primitive in _ELEMENTWISE:
        return _same_along_elementwise(made, along)
    return frozenset()


def _same_along_broadcast(made: Equation, along: Callable[[Atom], Axes]) -> Axes:
    """All axes, except those along which the operand's entries differ."""
    (operand, *_), shape = made.inputs, made.outputs[0].aval.shape
    inner, sizes = along(operand), operand.aval.shape
    differs = {
        axis
        for own, axis in enumerate(made.params["broadcast_dimensions"])
        if own not in inner and sizes[own] == shape[axis]
    }
    return frozenset(range(len(shape))) - differs


def _same_along_elementwise(made: Equation, along: Callable[[Atom], Axes]) -> Axes:
    """The axes along which all operands repeat their entries."""
    shape = made.outputs[0].aval.shape
    same = frozenset(range(len(shape)))
    for operand in made.inputs:
        sizes = operand.aval.shape
        if sizes:  # a scalar operand is broadcast along every axis
            spread = {i for i, size in enumerate(sizes) if size != shape[i]}
            same &= along(operand) | spread
    return same
