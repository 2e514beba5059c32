"""Validators and the wording of errors."""

import functools
import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.compat import is_reference

PyTree = Any
KeyPath = tuple[Any, ...]


class NotATree:
    """A pytree whose leaves are factors of gradients: no tree to add or to scale."""


def is_array(leaf: Any) -> bool:
    """Whether a leaf is a JAX or NumPy array or scalar, or a tracer."""
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed PRNG keys, or likely one raw key (uint32)."""
    if not is_array(leaf):
        return False
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return True
    return leaf.dtype == np.uint32 and leaf.shape in ((2,), (4,))


def is_float0(leaf: Any) -> bool:
    """Whether a leaf is ``float0``, as ``jax.grad(allow_int=True)`` gives integers."""
    return getattr(leaf, "dtype", None) == jax.dtypes.float0


def is_inexact(leaf: Any) -> bool:
    """Whether a leaf is a floating or complex array, or a Python float or complex."""
    if is_array(leaf):
        return not is_float0(leaf) and jnp.issubdtype(leaf.dtype, jnp.inexact)
    return isinstance(leaf, float | complex)


def describe(value: Any) -> str:
    """Describe a value as JAX does: ``float32[4,3]``, or ``a value of type str``.

    >>> describe(np.zeros((4, 3), np.float32)), describe("relu"), describe(None)
    ('float32[4,3]', 'a value of type str', 'None')
    """
    if value is None:
        return "None"
    if not (hasattr(value, "shape") and hasattr(value, "dtype")):
        return f"a value of type {type(value).__name__}"
    if is_reference(value):
        return "a reference (jax.new_ref)"
    name = (
        "float0" if is_float0(value) else getattr(value.dtype, "name", str(value.dtype))
    )
    return f"{name}[{','.join(map(str, value.shape))}]"


def describe_node(tree: PyTree) -> str:
    """Describe the root of a tree: ``a list of length 3``, ``a dict`` or an array."""
    if jax.tree_util.all_leaves([tree]) or tree is None:
        return describe(tree)
    if isinstance(tree, list | tuple):
        return f"a {type(tree).__name__} of length {len(tree)}"
    return f"a {type(tree).__name__}"


def located(name: str, path: KeyPath) -> str:
    """The words ``argument trees[1]['w']`` for a name and a key path."""
    return f"argument {name}{jax.tree_util.keystr(path)}"


def argument_names(fun: Callable[..., Any], count: int) -> list[str]:
    """The names of the first ``count`` positional arguments of ``fun``."""
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # a builtin, or a callable that hides its signature
        parameters = ()
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p.name for p in parameters if p.kind in kinds][:count]
    return named + [f"args[{i}]" for i in range(len(named), count)]


def check_callable(fun: Any, name: str) -> None:
    """Raise a TypeError unless ``fun`` can be called."""
    if not callable(fun):
        raise TypeError(f"argument {name} must be a function, got {describe(fun)}")


def factors_error(name: str, tree: PyTree) -> TypeError | None:
    """The error for the first node of a tree that holds factors, or None."""
    is_factored = functools.partial(_is_a, NotATree)
    for path, node in jax.tree.leaves_with_path(tree, is_leaf=is_factored):
        if is_factored(node):
            return TypeError(
                f"{located(name, path)} is a Jacobian, and a Jacobian holds factors, "
                "not gradients: pass J.sum(), J.mean() or J.to_rows()"
            )
    return None


def check_no_factors(name: str, tree: PyTree) -> None:
    """Raise a TypeError if a Jacobian stands where a tree of arrays is meant."""
    error = factors_error(name, tree)
    if error is not None:
        raise error


def _is_a(kind: type, node: Any) -> bool:
    return isinstance(node, kind)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise unless ``chunk_size`` is None or a positive int."""
    if chunk_size is None:
        return
    if isinstance(chunk_size, bool) or not isinstance(chunk_size, int | np.integer):
        raise TypeError(
            "argument chunk_size must be None or an int (it is static), got "
            f"{describe(chunk_size)}"
        )
    if chunk_size < 1:
        raise ValueError(f"argument chunk_size must be at least 1, got {chunk_size}")


