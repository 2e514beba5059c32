"""Sums without weights of what a scan uses: they are added up in its body.

They take the memory and the operations of an ordinary gradient, and leave no product
behind in a program that does not use them.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from pytree_grads import jacobian

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from _flops import count

pytestmark = pytest.mark.any_release

FLOOR = 2 * 2**20  # the memory of smaller programs is not compared


def draw(*shape):
    numbers = np.random.default_rng(len(shape)).standard_normal(shape)
    return jnp.asarray(numbers / (shape[-1] ** 0.5), jnp.result_type(float))


def words(count, *shape):
    numbers = np.random.default_rng(count).integers(0, count, shape)
    return jnp.asarray(numbers, jnp.int32)


def tanh_rnn(p, x):
    def step(h, x):
        return jnp.tanh(x @ p["in"] + h @ p["w"] + p["b"]), None

    h, _ = jax.lax.scan(step, jnp.zeros_like(p["b"]), x)
    return jnp.sum(h**2)


def layers(p, x):
    def step(h, w):
        return h + jnp.tanh(h @ w), None

    return jnp.sum(jax.lax.scan(step, x, p["layers"])[0] ** 2)


def recomputed(p, x):
    @jax.checkpoint
    def step(h, w):
        return h + jnp.tanh(h @ w), None

    return jnp.sum(jax.lax.scan(step, x, p["layers"])[0] ** 2)


def reader(p, tokens):
    def step(h, token):
        return jnp.tanh(p["table"][token] + h @ p["w"]), None

    h, _ = jax.lax.scan(step, jnp.zeros_like(p["w"][0]), tokens, reverse=True)
    return jnp.sum(h**2)


def shared_inside(p, x):
    """A term of the scan that no example enters, and a weight used outside as well."""

    def step(h, x):
        total, h = h
        h = jnp.tanh(x @ p["w"] + h)
        return (total + jnp.sum((p["w"] @ p["v"]) ** 2) * 1e-3, h), None

    (total, h), _ = jax.lax.scan(step, (jnp.zeros(()), jnp.zeros_like(x[0])), x)
    return total + jnp.sum((h @ p["w"]) ** 2) + jnp.sum(h @ p["v"])


def nested(p, x):
    def outer(h, w):
        def inner(h, x):
            return jnp.tanh(h @ w + x @ p["w"]), None

        return jax.lax.scan(inner, h, x)

    h, _ = jax.lax.scan(outer, jnp.zeros_like(x[0]), p["layers"])
    return jnp.sum(h**2)


def convolutions(p, x):
    def step(h, kernel):
        h = jax.lax.conv_general_dilated(h[None], kernel, (1, 1), "SAME")[0]
        return jnp.tanh(h), None

    return jnp.sum(jax.lax.scan(step, x, p["kernels"])[0] ** 2)


def masked_rnn(p, x):
    return tanh_rnn({**p, "w": jnp.tril(p["w"]) * jnp.exp(p["b"])[None]}, x)


def masked_layers(p, x):
    """A scan inside a scan adds up both what has a tail and what has none."""

    def layer(h, own):
        def step(h, x):
            return jnp.tanh(x + h @ (own["w"] * own["mask"]) + own["b"]), None

        return jax.lax.scan(step, h, x)

    return jnp.sum(jax.lax.scan(layer, jnp.zeros_like(x[0]), p)[0] ** 2)


CASES = {
    "tanh_rnn": (
        tanh_rnn,
        lambda: {"in": draw(64, 64), "w": draw(64, 64), "b": draw(64)},
        lambda: draw(32, 64, 64),
    ),
    "small_rnn": (
        tanh_rnn,
        lambda: {"in": draw(4, 8), "w": draw(8, 8), "b": draw(8)},
        lambda: draw(64, 64, 4),
    ),
    "layers": (layers, lambda: {"layers": draw(4, 64, 64)}, lambda: draw(64, 64)),
    "layers_of_sequences": (
        layers,
        lambda: {"layers": draw(4, 64, 64)},
        lambda: draw(16, 32, 64),
    ),
    "recomputed": (
        recomputed,
        lambda: {"layers": draw(4, 64, 64)},
        lambda: draw(16, 32, 64),
    ),
    "few_words": (
        reader,
        lambda: {"table": draw(16, 64), "w": draw(64, 64)},
        lambda: words(16, 64, 32),
    ),
    "many_words": (
        reader,
        lambda: {"table": draw(9999, 32), "w": draw(32, 32)},
        lambda: words(9999, 8, 16),
    ),
    "shared_inside": (
        shared_inside,
        lambda: {"w": draw(16, 16), "v": draw(16, 16)},
        lambda: draw(8, 5, 16),
    ),
    "nested": (
        nested,
        lambda: {"layers": draw(3, 32, 32), "w": draw(32, 32)},
        lambda: draw(32, 16, 32),
    ),
    "convolutions": (
        convolutions,
        lambda: {"kernels": draw(3, 4, 4, 3, 3)},
        lambda: draw(8, 4, 9, 9),
    ),
    "masked_rnn": (
        masked_rnn,
        lambda: {"in": draw(64, 64), "w": draw(64, 64), "b": draw(64)},
        lambda: draw(32, 64, 64),
    ),
    "masked_layers": (
        masked_layers,
        lambda: {"w": draw(2, 16, 16), "mask": draw(2, 16, 16), "b": draw(2, 16)},
        lambda: draw(8, 5, 16),
    ),
}


def built(name):
    fun, params, batch = CASES[name]
    return fun, params(), batch()


def plain(fun):
    return jax.grad(lambda p, x: jnp.sum(jax.vmap(fun, (None, 0))(p, x)))


def summed(fun, **options):
    return lambda p, x: jacobian(fun, **options)(p, x).sum()


def assert_close(found, wanted, tolerance=1e-10):
    for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert x.dtype == y.dtype
        scale = np.max(np.abs(y), initial=0.0)
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * scale)


def cost(fun, *args):
    """Operations of products, and bytes of temporary memory."""
    memory = jax.jit(fun).lower(*args).compile().memory_analysis()
    return count(jax.make_jaxpr(fun)(*args).jaxpr), memory.temp_size_in_bytes


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_rows(name, x64):
    fun, p, x = built(name)
    wanted = jax.tree.map(
        lambda rows: rows.sum(0), jax.vmap(jax.grad(fun), (None, 0))(p, x)
    )

    @jax.jit
    def products(p, x):
        J = jacobian(fun)(p, x)
        d = jax.tree.map(jnp.cos, p)
        ones = jnp.ones(len(J))
        parts = J[: len(J) // 2].sum(), J[len(J) // 2 :].sum()
        return {
            "sum": J.sum(),
            "with ones": J.weighted_sum(ones),
            "of parts": jax.tree.map(jnp.add, *parts),
            "in a metric": jax.tree.map(jnp.divide, J.scale_params(d).sum(), d),
            "from kept rows": J.scale(ones).sum(),
            "mean": jax.tree.map(lambda x: x * len(J), J.mean()),
            "norms": J.norms(),
        }

    found = products(p, x)
    rows = jax.vmap(jax.grad(fun), (None, 0))(p, x)
    square = sum(
        jnp.sum(jnp.reshape(r, (len(r), -1)) ** 2, 1) for r in jax.tree.leaves(rows)
    )
    np.testing.assert_allclose(found.pop("norms"), jnp.sqrt(square), rtol=1e-9)
    for own in found.values():
        assert_close(own, wanted)


@pytest.mark.parametrize("name", [x for x in CASES if x != "shared_inside"])
def test_they_take_one_gradient(name):
    fun, p, x = built(name)
    operations, memory = cost(plain(fun), p, x)
    own, taken = cost(summed(fun), p, x)
    assert own <= 1.05 * operations
    assert taken <= 1.05 * max(memory, FLOOR)


@pytest.mark.parametrize("name", ["tanh_rnn", "layers_of_sequences"])
def test_what_is_not_asked_for_is_not_computed(name):
    """XLA drops the sums from the body of the loop if only norms are used."""
    fun, p, x = built(name)

    def products(fun):
        text = jax.jit(fun).lower(p, x).compile().as_text()
        return text.count(" dot(")

    def norms(p, x):
        return jacobian(fun)(p, x).norms()

    def both(p, x):
        J = jacobian(fun)(p, x)
        return J.norms(), J.sum()

    rows = len(jax.tree.leaves(p)) - (name == "tanh_rnn")  # a bias needs no product
    assert products(both) == products(norms) + rows
    assert cost(norms, p, x)[0] < cost(both, p, x)[0]


def test_dense_terms_beside_a_scan_take_no_more_than_rows():
    """Sums of bfloat16 rows are carried in float32, not left to the backward pass."""

    def fun(p, x):
        total = tanh_rnn(p, x)
        for i, own in enumerate((jnp.sin, jnp.cos, jnp.tanh, jnp.exp)):
            total += jnp.sum(own(p["w"] * x[i][None]))
        return total

    _, p, x = built("tanh_rnn")
    p, x = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (p, x[:, :4]))

    def with_ones(p, x):
        return jacobian(fun)(p, x).weighted_sum(jnp.ones(len(x)))

    assert cost(summed(fun), p, x)[1] <= 1.05 * cost(with_ones, p, x)[1]


def test_bfloat16_and_empty_batches_and_nan():
    fun, p, x = built("tanh_rnn")
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (p, x))
    assert_close(jax.jit(summed(fun))(*half), plain(fun)(*half), 0.03)
    empty = jax.jit(summed(fun))(p, x[:0])
    assert_close(empty, jax.tree.map(jnp.zeros_like, p))
    broken = jax.jit(summed(fun))(p, x.at[3, 2].set(jnp.nan))
    assert all(jnp.isnan(x).all() for x in jax.tree.leaves(broken))


def test_examples_that_do_not_enter_count(x64):
    """The gradient is the same for all examples, and is added up once for each."""

    def fun(p, x):
        def step(h, _):
            return h @ p, None

        return jnp.sum(jax.lax.scan(step, jnp.ones(3), length=4)[0]) + 0 * jnp.sum(x)

    p, x = draw(3, 3), draw(5, 2)
    assert_close(jax.jit(summed(fun))(p, x), plain(fun)(p, x))


def test_nested_transformations(x64):
    fun, p, x = built("tanh_rnn")
    x = x[:3, :4]
    stack = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), p)
    found = jax.jit(jax.vmap(summed(fun), (0, None)))(stack, x)
    assert_close(found, jax.vmap(plain(fun), (0, None))(stack, x))
    stacks = jnp.stack([x, x + 1])
    found = jax.jit(jax.vmap(summed(fun), (None, 0)))(p, stacks)
    assert_close(found, jax.vmap(plain(fun), (None, 0))(p, stacks))

    def length(gradient):
        return lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(p, x)))

    for derivative in (jax.grad, jax.jacfwd):
        found = jax.jit(derivative(length(summed(fun))))(p)
        assert_close(found, derivative(length(plain(fun)))(p), 1e-8)


def test_several_outputs(x64):
    def fun(p, x):
        def step(h, w):
            return jnp.tanh(h @ w), None

        return jax.lax.scan(step, x, p)[0]

    p, x = draw(2, 4, 4), draw(5, 4)
    total = plain(lambda p, x: jnp.sum(fun(p, x)))(p, x)
    assert_close(jax.jit(summed(fun))(p, x), total)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("tanh_rnn", AxisType.Auto),
        ("tanh_rnn", AxisType.Explicit),
        ("layers", AxisType.Explicit),
        ("few_words", AxisType.Auto),
    ],
)
def test_devices(name, kind):
    fun, p, x = built(name)
    mesh = jax.make_mesh((4,), ("examples",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        spread = jax.device_put(x, jax.NamedSharding(mesh, PartitionSpec("examples")))
        found = jax.jit(summed(fun))(p, spread)
    assert_close(found, plain(fun)(p, x), 2e-5)


@pytest.mark.parametrize("name", ["tanh_rnn", "layers", "few_words"])
def test_devices_that_are_mapped(name):
    fun, p, x = built(name)
    mesh = jax.make_mesh((4,), ("examples",), axis_types=(AxisType.Auto,))
    total = jax.shard_map(
        summed(fun, axis_name="examples"),
        mesh=mesh,
        in_specs=(PartitionSpec(), PartitionSpec("examples")),
        out_specs=PartitionSpec(),
    )
    assert_close(jax.jit(total)(p, x), plain(fun)(p, x), 2e-5)
