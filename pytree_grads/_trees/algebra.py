"""Strict algebra of trees: no broadcast, no silent cast, sums in float32 or wider."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._jax.compat import is_reference
from .checks import (
    PyTree,
    check_matching,
    check_tree_of_numbers,
    describe,
    factors_error,
    is_array,
    is_float0,
    is_inexact,
    located,
)


def carried_dtype(dtype: Any) -> np.dtype:
    """The accumulation dtype of a leaf: float32, or its own dtype if that is wider.

    >>> [carried_dtype(x).name for x in (jnp.bfloat16, jnp.float64, jnp.complex64)]
    ['float32', 'float64', 'complex64']
    """
    if jnp.finfo(dtype).bits < 32:
        return jnp.dtype(jnp.float32)
    return jnp.dtype(dtype)


def common_dtype(*dtypes: Any) -> np.dtype:
    """The narrowest dtype that can accumulate all of these, with or without x64."""
    return np.result_type(*map(carried_dtype, dtypes))


def widened(dtype: Any) -> np.dtype:
    """The dtype to keep a coefficient in: floating or complex, float32 or wider."""
    return carried_dtype(dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32)


def map_inexact(fun: Callable[..., Any], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` that leaves ``float0`` leaves as they are."""
    return jax.tree.map(lambda x, *xs: x if is_float0(x) else fun(x, *xs), tree, *rest)


def carry(tree: PyTree) -> PyTree:
    """Cast every leaf to its accumulation dtype."""
    return map_inexact(lambda x: jnp.asarray(x, carried_dtype(x.dtype)), tree)


def round_like(tree: PyTree, like: PyTree) -> PyTree:
    """Cast every leaf to the dtype of the corresponding leaf of ``like``."""
    return map_inexact(lambda x, y: x.astype(y.dtype), tree, like)


def carried_reals(*trees: PyTree) -> set[np.dtype]:
    """The real accumulation dtypes of all leaves, which coefficients multiply."""
    dtypes = {leaf.dtype for leaf in jax.tree.leaves(trees) if hasattr(leaf, "dtype")}
    return {
        real_part(carried_dtype(d)) for d in dtypes if jnp.issubdtype(d, jnp.inexact)
    }


def real_part(dtype: Any) -> np.dtype:
    """The dtype of the real part of a floating or complex dtype, canonical for JAX."""
    return jnp.finfo(jax.dtypes.canonicalize_dtype(dtype)).dtype


def floating(
    name: str, numbers: Any, meets: Collection[Any], *, real: bool = False
) -> Any:
    """Convert numbers from the user to a floating array, as wide as a product needs.

    NumPy converts Python and NumPy numbers in one step; JAX would first cut an int64 to
    32 bits. After that, an int, a float64 and a float32 look the same to ``jax.jit``,
    which does not compile again.

    Args:
      name: the name of the numbers in messages.
      numbers: a number, an array, or nested sequences of Python or NumPy numbers.
      meets: the real dtypes that the numbers are multiplied with.
      real: whether to refuse complex numbers and booleans.

    Returns:
      A floating array in the widest of the dtypes, or a complex one if the numbers are.

    Raises:
      TypeError: ``numbers`` holds no numbers, or complex ones or booleans if `real`.
      ValueError: a finite Python or NumPy number is infinite in one of the dtypes; or a
        sequence is ragged, or holds traced numbers.

    >>> floating("c", [1, 2], {jnp.dtype("float32")})
    array([1., 2.], dtype=float32)
    """
    array = numbers if isinstance(numbers, jax.Array) else _host_array(name, numbers)
    what = array if isinstance(numbers, list | tuple) else numbers
    if real and not any(
        jnp.issubdtype(array.dtype, kind) for kind in (jnp.floating, jnp.integer)
    ):
        kind = "hold real numbers" if array.ndim else "be a real number"
        is_mask = array.ndim and array.dtype == bool
        mend = ": give mask.astype(jnp.float32)" if is_mask else ""
        raise TypeError(f"{name} must {kind}, got {describe(what)}{mend}")
    check_numbers(name, array, what)
    dtypes = meets or {jnp.zeros(()).dtype}
    dtype = np.result_type(*dtypes)
    if jnp.iscomplexobj(array):
        dtype = np.result_type(carried_dtype(dtype), np.complex64)
    if isinstance(array, np.ndarray):
        _check_range(name, array, min(dtypes, key=lambda d: float(jnp.finfo(d).max)))
    return array if array.dtype == dtype else array.astype(dtype)


