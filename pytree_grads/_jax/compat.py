"""What changes between releases of JAX: reading jaxprs and evaluating an equation.

JAX 0.12 merged `ClosedJaxpr` and `Jaxpr` into one class. It describes the operands of
`scan` by `ft_in` in place of `num_consts` and `num_carry`. No other file may know.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.extend.core import primitives

# Calls whose body can be inlined into the program around them.
INLINED_CALLS = tuple(
    getattr(primitives, name)
    for name in ("jit_p", "closed_call_p", "call_p")
    if hasattr(primitives, name)
)


def open_jaxpr(jaxpr: Any) -> tuple[core.Jaxpr, Sequence[Any]]:
    """The open jaxpr of an open or closed one, and the values of its constvars."""
    if isinstance(jaxpr, core.ClosedJaxpr):
        return jaxpr.jaxpr, jaxpr.consts
    return jaxpr, getattr(jaxpr, "consts", ())


def call_jaxpr(equation: core.JaxprEqn) -> Any:
    """The body of a call equation (`jit`, `closed_call`, `remat`)."""
    params = equation.params
    return params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"]


def all_equations(jaxpr: Any) -> Iterator[core.JaxprEqn]:
    """The equations of a jaxpr and of all bodies in it."""
    for equation in open_jaxpr(jaxpr)[0].eqns:
        yield equation
        for body in _bodies(equation):
            yield from all_equations(body)


def custom_rule(jaxpr: Any) -> str | None:
    """What in a function, if anything, can be differentiated only example by example.

    A `jax.custom_vjp` may close over the example, or may not be linear in its
    cotangent. Products with matrices of `jax.experimental.sparse` lose their gradient
    under `jax.vmap`.
    """
    for equation in all_equations(jaxpr):
        if equation.primitive is primitives.custom_vjp_call_p:
            return "a jax.custom_vjp"
        if equation.primitive.name.startswith(("bcoo_", "bcsr_")):
            return f"the sparse product {equation.primitive.name}"
    return None


def has_custom_calls(jaxpr: Any) -> bool:
    """Whether a function has custom derivative rules, such as `jax.custom_jvp`.

    Such a rule may close over values of the trace in which the function was called. It
    cannot be used after that trace.
    """
    return any(x.primitive.name.startswith("custom_") for x in all_equations(jaxpr))


def effectful_equations(jaxpr: Any) -> Iterator[core.JaxprEqn]:
    """The equations with effects, at every depth, without the calls around them."""
    for equation in open_jaxpr(jaxpr)[0].eqns:
        if not equation.effects:
            continue
        bodies = list(_bodies(equation))
        if not bodies:
            yield equation
        for body in bodies:
            yield from effectful_equations(body)


def _bodies(equation: core.JaxprEqn) -> Iterator[Any]:
    for param in equation.params.values():
        for body in param if isinstance(param, tuple | list) else [param]:
            if isinstance(body, core.Jaxpr | core.ClosedJaxpr):
                yield body


def effect_name(effect: Any) -> str:
    """The name of an effect's class; the class itself is not public."""
    return type(effect).__name__


def is_reference(value: Any) -> bool:
    """Whether a value is a mutable reference, made by `jax.new_ref`."""
    return isinstance(value, jax.Ref)


# `discharge_state` replaces references by pure values. It is not public.
try:
    from jax._src.state.discharge import discharge_state as _discharge_state
except (
    ImportError
):  # a future release may move it: functions with references are refused then
    _discharge_state = None


def without_references(jaxpr: Any) -> Any:
    """Replace the references that a closed jaxpr makes by pure values.

    References from outside that are only read are read now. Other effects remain.
    """
    if _discharge_state is None:
        return jaxpr
    values = open_jaxpr(jaxpr)[1]
    if any(is_reference(x) for x in values):
        jaxpr = _with_own_references(jaxpr, values)
    return _discharge_state(jaxpr, lower=False)


def _with_own_references(jaxpr: Any, values: Sequence[Any]) -> Any:
    """Replace the references among a jaxpr's constants by copies made inside it."""
    opened, _ = open_jaxpr(jaxpr)
    # Read before the new trace begins: inside it, the read would be an effect.
    found = [x[...] if is_reference(x) else x for x in values]

    def copied(*args: Any) -> Any:
        own = [
            jax.new_ref(x) if is_reference(was) else x
            for x, was in zip(found, values, strict=True)
        ]
        return core.jaxpr_as_fun(core.ClosedJaxpr(opened, own))(*args)

    return jax.make_jaxpr(copied)(*(var.aval for var in opened.invars))


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """`(num_consts, num_carry)` of a scan equation."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()
    return len(consts), len(carry)


def trace_state() -> Any:
    """A state that compares equal within one trace, and outside of all traces.

    Values made in one state may be used in any equal one.
    """
    return core.get_opaque_trace_state()


_OUTSIDE = trace_state()  # wrong only if this import happens inside a trace


def is_outside_traces() -> bool:
    """Whether nothing is traced now, so that operations run at once."""
    return trace_state() == _OUTSIDE


def bind(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Evaluate an equation on new operands, and keep its source location."""
    with equation.ctx.manager:
        return bind_here(equation, operands)


def bind_here(equation: core.JaxprEqn, operands: Sequence[Any]) -> list[Any]:
    """Evaluate an equation in the context that is current, such as another mesh."""
    primitive = equation.primitive
    params = primitive.get_bind_params(equation.params)
    with _source(equation):
        outputs = primitive.bind(*operands, **params)
    return list(outputs) if primitive.multiple_results else [outputs]


try:
    from jax._src import source_info_util as _source_info
except ImportError:  # a future release may move it: errors then point at this package
    _source_info = None


def _source(equation: core.JaxprEqn) -> Any:
    if _source_info is None:
        return jax.named_scope("pytree_grads")
    info = equation.source_info
    stack = _source_info.current_name_stack() + info.name_stack
    return _source_info.user_context(info.traceback, name_stack=stack)


def varying_axes(value: Any) -> frozenset[str]:
    """The mesh axes over which a value varies inside `jax.shard_map`; empty outside."""
    aval = value if isinstance(value, jax.ShapeDtypeStruct) else jax.typeof(value)
    kind = getattr(aval, "manual_axis_type", None)
    return frozenset(
        (getattr(aval, "vma", None) or ()) if kind is None else kind.varying
    )


def as_varying(value: jax.Array, axes: frozenset[str]) -> jax.Array:
    """A value, marked as varying over these mesh axes too."""
    missing = tuple(sorted(axes - varying_axes(value)))
    return jax.lax.pcast(value, missing, to="varying") if missing else value


def varying_zeros(shape: tuple[int, ...], dtype: Any, *values: Any) -> jax.Array:
    """Zeros to start a sum from; they vary over the mesh axes of the given values."""
    return as_varying(
        jnp.zeros(shape, dtype), frozenset[str]().union(*map(varying_axes, values))
    )


def abstract_like(value: jax.Array, shape: tuple[int, ...]) -> Any:
    """An operand for `jax.linear_transpose`: like a value, but of another shape."""
    axes = varying_axes(value)
    if not axes:
        return jax.ShapeDtypeStruct(shape, value.dtype)
    return as_varying(jnp.zeros(shape, value.dtype), axes)
