"""Every rule: the smallest function that needs it, against plain ``vmap(grad)``.

A new primitive is one function in ``pytree_grads/_engine/rules`` and one row here.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import primitives as p
from routes import factors_kept, is_dense, leaves_of

from pytree_grads import jacobian
from pytree_grads._engine.rules import RULES
from pytree_grads._engine.rules.table import rule, through

N = 5


@dataclass(frozen=True)
class Row:
    """A rule's primitive, and ``fun(w, x)`` with a leaf that is factored through it."""

    primitive: jax.extend.core.Primitive
    fun: Callable[..., jax.Array]
    w: tuple[int, ...]  # the shape of the parameter
    x: tuple[int, ...]  # and of an example


def by_hand(forward, backward):
    """A loss with a linear step in front, whose backward pass is written by hand."""

    @jax.custom_vjp
    def step(w):
        return forward(w)

    step.defvjp(lambda w: (forward(w), None), lambda _, g: (backward(g),))
    return lambda w, x: product(step(w).reshape(3, 4), x)


def product(w, x):
    """A loss whose gradient is an outer product, with a cotangent that differs."""
    return jnp.sum(jnp.sin(w @ x))


def plus_flipped(w):
    return w + jnp.flip(w)


def minus_flipped(w):
    return w - jnp.flip(w)


def in_single_precision(w, x):
    return product(w.astype("float32").astype(w.dtype), x)


def transposed_in_blocks(w, x):
    return product(w.reshape(3, 2, 4).transpose(1, 0, 2).reshape(6, 4), x)


def stacked_twice(w, x):
    return product(jnp.stack([w, w]).reshape(6, 4), x)


def in_two_halves(w, x):
    return sum(product(u, x) for u in jnp.split(w, 2))


def one_after_another(w, x):
    return sum(product(u, x) for u in lax.unstack(w))


def image_loss(w, x):
    return jnp.sum(jnp.sin(lax.conv(x[None], w, (1, 1), "VALID")))


def recurrent(w, x):
    def step(h, x):
        return jnp.tanh(w @ h + x), None

    return jnp.sum(lax.scan(step, jnp.ones_like(x[0]), x)[0])


def layers(w, x):
    return jnp.sum(lax.scan(lambda h, w: (jnp.tanh(w @ h), None), x, w)[0])


def embedding(w, x):
    """Look up two lines, whose numbers depend on the example."""
    index = jnp.argsort(x)[:2]
    return jnp.sum(jnp.sin(w[index] * x[:2, None]))


def one_line(w, x):
    """Look up one line, by a slice that starts where the example says."""
    return jnp.sum(jnp.sin(lax.dynamic_slice_in_dim(w, jnp.argmax(x), 1) * x[1]))


