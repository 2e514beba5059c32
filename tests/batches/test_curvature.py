"""``gauss_newton_product`` and ``fisher_product`` against the dense matrices."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TraceCounter, tree_allclose
from jax.flatten_util import ravel_pytree

from pytree_grads import (
    Vector,
    chain_rule_grad,
    fisher_product,
    gauss_newton_product,
    per_example_grad,
)

pytestmark = pytest.mark.any_release

N = 7
KEY = jax.random.key(4)
CHUNKS = [None, 1, 3, N - 1, N + 5]


def problem(n=N, dtype=jnp.float64):
    keys = jax.random.split(KEY, 4)
    params = {
        "w": jax.random.normal(keys[0], (3, 2), dtype),
        "b": [jax.random.normal(keys[1], (2,), dtype)],
    }
    v = jax.tree.map(lambda p: jax.random.normal(keys[3], p.shape, dtype), params)
    return params, jax.random.normal(keys[2], (n, 3), dtype), v


def embed(params, x):
    z = jnp.tanh(x @ params["w"] + params["b"][0])
    return {
        "z": z,
        "size": jnp.sum(z**2),
        "sign": (x > 0).astype(jnp.int32),
        "none": None,
    }


def contrastive(outputs):
    """A loss that couples every pair of examples, and reads an integer output."""
    logits = outputs["z"] @ outputs["z"].T
    nearest = jnp.trace(jax.nn.log_softmax(logits / 0.5, axis=-1))
    spread = outputs["size"] - jnp.mean(outputs["size"])
    signs = outputs["sign"].sum(axis=1).astype(spread.dtype)
    return jnp.sum(signs * spread**2) - nearest


def scalar(params, x):
    return embed(params, x)["size"]


def dense_gauss_newton(outer, fun, params, x):
    """Jᵀ H J with J and H built."""
    flat, unravel = ravel_pytree(params)

    def outputs(flat):
        return jax.vmap(fun, (None, 0))(unravel(flat), x)

    inexact, fixed = {}, {}
    for name, leaf in outputs(flat).items():
        (inexact if name in ("z", "size") else fixed)[name] = leaf
    _, unravel_outputs = ravel_pytree(inexact)

    def flat_outputs(flat):
        return ravel_pytree({name: outputs(flat)[name] for name in inexact})[0]

    @jax.jit
    def matrix(flat):
        J = jax.jacrev(flat_outputs)(flat)
        H = jax.hessian(lambda f: outer({**unravel_outputs(f), **fixed}))(
            flat_outputs(flat)
        )
        return J.T @ H @ J

    return matrix(flat), unravel


def product_with(matrix, v, unravel):
    return unravel(matrix @ ravel_pytree(v)[0])


@pytest.mark.parametrize("chunk_size", CHUNKS)
class TestGaussNewton:
    def test_equals_the_dense_matrix(self, chunk_size, x64):
        params, x, v = problem()
        G, unravel = dense_gauss_newton(contrastive, embed, params, x)
        linearized = gauss_newton_product(contrastive, embed, chunk_size=chunk_size)
        expected = product_with(G, v, unravel)
        assert tree_allclose(linearized(params, x)(v), expected)
        in_jit = jax.jit(lambda params, x, v: linearized(params, x)(v))
        assert tree_allclose(in_jit(params, x, v), expected)

    def test_a_penalty_on_the_parameters_is_damping(self, chunk_size, x64):
        params, x, v = problem()

        def outer(outputs, params, weight):
            return contrastive(outputs) + weight * jnp.sum(params["w"] ** 2), params

        G, unravel = dense_gauss_newton(contrastive, embed, params, x)
        expected = product_with(G, v, unravel)
        expected["w"] += 2 * 0.3 * v["w"]
        product = gauss_newton_product(
            outer,
            embed,
            chunk_size=chunk_size,
            outer_has_params=True,
            outer_has_aux=True,
        )
        got = jax.jit(lambda params, x: product(params, x, outer_args=(0.3,))(v))(
            params, x
        )
        assert tree_allclose(got, expected)

    def test_parameters_and_outputs_in_one_term(self, chunk_size, x64):
        """The mixed blocks of H: outer = p · f(p)."""
        x, p, v = jax.random.normal(KEY, (N,)), jnp.float64(0.7), jnp.float64(1.3)
        product = gauss_newton_product(
            lambda f, p: jnp.sum(jnp.sin(p * f)),
            lambda p, x: p**2 * x,
            chunk_size=chunk_size,
            outer_has_params=True,
        )(p, x)
        f, J = p**2 * x, 2 * p * x
        s, c = jnp.sin(p * f), jnp.cos(p * f)
        expected = jnp.sum(-s * (p * J) ** 2 + 2 * (c - s * p * f) * J - s * f**2) * v
        assert tree_allclose(product(v), expected)

    def test_several_arguments_axes_keys_and_auxiliary_data(self, chunk_size, x64):
        def towers(query, passage, x, y, key):
            keep = jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)
            return (jnp.tanh((x * keep) @ query), jnp.tanh(y @ passage)), keep

        def outer(outputs):
            return -jnp.trace(jax.nn.log_softmax(outputs[0] @ outputs[1].T, axis=-1))

        keys = jax.random.split(KEY, 6)
        query, passage, x, y, v, u = (
            jax.random.normal(key, shape)
            for key, shape in zip(
                keys, [(3, 2), (3, 2), (N, 3), (3, N), (3, 2), (3, 2)], strict=True
            )
        )
        noise = jax.random.split(KEY, N)
        product = gauss_newton_product(
            outer,
            towers,
            (1, 0),
            in_axes=(None, None, 0, -1, 0),
            has_aux=True,
            chunk_size=chunk_size,
        )
        got = jax.jit(lambda *args: product(*args)((v, u)))(query, passage, x, y, noise)

        def outputs(passage, query):
            return jax.vmap(towers, (None, None, 0, 1, 0))(query, passage, x, y, noise)[
                0
            ]

        @jax.jit
        def expected(passage, query):
            f, df = jax.jvp(outputs, (passage, query), (v, u))
            _, curved = jax.jvp(jax.grad(outer), (f,), (df,))
            return jax.vjp(outputs, passage, query)[1](curved)

        assert tree_allclose(got, expected(passage, query))

    def test_a_batched_argument(self, chunk_size, x64):
        """By the inputs themselves: each example's own block, coupled by outer."""
        params, x, _ = problem()
        v = jax.random.normal(KEY, x.shape)
        product = gauss_newton_product(
            contrastive, lambda x: embed(params, x), in_axes=1, chunk_size=chunk_size
        )
        got = jax.jit(lambda x, v: product(x)(v))(x.T, v.T)

        def outputs(x):
            tree = jax.vmap(lambda x: embed(params, x))(x)
            return {"z": tree["z"], "size": tree["size"]}, tree["sign"]

        @jax.jit
        def expected(x, v):
            f, push, sign = jax.linearize(outputs, x, has_aux=True)
            slopes = jax.grad(lambda f: contrastive({**f, "sign": sign}))
            return jax.linear_transpose(push, x)(jax.jvp(slopes, (f,), (push(v),))[1])[
                0
            ]

        assert tree_allclose(got, expected(x, v).T)

    def test_no_examples(self, chunk_size):
        params, x, v = problem(0, jnp.float32)
        product = gauss_newton_product(contrastive, embed, chunk_size=chunk_size)(
            params, x
        )
        assert tree_allclose(product(v), jax.tree.map(jnp.zeros_like, v))

    def test_conjugate_gradients_under_jit(self, chunk_size, x64):
        params, x, _ = problem()

        def outer(outputs):
            return jnp.sum((outputs["z"] - 1.0) ** 2)

        @jax.jit
        def step(params, x):
            product = gauss_newton_product(outer, embed, chunk_size=chunk_size)(
                params, x
            )
            grad = chain_rule_grad(outer, embed, chunk_size=chunk_size)(params, x)
            return grad, jax.scipy.sparse.linalg.cg(
                lambda v: (Vector(product(v)) + 0.1 * Vector(v)).tree, grad, tol=1e-13
            )[0]

        G, unravel = dense_gauss_newton(outer, embed, params, x)
        grad, got = step(params, x)
        damped = G + 0.1 * jnp.eye(len(G))
        expected = unravel(jnp.linalg.solve(damped, ravel_pytree(grad)[0]))
        assert tree_allclose(got, expected, rtol=1e-10)

    def test_float32_rounding(self, chunk_size):
        params, x, v = problem(dtype=jnp.float32)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (params, x, v))
            G, unravel = dense_gauss_newton(contrastive, embed, *wide[:2])
            expected = jax.tree.map(
                lambda leaf: leaf.astype(jnp.float32), product_with(G, wide[2], unravel)
            )
        product = gauss_newton_product(contrastive, embed, chunk_size=chunk_size)
        got = jax.jit(lambda params, x, v: product(params, x)(v))(params, x, v)
        assert tree_allclose(got, expected)

    def test_a_bfloat16_sum_is_carried(self, chunk_size):
        p, x = jnp.ones(1, jnp.bfloat16), jnp.ones((1000, 1), jnp.bfloat16)
        product = gauss_newton_product(
            lambda f: jnp.sum(f.astype(jnp.float32) ** 2) / 2,
            lambda p, x: (p * x)[0],
            chunk_size=chunk_size,
        )(p, x)
        assert tree_allclose(product(p), jnp.full(1, 1000, jnp.bfloat16))


