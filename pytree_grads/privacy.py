"""Differentially private training: clipped sums that know their sensitivity, and noise.

=======================  ===============================================================
what you want            call
=======================  ===============================================================
a sum or mean of         ``clipped = clipped_grad(f, l2_clip_norm=1.0)``, then
clipped gradients        ``clipped(params, batch)``
its sensitivity          ``clipped.sensitivity("add_or_remove_one")``
matching noise           ``gaussian(clipped, noise_multiplier, key)``, for optax.chain
=======================  ===============================================================

Names, arguments and results are those of ``jax_privacy``, so you can combine parts of
both packages. For accounting, samplers, correlated noise and auditing, use
``jax_privacy`` and ``dp_accounting``, which the extra ``privacy`` of this package
installs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf, isnan, sqrt
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from . import Jacobian, jacobian, value_and_jacobian

__all__ = ["ClippedGrad", "clipped_grad", "gaussian"]

# How far one example moves the result, in units of its bound.
FACTORS = {"ADD_OR_REMOVE_ONE": 1.0, "REPLACE_SPECIAL": 1.0, "REPLACE_ONE": 2.0}


class AuxiliaryOutput(NamedTuple):
    """What is returned for each example; None for what was not asked for."""

    values: Any
    grad_norms: Any
    aux: Any


@dataclass(frozen=True)
class ClippedGrad:
    """A function that returns a sum of clipped gradients, and knows its sensitivity.

    ``clipped_grad`` makes it. It is called with the arguments of ``fun``, and with
    ``is_padding_example=``, an array (N,) of bools, True for rows that do not count.

    Attributes:
      fun: the function that a call runs.
      l2_norm_bound: the largest norm that one example contributes to the result, after
        the division by ``normalize_by``.
      has_aux: whether the result is a pair of the gradient and what is returned per
        example. That part has no privacy guarantee.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import privacy
    >>> loss = lambda p, x: (p - x) ** 2 / 2
    >>> clipped = privacy.clipped_grad(
    ...     loss, l2_clip_norm=2.0, normalize_by=4.0, keep_batch_dim=False
    ... )
    >>> print(clipped(1.0, jnp.array([0.0, 9.0])), clipped.sensitivity())
    -0.25 0.5
    """

    fun: Callable[..., Any]
    l2_norm_bound: float
    has_aux: bool

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The gradient, or the pair of it and what is returned per example."""
        return self.fun(*args, **kwargs)

    def sensitivity(self, neighboring_relation: Any = "replace_special") -> float:
        """The L2 sensitivity: how far the gradient moves if one example changes.

        Args:
          neighboring_relation: a ``dp_accounting.NeighboringRelation``, or its name:
            ``"add_or_remove_one"``, ``"replace_special"`` (an example is replaced by
            zero) or ``"replace_one"``, which counts twice.

        Returns:
          A Python float.

        Raises:
          ValueError: the relation is another one.

        >>> from pytree_grads import privacy
        >>> clipped = privacy.clipped_grad(lambda p, x: p * x, l2_clip_norm=3.0)
        >>> clipped.sensitivity("replace_one")
        6.0
        """
        name = str(getattr(neighboring_relation, "name", neighboring_relation)).upper()
        if name not in FACTORS:
            known = ", ".join(repr(name.lower()) for name in FACTORS)
            raise ValueError(
                f"neighboring_relation must be one of {known}, got "
                f"{neighboring_relation!r}"
            )
        return FACTORS[name] * self.l2_norm_bound


