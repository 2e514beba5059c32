"""What likely went wrong if ``fun`` or ``outer`` failed, in the words of the call."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .._trees.checks import PyTree, describe_node


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
) -> Iterator[None]:
    """Raise a TypeError if ``outer`` lacks arguments, or the two are swapped."""
    try:
        yield
    except Exception as error:
        _raise_if_swapped(outer, fun, args, kwargs, outer_args, error)
        missing = _missing(outer, outer_args)
        if missing:
            names = "".join(f"{name}, " for name in missing).strip()
            names = names if len(missing) == 1 else names.rstrip(",")
            raise TypeError(
                f"argument outer, {_shown(outer)}, was called without "
                f"{names.rstrip(',')}: what "
                "it takes after the outputs (and the parameters, with "
                "outer_has_params) is given "
                f"to the call as outer_args=({names})"
            ) from error
        outputs = outer_args[0]
        if not has_aux and isinstance(outputs, tuple) and len(outputs) == 2:
            error.add_note(
                f"outer was given {describe_node(outputs)}, for fun returned a pair: "
                "if its second "
                "item is auxiliary data, give has_aux=True"
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
            "take the "
            f"stacked outputs alone, and fun, {_shown(fun)}, does. The first is outer, "
            "which maps "
            "the outputs of all examples to one scalar; the second is fun, the "
            "function of one "
            "example"
        ) from error


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
    signature = _signature(fun)
    if signature is None:
        return []
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in signature.parameters.values() if p.kind in kinds]
    return [p.name for p in needed[len(args) :] if p.default is inspect.Parameter.empty]


def _shown(fun: Callable[..., Any]) -> str:
    """A function with the names of its arguments: ``loss(params, x, y)``."""
    signature = _signature(fun)
    names = ["..."] if signature is None else list(signature.parameters)
    return f"{getattr(fun, '__name__', type(fun).__name__)}({', '.join(names)})"
