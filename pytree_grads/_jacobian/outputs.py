"""What a function returns for one example, and trees of a number per row."""

from dataclasses import dataclass, replace
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.compat import is_reference
from .._trees.algebra import carried_reals, floating
from .._trees.checks import (
    PyTree,
    describe,
    describe_node,
    is_array,
    located,
    structure_difference,
)


@dataclass(frozen=True)
class Outputs:
    """The structure of one example's output.

    The engine keeps one number per row in an array of shape (N,), or (N, K) where an
    example has K outputs. Users see trees like the function's output, with leaves of
    shape (N, *k); or *k if the function is one of a whole batch, which is one example
    to the engine.
    """

    treedef: Any
    shapes: tuple[tuple[int, ...], ...]
    batched: bool = True

    @classmethod
    def of(cls, avals: PyTree, batched: bool) -> "Outputs":
        leaves, treedef = jax.tree.flatten(avals)
        return cls(treedef, tuple(tuple(leaf.shape) for leaf in leaves), batched)

    def lead(self, size: Any) -> tuple[Any, ...]:
        """The axes of examples, as users see them: (N,), or none."""
        return (size,) if self.batched else ()

    @property
    def is_array(self) -> bool:
        """Whether an example has one array of outputs, and not a tree of them."""
        return jax.tree_util.treedef_is_leaf(self.treedef)

    @property
    def is_scalar(self) -> bool:
        return _is_scalar(self.treedef, self.shapes)

    @property
    def is_pair(self) -> bool:
        """Whether the output is a pair (scalar, non-scalar), probably loss and aux."""
        tree = jax.tree.unflatten(self.treedef, [0] * len(self.shapes))
        if type(tree) is not tuple or len(tree) != 2:
            return False
        first, second = self.treedef.children()
        return _is_scalar(first, self.shapes[:1]) and not _is_scalar(
            second, self.shapes[1:]
        )

    @property
    def count(self) -> int:
        """K."""
        return sum(map(prod, self.shapes))

    def chosen(self, size: int) -> "Outputs":
        """The outputs of which some are chosen along the first axis of the array."""
        (shape,) = self.shapes
        return replace(self, shapes=((size, *shape[1:]),))

    def rows(self, size: int) -> tuple[int, ...]:
        """The shape of one number per row, for N = size."""
        return (size,) if self.is_scalar else (size, self.count)

    def expand(self, numbers: jax.Array, axis: int = 0) -> PyTree:
        """The user's tree of one number per row; N is on `axis`, K on the next."""
        if self.is_scalar:
            return numbers if self.batched else jnp.squeeze(numbers, axis)
        parts, start = [], 0
        for shape in self.shapes:
            part = jax.lax.slice_in_dim(
                numbers, start, start + prod(shape), axis=axis + 1
            )
            before, after = part.shape[:axis], part.shape[axis + 2 :]
            lead = self.lead(part.shape[axis])
            parts.append(part.reshape(*before, *lead, *shape, *after))
            start += prod(shape)
        return jax.tree.unflatten(self.treedef, parts)

    def flatten(self, name: str, tree: PyTree, size: int, params: PyTree) -> jax.Array:
        """A user's tree of one real number per row as an array, as wide as the rows."""
        self._check_structure(name, tree, size)
        flat, meets = [], carried_reals(params)
        leaves = jax.tree.leaves_with_path(tree)
        for (path, leaf), shape in zip(leaves, self.shapes, strict=True):
            where, per_row = located(name, path), (*self.lead(size), *shape)
            if not is_array(leaf):
                raise TypeError(
                    f"{where} must be an array of shape {per_row}, got {describe(leaf)}"
                    f"{_filled(per_row, leaf)}"
                )
            x = floating(where, leaf, meets, real=True)
            if x.shape != per_row:
                raise ValueError(
                    f"{where} must have one number per row, shape {per_row}, "
                    f"got {describe(x)}{_filled(per_row, x)}"
                )
            flat.append(jnp.asarray(x).reshape(size, prod(shape)))
        return (
            flat[0].reshape(size) if self.is_scalar else jnp.concatenate(flat, axis=1)
        )

    def _check_structure(self, name: str, tree: PyTree, size: int) -> None:
        """Raise unless a user's tree has an array where the function returns one."""
        if jax.tree.structure(tree) == self.treedef:
            return
        lead = self.lead(size)
        arrays = [jax.ShapeDtypeStruct((*lead, *k), jnp.float32) for k in self.shapes]
        expected = jax.tree.unflatten(self.treedef, arrays)
        try:
            nodes = self.treedef.flatten_up_to(tree)
        except ValueError:
            path, clause = structure_difference(expected, tree)
            hint = "; if its second item is auxiliary data: has_aux=True"
            raise ValueError(
                f"argument {name} must be a tree like the function's output, but "
                f"{name}{jax.tree_util.keystr(path)} is not: {clause}"
                f"{hint * self.is_pair}"
            ) from None
        for (path, array), node in zip(
            jax.tree.leaves_with_path(expected), nodes, strict=True
        ):
            if jax.tree_util.all_leaves([node]) and node is not None:
                continue
            where = located(name, path)
            mend = f": jnp.asarray({where.removeprefix('argument ')})"
            raise ValueError(
                f"{where} must be an array of shape {array.shape}, got "
                f"{describe_node(node)}{mend * isinstance(node, list | tuple)}"
            )


def _is_scalar(treedef: Any, shapes: tuple[tuple[int, ...], ...]) -> bool:
    return jax.tree_util.treedef_is_leaf(treedef) and shapes == ((),)


def _filled(shape: tuple[int, ...], number: Any) -> str:
    """What to write for a reference, or for one number for every row."""
    if is_reference(number):
        return ": pass ref[...]"
    if is_array(number) and not number.shape:
        return f": jnp.full({shape}, number)"
    is_number = isinstance(number, int | float) and not is_array(number)
    return f": jnp.full({shape}, {float(number)})" if is_number else ""
