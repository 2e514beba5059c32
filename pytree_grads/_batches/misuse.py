"""Guess, in the user's terms, why a call failed."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from .._trees.checks import PyTree, describe_node, given_argnums


@contextmanager
def explained_fun(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outer_args: tuple[Any, ...],
) -> Iterator[None]:
    """Raise a TypeError if ``fun`` fails and the two functions are likely swapped.

    ``outer_args`` are all arguments of ``outer``, outputs first. Only signatures are
    read.
    """
    try:
        yield
    except Exception as error:
        _raise_if_swapped(outer, fun, args, kwargs, outer_args, error)
        raise


@contextmanager
def explained_outer(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outer_args: tuple[Any, ...],
    has_aux: bool,
    has_params: bool,
) -> Iterator[None]:
    """Raise a TypeError if ``outer`` lacks arguments, or the two are swapped."""
    try:
        yield
    except Exception as error:
        _raise_if_swapped(outer, fun, args, kwargs, outer_args, error)
        missing = _missing(outer, outer_args)
        outputs = outer_args[0]
        if missing:
            came_apart = isinstance(outputs, tuple | list) and (
                len(outer_args) + len(missing) == len(outputs)
            )
            mends = [_ONE_ARGUMENT.format(describe_node(outputs))] * came_apart
            mends += _mends_of_missing(outer, has_params)
            raise TypeError(
                f"argument outer, {_shown(outer)}, was called without "
                f"{', '.join(missing)}: {'; else, '.join(mends)}"
            ) from error
        if not has_aux and isinstance(outputs, tuple) and len(outputs) == 2:
            error.add_note(
                f"outer was given {describe_node(outputs)}, for fun returned a pair: "
                "if its second item is auxiliary data, give has_aux=True"
            )
        raise


def _raise_if_swapped(
    outer: Callable[..., Any],
    fun: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outer_args: tuple[Any, ...],
    error: Exception,
) -> None:
    fits_other = _takes(outer, args, kwargs) and _takes(fun, outer_args, {})
    if fits_other and _missing(outer, outer_args):
        raise TypeError(
            f"arguments outer and fun look swapped: outer, {_shown(outer)}, does not "
            f"take the stacked outputs alone, and fun, {_shown(fun)}, does. The first "
            "is outer, which maps the outputs of all examples to one scalar; the "
            "second is fun, the function of one example"
        ) from error


_ONE_ARGUMENT = (
    "if these are outputs of fun, the outputs come as one argument, {}, which outer "
    "takes apart"
)


def _mends_of_missing(outer: Callable[..., Any], has_params: bool) -> Iterator[str]:
    """How outer may get what it takes after the outputs, the likeliest first."""
    _, *others = _required(outer)
    if not has_params:
        first, *rest = others
        more = f", and outer_args={_tuple(rest)} at the call" if rest else ""
        yield (
            f"if {first} are the parameters: outer_has_params=True{more} (outer_args "
            "are not differentiated)"
        )
    names = _tuple(others[1:] if has_params else others)
    yield (
        "what it takes after the outputs (and the parameters, with outer_has_params) "
        f"is given to the call as outer_args={names}"
    )


def _tuple(names: Sequence[str]) -> str:
    return f"({names[0]},)" if len(names) == 1 else f"({', '.join(names)})"


def check_call(
    maker: Callable[..., Any],
    fun: Callable[..., Any],
    argnums: Any,
    kwargs: dict[str, Any],
) -> None:
    """Raise if the returned function got options, or ``argnums`` call arguments.

    Args:
      maker: the public function that took ``fun``.
      fun: the function of one example; only its signature is read.
      argnums: as the maker took it.
      kwargs: the keyword arguments of the call.
    """
    options = list(inspect.signature(maker).parameters)
    made = f"{maker.__name__}({'outer, ' * (options[0] == 'outer')}fun"
    given_argnums(argnums, f": call {made})(params, *batch)")
    for name, value in kwargs.items():
        if name not in {*options, *_OPTIONS} or _takes_keyword(fun, name):
            continue
        where = f"an option of {maker.__name__}"
        if name in options:
            said = f"{where}: {made}, {name}={_literal(value)})(...)"
        else:
            said = f"not {where}, and fun does not take it"
        raise TypeError(f"{name} is {said}")


# Those that some public functions take and others do not.
_OPTIONS = (
    "axis_name",
    "batch_axis_name",
    "batched",
    "outer_has_aux",
    "outer_has_params",
    "recompute",
)


def _literal(value: Any) -> str:
    """A value as it is written, if it is short."""
    is_short = value is None or isinstance(value, bool | int | str)
    is_tuple = isinstance(value, tuple) and "..." not in map(_literal, value)
    return repr(value) if is_short or is_tuple else "..."


def _takes_keyword(fun: Callable[..., Any], name: str) -> bool:
    """Whether a function may take a keyword, as far as its signature says."""
    signature = _signature(fun)
    if signature is None:
        return True
    parameters = signature.parameters.values()
    return any(
        p.kind is p.VAR_KEYWORD or (p.name == name and p.kind is not p.POSITIONAL_ONLY)
        for p in parameters
    )


def _signature(fun: Callable[..., Any]) -> inspect.Signature | None:
    try:
        return inspect.signature(fun)
    except (TypeError, ValueError):  # a builtin, or a callable that hides its signature
        return None


def _takes(
    fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> bool:
    """Whether a function takes these arguments, as far as its signature says."""
    signature = _signature(fun)
    if signature is None:
        return False
    try:
        signature.bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _missing(fun: Callable[..., Any], args: tuple[PyTree, ...]) -> list[str]:
    """The names of positional arguments that a call leaves out."""
    return _required(fun)[len(args) :]


def _required(fun: Callable[..., Any]) -> list[str]:
    """The names of positional arguments without defaults: these come first."""
    signature = _signature(fun)
    if signature is None:
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        p.name
        for p in signature.parameters.values()
        if p.kind in kinds and p.default is inspect.Parameter.empty
    ]


def _shown(fun: Callable[..., Any]) -> str:
    """A function with the names of its arguments: ``loss(params, x, y)``."""
    signature = _signature(fun)
    names = ["..."] if signature is None else list(signature.parameters)
    return f"{getattr(fun, '__name__', type(fun).__name__)}({', '.join(names)})"
