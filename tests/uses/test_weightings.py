"""Weightings give the values of their papers, certificates of optimality in float64,
and finite weights for every Gramian.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads import jacobian, weightings

pytestmark = pytest.mark.any_release

KEY = jax.random.key(0)
TWO = [[-4, 1], [6, 1]]
THREE = [[-4, 1, 1], [6, 1, 1], [1, -3, 2]]


def gram_of(rows, dtype=np.float32):
    rows = np.asarray(rows, np.float64)
    return jnp.asarray(rows @ rows.T, dtype)


# The third entry of the first table is the second again.
WEIGHTINGS = {
    "mean": weightings.mean,
    "sum": weightings.sum,
    "upgrad": weightings.upgrad,
    "dualproj": weightings.dualproj,
    "pcgrad": lambda gram: weightings.pcgrad(gram, KEY),
    "mgda": weightings.mgda,
    "cagrad": weightings.cagrad,
    "cagrad_4": lambda gram: weightings.cagrad(gram, c=0.4),
    "cagrad_12": lambda gram: weightings.cagrad(gram, c=1.2),
    "nash_mtl": weightings.nash_mtl,
    "nash_mtl_cut": lambda gram: weightings.nash_mtl(gram, max_norm=1.0),
    "fairgrad_1": lambda gram: weightings.fairgrad(gram, 1.0),
    "fairgrad_2": lambda gram: weightings.fairgrad(gram, 2.0),
    "aligned_mtl": weightings.aligned_mtl,
    "aligned_mtl_rmse": lambda gram: weightings.aligned_mtl(gram, scale_mode="rmse"),
    "aligned_mtl_median": lambda gram: weightings.aligned_mtl(
        gram, scale_mode="median"
    ),
    "imtl_g": weightings.imtl_g,
    "config": weightings.config,
    # As TorchJD regularises.
    "upgrad_torchjd": lambda gram: weightings.upgrad(gram, regularization=1e-4),
    "dualproj_torchjd": lambda gram: weightings.dualproj(gram, regularization=1e-4),
}
VALUES = [
    ("mean", TWO, (1, 1)),
    ("sum", TWO, (2, 2)),
    ("upgrad", TWO, (0.292398, 1.900585)),
    ("dualproj", TWO, (5 / 9, 10 / 9)),
    ("pcgrad", TWO, (0.584795, 3.801170)),
    ("mgda", TWO, (0, 1)),
    ("cagrad", TWO, (0.183503, 1.204124)),
    ("cagrad_4", TWO, (0.3468, 1.1633)),
    ("nash_mtl", TWO, (0.076584, 0.998533)),
    ("nash_mtl_cut", TWO, (0.0542, 0.7061)),
    ("fairgrad_1", TWO, (0.076584, 0.998533)),
    ("fairgrad_2", TWO, (0.0313, 0.7908)),
    ("aligned_mtl", TWO, (0.213279, 0.967333)),
    ("aligned_mtl_rmse", TWO, (0.576376, 2.614172)),
    ("imtl_g", TWO, (0.0767, 1.0)),
    ("config", TWO, (0.158809, 2.070607)),
    ("upgrad_torchjd", TWO, (0.2929, 1.9004)),
    ("dualproj_torchjd", TWO, (0.5563, 1.1109)),
    ("upgrad", THREE, (0.20274, 0.18906, 2.26556)),
    ("dualproj", THREE, (1 / 3, -1 / 6, 3 / 2)),
    ("mgda", THREE, (0, 0.29412, 1.17647)),
    ("cagrad", THREE, (0.19877, -0.13302, 1.53364)),
    ("nash_mtl", THREE, (0.09415, 0.13337, 1.72434)),
    ("aligned_mtl", THREE, (0.20027, 0.04692, 1.07535)),
    ("imtl_g", THREE, (0.05946, 0.40053, 1.14987)),
    ("config", THREE, (0.17512, 1.17973, 3.38680)),
]


def each(table):
    return pytest.mark.parametrize("name", table)


@pytest.mark.parametrize("name, rows, expected", VALUES)
def test_values(name, rows, expected):
    """On the rows (-4, 1, 1), (6, 1, 1) and on those with a third, (1, -3, 2)."""
    rows = np.array(rows, np.float64)
    full = rows if rows.shape[1] == 3 else rows[:, [0, 1, 1]]
    weights = WEIGHTINGS[name](gram_of(full))
    np.testing.assert_allclose(np.asarray(weights) @ rows, expected, atol=6e-5)


def test_weights_of_upgrad():
    weights = weightings.upgrad(gram_of([[-4, 1, 1], [6, 1, 1]]))
    np.testing.assert_allclose(weights, [10 / 9, 15 / 19], rtol=1e-6)


# ------------------------------------------------- the Gramians that make a solver fail


def random_rows(seed, count, size):
    return np.random.default_rng(seed).normal(size=(count, size))


HARD = {
    "two": random_rows(0, 2, 5),
    "three": random_rows(1, 3, 3),
    "more losses than entries": random_rows(2, 5, 2),
    "barely independent": random_rows(3, 16, 16),
    "many": random_rows(4, 64, 64),
    "many of low rank": random_rows(5, 64, 10),
    "a row of zeros": np.append(random_rows(6, 3, 5), np.zeros((1, 5)), axis=0),
    "equal rows": np.repeat(random_rows(7, 2, 4), 2, axis=0),
    "opposite rows": np.array([[1.0, 2.0], [-1.0, -2.0]]),
    "opposite and another": np.array([[1.0, 2.0], [-1.0, -2.0], [2.0, -1.0]]),
    "stationary": np.array([[1.0, 0.0], [-0.5, 0.75], [-0.5, -0.75]]),
    "zeros": np.zeros((3, 4)),
    "one": np.array([[3.0, 4.0]]),
    "one zero": np.zeros((1, 2)),
    "of far sizes": random_rows(8, 4, 6) * np.array([[1e-3], [1.0], [30.0], [1e-1]]),
    "tiny": 1e-10 * random_rows(9, 3, 5),
    "huge": 1e12 * random_rows(10, 3, 5),
}

STATIONARY = [
    "more losses than entries", "many of low rank", "opposite rows",
    "opposite and another", "stationary", "zeros", "one zero",
]  # fmt: skip


def combined(name, rows):
    """Weights, and the combined gradient in units of the largest row."""
    gram = gram_of(rows)
    weights = np.asarray(WEIGHTINGS[name](gram), np.float64)
    size = max(np.linalg.norm(rows, axis=1).max(), 1e-30)
    return weights, weights @ rows / size


@each(WEIGHTINGS)
@pytest.mark.parametrize("case", HARD)
def test_weights_are_finite(name, case):
    weights, direction = combined(name, HARD[case])
    assert weights.shape == HARD[case].shape[:1]
    assert np.isfinite(weights).all()
    assert np.isfinite(direction).all()


@each(WEIGHTINGS)
@pytest.mark.parametrize("count", [2, 3])
def test_a_nan_is_not_hidden(name, count):
    for place in ((0, 0), (1, 0)):
        weights = WEIGHTINGS[name](jnp.eye(count).at[place].set(jnp.nan))
        assert name in ("mean", "sum") or bool(jnp.isnan(weights).any())


@each(["upgrad", "dualproj", "mgda"])
@pytest.mark.parametrize("count", [2, 3, 8])
@pytest.mark.parametrize("order", [1, -1])
def test_norms_that_differ_by_a_million(name, count, order):
    """Not in units of the largest gradient, but in those of the result."""
    rows = random_rows(24, count, 12)[::order]
    rows *= 10.0 ** np.linspace(0, 6, count)[:, None]
    rows[-1] -= 1e6 * rows[0]  # the last one conflicts with the first
    _, direction = combined(name, rows[::order])
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    assert (units @ direction).min() > -1e-5 * np.linalg.norm(direction)


def test_nearly_opposite_gradients_stay_within_the_ball():
    """The inner products no longer tell how short their shortest combination is."""
    for c in (0.5, 1.0, 2.0):
        for angle in 10.0 ** np.arange(-7.0, -1.0):
            rows = np.array([[1.0, 0.0], [-np.cos(angle), np.sin(angle)]])
            rows *= np.array([[1.0], [0.3]])
            weights = np.asarray(weightings.cagrad(gram_of(rows), c=c), np.float64)
            away = np.linalg.norm(weights @ rows - rows.mean(axis=0))
            assert away <= 1.01 * c * np.linalg.norm(rows.mean(axis=0))


@each(["upgrad", "dualproj", "mgda", "cagrad_12", "nash_mtl", "fairgrad_2"])
@pytest.mark.parametrize("case", HARD)
def test_no_loss_gets_worse(name, case):
    rows = HARD[case]
    _, direction = combined(name, rows)
    lengths = np.linalg.norm(rows, axis=1)
    units = rows / np.where(lengths > 0, lengths, 1)[:, None]
    # Where the losses are stationary, only the zero direction would do, and the result
    # is nearly zero, either way.
    assert (units @ direction).min() > (-1e-2 if case in STATIONARY else -2e-4)


def upper_bounds(gram, weights, low):
    """How far v ≥ low is from the smallest vᵀGv, relative to the trace."""
    slope = gram @ weights / max(np.trace(gram), 1e-30)
    above = weights - low
    return max(-above.min(), -slope.min(), np.abs(above * slope).max())


@pytest.mark.parametrize("case", HARD)
def test_dual_cone_certificate(case):
    """Of a convex problem, a point at which no condition fails is the solution."""
    rows = HARD[case]
    gram, count = gram_of(rows), len(rows)
    exact = np.asarray(gram, np.float64)
    low = np.full(count, 1 / count)
    dual = np.asarray(weightings.dualproj(gram), np.float64)
    assert upper_bounds(exact, dual, low) < 2e-6
    for i in range(min(count, 5)):
        one = jnp.zeros(count).at[i].set(1)
        part = np.asarray(weightings.upgrad(gram, preference=one), np.float64)
        assert upper_bounds(exact, part, np.eye(count)[i]) < 2e-6


@pytest.mark.parametrize("case", HARD)
def test_mgda_certificate(case):
    """No vertex of the simplex lies below the solution."""
    gram = np.asarray(gram_of(HARD[case]), np.float64)
    w = np.asarray(weightings.mgda(jnp.asarray(gram, jnp.float32)), np.float64)
    assert w.min() >= 0
    assert abs(w.sum() - 1) < 1e-5
    slope = gram @ w / max(np.trace(gram), 1e-30)
    assert (w * (slope - slope.min())).max() < 2e-6


# Norms that differ by 1e4 take the products in float32 beyond their digits.
@pytest.mark.parametrize("case", [case for case in HARD if case != "of far sizes"])
@pytest.mark.parametrize("c", [0.1, 0.5, 2.0])
def test_cagrad_certificate(case, c):
    """On the sphere around the mean, towards a combination of the worst losses."""
    rows = HARD[case] / max(np.linalg.norm(HARD[case]), 1e-30)
    weights = np.asarray(weightings.cagrad(gram_of(rows), c=c), np.float64)
    mean, direction = rows.mean(axis=0), weights @ rows
    added = weights - 1 / len(rows)
    radius = c * np.linalg.norm(mean)
    assert np.linalg.norm(direction - mean) < radius * (1 + 1e-4) + 2e-6
    assert added.min() > -1e-6
    gains = rows @ direction
    share = added / max(added.sum(), 1e-30)
    assert (share * (gains - gains.min())).max() < 3e-4 * max(1, c)
    smallest = np.sqrt(np.maximum(share @ rows @ rows.T @ share, 0))
    if radius > 0:  # shorter only where the losses are nearly stationary
        reached = np.linalg.norm(direction - mean) / radius
        smooth = np.sqrt(smallest**2 + np.finfo(np.float32).eps)
        assert abs(reached - smallest / smooth) < 2e-3


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("case", ["two", "three", "of far sizes", "tiny", "equal rows"])
def test_fair_weights_solve_their_equation(alpha, case, x64):
    gram = gram_of(HARD[case], np.float64)
    w = weightings.fairgrad(gram, alpha)
    np.testing.assert_allclose(gram @ w, w ** (-1 / alpha), rtol=1e-6)


def test_the_norm_of_a_bargain(x64):
    rows = random_rows(11, 5, 9)
    gram = gram_of(rows, np.float64)
    w = weightings.nash_mtl(gram)
    np.testing.assert_allclose(w @ gram @ w, 5, rtol=1e-9)
    cut = weightings.nash_mtl(gram, max_norm=0.5)
    np.testing.assert_allclose(jnp.sqrt(cut @ gram @ cut), 0.5, rtol=1e-9)


def test_rows_of_zeros_are_the_shortest():
    rows = np.append(random_rows(6, 15, 20), np.zeros((1, 20)), axis=0)
    for count in (2, 16):
        weights = weightings.mgda(gram_of(rows[-count:]))
        np.testing.assert_array_equal(weights, np.eye(count)[-1])


def test_a_zero_gradient_changes_no_bargain():
    rows = random_rows(12, 3, 5)
    with_zero = weightings.nash_mtl(gram_of(np.append(rows, np.zeros((1, 5)), 0)))
    alone = weightings.nash_mtl(gram_of(rows))
    np.testing.assert_allclose(with_zero, jnp.append(alone, 0.0), rtol=1e-3)


# -------------------------------------------------------------------------- properties


# PCGrad's order is random, so its result depends on the order of the losses.
@each([name for name in WEIGHTINGS if name != "pcgrad"])
@pytest.mark.parametrize("case", ["three", "more losses than entries", "many"])
def test_the_order_of_losses_does_not_matter(name, case):
    rows = HARD[case]
    _, direction = combined(name, rows)
    _, other = combined(name, rows[::-1])
    size = max(1, np.abs(direction).max())
    np.testing.assert_allclose(other, direction, atol=3e-3 * size)


@each(["upgrad", "pcgrad_two", "constant"])
def test_linear_in_each_loss(name):
    """The combined gradient of scaled losses is linear in the scales."""
    functions = {
        "upgrad": weightings.upgrad,
        "pcgrad_two": lambda gram: weightings.pcgrad(gram, KEY),
        "constant": lambda gram: weightings.constant(gram, jnp.array([0.3, 0.7])),
    }
    rows = random_rows(13, 2, 4)

    def of(scales):
        scaled = np.array(scales)[:, None] * rows
        return np.asarray(functions[name](gram_of(scaled))) @ scaled

    first, second = np.array([1.0, 3.0]), np.array([5.0, 0.5])
    np.testing.assert_allclose(
        of(first + 2 * second), of(first) + 2 * of(second), rtol=2e-5, atol=1e-5
    )


def test_dualproj_is_not_linear_in_each_loss():
    rows = np.array([[-4.0, 1], [6, 1]])

    def of(scales):
        scaled = np.array(scales)[:, None] * rows
        return np.asarray(weightings.dualproj(gram_of(scaled))) @ scaled

    assert np.abs(of([6.0, 2.0]) - of([1.0, 1.0]) - of([5.0, 1.0])).max() > 0.1


@each(["nash_mtl", "imtl_g", "config"])
def test_invariant_directions(name):
    rows = random_rows(14, 3, 6)
    scaled = rows * np.array([[0.1], [1.0], [20.0]])

    def direction(rows):
        found = np.asarray(WEIGHTINGS[name](gram_of(rows)), np.float64) @ rows
        return found / np.linalg.norm(found)

    np.testing.assert_allclose(direction(scaled), direction(rows), atol=1e-4)


@each(["upgrad", "dualproj"])
def test_the_preference_is_kept_without_conflict(name):
    rows = np.abs(random_rows(15, 3, 6))
    preference = jnp.array([0.2, 1.0, 3.0])
    found = getattr(weightings, name)(gram_of(rows), preference=preference)
    np.testing.assert_allclose(found, preference, rtol=1e-6)


def test_config_has_equal_cosines():
    rows = random_rows(16, 4, 9)
    direction = np.asarray(weightings.config(gram_of(rows)), np.float64) @ rows
    units = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    np.testing.assert_allclose(
        units @ direction, [(units @ direction)[0]] * 4, rtol=1e-3
    )
    wanted = np.array([1.0, 2.0, 3.0, 4.0])
    weights = weightings.config(gram_of(rows), preference=jnp.asarray(wanted, float))
    cosines = units @ (np.asarray(weights, np.float64) @ rows)
    np.testing.assert_allclose(cosines / cosines[0], wanted, rtol=1e-3)


def test_aligned_gradients_are_orthogonal_and_of_one_length():
    rows = random_rows(17, 3, 7)
    parts = [
        weightings.aligned_mtl(gram_of(rows), preference=one) for one in jnp.eye(3)
    ]
    aligned = np.stack(parts).astype(np.float64) @ rows
    smallest = np.linalg.eigvalsh(rows @ rows.T)[0]
    np.testing.assert_allclose(aligned @ aligned.T, smallest * np.eye(3), atol=2e-4)


def test_pcgrad_by_hand():
    """Against the loop of the paper, over rows, with the same orders."""
    rows = random_rows(18, 5, 3)
    keys = jax.random.split(KEY, 5)
    total = np.zeros(3)
    for i in range(5):
        corrected = rows[i].copy()
        for j in np.asarray(jax.random.permutation(keys[i], 5)):
            product = corrected @ rows[j]
            if j != i and product < 0:
                corrected -= product / (rows[j] @ rows[j]) * rows[j]
        total += corrected
    weights = weightings.pcgrad(gram_of(rows), KEY)
    np.testing.assert_allclose(np.asarray(weights) @ rows, total, rtol=1e-4, atol=1e-5)


def test_krum_by_hand():
    rows = random_rows(19, 6, 4)
    rows[2] += 30
    distances = ((rows[:, None] - rows[None]) ** 2).sum(-1)
    scores = np.sort(distances, axis=1)[:, 1:4].sum(axis=1)
    expected = np.isin(np.arange(6), np.argsort(scores)[:2]) / 2
    np.testing.assert_allclose(weightings.krum(gram_of(rows), 1, 2), expected)


def test_random_weights():
    gram = jnp.eye(4)
    first, second = (weightings.random(gram, jax.random.key(i)) for i in range(2))
    assert not np.allclose(first, second)
    for weights in (first, second):
        assert float(weights.min()) > 0
        np.testing.assert_allclose(weights.sum(), 1, rtol=1e-6)


# -------------------------------------------------------------------- transformations


@each(WEIGHTINGS)
def test_vmap_and_jit(name):
    grams = jnp.stack([gram_of(random_rows(seed, 3, 5)) for seed in range(3)])
    mapped = jax.jit(jax.vmap(WEIGHTINGS[name]))(grams)
    one_by_one = jnp.stack([WEIGHTINGS[name](gram) for gram in grams])
    np.testing.assert_allclose(mapped, one_by_one, rtol=1e-3, atol=1e-5)


@each([n for n in WEIGHTINGS if n not in ("mean", "sum")])
@pytest.mark.parametrize("case", ["two", "three"])
def test_derivatives(name, case, x64):
    """Of the combined gradient's products with all rows, along a random direction."""
    gram = gram_of(HARD[case], np.float64)
    shift = random_rows(20, *gram.shape) * 1e-2
    shift = jnp.asarray(shift + shift.T)

    def along(t):
        moved = gram + t * shift
        return moved @ WEIGHTINGS[name](moved)

    got = jax.jvp(along, (0.0,), (1.0,))[1]
    step = 1e-4
    expected = (along(step) - along(-step)) / (2 * step)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)
    reverse = jax.grad(lambda t: along(t).sum())(0.0)
    np.testing.assert_allclose(reverse, got.sum(), rtol=1e-8)


