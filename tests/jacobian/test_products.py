"""Every product of every model in every mode, against plain `jax.vmap(jax.grad(f))`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import MODELS, N
from routes import (
    factors_kept,
    few_at_once,
    is_dense,
    is_matrix,
    leaves_of,
    with_thresholds,
)
from rows import CORE, PRODUCTS, Given, Rows, assert_close, expected, products

from pytree_grads import jacobian
from pytree_grads._engine.products.routes import gram_prefers_rows

DOUBLE, SINGLE = 1e-12, 1e-5
# JAX's own attention rounds to float32 on the way, also in float64.
COARSE = {"attention_as_jax_has_it": 1e-6}
STREAMED = ("norms", "weighted_sum", "gram", "square_sum(c)", "clip each")
WEIGHED = ("norms", "gram", "clip each")
RECOMPUTED = ("norms", "sum", "clip", "J @ v")


@pytest.fixture
def factored():
    with factors_kept():
        yield


def promotion(model):
    return jax.numpy_dtype_promotion("standard" if model.promotes else "strict")


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def model(request):
    """A model, where strict promotion allows it.

    Libraries have their own ways in float64.
    """
    with promotion(request.param):
        yield request.param


@functools.cache
def built(model, dtype):
    """`(fun, params, batch)` in the default dtype, which is named only to remember
    both.
    """
    return model()


@functools.cache
def problem(model):
    """`(fun, params, batch, rows, given)` in float64."""
    fun, params, batch = built(model, "float64")
    rows = Rows.from_tree(
        jax.jit(jax.vmap(jax.grad(fun), (None, *[0] * len(batch))))(params, *batch)
    )
    return fun, params, batch, rows, Given.draw(rows, params)


def compare(model, names, **mode):
    fun, params, batch, rows, given = problem(model)

    @jax.jit
    def of_all(params, given, *batch):
        return products(jacobian(fun, **mode)(params, *batch), given, names)

    got, want = of_all(params, given, *batch), expected(rows, given, names)
    for name in names:
        assert_close(got[name], want[name], COARSE.get(model.name, DOUBLE))


def test_all_products(model, factored, x64):
    """On most models those that the others are made of, with their parts."""
    compare(model, tuple(PRODUCTS) if model.name in LOOPED else ("to_rows", *CORE))


SCANNED = tuple(name for name in MODELS if "scan" in name or "recur" in name)
LOOPED = (
    "scan_over_layers",
    "tied_embedding",
    "embeddings",
    "einsums_with_blocks",
    "slices_of_a_weight",
    "complex_parameters",
    "the_same_for_every_example",
)


CHUNKED = dict.fromkeys(
    [
        *SCANNED,
        *LOOPED,
        *(name for name in MODELS if "conv" in name),
        "perceptron",
        "haiku",
    ]
)


@pytest.mark.any_release
@pytest.mark.parametrize("name", CHUNKED)
def test_products_of_chunks(name, factored, x64):
    with promotion(MODELS[name]):
        # N = 5: the last chunk is short.
        compare(MODELS[name], STREAMED if name in LOOPED else WEIGHED, chunk_size=2)


@pytest.mark.any_release
@pytest.mark.parametrize("name", [*SCANNED, "perceptron", "tied_embedding", "equinox"])
def test_products_of_recomputed_rows(name, factored, x64):
    with promotion(MODELS[name]):
        compare(MODELS[name], RECOMPUTED, recompute=True)


@pytest.mark.any_release
@pytest.mark.parametrize("name", LOOPED)
def test_all_products_in_blocks_of_rows(name, factored, x64):
    """Where rows are materialised, few are at a time: here no more than two or
    three.
    """
    with few_at_once(60):
        compare(MODELS[name], tuple(PRODUCTS))


@pytest.fixture
def all_is_large():
    """What is done for large sizes alone is done for all."""
    with with_thresholds(large_product=1, large_narrow=1):
        yield


@pytest.mark.any_release
@pytest.mark.parametrize("name", [*LOOPED, "scan_over_layers_with_tables", "ensemble"])
def test_all_products_by_the_ways_of_large_models(name, factored, all_is_large, x64):
    compare(MODELS[name], tuple(PRODUCTS))


def test_all_products_of_rows_that_are_made_in_loops(all_is_large, x64):
    """The route that the shapes ask for: kernels smaller than what they are made
    from.
    """
    compare(MODELS["convolutions_in_scans"], tuple(PRODUCTS))


@pytest.mark.any_release
def test_single_precision(model):
    """The route that the shapes ask for errs no more than plain gradients in float32
    do.
    """
    fun, params, batch = built(model, "float32")
    with jax.enable_x64(True):
        _, _, _, rows, given = problem(model)
        want = expected(rows, given, SINGLES)
        given = jax.tree.map(_narrow, given)

    @jax.jit
    def of_all(params, given, *batch):
        rows = jax.vmap(jax.grad(fun), (None, *[0] * len(batch)))(params, *batch)
        return products(jacobian(fun)(params, *batch), given, SINGLES), rows

    got, plain = of_all(params, given, *batch)
    pairs = zip(jax.tree.leaves(plain), rows.leaves, strict=True)
    plain = Rows([np.asarray(x, y.dtype) for x, y in pairs], rows.treedef)
    errors = jax.tree.map(_distance, expected(plain, given, SINGLES), want)
    for name in SINGLES:
        assert_close(got[name], want[name], SINGLE, also=errors[name])


SINGLES = ("to_rows", "norms", "weighted_sum", "gram", "square_sum(c)", "clip")


def _distance(x, y):
    return 4 * np.max(np.abs(x - y), initial=0.0)


def _narrow(x):
    return np.asarray(x, np.complex64 if np.iscomplexobj(x) else np.float32)


def test_no_leaf_loses_its_factors(model, factored, x64):
    fun, params, batch = built(model, "float64")
    leaves = leaves_of(jax.eval_shape(jacobian(fun), params, *batch))
    paths = [
        jax.tree_util.keystr(path) for path, _ in jax.tree.leaves_with_path(params)
    ]
    pairs = zip(paths, leaves, strict=True)
    assert {path for path, x in pairs if is_matrix(x) and is_dense(x)} <= model.dense


def test_the_table_is_about_batches():
    assert all(len(jax.tree.leaves(m()[2])[0]) == N for m in MODELS.values())


def test_a_gramian_counts_the_work_of_one_row():
    """However many rows there are: two lines of three numbers are compared dearer than
    added up.
    """

    def f(p, tokens):
        return jnp.sum(jnp.sin(p[tokens]) * jnp.arange(6.0).reshape(2, 3))

    tokens = jnp.zeros((64, 2), int).at[:, 1].set(jnp.arange(64) % 4)
    for few in (tokens[:8], tokens):
        (leaf,) = jacobian(f)(jnp.ones((4, 3)), few)._rows.matrix.leaves
        assert gram_prefers_rows(leaf, leaf)
