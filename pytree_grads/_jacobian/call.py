"""The two ways to make a Jacobian: ``jacobian`` and ``value_and_jacobian``."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal, overload

import jax

from .._batches.axes import DEFAULT
from .._batches.batch import resolve
from .._batches.misuse import check_call
from .._batches.unbound import refuse_name
from .._jax.compat import trace_state
from .._jax.sharding import AxisName
from .._trees.checks import check_bool, check_callable, check_chunk_size, like
from .compiled import compiled_once
from .jacobian import Jacobian
from .kept import Kept
from .origin import Origin
from .outputs import Outputs
from .source import Source
from .streamed import Streamed


# Neither ``argnums`` nor ``batched`` changes a static type: J is a ``Jacobian``, and
# sums and numbers per row are trees of arrays, Any.
@overload
def jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    recompute: bool = ...,
    axis_name: AxisName = ...,
    batched: bool = ...,
    batch_axis_name: None = ...,
) -> Callable[..., Jacobian]: ...


@overload
def jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    recompute: bool = ...,
    axis_name: AxisName = ...,
    batched: bool = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[Jacobian, Any]]: ...


@overload
def jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool,
    chunk_size: int | None = ...,
    recompute: bool = ...,
    axis_name: AxisName = ...,
    batched: bool = ...,
    batch_axis_name: None = ...,
) -> Callable[..., Any]: ...


def jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    recompute: bool = False,
    axis_name: AxisName = None,
    batched: bool = True,
    batch_axis_name: None = None,
) -> Callable[..., Any]:
    """J, the rows of a function's gradients at every example, without building them.

    Row i is ∇ₚf(p, xᵢ). The function of one example is traced once, its backward pass
    is cut where a parameter's gradient would be put together, and the pieces (a layer's
    input and the cotangent of its output, say) are computed for the whole batch in one
    forward and one backward pass. Norms, clipping, inner products and weighted sums of
    rows follow from those. Any JAX function will do; what the engine does not know it
    materialises (see ``Jacobian.explain``).

    Args:
      fun: the function of one example; returns a real floating-point scalar, array or
        tree of arrays, and with ``has_aux`` a pair of that and auxiliary data. (Without
        ``has_aux``, a tuple (scalar, non-scalar) is treated as two outputs, with a
        warning; a list or dict gives no warning.) It may use references
        (``jax.new_ref``) that it makes itself, and read others. Effects that no result
        depends on (``jax.debug.print``, ``checkify.check``) may not take place, or
        several times: only what is needed is computed.
      argnums: the positional argument, or arguments, to differentiate, as in
        ``jax.grad``. The argument of a flax model is ``variables["params"]``, or
        ``params`` of ``graph, params, rest = nnx.split(model, nnx.Param, ...)``.
      in_axes: an int, None, or a tuple with an entry per positional argument, as in
        ``jax.vmap``. ``"default"`` is None for the differentiated arguments and 0 for
        all others. Keyword arguments are mapped over axis 0.
      has_aux: whether ``fun`` also returns auxiliary data, stacked like the outputs.
      chunk_size: keep nothing, and make each product from this many examples at a time.
        It need not divide N.
      recompute: keep nothing between products. Norms are taken where rows arise (inside
        the body of a scan over layers), and a weighted sum is one vector-Jacobian
        product, whose weights go through the dtypes of ``fun``: in float16, weights of
        1e-6 lose digits and those of 1e-9 are zero. If ``fun`` has a
        ``jax.custom_vjp``, which need not be linear in its cotangent, a weighted sum is
        made from factors instead. Outside ``jit``, each product of a J that keeps
        nothing is compiled once for ``fun`` and the shapes, as ``jax.jit`` of ``fun``
        is: values that ``fun`` closes over are compiled in as constants.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, over which sums of
        rows (``sum``, ``mean``, ``weighted_sum``, ``square_sum``) are those of all
        devices. By default they are those of the rows on the device; norms and all else
        per row always are.
      batched: whether ``fun`` is a function of one example. If not, it takes all
        arguments whole, as under ``jax.jacrev``: K losses of one batch have K rows. J
        then has the shape ``(*k, P)`` for outputs of shape k, ``norms()`` ``(*k)``,
        ``gram()`` ``(*k, *k)``, and ``mean()`` of one loss is its gradient. The options
        ``in_axes`` and ``chunk_size`` are about examples, and are refused.
      batch_axis_name: refused, with an error that names two exact ways out: with
        statistics of the batch, no example has a gradient of its own.

    Returns:
      A function of the arguments of ``fun`` that returns a ``Jacobian``, or with
      ``has_aux`` the pair of a ``Jacobian`` and the auxiliary data.

    Raises:
      TypeError: a differentiated leaf is not a real or complex floating-point array, or
        is one that flax does not train, or an output is not real and floating-point.
      ValueError: a differentiated argument is mapped, there are no parameters, an axis
        is out of range, or sizes disagree; or ``in_axes`` or ``chunk_size`` is given
        with ``batched=False``.
      NotImplementedError: ``fun`` has an effect that changes results: it writes to a
        reference that was made outside of it; or, where nothing is kept, it reads such
        a reference or calls out for a result (``jax.experimental.io_callback``).

    >>> import jax.numpy as jnp
    >>> loss = lambda p, x, y: (jnp.dot(p["w"], x) + p["b"] - y) ** 2
    >>> params = {"w": jnp.array([1.0, 2.0]), "b": jnp.array(0.5)}
    >>> x, y = jnp.array([[2.0, 2.0], [4.0, 8.0]]), jnp.array([6.0, 20.0])
    >>> J = jacobian(loss)(params, x, y)
    >>> print(J.shape, J.norms().round())
    (2, 3) [3. 9.]
    >>> print(f"{J.clip(4.5).sum()['b']:.3f}")
    1.500

    Two losses of the whole batch:

    >>> losses = lambda p, x, y: jnp.stack([(x @ p["w"] - y).mean(), p["b"] ** 2])
    >>> J = jacobian(losses, batched=False)(params, x, y)
    >>> print(J.shape, J.norms().round(1), J.gram().shape)
    (2, 3) [5.8 1. ] (2, 2)
    """
    return _make(
        fun,
        argnums,
        in_axes,
        has_aux,
        chunk_size,
        recompute,
        axis_name,
        batched,
        batch_axis_name,
        with_outputs=False,
    )


@overload
def value_and_jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[False] = ...,
    chunk_size: int | None = ...,
    recompute: bool = ...,
    axis_name: AxisName = ...,
    batched: bool = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[Any, Jacobian]]: ...


@overload
def value_and_jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: Literal[True],
    chunk_size: int | None = ...,
    recompute: bool = ...,
    axis_name: AxisName = ...,
    batched: bool = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[tuple[Any, Any], Jacobian]]: ...


@overload
def value_and_jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = ...,
    *,
    in_axes: Any = ...,
    has_aux: bool,
    chunk_size: int | None = ...,
    recompute: bool = ...,
    axis_name: AxisName = ...,
    batched: bool = ...,
    batch_axis_name: None = ...,
) -> Callable[..., tuple[Any, Jacobian]]: ...


def value_and_jacobian(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    recompute: bool = False,
    axis_name: AxisName = None,
    batched: bool = True,
    batch_axis_name: None = None,
) -> Callable[..., tuple[Any, Jacobian]]:
    """The outputs of a function at every example, and J, from one forward pass.

    Arguments and errors are those of ``jacobian``.

    Returns:
      A function of the arguments of ``fun`` that returns ``(outputs, J)``, or with
      ``has_aux`` ``((outputs, aux), J)``; outputs and aux have a leading axis N.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: jnp.dot(p, x)
    >>> p, x = jnp.array([1.0, 2.0]), jnp.array([[3.0, 4.0]])
    >>> outputs, J = value_and_jacobian(f)(p, x)
    >>> print(outputs, J.norms())
    [11.] [5.]
    """
    return _make(
        fun,
        argnums,
        in_axes,
        has_aux,
        chunk_size,
        recompute,
        axis_name,
        batched,
        batch_axis_name,
        with_outputs=True,
    )


def _make(
    fun: Callable[..., Any],
    argnums: int | Sequence[int],
    in_axes: Any,
    has_aux: bool,
    chunk_size: int | None,
    recompute: bool,
    axis_name: AxisName,
    batched: bool,
    batch_axis_name: None,
    *,
    with_outputs: bool,
) -> Callable[..., Any]:
    check_callable(fun, "fun")
    check_chunk_size(chunk_size)
    check_bool("recompute", recompute)
    check_bool("batched", batched)
    refuse_name(batch_axis_name)

    if not batched:
        _check_whole(in_axes, chunk_size)

    @like(fun)
    def jacobian_of(*args: Any, **kwargs: Any) -> Any:
        maker = value_and_jacobian if with_outputs else jacobian
        check_call(maker, fun, argnums, kwargs)
        batch = resolve(
            fun, args, kwargs, argnums, in_axes, shared=True, batched=batched
        )
        if not jax.tree.leaves(batch.primals):
            raise ValueError("the arguments to differentiate hold no arrays")
        keeps_nothing = recompute or chunk_size is not None
        source = Source.of(
            fun,
            batch,
            has_aux,
            chunk_size,
            many=isinstance(argnums, Sequence),
            runs_again=bool(keeps_nothing),
        )
        examined = source.examined() if recompute else None
        trace = source.trace(examined and examined.fun)
        outputs = Outputs.of(trace.output_avals, bool(batched))
        if outputs.is_pair and not has_aux:
            warnings.warn(_PAIR, stacklevel=2)
        origin = Origin.of(source, outputs.rows(batch.size), axis_name)
        if keeps_nothing:
            rows = Streamed(
                origin,
                one_pass=not recompute,
                pulls_back=examined is not None and examined.pulls_back,
                trace=trace,
            )
            values, aux = _outputs(source) if with_outputs or has_aux else (None, None)
        else:
            factored = source.factor(trace, batch.localized(), with_sums=True)
            sources, tail = factored.rows
            rows = Kept(
                origin, sources, tail=tail, made_in=trace_state(), sums=factored.sums
            )
            values, aux = factored.outputs, factored.aux
        if not batched:
            values, aux = jax.tree.map(lambda x: x[0], (values, aux))
        made = Jacobian(rows, outputs)
        if with_outputs:
            return ((values, aux) if has_aux else values), made
        return (made, aux) if has_aux else made

    return jacobian_of


def _check_whole(in_axes: Any, chunk_size: int | None) -> None:
    """Raise if an option about examples is given for a function of a whole batch."""
    given = {"in_axes": in_axes != DEFAULT, "chunk_size": chunk_size is not None}
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"argument {name} is about examples, and with batched=False fun takes "
                "its arguments whole: leave one of the two out"
            )


_PAIR = (
    "fun returned a pair of a scalar and of something else, and J has a row for each "
    "of their numbers: if the second item is auxiliary data, give has_aux=True; if "
    "not, return a dict or a list"
)
_outputs = compiled_once()(Source.outputs)
