"""The protocol of terms: the methods that every kind has.

Methods are about one row; `jax.vmap` maps them over examples and outputs. Only
`squared`, `add_rows` and `joined` take arrays with row axes.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, Self, TypeAlias

import jax

Shape: TypeAlias = tuple[int, ...]


class Squared(NamedTuple):
    """The squared norm of a row that was multiplied twice by a scale."""

    square: jax.Array  # of the scaled row
    absolute: jax.Array | None  # the sum of absolute values, if summands may cancel
    scale: jax.Array  # a power of two


class NormCost(NamedTuple):
    """How the norm of one row is computed, and its multiplications and additions."""

    way: str  # in words for users: "squares", "inner products", "patches" or "rows"
    flops: int


class Term(Protocol):
    """One row, or a summand of one, in some form; a kind is a registered dataclass."""

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
        """T: how many outer products add up in a block; 1 for other forms."""
        ...

    @property
    def factors(self) -> tuple[jax.Array, ...]:
        """The arrays in each of which the row is linear, if there are any."""
        ...

    @property
    def coefficients(self) -> tuple[jax.Array, ...]:
        """The arrays that all rows share by construction; they have no row axes."""
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

    @property
    def row_size(self) -> int:
        """Entries of the largest array that `materialize` makes: of the row, mostly."""
        ...

    def apply(self, v: jax.Array) -> jax.Array:
        """The sum of the row's entries times the entries of v, without a conjugate.

        All rows share v, so a factor may be multiplied by v first.
        """
        ...

    def apply_own(self, v: jax.Array) -> jax.Array:
        """Like `apply`, but each row has its own v, which is as large as the row."""
        ...

    @property
    def apply_cost(self) -> int:
        """Multiplications and additions of `apply_own`."""
        ...

    @property
    def shared_apply_cost(self) -> int:
        """Multiplications and additions of `apply`, for each row."""
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
        """How `squared_norm` computes the norm, and what it costs."""
        ...

    def near_one(self) -> tuple["Term", jax.Array]:
        """The row multiplied twice by a scale that brings it near one, and the scale.

        Further scales may multiply the last factor of the result.
        """
        ...

    def mass(self) -> jax.Array:
        """A bound of the norm: the sum of the norms of what adds up to the row."""
        ...

    # ------------------------------------------------------------------------------
    # Squares of entries

    @property
    def has_squares(self) -> bool:
        """Whether the squared entries are a term that is cheaper than the row."""
        ...

    @property
    def must_merge(self) -> bool:
        """Whether `squared` needs `merged` first, since summands share entries."""
        ...

    def merged(self) -> Self:
        """An equal term in which no two summands share an entry."""
        ...

    def squared(self) -> "Term":
        """The term of the row of |entry|**2; its factors may have row axes.

        It is used only if `has_squares`, and after `merged` if `must_merge`.
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

        Every array of this term has a row axis of size N at `axis`. `weights` is (N,),
        or None for ones. `onto` has the shape of a row, or is None for zeros.
        """
        ...

    @property
    def sum_cost(self) -> int:
        """Multiplications and additions of `add_rows` for each row."""
        ...

    # ------------------------------------------------------------------------------
    # Many terms, and parts of one

    @property
    def form(self) -> Any:
        """A key that terms share if they can be `joined`; None if this one cannot."""
        ...

    @property
    def most_apart(self) -> int:
        """The largest number of terms of one form that are not joined."""
        ...

    def joined(self, others: Sequence[Any]) -> Self:
        """One term for the sum of this and others of its form; it may have row axes."""
        ...

    @property
    def line_offsets(self) -> Shape | None:
        """The shape of a kernel, whose offsets have separate lines; () without one.

        None if `lines_at` is not available, so that rows cannot be cut into tiles.
        """
        ...

    def lines_at(self, offset: jax.Array) -> Any:  # an outer term
        """The lines of the row that belong to one offset, as outer products."""
        ...
