"""One call from K losses to the combined gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from .. import value_and_jacobian
from ._stateful import StatefulWeighting


def combined_value_and_grad(
    losses: Callable[..., Any],
    weighting: Callable[[Any], Any],
    *,
    heads: bool = False,
    has_aux: bool = False,
) -> Callable[..., Any]:
    """The values of K losses, and one gradient that a weighting combines from theirs.

    The gradients of the losses with respect to the parameters are the rows of J. The
    result is Jᵀw, with the weights w = weighting(JJᵀ).

    With ``heads``, the first argument is the trunk that all losses share, and the
    second holds the parameters that belong to single losses. The weighting looks at
    the trunk alone and weighs its gradients; each head gets the gradient of its own
    loss, with weight 1.

    Args:
      losses: a function ``losses(params, *args)``, or with ``heads``
        ``losses(trunk, heads, *args)``, that returns K losses as an array (K,).
      weighting: a function from a Gramian (K, K) to weights (K,), such as ``upgrad``;
        ``lambda gram: pcgrad(gram, key)`` if it takes more.
      heads: whether ``losses`` takes heads as its second argument.
      has_aux: whether ``weighting`` returns a pair of weights and auxiliary data, such
        as the next state: ``lambda gram: vaccine.update(gram, state)``.

    Returns:
      A function of the arguments of ``losses``. It returns ``(values, grads)``: the
      losses, (K,), and a tree like the parameters, or with ``heads`` a pair of trees
      like trunk and heads. With ``has_aux`` it returns ``((values, aux), grads)``.

    Raises:
      TypeError: an argument is not callable, or ``losses`` returns no floating-point
        array.
      ValueError: ``losses`` returns another shape than (K,), or ``weighting`` does not
        return K weights.

    Source: Quinton and Rey, "Jacobian descent for multi-objective optimization", 2024;
      heads as in Sener and Koltun, "Multi-task learning as multi-objective
      optimization", 2018.

    >>> import jax.numpy as jnp, numpy as np
    >>> from pytree_grads import weightings
    >>> losses = lambda p: jnp.array([[-4.0, 1.0, 1.0], [6.0, 1.0, 1.0]]) @ p
    >>> step = weightings.combined_value_and_grad(losses, weightings.upgrad)
    >>> values, grad = step(jnp.ones(3))
    >>> print(values, np.asarray(grad).round(4))
    [-2.  8.] [0.2924 1.9006 1.9006]
    """
    if isinstance(weighting, StatefulWeighting):
        raise TypeError(
            "weighting must be a function of a Gramian, got a StatefulWeighting w: "
            "write lambda gram: w.update(gram, state), and has_aux=True"
        )
    for name, value in (("losses", losses), ("weighting", weighting)):
        if not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}")

    def of_params(params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        values, gram, weighted_sum = _rows_of_losses(losses, params, args, kwargs)
        weights, aux = _weights(weighting, gram, has_aux)
        return ((values, aux) if has_aux else values), weighted_sum(weights)

    def of_trunk_and_heads(
        trunk: Any, heads: Any, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        result, shared = of_params(trunk, heads, *args, **kwargs)
        own = jax.grad(lambda h: losses(trunk, h, *args, **kwargs).sum())(heads)
        return result, (shared, own)

    return of_trunk_and_heads if heads else of_params


def _rows_of_losses(
    losses: Callable[..., Any], params: Any, args: Any, kwargs: Any
) -> tuple[jax.Array, jax.Array, Callable[[jax.Array], Any]]:
    """The K losses, the Gramian of their gradients, and sums of those by weights."""

    def checked(params: Any, *args: Any, **kwargs: Any) -> jax.Array:
        values = losses(params, *args, **kwargs)
        if not hasattr(values, "dtype") or not jnp.issubdtype(
            values.dtype, jnp.floating
        ):
            raise TypeError(
                f"losses must return K losses as one floating-point array (K,), got "
                f"{values!r}: write jnp.stack([...])"
            )
        if values.ndim != 1 or not values.size:
            raise ValueError(
                f"losses must return K > 0 losses as an array (K,), got shape "
                f"{values.shape}"
            )
        return values

    values, J = value_and_jacobian(checked, batched=False)(params, *args, **kwargs)
    return values, J.gram(), J.weighted_sum


def _weights(
    weighting: Callable[[Any], Any], gram: jax.Array, has_aux: bool
) -> tuple[jax.Array, Any]:
    found: Any = weighting(gram)
    is_pair = isinstance(found, tuple) and len(found) == 2
    if is_pair != has_aux:
        raise ValueError(
            f"weighting returned {type(found).__name__}: with has_aux=True it returns "
            "a pair of weights and auxiliary data, otherwise weights"
        )
    weights, aux = found if has_aux else (found, None)
    weights = jnp.asarray(weights)
    if weights.shape != gram.shape[:1]:
        raise ValueError(
            f"weighting must return {len(gram)} weights, one for each loss, got shape "
            f"{weights.shape}"
        )
    return weights, aux
