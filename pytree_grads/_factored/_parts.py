"""Rows that are too large to be there at once, some lines of all rows at a time.

Every entry is made once, where some rows at a time would be made again for each pair of blocks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from math import ceil, prod
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._chunks import chunk_starts
from . import _costs
from ._dot import dot
from ._leaves import Leaf, are_alike, over_rows, times
from ._terms import Outer, Term, outer_at, outer_count, pair_count
from ._windows import Windows

_Carry = TypeVar("_Carry")


@dataclass(frozen=True)
class Parts:
    """How rows of one layout, blocks (B, m, n) of outer products or of windows, are cut."""

    outers: int  # how many outer products a row has, of lines of their own
    blocks: int
    m: int  # lines of a block
    lines: int  # of a part

    @classmethod
    def of(cls, *leaves: Leaf) -> "Parts | None":
        """How to cut rows of these leaves, if they fill too many entries and can be cut."""
        sizes = [prod(leaf.rows) * prod(leaf.shape) for leaf in leaves]
        pieces = [piece for leaf in leaves for piece in leaf.pieces]
        if max(sizes) <= _costs.ENTRIES_AT_ONCE or not all(are_alike(pieces[0], x) for x in pieces):
            return None
        terms = [piece.of_one_row for piece in pieces]
        kinds = {x.offsets if isinstance(x, Windows) else type(x) for x in terms}
        if len(kinds) > 1 or not isinstance(terms[0], Outer | Windows):
            return None
        outers = outer_count(terms[0])
        blocks, m, n = terms[0].shape
        m //= outers
        # As many lines as pairs take no more place than the factors.
        most = _costs.ENTRIES_AT_ONCE // max(n * prod(leaf.rows) for leaf in leaves)
        most = max(1, most, *map(pair_count, terms))
        return cls(outers, blocks, m, ceil(m / ceil(m / most)))

    def fold(self, step: Callable[[_Carry, "Part"], _Carry], init: _Carry) -> _Carry:
        """`carry = step(carry, part)` for all parts."""
        starts = chunk_starts(self.m, self.lines)
        firsts = np.arange(len(starts), dtype=starts.dtype) * self.lines  # not yet had
        cuts = np.stack([starts, firsts], -1)
        places = np.indices((self.outers, self.blocks, len(cuts)), np.int32).reshape(3, -1)

        def body(carry: _Carry, at: list[jax.Array]) -> tuple[_Carry, None]:
            return step(carry, Part(self, *at)), None

        xs = [places[0], places[1], *cuts[places[2]].T]
        return jax.lax.scan(body, init, list(map(jnp.asarray, xs)))[0]


@dataclass(frozen=True)
class Part:
    """Some lines of a block of all rows, of which the last part may have had some before."""

    parts: Parts
    outer: jax.Array
    block: jax.Array
    start: jax.Array
    first: jax.Array

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
        outer = outer_at(term, self.outer)
        left, right = (
            jax.lax.dynamic_index_in_dim(x, self.block, keepdims=False)
            for x in (outer.left, outer.right)
        )
        left = jax.lax.dynamic_slice_in_dim(left, self.start, self.parts.lines, 1)
        return dot("tm,tn->mn", left, right)

    def fresh(self, entries: jax.Array) -> jax.Array:
        """The same with zeros for what a part before had."""
        if not self.parts.m % self.parts.lines:
            return entries
        is_fresh = self.start + jnp.arange(self.parts.lines, dtype=self.start.dtype) >= self.first
        return jnp.where(is_fresh[:, None], entries, jnp.zeros_like(entries))
