"""Tiles: some rows at a time, or some lines of all rows, to bound the memory."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..._batches.chunks import chunk_starts, even_chunk
from .. import thresholds
from ..einsum import dot
from ..leaf import Leaf, are_alike, at_once, over_rows, take
from ..terms.protocol import Term
from ..weighing import times

_Carry = TypeVar("_Carry")


def over_blocks(
    step: Callable[[jax.Array, Leaf, jax.Array, jax.Array], jax.Array],
    init: jax.Array,
    leaf: Leaf,
    entries: int,
) -> jax.Array:
    """Run `carry = step(carry, block, start, is_new)` over blocks of examples.

    The rows of a block have at most `entries` entries. The last block is moved back so
    that it is full; `is_new` is False for its examples that overlap the previous block.
    """
    most = at_once(leaf, entries)
    if not thresholds.exceeds(leaf.size, most):
        return step(init, leaf, jnp.asarray(0), jnp.ones(leaf.size, bool))
    size = even_chunk(leaf.size, most)
    starts = chunk_starts(leaf.size, size)
    firsts = jnp.arange(len(starts), dtype=starts.dtype) * size

    def body(
        carry: jax.Array, xs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        start, first = xs
        is_new = start + jnp.arange(size, dtype=start.dtype) >= first
        return step(carry, take(leaf, start, size), start, is_new), None

    return jax.lax.scan(body, init, (jnp.asarray(starts), firsts))[0]


@dataclass(frozen=True)
class Tiles:
    """How rows are cut into tiles: some lines of a block, for all rows.

    So every entry is computed once. With blocks of examples, rows would be computed
    again for each pair of blocks.
    """

    offsets: int  # of a kernel, each with separate lines; 1 without a kernel
    blocks: int
    m: int  # lines of a block for each offset
    lines: int  # of a tile

    @classmethod
    def of(cls, *leaves: Leaf) -> "Tiles | None":
        """The tiles for rows of these leaves; None to take whole rows."""
        sizes = [prod(leaf.rows) * prod(leaf.shape) for leaf in leaves]
        if not any(
            thresholds.exceeds(n, thresholds.current().entries_at_once) for n in sizes
        ):
            return None
        summands = [x for leaf in leaves for x in leaf.summands]
        terms = [x.of_one_row for x in summands]
        kinds = {x.line_offsets for x in terms}
        if len(kinds) > 1 or not all(are_alike(summands[0], x) for x in summands):
            return None
        (own,) = kinds
        if own is None:
            return None
        offsets = prod(own)
        blocks, lines, n = terms[0].shape
        m = lines // offsets
        most = thresholds.current().entries_at_once // max(
            n * prod(x.rows) for x in leaves
        )
        # A tile with as many lines as pairs is no larger than the right factor.
        most = max(1, most, *(x.pair_count for x in terms))
        return cls(offsets, blocks, m, even_chunk(m, most))

    def fold(self, step: Callable[[_Carry, "Tile"], _Carry], init: _Carry) -> _Carry:
        """Run `carry = step(carry, tile)` over all tiles."""
        starts = chunk_starts(self.m, self.lines)
        new_from = np.arange(len(starts), dtype=starts.dtype) * self.lines
        counts = (self.offsets, self.blocks, len(starts))
        offset, block, i = np.indices(counts, np.int32).reshape(3, -1)
        where = [offset, block, starts[i], new_from[i]]

        def body(carry: _Carry, at: list[jax.Array]) -> tuple[_Carry, None]:
            return step(carry, Tile(self, *at)), None

        return jax.lax.scan(body, init, list(map(jnp.asarray, where)))[0]


@dataclass(frozen=True)
class Tile:
    """Some lines of all rows; the last tile of a block is moved back to be full."""

    tiles: Tiles
    offset: jax.Array
    block: jax.Array
    start: jax.Array
    new_from: jax.Array  # the first line that was not in the previous tile

    def entries(self, leaf: Leaf) -> jax.Array:
        """The lines of all rows, before their view: (*leaf.rows, lines, n)."""
        return over_rows(lambda terms: self._of_row(leaf, terms), leaf)

    def _of_row(self, leaf: Leaf, terms: Sequence[Term]) -> jax.Array:
        lines = [
            times(self._lines(term).astype(leaf.carried), summand.factor)
            for summand, term in zip(leaf.summands, terms, strict=True)
        ]
        return reduce(jax.lax.add, lines)

    def _lines(self, term: Term) -> jax.Array:
        outer = term.lines_at(self.offset)
        left, right = (
            jax.lax.dynamic_index_in_dim(x, self.block, keepdims=False)
            for x in (outer.left, outer.right)
        )
        left = jax.lax.dynamic_slice_in_dim(left, self.start, self.tiles.lines, 1)
        return dot("tm,tn->mn", left, right)

    def new(self, entries: jax.Array) -> jax.Array:
        """The entries, with zeros for lines that overlap the previous tile."""
        if not self.tiles.m % self.tiles.lines:
            return entries
        lines = self.start + jnp.arange(self.tiles.lines, dtype=self.start.dtype)
        is_new = lines >= self.new_from
        return jnp.where(is_new[:, None], entries, jnp.zeros_like(entries))