def check_key(key: Any) -> None:
    """Raise a TypeError unless ``key`` is one PRNG key, typed or raw (uint32)."""
    if isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        is_key = key.shape == ()
    else:
        is_key = is_array(key) and key.dtype == np.uint32 and key.ndim == 1
    if not is_key:
        raise TypeError(
            "argument key must be a PRNG key as jax.random.key makes it, got "
            f"{describe(key)}"
        )


def check_bool(name: str, flag: Any) -> None:
    """Raise unless a static option is a bool."""
    if not isinstance(flag, bool | np.bool_):
        raise TypeError(f"argument {name} must be a bool (it is static), got {flag!r}")


def positive_int(name: str, number: int) -> int:
    """A static argument as a positive int."""
    try:
        found = operator.index(number)
    except TypeError:
        raise TypeError(
            f"argument {name} must be an int (it is static), got {number!r}"
        ) from None
    if found < 1:
        raise ValueError(f"argument {name} must be at least 1, got {found}")
    return found


def given_argnums(argnums: int | Sequence[int], mend: str = "") -> tuple[int, ...]:
    """``argnums`` as a tuple, or a TypeError that ends in what to write instead."""
    try:
        if isinstance(argnums, Sequence):
            return tuple(operator.index(i) for i in argnums)
        return (operator.index(argnums),)
    except TypeError:
        raise TypeError(
            "argument argnums must be an int or a tuple of ints, got "
            f"{describe_node(argnums)}{mend}"
        ) from None


def normalize_argnums(argnums: int | Sequence[int], count: int) -> tuple[int, ...]:
    """``argnums`` as distinct positions, 0 or more, among ``count`` arguments.

    >>> normalize_argnums((0, -1), 3)
    (0, 2)
    """
    given = given_argnums(argnums)
    if not given:
        raise ValueError(
            "argument argnums is empty: name at least one argument to differentiate"
        )
    for i in given:
        if not -count <= i < count:
            came = f"{count} came"
            if not count:
                came = "the call passed no positional arguments"
            raise ValueError(
                f"argument argnums={argnums!r} needs a positional argument {i}, but "
                f"{came} (an argument that is differentiated cannot be passed by "
                "keyword)"
            )
    positions = tuple(i % count for i in given)
    if len(set(positions)) < len(positions):
        raise ValueError(f"argument argnums={argnums!r} names the same argument twice")
    return positions


def check_arrays(name: str, tree: PyTree) -> None:
    """Raise a TypeError that names the first leaf that is not an array to JAX."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        try:
            jax.typeof(leaf)
        except TypeError:
            where = f"{name}{jax.tree_util.keystr(path)}"
            raise TypeError(
                f"{where} must be an array or a number, got {describe(leaf)}"
            ) from None


def check_tree_of_numbers(name: str, tree: PyTree) -> None:
    """Raise a TypeError that names the first leaf that holds no numbers."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        is_integer = is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.integer)
        if not (is_inexact(leaf) or is_integer or isinstance(leaf, int)):
            raise TypeError(
                f"{located(name, path)} must hold numbers, got {describe(leaf)}"
            )


def check_scalar(value: Any, what: str, mend: str) -> None:
    """Raise unless ``value`` is a real floating scalar, as ``jax.grad`` needs."""
    if describe_node(value) in ("a tuple of length 2", "a list of length 2"):
        option = "outer_has_aux=True" if what.endswith("outer") else "has_aux=True"
        mend = f"{option} takes a pair (value, aux), and differentiates the value alone"
    if not is_inexact(value):
        raise TypeError(
            f"{what} must be a floating-point scalar, got {describe(value)}: {mend}"
        )
    if jnp.iscomplexobj(value):
        raise TypeError(
            f"{what} must be real, got {describe(value)}: take its real part, or abs"
        )
    if jnp.shape(value):
        raise ValueError(f"{what} must be a scalar, got {describe(value)}: {mend}")


def check_outer_value(value: Any) -> None:
    """Raise unless an outer function returned a real floating-point scalar."""
    mend = (
        "outer maps the stacked outputs to one scalar, by a sum or a mean for instance"
    )
    check_scalar(value, "the value of outer", mend)


