"""Rows kept, recomputed and streamed in chunks give the same products, whatever came
before.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import clips_cotangent, tree_allclose

from pytree_grads import jacobian

pytestmark = pytest.mark.any_release

N = 5
MODES = [
    {"chunk_size": 2},
    {"recompute": True},
    {"chunk_size": 3, "recompute": True},
]


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / 2)


def dense(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x**2)


def scanned(params, x):
    step = jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None))
    return jnp.sum(jax.lax.scan(step, x, params)[0] ** 2)


def two_outputs(params, x):
    h = jnp.tanh(x @ params["w"])
    return {"h": h[:2], "sum": jnp.sum(h * params["s"])}


MODELS = {
    "dense": (dense, lambda: ([normal(0, 7, 6), normal(1, 6, 4)], normal(2, N, 7))),
    "scanned": (scanned, lambda: (normal(3, 4, 6, 6), normal(4, N, 2, 6))),
    "outputs": (
        two_outputs,
        lambda: ({"w": normal(5, 6, 6), "s": normal(6, 6)}, normal(7, N, 6)),
    ),
}


def products(fun, settings):
    """All that may follow a clip, each from a Jacobian of its own."""

    def of(params, x):
        def new():
            return jacobian(fun, **settings)(params, x)

        weights = jax.tree.map(
            lambda n: jnp.linspace(-1, 2, n.size, dtype=n.dtype).reshape(n.shape),
            new().norms(),
        )
        groups = jax.tree.map(lambda p: 0.1, params)
        known, after, scaled = new(), new(), new().scale(weights)
        clipped = after.clip(0.2)
        return {
            "sum": new().clip(0.2).sum(),
            "mean": new().clip(0.2, nan_safe=True).mean(),
            "groups": new().clip(groups).sum(),
            "norms": new().clip(0.2).norms(),
            "scaled after": new().clip(0.2).scale(weights).sum(),
            "scaled before": new().scale(weights).clip(0.2).weighted_sum(weights),
            "slice": new().clip(0.2)[1:4].sum(),
            "twice": new().clip(groups).clip(0.15).sum(),
            "squares": new().clip(0.2).square_sum(weights),
            "gram": new().clip(0.2).gram(),
            "rows": new().clip(0.2).to_rows(),
            "norms first": (known.norms(), known.clip(0.2).sum()),
            "norms after": (
                clipped.sum(),
                after.norms(),
                clipped.norms(),
                after.clip(0.1).sum(),
            ),
            "of scaled rows": (scaled.clip(0.2).sum(), scaled.norms()),
        }

    return jax.jit(of)


@pytest.mark.parametrize("name", MODELS)
def test_every_mode_gives_the_same_products(name):
    fun, arguments = MODELS[name]
    with jax.enable_x64(True):
        params, x = arguments()
        want = products(fun, {})(params, x)
        for settings in MODES:
            got = products(fun, settings)(params, x)
            for product, value in want.items():
                assert tree_allclose(got[product], value, rtol=1e-12), (
                    settings,
                    product,
                )


def test_the_rest_of_a_batch_may_have_norms_in_other_parts():
    """Many small vectors of one form are worked on as one: here in the last chunk
    alone.
    """

    def fun(params, x):
        return (
            sum(jnp.sum(jnp.sin(b) * x * i) for i, b in enumerate(params["b"], 1))
            + params["s"]
        )

    params = {"b": [normal(i, 30) for i in range(5)], "s": jnp.ones(())}
    x = normal(9, 150, 30)
    J = jacobian(fun, chunk_size=100)(params, x)
    whole = jacobian(fun)(params, x)
    assert tree_allclose(J.clip(0.2).sum(), whole.clip(0.2).sum())
    assert tree_allclose(J.norms(), whole.norms())


@pytest.mark.parametrize("n", [0, 3, 6, 7])
@pytest.mark.parametrize("outputs", [0, 2])
def test_norms_after_a_clipped_sum_of_several_outputs(n, outputs):
    w, x = normal(10, 4, outputs), normal(11, n, 4)
    J, whole = (jacobian(lambda w, x: x @ w, chunk_size=k)(w, x) for k in (3, None))
    assert tree_allclose(J.clip(0.2).sum(), whole.clip(0.2).sum())
    assert tree_allclose(J.norms(), whole.norms())


def clipped_backwards(w, x):
    return jnp.sum(clips_cotangent(0.1)(jnp.tanh(x @ w)) ** 2)


@pytest.mark.parametrize("chunk_size", [None, 2, 3, N])
def test_chunks_weigh_rows_and_not_their_cotangents(chunk_size):
    """A backward pass that is not linear gives the rows, and they are weighed
    afterwards.
    """
    w, x = normal(8, 7, 6), normal(9, N, 7)
    rows = jax.vmap(jax.grad(clipped_backwards), (None, 0))(w, x)
    weights = jnp.linspace(-3, 2, N, dtype=rows.dtype)
    J = jacobian(clipped_backwards, chunk_size=chunk_size)(w, x)
    assert tree_allclose(J.weighted_sum(weights), jnp.tensordot(weights, rows, 1))
    bound = jnp.min(J.norms()) / 2
    units = rows / jnp.linalg.norm(rows, axis=(1, 2), keepdims=True)
    assert tree_allclose(J.clip(bound).sum(), bound * units.sum(0))
    J.check()


def test_norms_of_a_row_that_leaves_its_trace_are_made_anew():
    """A Jacobian used inside a scan, and after it, holds nothing of the scan's
    trace.
    """
    J = jacobian(dense)([jnp.ones((7, 6)), jnp.ones((6, 4))], jnp.ones((6, 7)))
    _, inside = jax.lax.scan(lambda c, i: (c, J.norms() * i), 0.0, jnp.arange(2.0))
    assert tree_allclose(inside[1], J.norms())


def test_norms_that_a_clipped_sum_has_taken_do_not_leave_its_trace():
    J = jacobian(dense, chunk_size=2)(
        [jnp.ones((7, 6)), jnp.ones((6, 4))], jnp.ones((6, 7))
    )
    with jax.check_tracer_leaks():
        sums = jax.jit(lambda s: jax.tree.map(lambda x: s * x, J.clip(0.2).sum()))(2.0)
        assert jax.jit(lambda s: s * J.norms())(2.0).shape == (6,)
    assert tree_allclose(sums, jax.tree.map(lambda x: 2 * x, J.clip(0.2).sum()))
    assert J.norms().shape == (6,)
