"""What every weighting checks of its arguments, with errors that name the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from .. import Jacobian


def gramian(gram: Any, name: str = "gram") -> jax.Array:
    """A user's Gramian as an array (K, K) in float32 or wider."""
    array = _floats(name, gram)
    if array.ndim != 2 or array.shape[0] != array.shape[1]:
        raise ValueError(
            f"{name} must have shape (K, K), a row for each of K losses, got "
            f"{array.shape}: J.gram() has it if f returns one loss; for outputs of "
            "shape (K,) and a batch of one, write J.gram()[0, :, 0, :], and for a "
            "stack of Gramians, jax.vmap the weighting"
        )
    if not array.shape[0]:
        raise ValueError(f"{name} has shape (0, 0): there must be at least one loss")
    return array


def per_loss(name: str, values: Any, gram: jax.Array) -> jax.Array:
    """A user's number per loss, of shape (K,), in the dtype of the Gramian."""
    array = _floats(name, values)
    if array.shape != gram.shape[:1]:
        raise ValueError(
            f"{name} must have shape {gram.shape[:1]}, a number for each of "
            f"{gram.shape[0]} losses, got {array.shape}"
        )
    return array.astype(gram.dtype)


def preference(values: Any, gram: jax.Array) -> jax.Array:
    """A user's preference for each loss, none of them negative; 1/K by default."""
    if values is None:
        return jnp.full(gram.shape[:1], 1 / len(gram), gram.dtype)
    array = per_loss("preference", values, gram)
    if not isinstance(array, Tracer) and bool(jnp.any(array < 0)):
        raise ValueError(f"preference must not be negative, got {array}")
    return array


def number(name: str, value: Any, *, low: float, open_: bool = False) -> jax.Array:
    """A user's real scalar: finite and at least ``low``, or if ``open_``, above it."""
    if isinstance(value, bool) or not _is_real(value) or np.ndim(value):
        raise TypeError(f"{name} must be a real scalar, got {value!r}")
    if not isinstance(value, Tracer):
        fits = value > low if open_ else low <= value < jnp.inf
        if not bool(fits):
            bound = f"above {low}" if open_ else f"at least {low} and finite"
            raise ValueError(f"{name} must be {bound}, got {value}")
    return jnp.asarray(value, float)


def fraction(name: str, value: Any) -> jax.Array:
    """A user's real scalar from 0 to 1."""
    checked = number(name, value, low=0.0)
    if not isinstance(value, Tracer) and value > 1:
        raise ValueError(f"{name} must be at most 1, got {value}")
    return checked


def one_key(key: Any) -> jax.Array:
    """A user's PRNG key, typed or of the old kind."""
    array = jnp.asarray(key) if hasattr(key, "dtype") else None
    if array is None or not (
        (jnp.issubdtype(array.dtype, jax.dtypes.prng_key) and array.ndim == 0)
        or (array.dtype == jnp.uint32 and array.ndim == 1)
    ):
        raise TypeError(f"key must be one PRNG key, as jax.random.key(0), got {key!r}")
    return array


def whole(name: str, value: Any, *, low: int) -> int:
    """A user's static int that is at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def _is_real(value: Any) -> bool:
    dtype = value.dtype if isinstance(value, jax.Array) else np.asarray(value).dtype
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _floats(name: str, values: Any) -> jax.Array:
    """An array of real floating-point numbers, in float32 or wider."""
    if isinstance(values, Jacobian):
        raise TypeError(f"{name} must be an array, got a Jacobian: write J.gram()")
    try:
        array = jnp.asarray(values)
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"{name} must hold real floating-point numbers, got {values!r}"
        ) from error
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must hold real floating-point numbers, got {array.dtype}: "
            f"write {name}.astype(float) if that is meant"
        )
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)