def clipped_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    l2_clip_norm: Any,
    rescale_to_unit_norm: bool = False,
    normalize_by: float = 1.0,
    batch_argnums: int | Sequence[int] = 1,
    keep_batch_dim: bool = True,
    return_values: bool = False,
    return_grad_norms: bool = False,
    microbatch_size: int | None = None,
    nan_safe: bool = True,
    dtype: Any = None,
    prng_argnum: int | None = None,
) -> ClippedGrad:
    """The sum of the clipped gradients of all examples, as ``jax_privacy`` has it.

    It replaces ``jax_privacy.clipped_grad``, and computes the sum from factors: it
    builds no gradient of an example. In addition, ``l2_clip_norm`` may be a tree of
    bounds. The options ``pre_clipping_transform`` and ``spmd_axis_name`` of jax_privacy
    do not exist here: put the first into ``fun``; sharded batches need no option. If a
    row holds a NaN or an infinity, the whole row counts as zero here; jax_privacy keeps
    its other entries.

    Args:
      fun: a function that returns a scalar loss of one example, or with ``has_aux`` a
        pair of that and auxiliary data.
      argnums: the positional argument, or arguments, to differentiate.
      has_aux: whether ``fun`` returns auxiliary data.
      l2_clip_norm: the bound, a number ≥ 0; or a prefix tree of the parameters, with a
        bound for each part, which are then clipped separately.
      rescale_to_unit_norm: whether clipped gradients are divided by their bound, which
        must be positive then.
      normalize_by: a number > 0 by which the sum is divided, such as the expected size
        of a batch. The sensitivity is divided by it too.
      batch_argnums: the positional arguments with a batch axis 0. Keyword arguments
        have one too.
      keep_batch_dim: whether ``fun`` is a function of a batch, which sees these
        arguments with a batch axis of length 1. Otherwise it is a function of one
        example, which sees them without that axis.
      return_values: whether to return the losses of the examples.
      return_grad_norms: whether to return the norms of the gradients before the clip.
      microbatch_size: how many examples to process at a time; it need not divide N.
      nan_safe: whether a row with a NaN or an infinity counts as zero. Otherwise it
        spoils the sum, even if it is padding.
      dtype: the dtype of the gradient, such as float32 for bfloat16 parameters; by
        default that of the parameters. Sums are carried in float32 or wider.
      prng_argnum: the positional argument that is a PRNG key, which is split into one
        for each example.

    Returns:
      A ``ClippedGrad``. Called, it returns a tree like the parameters; or a pair of it
      and a named tuple of ``values`` (N,), ``grad_norms`` (N,) and ``aux``, stacked, if
      any of these is asked for.

    Raises:
      TypeError: ``fun`` is not callable, or a bound or ``normalize_by`` is not a
        static real number, or ``dtype`` is no floating-point dtype; from the call,
        ``fun`` does not return a scalar.
      ValueError: a bound is negative or NaN, or zero if it is to be divided by;
        ``microbatch_size`` is not an int ≥ 1; bounds are no prefix of the parameters;
        ``normalize_by`` is not positive and finite; an argument is both differentiated
        and a batch; or from the call, ``is_padding_example`` does not have shape (N,).

    Source: Abadi et al., "Deep learning with differential privacy", 2016; McKenna et
      al., "JAX-Privacy", 2026.

    >>> import jax.numpy as jnp
    >>> from pytree_grads import privacy
    >>> loss = lambda p, x: jnp.mean((x - p) ** 2) / 2
    >>> clipped = privacy.clipped_grad(
    ...     loss, l2_clip_norm=jnp.inf, return_values=True, return_grad_norms=True
    ... )
    >>> grad, aux = clipped(3.0, jnp.array([0.0, 7.0, -2.0]))
    >>> print(grad, aux.values, aux.grad_norms)
    4.0 [ 4.5  8.  12.5] [3. 4. 5.]
    """
    if not callable(fun):
        raise TypeError(f"fun must be a function, got {fun!r}")
    bound = _bound(l2_clip_norm, rescale_to_unit_norm)
    batched = _argnums(argnums, batch_argnums, prng_argnum)
    _check_options(microbatch_size, dtype)
    divisor = _static("normalize_by", normalize_by)
    if not 0 < divisor < inf:
        raise ValueError(f"normalize_by must be above 0 and finite, got {divisor}")
    has_any_aux = has_aux or return_values or return_grad_norms

    def clipped(*args: Any, is_padding_example: Any = None, **kwargs: Any) -> Any:
        call = _Call(fun, argnums, batched, keep_batch_dim, has_aux, prng_argnum)
        args = call.with_keys(args)
        args, one_example = call.in_dtype(args, dtype)
        maker = value_and_jacobian if return_values else jacobian
        made = maker(
            one_example,
            argnums,
            in_axes=call.in_axes(args),
            has_aux=has_aux,
            chunk_size=microbatch_size,
        )(*args, **kwargs)
        J, values, aux = _sorted_out(made, return_values, has_aux)
        _check_one_loss(J, keep_batch_dim)
        _check_prefix(l2_clip_norm, args, argnums)
        weights = _weights(is_padding_example, len(J))
        total, norms = J.clipped_sum(l2_clip_norm, weights, nan_safe=nan_safe)
        if rescale_to_unit_norm:
            total = _divided_by_bounds(total, l2_clip_norm)
        total = jax.tree.map(lambda x: x / divisor, total)
        total = total if dtype is None else optax.tree.cast(total, dtype)
        if not has_any_aux:
            return total
        whole = _whole_norms(norms) if return_grad_norms else None
        aux = jax.tree.map(_without_axis, aux) if keep_batch_dim else aux
        return total, AuxiliaryOutput(values, whole, aux)

    return ClippedGrad(clipped, bound / divisor, has_any_aux)