# The eigenvectors of Aligned-MTL have no derivative where eigenvalues coincide.
@each([name for name in WEIGHTINGS if not name.startswith("aligned")])
@pytest.mark.parametrize(
    "case",
    [
        "a row of zeros", "equal rows", "opposite rows", "stationary", "zeros",
        "tiny", "huge",
    ],
)  # fmt: skip
def test_derivatives_are_finite(name, case):
    gram = gram_of(HARD[case])
    slope = jax.grad(lambda gram: jnp.sum(WEIGHTINGS[name](gram)))(gram)
    assert bool(jnp.isfinite(slope).all())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("mean", 1), ("sum", 1), ("upgrad", 1), ("dualproj", 1), ("pcgrad", 1),
        ("mgda", 1), ("cagrad", 1.5), ("nash_mtl", 0.2), ("fairgrad_1", 0.2),
        ("fairgrad_2", 5 ** (-4 / 3)), ("aligned_mtl", 1), ("imtl_g", 1), ("config", 1),
    ],
)  # fmt: skip
def test_a_single_loss(name, expected):
    """Of a gradient of norm 5."""
    weights = WEIGHTINGS[name](gram_of(HARD["one"]))
    np.testing.assert_allclose(weights, [expected], rtol=1e-5)


@each(WEIGHTINGS)
def test_double_precision(name, x64):
    weights = WEIGHTINGS[name](gram_of(HARD["three"], np.float64))
    assert weights.dtype == jnp.float64
    half = WEIGHTINGS[name](jnp.eye(2, dtype=jnp.bfloat16))
    assert half.dtype == jnp.float32


