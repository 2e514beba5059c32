"""The walk back from a value: `decompose` asks the table of rules at each equation."""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import jax.numpy as jnp

from .. import thresholds
from ..facts import is_zero
from ..graph import Atom, Equation, Value
from ..sites import AtNorm, AtRest, AtRow, AtScan, AtSum, AtTerm, AtValue, Cut, Site
from ..views import View, shape_after, simplified
from .table import RULES


def decompose(value: Atom) -> tuple[Cut, ...]:
    """The cuts that add up to a value: its terms, or itself if there are too many."""
    todo: list[Cut] = [Cut(AtValue(value))]
    found: list[Cut] = []
    while todo and len(found) <= thresholds.MOST_SUMMANDS:
        cut = todo.pop()
        assert isinstance(cut.site, AtValue)
        if is_zero(cut.site.value):
            continue
        parts = _parts(cut, cut.site.value)
        if parts is None:
            found.append(cut)
        else:
            found += [part for part in parts if not isinstance(part.site, AtValue)]
            todo += [part for part in parts if isinstance(part.site, AtValue)]
    return (Cut(AtValue(value)),) if todo else _merged(found)


def _parts(cut: Cut, value: Atom) -> list[Cut] | None:
    """The cuts that add up to a cut at a value, or None if no rule applies."""
    equation = value.producer if isinstance(value, Value) else None
    if not isinstance(value, Value) or equation is None or equation.primitive is None:
        return None
    rule = RULES.get(equation.primitive)
    parts = rule(equation, value, cut.view) if rule else None
    if parts is None or not _are_sound(parts, cut, equation):
        return None
    return [replace(part, factor=part.factor * cut.factor) for part in parts]


def _are_sound(parts: Sequence[Cut], cut: Cut, equation: Equation) -> bool:
    """Whether parts have the shape and the kind of dtype of the cut they add up to.

    If not, their rule has a bug. The value is then kept as a dense term, with a
    warning, which is an error in the tests.
    """
    wanted = _shape_and_kind(cut)
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


def _shape_and_kind(cut: Cut) -> tuple[tuple[int, ...], str]:
    return shape_after(cut.view, cut.site.shape), _kind(cut.site)


def _kind(site: Site) -> Literal["complex", "real", "other"]:
    """The kind of numbers in a term; the indices of a scatter term do not count."""
    match site:
        case AtScan(_, inner) | AtRow(inner) | AtSum(inner):
            return _kind(inner)
        case AtNorm() | AtRest():
            return "real"
        case AtValue() | AtTerm():
            dtypes = [atom.aval.dtype for atom in site.operands]
    if any(jnp.issubdtype(dtype, jnp.complexfloating) for dtype in dtypes):
        return "complex"
    if any(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return "real"
    return "other"


def _merged(cuts: Sequence[Cut]) -> tuple[Cut, ...]:
    """Simplify the views of cuts, and merge cuts that have the same site and view."""
    factors: dict[tuple[Site, View], float] = {}
    for cut in cuts:
        key = cut.site, simplified(cut.view, cut.site.shape)
        factors[key] = factors.get(key, 0.0) + cut.factor
    return tuple(Cut(*key, factor) for key, factor in factors.items())