def gaussian(
    clipped: Any,
    noise_multiplier: float,
    key: Any,
    *,
    neighboring_relation: Any = None,
    dtype: Any = None,
) -> optax.GradientTransformation:
    """Gaussian noise that matches the sensitivity of ``clipped``.

    The standard deviation is ``noise_multiplier * clipped.sensitivity(relation)``. So
    bound, divisor and noise cannot disagree: noise for a sum is not added to a mean. Do
    not scale the gradient between ``clipped`` and this transformation. After it,
    anything may follow in ``optax.chain``. With the same key it adds the noise that
    ``jax_privacy.noise_addition.gaussian_privatizer`` adds.

    Args:
      clipped: what made the gradients: a ``ClippedGrad``, or another object with a
        method ``sensitivity``, as ``jax_privacy.clipped_grad`` returns it.
      noise_multiplier: a static number ≥ 0, as accountants take it.
      key: one PRNG key for the noise of all steps.
      neighboring_relation: that of the accountant, as ``clipped.sensitivity`` takes it;
        None for its default.
      dtype: in which noise is drawn; that of each leaf by default.

    Returns:
      An ``optax.GradientTransformation``. Its state holds the key of the next step.

    Raises:
      TypeError: ``clipped`` has no method ``sensitivity``, ``noise_multiplier`` is not
        a static real number, or ``key`` is not one PRNG key; from ``update``, a
        gradient is not real.
      ValueError: ``noise_multiplier`` is negative or infinite, or the sensitivity is
        infinite.

    Source: Abadi et al., "Deep learning with differential privacy", 2016.

    >>> import jax, optax
    >>> from pytree_grads import privacy
    >>> loss = lambda p, x: (p - x) ** 2 / 2
    >>> clipped = privacy.clipped_grad(loss, l2_clip_norm=1.0, normalize_by=256.0)
    >>> noise = privacy.gaussian(clipped, 1.1, jax.random.key(0))
    >>> optimizer = optax.chain(noise, optax.adam(1e-3))
    >>> len(optimizer.init(0.0))
    2
    """
    if not callable(getattr(clipped, "sensitivity", None)):
        raise TypeError(
            "clipped must be what clipped_grad returned, which knows its sensitivity, "
            f"got {clipped!r}"
        )
    multiplier = _static("noise_multiplier", noise_multiplier)
    if not 0 <= multiplier < inf:
        raise ValueError(
            f"noise_multiplier must be ≥ 0 and finite, got {noise_multiplier}"
        )
    _check_key(key)
    relation = () if neighboring_relation is None else (neighboring_relation,)
    sensitivity = clipped.sensitivity(*relation)
    if multiplier and not np.isfinite(sensitivity):
        raise ValueError(f"the sensitivity is {sensitivity}: no noise hides an example")
    deviation = float(multiplier * sensitivity)

    def init(params: Any) -> tuple[Any, tuple[()]]:
        del params
        return key, ()

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        _check_real(updates)
        following, now = jax.random.split(state[0])
        normal = optax.tree.random_like(now, updates, jax.random.normal, dtype=dtype)
        noisy = jax.tree.map(
            lambda x, z: (x.astype(z.dtype) + deviation * z).astype(x.dtype),
            updates,
            normal,
        )
        return noisy, (following, ())

    return optax.GradientTransformation(init, update)


def _check_key(key: Any) -> None:
    dtype, ndim = getattr(key, "dtype", None), np.ndim(key)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    if not ((typed and ndim == 0) or (dtype == jnp.uint32 and ndim == 1)):
        raise TypeError(f"key must be one PRNG key, as jax.random.key(0), got {key!r}")


