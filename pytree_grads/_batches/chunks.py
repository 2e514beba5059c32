"""Chunks: which examples of a batch are worked on together."""

import math
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._trees.checks import check_chunk_size, is_float0


def chunk_starts(size: int, chunk_size: int) -> np.ndarray:
    """Where each chunk begins; the last one is moved back so that it is full.

    >>> chunk_starts(7, 3)
    array([0, 3, 4], dtype=int32)
    """
    count = math.ceil(size / chunk_size)
    return np.minimum(np.arange(count) * chunk_size, size - chunk_size).astype(np.int32)


def even_chunk(size: int, most: int) -> int:
    """The chunk size that gives the fewest chunks of nearly equal size.

    >>> even_chunk(10, 7), even_chunk(10, 10)
    (5, 10)
    """
    return math.ceil(size / math.ceil(size / most))


def loop_chunk(size: int, chunk_size: int | None) -> int | None:
    """The size of the chunks to loop over, or None for one call of the whole batch."""
    check_chunk_size(chunk_size)
    if chunk_size is None:
        return None
    if not isinstance(size, int):
        raise ValueError(
            f"argument chunk_size={chunk_size} cuts a batch of known size, and the "
            "number of "
            f"examples is symbolic, {size}: leave it out, or export with a number"
        )
    return None if size <= chunk_size else int(chunk_size)


@dataclass(frozen=True)
class Chunks:
    """N rows in equal groups.

    Each chunk takes the same number of neighbouring rows from each group.

    A chunk of neighbours alone would be on one device where rows are sharded. There are
    as many groups as divide the batch and the chunk. So if the number of devices
    divides both, each device has whole groups, and every chunk has as many rows on one
    device as on another.
    """

    total: int  # N
    groups: int
    width: int  # rows of each group in a chunk

    @classmethod
    def of(cls, total: int, chunk_size: int, devices: int = 1) -> "Chunks":
        """Chunks of a size, or of the next below that is shared out over the devices.

        >>> Chunks.of(7, 3)
        Chunks(total=7, groups=1, width=3)
        >>> Chunks.of(32, 12), Chunks.of(32, 12, devices=8).size
        (Chunks(total=32, groups=4, width=3), 8)
        """
        if chunk_size % devices:
            chunk_size = devices * max(1, chunk_size // devices)
        groups = math.gcd(total, chunk_size)
        return cls(total, groups, chunk_size // groups)

    @property
    def size(self) -> int:
        """The number of rows in a chunk."""
        return self.groups * self.width

    @property
    def span(self) -> int:
        """The number of rows in a group."""
        return self.total // self.groups

    @property
    def starts(self) -> np.ndarray:
        """Where full chunks begin in every group; the last two may overlap."""
        return chunk_starts(self.span, self.width)

    @property
    def apart(self) -> "tuple[np.ndarray, Place | None]":
        """Where full chunks begin, none overlapping, and the chunk of the rows left.

        >>> starts, rest = Chunks.of(7, 3).apart
        >>> starts, rest.chunks.size, rest.start
        (array([0, 3], dtype=int32), 1, 6)
        """
        count, left = divmod(self.span, self.width)
        starts = np.arange(count, dtype=np.int32) * self.width
        rest = Place(replace(self, width=left), count * self.width) if left else None
        return starts, rest

    def joined(self, full: jax.Array, *rest: jax.Array) -> jax.Array:
        """An array of all rows, from those of full chunks and the rows that are left.

        >>> full, rest = np.array([[0, 1, 2], [3, 4, 5]]), np.array([6])
        >>> Chunks.of(7, 3).joined(full, rest).tolist()
        [0, 1, 2, 3, 4, 5, 6]
        """
        count, groups, entries = len(full), self.groups, full.shape[2:]
        grouped = full.reshape(count, groups, self.width, *entries).swapaxes(0, 1)
        parts = [grouped.reshape(groups, count * self.width, *entries)]
        parts += [x.reshape(groups, len(x) // groups, *entries) for x in rest]
        return jnp.concatenate(parts, axis=1).reshape(self.total, *entries)


@dataclass(frozen=True)
class Place:
    """Where one chunk is."""

    chunks: Chunks
    start: Any  # in every group; may be traced

    def cut(self, x: Any, axis: int = 0) -> Any:
        """The rows of the chunk, from an array of all rows."""
        if self.chunks.size == self.chunks.total:
            return x
        shape = (*x.shape[:axis], self.chunks.size, *x.shape[axis + 1 :])
        if is_float0(x):
            return np.zeros(shape, x.dtype)
        grouped = self._grouped(x, self.chunks.span, axis)
        part = jax.lax.dynamic_slice_in_dim(
            grouped, self.start, self.chunks.width, axis + 1
        )
        return part.reshape(shape)

    def put(self, x: jax.Array, part: jax.Array, axis: int = 0) -> jax.Array:
        """An array of all rows with those of the chunk in their places."""
        grouped = self._grouped(x, self.chunks.span, axis)
        part = self._grouped(part, self.chunks.width, axis)
        update = jax.lax.dynamic_update_slice_in_dim
        return update(grouped, part, self.start, axis + 1).reshape(x.shape)

    def _grouped(self, x: jax.Array, size: int, axis: int) -> jax.Array:
        return x.reshape(
            *x.shape[:axis], self.chunks.groups, size, *x.shape[axis + 1 :]
        )
