"""A diagonal in parameter space, as `J.scale_params` takes it."""

import jax
import jax.numpy as jnp

from .._trees.algebra import carried_reals, floating
from .._trees.checks import PyTree, describe, located, structure_difference


def read(diagonal: PyTree, params: PyTree) -> tuple[jax.Array, ...]:
    """The numbers for each leaf, with as many axes as the leaf has."""
    if jax.tree.structure(diagonal) != jax.tree.structure(params):
        path, clause = structure_difference(params, diagonal)
        raise ValueError(
            "argument diagonal must be a tree like the parameters, but "
            f"diagonal{jax.tree_util.keystr(path)} is not: {clause}"
        )
    leaves = jax.tree.leaves_with_path(diagonal)
    found = []
    for (path, given), like in zip(leaves, jax.tree.leaves(params), strict=True):
        where = located("diagonal", path)
        x = jnp.asarray(floating(where, given, carried_reals(like), real=True))
        x = x.reshape((1,) * like.ndim) if not x.ndim else x
        fits = x.ndim == like.ndim and all(
            n in (1, m) for n, m in zip(x.shape, like.shape, strict=True)
        )
        if not fits:
            raise ValueError(
                f"{where} must have the shape {like.shape} of the parameter, or some "
                f"of its axes with length 1, or be one number, got {describe(x)}"
            )
        found.append(x)
    return tuple(found)