def _check_real(updates: Any) -> None:
    for path, x in jax.tree.leaves_with_path(updates):
        where = f"the gradient{jax.tree_util.keystr(path)}"
        if jnp.iscomplexobj(x):
            raise TypeError(
                f"{where} is complex, and complex normal noise has half the variance "
                "in each part: make the real and imaginary parts parameters of their "
                "own"
            )
        if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
            raise TypeError(
                f"{where} must be a floating-point array, got {jnp.result_type(x)}: "
                "pass what the clipped function returned"
            )


@dataclass(frozen=True)
class _Call:
    """One call's arguments as ``jacobian`` takes them."""

    fun: Callable[..., Any]
    argnums: int | Sequence[int]
    batched: tuple[int, ...]
    keep_batch_dim: bool
    has_aux: bool
    prng_argnum: int | None

    def with_keys(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """The arguments with a key for each example in place of the one key."""
        if len(args) <= max(self.batched):
            raise ValueError(
                f"batch_argnums names argument {max(self.batched)}, got {len(args)} "
                "positional arguments"
            )
        if self.prng_argnum is None:
            return args
        size = jax.tree.leaves(args[self.batched[0]])[0].shape[0]
        keys = jax.tree.map(
            lambda key: jax.random.split(key, size), args[self.prng_argnum]
        )
        return _replaced(args, self.prng_argnum, keys)

    def in_axes(self, args: tuple[Any, ...]) -> tuple[int | None, ...]:
        mapped = {*self.batched, self.prng_argnum}
        return tuple(0 if i in mapped else None for i in range(len(args)))

    def in_dtype(
        self, args: tuple[Any, ...], dtype: Any
    ) -> tuple[tuple[Any, ...], Callable[..., Any]]:
        """Parameters in the dtype of the gradient, and the function of one example.

        The function casts them back, so that it computes what it did. Parameters that
        are wider than that stay as they are.
        """

        def widened(x: Any) -> jax.Array:
            x = jnp.asarray(x)
            return (
                x.astype(dtype) if jnp.dtype(dtype).itemsize > x.dtype.itemsize else x
            )

        numbers = [self.argnums] if isinstance(self.argnums, int) else self.argnums
        narrow = {i: args[i] for i in numbers}
        if dtype is not None:
            for i in numbers:
                args = _replaced(args, i, jax.tree.map(widened, args[i]))

        def one_example(*args: Any, **kwargs: Any) -> Any:
            for i in numbers if dtype is not None else ():
                cast = jax.tree.map(
                    lambda x, like: x.astype(jnp.result_type(like)), args[i], narrow[i]
                )
                args = _replaced(args, i, cast)
            for i in self.batched if self.keep_batch_dim else ():
                args = _replaced(args, i, jax.tree.map(lambda x: x[None], args[i]))
            return self.fun(*args, **kwargs)

        return args, one_example


def _replaced(args: tuple[Any, ...], index: int, value: Any) -> tuple[Any, ...]:
    return (*args[:index], value, *args[index + 1 :])


def _static(name: str, value: Any) -> float:
    """A user's real number, known before tracing, as a Python float."""
    known = None if isinstance(value, Tracer) else np.asarray(value)
    kinds = jnp.floating, jnp.integer
    if (
        known is None
        or known.shape
        or not any(jnp.issubdtype(known.dtype, kind) for kind in kinds)
    ):
        raise TypeError(
            f"{name} must be a static real number, since the noise depends on it, got "
            f"{value!r}"
        )
    return float(known)


def _static_bound(value: Any) -> float:
    """A bound as a Python float."""
    if np.shape(value):
        raise TypeError(
            "l2_clip_norm must be a number, or a prefix tree of the parameters with a "
            f"number for each part, got an array of shape {np.shape(value)}"
        )
    return _static("l2_clip_norm", value)


def _bound(l2_clip_norm: Any, rescale: bool) -> float:
    """The norm that bounds a clipped row, from one bound or several."""
    bounds = [_static_bound(x) for x in jax.tree.leaves(l2_clip_norm)]
    if not bounds:
        raise ValueError("l2_clip_norm holds no bound")
    for bound in bounds:
        if isnan(bound) or bound < 0:
            raise ValueError(f"l2_clip_norm must not be negative or NaN, got {bound}")
        if rescale and not bound:
            raise ValueError(
                "rescale_to_unit_norm divides by the bound: l2_clip_norm must be "
                "positive, got 0; for gradients of norm 1, write a small bound, as 1e-8"
            )
    units = [1.0 if rescale else bound for bound in bounds]
    return units[0] if len(units) == 1 else sqrt(sum(unit**2 for unit in units))


def _argnums(argnums: Any, batch_argnums: Any, prng_argnum: Any) -> tuple[int, ...]:
    """The positions of batches, checked against the others."""
    ours = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    batched = (
        (batch_argnums,) if isinstance(batch_argnums, int) else tuple(batch_argnums)
    )
    if not batched:
        raise ValueError("batch_argnums must name at least one argument")
    others = () if prng_argnum is None else (prng_argnum,)
    if min(ours + batched + others) < 0:
        raise ValueError(
            f"argnums={argnums}, batch_argnums={batch_argnums} and "
            f"prng_argnum={prng_argnum} must not be negative"
        )
    if len({*ours, *batched, *others}) < len(ours + batched + others):
        raise ValueError(
            f"argnums={argnums}, batch_argnums={batch_argnums} and "
            f"prng_argnum={prng_argnum} must name different arguments"
        )
    return batched


def _sorted_out(made: Any, with_values: bool, has_aux: bool) -> tuple[Any, Any, Any]:
    """J, values and aux, of what ``jacobian`` or ``value_and_jacobian`` returned."""
    if not with_values:
        J, aux = made if has_aux else (made, None)
        return J, None, aux
    outputs, J = made
    values, aux = outputs if has_aux else (outputs, None)
    return J, values, aux


def _check_options(microbatch_size: Any, dtype: Any) -> None:
    is_int = isinstance(microbatch_size, int) and not isinstance(microbatch_size, bool)
    if microbatch_size is not None and not (is_int and microbatch_size > 0):
        raise ValueError(
            f"microbatch_size must be an int ≥ 1 or None, got {microbatch_size!r}"
        )
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(f"dtype must be a floating-point dtype or None, got {dtype!r}")


def _check_prefix(l2_clip_norm: Any, args: tuple[Any, ...], argnums: Any) -> None:
    """Raise unless bounds are a prefix tree of what is differentiated."""
    several = not isinstance(argnums, int)
    params = tuple(args[i] for i in argnums) if several else args[argnums]
    try:
        jax.tree.map(lambda *_: None, l2_clip_norm, params)
    except ValueError as error:
        raise ValueError(
            "l2_clip_norm must be a number, or a prefix tree of the parameters with a "
            f"number for each part: {error}"
        ) from error


def _check_one_loss(J: Jacobian, keep_batch_dim: bool) -> None:
    """Raise if an example has several rows: each is clipped, so their sum is not."""
    if len(J.shape) == 2:
        return
    seen = (
        "fun sees a batch of one example: return the mean of its losses, or write "
        "keep_batch_dim=False for a function of one example"
        if keep_batch_dim
        else "return one loss, as their sum or mean"
    )
    raise TypeError(
        f"fun must return a scalar loss, got shape {J.shape[1:-1]}, of which every "
        f"entry would be clipped by itself; {seen}"
    )


def _weights(is_padding_example: Any, count: int) -> Any:
    """A weight for each row: 0 for padding; None if there is none."""
    if is_padding_example is None:
        return None
    padding = jnp.asarray(is_padding_example)
    if padding.dtype != jnp.bool_:
        raise TypeError(
            f"is_padding_example must hold bools, True for padding, got {padding.dtype}"
        )
    if padding.shape != (count,):
        raise ValueError(
            f"is_padding_example must have shape ({count},), a bool for each example, "
            f"got {padding.shape}"
        )
    return jnp.where(padding, 0.0, 1.0).astype(jnp.float32)


def _divided_by_bounds(total: Any, bounds: Any) -> Any:
    """Each part of a sum divided by its own bound."""
    return jax.tree.map(
        lambda bound, part: jax.tree.map(lambda x: x / float(bound), part),
        bounds,
        total,
    )


def _whole_norms(norms: Any) -> jax.Array:
    """The norms of whole rows, (N,), in float32, from those of their parts."""
    parts = jax.tree.leaves(norms)
    whole = parts[0] if len(parts) == 1 else jnp.linalg.norm(jnp.stack(parts), axis=0)
    return whole.astype(jnp.float32)


def _without_axis(x: jax.Array) -> jax.Array:
    """Without the axis of length 1 that a function of a batch of one leaves."""
    return x[:, 0] if x.ndim >= 2 and x.shape[1] == 1 else x