# ------------------------------------------------------------------------- with state


def test_gradvac_by_hand():
    """Against the loop of the paper, over rows, for three steps."""
    vaccine = weightings.gradvac(KEY, decay=0.7)
    state, averages, key = vaccine.init(4), np.zeros((4, 4)), KEY
    for step in range(3):
        rows = random_rows(step, 4, 3)
        key, now = jax.random.split(key)
        orders = jax.vmap(lambda k: jax.random.permutation(k, 4))(
            jax.random.split(now, 4)
        )
        total = np.zeros(3)
        for i in range(4):
            g = rows[i].copy()
            for j in np.asarray(orders[i]):
                if i == j:
                    continue
                norm, other = np.linalg.norm(g), np.linalg.norm(rows[j])
                cosine, goal = g @ rows[j] / (norm * other), averages[i, j]
                if cosine < goal:
                    sines = np.sqrt(1 - cosine**2), np.sqrt(1 - goal**2)
                    raised = goal * sines[0] - cosine * sines[1]
                    g = g + norm * raised / (other * sines[1]) * rows[j]
                averages[i, j] = 0.7 * goal + 0.3 * cosine
            total += g
        weights, state = vaccine.update(gram_of(rows), state)
        np.testing.assert_allclose(np.asarray(weights) @ rows, total, rtol=1e-3)
        np.testing.assert_allclose(state.cosines, averages, atol=1e-5)


