"""The protocol of terms: what the products ask of every kind.

Methods speak of one row; `jax.vmap` maps them over examples and outputs. Only
`squared`, `add_rows` and `joined` take arrays with axes of rows.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]


class Squared(NamedTuple):
    """The squared norm of a row that was multiplied twice by a scale."""

    square: jax.Array  # of the scaled row
    absolute: jax.Array | None  # the sum of absolute values, if the square subtracts
    scale: jax.Array  # a power of two


class NormCost(NamedTuple):
    """How the norm of one row is taken, and the multiplications and additions."""

    way: str  # in words for users: "squares", "inner products", "patches" or "rows"
    flops: int


class Term(Protocol):
    """One row, or a summand of one, in some form. A kind is a registered dataclass."""

    # ------------------------------------------------------------------------------
    # What it is

    @property
    def is_dense(self) -> bool:
        """Whether the term is the row itself, as an array."""
        ...

    @property
    def shape(self) -> Shape:
        """The shape of the row: (B, m, n), or any shape."""
        ...

    @property
    def dtype(self) -> Any:
        """The accumulation dtype of the row's entries: float32, or wider."""
        ...

    @property
    def pair_count(self) -> int:
        """T: how many outer products add up in a block; 1 if the row is an array."""
        ...

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        """The arrays in each of which the row is linear; () if it is in none."""
        ...

    def with_factors(self, factors: Sequence[jax.Array]) -> Self:
        """The term with other factors."""
        ...

    def describe(self) -> str:
        """The term in words for users, such as "outer 64x48, T=3"."""
        ...

    # ------------------------------------------------------------------------------
    # The row, and products with one array

    def materialize(self) -> jax.Array:
        """The row as one array, in the accumulation dtype."""
        ...

    @property
    def row_cost(self) -> int:
        """Multiplications and additions of `materialize`."""
        ...

    def apply(self, v: jax.Array) -> jax.Array:
        """The sum of the row's entries times those of v, without a conjugate.

        All rows share v, so it may be taken before the factors are multiplied.
        """
        ...

    def apply_own(self, v: jax.Array) -> jax.Array:
        """`apply` for a v of each row's own: an array as large as the row exists."""
        ...

    @property
    def apply_cost(self) -> int:
        """Multiplications and additions of `apply_own`."""
        ...

    # ------------------------------------------------------------------------------
    # Norms

    @property
    def norm_is_product(self) -> bool:
        """Whether the norm of the row is the product of the norms of its factors."""
        ...

    def squared_norm(self) -> Squared:
        """The squared norm, scaled so that it neither overflows nor underflows."""
        ...

    @property
    def norm_cost(self) -> NormCost:
        """How `squared_norm` works, and what it costs."""
        ...

    def near_one(self) -> tuple["Term", jax.Array]:
        """The row multiplied twice by a scale that brings it near one, and the scale.

        The last factor of the result is multiplied by further scales.
        """
        ...

    def mass(self) -> jax.Array:
        """The sum of the norms of what adds up to the row: at least its norm."""
        ...

    # ------------------------------------------------------------------------------
    # Squares of entries

    @property
    def has_squares(self) -> bool:
        """Whether the squares of the entries are a term, cheaper than the row."""
        ...

    @property
    def must_merge(self) -> bool:
        """Whether `squared` needs the factors of `merged`: summands share entries."""
        ...

    def merged(self) -> Self:
        """The same row, in which no two summands share an entry."""
        ...

    def squared(self) -> "Term":
        """The row with |entry|**2 for each entry; factors may have axes of rows.

        Only asked of a term that `has_squares`, and that is merged.
        """
        ...

    # ------------------------------------------------------------------------------
    # Sums over rows

    @property
    def adds_in_place(self) -> bool:
        """Whether `add_rows` writes into the array that it adds to."""
        ...

    def add_rows(
        self,
        onto: jax.Array | None,
        weights: jax.Array | None,
        axis: int,
        factor: float,
    ) -> jax.Array:
        """`onto` plus `factor` times the weighted sum of rows.

        Every array of this term has an axis of N rows at `axis`. `weights` is (N,),
        or None for ones; `onto` has the shape of a row, or is None for zeros.
        """
        ...

    @property
    def sum_cost(self) -> int:
        """Multiplications and additions that a row takes in `add_rows`."""
        ...

    # ------------------------------------------------------------------------------
    # Many terms, and parts of one

    @property
    def form(self) -> Any:
        """Equal for terms that can be `joined`, apart from T; None if it cannot be."""
        ...

    @property
    def most_apart(self) -> int:
        """How many terms of one form stay apart; more are joined."""
        ...

    def joined(self, others: Sequence[Any]) -> Self:
        """The sum of this term and others of its form, as one; arrays may have rows."""
        ...

    @property
    def line_offsets(self) -> Shape | None:
        """Offsets of a kernel, each with lines of its own; () without a kernel.

        None if `lines_at` is not available, so that rows cannot be cut into tiles.
        """
        ...

    def lines_at(self, offset: jax.Array) -> Any:  # an outer term
        """The lines of the row that belong to one offset, as outer products."""
        ...
