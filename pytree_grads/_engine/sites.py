"""Sites and cuts: where the backward pass is cut, and which terms are made there.

A site is a place in the backward pass of one example where a term is made. A cut is a
site with the view from there to the leaf. Evaluated for all examples, a cut becomes a
`Summand` of a `Leaf`. `sizes` says how many entries each array of a term has for one
row.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, TypeAlias

from .graph import Atom, Equation, Value
from .layout import Layout
from .views import Shape, View


@dataclass(frozen=True)
class AtValue:
    """A dense term: the value itself."""

    value: Atom

    @property
    def producer(self) -> Equation | None:
        return self.value.producer if isinstance(self.value, Value) else None

    @property
    def shape(self) -> Shape:
        return tuple(self.value.aval.shape)

    @property
    def sizes(self) -> tuple[int, ...]:
        return (prod(self.shape),)

    @property
    def operands(self) -> tuple[Atom, ...]:
        return (self.value,)


@dataclass(frozen=True)
class AtTerm:
    """A term in factors: the operands of an equation that is not evaluated itself."""

    equation: Equation
    layout: Layout
    operands: tuple[Any, ...]  # atoms, or keys of arrays that are made of some

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        return self.layout.sizes


@dataclass(frozen=True)
class AtScan:
    """A term in the body of a scan, stacked or added up over the steps."""

    equation: Equation
    site: "Site"
    stacked: bool

    @property
    def length(self) -> int:
        return self.equation.params["length"]

    @property
    def is_dense(self) -> bool:
        return is_dense(self.site)

    @property
    def shape(self) -> Shape:
        inner = self.site.shape
        if not self.stacked:
            return inner
        if self.is_dense:
            return (self.length, *inner)
        blocks, *rest = inner
        return (self.length * blocks, *rest)

    @property
    def sizes(self) -> tuple[int, ...]:
        added_up = self.is_dense and not self.stacked
        return tuple(n * (1 if added_up else self.length) for n in self.site.sizes)


@dataclass(frozen=True)
class AtNorm:
    """A dense term: the norm of a row of another term, which is not kept."""

    site: "Site"
    shape: Shape = ()
    sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class _LikeRow:
    """A dense term with the shape of another term's rows."""

    site: "Site"

    @property
    def shape(self) -> Shape:
        return self.site.shape

    @property
    def sizes(self) -> tuple[int, ...]:
        return (prod(self.shape),)


@dataclass(frozen=True)
class AtRow(_LikeRow):
    """A dense term: a row of another term, as an array."""


@dataclass(frozen=True)
class AtSum(_LikeRow):
    """A dense term: the sum of another term's rows over all examples.

    It stands for these rows in a sum without weights, and nowhere else.
    """

    site: AtTerm


@dataclass(frozen=True)
class Lookups:
    """Scatter terms that add to lines of one table; see `lookups`."""

    sites: tuple[AtTerm, ...]

    @property
    def indices(self) -> list[tuple[Any, ...]]:
        """The operands of each term from which its indices are made."""
        return [site.operands[:-1] for site in self.sites]

    @property
    def count(self) -> int:
        """S: how many look-ups there are."""
        return sum(site.sizes[0] for site in self.sites)


@dataclass(frozen=True)
class AtRest:
    """A dense term: the norm of another term without the lines that are looked up."""

    site: AtTerm
    lookups: Lookups
    shape: Shape = ()
    sizes: tuple[int, ...] = (1,)


Site: TypeAlias = AtValue | AtTerm | AtScan | AtNorm | AtRow | AtSum | AtRest


@dataclass(frozen=True)
class Cut:
    """`factor * view(term)`: what the term at one site adds to a value."""

    site: Site
    view: View = ()
    factor: float = 1.0
    reason: str = ""  # why the term is dense, if it is


def is_dense(site: Site) -> bool:
    """Whether the term of a site is dense."""
    return not isinstance(innermost(site), AtTerm)


def size(site: Site) -> int:
    """How many entries are kept for one row."""
    return sum(site.sizes)


def innermost(site: Site) -> Site:
    """The site itself, without the scans around it."""
    while isinstance(site, AtScan):
        site = site.site
    return site


def origin(site: Site) -> str:
    """The name of the primitive that makes a term, with the scans around it."""
    match site:
        case AtScan(_, inner):
            return f"scan/{origin(inner)}"
        case AtNorm(inner) | AtRow(inner) | AtSum(inner) | AtRest(inner):
            return origin(inner)
        case AtValue():
            equation = site.producer
        case AtTerm(equation):
            pass
    # An equation without a primitive is the barrier before a remat body.
    return str(equation.primitive or "remat") if equation else "input"
