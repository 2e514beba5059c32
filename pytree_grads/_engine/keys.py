"""Keys: the names of the arrays of a backward pass from which terms are made.

A key is an atom of the graph, or says how an array is made from others:

- from an array in the body of a scan: stacked, or added up over the steps;
- from the arrays of a term: its norm, its row, or the sum of all rows;
- from a table that is read by parts and looked up: what its norm takes, see `lookups`.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from .graph import Atom, Equation, Graph, Known, Value
from .sites import AtNorm, AtRest, AtRow, AtScan, AtSum, AtTerm, Lookups, Site, is_dense


@dataclass(frozen=True)
class Stacked:
    """An array in the body of a scan, stacked over the steps."""

    equation: Equation
    key: "Key"


@dataclass(frozen=True)
class Total:
    """An array in the body of a scan, added up over the steps."""

    equation: Equation
    key: "Key"


@dataclass(frozen=True)
class Norm:
    """The norm of a row of the term at a site."""

    site: Site


@dataclass(frozen=True)
class Row:
    """A row of the term at a site, as an array."""

    site: Site


@dataclass(frozen=True)
class Sum:
    """The sum of the rows of the term at a site, over all examples."""

    site: AtTerm


@dataclass(frozen=True)
class Rest:
    """In the body of a scan: the norm of a term's lines that no index names."""

    site: AtTerm
    lookups: Lookups


@dataclass(frozen=True)
class Looked:
    """In the body of a scan: the left factor at the lines that indices name."""

    site: AtTerm
    lookups: Lookups


@dataclass(frozen=True)
class Places:
    """The line of the small table to which each index of some look-ups goes."""

    lookups: Lookups
    number: int  # of the scatter term whose indices these are


Key: TypeAlias = (
    Value | Known | Stacked | Total | Norm | Row | Sum | Rest | Looked | Places
)


def keys_of(site: Site) -> tuple[Key, ...]:
    """The keys of the arrays from which the term at a site is assembled."""
    match site:
        case AtNorm(inner):
            return (Norm(inner),)
        case AtRow(inner):
            return (Row(inner),)
        case AtSum(inner):
            return (Sum(inner),)
        case AtRest(inner, lookups):
            return (Rest(inner, lookups),)
        case AtScan(equation, inner, stacked):
            make = Stacked if stacked or not is_dense(inner) else Total
            return tuple(make(equation, key) for key in keys_of(inner))
    return site.operands


def atom_of(key: Key) -> Atom | None:
    """The atom that holds what a key names, if one does.

    A stack of what a scan reads step by step is an operand of the scan.
    """
    match key:
        case Stacked(equation, inner):
            value, (_, steps_from) = atom_of(inner), equation.splits
            if value in equation.body.inputs[steps_from:]:
                return equation.inputs[equation.body.inputs.index(value)]
            return None
        case Value() | Known():
            return key
    return None


def depth(key: Key) -> int:
    """How many axes of scan steps the array of a key has in front."""
    return 1 + depth(key.key) if isinstance(key, Stacked) else 0


def rows_axis(site: Site) -> int:
    """The first row axis of a term's arrays: behind the steps, or behind the blocks."""
    return depth(keys_of(site)[0]) if is_dense(site) else 1


# --------------------------------------------------------------------------------------


def depends(keys: Sequence[Key], graph: Graph, seeds: Iterable[Atom]) -> list[bool]:
    """For each key, whether its array may depend on one of the seeds."""
    return depends_on(keys, graph.downstream(seeds))


def depends_on(keys: Sequence[Key], reached: set[Atom]) -> list[bool]:
    """For each key, whether its array may depend on atoms that were reached."""
    return [_depends(key, reached) for key in keys]


def _depends(key: Key, reached: set[Atom]) -> bool:
    match key:
        case Stacked(equation, inner) | Total(equation, inner):
            return _depends(inner, equation.reached_inside(reached))
        case Sum():
            return False  # all examples share it
        case Rest() | Looked():
            return True  # its indices are outside of the scan
        case Places(lookups):
            return any(x in reached for own in lookups.indices for x in own)
        case Norm(site) | Row(site):
            return any(_depends(own, reached) for own in keys_of(site))
    return key in reached
