"""Clipping: bounds for groups of leaves, and the factors that keep rows within them."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import PyTree, describe, describe_node, located
from ._factored._products import combined_norms


def groups(max_norm: PyTree, params: PyTree) -> list[tuple[list[int], jax.Array]]:
    """For each bound in a prefix tree, the leaves that it bounds together."""
    for path, bound in jax.tree.leaves_with_path(max_norm):
        where = located("max_norm", path)
        if not isinstance(bound, jax.Array | np.ndarray | np.generic | float | int):
            raise TypeError(f"{where} must be a real number, got {describe(bound)}")
        if jnp.shape(bound) != () or not jnp.isrealobj(bound):
            raise ValueError(f"{where} must be one real number, got {describe(jnp.asarray(bound))}")
        if not isinstance(bound, jax.Array) and not float(bound) >= 0:
            raise ValueError(f"{where} must not be negative or NaN, got {bound}")
    leaves = jax.tree.leaves(max_norm)
    try:
        labels = jax.tree.broadcast(
            jax.tree.unflatten(jax.tree.structure(max_norm), range(len(leaves))), params
        )
    except ValueError:
        raise ValueError(
            "argument max_norm must be a number or a prefix tree of the parameters, "
            f"{describe_node(params)}, got {describe_node(max_norm)}"
        ) from None
    owners = jax.tree.leaves(labels)
    members = [[i for i, owner in enumerate(owners) if owner == j] for j in range(len(leaves))]
    return [(found, jnp.asarray(b)) for found, b in zip(members, leaves, strict=True) if found]


def factors(
    norms: Sequence[jax.Array], groups: list[tuple[list[int], jax.Array]]
) -> tuple[list[jax.Array], jax.Array]:
    """The factor of every row for each leaf, and which rows are finite, from norms of leaves."""
    found: list[Any] = [None] * len(norms)
    finite = jnp.ones(norms[0].shape, bool)
    for members, bound in groups:
        norm = combined_norms([norms[i] for i in members])
        finite &= jnp.isfinite(norm)
        bound = bound.astype(norm.dtype)
        too_long = norm > bound  # False for NaN, which is passed on
        shrink = bound / jnp.where(too_long, norm, jnp.ones_like(norm))
        factor = jnp.where(too_long, shrink, jnp.ones_like(norm))
        for i in members:
            found[i] = factor
    return found, finite
