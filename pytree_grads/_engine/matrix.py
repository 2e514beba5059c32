"""The rows of all leaves together, each row with a weight: diag(weights) J."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial, reduce
from typing import Any

import jax
import jax.numpy as jnp

from .._batches.chosen import Chosen
from .._trees.algebra import carried_dtype, common_dtype
from .absorbed import absorbed
from .leaf import Leaf, Summand, as_arrays, chosen, weighted, widened
from .products import gram as _gram
from .products import metric as _metric
from .products import sums as _sums
from .products.scaled_norms import Norms
from .tails.fold import fold
from .tails.tail import Tail
from .tails.through import Through, through


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sources", "weights", "valid", "tail", "diagonal"],
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

    The sources are the leaves themselves. If some leaves have a tail, they are the
    other leaves, and then the values where the tail begins.
    """

    sources: tuple[Leaf, ...]
    weights: tuple[jax.Array, ...] | None = None
    valid: jax.Array | None = None
    tail: Tail | None = None
    diagonal: tuple[jax.Array | None, ...] | None = None

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """All leaves; those with a tail have it folded into their terms."""
        if self.tail is None:
            return self.sources
        return self._with_tailed(fold(self.tail, self.tail_sources))

    @property
    def _unfolded(self) -> tuple[Leaf, ...]:
        """All leaves; the rows of those with a tail go through it, entry by entry."""
        tail = self.tail
        if tail is None:
            return self.sources
        count = len(tail.leaves)
        return self._with_tailed(
            [through(tail, k, self.tail_sources) for k in range(count)]
        )

    def _with_tailed(self, leaves: Sequence[Leaf]) -> tuple[Leaf, ...]:
        """All leaves, in order: those without a tail, and these, which have one."""
        assert self.tail is not None
        found = dict(zip(self.plain, self.sources, strict=False))
        found |= zip(self.tail.leaves, leaves, strict=True)
        return tuple(found[i] for i in range(self.count))

    @property
    def count(self) -> int:
        """How many leaves there are."""
        count = len(self.sources)
        if self.tail is not None:
            count += len(self.tail.leaves) - self.tail.program.source_count
        return count

    @property
    def plain(self) -> list[int]:
        """The positions of the leaves without a tail."""
        tailed = () if self.tail is None else self.tail.leaves
        return [i for i in range(self.count) if i not in tailed]

    @property
    def tail_sources(self) -> tuple[Leaf, ...]:
        """The values where the tail begins."""
        return self.sources[len(self.plain) :]

    @property
    def dtype(self) -> Any:
        """The real accumulation dtype of what is summed over all leaves."""
        return common_dtype(*(leaf.real for leaf in self.sources))

    def scaled(self, factors: Sequence[jax.Array]) -> "Matrix":
        """The rows, multiplied by a number for each row and leaf."""
        if self.weights is not None:
            products: dict[tuple[int, int], jax.Array] = {}
            pairs = list(zip(factors, self.weights, strict=True))
            for f, w in pairs:
                if (id(f), id(w)) not in products:
                    products[id(f), id(w)] = product(f, w)
            factors = [products[id(f), id(w)] for f, w in pairs]
        return replace(self, weights=tuple(factors))

    def only(self, valid: jax.Array) -> "Matrix":
        """The rows, of which those that are not valid count as zero."""
        return replace(self, valid=valid if self.valid is None else valid & self.valid)

    def selected(self) -> "Matrix":
        """Replace `valid`: rows that do not count get zero factors and weight 0.

        The diagonal becomes part of the factors, as far as it can.
        """
        rows = self if self.valid is None else self._with_zeros(self.valid)
        if rows.diagonal is None:
            return rows
        leaves, left = _metric.all_absorbed(rows.leaves, rows.diagonal)
        return replace(rows, sources=leaves, tail=None, diagonal=left)

    def _with_zeros(self, valid: jax.Array) -> "Matrix":
        """The rows, with zero factors and weight 0 for those that are not valid."""
        sources = tuple(_select(leaf, valid) for leaf in self.sources)
        ones = (jnp.ones(valid.shape, self.dtype),) * self.count
        weights = _for_each(
            lambda w: jnp.where(valid, w, jnp.zeros_like(w)), self.weights or ones
        )
        return replace(self, sources=sources, weights=weights, valid=None)

    def entries(self, i: int) -> jax.Array | None:
        """What is left of the diagonal for leaf i, in its accumulation dtype."""
        own = None if self.diagonal is None else self.diagonal[i]
        return None if own is None else own.astype(self.leaves[i].carried)

    def weight(
        self, i: int, extra: jax.Array | None = None, leaf: Leaf | None = None
    ) -> jax.Array | None:
        """The weights of the rows of leaf i, multiplied by `extra`.

        They have the dtype of norms of some leaf: leaf i, unless another is given.
        """
        leaf = leaf or self.leaves[i]
        own = None if self.weights is None else self.weights[i].astype(leaf.real)
        if extra is None:
            return own
        extra = extra.astype(leaf.real)
        return extra if own is None else own * extra

    def without_tail(self) -> "Matrix":
        """The rows without programs, which cannot be pickled.

        What does not fold into terms is kept as rows.
        """
        if self.tail is None:
            return self
        return replace(self, sources=tuple(map(_as_rows, self.leaves)), tail=None)

    def by_leaf(self, number: Callable[[Leaf], float]) -> list[float]:
        """A cost of each leaf; that of a source counts for the first leaf behind it."""
        found = dict(zip(self.plain, map(number, self.sources), strict=False))
        for i, own in [] if self.tail is None else self.tail.first_needed:
            costs = zip(own, self.tail_sources, strict=True)
            found[i] = sum(number(leaf) for is_first, leaf in costs if is_first)
        return [found[i] for i in range(len(found))]

    def words_by_leaf(self) -> list[list[str]]:
        """What the tail of each leaf does, in words for users."""
        tail = self.tail
        return [
            tail.program.words(i) if tail and i in tail.leaves else []
            for i in range(self.count)
        ]

    def leaf_norms(self) -> list[Norms]:
        """The norms of the rows of each leaf."""
        rows = self.selected()
        norms = _metric.leaf_norms(rows.leaves, rows.diagonal)
        return [x.scaled([rows.weight(i) for i in x.leaves]) for x in norms]

    def weighted_sum(self, weights: jax.Array | None) -> list[jax.Array]:
        """The weighted sum of rows: one array per leaf, in its accumulation dtype."""
        rows = replace(self, diagonal=None).selected()
        found = {
            i: _sums.weighted_sum(leaf, rows.weight(i, weights, leaf))
            for i, leaf in zip(rows.plain, rows.sources, strict=False)
        }
        for positions in rows.tailed:
            found |= rows._sum_through(positions, weights)
        return [_times(found[i], self.diagonal_of(i)) for i in range(len(found))]

    def diagonal_of(self, i: int) -> jax.Array | None:
        """The diagonal for leaf i."""
        return None if self.diagonal is None else self.diagonal[i]

    @property
    def tailed(self) -> list[list[int]]:
        """The positions of the leaves with a tail, by the weights that they share."""
        groups: dict[int, list[int]] = {}
        for i in () if self.tail is None else self.tail.leaves:
            own = 0 if self.weights is None else id(self.weights[i])
            groups.setdefault(own, []).append(i)
        return list(groups.values())

    def _sum_through(
        self, positions: Sequence[int], weights: jax.Array | None
    ) -> dict[int, jax.Array]:
        """The weighted sums of leaves with a tail: added up first, then through it."""
        assert self.tail is not None
        tail = self.tail.of(positions)
        needed = tail.program.needed
        totals = [
            _sums.weighted_sum(leaf, self.weight(positions[0], weights, leaf))
            if own
            else jnp.zeros(leaf.shape, leaf.carried)
            for leaf, own in zip(self.tail_sources, needed, strict=True)
        ]
        return dict(zip(positions, tail(totals), strict=True))

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
        rows = replace(self, diagonal=None).selected()
        vectors = [_times(v, self.diagonal_of(i)) for i, v in enumerate(vectors)]
        total = jnp.zeros(rows.sources[0].rows, self.dtype)

        def plus(total: jax.Array, i: int, leaf: Leaf, v: jax.Array) -> jax.Array:
            product, weight = _sums.applied(leaf, v), rows.weight(i, None, leaf)
            return total + (product if weight is None else product * weight).astype(
                self.dtype
            )

        for i, leaf in zip(rows.plain, rows.sources, strict=False):
            total = plus(total, i, leaf, vectors[i])
        for positions in rows.tailed:
            pulled = rows._pulled(positions, vectors)
            for leaf, v in zip(rows.tail_sources, pulled, strict=True):
                total = plus(total, positions[0], leaf, v)
        return total

    def _pulled(
        self, positions: Sequence[int], vectors: Sequence[jax.Array]
    ) -> list[jax.Array]:
        """Vectors like some leaves with a tail, pulled back to its sources."""
        assert self.tail is not None
        tail = self.tail.of(positions)
        avals = [tail.program.avals[k] for k in range(len(positions))]
        own = [
            vectors[i].astype(carried_dtype(aval.dtype))
            for i, aval in zip(positions, avals, strict=True)
        ]
        shapes = [(x.shape, x.dtype) for x in self.tail_sources]
        return tail.transposed(own, shapes)

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
        stacks, rows = [], replace(self, diagonal=None).selected()
        for i, leaf in enumerate(rows._unfolded):
            weight, entries = rows.weight(i, None, leaf), self.diagonal_of(i)
            carried = weight is not None or entries is not None
            stacked = _sums.rows(leaf, carried=carried)
            if weight is not None:
                factors = weight.reshape(*leaf.rows, *[1] * len(leaf.shape))
                stacked = stacked * factors.astype(stacked.dtype)
            if entries is not None:
                stacked *= _leading(entries, stacked.ndim).astype(stacked.dtype)
            stacks.append(stacked.astype(leaf.dtype))
        return stacks

    def chosen(self, rows: Chosen) -> "Matrix":
        """The rows of some of the examples, or of some outputs of all examples."""
        cut = partial(rows.cut, axis=int(rows.of_outputs))
        weights = None if self.weights is None else _for_each(cut, self.weights)
        valid = None if self.valid is None else cut(self.valid)
        sources = tuple(chosen(x, rows) for x in self.sources)
        return replace(self, sources=sources, weights=weights, valid=valid)


def _for_each(
    fun: Callable[[jax.Array], jax.Array], weights: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """Apply a function to weights; leaves that share weights go on to do so."""
    made = {id(w): fun(w) for w in {id(w): w for w in weights}.values()}
    return tuple(made[id(w)] for w in weights)


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
    """The inner products of leaf i, summed over common outputs: (N, N′)."""
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
    return x if diagonal is None else product(x, diagonal)


def _are_same(rows: Matrix, others: Matrix, i: int) -> bool:
    return rows.leaves[i] is others.leaves[i] and rows.weights is others.weights


def _total(products: Sequence[jax.Array]) -> jax.Array:
    dtype = common_dtype(*(x.dtype for x in products))
    return reduce(jnp.add, [x.astype(dtype) for x in products])


def _leading(x: jax.Array, ndim: int) -> jax.Array:
    return x.reshape((1,) * (ndim - x.ndim) + x.shape)


def _as_rows(leaf: Leaf) -> Leaf:
    """The leaf with its rows as arrays, if it goes through a program."""
    if not any(isinstance(x, Through) for x in leaf.terms):
        return leaf
    stacked = _sums.rows(leaf, carried=True)
    return as_arrays(leaf, stacked, "a tail that does not fold")


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
