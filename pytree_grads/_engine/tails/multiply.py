"""Rules of products with shared arrays, and of sums over axes."""

from collections.abc import Sequence
from dataclasses import replace
from math import prod

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import primitives as p

from ..._trees.algebra import carried_dtype
from ..einsum import dot
from ..facts import concrete_scalar, is_zero, same_along
from ..graph import Atom, Equation
from ..views import Shape
from .axes import Axis, Group, Piece, in_order, wide
from .folding import Folding, Sum, multiplied, rule
from .moves import spread

# --------------------------------------------------------------------------------------
# Entry by entry


@rule(p.mul_p)
def _mul(folding: Folding, equation: Equation, index: int) -> Sum | None:
    left, right = equation.inputs
    own, other = (left, right) if left in folding.values else (right, left)
    return _by(folding, own, other, inverse=False)


@rule(p.div_p)
def _div(folding: Folding, equation: Equation, index: int) -> Sum | None:
    return _by(folding, *equation.inputs, inverse=True)


def _by(folding: Folding, own: Atom, other: Atom, *, inverse: bool) -> Sum | None:
    number = concrete_scalar(other)
    value = folding.read(own)
    if value is None:
        return None
    if number is not None and (number or not inverse):
        times = 1 / number if inverse else number
        return {piece: factor * times for piece, factor in value.items()}
    shapes = own.aval.shape, other.aval.shape
    times = _as_number(folding, other, shapes[0])
    if times is not None:
        times = 1 / times if inverse else times
        return {piece: multiplied(factor, times) for piece, factor in value.items()}
    if len(shapes[0]) != len(shapes[1]):
        return None
    shape = tuple(max(pair) for pair in zip(*shapes, strict=True))

    def product(piece: Piece) -> Piece | None:
        if shape != piece.shape:
            wider = spread(piece, shape, range(len(shape)))
            if wider is None:
                return None
            piece = wider
        return _scaled(folding, piece, other, inverse=inverse)

    return folding.each(own, product)


def _as_number(folding: Folding, atom: Atom, shape: Shape) -> jax.Array | None:
    """A shared array as a number, if all its entries are one."""
    own = tuple(atom.aval.shape)
    same = same_along(atom)
    if own and own != shape:
        return None
    if not all(size == 1 or (size and i in same) for i, size in enumerate(own)):
        return None
    x = folding.coefficient(atom)[(0,) * len(own)]
    return x.astype(carried_dtype(x.dtype))


@rule(p.select_n_p)
def _select(folding: Folding, equation: Equation, index: int) -> Sum | None:
    which, *cases = equation.inputs
    cases_at = folding.coefficient(which)
    found: Sum = {}
    for i, case in enumerate(cases):
        if is_zero(case):
            continue
        chosen = cases_at == jnp.asarray(i, cases_at.dtype)
        made = folding.each(case, lambda x, own=chosen: _chosen(x, own))
        if made is None:
            return None
        found |= made
    return found


def _chosen(piece: Piece, chosen: jax.Array) -> Piece | None:
    """A piece with zeros where a shared array is False.

    Lines and columns that are not chosen at all are zero in the factors, whatever these
    hold: NaN times 0 would be NaN.
    """
    chosen = jnp.broadcast_to(chosen, piece.shape)
    if piece.left is not None:
        whole = piece.canonical(chosen)  # (B, m, n)
        for group, axis in (("M", 2), ("N", 1)):
            factor = piece.left if group == "M" else piece.right
            rows = piece.left_rows if group == "M" else piece.right_rows
            if factor is not None and not piece.repeats(group):
                used = jnp.any(whole, axis)
                used = used.reshape(used.shape[0], *[1] * (rows + 1), used.shape[1])
                kept = jnp.where(used, factor, jnp.zeros_like(factor))
                piece = piece.with_factor(group, kept)
    return _times(piece, chosen.astype(piece.right.dtype), frozenset())


