"""What is compiled: a linear combination as by hand, and loops of layers that do not
grow.
"""

import re

import jax
import jax.numpy as jnp
import pytest

from pytree_grads import Vector, jacobian, linear_combination

LEAVES, TREES, SIZE = 20, 4, 4096


def by_hand(coefficients, trees):
    def combine(*leaves):
        return sum(
            (c * leaf for c, leaf in zip(coefficients[1:], leaves[1:], strict=True)),
            start=coefficients[0] * leaves[0],
        )

    return jax.tree.map(combine, *trees)


def with_operators(coefficients, trees):
    return sum(
        c * Vector(tree) for c, tree in zip(coefficients, trees, strict=True)
    ).tree


@pytest.fixture
def arguments():
    trees = [
        {f"leaf{i}": jnp.full(SIZE, float(k + i)) for i in range(LEAVES)}
        for k in range(TREES)
    ]
    return jnp.linspace(0.5, 1.5, TREES), trees


def instructions(combine, arguments):
    """The optimised program, with numbers for names and no word of where its source
    stands.
    """
    text = jax.jit(combine).lower(*arguments).compile().as_text()
    text = re.sub(r", metadata=\{[^}]*\}", "", text)
    lines = "\n".join(re.findall(r"^ +((?:ROOT )?%.* = .*)$", text, re.MULTILINE))
    numbers = {}
    return re.sub(
        r"%[\w.-]+", lambda name: numbers.setdefault(name[0], f"%{len(numbers)}"), lines
    )


@pytest.mark.parametrize("combine", [linear_combination, with_operators])
def test_the_program_is_the_one_by_hand(combine, arguments):
    ours, plain = instructions(combine, arguments), instructions(by_hand, arguments)
    assert ours.count(" fusion(") == LEAVES
    assert ours.count(" multiply(") == LEAVES * TREES
    assert ours == plain


def test_no_temporary_memory(arguments):
    memory = jax.jit(linear_combination).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < SIZE  # less than any leaf


def most_operands_of_a_loop(depth):
    """Of the clipped sum of a residual stream of that many normalised layers."""

    def loss(layers, x):
        for into, out in layers:
            centred = x - jnp.mean(x, axis=-1, keepdims=True)
            x = x + jnp.tanh(centred @ into) @ out
        return jnp.sum(x**2)

    layers = [(jnp.eye(32), jnp.eye(32))] * depth
    clipped = jax.jit(lambda layers, x: jacobian(loss)(layers, x).clip(1.0).sum())
    text = clipped.lower(layers, jnp.ones((4, 8, 32))).compile().as_text()
    return max(x.count("%") for x in re.findall(r" fusion\((.*?)\), kind=kLoop", text))


def test_a_cotangent_of_a_residual_stream_is_made_once():
    """Each is the one before it and a branch, not all branches again."""
    assert most_operands_of_a_loop(9) == most_operands_of_a_loop(12) < 9


def test_a_loop_over_windows_takes_arrays_without_axes_of_size_one():
    """XLA would copy them: it lays such axes out anew."""
    numbers = ("NHWC", "HWIO", "NHWC")

    def fun(kernels, x):
        for kernel in kernels:
            x = jax.lax.conv_general_dilated(
                x[None], kernel, (1, 1), "SAME", None, None, numbers
            )
            x = jnp.tanh(x[0])
        return jnp.sum(x)

    kernels = [jnp.ones((3, 3, 6, 6)), jnp.ones((3, 3, 6, 6))]
    clipped = jax.jit(lambda p, x: jacobian(fun)(p, x).clip(1.0).sum())
    text = clipped.lower(kernels, jnp.ones((4, 8, 8, 6))).as_text()
    loops = [line for line in text.splitlines() if "stablehlo.while" in line]
    assert any("tensor<4x10x10x6xf32>" in loop for loop in loops)
    assert not any("x1x10x10x6xf32>" in loop for loop in loops)