def test_gradvac_raises_the_cosine_to_the_average():
    rows = np.array([[1.0, 0.0], [-1.0, 1.0]])
    vaccine = weightings.gradvac(KEY)
    state = vaccine.init(2)
    state = state._replace(cosines=state.cosines.at[0, 1].set(0.5).at[1, 0].set(-1.0))
    weights, _ = vaccine.update(gram_of(rows), state)
    corrected = (np.asarray(weights) - [0, 1]) @ rows  # of the first gradient alone
    cosine = corrected @ rows[1] / np.linalg.norm(corrected) / np.linalg.norm(rows[1])
    np.testing.assert_allclose(cosine, 0.5, rtol=1e-5)


def test_cr_mogm_is_a_moving_average():
    smooth = weightings.cr_mogm(weightings.mgda, decay=0.8)
    state, expected = smooth.init(3), np.full(3, 1 / 3)
    for seed in range(4):
        gram = gram_of(random_rows(seed, 3, 3))
        weights, state = smooth.update(gram, state)
        expected = 0.8 * expected + 0.2 * np.asarray(weightings.mgda(gram))
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


@pytest.mark.parametrize("pull", [0.0, 0.7])
def test_two_batches_by_hand(pull):
    """A step of the paper; with no pull, SDMGrad is MoDo."""
    cross = np.array([[2.0, -1.0, 0.5], [0.3, 1.0, -2.0], [0.0, 1.0, 4.0]])
    w = np.array([0.2, 0.3, 0.5])
    moved = w - 0.1 * cross @ (w + pull / 3)
    top = np.sort(moved)[::-1]
    thetas = (np.cumsum(top) - 1) / np.arange(1, 4)
    theta = thetas[np.nonzero(top > thetas)[0][-1]]
    expected = np.maximum(moved - theta, 0)
    rule = weightings.sdmgrad(step_size=0.1, direction_weight=pull)
    weights, state = rule.update(jnp.asarray(cross, float), jnp.asarray(w, float))
    np.testing.assert_allclose(state, expected, rtol=1e-5)
    np.testing.assert_allclose(weights, expected + pull / 3, rtol=1e-5)
    if not pull:
        double = weightings.modo(step_size=0.1)
        weights, _ = double.update(jnp.asarray(cross, float), jnp.asarray(w, float))
        np.testing.assert_allclose(weights, expected, rtol=1e-5)


