"""What a function returns for one example, and trees of a number per row."""

from dataclasses import dataclass
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._trees.algebra import carried_reals, floating
from .._trees.checks import PyTree, describe, is_array, located


@dataclass(frozen=True)
class Outputs:
    """The structure of one example's output.

    The engine keeps one number per row in an array of shape (N,), or (N, K) where an
    example has K outputs. Users see trees like the function's output, with leaves of
    shape (N, *k).
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, avals: PyTree) -> "Outputs":
        leaves, treedef = jax.tree.flatten(avals)
        return cls(treedef, tuple(tuple(leaf.shape) for leaf in leaves))

    @property
    def is_scalar(self) -> bool:
        return jax.tree_util.treedef_is_leaf(self.treedef) and self.shapes == ((),)

    @property
    def is_pair(self) -> bool:
        """Whether this is a pair of a scalar and of several numbers: a loss and aux?"""
        tree = jax.tree.unflatten(self.treedef, [0] * len(self.shapes))
        if type(tree) is not tuple or len(tree) != 2:
            return False
        return tree[0] == 0 and self.shapes[0] == () and self.count > 2

    @property
    def count(self) -> int:
        """K."""
        return sum(map(prod, self.shapes))

    def rows(self, size: int) -> tuple[int, ...]:
        """The shape of one number per row, for N = size."""
        return (size,) if self.is_scalar else (size, self.count)

    def expand(self, numbers: jax.Array, axis: int = 0) -> PyTree:
        """The user's tree of one number per row; N is on `axis`, K on the next."""
        if self.is_scalar:
            return numbers
        parts, start = [], 0
        for shape in self.shapes:
            part = jax.lax.slice_in_dim(
                numbers, start, start + prod(shape), axis=axis + 1
            )
            before, after = part.shape[: axis + 1], part.shape[axis + 2 :]
            parts.append(part.reshape(*before, *shape, *after))
            start += prod(shape)
        return jax.tree.unflatten(self.treedef, parts)

    def flatten(self, name: str, tree: PyTree, size: int, params: PyTree) -> jax.Array:
        """A user's tree of one real number per row as an array, as wide as the rows."""
        leaves, treedef = jax.tree.flatten(tree)
        if treedef != self.treedef:
            hint = (
                " (if its second item is auxiliary data: has_aux=True)"
                if self.is_pair
                else ""
            )
            raise ValueError(
                f"argument {name} must be a tree like the function's output, "
                f"{self.treedef}, "
                f"got {treedef}{hint}"
            )
        flat, meets = [], carried_reals(params)
        paths = [path for path, _ in jax.tree.leaves_with_path(tree)]
        for path, leaf, shape in zip(paths, leaves, self.shapes, strict=True):
            where = located(name, path)
            if not is_array(leaf):
                raise TypeError(f"{where} must be an array, got {describe(leaf)}")
            x = floating(where, leaf, meets, real=True)
            if x.shape != (size, *shape):
                raise ValueError(
                    f"{where} must have one number per row, shape {(size, *shape)}, "
                    f"got {describe(x)}"
                )
            flat.append(jnp.asarray(x).reshape(size, prod(shape)))
        return (
            flat[0].reshape(size) if self.is_scalar else jnp.concatenate(flat, axis=1)
        )
