"""Losses of a whole batch: a row for each loss, against `jax.jacrev`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import TraceCounter, tree_allclose

from pytree_grads import jacobian, per_example_grad, value_and_jacobian
from pytree_grads._jax.compat import all_equations

pytestmark = pytest.mark.any_release

N, K = 6, 3
MODES = [{}, {"recompute": True}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def params():
    return {"w": normal(0, 4, 7), "b": normal(1, 7), "v": normal(2, 7, K)}


def hidden(p, x):
    return jnp.tanh(x @ p["w"] + p["b"][None])


def tasks(p, x, y):
    """An array of losses."""
    return jnp.mean((hidden(p, x) @ p["v"] - y) ** 2, axis=0)


def physics(p, x, y):
    """A tree of losses, of which one couples the batch and one has no data."""
    out = hidden(p, x) @ p["v"]
    return {
        "data": jnp.mean((out - y) ** 2),
        "coupled": jax.nn.logsumexp(out, axis=0),
        "penalty": jnp.sum(p["b"] ** 2),
    }


def one(p, x, y):
    """A scalar."""
    return jnp.sum(tasks(p, x, y) ** 2)


LOSSES = {f.__name__: f for f in (tasks, physics, one)}
each_loss = pytest.mark.parametrize("name", LOSSES)


def batch():
    return normal(3, N, 4), normal(4, N, K)


def flat(name, p):
    """The rows as a matrix (K, P), or one row (P,)."""
    rows = jax.jacrev(LOSSES[name])(p, *batch())
    outputs = jax.tree.leaves(jax.eval_shape(LOSSES[name], p, *batch()))
    parts = []
    treedef = jax.tree.structure(jax.eval_shape(LOSSES[name], p, *batch()))
    for tree, out in zip(treedef.flatten_up_to(rows), outputs, strict=True):
        leaves = [x.reshape(*out.shape, -1) for x in jax.tree.leaves(tree)]
        parts.append(jnp.concatenate(leaves, axis=-1))
    if name == "one":
        return parts[0]
    return jnp.concatenate([jnp.atleast_2d(x) for x in parts])


def ravel(tree):
    """A tree of numbers per row in the order of rows."""
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


@each_mode
@each_loss
def test_every_product(name, mode, x64):
    fun, p = LOSSES[name], params()
    want = flat(name, p)
    matrix = jnp.atleast_2d(want)
    outputs = jax.eval_shape(fun, p, *batch())
    c = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), outputs)
    v = jax.tree.map(jnp.sin, p)

    def vector(tree):
        return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])

    @jax.jit
    def products(p, c, *batch):
        J = jacobian(fun, batched=False, **mode)(p, *batch)
        numbers = {
            "norms": J.norms(),
            "squares": J.squared_norms(),
            "applied": J @ v,
            "clipped": J.clip(0.1).norms(),
            "group": J.norms(groups={"w": 0, "b": 0, "v": 0})["b"],
        }
        sums = {
            "weighted": J.weighted_sum(c),
            "transposed": J.T @ c,
            "sum": J.sum(),
            "mean": J.mean(),
            "squares": J.square_sum(c),
            "scaled": J.scale(c).sum(),
        }
        return J.to_rows(), numbers, sums, J.gram(), J.gram(trace=True)

    rows, numbers, sums, gram, trace = products(p, c, *batch())
    assert tree_allclose(rows, jax.jacrev(fun)(p, *batch()))
    norms, weights = jnp.linalg.norm(matrix, axis=1), ravel(c)
    expected = {
        "norms": norms,
        "squares": norms**2,
        "applied": matrix @ vector(v),
        "clipped": jnp.minimum(norms, 0.1),
        "group": jnp.linalg.norm(matrix[:, :7], axis=1),
    }
    for key, tree in numbers.items():
        assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, outputs)
        assert tree_allclose(ravel(tree), expected[key]), key
    weighted = weights @ matrix
    expected = {
        "weighted": weighted,
        "transposed": weighted,
        "scaled": weighted,
        "sum": matrix.sum(0),
        "mean": matrix.mean(0),
        "squares": weights @ matrix**2,
    }
    for key, tree in sums.items():
        assert tree_allclose(vector(tree), expected[key]), key
    assert tree_allclose(trace, jnp.sum(matrix**2))
    if name != "physics":
        assert tree_allclose(gram, want @ want.T)
    else:
        assert tree_allclose(gram["coupled"]["data"], matrix[:3] @ matrix[3])


@each_mode
@each_loss
def test_shapes_without_examples(name, mode):
    J = jacobian(LOSSES[name], batched=False, **mode)(params(), *batch())
    assert J.shape == {"tasks": (3, 56), "physics": (5, 56), "one": (56,)}[name]
    assert repr(J).startswith(f"Jacobian(shape={J.shape}")
    J.check()
    assert "['w']" in J.explain()
    if name == "one":
        assert tree_allclose(J.mean(), jax.grad(one)(params(), *batch()))


@each_mode
def test_outputs_and_aux_come_whole(mode):
    def with_aux(p, x, y):
        return tasks(p, x, y), {"h": hidden(p, x), "n": jnp.asarray(len(x))}

    (values, aux), J = value_and_jacobian(
        with_aux, batched=False, has_aux=True, **mode
    )(params(), *batch())
    want, want_aux = with_aux(params(), *batch())
    assert tree_allclose(values, want)
    assert tree_allclose(aux, want_aux)
    assert J.norms().shape == (K,)


@each_mode
def test_inside_grad_vmap_and_scan(mode, x64):
    def ours(p, x):
        return jnp.sum(jacobian(tasks, batched=False, **mode)(p, x, batch()[1]).gram())

    def plainly(p, x):
        rows = jax.jacrev(tasks)(p, x, batch()[1])
        return sum(jnp.sum(jnp.sum(g, 0) ** 2) for g in jax.tree.leaves(rows))

    (x, _), p = batch(), params()
    assert tree_allclose(jax.grad(ours)(p, x), jax.grad(plainly)(p, x))
    xs = jnp.stack([x, x / 2])
    want = jax.vmap(plainly, (None, 0))(p, xs)
    assert tree_allclose(jax.vmap(ours, (None, 0))(p, xs), want)
    _, found = jax.lax.scan(lambda p, x: (p, ours(p, x)), p, xs)
    assert tree_allclose(found, want)


@each_mode
def test_with_jacobians_of_examples_and_of_other_losses(mode, x64):
    p, (x, y) = params(), batch()
    whole = jacobian(tasks, batched=False, **mode)(p, x, y)
    each = jacobian(lambda p, x, y: one(p, x[None], y[None]), **mode)(p, x, y)
    a, b = flat("tasks", p), flat("one", p)
    rows = per_example_grad(lambda p, x, y: one(p, x[None], y[None]))(p, x, y)
    rows = jnp.concatenate([x.reshape(N, -1) for x in jax.tree.leaves(rows)], axis=1)
    assert tree_allclose(whole.gram(each), a @ rows.T)
    assert tree_allclose(each.gram(whole), rows @ a.T)
    total = jacobian(one, batched=False, **mode)(p, x, y)
    assert tree_allclose(whole @ total.T, a @ b)
    both = whole + 2 * jacobian(tasks, batched=False, **mode)(p, 2 * x, y)
    plain = jax.jacrev(lambda p: tasks(p, x, y) + 2 * tasks(p, 2 * x, y))(p)
    assert tree_allclose(both.to_rows(), plain)
    both.check()


def table(p, x, y):
    """Losses in an array of two axes."""
    return jnp.stack([tasks(p, x, y), tasks(p, 2 * x, y), jnp.sin(tasks(p, x, y))])


MASK = np.array([True, False, True])
INDICES = [1, -1, slice(0, 2), slice(None, None, -2), np.array([2, 0, 2]), [], MASK]


@each_mode
@pytest.mark.parametrize("fun", [tasks, table])
def test_losses_chosen_by_an_index(fun, mode, x64):
    p, rows = params(), jax.jacrev(fun)(params(), *batch())
    J = jacobian(fun, batched=False, **mode)(p, *batch())
    for index in INDICES:
        own = jax.tree.map(lambda x, i=index: x[np.atleast_1d(np.arange(3)[i])], rows)
        assert J[index].shape == (*own["b"].shape[:-1], 56)
        assert tree_allclose(J[index].to_rows(), own)
        axes = tuple(range(own["b"].ndim - 1))
        total = jax.tree.map(lambda x, axes=axes: x.sum(axes), own)
        assert tree_allclose(J[index].sum(), total)
    J[1:].check()
    assert "['w']" in J[1:].explain()


@each_mode
def test_losses_chosen_with_weights_in_sums_and_in_jit(mode, x64):
    p, (x, y) = params(), batch()

    @jax.jit
    def ours(p, x, i):
        J = jacobian(tasks, batched=False, **mode)(p, x, y).clip(0.1)
        K = jacobian(tasks, batched=False, **mode)(p, 2 * x, y)
        two = (2 * J[i] - K[jnp.array([1, 0])])[::-1]
        return two.norms(), two.sum(), J[i][1].gram(K), J[i].weighted_sum(y[0, :2])

    def plainly(p, x, i):
        flat = [_matrix(jax.jacrev(tasks)(p, z, y)) for z in (x, 2 * x)]
        J, K = flat[0], flat[1]
        J *= jnp.minimum(1, 0.1 / jnp.linalg.norm(J, axis=1, keepdims=True))
        two = (2 * J[i] - K[jnp.array([1, 0])])[::-1]
        chosen = J[i]
        sums = two.sum(0), y[0, :2] @ chosen
        return jnp.linalg.norm(two, axis=1), sums[0], chosen[1:] @ K.T, sums[1]

    for i in (jnp.array([2, 0]), jnp.array([0, 0])):
        found = ours(p, x, i)
        flat = [x if hasattr(x, "shape") else _vector(x) for x in found]
        assert tree_allclose(flat, list(plainly(p, x, i)))


def _matrix(rows):
    return jnp.concatenate([x.reshape(len(x), -1) for x in jax.tree.leaves(rows)], 1)


def _vector(tree):
    return jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(tree)])


def test_arguments_that_are_no_arrays_and_keywords():
    def losses(p, x, kind, *, y):
        assert kind == "mean"
        return tasks(p, x, y)

    x, y = map(np.asarray, batch())
    J = jacobian(losses, batched=False)(params(), x, "mean", y=y)
    assert tree_allclose(J.to_rows(), jax.jacrev(tasks)(params(), *batch()))


def test_the_forward_pass_is_shared():
    counted = TraceCounter(tasks)
    jax.make_jaxpr(lambda p: jacobian(counted, batched=False)(p, *batch()).gram())(
        params()
    )
    assert counted.count == 1

    def tanhs(fun):
        found = all_equations(jax.make_jaxpr(fun)(params()))
        return sum(eqn.primitive.name == "tanh" for eqn in found)

    assert tanhs(lambda p: jacobian(tasks, batched=False)(p, *batch()).norms()) == 1


@pytest.mark.parametrize("n", [8, 48])
def test_no_array_is_as_large_as_the_rows_where_factors_are_smaller(n):
    """The losses share the inputs of a layer: of 48 examples, those count once."""
    k, width = 5, 64
    p = {"w": normal(0, width, width), "v": normal(1, width, k)}

    def losses(p, x):
        return jnp.mean((jnp.tanh(x @ p["w"]) @ p["v"]) ** 2, axis=0)

    def products(p, x):
        J = jacobian(losses, batched=False)(p, x)
        return J.norms(), J.gram(), J.weighted_sum(jnp.ones(k))

    equations = all_equations(jax.make_jaxpr(products)(p, normal(2, n, width)))
    largest = max(v.aval.size for eqn in equations for v in eqn.outvars)
    cotangents = k * n * width
    assert largest <= max(width * width, cotangents)  # five rows: k * width * width


J = jacobian(tasks, batched=False)(params(), *batch())
ERRORS = {
    "chunk_size": (
        lambda: jacobian(tasks, batched=False, chunk_size=2),
        ValueError,
        "argument chunk_size is about examples, and with batched=False fun takes its "
        "arguments whole",
    ),
    "in_axes": (
        lambda: value_and_jacobian(tasks, batched=False, in_axes=0),
        ValueError,
        "argument in_axes is about examples",
    ),
    "batched": (
        lambda: jacobian(tasks, batched=0),
        TypeError,
        "argument batched must be a bool (it is static), got 0",
    ),
    "length": (lambda: len(J), TypeError, "has no examples to count: J.shape is (3,"),
    "an index of one loss": (
        lambda: jacobian(one, batched=False)(params(), *batch())[0],
        TypeError,
        "fun returns one loss or a tree: stack losses, or J.scale with zeros drops",
    ),
    "an index that is too large": (
        lambda: J[3],
        IndexError,
        "index 3 is out of range: J has the rows of 3 losses",
    ),
    "weights": (
        lambda: J.weighted_sum(jnp.ones((1, K))),
        ValueError,
        "argument c must have one number per row, shape (3,), got float32[1,3]",
    ),
    "J + rows of examples": (
        lambda: J + jacobian(tasks)(params(), *(x[None] for x in batch())),
        ValueError,
        "the same examples and outputs",
    ),
    "an error in the function": (
        lambda: jacobian(lambda p, x: x @ x, batched=False)(params(), batch()[0]),
        TypeError,
        "dot_general requires contracting dimensions",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_table(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call()
    if name == "an error in the function":
        note = caught.value.__notes__[-1]
        assert note.startswith("fun was called with the whole batch:")
        assert note.endswith("x: float32[6,4]")
