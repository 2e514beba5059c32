"""What the tests share: one comparison of trees, a counter of traces, a rule that is
not linear.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Relative to the largest entry of the leaf. A sum of n terms of one size errs by about
# sqrt(n) units in the last place; no test sums more than some thousand: 1e-5 is 84
# units of float32, 1e-12 is 4500 of float64. Results in bfloat16 and float16 are
# carried in float32 and rounded once or, where XLA rounds in between, a few times: 4
# units of 2**-8 and of 2**-11.
TOLERANCES = {
    "bfloat16": 4 * 2.0**-8,
    "float16": 4 * 2.0**-11,
    "float32": 1e-5,
    "complex64": 1e-5,
    "float64": 1e-12,
    "complex128": 1e-12,
}


def tree_allclose(got, expected, rtol=None):
    """True if two trees agree in structure, shapes, dtypes and values; else raise,
    naming the leaf.

    NaN equals NaN and an infinity itself. ``rtol`` replaces the tolerance of the dtype,
    relative to the largest finite entry of the expected leaf; integers must be equal.
    """
    got_structure, expected_structure = (
        jax.tree.structure(got),
        jax.tree.structure(expected),
    )
    assert got_structure == expected_structure, (
        f"{got_structure} is not {expected_structure}"
    )
    for (path, want), have in zip(
        jax.tree.leaves_with_path(expected), jax.tree.leaves(got), strict=True
    ):
        where = jax.tree_util.keystr(path)
        assert have.shape == want.shape, (
            f"{where}: shape {have.shape} is not {want.shape}"
        )
        assert have.dtype == want.dtype, (
            f"{where}: dtype {have.dtype} is not {want.dtype}"
        )
        if want.dtype == jax.dtypes.float0:
            continue
        tolerance = TOLERANCES.get(want.dtype.name, 0.0) if rtol is None else rtol
        wide = np.complex128 if np.iscomplexobj(want) else np.float64
        have, want = np.asarray(have).astype(wide), np.asarray(want).astype(wide)
        size = np.max(np.abs(want), where=np.isfinite(want), initial=0.0)
        np.testing.assert_allclose(
            have, want, rtol=0, atol=tolerance * size, err_msg=where
        )
    return True


def equations(closed_jaxpr):
    """Every equation of a jaxpr that is not itself a call of ``jit``, bodies
    included.
    """
    for eqn in closed_jaxpr.jaxpr.eqns:
        if eqn.primitive.name == "jit":
            yield from equations(eqn.params["jaxpr"])
        else:
            yield eqn


class CompilationCounter:
    """Counts the programs that XLA compiles inside a ``with`` block."""

    def __enter__(self):
        self.count = 0
        self.is_active = True
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *_):
        self.is_active = False  # JAX has no public way to take back one listener

    def _listen(self, event, duration, **_):
        self.count += (
            self.is_active and event == "/jax/core/compile/backend_compile_duration"
        )


class TraceCounter:
    """A function that counts how often its Python body runs, that is, how often it is
    traced.
    """

    def __init__(self, fun):
        functools.update_wrapper(self, fun, updated=())
        self.fun = fun
        self.count = 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        return self.fun(*args, **kwargs)


def clips_cotangent(bound):
    """The identity, with a backward pass that is not linear: it clips the cotangent."""

    @jax.custom_vjp
    def same(x):
        return x

    same.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -bound, bound),))
    return same
