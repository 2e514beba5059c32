"""Norms, Gramians and scales of groups of parameters, against plain rows."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads import jacobian

pytestmark = pytest.mark.any_release

N = 5
MODES = [{}, {"recompute": True}, {"chunk_size": 2}]
each_mode = pytest.mark.parametrize("mode", MODES, ids=str)


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape))


def params():
    return {
        "layers": [{"w": normal(0, 4, 3), "b": normal(1, 3)}, {"w": normal(2, 3, 3)}],
        "head": normal(3, 3),
        "nothing": {},
    }


# Prefixes of the parameters, and the leaves in each of their groups.
LEAVES = ["head", "layers[0].b", "layers[0].w", "layers[1].w"]
PREFIXES = {
    "one": (0, [[0, 1, 2, 3]]),
    "parts": ({"layers": 1.0, "head": "h", "nothing": {}}, [[0], [1, 2, 3]]),
    "layers": ({"layers": [True, 2], "head": 3, "nothing": {}}, [[0], [1, 2], [3]]),
    "leaves": ("leaves", [[0], [1], [2], [3]]),
    "an empty group": ({"layers": 0, "head": 0, "nothing": 0}, [[0], [1, 2, 3], []]),
}
each_prefix = pytest.mark.parametrize("prefix", PREFIXES)


def hidden(p, x):
    first, second = p["layers"]
    return jnp.tanh(jnp.tanh(x @ first["w"] + first["b"]) @ second["w"])


def loss(p, x):
    return jnp.sum(hidden(p, x) * p["head"])


def outputs(p, x):
    h = hidden(p, x) * p["head"]
    return {"h": h[:2], "sum": jnp.sum(h)}


def xs():
    return normal(4, N, 4)


def tree_of(prefix):
    given = PREFIXES[prefix][0]
    return params() if given == "leaves" else given


def like(prefix, groups):
    return jax.tree.unflatten(jax.tree.structure(tree_of(prefix)), groups)


def parts(rows, prefix):
    """The rows of each group as a matrix (N, P of the group)."""
    flat = [x.reshape(N, -1) for x in jax.tree.leaves(rows)]
    return [
        np.concatenate([np.zeros((N, 0)), *(flat[i] for i in own)], axis=1)
        for own in PREFIXES[prefix][1]
    ]


def rows_of(fun):
    return jax.vmap(jax.grad(fun), (None, 0))(params(), xs())


@each_mode
@each_prefix
def test_groups_of_parameters(prefix, mode, x64):
    groups = PREFIXES[prefix][0]
    own = parts(rows_of(loss), prefix)

    @jax.jit
    def products(p, x):
        J = jacobian(loss, **mode)(p, x)
        return (
            J.norms(groups=groups),
            J.squared_norms(groups=groups),
            J.gram(groups=groups),
            J.gram(J[1:3], groups=groups),
        )

    norms, squares, kernel, some = products(params(), xs())
    assert tree_allclose(norms, like(prefix, [np.linalg.norm(x, axis=1) for x in own]))
    assert tree_allclose(squares, like(prefix, [np.sum(x**2, axis=1) for x in own]))
    assert tree_allclose(kernel, like(prefix, [x @ x.T for x in own]))
    assert tree_allclose(some, like(prefix, [x @ x[1:3].T for x in own]))


@each_mode
@each_prefix
def test_groups_are_scaled(prefix, mode, x64):
    groups = PREFIXES[prefix][0]
    s = [jnp.sin(jnp.arange(N) + i + 1) for i in range(len(PREFIXES[prefix][1]))]
    owners = {i: x for own, x in zip(PREFIXES[prefix][1], s, strict=True) for i in own}
    rows, treedef = jax.tree.flatten(rows_of(loss))
    want = [x * owners[i].reshape(N, *[1] * (x.ndim - 1)) for i, x in enumerate(rows)]

    @jax.jit
    def products(p, x, s):
        J = jacobian(loss, **mode)(p, x).scale(s, groups=groups)
        return J.to_rows(), J.clip(0.1).sum()

    found, clipped = products(params(), xs(), like(prefix, s))
    assert tree_allclose(found, jax.tree.unflatten(treedef, want))
    lengths = np.linalg.norm(
        np.concatenate([x.reshape(N, -1) for x in want], axis=1), axis=1
    )
    shrunk = [np.tensordot(np.minimum(1, 0.1 / lengths), x, 1) for x in want]
    assert tree_allclose(clipped, jax.tree.unflatten(treedef, shrunk))


@each_mode
def test_groups_are_outside_of_trees_of_outputs(mode, x64):
    J = jacobian(outputs, **mode)(params(), xs())
    groups = {"layers": [0, 1], "head": 2, "nothing": {}}
    rows = J.to_rows()
    norms = J.norms(groups=groups)
    assert jax.tree.structure(norms) == jax.tree.structure(
        jax.tree.map(lambda _: {"h": 0, "sum": 0}, groups)
    )
    head = {"h": rows["h"]["head"], "sum": rows["sum"]["head"]}
    lengths = jax.tree.map(lambda x: jnp.linalg.norm(x, axis=-1), head)
    assert tree_allclose(norms["head"], lengths)
    kernel = J.gram(groups=groups)["head"]["h"]["sum"]
    assert tree_allclose(
        kernel, jnp.einsum("nkp,mp->nkm", head["h"], head["sum"]), rtol=1e-12
    )
    scaled = J.scale(norms, groups=groups).to_rows()
    assert tree_allclose(scaled["h"]["head"], head["h"] * norms["head"]["h"][..., None])
    bounds = jax.tree.map(lambda _: 0.1, groups)
    _, before = J.clip(bounds, with_norms=True)
    assert tree_allclose(norms, before)


@each_mode
def test_groups_inside_grad_and_vmap(mode, x64):
    groups = {"layers": 0, "head": 1, "nothing": {}}

    def ours(p):
        J = jacobian(loss, **mode)(p, xs())
        norms = J.norms(groups=groups)
        clipped = J.scale(jax.tree.map(lambda x: 1 / x, norms), groups=groups)
        return jnp.sum(norms["layers"] ** 3) + jnp.sum(clipped.sum()["head"])

    def plainly(p):
        rows = jax.vmap(jax.grad(loss), (None, 0))(p, xs())
        layers = jax.tree.leaves(rows["layers"])
        norms = jnp.sqrt(sum(jnp.sum(x.reshape(N, -1) ** 2, 1) for x in layers))
        lengths = jnp.linalg.norm(rows["head"], axis=1, keepdims=True)
        return jnp.sum(norms**3) + jnp.sum(rows["head"] / lengths)

    assert tree_allclose(jax.grad(ours)(params()), jax.grad(plainly)(params()))
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), params())
    assert tree_allclose(jax.vmap(ours)(many), jax.vmap(plainly)(many))


def test_norms_of_groups_neither_overflow_nor_underflow():
    def f(p, x):
        return 1e30 * p["a"] @ x + 1e-30 * p["b"] @ x

    p = {"a": jnp.ones(3), "b": jnp.ones(3)}
    norms = jacobian(f)(p, jnp.ones((2, 3))).norms(groups="leaves")
    assert tree_allclose(
        norms, {"a": jnp.full(2, 3**0.5 * 1e30), "b": jnp.full(2, 3**0.5 * 1e-30)}
    )


J = jacobian(loss)(params(), xs())
K = jacobian(outputs)(params(), xs())
BOTH = {"layers": jnp.ones(N), "head": jnp.ones(N), "nothing": {}}
ERRORS = {
    "another word": (
        lambda: J.norms(groups="layers"),
        "argument groups must be 'leaves' or a prefix tree of the parameters, got",
    ),
    "no prefix": (
        lambda: J.gram(groups={"layers": 0}),
        "argument groups must be 'leaves' or a prefix tree of the parameters, but "
        "groups does not match: missing keys ['head', 'nothing']",
    ),
    "a wrong branch": (
        lambda: J.squared_norms(groups={"layers": [0], "head": 0, "nothing": {}}),
        "groups['layers'] does not match: expected a list of length 2, got a list of "
        "length 1",
    ),
    "scales of other groups": (
        lambda: J.scale({"layers": jnp.ones(N)}, groups=BOTH),
        "argument s must have a number per row for each group, as "
        "J.norms(groups=groups) has, but s does not match: missing keys",
    ),
    "one array of scales": (
        lambda: J.scale(jnp.ones(N), groups=BOTH),
        "argument s must have a number per row for each group",
    ),
    "scales of another length": (
        lambda: J.scale({**BOTH, "head": jnp.ones(2)}, groups=BOTH),
        "argument s['head'] must have one number per row, shape (5,), got float32[2]",
    ),
    "scales of one output": (
        lambda: K.scale(BOTH, groups=BOTH),
        "argument s['head'] must be a tree like the function's output",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_does_not_fit_the_groups_is_refused(name):
    call, words = ERRORS[name]
    with pytest.raises(ValueError, match=re.escape(words)):
        call()
