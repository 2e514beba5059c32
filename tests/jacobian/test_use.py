"""How a Jacobian is used: in JAX's transformations, as a pytree, with arguments of
every kind.
"""

import collections
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import CompilationCounter, TraceCounter, tree_allclose

from pytree_grads import Vector, jacobian, value_and_jacobian

pytestmark = pytest.mark.any_release

N = 5
KEY = jax.random.key(7)
MODES = {"kept": {}, "recomputed": {"recompute": True}, "chunks": {"chunk_size": 2}}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def loss(p, x):
    """Dense layers of T = 1 and T = 4, a scan over layers and one over time, a tie and
    a bias.
    """
    h, _ = jax.lax.scan(
        lambda h, w: (jnp.tanh(h @ w), None), x @ p["w"] + p["b"][None], p["deep"]
    )
    last, _ = jax.lax.scan(
        lambda c, h: (jnp.tanh(c @ p["u"] + h), None), jnp.zeros(7), h
    )
    return jnp.sum(jnp.sin(last @ p["w"].T)) + jnp.sum(jnp.tanh(h @ p["u"]))


def single(p, x):
    return jnp.tanh(jnp.vdot(p, x))


def problem(n=N):
    keys = jax.random.split(KEY, 5)
    shapes = {"w": (3, 7), "b": (7,), "deep": (2, 7, 7), "u": (7, 7)}
    pairs = zip(shapes.items(), keys, strict=False)
    params = {name: 0.5 * jax.random.normal(k, s, float) for (name, s), k in pairs}
    return params, jax.random.normal(keys[4], (n, 4, 3), float)


def rows(p, x, fun=loss):
    return jax.vmap(jax.grad(fun), (None, 0))(p, x)


def matrix(p, x, fun=loss):
    stacked = jax.tree.leaves(rows(p, x, fun))
    return jnp.concatenate([r.reshape(len(r), -1) for r in stacked], axis=1)


def norms_of(p, x):
    return np.linalg.norm(_matrix(p, x), axis=1)


_matrix = jax.jit(matrix)


def small(p, x):
    return jnp.sum(jnp.tanh(x @ p["w"] + p["b"][None]) @ p["u"])


def clipped(stacked, bound):
    flat = [r.reshape(len(r), -1) for r in jax.tree.leaves(stacked)]
    norms = jnp.sqrt(sum(jnp.sum(r**2, axis=1) for r in flat))
    factors = jnp.minimum(1, bound / norms)
    return jax.tree.map(lambda r: jnp.tensordot(factors, r, 1), stacked)


class TestTransformations:
    @modes
    def test_vmap(self, mode, x64):
        params, x = problem()
        many = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)

        @jax.jit
        @jax.vmap
        def of(p):
            J = jacobian(loss, **mode)(p, x)
            return J.norms(), J.gram(), J.clip(0.5).sum(), J @ p

        @jax.jit
        @jax.vmap
        def plain(p):
            J = matrix(p, x)
            v = jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(p)])
            return jnp.linalg.norm(J, axis=1), J @ J.T, clipped(rows(p, x), 0.5), J @ v

        assert tree_allclose(of(many), plain(many))

    @modes
    @pytest.mark.parametrize("product", ["norms", "gram", "clip", "square_sum"])
    def test_a_gradient_penalty_differentiates_through_products(
        self, mode, product, x64
    ):
        params, x = problem()
        ours = {
            "norms": lambda J: jnp.sum(J.norms() ** 3),
            "gram": lambda J: jnp.sum(jnp.sin(J.gram())),
            "clip": lambda J: sum(
                jnp.sum(jnp.sin(g)) for g in jax.tree.leaves(J.clip(0.8).sum())
            ),
            "square_sum": lambda J: sum(
                jnp.sum(g**2) for g in jax.tree.leaves(J.square_sum())
            ),
        }[product]

        def plain(p):
            J = matrix(p, x)
            norms = jnp.linalg.norm(J, axis=1)
            return {
                "norms": lambda: jnp.sum(norms**3),
                "gram": lambda: jnp.sum(jnp.sin(J @ J.T)),
                "clip": lambda: jnp.sum(jnp.sin(jnp.minimum(1, 0.8 / norms) @ J)),
                "square_sum": lambda: jnp.sum(jnp.sum(J**2, axis=0) ** 2),
            }[product]()

        def penalty(p):
            return ours(jacobian(loss, **mode)(p, x))

        got = jax.jit(jax.value_and_grad(penalty))(params)
        assert tree_allclose(got, jax.jit(jax.value_and_grad(plain))(params))

    def test_forward_and_second_derivatives_of_norms(self, x64):
        params, x = problem()

        def ours(p):
            return jnp.sum(jacobian(loss)(p, x).norms() ** 2)

        def plain(p):
            return jnp.sum(matrix(p, x) ** 2)

        def hessian_vector(fun):
            return jax.jvp(jax.grad(jax.checkpoint(fun)), (params,), (params,))

        got = jax.jit(lambda: hessian_vector(ours))()
        assert tree_allclose(got, jax.jit(lambda: hessian_vector(plain))())

    @modes
    def test_a_training_loop_in_a_scan(self, mode, x64):
        params, x = problem()

        def train(gradient):
            def step(p, i):
                grads = gradient(p, jnp.roll(x, i, axis=0)[:3])
                return jax.tree.map(lambda p, g: p - 0.1 * g, p, grads), None

            return jax.jit(lambda p: jax.lax.scan(step, p, jnp.arange(3))[0])(params)

        ours = train(
            jax.checkpoint(lambda p, x: jacobian(loss, **mode)(p, x).clip(0.5).sum())
        )
        assert tree_allclose(ours, train(lambda p, x: clipped(rows(p, x), 0.5)))