@pytest.mark.parametrize("chunk_size", CHUNKS)
class TestFisher:
    def test_equals_the_dense_matrix(self, chunk_size, x64):
        params, x, v = problem()
        rows = jax.jit(per_example_grad(scalar))(params, x)
        J = jax.vmap(lambda row: ravel_pytree(row)[0])(rows)
        _, unravel = ravel_pytree(params)
        product = fisher_product(scalar, chunk_size=chunk_size)(params, x)
        assert tree_allclose(product(v), product_with(J.T @ J / N, v, unravel))

    def test_no_examples(self, chunk_size):
        params, x, v = problem(0, jnp.float32)
        product = fisher_product(scalar, chunk_size=chunk_size)(params, x)
        assert tree_allclose(product(v), jax.tree.map(jnp.zeros_like, v))

    def test_options(self, chunk_size, x64):
        params, x, v = problem()

        def both(x, params):
            return scalar(params, x), x

        product = fisher_product(
            both, 1, in_axes=(1, None), has_aux=True, chunk_size=chunk_size
        )
        expected = fisher_product(scalar)(params, x)(v)
        assert tree_allclose(product(x.T, params)(v), expected)

    def test_vmap_and_grad_of_a_product(self, chunk_size, x64):
        params, x, v = problem()
        expected = fisher_product(scalar)(params, x)
        product = fisher_product(scalar, chunk_size=chunk_size)(params, x)
        many = jax.tree.map(lambda leaf: jnp.stack([leaf, 2 * leaf]), v)
        got, plain = (jax.jit(jax.vmap(matvec))(many) for matvec in (product, expected))
        assert tree_allclose(got, plain)

        def curvature(params):
            product = fisher_product(scalar, chunk_size=chunk_size)(params, x)
            return Vector(v) @ Vector(product(v))

        def slopes(params):
            return jax.jvp(
                lambda p: jax.vmap(scalar, (None, 0))(p, x), (params,), (v,)
            )[1]

        direct = jax.jit(jax.grad(lambda params: jnp.mean(slopes(params) ** 2)))(params)
        assert tree_allclose(jax.jit(jax.grad(curvature))(params), direct, rtol=1e-10)


