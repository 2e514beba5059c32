"""What is not defined for a Jacobian, and what to write instead."""

from typing import Any, NoReturn

from .._trees.checks import NotATree, describe, is_array

_SCALE = "rows are scaled by J.scale(s), with a real number per row, as in "
_ADD = (
    "J + other takes another Jacobian of the same shape; trees like the parameters are "
    "added as in Vector(J.sum()) + Vector(tree)"
)
_POWER = (
    "J.square_sum() is the sum of the squares of the rows, J.squared_norms() are "
    "their norms'"
)
_ROWS = "J holds factors, no rows: J.to_rows() are the rows as a tree of stacked arrays"


class NotAnArray(NotATree):
    """A matrix that is not an array: operators raise, and say what to write instead."""

    __array_ufunc__ = None  # NumPy arrays leave operators to us
    _symbol = "J"

    @property
    def _has_one_output(self) -> bool:
        """Whether a number per row is one array, not a tree of them."""
        return True

    def _refuse_scaling(self, written: str, by: Any, form: str = "{}") -> NoReturn:
        self._refuse(written, _SCALE + _scaled(by, form, self._has_one_output))

    def _refuse(self, written: str, mend: str) -> NoReturn:
        raise TypeError(f"{written.format(self._symbol)} is not defined: {mend}")

    def __mul__(self, other: Any) -> Any:
        self._refuse_scaling(f"{{}} * {written(other)}", other)

    def __rmul__(self, other: Any) -> Any:
        self._refuse_scaling(f"{written(other)} * {{}}", other)

    def __truediv__(self, other: Any) -> Any:
        self._refuse_scaling(f"{{}} / {written(other)}", other, "1 / {}")

    def __rtruediv__(self, other: Any) -> NoReturn:
        self._refuse(f"{written(other)} / {{}}", _ROWS)

    def __add__(self, other: Any) -> Any:
        self._refuse(f"{{}} + {written(other)}", _ADD)

    def __radd__(self, other: Any) -> NoReturn:
        self._refuse(f"{written(other)} + {{}}", _ADD)

    def __sub__(self, other: Any) -> Any:
        self._refuse(f"{{}} - {written(other)}", _ADD)

    def __rsub__(self, other: Any) -> NoReturn:
        self._refuse(f"{written(other)} - {{}}", _ADD)

    def __pow__(self, other: Any) -> NoReturn:
        self._refuse(f"{{}} ** {written(other)}", _POWER)

    def __neg__(self) -> Any:
        self._refuse_scaling("-{}", -1)

    def __abs__(self) -> NoReturn:
        self._refuse("abs({})", f"J.norms() are the lengths of the rows; {_ROWS}")

    def __float__(self) -> NoReturn:
        self._refuse("float({})", _ROWS)

    def __int__(self) -> NoReturn:
        self._refuse("int({})", _ROWS)

    def __complex__(self) -> NoReturn:
        self._refuse("complex({})", _ROWS)

    def __iter__(self) -> NoReturn:
        one = "J[i] has the row of one example, as in [J[i] for i in range(len(J))]"
        self._refuse("iter({})", f"{_ROWS}, and {one}")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        self._refuse("an array of {}", _ROWS)


def written(other: Any) -> str:
    """An operand, as it may stand in an expression."""
    if isinstance(other, NotAnArray):
        return other._symbol
    return repr(other) if isinstance(other, int | float | complex) else describe(other)


def _scaled(by: Any, form: str, has_one_output: bool) -> str:
    """The call that scales rows by a number, or by an array of numbers."""
    if is_array(by) and by.ndim:
        if has_one_output:
            return f"J.scale({form.format('array')})"
        return "J.scale(s) for a tree s like J.norms()"
    number = form.format(float(by) if isinstance(by, int | float) else "number")
    if has_one_output:
        return f"J.scale(jnp.full(J.shape[:-1], {number}))"
    each = f"lambda x: jnp.full_like(x, {number})"
    return f"J.scale(jax.tree.map({each}, J.norms()))"
