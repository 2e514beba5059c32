"""Einsums that are carried in float32 or wider."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._tree import common_dtype


def dot(spec: str, *operands: jax.Array, precision: Any = lax.Precision.HIGHEST) -> jax.Array:
    """An einsum that is carried in float32 or wider."""
    dtype = common_dtype(*(x.dtype for x in operands))
    if len({x.dtype for x in operands}) > 1:  # else products of narrow floats are exact as they are
        operands = tuple(x.astype(dtype) for x in operands)
    return jnp.einsum(spec, *operands, precision=precision, preferred_element_type=dtype)
