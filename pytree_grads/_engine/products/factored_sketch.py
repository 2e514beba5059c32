"""Random projections of rows that take the factors of a term one side at a time.

A leaf is looked at as a matrix (M, N): its axes are split in two, the same way for
every term it may have, so that a key means one projection. Each side has a map of its
own to few numbers; an outer product is projected by its two vectors, and any other row
as the matrix that it is.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import isqrt, prod
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp

from ..._jax.compat import varying_zeros
from ..einsum import dot
from ..leaf import Leaf, Summand, over_rows
from ..terms.outer import Outer
from ..terms.patches import Patches
from ..terms.protocol import Shape, Term
from ..terms.scatter import Scatter
from ..views import Reshape, Transpose, View, apply
from ..weighing import times

# How many multiplications take as long as to look up one entry.
_LOOK_UP = 16


class Map(Protocol):
    """A random linear map of vectors of one side, (size,) to (dim,)."""

    @property
    def dim(self) -> int: ...

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., size) to (..., dim)."""
        ...

    def part(self, start: Any, size: int) -> "Map":
        """The map of entries from `start` on."""
        ...

    def lines(self, index: jax.Array) -> jax.Array:
        """What unit vectors are mapped to: (...) to (..., dim); zero from size on."""
        ...


class Sketch(Protocol):
    """Two maps, and how the images of both sides become `dim` numbers."""

    @property
    def left(self) -> Any: ...  # a Map

    @property
    def right(self) -> Any: ...  # a Map

    def pairs(self, left: jax.Array, right: jax.Array) -> jax.Array:
        """The sum of t outer products: images (T, ·) and (T, ·) to (dim,)."""
        ...

    def matrix(self, row: jax.Array) -> jax.Array:
        """A row as a matrix, (M, N) to (dim,)."""
        ...

    def pair_cost(self, sizes: Shape) -> int:
        """Operations for a pair of vectors of such sizes."""
        ...

    def matrix_cost(self, sizes: Shape) -> int:
        """Operations for a row that is a matrix of such a shape."""
        ...


# ------------------------------------------------------------------------------------
# Maps of one side


@dataclass(frozen=True)
class Signs:
    """Entries ±1/√dim, or the entries themselves with random signs."""

    entries: jax.Array  # (size, dim)

    @property
    def dim(self) -> int:
        return self.entries.shape[1]

    def __call__(self, x: jax.Array) -> jax.Array:
        return x @ self.entries.astype(x.dtype)

    def part(self, start: Any, size: int) -> "Signs":
        return Signs(jax.lax.dynamic_slice_in_dim(self.entries, start, size))

    def lines(self, index: jax.Array) -> jax.Array:
        return self.entries.at[index].get(mode="fill", fill_value=0)


@dataclass(frozen=True)
class Count:
    """A count sketch: each entry is added to one of `dim` numbers, with a sign.

    Entries come in runs of `dim`, of which no two go to the same number. So each number
    looks up one entry of every run, which is many times faster than adding at places.
    """

    bucket: jax.Array  # (size,)
    sign: jax.Array  # (size,)
    dim: int
    first: Any = 0  # the number of the first entry, an int or traced

    def __call__(self, x: jax.Array) -> jax.Array:
        size, entry = x.shape[-1], jnp.arange(x.shape[-1])
        begin = self.first % self.dim
        runs = -(-size // self.dim)
        if not isinstance(begin, int) or begin:
            runs += 1  # where a part begins and ends within a run
        place = (begin + entry) // self.dim * self.dim + self.bucket
        # Which entry is looked up; `size` where there is none.
        source = jnp.full(runs * self.dim, size).at[place].set(entry)
        sign = self.sign.at[source].get(mode="fill", fill_value=0).astype(x.dtype)
        found = x.at[..., source].get(mode="fill", fill_value=0) * sign.reshape(
            *[1] * (x.ndim - 1), -1
        )
        return jnp.sum(found.reshape(*x.shape[:-1], runs, self.dim), axis=-2)

    def part(self, start: Any, size: int) -> "Count":
        take = partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=size)
        first = self.first + start
        return Count(take(self.bucket), take(self.sign), self.dim, first)

    def lines(self, index: jax.Array) -> jax.Array:
        sign = self.sign.at[index].get(mode="fill", fill_value=0)
        bucket = self.bucket.at[index].get(mode="fill", fill_value=0)
        return jax.nn.one_hot(bucket, self.dim, dtype=sign.dtype) * sign[..., None]


