"""``reassemble``, ``chain_rule_grad`` and its chunks against ``jax.grad`` of the
composition.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TraceCounter, clips_cotangent, tree_allclose

from pytree_grads import (
    chain_rule_grad,
    chain_rule_value_and_grad,
    per_example_grad,
    reassemble,
)

N = 7
KEY = jax.random.key(2)
CHUNKS = [None, 1, 3, N - 1, N + 5]


def problem(n=N, dtype=jnp.float32):
    keys = jax.random.split(KEY, 3)
    params = {
        "w": jax.random.normal(keys[0], (3, 2), dtype),
        "b": jax.random.normal(keys[1], (2,), dtype),
    }
    return params, jax.random.normal(keys[2], (n, 3), dtype)


def embed(params, x):
    z = jnp.tanh(x @ params["w"] + params["b"])
    return {"z": z, "size": jnp.sum(z**2)}


def scalar(params, x):
    return embed(params, x)["size"]


def contrastive(outputs):
    """A loss that couples every pair of examples."""
    logits = outputs["z"] @ outputs["z"].T
    nearest = jnp.trace(jax.nn.log_softmax(logits / 0.5, axis=-1))
    spread = outputs["size"] - jnp.mean(outputs["size"])
    return jnp.sum(spread**2) - nearest


def variance(sizes):
    return jnp.sum((sizes - jnp.mean(sizes)) ** 2)


def composed(outer, fun):
    def loss(params, x):
        return outer(jax.vmap(fun, (None, 0))(params, x))

    return jax.value_and_grad(loss)


class TestReassemble:
    def test_equals_the_composition(self, x64):
        params, x = problem(dtype=jnp.float64)
        outputs = jax.vmap(scalar, (None, 0))(params, x)
        rows = per_example_grad(scalar)(params, x)
        expected = composed(variance, scalar)(params, x)[1]
        assert tree_allclose(reassemble(variance, outputs, rows), expected)
        assert tree_allclose(
            jax.jit(lambda f, r: reassemble(variance, f, r))(outputs, rows), expected
        )

    def test_trees_of_outputs(self, x64):
        params, x = problem(dtype=jnp.float64)
        outputs = jax.vmap(embed, (None, 0))(params, x)
        rows = jax.vmap(jax.jacrev(embed), (None, 0))(params, x)
        expected = composed(contrastive, embed)(params, x)[1]
        assert tree_allclose(reassemble(contrastive, outputs, rows), expected)

    def test_keeps_the_dtype_and_carries_the_sum(self):
        rows = {
            "w": jnp.ones((1000, 2), jnp.bfloat16),
            "n": np.zeros((1000, 3), jax.dtypes.float0),
        }
        expected = {
            "w": jnp.full(2, 1000, jnp.bfloat16),
            "n": np.zeros(3, jax.dtypes.float0),
        }
        assert tree_allclose(
            reassemble(jnp.sum, jnp.ones(1000), rows), expected, rtol=0
        )

    def test_complex_rows(self):
        def f(p, x):
            return jnp.abs(p * x) ** 2

        p, x = jnp.complex64(1 + 2j), jnp.arange(3.0).astype(jnp.complex64)
        outputs, rows = jax.vmap(jax.value_and_grad(f), (None, 0))(p, x)
        expected = jax.grad(lambda p: variance(jax.vmap(f, (None, 0))(p, x)))(p)
        assert tree_allclose(reassemble(variance, outputs, rows), expected)

    def test_no_examples(self):
        got = reassemble(jnp.sum, jnp.ones(0), {"w": jnp.ones((0, 3))})
        assert tree_allclose(got, {"w": jnp.zeros(3)})

    def test_a_nan_row_is_not_hidden_by_a_zero_weight(self):
        rows = jnp.array([[jnp.nan, 1.0], [2.0, 3.0]])
        got = reassemble(lambda f: f[1], jnp.ones(2), rows)
        assert tree_allclose(got, jnp.array([jnp.nan, 3.0]))

    def test_numpy_goes_in(self):
        got = reassemble(
            jnp.sum, np.ones(2, np.float32), {"w": np.ones((2, 3), np.float32)}
        )
        assert tree_allclose(got, {"w": jnp.full(3, 2.0)})

    def test_vmap_and_grad(self):
        outputs, rows = jnp.arange(3.0), jax.random.normal(KEY, (3, 2))
        many = jnp.stack([rows, 2 * rows])
        got = jax.vmap(lambda r: reassemble(variance, outputs, r))(many)
        assert tree_allclose(
            got, jnp.stack([reassemble(variance, outputs, r) for r in many])
        )
        got = jax.grad(lambda r: jnp.sum(reassemble(variance, outputs, r)))(rows)
        weights = jax.grad(variance)(outputs)
        assert tree_allclose(got, jnp.stack([weights, weights], axis=1))


@pytest.mark.parametrize("chunk_size", CHUNKS)
class TestChainRule:
    def test_equals_the_composition(self, chunk_size, x64):
        params, x = problem(dtype=jnp.float64)
        expected = composed(contrastive, embed)(params, x)
        both = chain_rule_value_and_grad(contrastive, embed, chunk_size=chunk_size)
        assert tree_allclose(both(params, x), expected)
        assert tree_allclose(jax.jit(both)(params, x), expected)
        alone = chain_rule_grad(contrastive, embed, chunk_size=chunk_size)
        assert tree_allclose(alone(params, x), expected[1])

    def test_both_parameters_and_outer_args(self, chunk_size):
        params, x = problem()

        def outer(outputs, params, weight, shift):
            return weight * contrastive(outputs) + jnp.sum((params["b"] - shift) ** 2)

        def loss(params):
            return outer(jax.vmap(embed, (None, 0))(params, x), params, 0.5, 2.0)

        both = chain_rule_value_and_grad(
            outer, embed, chunk_size=chunk_size, outer_has_params=True
        )
        got = jax.jit(lambda params, x: both(params, x, outer_args=(0.5, 2.0)))(
            params, x
        )
        assert tree_allclose(got, jax.jit(jax.value_and_grad(loss))(params))

    def test_two_towers(self, chunk_size):
        def towers(query, passage, x, y):
            return jnp.tanh(x @ query), jnp.tanh(y @ passage)

        def outer(outputs, both):
            logits = outputs[0] @ outputs[1].T
            return -jnp.trace(jax.nn.log_softmax(logits, axis=-1)) + jnp.sum(
                both[0] * both[1]
            )

        query, passage, x, y = (
            jax.random.normal(key, shape)
            for key, shape in zip(
                jax.random.split(KEY, 4), [(3, 2), (3, 2), (N, 3), (3, N)], strict=True
            )
        )
        grad = chain_rule_grad(
            outer,
            towers,
            (1, 0),
            in_axes=(None, None, 0, -1),
            chunk_size=chunk_size,
            outer_has_params=True,
        )
        got = jax.jit(grad)(query, passage, x, y)

        def loss(passage, query):
            outputs = jax.vmap(towers, (None, None, 0, 1))(query, passage, x, y)
            return outer(outputs, (passage, query))

        assert tree_allclose(got, jax.jit(jax.grad(loss, (0, 1)))(passage, query))

    @pytest.mark.parametrize("which", ["fun", "outer", "both"])
    def test_auxiliary_data(self, chunk_size, which):
        params, x = problem()
        inner, outer_aux = which != "outer", which != "fun"

        def fun(params, x):
            return (scalar(params, x), {"x": x}) if inner else scalar(params, x)

        def outer(sizes):
            return (variance(sizes), jnp.max(sizes)) if outer_aux else variance(sizes)

        value, grads = composed(variance, scalar)(params, x)
        largest = jnp.max(jax.vmap(scalar, (None, 0))(params, x))
        aux = {"fun": {"x": x}, "outer": largest, "both": ({"x": x}, largest)}[which]
        options = {
            "has_aux": inner,
            "outer_has_aux": outer_aux,
            "chunk_size": chunk_size,
        }
        got = jax.jit(chain_rule_value_and_grad(outer, fun, **options))(params, x)
        assert tree_allclose(got, ((value, aux), grads))
        got = jax.jit(chain_rule_grad(outer, fun, **options))(params, x)
        assert tree_allclose(got, (grads, aux))

    def test_complex_and_integer_outputs(self, chunk_size):
        def fun(p, x):
            z = jnp.exp(1j * p * x)
            return {
                "z": z,
                "sign": (x.real > 0.0).astype(jnp.int32),
                "label": x.real > 1.0,
            }

        def outer(outputs):
            picked = jnp.where(outputs["label"], outputs["z"], 2 * outputs["z"])
            return jnp.abs(jnp.sum(picked * outputs["sign"].astype(jnp.complex64))) ** 2

        p, x = jnp.complex64(0.3 + 0.1j), jnp.linspace(-1, 2, N).astype(jnp.complex64)
        got = jax.jit(chain_rule_value_and_grad(outer, fun, chunk_size=chunk_size))(
            p, x
        )
        assert tree_allclose(got, jax.jit(composed(outer, fun))(p, x))

    def test_dropout_is_replayed(self, chunk_size):
        """Both passes see the same randomness.

        A batch norm over the outputs would show it.
        """

        def fun(p, x, key):
            keep = jax.random.bernoulli(key, 0.5, x.shape).astype(jnp.float32)
            return jnp.sin(p * x * keep), keep

        p, x = jnp.float32(1.5), jax.random.normal(KEY, (N, 4))
        keys = jax.random.split(KEY, N)

        def outer(f):
            return jnp.sum((f - f.mean(0, keepdims=True)) ** 4)

        both = chain_rule_value_and_grad(
            outer, fun, has_aux=True, chunk_size=chunk_size
        )
        (value, kept), grad = jax.jit(both)(p, x, keys)
        masks = jax.vmap(lambda key: jax.random.bernoulli(key, 0.5, (4,)))(keys)
        assert tree_allclose(kept, masks.astype(jnp.float32))

        def loss(p):
            return outer(jax.vmap(fun, (None, 0, 0))(p, x, keys)[0])

        assert tree_allclose((value, grad), jax.jit(jax.value_and_grad(loss))(p))

    def test_a_batched_argument_has_a_batched_gradient(self, chunk_size):
        params, x = problem()

        def loss(params, x):
            return contrastive(jax.vmap(embed, (None, 1))(params, x))

        grad = chain_rule_grad(
            contrastive, embed, (0, 1), in_axes=(None, 1), chunk_size=chunk_size
        )
        expected = jax.jit(jax.grad(loss, (0, 1)))(params, x.T)
        assert tree_allclose(jax.jit(grad)(params, x.T), expected)

    def test_a_bfloat16_sum_is_carried(self, chunk_size):
        p, x = jnp.ones(1, jnp.bfloat16), jnp.ones((1000, 1), jnp.bfloat16)
        grad = chain_rule_grad(
            lambda f: jnp.sum(f.astype(jnp.float32)),
            lambda p, x: (p * x)[0],
            chunk_size=chunk_size,
        )(p, x)
        assert tree_allclose(grad, jnp.full(1, 1000, jnp.bfloat16))

    def test_infinite_and_nan_derivatives_are_what_jax_grad_has(self, chunk_size):
        def fun(p, x):
            return jnp.sqrt(p["a"] * x) + p["b"] * x

        # The derivative of sqrt(a x) by x at 0 is infinite; by a it is 0 * inf.
        by_chunks = jax.jit(
            chain_rule_grad(
                jnp.sum, fun, (0, 1), in_axes=(None, 0), chunk_size=chunk_size
            )
        )
        plain = jax.jit(
            jax.grad(lambda p, x: jnp.sum(jax.vmap(fun, (None, 0))(p, x)), (0, 1))
        )
        p = {"a": jnp.float32(1), "b": jnp.float32(2)}
        for bad in (
            0.0,
            -1.0,
            np.inf,
        ):  # an infinite derivative, a NaN, an infinite output
            for i in range(N):
                x = jnp.arange(1.0, N + 1).at[i].set(bad)
                assert tree_allclose(by_chunks(p, x), plain(p, x))

    def test_an_infinite_row_stays_infinite(self, chunk_size):
        x = jnp.ones(N).at[N - 3].set(jnp.inf)
        got = chain_rule_grad(jnp.sum, lambda p, x: p * x, chunk_size=chunk_size)(
            jnp.float32(2), x
        )
        assert tree_allclose(got, jnp.float32(jnp.inf))

    def test_no_examples(self, chunk_size):
        params, x = problem(0)
        value, grads = chain_rule_value_and_grad(
            lambda f: jnp.sum(f) + 1, scalar, chunk_size=chunk_size
        )(params, x)
        assert tree_allclose(value, jnp.float32(1))
        assert tree_allclose(grads, jax.tree.map(jnp.zeros_like, params))

    def test_vmap_scan_and_second_order(self, chunk_size):
        params, x = problem()
        grad = chain_rule_grad(contrastive, embed, chunk_size=chunk_size)
        reference = jax.grad(lambda p, x: composed(contrastive, embed)(p, x)[0])
        many = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), params)
        pairs = (
            jax.jit(jax.vmap(gradient, (0, None)))(many, x)
            for gradient in (grad, reference)
        )
        assert tree_allclose(*pairs)

        def descend(gradient):
            def step(p, _):
                return jax.tree.map(lambda p, g: p - 0.01 * g, p, gradient(p, x)), None

            return jax.jit(lambda p: jax.lax.scan(step, p, length=3)[0])(params)

        assert tree_allclose(descend(grad), descend(reference))

        def square(gradient):
            return jax.grad(
                lambda p: sum(jnp.sum(g**2) for g in jax.tree.leaves(gradient(p, x)))
            )

        got, expected = (
            jax.jit(square(gradient))(params) for gradient in (grad, reference)
        )
        assert tree_allclose(got, expected, rtol=1e-4)


def test_a_differentiated_number():
    got = chain_rule_grad(jnp.sum, lambda p, x: p * x)(2.0, jnp.ones(3))
    assert tree_allclose(got, jnp.float32(3))


def test_outputs_without_arrays_leave_the_direct_gradient():
    got = chain_rule_grad(
        lambda outputs, p: p**2, lambda p, x: (), outer_has_params=True, chunk_size=2
    )(jnp.float32(3), jnp.ones(5))
    assert tree_allclose(got, jnp.float32(6))


@pytest.mark.parametrize(("chunk_size", "traces"), [(None, 1), (7, 1), (1, 2), (3, 4)])
def test_fun_is_traced_once_a_pass_and_size_and_outer_once(chunk_size, traces):
    fun, outer = TraceCounter(embed), TraceCounter(contrastive)
    both = jax.jit(chain_rule_value_and_grad(outer, fun, chunk_size=chunk_size))
    params, x = problem()
    both(params, x)
    both(jax.tree.map(lambda p: 2 * p, params), -x)
    assert (fun.count, outer.count) == (traces, 1)


def test_a_backward_pass_that_clips():
    """Not linear in the cotangent, which therefore has to arrive in one piece and for
    every row.
    """
    clipped = clips_cotangent(1.0)

    def gradient(chunk_size):
        return chain_rule_grad(
            lambda f: jnp.sum(cotangents * f),
            lambda p, x: clipped(p * x),
            chunk_size=chunk_size,
        )(jnp.float32(2), x)

    cotangents = jnp.array([0.5, 3.0, -0.75, 1.5, -3.0, 1.25, 0.25])
    x = jnp.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    for chunk_size in (None, 1, 2, 3, 4, 5, 6, 7):
        assert gradient(chunk_size) == jnp.clip(cotangents, -1.0, 1.0) @ x


def test_dropout_gives_the_same_bits_in_both_passes():
    """What each pass saw is sent home by a callback: the outputs of one example, bit
    for bit.
    """
    seen = {}

    def record(i, outputs):
        seen.setdefault(int(i), []).append(np.asarray(outputs).tobytes())

    def fun(p, x, key, i):
        keep = jax.random.bernoulli(key, 0.5, (16,)).astype(x.dtype)
        outputs = jnp.tanh(jnp.tanh(x @ p["w"]) * keep @ p["v"])
        jax.debug.callback(record, i, outputs)
        return outputs

    keys = jax.random.split(KEY, 4)
    p = {
        "w": jax.random.normal(keys[0], (3, 16)),
        "v": jax.random.normal(keys[1], (16, 2)),
    }
    x = jax.random.normal(keys[2], (N, 3))
    # Compiled as usual: with little effort, two copies of one tanh may differ in their
    # last bit.
    both = jax.jit(
        chain_rule_value_and_grad(variance_of_rows, fun, chunk_size=3),
        compiler_options={"xla_backend_optimization_level": 3},
    )
    jax.block_until_ready(both(p, x, jax.random.split(keys[3], N), jnp.arange(N)))
    jax.effects_barrier()
    assert sorted(seen) == list(range(N))
    for outputs in seen.values():
        assert len(outputs) == 2  # both passes
        assert len(set(outputs)) == 1
    assert len({outputs[0] for outputs in seen.values()}) == N


def variance_of_rows(outputs):
    return jnp.sum((outputs - jnp.mean(outputs, axis=0, keepdims=True)) ** 2)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("chunk_size", [2, 3, N + 1])
def test_towers_with_shared_and_with_separate_parameters(shared, chunk_size, x64):
    """Queries and passages, the passages on axis 1, an outer loss with labels and a
    temperature.
    """
    keys = jax.random.split(KEY, 5)
    towers = {"query": {"w": jax.random.normal(keys[0], (3, 2))}}
    if not shared:
        towers["passage"] = {"w": jax.random.normal(keys[1], (3, 2))}
    x, y = jax.random.normal(keys[2], (N, 3)), jax.random.normal(keys[3], (3, N))
    labels = jax.random.permutation(keys[4], N)

    def encode(towers, x, y):
        passage = towers["passage" if "passage" in towers else "query"]
        return {
            "q": jnp.tanh(x @ towers["query"]["w"]),
            "p": jnp.tanh(y @ passage["w"]),
        }

    def retrieval(outputs, labels, temperature):
        scores = jax.nn.log_softmax(
            outputs["q"] @ outputs["p"].T / temperature, axis=-1
        )
        return -jnp.mean(jnp.take_along_axis(scores, labels[:, None], axis=-1))

    def loss(towers):
        outputs = jax.vmap(encode, (None, 0, 1))(towers, x, y)
        return retrieval(outputs, labels, 0.3)

    both = chain_rule_value_and_grad(
        retrieval, encode, in_axes=(None, 0, 1), chunk_size=chunk_size
    )
    got = both(towers, x, y, outer_args=(labels, 0.3))
    assert tree_allclose(got, jax.value_and_grad(loss)(towers))


def test_bfloat16_parameters_are_as_exact_as_their_dtype():
    """The sum over chunks is no less exact than the gradient in one piece."""
    params, x = problem(64, jnp.bfloat16)

    def spread(outputs):
        return variance(outputs["size"].astype(jnp.float32)) / 64

    got = jax.jit(chain_rule_grad(spread, embed, chunk_size=5))(params, x)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (params, x))
    exact = composed(spread, embed)(*wide)[1]
    for name, leaf in got.items():
        assert leaf.dtype == jnp.bfloat16
        error = jnp.linalg.norm(leaf.astype(jnp.float32) - exact[name])
        assert error < 0.05 * jnp.linalg.norm(
            exact[name]
        )  # outputs are rounded to 8 bits


def test_memory_follows_the_chunk_and_not_the_batch():
    """From 256 examples to 16,384, nothing grows but the outputs and their
    cotangents.
    """

    def encoder(params, x):
        hidden = jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"])  # (T, 64)
        return jnp.mean(hidden, axis=0)

    params = {"w": jnp.ones((4, 64)), "v": jnp.ones((64, 64))}
    row = 64 * 4  # bytes of one example's outputs

    def temporary(n, chunk_size):
        both = jax.jit(
            chain_rule_value_and_grad(
                lambda f: jnp.sum(f**2), encoder, chunk_size=chunk_size
            )
        )
        batch = jax.ShapeDtypeStruct((n, 32, 4), jnp.float32)
        return both.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    of_a_chunk = temporary(256, 32)
    for n in (1024, 4096, 16384):
        assert temporary(n, 32) <= of_a_chunk + 2 * n * row
    assert temporary(16384, 32) < temporary(16384, None) / 30
