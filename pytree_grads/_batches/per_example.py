"""Per-example gradients: ``jax.vmap`` of ``jax.grad``, with checks and chunks."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax

from .._trees.checks import check_callable, check_chunk_size, check_scalar, like
from .batch import resolve
from .functions import Fun
from .loops import map_chunks
from .misuse import check_call
from .notes import note_of_fun
from .unbound import refuse_name


# Static types tell one argument from several, and a value from a value with auxiliary
# data. Trees of arrays are Any.
@overload
def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: int = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[jax.Array, Any]]: ...


@overload
def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: Sequence[int],
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[jax.Array, tuple[Any, ...]]]: ...


@overload
def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: int = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[tuple[jax.Array, Any], Any]]: ...


@overload
def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: Sequence[int],
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[tuple[jax.Array, Any], tuple[Any, ...]]]: ...


@overload
def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool = ...,
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[Any, Any]]: ...


def per_example_value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    batch_axis_name: None = None,
) -> Callable[..., tuple[Any, Any]]:
    """The value and the gradient of ``fun`` at every example of a batch, stacked.

    Row i is f(p, xᵢ) and ∇ₚf(p, xᵢ), as ``jax.vmap(jax.value_and_grad(fun))`` gives it.

    Args:
      fun: the function of one example; returns a real scalar, or ``(scalar, aux)``.
      argnums: the positional argument, or arguments, to differentiate, as in
        ``jax.grad``. The argument of a flax model is ``variables["params"]``, or
        ``params`` of ``graph, params, rest = nnx.split(model, nnx.Param, ...)``.
      in_axes: an int, None, or a tuple with an entry per positional argument, as in
        ``jax.vmap``. ``"default"`` is None for the differentiated arguments and 0 for
        all others. Keyword arguments are mapped over axis 0.
      has_aux: whether ``fun`` also returns auxiliary data, which is stacked like the
        values.
      chunk_size: how many examples to work on at once; None means all. It need not
        divide N.
      batch_axis_name: refused, with an error that names two exact ways out: with
        statistics of the batch, no example has a gradient of its own.

    Returns:
      A function of the arguments of ``fun`` that returns ``(values, grads)``, or
      ``((values, aux), grads)``: values of shape (N,), and grads like the
      differentiated argument with a leading axis N on every leaf, in the leaf's dtype;
      for a tuple of ``argnums``, a tuple of such trees.

    Raises:
      TypeError: a differentiated leaf is not a real or complex floating-point array, or
        is one that flax does not train, or ``fun`` returns something other than a real
        floating-point value.
      ValueError: ``fun`` does not return a scalar, an axis is out of range, or sizes
        disagree.

    ===========================  =======================================================
    case                         result
    ===========================  =======================================================
    N = 0                        arrays with a leading axis of 0
    chunk_size >= N              one chunk, the same as None
    a NaN row                    NaN in that row alone
    complex parameters           ``jax.grad``'s convention: step along the conjugate
    inside ``jax.shard_map``     rows are those of the examples on the device, never
                                 added up
    a batched PRNG-key argument  each example sees its own key, whatever the chunks are
    ===========================  =======================================================

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: p["m"] * x + p["b"]
    >>> params = {"m": jnp.array(2.0), "b": jnp.array(-1.0)}
    >>> values, grads = per_example_value_and_grad(f)(params, jnp.array([0.25, 1.5]))
    >>> print(values, grads["m"], grads["b"])
    [-0.5  2. ] [0.25 1.5 ] [1. 1.]
    """
    check_callable(fun, "fun")
    check_chunk_size(chunk_size)
    refuse_name(batch_axis_name)
    inner = Fun(fun, has_aux)

    @like(fun)
    def checked(*args: Any, **kwargs: Any) -> Any:
        value, aux = inner(*args, **kwargs)
        check_scalar(value, "the value of fun at one example", _NOT_SCALAR)
        return value, aux

    @like(fun)
    def rows(*args: Any, **kwargs: Any) -> Any:
        check_call(per_example_value_and_grad, fun, argnums, kwargs)
        batch = resolve(fun, args, kwargs, argnums, in_axes).localized()
        row = jax.value_and_grad(checked, argnums, has_aux=True)
        with note_of_fun(fun, batch):
            (values, aux), grads = map_chunks(
                lambda chunk: chunk.vmap(lambda args, kwargs: row(*args, **kwargs)),
                batch,
                chunk_size,
            )
        return ((values, aux) if has_aux else values), grads

    return rows


_NOT_SCALAR = (
    "the rows of a function with several outputs are those of jacobian; a function of "
    "the whole "
    "batch belongs in the outer function of chain_rule_grad"
)


@overload
def per_example_grad(
    fun: Callable[..., Any],
    argnums: int = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., Any]: ...


@overload
def per_example_grad(
    fun: Callable[..., Any],
    argnums: Sequence[int],
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[Any, ...]]: ...


@overload
def per_example_grad(
    fun: Callable[..., Any],
    argnums: int = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[Any, Any]]: ...


@overload
def per_example_grad(
    fun: Callable[..., Any],
    argnums: Sequence[int],
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[tuple[Any, ...], Any]]: ...


@overload
def per_example_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool = ...,
    chunk_size: int | None = ...,
    batch_axis_name: None = ...,
) -> Callable[..., Any]: ...


def per_example_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    batch_axis_name: None = None,
) -> Callable[..., Any]:
    """The gradient of ``fun`` at every example, stacked: row i is ∇ₚf(p, xᵢ).

    Args:
      fun: the function of one example; returns a real scalar, or ``(scalar, aux)``.
      argnums: as in :func:`per_example_value_and_grad`, as are the options that follow.
      in_axes: the axis of the examples in each argument.
      has_aux: whether ``fun`` also returns auxiliary data.
      chunk_size: how many examples to work on at once.
      batch_axis_name: refused, as in :func:`per_example_value_and_grad`.

    Returns:
      A function of the arguments of ``fun`` that returns ``grads``, or ``(grads,
      aux)``: every leaf like the differentiated argument's, with a leading axis N.

    Raises:
      TypeError: as :func:`per_example_value_and_grad`.
      ValueError: as :func:`per_example_value_and_grad`.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: jnp.sin(p @ x)
    >>> print(per_example_grad(f)(jnp.zeros(2), jnp.array([[1.0, 2.0], [3.0, 4.0]])))
    [[1. 2.]
     [3. 4.]]
    """
    value_and_grad = per_example_value_and_grad(
        fun,
        argnums,
        in_axes=in_axes,
        has_aux=has_aux,
        chunk_size=chunk_size,
        batch_axis_name=batch_axis_name,
    )

    @like(fun)
    def rows(*args: Any, **kwargs: Any) -> Any:
        check_call(per_example_grad, fun, argnums, kwargs)
        values, grads = value_and_grad(*args, **kwargs)
        return (grads, values[1]) if has_aux else grads

    return rows
