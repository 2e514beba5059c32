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
from . import multiply as _multiply  # noqa: F401
from .axes import Axis, Piece, in_order, pieces_of, summand_of
from .folding import MOST_PIECES, Folding, Sum
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
        folded = _leaf(folding.read(atom), rows)
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


def _leaf(value: Sum | None, rows: Leaf) -> Leaf | None:
    """A leaf that is a sum of pieces, if that takes fewer operations than rows."""
    if value is None:
        return None
    value = _joined(value)
    if len(value) > MOST_PIECES:
        return None
    aligned = _aligned(list(value))
    summands = tuple(map(summand_of, aligned, value.values()))
    leaf = replace(rows, summands=summands)
    if thresholds.exceeds(norm_route(leaf).flops, norm_route(rows).flops):
        return None
    return leaf


def _joined(value: Sum) -> Sum:
    """Add the weights of pieces that have the same factors."""
    groups: dict[Any, list[Piece]] = {}
    for piece in value:
        own = id(piece.left), id(piece.right), piece.axes, piece.groups, piece.after
        groups.setdefault(own if not piece.is_scatter else id(piece), []).append(piece)
    found: Sum = {}
    for pieces in groups.values():
        first = pieces[0]
        if len(pieces) == 1 or not any(x.weight is not None for x in pieces):
            found |= {piece: value[piece] for piece in pieces}
            continue
        total = reduce(jnp.add, [value[x] * _weight(x) for x in pieces])
        flops = max(x.flops for x in pieces)
        found[replace(first, weight=total, flops=flops)] = 1.0
    return found


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
