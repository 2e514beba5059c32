"""``J + other``: the rows of two functions, added row by row."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import jax

from .._batches.batch import Batch
from .._batches.chosen import Chosen
from .._engine.added import added
from .._engine.matrix import Matrix
from .._engine.trace import Factors, Form
from .kept import Kept
from .rows import Rows
from .source import Source
from .streamed import Streamed


@dataclass(frozen=True)
class Sum(Source):
    """A source of the rows of several sources, added up.

    What it has in common with other sources is that of its first part.
    """

    parts: tuple[Streamed, ...] = ()  # each with its weights; no clip waits

    @classmethod
    def from_parts(cls, parts: Sequence[Streamed]) -> "Sum":
        first = parts[0].origin.source
        own = {field.name: getattr(first, field.name) for field in fields(Source)}
        return cls(**own, parts=tuple(parts))

    @property
    def joint(self) -> Batch:
        """The batches of all parts, and the weights of their rows, as one batch."""
        batches = [part.origin.source.joint for part in self.parts]
        numbers = jax.tree.leaves([(x.weights, x.valid) for x in self.parts])
        leaves = [leaf for batch in batches for leaf in batch.leaves]
        axes = [axis for batch in batches for axis in batch.axes]
        return replace(
            batches[0],
            leaves=(*leaves, *numbers),
            axes=(*axes, *[0] * len(numbers)),
        )

    def trace(self, fun: Any = None) -> Any:
        """The traces of the parts."""
        return tuple(part.trace or part.origin.source.trace() for part in self.parts)

    def factors(self, trace: Any, chunk: Batch, form: Form = "auto") -> Factors:
        """The rows of a chunk of the joint batch."""
        # A norm that is reduced where a row arises is of no use for a sum of rows.
        form = "auto" if form == "norms" else form
        given, matrices = iter(chunk.leaves), []
        batches = []
        for part in self.parts:
            batch = part.origin.source.joint
            leaves = tuple(next(given) for _ in batch.leaves)
            batches.append(replace(batch, leaves=leaves, size=chunk.size))
        treedef = jax.tree.structure([(x.weights, x.valid) for x in self.parts])
        numbers = jax.tree.unflatten(treedef, list(given))
        for part, one, batch, own in zip(
            self.parts, trace, batches, numbers, strict=True
        ):
            made = part.origin.source.factors(one, batch, form)
            weights, valid = own
            matrices.append(
                Matrix(made.sources, weights, valid, made.tail, part.diagonal)
            )
        total, *others = matrices
        for other in others:
            total = added(total, other)
        return Factors(total.sources, total.tail)

    def chosen(self, rows: Chosen) -> "Sum":
        """The rows of some of the examples."""
        return Sum.from_parts([part.chosen(rows) for part in self.parts])

    def without_function(self) -> "Sum":
        """What a compiled product of kept rows takes: nothing is recomputed."""
        bare = [
            replace(part, origin=part.origin.without_function(), trace=None)
            for part in self.parts
        ]
        return Sum.from_parts(bare)


jax.tree_util.register_pytree_node(
    Sum, lambda x: (x.parts, None), lambda _, parts: Sum.from_parts(parts)
)


def add(one: Rows, other: Rows) -> Rows:
    """The sum of the rows of two Jacobians, both kept or both recomputed."""
    one.origin.require_one()
    other.origin.require_one()
    if isinstance(one, Kept) and isinstance(other, Kept):
        parts = [
            Streamed(
                x.origin,
                weights=x.matrix.weights,
                valid=x.valid,
                diagonal=x.diagonal,
            )
            for x in (one, other)
        ]
        origin = replace(one.origin, source=Sum.from_parts(parts))
        total = added(one.matrix, other.matrix)
        return Kept(origin, total.sources, tail=total.tail)
    assert isinstance(one, Streamed)
    assert isinstance(other, Streamed)
    parts = [one.settled(), other.settled()]
    origin = replace(one.origin, source=Sum.from_parts(parts))
    return Streamed(origin, one_pass=one.one_pass)
