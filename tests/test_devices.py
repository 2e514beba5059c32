"""Every call on eight devices, however batch and parameters are laid out, is as on one."""

import functools

import jax
import pytest
from helpers import tree_allclose
from layouts import CALLS, LAYOUTS, one_device


@functools.cache
def expected(call):
    return one_device(CALLS[call])


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_devices_give_what_one_gives(layout, call):
    with jax.enable_x64(True):
        numbers, sums = LAYOUTS[layout].run(CALLS[call])
        want_numbers, want_sums = expected(call)
        wanted = {name: want_numbers[name] for name in numbers}
        assert tree_allclose(numbers, wanted, rtol=1e-11)
        assert tree_allclose(sums, want_sums, rtol=1e-11)
