"""Functions with several outputs: a row for each output of each example, against
`jax.jacrev`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads import jacobian, value_and_jacobian
from pytree_grads._engine.leaf import Leaf

N, K = 3, 6
KEYS = jax.random.split(jax.random.key(0), 6)
MODES = [{}, {"recompute": True}, {"chunk_size": 2}]


def array_out(p, x):
    hidden = jnp.tanh(x @ p["w"] + p["b"])
    return (hidden @ p["v"]).reshape(2, 3)


def tree_out(p, x):
    def step(h, _):
        return jnp.tanh(h @ p["square"] + x[:, None] @ p["b"][None]), None

    h, _ = jax.lax.scan(step, jnp.outer(x, p["b"]), length=2)
    flat = (h.sum(0) @ p["v"])[:5]
    return {"flat": flat, "nested": (jnp.sum(h**2) + p["table"][0, 0], None)}


def problem():
    def normal(i, *shape):
        return jax.random.normal(KEYS[i], shape, float)

    params = {"w": normal(0, 3, 7), "b": normal(1, 7), "v": normal(2, 7, K)}
    return params | {"square": normal(3, 7, 7), "table": normal(4, 2, 2)}, normal(
        5, N, 3
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("constant", [1.0, np.float64(1), jnp.float32(1)])
def test_an_output_that_is_a_constant(constant, mode):
    outputs, J = value_and_jacobian(lambda p, x: constant, **mode)(
        jnp.ones(2), jnp.ones((N, 2))
    )
    assert outputs.tolist() == [1.0] * N
    assert J.norms().tolist() == [0.0] * N


def dense(fun, params, x):
    """The rows as a matrix (N, K, P), in the order of the output's and the parameters'
    leaves.
    """
    rows = jax.vmap(jax.jacrev(fun), (None, 0))(params, x)
    outputs, inner = jax.eval_shape(fun, params, x[0]), jax.tree.structure(params)
    of_output = [
        np.concatenate(
            [np.reshape(leaf, (N, out.size, -1)) for leaf in inner.flatten_up_to(row)],
            axis=2,
        )
        for out, row in zip(
            jax.tree.leaves(outputs),
            jax.tree.structure(outputs).flatten_up_to(rows),
            strict=True,
        )
    ]
    return rows, np.concatenate(of_output, axis=1)


def unflat(fun, params, x, numbers):
    """Numbers (N, K, ...) as the user's tree of them."""
    outputs = jax.eval_shape(fun, params, x[0])
    leaves, start = [], 0
    for out in jax.tree.leaves(outputs):
        part = numbers[:, start : start + out.size]
        leaves.append(part.reshape(N, *out.shape, *part.shape[2:]))
        start += out.size
    return jax.tree.unflatten(jax.tree.structure(outputs), leaves)


def like_params(params, vector):
    leaves, treedef = jax.tree.flatten(params)
    cuts = np.cumsum([x.size for x in leaves])[:-1]
    parts = zip(np.split(vector, cuts), leaves, strict=True)
    return jax.tree.unflatten(treedef, [part.reshape(x.shape) for part, x in parts])


@pytest.mark.parametrize("mode", MODES, ids=["kept", "recomputed", "chunks"])
@pytest.mark.parametrize("fun", [array_out, tree_out])
def test_products(fun, mode, x64):
    params, x = problem()
    rows, matrix = dense(fun, params, x)
    rng = np.random.default_rng(0)
    c = rng.standard_normal((N, K))
    s = np.abs(rng.standard_normal((N, K)))
    v = rng.standard_normal(matrix.shape[2])
    bound = float(np.median(np.linalg.norm(matrix, axis=2)))

    @jax.jit
    def products(params, x, c, s, v):
        outputs, J = value_and_jacobian(fun, **mode)(params, x)
        return {
            "outputs": outputs,
            "to_rows": J.to_rows(),
            "norms": J.norms(),
            "weighted_sum": J.weighted_sum(c),
            "sum": J.T @ s,
            "mean": J.mean(),
            "apply": J @ v,
            "square_sum": J.square_sum(c),
            "scaled": J.scale(s).sum(),
            "clipped": J.clip(bound).weighted_sum(c),
            "sliced": J[1:3].gram(),
        }

    got = products(
        params, x, *(unflat(fun, params, x, a) for a in (c, s)), like_params(params, v)
    )
    norms = np.linalg.norm(matrix, axis=2)
    factors = np.minimum(1, bound / norms)

    def total(weights, of=matrix):
        return like_params(params, np.tensordot(weights, of, 2))

    want = {
        "outputs": jax.vmap(fun, (None, 0))(params, x),
        "to_rows": rows,
        "norms": unflat(fun, params, x, norms),
        "weighted_sum": total(c),
        "sum": total(s),
        "mean": total(np.full((N, K), 1 / (N * K))),
        "apply": unflat(fun, params, x, matrix @ v),
        "square_sum": total(c, matrix**2),
        "scaled": total(s),
        "clipped": total(c * factors),
    }
    sliced = got.pop("sliced")
    assert tree_allclose(got, want)
    blocks = np.einsum("ikp,jlp->ikjl", matrix[1:3], matrix[1:3])
    flat = [np.asarray(x) for x in jax.tree.leaves(sliced)]
    assert sum(block.size for block in flat) == blocks.size
    np.testing.assert_allclose(
        sorted(np.concatenate([x.ravel() for x in flat])),
        sorted(blocks.ravel()),
        rtol=1e-10,
    )


