"""Kernels of several outputs: whole, and traced over the outputs."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from models import MODELS
from routes import factors_kept, few_at_once, leaves_of

from pytree_grads import jacobian
from pytree_grads._engine.products.kernels import shares_pairs
from pytree_grads._engine.products.routes import gram_prefers_rows
from pytree_grads._jax.compat import all_equations

pytestmark = pytest.mark.any_release

N, K = 5, 3
MODES = [{}, {"recompute": True}, {"chunk_size": 2}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def dense(p, x):
    """T = 1: left vectors are shared by the outputs."""
    h = jnp.tanh(x[0] @ p["w"] + p["b"])
    return h @ p["v"]


def positions(p, x):
    """T = 2, and a tree of outputs."""
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    return {"h": (h @ p["v"])[:, :2].sum(0), "s": jnp.sum(h)}


def scanned(p, x):
    """Blocks of one pair, and a penalty that all examples share."""
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x[0], p["layers"])
    return h[:K] + jnp.sum(p["b"] ** 2)


def mixed(p, x):
    """Left vectors of each output, for a weight that multiplies cotangents."""
    h = jax.grad(lambda x: jnp.sum(jnp.sin(x @ p["w"])))(x[0])
    return (h[:, None] * jnp.cos(x[0] @ p["square"])[None, :]).ravel()[:K]


def table(p, x):
    return p["w"][jnp.argmax(x[0])][:K] * x[0, 0]


def turned(p, x):
    """T = 2; outputs share the right vectors of one weight, the left of another."""
    h = jnp.tanh(p["square"] @ x.T).T @ p["w"]
    return jnp.tanh(h).sum(0)[:K]


def stacked(p, x):
    """Blocks of two pairs, whose outputs share one side."""
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, p["layers"])
    return h.sum(0)[:K]


KINDS = (dense, positions, scanned, mixed, table, turned, stacked)
FUNCTIONS = {f.__name__: f for f in KINDS}
each_function = pytest.mark.parametrize("name", FUNCTIONS)


def params():
    shapes = {"w": (4, 6), "b": (6,), "v": (6, K), "layers": (3, 4, 4)}
    shapes["square"] = (4, 4)
    return {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def rows(fun, x):
    """All rows as an array (N, K, P)."""

    def flat(p, x):
        leaves = jax.tree.leaves(fun(p, x))
        return jnp.concatenate([jnp.ravel(x) for x in leaves])

    found = jax.vmap(jax.jacrev(flat), (None, 0))(params(), x)
    flat = [x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(found)]
    return np.concatenate(flat, axis=-1)


@each_mode
@each_function
def test_kernels_of_outputs(name, mode, x64):
    fun, x, y = FUNCTIONS[name], normal(9, N, 2, 4), normal(10, 4, 2, 4)
    a, b = rows(fun, x), rows(fun, y)

    @jax.jit
    def kernels(p, x, y, s):
        J, other = (jacobian(fun, **mode)(p, z) for z in (x, y))
        scaled = J.scale(s)
        return (
            J.gram(trace=True),
            J.gram(other, trace=True),
            other.gram(scaled, trace=True),
            J.gram(trace=True, groups="leaves"),
            sum(map(jnp.sum, jax.tree.leaves(J.gram(other)))),
        )

    J = jacobian(fun, **mode)(params(), x)
    s = jax.tree.map(lambda x: jnp.sin(jnp.arange(x.size)).reshape(x.shape), J.norms())
    flat = jnp.concatenate([x.reshape(N, -1) for x in jax.tree.leaves(s)], axis=1)
    own, between, scaled, leaves, whole = kernels(params(), x, y, s)
    assert tree_allclose(own, np.einsum("ikp,jkp->ij", a, a), rtol=1e-12)
    assert tree_allclose(between, np.einsum("ikp,jkp->ij", a, b), rtol=1e-12)
    want = np.einsum("ikp,jkp,jk->ij", b, a, flat)
    assert tree_allclose(scaled, want, rtol=1e-11)
    assert tree_allclose(sum(jax.tree.leaves(leaves)), own, rtol=1e-12)
    assert np.isclose(whole, np.einsum("ikp,jlp->", a, b))


SHARED = {"positions": "w", "turned": "square", "stacked": "layers"}


@pytest.mark.parametrize(("name", "leaf"), SHARED.items())
@pytest.mark.parametrize("entries", [1, 1 << 20])
def test_rows_of_several_pairs_whose_outputs_share_vectors(name, leaf, entries, x64):
    fun, x, y = FUNCTIONS[name], normal(9, N, 2, 4), normal(10, 4, 2, 4)
    a, b = rows(fun, x), rows(fun, y)
    with factors_kept(), few_at_once(entries):
        J, other = (jacobian(fun)(params(), z) for z in (x, y))
        one, two = (leaves_of(z)[sorted(params()).index(leaf)] for z in (J, other))
        assert shares_pairs(one, two)
        assert not gram_prefers_rows(one, two)
        traced, whole = J.gram(other, trace=True), J.gram(other)
    assert tree_allclose(traced, np.einsum("ikp,jkp->ij", a, b), rtol=1e-12)
    total = sum(map(jnp.sum, jax.tree.leaves(whole)))
    assert np.isclose(total, np.einsum("ikp,jlp->", a, b), rtol=1e-12)
    if name != "positions":
        assert tree_allclose(whole, np.einsum("ikp,jlp->ikjl", a, b), rtol=1e-12)


@each_mode
def test_the_trace_of_one_output_is_the_kernel(mode, x64):
    x = normal(9, N, 2, 4)
    J = jacobian(lambda p, x: dense(p, x)[0], **mode)(params(), x)
    assert tree_allclose(J.gram(trace=True), J.gram())


@each_mode
def test_traced_kernels_inside_grad_and_vmap(mode, x64):
    x = normal(9, N, 2, 4)

    def ours(p):
        return jnp.sum(jacobian(dense, **mode)(p, x).gram(trace=True) ** 2)

    def plainly(p):
        found = jax.vmap(jax.jacrev(dense), (None, 0))(p, x)
        flat = [x.reshape(N, -1) for x in jax.tree.leaves(found)]
        flat = jnp.concatenate(flat, axis=1)
        return jnp.sum((flat @ flat.T) ** 2)

    p = params()
    assert tree_allclose(jax.grad(ours)(p), jax.grad(plainly)(p), rtol=1e-11)
    many = jax.tree.map(lambda x: jnp.stack([x, x / 2]), p)
    assert tree_allclose(jax.vmap(ours)(many), jax.vmap(plainly)(many), rtol=1e-11)


def test_complex_rows_are_conjugated_on_the_left(x64):
    w = jax.lax.complex(normal(0, 4, 3), normal(1, 4, 3))

    def fun(w, x):
        z = x @ w
        return jnp.stack([jnp.real(z[0] ** 2), jnp.imag(z[1] * z[2])])

    x = jax.lax.complex(normal(2, N, 4), normal(3, N, 4))
    a = jax.vmap(jax.jacrev(fun), (None, 0))(w, x).reshape(N, 2, -1)
    J = jacobian(fun)(w, x)
    want = np.einsum("ikp,jkp->ij", a.conj(), a)
    assert tree_allclose(J.gram(trace=True), want)
    assert tree_allclose(J.gram(), np.einsum("ikp,jlp->ikjl", a.conj(), a))


@pytest.mark.parametrize("name", ["perceptron", "scan_over_layers", "tied_embedding"])
def test_kernels_of_models_with_two_outputs(name, x64):
    """The output of a model beside another function of it."""
    fun, p, batch = MODELS[name]()

    def both(p, *example):
        value = fun(p, *example)
        return jnp.stack([value, jnp.sin(value)])

    rows = jax.vmap(jax.jacrev(both), (None, *[0] * len(batch)))(p, *batch)
    flat = [x.reshape(*x.shape[:2], -1) for x in jax.tree.leaves(rows)]
    flat = np.concatenate(flat, axis=-1)
    with factors_kept():
        J = jax.jit(jacobian(both))(p, *batch)
        traced, whole = J.gram(trace=True), J.gram()
    assert tree_allclose(traced, np.einsum("ikp,jkp->ij", flat, flat), rtol=1e-11)
    assert tree_allclose(whole, np.einsum("ikp,jlp->ikjl", flat, flat), rtol=1e-11)


def wide(p, x):
    h = x
    for w, b in p[:-1]:
        h = jnp.tanh(h @ w + b)
    return h @ p[-1][0] + p[-1][1]


def problem(n, k):
    sizes = [64, 64, 64, k]
    pairs = itertools.pairwise(sizes)
    p = [(normal(i, a, b) / 8, jnp.zeros(b)) for i, (a, b) in enumerate(pairs)]
    return p, normal(20, n, 64)


def test_no_array_of_a_traced_kernel_holds_all_pairs_of_outputs():
    n, k = 24, 12
    p, x = problem(n, k)
    jaxpr = jax.make_jaxpr(lambda p, x: jacobian(wide)(p, x).gram(trace=True))(p, x)
    largest = max(v.aval.size for eqn in all_equations(jaxpr) for v in eqn.outvars)
    assert largest < n * k * n * k / 2


def products(fun, *args):
    """Multiplications of contractions in the compiled program, by its FLOPs."""
    return jax.jit(fun).lower(*args).compile().cost_analysis()["flops"]


def by_hand(p, x):
    """Products of inputs times products of cotangents, layer by layer."""
    inputs, n, k = [x], len(x), p[-1][0].shape[1]
    for w, b in p[:-1]:
        inputs.append(jnp.tanh(inputs[-1] @ w + b))
    cotangents = jnp.broadcast_to(jnp.eye(k), (n, k, k))
    kernel = jnp.zeros((n, k, n, k))
    for (w, _), h in zip(reversed(p), reversed(inputs), strict=True):
        flat = cotangents.reshape(n * k, -1)
        both = (flat @ flat.T).reshape(n, k, n, k)
        kernel = kernel + (h @ h.T + 1)[:, None, :, None] * both
        cotangents = (cotangents @ w.T) * (1 - h**2)[:, None]
    return kernel


def test_a_kernel_of_many_outputs_costs_what_it_costs_by_hand():
    """One product of inputs and one of cotangents for a weight and its bias."""
    p, x = problem(32, 10)

    def ours(p, x):
        return jacobian(wide)(p, x).gram()

    with jax.numpy_rank_promotion("allow"):
        assert np.allclose(ours(p, x), by_hand(p, x), rtol=1e-4, atol=1e-4)
        assert products(ours, p, x) < 1.1 * products(by_hand, p, x)
        hand = jax.jit(by_hand).lower(p, x).compile().memory_analysis()
    mine = jax.jit(ours).lower(p, x).compile().memory_analysis()
    assert mine.temp_size_in_bytes < 1.2 * hand.temp_size_in_bytes
