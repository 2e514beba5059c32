"""Products outside ``jit``: each is compiled once for its shapes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._jax.compat import is_outside_traces
from .._trees.checks import PyTree
from .source import Source


def compiled_once(*static: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator: outside every trace, a function is compiled, once for its shapes.

    A loop over chunks would be compiled at each call otherwise. Inside a trace, the
    function is part of it. If an argument has a method ``as_argument``, the program
    receives its result instead of the argument.

    Args:
      static: the names of keyword arguments that are not arrays; they are compared and
        hashed.
    """

    def decorate(fun: Callable[..., Any]) -> Callable[..., Any]:
        jitted = jax.jit(fun, static_argnames=static)

        @functools.wraps(fun)
        def call(*args: PyTree, **settings: Any) -> Any:
            if not is_outside_traces():
                return fun(*args, **settings)
            given = [x.as_argument() if hasattr(x, "as_argument") else x for x in args]
            return (jitted if _may_be_kept(given) else fun)(*given, **settings)

        return call

    return decorate


def _may_be_kept(args: list[PyTree]) -> bool:
    """Whether a program may be kept: what is static can be hashed, and never changes.

    An array of NumPy that all examples share is static, for the function takes it as it
    is.
    """
    nodes = jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, Source))
    sources = [x for x in nodes if isinstance(x, Source)]
    if any(isinstance(leaf, np.ndarray) for x in sources for leaf in x.batch.leaves):
        return False
    try:
        hash(jax.tree.structure(args))
    except TypeError:
        return False
    return True