def test_the_gramian_is_the_empirical_tangent_kernel(x64):
    params, x = problem()
    _, matrix = dense(array_out, params, x)
    J = jax.jit(jacobian(array_out))(params, x)
    kernel = jax.jit(lambda J: J.gram(J[:2]))(J)
    expected = np.einsum("ikp,jlp->ikjl", matrix, matrix[:2]).reshape(N, 2, 3, 2, 2, 3)
    assert tree_allclose(kernel, expected)
    scalars = jax.jit(jacobian(lambda p, x: jnp.sum(array_out(p, x))))(params, x)
    assert tree_allclose(
        jax.jit(lambda I, J: I @ J.T)(scalars, J), expected_cross(matrix)
    )
    assert J.shape == (N, 2, 3, matrix.shape[2])
    assert len(J) == N


def expected_cross(matrix):
    return np.einsum("ip,jlp->ijl", matrix.sum(1), matrix).reshape(N, N, 2, 3)


def test_the_gramian_of_a_tree_of_outputs_is_a_tree_of_trees(x64):
    params, x = problem()
    _, matrix = dense(tree_out, params, x)
    kernel = jax.jit(lambda p, x: jacobian(tree_out)(p, x).gram())(params, x)
    full = np.einsum("ikp,jlp->ikjl", matrix, matrix)
    assert kernel["flat"]["flat"].shape == (N, 5, N, 5)
    assert tree_allclose(kernel["flat"]["nested"][0], full[:, :5, :, 5])
    assert tree_allclose(kernel["nested"][0]["nested"][0], full[:, 5, :, 5])
    assert kernel["nested"][1] is None


def test_outputs_share_the_forward_factors():
    params, x = problem()
    J = jax.eval_shape(jacobian(array_out), params, x)
    nodes = jax.tree.leaves(J, is_leaf=lambda node: isinstance(node, Leaf))
    leaves = [node for node in nodes if isinstance(node, Leaf) and node.summands]
    arrays = [a for leaf in leaves for a in jax.tree.leaves(leaf.summands)]
    hidden = [a for a in arrays if set(a.shape) & {7} and K not in a.shape]
    assert hidden, "an activation is kept once for all outputs"


def test_one_output_in_an_array_is_not_a_scalar(x64):
    params, x = problem()

    def one(p, x):
        return array_out(p, x).sum()[None]

    def of(fun):
        J = jacobian(fun)(params, x)
        return J.norms(), J.gram()

    norms, gram = jax.jit(lambda: of(one))()
    expected, expected_gram = jax.jit(lambda: of(lambda p, x: one(p, x)[0]))()
    assert tree_allclose(norms, expected[:, None])
    assert tree_allclose(gram, expected_gram[:, None, :, None])


@pytest.mark.parametrize("mode", MODES, ids=["kept", "recomputed", "chunks"])
def test_no_examples(mode):
    params, x = problem()

    @jax.jit
    def of(params, x):
        J = jacobian(array_out, **mode)(params, x)
        return J, J.norms(), J.gram(), J.sum()

    J, norms, gram, total = of(params, x[:0])
    assert J.shape[:3] == norms.shape == (0, 2, 3)
    assert gram.shape == (0, 2, 3, 0, 2, 3)
    assert tree_allclose(total, jax.tree.map(jnp.zeros_like, params))
