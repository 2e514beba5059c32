"""Random projections of rows whose matrix is made as it is used."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._engine import thresholds
from .._engine.leaf import Leaf
from .._engine.matrix import Matrix
from .._engine.products.factored_sketch import KINDS, in_words, maps, project


@dataclass(frozen=True)
class Projection:
    """Rows times a matrix of ±1/√dim: shape (*rows, dim)."""

    dim: int

    def __call__(self, matrix: Matrix, key: jax.Array) -> jax.Array:
        entries = sum(prod(leaf.shape) for leaf in matrix.leaves)
        at_once = max(1, thresholds.current().entries_at_once // max(1, entries))
        scale = jnp.asarray(self.dim, matrix.dtype) ** -0.5

        def column(j: jax.Array) -> jax.Array:
            own = jax.random.fold_in(key, j)
            return matrix.apply(
                [
                    _signs(jax.random.fold_in(own, i), leaf)
                    for i, leaf in enumerate(matrix.leaves)
                ]
            )

        rows = matrix.leaves[0].rows
        if not prod(rows):
            return jnp.zeros((*rows, self.dim), matrix.dtype)
        numbers = jnp.arange(self.dim, dtype=jnp.uint32)
        columns = jax.lax.map(column, numbers, batch_size=min(at_once, self.dim))
        return jnp.moveaxis(columns, 0, -1) * scale


def _signs(key: jax.Array, leaf: Leaf) -> jax.Array:
    """Entries ±1 for a leaf; ±1±i for a complex one, whose imaginary parts count."""
    if not jnp.issubdtype(leaf.carried, jnp.complexfloating):
        return jax.random.rademacher(key, leaf.shape, leaf.carried)
    return jax.lax.complex(*jax.random.rademacher(key, (2, *leaf.shape), leaf.real))


@dataclass(frozen=True)
class FactoredProjection:
    """Rows projected one side of their factors at a time: shape (*rows, dim)."""

    dim: int
    kind: str

    def __call__(self, matrix: Matrix, key: jax.Array) -> jax.Array:
        rows = matrix.selected()
        inner, outer = jax.random.split(key)
        own = self._maps(rows, inner)
        # Real and imaginary parts get signs of their own: their products vanish.
        parts = jax.random.rademacher(outer, (2, self.dim), matrix.dtype)
        total = jnp.zeros((*rows.leaves[0].rows, self.dim), matrix.dtype)
        for i, leaf in enumerate(rows.leaves):
            found = project(leaf, own[i], self.dim, rows.entries(i))
            if jnp.iscomplexobj(found):
                found = _of_parts(found, parts)
            weight = rows.weight(i)
            if weight is not None:
                found = found * weight.reshape(*leaf.rows, 1).astype(found.dtype)
            total += found.astype(matrix.dtype)
        return total

    def _maps(self, rows: Matrix, key: jax.Array) -> list[Any]:
        """The map of each leaf."""
        shapes = [leaf.shape for leaf in rows.leaves]
        return maps(key, shapes, self.dim, self.kind, rows.dtype)

    def words(self, rows: Matrix) -> list[str]:
        """How each leaf is taken, for users."""
        own = self._maps(rows, jax.random.key(0))
        return [
            in_words(leaf, own[i], is_whole=rows.entries(i) is not None)
            for i, leaf in enumerate(rows.leaves)
        ]


def _of_parts(found: jax.Array, signs: jax.Array) -> jax.Array:
    """Complex sketches (*rows, dim) as real ones, with signs (2, dim) of both parts."""
    signs = signs.reshape(2, *[1] * (found.ndim - 1), -1).astype(found.real.dtype)
    return found.real * signs[0] + found.imag * signs[1]


def projection(dim: int, kind: str) -> Projection | FactoredProjection:
    """The projection of a user's kind."""
    if kind == "dense":
        return Projection(dim)
    if kind not in KINDS:
        known = ", ".join(map(repr, ["dense", *KINDS]))
        raise ValueError(f"kind must be one of {known}, got {kind!r}")
    return FactoredProjection(dim, kind)
