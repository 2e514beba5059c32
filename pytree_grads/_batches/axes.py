"""Which axis of which leaf holds the examples: ``in_axes``, read and checked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.compat import is_reference
from .._trees.checks import (
    KeyPath,
    PyTree,
    describe,
    describe_node,
    is_array,
    is_key,
    located,
)

# The default is a string because `jax.vmap` accepts none, so every value valid for
# vmap keeps its meaning.
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
            f"positional argument, or {DEFAULT!r}, got {_given(in_axes)}"
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


@dataclass(frozen=True)
class Mapped:
    """A leaf of an argument, and the axis over which it is to be mapped."""

    leaf: Any
    axis: int
    name: str
    path: KeyPath
    keyword: str | None  # the name, if the argument was passed by keyword

    @property
    def where(self) -> str:
        return located(self.name, self.path)

    @property
    def written(self) -> str:
        """The leaf as an expression: ``batch['x'][0]``."""
        return f"{self.name}{jax.tree_util.keystr(self.path)}"

    @property
    def sequence(self) -> str | None:
        """The list or tuple that holds the leaf, as an expression."""
        if not self.path or not isinstance(self.path[-1], jax.tree_util.SequenceKey):
            return None
        return f"{self.name}{jax.tree_util.keystr(self.path[:-1])}"

    @property
    def size(self) -> int:
        return self.leaf.shape[self.axis]

    def checked(self) -> "Mapped":
        """With a JAX array and an axis >= 0, if the leaf has that axis."""
        leaf, axis = self.leaf, self.axis
        wrong = (
            f"{self.where} would be mapped over axis {axis}, but it is "
            f"{describe(leaf)}, "
        )
        if not is_array(leaf):
            raise TypeError(f"{wrong}not an array: {self._mend_no_array()}")
        if not holds_numbers(leaf):
            raise TypeError(f"{wrong}not an array of numbers: {_LABELS}")
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(f"{wrong}of rank {leaf.ndim}: {self._mend_rank()}")
        return replace(self, leaf=jnp.asarray(leaf), axis=int(axis) % leaf.ndim)

    def _mend_no_array(self) -> str:
        if is_reference(self.leaf):
            return "pass ref[...]"
        if isinstance(self.leaf, str):
            return f"{_LABELS}; if not, {shared_mend(self.keyword)}"
        is_number = isinstance(self.leaf, int | float | complex)
        return self._mend_sequence() if is_number else shared_mend(self.keyword)

    def _mend_rank(self) -> str:
        if is_key(self.leaf):
            return self.mend_key("N")
        return shared_mend(self.keyword) if self.leaf.ndim else self._mend_sequence()

    def _mend_sequence(self) -> str:
        """What to write for a number in a list."""
        mend = shared_mend(self.keyword)
        if self.sequence is None:
            return mend
        return (
            "if the list holds a number for each example, make it one array with "
            f"jnp.asarray({self.sequence}); if not, {mend}"
        )

    def mend_key(self, size: Any) -> str:
        """What to write for one PRNG key."""
        shared = "None in in_axes" if self.keyword is None else "a key bound beforehand"
        return (
            "if it is a PRNG key, give one key per example: "
            f"jax.random.split({self.written}, {size}); {shared} gives all examples "
            "the same random numbers"
        )


_LABELS = (
    "if these are labels, give each a number, as "
    "numpy.unique(labels, return_inverse=True)[1] does"
)


def holds_numbers(leaf: Any) -> bool:
    """Whether a leaf is an array whose dtype JAX supports."""
    if not is_array(leaf):
        return False
    try:
        jax.typeof(leaf)
    except TypeError:
        return False
    return True


def common_size(mapped: Sequence[Mapped]) -> int:
    """N, on which all batched leaves agree."""
    if not mapped:
        raise ValueError(
            "no argument is batched: at least one leaf needs an axis of examples in "
            "in_axes (without in_axes, every argument that is not differentiated is "
            "mapped over axis 0)"
        )
    first = mapped[0]
    for other in mapped:
        if other.size != first.size:
            raise ValueError(
                f"the batch sizes disagree: axis {first.axis} of {first.where} has "
                f"size {first.size}, but axis {other.axis} of {other.where} has size "
                f"{other.size}: {_size_mend(first, other, mapped)}"
            )
    return first.size


def _size_mend(first: Mapped, other: Mapped, mapped: Sequence[Mapped]) -> str:
    """What to write for two leaves whose sizes disagree."""
    for one, that in ((other, first), (first, other)):
        if is_key(one.leaf):
            return one.mend_key(that.size)
        beside = [x.leaf.shape for x in mapped if x.sequence == one.sequence]
        is_list = one.sequence is not None and len(set(beside)) == 1
        if is_list and len(beside) == that.size:
            return (
                f"if {one.sequence} is a list of examples, make it one array with "
                f"jnp.stack({one.sequence}); if not, {shared_mend(other.keyword)}"
            )
    return shared_mend(other.keyword)
