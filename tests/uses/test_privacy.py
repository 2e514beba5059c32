"""Clipped gradients, sensitivities and noise are those of jax_privacy."""

import contextlib
import dataclasses
import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import tree_allclose

from pytree_grads import jacobian, per_example_grad, privacy

pytestmark = pytest.mark.any_release

reason = "the extra `privacy` is not installed"
jax_privacy = pytest.importorskip("jax_privacy", reason=reason)
dp_accounting = pytest.importorskip("dp_accounting", reason=reason)
Relation = dp_accounting.NeighboringRelation

PARAMS = {"w": jnp.linspace(-1.0, 1.0, 15).reshape(5, 3), "v": jnp.ones(3)}
XS = jax.random.normal(jax.random.key(0), (16, 5))
YS = jnp.arange(16.0) % 2
PADDING = jnp.arange(16) >= 13


def of_batch(params, x, y):
    """A loss as functions of a batch have it, here of one example."""
    return jnp.mean((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2)


def with_aux(params, x, y):
    out = jnp.tanh(x @ params["w"]) @ params["v"]
    return jnp.mean((out - y) ** 2), {"out": out, "x": x}


def of_one(params, x, y):
    assert x.shape == (5,)
    return (jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2


def with_key(params, key, x, y):
    mask = jax.random.bernoulli(key, 0.5, (3,)).astype(jnp.float32)
    return jnp.mean(((jnp.tanh(x @ params["w"]) * mask[None]) @ params["v"] - y) ** 2)


BATCH = {"batch_argnums": (1, 2)}
CASES = {
    "sum": (of_batch, {"l2_clip_norm": 0.5, **BATCH}),
    "large bound": (of_batch, {"l2_clip_norm": 1e3, **BATCH}),
    "no bound": (of_batch, {"l2_clip_norm": float("inf"), **BATCH}),
    "bound of zero": (of_batch, {"l2_clip_norm": 0.0, **BATCH}),
    "mean": (of_batch, {"l2_clip_norm": 0.5, "normalize_by": 13.0, **BATCH}),
    "unit norm": (
        of_batch,
        {"l2_clip_norm": 0.5, "rescale_to_unit_norm": True, **BATCH},
    ),
    "unit norm, mean": (
        of_batch,
        {
            "l2_clip_norm": 0.5,
            "rescale_to_unit_norm": True,
            "normalize_by": 13.0,
            **BATCH,
        },
    ),
    "values and norms": (
        of_batch,
        {
            "l2_clip_norm": 0.5,
            "return_values": True,
            "return_grad_norms": True,
            **BATCH,
        },
    ),
    "norms": (of_batch, {"l2_clip_norm": 0.5, "return_grad_norms": True, **BATCH}),
    "aux": (with_aux, {"l2_clip_norm": 0.5, "has_aux": True, **BATCH}),
    "all three": (
        with_aux,
        {
            "l2_clip_norm": 0.5,
            "has_aux": True,
            "return_values": True,
            "return_grad_norms": True,
            **BATCH,
        },
    ),
    "one example": (of_one, {"l2_clip_norm": 0.5, "keep_batch_dim": False, **BATCH}),
    "microbatches": (of_batch, {"l2_clip_norm": 0.5, "microbatch_size": 4, **BATCH}),
    "microbatches, norms": (
        of_batch,
        {
            "l2_clip_norm": 0.5,
            "microbatch_size": 4,
            "return_values": True,
            "return_grad_norms": True,
            **BATCH,
        },
    ),
    "not safe": (of_batch, {"l2_clip_norm": 0.5, "nan_safe": False, **BATCH}),
    "dtype": (of_batch, {"l2_clip_norm": 0.5, "dtype": jnp.float32, **BATCH}),
    "keys": (
        with_key,
        {"l2_clip_norm": 0.5, "prng_argnum": 1, "batch_argnums": (2, 3)},
    ),
}
RELATIONS = [
    Relation.ADD_OR_REMOVE_ONE,
    Relation.REPLACE_ONE,
    Relation.REPLACE_SPECIAL,
]


@contextlib.contextmanager
def as_they_run():
    """jax_privacy promotes dtypes, and uses names that optax will drop."""
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
        warnings.simplefilter("ignore", DeprecationWarning)
        with jax.numpy_rank_promotion("allow"):
            yield


def arguments(fun):
    key = (jax.random.key(5),) if fun is with_key else ()
    return (PARAMS, *key, XS, YS)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("padding", [None, PADDING], ids=["full", "padded"])
def test_it_equals_jax_privacy(name, padding):
    fun, options = CASES[name]
    ours = privacy.clipped_grad(fun, **options)
    theirs = jax_privacy.clipped_grad(fun, **options)
    keywords = {} if padding is None else {"is_padding_example": padding}
    with as_they_run():
        expected = jax.jit(theirs)(*arguments(fun), **keywords)
    got = jax.jit(ours)(*arguments(fun), **keywords)
    assert ours.has_aux == theirs.has_aux
    if ours.has_aux:
        # Microbatches of padding alone, which jax_privacy leaves out, have no values.
        real = 13 if padding is not None and "microbatch_size" in options else 16
        assert type(got[1])._fields == type(expected[1])._fields
        tree_allclose(
            *(
                jax.tree.map(lambda x: x[:real], tuple(aux))
                for _, aux in (got, expected)
            ),
            rtol=1e-6,
        )
        got, expected = got[0], expected[0]
    tree_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_sensitivities_equal_those_of_jax_privacy(name):
    fun, options = CASES[name]
    ours = privacy.clipped_grad(fun, **options)
    theirs = jax_privacy.clipped_grad(fun, **options)
    for relation in RELATIONS:
        assert ours.sensitivity(relation) == theirs.sensitivity(relation)
        assert ours.sensitivity(relation.name.lower()) == ours.sensitivity(relation)
    assert ours.sensitivity() == theirs.sensitivity()


def test_several_arguments():
    def fun(w, v, x, y):
        return of_batch({"w": w, "v": v}, x, y)

    options = {"argnums": (0, 1), "batch_argnums": (2, 3), "l2_clip_norm": 0.5}
    args = (PARAMS["w"], PARAMS["v"], XS, YS)
    with as_they_run():
        expected = jax_privacy.clipped_grad(fun, **options)(*args)
    tree_allclose(privacy.clipped_grad(fun, **options)(*args), expected, rtol=1e-6)


def test_keyword_arguments_are_batches():
    def fun(params, x, *, y):
        return of_one(params, x, y)

    options = {"l2_clip_norm": 0.5, "keep_batch_dim": False}
    with as_they_run():
        expected = jax_privacy.clipped_grad(fun, **options)(PARAMS, XS, y=YS)
    got = privacy.clipped_grad(fun, **options)(PARAMS, XS, y=YS)
    tree_allclose(got, expected, rtol=1e-6)


# ---------------------------------------------------------------- what is ours alone


@pytest.mark.parametrize("rescale", [False, True])
def test_a_bound_for_each_part(rescale):
    bounds = {"w": 0.3, "v": 0.4}
    rows = per_example_grad(of_one)(PARAMS, XS, YS)

    def clipped(name):
        flat = rows[name].reshape(16, -1)
        scales = jnp.minimum(1, bounds[name] / jnp.linalg.norm(flat, axis=1))
        scales = scales / bounds[name] if rescale else scales
        return jnp.tensordot(scales, rows[name], 1) / 4

    ours = privacy.clipped_grad(
        of_one,
        l2_clip_norm=bounds,
        normalize_by=4.0,
        rescale_to_unit_norm=rescale,
        keep_batch_dim=False,
        return_grad_norms=True,
        **BATCH,
    )
    grad, aux = ours(PARAMS, XS, YS)
    tree_allclose(grad, {name: clipped(name) for name in rows}, rtol=1e-5)
    tree_allclose(aux.grad_norms, jax.vmap(optax.tree.norm)(rows), rtol=1e-5)
    np.testing.assert_allclose(ours.sensitivity(), (2**0.5 if rescale else 0.5) / 4)


@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
@pytest.mark.parametrize("options", [{}, {"normalize_by": 5.0}])
def test_the_sensitivity_bounds_what_an_example_moves(relation, options):
    """The sum and the mean, for each example that is left out or replaced."""
    clipped = privacy.clipped_grad(
        of_one, l2_clip_norm=0.5, keep_batch_dim=False, **options, **BATCH
    )
    whole = clipped(PARAMS, XS, YS)

    def moved(i):
        if relation == "add_or_remove_one":
            other = clipped(PARAMS, XS, YS, is_padding_example=jnp.arange(16) == i)
        else:
            other = clipped(PARAMS, XS.at[i].set(-9.0), YS.at[i].set(1 - YS[i]))
        return optax.tree.norm(jax.tree.map(jnp.subtract, whole, other))

    largest = max(float(moved(i)) for i in range(16))
    assert largest <= clipped.sensitivity(relation) * (1 + 1e-5)
    assert largest > 0.5 * clipped.sensitivity(relation)


def test_a_bad_row_counts_as_zero():
    clipped = privacy.clipped_grad(
        of_one, l2_clip_norm=0.5, keep_batch_dim=False, **BATCH
    )
    bad = XS.at[3, 0].set(jnp.nan)
    expected = clipped(PARAMS, XS, YS, is_padding_example=jnp.arange(16) == 3)
    tree_allclose(clipped(PARAMS, bad, YS), expected, rtol=1e-6)


def test_sums_of_narrow_gradients_in_a_wide_dtype():
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    xs, ys = XS.astype(jnp.bfloat16), YS.astype(jnp.bfloat16)
    clipped = privacy.clipped_grad(
        of_one, l2_clip_norm=0.5, keep_batch_dim=False, dtype=jnp.float32, **BATCH
    )
    grad = clipped(narrow, xs, ys)
    assert {x.dtype for x in jax.tree.leaves(grad)} == {jnp.dtype(jnp.float32)}
    rows = per_example_grad(of_one)(narrow, xs, ys)
    rows = jax.tree.map(lambda x: x.astype(jnp.float32), rows)
    norms = jax.vmap(optax.tree.norm)(rows)
    scales = jnp.minimum(1, 0.5 / norms)
    expected = jax.tree.map(lambda x: jnp.tensordot(scales, x, 1), rows)
    tree_allclose(grad, expected, rtol=2e-2)


def test_a_narrow_dtype_rounds_the_sum_alone():
    options = {"l2_clip_norm": 0.5, "keep_batch_dim": False, **BATCH}
    exact = privacy.clipped_grad(of_one, **options)(PARAMS, XS, YS)
    narrow = privacy.clipped_grad(of_one, dtype=jnp.bfloat16, **options)
    expected = jax.tree.map(lambda x: x.astype(jnp.bfloat16), exact)
    tree_allclose(narrow(PARAMS, XS, YS), expected, rtol=0)


def test_it_costs_what_the_clipped_sum_costs():
    clipped = privacy.clipped_grad(
        of_one, l2_clip_norm=0.5, keep_batch_dim=False, **BATCH
    )

    def by_hand(params, xs, ys):
        return jacobian(of_one)(params, xs, ys).clipped_sum(0.5, nan_safe=True)[0]

    def flops(fun):
        program = jax.jit(fun).lower(PARAMS, XS, YS).compile()
        return program.cost_analysis()["flops"]

    assert flops(clipped) <= 1.02 * flops(by_hand)


# ----------------------------------------------------------------------------- noise


def gradient(clipped):
    return clipped(PARAMS, XS, YS)


@pytest.mark.parametrize("options", [{}, {"normalize_by": 16.0}])
@pytest.mark.parametrize("relation", ["add_or_remove_one", "replace_one"])
def test_the_noise_fits_the_sensitivity(options, relation):
    clipped = privacy.clipped_grad(of_batch, l2_clip_norm=0.5, **options, **BATCH)
    noise = privacy.gaussian(
        clipped, 1.3, jax.random.key(0), neighboring_relation=relation
    )
    zeros = jnp.zeros(200_000)
    drawn, _ = noise.update(zeros, noise.init(zeros))
    expected = 1.3 * 0.5 * (2 if relation == "replace_one" else 1)
    expected /= options.get("normalize_by", 1.0)
    np.testing.assert_allclose(drawn.std(), expected, rtol=0.01)
    assert abs(float(drawn.mean())) < 0.02 * expected


def test_the_noise_is_that_of_jax_privacy():
    clipped = privacy.clipped_grad(of_batch, l2_clip_norm=0.5, **BATCH)
    ours = privacy.gaussian(clipped, 1.3, jax.random.key(7))
    theirs = jax_privacy.noise_addition.gaussian_privatizer(
        stddev=1.3 * clipped.sensitivity(), prng_key=jax.random.key(7)
    )
    states = [x.init(PARAMS) for x in (ours, theirs)]
    for _ in range(3):
        got, states[0] = ours.update(gradient(clipped), states[0])
        with as_they_run():
            expected, states[1] = theirs.update(gradient(clipped), states[1])
        tree_allclose(got, expected, rtol=1e-6)


def test_steps_get_noise_of_their_own():
    clipped = privacy.clipped_grad(of_batch, l2_clip_norm=0.5, **BATCH)
    noise = privacy.gaussian(clipped, 1.0, jax.random.key(0))
    first, state = noise.update(PARAMS, noise.init(PARAMS))
    second, _ = noise.update(PARAMS, state)
    assert not np.allclose(first["w"], second["w"])


def test_one_step_of_jax_privacy_and_ours():
    """Their clip with our noise, ours with theirs, in one chain with optax."""
    key = jax.random.key(3)
    options = {"l2_clip_norm": 0.5, "normalize_by": 13.0, **BATCH}
    results = []
    for clipped in (
        privacy.clipped_grad(of_batch, **options),
        jax_privacy.clipped_grad(of_batch, **options),
    ):
        theirs = jax_privacy.noise_addition.gaussian_privatizer(
            stddev=1.1 * clipped.sensitivity(), prng_key=key
        )
        for noise in (privacy.gaussian(clipped, 1.1, key), theirs):
            optimizer = optax.chain(noise, optax.adam(0.1))
            with as_they_run():
                grad = clipped(PARAMS, XS, YS, is_padding_example=PADDING)
                state = optimizer.init(PARAMS)
                updates, _ = optimizer.update(grad, state, PARAMS)
                results.append(optax.apply_updates(PARAMS, updates))
    for other in results[1:]:
        tree_allclose(other, results[0], rtol=1e-6)


def test_it_drops_into_an_execution_plan():
    from jax_privacy.experimental import execution_plan

    with as_they_run():
        config = execution_plan.BandMFExecutionPlanConfig.default(
            num_bands=1, iterations=10, epsilon=1.0, delta=1e-5,
            sampling_prob=0.1, normalize_by=13.0, noise_seed=0,
        )  # fmt: skip
        plan = config.plan
    ours = functools.partial(
        privacy.clipped_grad,
        l2_clip_norm=config.l2_clip_norm,
        normalize_by=config.normalize_by,
        rescale_to_unit_norm=config.rescale_to_unit_norm,
        dtype=config.dtype,
    )
    results = []
    for each in (plan, dataclasses.replace(plan, clipped_grad=ours)):
        with as_they_run():
            clipped = each.clipped_grad(of_batch, **BATCH)
            grad = clipped(PARAMS, XS, YS, is_padding_example=PADDING)
            noise = each.noise_addition_transform
            results.append(noise.update(grad, noise.init(PARAMS))[0])
    tree_allclose(results[1], results[0], rtol=1e-6)


@pytest.mark.parametrize(
    "multiplier, steps, rdp, pld",
    [
        (1.3, 3515, 0.954, 0.864),
        (1.1, 14062, 2.597, 2.382),
        (0.7, 10546, 6.319, 5.639),
    ],
)
def test_accounting(multiplier, steps, rdp, pld):
    """dp-accounting's ε for batches of 256 of 60,000, as the page on privacy says."""
    step = dp_accounting.PoissonSampledDpEvent(
        256 / 60000, dp_accounting.GaussianDpEvent(multiplier)
    )
    event = dp_accounting.SelfComposedDpEvent(step, steps)
    for accountant, expected in (
        (dp_accounting.rdp.RdpAccountant(), rdp),
        (dp_accounting.pld.PLDAccountant(), pld),
    ):
        epsilon = accountant.compose(event).get_epsilon(1e-5)
        assert epsilon == pytest.approx(expected, abs=6e-4)


# ------------------------------------------------------------------------------- errors


def make(**options):
    return privacy.clipped_grad(of_batch, **{"l2_clip_norm": 0.5, **BATCH, **options})


KEY = jax.random.key(0)


@pytest.mark.parametrize(
    "call, kind, words",
    [
        (lambda: make(l2_clip_norm=-1.0), ValueError, "must not be negative"),
        (lambda: make(l2_clip_norm=float("nan")), ValueError, "negative or NaN"),
        (lambda: make(l2_clip_norm={"w": 1.0, "v": -1.0}), ValueError, "negative"),
        (lambda: make(l2_clip_norm={}), ValueError, "no bound"),
        (lambda: make(l2_clip_norm=jnp.ones(2)), TypeError, "an array of shape (2,)"),
        (
            lambda: jax.jit(lambda c: make(l2_clip_norm=c)(PARAMS, XS, YS))(0.5),
            TypeError,
            "static real number",
        ),
        (
            lambda: make(l2_clip_norm=0.0, rescale_to_unit_norm=True),
            ValueError,
            "must be positive",
        ),
        (
            lambda: make(l2_clip_norm={"w": 1.0})(PARAMS, XS, YS),
            ValueError,
            "l2_clip_norm must be a number, or a prefix tree",
        ),
        (lambda: make(microbatch_size=0), ValueError, "microbatch_size must be an int"),
        (lambda: make(dtype=int), TypeError, "dtype must be a floating-point dtype"),
        (lambda: make(l2_clip_norm="a"), TypeError, "l2_clip_norm must be a static"),
        (lambda: make(l2_clip_norm=True), TypeError, "l2_clip_norm must be a static"),
        (lambda: make(normalize_by=0.0), ValueError, "normalize_by must be above 0"),
        (lambda: make(normalize_by="1"), TypeError, "normalize_by must be a static"),
        (
            lambda: privacy.clipped_grad(lambda p, x: x @ p["w"], l2_clip_norm=0.5)(
                PARAMS, XS
            ),
            TypeError,
            "got shape (1, 3), of which every entry would be clipped by itself; fun "
            "sees a batch of one example",
        ),
        (
            lambda: privacy.clipped_grad(
                lambda p, x: x @ p["w"], l2_clip_norm=0.5, keep_batch_dim=False
            )(PARAMS, XS),
            TypeError,
            "got shape (3,), of which every entry would be clipped by itself; return",
        ),
        (lambda: make(batch_argnums=()), ValueError, "at least one"),
        (lambda: make(batch_argnums=0), ValueError, "different arguments"),
        (lambda: make(batch_argnums=-1), ValueError, "must not be negative"),
        (lambda: make(batch_argnums=7)(PARAMS, XS, YS), ValueError, "argument 7"),
        (lambda: privacy.clipped_grad(3, l2_clip_norm=1.0), TypeError, "a function"),
        (
            lambda: make()(PARAMS, XS, YS, is_padding_example=PADDING[:5]),
            ValueError,
            "must have shape (16,)",
        ),
        (
            lambda: make()(PARAMS, XS, YS, is_padding_example=jnp.ones(16)),
            TypeError,
            "must hold bools",
        ),
        (lambda: make().sensitivity("other"), ValueError, "'replace_one'"),
        (lambda: privacy.gaussian(of_batch, 1.0, KEY), TypeError, "clipped_grad"),
        (lambda: privacy.gaussian(make(), -1.0, KEY), ValueError, "must be ≥ 0"),
        (lambda: privacy.gaussian(make(), "1", KEY), TypeError, "a static real number"),
        (lambda: privacy.gaussian(make(), np.inf, KEY), ValueError, "≥ 0 and finite"),
        (lambda: privacy.gaussian(make(), 1.0, 0), TypeError, "one PRNG key"),
        (
            lambda: privacy.gaussian(make(), 1.0, jax.random.split(KEY)),
            TypeError,
            "one PRNG key",
        ),
        (
            lambda: privacy.gaussian(make(), 1.0, KEY).update(
                [jnp.ones(2, int)], (KEY, ())
            ),
            TypeError,
            "gradient[0] must be a floating-point array, got int32",
        ),
        (
            lambda: privacy.gaussian(make(l2_clip_norm=float("inf")), 1.0, KEY),
            ValueError,
            "sensitivity is inf",
        ),
        (
            lambda: privacy.gaussian(make(), 1.0, KEY).update(
                {"w": jnp.ones(2, complex)}, (KEY, ())
            ),
            TypeError,
            "['w'] is complex",
        ),
    ],
)
def test_errors(call, kind, words):
    with pytest.raises(kind) as error:
        call()
    assert words in str(error.value)
