"""The rows of all leaves together, each row with a weight: diag(weights) J."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from .._batches.chosen import Chosen
from .._trees.algebra import common_dtype
from .absorbed import absorbed
from .leaf import Leaf, Summand, chosen, weighted, widened
from .products import gram as _gram
from .products import metric as _metric
from .products import sums as _sums
from .products.scaled_norms import Norms


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["leaves", "weights", "valid", "diagonal"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Matrix:
    """The rows of all leaves, with weights.

    Arrays of one number per row have shape (N,), or (N, K) if an example has K outputs.
    `weights` has such an array for each leaf, since a clip per group differs between
    leaves; None means ones. A row that is not `valid` counts as zero, whatever it
    holds; None means that all rows are valid. `diagonal` has an array for each leaf, by
    whose entries those of its rows are multiplied. It has as many axes as the leaf, of
    which some may have length 1; None means ones.
    """

    leaves: tuple[Leaf, ...]
    weights: tuple[jax.Array, ...] | None = None
    valid: jax.Array | None = None
    diagonal: tuple[jax.Array | None, ...] | None = None

    @property
    def dtype(self) -> Any:
        """The real accumulation dtype of what is summed over all leaves."""
        return common_dtype(*(leaf.real for leaf in self.leaves))

    def scaled(self, factors: Sequence[jax.Array]) -> "Matrix":
        """The rows, multiplied by a number for each row and leaf."""
        if self.weights is not None:
            factors = [
                product(f, w) for f, w in zip(factors, self.weights, strict=True)
            ]
        return replace(self, weights=tuple(factors))

    def only(self, valid: jax.Array) -> "Matrix":
        """The rows, of which those that are not valid count as zero."""
        return replace(self, valid=valid if self.valid is None else valid & self.valid)

    def selected(self) -> "Matrix":
        """Replace `valid`: rows that do not count get zero factors and weight 0.

        The diagonal becomes part of the factors, as far as it can.
        """
        if self.diagonal is not None:
            leaves, left = _metric.all_absorbed(self.leaves, self.diagonal)
            return replace(self, leaves=leaves, diagonal=None)._selected(left)
        return self._selected(None)

    def _selected(self, diagonal: tuple[jax.Array | None, ...] | None) -> "Matrix":
        if self.valid is None:
            return replace(self, diagonal=diagonal)
        leaves = tuple(_select(leaf, self.valid) for leaf in self.leaves)
        ones = [jnp.ones(self.valid.shape, leaf.real) for leaf in leaves]
        weights = [
            jnp.where(self.valid, w, jnp.zeros_like(w)) for w in self.weights or ones
        ]
        return Matrix(leaves, tuple(weights), diagonal=diagonal)

    def entries(self, i: int) -> jax.Array | None:
        """What is left of the diagonal for leaf i, in its accumulation dtype."""
        own = None if self.diagonal is None else self.diagonal[i]
        return None if own is None else own.astype(self.leaves[i].carried)

    def weight(self, i: int, extra: jax.Array | None = None) -> jax.Array | None:
        """The weights of the rows of leaf i, multiplied by `extra`."""
        own = (
            None
            if self.weights is None
            else self.weights[i].astype(self.leaves[i].real)
        )
        if extra is None:
            return own
        extra = extra.astype(self.leaves[i].real)
        return extra if own is None else own * extra

    def leaf_norms(self) -> list[Norms]:
        """The norms of the rows of each leaf."""
        rows = self.selected()
        norms = _metric.leaf_norms(rows.leaves, rows.diagonal)
        return [x.scaled([rows.weight(i) for i in x.leaves]) for x in norms]

    def weighted_sum(self, weights: jax.Array | None) -> list[jax.Array]:
        """The weighted sum of rows: one array per leaf, in its accumulation dtype."""
        rows = self.selected()
        return [
            _times(_sums.weighted_sum(leaf, rows.weight(i, weights)), rows.entries(i))
            for i, leaf in enumerate(rows.leaves)
        ]

    def square_sum(self, weights: jax.Array | None) -> list[jax.Array]:
        sums, rows = [], self.selected()
        for i, leaf in enumerate(rows.leaves):
            leaf, own = weighted(leaf, rows.weight(i))
            scale = None if own is None else own**2
            if weights is not None:
                extra = weights.astype(leaf.real)
                scale = extra if scale is None else scale * extra
            total, entries = _sums.square_sum(leaf, scale), rows.entries(i)
            sums.append(total if entries is None else total * jnp.abs(entries) ** 2)
        return sums

    def apply(self, vectors: Sequence[jax.Array]) -> jax.Array:
        rows = self.selected()
        total = jnp.zeros(rows.leaves[0].rows, self.dtype)
        for i, (leaf, v) in enumerate(zip(rows.leaves, vectors, strict=True)):
            v = _times(v.astype(leaf.carried), rows.entries(i))
            product, weight = _sums.applied(leaf, v), rows.weight(i)
            total += (product if weight is None else product * weight).astype(
                self.dtype
            )
        return total

    def gram(
        self, other: "Matrix", members: Sequence[Sequence[int]], *, trace: bool = False
    ) -> list[jax.Array]:
        """The inner products with the rows of `other`, over each group of leaves.

        Their shape is (*rows, *other rows). With `trace` they are summed over the
        outputs that both rows have in common, and the shape is (N, N′).
        """
        rows = self.selected()
        others = rows if other is self else other.selected()
        gram = _traced_gram if trace else _weighted_gram
        products = [gram(rows, others, i) for i in range(len(rows.leaves))]
        return [
            _total([products[i] for i in own] or [0 * products[0]]) for own in members
        ]

    def rows(self) -> list[jax.Array]:
        """The stacked rows: one array per leaf, in the leaf's dtype."""
        stacks, rows = [], self.selected()
        for i, leaf in enumerate(rows.leaves):
            weight, entries = rows.weight(i), rows.entries(i)
            carried = weight is not None or entries is not None
            stacked = _sums.rows(leaf, carried=carried)
            if weight is not None:
                factors = weight.reshape(*leaf.rows, *[1] * len(leaf.shape))
                stacked = stacked * factors.astype(stacked.dtype)
            if entries is not None:
                stacked = stacked * _leading(entries, stacked.ndim)
            stacks.append(stacked.astype(leaf.dtype))
        return stacks

    def chosen(self, rows: Chosen) -> "Matrix":
        """The rows of some of the examples."""
        weights = None if self.weights is None else tuple(map(rows.cut, self.weights))
        valid = None if self.valid is None else rows.cut(self.valid)
        leaves = tuple(chosen(x, rows) for x in self.leaves)
        return Matrix(leaves, weights, valid, self.diagonal)