def least_on_a_grid(value, gram):
    """The smallest of a function of (w, ‖Jᵀw‖) over 100,001 convex combinations."""
    x = np.linspace(0, 1, 100001)
    w = np.stack([x, 1 - x])
    norms = np.sqrt(np.maximum(np.einsum("ik,ij,jk->k", w, gram, w), 0))
    values = value(w, norms)
    return values.min()


@pytest.mark.parametrize("seed", range(8))
def test_two_losses_have_closed_forms(seed):
    """MGDA and CAGrad of two losses are no worse than the best of a fine grid."""
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(2, 3)) * 10.0 ** rng.uniform(-1, 1, size=(2, 1))
    rows[1] -= seed % 2 * 3 * rows[0]  # half of them conflict
    gram = rows @ rows.T
    size = np.sqrt(np.trace(gram))
    w = np.asarray(weightings.mgda(gram_of(rows)), np.float64)
    best = least_on_a_grid(lambda w, norms: norms, gram)
    assert np.linalg.norm(w @ rows) <= best + 1e-6 * size

    c, uniform = 0.7, np.full(2, 0.5)
    radius = c * np.sqrt(uniform @ gram @ uniform)
    d = np.asarray(weightings.cagrad(gram_of(rows), c=c), np.float64) @ rows
    assert np.linalg.norm(d - uniform @ rows) <= radius * (1 + 1e-5)
    # The dual: the worst loss improves as much as the best direction can.
    best = least_on_a_grid(lambda w, norms: uniform @ gram @ w + radius * norms, gram)
    assert np.min(rows @ d) >= best - 1e-4 * size**2


