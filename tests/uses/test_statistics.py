"""Statistics equal those of stacked rows in float64, and the numbers of the digits."""

import contextlib
import itertools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tree_allclose
from sklearn.datasets import load_digits

from pytree_grads import jacobian, per_example_grad, statistics

pytestmark = pytest.mark.any_release

PARAMS = {
    "first": {"w": jnp.linspace(-1.0, 1.0, 15).reshape(5, 3), "b": jnp.zeros(3)},
    "last": jnp.array([1.0, -2.0, 0.5]),
}
XS = jax.random.normal(jax.random.key(0), (24, 5))
YS = jnp.arange(24.0) % 2


def loss(params, x, y):
    hidden = jnp.tanh(x @ params["first"]["w"] + params["first"]["b"])
    return (hidden @ params["last"] - y) ** 2


def make(**options):
    return jacobian(loss, **options)(PARAMS, XS, YS)


def rows():
    """The rows in float64."""
    with jax.enable_x64(True):
        wide = [
            jax.tree.map(lambda x: jnp.asarray(x, float), a) for a in (PARAMS, XS, YS)
        ]
        return jax.tree.map(np.asarray, per_example_grad(loss)(*wide))


def matrix(tree):
    return np.concatenate([x.reshape(24, -1) for x in jax.tree.leaves(tree)], axis=1)


def by_hand(G):
    """Unbiased tr Σ and ‖G‖², from the covariance of rows (N, P)."""
    trace = G.var(axis=0, ddof=1).sum()
    return trace, (G.mean(axis=0) ** 2).sum() - trace / len(G)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 7}, {"recompute": True}])
def test_noise_scale_of_the_whole(options):
    trace, squared = by_hand(matrix(rows()))
    pair = jax.jit(lambda: statistics.noise_scale(make(**options)))()
    np.testing.assert_allclose(pair.trace, trace, rtol=1e-5)
    np.testing.assert_allclose(pair.squared_norm, squared, rtol=1e-5)
    np.testing.assert_allclose(pair.ratio(), trace / squared, rtol=1e-5)
    plain = statistics.noise_scale(make(), unbiased=False)
    np.testing.assert_allclose(plain.squared_norm, squared + trace / 24, rtol=1e-5)


def test_noise_scale_of_parts():
    pair = statistics.noise_scale(make(), per_leaf=True)
    for (trace, squared), got, want in zip(
        [by_hand(matrix(x)) for x in jax.tree.leaves(rows())],
        jax.tree.leaves(pair.trace),
        jax.tree.leaves(pair.squared_norm),
        strict=True,
    ):
        np.testing.assert_allclose([got, want], [trace, squared], rtol=1e-5, atol=1e-6)
    labels = {"first": {"w": "a", "b": "b"}, "last": "a"}
    parts = statistics.noise_scale(make(), labels=labels)
    trace, squared = by_hand(matrix([rows()["first"]["w"], rows()["last"]]))
    np.testing.assert_allclose(parts.trace["a"], trace, rtol=1e-5)
    np.testing.assert_allclose(parts.squared_norm["a"], squared, rtol=1e-5)
    assert set(parts.trace) == {"a", "b"}
    two = statistics.noise_scale(make(), labels={"first": "trunk", "last": "head"})
    whole = statistics.noise_scale(make())
    np.testing.assert_allclose(sum(two.trace.values()), whole.trace, rtol=1e-5)


def test_both_parts_are_unbiased():
    """Averaged over all pairs of examples, they are those of the population."""
    G = matrix(rows())
    few = jnp.arange(6)
    pairs = [
        statistics.noise_scale(jacobian(loss)(PARAMS, XS[i], YS[i]))
        for i in map(jnp.array, itertools.combinations(few.tolist(), 2))
    ]
    average = jax.tree.map(lambda *x: np.mean(x), *pairs)
    trace, squared = by_hand(G[:6])
    np.testing.assert_allclose(average.trace, trace, rtol=1e-5)
    np.testing.assert_allclose(average.squared_norm, squared, rtol=1e-4)


def test_variance_and_signal():
    expected = jax.tree.map(lambda x: x.var(axis=0, ddof=1), rows())
    got = statistics.variance(make())
    tree_allclose(got, jax.tree.map(lambda x: np.float32(x), expected), rtol=1e-5)
    signal = jax.tree.map(
        lambda x: np.float32(x.mean(0) ** 2 / x.var(0, ddof=1)), rows()
    )
    tree_allclose(statistics.signal_to_noise(make()), signal, rtol=1e-4)


