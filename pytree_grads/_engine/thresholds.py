"""The numbers on which the choice between ways of computing one thing rests.

There is one record for each platform. No number changes a result beyond rounding.
`benchmarks/constants.py` times the ways on both sides of each, on whatever device there
is, and `benchmarks/README.md` has its tables.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import jax
from jax.errors import InconclusiveDimensionOperation

NEVER = 1 << 60  # larger than any size

# Limits to the size of a program, on any platform.

# Summands of a leaf, at most: sums of sums of one value double them each time.
MOST_SUMMANDS = 512

# Offsets of a kernel for each position of its cotangent, up to which patches are a
# term; each offset is an operation of its own in the program.
MOST_OFFSETS = 16


@dataclass(frozen=True)
class Thresholds:
    """The numbers of one platform. The defaults were measured on CPUs."""

    # The factors of a convolution are kept only if they are that many times smaller
    # than its row: each product goes through all patches again, which costs as much
    # as the row.
    dearer: int = 4

    # Entries of materialised rows in loops that materialise some rows at a time:
    # 16 MiB of float32, enough work for one turn of a loop, and little next to a
    # backward pass.
    entries_at_once: int = 1 << 22

    # Entries of rows that are squared at a time. The squares take as much space as
    # the rows, and a few at a time are as fast.
    squares_at_once: int = 1 << 19

    # Outer products of one form that stay apart in a leaf: joining copies them, but
    # norms and Gramians take pairs of summands.
    apart: int = 3

    # Leaves whose vectors have one form are worked on as one array if there are that
    # many, of at most so many entries: copies then cost less than loops to compile.
    many: int = 4
    small: int = 1 << 11

    # Entries from which on the weighted sum of vectors is a product of a matrix and a
    # vector, which takes longer to compile.
    large_product: int = 1 << 20

    # A sum over rows weights the left of two vectors if the right one is more than
    # so many times as long; otherwise the right one, as the sum of the bias does.
    shared: int = 8

    # Look-ups that share an index are found by comparing all pairs if that costs at
    # most so many multiplications for each line of the table; otherwise by an array
    # with a number for each line.
    pairs: int = 20

    # A sum over rows with at most so many columns is multiplied the other way round,
    # from so many multiplications on, and if there are so many times as many lines
    # and rows. Turning the result back takes as long to compile as three loops.
    narrow: int = 128
    large_narrow: int = 1 << 17
    fewer: int = 4


_CPU = Thresholds()

# Measured on an H200: weighting the left vectors takes 0.53 to 0.68 of the time, and
# neither narrow products nor weighted sums gain from another form. The other numbers
# made the same choice there as on CPUs, or a choice within a tenth of the best.
_GPU = Thresholds(shared=1, narrow=0, large_product=NEVER)

# Not measured: no TPU was at hand. Like a GPU, it has no use for what is done for the
# loops that XLA writes for CPUs.
_TPU = _GPU

_RECORDS = {"cpu": _CPU, "gpu": _GPU, "cuda": _GPU, "rocm": _GPU, "tpu": _TPU}

_changed: ContextVar[Thresholds | None] = ContextVar("thresholds", default=None)


def of(platform: str) -> Thresholds:
    """The record of a platform; an unknown one takes the record of CPUs."""
    return _RECORDS.get(platform, _CPU)


def current() -> Thresholds:
    """The record of the default backend, at the time of tracing.

    A program for another device, or one that is exported for several platforms, takes
    these numbers too: its results are the same, at worst it is slower.
    """
    return _changed.get() or of(jax.default_backend())


@contextmanager
def changed(**numbers: int) -> Iterator[None]:
    """Replace numbers of the current record for a while: for tests and benchmarks.

    It acts on what is traced inside. Programs that were compiled before stay as they
    are.
    """
    token = _changed.set(replace(current(), **numbers))
    try:
        yield
    finally:
        _changed.reset(token)


def exceeds(size: Any, bound: Any) -> bool:
    """Whether a size is known to be larger than a bound.

    In a program that is exported for any batch size, sizes are symbolic. A size that
    may be larger or not does not exceed the bound: the way for small sizes needs no
    number, has no loops over parts, and does no quadratic work that the way for large
    sizes avoids.
    """
    try:
        return bool(size > bound)
    except InconclusiveDimensionOperation:
        return False
