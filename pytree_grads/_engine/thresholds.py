"""The numbers that decide between two ways to compute the same thing.

There is one record for each platform (TPUs take the GPU's until measured). No number
changes a result beyond rounding. `benchmarks/constants.py` times both ways for each
number of a record, on the device at hand; limits to the size of a program have no cases
there.
`benchmarks/results/constants.md` has the table.
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

# The most summands of a leaf: a chain of sums of a value with itself doubles them at
# each step.
MOST_SUMMANDS = 512

# The most offsets of a kernel, for each position of its cotangent, for which patches
# are a term. Each offset is a separate step.
MOST_OFFSETS = 16


# Groups of leaves whose norms are combined in one elementwise loop, at most. The norms
# of more are stacked first: a loop with many operands takes long to compile (64 layers
# in a list: 1.19 times the whole program).
MOST_IN_A_LOOP = 16


@dataclass(frozen=True)
class Thresholds:
    """The numbers of one platform. The defaults were measured on CPUs."""

    # The factors of a convolution are kept only if they are more than this many times
    # smaller than its row. Each product goes through all patches again, which costs as
    # much as building the row.
    dearer: int = 4

    # Entries of the rows that a loop materialises at a time. They take 16 MiB in
    # float32: enough work for one iteration, and little next to a backward pass.
    entries_at_once: int = 1 << 22

    # Entries of rows that are squared at a time. The squares take as much memory as
    # the rows, and a few rows at a time are as fast.
    squares_at_once: int = 1 << 19

    # The most outer terms of one form that stay separate summands of a leaf. Joining
    # them copies their factors; without it, norms and Gramians take all pairs.
    apart: int = 3

    # Leaves whose factors are vectors of one form are stacked if there are at least
    # `many` of them, of at most `small` entries. The copies then cost less than
    # compiling a loop for each.
    many: int = 4
    small: int = 1 << 11

    # The number of entries from which a weighted sum of vectors is computed as a
    # product of a matrix and a vector, which takes longer to compile.
    large_product: int = 1 << 20

    # In a sum over rows, the weights multiply the left of two vectors if the right one
    # is more than this many times as long. Otherwise they multiply the right one, as
    # in the sum for the bias.
    shared: int = 8

    # Look-ups that share an index are found by comparing all pairs, if that costs at
    # most this many multiplications for each line of the table. Otherwise they are
    # found with an array of one number for each line.
    pairs: int = 4

    # More look-ups than this are sorted, rather than compared with one another.
    compared: int = 256

    # A sum over rows is computed as the transpose of the transposed product if it has
    # at most `narrow` columns, takes at least `large_narrow` multiplications, and has
    # `fewer` times as many lines and rows as columns. The transpose of the result
    # takes as long to compile as three loops.
    narrow: int = 128
    large_narrow: int = 1 << 17
    fewer: int = 4


_CPU = Thresholds()

# Measured on an H200. Weights on the left vectors take 0.53 to 0.64 of the time if the
# right ones are 4 or 8 times as long; if both are equally long, the weights stay on the
# right. Narrow products and weighted sums gain nothing from another form. With the
# other numbers, the better way is the same as on CPUs, or the difference is less than a
# tenth.
_GPU = Thresholds(shared=1, narrow=0, large_product=NEVER)

# Not measured, for lack of a TPU. These numbers assume that a TPU, like a GPU, does not
# need the workarounds for the loops that XLA writes for CPUs.
_TPU = _GPU

_RECORDS = {"cpu": _CPU, "gpu": _GPU, "cuda": _GPU, "rocm": _GPU, "tpu": _TPU}

_changed: ContextVar[Thresholds | None] = ContextVar("thresholds", default=None)


def of(platform: str) -> Thresholds:
    """The record of a platform; an unknown one takes the record of CPUs."""
    return _RECORDS.get(platform, _CPU)


def current() -> Thresholds:
    """The record of the default backend at trace time.

    A program for another device, or one exported for several platforms, uses these
    numbers too. Its results are the same; at worst it is slower.
    """
    return _changed.get() or of(jax.default_backend())


@contextmanager
def changed(**numbers: int) -> Iterator[None]:
    """Replace numbers of the current record inside a `with`: for tests and benchmarks.

    This acts on what is traced inside, not on programs that were compiled before.
    """
    token = _changed.set(replace(current(), **numbers))
    try:
        yield
    finally:
        _changed.reset(token)


def exceeds(size: Any, bound: Any) -> bool:
    """Whether a size is known to be larger than a bound.

    In a program that is exported for any batch size, sizes are symbolic. If it is not
    known whether a symbolic size is larger, it does not exceed the bound. The way for
    small sizes is then right: it works for any size, has no loops over tiles, and does
    no quadratic work that the way for large sizes avoids.
    """
    try:
        return bool(size > bound)
    except InconclusiveDimensionOperation:
        return False
