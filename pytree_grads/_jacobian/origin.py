"""Origin: a source with the shapes of its rows, which kept and recomputed rows have."""

from dataclasses import dataclass, replace
from functools import partial
from math import prod

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from .._batches.chosen import Chosen
from .._jax.sharding import AxisName, device_count, sum_over
from .._trees.algebra import carried_dtype
from .._trees.checks import PyTree
from .source import Source


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["source"],
    meta_fields=["shape", "param_shapes", "axis_name"],
)
@dataclass(frozen=True)
class Origin:
    """A source with the shapes of its rows: of numbers per row, and of parameters.

    The shape of numbers per row is (N,) for a scalar function, and (N, K) if an example
    has K outputs. Sums over rows are sums over all devices along the mesh axes
    `axis_name`.
    """

    source: Source
    shape: tuple[int, ...]
    # Shapes of the parameters' leaves. They are those of one J in a stack of Js, too.
    param_shapes: tuple[tuple[int, ...], ...]
    axis_name: AxisName

    @classmethod
    def of(
        cls, source: Source, shape: tuple[int, ...], axis_name: AxisName = None
    ) -> "Origin":
        """The origin of a J that is made now, from parameters that are not stacked."""
        params = jax.tree.leaves(source.batch.primals)
        return cls(source, shape, tuple(x.shape for x in params), axis_name)

    @property
    def params(self) -> PyTree:
        """The differentiated arguments: a tuple if argnums is a sequence."""
        primals = self.source.batch.primals
        return primals if self.source.many else primals[0]

    @property
    def primals(self) -> list[jax.Array]:
        """The leaves of the differentiated arguments."""
        return jax.tree.leaves(self.params)

    @property
    def is_stack(self) -> bool:
        """Whether this is the origin of several Jacobians, as they leave `jax.vmap`."""
        ranks = zip(
            map(jnp.ndim, self.primals), map(len, self.param_shapes), strict=False
        )
        return any(rank > own for rank, own in ranks)

    def require_one(self) -> None:
        """Raise if this is the origin of a stack of Jacobians."""
        if self.is_stack:
            raise ValueError(
                "this is a stack of Jacobians, as jax.vmap returns it, and products "
                "are "
                "those of one: map them, as in jax.vmap(lambda J: J.norms())(stack)"
            )

    @property
    def count(self) -> int:
        """How many rows there are on all devices along `axis_name`."""
        return prod(self.shape) * device_count(self.axis_name)

    @property
    def may_pull_back(self) -> bool:
        """Whether a sum of rows in the dtypes of the parameters is exact enough."""
        return all(carried_dtype(x.dtype) == x.dtype for x in self.primals)

    def pulled_back(self, c: jax.Array | None) -> list[jax.Array] | None:
        """The sum of the rows times c, as one vector-Jacobian product of the batch.

        None if a custom rule or an effect does not allow it.
        """
        examined = self.source.examined()
        if not examined.pulls_back:
            return None
        weights = jnp.ones(self.shape) if c is None else c
        sums = self.source.pull_back(weights, examined.fun, alone=False)
        return sum_over(sums, self.axis_name)

    @property
    def layout(self) -> PartitionSpec:
        """How numbers per row are laid out: as the examples are."""
        return PartitionSpec(self.source.batch.mesh_axes)

    def chosen(self, rows: Chosen) -> "Origin":
        """The origin of the rows of some of the examples, or outputs."""
        self.require_one()
        shape = list(self.shape)
        shape[rows.of_outputs] = rows.size
        return replace(self, source=self.source.chosen(rows), shape=tuple(shape))

    def without_function(self) -> "Origin":
        """What a compiled product of kept rows takes: nothing is recomputed."""
        return replace(self, source=self.source.without_function())

    def like_params(self, leaves: list[jax.Array]) -> PyTree:
        """A tree of the structure of the differentiated arguments."""
        return jax.tree.unflatten(jax.tree.structure(self.params), leaves)

    def rounded(self, sums: list[jax.Array], count: int | None = None) -> PyTree:
        """Sums in the dtypes of the parameters, divided by a count."""
        if count is not None:
            sums = [x / jnp.asarray(count, x.dtype) for x in sums]
        pairs = zip(sums, self.primals, strict=True)
        return self.like_params([x.astype(p.dtype) for x, p in pairs])


def options(origin: Origin, made: str) -> str:
    """The options of a Jacobian in words, with the mesh axes over which rows add up."""
    axis_name = origin.axis_name
    return made if axis_name is None else f"{made}, axis_name={axis_name!r}"
