"""Rows that are hard on floating point: NaN, zero, huge, tiny and cancelling rows, and
sketches.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import equations, tree_allclose
from rows import Rows

from pytree_grads import jacobian

pytestmark = pytest.mark.any_release

N = 5
MODES = {"kept": {}, "recomputed": {"recompute": True}, "chunks": {"chunk_size": 2}}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
KEYS = jax.random.split(jax.random.key(5), 8)


def network(p, x, tokens):
    """Terms of every kind: outer with T = 1 and T = 2, scatter, a tie, dense
    vectors.
    """
    h = jnp.tanh(x @ p["w"] + p["b"][None])  # (2, 9)
    h = h + p["table"][tokens]
    return jnp.sum(jnp.sin(h @ p["table"].T)) + jnp.sum(h[0] @ p["v"])


def problem():
    shapes = {"w": (9, 9), "b": (9,), "table": (30, 9), "v": (9, 9)}
    params = {
        name: 0.3 * jax.random.normal(key, shape)
        for (name, shape), key in zip(shapes.items(), KEYS, strict=False)
    }
    x = jax.random.normal(KEYS[5], (N, 2, 9))
    return params, x, jax.random.randint(KEYS[6], (N, 2), 0, 30)


def stacked(p, x, tokens):
    return jax.vmap(jax.grad(network), (None, 0, 0))(p, x, tokens)


def total(rows, where):
    return jax.tree.map(lambda r: jnp.sum(r[where], axis=0), rows)


class TestRowsThatAreNotFinite:
    @modes
    def test_they_stay_alone_and_can_be_left_out(self, mode):
        params, x, tokens = problem()
        rows = stacked(params, x, tokens)
        x = x.at[1, 0, 2].set(jnp.inf).at[3, 0, 2].set(jnp.nan)
        good, bad = np.array([0, 2, 4]), np.array([1, 3])

        @jax.jit
        def of(params, x, tokens):
            J = jacobian(network, **mode)(params, x, tokens)
            safe = J.clip(0.9, nan_safe=True)
            loose = J.clip(1e9, nan_safe=True)
            sums = (
                loose.sum(),
                loose.weighted_sum(jnp.ones(N)),
                loose.square_sum(),
                J.sum(),
            )
            return (
                J.norms(),
                safe.norms(),
                loose.gram(),
                loose @ params,
                sums,
                safe.to_rows(),
            )

        norms, safe, gram, slopes, sums, clipped = of(params, x, tokens)
        flat = np.concatenate(
            [np.reshape(r, (N, -1)) for r in jax.tree.leaves(rows)], axis=1
        )
        expected = np.linalg.norm(flat, axis=1)
        np.testing.assert_allclose(norms[good], expected[good], rtol=1e-5)
        assert not np.any(np.isfinite(norms[bad]))
        np.testing.assert_allclose(
            safe[good], np.minimum(expected, 0.9)[good], rtol=1e-5
        )
        flat[bad] = 0
        np.testing.assert_allclose(gram, flat @ flat.T, atol=1e-5 * expected.max() ** 2)
        direction = np.concatenate([np.ravel(p) for p in jax.tree.leaves(params)])
        np.testing.assert_allclose(
            slopes, flat @ direction, atol=1e-5 * np.abs(slopes).max()
        )
        assert tree_allclose(sums[0], total(rows, good))
        assert tree_allclose(sums[1], total(rows, good))
        assert tree_allclose(sums[2], total(jax.tree.map(jnp.square, rows), good))
        assert not np.all(np.isfinite(sums[3]["w"]))
        assert all(np.all(leaf[bad] == 0) for leaf in jax.tree.leaves(clipped))

    @pytest.mark.parametrize("chunk_size", [None, 2, 3])
    def test_an_infinite_row_makes_an_infinite_sum(self, chunk_size):
        """Wherever it is: in two chunks, with a weight of 0 in one of them, it would be
        NaN.
        """

        @jax.jit
        def of(x):
            J = jacobian(
                lambda p, x: jnp.sqrt(p - x), chunk_size=chunk_size, recompute=True
            )
            return J(jnp.ones(()), x).sum(), J(jnp.ones(()), x).weighted_sum(
                jnp.full(N, 2.0)
            )

        for i in range(N):
            assert of(jnp.zeros(N).at[i].set(1.0)) == (jnp.inf, jnp.inf)

    @modes
    def test_one_bad_output_leaves_the_others_of_its_example(self, mode):
        def pair(p, x, scale):
            h = jnp.tanh(x @ p["w"])
            return jnp.stack(
                [jnp.sum(h), h[0] * scale * scale]
            )  # overflows, but 0 stays 0

        params, x, _ = problem()
        args = params, x[:, 0], jnp.array([1.0, 2.0, 1e30, 3.0, 4.0])

        @jax.jit
        def of(*args):
            J = jacobian(pair, **mode)(*args).clip(1e9, nan_safe=True)
            return J.sum()["w"], J.norms()

        rows = jax.vmap(jax.jacrev(pair), (None, 0, 0))(*args)["w"]
        rows = jnp.where(jnp.isfinite(rows).all((2, 3), keepdims=True), rows, 0)
        got, norms = of(*args)
        assert tree_allclose(got, rows.sum((0, 1)))
        assert norms[2, 1] == 0 < norms[2, 0]


class TestSizes:
    @modes
    @pytest.mark.parametrize("scale", [1e15, 1e-15, 1e30, 1e-30])
    def test_huge_and_tiny_rows_clip_right(self, mode, scale):
        params, x, tokens = problem()
        scales = jnp.where(jnp.arange(N) % 2 == 0, jnp.float32(scale), jnp.float32(1.0))

        def scaled(p, x, tokens, scale):
            return network(p, x, tokens) * scale

        @jax.jit
        def of(*args):
            J = jacobian(scaled, **mode)(*args)
            own = {"w": scale, "b": 1.0, "table": 2 * scale, "v": 0.5}
            return (
                J.norms(),
                J.clip(0.5).to_rows(),
                J.clip(own).weighted_sum(jnp.ones(N)),
            )

        norms, clipped, each = of(params, x, tokens, scales)
        with jax.enable_x64(True):
            wide = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, x))
            rows = stacked(*wide, tokens)
            scales = np.asarray(scales, np.float64)
            rows = jax.tree.map(lambda r: np.asarray(r).swapaxes(0, -1) * scales, rows)
            rows = jax.tree.map(lambda r: r.swapaxes(0, -1), rows)
        of_leaf = jax.tree.map(lambda r: np.linalg.norm(r.reshape(N, -1), axis=1), rows)
        expected = np.linalg.norm(jax.tree.leaves(of_leaf), axis=0)
        np.testing.assert_allclose(norms, expected, rtol=1e-5)
        bounds = {"w": scale, "b": 1.0, "table": 2 * scale, "v": 0.5}
        for name, row in rows.items():
            whole = np.minimum(1, 0.5 / expected)
            want = np.swapaxes(np.swapaxes(row, 0, -1) * whole, 0, -1)
            size = np.abs(want).reshape(N, -1).max(1).reshape(-1, *[1] * (row.ndim - 1))
            assert np.all(
                np.abs(np.asarray(clipped[name], np.float64) - want) <= 1e-5 * size
            )
            factor = np.minimum(1, bounds[name] / of_leaf[name])
            want = np.tensordot(factor, row, 1)
            np.testing.assert_allclose(each[name], want, atol=1e-5 * np.abs(want).max())

    @modes
    def test_norms_of_infinite_rows(self, mode):
        """An infinity makes an infinite norm."""
        bad = jnp.ones(3).at[1].set(jnp.inf).at[2].set(jnp.nan)
        x = jnp.ones((3, 2, 4)).at[:, 0, 0].set(bad)

        def f(p, x):
            return (
                jnp.sum(x @ p["pairs"]) + x[0] @ p["dense"] + jnp.sum(x[0] @ p["outer"])
            )

        @jax.jit
        def of(x):
            params = {
                "pairs": jnp.ones((4, 9)),
                "dense": jnp.ones(4),
                "outer": jnp.ones((4, 9)),
            }
            return jacobian(f, **mode)(params, x).norms()

        norms = of(x)
        assert tree_allclose(
            norms, jnp.array([np.sqrt(36 * 4 + 4 + 36), jnp.inf, jnp.nan])
        )

    @modes
    @pytest.mark.parametrize("width", [20, 500])
    def test_factors_whose_norms_are_no_numbers(self, mode, width):
        """A row may be ordinary though the norm of one of its factors is beyond the
        range.
        """
        left = jnp.array([1e38, 1e-37, 1e38, 0.0, 2e19, 1e-37, 1.0])
        right = jnp.array([1e-37, 1e38, 0.0, 1e38, 1e-37, 2e19, 2.0])

        @jax.jit
        def of(x, y):
            J = jacobian(lambda p, x, y: jnp.sum((x @ p) * y), **mode)(
                jnp.ones((width, 30)), x, y
            )
            return J.norms()

        norms = of(jnp.outer(left, jnp.ones(width)), jnp.outer(right, jnp.ones(30)))
        size = np.sqrt(width * 30)
        want = np.asarray(left, float) * np.asarray(right, float) * size
        np.testing.assert_allclose(norms, want, rtol=1e-5)

    @modes
    @pytest.mark.parametrize("steps", [1, 2])
    def test_norms_at_the_end_of_the_range(self, mode, steps):
        """What is no number of float32 any more is infinite, and never a row left as it
        is.
        """
        entries = jnp.array([1.0, 5e37 / steps, 1e38])  # of each step, 16 of them
        x = jnp.broadcast_to(jnp.sqrt(entries)[:, None, None], (3, steps, 4))

        def f(p, x, scale):
            return jnp.sum(x @ p["w"] * scale) + p["b"]

        @jax.jit
        def of(x):
            params = {"w": jnp.ones((4, 4)), "b": jnp.zeros(())}
            J = jacobian(f, **mode)(params, x, jnp.sqrt(entries))
            bounds = {"w": 1e3, "b": 1.0}
            return J.norms(), J.clip(1e3), J.clip(1e3, nan_safe=True), J.clip(bounds)

        norms, clipped, safe, each = of(x)
        assert tree_allclose(norms[:2], jnp.array([np.hypot(4.0 * steps, 1), 2e38]))
        rows, kept = clipped.to_rows(), safe.to_rows()
        assert tree_allclose(rows["w"][1], jnp.full((4, 4), 250.0))
        assert norms[2] == jnp.inf
        assert all(np.all(np.isnan(leaf[2])) for leaf in rows.values())
        assert all(np.all(leaf[2] == 0) for leaf in kept.values())
        assert np.all(np.isnan(each.sum()["w"]))
        assert each.sum()["b"] == 3

    @modes
    @pytest.mark.parametrize("entry", [3.2e38, 1.3e-38])
    def test_norms_whose_inverse_is_no_normal_number(self, mode, entry):
        @jax.jit
        def of(x):
            vectors = jacobian(lambda p, x: jnp.sum(p * x), **mode)(jnp.zeros(999), x)
            pairs = jacobian(lambda p, x: jnp.sum(x.reshape(3, 333) @ p), **mode)(
                jnp.zeros(333), x
            )
            return vectors.norms(), vectors.clip(entry / 2).norms(), pairs.norms()

        x = jnp.zeros((N, 999)).at[jnp.arange(N), 100 * jnp.arange(N)].set(entry)
        for found, expected in zip(of(x), (entry, entry / 2, entry), strict=True):
            if expected > jnp.finfo(jnp.float32).tiny:
                np.testing.assert_allclose(found, expected, rtol=2e-6)

    @modes
    def test_a_row_of_zeros_has_norm_zero_with_derivative_zero(self, mode):
        def f(p, x):
            return jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"] + x @ p["w"] @ p["w"].T)

        params = {"w": jnp.ones((9, 9)), "v": jnp.zeros((9, 9))}
        x = jnp.ones((N, 2, 9)).at[1].set(0)

        @jax.jit
        @jax.value_and_grad
        def of(params):
            J = jacobian(f, **mode)(params, x)
            return jnp.sum(J.norms()[1:2]) + sum(
                map(jnp.sum, J.clip(1.0)[1:2].sum().values())
            )

        value, slope = of(params)
        assert value == 0
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(slope))

    @modes
    def test_a_leaf_of_one_entry_with_derivative_zero(self, mode):
        """Where there is one entry, its scale is that of nothing but itself."""
        params = {"w": jnp.ones(3), "one": jnp.ones((1, 1))}

        def of_steps(params, x):
            def step(carry, x):
                return jnp.tanh(params["one"] @ carry + x @ params["w"]), carry

            last, carries = jax.lax.scan(step, jnp.zeros(1), x)
            return jnp.stack(
                [jnp.sum(last), jnp.sum(carries[1])]
            )  # by "one": only the first

        x = jnp.linspace(-1.0, 1.0, N * 6).reshape(N, 2, 3)
        norms = jax.jit(lambda *args: jacobian(of_steps, **mode)(*args).norms())(
            params, x
        )
        rows = jax.vmap(jax.jacrev(of_steps), (None, 0))(params, x)
        assert not rows["one"][:, 1].any()
        squares = [jnp.sum(r.reshape(N, 2, -1) ** 2, -1) for r in jax.tree.leaves(rows)]
        assert tree_allclose(norms, jnp.sqrt(sum(squares)), rtol=1e-6)

    def test_a_bound_of_zero_and_of_infinity(self):
        args = problem()
        J = jax.jit(jacobian(network))(*args)
        nothing, everything = jax.jit(
            lambda J: (J.clip(0.0).sum(), J.clip(jnp.inf).sum())
        )(J)
        assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(nothing))
        assert tree_allclose(everything, total(stacked(*args), slice(None)))

    @pytest.mark.parametrize("bound", [-1.0, float("nan")])
    def test_a_traced_bound_that_is_none_makes_rows_nan(self, bound):
        J = jacobian(network)(*problem())
        for nan_safe in (False, True):
            clip = jax.jit(lambda bound, safe=nan_safe: J.clip(bound, nan_safe=safe))
            clipped = clip(bound).sum()
            assert all(np.all(np.isnan(leaf)) for leaf in jax.tree.leaves(clipped))


PROBE = 2.0**-30


def probed(p, a, b):
    """Its row is Σₜ aₜ bₜᵀ, and beside it a number that tells by what a clip has
    multiplied.
    """
    return jnp.vdot(a @ p["w"], b).astype(jnp.float32) + p["probe"] * PROBE


def used_twice(p, a, b):
    """The same for T = 2, from two uses of the weight."""
    parts = jnp.vdot(a[0] @ p["w"], b[0]) + jnp.vdot(p["w"] @ b[1], a[1])
    return parts.astype(jnp.float32) + p["probe"] * PROBE


def in_a_scan(p, a, b):
    def step(total, ab):
        a, b = ab
        return total + jnp.vdot(a @ p["w"], b).astype(jnp.float32), None

    return jax.lax.scan(step, p["probe"] * PROBE, (a, b))[0]


@modes
@pytest.mark.parametrize("fun", [probed, used_twice, in_a_scan])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("left", [1e-6, 1e-4, 1e-2, 0.0])
def test_rows_that_cancel_keep_the_guarantee_of_clip(fun, dtype, left, mode):
    rng = np.random.default_rng(1)
    n, steps, width = 20, 2, 33
    a = np.repeat(rng.standard_normal((n, 1, width)), steps, axis=1)
    b = rng.standard_normal((n, steps, width))
    b[:, -1] = left * b[:, -1] - b[:, :-1].sum(1)
    a, b = jnp.asarray(a, dtype), jnp.asarray(b, dtype)
    params = {"w": jnp.zeros((width, width), dtype), "probe": jnp.float32(0)}

    @jax.jit
    def of(params, a, b, bound):
        J = jacobian(fun, **mode)(params, a, b)
        clipped = J.clip(bound).to_rows()
        return J.norms(), clipped["probe"] / PROBE, clipped["w"]

    exact = np.einsum(
        "nti,ntj->nij", np.asarray(a, np.float64), np.asarray(b, np.float64)
    )
    true = np.linalg.norm(exact, axis=(1, 2))
    for bound in (0.5 * np.median(true), 1e-9):
        norms, factors, rows = of(params, a, b, jnp.float32(bound))
        assert np.all(np.isfinite(norms))
        assert np.all(norms >= true * (1 - 1e-3))
        assert np.all(factors * true <= bound * (1 + 1e-3))
        # A row that leaves as bfloat16 is rounded once more.
        slack = 1e-3 if dtype == jnp.float32 else 2.0**-8
        wide = np.linalg.norm(np.asarray(rows, np.float64), axis=(1, 2))
        assert np.all(wide <= bound * (1 + slack))


@modes
@pytest.mark.parametrize("fun", [probed, used_twice, in_a_scan])
@pytest.mark.parametrize("far", [1e9, 1e10, 1e15])
def test_parts_whose_factors_lie_far_apart_keep_the_guarantee_of_clip(fun, far, mode):
    """Products of the small factors, divided by the large ones, are no numbers of
    float32.
    """
    rng = np.random.default_rng(3)
    sizes = np.array([far, 1 / far])[:, None]
    a, b = rng.standard_normal((2, N, 2, 33))
    a, b = jnp.asarray(a * sizes, jnp.float32), jnp.asarray(b / sizes, jnp.float32)
    params = {"w": jnp.zeros((33, 33)), "probe": jnp.float32(0)}

    @jax.jit
    def of(params, a, b):
        J = jacobian(fun, **mode)(params, a, b)
        return J.norms(), J.clip(1.0).to_rows()["w"]

    norms, rows = of(params, a, b)
    exact = np.einsum(
        "nti,ntj->nij", np.asarray(a, np.float64), np.asarray(b, np.float64)
    )
    assert np.all(norms >= np.linalg.norm(exact, axis=(1, 2)) * (1 - 1e-3))
    wide = np.linalg.norm(np.asarray(rows, np.float64), axis=(1, 2))
    assert np.all(wide <= 1 + 1e-3)


def two_outputs(p, x, tokens, size):
    """The second is of another row; both share the factors of the first layer."""
    with_bias = network({**p, "b": p["b"] + 0.1}, x, tokens)
    return size * jnp.stack([network(p, x, tokens), with_bias])


def one_output(p, x, tokens, size):
    h = x.reshape(1, 6, 3)
    windows = jax.lax.conv_general_dilated(
        h,
        p["w"].reshape(3, 3, 9),
        (1,),
        "SAME",
        dimension_numbers=("NHC", "HIO", "NHC"),
    )
    return size * (network(p, x, tokens) + jnp.sum(jnp.cos(windows)))


@modes
@pytest.mark.parametrize("fun", [one_output, two_outputs])
@pytest.mark.parametrize("size", [1e25, 1e-25])
def test_squares_of_weighted_rows_whose_own_are_out_of_range(fun, size, mode):
    """The products of `J.scale(s)` and `J.clip(b)` are those of rows that are near
    one.
    """
    args = problem()
    shape = (N, 2) if fun is two_outputs else (N,)
    differentiate = jax.jacrev if fun is two_outputs else jax.grad
    rows = jax.vmap(differentiate(fun), (None, 0, 0, None))(*args, 1.0)
    flat = np.concatenate([r.reshape(*shape, -1) for r in jax.tree.leaves(rows)], -1)
    weights = 1 + np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    J = jacobian(fun, **mode)(*args, jnp.full(N, size))
    cases = [
        (J.scale(weights).scale(jnp.full(shape, 1 / size)), weights[..., None] * flat)
    ]
    if size > 1:
        lengths = np.linalg.norm(flat, axis=-1, keepdims=True)
        cases.append((J.clip(2.0), 2 * flat / lengths))
    for weighted, right in cases:
        squares = [jnp.ravel(x) for x in jax.tree.leaves(weighted.square_sum())]
        right = right.reshape(-1, flat.shape[-1])
        gram = (right @ right.T).reshape(shape + shape)
        for got, want in (
            (jnp.concatenate(squares), np.sum(right**2, 0)),
            (weighted.gram(), gram),
        ):
            np.testing.assert_allclose(got, want, rtol=2e-4, atol=1e-5 * np.max(want))


@modes
def test_rows_of_a_tie_that_are_zero_or_tiny(mode):
    """Look-ups and products of one table, of examples that are masked, or nearly so."""
    params, x, tokens = problem()
    mask = jnp.array([1.0, 0.0, 1e-20, 1e-33, 1e-34])

    def masked(p, x, tokens, mask):
        return mask * network(p, x, tokens)

    same = jnp.broadcast_to(x[:1], x.shape), jnp.broadcast_to(tokens[:1], tokens.shape)
    norms = jacobian(
        lambda *args: masked({**params, "table": args[0]}, *args[1:]), **mode
    )(params["table"], *same, mask).norms()
    assert norms[1] == 0
    np.testing.assert_allclose(norms, norms[0] * mask, rtol=1e-5)


def test_norms_err_little_where_parts_cancel_little():
    rng = np.random.default_rng(2)
    a, b = (
        jnp.asarray(rng.standard_normal((200, 8, 65)), jnp.float32) for _ in range(2)
    )
    params = {"w": jnp.zeros((65, 65)), "probe": jnp.float32(0)}
    norms = jax.jit(lambda *args: jacobian(probed)(*args).norms())(params, a, b)
    exact = np.einsum(
        "nti,ntj->nij", np.asarray(a, np.float64), np.asarray(b, np.float64)
    )
    np.testing.assert_allclose(norms, np.linalg.norm(exact, axis=(1, 2)), rtol=2e-6)


class TestSketch:
    @modes
    def test_it_is_one_projection_for_every_batch(self, mode, x64):
        params, x, tokens = jax.tree.map(_wide, problem())
        dim, key = 7, jax.random.key(11)
        size = sum(p.size for p in jax.tree.leaves(params))

        def linear(p, row):
            return sum(jnp.vdot(p[name], row[name]) for name in p)

        def unflat(eye):
            cuts = np.cumsum([p.size for p in jax.tree.leaves(params)])[:-1]
            parts = zip(
                np.split(eye, cuts, axis=1), jax.tree.leaves(params), strict=True
            )
            return jax.tree.unflatten(
                jax.tree.structure(params), [e.reshape(-1, *p.shape) for e, p in parts]
            )

        @jax.jit
        def of(params, x, tokens):
            J = jacobian(network, **mode)(params, x, tokens)
            return (
                J.sketch(key, dim),
                J[2:4].sketch(key, dim),
                J.sketch(KEYS[0], dim),
                J.to_rows(),
            )

        basis = unflat(np.eye(size))
        projection = jax.jit(lambda p, e: jacobian(linear)(p, e).sketch(key, dim))(
            params, basis
        )
        np.testing.assert_allclose(np.abs(projection), dim**-0.5)
        assert abs(np.mean(np.sign(projection))) < 5 / np.sqrt(projection.size)
        sketches, some, others, rows = of(params, x, tokens)
        flat = np.concatenate(
            [np.reshape(r, (N, -1)) for r in jax.tree.leaves(rows)], axis=1
        )
        assert tree_allclose(sketches, flat @ np.asarray(projection))
        assert tree_allclose(some, sketches[2:4])
        assert not np.allclose(others, sketches)

    def test_inner_products_survive_and_are_unbiased(self):
        def f(p, x, z):
            return jnp.sum(jnp.sin(x @ p["w"])) + jnp.sum(jnp.real(z * p["z"]))

        params = {"w": jnp.ones((9, 3)) / 3, "z": jnp.ones(20, complex)}
        x = jax.random.normal(KEYS[0], (N, 9))
        z = jax.lax.complex(*jax.random.normal(KEYS[1], (2, N, 20)))

        @jax.jit
        def of(params, x, z):
            J = jacobian(f)(params, x, z)
            one = jax.vmap(lambda key: J.sketch(key, 32))(
                jax.random.split(KEYS[2], 200)
            )
            return J.gram(), jnp.einsum("sik,sjk->sij", one, one)

        gram, products = map(np.asarray, of(params, x, z))
        norms = np.sqrt(np.real(np.diag(gram)))
        allowed = np.sqrt(2 / 32) * np.outer(norms, norms)
        errors = products - np.real(gram)[None]
        assert np.all(np.abs(errors.mean(0)) < 5 * allowed / np.sqrt(200))
        assert np.all(errors.std(0) < 1.3 * allowed)


def _wide(x):
    return x.astype(float) if jnp.issubdtype(x.dtype, jnp.floating) else x


@pytest.mark.parametrize("name", ["dot_general", "conv_general_dilated"])
@pytest.mark.parametrize("precision", [None, jax.lax.Precision.HIGHEST])
def test_sums_of_rows_are_contracted_in_the_precision_that_the_function_asks_for(
    precision, name
):
    def fun(w, x):
        if name == "dot_general":
            return jnp.sum(jnp.tanh(jnp.dot(x, w, precision=precision)))
        x, w = x.T[None], w.T[..., None]
        return jnp.sum(jnp.tanh(jax.lax.conv(x, w, (1,), "SAME", precision=precision)))

    def total(w, x):
        return jacobian(fun)(w, x).sum()

    jaxpr = jax.make_jaxpr(total)(jnp.ones((9, 8)), jnp.ones((7, 2, 9)))
    asked = [
        e.params["precision"] for e in equations(jaxpr) if e.primitive.name == name
    ]
    assert len(asked) > 1
    assert asked[-1] in (precision, (precision, precision))


@modes
def test_rows_in_float32_where_float64_is_the_default(mode, x64):
    params, x, tokens = problem()
    params, x = jax.tree.map(lambda a: a.astype(jnp.float32), (params, x))

    @jax.jit
    def of(params, x, tokens):
        J = jacobian(network, **mode)(params, x, tokens)
        c = jnp.arange(N) / 3
        return J.sum(), J.scale(c).weighted_sum(c), stacked(params, x, tokens)

    sums, weighted, rows = of(params, x, tokens)
    squares = np.square(np.arange(N) / 3, dtype=np.float32)
    assert tree_allclose(sums, total(rows, slice(None)))
    assert tree_allclose(
        weighted, jax.tree.map(lambda r: np.tensordot(squares, r, 1), rows)
    )


@modes
@pytest.mark.parametrize("narrow", [jnp.bfloat16, jnp.float32])
def test_a_gramian_has_the_wider_dtype_on_either_side(mode, narrow, x64):
    params, x, tokens = jax.tree.map(_wide, problem())

    @jax.jit
    def of(params, x, tokens):
        J = jacobian(network, **mode)(params, x, tokens)
        small, y = jax.tree.map(lambda a: a.astype(narrow), (params, x[:3]))
        other = jacobian(network, **mode)(small, y, tokens[:3])
        return J.gram(other), other.gram(J), J.to_rows(), other.to_rows()

    left, right, rows, others = of(params, x, tokens)
    mine, theirs = (Rows.from_tree(jax.tree.map(_wide, r)) for r in (rows, others))
    assert left.dtype == right.dtype == jnp.float64
    rtol = {jnp.bfloat16: 2.0**-7, jnp.float32: 1e-6}[narrow]
    assert tree_allclose(left, mine.gram(theirs), rtol)
    assert tree_allclose(right, theirs.gram(mine), rtol)
