"""Which leaves are differentiated: what JAX, flax and equinox call parameters.

No framework is imported here: whoever passes its objects has imported it.
"""

import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .._jax.compat import is_reference
from .._trees.checks import (
    KeyPath,
    PyTree,
    describe,
    is_array,
    is_inexact,
    is_key,
    located,
)

_NNX_SPLIT = (
    "write graph, params, rest = nnx.split(model, nnx.Param, ...), differentiate by "
    "params, and "
    "call nnx.merge(graph, params, rest, copy=True) inside the function"
)
_ALSO_TRAINED = (
    "what is trained too can be an argument of its own, with the positions of both in "
    "argnums"
)
_BY_ITSELF = (
    "in training mode each example is normalised by itself (docs/howto/batch_norm.md)"
)
_ONE_KEY = (
    "a PRNG key that all examples share gives them the same random numbers, and "
    "jax.random.split(key, N) makes one for each, an argument of the batch"
)


def check_differentiable(name: str, tree: PyTree) -> None:
    """Raise a TypeError that names the first leaf that cannot be differentiated.

    It must be a floating-point array or number, and a leaf that flax would train: an
    ``nnx.Param`` in an nnx module or state, the collection ``params`` in the variables
    of linen.
    """
    _check_nnx(name, tree)
    _check_linen(name, tree)
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not is_inexact(leaf):
            raise TypeError(
                f"{located(name, path)} is differentiated and must be a real or "
                "complex "
                f"floating-point array, got {describe(leaf)}: "
                f"{_mend(name, tree, path, leaf)}"
            )


def _check_nnx(name: str, tree: PyTree) -> None:
    """Raise if a module holds no ``nnx.Param``, or a state both that and others.

    A state without any ``nnx.Param`` was selected on purpose, so it is accepted.
    """
    variable, module, state = _nnx_types()
    if not variable:
        return
    leaves: list[tuple[KeyPath, Any]] = []
    is_whole = False
    for path, node in _nodes(tree, (*variable, *module, *state)):
        if isinstance(node, (*variable, *module, *state)):
            is_whole |= isinstance(node, module)
            leaves += [(path + rest, leaf) for rest, leaf in _nodes(node, variable)]
    leaves = [(path, leaf) for path, leaf in leaves if jax.tree.leaves(leaf)]
    others = [(path, leaf) for path, leaf in leaves if not _is_nnx_param(leaf)]
    if others and (is_whole or len(others) < len(leaves)):
        path, leaf = others[0]
        kind = (
            f"an nnx.{type(leaf).__name__}"
            if isinstance(leaf, variable)
            else describe(leaf)
        )
        raise TypeError(
            f"{located(name, path)} is differentiated and must be an nnx.Param, as for "
            "nnx.grad, "
            f"got {kind}: {_NNX_SPLIT}; {_ALSO_TRAINED}"
            f"{_nnx_advice([leaf for _, leaf in others])}"
        )


def _nnx_advice(others: list[Any]) -> str:
    """What else the function must do, so that gradients are not silently wrong."""
    advice = ""
    if any(isinstance(x, _types("flax.nnx", "BatchStat")) for x in others):
        advice += f"; call model.eval() first: {_BY_ITSELF}"
    states = [x for x in others if isinstance(x, _types("flax.nnx", "RngState"))]
    if states:
        tags = sorted({getattr(x, "tag", "default") for x in states})
        keys = ", ".join(f"{tag}=key" for tag in tags)
        advice += (
            "; give each example a key and call nnx.reseed(net, "
            f"{keys}) on the merged net inside, or all examples share one mask"
        )
    return advice


def _check_linen(name: str, tree: PyTree) -> None:
    """Raise if the variables of a linen module hold a collection beside ``params``."""
    core = sys.modules.get("flax.core")
    if "flax.linen" not in sys.modules or core is None:
        return

    def is_variables(node: Any) -> bool:
        return isinstance(node, dict | core.FrozenDict) and isinstance(
            node.get("params"), Mapping
        )

    for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_variables):
        for key in node if is_variables(node) else ():
            if (
                key != "params"
                and isinstance(node[key], Mapping)
                and jax.tree.leaves(node[key])
            ):
                where = f"{name}{jax.tree_util.keystr(path)}"
                raise TypeError(
                    f"argument {where}[{key!r}] is differentiated, but flax trains the "
                    "collection "
                    f"'params' alone: differentiate by params = {where}['params'], and "
                    "call "
                    f"model.apply({{**{where}, 'params': params}}, ...) inside the "
                    f"function; {_ALSO_TRAINED}{_linen_advice(key)}"
                )


def _linen_advice(collection: str) -> str:
    if collection != "batch_stats":
        return ""
    return f"; give its BatchNorm use_running_average=True: {_BY_ITSELF}"


def _mend(name: str, tree: PyTree, path: KeyPath, leaf: Any) -> str:
    """What to write instead of differentiating with respect to a non-float leaf."""
    if is_reference(leaf):
        return "pass ref[...]"
    advice = f"; {_ONE_KEY}" if is_key(leaf) else ""
    return _mend_of_kind(name, tree, path, leaf) + advice


def _mend_of_kind(name: str, tree: PyTree, path: KeyPath, leaf: Any) -> str:
    if _holds(tree, sum(_nnx_types(), ())):
        return (
            f"make it an nnx.Variable of another kind than nnx.Param; then {_NNX_SPLIT}"
        )
    if _holds(tree, _types("equinox", "Module")):
        return (
            f"write params, static = eqx.partition({name}, eqx.is_inexact_array), "
            "differentiate by "
            "params, and call eqx.combine(params, static) inside the function"
        )
    if path:
        mend = (
            "move it to an argument that is not differentiated, with None in in_axes "
            "if all "
            "examples share it, or close over it in the function"
        )
    else:
        mend = "say in argnums which arguments are differentiated"
    is_number = is_array(leaf) and (
        jnp.issubdtype(leaf.dtype, jnp.integer) or jnp.issubdtype(leaf.dtype, jnp.bool)
    )
    if is_number or isinstance(leaf, int):
        mend += "; if it is trained, make it an array of a float dtype"
    return mend


def _nnx_types() -> tuple[tuple[type, ...], tuple[type, ...], tuple[type, ...]]:
    """The classes of nnx variables, of modules, and of states; empty without nnx."""
    return (
        _types("flax.nnx", "Variable"),
        _types("flax.nnx", "Module", "Pytree"),
        _types("flax.nnx", "State", "FlatState"),
    )


def _is_nnx_param(node: Any) -> bool:
    return isinstance(node, _types("flax.nnx", "Param"))


def _types(module: str, *names: str) -> tuple[type, ...]:
    """The classes of these names in a module; none where it was never imported."""
    found = [getattr(sys.modules.get(module), name, None) for name in names]
    return tuple(x for x in found if isinstance(x, type))


def _nodes(tree: PyTree, types: tuple[type, ...]) -> list[tuple[KeyPath, Any]]:
    """The topmost nodes of some classes, and the leaves outside, with key paths."""
    return jax.tree.leaves_with_path(tree, is_leaf=lambda x: isinstance(x, types))


def _holds(tree: PyTree, types: tuple[type, ...]) -> bool:
    return any(isinstance(node, types) for _, node in _nodes(tree, types))