def _times(piece: Piece, x: jax.Array, same: frozenset[int]) -> Piece | None:
    """A piece times a shared array, which repeats its entries along some axes."""
    axes = [a for i, a in enumerate(piece.axes) if a.size != 1 and i not in same]
    groups = {axis.group for axis in axes}
    if piece.is_scatter:
        return _scatter_times(piece, piece.canonical(x))
    if not groups >= {"M", "N"}:
        group = "M" if "M" in groups else "N"
        return _factor_times(piece, group, piece.canonical(x))
    x = piece.canonical(x)
    return replace(piece, weight=x if piece.weight is None else piece.weight * x)


def _factor_times(piece: Piece, group: Group, x: jax.Array) -> Piece:
    """Multiply one factor by numbers (B, m, n) that differ along its axes only."""
    numbers = x[:, :, 0] if group == "M" else x[:, 0, :]
    factor = piece.left if group == "M" else piece.right
    rows = piece.left_rows if group == "M" else piece.right_rows
    assert factor is not None
    numbers = numbers.reshape(numbers.shape[0], *[1] * (rows + 1), numbers.shape[1])
    return piece.with_factor(group, factor * numbers, piece.entries(group))


def _scatter_times(piece: Piece, x: jax.Array) -> Piece:
    """Multiply each line of a scatter by the line (B, m, n) of its index."""
    assert piece.index is not None
    rows = piece.index.shape[1:-1]
    index = jnp.clip(piece.index, 0, x.shape[1] - 1)
    flat = index.reshape(index.shape[0], -1, 1)
    lines = jnp.take_along_axis(x, flat, axis=1)
    lines = lines.reshape(index.shape[0], *rows, index.shape[-1], x.shape[2])
    lines, right = _with_equal_rows(
        lines, piece.left_rows, piece.right, piece.right_rows
    )
    most = max(piece.left_rows, piece.right_rows)
    flops = piece.flops + piece.entries("N")
    return replace(piece, right=right * lines, right_rows=most, flops=flops)


def _with_equal_rows(
    x: jax.Array, x_rows: int, y: jax.Array, y_rows: int
) -> tuple[jax.Array, jax.Array]:
    """Two arrays (B, *rows, ...), with axes of size 1 for row axes that one lacks."""

    def wide(z: jax.Array, rows: int) -> jax.Array:
        return lax.expand_dims(z, range(1 + rows, 1 + max(x_rows, y_rows)))

    return wide(x, x_rows), wide(y, y_rows)


def _scaled(
    folding: Folding, piece: Piece, atom: Atom, *, inverse: bool
) -> Piece | None:
    """A piece times a shared array, or divided by it, entry by entry."""
    key = piece, atom, inverse
    if key not in folding.scaled:
        x = folding.coefficient(atom).astype(piece.right.dtype)
        x = 1 / x if inverse else x
        same = same_along(atom)
        same |= {i for i, size in enumerate(x.shape) if size == 1}
        x = jnp.broadcast_to(x, piece.shape)
        folding.scaled[key] = _times(piece, x, same)
    return folding.scaled[key]


# --------------------------------------------------------------------------------------
# Contractions


@rule(p.reduce_sum_p)
def _reduce(folding: Folding, equation: Equation, index: int) -> Sum | None:
    axes = equation.params["axes"]

    def one(piece: Piece) -> Piece | None:
        total = summed(piece, axes)
        if total is not None and piece.weight is not None and prod(total.shape) == 1:
            folding.totals[id(total.right)] = total, piece, axes
        return total

    return folding.each(equation.inputs[0], one)


