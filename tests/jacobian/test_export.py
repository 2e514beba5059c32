"""Programs that are exported: for sizes that are not known yet, and for other
platforms.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tree_allclose
from jax import export
from models import MODELS

import pytree_grads as pg

F32, INT = jnp.float32, jnp.int32
PRODUCTS = {
    "sum": lambda J: J.sum(),
    "mean": lambda J: J.mean(),
    "norms": lambda J: J.norms(),
    "clipped": lambda J: J.clip(0.5).sum(),
    "scaled": lambda J: J.scale(J.norms()).sum(),
    "weighted": lambda J: J.weighted_sum(J.norms()),
    "gram": lambda J: J.gram(),
    "squares": lambda J: J.square_sum(),
    "directions": lambda J: J @ J.sum(),
    "sketch": lambda J: J.sketch(jax.random.key(0), 4),
    "rows": lambda J: J.to_rows(),
}


def mlp(p, x):
    h = (x @ p["w"]).reshape(-1, 5) + p["b"][None]
    return jnp.sum(jnp.tanh(jnp.tanh(h) @ p["v"]))


def look_up(p, x):
    return jnp.sum(jnp.tanh(p["e"][x]) @ p["e"].T)


def embed(p, x):
    return jnp.sum(jnp.tanh(p["e"][x]))


def recurrent(p, x):
    def step(h, line):
        return jnp.tanh(h @ p["w"] + line), None

    return jnp.sum(jax.lax.scan(step, jnp.zeros(4), x)[0])


def outputs(p, x):
    return jnp.tanh(x @ p["w"])


DENSE = {"w": (4, 5), "b": (5,), "v": (5, 3)}
# The function, its parameters, and one example with a symbolic length t of a sequence
# or without.
FUNCTIONS = {
    "vectors": (mlp, DENSE, (4,), F32),
    "sequences": (mlp, DENSE, ("t", 4), F32),
    "look-ups": (look_up, {"e": (9, 5)}, (7,), INT),
    "look-ups of sequences": (look_up, {"e": (9, 5)}, ("t",), INT),
    "embedded sequences": (embed, {"e": (9, 5)}, ("t",), INT),
    "recurrent": (recurrent, {"w": (4, 4)}, ("t", 4), F32),
    "outputs": (outputs, {"w": (4, 5)}, (4,), F32),
}


@pytest.mark.parametrize("mode", [{}, {"recompute": True}], ids=["kept", "recomputed"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_sizes_may_be_symbolic(name, mode):
    fun, shapes, example, dtype = FUNCTIONS[name]
    n, t = export.symbolic_shape("n, t")
    aval = jax.ShapeDtypeStruct(
        (n, *(t if size == "t" else size for size in example)), dtype
    )
    rng = np.random.default_rng(0)
    params = {
        k: jnp.asarray(rng.standard_normal(shape), F32) for k, shape in shapes.items()
    }

    def products(params, x):
        return {
            k: of(pg.jacobian(fun, **mode)(params, x)) for k, of in PRODUCTS.items()
        }

    exported = export.export(jax.jit(products))(jax.eval_shape(lambda: params), aval)
    for n, t in (1, 3), (6, 2):
        shape = (n, *(t if size == "t" else size for size in example))
        x = rng.integers(9, size=shape) if dtype == INT else rng.standard_normal(shape)
        x = jnp.asarray(x, dtype)
        assert tree_allclose(
            exported.call(params, x), jax.jit(products)(params, x), rtol=1e-4
        )


def test_what_needs_a_number_says_so():
    (n,) = export.symbolic_shape("n")
    x = jax.ShapeDtypeStruct((n, 4), F32)
    p = jax.ShapeDtypeStruct((4, 5), F32)

    def exported(of, **mode):
        made = pg.jacobian(lambda p, x: jnp.sum(jnp.tanh(x @ p)), **mode)
        return export.export(jax.jit(lambda p, x: of(made(p, x))))(p, x)

    with pytest.raises(
        TypeError, match=r"number of examples is symbolic.*J.shape\[0\]"
    ):
        exported(lambda J: len(J))
    with pytest.raises(
        TypeError, match=r"an index needs a batch of known size.*, n: ch"
    ):
        exported(lambda J: J[1:3].sum())
    with pytest.raises(TypeError, match=r"choose in the batch.*xs\[index\]"):
        exported(lambda J: J[1].sum())
    with pytest.raises(ValueError, match="chunk_size=2 cuts a batch of known size"):
        exported(lambda J: J.sum(), chunk_size=2)


def lowered(fun, *args):
    """Whether a program lowers for TPUs and GPUs, of which none need be there."""
    return export.export(jax.jit(fun), platforms=["tpu", "cuda"])(*args)


@pytest.mark.any_release
@pytest.mark.parametrize("name", MODELS)
def test_clipped_sums_lower_for_other_platforms(name):
    fun, params, batch = MODELS[name]()
    with jax.numpy_dtype_promotion("standard" if MODELS[name].promotes else "strict"):
        lowered(
            lambda p, *batch: pg.jacobian(fun)(p, *batch).clip(1.0).sum(),
            params,
            *batch,
        )


CALLS = {
    "jacobian": lambda f, p, *b: {
        k: of(pg.jacobian(f)(p, *b)) for k, of in PRODUCTS.items()
    },
    "recomputed": lambda f, p, *b: (
        pg.jacobian(f, recompute=True)(p, *b).clip(1.0).sum()
    ),
    "chunks": lambda f, p, *b: pg.jacobian(f, chunk_size=2)(p, *b).clip(1.0).sum(),
    "value_and_jacobian": lambda f, p, *b: pg.value_and_jacobian(f)(p, *b)[1].norms(),
    "per_example_grad": lambda f, p, *b: pg.per_example_grad(f)(p, *b),
    "per_example_value_and_grad": lambda f, p, *b: pg.per_example_value_and_grad(f)(
        p, *b
    ),
    "chain_rule_grad": lambda f, p, *b: pg.chain_rule_grad(jnp.max, f)(p, *b),
    "chain_rule_value_and_grad": lambda f, p, *b: pg.chain_rule_value_and_grad(
        jnp.max, f, chunk_size=2
    )(p, *b),
    "gauss_newton_product": lambda f, p, *b: pg.gauss_newton_product(
        lambda outputs: jnp.sum(outputs**2), f
    )(p, *b)(p),
    "fisher_product": lambda f, p, *b: pg.fisher_product(f)(p, *b)(p),
    "reassemble": lambda f, p, *b: pg.reassemble(
        jnp.sum, jnp.ones(len(b[0])), pg.per_example_grad(f)(p, *b)
    ),
    "linear_combination": lambda f, p, *b: pg.linear_combination([0.5, 2.0], [p, p]),
    "Vector": lambda f, p, *b: (2 * pg.Vector(p) - pg.Vector(p) / 3).tree,
    "Accumulator": lambda f, p, *b: pg.Accumulator.zeros_like(p).add(p, 3).mean(),
}


@pytest.mark.any_release
@pytest.mark.parametrize(
    "name",
    [
        "perceptron",
        "tied_embedding",
        "equinox",
        "scan_over_layers",
        "image_convolutions",
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_every_call_lowers_for_other_platforms(name, call):
    fun, params, batch = MODELS[name]()
    lowered(lambda p, *batch: CALLS[call](fun, p, *batch), params, *batch)


def test_a_step_is_exported_loaded_and_called():
    optimizer = optax.sgd(0.1, momentum=0.9)
    rng = np.random.default_rng(1)
    params = {
        k: jnp.asarray(rng.standard_normal(shape), F32) for k, shape in DENSE.items()
    }

    @jax.jit
    def step(params, state, x):
        J = pg.jacobian(mlp)(params, x)
        updates, state = optimizer.update(J.clip(0.5).mean(), state, params)
        return optax.apply_updates(params, updates), state

    (n,) = export.symbolic_shape("n")
    state = optimizer.init(params)
    avals = jax.eval_shape(lambda: (params, state))
    flat, treedef = jax.tree.flatten(avals)

    def flat_step(leaves, x):
        return jax.tree.leaves(step(*jax.tree.unflatten(treedef, leaves), x))

    made = export.export(jax.jit(flat_step))(flat, jax.ShapeDtypeStruct((n, 4), F32))
    loaded = export.deserialize(bytearray(made.serialize()))
    x = jnp.asarray(rng.standard_normal((7, 4)), F32)
    got = jax.tree.unflatten(treedef, loaded.call(jax.tree.leaves((params, state)), x))
    assert tree_allclose(got, step(params, state, x), rtol=1e-4)
