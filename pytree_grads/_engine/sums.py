"""The products of one leaf: its rows, sums over them and over their squares, J v."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial, reduce
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._batches.chunks import chunk_starts, even_chunk
from .._trees.algebra import carried_dtype
from . import terms as _terms
from . import thresholds
from .einsum import dot, times_rows
from .leaf import Leaf, Piece, at_once, over_rows, row, squeezed, take, times, zeros_of
from .patches import Windows
from .terms import Dense, Outer, Scatter, Term
from .views import apply, transposed


def rows(leaf: Leaf, *, carried: bool = False) -> jax.Array:
    """All rows, stacked: shape (N, *leaf) or (N, K, *leaf), in the leaf's dtype or as carried."""
    dtype = leaf.carried if carried else leaf.dtype
    return over_rows(lambda terms: row(leaf, terms).astype(dtype), leaf)


def applied(leaf: Leaf, v: jax.Array) -> jax.Array:
    """The directional derivatives J v: real, shape (N,) or (N, K)."""
    v = v.astype(leaf.carried)
    pulled = [
        transposed(piece.tail, piece.shape, v.astype(_terms.dtype_of(piece.term)))
        for piece in leaf.pieces
    ]

    def one(terms: Sequence[Term]) -> jax.Array:
        total = jnp.zeros((), leaf.real)
        for piece, term, w in zip(leaf.pieces, terms, pulled, strict=True):
            product = jnp.real(_terms.apply_row(term, w)).astype(leaf.real)
            total += times(product, piece.factor)
        return total

    return over_rows(one, leaf)


