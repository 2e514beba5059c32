"""Products with the Jacobian of a batch's outputs, jvp and vjp, chunk by chunk."""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax

from .._jax import compat
from .._jax.sharding import zeros
from .._trees import algebra
from .._trees.checks import PyTree
from .batch import Batch
from .chunks import Place
from .loops import fold_chunks, map_chunks

# From a batch, the stacked outputs and auxiliary data of its examples.
Apply = Callable[[Batch], tuple[PyTree, PyTree]]


@contextlib.contextmanager
def differentiated(apply: Apply, batch: Batch) -> Iterator[None]:
    """Surround what differentiates ``apply``: errors name a custom rule in the way."""
    try:
        yield
    except Exception as error:
        rule = _rule_in(apply, batch)
        if rule is None or not _is_of_jax(error):
            raise
        raise NotImplementedError(
            f"fun has {rule}, with which JAX cannot differentiate jax.vmap of fun "
            "(jax.vmap(jax.grad(fun)) works): pass all that a jax.custom_vjp uses of "
            "the example as its arguments, so that it closes over nothing; or "
            "differentiate example by example, by c = jax.grad(outer)(outputs) and "
            "jacobian(fun)(...).weighted_sum(c)"
        ) from error


def _is_of_jax(error: Exception) -> bool:
    """Whether an error was raised by JAX, not by a rule of the user's own."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    raised_in = trace.tb_frame.f_globals.get("__name__", "") if trace else ""
    return (
        isinstance(error, jax.errors.JAXTypeError) or raised_in.split(".")[0] == "jax"
    )


def _rule_in(apply: Apply, batch: Batch) -> str | None:
    """The custom rule of a function, if it has one and can be evaluated."""
    try:
        jaxpr = jax.make_jaxpr(lambda: apply(batch))()
    except Exception:
        return None
    return compat.custom_rule(jaxpr)


def vjp(apply: Apply, batch: Batch) -> tuple[PyTree, Callable[..., Any], PyTree]:
    """``(outputs, pull, aux)``: ``pull(cotangents)`` is the gradient of the primals."""
    with differentiated(apply, batch):
        outputs, pull, aux = jax.vjp(
            lambda primals: apply(batch.with_primals(primals)),
            batch.primals,
            has_aux=True,
        )

    def pulled(cotangents: PyTree) -> tuple[PyTree, ...]:
        with differentiated(apply, batch):
            return pull(cotangents)[0]

    return outputs, pulled, aux


def push_chunks(
    apply: Apply, batch: Batch, chunk_size: int, tangents: PyTree
) -> PyTree:
    """The tangents of the outputs, by one Jacobian-vector product per chunk."""
    leaves, treedef = jax.tree.flatten(tangents)
    count = len(batch.leaves)
    # Slice tangents like primals: each chunk gets the part for its own examples.
    both = replace(
        batch, leaves=(*batch.leaves, *leaves), axes=(*batch.axes, *batch.primal_axes)
    )

    def push(both: Batch) -> PyTree:
        chunk = replace(both, leaves=both.leaves[:count], axes=batch.axes)
        part = jax.tree.unflatten(treedef, both.leaves[count:])
        with differentiated(apply, chunk):
            _, out, _ = jax.jvp(
                lambda primals: apply(chunk.with_primals(primals)),
                (chunk.primals,),
                (part,),
                has_aux=True,
            )
        return out

    return map_chunks(push, both, chunk_size)


def pull_chunks(
    apply: Apply, batch: Batch, chunk_size: int, cotangents: PyTree
) -> PyTree:
    """The gradient of ``batch.primals``, carried, by one vjp per chunk."""
    leaves, treedef = jax.tree.flatten(batch.primals)
    start = [zeros(x, x.shape, algebra.carried_dtype(x.dtype)) for x in leaves]

    def step(
        totals: list[jax.Array], chunk: Batch, place: Place
    ) -> tuple[list[jax.Array], None]:
        _, pull, _ = vjp(apply, chunk)
        grads = pull(jax.tree.map(place.cut, cotangents))
        wide = jax.tree.leaves(algebra.carry(grads))
        triples = zip(totals, wide, batch.primal_axes, strict=True)
        return [_add_at(place, *args) for args in triples], None

    total, _ = fold_chunks(step, start, batch, chunk_size)
    return jax.tree.unflatten(treedef, total)


def _add_at(
    place: Place, total: jax.Array, part: jax.Array, axis: int | None
) -> jax.Array:
    """``total + part``, at a chunk's place on the batch axis of a leaf, if any."""
    if axis is None:
        return total + part
    return place.put(total, place.cut(total, axis) + part, axis)