def test_signal_without_noise():
    J = jacobian(lambda p, x: p @ x)(jnp.zeros(2), jnp.array([[2.0, 0.0]] * 3))
    np.testing.assert_array_equal(statistics.signal_to_noise(J), [np.inf, 0])


def test_fisher_diagonal():
    expected = jax.tree.map(lambda x: np.float32((x**2).mean(axis=0)), rows())
    tree_allclose(statistics.fisher_diagonal(make()), expected, rtol=1e-5)


def logits(params, x):
    return jnp.tanh(x @ params["first"]["w"]) * params["last"]


def test_fisher_diagonal_is_not_the_square_of_the_mean():
    """Which `fisher_diag` of optax computes, and which is zero at a minimum."""
    x = jnp.array([1.0, 2.0, 6.0])
    J = jacobian(lambda p, x: (p - x) ** 2 / 2)(x.mean(), x)
    np.testing.assert_allclose(statistics.fisher_diagonal(J), 14 / 3, rtol=1e-6)

    def mean_loss(p, x, _):
        return ((p - x) ** 2 / 2).mean()

    assert jnp.square(jax.grad(mean_loss)(x.mean(), x, None)) == 0
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from optax.second_order import fisher_diag  # up to release 0.2.8

        np.testing.assert_array_equal(fisher_diag(mean_loss, x.mean(), x, None), [0])


def test_sampled_fisher_diagonal():
    """Against the expectation over the model's own labels."""

    def exact(params, x):
        jac = jax.jacrev(lambda p: jax.nn.log_softmax(logits(p, x)))(params)
        odds = jax.nn.softmax(logits(params, x))
        return jax.tree.map(lambda j: jnp.tensordot(odds, j**2, 1), jac)

    expected = jax.tree.map(
        lambda x: x.mean(axis=0), jax.vmap(exact, (None, 0))(PARAMS, XS)
    )
    fisher = statistics.sampled_fisher_diagonal(
        logits, jax.random.key(3), num_samples=800
    )
    tree_allclose(jax.jit(fisher)(PARAMS, XS), expected, rtol=0.05)


DIGITS = load_digits()
IMAGES = jnp.asarray(DIGITS.data / 16, jnp.float32)
LABELS = jnp.asarray(DIGITS.target)


def digit_loss(params, image, label):
    scores = image @ params["w"] + params["b"]
    return optax.softmax_cross_entropy_with_integer_labels(scores, label)


def test_noise_scale_of_the_digits():
    """Softmax regression, all images, learning rate 0.5, from zero."""

    @jax.jit
    def step(params):
        J = jacobian(digit_loss)(params, IMAGES, LABELS)
        pairs = [statistics.noise_scale(J, unbiased=u) for u in (False, True)]
        return jax.tree.map(lambda p, g: p - 0.5 * g, params, J.mean()), pairs

    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    seen = {}
    for number in range(301):
        params, pairs = step(params)
        seen[number] = [float(pair.ratio()) for pair in pairs]
    plain = [seen[i][0] for i in (0, 10, 100, 300)]
    unbiased = [seen[i][1] for i in (0, 10, 100, 300)]
    np.testing.assert_allclose(plain, [72.0, 97.4, 528.8, 1838.4], rtol=1e-3)
    np.testing.assert_allclose(unbiased[:3], [75.0, 103.0, 749.3], rtol=1e-3)
    assert -85_000 < unbiased[3] < -75_000  # −79,748 in float64


# ------------------------------------------------------------------ importance sampling


@pytest.mark.parametrize("uniform", [0.0, 0.1, 1.0])
def test_sampling_is_unbiased(uniform):
    G = matrix(rows())
    norms = jnp.asarray(np.linalg.norm(G, axis=1), jnp.float32)
    p, w = statistics.sampling_weights(norms, uniform=uniform)
    np.testing.assert_allclose(p.sum(), 1, rtol=1e-6)
    mean = (np.asarray(p) * np.asarray(w)) @ G
    np.testing.assert_allclose(mean, G.mean(axis=0), rtol=1e-5, atol=1e-7)
    second = (np.asarray(p) * np.asarray(w) ** 2) @ (G**2).sum(axis=1)
    if uniform == 0:  # Cauchy and Schwarz: no other probabilities give less
        np.testing.assert_allclose(second, np.linalg.norm(G, axis=1).mean() ** 2, 1e-5)


