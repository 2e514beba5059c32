"""A test process lets compiled programs go before it holds too much."""

import jax
import jax.numpy as jnp
import memory
import pytest

pytestmark = pytest.mark.any_release


def test_released_programs_are_compiled_again():
    traces = []

    @jax.jit
    def fun(x):
        traces.append(x)
        return x + 1

    fun(jnp.ones(3))
    fun(jnp.ones(3))
    assert len(traces) == 1
    assert memory.release() == pytest.approx(memory.resident_bytes(), rel=0.1)
    assert fun(jnp.ones(3))[0] == 2
    assert len(traces) == 2


def test_memory_is_released_above_a_bound_and_then_not_at_once(monkeypatch):
    sizes = iter([90, 110, 125, 131, 80])
    left = iter([120, 70])
    monkeypatch.setattr(memory, "resident_bytes", lambda: next(sizes))
    monkeypatch.setattr(memory, "release", lambda: next(left))
    watch = memory.Watch(bound=100, step=10)
    for _ in range(5):
        watch.look()
    assert watch.releases == [(110, 120), (131, 70)]
    assert watch.next == 100
