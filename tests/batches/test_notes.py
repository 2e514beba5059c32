"""Errors in ``fun`` and ``outer`` say what these were called with: one note, in all
modes.
"""

import jax
import jax.numpy as jnp
import pytest
from helpers import clips_cotangent

from pytree_grads import (
    chain_rule_grad,
    chain_rule_value_and_grad,
    fisher_product,
    gauss_newton_product,
    jacobian,
    per_example_grad,
    per_example_value_and_grad,
    reassemble,
    value_and_jacobian,
)

N = 8
P = {"w": jnp.ones((5, 3)), "v": jnp.ones(3)}
X, Y = jnp.ones((N, 5)), jnp.ones(N)
OF_FUN = """\
fun was called with one example, not with the batch of 8:
  params['v']: float32[3]
  params['w']: float32[5,3]
  x: float32[5] (axis 0 of float32[8,5] taken off)
  y: float32[] (axis 0 of float32[8] taken off)"""


def good(params, x, y):
    return jnp.tanh(x @ params["w"]) @ params["v"] - y


def for_a_batch(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"])[:, None] - y)


class Raised(Exception):
    pass


def raises(params, x, y):
    raise Raised


def raises_backwards(params, x, y):
    @jax.custom_vjp
    def same(value):
        return value

    def backward(_, cotangent):
        raise Raised

    same.defvjp(lambda value: (value, None), backward)
    return same(good(params, x, y))


def notes(call, kind=Exception):
    """Our notes on the error of a call; JAX has others."""
    with pytest.raises(kind) as caught:
        call()
    found = getattr(caught.value, "__notes__", [])
    return [note for note in found if "was called with" in note]


def mean(outputs, *rest):
    return jnp.mean(outputs)


V = jax.tree.map(jnp.ones_like, P)
MODES = [
    {},
    {"chunk_size": 3},
    {"recompute": True},
    {"recompute": True, "chunk_size": 3},
]
CALLS = {
    "per_example_grad": per_example_grad,
    "per_example_value_and_grad": per_example_value_and_grad,
    "chain_rule_grad": lambda fun, **mode: chain_rule_grad(mean, fun, **mode),
    "chain_rule_value_and_grad": lambda fun, **mode: chain_rule_value_and_grad(
        mean, fun, **mode
    ),
    "gauss_newton_product": lambda fun, **mode: (
        lambda *args: gauss_newton_product(mean, fun, **mode)(*args)(V)
    ),
    "fisher_product": lambda fun, **mode: (
        lambda *args: fisher_product(fun, **mode)(*args)(V)
    ),
    "jacobian": lambda fun, **mode: lambda *args: jacobian(fun, **mode)(*args).norms(),
    "value_and_jacobian": lambda fun, **mode: (
        lambda *args: value_and_jacobian(fun, **mode)(*args)[1].sum()
    ),
}
CASES = [
    (name, mode)
    for name in CALLS
    for mode in MODES
    if "recompute" not in mode or name in ("jacobian", "value_and_jacobian")
]


@pytest.mark.parametrize("name, mode", CASES)
def test_an_error_in_fun_has_one_note(name, mode):
    assert notes(lambda: CALLS[name](for_a_batch, **mode)(P, X, Y)) == [OF_FUN]
    assert notes(lambda: CALLS[name](raises, **mode)(P, X, Y), Raised) == [OF_FUN]
    compiled = jax.jit(CALLS[name](raises, **mode))
    assert notes(lambda: compiled(P, X, Y), Raised) == [OF_FUN]


@pytest.mark.parametrize("name, mode", CASES)
def test_an_error_in_a_backward_pass_has_the_note(name, mode):
    if name in (
        "gauss_newton_product",
        "fisher_product",
    ):  # J v is forward mode: JAX refuses
        assert notes(lambda: CALLS[name](raises_backwards, **mode)(P, X, Y)) == [OF_FUN]
    else:
        assert notes(
            lambda: CALLS[name](raises_backwards, **mode)(P, X, Y), Raised
        ) == [OF_FUN]


@pytest.mark.parametrize("name", ["per_example_grad", "fisher_product"])
def test_an_output_that_is_no_scalar_says_what_fun_was_called_with(name):
    call = lambda: CALLS[name](lambda params, x, y: x @ params["w"])(P, X, Y)  # noqa: E731
    with pytest.raises(ValueError, match=r"must be a scalar, got float32\[3\]"):
        call()
    assert notes(call) == [OF_FUN]


@pytest.mark.parametrize("recompute", [False, True])
def test_an_output_that_cannot_be_differentiated_says_what_fun_was_called_with(
    recompute,
):
    assert notes(
        lambda: jacobian(lambda params, x, y: 1, recompute=recompute)(P, X, Y)
    ) == [OF_FUN]


@pytest.mark.parametrize("product", ["norms", "sum", "gram", "to_rows", "check"])
def test_an_error_that_comes_with_a_product_has_one_note(product):
    calls = []

    def once(params, x, y):
        calls.append(x)
        if len(calls) > 1:
            raise RuntimeError
        return good(params, x, y)

    J = jacobian(once, chunk_size=3)(P, X, Y)
    want = (
        OF_FUN.replace("8", "4") if product == "check" else OF_FUN
    )  # it takes a few examples
    assert notes(getattr(J, product), RuntimeError) == [want]


@pytest.mark.parametrize("chunk_size", [None, 3])
@pytest.mark.parametrize(
    "made", [chain_rule_grad, chain_rule_value_and_grad, gauss_newton_product]
)
def test_an_error_in_outer_has_one_note(made, chunk_size):
    def outer(outputs, params, labels, weights):
        return outputs @ labels

    def call(outer):
        product = made(outer, good, chunk_size=chunk_size, outer_has_params=True)
        return product(P, X, Y, outer_args=(jnp.ones((3, 2)), {"a": jnp.ones(2)}))

    words = """\
outer was called with the outputs of all examples, stacked:
  outputs: float32[8]
  params['v']: float32[3]
  params['w']: float32[5,3]
  outer_args[0]: float32[3,2]
  outer_args[1]['a']: float32[2]"""
    assert notes(lambda: call(outer)) == [words]
    assert notes(lambda: call(lambda outputs, params, *_: outputs), ValueError) == [
        words
    ]
    assert notes(lambda: call(lambda outputs: jnp.sum(outputs)), TypeError) == [words]


def test_an_error_in_the_outer_function_of_reassemble_has_one_note():
    call = lambda: reassemble(lambda outputs: outputs @ X.T, Y, {"w": X})  # noqa: E731
    head = "outer was called with the outputs of all examples, stacked:\n"
    assert notes(call) == [head + "  outputs: float32[8]"]


def test_what_is_mapped_over_other_axes_and_not_at_all():
    def fun(params, batch, activation, *, scale):
        raise Raised

    args = (P["v"], {"a": jnp.ones((3, 5)), "b": jnp.ones(2), "n": None}, jnp.tanh)
    in_axes = (None, {"a": -1, "b": None, "n": None}, None)
    call = lambda: per_example_grad(fun, in_axes=in_axes)(*args, scale=jnp.ones(5))  # noqa: E731
    words = """\
fun was called with one example, not with the batch of 5:
  params: float32[3]
  batch['a']: float32[3] (axis 1 of float32[3,5] taken off)
  batch['b']: float32[2]
  activation: a value of type PjitFunction
  scale: float32[] (axis 0 of float32[5] taken off)"""
    assert notes(call) == [words]


def test_long_trees_are_cut_short():
    trees = [[jnp.ones(2)] * 6, [jnp.ones(2)] * 40]
    notes_of = [notes(lambda t=t: per_example_grad(raises)(t, X, Y))[0] for t in trees]
    lines = [note.splitlines()[1:-2] for note in notes_of]
    assert lines[0] == [f"  params[{i}]: float32[2]" for i in range(6)]
    assert lines[1] == [*lines[0][:5], "  params: 35 more leaves"]


def test_the_innermost_function_has_the_note():
    def inner(p, z):
        raise Raised

    def fun(params, x, y):
        return jnp.sum(per_example_grad(inner)(params["v"], x))

    words = """\
fun was called with one example, not with the batch of 5:
  p: float32[3]
  z: float32[] (axis 0 of float32[5] taken off)"""
    assert notes(lambda: jacobian(fun)(P, X, Y), Raised) == [words]


def test_errors_in_arguments_have_no_note():
    assert notes(lambda: jacobian(good)(P, X, Y[:3]), ValueError) == []
    product = gauss_newton_product(mean, good)(P, X, Y)
    assert notes(lambda: product({"w": 1.0}), ValueError) == []
    assert notes(lambda: jacobian(good)(P, X, Y).weighted_sum(Y[:3]), ValueError) == []


def test_a_note_that_cannot_be_made_hides_no_error(monkeypatch):
    def broken(*args):
        raise RuntimeError

    monkeypatch.setattr("pytree_grads._batches.notes.describe", broken)
    assert notes(lambda: jacobian(raises)(P, X, Y), Raised) == []


def test_without_an_error_nothing_is_written(monkeypatch):
    def never(*args):
        raise AssertionError

    monkeypatch.setattr("pytree_grads._batches.notes.argument_names", never)
    monkeypatch.setattr("pytree_grads._batches.notes.describe", never)
    fun = lambda params, x, y: clips_cotangent(1.0)(good(params, x, y))  # noqa: E731
    jacobian(fun)(P, X, Y).clip(1.0).sum()
    chain_rule_grad(mean, fun, chunk_size=3)(P, X, Y)
    per_example_grad(fun)(P, X, Y)
