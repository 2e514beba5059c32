"""Products with curvature matrices of a batch, Jᵀ H J v, in the memory of one chunk."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.sharding import AxisName, device_count, placed_like, sum_over
from .._trees import algebra
from .._trees.checks import (
    PyTree,
    check_callable,
    check_chunk_size,
    check_matching,
    check_scalar,
    is_inexact,
    like,
)
from .batch import Batch, resolve
from .chunks import loop_chunk
from .functions import Call, Fun, Outer
from .loops import map_chunks
from .misuse import check_call
from .notes import note_of_fun
from .unbound import check_name, explain_unbound
from .vjp import Apply, differentiated, pull_chunks, push_chunks


def gauss_newton_product(
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
) -> Callable[..., Callable[[PyTree], PyTree]]:
    """The product with the generalized Gauss-Newton matrix of ``outer(outputs)``.

    With L = outer(f(p, x₁), …, f(p, x_N)), the product is G v = Jᵀ H J v: J is the
    Jacobian of all outputs, H the Hessian of ``outer`` at them. ``outer`` may couple
    all the examples, and H is never built. Where ``outer`` is convex, G is positive
    semi-definite: it is the Hessian of L without the curvature of ``fun``. For a
    cross-entropy of logits, and for every other negative log-likelihood whose natural
    parameters are the outputs, G is the Fisher matrix of the model.

    Args:
      outer: as in :func:`chain_rule_value_and_grad`, as are the options that follow;
        its Hessian is needed as well.
      fun: the function of one example.
      argnums: the positional argument of ``fun``, or arguments, to differentiate.
      in_axes: the axis of the examples in each argument.
      has_aux: whether ``fun`` also returns auxiliary data, which is dropped.
      chunk_size: how many examples to work on at once. The outputs are found once; each
        product then evaluates every chunk twice, for J v and for its share of the
        result, and keeps nothing but rows of outputs. By default, the linearized
        ``fun`` is kept between products.
      outer_has_params: whether ``outer`` also takes the differentiated argument. H is
        then the Hessian with respect to the outputs and the argument together, and J is
        extended below by an identity block: a penalty on the weights in ``outer`` damps
        G as it should.
      outer_has_aux: whether ``outer`` also returns auxiliary data, which is dropped.
      axis_name: inside ``jax.shard_map``, the mesh axis, or axes, over which products
        are added up.
      batch_axis_name: a name for the axis of examples inside ``fun``; J is then the
        Jacobian of all outputs through the statistics of the batch.

    Returns:
      A function of the arguments of ``fun``, and of ``outer_args``, that returns the
      product: a function of one tree v like the differentiated argument, which returns
      another, summed over chunks in float32 or wider. It cannot leave ``jax.jit``, and
      is ready for ``jax.scipy.sparse.linalg.cg`` inside; add damping as ``lambda v:
      (Vector(product(v)) + damping * Vector(v)).tree``.

    Raises:
      TypeError: as :func:`chain_rule_value_and_grad`.
      ValueError: as :func:`chain_rule_value_and_grad`; by the product, if v is not like
        the differentiated argument in structure, shapes and dtypes.

    =====================================  =============================================
    case                                   result
    =====================================  =============================================
    N = 0                                  zeros, and what the parameters in ``outer``
                                           add
    an output that is an integer           reaches ``outer``; it has no derivative
    ``jax.custom_vjp`` in ``fun``          TypeError of JAX: J v needs forward mode
    complex parameters                     G v is the directional derivative along v of
                                           the gradient in ``jax.grad``'s conjugate
                                           convention; linear over the reals
    =====================================  =============================================

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order
    gradient descent" (2002); Martens, "New insights and perspectives on the natural
    gradient method" (2020, arXiv:1412.1193), sections 8 and 9.

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: p["m"] * x + p["b"]
    >>> params = {"m": jnp.array(2.0), "b": jnp.array(-1.0)}
    >>> x = jnp.array([0.25, 1.5])
    >>> product = gauss_newton_product(lambda f: (f**2).sum(), f)(params, x)
    >>> G_v = product({"m": jnp.array(1.0), "b": jnp.array(0.0)})
    >>> print(G_v["m"], G_v["b"])
    4.625 3.5
    """
    check_callable(outer, "outer")
    check_callable(fun, "fun")
    check_chunk_size(chunk_size)
    check_name(batch_axis_name, chunk_size)
    is_single = not isinstance(argnums, Sequence)
    inner = Fun(fun, has_aux)
    loss_of = Outer(outer, outer_has_params, outer_has_aux, is_single)

    def apply(batch: Batch) -> tuple[PyTree, PyTree]:
        def one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[PyTree, PyTree]:
            outputs, _ = inner(*args, **kwargs)
            return _has_derivative(outputs), _has_none(outputs)

        return batch.vmap(one, axis_name=batch_axis_name)

    @like(fun)
    def linearized(*args: Any, outer_args: Sequence[Any] = (), **kwargs: Any) -> Any:
        check_call(gauss_newton_product, fun, argnums, kwargs)
        call = Call(inner, loss_of, args, kwargs, outer_args)
        resolved = resolve(fun, args, kwargs, argnums, in_axes)
        batch = resolved.localized()
        chunk = loop_chunk(batch.size, chunk_size)
        in_fun = note_of_fun(fun, batch, has_rows=False)
        with in_fun, call.runs_fun(batch.primals):
            outputs, fixed, push, pull = _linear_maps(apply, batch, chunk)

        def loss(outputs: PyTree, *primals: PyTree) -> jax.Array:
            value, _ = loss_of(_joined(outputs, fixed), primals, outer_args)
            return value

        at = (outputs, *batch.primals) if outer_has_params else (outputs,)
        with call.runs_outer(_joined(outputs, fixed), batch.primals):
            _, curve = jax.linearize(jax.grad(loss, tuple(range(len(at)))), *at)

        def product(v: PyTree) -> PyTree:
            """Jᵀ H J v, for a tree like the differentiated argument."""
            params = batch.primals[0] if is_single else batch.primals
            v = algebra.floating_like("v", v, params, "params", carried=False)
            check_matching(params, v, "params", "v")
            tangents = placed_like((v,) if is_single else v, batch.primals)
            direct = tangents if outer_has_params else ()
            with in_fun:
                cotangents, *more = curve(push(tangents), *direct)
                total = algebra.carry(pull(cotangents))
            if more:
                total = jax.tree.map(jnp.add, total, algebra.carry(tuple(more)))
            total = placed_like(sum_over(total, axis_name), resolved.primals)
            result = algebra.round_like(total, batch.primals)
            return result[0] if is_single else result

        return product

    return linearized


def _linear_maps(apply: Apply, batch: Batch, chunk: int | None) -> tuple[Any, ...]:
    """``(outputs, fixed, push, pull)``: v to J v, and cotangents c to Jᵀ c."""
    if chunk is not None:
        outputs, fixed = map_chunks(apply, batch, chunk)
        push = functools.partial(push_chunks, apply, batch, chunk)
        pull = functools.partial(pull_chunks, apply, batch, chunk)
        return outputs, fixed, push, pull
    with differentiated(apply, batch):
        outputs, push, fixed = jax.linearize(
            lambda primals: apply(batch.with_primals(primals)),
            batch.primals,
            has_aux=True,
        )
        transposed = jax.linear_transpose(push, batch.primals)

    def pulled(cotangents: PyTree) -> tuple[PyTree, ...]:
        with differentiated(apply, batch):
            return transposed(cotangents)[0]

    return outputs, fixed, push, pulled


def fisher_product(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    *,
    in_axes: Any = "default",
    has_aux: bool = False,
    chunk_size: int | None = None,
    axis_name: AxisName = None,
) -> Callable[..., Callable[[PyTree], PyTree]]:
    """The product with the empirical Fisher matrix, F v = Jᵀ J v / N.

    J holds the gradients of ``fun`` at the N examples, so F is the mean of gᵢ gᵢᵀ.
    ``fun`` is the log-likelihood of an example, or the loss that is its negative: the
    sign does not matter. With labels drawn from the model, F is an unbiased estimate of
    the Fisher matrix; with the labels of the data it is what is called the empirical
    Fisher, which need not resemble it (Kunstner et al.). The Fisher matrix itself,
    where the outputs are natural parameters (logits, the mean of a Gaussian), is
    :func:`gauss_newton_product` of the mean negative log-likelihood.

    Args:
      fun: a function of one example that returns a real scalar.
      argnums: the positional argument of ``fun``, or arguments, to differentiate.
      in_axes: the axis of the examples in each argument.
      has_aux: whether ``fun`` also returns auxiliary data, which is dropped.
      chunk_size: how many examples to work on at once, as in
        :func:`gauss_newton_product`.
      axis_name: mesh axes over which products are added up; N then counts all their
        examples.

    Returns:
      A function of the arguments of ``fun`` that returns the product, as
      :func:`gauss_newton_product` does. Without examples it is zero.

    Raises:
      TypeError: ``fun`` does not return a real floating-point value, or a
        differentiated leaf is not a floating-point array.
      ValueError: ``fun`` does not return a scalar, or the arguments disagree.

    Source: Martens (2020, arXiv:1412.1193), section 11, on the empirical Fisher;
    Kunstner, Balles and Hennig, "Limitations of the empirical Fisher approximation"
    (2019, arXiv:1905.12558).

    >>> import jax.numpy as jnp
    >>> f = lambda p, x: p * x
    >>> product = fisher_product(f)(jnp.array(2.0), jnp.array([1.0, 3.0]))
    >>> print(product(jnp.array(1.0)))
    5.0
    """
    check_callable(fun, "fun")
    inner = Fun(fun, has_aux)

    @like(fun)
    def scalar(*args: Any, **kwargs: Any) -> Any:
        try:
            value, _ = inner(*args, **kwargs)
        except NameError as error:
            explain_unbound(error, has_rows=True)
            raise
        mend = "a log-likelihood or a loss of one example is one number"
        check_scalar(value, "the value of fun", mend)
        return value

    def half_mean_square(outputs: jax.Array) -> jax.Array:
        """Its Hessian is 1 / N."""
        wide = outputs.astype(algebra.carried_dtype(outputs.dtype))
        return jnp.sum(wide**2) / (2 * max(1, wide.size * device_count(axis_name)))

    product_of = gauss_newton_product(
        half_mean_square,
        scalar,
        argnums,
        in_axes=in_axes,
        chunk_size=chunk_size,
        axis_name=axis_name,
    )

    @like(fun)
    def linearized(*args: Any, **kwargs: Any) -> Any:
        check_call(fisher_product, fun, argnums, kwargs)
        return product_of(*args, **kwargs)

    return linearized


def _has_derivative(outputs: PyTree) -> PyTree:
    """The leaves that have a derivative, None in the place of the others."""
    return jax.tree.map(lambda x: x if is_inexact(x) else None, outputs)


def _has_none(outputs: PyTree) -> PyTree:
    """The other leaves, None in the place of those that have a derivative."""
    return jax.tree.map(lambda x: None if is_inexact(x) else x, outputs)


def _joined(first: PyTree, second: PyTree) -> PyTree:
    """Both together again."""
    return jax.tree.map(
        lambda x, y: y if x is None else x, first, second, is_leaf=lambda x: x is None
    )
