"""Which axis of which leaf holds the examples: ``in_axes`` read and checked against arguments."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from ._checks import PyTree, describe, describe_node, is_array


def argument_specs(
    in_axes: int | Sequence[Any] | None, count: int, argnums: tuple[int, ...]
) -> list[Any]:
    """One axis specification per positional argument."""
    if in_axes is None:
        return [None if i in argnums else 0 for i in range(count)]
    if isinstance(in_axes, int):
        return [in_axes] * count
    if not isinstance(in_axes, tuple | list):
        raise TypeError(
            "argument in_axes must be an int, or a tuple with an entry for each positional "
            f"argument, got {describe(in_axes)}"
        )
    if len(in_axes) != count:
        raise ValueError(
            f"argument in_axes has {len(in_axes)} entries for {count} positional arguments"
        )
    return list(in_axes)


def leaf_axes(prefix: str, name: str, arg: PyTree, spec: PyTree) -> list[tuple[Any, Any, Any]]:
    """(key path, leaf, axis) for every leaf of an argument, under a prefix tree of axes."""
    for axis in jax.tree.leaves(spec):
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(f"{prefix} must hold ints and None only, got {describe(axis)}")
    try:
        axes_tree = jax.tree.broadcast(spec, arg, is_leaf=_is_none)
    except ValueError:
        raise ValueError(
            f"{prefix} = {spec!r} is not a pytree prefix of argument {name}, {describe_node(arg)}: "
            "give one axis for the whole argument, or a tree that branches as it does"
        ) from None
    axes = jax.tree.leaves(axes_tree, is_leaf=_is_none)
    leaves = jax.tree.leaves_with_path(arg, is_leaf=_is_none)
    return [(p, x, axis) for (p, x), axis in zip(leaves, axes, strict=True) if x is not None]


def _is_none(x: Any) -> bool:
    return x is None


def checked_axis(where: str, leaf: Any, axis: int) -> int:
    """The axis as a non-negative int, if the leaf has it."""
    if not is_array(leaf):
        mend = "give it None in in_axes, or bind it beforehand with functools.partial"
        if isinstance(leaf, int | float | complex) and re.search(r"\[\d+\]$", where):
            mend = (
                "if the list holds a number for each example, make it one array with jnp.asarray; "
                f"if not, {mend}"
            )
        raise TypeError(
            f"{where} would be mapped over axis {axis}, but it is {describe(leaf)}, not an array: "
            f"{mend}"
        )
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(
            f"{where} would be mapped over axis {axis}, but it is {describe(leaf)}, of rank "
            f"{leaf.ndim}: in_axes says which axis holds the examples, or None if they share it"
        )
    return int(axis) % leaf.ndim


def common_size(sizes: list[tuple[int, str]]) -> int:
    """The N on which all batched leaves agree."""
    if not sizes:
        raise ValueError(
            "no argument is batched: at least one leaf needs an axis of examples in in_axes "
            "(by default every argument that is not differentiated is mapped over axis 0)"
        )
    first_size, first_where = sizes[0]
    for size, where in sizes:
        if size != first_size:
            raise ValueError(
                f"the batch sizes disagree: {first_where} has size {first_size}, "
                f"but {where} has size {size}"
            )
    return first_size
