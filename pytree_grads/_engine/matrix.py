"""The rows of all leaves together, each row with a weight: diag(weights) J."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp

from .._jax import sharding
from .._trees.algebra import carried_dtype, common_dtype
from .leaf import Leaf, Summand, take, weighted, widened
from .products import gram as _gram
from .products import sums as _sums
from .products.norms import leaf_norms
from .products.scaled_norms import Norms
from .tails.fold import fold
from .tails.tail import Tail


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["sources", "weights", "valid", "tail"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Matrix:
    """The rows of all leaves, with weights.

    Arrays of one number per row have shape (N,), or (N, K) if an example has K outputs.
    `weights` has such an array for each leaf, since a clip per group differs between
    leaves; None means ones. A row that is not `valid` counts as zero, whatever it
    holds; None means that all rows are valid.

    The sources are the leaves themselves. If some leaves have a tail, they are the
    other leaves, and then the values where the tail begins.
    """

    sources: tuple[Leaf, ...]
    weights: tuple[jax.Array, ...] | None = None
    valid: jax.Array | None = None
    tail: Tail | None = None

    @cached_property
    def leaves(self) -> tuple[Leaf, ...]:
        """All leaves; those with a tail have it folded into their terms."""
        if self.tail is None:
            return self.sources
        plain, sources = self._plain, self.sources[len(self._plain) :]
        found = dict(zip(plain, self.sources, strict=False))
        found |= zip(self.tail.leaves, fold(self.tail, sources), strict=True)
        return tuple(found[i] for i in range(len(found)))

    @property
    def _plain(self) -> list[int]:
        """The positions of the leaves without a tail."""
        tailed = () if self.tail is None else self.tail.leaves
        count = len(self.sources) + len(tailed)
        if self.tail is not None:
            count -= self.tail.program.source_count
        return [i for i in range(count) if i not in tailed]

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
        """Replace `valid`: rows that do not count get zero factors and weight 0."""
        if self.valid is None:
            return self
        sources = tuple(_select(leaf, self.valid) for leaf in self.sources)
        count = len(self._plain) + (0 if self.tail is None else len(self.tail.leaves))
        ones = (jnp.ones(self.valid.shape, self.dtype),) * count
        own: dict[int, jax.Array] = {}  # leaves share weights, and go on to do so
        for w in self.weights or ones:
            if id(w) not in own:
                own[id(w)] = jnp.where(self.valid, w, jnp.zeros_like(w))
        weights = tuple(own[id(w)] for w in self.weights or ones)
        return Matrix(sources, weights, tail=self.tail)

    def weight(self, i: int, extra: jax.Array | None = None) -> jax.Array | None:
        """The weights of the rows of leaf i, multiplied by `extra`."""
        return self._weight(i, extra, self.leaves[i])

    def _weight(
        self, i: int, extra: jax.Array | None, leaf: Leaf
    ) -> jax.Array | None:
        """The weights of leaf i, multiplied by `extra`, in the dtype of some leaf."""
        own = None if self.weights is None else self.weights[i].astype(leaf.real)
        if extra is None:
            return own
        extra = extra.astype(leaf.real)
        return extra if own is None else own * extra

    def by_leaf(self, number: Callable[[Leaf], int]) -> list[int]:
        """A cost of each leaf; that of a source counts for the first leaf behind it."""
        plain = self._plain
        found = dict(zip(plain, map(number, self.sources), strict=False))
        for i, own in [] if self.tail is None else self.tail.first_needed:
            costs = zip(own, self.sources[len(plain) :], strict=True)
            found[i] = sum(number(leaf) for is_first, leaf in costs if is_first)
        return [found[i] for i in range(len(found))]

    def leaf_norms(self) -> list[Norms]:
        """The norms of the rows of each leaf."""
        rows = self.selected()
        norms = leaf_norms(rows.leaves)
        return [x.scaled([rows.weight(i) for i in x.leaves]) for x in norms]

    def weighted_sum(self, weights: jax.Array | None) -> list[jax.Array]:
        """The weighted sum of rows: one array per leaf, in its accumulation dtype."""
        rows = self.selected()
        found = {
            i: _sums.weighted_sum(leaf, rows._weight(i, weights, leaf))
            for i, leaf in zip(rows._plain, rows.sources, strict=False)
        }
        for positions in rows._tailed:
            found |= rows._sum_through(positions, weights)
        return [found[i] for i in range(len(found))]

    @property
    def _tailed(self) -> list[list[int]]:
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
        sources = self.sources[len(self._plain) :]
        needed = tail.program.needed
        totals = [
            _sums.weighted_sum(leaf, self._weight(positions[0], weights, leaf))
            if own
            else jnp.zeros(leaf.shape, leaf.carried)
            for leaf, own in zip(sources, needed, strict=True)
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
            sums.append(_sums.square_sum(leaf, scale))
        return sums

    def apply(self, vectors: Sequence[jax.Array]) -> jax.Array:
        rows = self.selected()
        total = jnp.zeros(rows.sources[0].rows, self.dtype)

        def plus(
            total: jax.Array, i: int, leaf: Leaf, v: jax.Array
        ) -> jax.Array:
            product, weight = _sums.applied(leaf, v), rows._weight(i, None, leaf)
            return total + (product if weight is None else product * weight).astype(
                self.dtype
            )

        plain = rows._plain
        for i, leaf in zip(plain, rows.sources, strict=False):
            total = plus(total, i, leaf, vectors[i])
        sources = rows.sources[len(plain) :]
        for positions in rows._tailed:
            pulled = rows._pulled(positions, vectors)
            for leaf, v in zip(sources, pulled, strict=True):
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
        shapes = [(x.shape, x.dtype) for x in self.sources[len(self._plain) :]]
        return tail.transposed(own, shapes)

    def gram(self, other: "Matrix") -> jax.Array:
        """The inner products with the rows of `other`: (*rows, *other rows)."""
        total, rows = None, self.selected()
        others = rows if other is self else other.selected()
        for i, (leaf, theirs) in enumerate(
            zip(rows.leaves, others.leaves, strict=True)
        ):
            wider = common_dtype(leaf.carried, theirs.carried)
            mine, left = weighted(widened(leaf, wider), rows.weight(i))
            yours, right = mine, left
            if theirs is not leaf or others.weights is not rows.weights:
                yours, right = weighted(widened(theirs, wider), others.weight(i))
            product = _gram.gram(mine, yours)
            if left is not None:
                left = left.reshape(*leaf.rows, *[1] * len(theirs.rows))
                product = product * left.astype(product.dtype)
            if right is not None:
                product = product * _leading(right, product.ndim).astype(product.dtype)
            dtype = common_dtype(
                product.dtype, *([] if total is None else [total.dtype])
            )
            product = product.astype(dtype)
            total = product if total is None else total.astype(dtype) + product
        assert total is not None
        return total

    def rows(self) -> list[jax.Array]:
        """The stacked rows: one array per leaf, in the leaf's dtype."""
        stacks, rows = [], self.selected()
        for i, leaf in enumerate(rows.leaves):
            weight = rows.weight(i)
            stacked = _sums.rows(leaf, carried=weight is not None)
            if weight is not None:
                factors = weight.reshape(*leaf.rows, *[1] * len(leaf.shape))
                stacked = (stacked * factors.astype(stacked.dtype)).astype(leaf.dtype)
            stacks.append(stacked)
        return stacks

    def taken(self, start: Any, size: int) -> "Matrix":
        """The rows of `size` examples from `start` on."""
        cut = partial(sharding.take, start=start, size=size)
        weights = None
        if self.weights is not None:
            own = {id(w): w for w in self.weights}
            own = {key: cut(w) for key, w in own.items()}
            weights = tuple(own[id(w)] for w in self.weights)
        valid = None if self.valid is None else cut(self.valid)
        sources = tuple(take(leaf, start, size) for leaf in self.sources)
        return Matrix(sources, weights, valid, self.tail)


def product(x: jax.Array, y: jax.Array) -> jax.Array:
    """Multiply two arrays of a number per row, in the accumulation dtype."""
    dtype = common_dtype(x.dtype, y.dtype)
    return x.astype(dtype) * y.astype(dtype)


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
