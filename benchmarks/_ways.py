"""Ways to a product with per-example gradients: ours, by each route, and the peers'.

A way takes a problem and the name of a product, and gives a function of the problem's
arguments.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from typing import Any

import jax
import jax.numpy as jnp
import optax
from _layers import Problem

from pytree_grads import jacobian
from pytree_grads._batches.batch import resolve
from pytree_grads._jacobian.jacobian import Jacobian
from pytree_grads._jacobian.kept import Kept
from pytree_grads._jacobian.origin import Origin
from pytree_grads._jacobian.outputs import Outputs
from pytree_grads._jacobian.source import Source

MAX_NORM = 1.0

PRODUCTS = {
    "clipped": "clipped sum and norms",
    "weighted": "weighted sum",
    "gram": "Gramian",
    "square": "sum of squares",
}


def ordinary(problem: Problem) -> Callable[..., Any]:
    """The gradient of the sum of the losses of the batch, which is mapped over."""

    def total(*args):
        return jnp.sum(jax.vmap(problem.fun, in_axes=problem.in_axes)(*args))

    return jax.grad(total)


def weights(problem: Problem) -> jax.Array:
    """Weights of the examples that a weighted sum takes."""
    return jnp.linspace(-1, 2, problem.size, dtype="float32")


# --------------------------------------------------------------------------------------
# Ours


def _product_of(J: Jacobian, problem: Problem, product: str) -> Any:
    match product:
        case "clipped":
            return J.clipped_sum(MAX_NORM)
        case "weighted":
            return J.weighted_sum(weights(problem))
        case "gram":
            return J.gram()
        case "square":
            return J.square_sum()
    raise ValueError(product)


def ours(problem: Problem, product: str, **options: Any) -> Callable[..., Any]:
    """The package as its users call it, with options of `jacobian`."""

    def run(*args):
        J = jacobian(problem.fun, in_axes=problem.in_axes, **options)(*args)
        return _product_of(J, problem, product)

    return run


def by_route(problem: Problem, product: str, route: Any) -> Callable[..., Any]:
    """The package with a route forced on all leaves."""

    def run(*args):
        batch = resolve(problem.fun, args, {}, 0, problem.in_axes)
        source = Source.of(
            problem.fun,
            batch,
            has_aux=False,
            chunk_size=None,
            many=False,
            runs_again=False,
        )
        trace = source.trace()
        outputs = Outputs.of(trace.output_avals)
        origin = Origin.of(source, outputs.rows(batch.size))
        J = Jacobian(Kept(origin, source.factor(trace, batch, route).leaves), outputs)
        return _product_of(J, problem, product)

    return run


ROUTES: dict[str, Callable[[Problem, str], Callable[..., Any]]] = {
    "auto": ours,
    "factored": partial(by_route, route="factored"),
    "materialised": partial(by_route, route="rows"),
    "8 at a time": partial(ours, chunk_size=8),
    "one at a time": partial(ours, chunk_size=1),
    "recompute": partial(ours, recompute=True),
}


# --------------------------------------------------------------------------------------
# The peers


def by_rows(problem: Problem, product: str) -> Callable[..., Any]:
    """All rows by `vmap(grad)`, and what one would write by hand after that."""

    def run(*args):
        rows = jax.vmap(jax.grad(problem.fun), in_axes=problem.in_axes)(*args)
        match product:
            case "clipped":
                norms = jax.vmap(optax.tree.norm)(rows)
                factors = jnp.minimum(1, MAX_NORM / norms)
                return jax.tree.map(lambda x: jnp.tensordot(factors, x, 1), rows), norms
            case "weighted":
                return jax.tree.map(
                    lambda x: jnp.tensordot(weights(problem), x, 1), rows
                )
            case "gram":
                flat = [x.reshape(problem.size, -1) for x in jax.tree.leaves(rows)]
                return sum(x @ x.T for x in flat)
            case "square":
                return jax.tree.map(lambda x: jnp.sum(x**2, axis=0), rows)
        raise ValueError(product)

    return run


def with_optax(problem: Problem, product: str) -> Callable[..., Any]:
    """optax's aggregate of `vmap(grad)`, without noise."""
    assert product == "clipped"

    def run(*args):
        rows = jax.vmap(jax.grad(problem.fun), in_axes=problem.in_axes)(*args)
        aggregate = optax.contrib.differentially_private_aggregate(
            MAX_NORM, 0.0, jax.random.key(0)
        )
        mean, _ = aggregate.update(rows, aggregate.init(args[0]))
        total = jax.tree.map(lambda x: x * problem.size, mean)
        return total, jax.vmap(optax.tree.norm)(rows)

    return run


def with_jax_privacy(
    problem: Problem, product: str, microbatch_size: int | None
) -> Callable[..., Any]:
    """jax_privacy's `clipped_grad`."""
    assert product == "clipped"
    from jax_privacy.clipping import clipped_grad

    clipped = clipped_grad(
        problem.fun,
        l2_clip_norm=MAX_NORM,
        batch_argnums=tuple(i for i, axis in enumerate(problem.in_axes) if axis == 0),
        keep_batch_dim=False,
        return_grad_norms=True,
        microbatch_size=microbatch_size,
    )

    def run(*args):
        total, aux = clipped(*args)
        return total, aux.grad_norms

    return run


def installed(module: str, package: str) -> str | None:
    """The version of a package, None if it is not there."""
    try:
        import_module(module)
        return metadata.version(package)
    except Exception:  # a peer that breaks on import is as good as none
        return None


PEERS: dict[str, Callable[[Problem, str], Callable[..., Any]]] = {
    "vmap(grad)": by_rows,
    "optax": with_optax,
    "jax_privacy": partial(with_jax_privacy, microbatch_size=None),
    "jax_privacy, 8": partial(with_jax_privacy, microbatch_size=8),
    "jax_privacy, 1": partial(with_jax_privacy, microbatch_size=1),
}


def peers_with(product: str, size: int) -> list[str]:
    """The peers that have a product, for a batch of that size."""
    found = ["vmap(grad)"]
    if product == "clipped":
        found.append("optax")
        if installed("jax_privacy", "jax_privacy"):
            found += (
                ["jax_privacy"]
                + ["jax_privacy, 8"] * (size % 8 == 0)
                + ["jax_privacy, 1"]
            )
    return found
