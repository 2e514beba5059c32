"""Operator syntax for trees: ``2 * p1 * Vector(g1) + 2 * p2 * Vector(g2)``."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from . import algebra
from .checks import (
    NotATree,
    PyTree,
    check_matching,
    check_no_factors,
    describe,
    is_array,
    is_float0,
)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["tree"], meta_fields=["dtypes"]
)
@dataclass(frozen=True)
class _Carried:
    """A tree whose leaves may be wider than the dtypes they were declared with."""

    tree: PyTree
    dtypes: tuple[np.dtype, ...] | None = (
        None  # declared, leaf by leaf; None: as the leaves are
    )

    def declared_dtypes(self) -> tuple[np.dtype, ...]:
        return self.dtypes or tuple(leaf.dtype for leaf in jax.tree.leaves(self.tree))

    def declared(self) -> PyTree:
        """The shapes and declared dtypes of the leaves."""
        leaves, treedef = jax.tree.flatten(self.tree)
        pairs = zip(leaves, self.declared_dtypes(), strict=True)
        return jax.tree.unflatten(
            treedef, [jax.ShapeDtypeStruct(x.shape, d) for x, d in pairs]
        )

    def widened(self) -> "_Carried":
        """Cast every leaf to its accumulation dtype."""
        wide, dtypes = algebra.carry(self.tree), self.declared_dtypes()
        is_wider = tuple(leaf.dtype for leaf in jax.tree.leaves(wide)) != dtypes
        return _Carried(wide, dtypes if is_wider else None)


def _jitted(fun: Callable[..., Any]) -> Callable[..., Any]:
    """Compile ``fun(*scalars, left[, right])`` with checks of the operands."""

    @functools.partial(jax.jit, inline=True)
    def checked(*scalars: jax.Array, **operands: _Carried) -> Any:
        for name, operand in operands.items():
            algebra.check_summable(f"{name}.tree", operand.tree)
        if "right" in operands:
            left, right = operands["left"].declared(), operands["right"].declared()
            check_matching(left, right, "left.tree", "right.tree")
        wide = {name: operand.widened() for name, operand in operands.items()}
        return fun(*scalars, **wide)

    return functools.partial(algebra.call, checked)


@_jitted
def _added(left: _Carried, right: _Carried) -> _Carried:
    return _Carried(algebra.map_inexact(jnp.add, left.tree, right.tree), left.dtypes)


@_jitted
def _subtracted(left: _Carried, right: _Carried) -> _Carried:
    return _Carried(
        algebra.map_inexact(jnp.subtract, left.tree, right.tree), left.dtypes
    )


@_jitted
def _scaled(scalar: jax.Array, left: _Carried) -> _Carried:
    return _apply_scalar(jnp.multiply, scalar, left)


@_jitted
def _divided(scalar: jax.Array, left: _Carried) -> _Carried:
    return _apply_scalar(algebra.divide_by, scalar, left)


def _apply_scalar(
    op: Callable[..., jax.Array], scalar: jax.Array, vector: _Carried
) -> _Carried:
    if scalar.shape:
        raise ValueError(
            f"a Vector is scaled by a scalar, got {describe(scalar)}: "
            "linear_combination takes a "
            "matrix of coefficients for many combinations at once"
        )
    algebra.check_real_leaves(scalar, "left.tree", vector.tree, "the scalar")
    scale = functools.partial(algebra.scale, scalar, op=op)
    return _Carried(algebra.map_inexact(scale, vector.tree), vector.dtypes)


@_jitted
def _inner(left: _Carried, right: _Carried) -> jax.Array:
    return algebra.inner(left.tree, right.tree)


@_jitted
def _norm(left: _Carried) -> jax.Array:
    return algebra.norm(left.tree)


@functools.partial(jax.jit, inline=True)
def _rounded(vector: _Carried) -> PyTree:
    leaves, treedef = jax.tree.flatten(vector.tree)
    pairs = zip(leaves, vector.declared_dtypes(), strict=True)
    return jax.tree.unflatten(
        treedef, [x if is_float0(x) else x.astype(dtype) for x, dtype in pairs]
    )


@jax.tree_util.register_pytree_with_keys_class
class Vector:
    """A tree of arrays as an element of a vector space.

    Every operator is one compiled call over the whole tree. From one operator to the
    next, a leaf is carried in its accumulation dtype: float32, or its own dtype if that
    is wider. It is rounded to its declared dtype when the tree is read: by ``.tree``,
    or when the vector crosses ``jax.jit``, ``jax.lax.scan`` or ``jax.tree.map``, since
    as a pytree it has the declared leaves. (So a bfloat16 ``Vector`` in the carry of a
    scan is rounded at each step.)

    ====================  ==============================================================
    ``u + v``, ``u - v``  sums of trees that agree in structure, shapes and dtypes
    ``sum([u, v])``       the builtin sum works too
    ``c * v``, ``v / c``  a real scalar c, or complex if all leaves are; also ``-v``
    ``u @ v``             the inner product, a scalar; conjugates ``u``
    ``v.norm()``          the Euclidean norm, a scalar
    ``v.tree``            the tree, in its declared dtypes
    ====================  ==============================================================

    Args:
      tree: a pytree of real or complex floating-point arrays of any shapes. ``float0``
        leaves pass through. The first operator checks the leaves. A ``Jacobian`` is no
        such tree.

    Raises:
      TypeError: by an operator, if an operand is neither a Vector nor a scalar, or if a
        leaf cannot be summed.
      ValueError: by an operator, if the trees disagree. The message names the key path.

    >>> import jax.numpy as jnp
    >>> u = Vector({"w": jnp.array([1.0, 2.0])})
    >>> v = Vector({"w": jnp.array([10.0, 20.0])})
    >>> print((2 * u - v / 10).tree["w"], u @ v, (v - 7 * u).norm())
    [1. 2.] 50.0 6.7082043
    """

    __slots__ = ("_carried",)
    __array_ufunc__ = None  # so that a NumPy scalar leaves the operator to Vector

    def __init__(self, tree: PyTree):
        if isinstance(tree, NotATree):
            check_no_factors("tree", tree)
        self._carried = _Carried(tree)

    @classmethod
    def _of(cls, carried: _Carried) -> "Vector":
        vector = object.__new__(cls)
        vector._carried = carried
        return vector

    @property
    def tree(self) -> PyTree:
        """The tree, with its leaves rounded to their declared dtypes."""
        return (
            self._carried.tree
            if self._carried.dtypes is None
            else _rounded(self._carried)
        )

    def tree_flatten_with_keys(self) -> tuple[Any, None]:
        """Flatten to one child, the tree in its declared dtypes."""
        return ((jax.tree_util.GetAttrKey("tree"), self.tree),), None

    @classmethod
    def tree_unflatten(cls, aux: None, children: Any) -> "Vector":
        """Rebuild without checks, since leaves may be any objects here."""
        return cls._of(_Carried(*children))

    def __repr__(self) -> str:
        return f"Vector({self.tree!r})"

    def __add__(self, other: Any) -> "Vector":
        return Vector._of(_added(left=self._carried, right=_operand("+", other)))

    def __radd__(self, other: Any) -> "Vector":
        if type(other) is int and other == 0:  # the start of the builtin sum
            return self
        return Vector._of(
            _added(left=_operand("+", other, first=True), right=self._carried)
        )

    def __sub__(self, other: Any) -> "Vector":
        return Vector._of(_subtracted(left=self._carried, right=_operand("-", other)))

    def __rsub__(self, other: Any) -> "Vector":
        return Vector._of(
            _subtracted(left=_operand("-", other, first=True), right=self._carried)
        )

    def __neg__(self) -> "Vector":
        return -1 * self

    def __mul__(self, scalar: Any) -> "Vector":
        return Vector._of(_scaled(_scalar("*", scalar, self), left=self._carried))

    __rmul__ = __mul__

    def __truediv__(self, scalar: Any) -> "Vector":
        return Vector._of(_divided(_scalar("/", scalar, self), left=self._carried))

    def __rtruediv__(self, other: Any) -> NoReturn:
        raise _entry_by_entry(f"{describe(other)} / Vector", "1 / x")

    def __pow__(self, other: Any) -> NoReturn:
        raise _entry_by_entry(f"Vector ** {describe(other)}", "x**2")

    def __rpow__(self, other: Any) -> NoReturn:
        raise _entry_by_entry(f"{describe(other)} ** Vector", "2**x")

    def __abs__(self) -> NoReturn:
        raise _entry_by_entry("abs(Vector)", "abs(x)")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        raise TypeError(
            "an array of a Vector is not defined: v.tree is its tree, and "
            "jax.flatten_util.ravel_pytree(v.tree)[0] all its entries in one array"
        )

    def __matmul__(self, other: Any) -> jax.Array:
        return _inner(left=self._carried, right=_operand("@", other))

    def __rmatmul__(self, other: Any) -> jax.Array:
        return _inner(left=_operand("@", other, first=True), right=self._carried)

    def norm(self) -> jax.Array:
        """The Euclidean norm of all entries.

        Entries are divided by the largest before they are squared, so that squaring
        neither overflows nor underflows. The derivative at a vector of zeros is 0.

        Returns:
          A real scalar of shape (), in the widest accumulation dtype; infinite or NaN
          if an entry is.

        Raises:
          TypeError: a leaf is not a real or complex floating-point array.

        >>> import jax.numpy as jnp
        >>> print(Vector({"w": jnp.array([3e30, 4e30])}).norm())
        5e+30
        """
        return _norm(left=self._carried)


def _entry_by_entry(written: str, of_leaf: str) -> TypeError:
    """The error for an operator that a vector space does not have."""
    return TypeError(
        f"{written} is not defined: entry by entry, write jax.tree.map(lambda x: "
        f"{of_leaf}, v.tree)"
    )


def _operand(operator: str, other: Any, *, first: bool = False) -> _Carried:
    """The other operand of an operator between vectors."""
    if isinstance(other, Vector):
        return other._carried
    what = describe(other)
    both = f"{what} {operator} Vector" if first else f"Vector {operator} {what}"
    why, mend = f"Vector {operator} takes another Vector", "wrap a tree as Vector(tree)"
    if operator != "@" and (
        is_array(other) or isinstance(other, complex | float | int)
    ):
        why = "nothing is broadcast over a tree"
        each = f"jax.tree.map(lambda x: x {operator} 1.0, v.tree)"
        mend = f"map over the leaves, as in {each}"
    raise TypeError(f"{both} is not defined, for {why}: {mend}")


def _scalar(operator: str, scalar: Any, vector: Vector) -> Any:
    """The scalar operand as an array in the real accumulation dtype of the vector."""
    if isinstance(scalar, Vector):
        raise TypeError(
            f"Vector {operator} Vector is not defined: u @ v is the inner product, and "
            "jax.tree.map(jnp.multiply, u.tree, v.tree) works entry by entry"
        )
    if not (is_array(scalar) or isinstance(scalar, complex | float | int)):
        raise TypeError(f"Vector {operator} takes a scalar, got {describe(scalar)}")
    return algebra.floating(
        "the scalar", scalar, algebra.carried_reals(vector._carried.tree)
    )
