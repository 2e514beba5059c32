"""The strict algebra of trees: no broadcasting, no silent cast, sums in float32 or wider."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._checks import PyTree, check_matching, describe, is_float0, located


def carried_dtype(dtype: Any) -> np.dtype:
    """The dtype in which sums of a leaf are carried: float32, or the leaf's own if it is wider.

    >>> carried_dtype(jnp.bfloat16), carried_dtype(jnp.float64), carried_dtype(jnp.complex64)
    (dtype('float32'), dtype('float64'), dtype('complex64'))
    """
    if jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def carry(tree: PyTree) -> PyTree:
    """Every leaf in its carried dtype; ``float0`` leaves stay as they are."""
    return jax.tree.map(
        lambda x: x if is_float0(x) else jnp.asarray(x, carried_dtype(x.dtype)), tree
    )


def round_like(tree: PyTree, like: PyTree) -> PyTree:
    """Every leaf cast, once, to the dtype of its counterpart in ``like``."""
    return jax.tree.map(lambda x, y: x if is_float0(x) else x.astype(y.dtype), tree, like)


def add(left: PyTree, right: PyTree) -> PyTree:
    """The sum of two trees that were checked to match; ``float0`` leaves stay as they are."""
    return jax.tree.map(lambda x, y: x if is_float0(x) else x + y, left, right)


def scale(coefficient: jax.Array, leaf: jax.Array) -> jax.Array:
    """``coefficient * leaf`` in the leaf's dtype, broadcasting the coefficient over the leaf.

    A real coefficient multiplies the parts of a complex leaf one by one: promoting it to complex
    would turn an infinity into NaN.
    """
    if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(coefficient):
        part = coefficient.astype(leaf.real.dtype)
        return jax.lax.complex(part * leaf.real, part * leaf.imag)
    return coefficient.astype(leaf.dtype) * leaf


def check_summable(name: str, tree: PyTree) -> None:
    """Raise a TypeError that names the first leaf which has no place in a sum of gradients."""
    for path, leaf in jax.tree.leaves_with_path(tree):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None:
            kind = "is not an array"
        elif is_float0(leaf) or jnp.issubdtype(dtype, jnp.inexact):
            continue
        elif jnp.issubdtype(dtype, jax.dtypes.prng_key):
            kind = "is an array of PRNG keys"
        else:
            kind = "is an integer or boolean array"
        raise TypeError(
            f"{located(name, path)} {kind} ({describe(leaf)}), and only real or complex "
            "floating-point leaves can be combined: cast it with optax.tree.cast, or leave it out "
            "of the tree (eqx.partition, optax.tree.map_params or a dict without it)"
        )


def check_all_matching(name: str, trees: Sequence[PyTree]) -> None:
    """Raise unless the trees agree in structure, shape and dtype and hold only summable leaves."""
    for i, tree in enumerate(trees):
        check_summable(f"{name}[{i}]", tree)
        check_matching(trees[0], tree, f"{name}[0]", f"{name}[{i}]")
