"""What is not defined for a Jacobian, and what to write instead."""

from typing import Any, NoReturn

from .._trees.checks import describe

_SCALE = (
    "rows are scaled by J.scale(s), with a number per row, as in "
    "J.scale(jnp.full(len(J), {}))"
)
_ADD = (
    "Jacobians are not added: take the jacobian of the sum of the functions, or add "
    "sums of rows, "
    "as in Vector(J.sum()) + Vector(other.sum())"
)
_POWER = (
    "J.square_sum() is the sum of the squares of the rows, J.squared_norms() are "
    "their norms'"
)
_ROWS = "J holds factors, no rows: J.to_rows() are the rows as a tree of stacked arrays"


class NotAnArray:
    """A matrix that is no array: operators raise, and say what to write instead."""

    __array_ufunc__ = None  # NumPy arrays leave operators to us
    _symbol = "J"

    def _refuse(self, written: str, mend: str) -> NoReturn:
        raise TypeError(f"{written.format(self._symbol)} is not defined: {mend}")

    def __mul__(self, other: Any) -> NoReturn:
        self._refuse(f"{{}} * {_written(other)}", _SCALE.format(_number(other)))

    def __rmul__(self, other: Any) -> NoReturn:
        self._refuse(f"{_written(other)} * {{}}", _SCALE.format(_number(other)))

    def __truediv__(self, other: Any) -> NoReturn:
        self._refuse(
            f"{{}} / {_written(other)}", _SCALE.format(f"1 / {_number(other)}")
        )

    def __rtruediv__(self, other: Any) -> NoReturn:
        self._refuse(f"{_written(other)} / {{}}", _ROWS)

    def __add__(self, other: Any) -> NoReturn:
        self._refuse(f"{{}} + {_written(other)}", _ADD)

    def __radd__(self, other: Any) -> NoReturn:
        self._refuse(f"{_written(other)} + {{}}", _ADD)

    def __sub__(self, other: Any) -> NoReturn:
        self._refuse(f"{{}} - {_written(other)}", _ADD)

    def __rsub__(self, other: Any) -> NoReturn:
        self._refuse(f"{_written(other)} - {{}}", _ADD)

    def __pow__(self, other: Any) -> NoReturn:
        self._refuse(f"{{}} ** {_written(other)}", _POWER)

    def __neg__(self) -> NoReturn:
        self._refuse("-{}", _SCALE.format("-1.0"))

    def __abs__(self) -> NoReturn:
        self._refuse("abs({})", f"J.norms() are the lengths of the rows; {_ROWS}")

    def __float__(self) -> NoReturn:
        self._refuse("float({})", _ROWS)

    def __int__(self) -> NoReturn:
        self._refuse("int({})", _ROWS)

    def __complex__(self) -> NoReturn:
        self._refuse("complex({})", _ROWS)

    def __iter__(self) -> NoReturn:
        self._refuse("iter({})", f"{_ROWS}, and J[i : i + 1].to_rows() is one of them")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        self._refuse("an array of {}", _ROWS)


def _written(other: Any) -> str:
    """An operand, as it may stand in an expression."""
    if isinstance(other, NotAnArray):
        return other._symbol
    return repr(other) if isinstance(other, int | float | complex) else describe(other)


def _number(other: Any) -> str:
    return repr(float(other)) if isinstance(other, int | float) else "2.0"