def summed(piece: Piece, axes: Sequence[int]) -> Piece | None:
    """The sum of a piece over some axes of the value."""
    gone = [piece.axes[i] for i in axes]
    if piece.is_scatter:
        return _summed_scatter(piece, gone)
    if any(axis.group == "B" and axis.size != 1 for axis in gone):
        return None
    if piece.weight is not None:
        contracted = _contracted(piece, gone)
        if contracted is None:
            return None
        piece = contracted
    for group in "MN":
        piece = _factor_summed(piece, group, [x for x in gone if x.group == group])
    left = tuple(x for x in piece.axes if x not in gone)
    groups = tuple(x for x in piece.groups if x not in gone)
    return _collapsed(replace(piece, axes=left, groups=groups))


def _factor_summed(piece: Piece, group: Group, gone: list[Axis]) -> Piece:
    if not gone:
        return piece
    own = piece.of(group)
    factor = piece.left if group == "M" else piece.right
    assert factor is not None
    if piece.repeats(group):
        count = float(prod(x.size for x in gone))
        return piece.with_factor(group, factor * count, piece.entries(group))
    lead = factor.shape[:-1]
    tensor = factor.reshape(*lead, *(x.size for x in own))
    places = [len(lead) + own.index(x) for x in gone]
    total = jnp.sum(tensor, places).reshape(*lead, -1)
    return piece.with_factor(group, total, piece.entries(group))


def _contracted(piece: Piece, gone: list[Axis]) -> Piece | None:
    """A weighed piece, summed over all axes of one factor: the weight goes with it.

    Σₘ weightₘₙ aₘ bₙ = (aᵀ weight)ₙ bₙ
    """
    wide_axes = {group: [x for x in piece.of(group) if x.size != 1] for group in "MN"}
    whole = [g for g in "MN" if wide_axes[g] and set(wide_axes[g]) <= set(gone)]
    if not whole:
        return None
    group = whole[0]
    weight = piece.weight
    assert weight is not None
    assert piece.left is not None
    factor, other = piece.left, piece.right
    counts = piece.left_rows, piece.right_rows
    if group == "N":
        factor, other, counts = other, factor, counts[::-1]
        weight = jnp.swapaxes(weight, 1, 2)
    if factor.shape[-1] == 1 < weight.shape[1]:
        weight = jnp.sum(weight, 1, keepdims=True)
    lead = factor.shape[:-1]
    flat = factor.reshape(lead[0], -1, factor.shape[-1])
    images = dot("bzm,bmn->bzn", flat, weight).reshape(*lead, -1)
    images, other = _with_equal_rows(images, counts[0], other, counts[1])
    made = images * other  # (B, *rows, T, n)
    # All that is left is in one factor. The other is a number; its axes are summed
    # over once more below, so it is divided by how many entries it has.
    count = prod(x.size for x in wide_axes[group])
    one = jnp.full((1, 1, 1), 1 / count, made.dtype)
    one = jnp.broadcast_to(one, (made.shape[0], made.shape[-2], 1))
    rows = max(counts)
    pairs = piece.left.shape[0] * piece.left.shape[-2]
    flops = piece.flops + pairs * (2 * prod(weight.shape[1:]) + made.shape[-1])
    bare = replace(piece, weight=None, flops=flops)
    if group == "M":
        return replace(bare, left=one, right=made, left_rows=0, right_rows=rows)
    return replace(bare, left=made, right=one, left_rows=rows, right_rows=0)


def _collapsed(piece: Piece) -> Piece:
    """Add up the pairs of a piece that has one line or one column."""
    if piece.size("M") != 1 and piece.size("N") != 1:
        return piece
    if piece.is_dense or piece.weight is not None or piece.size("B") != 1:
        return piece
    assert piece.left is not None
    left, right = _with_equal_rows(
        wide(piece, "M"), piece.left_rows, wide(piece, "N"), piece.right_rows
    )
    total = jnp.sum(left * right, axis=-2, keepdims=True)
    renamed = {x: Axis(x.size, "N") for x in piece.groups}
    return replace(
        piece,
        axes=tuple(renamed[x] for x in piece.axes),
        groups=tuple(renamed[x] for x in piece.groups),
        left=jnp.ones((1, 1, 1), total.dtype),
        right=total,
        left_rows=0,
        right_rows=max(piece.left_rows, piece.right_rows),
        flops=piece.flops
        + 2 * piece.left.shape[-2] * piece.size("M") * piece.size("N"),
    )


