"""Which equations are linear in the operands that differ between examples."""

from collections.abc import Callable, Container, Sequence
from typing import TypeAlias

import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive
from jax.extend.core import primitives as p

from ..graph import Atom, Equation

Varying: TypeAlias = Sequence[bool]  # whether each operand differs between examples
_Test: TypeAlias = Callable[[Varying], bool]


def _any(varies: Varying) -> bool:
    return True


def _one(varies: Varying) -> bool:
    """Bilinear: linear if one operand differs."""
    return sum(varies) == 1


def _only(*positions: int) -> _Test:
    """Linear in these operands, if the others are shared."""

    def test(varies: Varying) -> bool:
        return not any(x for i, x in enumerate(varies) if i not in positions)

    return test


def _last(varies: Varying) -> bool:
    return not any(varies[:-1])


def _all_but_first(varies: Varying) -> bool:
    return not varies[0]


_LINEAR: dict[Primitive, _Test] = {
    p.mul_p: _one,
    p.dot_general_p: _one,
    p.conv_general_dilated_p: _one,
    p.div_p: _only(0),
    p.gather_p: _only(0),
    p.dynamic_slice_p: _only(0),
    p.dynamic_update_slice_p: _only(0, 1),
    p.scatter_add_p: _only(0, 2),
    p.triangular_solve_p: _only(1),
    p.linear_solve_p: _last,  # the right-hand side, if it is one array
    p.select_n_p: _all_but_first,
    p.pad_p: _only(0),
} | dict.fromkeys(
    (
        p.add_p, p.add_jaxvals_p, p.sub_p, p.neg_p, p.reduce_sum_p, p.cumsum_p,
        p.broadcast_in_dim_p, p.reshape_p, p.transpose_p, p.squeeze_p, p.rev_p,
        p.slice_p, p.concatenate_p, p.convert_element_type_p, p.copy_p, p.name_p,
        lax.split_p, lax.unstack_p, lax.stack_p,
    ),
    _any,
)  # fmt: skip


def is_linear(equation: Equation, varying: Container[Atom]) -> bool:
    """Whether the outputs are linear in the operands in `varying`, all together.

    Other operands are coefficients, or are added: those of a sum, say.
    """
    if equation.primitive is None:  # the barrier before a remat body: the identity
        return True
    if equation.primitive is p.linear_solve_p and len(equation.outputs) > 1:
        return False  # several arrays on the right-hand side, some of them shared
    test = _LINEAR.get(equation.primitive)
    if test is None or not test([x in varying for x in equation.inputs]):
        return False
    own = [x for x in equation.inputs if x in varying]
    return all(_is_real(x) for x in [*own, *equation.outputs]) and _is_placed(equation)


def _is_real(atom: Atom) -> bool:
    return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _is_placed(equation: Equation) -> bool:
    """Whether no output has a sharding of its own, on a mesh with explicit axes."""
    given = [equation.params.get(name) for name in ("out_sharding", "sharding")]
    return all(x is None or x.mesh.empty for x in given)


# Operands that are added to the output, rather than coefficients of it. If one of them
# is shared by all examples, it is a term of its own.
_ADDED = {
    p.add_p: (0, 1), p.add_jaxvals_p: (0, 1), p.sub_p: (0, 1), p.scatter_add_p: (0, 2),
    p.dynamic_update_slice_p: (0, 1),
}  # fmt: skip


def added(equation: Equation) -> list[Atom]:
    """The operands of a linear equation that are not coefficients."""
    if equation.primitive in (p.select_n_p,):
        return list(equation.inputs[1:])
    if equation.primitive in (p.concatenate_p, lax.stack_p, None):
        return list(equation.inputs)
    positions = _ADDED.get(equation.primitive, ())
    return [equation.inputs[i] for i in positions]
