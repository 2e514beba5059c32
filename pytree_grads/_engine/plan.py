"""The plan: for each gradient leaf, the places in the backward pass where its terms are made.

`decompose` walks back from a value through linear steps (its tail) to the equations that make its
terms. What the walk does not know becomes a dense term: slower, never wrong.
"""

from collections.abc import Container, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import prod
from typing import Literal, TypeAlias

from jax.extend.core import primitives as p

from . import thresholds
from .convolutions import WindowLayout, window_layout
from .graph import Atom, Equation, Value
from .layout import DotLayout, ScatterLayout, dot_layout, line_layout, scatter_layout
from .views import (
    Place,
    Reshape,
    Shape,
    Tail,
    disjoint,
    is_zero,
    isometric,
    mapped,
    read_parts,
    read_scale,
    read_steps,
    simplified,
)

Route: TypeAlias = Literal["auto", "factored", "rows", "norms"]


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
    """An outer, scatter or windows term, from the operands of the equation that adds it up."""

    equation: Equation
    layout: DotLayout | ScatterLayout | WindowLayout
    operands: tuple[Atom, ...]

    @property
    def shape(self) -> Shape:
        return self.layout.shape

    @property
    def size(self) -> int:
        return self.layout.size


@dataclass(frozen=True)
class AtScan:
    """A term inside the body of a scan, stacked over its steps or added up over them."""

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
        return (self.length, *inner) if self.is_dense else (self.length * inner[0], *inner[1:])

    @property
    def size(self) -> int:
        added_up = self.is_dense and not self.stacked
        return self.site.size * (1 if added_up else self.length)


@dataclass(frozen=True)
class AtNorm:
    """The norm of a row of another term, a dense term of its own: what is left of it in memory."""

    site: "Site"
    shape: Shape = ()
    size: int = 1


@dataclass(frozen=True)
class AtRow:
    """A row of another term as an array, a dense term of its own."""

    site: "Site"

    @property
    def shape(self) -> Shape:
        return self.site.shape

    @property
    def size(self) -> int:
        return prod(self.shape)


Site: TypeAlias = AtValue | AtTerm | AtScan | AtNorm | AtRow


def is_dense(site: Site) -> bool:
    """Whether the term of a site is dense."""
    return site.is_dense if isinstance(site, AtScan) else isinstance(site, AtValue | AtNorm | AtRow)


def origin(site: Site) -> str:
    """The name of the primitive that makes a term, with the scans around it."""
    if isinstance(site, AtScan):
        return f"scan/{origin(site.site)}"
    if isinstance(site, AtNorm | AtRow):
        return origin(site.site)
    equation = site.equation if not isinstance(site, AtValue) else site.producer
    return str(equation.primitive or "remat") if equation else "input"


@dataclass(frozen=True)
class Piece:
    """`factor * tail(term)`, a summand of a leaf."""

    site: Site
    tail: Tail = ()
    factor: float = 1.0
    reason: str = ""  # why the term is dense, where it is


@dataclass(frozen=True)
class LeafPlan:
    """The pieces of a leaf, and those that one sum of its rows alone costs least from."""

    pieces: tuple[Piece, ...]
    summands: tuple[Piece, ...]


def plan_leaf(leaf: Atom, varying: Container[Atom], route: Route) -> LeafPlan:
    """The pieces of a leaf: its terms, or the leaf itself where those would be no smaller.

    A sum alone takes the terms there too, but not those of a scan, whose sum over the steps takes
    less memory. `varying` holds what differs between examples; what does not is kept once, so its
    size is free.
    """
    if route == "rows":
        rows = (Piece(AtValue(leaf), reason="asked for"),)
        return LeafPlan(rows, rows)
    pieces = tuple(
        replace(piece, reason=f"stopped at {origin(piece.site)}") if is_dense(piece.site) else piece
        for piece in decompose(leaf)
    )
    terms, sites = pieces, [piece.site for piece in pieces]
    own = [site for site in sites if not (isinstance(site, AtValue) and site.value not in varying)]
    dearer = thresholds.current().dearer
    kept = sum(site.size * (dearer if _is_convolution(site) else 1) for site in own)
    is_larger = thresholds.exceeds(kept, max(1, prod(leaf.aval.shape)) - 1)
    if route != "factored" and is_larger:
        stops = dict.fromkeys(x.reason for x in pieces if x.reason and x.site in own)
        reason = ", ".join(stops) or "factors are larger than the row"
        if all(_is_convolution(site) for site in sites):
            pieces = tuple(replace(q, site=_row_at(q.site), reason=reason) for q in pieces)
        else:
            pieces = (Piece(AtValue(leaf), reason=reason),)
    summands = terms if all(isinstance(site, AtTerm) for site in sites) else pieces
    return LeafPlan(_norms_of(pieces) if route == "norms" else pieces, summands)


def _norms_of(pieces: tuple[Piece, ...]) -> tuple[Piece, ...]:
    """Pieces with the same norm that hold little more than norms, where the pieces do not meet."""
    pairs = combinations(pieces, 2)
    if not all(isometric(piece.tail) for piece in pieces):
        return pieces
    if not all(disjoint(x.tail, y.tail) for x, y in pairs):
        return pieces
    sites = [_norm_at(piece.site) for piece in pieces]
    total, start, found = sum(site.size for site in sites), 0, []
    for site, piece in zip(sites, pieces, strict=True):
        place = Place((start,), (start + site.size,), (total,), (1,))
        found.append(Piece(site, (Reshape((site.size,)), place), piece.factor))
        start += site.size
    return tuple(found)