def _summed_scatter(piece: Piece, gone: list[Axis]) -> Piece | None:
    """The sum of a scatter over all its lines, or over columns."""
    lines = [x for x in piece.of("M") if x.size != 1]
    if set(lines) & set(gone) and not set(lines) <= set(gone):
        return None
    if any(axis.group == "B" and axis.size != 1 for axis in gone):
        return None
    piece = _factor_summed(piece, "N", [x for x in gone if x.group == "N"])
    axes = tuple(x for x in piece.axes if x not in gone)
    groups = tuple(x for x in piece.groups if x not in gone)
    if not set(lines) <= set(gone) or not lines:
        return replace(piece, axes=axes, groups=groups)
    if piece.size("B") != 1:
        return None
    assert piece.index is not None
    inside = (piece.index < prod(x.size for x in lines))[..., None]
    inside, right = _with_equal_rows(
        inside, piece.left_rows, piece.right, piece.right_rows
    )
    total = jnp.sum(jnp.where(inside, right, jnp.zeros_like(right)), -2, keepdims=True)
    return replace(
        piece,
        axes=axes,
        groups=groups,
        left=jnp.ones((1, 1, 1), total.dtype),
        right=total,
        left_rows=0,
        right_rows=max(piece.left_rows, piece.right_rows),
        index=None,
        flops=piece.flops + piece.entries("N"),
    )


@rule(p.dot_general_p)
def _dot(folding: Folding, equation: Equation, index: int) -> Sum | None:
    at = 0 if equation.inputs[0] in folding.values else 1
    matrix = folding.coefficient(equation.inputs[1 - at])
    contracted, batched = equation.params["dimension_numbers"]

    def product(piece: Piece) -> Piece | None:
        return _times_matrix(
            piece,
            matrix.astype(piece.right.dtype),
            own=(contracted[at], batched[at]),
            other=(contracted[1 - at], batched[1 - at]),
            own_first=at == 0,
        )

    return folding.each(equation.inputs[at], product)


def _times_matrix(
    piece: Piece,
    matrix: jax.Array,
    own: tuple[Sequence[int], Sequence[int]],
    other: tuple[Sequence[int], Sequence[int]],
    *,
    own_first: bool,
) -> Piece | None:
    """The contraction of a piece with a shared array, applied to one factor.

    `own` has the contracted and batch axes of the value, `other` those of the array.
    """
    if not own[0] and not own[1] and piece.left_rows == 0 and not piece.is_scatter:
        return _outer_with(piece, matrix, own_first=own_first)
    blocks = [piece.axes[i] for i in own[1]]
    if blocks and blocks == piece.of("B"):
        # A matrix for each block: one for each layer of a scan, say.
        matrix = jnp.moveaxis(matrix, other[1], range(len(blocks)))
        by_block = matrix.reshape(-1, *matrix.shape[len(blocks) :])
        at = [i - sum(j < i for j in other[1]) for i in other[0]]
        return _times_matrices(piece, by_block, own[0], at, own_first=own_first)
    involved = [piece.axes[i] for i in (*own[0], *own[1])]
    groups = {x.group for x in involved if x.size != 1}
    if len(groups) > 1 or piece.weight is not None or "B" in groups:
        return None
    group = next(iter(groups), "N")
    if any(x.group != group for x in involved) or (piece.is_scatter and group == "M"):
        return None
    members, factor = piece.of(group), wide(piece, group)
    lead = factor.shape[:-1]
    tensor = factor.reshape(*lead, *(x.size for x in members))

    def places(axes: Sequence[int]) -> list[int]:
        return [len(lead) + members.index(piece.axes[i]) for i in axes]

    numbers = (places(own[0]), list(other[0])), (places(own[1]), list(other[1]))
    made = lax.dot_general(
        tensor, matrix, numbers, precision=lax.Precision.HIGHEST
    )  # (batch, lead, kept, new)
    count = len(own[1])
    made = jnp.moveaxis(made, range(count), range(len(lead), len(lead) + count))
    batch = [piece.axes[i] for i in own[1]]
    kept = [x for x in members if x not in involved]
    new = [
        Axis(size, group)
        for i, size in enumerate(matrix.shape)
        if i not in (*other[0], *other[1])
    ]
    free = [x for x in piece.axes if x not in involved]
    others = [x for x in piece.groups if x not in members]
    order = [*batch, *free, *new] if own_first else [*batch, *new, *free]
    changed = replace(
        piece,
        axes=tuple(order),
        groups=in_order([*others, *batch, *kept, *new]),
    )
    count = prod(matrix.shape[i] for i in other[0])
    flops = 2 * count * lead[0] * lead[-1] * prod(x.size for x in [*batch, *kept, *new])
    return changed.with_factor(group, made.reshape(*lead, -1), flops)


