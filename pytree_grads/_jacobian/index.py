"""Which rows an index of J chooses: an int, a slice, indices or a mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .._batches.chosen import At, Chosen, Span
from .._trees.checks import describe, describe_node

_KINDS = (
    "a Jacobian takes an int, a slice, an array (k,) of ints, or a mask (N,) of bools, "
    "and chooses {}, got "
)
_TOGETHER = {
    "examples": "the outputs of an example stay together",
    "losses": "what is behind the first axis of losses stays together",
}


def read(index: Any, size: Any, what: str) -> Chosen:
    """The rows that an index chooses from those of `size` examples or losses."""
    if isinstance(index, slice):
        return _of_slice(index, size)
    kinds = _KINDS.format(what)
    if isinstance(index, tuple):
        raise TypeError(
            f"{kinds}{describe_node(index)}: {_TOGETHER[what]}; J.scale with zeros "
            "drops some of them"
        )
    array = _as_array(index, kinds)
    _check_size(size, "index")
    if array.dtype == bool:
        return At(_of_mask(array, size, what))
    if not jnp.issubdtype(array.dtype, jnp.integer):
        raise TypeError(f"{kinds}{describe_node(index)}")
    if array.ndim > 1:
        raise ValueError(
            f"an array of indices has one axis, got {describe(array)}: J[index.ravel()]"
        )
    if not _is_known(array):
        return At(jnp.atleast_1d(_clamped(array, size)))
    indices = np.atleast_1d(_in_range(np.asarray(array), size, what))
    if array.ndim:
        return At(jnp.asarray(indices, jnp.int32))
    return Span(int(indices[0]), 1)


def _of_slice(index: slice, size: Any) -> Chosen:
    if any(isinstance(x, Tracer) for x in (index.start, index.stop, index.step)):
        raise TypeError(
            "the bounds of a slice of a Jacobian are static, got a traced one: for k "
            "rows from a traced start, J[start + jnp.arange(k)]"
        )
    _check_size(size, "start:stop")
    chosen = range(*index.indices(size))
    if chosen.step == 1:
        return Span(chosen.start, len(chosen))
    return At(jnp.asarray(np.asarray(chosen, np.int32)))


def _check_size(size: Any, written: str) -> None:
    if not isinstance(size, int):
        raise TypeError(
            "an index needs a batch of known size, and the number of examples is "
            f"symbolic, {size}: choose in the batch, as in jacobian(f)(params, "
            f"xs[{written}]), or give rows weight 0"
        )


def _as_array(index: Any, kinds: str) -> Any:
    if isinstance(index, jax.Array):
        return index
    if isinstance(index, list) and not index:
        return np.zeros(0, np.int32)
    try:
        return np.asarray(index)
    except (ValueError, jax.errors.TracerArrayConversionError):
        raise TypeError(f"{kinds}{describe_node(index)}: jnp.asarray(index)") from None


def _is_known(array: Any) -> bool:
    """Whether the values of an array may be looked at."""
    if isinstance(array, Tracer):
        return False
    return not isinstance(array, jax.Array) or array.is_fully_addressable


def _of_mask(mask: Any, size: int, what: str) -> jax.Array:
    if mask.shape != (size,):
        raise ValueError(
            f"a mask has one entry for each of {size} {what}, got {describe(mask)}"
        )
    if not _is_known(mask):
        raise TypeError(
            "how many rows a traced mask keeps is not known: J[jnp.nonzero(mask, "
            "size=k)[0]] takes k rows, J.scale(mask.astype(float)) makes the others "
            "zero"
        )
    return jnp.asarray(np.flatnonzero(np.asarray(mask)), jnp.int32)


def _in_range(indices: np.ndarray, size: int, what: str) -> np.ndarray:
    """Static indices, counted from the start."""
    wrong = indices[(indices < -size) | (indices >= size)]
    if wrong.size:
        raise IndexError(
            f"index {wrong.flat[0]} is out of range: J has the rows of {size} {what}"
        )
    return np.where(indices < 0, indices.astype(np.int64) + size, indices)


def _clamped(index: jax.Array, size: int) -> jax.Array:
    """Traced indices, counted from the start, or the nearest in the range."""
    if not size:
        raise IndexError("J has no rows: an index cannot be clamped to one of them")
    if index.dtype.itemsize < 4:  # these may not hold the number of examples
        index = index.astype(jnp.int32)
    index = jnp.minimum(index, jnp.asarray(size - 1, index.dtype))
    if jnp.issubdtype(index.dtype, jnp.signedinteger):
        from_end = jnp.maximum(index + jnp.asarray(size, index.dtype), 0)
        index = jnp.where(index < 0, from_end, index)
    return index.astype(jnp.int32)