def test_the_fisher_matrix_of_a_model_is_gauss_newton_of_its_likelihood(x64):
    """The mean over the model's own labels of the outer products of its gradients."""
    key, x = jax.random.key(0), jax.random.normal(KEY, (N, 3))
    params = {"w": jax.random.normal(key, (3, 4))}
    v = {"w": jax.random.normal(KEY, (3, 4))}

    def logits(params, x):
        return jnp.tanh(x @ params["w"]) * 2

    def nll(logits):
        return -jnp.mean(
            jax.nn.log_softmax(logits)[:, 0]
        )  # the curvature knows no labels

    def log_likelihood(params, x, label):
        return jax.nn.log_softmax(logits(params, x))[label]

    got = gauss_newton_product(nll, logits)(params, x)(v)
    odds = jax.nn.softmax(jax.vmap(logits, (None, 0))(params, x))
    expected = Vector(jax.tree.map(jnp.zeros_like, v))
    of_one = jax.jit(
        lambda x, label: fisher_product(log_likelihood)(params, x, label)(v)
    )
    for i in range(N):
        for label in range(4):
            expected += (
                odds[i, label] / N * Vector(of_one(x[i : i + 1], jnp.array([label])))
            )
    assert tree_allclose(got, expected.tree)


def test_how_often_a_chunked_product_traces_fun():
    """The outputs when it is made, then J v, and the pull for each size of chunk.

    Outer once.
    """
    fun, outer = TraceCounter(embed), TraceCounter(contrastive)
    params, x, v = problem(dtype=jnp.float32)
    product = gauss_newton_product(outer, fun, chunk_size=3)(params, x)
    assert (fun.count, outer.count) == (1, 1)
    product(v)
    assert (fun.count, outer.count) == (4, 1)


