"""The chain rule over a batch without the rows, in the memory of one chunk."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp

from .._jax.sharding import AxisName, placed_like, sum_over, value_over
from .._trees import algebra
from .._trees.checks import (
    check_callable,
    check_chunk_size,
    like,
)
from .batch import resolve
from .chunks import loop_chunk
from .functions import Call, Fun, Outer
from .loops import map_chunks
from .misuse import check_call
from .named import mapped
from .notes import note_of_fun
from .unbound import check_name
from .vjp import pull_chunks, vjp


@overload
def chain_rule_value_and_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: Literal[False] = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., tuple[jax.Array, Any]]: ...


@overload
def chain_rule_value_and_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: Sequence[int],
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: Literal[False] = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., tuple[jax.Array, tuple[Any, ...]]]: ...


@overload
def chain_rule_value_and_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: bool = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., tuple[Any, Any]]: ...


def chain_rule_value_and_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    outer_has_params: bool = False,
    outer_has_aux: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: str | None = None,
) -> Callable[..., tuple[Any, Any]]:
    """The value and gradient of ``outer`` of the stacked outputs of ``fun``.

    With L = outer(f(p, x₁), …, f(p, x_N)), the gradient is Jᵀ ∂L/∂f: outputs first,
    then ∂L/∂f, then one vector-Jacobian product. ``outer`` may couple all the examples
    (contrastive and ranking losses, statistics of the batch). With ``chunk_size``, the
    outputs are found chunk by chunk and nothing else is kept, ∂L/∂f is found once for
    the whole batch, and each chunk is evaluated again for its own product. That is
    exact for every ``outer``, takes the memory of one chunk beside the batch, its
    outputs and what ``outer`` makes of them, and costs one more evaluation of ``fun``.

    Args:
      outer: called as ``outer(outputs)``, or ``outer(outputs, params)`` with
        ``outer_has_params``, each followed by the ``outer_args`` of the call; returns a
        real scalar, or ``(scalar, aux)``. ``outputs`` holds what ``fun`` returns, every
        leaf with a leading axis N.
      fun: the function of one example: any pytree of arrays, or ``(outputs, aux)``.
        Outputs may be complex; integer outputs reach ``outer`` and have no gradient.
      argnums: the positional argument of ``fun``, or arguments, to differentiate.
        The argument of a flax model is ``variables["params"]``, or ``params`` of
        ``graph, params, rest = nnx.split(model, nnx.Param, ...)``.
      in_axes: an int, None, or a tuple with an entry per positional argument, as in
        ``jax.vmap``. ``"default"`` is None for the differentiated arguments and 0 for
        all others. Keyword arguments are mapped over axis 0.
      has_aux: whether ``fun`` also returns auxiliary data, which is stacked.
      chunk_size: how many examples to work on at once; None means all. It need not
        divide N, but the remainder is a smaller chunk, compiled separately. Call the
        result inside ``jax.jit``: outside, a loop over chunks is compiled at every
        call, as ``jax.lax.scan`` of a new function is.
      outer_has_params: whether ``outer`` also takes the differentiated argument (a
        tuple of them for a tuple of ``argnums``), whose direct gradient is added: a
        penalty on weights, say.
      outer_has_aux: whether ``outer`` also returns auxiliary data.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, over which value and
        gradient are added up. ``outer`` sees the outputs of its device (and others' by
        collectives of its own), and the loss is the sum of ``outer`` over all devices.
      batch_axis_name: a name for the axis of examples inside ``fun``, as ``jax.vmap``
        has it: batch norm takes its mean over it. The gradient is exact: that of the
        whole batch, through its statistics. Auxiliary data that is the same for all
        examples, such as running statistics, then comes once and is not stacked.

    Returns:
      A function of the arguments of ``fun``, and of the keyword ``outer_args``, a
      tuple, empty by default, that returns ``(value, grads)``: grads like the
      differentiated argument, summed over chunks in float32 or wider. With one kind of
      auxiliary data, ``((value, aux), grads)``; with both, ``((value, (aux,
      outer_aux)), grads)``.

    Raises:
      TypeError: a differentiated leaf is not a real or complex floating-point array, or
        is one that flax does not train, or ``outer`` returns something other than a
        real floating-point value.
      ValueError: ``outer`` does not return a scalar, an axis is out of range, or sizes
        disagree; or ``batch_axis_name`` is given with ``chunk_size``: no chunk knows
        the statistics of the batch.

    ===========================  =======================================================
    case                         result
    ===========================  =======================================================
    N = 0                        ``outer`` of arrays with a leading axis of 0; zero
                                 gradients
    chunk_size >= N              one chunk, the same as None
    a batched PRNG-key argument  both evaluations of an example see the same key
    a differentiated argument    its gradient has the same batch axis (with ``in_axes``)
    that is batched
    parameters in bfloat16 or    within a chunk the sum over examples is that of
    float16                      ``jax.grad``, in the dtype of the backward pass; chunks
                                 are added up in float32
    a NaN or inf in ∂L/∂f or J   NaN or inf in the entries it touches, as with
                                 ``jax.grad``
    a ``jax.custom_vjp`` in      as with ``jax.grad``: the cotangent of an example goes
    ``fun`` that is not linear   through it once, and whole
    (it clips cotangents, say)
    ===========================  =======================================================

    Source: the two passes are those of GradCache (Gao et al., 2021, arXiv:2101.06983).

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: p["m"] * x + p["b"]
    >>> params = {"m": jnp.array(2.0), "b": jnp.array(-1.0)}
    >>> outer = lambda f: (f**2).sum()
    >>> loss_and_grad = chain_rule_value_and_grad(outer, f, chunk_size=1)
    >>> loss, grads = loss_and_grad(params, jnp.array([0.25, 1.5]))
    >>> print(loss, grads["m"], grads["b"])
    4.25 5.75 3.0
    """
    check_callable(outer, "outer")
    check_callable(fun, "fun")
    check_chunk_size(chunk_size)
    check_name(batch_axis_name, chunk_size)
    is_single = not isinstance(argnums, Sequence)
    inner = Fun(fun, has_aux)
    of_all = functools.partial(mapped, inner, axis_name=batch_axis_name)
    loss = Outer(outer, outer_has_params, outer_has_aux, is_single)
    # Integer outputs are allowed: their cotangent is float0.
    by = (0, 1) if outer_has_params else (0,)
    pull_loss = jax.value_and_grad(loss, by, has_aux=True, allow_int=True)

    @like(fun)
    def value_and_grad(
        *args: Any, outer_args: Sequence[Any] = (), **kwargs: Any
    ) -> Any:
        check_call(chain_rule_value_and_grad, fun, argnums, kwargs)
        call = Call(inner, loss, args, kwargs, outer_args)
        resolved = resolve(fun, args, kwargs, argnums, in_axes)
        batch = resolved.localized()
        chunk = loop_chunk(batch.size, chunk_size)
        in_fun = note_of_fun(fun, batch, has_rows=False)
        primals = batch.primals
        with in_fun, call.runs_fun(primals):
            if chunk is None:
                outputs, pull, aux = vjp(of_all, batch)
            else:
                outputs, aux = map_chunks(of_all, batch, chunk, apart=True)
                pull = functools.partial(pull_chunks, of_all, batch, chunk)
        with call.runs_outer(outputs, primals):
            (value, outer_aux), (cotangents, *direct) = pull_loss(
                outputs, primals, outer_args
            )
        with in_fun:
            total = algebra.carry(pull(cotangents))
        for grads in direct:
            total = jax.tree.map(jnp.add, total, algebra.carry(grads))
        value, total = value_over(value, axis_name), sum_over(total, axis_name)
        grads = algebra.round_like(placed_like(total, resolved.primals), batch.primals)
        auxs = (aux,) * has_aux + (outer_aux,) * outer_has_aux
        if auxs:
            value = (value, auxs if len(auxs) == 2 else auxs[0])
        return value, grads[0] if is_single else grads

    return value_and_grad


@overload
def chain_rule_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: Literal[False] = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., Any]: ...


@overload
def chain_rule_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: Sequence[int],
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: Literal[False] = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., tuple[Any, ...]]: ...


@overload
def chain_rule_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: bool = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., tuple[Any, Any]]: ...


@overload
def chain_rule_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: Literal[True],
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., tuple[Any, Any]]: ...


@overload
def chain_rule_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool = ...,
    chunk_size: int | None = ...,
    outer_has_params: bool = ...,
    outer_has_aux: bool = ...,
    axis_name: AxisName = ...,
    batch_axis_name: str | None = ...,
) -> Callable[..., Any]: ...


def chain_rule_grad(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    outer_has_params: bool = False,
    outer_has_aux: bool = False,
    axis_name: AxisName = None,
    batch_axis_name: str | None = None,
) -> Callable[..., Any]:
    """The gradient of ``outer`` of the stacked outputs of ``fun``, Jᵀ ∂L/∂f.

    Args:
      outer: as in :func:`chain_rule_value_and_grad`, as are the options that follow.
      fun: the function of one example.
      argnums: the positional argument of ``fun``, or arguments, to differentiate.
      in_axes: the axis of the examples in each argument.
      has_aux: whether ``fun`` also returns auxiliary data.
      chunk_size: how many examples to work on at once.
      outer_has_params: whether ``outer`` also takes the differentiated argument.
      outer_has_aux: whether ``outer`` also returns auxiliary data.
      axis_name: mesh axes over which the gradient is added up.
      batch_axis_name: a name for the axis of examples inside ``fun``.

    Returns:
      A function of the arguments of ``fun``, and of ``outer_args``, that returns
      ``grads``; with one kind of auxiliary data ``(grads, aux)``, with both ``(grads,
      (aux, outer_aux))``.

    Raises:
      TypeError: as :func:`chain_rule_value_and_grad`.
      ValueError: as :func:`chain_rule_value_and_grad`.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: p * x
    >>> print(chain_rule_grad(jnp.max, f)(jnp.array(2.0), jnp.array([1.0, 3.0])))
    3.0
    """
    value_and_grad = chain_rule_value_and_grad(
        outer,
        fun,
        argnums,
        in_axes=in_axes,
        has_aux=has_aux,
        chunk_size=chunk_size,
        outer_has_params=outer_has_params,
        outer_has_aux=outer_has_aux,
        axis_name=axis_name,
        batch_axis_name=batch_axis_name,
    )

    @like(fun)
    def grad(*args: Any, **kwargs: Any) -> Any:
        check_call(chain_rule_grad, fun, argnums, kwargs)
        value, grads = value_and_grad(*args, **kwargs)
        return (grads, value[1]) if has_aux or outer_has_aux else grads

    return grad
