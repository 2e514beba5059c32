"""What is said of a name for the axis of examples: where it is missing, or no use."""

import re
from typing import Any, NoReturn

from .._trees.checks import describe

_NO_ROWS = (
    "the row of an example is the gradient of its own output, and with statistics of "
    "the batch an output depends on all examples. There are two exact ways out: "
    "evaluation mode, with statistics that are arguments; or the batch as one example "
    "with N outputs, jacobian(jax.vmap(fun, (None, 0), axis_name={0!r}), "
    "batched=False)(params, xs). The gradient of a loss of the whole batch is that of "
    "chain_rule_grad(outer, fun, batch_axis_name={0!r})"
)
_UNNAMED = (
    "fun uses the axis {0!r}, which has no name here. If it is an axis of a mesh, make "
    "the call inside jax.shard_map. If it is the axis of the examples (batch norm): "
)
_UNBOUND = re.compile(r"unbound axis name: (\w+)")


def check_name(name: str | None, chunk_size: int | None) -> None:
    """Raise unless the axis of examples may have this name."""
    if name is None:
        return
    if not isinstance(name, str):
        raise TypeError(f"argument batch_axis_name must be a str, got {describe(name)}")
    if chunk_size is not None:
        raise ValueError(
            f"argument chunk_size={chunk_size} evaluates fun for some examples at a "
            f"time, and over the axis {name!r} it takes statistics of all of them: no "
            "chunk can know these, so there is no exact answer in chunks. Leave out "
            "chunk_size"
        )


def refuse_name(name: Any) -> None:
    """Raise if a call that returns rows is given a name for the axis of examples."""
    if name is not None:
        raise ValueError(f"argument batch_axis_name: {_NO_ROWS.format(name)}")


def explain_unbound(error: Exception, *, has_rows: bool) -> None:
    """Raise an error that says what to do, if a function uses an axis without a name.

    `has_rows` says whether the call returns rows, or products with them.
    """
    found = _UNBOUND.search(str(error)) if isinstance(error, NameError) else None
    if found is not None:
        _raise_unbound(error, found[1], has_rows)


def _raise_unbound(error: Exception, name: str, has_rows: bool) -> NoReturn:
    mend = _NO_ROWS if has_rows else "give batch_axis_name={0!r}"
    raise NameError((_UNNAMED + mend).format(name)) from error