def _host_array(name: str, numbers: Any) -> np.ndarray:
    """Python and NumPy numbers as an array; ints of more than 64 bits become floats."""
    try:
        array = np.asarray(numbers)
    except (ValueError, jax.errors.TracerArrayConversionError):
        # Ragged, or tracers in lists.
        raise ValueError(
            f"{name} must be a sequence of K scalars, or one array of shape (K,) or "
            "(M, K), "
            f"got {numbers!r}"
        ) from None
    kinds = complex | float | int | np.number
    if array.dtype == object and all(isinstance(x, kinds) for x in array.flat):
        try:
            array = array.astype(
                complex if any(map(np.iscomplexobj, array.flat)) else float
            )
        except OverflowError:
            raise ValueError(
                f"{name} must fit a float, got an int that is too large"
            ) from None
    return array


def _check_range(name: str, array: np.ndarray, dtype: Any) -> None:
    """Raise a ValueError if a finite number is infinite in a real dtype."""
    wide = array.astype(complex if np.iscomplexobj(array) else float)
    with np.errstate(over="ignore", invalid="ignore"):
        lost = [
            np.isfinite(x) & ~np.isfinite(x.astype(dtype))
            for x in (np.real(wide), np.imag(wide))
        ]
    if np.any(lost):
        raise ValueError(
            f"{name} must fit {jnp.dtype(dtype).name}, the dtype of what it meets (at "
            "most "
            f"{float(jnp.finfo(dtype).max):.3g}), got "
            f"{wide[lost[0] | lost[1]].flat[0]:.6g}"
        )


def floating_like(
    name: str, tree: PyTree, like: PyTree, like_name: str, *, carried: bool
) -> PyTree:
    """Convert a tree of numbers from the user to floating arrays, as `like` has them.

    Args:
      name: the name of the tree in messages.
      tree: a tree of numbers or arrays, of the structure of `like`.
      like: a tree of arrays.
      like_name: its name in messages.
      carried: whether each leaf gets the accumulation dtype of its counterpart. If not,
        integers and Python numbers get the dtype of their counterpart, and floating
        arrays keep their own.

    Raises:
      TypeError: a leaf does not hold numbers.
      ValueError: the trees differ in structure, or a number is too large.
    """
    check_tree_of_numbers(name, tree)
    if jax.tree.structure(tree) != jax.tree.structure(like):
        check_matching(like, tree, like_name, name)

    def convert(path: Any, x: Any, y: jax.Array) -> jax.Array:
        dtype = carried_dtype(y.dtype) if carried else y.dtype
        if not carried and is_array(x) and is_inexact(x):
            dtype = x.dtype
        return jnp.asarray(floating(located(name, path), x, {real_part(dtype)}))

    return jax.tree.map_with_path(convert, tree, like)


def check_numbers(name: str, array: Any, what: Any) -> None:
    """Raise a TypeError about `what` unless an array holds numbers or booleans."""
    if not (jnp.issubdtype(array.dtype, jnp.number) or array.dtype == bool):
        raise TypeError(f"{name} must hold numbers, got {describe(what)}")


def check_real_leaves(coefficients: Any, name: str, tree: PyTree, what: str) -> None:
    """Raise a TypeError if complex coefficients meet a real leaf."""
    if not jnp.iscomplexobj(coefficients):
        return
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not (is_float0(leaf) or jnp.iscomplexobj(leaf)):
            raise TypeError(
                f"{what} is complex, but {located(name, path)} is real "
                f"({describe(leaf)}): the "
                "result would not fit its dtype; cast the tree to complex with "
                "optax.tree.cast, or "
                "combine real and imaginary parts apart"
            )


def scale(
    coefficient: jax.Array, leaf: jax.Array, op: Callable = jnp.multiply
) -> jax.Array:
    """Broadcast ``op(coefficient, leaf)`` over a leaf, in the leaf's dtype.

    A real coefficient is applied to the real and the imaginary part of a complex leaf
    separately. As a complex number it would turn an infinity into NaN.
    """
    if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(coefficient):
        part = coefficient.astype(leaf.real.dtype)
        return jax.lax.complex(op(part, leaf.real), op(part, leaf.imag))
    return op(coefficient.astype(leaf.dtype), leaf)


def divide_by(divisor: jax.Array, leaf: jax.Array) -> jax.Array:
    """``leaf / divisor``, as an ``op`` for ``scale``."""
    return leaf / divisor


