"""Products with the Jacobian of a batch's outputs, forward and reverse, in chunks that overlap."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from . import _tree
from ._batch import Batch, chunk_starts, fold_chunks, map_chunks
from ._checks import PyTree, is_float0

# From a batch, the stacked outputs and auxiliary data of its examples.
Apply = Callable[[Batch], tuple[PyTree, PyTree]]


def vjp(apply: Apply, batch: Batch) -> tuple[PyTree, Callable[..., Any], PyTree]:
    """``(outputs, pull, aux)``; ``pull(cotangents)`` is the gradient of ``batch.primals``."""
    outputs, pull, aux = jax.vjp(
        lambda primals: apply(batch.with_primals(primals)), batch.primals, has_aux=True
    )
    return outputs, lambda cotangents: pull(cotangents)[0], aux


def push_chunks(apply: Apply, batch: Batch, chunk_size: int, tangents: PyTree) -> PyTree:
    """The tangents of the outputs, by one Jacobian-vector product per chunk."""
    leaves, treedef = jax.tree.flatten(tangents)
    count = len(batch.leaves)
    # Tangents are cut as their primals are: of each, a chunk has what belongs to its examples.
    both = replace(batch, leaves=(*batch.leaves, *leaves), axes=(*batch.axes, *batch.primal_axes))

    def push(both: Batch) -> PyTree:
        chunk = replace(both, leaves=both.leaves[:count], axes=batch.axes)
        part = jax.tree.unflatten(treedef, both.leaves[count:])
        _, out, _ = jax.jvp(
            lambda primals: apply(chunk.with_primals(primals)),
            (chunk.primals,),
            (part,),
            has_aux=True,
        )
        return out

    return map_chunks(push, both, chunk_size)


def pull_chunks(apply: Apply, batch: Batch, chunk_size: int, cotangents: PyTree) -> PyTree:
    """The gradient of ``batch.primals``, carried, by one vector-Jacobian product per chunk."""
    cotangents = _share_overlap(cotangents, batch.size, chunk_size)
    axes = batch.primal_axes
    leaves, treedef = jax.tree.flatten(batch.primals)
    zeros = [jax.lax.full_like(x, 0, dtype=_tree.carried_dtype(x.dtype)) for x in leaves]

    def cut(leaf: Any, start: Any) -> Any:
        if is_float0(leaf):
            return np.zeros((chunk_size, *leaf.shape[1:]), leaf.dtype)
        return jax.lax.dynamic_slice_in_dim(leaf, start, chunk_size)

    def step(totals: list[jax.Array], chunk: Batch, start: Any, _: Any) -> list[jax.Array]:
        _, pull, _ = vjp(apply, chunk)
        grads = pull(jax.tree.map(lambda leaf: cut(leaf, start), cotangents))
        wide = jax.tree.leaves(_tree.carry(grads))
        return [_add_at(*args, start) for args in zip(totals, wide, axes, strict=True)]

    return jax.tree.unflatten(treedef, fold_chunks(step, zeros, batch, chunk_size))


def _add_at(total: jax.Array, part: jax.Array, axis: int | None, start: Any) -> jax.Array:
    """``total + part``, at ``start`` on the batch axis of a leaf that has one."""
    if axis is None:
        return total + part
    old = jax.lax.dynamic_slice_in_dim(total, start, part.shape[axis], axis)
    return jax.lax.dynamic_update_slice_in_dim(total, old + part, start, axis)


def _share_overlap(cotangents: PyTree, size: int, chunk_size: int) -> PyTree:
    """Halve the cotangents of the rows that the last chunk shares with the one before it.

    Each of the two then contributes half of a row's gradient. Halving is exact, and unlike a zero
    cotangent it makes no NaN of an infinite derivative.
    """
    starts = chunk_starts(size, chunk_size)
    last, end_before = int(starts[-1]), (len(starts) - 1) * chunk_size
    if last == end_before:
        return cotangents
    row = jnp.arange(size)
    share = jnp.where((row >= last) & (row < end_before), 0.5, 1.0)
    return _tree.map_inexact(
        lambda x: _tree.scale(share.reshape(-1, *[1] * (x.ndim - 1)), x), cotangents
    )