def test_modo_tends_to_mgda():
    gram = gram_of(random_rows(21, 3, 4))
    rule = weightings.modo(step_size=0.05)
    step = jax.jit(rule.update)
    state = rule.init(3)
    for _ in range(800):
        weights, state = step(gram, state)
    np.testing.assert_allclose(gram @ weights, gram @ weightings.mgda(gram), atol=1e-3)


def test_excess_mtl_by_hand():
    excess = weightings.excess_mtl(step_size=0.5)
    start = {"a": jnp.zeros((2, 3)), "b": jnp.zeros((2, 2, 2))}
    state, sums, weights, first = excess.init(start), np.zeros((2, 7)), np.ones(2), None
    for seed in range(3):
        flat = random_rows(seed, 2, 7)
        rows = {
            "a": jnp.asarray(flat[:, :3], float),
            "b": jnp.asarray(flat[:, 3:].reshape(2, 2, 2), float),
        }
        sums += flat**2
        risks = (flat**2 / np.sqrt(sums)).sum(axis=1)
        if first is None:
            first = risks
        else:
            weights = weights * np.exp(0.5 * risks / first)
            weights *= 2 / weights.sum()
        got, state = excess.update(rows, state)
        np.testing.assert_allclose(got, weights, rtol=1e-5)


def test_excess_mtl_of_growing_losses():
    """Powers of e beyond all numbers leave weights that add up to K."""
    excess = weightings.excess_mtl(step_size=1000.0)
    rows = jnp.array([[1.0, 0.0], [0.0, 2.0]])
    state = excess.init(rows)
    for factor in (1.0, 10.0, 100.0):
        weights, state = excess.update(rows * jnp.array([[1.0], [factor]]), state)
    np.testing.assert_allclose(weights, [0.0, 2.0])


def test_states_pass_through_scan():
    vaccine = weightings.gradvac(KEY)
    grams = jnp.stack([gram_of(random_rows(seed, 3, 5)) for seed in range(4)])

    def step(state, gram):
        weights, state = vaccine.update(gram, state)
        return state, weights

    _, scanned = jax.lax.scan(step, vaccine.init(3), grams)
    state = vaccine.init(3)
    for gram, expected in zip(grams, scanned, strict=True):
        weights, state = vaccine.update(gram, state)
        np.testing.assert_allclose(weights, expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- from stacked rows


def test_graddrop_keeps_one_sign():
    rows = {"w": jnp.asarray(random_rows(22, 4, 500), float)}
    dropped = np.asarray(weightings.graddrop(rows, KEY)["w"])
    x = np.asarray(rows["w"])
    positive, negative = np.maximum(x, 0).sum(0), np.minimum(x, 0).sum(0)
    is_positive = np.isclose(dropped, positive, rtol=1e-5)
    assert (is_positive | np.isclose(dropped, negative, rtol=1e-5)).all()
    purity = 0.5 * (1 + x.sum(0) / np.abs(x).sum(0))
    assert abs(is_positive.mean() - purity.mean()) < 0.06
    # An entry whose gradients all have one sign loses nothing.
    same = (x > 0).all(0) | (x < 0).all(0)
    np.testing.assert_allclose(dropped[same], x.sum(0)[same], rtol=1e-5)


def test_graddrop_of_zeros_is_zero():
    assert not weightings.graddrop(jnp.zeros((3, 4)), KEY).any()


def test_trimmed_mean_by_hand():
    x = random_rows(23, 7, 5)
    expected = np.sort(x, axis=0)[2:5].mean(axis=0)
    found = weightings.trimmed_mean({"w": jnp.asarray(x, jnp.bfloat16)}, 2)
    assert found["w"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found["w"], float), expected, atol=0.02)


