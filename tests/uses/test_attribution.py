"""Attributions equal brute force in float64: retraining, steps, matrices in full."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from sklearn.datasets import load_digits, load_iris

from pytree_grads import attribution, fisher_product, gauss_newton_product, jacobian

pytestmark = pytest.mark.any_release

L2 = 1e-2


def entropy(logits, label):
    return jax.nn.logsumexp(logits) - jnp.sum(logits * label)


def logits(w, x):
    return x @ w


def bare(w, x, label):
    return entropy(logits(w, x), label)


def penalised(w, x, label):
    return bare(w, x, label) + L2 / 2 * jnp.sum(w**2)


def classes(images, labels):
    """Images with a column of ones, and one-hot labels."""
    images = np.concatenate([images, np.ones((len(images), 1))], axis=1)
    return jnp.asarray(images), jax.nn.one_hot(jnp.asarray(labels), labels.max() + 1)


def newton(loss, w, xs, labels, steps=30):
    """A minimum of the mean loss, and the Hessian there."""

    def objective(v):
        return jax.vmap(loss, (None, 0, 0))(v.reshape(w.shape), xs, labels).mean()

    gradient, hessian = jax.jit(jax.grad(objective)), jax.jit(jax.hessian(objective))
    v = w.ravel()
    for _ in range(steps):
        g = gradient(v)
        if jnp.linalg.norm(g) < 1e-10:
            break
        v = v - jnp.linalg.lstsq(hessian(v), g)[0]
    assert jnp.linalg.norm(gradient(v)) < 1e-8
    return v.reshape(w.shape), hessian(v)


def curvature(w, xs, labels):
    def outer(z):
        return jax.vmap(entropy)(z, labels).mean()

    return gauss_newton_product(outer, logits)(w, xs)


# ---------------------------------------------------------------------------- influence


def without_each(w, hessian, xs, labels):
    """The minima without each example, (N, *w), by steps with the Hessian of all."""
    count = len(xs)
    inverse = jnp.linalg.inv(hessian)

    @jax.jit
    def step(ws, left_out):
        z = jnp.einsum("ni,bic->bnc", xs, ws)
        slopes = jax.nn.softmax(z) - labels[None]
        slopes = slopes.at[jnp.arange(len(left_out)), left_out].set(0)
        grads = jnp.einsum("ni,bnc->bic", xs, slopes) / (count - 1) + L2 * ws
        flat = grads.reshape(len(ws), -1)
        moved = ws - (flat @ inverse).reshape(ws.shape)
        return moved, jnp.linalg.norm(flat, axis=1).max()

    found = []
    for start in range(0, count, 100):
        left_out = jnp.arange(start, min(start + 100, count))
        ws, size = jnp.broadcast_to(w, (len(left_out), *w.shape)), 1.0
        while size > 1e-8:
            ws, size = step(ws, left_out)
        found.append(ws)
    return jnp.concatenate(found)


def test_influence_is_leaving_one_out(x64):
    """On all 1,797 digits: correlation with 1,797 models retrained, per query."""
    images, targets = load_digits(return_X_y=True)
    xs, labels = classes(images / 16, targets)
    # The Hessian by hand is much faster than `jax.hessian` of the mean.
    w, hessian = _softmax_newton(xs, labels)
    queries = slice(0, 200)
    J_query = jacobian(bare)(w, xs[queries], labels[queries])
    J_train = jacobian(penalised)(w, xs, labels)
    product = curvature(w, xs, labels)
    scores = attribution.influence(
        J_query, J_train, product, damping=L2, tolerance=1e-11
    )

    rows = [J.to_rows().reshape(len(J), -1) for J in (J_query, J_train)]
    exact = rows[0] @ jnp.linalg.solve(hessian, rows[1].T) / len(xs)
    np.testing.assert_allclose(scores, exact, rtol=1e-7, atol=1e-12)

    losses = jax.jit(lambda w: jax.vmap(bare, (None, 0, 0))(w, xs[:200], labels[:200]))
    retrained = jax.lax.map(
        losses, without_each(w, hessian, xs, labels), batch_size=100
    )
    correlations = attribution.leave_one_out_correlation(scores, retrained, losses(w))
    assert correlations.shape == (200,)
    assert correlations.min() > 0.999
    # The scores are the changes, not only in proportion to them. An example that goes
    # takes its curvature along, which makes the change a little larger.
    changes = (retrained - losses(w)[None]).T
    slope = jnp.sum(scores * changes) / jnp.sum(scores**2)
    assert 1 <= slope < 1.1


def _softmax_newton(xs, labels):
    count, width = xs.shape
    classes_ = labels.shape[1]
    w = jnp.zeros((width, classes_))
    for _ in range(20):
        p = jax.nn.softmax(xs @ w)
        gradient = xs.T @ (p - labels) / count + L2 * w
        spread = (
            jnp.einsum("nc,cd->ncd", p, jnp.eye(classes_)) - p[:, :, None] * p[:, None]
        )
        hessian = jnp.einsum("ni,ncd,nj->icjd", xs, spread, xs, optimize=True) / count
        hessian = hessian.reshape(w.size, w.size) + L2 * jnp.eye(w.size)
        if jnp.linalg.norm(gradient) < 1e-12:
            break
        w = w - jnp.linalg.solve(hessian, gradient.ravel()).reshape(w.shape)
    assert jnp.linalg.norm(gradient) < 1e-8
    return w, hessian


@pytest.fixture
def irises(x64):
    """Sepals of two kinds of iris, which overlap: the minimum without a penalty."""
    measured, kinds = load_iris(return_X_y=True)
    xs, labels = classes(stats.zscore(measured[50:, :2]), kinds[50:] - 1)
    w, hessian = newton(bare, jnp.zeros((3, 2)), xs, labels)
    return w, hessian, xs, labels


def test_influences_add_up_to_zero(irises):
    """At a minimum without a penalty, where the matrix is singular."""
    w, _, xs, labels = irises
    J = jacobian(bare)(w, xs, labels)
    product = curvature(w, xs, labels)
    scores = attribution.influence(J, J, product, damping=0.0)
    assert jnp.abs(scores).sum(axis=1).min() > 1e-3
    np.testing.assert_allclose(scores.sum(axis=1), 0, atol=1e-9)
    np.testing.assert_allclose(scores, scores.T, atol=1e-6)
    assert (jnp.diagonal(scores) > 0).all()


def test_influence_on_any_tree_is_the_solved_system(x64):
    """With the Fisher matrix, in batches, inside jit."""
    params = {
        "a": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3),
        "b": jnp.array([0.3, -0.2]),
    }
    xs = jax.random.normal(jax.random.key(0), (20, 2))

    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ p["a"]) ** 2) + jnp.cos(p["b"] @ x)

    J = jacobian(fun)(params, xs)
    G = np.concatenate([x.reshape(20, -1) for x in jax.tree.leaves(J.to_rows())], 1)
    exact = G @ np.linalg.solve(G.T @ G / 20 + 0.1 * np.eye(8), G.T) / 20

    def scores(params, damping, **options):
        J = jacobian(fun)(params, xs)
        product = fisher_product(fun)(params, xs)
        options = {"tolerance": 1e-11, **options}
        return attribution.influence(J, J, product, damping=damping, **options)

    np.testing.assert_allclose(scores(params, 0.1), exact, rtol=1e-7, atol=1e-10)
    few = scores(params, 0.1, batch_size=3)
    np.testing.assert_allclose(few, exact, rtol=1e-7, atol=1e-10)
    compiled = jax.jit(scores)(params, 0.1)
    np.testing.assert_allclose(compiled, exact, rtol=1e-7, atol=1e-10)
    short = jax.jit(lambda p: scores(p, 0.1, max_steps=1))(params)
    assert jnp.isnan(short).all()


def test_complex_parameters_are_pairs_of_real_ones(x64):
    def fun(p, x):
        return jnp.sum(jnp.abs(jnp.tanh(x @ p["z"])) ** 2)

    z = jax.lax.complex(*jax.random.normal(jax.random.key(0), (2, 3, 2))) / 2
    xs = jax.random.normal(jax.random.key(1), (5, 2, 3)).astype(complex)

    def split(parts, x):
        return fun({"z": jax.lax.complex(parts["re"], parts["im"])}, x)

    found = []
    for f, p in ((fun, {"z": z}), (split, {"re": z.real, "im": z.imag})):
        J = jacobian(f)(p, xs)
        product = fisher_product(f)(p, xs)
        scores = attribution.influence(J[:2], J, product, damping=0.1, tolerance=1e-11)
        found.append((scores, attribution.tracin([(J[:2], J)], [1.0])))
    for got, want in zip(*found, strict=True):
        assert got.dtype == want.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-7)


def test_no_queries():
    J = jacobian(lambda p, x: p @ x)(jnp.zeros(3), jnp.eye(3))
    assert attribution.influence(J[:0], J, SAME, damping=1.0).shape == (0, 3)
    assert attribution.tracin([(J[:0], J)], [1.0]).shape == (0, 3)


def test_a_singular_matrix_without_damping_is_an_error():
    def fun(p, x):
        return p @ x

    J = jacobian(fun)(jnp.zeros(3), jnp.eye(3)[:2])
    outside = jacobian(fun)(jnp.zeros(3), jnp.eye(3))
    product = fisher_product(fun)(jnp.zeros(3), jnp.eye(3)[:2])
    inside = attribution.influence(J, J, product, damping=0.0)
    np.testing.assert_allclose(inside, jnp.eye(2), rtol=1e-6)
    with pytest.raises(ValueError, match=r"queries \[2\] were not solved.*damping"):
        attribution.influence(outside, J, product, damping=0.0)
    damped = attribution.influence(outside, J, product, damping=0.5)
    np.testing.assert_allclose(damped, jnp.eye(3)[:, :2] / 2, rtol=1e-6)


# ------------------------------------------------------------------------------- tracin


def test_tracin_of_a_small_step_is_the_change_of_the_loss(irises):
    _, _, xs, labels = irises
    w = jax.random.normal(jax.random.key(0), (3, 2))
    train, query = (xs[:60], labels[:60]), (xs[60:], labels[60:])
    pair = jacobian(bare)(w, *query), jacobian(bare)(w, *train)

    def losses(w):
        return jax.vmap(bare, (None, 0, 0))(w, *query)

    total = pair[1].sum()

    _, slope = jax.jvp(losses, (w,), (-total,))
    scores = attribution.tracin([pair], [1.0])
    np.testing.assert_allclose(-scores.sum(axis=1), slope, rtol=1e-10, atol=1e-10)

    def missed(size):
        scores = attribution.tracin([pair], [size])
        change = losses(w) - losses(w - size * total)
        return jnp.abs(scores.sum(axis=1) - change).max()

    ratio = missed(1e-4) / missed(1e-5)
    assert 95 < ratio < 105  # an error of the second order


def test_tracin_of_checkpoints_is_the_sum_of_gramians(x64):
    xs = jax.random.normal(jax.random.key(0), (9, 4))

    def fun(p, x):
        return jnp.tanh(p @ x)

    checkpoints = [jnp.linspace(-1.0, 1.0, 4), jnp.ones(4)]
    pairs = ((jacobian(fun)(p, xs[:2]), jacobian(fun)(p, xs[2:])) for p in checkpoints)
    got = attribution.tracin(pairs, [0.5, 0.25])
    rows = [jacobian(fun)(p, xs).to_rows() for p in checkpoints]
    want = sum(s * r[:2] @ r[2:].T for s, r in zip([0.5, 0.25], rows, strict=True))
    np.testing.assert_allclose(got, want, rtol=1e-12)


# --------------------------------------------------------------------------------- trak


def test_trak_by_hand(x64):
    keys = jax.random.split(jax.random.key(0), 3)
    phi = [jax.random.normal(k, (30, 6)) for k in keys]
    queries = [x[:4] + 0.5 for x in phi]
    residuals = [jax.random.uniform(k, (30,)) for k in keys]
    for damping in (0.0, 0.7):
        kernels = [
            q @ np.linalg.inv(x.T @ x + damping * np.eye(6)) @ x.T
            for q, x in zip(queries, phi, strict=True)
        ]
        want = np.mean(kernels, 0) * np.mean(residuals, 0)
        got = attribution.trak(queries, phi, residuals, damping=damping)
        np.testing.assert_allclose(got, want, rtol=1e-9)


def test_trak_of_a_linear_model_is_influence(x64):
    """Without a projection, and for squares, whose output has slopes y − f."""
    xs = jax.random.normal(jax.random.key(0), (40, 5))
    y = xs @ jnp.arange(5.0) + jax.random.normal(jax.random.key(1), (40,))
    w = jnp.linalg.lstsq(xs, y)[0]

    def loss(w, x, y):
        return (w @ x - y) ** 2 / 2

    J_train = jacobian(loss)(w, xs, y)
    J_query = jacobian(lambda w, x: -(w @ x))(w, xs[:3])
    product = gauss_newton_product(
        lambda z: ((z - y) ** 2).mean() / 2, lambda w, x: w @ x
    )
    want = attribution.influence(
        J_query, J_train, product(w, xs), damping=0.0, tolerance=1e-11
    )
    features = jacobian(lambda w, x: w @ x)(w, xs).to_rows()
    got = attribution.trak([features[:3]], [features], [y - xs @ w])
    np.testing.assert_allclose(got, want, rtol=1e-8, atol=1e-10)


def test_trak_without_damping_on_a_singular_matrix():
    phi = jax.random.normal(jax.random.key(0), (5, 8))
    arguments = [phi[:2]], [phi], [jnp.ones(5)]
    with pytest.raises(ValueError, match=r"singular.*damping above 0"):
        attribution.trak(*arguments)
    assert jnp.isnan(jax.jit(attribution.trak)(*arguments)).all()
    assert jnp.isfinite(attribution.trak(*arguments, damping=0.1)).all()


# ------------------------------------------------------------------------------- judges


def test_lds_is_spearmans_correlation(x64):
    rng = np.random.default_rng(0)
    scores, subsets = rng.normal(size=(3, 12)), rng.random((20, 12)) < 0.5
    losses = rng.normal(size=(20, 3)).round(1)  # with ties
    got = attribution.lds(scores, subsets, losses)
    for q in range(3):
        sums = subsets @ scores[q]
        want = stats.spearmanr(sums, -losses[:, q]).statistic
        np.testing.assert_allclose(got[q], want, rtol=1e-10)
    additive = -(subsets @ scores.T)
    np.testing.assert_allclose(attribution.lds(scores, subsets, additive), 1)
    constant = attribution.lds(scores, subsets, np.zeros((20, 3)))
    assert jnp.isnan(constant).all()


def test_leave_one_out_is_pearsons_correlation(x64):
    rng = np.random.default_rng(0)
    scores, without, losses = (rng.normal(size=s) for s in ((3, 12), (12, 3), (3,)))
    got = attribution.leave_one_out_correlation(scores, without, losses)
    want = [np.corrcoef(scores[q], without[:, q])[0, 1] for q in range(3)]
    np.testing.assert_allclose(got, want, rtol=1e-10)


# ------------------------------------------------------------------------------- errors

J = jacobian(lambda p, x: p @ x)(jnp.zeros(2), jnp.ones((3, 2)))
MANY = jacobian(lambda p, x: p * x)(jnp.zeros(2), jnp.ones((3, 2)))
EMPTY = jacobian(lambda p, x: p @ x)(jnp.zeros(2), jnp.ones((0, 2)))
PHI, ONES = jnp.ones((3, 2)), jnp.ones(3)


def SAME(v):
    return v


ERRORS = {
    "tracin of rows": (
        lambda: attribution.tracin([(J.to_rows(), J)], [1.0]),
        TypeError, r"J_query of pairs\[0\] must be a Jacobian",
    ),
    "tracin of no pair": (
        lambda: attribution.tracin([J], [1.0]), TypeError, r"\(J_query, J_train\)",
    ),
    "tracin of outputs": (
        lambda: attribution.tracin([(J, MANY)], [1.0]),
        ValueError, "returns one number",
    ),
    "tracin with too few sizes": (
        lambda: attribution.tracin([(J, J)] * 2, [1.0]), ValueError, "more pairs",
    ),
    "tracin with too many sizes": (
        lambda: attribution.tracin([(J, J)], [1.0, 2.0]), ValueError, "for 1 pairs",
    ),
    "tracin of other examples": (
        lambda: attribution.tracin([(J, J), (J[:1], J)], [1.0, 1.0]),
        ValueError, "the same examples",
    ),
    "tracin with one size for all": (
        lambda: attribution.tracin([(J, J)], 0.1), TypeError, "a number for each pair",
    ),
    "influence of a matrix": (
        lambda: attribution.influence(J, J, jnp.eye(2), damping=0.0),
        TypeError, "gauss_newton_product",
    ),
    "negative damping": (
        lambda: attribution.influence(J, J, SAME, damping=-1.0),
        ValueError, "damping must be at least 0",
    ),
    "damping of text": (
        lambda: attribution.influence(J, J, SAME, damping="0.1"),
        TypeError, "damping must be a real scalar",
    ),
    "half a step": (
        lambda: attribution.influence(J, J, SAME, damping=0.0, max_steps=0.5),
        TypeError, "max_steps must be an int",
    ),
    "influence of nothing": (
        lambda: attribution.influence(J, EMPTY, SAME, damping=0.0),
        ValueError, "at least one example",
    ),
    "trak of no model": (
        lambda: attribution.trak([], [], []), ValueError, "at least one model",
    ),
    "trak of too few": (
        lambda: attribution.trak([PHI], [PHI, PHI], [ONES]), ValueError, "models",
    ),
    "trak of other widths": (
        lambda: attribution.trak([PHI[:, :1]], [PHI], [ONES]),
        ValueError, "1 in queries, 2 in features",
    ),
    "trak of ints": (
        lambda: attribution.trak([PHI], [PHI], [jnp.arange(3)]), TypeError, "astype",
    ),
    "trak of empty sketches": (
        lambda: attribution.trak([PHI[:, :0]], [PHI[:, :0]], [ONES]),
        ValueError, "at least one number",
    ),
    "lds of indices": (
        lambda: attribution.lds(PHI.T, jnp.zeros((4, 3), int), jnp.ones((4, 2))),
        TypeError, "subsets must hold bools",
    ),
    "lds of losses the wrong way round": (
        lambda: attribution.lds(PHI.T, jnp.zeros((4, 3), bool), jnp.ones((2, 4))),
        ValueError, "4 in subsets, 2 in losses",
    ),
    "leaving out the wrong way round": (
        lambda: attribution.leave_one_out_correlation(PHI.T, PHI.T, jnp.ones(2)),
        ValueError, "training examples",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=words):
        call()
