"""Rows times a diagonal in parameter space, against plain rows."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from models import MODELS, N
from routes import factors_kept, few_at_once
from rows import Given, Rows, assert_close

from pytree_grads import jacobian
from pytree_grads._jax.compat import all_equations

pytestmark = pytest.mark.any_release

MODES = [{}, {"recompute": True}, {"chunk_size": 2}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def numbers(shape):
    """Numbers of both signs, none near zero."""
    rng = np.random.default_rng(sum(shape) + len(shape))
    return jnp.asarray(rng.uniform(0.5, 2, shape) * rng.choice([-1, 1], shape))


def first(x):
    return numbers((*x.shape[:1], *[1] * (x.ndim - 1)))


def last(x):
    return numbers((*[1] * (x.ndim - 1), *x.shape[-1:]))


DIAGONALS = {
    "a number for each leaf": lambda x: numbers(()),
    "a number for each line": first,
    "a number for each column": last,
    "a number for each entry": lambda x: numbers(x.shape),
}
CHOSEN = (
    "perceptron",
    "scan_over_layers",
    "tied_embedding",
    "convolutions_in_scans",
    "complex_parameters",
)


def scaled(rows, d):
    def times(x, y):
        return x * np.asarray(y).astype(x.dtype) if np.ndim(y) else x * float(y)

    pairs = zip(rows.leaves, jax.tree.leaves(d), strict=True)
    return Rows([times(x, y) for x, y in pairs], rows.treedef)


# On most models in one mode.
CASES = [
    *((name, kind, {}) for name in CHOSEN for kind in DIAGONALS),
    *((name, kind, MODES[2]) for name in CHOSEN[:2] for kind in DIAGONALS),
    *(("perceptron", kind, MODES[1]) for kind in DIAGONALS),
]


@pytest.mark.parametrize(("name", "kind", "mode"), CASES)
def test_products_in_another_metric(name, kind, mode, x64):
    fun, p, batch = MODELS[name]()
    d = jax.tree.map(DIAGONALS[kind], p)
    plain = Rows.of(fun, p, batch)
    rows = scaled(plain, d)
    given = Given.draw(plain, p)

    @jax.jit
    def products(p, d, c, *batch):
        J = jacobian(fun, **mode)(p, *batch).scale_params(d)
        return {
            "rows": J.to_rows(),
            "norms": J.norms(),
            "sum": J.weighted_sum(c),
            "gram": J.gram(),
            "squares": J.square_sum(c),
            "applied": J @ given.v,
            "clipped": J.clip(given.bound).sum(),
        }

    with factors_kept():
        found = products(p, d, given.c, *batch)
    want = {
        "rows": rows.to_rows(),
        "norms": rows.norms(),
        "sum": rows.weighted_sum(given.c),
        "gram": rows.gram(),
        "squares": rows.square_sum(given.c),
        "applied": rows.apply(given.v),
        "clipped": rows.clip(given.bound).weighted_sum(),
    }
    for product, value in want.items():
        assert_close(found[product], value, 1e-11)


def f(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"]) ** 2)


def problem():
    p = {"w": numbers((4, 6)), "b": numbers((6,))}
    return p, numbers((N, 4))


@each_mode
def test_with_weights_groups_other_metrics_and_sums(mode, x64):
    p, x = problem()
    d = {"w": numbers((4, 6)), "b": numbers((6,))}
    e = {"w": numbers((4, 1)), "b": 3.0}
    rows = Rows.of(f, p, (x,))
    J = jacobian(f, **mode)(p, x)
    twice = scaled(scaled(rows, d), e)
    assert_close(J.scale_params(d).scale_params(e).to_rows(), twice.to_rows(), 1e-12)
    clipped = J.clip(0.5).scale_params(d)
    assert_close(clipped.norms(), scaled(rows.clip(0.5), d).norms(), 1e-12)
    between = J.scale_params(d).gram(J.scale_params(e)[1:3])
    want = scaled(rows, d).gram(scaled(rows, e)[1:3])
    assert_close(between, want, 1e-12)
    norms = J.scale_params(d).norms(groups="leaves")
    assert_close(norms, scaled(rows, d).by_leaf(Rows.norms), 1e-12)
    total = J.scale_params(d) + 2 * J
    plain = jax.tree.map(
        lambda x, y: x + 2 * y, scaled(rows, d).to_rows(), rows.to_rows()
    )
    assert_close(total.to_rows(), plain, 1e-12)
    assert_close(total.norms(), Rows.from_tree(plain).norms(), 1e-11)
    total.check()


@each_mode
def test_outputs_grad_and_vmap(mode, x64):
    p, x = problem()

    def outputs(p, x):
        return jnp.tanh(x @ p["w"] + p["b"])[:3]

    def ours(d):
        J = jacobian(outputs, **mode)(p, x).scale_params(d)
        return jnp.sum(J.gram(trace=True) ** 2) + jnp.sum(J.norms())

    def plainly(d):
        rows = jax.vmap(jax.jacrev(outputs), (None, 0))(p, x)
        flat = [(rows[k] * d[k][None, None]).reshape(N, 3, -1) for k in ("b", "w")]
        flat = jnp.concatenate(flat, axis=-1)
        kernel = jnp.einsum("ikp,jkp->ij", flat, flat)
        return jnp.sum(kernel**2) + jnp.sum(jnp.linalg.norm(flat, axis=-1))

    d = {"w": numbers((4, 6)), "b": numbers((6,))}
    assert tree_allclose(jax.grad(ours)(d), jax.grad(plainly)(d), rtol=1e-11)
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), d)
    assert tree_allclose(jax.vmap(ours)(many), jax.vmap(plainly)(many), rtol=1e-11)


def twice(p, x):
    """T = 2."""
    both = jnp.stack([x, x[::-1]])
    return jnp.sum(jnp.tanh(both @ p["w"]) ** 2) + jnp.sum(p["b"])


@pytest.mark.parametrize("kind", DIAGONALS)
@pytest.mark.parametrize("fun", [f, twice])
def test_the_table_says_which_norms_build_rows(fun, kind):
    p, x = problem()
    with factors_kept():
        J = jacobian(fun)(p, x).scale_params(jax.tree.map(DIAGONALS[kind], p))
    table = J.explain()
    (line,) = (line for line in table.splitlines() if line.startswith("['w']"))
    one = {f: "squares", twice: "inner products"}[fun]
    of_entries = {f: "squares", twice: "rows"}[fun]
    route = of_entries if kind == "a number for each entry" else one
    assert f" {route} " in line
    assert "times a diagonal in parameter space" in table


@pytest.mark.parametrize("name", ["perceptron", "convolutions_in_scans"])
@pytest.mark.parametrize("kind", ["dense", "kronecker", "tensor"])
def test_sketches_in_another_metric(name, kind, x64):
    """They are those of a linear function with the same rows."""
    fun, p, batch = MODELS[name]()
    d = jax.tree.map(DIAGONALS["a number for each entry"], p)
    rows = scaled(Rows.of(fun, p, batch), d).to_rows()

    def linear(p, rows):
        return sum(map(jnp.sum, jax.tree.leaves(jax.tree.map(jnp.multiply, p, rows))))

    with factors_kept():
        J = jax.jit(jacobian(fun))(p, *batch).scale_params(d)
    found, want = (
        X.sketch(jax.random.key(0), 9, kind=kind)
        for X in (J, jacobian(linear)(p, rows))
    )
    assert_close(found, want, 1e-11)


def test_norms_of_a_dense_layer_build_no_rows():
    p, x = {"w": numbers((32, 48)), "b": numbers((48,))}, numbers((16, 32))
    d = jax.tree.map(jnp.sin, p)

    def products(p, d, x):
        J = jacobian(f)(p, x).scale_params(d)
        return J.norms(), J.clip(1.0).sum(), J.square_sum()

    equations = all_equations(jax.make_jaxpr(products)(p, d, x))
    largest = max(v.aval.size for eqn in equations for v in eqn.outvars)
    assert largest == p["w"].size


def test_a_gramian_makes_some_products_at_a_time(x64):
    p, x = problem()
    d = jax.tree.map(jnp.sin, p)
    rows = scaled(Rows.of(f, p, (x,)), d)
    with factors_kept(), few_at_once(2 * N * (4 + 6)):
        found = jacobian(f)(p, x).scale_params(d).gram()
    assert_close(found, rows.gram(), 1e-12)


def test_numbers_that_are_large_where_all_rows_are_zero():
    """As roots of second moments are, of inputs that are always zero."""
    p, x = problem()
    p, x = jax.tree.map(jnp.float32, (p, x))
    x = x.at[:, 1].set(0.0)
    d = {"w": jnp.ones((4, 6)).at[1].set(1e30) * jnp.abs(p["w"]), "b": 1.0}
    d["w"] = d["w"].at[:, 2].multiply(1e-10)
    with factors_kept():
        J = jacobian(f)(p, x).scale_params(d)
    rows = scaled(Rows.of(f, p, (x,)), d)
    assert tree_allclose(J.norms(), rows.norms(), rtol=1e-5)
    assert tree_allclose(J.clip(1e-3).norms(), jnp.full(N, 1e-3), rtol=1e-5)


@each_mode
def test_the_check_is_of_rows_in_their_metric(mode):
    p, x = problem()
    J = jacobian(f, **mode)(p, x)
    for d in (
        {"w": p["w"], "b": 0.0},
        {"w": jnp.zeros((4, 6)), "b": p["b"]},
        {"w": 2.0, "b": -1e-9},
    ):
        J.scale_params(d).check()
        J.clip(0.1).scale_params(d)[1:].check()


def test_the_check_finds_what_only_a_metric_shows():
    p, x = problem()

    def faint(p, x):
        return f(p, x) + 1e-9 * p["faint"] * x[0]

    J = jacobian(faint)({**p, "faint": jnp.ones(())}, x)
    b, of_faint, w = J._rows.sources
    wrong = (b, jax.tree.map(lambda x: 2 * x, of_faint), w)
    J = replace(J, _rows=replace(J._rows, sources=wrong))
    J.check()
    with pytest.raises(ValueError, match=re.escape("params['faint']: to_rows")):
        J.scale_params({"w": 1.0, "b": 1.0, "faint": 1e9}).check()


J = jacobian(f)(*problem())
ERRORS = {
    "a missing leaf": (
        lambda: J.scale_params({"w": 1.0}),
        ValueError,
        "argument diagonal must be a tree like the parameters, but diagonal is not: "
        "missing keys ['b']",
    ),
    "another shape": (
        lambda: J.scale_params({"w": jnp.ones(6), "b": 1.0}),
        ValueError,
        "argument diagonal['w'] must have the shape (4, 6) of the parameter, or some "
        "of its axes with length 1, or be one number, got float32[6]",
    ),
    "complex numbers": (
        lambda: J.scale_params({"w": 1j, "b": 1.0}),
        TypeError,
        "argument diagonal['w'] must be a real number",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_table(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=re.escape(words)):
        call()
