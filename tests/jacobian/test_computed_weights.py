"""Weights that are computed from parameters: what clipped sums and sums take.

The limits are those of operations and of temporary memory, against the gradient of the
whole batch.
"""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree_grads import jacobian
from pytree_grads._jax.compat import all_equations

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
import _computed as models
from _flops import count
from _layers import Draw

pytestmark = pytest.mark.any_release

MIB = 2**20
FLOOR = 2 * MIB  # the memory of smaller programs is not compared
TILE = 16 * MIB  # what rows may take that are built some at a time

# The most operations of norms and clipped sum, over those of the gradient.
CLOSED, COUPLED, TILED = 1.65, 2.1, 2.1
CASES = {
    "mask": (models.mask, (256, 64), CLOSED),
    "learned_scale": (models.learned_scale, (256, 64), CLOSED),
    "weight_norm": (models.weight_norm, (256, 64), COUPLED),
    "spectral_norm": (models.spectral_norm, (256, 64), COUPLED),
    "merged_adapters": (models.merged_adapters, (256, 64), CLOSED),
    "permuted": (models.permuted, (256, 64), CLOSED),
    "softplus": (models.softplus, (256, 64), CLOSED),
    "weight_decay": (models.weight_decay, (256, 64), CLOSED),
    "flow": (models.flow, (256, 128), CLOSED),
    "vmapped_embedding": (models.vmapped_embedding, (64, 32), CLOSED),
    "hash_grid": (models.hash_grid, (64, 64), CLOSED),
    "learned_step": (models.learned_step, (256, 64), COUPLED),
    "masked_sequence": (models.masked_sequence, (256, 64), TILED),
}


def loss(model):
    return lambda p, *batch: jnp.sum(
        jax.vmap(model.fun, (None, *(0 for _ in batch)))(p, *batch)
    )


def clipped(model):
    def both(p, *batch):
        J = jacobian(model.fun)(p, *batch)
        return J.clip(1.0).sum(), J.norms()

    return both


def summed(model):
    return lambda p, *batch: jacobian(model.fun)(p, *batch).sum()


def cost(fun, *args):
    """Operations of products, and bytes of temporary memory."""
    memory = jax.jit(fun).lower(*args).compile().memory_analysis()
    return count(jax.make_jaxpr(fun)(*args).jaxpr), memory.temp_size_in_bytes


def built(name):
    build, shape, most = CASES[name]
    return build(Draw(name), *shape), most


@pytest.mark.parametrize("name", CASES)
def test_clipped_sums_and_norms(name):
    model, most = built(name)
    plain, memory = cost(jax.grad(loss(model)), *model.args)
    operations, own = cost(clipped(model), *model.args)
    assert operations <= most * plain
    tile = TILE if most is TILED else 0
    assert own <= 1.5 * max(memory, FLOOR) + tile


@pytest.mark.parametrize("name", [*CASES, "chunked_vocabulary", "kalman_filter"])
def test_sums_alone_take_one_gradient(name):
    shape = CASES[name][1] if name in CASES else (16, 8)
    model = getattr(models, name)(Draw(name), *shape)
    plain, memory = cost(jax.grad(loss(model)), *model.args)
    operations, own = cost(summed(model), *model.args)
    assert operations <= 1.05 * plain
    assert own <= 1.05 * max(memory, FLOOR)


@pytest.mark.parametrize("name", ["spectral_norm", "masked_sequence"])
def test_sums_of_jacobians_and_sums_in_a_metric_build_no_rows(name):
    """The sum of two, of which one has weights and one a diagonal of its shape."""
    n = 64
    model = getattr(models, name)(Draw(name), n, 16)
    p, *batch = model.args

    def total(p, d, *batch):
        J = jacobian(model.fun)(p, *batch)
        return (J.scale(jnp.arange(1.0 * len(J))) + J.scale_params(d)).sum()

    axes = (None, *(0 for _ in batch))
    rows = jax.vmap(jax.grad(model.fun), axes)(p, *batch)
    d = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), p)
    s = jnp.arange(1.0 * len(batch[0]))
    want = jax.tree.map(lambda x, d: jnp.tensordot(s, x, 1) + x.sum(0) * d, rows, d)
    args = (p, d, *batch)
    for x, y in zip(*map(jax.tree.leaves, (total(*args), want)), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-3, atol=1e-4 * jnp.max(jnp.abs(y)))
    largest = max(
        v.aval.size
        for equation in all_equations(jax.make_jaxpr(total)(*args))
        for v in equation.outvars
    )
    assert largest < max(x.size for x in jax.tree.leaves(rows)) / 2


@pytest.mark.parametrize("name", [*CASES, "kalman_filter", "chunked_vocabulary"])
def test_products_are_those_of_rows(name, x64):
    small = getattr(models, name)(Draw(name), 8, 5)
    args = jax.tree.map(
        lambda x: x.astype(float) if x.dtype == np.float32 else x, small.args
    )
    axes = small.in_axes
    rows = jax.vmap(jax.grad(small.fun), axes)(*args)
    flat = np.concatenate([x.reshape(5, -1) for x in jax.tree.leaves(rows)], 1)
    J = jax.jit(jacobian(small.fun, in_axes=axes))(*args)
    v = jax.tree.map(lambda x: jnp.cos(jnp.arange(x.size)).reshape(x.shape), args[0])
    w = np.concatenate([np.ravel(x) for x in jax.tree.leaves(v)])

    def raveled(tree):
        return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])

    c = np.linspace(-1.0, 2.0, 5)
    lengths = np.linalg.norm(flat, axis=1)
    size = np.max(lengths)
    pairs = {
        "norms": (J.norms(), lengths),
        "gram": (J.gram(), flat @ flat.T),
        "J @ v": (J @ v, flat @ w),
        "weighted": (raveled(J.weighted_sum(jnp.asarray(c))), c @ flat),
        "squares": (raveled(J.square_sum()), np.sum(flat**2, 0)),
        "rows": (raveled(J.to_rows()), raveled(rows)),
        "clipped": (
            raveled(J.clip(float(np.median(lengths))).sum()),
            np.minimum(1, np.median(lengths) / lengths) @ flat,
        ),
    }
    for product, (got, want) in pairs.items():
        np.testing.assert_allclose(
            got, want, rtol=1e-9, atol=1e-11 * max(size, size**2), err_msg=product
        )
