"""The strictness under which every test runs, set once and before JAX starts."""

import gc
import os

import hypothesis
import jax
import pytest
from memory import Watch
from quick import spend_little

# Programs of tests run once; tracing makes many objects that stay, and looking at them
# takes long.
spend_little()
gc.set_threshold(100_000, 20, 100)

# Nothing is promoted or broadcast behind one's back, in the package or in the tests.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_num_cpu_devices", 8)

# A compilation makes the first example slow; CI must find the same failure twice.
hypothesis.settings.register_profile("local", deadline=None, max_examples=30)
hypothesis.settings.register_profile(
    "ci", deadline=None, max_examples=30, derandomize=True
)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "local")


@pytest.fixture
def x64():
    """Run a test in double precision, where the oracle hardly rounds."""
    with jax.enable_x64(True):
        yield


MEMORY = Watch()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """Let compiled programs go between two tests where a process holds too many."""
    MEMORY.look()
