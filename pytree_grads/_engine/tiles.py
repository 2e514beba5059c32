"""Rows that are too large to be there at once, some lines of all rows at a time.

Every entry is made once, where some rows at a time would be made again for each pair of blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._batches.chunks import chunk_starts, even_chunk
from . import thresholds
from .einsum import dot
from .leaf import Leaf, are_alike, over_rows, times
from .patches import Windows
from .terms import Outer, Term, at_offset, pair_count

_Carry = TypeVar("_Carry")


@dataclass(frozen=True)
class Parts:
    """How rows of one layout, blocks of lines that are sums of outer products, are cut."""

    offsets: int  # of windows, each with lines of its own; 1 where there are none
    blocks: int
    m: int  # lines of a block for each offset
    lines: int  # of a part

    @classmethod
    def of(cls, *leaves: Leaf) -> "Parts | None":
        """How to cut rows of these leaves, if they fill too many entries and can be cut."""
        sizes = [prod(leaf.rows) * prod(leaf.shape) for leaf in leaves]
        pieces = [piece for leaf in leaves for piece in leaf.pieces]
        is_large = any(thresholds.exceeds(size, thresholds.ENTRIES_AT_ONCE) for size in sizes)
        if not is_large or not all(are_alike(pieces[0], x) for x in pieces):
            return None
        terms = [piece.of_one_row for piece in pieces]
        kinds = {x.offsets if isinstance(x, Windows) else () for x in terms}
        if len(kinds) > 1 or not all(isinstance(x, Outer | Windows) for x in terms):
            return None
        offsets = prod(*kinds)  # of what has no windows, 1
        blocks, m, n = terms[0].shape
        m //= offsets
        most = thresholds.ENTRIES_AT_ONCE // max(n * prod(leaf.rows) for leaf in leaves)
        # A part with as many lines as there are pairs is no larger than the right factor.
        most = max(1, most, *map(pair_count, terms))
        return cls(offsets, blocks, m, even_chunk(m, most))

    def fold(self, step: Callable[[_Carry, "Part"], _Carry], init: _Carry) -> _Carry:
        """`carry = step(carry, part)` for all parts."""
        starts = chunk_starts(self.m, self.lines)
        new_from = np.arange(len(starts), dtype=starts.dtype) * self.lines
        at = np.indices((self.offsets, self.blocks, len(starts)), np.int32).reshape(3, -1)
        places = [at[0], at[1], starts[at[2]], new_from[at[2]]]

        def body(carry: _Carry, place: list[jax.Array]) -> tuple[_Carry, None]:
            return step(carry, Part(self, *place)), None

        return jax.lax.scan(body, init, list(map(jnp.asarray, places)))[0]


@dataclass(frozen=True)
class Part:
    """Some lines of all rows. The last part of a block is moved back so that it is full."""

    parts: Parts
    offset: jax.Array
    block: jax.Array
    start: jax.Array
    new_from: jax.Array  # the first line that was not in the part before

    def entries(self, leaf: Leaf) -> jax.Array:
        """Those of all rows, before the tail: shape (*leaf.rows, lines, n), carried."""
        return over_rows(lambda terms: self._of_row(leaf, terms), leaf)

    def _of_row(self, leaf: Leaf, terms: Sequence[Term]) -> jax.Array:
        lines = [
            times(self._lines(term).astype(leaf.carried), piece.factor)
            for piece, term in zip(leaf.pieces, terms, strict=True)
        ]
        return reduce(jax.lax.add, lines)

    def _lines(self, term: Term) -> jax.Array:
        assert isinstance(term, Outer | Windows)
        outer = at_offset(term, self.offset)
        left, right = (
            jax.lax.dynamic_index_in_dim(x, self.block, keepdims=False)
            for x in (outer.left, outer.right)
        )
        left = jax.lax.dynamic_slice_in_dim(left, self.start, self.parts.lines, 1)
        return dot("tm,tn->mn", left, right)

    def new(self, entries: jax.Array) -> jax.Array:
        """The same with zeros for lines of the part before, so that products count them once."""
        if not self.parts.m % self.parts.lines:
            return entries
        is_new = self.start + jnp.arange(self.parts.lines, dtype=self.start.dtype) >= self.new_from
        return jnp.where(is_new[:, None], entries, jnp.zeros_like(entries))
