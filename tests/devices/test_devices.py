"""Every call on eight devices, however batch and parameters are laid out, is as on
one.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from layouts import CALLS, LAYOUTS, one_device, sketch
from routes import factors_kept, few_at_once

from pytree_grads import (
    Accumulator,
    chain_rule_value_and_grad,
    jacobian,
    per_example_grad,
)


@functools.cache
def expected(call):
    return one_device(CALLS[call])


# A layout of each kind.
TYPICAL = ("auto, sharded", "explicit, split", "shard_map, checked")

# Calls that take the steps of others: the layout of each kind is enough for them.
OTHERS = (
    "recomputed",
    "in uneven chunks",
    "questions",
    "questions in chunks",
    "chain rule",
    "chain rule in uneven chunks",
    "curvature",
)
PAIRS = [
    pytest.param(
        layout,
        call,
        marks=[pytest.mark.any_release] * (layout not in TYPICAL or call in OTHERS),
    )
    for layout in LAYOUTS
    for call in CALLS
    if layout in TYPICAL or call not in OTHERS
]


@pytest.mark.parametrize(("layout", "call"), PAIRS)
def test_many_devices_give_what_one_gives(layout, call):
    with jax.enable_x64(True):
        numbers, sums = LAYOUTS[layout].run(CALLS[call])
        want_numbers, want_sums = expected(call)
        wanted = {name: want_numbers[name] for name in numbers}
        assert tree_allclose(numbers, wanted, rtol=1e-11)
        wanted = {name: want_sums[name] for name in sums}
        assert tree_allclose(sums, wanted, rtol=1e-11)


@pytest.mark.parametrize("layout", TYPICAL)
def test_sketches_are_the_same_on_many_devices(layout):
    with jax.enable_x64(True):
        numbers, _ = LAYOUTS[layout].run(sketch)
        assert tree_allclose(numbers, one_device(sketch)[0], rtol=1e-11)


def test_rows_some_at_a_time_inside_shard_map():
    """What loops over rows add to varies over the devices from the start, as its checks
    ask.
    """
    params = {"w": jnp.sin(jnp.arange(35.0)).reshape(7, 5)}
    x = jnp.cos(jnp.arange(16.0 * 9 * 7)).reshape(16, 9, 7)

    def products(params, x, axis_name=None):
        fun = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) ** 2)  # noqa: E731
        J = jacobian(fun, axis_name=axis_name)(params, x)
        return J.gram(), J.square_sum(), J.clip(1.0).sum()

    on_all = jax.shard_map(
        lambda params, x: products(params, x, "data"),
        mesh=EIGHT[AxisType.Auto],
        in_specs=(P(), P("data")),
        out_specs=(P("data"), P(), P()),
    )
    with factors_kept(), few_at_once(60):
        grams, *sums = jax.jit(on_all)(params, x)
        want, *want_sums = products(params, x)
    assert tree_allclose(sums, want_sums, rtol=1e-5)
    for i in range(0, 16, 2):
        assert tree_allclose(grams[i : i + 2], want[i : i + 2, i : i + 2], rtol=1e-5)


EIGHT = {
    kind: jax.make_mesh((8,), ("data",), axis_types=(kind,))
    for kind in (AxisType.Auto, AxisType.Explicit)
}


def product(params, x):
    """Its gradient by params["w"] is x, which tells rows of examples from sums of
    them.
    """
    return jnp.dot(params["w"], x) + params["b"]


PARAMS = {"w": jnp.ones(3), "b": jnp.ones(())}
X = jnp.arange(48.0).reshape(16, 3)


def manually(fun, checked, out):
    specs = {"in_specs": (P(), P("data")), "out_specs": out}
    mapped = jax.shard_map(fun, mesh=EIGHT[AxisType.Auto], check_vma=checked, **specs)
    return jax.jit(mapped)(PARAMS, X)


def test_the_trap_of_jax_36886():
    """In ``jax.shard_map``, ``jax.grad`` by replicated parameters adds up over the
    devices.

    With the default checks ``vmap(grad)`` has rows of the right shape and the wrong
    value.
    """

    def plain(params, x):
        return jax.vmap(jax.grad(product), (None, 0))(params, x)["w"]

    trapped = manually(plain, True, P("data"))
    assert trapped.shape == X.shape
    assert tree_allclose(
        trapped[0], X[::2].sum(axis=0)
    )  # of the first example on each device
    for checked in (True, False):
        for call in (
            per_example_grad(product),
            lambda *args: jacobian(product)(*args).to_rows(),
            lambda *args: jacobian(product, recompute=True)(*args).to_rows(),
        ):
            assert tree_allclose(manually(call, checked, P("data"))["w"], X)
        clipped = manually(
            lambda *args: jacobian(product)(*args).norms(), checked, P("data")
        )
        assert tree_allclose(clipped, jacobian(product)(PARAMS, X).norms())


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"chunk_size": 1}])
def test_sums_stay_on_their_device_unless_asked(checked, settings):
    def local(params, x):
        J = jacobian(product, **settings)(params, x)
        outer = functools.partial(jnp.sum, axis=0)
        chunks = {"chunk_size": settings.get("chunk_size")}
        sums = {
            "sum": J.sum(),
            "mean": J.mean(),
            "squares": J.square_sum(),
            "chain": chain_rule_value_and_grad(outer, product, **chunks)(params, x)[1],
        }
        return jax.tree.map(lambda leaf: leaf[None], (sums, J.gram()))

    sums, grams = manually(local, checked, P("data"))
    pairs = X.reshape(8, 2, 3)
    assert tree_allclose(sums["sum"]["w"], pairs.sum(axis=1))
    assert tree_allclose(sums["mean"]["w"], pairs.mean(axis=1))
    assert tree_allclose(sums["squares"]["w"], (pairs**2).sum(axis=1))
    assert tree_allclose(sums["chain"]["w"], pairs.sum(axis=1))
    assert tree_allclose(grams, jnp.einsum("dip,djp->dij", pairs, pairs) + 1)


@pytest.mark.parametrize("checked", [True, False])
def test_a_value_that_devices_have_agreed_on_is_not_added_up(checked):
    """Where an outer loss ends in ``psum``, checks know that its value is one for all
    devices.
    """

    def outer(outputs):
        return jax.lax.psum(jnp.sum(outputs**2), "data")

    chain = chain_rule_value_and_grad(outer, product, axis_name="data")
    value, grad = manually(chain, checked, P())
    want = chain_rule_value_and_grad(lambda f: jnp.sum(f**2), product)(PARAMS, X)
    times = (
        1 if checked else 8
    )  # unchecked, a psum is its own transpose: each device has a loss
    assert tree_allclose(value, times * want[0])
    assert tree_allclose(grad["w"], times * want[1]["w"])


@pytest.mark.parametrize("kind", EIGHT)
@pytest.mark.parametrize("settings", [{}, {"recompute": True}, {"chunk_size": 8}])
def test_a_batch_that_does_not_divide_the_devices(kind, settings):
    """Examples are repeated up to the next multiple, with weight zero: no NaN comes of
    that.
    """

    def fun(params, x):  # zeros in the place of examples would make NaN of 0 / 0
        return jnp.sum(x @ params["w"] / jnp.linalg.norm(x))

    params, x = {"w": jnp.ones((3, 2))}, X[1:14]
    rows = np.arange(16) % len(x)
    weights = jnp.where(np.arange(16) < len(x), 1.0, 0.0)
    assert jnp.isnan(jax.grad(fun)(params, 0 * x[0])["w"]).all()

    def step(params, x, weights):
        J = jacobian(fun, **settings)(params, x)
        outer = lambda outputs, weights: jnp.sum(weights * outputs**2)  # noqa: E731
        chain = chain_rule_value_and_grad(
            outer, fun, chunk_size=settings.get("chunk_size")
        )
        return J.clip(0.5).weighted_sum(weights), chain(
            params, x, outer_args=(weights,)
        )

    want = step(params, x, jnp.ones(len(x)))
    with jax.set_mesh(EIGHT[kind]):
        got = jax.jit(step)(params, *jax.device_put((x[rows], weights), P("data")))
    assert tree_allclose(got, want)


@pytest.mark.parametrize("kind", EIGHT)
def test_derivatives_of_products_on_many_devices(kind):
    def penalty(params, x):
        J = jacobian(curved)(params, x)
        return jnp.sum(J.norms() ** 3) + jnp.sum(J.clip(0.5).sum()["w"] ** 2)

    def curved(params, x):
        return jnp.sum(jnp.tanh(x @ params["w"]))

    params, x = {"w": jnp.linspace(-1, 1, 24).reshape(3, 8)}, X / 48
    want = jax.grad(penalty)(params, x)
    with jax.set_mesh(EIGHT[kind]):
        arrays = jax.device_put(params, P(None, None)), jax.device_put(x, P("data"))
        assert tree_allclose(jax.jit(jax.grad(penalty))(*arrays), want)


@pytest.mark.parametrize("kind", EIGHT)
def test_reports_of_sharded_rows(kind):
    with jax.set_mesh(EIGHT[kind]):
        x = jax.device_put(X, P("data"))
        jacobian(product)(PARAMS, x).check(rows=2)
        for settings in ({}, {"chunk_size": 8}):
            J = jacobian(product, **settings)(PARAMS, x)
            assert "['w']" in J.explain()
            assert tree_allclose(J[2:5].sum()["w"], X[2:5].sum(axis=0))
            assert tree_allclose(J[:8].norms(), np.asarray(J.norms())[:8])


@pytest.mark.parametrize(
    "settings", [{}, {"recompute": True}, {"chunk_size": 8}], ids=str
)
def test_slices_of_rows_with_parameters_that_are_sharded_as_the_batch_is(settings):
    def f(params, x):
        return jnp.sum(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"]))

    def products(params, x):
        J = jacobian(f, **settings)(params, x)
        return J[4:].norms(), J[3:6].clip(0.5).mean(), J[2:][1:4].sum()

    params = {"w": jnp.linspace(-1, 1, 24).reshape(3, 8), "v": jnp.linspace(-1, 1, 8)}
    want = jax.jit(products)(params, X / 48)
    with jax.set_mesh(EIGHT[AxisType.Explicit]):
        spec = {"w": P(None, "data"), "v": P("data")}
        arrays = jax.device_put(params, spec), jax.device_put(X / 48, P("data"))
        norms, *sums = jax.jit(products)(*arrays)
        assert tree_allclose([norms, *sums], list(want))
        assert all(
            jax.typeof(x[n]).sharding.spec == spec[n] for x in sums for n in spec
        )


@pytest.mark.parametrize(
    "shape", [(4, 2, 3, 3), (32, 32, 3, 3)], ids=["rows", "windows"]
)
def test_chunked_sums_of_convolutions_over_explicit_axes(shape):
    def f(kernel, x):
        return jnp.sum(jnp.tanh(jax.lax.conv(x[None], kernel, (1, 1), "SAME")))

    def sums(kernel, x):
        J = jacobian(f, chunk_size=8)(kernel, x)
        return J.sum(), J.clip(0.5).sum(), J.T @ jnp.arange(16.0)

    kernel = jnp.sin(jnp.arange(float(np.prod(shape)))).reshape(shape) / 3
    x = jnp.cos(jnp.arange(16.0 * shape[1] * 9)).reshape(16, shape[1], 3, 3)
    want = jax.jit(sums)(kernel, x)
    with jax.set_mesh(EIGHT[AxisType.Explicit]):
        arrays = jax.device_put(kernel, P()), jax.device_put(x, P("data"))
        assert tree_allclose(jax.jit(sums)(*arrays), want)


def test_an_accumulator_of_each_device():
    """``jax.lax.psum`` merges accumulators, and so the gradients of uneven local
    batches.
    """

    def mean(params, x):
        J = jacobian(product)(params, x)
        weight = jax.lax.axis_index("data").astype(float)
        own = Accumulator.zeros_like(params).add(J.mean(), weight)
        return jax.lax.psum(own, "data").mean()["w"]

    want = jnp.average(X.reshape(8, 2, 3).mean(axis=1), axis=0, weights=jnp.arange(8.0))
    assert tree_allclose(manually(mean, False, P()), want)
