"""Every step of a tail: the smallest function that needs it, against plain rows.

A new step is one function in ``pytree_grads/_engine/tails`` and one row here.
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from routes import factors_kept, leaves_of, matrix_of, with_thresholds

from pytree_grads import jacobian
from pytree_grads._engine.tails.folding import RULES
from pytree_grads._engine.tails.through import Through

N = 5
D, K = 48, 40  # so large that inner products cost less than rows
MASK = np.arange(D * K).reshape(D, K) % 3 != 1
ORDER = np.random.default_rng(0).permutation(D)
MATRIX = np.sin(np.arange(D * D)).reshape(D, D) / D
LOWER = np.tril(np.ones((D, D))) + np.eye(D)


def mask(w):
    return w * MASK.astype(w.dtype)


@dataclass(frozen=True)
class Row:
    """A weight that is a function of a parameter, and whether its tail folds."""

    name: str  # of the primitive in the tail
    weight: Callable[[jax.Array], jax.Array]  # of (D, K), to (D, K)
    folds: bool = True
    shape: tuple[int, ...] = (D, K)


def solved(w):
    return lax.linalg.triangular_solve(LOWER.astype(w.dtype), w, left_side=True)


def convolved(w):
    kernel = jnp.arange(3.0, dtype=w.dtype).reshape(3, 1, 1)
    return lax.conv_general_dilated(
        w.T[:, :, None], kernel, (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    )[:, :, 0].T


def scanned(w):
    """A weight made line by line."""
    return lax.scan(lambda _, line: (None, line * jnp.cos(line[::-1])), None, w)[1]


ROWS = [
    Row("mul", mask),
    Row("mul", lambda w: w * jnp.sin(w[:, :1])),
    Row("mul", lambda w: w * jnp.sin(w[:1])),
    Row("mul", lambda w: w * jnp.sin(w[0, 0])),
    Row("div", lambda w: w / jnp.asarray(MASK + 1.5, w.dtype)),
    Row("select_n", lambda w: jnp.where(MASK, w, jnp.zeros((), w.dtype))),
    # Two pieces, each with zeros of its own.
    Row("select_n", lambda w: jnp.where(MASK, w, 2 * w)),
    Row("dot_general", lambda w: MATRIX.astype(w.dtype) @ w),
    Row("dot_general", lambda w: w @ MATRIX[:K, :K].astype(w.dtype)),
    Row("dot_general", lambda w: w[:, :2] @ w[:2]),
    Row("dot_general", lambda w: w / (w[0] @ mask(w)[0])),
    Row("reduce_sum", lambda w: w / jnp.sum(w**2 + 1, axis=0, keepdims=True)),
    Row("reduce_sum", lambda w: w / jnp.sum(w**2 + 1, axis=1, keepdims=True)),
    Row("reduce_sum", lambda w: w / jnp.sum(w**2 + 1)),
    Row("broadcast_in_dim", lambda w: mask(jnp.broadcast_to(w[:1], (D, K)))),
    Row("gather", lambda w: mask(w)[ORDER]),
    Row("scatter-add", lambda w: w[ORDER]),
    Row("scatter-add", lambda w: w[np.arange(D) // 2]),
    Row("scatter-add", lambda w: w[:, np.arange(K) // 3 + 2]),
    Row("cumsum", lambda w: jnp.cumsum(w, axis=0)),
    Row("rev", lambda w: mask(w)[::-1]),
    Row("pad", lambda w: jnp.pad(mask(w)[1:], ((1, 0), (0, 0)))),
    Row("concatenate", lambda w: jnp.concatenate([mask(w)[2:], w[:2]])),
    Row("slice", lambda w: mask(jnp.pad(w, ((1, 0), (0, 0)))[:-1])),
    Row("transpose", lambda w: mask(w.T), shape=(K, D)),
    Row("reshape", lambda w: mask(w.reshape(D, K)), shape=(D * K,)),
    Row("squeeze", lambda w: mask(w[0]), shape=(1, D, K)),
    Row("neg", lambda w: -mask(w)),
    Row("add_any", lambda w: mask(w) + w * jnp.cos(w)),
    Row("sub", lambda w: mask(w) - w * jnp.cos(w)),
    Row("copy", lambda w: mask(jnp.copy(w))),
    Row("name", lambda w: mask(checkpoint_name(w, "w"))),
    Row(
        "convert_element_type",
        lambda w: mask(w.astype(jnp.float32).astype(w.dtype)),
    ),
    Row("triangular_solve", solved, folds=False),
    Row(
        "custom_linear_solve",
        lambda w: jnp.linalg.solve(LOWER.astype(w.dtype).T + 1, w),
        folds=False,
    ),
    Row("conv_general_dilated", convolved, folds=False),
    Row("cumsum", lambda w: jnp.cumsum(mask(w), axis=0)),
    Row("optimization_barrier", lambda w: jax.checkpoint(mask)(w)),
    Row("scan", scanned, folds=False),
    Row("dynamic_slice", lambda w: mask(lax.dynamic_slice(w, (0, 0), (D, K)))),
    Row("split", lambda w: mask(jnp.concatenate([w[2:], w[:2]]))),
    Row(
        "dynamic_update_slice",
        lambda w: lax.dynamic_update_slice(mask(w), w[:1] * 2, (1, 0)),
        folds=False,
    ),
]


def loss(row, positions=None):
    def fun(w, x):
        return jnp.sum(jnp.sin(x @ row.weight(w)))

    x = np.random.default_rng(1)
    w = jnp.asarray(x.normal(size=row.shape))
    shape = (N, D) if positions is None else (N, positions, D)
    return fun, w, jnp.asarray(x.normal(size=shape)) / 4


def products(J, v, c):
    gram = J.gram()
    squares = J.square_sum(c)
    return J.to_rows(), J.norms(), gram, J @ v, J.weighted_sum(c), squares


MODES = {"kept": {}, "recomputed": {"recompute": True}, "chunks": {"chunk_size": 2}}


@pytest.mark.any_release
@pytest.mark.parametrize(
    ("mode", "positions"),
    [("kept", None), ("kept", 2), ("recomputed", 2), ("chunks", None)],
)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_products_are_those_of_rows(row, mode, positions, x64):
    fun, w, x = loss(row, positions)
    v, c = jnp.cos(jnp.arange(w.size)).reshape(w.shape), jnp.linspace(-1, 2, N)
    with factors_kept():
        J = jacobian(fun, **MODES[mode])(w, x)
        got = products(J, v, c)
    rows = jax.vmap(jax.grad(fun), (None, 0))(w, x)
    flat = rows.reshape(N, -1)
    want = (
        rows,
        jnp.linalg.norm(flat, axis=1),
        flat @ flat.T,
        flat @ v.ravel(),
        jnp.tensordot(c, rows, 1),
        jnp.tensordot(c, rows**2, 1),
    )
    rounds = row.name == "convert_element_type"
    assert tree_allclose(got, want, 1e-5 if rounds else 1e-10)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_is_materialised(row, x64):
    """The sources of the tail are factors, and the tail folds if it can."""
    fun, w, x = loss(row)
    with factors_kept():
        J = jacobian(fun)(w, x)
    (leaf,) = leaves_of(J)
    sources = matrix_of(J).sources
    assert not any(s.term.is_dense for leaf in sources for s in leaf.summands)
    is_through = any(isinstance(s.term, Through) for s in leaf.summands)
    assert is_through != row.folds


def masked_loss(w, x):
    return jnp.sum(jnp.sin(x @ mask(w)))


def solved_loss(w, x):
    return jnp.sum(jnp.sin(x @ solved(w)))


@pytest.mark.parametrize("fun", [masked_loss, solved_loss])
def test_rows_are_pickled_without_their_tail(fun, x64):
    _, w, x = loss(ROWS[0])
    J = jacobian(fun)(w, x)
    other = pickle.loads(pickle.dumps(J))
    assert tree_allclose(other.norms(), J.norms())
    assert tree_allclose(other.clip(0.5).sum(), J.clip(0.5).sum())


def test_equal_calls_have_equal_treedefs(x64):
    """So a product that is compiled for one is used for the other."""
    fun, w, x = loss(ROWS[0])
    one, other = (jax.tree.structure(jacobian(fun)(w, x + i)) for i in range(2))
    assert one == other
    assert hash(one) == hash(other)


def test_every_step_that_folds_has_a_row():
    names = {getattr(x, "name", "optimization_barrier") for x in RULES}
    names = {name.replace("add", "add_any", name == "add") for name in names}
    assert names <= {row.name for row in ROWS} | {"add_any_any", "add_any"}


def test_look_ups_that_are_sorted(x64):
    """Many look-ups of a large table are merged after they are sorted."""

    def fun(table, tokens):
        return jnp.sum(jnp.sin(table[tokens] * jnp.arange(1.0, 8.0)[:, None]))

    table = jnp.sin(jnp.arange(200.0)).reshape(100, 2)
    tokens = jax.random.randint(jax.random.key(0), (N, 7), 0, 4)
    rows = jax.vmap(jax.grad(fun), (None, 0))(table, tokens)
    with with_thresholds(compared=2, pairs=1 << 20):
        J = jacobian(fun)(table, tokens)
        norms, squares = J.norms(), J.square_sum()
    assert tree_allclose(norms, jnp.linalg.norm(rows.reshape(N, -1), axis=1))
    assert tree_allclose(squares, jnp.sum(rows**2, 0))


def products_as_arrays(J):
    return J.norms(), J.gram(), J.to_rows(), J.sum(), J.clip(1.0).sum()


def exact(fun, p, x):
    """The same products from plain rows."""
    rows = jax.vmap(jax.grad(fun), (None, 0))(p, x)
    flat = jnp.concatenate([r.reshape(len(x), -1) for r in jax.tree.leaves(rows)], 1)
    norms = jnp.linalg.norm(flat, axis=1)
    scale = jnp.minimum(1, 1 / norms)

    def weighted(c):
        return jax.tree.map(lambda r: jnp.tensordot(c, r, 1), rows)

    return norms, flat @ flat.T, rows, weighted(jnp.ones(len(x))), weighted(scale)


def test_a_nan_behind_a_mask_stays_behind_it(x64):
    """Zero times NaN is NaN, and what `where` selects is not."""
    kept = jnp.ones((D, K), bool).at[0].set(False)  # the first input is not used

    def fun(w, x):
        y = x @ jnp.where(kept, w, 0.0)
        return jnp.sum(jnp.sin(jnp.where(jnp.isfinite(y), y, 0.0)))

    w, x = jnp.cos(jnp.arange(D * K)).reshape(D, K), jnp.sin(jnp.arange(3 * D))
    x = x.reshape(3, D).at[0, 0].set(jnp.nan)
    with factors_kept():
        got = products_as_arrays(jacobian(fun)(w, x))
    want = exact(fun, w, x)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("gain", ["heads", "blocks", "lines"])
def test_gains_of_parts_of_a_weight(gain, x64):
    """A gain for each head, for each block of the columns, and for each line."""
    shape, x_shape = {
        "heads": ((4, 5, 3), (4, 5)),
        "blocks": ((5, 12), (5,)),
        "lines": ((5, 12), (5,)),
    }[gain]
    gains = {"heads": (4, 1, 3), "blocks": (1, 4, 1), "lines": (5, 1)}[gain]

    def weight(p):
        if gain == "blocks":
            return (p["w"].reshape(5, 4, 3) * p["g"]).reshape(5, 12)
        return p["w"] * p["g"]

    def fun(p, x):
        how = "hi,hio->ho" if gain == "heads" else "i,io->o"
        return jnp.sum(jnp.sin(jnp.einsum(how, x, weight(p))))

    def draw(*sizes):
        return jnp.cos(jnp.arange(np.prod(sizes), dtype=float)).reshape(sizes)

    p, x = {"w": draw(*shape), "g": draw(*gains)}, draw(3, *x_shape)
    with factors_kept():
        got = products_as_arrays(jacobian(fun)(p, x))
    assert tree_allclose(got, exact(fun, p, x), 1e-10)


@pytest.mark.parametrize("fun", [masked_loss, solved_loss])
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_an_empty_batch(fun, mode, x64):
    _, w, x = loss(ROWS[0])
    with factors_kept():
        norms, gram, rows, total, clipped = products_as_arrays(
            jacobian(fun, **mode)(w, x[:0])
        )
    assert (norms.shape, gram.shape, rows.shape) == ((0,), (0, 0), (0, D, K))
    assert tree_allclose((total, clipped), (jnp.zeros((D, K)),) * 2)


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_no_tracer_is_left_behind(mode, x64):
    _, w, x = loss(ROWS[0])
    with jax.checking_leaks():
        jax.jit(lambda w, x: jacobian(masked_loss, **mode)(w, x).norms())(w, x)


def test_examples_over_explicit_axes(x64):
    _, w, x = loss(ROWS[0])
    mesh = jax.make_mesh((N,), ("d",), axis_types=(jax.sharding.AxisType.Explicit,))
    want = exact(masked_loss, w, x)
    with jax.set_mesh(mesh), factors_kept():
        over = jax.device_put(x, jax.P("d"))
        J = jax.jit(jacobian(masked_loss))(w, over)
        got = jax.device_get((J.norms(), J.sum(), J.clip(1.0).sum()))
    assert tree_allclose(got, (want[0], want[3], want[4]), 1e-10)


@pytest.mark.parametrize("scheme", ["rounded", "learned step", "clipped"])
def test_quantised_weights(scheme, x64):
    """Rounding passes gradients straight through; a learned step has a gradient."""

    def rounded(w):
        return w + lax.stop_gradient(jnp.round(w) - w)

    def weight(p):
        if scheme == "rounded":
            return rounded(p["w"] * 8) / 8
        w = p["w"] / p["step"]
        return rounded(jnp.clip(w, -3, 3) if scheme == "clipped" else w) * p["step"]

    def fun(p, x):
        return jnp.sum(jnp.sin(x @ weight(p)))

    p = {"w": jnp.cos(jnp.arange(float(D * K))).reshape(D, K), "step": jnp.array(0.2)}
    x = jnp.sin(jnp.arange(4.0 * D)).reshape(4, D)
    with factors_kept():
        J = jacobian(fun)(p, x)
        got = products_as_arrays(J)
    assert tree_allclose(got, exact(fun, p, x), 1e-10)
    terms = [s.term for leaf in leaves_of(J) for s in leaf.summands]
    assert not any(isinstance(x, Through) for x in terms)
    assert len(terms) <= 2  # both gradients of a step are one number


def adapters_in_a_scan(p, x):
    """A merged adapter for each layer."""

    def layer(h, own):
        return jnp.tanh(h @ (own["w"] + own["u"] @ own["v"])), None

    return jnp.sum(lax.scan(layer, x, p)[0] ** 2)


def a_matrix_for_each_head(p, x):
    """Two axes of blocks, and both sides of a weight."""
    weights = jnp.einsum("hgij,hgjk->hgik", p["u"], p["w"])
    weights = jnp.einsum("hgik,hgkl->hgil", weights, p["v"])
    return jnp.sum(jnp.sin(jnp.einsum("...i,hgij->...hgj", x, weights)) ** 2)


def heads_in_another_order(p, x):
    """Blocks whose axes are not in the order of the matrices."""
    weights = jnp.einsum("hgij,ghjk->ghik", p["u"], p["w"])
    return jnp.sum(jnp.sin(jnp.einsum("...i,ghij->...hgj", x, weights)) ** 2)


def blocks(*shape):
    def draw(seed, *own):
        numbers = np.random.default_rng(seed).normal(size=own)
        return jnp.asarray(numbers) / own[-1] ** 0.5

    return {
        "u": draw(0, *shape, 24, 3),
        "v": draw(1, *shape, 3, 24),
        "w": draw(2, *shape, 24, 24),
    }


def heads(h, g):
    p = blocks(h, g)
    u, v = (jnp.concatenate([p[k]] * 8, -1 if k == "u" else -2) for k in "uv")
    return {"u": u, "w": p["w"], "v": v}


@pytest.mark.any_release
@pytest.mark.parametrize("positions", [None, 3])
@pytest.mark.parametrize(
    ("fun", "p"),
    [
        (adapters_in_a_scan, lambda: blocks(4)),
        (a_matrix_for_each_head, lambda: heads(2, 3)),
        (heads_in_another_order, lambda: {**heads(2, 3), "w": blocks(3, 2)["w"]}),
    ],
)
def test_a_matrix_for_each_block(fun, p, positions, x64):
    p = {k: x for k, x in p().items() if fun is not heads_in_another_order or k != "v"}
    shape = (N, 24) if positions is None else (N, positions, 24)
    x = jnp.asarray(np.random.default_rng(3).normal(size=shape))

    @jax.jit
    def found(p, x):
        J = jacobian(fun)(p, x)
        return products_as_arrays(J), J @ jax.tree.map(jnp.cos, p)

    products, applied = found(p, x)
    assert tree_allclose(products, exact(fun, p, x), 1e-10)
    rows = jax.vmap(jax.grad(fun), (None, 0))(p, x)
    images = [
        jnp.tensordot(r, jnp.cos(w), w.ndim)
        for r, w in zip(*map(jax.tree.leaves, (rows, p)), strict=True)
    ]
    assert tree_allclose(applied, sum(images), 1e-10)


def test_adapters_in_a_scan_fold(x64):
    x = jnp.ones((N, 24))
    for leaf in leaves_of(jacobian(adapters_in_a_scan)(blocks(4), x)):
        assert not any(isinstance(s.term, Through) for s in leaf.summands)
