"""A function over the chunks of a batch, in one compiled loop."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from .._jax.convolutions import with_canonical_convolutions
from .._jax.sharding import zeros
from .._jax.xla import not_merged
from .._trees.checks import PyTree
from .batch import Batch
from .chunks import Chunks, Place, loop_chunk


def map_chunks(
    fun: Callable[..., PyTree],
    batch: Batch,
    chunk_size: int | None,
    rows: PyTree = None,
    *,
    apart: bool = False,
) -> PyTree:
    """``fun(chunk)`` for every chunk, its rows written into arrays of N rows.

    With ``rows``, trees of arrays of N rows, it is ``fun(chunk, rows of the chunk)``.
    Rows are on the leading axis.

    The last chunk may overlap its predecessor, so that all are of one size and ``fun``
    is traced once. The rows that they share are computed and written twice, and are the
    same. With ``apart`` the chunks are those of ``fold_chunks``: if both evaluate a
    row, it has the same shapes in both, and is rounded alike.
    """
    chunk_size = loop_chunk(batch.size, chunk_size)
    extra = () if rows is None else (rows,)
    if chunk_size is None:
        return fun(batch, *extra)
    chunks = batch.chunks(chunk_size)
    starts, rest = chunks.apart if apart else (chunks.starts, None)

    def at(place: Place) -> PyTree:
        return fun(batch.part(place), *jax.tree.map(place.cut, extra))

    # jit remembers its trace: to find the shapes first does not trace ``fun`` again.
    rows_from = jax.jit(lambda start: at(Place(chunks, start)), inline=True)
    avals = jax.eval_shape(rows_from, jax.ShapeDtypeStruct((), starts.dtype))
    written = jax.tree.map(lambda a: zeros(a, (batch.size, *a.shape[1:])), avals)
    if rest is not None:
        written = jax.tree.map(rest.put, written, at(rest))

    def write(rows: PyTree, start: jax.Array) -> tuple[PyTree, None]:
        place = Place(chunks, start)
        return jax.tree.map(place.put, rows, rows_from(start)), None

    return lax.scan(with_canonical_convolutions(write), written, jnp.asarray(starts))[0]


def fold_chunks(
    step: Callable[[PyTree, Batch, Place], tuple[PyTree, PyTree]],
    init: PyTree,
    batch: Batch,
    chunk_size: int | None,
    *,
    alone: bool = False,
) -> tuple[PyTree, PyTree]:
    """``carry, rows = step(carry, chunk, place)`` over chunks of which no two overlap.

    It returns the last carry, and the rows of all chunks as arrays of N rows.

    Rows that do not fill a chunk are a chunk of their own, for which ``step`` is traced
    as well. If the last chunk were padded with repeated rows, zero cotangents would not
    cancel them: 0 times an infinite derivative is NaN. The smaller chunk comes first,
    so that the loop waits for it, and the memory of one chunk is needed at a time. (If
    N < 2k, XLA unrolls the loop of one turn, and may hold both.)

    With ``alone``, a single call on all rows is kept separate from the surrounding
    program (``xla.not_merged``). It must return no rows then.
    """
    chunk_size = loop_chunk(batch.size, chunk_size)
    if chunk_size is None:
        whole = Place(Chunks(batch.size, 1, batch.size), 0)
        if alone:
            init = batch.varied(init)
            return not_merged(
                lambda: step(init, batch, whole), (init, None), batch.primals
            )
        return step(init, batch, whole)
    chunks = batch.chunks(chunk_size)
    starts, rest = chunks.apart
    carry, last = batch.varied(init), None
    if rest is not None:
        carry, last = step(carry, batch.part(rest), rest)

    def body(carry: PyTree, start: jax.Array) -> tuple[PyTree, PyTree]:
        place = Place(chunks, start)
        return step(carry, batch.part(place), place)

    carry, rows = lax.scan(
        with_canonical_convolutions(body), carry, jnp.asarray(starts)
    )
    rows = jax.tree.map(chunks.joined, rows, *([] if rest is None else [last]))
    return carry, rows