class TestPytree:
    @modes
    def test_it_leaves_jit_and_enters_again(self, mode, x64):
        params, x = problem()
        J = jax.jit(jacobian(loss, **mode))(params, x)
        assert (J.shape, len(J)) == ((N, 3 * 7 + 7 + 2 * 49 + 49), N)
        expected = norms_of(params, x)
        assert tree_allclose(jax.jit(lambda J: J.clip(1e9).norms())(J), expected)
        leaves, treedef = jax.tree.flatten(jax.jit(lambda J: J[2:])(J))
        later = jax.tree.unflatten(treedef, leaves)
        assert tree_allclose(jax.jit(lambda J: J.norms())(later), expected[2:])

    @modes
    def test_it_is_pickled_before_and_after_its_norms_are_known(self, mode, x64):
        J = jacobian(single, **mode)(jnp.arange(3.0), jnp.arange(3.0 * N).reshape(N, 3))
        for _ in range(2):
            other = pickle.loads(pickle.dumps(J))
            assert tree_allclose(other.norms(), J.norms())
            assert tree_allclose(other.clip(0.5).sum(), J.clip(0.5).sum())

    def test_equal_calls_have_equal_treedefs(self):
        params, x = problem()
        one, two = (jax.tree.structure(jacobian(small)(params, x)) for _ in range(2))
        assert one == two
        assert hash(one) == hash(two)

    def test_a_tree_of_something_else_in_its_place_has_a_repr(self):
        J = jacobian(single)(jnp.arange(3.0), jnp.ones((N, 3)))
        assert (
            repr(jax.tree.map(jnp.shape, J))
            == repr(jax.tree.map(lambda _: None, J))
            == repr(J)
        )

    @modes
    def test_a_stack_of_jacobians(self, mode, x64):
        params, x = problem()
        many = jax.tree.map(lambda p: jnp.stack([p, 0.5 * p]), params)
        stack = jax.jit(jax.vmap(lambda p: jacobian(loss, **mode)(p, x)))(many)
        got = jax.jit(jax.vmap(lambda J: J.norms()))(stack)
        expected = jax.vmap(lambda p: jnp.linalg.norm(matrix(p, x), axis=1))(many)
        assert tree_allclose(got, expected)

    @modes
    def test_a_stack_says_what_it_is_and_gives_no_products(self, mode):
        """Of two axes of one size, a product would take one for the other."""
        params, x = jnp.ones((N, 3)), jnp.arange(3.0 * N).reshape(N, 3)
        stack = jax.vmap(lambda p: jacobian(single, **mode)(p, x))(params)
        one = jax.tree.map(lambda leaf: leaf[0], stack)
        assert repr(one) == repr(jacobian(single, **mode)(params[0], x))
        assert repr(stack) == f"a stack of {one!r}"
        products = (
            lambda J: J.sum(),
            lambda J: J.square_sum(),
            lambda J: J.norms(),
            lambda J: J.clip(1.0).sum(),
            lambda J: J.scale(jnp.ones(N)).to_rows(),
            lambda J: J @ params,
            lambda J: J.gram(),
            lambda J: J[1:3],
        )
        for product in products:
            with pytest.raises(ValueError, match="stack of Jacobians"):
                product(stack)

    def test_it_crosses_a_scan(self, x64):
        params, x = problem()

        def step(J, s):
            return J.scale(jnp.full(N, s)), J.norms()

        @jax.jit
        def of(params, x):
            start = jacobian(loss)(params, x).scale(jnp.ones(N))
            return jax.lax.scan(step, start, jnp.array([2.0, 3.0, 0.5]))[1]

        norms = of(params, x)
        expected = norms_of(params, x)
        assert tree_allclose(norms, np.stack([expected, 2 * expected, 6 * expected]))

    @modes
    def test_slices(self, mode, x64):
        params, x = problem()
        parts = slice(1, 4), slice(None, -2), slice(3, 99), slice(4, 2), slice(-3, None)

        @jax.jit
        def of(params, x):
            J = jacobian(small, **mode)(params, x).scale(jnp.arange(1.0, N + 1))
            return [J[part].norms() for part in parts], J[1:4][1:].norms()

        norms = np.linalg.norm(matrix(params, x, small), axis=1) * np.arange(1, N + 1)
        assert tree_allclose(
            of(params, x), ([norms[part] for part in parts], norms[2:4])
        )


