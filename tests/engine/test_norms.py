"""What norms are put together from: many leaves of one form, products of arrays, powers
of two.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose

from pytree_grads import jacobian
from pytree_grads._engine.einsum import dot, times_rows
from pytree_grads._engine.scaling import power, root_of

pytestmark = pytest.mark.any_release

N, LAYERS = 5, 6
MODES = {"kept": {}, "recomputed": {"recompute": True}, "chunks": {"chunk_size": 2}}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def gates(params, x):
    """Layers whose scales and biases are small vectors of one form."""
    for p in params:
        x = jnp.tanh(x * p["scale"] + p["bias"])
    return jnp.sum(x[:1]), jnp.sum(x)


def problem():
    keys = jax.random.split(jax.random.key(3), 2 * LAYERS + 1)
    scales = [jax.random.normal(key, (3,)) for key in keys[:LAYERS]]
    params = [{"scale": x, "bias": jnp.full(3, 0.1 * i)} for i, x in enumerate(scales)]
    return params, jax.random.normal(keys[-1], (N, 3))


def loss(params, x):
    return gates(params, x)[1]


def norms_of(rows):
    squares = [jnp.sum(r**2, axis=-1) for r in jax.tree.leaves(rows)]
    return jnp.sqrt(sum(squares))


@modes
class TestManySmallVectors:
    @pytest.mark.parametrize("fun", [loss, gates])
    def test_norms_and_clips(self, mode, fun, x64):
        params, x = problem()
        rows = jax.vmap(jax.jacrev(fun), (None, 0))(params, x)
        bounds = [0.02 * (i + 1) for i in range(LAYERS)]  # of scale and bias together

        @jax.jit
        def of(params, x):
            J = jacobian(fun, **mode)(params, x)
            return J.norms(), J.clip(0.1).to_rows(), J.clip(bounds).to_rows()

        norms, clipped, by_layer = of(params, x)

        def check(norms, clipped, by_layer, rows):
            assert tree_allclose(norms, norms_of(rows))
            assert tree_allclose(norms_of(clipped), np.minimum(norms_of(rows), 0.1))
            for layer, own, bound in zip(by_layer, rows, bounds, strict=True):
                factor = np.minimum(1, bound / norms_of(own))[:, None]
                assert tree_allclose(
                    layer, jax.tree.map(lambda r, f=factor: r * f, own)
                )

        if isinstance(norms, tuple):
            for parts in zip(norms, clipped, by_layer, rows, strict=True):
                check(*parts)
        else:
            check(norms, clipped, by_layer, rows)

    def test_a_bound_for_each_leaf_after_weights(self, mode, x64):
        params, x = problem()
        rows = jax.vmap(jax.grad(loss), (None, 0))(params, x)
        weights = jnp.arange(1.0, N + 1)
        bounds = jax.tree.map(lambda p: 0.05, params)

        @jax.jit
        def of(params, x):
            J = jacobian(loss, **mode)(params, x).scale(weights)
            return J.clip(bounds).norms(), J.clip(bounds).sum()

        def clipped(r):
            r = r * weights[:, None]
            return r * np.minimum(1, 0.05 / np.linalg.norm(r, axis=1))[:, None]

        want = jax.tree.map(clipped, rows)
        norms, sums = of(params, x)
        assert tree_allclose(norms, norms_of(want))
        assert tree_allclose(sums, jax.tree.map(lambda r: np.sum(r, axis=0), want))

    def test_they_are_worked_on_as_one(self, mode):
        """Two sums of squares for the scales and for the biases of all layers."""
        params, x = problem()

        def counted(params):
            norms = jax.make_jaxpr(lambda p, x: jacobian(loss, **mode)(p, x).norms())
            return str(norms(params, x)).count("name=_square_and_scale")

        assert counted(params) == counted(params[:4]) == counted(params[:1]) / 2 > 0

    def test_gradients_through_them(self, mode, x64):
        params, x = problem()

        def penalty(p):
            return jnp.sum(jacobian(loss, **mode)(p, x).norms())

        def plain(p):
            return jnp.sum(norms_of(jax.vmap(jax.grad(loss), (None, 0))(p, x)))

        assert tree_allclose(
            jax.jit(jax.grad(penalty))(params), jax.grad(plain)(params)
        )


@modes
class TestTheRange:
    """What is representable is right, whatever its factors are."""

    def test_rows_in_and_out_of_the_range_of_squares(self, mode):
        x = jnp.array([[3.0, 4.0]]) * jnp.array([[1.0], [1e-30], [1e30], [0.0]])
        norms = jax.jit(
            lambda x: jacobian(lambda p, x: p @ x, **mode)(jnp.ones(2), x).norms()
        )
        assert tree_allclose(norms(x), jnp.array([5.0, 5e-30, 5e30, 0.0]), rtol=1e-6)
        assert norms(x[:1]) == 5

    def test_a_product_of_small_sizes_whose_norm_is_not_small(self, mode):
        def fun(p, x):
            a, b = (jnp.broadcast_to(number, (1000,)) for number in x)
            return a @ (p @ b)

        x = jnp.array([[1e-19, 9e-20], [1e-19, 1e-18], [1e19, 1e16]])
        norms = jax.jit(lambda p: jacobian(fun, **mode)(p, x).norms())(
            jnp.ones((1000, 1000))
        )
        assert tree_allclose(norms, jnp.array([9e-36, 1e-34, 1e38]), rtol=1e-5)

    @pytest.mark.parametrize("count", [1, 5])
    def test_factors_beyond_the_range_of_their_leaf(self, mode, count, x64):
        def fun(ps, x):
            a, b = x
            return sum(a @ (p.astype(jnp.float64) @ b) for p in ps)

        def twice(ps, x):  # in pieces of its own
            a, b = x
            return fun(ps, x) + sum(b @ (p.astype(jnp.float64).T @ a) for p in ps)

        sizes = 10.0 ** np.array([[60, -60], [-60, 60], [-25, 25], [20, 15]])
        x = np.arange(1.0, 7.0).reshape(1, 2, 3) * sizes[:, :, None]
        params = [jnp.ones((3, 3), jnp.float32)] * count
        for f, factor, rows in ((fun, 1, x), (twice, 2, x[2:])):
            norms = jax.jit(lambda p, x, f=f: jacobian(f, **mode)(p, x).norms())(
                params, rows
            )
            assert norms.dtype == np.float32
            want = factor * count**0.5 * np.prod(np.linalg.norm(rows, axis=2), axis=1)
            assert tree_allclose(norms, want.astype(np.float32), rtol=1e-5)


def over_a_scan(p, x, c):
    """A matrix for each step: blocks of a stacked weight."""

    def step(total, xs):
        w, x, c = xs
        return total + jnp.sum((x @ w) * c), None

    return jax.lax.scan(step, jnp.zeros((), x.dtype), (p, x, c))[0]


def of_experts(p, x, c):
    return jnp.sum(jnp.einsum("em,emn->en", x, p) * c)


def of_positions(p, x, c):
    """Pairs that cancel: the signs of the second position are those of the first,
    turned.
    """
    return jnp.sum((x @ p[0]) * c)


def of_a_weight_twice(p, x, c):
    """Two pieces of one leaf, one of them through a slice."""
    return jnp.sum((x[0] @ p[0]) * c[0]) + jnp.sum((x[1, :4] @ p[0, :4]) * c[1])


def of_windows(p, x, c):
    """A kernel of two offsets whose second window has the large image and the small
    cotangent.
    """
    image = jnp.concatenate([x, x[:1]])[None]
    numbers = ("NWC", "WIO", "NWC")
    out = jax.lax.conv_general_dilated(
        image, p, (1,), "VALID", dimension_numbers=numbers
    )
    return jnp.sum(out[0] * c)


@modes
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ratio", [1e10, 1e18])
@pytest.mark.parametrize(
    "fun", [over_a_scan, of_experts, of_positions, of_a_weight_twice, of_windows]
)
def test_factors_that_share_the_size_of_a_row_in_opposite_ways(fun, ratio, dtype, mode):
    """One is large where the other is small, in one block or position, and the other
    way round.
    """
    keys = jax.random.split(jax.random.key(0), 2)
    share = jnp.array([ratio, 1 / ratio]).reshape(1, 2, 1)
    x = (jax.random.normal(keys[0], (N, 2, 12)) * share).astype(dtype)
    c = (jax.random.normal(keys[1], (N, 2, 10)) / share).astype(dtype)
    p = jnp.zeros((2, 12, 10), dtype)
    wide = [np.asarray(x.astype("float32"), "float64") for x in (p, x, c)]
    with jax.enable_x64(True):
        rows = jax.vmap(jax.grad(fun), (None, 0, 0))(*map(jnp.asarray, wide))
        want = np.asarray(jnp.sqrt(jnp.sum(rows**2, (1, 2, 3))))
    J = jacobian(fun, **mode)(p, x, c)
    tolerance = 1e-5 if dtype == "float32" else 2e-2
    np.testing.assert_allclose(J.norms(), want, rtol=tolerance)
    np.testing.assert_allclose(J.clip(0.5).norms(), 0.5, rtol=tolerance)
    clipped = np.asarray(J.clip(0.5).to_rows().astype("float32"), "float64")
    np.testing.assert_allclose(
        np.sqrt(np.sum(clipped**2, (1, 2, 3))), 0.5, rtol=2 * tolerance
    )


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "fun", [over_a_scan, of_experts, of_positions, of_a_weight_twice]
)
def test_a_factor_of_the_smallest_normal_number_is_not_zero(fun, dtype, x64):
    limits = jnp.finfo(dtype)
    x = jnp.full((N, 2, 12), limits.tiny, dtype)
    c = jnp.full((N, 2, 12), 2.0 ** (limits.maxexp - 1), dtype)  # times tiny: 2
    J = jacobian(fun)(jnp.zeros((2, 12, 12), dtype), x, c)
    want = jnp.linalg.norm(J.to_rows().reshape(N, -1), axis=1)
    assert want[0] > 24
    np.testing.assert_allclose(J.norms(), want, rtol=1e-6)
    np.testing.assert_allclose(J.clip(1.0).norms(), 1, rtol=1e-6)


@pytest.mark.parametrize("zero", ["blocks", "rows"])
def test_factors_that_are_zero_where_the_other_is_large(zero):
    """What is zero has no part in the scale of what is not."""
    x, c = jnp.full((N, 2, 12), 1e-12), jnp.full((N, 2, 10), 1e-3)
    x = x.at[:, 0].set(0) if zero == "blocks" else jnp.zeros_like(x)
    c = c.at[:, 0].set(1e38)
    for fun in (over_a_scan, of_experts, of_positions):
        norms = jacobian(fun)(jnp.zeros((2, 12, 10)), x, c).norms()
        want = 0 if zero == "rows" else 1e-15 * np.sqrt(120)
        np.testing.assert_allclose(norms, want, rtol=1e-5)


@modes
def test_rows_that_are_nan_after_a_clip_have_no_infinite_norm(mode):
    x = jnp.array([[jnp.inf, 1.0], [1.0, 2.0]])
    clipped = jacobian(lambda p, x: jnp.sum(p * x), **mode)(jnp.ones(2), x).clip(1.0)
    assert tree_allclose(clipped.norms(), jnp.array([jnp.nan, 1.0]))


@modes
def test_no_tracer_is_left_behind(mode):
    x = jnp.array([[1.0, 1.0], [1.0, 2.0]])
    with jax.check_tracer_leaks():
        norms = jax.jit(
            lambda p: jacobian(lambda p, x: jnp.sum(p * x), **mode)(p, x).norms()
        )
        assert tree_allclose(norms(jnp.ones(2)), jnp.sqrt(jnp.array([2.0, 5.0])))


WIDE = {"bfloat16": "float32", "float32": "float32", "complex64": "complex64"}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize(
    "spec",
    [
        "ip,jp->ij",
        "ip,p->i",
        "btm,btn->bmn",
        "bn,bn->b",
        "btm,bsm->bts",
        "zn,zm->mn",
        "bts,bsn->btn",
    ],
)
def test_dot_is_einsum(spec, dtype):
    sizes = dict(zip("ijpbtsmnz", range(2, 11), strict=True))
    keys = jax.random.split(jax.random.key(0), 2)
    x, y = (
        jax.random.normal(key, [sizes[c] for c in letters], WIDE[dtype]).astype(dtype)
        for key, letters in zip(keys, spec.split("->")[0].split(","), strict=True)
    )
    wide = jnp.dtype(WIDE[dtype])
    found = dot(spec, x, y)
    assert found.dtype == wide
    assert tree_allclose(
        found, jnp.einsum(spec, x.astype(wide), y.astype(wide)), rtol=1e-5
    )
    mixed = dot(spec, x, y.astype(wide))
    assert mixed.dtype == wide
    assert tree_allclose(
        mixed, jnp.einsum(spec, x.astype(wide), y.astype(wide)), rtol=1e-5
    )


def test_times_rows():
    x = jnp.arange(24.0).reshape(2, 3, 4)
    assert tree_allclose(
        times_rows(x, jnp.arange(3.0), 1), x * jnp.arange(3.0)[None, :, None]
    )
    assert tree_allclose(times_rows(x, x[..., 0], 0), x * x[:, :, :1])
    assert tree_allclose(times_rows(x, jnp.float32(2), 0), 2 * x)


def scales_of_all_sizes(scale_of, dtype):
    """Numbers from the least normal one to the largest, and their scales: powers of
    two.
    """
    limits = np.finfo(dtype)
    ends = [float(limits.tiny), 1.0, 2.0, float(limits.max)]
    sizes = np.array(
        [*ends, *2.0 ** np.linspace(limits.minexp, limits.maxexp - 1e-6, 999)]
    )
    sizes = sizes.astype(dtype)
    scales = np.asarray(scale_of(jnp.asarray(sizes)))
    assert scales.dtype == dtype
    assert np.all(np.frexp(scales)[0] == 0.5)
    return sizes, scales


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_powers_are_exact_and_bring_every_float_near_one(dtype, x64):
    sizes, scales = scales_of_all_sizes(power, dtype)
    near = sizes * scales * scales
    assert np.all((near >= 1) & (near < 4))
    assert np.all(np.isfinite(1 / scales / scales))
    assert np.isinf(1 / power(jnp.asarray(np.inf, dtype)) ** 2)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_scales_of_squares_are_exact_and_bring_every_norm_near_one(dtype, x64):
    limits = np.finfo(dtype)
    squares, scales = scales_of_all_sizes(root_of, dtype)
    near = np.sqrt(squares) * scales * scales
    assert np.all((near >= 0.5) & (near <= 2))
    # Too small, of entries that may be normal numbers; too large, of entries that are
    # finite.
    smallest, largest = root_of(jnp.asarray([0, np.inf], dtype))
    assert (limits.tiny * smallest * smallest) ** 2 >= limits.tiny
    assert np.isfinite(2.0**40 * (limits.max * largest * largest) ** 2)
    assert largest * largest >= limits.tiny


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_leaves_of_two_dtypes_whose_factors_are_of_both(x64, chunk_size):
    """A wide weight between narrow ones: the factors of a leaf are then of different
    widths.
    """

    def fun(p, x):
        return (jnp.tanh(x @ p["w"] + p["b"]) @ p["v"]) ** 2

    params = {
        "w": jnp.ones((5, 4)),
        "b": jnp.ones(4, "float32"),
        "v": jnp.ones(4, "float32"),
    }
    x = jnp.linspace(-1, 1, 35, dtype="float32").reshape(7, 5)
    with jax.numpy_dtype_promotion("standard"):
        rows = jax.vmap(jax.grad(fun), (None, 0))(params, x)
        J = jacobian(fun, chunk_size=chunk_size)(params, x)
        sums, norms = J.clip(1.5).sum(), J.norms()
    flat = np.concatenate(
        [np.float64(r).reshape(7, -1) for r in jax.tree.leaves(rows)], 1
    )
    want = np.linalg.norm(flat, axis=1)
    np.testing.assert_allclose(norms, want, rtol=1e-6)
    factors = np.minimum(1, 1.5 / want)
    np.testing.assert_allclose(
        sums["w"], np.tensordot(factors, rows["w"], 1), rtol=1e-5
    )
