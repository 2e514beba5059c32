"""What is called outside ``jit`` is compiled once for its shapes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CompilationCounter, tree_allclose

from pytree_grads import jacobian, value_and_jacobian

pytestmark = pytest.mark.any_release

N = 6
P = {"r": jnp.eye(3) / 5, "w": jnp.ones((4, 3)) / 3}
X = jnp.sin(jnp.arange(N * 12.0)).reshape(N, 12)
KEY = jax.random.key(0)

MODES = {
    "kept": {},
    "recompute": {"recompute": True},
    "chunks": {"chunk_size": 4},
    "chunks recomputed": {"chunk_size": 4, "recompute": True},
}
PRODUCTS = {
    "norms": lambda J: J.norms(),
    "sum": lambda J: J.sum(),
    "mean": lambda J: J.mean(),
    "weighted_sum": lambda J: J.weighted_sum(jnp.ones(N)),
    "square_sum": lambda J: J.square_sum(jnp.ones(N)),
    "gram": lambda J: J.gram(),
    "gram of others": lambda J: J @ J[1:4].T,
    "J @ v": lambda J: J @ P,
    "clip": lambda J: J.clip(1.0, nan_safe=True).sum(),
    "clip parts": lambda J: J.clip({"r": 1.0, "w": 2.0}).norms(),
    "scale": lambda J: J.scale(jnp.ones(N)).clip(1.0).mean(),
    "to_rows": lambda J: J.to_rows(),
    "sketch": lambda J: J.sketch(KEY, 4),
    "check": lambda J: J.check(2),
}


def recurrent(p, x):
    def step(carry, x):
        return jnp.tanh(carry @ p["r"] + x @ p["w"]), None

    return jnp.sum(jax.lax.scan(step, jnp.zeros(3), x.reshape(3, 4))[0])


@pytest.mark.parametrize("mode", MODES)
def test_products_outside_jit_are_compiled_once(mode):
    def make(x):
        return jacobian(recurrent, **MODES[mode])(P, x)

    first = {name: product(make(X)) for name, product in PRODUCTS.items()}
    for name, product in PRODUCTS.items():
        J = make(2 * X)
        with CompilationCounter() as counter:
            product(J)
        assert counter.count == 0, name
    inside = jax.jit(lambda J: {k: PRODUCTS[k](J) for k in PRODUCTS if k != "check"})(
        make(X)
    )
    del first["check"]
    assert tree_allclose(first, inside)


@pytest.mark.parametrize("mode", ["recompute", "chunks", "chunks recomputed"])
def test_outputs_too(mode):
    def make(x):
        return value_and_jacobian(recurrent, **MODES[mode])(P, x)[0]

    make(X), make(3 * X)
    with CompilationCounter() as counter:
        outputs = make(2 * X)
    assert counter.count == 0
    assert tree_allclose(outputs, jax.vmap(recurrent, (None, 0))(P, 2 * X))


def test_rows_that_are_kept_have_no_need_of_their_function():
    """A function that is another object each time does not compile its products
    again.
    """
    for scale in 2.0, 3.0, 3.0:
        make = jacobian(lambda p, x, s: s * recurrent(p, x), in_axes=(None, 0, None))
        J = make(P, X, np.full((), scale, np.float32))
        with CompilationCounter() as counter:
            J.clip(1.0).sum(), J.sketch(KEY, 4)
    assert counter.count == 0


@pytest.mark.parametrize("mode", MODES)
def test_an_array_of_the_host_that_changes_in_between(mode):
    table = np.ones(3, np.float32)
    make = jacobian(
        lambda p, x, t: recurrent(p, x) * jnp.sum(t),
        in_axes=(None, 0, None),
        **MODES[mode],
    )
    once = make(P, X, table).sum()
    table *= 2
    assert tree_allclose(make(P, X, table).sum(), jax.tree.map(lambda x: 2 * x, once))


@pytest.mark.parametrize("mode", MODES)
def test_under_transformations_outside_jit(mode):
    def total(x):
        J = jacobian(recurrent, **MODES[mode])(P, x)
        return jnp.sum(J.clip(0.5).sum()["w"]) + jnp.sum(J.sketch(KEY, 2))

    value, slope = jax.value_and_grad(total)(X)
    again, mapped = (
        jax.jit(jax.value_and_grad(total))(X),
        jax.vmap(total)(jnp.stack([X, 2 * X])),
    )
    assert tree_allclose((value, slope), again, rtol=1e-4)
    assert tree_allclose(mapped, jnp.stack([total(X), total(2 * X)]), rtol=1e-4)
