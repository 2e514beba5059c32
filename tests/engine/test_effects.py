"""What a function does besides returning values: right where it can be pure, refused
elsewhere.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from jax.experimental import io_callback
from rows import Rows, assert_close

from pytree_grads import chain_rule_grad, jacobian, value_and_jacobian

P = jnp.linspace(-0.5, 0.9, 12).reshape(4, 3)
X = jnp.linspace(-1.0, 1.0, 20).reshape(5, 4)
MODES = {
    "kept": {},
    "recomputed": {"recompute": True},
    "chunks": {"chunk_size": 2},
    "both": {"chunk_size": 2, "recompute": True},
}
AGAIN = {name: mode for name, mode in MODES.items() if name != "kept"}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)


def written_and_read(p, x):
    ref = jax.new_ref(jnp.tanh(x @ p))
    ref[0] = ref[1] * p[0, 0]
    return jnp.sum(ref[...] ** 2)


def added_up(p, x):
    ref = jax.new_ref(jnp.zeros(3))
    ref[...] += x @ p
    ref[1] += ref[0] * p[1, 1]
    return jnp.sum(ref[...] ** 2)


def in_a_scan(p, x):
    ref = jax.new_ref(jnp.zeros(3))

    def body(carry, line):
        ref[...] = jnp.tanh(ref[...] + line)
        return carry, ref[0]

    _, firsts = jax.lax.scan(body, None, p * x[:, None])
    return jnp.sum(ref[...]) + jnp.sum(firsts**2)


def in_a_call(p, x):
    ref = jax.new_ref(x @ p)

    @jax.jit
    def doubled():
        ref[...] = 2 * ref[...]

    doubled()
    doubled()
    return jnp.sum(jnp.sin(ref[...]))


def rematerialised(p, x):
    @jax.checkpoint
    def body(h):
        ref = jax.new_ref(h)
        ref[0] = ref[1] ** 2
        return ref[...]

    return jnp.sum(body(body(x @ p)))


FUNCTIONS = [written_and_read, added_up, in_a_scan, in_a_call, rematerialised]


@modes
@pytest.mark.parametrize("fun", FUNCTIONS, ids=lambda fun: fun.__name__)
def test_references_are_values(fun, mode, x64):
    p, x = P.astype(float), X.astype(float)
    rows = Rows.of(fun, p, (x,))

    @jax.jit
    def products(p, x):
        outputs, J = value_and_jacobian(fun, **mode)(p, x)
        clipped = J.clip(0.1)
        return (
            outputs,
            J.sum(),
            J.norms(),
            clipped.sum(),
            J.gram(),
            J.square_sum(),
            J.to_rows(),
        )

    outputs, total, norms, clipped, gram, squares, stacked = products(p, x)
    assert_close(outputs, jax.vmap(fun, (None, 0))(p, x), 1e-11)
    assert_close(total, rows.weighted_sum(), 1e-11)
    assert_close(norms, rows.norms(), 1e-11)
    assert_close(clipped, rows.clip(0.1).weighted_sum(), 1e-11)
    assert_close(gram, rows.gram(), 1e-11)
    assert_close(squares, rows.square_sum(), 1e-11)
    assert_close(stacked, rows.to_rows(), 1e-11)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("fun", FUNCTIONS, ids=lambda fun: fun.__name__)
def test_the_chain_rule_sees_references(fun, chunk_size):
    got = chain_rule_grad(jnp.sum, fun, chunk_size=chunk_size)(P, X)
    want = jax.grad(lambda p: jnp.sum(jax.vmap(fun, (None, 0))(p, X)))(P)
    assert tree_allclose(got, want)


def test_outputs_that_come_from_references():
    def fun(p, x):
        ref = jax.new_ref(x @ p)
        ref[0] = ref[1] * ref[2]
        return {"h": ref[...], "first": ref[0]}

    got = jax.jit(lambda: jacobian(fun)(P, X).to_rows())()
    assert tree_allclose(got, jax.vmap(jax.jacrev(fun), (None, 0))(P, X))


class TestReferencesFromOutside:
    def test_one_that_is_read_is_a_value(self):
        ref = jax.new_ref(jnp.arange(1.0, 4))

        def fun(p, x):
            return jnp.sum(x @ p * ref[...])

        J = jacobian(fun)(P, X)
        assert tree_allclose(J.sum(), X.sum(0)[:, None] * jnp.arange(1.0, 4)[None])

    @pytest.mark.parametrize("mode", AGAIN.values(), ids=AGAIN)
    def test_where_each_product_would_read_it_anew_it_is_refused(self, mode):
        ref = jax.new_ref(jnp.ones(3))
        with pytest.raises(
            NotImplementedError, match=r"reads a reference .* pass its value"
        ):
            jacobian(lambda p, x: jnp.sum(x @ p * ref[...]), **mode)(P, X)

    @modes
    def test_one_that_is_written_is_refused(self, mode):
        ref = jax.new_ref(jnp.ones(()))

        def fun(p, x):
            ref[...] += 1.0
            return jnp.sum(x @ p) * ref[...]

        with pytest.raises(NotImplementedError, match="reference"):
            jacobian(fun, **mode)(P, X)


class TestCallsOutOfTheProgram:
    @staticmethod
    def fun(p, x):
        scale = io_callback(
            lambda: np.float32(3.0), jax.ShapeDtypeStruct((), "float32")
        )
        return jnp.sum(x @ p) * scale

    def test_a_result_that_is_fetched_once_is_a_value(self):
        J = jacobian(self.fun)(P, X)
        assert tree_allclose(J.sum(), 3 * jnp.broadcast_to(X.sum(0)[:, None], P.shape))

    @pytest.mark.parametrize("mode", AGAIN.values(), ids=AGAIN)
    def test_a_result_that_each_product_would_fetch_is_refused(self, mode):
        with pytest.raises(NotImplementedError, match="io_callback"):
            jacobian(self.fun, **mode)(P, X)

    @modes
    def test_prints_and_callbacks_without_results_change_nothing(self, mode):
        def fun(p, x):
            jax.debug.print("{}", x[0])
            io_callback(lambda x: None, None, x)
            return jnp.sum(jnp.tanh(x @ p))

        def bare(p, x):
            return jnp.sum(jnp.tanh(x @ p))

        assert tree_allclose(
            jacobian(fun, **mode)(P, X).sum(), jacobian(bare)(P, X).sum()
        )

    def test_an_effect_that_nobody_knows_is_refused_by_name(self):
        from jax._src.lax.lax import (
            NoDCEEffect,  # any effect of JAX; a subclass has another name
        )

        class Surprise(NoDCEEffect):
            pass

        equation = (
            jax.make_jaxpr(jnp.sin)(1.0).jaxpr.eqns[0].replace(effects={Surprise()})
        )
        from pytree_grads._jax import effects as _effects

        with pytest.raises(NotImplementedError, match=r"effect .*Surprise.*, of sin"):
            _effects._check(equation, runs_again=False)


def closes_over_the_example(p, x):
    @jax.custom_vjp
    def go(w):
        return jnp.tanh(x @ w)

    go.defvjp(
        lambda w: (go(w), jnp.cosh(x @ w)), lambda c, t: (jnp.outer(x, t / c**2),)
    )
    return jnp.sum(go(p) ** 2)


def clips_its_cotangent(p, x):
    @jax.custom_vjp
    def same(h):
        return h

    same.defvjp(lambda h: (h, None), lambda _, t: (jnp.clip(t, -0.5, 0.5),))
    return jnp.sum(jax.jit(same)(jnp.sin(x @ p)) * jnp.array([0.1, 1.0, 3.0]))


def sparse(p, x):
    from jax.experimental.sparse import BCOO

    indices = jnp.array([[0, 0], [1, 2], [3, 1]])
    return jnp.sum((x @ BCOO((p[0], indices), shape=(4, 3))) ** 2)


RULES = [closes_over_the_example, clips_its_cotangent, sparse]


class TestRulesThatHoldForOneExample:
    @modes
    @pytest.mark.parametrize("fun", RULES, ids=lambda fun: fun.__name__)
    def test_one_object_answers_all_products(self, fun, mode, x64):
        p, x = P.astype(float), X.astype(float)
        c = jnp.array([100.0, -1.0, 0.01, 3.0, 2.0])
        rows = Rows.of(fun, p, (x,))
        J = jacobian(fun, **mode)(p, x)
        assert_close(J.sum(), rows.weighted_sum(), 1e-11)
        assert_close(J.weighted_sum(c), rows.weighted_sum(c), 1e-11)
        assert_close(J.clip(0.1).sum(), rows.clip(0.1).weighted_sum(), 1e-11)
        assert_close(J.norms(), rows.norms(), 1e-11)
        J.check()

    @pytest.mark.parametrize("chunk_size", [None, 2])
    @pytest.mark.parametrize(
        "fun", [closes_over_the_example, sparse], ids=lambda f: f.__name__
    )
    def test_the_chain_rule_says_what_is_in_the_way(self, fun, chunk_size):
        with pytest.raises(NotImplementedError, match="custom_vjp uses of the example"):
            chain_rule_grad(jnp.sum, fun, chunk_size=chunk_size)(P, X)

    def test_check_finds_sums_that_are_not_linear(self):
        J = jacobian(clips_its_cotangent, recompute=True)(P, X)
        object.__setattr__(
            J._rows, "pulls_back", True
        )  # as if the rule had not been seen
        with pytest.raises(ValueError, match="weighted_sum"):
            J.check()
