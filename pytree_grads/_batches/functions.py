"""The user's functions with their options: ``fun`` of one example, ``outer`` of all."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .._trees.checks import PyTree, check_outer_value, describe, split_aux
from .batch import Batch
from .misuse import explained_fun, explained_outer
from .notes import note_of_outer


@dataclass(frozen=True)
class Fun:
    """``fun``, which returns a value, or with ``has_aux`` a pair of a value and aux."""

    fun: Callable[..., Any]
    has_aux: bool

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[PyTree, PyTree]:
        """``(value, aux)`` for one example; aux is None without ``has_aux``."""
        return split_aux(self.fun(*args, **kwargs), self.has_aux, "the result of fun")

    def mapped(self, batch: Batch) -> tuple[PyTree, PyTree]:
        """``(values, aux)`` for all examples of a batch, stacked."""
        return batch.vmap(lambda args, kwargs: self(*args, **kwargs))


@dataclass(frozen=True)
class Outer:
    """``outer``, which takes the outputs of all examples, with its options."""

    outer: Callable[..., Any]
    has_params: bool
    has_aux: bool
    is_single: bool  # whether the parameters are one tree, and not a tuple of them

    def params(self, primals: Sequence[PyTree]) -> tuple[PyTree, ...]:
        """What is passed for the parameters: one argument, or none."""
        if not self.has_params:
            return ()
        return (primals[0] if self.is_single else tuple(primals),)

    def __call__(
        self, outputs: PyTree, primals: Sequence[PyTree], outer_args: Sequence[Any]
    ) -> tuple[Any, PyTree]:
        """``(value, aux)``: a real scalar, and None without ``has_aux``."""
        result = self.outer(outputs, *self.params(primals), *outer_args)
        value, aux = split_aux(result, self.has_aux, "the result of outer")
        check_outer_value(value)
        return value, aux


@dataclass(frozen=True)
class Call:
    """One call of a transformed function, for errors that say what went wrong."""

    fun: Fun
    outer: Outer
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outer_args: Sequence[Any]

    def __post_init__(self) -> None:
        if not isinstance(self.outer_args, tuple | list):
            raise TypeError(
                "argument outer_args must be a tuple of arguments, got "
                f"{describe(self.outer_args)}"
            )

    @contextlib.contextmanager
    def runs_fun(self, primals: Sequence[PyTree]) -> Iterator[None]:
        """Surround what evaluates ``fun``: an error says if the two look swapped."""
        given = (None, *self.outer.params(primals), *self.outer_args)
        with explained_fun(
            self.outer.outer, self.fun.fun, self.args, self.kwargs, given
        ):
            yield

    @contextlib.contextmanager
    def runs_outer(self, outputs: PyTree, primals: Sequence[PyTree]) -> Iterator[None]:
        """Surround what evaluates ``outer``: an error says what it was given."""
        params = self.outer.params(primals)
        given = (outputs, *params, *self.outer_args)
        call = self.outer.outer, self.fun.fun, self.args, self.kwargs
        with (
            note_of_outer(outputs, params, self.outer_args),
            explained_outer(*call, given, self.fun.has_aux, self.outer.has_params),
        ):
            yield