# ----------------------------------------------------------------- K losses, one call


def two_tasks(trunk, heads, x, y, z):
    features = jnp.tanh(x @ trunk["w"])
    first = jnp.mean((features @ heads["y"] - y) ** 2)
    second = jnp.mean((features @ heads["z"] - z) ** 2)
    return jnp.stack([first, second])


TRUNK = {"w": jnp.linspace(-1.0, 1.0, 15).reshape(5, 3)}
HEADS = {"y": jnp.ones(3), "z": jnp.array([1.0, -2.0, 0.5])}
DATA = (
    jax.random.normal(jax.random.key(1), (32, 5)),
    jax.random.normal(jax.random.key(2), (32,)),
    jax.random.normal(jax.random.key(3), (32,)),
)


def test_one_call_against_plain_jax():
    rows = jax.jacrev(two_tasks)(TRUNK, HEADS, *DATA)["w"]
    flat = rows.reshape(2, -1)
    weights = weightings.upgrad(flat @ flat.T)
    step = weightings.combined_value_and_grad(two_tasks, weightings.upgrad, heads=True)
    values, (trunk, heads) = jax.jit(step)(TRUNK, HEADS, *DATA)
    tree_allclose(values, two_tasks(TRUNK, HEADS, *DATA))
    expected = {"w": jnp.tensordot(weights, rows, 1)}
    tree_allclose(trunk, expected, rtol=1e-4)
    total = jax.grad(lambda h: two_tasks(TRUNK, h, *DATA).sum())(HEADS)
    tree_allclose(heads, total, rtol=1e-4)


def test_one_call_without_heads():
    both = {"trunk": TRUNK, "heads": HEADS}

    def losses(both, x, y, *, z):
        return two_tasks(both["trunk"], both["heads"], x, y, z)

    step = weightings.combined_value_and_grad(losses, weightings.sum)
    _, grads = step(both, *DATA[:2], z=DATA[2])
    expected = jax.grad(lambda b: losses(b, *DATA[:2], z=DATA[2]).sum())(both)
    tree_allclose(grads, expected, rtol=1e-4)


def test_one_call_with_a_state():
    smooth = weightings.cr_mogm(weightings.mgda)

    @jax.jit
    def step(trunk, state):
        return weightings.combined_value_and_grad(
            two_tasks, lambda gram: smooth.update(gram, state), heads=True, has_aux=True
        )(trunk, HEADS, *DATA)

    (values, state), (grads, _) = step(TRUNK, smooth.init(2))
    assert values.shape == state.shape == (2,)
    rows = jax.jacrev(two_tasks)(TRUNK, HEADS, *DATA)["w"]
    tree_allclose(grads, {"w": jnp.tensordot(state, rows, 1)}, rtol=1e-4)


def test_every_example_is_a_loss():
    """Instance-wise risk minimisation: no example gets worse."""

    def loss(params, x, y):
        return (jnp.tanh(x @ params["w"]).sum() - y) ** 2

    J = jacobian(loss)(TRUNK, *DATA[:2])
    combined = J.weighted_sum(weightings.upgrad(J.gram()))
    gains = J @ combined
    assert float(gains.min()) > -1e-3 * float(gains.max())
    assert float((J @ J.mean()).min()) < -1e-2 * float(gains.max())