ROWS = [
    # Views of one operand
    Row(p.reshape_p, lambda w, x: product(w.reshape(3, 4), x), (12,), (4,)),
    Row(
        p.squeeze_p,
        by_hand(lambda w: w[None], lambda g: lax.squeeze(g, [0])),
        (3, 4),
        (4,),
    ),
    Row(p.broadcast_in_dim_p, lambda w, x: product(w[0], x), (1, 3, 4), (4,)),
    Row(p.reduce_sum_p, lambda w, x: product(w[None][0], x), (3, 4), (4,)),
    Row(p.copy_p, lambda w, x: product(w.copy(), x), (3, 4), (4,)),
    Row(p.name_p, by_hand(jnp.copy, lambda g: checkpoint_name(g, "g")), (3, 4), (4,)),
    Row(p.convert_element_type_p, in_single_precision, (3, 4), (4,)),
    Row(p.transpose_p, transposed_in_blocks, (6, 4), (4,)),
    Row(p.rev_p, lambda w, x: product(jnp.flip(w, 0), x), (3, 4), (4,)),
    Row(p.slice_p, lambda w, x: product(jnp.pad(w, ((1, 1), (0, 0))), x), (3, 4), (4,)),
    Row(p.pad_p, lambda w, x: product(w[1:3], x), (4, 4), (4,)),
    Row(lax.split_p, lambda w, x: product(jnp.concatenate([w, w]), x), (3, 4), (4,)),
    Row(lax.unstack_p, stacked_twice, (3, 4), (4,)),
    # Operands side by side
    Row(p.concatenate_p, in_two_halves, (6, 4), (4,)),
    Row(lax.stack_p, one_after_another, (2, 3, 4), (4,)),
    # Sums, and products with a known number
    Row(p.add_p, by_hand(plus_flipped, plus_flipped), (3, 4), (4,)),
    Row(p.add_jaxvals_p, lambda w, x: product(w, x) + product(w, 2 * x), (3, 4), (4,)),
    Row(p.sub_p, by_hand(minus_flipped, minus_flipped), (3, 4), (4,)),
    Row(p.neg_p, lambda w, x: product(-w, x), (3, 4), (4,)),
    Row(p.mul_p, lambda w, x: product(2 * w, x), (3, 4), (4,)),
    Row(p.div_p, lambda w, x: product(w / 2, x), (3, 4), (4,)),
    # Terms
    Row(p.dot_general_p, product, (3, 4), (4,)),
    Row(p.scatter_add_p, embedding, (6, 4), (4,)),
    Row(p.dynamic_update_slice_p, one_line, (6, 4), (4,)),
    Row(p.conv_general_dilated_p, image_loss, (3, 2, 2, 2), (2, 4, 4)),
    Row(p.scan_p, recurrent, (3, 3), (4, 3)),
    Row(p.scan_p, layers, (4, 3, 3), (3,)),
]


@pytest.fixture
def used(monkeypatch):
    """The primitives whose rules say something of a value, while a test runs."""
    found = set()

    def counted(primitive, own):
        @functools.wraps(own)
        def fun(*args):
            parts = own(*args)
            if parts is not None:
                found.add(primitive)
            return parts

        return fun

    for primitive, own in RULES.items():
        monkeypatch.setitem(RULES, primitive, counted(primitive, own))
    return found


def draw(row):
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], row.w), jax.random.normal(keys[1], (N, *row.x))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.primitive.name)
def test_a_rule(row, used, x64):
    """The leaf stays in factors through the primitive, and its rows are right."""
    w, x = draw(row)
    want = np.asarray(jax.vmap(jax.grad(row.fun), (None, 0))(w, x))
    with factors_kept():
        J = jacobian(row.fun)(w, x)
    assert row.primitive in used
    (leaf,) = leaves_of(J)
    assert not is_dense(leaf)
    got = J.to_rows(), J.norms(), J.sum()
    norms = np.linalg.norm(want.reshape(N, -1), axis=1)
    # A gradient in float32 on the way has its rounding.
    rtol = 1e-6 if row.primitive is p.convert_element_type_p else None
    assert tree_allclose(got, (want, norms, want.sum(0)), rtol)


def test_every_rule_has_a_row():
    assert {row.primitive for row in ROWS} == set(RULES)


def test_a_rule_that_makes_another_shape_is_not_followed(monkeypatch, x64):
    """The leaf is right; in other tests the warning is an error."""

    def wrong(equation, value, view):
        return [through(equation.inputs[0], view)]

    monkeypatch.setitem(RULES, p.reshape_p, wrong)
    row = ROWS[0]
    w, x = draw(row)
    with factors_kept(), pytest.warns(UserWarning, match="the rule of reshape gives"):
        J = jacobian(row.fun)(w, x)
    assert tree_allclose(J.to_rows(), jax.vmap(jax.grad(row.fun), (None, 0))(w, x))


def test_a_new_primitive_is_one_function(monkeypatch, x64):
    """Without its rule a primitive makes a dense term; with it, factors."""
    row = next(row for row in ROWS if row.primitive is p.dot_general_p)
    w, x = draw(row)

    def leaf():
        with factors_kept():
            (found,) = leaves_of(jacobian(row.fun)(w, x))
        return found

    own = RULES[p.dot_general_p]
    monkeypatch.delitem(RULES, p.dot_general_p)
    assert is_dense(leaf())
    assert leaf().summands[0].reason == "stopped at dot_general"
    rule(p.dot_general_p)(own)
    assert not is_dense(leaf())