def contract(coefficients: jax.Array, leaf: jax.Array) -> jax.Array:
    """Contract the last axis of ``coefficients`` with the first of ``leaf``.

    Args:
      coefficients: (..., K).
      leaf: (K, *shape).

    Returns:
      An array (..., *shape) in the accumulation dtype of the leaf.
    """
    leaf = leaf.astype(carried_dtype(leaf.dtype))
    if jnp.iscomplexobj(leaf) and not jnp.iscomplexobj(coefficients):
        return jax.lax.complex(
            contract(coefficients, leaf.real), contract(coefficients, leaf.imag)
        )
    return jnp.tensordot(
        coefficients.astype(leaf.dtype),
        leaf,
        axes=([-1], [0]),
        precision=jax.lax.Precision.HIGHEST,
    )


def inner(left: PyTree, right: PyTree) -> jax.Array:
    """The inner product of trees in their accumulation dtypes; conjugates ``left``."""
    # A product and a sum are as fast as a dot, and take leaves that are sharded over
    # Explicit mesh axes too.
    parts = [
        jnp.sum(jnp.conj(x) * y)
        for x, y in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True)
        if not is_float0(x)
    ]
    dtype = np.result_type(np.float32, *(part.dtype for part in parts))
    return sum((part.astype(dtype) for part in parts), start=jnp.zeros((), dtype))


def norm(tree: PyTree) -> jax.Array:
    """The Euclidean norm of a tree in its accumulation dtypes.

    Its derivative at 0 is 0. The entries are first divided by the largest, so that
    squares neither overflow nor underflow.
    """
    leaves = [x for x in jax.tree.leaves(tree) if not is_float0(x)]
    parts = [
        p for x in leaves for p in ((x.real, x.imag) if jnp.iscomplexobj(x) else (x,))
    ]
    dtype = np.result_type(np.float32, *(part.dtype for part in parts))
    largest = jnp.zeros((), dtype)
    for part in parts:
        peak = jnp.max(jnp.abs(jax.lax.stop_gradient(part)), initial=0.0)
        largest = jnp.maximum(largest, peak.astype(dtype))
    # Neither the unit nor its reciprocal may be subnormal, since XLA flushes those to
    # zero.
    tiny = jnp.finfo(dtype).tiny
    unit = jnp.clip(largest, tiny, 1 / tiny)
    squares = [jnp.sum(jnp.square(p.astype(dtype) / unit)) for p in parts]
    square = sum(squares, start=jnp.zeros((), dtype))
    is_zero = square == 0
    return jnp.where(is_zero, 0.0, unit * jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def summing_error(name: str, tree: PyTree) -> TypeError | None:
    """The error for the first leaf of a tree that cannot be summed, or None."""
    factors = factors_error(name, tree)
    if factors is not None:
        return factors
    for path, leaf in jax.tree.leaves_with_path(tree):
        if is_inexact(leaf) or is_float0(leaf):
            continue
        mend = (
            "leave it out of the tree (eqx.filter, eqx.partition, or a dict without it)"
        )
        if is_reference(leaf):
            mend = "pass ref[...]"
        dtype = leaf.dtype if is_array(leaf) else type(leaf)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            kind = "an array of PRNG keys"
        elif any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, np.bool_)):
            kind = "an integer or boolean"
            mend = f"cast it with optax.tree.cast, or {mend}"
        else:
            kind = "not an array of numbers" if is_array(leaf) else "not an array"
        return TypeError(
            f"{located(name, path)} is {kind} ({describe(leaf)}), and only real or "
            "complex "
            f"floating-point leaves can be combined: {mend}"
        )
    return None


def check_summable(name: str, tree: PyTree) -> None:
    """Raise a TypeError unless every leaf of a tree can be summed."""
    error = summing_error(name, tree)
    if error is not None:
        raise error


def check_all_matching(name: str, trees: Sequence[PyTree]) -> None:
    """Raise unless trees can be summed and agree in structure, shapes and dtypes."""
    for i, tree in enumerate(trees):
        check_summable(f"{name}[{i}]", tree)
        check_matching(trees[0], tree, f"{name}[0]", f"{name}[{i}]")


def call(jitted: Callable[..., Any], *args: Any, **trees: PyTree) -> Any:
    """Call a jitted function, with a clear error for a leaf that ``jax.jit`` refuses.

    The checks inside ``jitted`` run while it is traced and cost nothing later, but they
    never see a leaf that is not an array.
    """
    try:
        return jitted(*args, **trees)
    except TypeError as error:
        clearer = (summing_error(name, tree) for name, tree in trees.items())
        raise next((e for e in clearer if e is not None), error) from None