def test_sampling_the_digits_reduces_the_variance():
    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    step = jax.jit(
        lambda p: jax.tree.map(
            lambda a, b: a - 0.5 * b, p, jacobian(digit_loss)(p, IMAGES, LABELS).mean()
        )
    )
    for _ in range(300):
        params = step(params)
    J = jacobian(digit_loss)(params, IMAGES, LABELS)
    norms = np.asarray(J.norms(), np.float64)
    p, w = map(np.asarray, statistics.sampling_weights(J.norms()))
    squared = float(optax.tree.norm(J.mean()) ** 2)
    uniform = (norms**2).mean() - squared
    weighted = (p * w**2) @ norms**2 - squared
    np.testing.assert_allclose(weighted / uniform, 0.414, atol=0.003)
    # And as drawn: the spread of 400 estimates from 32 examples each.
    G = J.to_rows()["b"]

    def estimate(key, p, w):
        drawn = jax.random.choice(key, len(w), (32,), p=p)
        return w[drawn] @ G[drawn] / 32

    def spread(p, w):
        keys = jax.random.split(jax.random.key(0), 400)
        found = jax.vmap(lambda key: estimate(key, p, w))(keys)
        return float(found.var(axis=0).sum())

    even = jnp.full(len(norms), 1 / len(norms)), jnp.ones(len(norms))
    assert spread(jnp.asarray(p), jnp.asarray(w)) < 0.75 * spread(*even)


def test_sampling_at_the_edges():
    p, w = statistics.sampling_weights(jnp.zeros(4))
    np.testing.assert_allclose([p, w], [[0.25] * 4, [1] * 4])
    p, w = statistics.sampling_weights(jnp.array([0.0, 2.0]), uniform=0.0)
    np.testing.assert_allclose([p, w], [[0, 1], [0, 0.5]])


def test_sampling_from_narrow_norms():
    """Their sum is beyond float16."""
    p, w = statistics.sampling_weights(jnp.linspace(1, 300, 2000).astype(jnp.float16))
    assert p.dtype == w.dtype == jnp.float32
    np.testing.assert_allclose([p.sum(), (p * w).sum()], 1, rtol=1e-5)


# ------------------------------------------------------------------------------- errors


def two_outputs():
    return jacobian(lambda p, x: jnp.stack([p @ x, p @ x]))(
        jnp.ones(2), jnp.ones((3, 2))
    )


def one_example():
    return jacobian(lambda p, x: p @ x)(jnp.ones(2), jnp.ones((1, 2)))


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: statistics.noise_scale(jnp.ones((3, 2))), TypeError, "a Jacobian"),
        (lambda: statistics.variance(two_outputs()), ValueError, "one row per example"),
        (lambda: statistics.variance(one_example()), ValueError, "at least 2 examples"),
        (lambda: statistics.noise_scale(one_example()), ValueError, "at least 2"),
        (
            lambda: statistics.noise_scale(make(), labels={"first": "a"}),
            ValueError,
            "prefix tree",
        ),
        (
            lambda: statistics.noise_scale(make(), labels="a", per_leaf=True),
            ValueError,
            "not both",
        ),
        (
            lambda: statistics.sampled_fisher_diagonal(None, jax.random.key(0)),
            TypeError,
            "logits must be a function",
        ),
        (
            lambda: statistics.sampled_fisher_diagonal(logits, 0),
            TypeError,
            "must be one PRNG key",
        ),
        (
            lambda: statistics.sampled_fisher_diagonal(
                logits, jax.random.key(0), num_samples=0
            ),
            ValueError,
            "at least 1",
        ),
        (
            lambda: statistics.sampled_fisher_diagonal(
                lambda p, x: p @ x, jax.random.key(0)
            )(jnp.ones(2), jnp.ones((3, 2))),
            ValueError,
            "array (C,)",
        ),
        (
            lambda: statistics.sampled_fisher_diagonal(
                logits, jax.random.split(jax.random.key(0))
            ),
            TypeError,
            "must be one PRNG key",
        ),
        (
            lambda: statistics.sampled_fisher_diagonal(logits, jax.random.key(0))(
                PARAMS
            ),
            ValueError,
            "pass a batch",
        ),
        (lambda: statistics.sampling_weights(jnp.arange(3)), TypeError, "J.norms()"),
        (
            lambda: statistics.sampling_weights(jnp.ones(2), uniform="a"),
            TypeError,
            "uniform must be a real scalar",
        ),
        (lambda: statistics.sampling_weights(jnp.ones((2, 2))), ValueError, "(N,)"),
        (lambda: statistics.sampling_weights(-jnp.ones(2)), ValueError, "negative"),
        (
            lambda: statistics.sampling_weights(jnp.ones(2), uniform=2.0),
            ValueError,
            "uniform must be from 0 to 1",
        ),
    ],
)
def test_errors(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)