def test_memory_follows_the_chunk():
    def encoder(params, x):
        return jnp.mean(jnp.tanh(jnp.tanh(x @ params["w"]) @ params["v"]), axis=0)

    params = {"w": jnp.ones((4, 64)), "v": jnp.ones((64, 64))}

    def temporary(n, chunk_size):
        product = gauss_newton_product(
            lambda f: jnp.sum(f**4), encoder, chunk_size=chunk_size
        )
        both = jax.jit(lambda params, x: product(params, x)(params))
        compiled = both.lower(params, jnp.ones((n, 32, 4))).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    rows = 64 * 4  # bytes of one example's outputs
    small, large = temporary(256, 32), temporary(2048, 32)
    assert large - small < 6 * (2048 - 256) * rows
    assert large < temporary(2048, None) / 10


class TestErrors:
    def test_a_tree_that_is_not_like_the_parameters(self):
        params, x, v = problem(dtype=jnp.float32)
        product = fisher_product(scalar)(params, x)
        with pytest.raises(
            ValueError, match=r"argument v\['w'\] .*float32\[3,2\], got .*\[2,3\]"
        ):
            product({**v, "w": v["w"].T})
        with pytest.raises(ValueError, match=r"missing keys \['b'\]"):
            product({"w": v["w"]})
        product = fisher_product(lambda a, b, x: a * b * x, (0, 1))(2.0, 3.0, x[:, 0])
        with pytest.raises(
            ValueError, match="expected a tuple of length 2, got a tuple of"
        ):
            product((jnp.ones(()),))
        with pytest.raises(
            ValueError, match=r"expected a tuple of length 2, got float32\[2\]"
        ):
            product(jnp.ones(2))
        with pytest.raises(
            ValueError, match="expected a tuple of length 2, got a dict"
        ):
            product({"a": jnp.ones(()), "b": jnp.ones(())})

    def test_outputs(self):
        params, x, _ = problem(dtype=jnp.float32)
        with pytest.raises(
            ValueError, match=r"value of fun must be a scalar, got float32\[2\]"
        ):
            fisher_product(lambda p, x: x @ p["w"])(params, x)
        with pytest.raises(ValueError, match="value of outer must be a scalar"):
            gauss_newton_product(lambda f: f["z"], embed)(params, x)
        with pytest.raises(
            TypeError, match="argument fun must be a function, got None"
        ):
            fisher_product(None)
        with pytest.raises(TypeError, match="argument outer must be a function"):
            gauss_newton_product(None, embed)
        with pytest.raises(TypeError, match="outer_args must be a tuple"):
            gauss_newton_product(contrastive, embed)(params, x, outer_args=np.ones(2))

    def test_a_custom_vjp_has_no_forward_mode(self):
        @jax.custom_vjp
        def square(x):
            return x**2

        square.defvjp(lambda x: (x**2, x), lambda x, g: (2 * x * g,))
        x = jnp.ones(5)
        for chunk_size in (None, 2):
            with pytest.raises(TypeError, match="custom_vjp"):
                fisher_product(lambda p, x: square(p * x), chunk_size=chunk_size)(
                    2.0, x
                )(jnp.float32(1))
