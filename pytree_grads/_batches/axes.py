"""Which axis of which leaf holds the examples: ``in_axes``, read and checked."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from .._trees.checks import PyTree, describe, describe_node, is_array

# A string, as `jax.vmap` takes none: all that it takes means the same here.
DEFAULT = "default"


def argument_specs(
    in_axes: int | Sequence[Any] | str | None, count: int, argnums: tuple[int, ...]
) -> list[Any]:
    """One axis specification per positional argument."""
    if isinstance(in_axes, str) and in_axes == DEFAULT:
        return [None if i in argnums else 0 for i in range(count)]
    if in_axes is None or isinstance(in_axes, int):
        return [in_axes] * count
    if not isinstance(in_axes, tuple | list):
        raise TypeError(
            "argument in_axes must be an int, None, a tuple with an entry for each "
            "positional "
            f"argument, or {DEFAULT!r}, got {_given(in_axes)}"
        )
    if len(in_axes) != count:
        raise ValueError(
            f"argument in_axes has {len(in_axes)} entries for {count} positional "
            "arguments"
        )
    return list(in_axes)


def leaf_axes(
    prefix: str, name: str, arg: PyTree, spec: PyTree
) -> list[tuple[Any, Any, Any]]:
    """(key path, leaf, axis) of every leaf of an argument, by a prefix tree of axes."""
    for axis in jax.tree.leaves(spec):
        if isinstance(axis, bool) or not isinstance(axis, int | np.integer):
            raise TypeError(
                f"{prefix} must hold ints and None only, got {describe(axis)}"
            )
    try:
        axes_tree = jax.tree.broadcast(spec, arg, is_leaf=_is_none)
    except ValueError:
        raise ValueError(
            f"{prefix} = {spec!r} is not a pytree prefix of argument {name}, "
            f"{describe_node(arg)}: "
            "give one axis for the whole argument, or a tree that branches as it does"
        ) from None
    axes = jax.tree.leaves(axes_tree, is_leaf=_is_none)
    leaves = jax.tree.leaves_with_path(arg, is_leaf=_is_none)
    return [
        (p, x, axis) for (p, x), axis in zip(leaves, axes, strict=True) if x is not None
    ]


def _is_none(x: Any) -> bool:
    return x is None


def _given(value: Any) -> str:
    return repr(value) if isinstance(value, str) else describe(value)


def shared_mend(keyword: str | None) -> str:
    """How to pass an argument that all examples share, by position or keyword."""
    if keyword is None:
        return "in_axes takes the axis of its examples, or None if they share it"
    return (
        "keyword arguments are mapped over axis 0; what all examples share is bound "
        "beforehand, "
        f"with functools.partial(fun, {keyword}=...) or a lambda"
    )


def checked_axis(where: str, leaf: Any, axis: int, keyword: str | None = None) -> int:
    """The axis as a non-negative int, if the leaf has it."""
    wrong = f"{where} would be mapped over axis {axis}, but it is {describe(leaf)}, "
    if not is_array(leaf):
        mend = shared_mend(keyword)
        if isinstance(leaf, int | float | complex) and re.search(r"\[\d+\]$", where):
            mend = (
                "if the list holds a number for each example, make it one array with "
                "jnp.asarray; "
                f"if not, {mend}"
            )
        raise TypeError(f"{wrong}not an array: {mend}")
    if not -leaf.ndim <= axis < leaf.ndim:
        raise ValueError(f"{wrong}of rank {leaf.ndim}: {shared_mend(keyword)}")
    return int(axis) % leaf.ndim


def common_size(sizes: list[tuple[int, str, str | None]]) -> int:
    """N, on which all batched leaves agree; each has a size, a place and a keyword."""
    if not sizes:
        raise ValueError(
            "no argument is batched: at least one leaf needs an axis of examples in "
            "in_axes "
            "(without in_axes, every argument that is not differentiated is mapped "
            "over axis 0)"
        )
    first_size, first_where, _ = sizes[0]
    for size, where, keyword in sizes:
        if size != first_size:
            raise ValueError(
                f"the batch sizes disagree: {first_where} has size {first_size}, "
                f"but {where} has size {size}: {shared_mend(keyword)}"
            )
    return first_size
