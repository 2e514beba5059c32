"""The numbers on which the choice between ways of computing one thing rests, all in one place.

No number changes a result beyond rounding. `benchmarks/constants.py` times the ways on both sides
of each, on whatever device there is, and `benchmarks/README.md` has its tables.
"""

from typing import Any

from jax.errors import InconclusiveDimensionOperation


def exceeds(size: Any, bound: Any) -> bool:
    """Whether a size is known to be larger than a bound.

    In a program that is exported for any size of the batch, sizes are symbolic. One that may be
    larger or not does not exceed the bound: the way for small sizes needs no number, has no loops
    over parts, and no work in the square of a size that the way for large ones spares.
    """
    try:
        return bool(size > bound)
    except InconclusiveDimensionOperation:
        return False


# --------------------------------------------------------------------------------------------------
# Factors or rows

# The factors of a convolution are worth their place only if they are that many times smaller than
# its row: each product then goes through all windows again, which costs as much as the row.
DEARER = 4

# Offsets of a kernel for each position of its cotangent, up to which windows are a term; each
# offset is an operation of its own in the program.
MOST_OFFSETS = 16

# Entries of materialised rows in loops that materialise some rows at a time: 16 MiB of float32,
# enough work for a turn of a loop, and little beside a backward pass.
ENTRIES_AT_ONCE = 1 << 22

# The same for squares of rows, which are there beside the entries: a few at a time are as fast.
SQUARES_AT_ONCE = 1 << 19

# --------------------------------------------------------------------------------------------------
# Size of the program

# Summands of a leaf, at most: sums of sums of one value double them each time.
MOST_SUMMANDS = 512

# Pieces of one form that stay apart: joining copies them, but products take pairs of pieces.
APART = 3

# Norms of that many leaves at most are put together in one elementwise loop; one of more takes XLA
# on CPUs long to compile.
FEW_PARTS = 16

# Vectors of leaves of one form whose norms are taken as one array: from that many leaves on, of
# that many entries at most. To copy them then costs less than to compile loops for them.
MANY = 4
SMALL = 1 << 11

# --------------------------------------------------------------------------------------------------
# Time

# Entries of the factors of one of several blocks (steps of a scan) from which on blocks are worked
# on one after the other for norms: what is made on the way need not be held for all at once.
LARGE_BLOCK = 1 << 13

# Entries of a factor of one vector for each row (8 MiB of float32) from which on its plain squares
# are taken on CPUs, where none is near the ends of the range. It spares one more reading, which
# takes XLA three times as long as the plain one; to compile the branch takes long too.
LARGE_FACTOR = 1 << 21

# Entries from which on the weighted sum of vectors is a product of a matrix and a vector, which XLA
# on CPUs takes longer to compile.
LARGE_PRODUCT = 1 << 20

# A sum over rows weights the shorter of two vectors, but the right one, as its bias does, unless
# that is more than so many times as long.
SHARED = 8

# What it takes to compare all pairs of look-ups, for each line of the table, up to which those that
# share an index are found so; beyond, by an array with a number for each line.
PAIRS = 20

# Columns of a weight up to which its sum over rows is multiplied the other way round: XLA on CPUs
# is up to six times as fast if so few are the lines, not the columns. From so many multiplications
# on, and if there are at least so many times as many lines and rows: to turn the result round takes
# as long to compile as three loops.
NARROW = 128
LARGE_NARROW = 1 << 17
FEWER = 4
