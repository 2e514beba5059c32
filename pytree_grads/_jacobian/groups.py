"""Groups of parameters: a prefix tree of the parameters, or each leaf by itself."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .._engine.products.scaled_norms import Norms, combined
from .._trees.checks import PyTree, prefix_difference

# For each group, the numbers of its leaves.
Members = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Groups:
    """Groups of the leaves of the parameters, and the tree in which they stand."""

    treedef: Any
    members: Members

    def tree(self, groups: Sequence[PyTree]) -> PyTree:
        """A tree like the prefix, of something for each group."""
        return jax.tree.unflatten(self.treedef, groups)

    def of_leaves(self, groups: Sequence[Any]) -> list[Any]:
        """For each leaf of the parameters, what its group has."""
        owners = {
            i: x for own, x in zip(self.members, groups, strict=True) for i in own
        }
        return [owners[i] for i in range(len(owners))]


def read(name: str, prefix: PyTree, params: PyTree, kind: str) -> Groups:
    """The groups that a prefix tree of the parameters stands for.

    Args:
      name: the argument, for messages.
      prefix: the tree; its leaves are ignored.
      params: the parameters.
      kind: what the argument may be, for messages.
    """
    treedef = jax.tree.structure(prefix)
    try:
        labels = jax.tree.broadcast(
            jax.tree.unflatten(treedef, range(treedef.num_leaves)), params
        )
    except ValueError:
        path, clause = prefix_difference(prefix, params)
        raise ValueError(
            f"argument {name} must be {kind} a prefix tree of the parameters, but "
            f"{name}{jax.tree_util.keystr(path)} does not match: {clause}"
        ) from None
    owners = jax.tree.leaves(labels)
    members = [
        tuple(i for i, owner in enumerate(owners) if owner == j)
        for j in range(treedef.num_leaves)
    ]
    return Groups(treedef, tuple(members))


def named(groups: PyTree, params: PyTree) -> Groups:
    """The groups that an argument ``groups`` asks for: a prefix tree or "leaves"."""
    if isinstance(groups, str):
        if groups != "leaves":
            raise ValueError(
                "argument groups must be 'leaves' or a prefix tree of the parameters, "
                f"got {groups!r}"
            )
        groups = params
    return read("groups", groups, params, "'leaves' or")


def norms(parts: Sequence[Norms], members: Members) -> tuple[jax.Array, ...]:
    """The norms of the rows of leaves, combined to one norm for each group."""
    return tuple(combined(parts, x) if x else _no_norms(parts) for x in members)


def _no_norms(parts: Sequence[Norms]) -> jax.Array:
    """The norms of rows of no leaves."""
    return jnp.zeros_like(combined(parts))
