"""Fold a tail into factors: the terms of leaves from the terms of its sources.

The program of a tail is interpreted on pieces (see `axes`) in place of arrays. Each
value is a sum of pieces with numbers. An equation that acts on one factor alone is
applied to that factor. An array that multiplies entry by entry becomes the weight of a
piece. If an equation fits none of these, the leaves behind it do not fold; their rows
go through the tail.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .. import thresholds
from ..leaf import Leaf
from ..products.routes import norm_route
from . import moves as _moves  # noqa: F401  (registers its rules)
from .axes import Axis, Piece, in_order, pieces_of, summand_of
from .folding import MOST_PIECES, Folding, Number, Sum
from .multiply import summed
from .tail import Tail
from .through import through


def fold(tail: Tail, sources: Sequence[Leaf]) -> list[Leaf]:
    """The leaves of a tail: folded into terms where that is possible and cheaper."""
    folding = Folding(tail)
    for atom, source in zip(tail.program.sources, sources, strict=True):
        folding.values[atom] = _pieces(source)
    for equation in tail.program.graph.equations:
        folding.step(equation)
    found = []
    for i, atom in enumerate(tail.program.graph.outputs):
        rows = through(tail, i, sources)
        value = folding.read(atom)
        folded = None if value is None else _leaf(_joined(value, folding), rows)
        found.append(folded if folded is not None else rows)
    return found


def _pieces(source: Leaf) -> Sum | None:
    if not prod(source.shape) or not prod(source.rows):
        return None
    found: Sum = {}
    for summand in source.summands:
        piece = pieces_of(summand)
        if piece is None:
            return None
        found[piece] = summand.factor
    return found


def _leaf(value: dict[Piece, float], rows: Leaf) -> Leaf | None:
    """A leaf that is a sum of pieces, unless rows take less than half the operations.

    Rows are as large as arrays get, and steps entry by entry do not count in theirs. If
    the norms of the pieces build rows as well, the way with fewer operations is taken.
    """
    if len(value) > MOST_PIECES:
        return None
    aligned = _aligned(list(value))
    summands = tuple(map(summand_of, aligned, value.values()))
    leaf = replace(rows, summands=summands)
    route, by_rows = norm_route(leaf), norm_route(rows)
    times = 1 if route.kind == "rows" else 2
    return None if thresholds.exceeds(route.flops, times * by_rows.flops) else leaf


def _joined(value: Sum, folding: Folding) -> dict[Piece, float]:
    """Add the weights of pieces that have the same factors, also behind their sums."""
    groups: dict[Any, list[Piece]] = {}
    for piece in value:
        groups.setdefault(_factors_of(piece, folding), []).append(piece)
    found: Sum = {}
    for pieces in groups.values():
        if len(pieces) == 1:
            found[pieces[0]] = value[pieces[0]]
        elif id(pieces[0].right) in folding.totals:
            found[_one_total(pieces, value, folding)] = 1.0
        elif any(x.weight is not None for x in pieces):
            found[_with_total_weight(pieces, [value[x] for x in pieces])] = 1.0
        else:
            found |= {piece: value[piece] for piece in pieces}
    return dict(_with_known_number(*x) for x in found.items())


def _with_known_number(piece: Piece, number: Number) -> tuple[Piece, float]:
    """A piece and its number, which goes into a factor if it is an array."""
    if not isinstance(number, jax.Array):
        return piece, number
    right = piece.right * number.astype(piece.right.dtype)
    return piece.with_factor("N", right, piece.entries("N")), 1.0


def _factors_of(piece: Piece, folding: Folding) -> Any:
    """What is equal for pieces whose weights may be added."""
    if id(piece.right) in folding.totals:
        _, whole, axes = folding.totals[id(piece.right)]
        return _factors_of(whole, folding), axes, piece.axes, piece.after
    if piece.is_scatter:
        return id(piece)
    return id(piece.left), id(piece.right), piece.axes, piece.groups, piece.after


def _with_total_weight(pieces: Sequence[Piece], numbers: Sequence[Number]) -> Piece:
    weights = [
        _weight(x) * jnp.asarray(n, x.right.dtype)
        for x, n in zip(pieces, numbers, strict=True)
    ]
    flops = max(x.flops for x in pieces)
    return replace(pieces[0], weight=reduce(jnp.add, weights), flops=flops)


def _one_total(pieces: Sequence[Piece], value: Sum, folding: Folding) -> Piece:
    """Numbers that are sums over pieces with the same factors, as one sum."""
    found = [folding.totals[id(x.right)] for x in pieces]
    _, _, axes = found[0]
    wholes = [whole for _, whole, _ in found]
    total = summed(_with_total_weight(wholes, [value[x] for x in pieces]), axes)
    assert total is not None  # as for each of them
    return replace(
        pieces[0],
        left=total.left,
        right=total.right,
        left_rows=total.left_rows,
        right_rows=total.right_rows,
        flops=total.flops,
    )


def _weight(piece: Piece) -> jax.Array:
    if piece.weight is None:
        return jnp.ones(piece.sizes, piece.right.dtype)
    return piece.weight


def _aligned(pieces: list[Piece]) -> list[Piece]:
    """The pieces, with the axes of the leaf in the groups of the largest piece.

    Inner products of pieces can then be taken factor by factor.
    """
    full = [x for x in pieces if not x.is_dense and x.left_rows and x.right_rows]
    if not full:
        return pieces
    guide = max(full, key=lambda x: min(x.size("M"), x.size("N")))
    # The axes of pieces are those of one value only if the same steps come after.
    place = guide.shape, guide.after
    return [
        x if x is guide or (x.shape, x.after) != place else _like(x, guide)
        for x in pieces
    ]


def _like(piece: Piece, guide: Piece) -> Piece:
    """A piece whose left factor repeats, with the groups of another if possible."""
    piece = _with_shared_weight(piece)
    if piece.is_scatter or piece.left is None or not piece.repeats("M"):
        return piece
    places = {
        group: [guide.axes.index(x) for x in guide.of(group) if x.size != 1]
        for group in "BMN"
    }
    own = [piece.axes.index(x) for x in piece.of("N") if x.size != 1]
    if places["B"] or piece.size("B") != 1 or own not in ([], places["M"], places["N"]):
        return piece
    axes = tuple(
        Axis(x.size, "M" if i in places["M"] else "N") for i, x in enumerate(piece.axes)
    )
    order = [*places["M"], *places["N"]]
    order += [i for i in range(len(axes)) if i not in order]
    groups = in_order([axes[i] for i in order])
    left, right, counts = piece.left, piece.right, (piece.left_rows, piece.right_rows)
    if own and own == places["M"]:
        left, right, counts = right, left, counts[::-1]
    weight = piece.weight
    if weight is not None:
        whole = weight.reshape([x.size for x in piece.groups])
        back = [piece.groups.index(x) for x in piece.axes]
        whole = lax.transpose(whole, back)
        sizes = (1, prod(axes[i].size for i in places["M"]), -1)
        weight = lax.transpose(whole, [axes.index(x) for x in groups]).reshape(sizes)
    return replace(
        piece,
        axes=axes,
        groups=groups,
        left=left,
        right=right,
        left_rows=counts[0],
        right_rows=counts[1],
        weight=weight,
    )


def _with_shared_weight(piece: Piece) -> Piece:
    """A piece whose left factor is shared, with that factor in its weight."""
    if piece.is_scatter or piece.left is None or piece.left_rows:
        return piece
    if piece.size("M") == 1 or piece.left.shape[-1] == 1 or piece.left.shape[-2] != 1:
        return piece
    weight = jnp.broadcast_to(piece.left[:, 0, :, None], piece.sizes)
    weight = weight if piece.weight is None else weight * piece.weight
    ones = jnp.ones((piece.left.shape[0], 1, 1), piece.left.dtype)
    return replace(piece, left=ones, weight=weight)