def shape_of(pieces: Sequence[Piece], leaf_shape: Shape) -> Shape:
    """The shape of what some pieces add up to: the leaf's, unless only norms are left of it."""
    for piece in pieces:
        site = piece.site
        while isinstance(site, AtScan):
            site = site.site
        if isinstance(site, AtNorm):
            place = piece.tail[-1]
            assert isinstance(place, Place)
            return place.shape
    return leaf_shape


def _norm_at(site: Site) -> Site:
    """Norms taken where a term arises: in the body, if each step of a scan is a row."""
    if isinstance(site, AtScan) and site.stacked:
        return replace(site, site=_norm_at(site.site))
    return AtNorm(site)


def _is_convolution(site: Site) -> bool:
    while isinstance(site, AtScan):
        site = site.site
    return isinstance(site, AtTerm) and isinstance(site.layout, WindowLayout)


def _row_at(site: Site) -> Site:
    """Rows as arrays, made where their terms arise."""
    return replace(site, site=_row_at(site.site)) if isinstance(site, AtScan) else AtRow(site)


def decompose(value: Atom) -> tuple[Piece, ...]:
    """Pieces that add up to a value; it is its own where there are too many."""
    factors: dict[tuple[Site, Tail], float] = {}
    todo: list[tuple[Atom, Tail, float]] = [(value, (), 1.0)]
    count = 0

    def found(site: Site, tail: Tail, factor: float) -> None:
        nonlocal count
        place = site, simplified(tail, site.shape)
        factors[place] = factors.get(place, 0.0) + factor
        count += 1

    while todo:
        if count > thresholds.MOST_SUMMANDS:
            return (Piece(AtValue(value)),)
        atom, tail, factor = todo.pop()
        equation = atom.producer if isinstance(atom, Value) else None
        if is_zero(atom):
            continue
        if not isinstance(atom, Value) or equation is None:
            found(AtValue(atom), tail, factor)
        elif read := read_steps(equation, atom):
            todo.append((read[1], read[0] + tail, factor))
        elif parts := read_parts(equation):
            todo += [(operand, place + tail, factor) for operand, place in parts]
        elif scale := read_scale(equation):
            todo.append((scale[1], tail, factor * scale[0]))
        elif signs := _signs(equation):
            todo += [(x, tail, s * factor) for x, s in zip(equation.inputs, signs, strict=True)]
        elif equation.primitive is p.dot_general_p:
            layout, rest = dot_layout(equation, tail)
            found(AtTerm(equation, layout, tuple(equation.inputs)), rest, factor)
        elif equation.primitive is p.scatter_add_p and (read := scatter_layout(equation)):
            site = AtTerm(equation, read[0], tuple(equation.inputs[1:]))
            found(site, read[1] + tail, factor)
            todo.append((equation.inputs[0], tail, factor))
        elif equation.primitive is p.conv_general_dilated_p and (read := window_layout(equation)):
            site = AtTerm(equation, read[0], tuple(equation.inputs))
            found(site, read[1] + tail, factor)
        elif equation.primitive is p.dynamic_update_slice_p and (line := line_layout(equation)):
            layout, rest, operands = line
            found(AtTerm(equation, layout, operands), rest + tail, factor)
        elif equation.primitive is p.scan_p and (parts := _scan_parts(equation, atom.index)):
            for part in parts:
                if isinstance(part.site, AtScan):
                    found(part.site, part.tail + tail, part.factor * factor)
                else:  # an operand of the scan that goes through it
                    assert isinstance(part.site, AtValue)
                    todo.append((part.site.value, part.tail + tail, part.factor * factor))
        else:
            found(AtValue(atom), tail, factor)
    return tuple(Piece(*place, factor) for place, factor in factors.items())


def _signs(equation: Equation) -> tuple[int, ...]:
    """The signs with which an equation adds up its operands, or () if it does no such thing."""
    if any(x.aval.shape != equation.outputs[0].aval.shape for x in equation.inputs):
        return ()  # a scalar operand is broadcast
    if equation.primitive in (p.add_p, p.add_jaxvals_p):
        return (1, 1)
    return (1, -1) if equation.primitive is p.sub_p else ()


def _scan_parts(equation: Equation, index: int) -> list[Piece]:
    """What adds up to output `index` of a scan: terms of its body, and operands that pass through.

    Empty where the body tells nothing: the output is then a dense term of its own.
    """
    body = equation.body
    carry_from, steps_from = equation.splits
    carries = steps_from - carry_from
    output = body.outputs[index]
    length = equation.params["length"]
    if not isinstance(output, Value):
        return []
    pieces = decompose(output)
    parts: list[Piece] = []
    if index < carries:
        own = [q for q in pieces if q == Piece(AtValue(body.inputs[carry_from + index]))]
        if len(own) != 1:
            return []
        parts.append(Piece(AtValue(equation.inputs[carry_from + index])))
        for q in pieces:
            if q is not own[0]:
                parts.append(replace(q, site=AtScan(equation, q.site, stacked=False)))
        return parts
    for q in pieces:
        site = AtScan(equation, q.site, stacked=True)
        unfold = (Reshape((length, *q.site.shape)), *mapped(q.tail, length))
        if isinstance(q.site, AtValue) and q.site.value in body.inputs[steps_from:]:
            through = equation.inputs[body.inputs.index(q.site.value)]
            parts.append(Piece(AtValue(through), unfold, q.factor))
        else:
            parts.append(Piece(site, unfold, q.factor))
    return parts
