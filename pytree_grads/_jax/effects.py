"""Side effects of a function: made pure, let pass, or refused by name.

The engine evaluates a value only if it is needed, and may evaluate it several times.
That is right for pure functions alone. So references are turned into values first. An
effect that no result depends on, such as a debug print, may happen or not. An effect
that could change a result is refused, with its name.
"""

from typing import Any

from . import compat

# No result depends on these.
_PASSIVE = frozenset(
    {
        "DebugEffect",  # jax.debug.print and jax.debug.callback
        "OrderedDebugEffect",
        "ErrorEffect",  # checkify.check
        "NamedAxisEffect",  # collectives over a named axis
        "NoDCEEffect",
        "ShapeAssertionEffect",  # of exported programs
    }
)
# Calls to the host. A result is a value like any other if the call happens once.
_CALLS = frozenset({"IOEffect", "OrderedIOEffect", "FfiEffect", "BufferCallbackEffect"})
_REFERENCES = frozenset(
    {"ReadEffect", "WriteEffect", "AccumEffect", "InternalMutableArrayEffect"}
)


def made_pure(jaxpr: Any, *, runs_again: bool) -> Any:
    """Replace references by pure values; refuse other effects that change results.

    Args:
      jaxpr: of the function of one example, or of its backward pass; closed.
      runs_again: whether each product runs it again, so that all runs must agree.

    Raises:
      NotImplementedError: an effect that changes results remains; the message names it.
    """
    if not jaxpr.effects:
        return jaxpr
    if _holds_references(jaxpr):
        if runs_again and any(
            compat.is_reference(x) for x in compat.open_jaxpr(jaxpr)[1]
        ):
            raise NotImplementedError(
                "the function reads a reference (jax.new_ref) that was made outside of "
                "it, and each product would read it again, changed perhaps: pass its "
                "value, ref[...], as an argument"
            )
        _refuse_writes_outside(jaxpr)
        jaxpr = compat.without_references(jaxpr)
    for equation in compat.effectful_equations(jaxpr):
        _check(equation, runs_again)
    return jaxpr


def _holds_references(jaxpr: Any) -> bool:
    return any(compat.effect_name(effect) in _REFERENCES for effect in jaxpr.effects)


def _refuse_writes_outside(jaxpr: Any) -> None:
    """Raise if the function writes to a reference made outside of it."""
    written = {"WriteEffect", "AccumEffect"}
    if any(compat.effect_name(effect) in written for effect in jaxpr.effects):
        raise NotImplementedError(
            "the function writes to a reference (jax.new_ref) that was made outside of "
            "it, and it may run never or several times: return the new value with "
            "has_aux=True, and write it after the call"
        )


def _check(equation: Any, runs_again: bool) -> None:
    """Raise if an equation has an effect that may change results."""
    for effect in equation.effects:
        name = compat.effect_name(effect)
        is_used = bool(equation.outvars)
        if name in _PASSIVE or (name in _CALLS and not (is_used and runs_again)):
            continue
        if name in _CALLS:
            raise NotImplementedError(
                f"the function calls {equation.primitive} for a result, and each "
                "product would call it again, for another result perhaps: take it out "
                "of the function and pass the result as an argument, or keep the rows "
                "(no recompute, no chunk_size)"
            )
        raise NotImplementedError(
            f"the function has the effect {effect}, of {equation.primitive}, which may "
            "change results: take it out of the function to differentiate"
        )
