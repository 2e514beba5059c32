"""The batch of one call: which axis of which argument holds the examples.

``resolve(fun, args, kwargs, argnums, in_axes)`` checks a call and returns a ``Batch``:

====================  ==================================================================
``.size``             N
``.argnums``          differentiated positions, non-negative, always a tuple
``.in_axes``          tuple, one tree per positional argument: each leaf's axis >= 0, or
                      None
``.args, .kwargs``    the arguments; differentiated leaves are JAX arrays
``.primals``          tuple of the differentiated arguments
``.with_primals(p)``  the same batch with other differentiated arguments
``.chunk(start, k)``  the Batch of examples start..start+k-1
``.chosen(rows)``     the Batch of some of the examples
``.vmap(fun)``        ``fun(args, kwargs)`` mapped over the examples; results stack on
                      axis 0
``.chunks(k)``        which examples are worked on together, about k at a time
``.part(place)``      the Batch of one such chunk
``.localized()``      each device keeps its own gradient of shared leaves
====================  ==================================================================
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from .._jax import compat
from .._jax.sharding import Names, count_at, laid_out, layout, names_at, without
from .._trees.checks import PyTree, argument_names, located, normalize_argnums
from .axes import (
    DEFAULT,
    Mapped,
    argument_specs,
    common_size,
    holds_numbers,
    leaf_axes,
)
from .chosen import Chosen, Span
from .chunks import Chunks, Place
from .differentiable import check_differentiable


@dataclass(frozen=True)
class Batch:
    """The arguments of one call, flat, each leaf with its axis of examples."""

    leaves: tuple[Any, ...]
    axes: tuple[
        int | None, ...
    ]  # one per leaf, non-negative; None: shared by all examples
    treedef: Any  # of (args, kwargs)
    argnums: tuple[int, ...]
    size: int
    # The mesh axes over which examples were sharded, if too few are left to share out.
    gathered: Names = ()
    # Whether the only example is all of the arguments, each with an axis of length 1.
    is_whole: bool = False

    @property
    def args(self) -> tuple[Any, ...]:
        """The positional arguments."""
        return jax.tree.unflatten(self.treedef, self.leaves)[0]

    @property
    def kwargs(self) -> dict[str, Any]:
        """The keyword arguments."""
        return jax.tree.unflatten(self.treedef, self.leaves)[1]

    @property
    def in_axes(self) -> tuple[PyTree, ...]:
        """One tree of axes per positional argument, as ``jax.vmap`` takes it."""
        return jax.tree.unflatten(self.treedef, self.axes)[0]

    @property
    def primals(self) -> tuple[PyTree, ...]:
        """The differentiated arguments, in the order of ``argnums``."""
        args = self.args
        return tuple(args[i] for i in self.argnums)

    @property
    def primal_positions(self) -> tuple[int, ...]:
        """Where the leaves of ``primals``, in their order, stand among all leaves."""
        counts = [child.num_leaves for child in self.treedef.children()[0].children()]
        ends = list(itertools.accumulate(counts))
        return tuple(
            j for i in self.argnums for j in range(ends[i] - counts[i], ends[i])
        )

    @property
    def primal_axes(self) -> tuple[int | None, ...]:
        """The batch axis of each leaf of ``primals``."""
        return tuple(self.axes[i] for i in self.primal_positions)

    def with_primals(self, primals: Sequence[PyTree]) -> "Batch":
        """The batch with other differentiated arguments, of the same structure."""
        args = list(self.args)
        for i, primal in zip(self.argnums, primals, strict=True):
            args[i] = primal
        return replace(self, leaves=tuple(jax.tree.leaves((tuple(args), self.kwargs))))

    def chunk(self, start: int, size: int) -> "Batch":
        """The batch of the ``size`` examples from ``start`` on."""
        return self.chosen(Span(start, size))

    def chosen(self, rows: Chosen) -> "Batch":
        """The batch of some of the examples."""
        leaves = [
            leaf if axis is None else rows.cut(leaf, axis)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        taken = replace(self, leaves=tuple(leaves), size=rows.size)
        return taken if taken.mesh_axes else replace(taken, gathered=self._names)

    def chunks(self, chunk_size: int) -> Chunks:
        """Which examples are worked on together."""
        devices = max((count_at(leaf, axis) for leaf, axis in self._mapped), default=1)
        return Chunks.of(self.size, chunk_size, devices)

    def part(self, place: Place) -> "Batch":
        """The batch of one chunk."""
        leaves = [
            leaf if axis is None else place.cut(leaf, axis)
            for leaf, axis in zip(self.leaves, self.axes, strict=True)
        ]
        return replace(self, leaves=tuple(leaves), size=place.chunks.size)

    def vmap(
        self,
        fun: Callable[[tuple[Any, ...], dict[str, Any]], PyTree],
        out_axes: Any = 0,
        axis_name: str | None = None,
    ) -> PyTree:
        """``fun(args, kwargs)`` of every example, results stacked on a leading axis.

        Inside ``fun``, the axis of examples may have a name.
        """
        mapped = [i for i, axis in enumerate(self.axes) if axis is not None]

        def one(values: list[Any]) -> PyTree:
            leaves = list(self.leaves)
            for i, value in zip(mapped, values, strict=True):
                leaves[i] = value
            return fun(*jax.tree.unflatten(self.treedef, leaves))

        axes = [self.axes[i] for i in mapped]
        arrays = [self.leaves[i] for i in mapped]
        return jax.vmap(
            one,
            in_axes=(axes,),
            out_axes=out_axes,
            axis_size=self.size,
            axis_name=axis_name,
        )(arrays)

    @property
    def mesh_axes(self) -> Names:
        """The Explicit mesh axes over which the examples are sharded."""
        return next(filter(None, itertools.starmap(names_at, self._mapped)), ())

    @property
    def _names(self) -> Names:
        """``mesh_axes``, or those of the batch from which these examples were taken."""
        return self.mesh_axes or self.gathered

    @property
    def value_positions(self) -> tuple[int, ...]:
        """Where the leaves that are mapped, and not differentiated, stand."""
        primals = self.primal_positions
        pairs = enumerate(self.axes)
        return tuple(i for i, axis in pairs if axis is not None and i not in primals)

    @property
    def _mapped(self) -> list[tuple[Any, int]]:
        """The leaves that differ between examples, each with its axis."""
        pairs = zip(self.leaves, self.axes, strict=True)
        return [(leaf, axis) for leaf, axis in pairs if axis is not None]

    def localized(self) -> "Batch":
        """The batch, with what the examples share on each device.

        Inside ``jax.shard_map``, ``jax.grad`` with respect to a replicated value sums
        over devices. With respect to a value that varies over the examples' mesh axes,
        each device keeps its own gradient. Over Explicit mesh axes, ``jax.vmap``
        takes shared values only if they are not sharded over the axes of the examples:
        they are gathered (as FSDP has it).
        """
        varying = frozenset[str]().union(
            *(compat.varying_axes(x) for x, _ in self._mapped)
        )
        names = self._names

        def own(leaf: Any, axis: int | None) -> Any:
            if axis is not None or not isinstance(leaf, jax.Array):
                return leaf
            if names:
                leaf = laid_out(leaf, without(layout(leaf), names))
            return compat.as_varying(leaf, varying)

        return replace(self, leaves=tuple(map(own, self.leaves, self.axes)))

    def varied(self, tree: PyTree) -> PyTree:
        """A tree of arrays that vary over all mesh axes over which the batch does."""
        arrays = [x for x in self.leaves if isinstance(x, jax.Array)]
        axes = frozenset[str]().union(*map(compat.varying_axes, arrays))
        return jax.tree.map(functools.partial(compat.as_varying, axes=axes), tree)


def resolve(
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    argnums: int | Sequence[int],
    in_axes: int | Sequence[Any] | str | None = DEFAULT,
    *,
    shared: bool = False,
    batched: bool = True,
) -> Batch:
    """Check the arguments of ``fun`` and find the examples in them.

    Args:
      fun: the function of one example; only its signature is read, for the names in
        messages.
      args: the positional arguments that the caller passed.
      kwargs: the keyword arguments, mapped over axis 0.
      argnums: position or positions to differentiate.
      in_axes: an int, None, or a tuple with a pytree prefix of ints and Nones per
        positional argument; ``"default"`` is None for the differentiated arguments and
        0 for all others.
      shared: whether all examples must share the differentiated arguments.
      batched: whether there are examples. If not, the batch has one: all of the
        arguments, whose arrays get an axis of length 1.

    Raises:
      TypeError: a differentiated leaf has no gradient; a leaf to be mapped is not an
        array.
      ValueError: an axis is out of range, batch sizes disagree, nothing is batched,
        ``argnums`` or ``in_axes`` does not fit the arguments, or what must be shared is
        mapped over.
    """
    positions = normalize_argnums(argnums, len(args))
    names = argument_names(fun, len(args))
    args = tuple(args)
    for i in positions:
        check_differentiable(names[i], args[i])
    args = tuple(
        jax.tree.map(jnp.asarray, arg) if i in positions else arg
        for i, arg in enumerate(args)
    )
    if not batched:
        return _of_one(args, kwargs, positions)
    specs = argument_specs(in_axes, len(args), positions)
    leaves: list[Any] = []
    axes: list[int | None] = []
    mapped: list[Mapped] = []
    named = [
        (name, arg, spec) for name, arg, spec in zip(names, args, specs, strict=True)
    ]
    named += [
        (key, kwargs[key], 0) for key in sorted(kwargs)
    ]  # the order of a flattened dict
    for i, (name, arg, spec) in enumerate(named):
        keyword = name if i >= len(args) else None
        prefix = (
            f"in_axes[{i}]" if keyword is None else "the axis of a keyword argument"
        )
        for path, leaf, axis in leaf_axes(prefix, name, arg, spec):
            if axis is not None:
                if shared and i in positions:
                    raise ValueError(
                        f"{located(name, path)} is differentiated and mapped over "
                        f"axis {axis}: a matrix of gradients needs parameters that all "
                        "examples share; give it None in in_axes"
                    )
                found = Mapped(leaf, axis, name, path, keyword).checked()
                leaf, axis = found.leaf, found.axis
                mapped.append(found)
            leaves.append(leaf)
            axes.append(axis)
    treedef = jax.tree.structure((args, kwargs))
    return Batch(tuple(leaves), tuple(axes), treedef, positions, common_size(mapped))


def _of_one(
    args: tuple[Any, ...], kwargs: dict[str, Any], argnums: tuple[int, ...]
) -> Batch:
    """The batch of one example, which is all of the arguments."""
    leaves, treedef = jax.tree.flatten((args, kwargs))
    empty = Batch(tuple(leaves), (None,) * len(leaves), treedef, argnums, 1)
    primals = empty.primal_positions
    mapped = [holds_numbers(x) and i not in primals for i, x in enumerate(leaves)]
    pairs = list(zip(leaves, mapped, strict=True))
    return replace(
        empty,
        leaves=tuple(jnp.asarray(x)[None] if own else x for x, own in pairs),
        is_whole=True,
        axes=tuple(0 if own else None for own in mapped),
    )
