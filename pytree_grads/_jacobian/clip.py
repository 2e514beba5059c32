"""Clipping: bounds for groups of leaves, and the factors that keep rows within them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .._engine.matrix import Matrix
from .._engine.products.scaled_norms import Norms
from .._trees.algebra import carried_reals, common_dtype, floating
from .._trees.checks import PyTree, describe, located
from . import groups


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["bounds"],
    meta_fields=["members", "nan_safe"],
)
@dataclass(frozen=True)
class Clip:
    """Bounds for the norms of rows, each over some of the leaves."""

    bounds: tuple[jax.Array, ...]
    members: tuple[tuple[int, ...], ...]  # for each bound, the leaves that it bounds
    nan_safe: bool

    def norms(self, parts: Sequence[Norms]) -> tuple[jax.Array, ...]:
        """Combine the leaf norms into one norm per bound."""
        return groups.norms(parts, self.members)

    def __call__(self, matrix: Matrix, norms: Sequence[jax.Array]) -> Matrix:
        """The rows of a matrix, clipped: `norms` has an array for each bound."""
        factors: list[Any] = [None] * sum(map(len, self.members))
        finite: Any = True
        for members, bound, norm in zip(self.members, self.bounds, norms, strict=True):
            if not members:
                continue
            finite &= jnp.isfinite(norm)
            factor = _factor(norm, bound)
            for i in members:
                factors[i] = factor
        clipped = matrix.scaled(factors)
        return clipped.only(finite) if self.nan_safe else clipped


def _factor(norm: jax.Array, bound: jax.Array) -> jax.Array:
    """The factor for a row with a given norm: 1, or what brings it to its bound."""
    limits = jnp.finfo(norm.dtype)
    bound = jnp.minimum(bound.astype(norm.dtype), float(limits.max))
    bound = jnp.where(bound >= 0, bound, jnp.nan)  # a traced one may be negative
    # NaN if the norm is not finite, 0 for a bound of 0.
    norm = jnp.where(jnp.isinf(norm), jnp.nan, norm)
    length = jnp.where(norm <= bound, jnp.maximum(bound, float(limits.tiny)), norm)
    return bound / length  # in this form, XLA does not recompute it for each leaf


def read(max_norm: PyTree, params: PyTree, nan_safe: bool) -> Clip:
    """The clip that a prefix tree of bounds asks for."""
    meets = {common_dtype(*carried_reals(params))}
    leaves: list[Any] = []
    for path, given in jax.tree.leaves_with_path(max_norm):
        where = located("max_norm", path)
        bound = floating(where, given, meets, real=True)
        if bound.shape != ():
            raise ValueError(
                f"{where} must be one real number, got {describe(bound)}: for a bound "
                "per row, J.scale(jnp.minimum(1.0, bounds / J.norms()))"
            )
        if not isinstance(bound, Tracer) and not float(bound) >= 0:
            raise ValueError(f"{where} must not be negative or NaN, got {given}")
        leaves.append(jnp.asarray(bound))
    members = groups.read("max_norm", max_norm, params, "a number or").members
    return Clip(tuple(leaves), members, nan_safe)