# ------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: weightings.mean(jnp.ones((2, 3))), ValueError, "shape (K, K)"),
        (lambda: weightings.upgrad(jnp.ones(3)), ValueError, "shape (K, K)"),
        (lambda: weightings.mgda(jnp.ones((2, 3, 3))), ValueError, "jax.vmap"),
        (lambda: weightings.mgda(jnp.ones((1, 2, 1, 2))), ValueError, "J.gram()[0"),
        (lambda: weightings.mgda(jnp.ones((0, 0))), ValueError, "at least one loss"),
        (lambda: weightings.sum(jnp.ones((2, 2), int)), TypeError, "int"),
        (lambda: weightings.sum(jnp.ones((2, 2), complex)), TypeError, "complex"),
        (
            lambda: weightings.upgrad(jnp.eye(2), preference=jnp.ones(3)),
            ValueError,
            "preference must have shape (2,)",
        ),
        (
            lambda: weightings.dualproj(jnp.eye(2), preference=jnp.array([1.0, -1.0])),
            ValueError,
            "must not be negative",
        ),
        (
            lambda: weightings.upgrad(jnp.eye(2), regularization=-1.0),
            ValueError,
            "regularization must be at least 0",
        ),
        (lambda: weightings.cagrad(jnp.eye(2), c=-0.1), ValueError, "c must be at"),
        (lambda: weightings.cagrad(jnp.eye(2), c=jnp.ones(2)), TypeError, "scalar"),
        (lambda: weightings.cagrad(jnp.eye(2), c="much"), TypeError, "real scalar"),
        (lambda: weightings.cagrad(jnp.eye(2), c=[1.0]), TypeError, "real scalar"),
        (lambda: weightings.cagrad(jnp.eye(2), c=jnp.inf), ValueError, "and finite"),
        (lambda: weightings.mgda(None), TypeError, "gram must hold real"),
        (
            lambda: weightings.mgda(jacobian(jnp.dot)(jnp.ones(2), jnp.ones((3, 2)))),
            TypeError,
            "write J.gram()",
        ),
        (
            lambda: weightings.trimmed_mean(
                jacobian(jnp.dot)(jnp.ones(2), jnp.ones((3, 2))), 1
            ),
            TypeError,
            "write J.to_rows()",
        ),
        (
            lambda: weightings.excess_mtl(1.0).update(
                jnp.ones((2, 3)), weightings.excess_mtl(1.0).init(jnp.ones((2, 2)))
            ),
            ValueError,
            "init(rows)",
        ),
        (
            lambda: weightings.combined_value_and_grad(
                lambda p: p, weightings.cr_mogm(weightings.mgda)
            ),
            TypeError,
            "w.update(gram, state)",
        ),
        (lambda: weightings.fairgrad(jnp.eye(2), 0.0), ValueError, "alpha must be"),
        (
            lambda: weightings.nash_mtl(jnp.eye(2), max_norm=0.0),
            ValueError,
            "max_norm must be above",
        ),
        (
            lambda: weightings.aligned_mtl(jnp.eye(2), scale_mode="max"),
            ValueError,
            "scale_mode must be one of",
        ),
        (lambda: weightings.pcgrad(jnp.eye(2), 3), TypeError, "key must be one PRNG"),
        (lambda: weightings.krum(jnp.eye(3), 1), ValueError, "at least 4 losses"),
        (lambda: weightings.krum(jnp.eye(3), 0, 4), ValueError, "at most 3"),
        (lambda: weightings.krum(jnp.eye(3), 0.5), TypeError, "must be an int"),
        (lambda: weightings.gradvac(KEY, decay=1.5), ValueError, "at most 1"),
        (
            lambda: weightings.gradvac(KEY).update(
                jnp.eye(3), weightings.gradvac(KEY).init(2)
            ),
            ValueError,
            "init(3)",
        ),
        (
            lambda: weightings.modo(0.1).update(jnp.eye(3), jnp.ones(2)),
            ValueError,
            "init(3)",
        ),
        (lambda: weightings.cr_mogm(weightings.mgda).init(0), ValueError, "at least 1"),
        (lambda: weightings.cr_mogm("mgda"), TypeError, "function of a Gramian"),
        (lambda: weightings.trimmed_mean(jnp.ones((4, 2)), 2), ValueError, "nothing"),
        (
            lambda: weightings.graddrop([jnp.ones((2, 1)), jnp.ones((3, 1))], KEY),
            ValueError,
            "one first axis",
        ),
        (lambda: weightings.graddrop(jnp.ones((2, 1), int), KEY), TypeError, "to_rows"),
        (lambda: weightings.graddrop(jnp.ones(()), KEY), ValueError, "is a scalar"),
        (
            lambda: weightings.combined_value_and_grad(
                lambda p: [p.sum(), p.sum()], weightings.sum
            )(jnp.ones(2)),
            TypeError,
            "jnp.stack",
        ),
        (
            lambda: weightings.combined_value_and_grad(
                lambda p: p.sum(), weightings.sum
            )(jnp.ones(2)),
            ValueError,
            "(K,), got shape ()",
        ),
        (
            lambda: weightings.combined_value_and_grad(
                lambda p: p, lambda gram: jnp.ones(3)
            )(jnp.ones(2)),
            ValueError,
            "must return 2 weights",
        ),
        (
            lambda: weightings.combined_value_and_grad(
                lambda p: p, lambda gram: (jnp.ones(2), None)
            )(jnp.ones(2)),
            ValueError,
            "has_aux=True",
        ),
        (
            lambda: weightings.combined_value_and_grad(None, weightings.sum),
            TypeError,
            "losses must be a function",
        ),
    ],
)  # fmt: skip
def test_errors(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)