def _times_matrices(
    piece: Piece,
    matrices: jax.Array,
    own: Sequence[int],
    other: Sequence[int],
    *,
    own_first: bool,
) -> Piece | None:
    """The contraction of each block of a piece with an array of its own.

    `matrices` has the blocks first. `other` are its contracted axes behind these, `own`
    those of the value. The result has the axes of blocks first.
    """
    involved = [piece.axes[i] for i in own]
    groups = {x.group for x in involved}
    is_open = piece.weight is None and not piece.is_scatter
    if len(groups) != 1 or groups <= {"B"} or not is_open:
        return None
    (group,) = groups
    members, factor = piece.of(group), wide(piece, group)
    lead = factor.shape[:-1]  # (B, *rows, T)
    if lead[0] != matrices.shape[0]:
        return None
    tensor = factor.reshape(*lead, *(x.size for x in members))
    places = [len(lead) + members.index(x) for x in involved]
    made = lax.dot_general(
        tensor,
        matrices,
        ((places, [1 + i for i in other]), ((0,), (0,))),
        precision=lax.Precision.HIGHEST,
    )  # (B, *rows, T, *kept, *new)
    kept = [x for x in members if x not in involved]
    sizes = enumerate(matrices.shape[1:])
    new = [Axis(size, group) for i, size in sizes if i not in other]
    batch = piece.of("B")
    free = [x for x in piece.axes if x not in (*involved, *batch)]
    order = [*batch, *free, *new] if own_first else [*batch, *new, *free]
    others = [x for x in piece.groups if x not in members]
    changed = replace(piece, axes=tuple(order), groups=in_order([*others, *kept, *new]))
    count = prod(matrices.shape[1 + i] for i in other)
    flops = 2 * count * lead[0] * lead[-1] * prod(x.size for x in [*kept, *new])
    return changed.with_factor(group, made.reshape(*lead, -1), flops)


def _outer_with(piece: Piece, x: jax.Array, *, own_first: bool) -> Piece | None:
    """The outer product with a shared array, which goes to a shared left factor.

    So the piece stays as small as it was.
    """
    if piece.weight is not None or piece.size("B") != 1 or piece.left is None:
        return None
    left = wide(piece, "M").reshape(-1, 1) * x.reshape(1, -1)  # (m, new)
    new = [Axis(size, "M") for size in x.shape]
    axes = [*piece.axes, *new] if own_first else [*new, *piece.axes]
    pairs = piece.left.shape[-2]
    if pairs != 1:
        return None
    return replace(
        piece,
        axes=tuple(axes),
        groups=in_order([*piece.groups, *new]),
        left=left.reshape(1, 1, -1),
    )
