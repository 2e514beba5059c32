"""What is not defined for a Jacobian, and what to write instead."""

import operator
from typing import Any, NoReturn

from jax.core import Tracer

from .._trees.checks import NotATree, describe, describe_node, is_array

_SCALE = "rows are scaled by J.scale(s), with a real number per row, as in "
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

    def __mul__(self, other: Any) -> NoReturn:
        self._refuse_scaling(f"{{}} * {_written(other)}", other)

    def __rmul__(self, other: Any) -> NoReturn:
        self._refuse_scaling(f"{_written(other)} * {{}}", other)

    def __truediv__(self, other: Any) -> NoReturn:
        self._refuse_scaling(f"{{}} / {_written(other)}", other, "1 / {}")

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
        one = "J[i : i + 1].to_rows() is one of them, for i >= 0"
        self._refuse("iter({})", f"{_ROWS}, and {one}")

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        self._refuse("an array of {}", _ROWS)


def _written(other: Any) -> str:
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


def check_slice(index: Any, size: Any) -> None:
    """Raise unless an index of a Jacobian is a slice of examples, static, of step 1."""
    is_slice = isinstance(index, slice)
    parts = (index.start, index.stop, index.step) if is_slice else (index,)
    if any(isinstance(x, Tracer) for x in parts):
        raise TypeError(
            "the bounds of a slice of a Jacobian are static, got a traced one; to "
            "choose rows by a traced index, index the batch that goes into it"
        )
    if not is_slice or index.step not in (None, 1):
        raise TypeError(
            "a Jacobian takes slices of examples, with step 1, such as J[2:5], got "
            f"{_index(index)}: {_other_choice(index, size)}"
        )
    if not isinstance(size, int):
        raise TypeError(
            "slices need a batch of known size, and the number of examples is "
            f"symbolic, {size}: {_CHOOSE.format('start:stop')}"
        )


_CHOOSE = (
    "choose in the batch, as in jacobian(f)(params, xs[{}]), or give rows weight 0"
)


def _index(index: Any) -> str:
    is_short = isinstance(index, int | slice)
    return repr(index) if is_short else describe_node(index)


def _other_choice(index: Any, size: Any) -> str:
    """What to write instead for an index other than a step-1 slice."""
    if isinstance(index, slice):
        return _CHOOSE.format("start:stop:step")
    try:
        position = operator.index(index)
    except TypeError:
        return _CHOOSE.format("index")
    if not isinstance(size, int):
        return _CHOOSE.format("i : i + 1")
    if not -size <= position < size:
        return f"J has the rows of {size} examples"
    start = position % size
    return (
        f"one row is J[{start} : {start + 1}].to_rows(), with a leading axis of 1, or "
        f"take row {start} of the batch"
    )
