"""Sites: the places in the backward pass where the terms of a leaf are made."""

from dataclasses import dataclass
from math import prod
from typing import TypeAlias

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
    def size(self) -> int:
        return prod(self.shape)

    @property
    def operands(self) -> tuple[Atom, ...]:
        return (self.value,)


@dataclass(frozen=True)
class AtTerm:
    """A term in factors, made from operands of the equation that would add it up."""

    equation: Equation
    layout: Layout
    operands: tuple[Atom, ...]

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def size(self) -> int:
        return self.layout.size


@dataclass(frozen=True)
class AtScan:
    """A term in the body of a scan, stacked over the steps or added up over them."""

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
    def size(self) -> int:
        added_up = self.is_dense and not self.stacked
        return self.site.size * (1 if added_up else self.length)


@dataclass(frozen=True)
class AtNorm:
    """The norm of a row of another term, which is not kept itself: a dense term."""

    site: "Site"
    shape: Shape = ()
    size: int = 1


@dataclass(frozen=True)
class AtRow:
    """A row of another term as an array: a dense term."""

    site: "Site"

    @property
    def shape(self) -> Shape:
        return self.site.shape

    @property
    def size(self) -> int:
        return prod(self.shape)


Site: TypeAlias = AtValue | AtTerm | AtScan | AtNorm | AtRow


@dataclass(frozen=True)
class Cut:
    """`factor * view(term)`: what one site adds to a value."""

    site: Site
    view: View = ()
    factor: float = 1.0
    reason: str = ""  # why the term is dense, if it is


def is_dense(site: Site) -> bool:
    """Whether the term of a site is dense."""
    return isinstance(innermost(site), AtValue | AtNorm | AtRow)


def innermost(site: Site) -> Site:
    """The site in the innermost of the scans around it."""
    while isinstance(site, AtScan):
        site = site.site
    return site


def origin(site: Site) -> str:
    """The name of the primitive that makes a term, with the scans around it."""
    match site:
        case AtScan(_, inner):
            return f"scan/{origin(inner)}"
        case AtNorm(inner) | AtRow(inner):
            return origin(inner)
        case AtValue():
            equation = site.producer
        case AtTerm(equation):
            pass
    # An equation without a primitive is the barrier around a remat body.
    return str(equation.primitive or "remat") if equation else "input"
