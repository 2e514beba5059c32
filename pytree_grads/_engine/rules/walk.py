"""The walk back from a value: `decompose` asks the table of rules at every equation."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import jax.numpy as jnp

from .. import thresholds
from ..facts import is_zero
from ..graph import Atom, Equation, Value
from ..sites import AtNorm, AtRow, AtScan, AtTerm, AtValue, Site, Summand
from ..views import View, shape_after, simplified
from .table import RULES


def decompose(value: Atom) -> tuple[Summand, ...]:
    """Summands that add up to a value: its terms, or itself if those are too many."""
    todo: list[Summand] = [Summand(AtValue(value))]
    found: list[Summand] = []
    while todo and len(found) <= thresholds.MOST_SUMMANDS:
        summand = todo.pop()
        assert isinstance(summand.site, AtValue)
        if is_zero(summand.site.value):
            continue
        parts = _parts(summand, summand.site.value)
        if parts is None:
            found.append(summand)
        else:
            found += [part for part in parts if not isinstance(part.site, AtValue)]
            todo += [part for part in parts if isinstance(part.site, AtValue)]
    return (Summand(AtValue(value)),) if todo else _merged(found)


def _parts(summand: Summand, value: Atom) -> list[Summand] | None:
    """What adds up to a summand at a value, or None if no rule says anything of it."""
    equation = value.producer if isinstance(value, Value) else None
    if not isinstance(value, Value) or equation is None or equation.primitive is None:
        return None
    rule = RULES.get(equation.primitive)
    parts = rule(equation, value, summand.view) if rule else None
    if parts is None or not _are_sound(parts, summand, equation):
        return None
    return [replace(part, factor=part.factor * summand.factor) for part in parts]


def _are_sound(parts: Sequence[Summand], summand: Summand, equation: Equation) -> bool:
    """Whether parts have the shape and the kind of dtype of what they add up to.

    If they have not, their rule has a bug. The value is then kept as a dense term, and
    a warning says so, which is an error in the tests.
    """
    wanted = _shape_and_kind(summand)
    for part in parts:
        got = _shape_and_kind(part)
        if got != wanted:
            warnings.warn(
                f"the rule of {equation.primitive} gives {got}, not {wanted}: please "
                "report this to pytree_grads. Results are right, but slower to compute",
                stacklevel=2,
            )
            return False
    return True


def _shape_and_kind(summand: Summand) -> tuple[tuple[int, ...], str]:
    return shape_after(summand.view, summand.site.shape), _kind(summand.site)


def _kind(site: Site) -> Literal["complex", "real", "other"]:
    """The kind of numbers in a term; the indices of a scattered term do not count."""
    match site:
        case AtScan(_, inner) | AtRow(inner):
            return _kind(inner)
        case AtNorm():
            return "real"
        case AtValue() | AtTerm():
            dtypes = [atom.aval.dtype for atom in site.operands]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return "complex"
    if any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return "real"
    return "other"


def _merged(summands: Sequence[Summand]) -> tuple[Summand, ...]:
    """Summands with simplified views; those of one site and view become one."""
    factors: dict[tuple[Site, View], float] = {}
    for summand in summands:
        key = summand.site, simplified(summand.view, summand.site.shape)
        factors[key] = factors.get(key, 0.0) + summand.factor
    return tuple(Summand(*key, factor) for key, factor in factors.items())
