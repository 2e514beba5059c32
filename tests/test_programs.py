"""What a linear combination compiles to: one fused loop a leaf, as one would write it by hand."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from pytree_grads import Vector, linear_combination

LEAVES, TREES, SIZE = 20, 4, 4096


def by_hand(coefficients, trees):
    def combine(*leaves):
        return sum(
            (c * leaf for c, leaf in zip(coefficients[1:], leaves[1:], strict=True)),
            start=coefficients[0] * leaves[0],
        )

    return jax.tree.map(combine, *trees)


def with_operators(coefficients, trees):
    return sum(c * Vector(tree) for c, tree in zip(coefficients, trees, strict=True)).tree


@pytest.fixture
def arguments():
    trees = [
        {f"leaf{i}": jnp.full(SIZE, float(k + i)) for i in range(LEAVES)} for k in range(TREES)
    ]
    return jnp.linspace(0.5, 1.5, TREES), trees


def operations(compiled):
    return Counter(re.findall(r"= \S+ ([a-z][\w-]*)\(", compiled.as_text()))


@pytest.mark.parametrize("combine", [linear_combination, with_operators])
def test_the_program_is_the_one_by_hand(combine, arguments):
    ours = jax.jit(combine).lower(*arguments).compile()
    plain = jax.jit(by_hand).lower(*arguments).compile()
    assert operations(ours)["fusion"] == LEAVES
    assert operations(ours)["multiply"] == LEAVES * TREES
    assert operations(ours) == operations(plain)


def test_no_temporary_memory(arguments):
    memory = jax.jit(linear_combination).lower(*arguments).compile().memory_analysis()
    assert memory.temp_size_in_bytes < SIZE  # less than any leaf
