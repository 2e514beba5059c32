"""The layout of arrays on a mesh, and the axes over which values vary.

Over Auto axes, XLA finds the layout of an array, and nothing has to be said. Over
Explicit axes, the layout is part of the array's type. An operation whose result has no
obvious layout, such as a sum over sharded examples, must be told one. The arithmetic of
this package runs as if Explicit axes were Auto; its results are laid out like rows or
parameters. Functions of the user run in the user's mode. Inside ``jax.shard_map``, the
type of a value says over which axes it varies.
"""

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from .compat import as_varying, varying_axes

PyTree = Any
# Names of the mesh axes over which one axis of an array is sharded.
Names: TypeAlias = tuple[str, ...]
AxisName: TypeAlias = str | tuple[str, ...] | None


def _typed(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jax.typeof(leaf)


def _mesh(leaf: Any) -> Any:
    """The mesh in the type of a leaf, if some axes of it are Explicit."""
    if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
        return None
    mesh = getattr(_typed(leaf).sharding, "mesh", None)
    return mesh if mesh is not None and mesh.explicit_axes else None


def layout(leaf: Any) -> PartitionSpec:
    """The Explicit mesh axes over which the axes of a leaf are sharded."""
    mesh = _mesh(leaf)
    if mesh is None:
        return PartitionSpec()
    parts = map(_names, _typed(leaf).sharding.spec)
    return PartitionSpec(
        *(tuple(n for n in own if n in mesh.explicit_axes) for own in parts)
    )


def _names(part: Any) -> Names:
    return (part,) if isinstance(part, str) else tuple(part or ())


def names_at(leaf: Any, axis: int) -> Names:
    """The Explicit mesh axes over which one axis of a leaf is sharded."""
    parts = tuple(layout(leaf))
    return _names(parts[axis]) if axis < len(parts) else ()


def count_at(leaf: Any, axis: int) -> int:
    """How many devices share one axis of a leaf, as far as its type says."""
    names = names_at(leaf, axis)
    return math.prod(_mesh(leaf).shape[name] for name in names) if names else 1


def without(parts: PartitionSpec, names: Names) -> PartitionSpec:
    """A layout without some mesh axes."""
    return PartitionSpec(
        *(tuple(n for n in _names(own) if n not in names) for own in parts)
    )


def rest(leaf: Any, drop: int) -> PartitionSpec:
    """The layout of a leaf without its first `drop` axes."""
    return PartitionSpec(*tuple(layout(leaf))[drop:])


def laid_out(leaf: Any, parts: PartitionSpec) -> Any:
    """An array in a layout; unchanged if its type has none."""
    mesh = _mesh(leaf)
    return (
        leaf if mesh is None else jax.sharding.reshard(leaf, NamedSharding(mesh, parts))
    )


def reshaped(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """An array of another shape, gathered along axes that the shape does not have.

    Over Explicit axes, one axis that is made of several has no obvious layout.
    """
    mesh = _mesh(x)
    if mesh is None:
        return x.reshape(shape)
    before: list[Names] = [()] * x.ndim
    after: list[Names] = [()] * len(shape)
    for i, own in enumerate(tuple(layout(x))):
        n = x.shape[i]
        if own and n in shape and not after[shape.index(n)]:
            before[i] = after[shape.index(n)] = own
    x = laid_out(x, PartitionSpec(*before))
    out = NamedSharding(mesh, PartitionSpec(*after))
    return jax.lax.reshape(x, shape, out_sharding=out)


def take(x: jax.Array, start: Any, size: int, axis: int = 0) -> jax.Array:
    """`size` entries along an axis, gathered if devices cannot share them evenly."""
    if size % count_at(x, axis):
        x = laid_out(x, without(layout(x), names_at(x, axis)))
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def chosen(x: jax.Array, index: jax.Array, axis: int = 0) -> jax.Array:
    """The entries at some indices along an axis, gathered like those of `take`."""
    if index.shape[0] % count_at(x, axis):
        x = laid_out(x, without(layout(x), names_at(x, axis)))

    def at(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take(x, index, axis, mode="clip")

    return in_auto(at, layout(x))(x, index)


def placed_like(tree: PyTree, other: PyTree) -> PyTree:
    """A tree whose leaves are laid out, and vary, like those of another tree."""
    return jax.tree.map(
        lambda x, y: as_varying(laid_out(x, layout(y)), varying_axes(y)), tree, other
    )


def zeros(aval: Any, shape: tuple[int, ...], dtype: Any = None) -> jax.Array:
    """Zeros of some shape that are laid out, and vary, like a leaf."""
    # An abstract leaf may have a sharding over Auto axes, which `full_like` rejects.
    bare = (
        aval
        if isinstance(aval, jax.Array)
        else jax.ShapeDtypeStruct(aval.shape, aval.dtype)
    )
    array = jax.lax.full_like(bare, 0, dtype=dtype, shape=shape)
    mesh = _mesh(aval)
    if mesh is not None:
        array = jax.sharding.reshard(array, NamedSharding(mesh, layout(aval)))
    return as_varying(array, varying_axes(aval))


def in_auto(fun: Callable[..., PyTree], out: PyTree) -> Callable[..., PyTree]:
    """Run ``fun`` as if Explicit mesh axes were Auto.

    ``out`` holds the layouts of the result's leaves, in a prefix tree of the result.
    """

    def call(*args: PyTree) -> PyTree:
        meshes = (_mesh(leaf) for leaf in jax.tree.leaves(args))
        mesh = next((mesh for mesh in meshes if mesh is not None), None)
        if mesh is None:
            return fun(*args)
        shardings = jax.tree.map(lambda parts: NamedSharding(mesh, parts), out)
        return jax.sharding.auto_axes(
            fun, axes=mesh.explicit_axes, out_sharding=shardings
        )(*args)

    return call


def sum_over(tree: PyTree, axis_name: AxisName) -> PyTree:
    """The sum over the devices along mesh axes; the tree itself if there are none."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def value_over(value: jax.Array, axis_name: AxisName) -> jax.Array:
    """Like `sum_over`, but a value whose type says that all devices share it stays."""
    names = [axis_name] if isinstance(axis_name, str) else axis_name or ()
    checked = [name for name in names if varying_axes(jax.lax.axis_index(name))]
    left = tuple(n for n in names if n not in checked or n in varying_axes(value))
    return sum_over(value, left or None)


def device_count(axis_name: AxisName) -> int:
    """How many devices there are along mesh axes."""
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)