def over_blocks(
    step: Callable[[jax.Array, Leaf, jax.Array, jax.Array], jax.Array],
    init: jax.Array,
    leaf: Leaf,
    entries: int,
) -> jax.Array:
    """`carry = step(carry, block of rows, start, fresh)`, blocks of at most so many entries.

    `fresh` is False for the rows of the last block that the block before it has had already.
    """
    most = at_once(leaf, entries)
    if not thresholds.exceeds(leaf.size, most):
        return step(init, leaf, jnp.asarray(0), jnp.ones(leaf.size, bool))
    size = even_chunk(leaf.size, most)
    starts = chunk_starts(leaf.size, size)
    firsts = jnp.arange(len(starts), dtype=starts.dtype) * size

    def body(carry: jax.Array, xs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        start, first = xs
        fresh = start + jnp.arange(size, dtype=start.dtype) >= first
        return step(carry, take(leaf, start, size), start, fresh), None

    return jax.lax.scan(body, init, (jnp.asarray(starts), firsts))[0]


def square_sum(leaf: Leaf, weights: jax.Array | None) -> jax.Array:
    """The sum over rows of weight times |entry|**2, entry by entry; in the real carried dtype."""
    if not prod(leaf.shape):
        return jnp.zeros(leaf.shape, leaf.real)
    if len(leaf.pieces) == 1 and _has_squares(leaf):
        squared = _squared(leaf, leaf.pieces[0])
        return weighted_sum(replace(leaf, pieces=(squared,), dtype=leaf.real), weights)

    def add(total: jax.Array, block: Leaf, start: jax.Array, fresh: jax.Array) -> jax.Array:
        squares = jnp.abs(rows(block, carried=True)) ** 2
        if leaf.size and leaf.size % block.size:
            where = fresh.reshape(-1, *[1] * (squares.ndim - 1))
            squares = jnp.where(where, squares, jnp.zeros_like(squares))
        own = weights
        if weights is not None:
            own = lax.dynamic_slice_in_dim(weights, start, block.size).reshape(-1)
        return total + _contract(own, squares.reshape(-1, *leaf.shape), axis=0)

    return over_blocks(add, zeros_of(leaf.shape, leaf.real, leaf), leaf, thresholds.SQUARES_AT_ONCE)


def _has_squares(leaf: Leaf) -> bool:
    """Whether the squares of the entries of its only piece are a term, and take little place."""
    (piece,) = leaf.pieces
    is_large = thresholds.exceeds(prod(leaf.rows) * prod(leaf.shape), thresholds.SQUARES_AT_ONCE)
    is_dense = isinstance(piece.term, Dense) and any(piece.levels)
    return _terms.has_squares(piece.term) and not (is_dense and is_large)


def _squared(leaf: Leaf, piece: Piece) -> Piece:
    """The piece with the squares of its entries, for a term that `has_squares`."""
    term, levels, depth = piece.term, piece.levels, len(leaf.rows)
    if isinstance(term, Scatter) and _terms.has_many_pairs(term):  # lines of one index meet
        own = replace(leaf, pieces=(piece,))
        right = over_rows(lambda terms: _terms.collapsed(terms[0]).right, own)
        right = jnp.moveaxis(right, range(depth), range(piece.axis, piece.axis + depth))
        term, levels = replace(term, right=right), (levels[0], depth)
    return replace(piece, term=_terms.squared(term), levels=levels, factor=piece.factor**2)


def weighted_sum(leaf: Leaf, weights: jax.Array | None) -> jax.Array:
    """The sum over rows of weight times row, in the carried dtype; None stands for ones."""
    blocks: dict[Any, jax.Array] = {}  # of pieces that are alike, added up before their tail
    for piece in sorted(leaf.pieces, key=lambda piece: isinstance(piece.term, Scatter)):
        place = piece.tail, piece.shape, _terms.dtype_of(piece.term)
        blocks[place] = _summed(piece, leaf, weights, blocks.get(place))
    parts = [
        lax.convert_element_type(apply(tail, block), leaf.carried)
        for (tail, *_), block in blocks.items()
    ]
    return reduce(lax.add, parts) if parts else jnp.zeros(leaf.shape, leaf.carried)


def _summed(
    piece: Piece, leaf: Leaf, weights: jax.Array | None, onto: jax.Array | None
) -> jax.Array:
    """The weighted sum of the rows of a piece, before its tail, and of what is there already."""
    arrays, treedef = jax.tree.flatten(piece.term)
    levels, axis = list(piece.levels), piece.axis
    n = leaf.size
    if leaf.outputs is not None:
        k = leaf.outputs
        both = [i for i, level in enumerate(levels) if level == 2]
        if not both:  # no row differs from the other rows of its example
            weights = jnp.full((n,), k, leaf.real) if weights is None else jnp.sum(weights, axis=1)
        elif len(both) < len(arrays):  # one factor does: add it up over the outputs first
            (i,) = both
            fold = jax.vmap(partial(_contract, axis=axis), in_axes=(0, axis), out_axes=axis)
            weights = jnp.ones((n, k), leaf.real) if weights is None else weights
            arrays[i], levels[i], weights = fold(weights, arrays[i]), 1, None
        else:
            arrays = [x.reshape(*x.shape[:axis], n * k, *x.shape[axis + 2 :]) for x in arrays]
            levels = [1] * len(arrays)
            weights = None if weights is None else weights.reshape(n * k)
    differing = [i for i, level in enumerate(levels) if level == 1]
    if isinstance(piece.term, Scatter) and differing == [0]:
        right = jnp.expand_dims(arrays[1], axis)
        arrays[1] = jnp.broadcast_to(right, (*right.shape[:axis], n, *right.shape[axis + 1 :]))
        differing = [0, 1]
    term = jax.tree.unflatten(treedef, arrays)
    if len(differing) < len(arrays):  # a product of sums over rows
        if differing:
            (i,) = differing
            arrays[i] = _contract(weights, arrays[i], axis=axis)
        block = _terms.materialize(jax.tree.unflatten(treedef, arrays))
        if not differing:
            total = n if weights is None else jnp.sum(weights)
            block = block * jnp.asarray(total, block.dtype)
    elif isinstance(term, Scatter):  # lines are added in place
        lines = term.right if weights is None else _weighted(weights, term.right, axis)
        block = jnp.zeros(piece.shape, _terms.dtype_of(term)) if onto is None else onto
        return _terms.add_lines(block, term.index, times(lines.astype(block.dtype), piece.factor))
    else:
        block = _contract_term(term, weights, axis)
    block = times(block, piece.factor)
    return block if onto is None else onto + block


def _contract(weights: jax.Array | None, x: jax.Array, *, axis: int) -> jax.Array:
    """The weighted sum over one axis, carried."""
    x = lax.convert_element_type(x, carried_dtype(x.dtype))
    y, first = squeezed(x, axis)
    if y.ndim - first <= 2:
        if weights is None:
            return lax.reduce_sum(x, (axis,))
        if not thresholds.exceeds(x.size, thresholds.LARGE_PRODUCT - 1):
            return lax.reduce_sum(_weighted(weights, x, axis), (axis,))
    # XLA on CPUs takes up to a hundred times as long for a sum of arrays with several axes.
    weights = jnp.ones(x.shape[axis], x.dtype) if weights is None else weights.astype(x.dtype)
    numbers = ((0,), (first,)), ((), ())
    total = lax.dot_general(weights, y, numbers, precision=lax.Precision.HIGHEST)
    return lax.reshape(total, x.shape[:axis] + x.shape[axis + 1 :])


def _contract_term(
    term: Dense | Outer | Windows, weights: jax.Array | None, axis: int
) -> jax.Array:
    """The weighted sum of terms whose arrays all have an axis of rows."""
    match term:
        case Dense(value):
            return _contract(weights, value, axis=axis)
        case Outer(left, right, precision):
            return _contract_outer(left, right, weights, precision)
        case Windows(left, right):
            if weights is not None:
                term = replace(term, right=_weighted(weights, right, axis))
            return term.summed()


def _contract_outer(
    left: jax.Array, right: jax.Array, weights: jax.Array | None, precision: Any
) -> jax.Array:
    """The sum over rows and pairs: (B, N, T, m) and (B, N, T, n) to (B, m, n)."""
    # Of vectors, the right ones: a bias adds up the same.
    much = thresholds.SHARED if left.shape[2] == 1 else 1
    shorter = thresholds.exceeds(right.shape[-1], left.shape[-1] * much)
    if weights is not None and shorter:
        left = _weighted(weights, left, 1)
    elif weights is not None:
        right = _weighted(weights, right, 1)
    # One contracted axis, as a backward pass has it: XLA copies operands that have two.
    blocks, rows, pairs = left.shape[:3]
    left, right = (lax.reshape(x, (blocks, rows * pairs, x.shape[-1])) for x in (left, right))
    if blocks != 1:
        return dot("bzm,bzn->bmn", left, right, precision=precision)
    left, right = (lax.squeeze(x, (0,)) for x in (left, right))
    m, n = left.shape[-1], right.shape[-1]
    if _is_narrow(n, m, left.shape[0]):
        lines = dot("zn,zm->nm", right, left, precision=precision)
        return lax.optimization_barrier(lines).T[None]
    block = dot("zm,zn->mn", left, right, precision=precision)
    return lax.expand_dims(block, (0,))


def _is_narrow(n: int, m: int, z: int) -> bool:
    """Whether a sum of z outer products, of m lines and n columns, has few columns."""
    many = min(thresholds.NARROW, m // thresholds.FEWER)
    is_long = not thresholds.exceeds(n, many) and thresholds.exceeds(z // thresholds.FEWER, n - 1)
    return is_long and thresholds.exceeds(z * m * n, thresholds.LARGE_NARROW - 1)


def _weighted(weights: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    """An array times weights along one axis, carried; scaled once for a weight and its bias."""
    dtype = carried_dtype(x.dtype)
    y, first = squeezed(lax.convert_element_type(x, dtype), axis)
    product = times_rows(y, lax.convert_element_type(weights, dtype), first)
    return lax.reshape(product, x.shape)
