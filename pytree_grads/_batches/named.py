"""A name for the axis of examples, over which ``fun`` may use collectives."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap

from .._trees.checks import PyTree
from .batch import Batch
from .functions import Fun


def mapped(fun: Fun, batch: Batch, axis_name: str | None) -> tuple[PyTree, PyTree]:
    """``(values, aux)`` of all examples, whose axis may have a name.

    Values are stacked. So are the leaves of aux that may differ between examples; what
    is the same for all, such as running statistics, comes once.
    """
    if axis_name is None:
        return fun.mapped(batch)
    differ: set[int] = set()

    def one(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[PyTree, PyTree]:
        value, aux = fun(*args, **kwargs)
        leaves, treedef = jax.tree.flatten(aux)
        at = jax.lax.axis_index(axis_name)
        leaves = [_watched(differ, i)(jnp.asarray(x), at) for i, x in enumerate(leaves)]
        return value, jax.tree.unflatten(treedef, leaves)

    values, aux = batch.vmap(one, axis_name=axis_name)
    leaves, treedef = jax.tree.flatten(aux)
    once = [x if i in differ else x[0] for i, x in enumerate(leaves)]
    return values, jax.tree.unflatten(treedef, once)


def _watched(differ: set[int], i: int) -> Callable[..., jax.Array]:
    """The identity of a leaf; i is added if the leaf may differ between examples.

    The index of the example always differs, so the rule below is called by the axis of
    examples, and not by an axis of another ``jax.vmap`` around the call.
    """

    @custom_vmap
    def same(x: jax.Array, at: jax.Array) -> jax.Array:
        return x

    @same.def_vmap
    def rule(size: int, batched: list[bool], x: jax.Array, at: jax.Array) -> Any:
        if batched[0]:
            differ.add(i)
        return x, batched[0]

    return same