def times_diagonal(
    one: Sequence[jax.Array | None] | None, other: Sequence[jax.Array | None]
) -> tuple[jax.Array | None, ...]:
    """The product of two diagonals, leaf by leaf."""
    if one is None:
        return tuple(other)
    return tuple(_both(x, y) for x, y in zip(one, other, strict=True))


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply two arrays of a number per row, in the accumulation dtype."""
    dtype = common_dtype(x.dtype, y.dtype)
    return x.astype(dtype) * y.astype(dtype)


def _weighted_gram(rows: Matrix, others: Matrix, i: int) -> jax.Array:
    """The inner products of all rows of leaf i of two matrices."""
    leaf, theirs = rows.leaves[i], others.leaves[i]
    wider = common_dtype(leaf.carried, theirs.carried)
    mine, left = weighted(widened(leaf, wider), rows.weight(i))
    yours, right = mine, left
    if not _are_same(rows, others, i):
        yours, right = weighted(widened(theirs, wider), others.weight(i))
    diagonal = _both(rows.entries(i), others.entries(i))
    if diagonal is None:
        product = _gram.gram(mine, yours)
    else:
        product = _metric.gram(mine, yours, diagonal)
    if left is not None:
        left = left.reshape(*leaf.rows, *[1] * len(theirs.rows))
        product = product * left.astype(product.dtype)
    if right is not None:
        product = product * _leading(right, product.ndim).astype(product.dtype)
    return product


def _traced_gram(rows: Matrix, others: Matrix, i: int) -> jax.Array:
    """The same, summed over the outputs that both rows have in common."""
    leaf, theirs = rows.leaves[i], others.leaves[i]
    wider = common_dtype(leaf.carried, theirs.carried)
    mine = absorbed(widened(leaf, wider), rows.weight(i))
    yours = mine
    if not _are_same(rows, others, i):
        yours = absorbed(widened(theirs, wider), others.weight(i))
    diagonal = _both(rows.entries(i), others.entries(i))
    if diagonal is None:
        return _gram.traced_gram(mine, yours)
    return _metric.traced_gram(mine, yours, diagonal)


def _both(x: jax.Array | None, y: jax.Array | None) -> jax.Array | None:
    """The product of two diagonals, of which None means ones."""
    if x is None or y is None:
        return y if x is None else x
    return product(x, y)


def _times(x: jax.Array, diagonal: jax.Array | None) -> jax.Array:
    return x if diagonal is None else x * diagonal


def _are_same(rows: Matrix, others: Matrix, i: int) -> bool:
    return rows.leaves[i] is others.leaves[i] and rows.weights is others.weights


def _total(products: Sequence[jax.Array]) -> jax.Array:
    dtype = common_dtype(*(x.dtype for x in products))
    return reduce(jnp.add, [x.astype(dtype) for x in products])


def _leading(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _select(leaf: Leaf, valid: jax.Array) -> Leaf:
    """The leaf with zeros in rows that are not valid; a weight 0 would keep NaN."""
    masks = [jnp.any(valid), valid, valid]
    if leaf.outputs is not None:
        masks[1] = jnp.any(valid, axis=1)

    def of(summand: Summand) -> Summand:
        arrays, treedef = jax.tree.flatten(summand.term)
        kept = []
        for x, count in zip(arrays, summand.row_axes, strict=True):
            mask, before = masks[count], summand.axis if count else 0
            after = x.ndim - mask.ndim - before
            mask = mask.reshape((1,) * before + mask.shape + (1,) * after)
            kept.append(jnp.where(mask, x, jnp.zeros_like(x)))
        return replace(summand, term=jax.tree.unflatten(treedef, kept))

    return replace(leaf, summands=tuple(map(of, leaf.summands)))
