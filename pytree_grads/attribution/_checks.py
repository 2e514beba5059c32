"""What every attribution checks of its arguments, with errors that name the remedy."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from .. import Jacobian


def one_row_per_example(name: str, J: Any) -> None:
    """Raise unless J is a Jacobian with one row per example."""
    if not isinstance(J, Jacobian):
        raise TypeError(
            f"{name} must be a Jacobian, as jacobian(f)(params, *batch) makes it, got "
            f"{type(J).__name__}"
        )
    if len(J.shape) != 2:
        raise ValueError(
            f"{name} must have one row per example, of shape (N, P), got {J.shape}: "
            "differentiate a function that returns one number"
        )


def number(name: str, value: Any, *, low: float) -> Any:
    """A user's real scalar that is at least ``low``."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a real scalar, got {value!r}")
    if not isinstance(value, Tracer) and not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def _is_real(value: Any) -> bool:
    if isinstance(value, str | bool) or value is None:
        return False
    return not jnp.ndim(value) and not jnp.iscomplexobj(value)


def whole(name: str, value: Any, *, low: int) -> int:
    """A user's static int that is at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value}")
    return value


def floats(name: str, values: Any, shape: str) -> jax.Array:
    """Real floating-point numbers with as many axes as ``shape`` names, as "(Q, N)"."""
    array = jnp.asarray(values)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{name} must hold real floating-point numbers, got {array.dtype}: "
            f"write {name}.astype(float) if that is meant"
        )
    axes = len([axis for axis in shape.strip("()").split(",") if axis.strip()])
    if array.ndim != axes:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")
    return array if array.dtype.itemsize >= 4 else array.astype(jnp.float32)


def same(what: str, **sizes: int) -> None:
    """Raise unless the named sizes, such as the number of examples, are one."""
    if len(set(sizes.values())) > 1:
        told = ", ".join(f"{size} in {name}" for name, size in sizes.items())
        raise ValueError(f"the number of {what} must be one: it is {told}")