@dataclass(frozen=True)
class Side:
    """What is drawn for the map of one side."""

    size: int
    dim: int
    counts: bool  # a count sketch; otherwise signs

    @property
    def is_kept(self) -> bool:
        """Whether the side is kept whole, with signs."""
        return not self.counts and self.size <= self.dim

    @property
    def signs(self) -> int:
        """How many random signs it takes."""
        return self.size if self.counts or self.is_kept else self.size * self.dim

    @property
    def runs(self) -> int:
        """How many random orders of `dim` numbers it takes."""
        return -(-self.size // self.dim) if self.counts else 0

    def map(self, signs: jax.Array, orders: jax.Array) -> Any:
        """The map of these signs and orders."""
        if self.counts:
            return Count(orders.reshape(-1)[: self.size], signs, self.dim)
        if self.is_kept:
            return Signs(jnp.diag(signs))
        entries = signs.reshape(self.size, self.dim)
        return Signs(entries * jnp.asarray(self.dim, signs.dtype) ** -0.5)


def drawn(key: jax.Array, sides: Sequence[Side], dim: int, dtype: Any) -> list[Any]:
    """The maps of all sides, drawn at once: a draw takes long to compile."""
    one, two = jax.random.split(key)
    signs = jax.random.rademacher(one, (sum(x.signs for x in sides),), dtype)
    bits = jax.random.bits(two, (sum(x.runs for x in sides), dim))
    orders = jnp.argsort(bits, axis=1)
    found, i, k = [], 0, 0
    for x in sides:
        found.append(x.map(signs[i : i + x.signs], orders[k : k + x.runs]))
        i, k = i + x.signs, k + x.runs
    return found


# ------------------------------------------------------------------------------------
# Both sides


@dataclass(frozen=True)
class Kronecker:
    """(P_left a) ⊗ (P_right b), from some place on: other leaves have others."""

    left: Signs
    right: Signs
    dim: int
    place: jax.Array

    def pairs(self, left: jax.Array, right: jax.Array) -> jax.Array:
        return self._flat(dot("tl,tr->lr", left, right))

    def matrix(self, row: jax.Array) -> jax.Array:
        return self._flat(self.right(self.left(row.T).T))

    def pair_cost(self, sizes: Shape) -> int:
        left, right = self.left.dim, self.right.dim
        return 2 * (sum(sizes) * max(left, right) + left * right)

    def matrix_cost(self, sizes: Shape) -> int:
        return 2 * prod(sizes) * self.left.dim

    def _flat(self, block: jax.Array) -> jax.Array:
        """(l, r) numbers in consecutive places of `dim`, the last before the first."""
        flat = block.reshape(-1)
        return jnp.roll(jnp.pad(flat, (0, self.dim - flat.size)), self.place)


def side_dims(shape: Shape, dim: int) -> Shape:
    """How many numbers each side of a matrix (M, N) is mapped to.

    A side that is at most √dim long is kept whole, and the other gets dim // side.
    Otherwise one is the whole part of √dim, and the other what dim has room for.
    """
    rows, columns = shape
    if rows**2 <= dim:
        return max(rows, 1), min(columns, dim // max(rows, 1))
    if columns**2 <= dim:
        return min(rows, dim // max(columns, 1)), max(columns, 1)
    small = isqrt(dim)
    large = dim // small
    pair = (small, large) if rows <= columns else (large, small)
    return min(rows, pair[0]), min(columns, pair[1])


@dataclass(frozen=True)
class Tensor:
    """A count sketch of pairs of entries: that of a, convolved with that of b."""

    left: Count
    right: Count
    dim: int

    def pairs(self, left: jax.Array, right: jax.Array) -> jax.Array:
        if jnp.iscomplexobj(left) or jnp.iscomplexobj(right):
            left, right = (jnp.fft.fft(x, axis=-1) for x in (left, right))
            return jnp.fft.ifft(jnp.sum(left * right, axis=0))
        left, right = (jnp.fft.rfft(x, axis=-1) for x in (left, right))
        return jnp.fft.irfft(jnp.sum(left * right, axis=0), n=self.dim)

    def matrix(self, row: jax.Array) -> jax.Array:
        longer, shorter = self.left, self.right
        if row.shape[0] < row.shape[1]:
            row, longer, shorter = row.T, shorter, longer
        signed = row.T * shorter.sign[:, None].astype(row.dtype)
        images = longer(signed)  # (short, dim), each to be turned by its bucket
        turned = jnp.arange(self.dim)[None] - shorter.bucket[:, None]
        return jnp.sum(jnp.take_along_axis(images, turned % self.dim, axis=1), axis=0)

    def pair_cost(self, sizes: Shape) -> int:
        transforms = 8 * self.dim * max(1, self.dim.bit_length())
        looked_up = sum(-(-size // self.dim) * self.dim for size in sizes)
        return _LOOK_UP * looked_up + transforms

    def matrix_cost(self, sizes: Shape) -> int:
        return _LOOK_UP * (prod(sizes) + self.dim * min(sizes))


KINDS = ("kronecker", "tensor")


def maps(
    key: jax.Array, shapes: Sequence[Shape], dim: int, kind: str, dtype: Any
) -> list[Count | Sketch]:
    """The map of each leaf: a count sketch for a vector, whose factors gain nothing."""
    sides = [_sides(shape, dim, kind) for shape in shapes]
    inner, outer = jax.random.split(key)
    places = jax.random.randint(outer, (len(shapes),), 0, dim)
    rest = iter(drawn(inner, [x for own in sides for x in own], dim, dtype))
    found: list[Count | Sketch] = []
    for place, own in zip(places, sides, strict=True):
        ends = [next(rest) for _ in own]
        if len(ends) == 1:
            found += ends
            continue
        left, right = ends
        found.append(
            Kronecker(left, right, dim, place)
            if kind == "kronecker"
            else Tensor(left, right, dim)
        )
    return found


def _sides(shape: Shape, dim: int, kind: str) -> list[Side]:
    """The sides of a leaf; a vector, or a leaf without entries, has one."""
    if len(shape) < 2 or 0 in shape:
        return [Side(prod(shape), dim, counts=True)]
    both = side_sizes(shape)
    if kind == "tensor":
        return [Side(size, dim, counts=True) for size in both]
    own = side_dims(both, dim)
    return [Side(m, d, counts=False) for m, d in zip(both, own, strict=True)]


# ------------------------------------------------------------------------------------
# Rows of a leaf


def project(
    leaf: Leaf, own: Count | Sketch, dim: int, entries: jax.Array | None = None
) -> jax.Array:
    """The sketches of all rows of a leaf, by its map: (*rows, dim).

    `entries` multiply those of each row.
    """

    def of_term(summand: Summand, term: Term) -> jax.Array:
        if not isinstance(own, Count) and entries is None:
            found = _by_factors(own, summand, leaf.shape)
            if found is not None:
                return _of_factors(own, found, summand, term)
        block = apply(summand.view, term.materialize())
        if entries is not None:
            block = block * entries.astype(block.dtype)
        if isinstance(own, Count):
            return own(block.reshape(-1))
        return own.matrix(block.reshape(side_sizes(leaf.shape)))

    def one(terms: Sequence[Term]) -> jax.Array:
        total = jnp.zeros(dim, leaf.carried)
        for summand, term in zip(leaf.summands, terms, strict=True):
            found = of_term(summand, term).astype(leaf.carried)
            total += times(found, summand.factor)
        return total

    is_whole = entries is not None
    by_factors = [_takes_factors(own, x, leaf.shape, is_whole) for x in leaf.summands]
    return over_rows(one, leaf, materializes=not all(by_factors))


def in_words(leaf: Leaf, own: Count | Sketch, *, is_whole: bool) -> str:
    """From what the rows of a leaf are projected, and to what, for users.

    `is_whole` says that rows are built anyhow, to multiply them by a diagonal.
    """
    if not leaf.summands or not prod(leaf.shape):
        return "zero"
    if isinstance(own, Count):
        return "row in full: a vector"
    ways = [
        "factors" if _takes_factors(own, x, leaf.shape, is_whole) else "row in full"
        for x in leaf.summands
    ]
    to = f", {own.left.dim}x{own.right.dim}" if isinstance(own, Kronecker) else ""
    return " + ".join(dict.fromkeys(ways)) + to


def _takes_factors(
    own: Count | Sketch, summand: Summand, shape: Shape, is_whole: bool
) -> bool:
    """Whether a term is projected by its factors; else its row is built."""
    if is_whole or isinstance(own, Count):
        return False
    return _by_factors(own, summand, shape) is not None


def side_sizes(shape: Shape) -> Shape:
    """How many entries each side of a leaf has."""
    split = split_of(shape)
    return prod(shape[:split]), prod(shape[split:])


def split_of(shape: Shape) -> int:
    """How many axes of a leaf are the left side: M + N is least; ties take more."""
    sizes = [(prod(shape[:k]) + prod(shape[k:]), -k) for k in range(1, len(shape))]
    return -min(sizes)[1]


def _of_factors(
    sketch: Sketch, found: "Orientation", summand: Summand, term: Term
) -> jax.Array:
    """The sketch of one term of one row, one side of its vectors at a time."""
    of_left, of_right = sketch.left, sketch.right
    if found.is_swapped:
        of_left, of_right = of_right, of_left
    blocks = summand.shape[0]
    lefts, rights = [], []
    for b in range(blocks):
        m, n = summand.shape[1:]
        start_left = b * m if found.blocks_left else 0
        start_right = 0 if found.blocks_left else b * n
        at = _at_block(term, b)
        left, right = _images(
            at, of_left.part(start_left, m), of_right.part(start_right, n)
        )
        lefts.append(left)
        rights.append(right)
    left, right = jnp.concatenate(lefts), jnp.concatenate(rights)
    if found.is_swapped:
        left, right = right, left
    return sketch.pairs(left, right)


def _by_factors(sketch: Sketch, summand: Summand, shape: Shape) -> "Orientation | None":
    """Where the term stands, if its factors are cheaper than its row as a matrix."""
    found = _orientation(summand, shape, split_of(shape))
    if found is None:
        return None
    one, (blocks, m, n) = summand.of_one_row, summand.shape
    factors = blocks * one.pair_count * sketch.pair_cost((m, n))
    rows = one.row_cost + sketch.matrix_cost(side_sizes(shape))
    return found if factors <= rows else None


def _at_block(term: Term, b: int) -> Term:
    """One block of a term, whose arrays all begin with the axis of blocks."""
    return jax.tree.map(lambda x: x[b : b + 1], term)


def _images(term: Term, of_left: Map, of_right: Map) -> tuple[jax.Array, jax.Array]:
    """The images of the vectors of one block, (T, ·) each."""
    wide = term.dtype
    if isinstance(term, Outer):
        return of_left(term.left[0].astype(wide)), of_right(term.right[0].astype(wide))
    if isinstance(term, Scatter):
        left = of_left.lines(term.index[0]).astype(wide)  # (T, ·)
        right = of_right(term.right[0].astype(wide))
        return left, jnp.broadcast_to(right, (len(left), right.shape[-1]))
    assert isinstance(term, Patches)
    size, pairs = term.left.shape[-1], term.pair_count
    right = term.right.reshape(pairs, -1).astype(wide)

    def add(total: jax.Array, offset: jax.Array) -> tuple[jax.Array, None]:
        lines = term.lines_at(offset).left[0].astype(wide)  # (T, m)
        return total + of_left.part(offset * size, size)(lines), None

    zeros = varying_zeros((pairs, of_left.dim), wide, term.left, term.right)
    total, _ = jax.lax.scan(add, zeros, jnp.arange(prod(term.offsets)))
    return total, of_right(right)


# ------------------------------------------------------------------------------------
# Where a term stands in its leaf


class Orientation(NamedTuple):
    """Which side of the leaf the left vectors of a term are on."""

    is_swapped: bool
    blocks_left: bool  # the blocks belong to the side of the left vectors


class _Atom(NamedTuple):
    """A run of an axis of the term: entries `size` apart by what follows it."""

    axis: str
    size: int
    inner: int  # how many entries of the axis one step goes over


def _orientation(summand: Summand, shape: Shape, split: int) -> Orientation | None:
    """How a term's (B, m, n) becomes the two sides of its leaf; None if it does not."""
    if not isinstance(summand.term, Outer | Scatter | Patches):
        return None
    atoms = _atoms_after(summand.view, summand.shape)
    if atoms is None:
        return None
    left = [x for axis in atoms[:split] for x in axis]
    right = [x for axis in atoms[split:] for x in axis]
    sizes = dict(zip("bmn", summand.shape, strict=True))
    for is_swapped in (False, True):
        for blocks_left in (True, False):
            own = ("bm", "n") if blocks_left else ("m", "bn")
            wanted = own[::-1] if is_swapped else own
            if all(
                _is_whole(side, axes, sizes)
                for side, axes in zip((left, right), wanted, strict=True)
            ):
                return Orientation(is_swapped, blocks_left)
    return None


def _is_whole(side: list[_Atom], axes: str, sizes: dict[str, int]) -> bool:
    """Whether a side is the axes, whole and in order."""
    expected = [
        (axis, inner)
        for axis in axes
        for inner in [x.inner for x in side if x.axis == axis]
    ]
    if [(x.axis, x.inner) for x in side] != expected:
        return False
    return all(
        prod(x.size for x in side if x.axis == axis) == sizes[axis]
        and _descends([x for x in side if x.axis == axis])
        for axis in axes
    )


def _descends(run: list[_Atom]) -> bool:
    """Whether the parts of one axis stand in their order."""
    inner = 1
    for x in reversed(run):
        if x.inner != inner:
            return False
        inner *= x.size
    return True


def _atoms_after(view: View, shape: Shape) -> list[list[_Atom]] | None:
    """What each axis consists of behind a view; None for steps that are not moves."""
    atoms = [
        [_Atom(axis, size, 1)] if size > 1 else []
        for axis, size in zip("bmn", shape, strict=True)
    ]
    for step in view:
        if isinstance(step, Transpose):
            atoms = [atoms[axis] for axis in step.permutation]
        elif isinstance(step, Reshape):
            moved = _regrouped([x for axis in atoms for x in axis], step.shape)
            if moved is None:
                return None
            atoms = moved
        else:
            return None
    return atoms


def _regrouped(flat: list[_Atom], shape: Shape) -> list[list[_Atom]] | None:
    """Runs in order, divided among new axes; None where an axis cuts across runs."""
    found, rest = [], list(flat)
    for size in shape:
        own = []
        while size > 1:
            if not rest:
                return None
            head = rest.pop(0)
            if size % head.size == 0:
                own.append(head)
                size //= head.size
            elif head.size % size == 0:
                inner = head.size // size
                own.append(_Atom(head.axis, size, head.inner * inner))
                rest.insert(0, _Atom(head.axis, inner, head.inner))
                size = 1
            else:
                return None
        found.append(own)
    return found if not rest else None
