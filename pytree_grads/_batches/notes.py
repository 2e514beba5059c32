"""Notes on errors that arise in a user's function: what it was called with."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

from .._trees.checks import KeyPath, PyTree, argument_names, describe
from .unbound import explain_unbound

_HEADS = ("fun was called with", "outer was called with")
_SHOWN = 6  # lines for one argument


class Note:
    """A context in which an error gets a note, unless a context further in gave it one.

    The text is made when there is an error, and never before.
    """

    def __init__(
        self,
        text: Callable[[], str],
        explain: Callable[[Exception], None] = lambda error: None,
    ):
        self._text = text
        self._explain = explain  # may raise a better error

    def __enter__(self) -> "Note":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, Exception) or _has_note(error):
            return
        with contextlib.suppress(Exception):  # the user's own error must come through
            error.add_note(self._text())
        self._explain(error)


def note_of_fun(fun: Callable[..., Any], batch: Any, *, has_rows: bool = True) -> Note:
    """The note for errors in ``fun``: one example of a batch.

    `has_rows` says whether the call returns rows, or products with them. Other calls
    can give the axis of examples a name.
    """

    def text() -> str:
        args, kwargs = jax.tree.unflatten(batch.treedef, batch.leaves)
        names = argument_names(fun, len(args))
        leaves = zip(jax.tree.leaves_with_path((args, kwargs)), batch.axes, strict=True)
        arguments: dict[str, list[tuple[KeyPath, str]]] = {}
        for ((which, position, *path), leaf), axis in leaves:
            name = position.key if which.idx else names[position.idx]
            words = _of_one(leaf, axis, batch.is_whole)
            arguments.setdefault(name, []).append((tuple(path), words))
        taken = f"one example, not with the batch of {batch.size}"
        head = f"{_HEADS[0]} {'the whole batch' if batch.is_whole else taken}:"
        return "\n".join([head, *_lines(arguments)])

    return Note(text, partial(explain_unbound, has_rows=has_rows))


def note_of_outer(
    outputs: PyTree, params: Sequence[PyTree] = (), args: Sequence[Any] = ()
) -> Note:
    """The note for errors in ``outer``: outputs, parameters if any, other arguments."""

    def text() -> str:
        names = ["outputs", *("params" for _ in params)]
        names += [f"outer_args[{i}]" for i in range(len(args))]
        arguments = {
            name: [
                (path, describe(leaf)) for path, leaf in jax.tree.leaves_with_path(tree)
            ]
            for name, tree in zip(names, (outputs, *params, *args), strict=True)
        }
        return "\n".join(
            [f"{_HEADS[1]} the outputs of all examples, stacked:", *_lines(arguments)]
        )

    return Note(text)


def _has_note(error: Exception) -> bool:
    return any(str(note).startswith(_HEADS) for note in getattr(error, "__notes__", ()))


def _of_one(leaf: Any, axis: int | None, is_whole: bool) -> str:
    """A leaf of one example: ``float32[5] (axis 0 of float32[8,5] taken off)``."""
    if axis is None:
        return describe(leaf)
    one = jax.ShapeDtypeStruct(leaf.shape[:axis] + leaf.shape[axis + 1 :], leaf.dtype)
    taken_off = f" (axis {axis} of {describe(leaf)} taken off)"
    return describe(one) + taken_off * (not is_whole)


def _lines(arguments: dict[str, list[tuple[KeyPath, str]]]) -> Iterator[str]:
    """A line for each leaf, the first few of each argument."""
    for name, leaves in arguments.items():
        shown = leaves if len(leaves) <= _SHOWN else leaves[: _SHOWN - 1]
        for path, words in shown:
            yield f"  {name}{jax.tree_util.keystr(path)}: {words}"
        if len(shown) < len(leaves):
            yield f"  {name}: {len(leaves) - len(shown)} more leaves"