def affine(p, x, q, *, shift):
    return jnp.sum(jnp.tanh(p["w"] @ x["x"] + q) * shift + x["t"]), {"x": x["x"]}


class TestArguments:
    def arguments(self):
        x = {"x": jax.random.normal(KEY, (3, N), float), "t": jnp.arange(float(N))}
        return {"w": jnp.ones((2, 3))}, x, jnp.arange(2.0), jnp.arange(float(N)) + 1

    @modes
    @pytest.mark.parametrize("argnums", [0, 2, (0,), (2, 0), (-1, 0)])
    def test_argnums_axes_keywords_and_aux(self, mode, argnums, x64):
        p, x, q, shift = self.arguments()
        axes = (None, {"x": -1, "t": 0}, None)
        options = {"in_axes": axes, "has_aux": True, **mode}
        J, other_aux = jacobian(affine, argnums, **options)(p, x, q, shift=shift)

        @jax.jit
        def of(p, x, q, shift):
            (outputs, aux), J = value_and_jacobian(affine, argnums, **options)(
                p, x, q, shift=shift
            )
            return outputs, aux, J.to_rows(), J.sum(), J @ J.sum(), J.gram().sum(1)

        def positional(p, x, q, shift):
            return affine(p, x, q, shift=shift)

        argnums = argnums if isinstance(argnums, int) else tuple(i % 3 for i in argnums)
        both = jax.vmap(
            jax.value_and_grad(positional, argnums, has_aux=True), (*axes, 0)
        )
        (values, wanted), expected = both(p, x, q, shift)
        outputs, aux, stacked, total, projected, products = of(p, x, q, shift)
        assert tree_allclose((outputs, aux, other_aux), (values, wanted, wanted))
        assert tree_allclose(stacked, expected)
        assert tree_allclose(total, jax.tree.map(lambda r: r.sum(0), expected))
        assert tree_allclose(projected, products)
        assert J.shape == (N, sum(x.size // N for x in jax.tree.leaves(expected)))

    @modes
    @pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
    def test_every_example_has_its_own_key(self, mode, make, x64):
        def noisy(p, key):
            return jnp.sum(jnp.sin(p @ jax.random.normal(key, (3, 2), float)))

        p, keys = jnp.ones((2, 3)), jax.random.split(make(1), N)
        expected = jax.vmap(jax.grad(noisy), (None, 0))(p, keys)
        assert tree_allclose(jacobian(noisy, **mode)(p, keys).to_rows(), expected)

    @modes
    def test_host_arrays_functions_and_closures(self, mode, x64):
        frozen = np.arange(6.0).reshape(3, 2)

        def f(p, x, activation, factor):
            return jnp.sum(activation(x @ p @ frozen) * factor)

        p, x = np.ones((3, 3)), np.linspace(-1, 1, 3 * N).reshape(N, 3)
        J = jacobian(f, in_axes=(None, 0, None, None), **mode)(p, x, jnp.sin, 2.0)
        expected = jax.vmap(jax.grad(lambda p, x: f(p, x, jnp.sin, 2.0)), (None, 0))(
            p, x
        )
        assert tree_allclose(J.to_rows(), expected)
        assert tree_allclose(J.sum(), expected.sum(0))

    @modes
    def test_closures_over_traced_values(self, mode, x64):
        params, x = problem()

        @jax.jit
        def of(p, temperature):
            return jacobian(lambda p, x: loss(p, x) * temperature, **mode)(p, x).norms()

        expected = 3 * norms_of(params, x)
        assert tree_allclose(of(params, 3.0), expected)

    @modes
    @pytest.mark.parametrize("n", [0, 1])
    def test_no_example_and_one(self, mode, n, x64):
        params, x = problem(n)

        @jax.jit
        def of(params, x):
            outputs, J = value_and_jacobian(small, **mode)(params, x)
            sums = (
                J.sum(),
                J.weighted_sum(jnp.ones(n)),
                J.clip(1e9, nan_safe=True).sum(),
                J.mean(),
            )
            numbers = outputs, J.norms(), J @ params, J.gram(), J.sketch(KEY, 3)
            return numbers, sums, J.square_sum(), J.to_rows()

        numbers, sums, squares, stacked = of(params, x)
        nothing = jax.tree.map(jnp.zeros_like, params)
        expected = jax.grad(small)(params, x[0]) if n else nothing
        nan = jax.tree.map(lambda z: jnp.full_like(z, jnp.nan), nothing)
        assert [a.shape for a in numbers] == [(n,), (n,), (n,), (n, n), (n, 3)]
        assert tree_allclose(sums, (expected,) * 3 + (expected if n else nan,))
        assert tree_allclose(squares, jax.tree.map(jnp.square, expected))
        assert tree_allclose(stacked, jax.tree.map(lambda g: g[None][:n], expected))

    @modes
    def test_sequences_of_no_steps(self, mode):
        """Nothing is added up: a factor that is the same at all steps has no first
        one.
        """

        def of_lines(p, words):
            numbers = jax.lax.GatherDimensionNumbers((1,), (0,), (0,))
            return jnp.sum(jax.lax.gather(p, words[:, None], numbers, (1, 2)))

        p, x, words = jnp.ones((3, 2)), jnp.ones((N, 0, 3)), jnp.zeros((N, 0), "int32")
        for J in (
            jacobian(lambda p, x: jnp.sum(x @ p), **mode)(p, x),
            jacobian(of_lines, **mode)(p, words),
        ):
            numbers = J.norms(), J.gram(), J @ p, J.sum(), J.square_sum(), J.to_rows()
            assert not any(np.any(a) for a in numbers)

    def test_a_vector_is_a_direction(self, x64):
        params, x = problem()
        J = jax.jit(jacobian(small))(params, x)
        assert tree_allclose(J @ Vector(params), J @ params)
        assert tree_allclose(J.T @ np.arange(N), J.weighted_sum(jnp.arange(float(N))))


class TestDtypes:
    @modes
    @pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
    def test_narrow_parameters_carried_in_float32(self, dtype, mode):
        def f(p, x):
            hidden = jnp.einsum(
                "ti,io->to", x, p["w"], preferred_element_type=jnp.float32
            )
            return jnp.sum(jnp.tanh(hidden + p["b"].astype(jnp.float32)[None]))

        keys = jax.random.split(KEY, 3)
        p = {"w": jax.random.normal(keys[0], (3, 5), dtype), "b": jnp.zeros(5, dtype)}
        x = jax.random.normal(keys[1], (N, 4, 3), dtype)

        @jax.jit
        def of(p, x):
            J = jacobian(f, **mode)(p, x)
            return J.norms(), J.gram(), J.sum(), J.to_rows()

        norms, gram, sums, stacked = of(p, x)
        wide = jax.tree.map(lambda a: a.astype(jnp.float32), (p, x))
        exact = jax.vmap(jax.grad(f), (None, 0))(*wide)
        assert norms.dtype == gram.dtype == jnp.float32
        flat = np.concatenate(
            [np.reshape(r, (N, -1)) for r in jax.tree.leaves(exact)], axis=1
        )
        eps = float(jnp.finfo(dtype).eps)
        np.testing.assert_allclose(norms, np.linalg.norm(flat, axis=1), rtol=2 * eps)
        total = jax.tree.map(lambda r, a: r.sum(0).astype(a.dtype), exact, p)
        assert tree_allclose(sums, total)
        assert tree_allclose(stacked, jax.tree.map(lambda r: r.astype(dtype), exact))

    def test_sums_of_many_narrow_rows_do_not_stall(self):
        p, x = jnp.ones(2, jnp.bfloat16), jnp.ones((1000, 2), jnp.bfloat16)
        J = jacobian(lambda p, x: jnp.sum(p * x))(p, x)
        assert tree_allclose(J.sum(), jnp.full(2, 1000, jnp.bfloat16))

    @modes
    def test_numbers_per_row_in_narrow_dtypes(self, mode, x64):
        """They meet other numbers per row in float32, or in the wider dtype of
        those.
        """
        x = jnp.linspace(1, 2, 3 * N, dtype=float).reshape(N, 3)
        J = jacobian(lambda p, x: jnp.sum(p * x), **mode)(jnp.ones(3, float), x)
        ones, large = jnp.ones(N, jnp.float16), jnp.full(N, 300, jnp.float16)
        least = J.clip(1e-9)
        assert tree_allclose(least.weighted_sum(ones), least.sum())
        assert tree_allclose(least.scale(ones).sum(), least.sum())
        assert tree_allclose(least.scale(jnp.ones(N, jnp.float32)).sum(), least.sum())
        assert tree_allclose(J.scale(large).scale(large).sum(), 9e4 * J.sum())
        assert tree_allclose(J.scale(large).weighted_sum(large), 9e4 * J.sum())

    @modes
    def test_leaves_of_several_dtypes(self, mode, x64):
        def f(p, x):
            hidden = (
                jnp.tanh(x.astype(jnp.float32) @ p["single"]).astype(float)
                @ p["double"]
            )
            z = p["complex"] * hidden.sum().astype(complex)
            return (
                jnp.sum(hidden)
                + jnp.real(z * z)
                + jnp.sum(p["half"].astype(float) * hidden)
            )

        p = {
            "single": jnp.ones((3, 5), jnp.float32) / 3,
            "double": jnp.linspace(-1, 2, 10).reshape(5, 2),
            "complex": jnp.asarray(0.5 + 1j, complex),
            "half": jnp.ones(2, jnp.float16),
        }
        x = jax.random.normal(KEY, (N, 3), float)

        @jax.jit
        def of(p, x):
            J = jacobian(f, **mode)(p, x)
            return J.to_rows(), J.norms(), J.gram(), J.sum(), J.clip(1.0).sum()

        stacked, norms, gram, sums, clipped = of(p, x)
        exact = jax.vmap(jax.grad(f), (None, 0))(p, x)
        assert tree_allclose(stacked, exact, rtol=1e-3)
        flat = np.concatenate(
            [np.reshape(r, (N, -1)) for r in jax.tree.leaves(exact)], axis=1
        )
        np.testing.assert_allclose(norms, np.linalg.norm(flat, axis=1), rtol=1e-3)
        scale = np.abs(flat).max() ** 2
        np.testing.assert_allclose(gram, flat.conj() @ flat.T, atol=1e-3 * scale)
        for tree in (sums, clipped):
            assert [a.dtype for a in jax.tree.leaves(tree)] == [
                a.dtype for a in jax.tree.leaves(p)
            ]


class TestTraces:
    def test_fun_is_traced_once_for_all_products(self):
        counter = TraceCounter(loss)
        params, x = problem()

        @jax.jit
        def step(p, x, c):
            outputs, J = value_and_jacobian(counter)(p, x)
            clipped = J.clip(1.0)
            return (
                outputs,
                J.norms(),
                J.gram(),
                J.weighted_sum(c),
                clipped.sum(),
                clipped.mean(),
            )

        step(params, x, jnp.ones(N))
        others = jax.tree.map(lambda p: 2 * p, params), -x, jnp.zeros(N)
        with CompilationCounter() as compiled:
            step(*others)
        assert counter.count == 1
        assert compiled.count == 0

    @modes
    @pytest.mark.parametrize(
        "fun", [loss, lambda p, x: {"h": x @ p["w"] + p["b"][None]}]
    )
    def test_how_often_the_function_is_called(self, fun, mode):
        """Once for J and all its products inside one trace, whatever it returns.

        Outside, each product is compiled, and calls it once, for its own program.
        """
        counter = TraceCounter(fun)
        params, x = problem()

        @jax.jit
        def products(p, x):
            J = jacobian(counter, **mode)(p, x)
            return J.norms(), J.gram(), J.square_sum(), J.clip(1.0).sum(), J.sum()

        products(params, x)
        assert counter.count == 1
        J = jacobian(counter, **mode)(params, x)
        assert counter.count == 2
        J.norms(), J.square_sum(), J.norms(), J.square_sum()
        assert counter.count == (2 if mode == {} else 4)

    def test_how_often_a_function_with_a_rule_is_called(self):
        """A rule may hold values of the trace in which the function was called."""
        counter = TraceCounter(lambda p, x: jnp.sum(jax.nn.relu(x @ p)))
        recomputed = jacobian(counter, recompute=True)
        jax.jit(lambda p, x: recomputed(p, x).clip(1.0).sum())(
            jnp.eye(3), jnp.ones((N, 3))
        )
        assert counter.count == 3  # to find the rule, to trace rows, to sum them

    @modes
    def test_new_values_do_not_compile_again(self, mode):
        params, x = problem()

        @jax.jit
        def step(J, bound, s):
            return J.clip(bound).scale(s).sum()

        make = jax.jit(jacobian(small, **mode))
        step(make(params, x), 1.0, jnp.ones(N))
        others = 2 * x, jnp.zeros(N)
        with CompilationCounter() as compiled:
            step(make(params, others[0]), 2.0, others[1])
        assert compiled.count == 0


@modes
class TestAsAPytree:
    def test_its_structure_does_not_depend_on_what_its_leaves_are(self, mode):
        J = jacobian(single, **mode)(jnp.ones(3), jnp.ones((N, 3)))
        numbers = jax.tree.map(lambda x: 0, J)
        assert jax.tree.structure(numbers) == jax.tree.structure(J)
        difference = jax.tree.map(jnp.subtract, J, jax.device_get(J))
        assert not any(jnp.any(x) for x in jax.tree.leaves(difference))
        norms = jax.vmap(lambda J: J.norms(), in_axes=(numbers,))
        stack = jax.tree.map(lambda x: jnp.stack([x, x]), J)
        assert tree_allclose(norms(stack), jnp.stack([J.norms()] * 2))
        abstract = jax.eval_shape(
            jacobian(single, **mode), jnp.ones(3), jnp.ones((N, 3))
        )
        assert jax.eval_shape(lambda J: J.norms(), abstract).shape == (N,)

    def test_a_method_is_one_function_wherever_it_is_looked_up(self, mode):
        class Model:
            def loss(self, p, x):
                return single(p, x)

        model, other = Model(), Model()
        made = [
            jacobian(m.loss, **mode)(jnp.ones(3), jnp.ones((N, 3)))
            for m in (model, model, other)
        ]
        one, same, different = map(jax.tree.structure, made)
        assert one == same
        assert hash(one) == hash(same)
        assert one != different

    @pytest.mark.parametrize(
        "use",
        [lambda J: J.scale(jnp.ones(N)), lambda J: J.clip(1.0), lambda J: J.explain()],
    )
    def test_a_stack_of_them_is_no_jacobian(self, mode, use):
        stack = jax.vmap(jacobian(single, **mode), (None, 0))(
            jnp.ones(3), jnp.ones((N, N, 3))
        )
        with pytest.raises(ValueError, match="this is a stack of Jacobians"):
            use(stack)


@modes
class TestMeansOfNarrowFloats:
    @pytest.mark.parametrize("size", [600, 70_000])
    def test_neither_the_sum_nor_the_count_overflows(self, mode, size):
        mode = {"chunk_size": 512} if "chunk_size" in mode else mode
        rows = jnp.full((size, 2), 600, "float16")
        J = jacobian(lambda p, x: jnp.vdot(p, x), **mode)(jnp.ones(2, "float16"), rows)
        for mean in J.mean(), J.clip(1e6).mean():
            assert mean.dtype == jnp.float16
            assert jnp.all(mean == 600)

    def test_they_are_rounded_once(self, mode):
        rows = jnp.linspace(1, 6, 257).astype("bfloat16")[:, None]
        J = jacobian(lambda p, x: jnp.vdot(p, x), **mode)(jnp.ones(1, "bfloat16"), rows)
        assert J.mean() == jnp.mean(rows.astype("float32")).astype("bfloat16")


@modes
class TestBackwardPassesOfTheirOwn:
    """What `jax.grad` makes of no function, but a user's rule may."""

    @staticmethod
    def weight_whose_gradient_is(change):
        """x @ p, whose gradient by p goes through a function that changes nothing."""

        @jax.custom_vjp
        def product(p, x):
            return x @ p

        def backward(kept, g):
            p, x = kept
            return change(x[:, None] @ g[None]), p @ g

        product.defvjp(lambda p, x: (x @ p, (p, x)), backward)
        return lambda p, x: jnp.sum(jnp.sin(product(p, x)))

    @pytest.mark.parametrize(
        "change",
        [
            lambda w: jnp.reshape(jnp.reshape(w, (2, 6), order="F"), (4, 3), order="F"),
            lambda w: jax.lax.reshape(jax.lax.reshape(w, (6, 2), (1, 0)), (3, 4)).T,
            lambda w: jax.lax.pad(w, 0.0, [(0, 0, 0), (-5, 5, 0)]) + w,
            lambda w: jax.lax.pad(w, 0.0, [(8, -5, 0), (0, 0, 0)])[:4] + w,
        ],
        ids=["in another order", "and back", "padded out of sight", "from the left"],
    )
    def test_the_rows_are_those_of_plain_jax(self, mode, change, x64):
        fun = self.weight_whose_gradient_is(change)
        p, x = (
            jax.random.normal(KEY, (4, 3), float),
            jax.random.normal(KEY, (N, 4), float),
        )
        J, want = jacobian(fun, **mode)(p, x), rows(p, x, fun)
        weights = jnp.arange(1.0, N + 1)
        assert tree_allclose(J.to_rows(), want)
        assert tree_allclose(J.weighted_sum(weights), jnp.tensordot(weights, want, 1))
        assert tree_allclose(
            J.clip(0.5).norms(),
            jnp.minimum(0.5, jnp.linalg.norm(want.reshape(N, -1), axis=1)),
        )


@modes
class TestWhatGoesInAndComesOut:
    @pytest.mark.parametrize("result", [jnp.stack, list, lambda x: dict(enumerate(x))])
    def test_aux_comes_in_a_pair(self, mode, result):
        def fun(p, x):
            return result([p @ x] * (3 if result is list else 2))

        with pytest.raises(TypeError, match="must be a pair"):
            value_and_jacobian(fun, has_aux=True, **mode)(jnp.ones(3), jnp.ones((2, 3)))

    def test_an_integer_of_numpy_is_one_argument(self, mode):
        J = jacobian(single, np.int64(0), **mode)(jnp.ones(3), jnp.ones((N, 3)))
        assert J.sum().shape == (3,)

    def test_a_field_called_tree_is_no_vector(self, mode):
        Params = collections.namedtuple("Params", "tree")
        J = jacobian(lambda p, x: single(p.tree, x), **mode)(
            Params(jnp.ones(3)), jnp.ones((N, 3))
        )
        v = Params(jnp.ones(3))
        assert tree_allclose(J @ v, J @ Vector(v))