def split_aux(result: Any, has_aux: bool, what: str) -> tuple[Any, Any]:
    """Split a result into ``(value, aux)``; without ``has_aux``, ``aux`` is None."""
    if not has_aux:
        return result, None
    if not (isinstance(result, list | tuple) and len(result) == 2):
        raise TypeError(
            f"{what} must be a pair (value, aux) with has_aux, got "
            f"{describe_node(result)}"
        )
    value, aux = result
    return value, aux


def like(fun: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that gives a function the name and the signature of ``fun``."""
    names = ("__module__", "__name__", "__qualname__")
    return functools.wraps(fun, assigned=names, updated=())


def check_matching(
    expected: PyTree,
    got: PyTree,
    expected_name: str,
    got_name: str,
    *,
    dtypes: bool = True,
) -> None:
    """Raise a ValueError at the first leaf where two trees differ.

    Args:
      expected: a tree of arrays, or of their shapes and dtypes.
      got: the tree to check.
      expected_name: the name of the first in messages.
      got_name: the name of the second in messages.
      dtypes: whether dtypes must be equal. If not, leaves must be both real or both
        complex.
    """
    if not _same_structure(expected, got):
        path, clause = structure_difference(expected, got)
        raise ValueError(
            f"{located(got_name, path)} does not match {expected_name}"
            f"{jax.tree_util.keystr(path)}: {clause}"
        )
    for (path, want), have in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        kinds = [x.dtype if dtypes else jnp.iscomplexobj(x) for x in (want, have)]
        if want.shape == have.shape and kinds[0] == kinds[1]:
            continue
        mend = (
            "trees are never broadcast; reshape one of them"
            if want.shape != have.shape
            else "nothing is cast silently; cast one tree with optax.tree.cast"
        )
        raise ValueError(
            f"{located(got_name, path)} does not match {expected_name}"
            f"{jax.tree_util.keystr(path)}: expected {describe(want)}, "
            f"got {describe(have)} ({mend})"
        )


def structure_difference(expected: PyTree, got: PyTree) -> tuple[KeyPath, str]:
    """The key path where two trees do not branch alike, and how they differ there."""
    return _difference(expected, got, _same_structure)


def prefix_difference(prefix: PyTree, tree: PyTree) -> tuple[KeyPath, str]:
    """The key path where `prefix` is no prefix of `tree`, and how they differ there."""
    return _difference(tree, prefix, lambda x, y: _is_prefix(y, x))


def _same_structure(x: PyTree, y: PyTree) -> bool:
    return jax.tree.structure(x) == jax.tree.structure(y)


def _is_prefix(prefix: PyTree, tree: PyTree) -> bool:
    try:
        jax.tree.broadcast(prefix, tree)
    except ValueError:
        return False
    return True


def _one_level(tree: PyTree) -> tuple[list[tuple[KeyPath, Any]], Any]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: x is not tree)


def _difference(
    expected: PyTree, got: PyTree, alike: Callable[[PyTree, PyTree], bool]
) -> tuple[KeyPath, str]:
    """The key path of the first node that is not `alike`, and how it differs."""
    path: KeyPath = ()
    while True:
        wanted, node = _one_level(expected)
        found, other = _one_level(got)
        if node != other:
            return path, _node_difference(expected, got)
        pairs = zip(wanted, found, strict=True)
        key, expected, got = next(
            (key, x, y) for (key, x), (_, y) in pairs if not alike(x, y)
        )
        path += key


def _node_difference(expected: PyTree, got: PyTree) -> str:
    if type(expected) is type(got):
        if isinstance(expected, dict):
            missing = [k for k in expected if k not in got]
            surplus = [k for k in got if k not in expected]
            if missing or surplus:
                kinds = [("missing keys", missing), ("unexpected keys", surplus)]
                return ", ".join(f"{kind} {keys}" for kind, keys in kinds if keys)
            return "the same keys in another order"
        if isinstance(expected, list | tuple):
            return f"expected {describe_node(expected)}, got {describe_node(got)}"
        return f"two {type(expected).__name__} nodes whose static data differ"
    return f"expected {describe_node(expected)}, got {describe_node(got)}"
