"""Complex outputs as pairs of real ones: the recipe of the docs, against plain JAX."""

import jax
import jax.numpy as jnp
import pytest
from helpers import tree_allclose

from pytree_grads import jacobian

pytestmark = pytest.mark.any_release

N = 5
KEYS = jax.random.split(jax.random.key(0), 4)


def log_psi(p, x):
    h = x @ p["w"]
    one = jax.lax.complex(jnp.ones(()), jnp.full((), 0.5)).astype(complex)
    return jnp.sum(jnp.log(jnp.cosh(one * h.astype(complex))) * p["v"].astype(complex))


def pair(p, x):
    z = log_psi(p, x)
    return {"re": z.real, "im": z.imag}


def params(dtype):
    p = {"w": jax.random.normal(KEYS[0], (4, 3)), "v": jax.random.normal(KEYS[1], (3,))}
    if dtype is complex:
        p["w"] = jax.lax.complex(p["w"], 0.1 * p["w"][::-1])
        p["v"] = jax.lax.complex(p["v"], p["v"][::-1])
    return jax.tree.map(lambda x: x.astype(dtype), p)


def problem(dtype):
    x = jax.random.normal(KEYS[2], (N, 4), float).astype(dtype)
    w = jnp.exp(jax.lax.complex(jnp.zeros(N), jnp.arange(1.0 * N)))
    return params(dtype), x, w


MODES = [{}, {"recompute": True}, {"chunk_size": 2}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def flat(rows):
    return jnp.concatenate([x.reshape(N, -1) for x in jax.tree.leaves(rows)], axis=1)


def vector(tree):
    return jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])


@each_mode
def test_real_parameters(mode, x64):
    p, x, w = problem(float)
    rows = jax.vmap(jax.jacrev(pair), (None, 0))(p, x)
    J = jax.lax.complex(flat(rows["re"]), flat(rows["im"]))
    C = jacobian(pair, **mode)(p, x)
    real = C.weighted_sum({"re": w.real, "im": w.imag})
    imag = C.weighted_sum({"re": w.imag, "im": -w.real})
    want = J.conj().T @ w
    assert tree_allclose(vector(real), want.real)
    assert tree_allclose(vector(imag), want.imag)
    G = C.gram()
    kernel = jax.lax.complex(
        G["re"]["re"] + G["im"]["im"], G["im"]["re"] - G["re"]["im"]
    )
    assert tree_allclose(kernel, J @ J.conj().T)


@each_mode
def test_holomorphic_functions_of_complex_parameters(mode, x64):
    p, x, c = problem(complex)
    J = flat(jax.vmap(jax.grad(log_psi, holomorphic=True), (None, 0))(p, x))
    C = jacobian(pair, **mode)(p, x)
    found = C.weighted_sum({"re": c.real, "im": -c.imag})
    assert tree_allclose(vector(found), J.T @ c)
    assert tree_allclose(C.gram()["re"]["re"], J.conj() @ J.T)


def test_the_error_names_the_recipe():
    with pytest.raises(TypeError, match="real and imaginary parts"):
        jacobian(log_psi)(params(float), jnp.ones((N, 4)))
