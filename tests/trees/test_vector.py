"""``Vector``: every operator, the carried precision, and life as a pytree."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import CompilationCounter, tree_allclose

from pytree_grads import Vector, linear_combination

U = {"w": jnp.array([[1.0, -2.0]]), "b": [jnp.float32(3.0), None]}
V = {"w": jnp.array([[10.0, 20.0]]), "b": [jnp.float32(-30.0), None]}


def trees(*coefficients):
    return linear_combination(coefficients, [U, V])


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        pytest.param(lambda u, v: u + v, (1, 1), id="+"),
        pytest.param(lambda u, v: u - v, (1, -1), id="-"),
        pytest.param(lambda u, v: -u, (-1, 0), id="neg"),
        pytest.param(lambda u, v: 2 * u + v * 3, (2, 3), id="int"),
        pytest.param(lambda u, v: u / 4 - 0.5 * v, (0.25, -0.5), id="float"),
        pytest.param(
            lambda u, v: np.float32(2) * u + v / np.float64(2), (2, 0.5), id="numpy"
        ),
        pytest.param(
            lambda u, v: np.ones(()) * u + v * np.int8(2), (1, 2), id="0-d numpy"
        ),
        pytest.param(
            lambda u, v: jnp.float32(2) * u - v / jnp.int32(2), (2, -0.5), id="jax"
        ),
        pytest.param(lambda u, v: sum([u, v, u]), (2, 1), id="sum"),
        pytest.param(lambda u, v: 0 + u, (1, 0), id="0 +"),
    ],
)
def test_operators(expression, expected):
    expected = trees(*expected)
    assert tree_allclose(expression(Vector(U), Vector(V)).tree, expected)
    assert tree_allclose(jax.jit(expression)(Vector(U), Vector(V)).tree, expected)
    doubled = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), (Vector(U), Vector(V)))
    batched = jax.vmap(expression)(*doubled).tree
    assert tree_allclose(
        batched, jax.tree.map(lambda x: jnp.stack([x, 2 * x]), expected)
    )


def test_inner_product_and_norm():
    u, v = Vector(U), Vector(V)
    assert tree_allclose(u @ v, jnp.float32(10 - 40 - 90))
    assert tree_allclose(v.norm(), jnp.float32(np.sqrt(100 + 400 + 900)))
    assert tree_allclose(Vector({}) @ Vector({}), jnp.float32(0))
    assert tree_allclose(Vector({}).norm(), jnp.float32(0))
    assert tree_allclose(Vector({"e": jnp.ones((0, 3))}).norm(), jnp.float32(0))


def test_complex_inner_product_conjugates_the_left():
    u, v = (Vector({"z": jnp.array([z], jnp.complex64)}) for z in (1 + 2j, 3 - 1j))
    assert tree_allclose(u @ v, jnp.complex64((1 - 2j) * (3 - 1j)))
    assert tree_allclose(u.norm(), jnp.float32(np.sqrt(5)))
    assert tree_allclose(
        (1j * u / 2j).tree, {"z": jnp.array([0.5 + 1j], jnp.complex64)}
    )
    assert tree_allclose((u / 2).tree, {"z": jnp.array([0.5 + 1j], jnp.complex64)})


def test_mixed_dtypes_meet_in_the_widest_carried(x64):
    v = Vector(
        {
            "h": jnp.ones(2, jnp.bfloat16),
            "f": jnp.ones(1, jnp.float32),
            "d": jnp.ones((), jnp.float64),
        }
    )
    assert tree_allclose(v @ v, jnp.float64(4))
    assert tree_allclose(v.norm(), jnp.float64(2))
    assert [x.dtype.name for x in jax.tree.leaves(2 * v)] == [
        "float64",
        "float32",
        "bfloat16",
    ]


class TestNorm:
    @pytest.mark.parametrize("size", [1e30, 1e-30, 1e38, 3e-38])
    def test_neither_overflows_nor_vanishes(self, size):
        v = Vector({"a": jnp.array([3 * size / 4]), "b": jnp.array([size, 0.0])})
        assert tree_allclose(v.norm(), jnp.float32(1.25 * size))
        grad = jax.grad(lambda v: v.norm())(v)
        assert tree_allclose(
            grad.tree, {"a": jnp.array([0.6]), "b": jnp.array([0.8, 0.0])}
        )

    def test_has_gradient_zero_at_zero(self):
        zero = Vector(
            {"a": jnp.zeros(2), "z": jnp.zeros(1, jnp.complex64), "e": jnp.zeros((0,))}
        )
        assert tree_allclose(jax.grad(lambda v: v.norm())(zero).tree, zero.tree)

    @pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
    def test_shows_what_is_not_finite(self, bad):
        v = Vector({"a": jnp.array([1.0, bad]), "b": jnp.ones(1, jnp.bfloat16)})
        assert tree_allclose(v.norm(), jnp.float32(abs(bad)))

    def test_second_derivative(self):
        hessian = jax.hessian(lambda x: Vector({"x": x}).norm())(jnp.array([3.0, 4.0]))
        assert tree_allclose(hessian, jnp.array([[16.0, -12.0], [-12.0, 9.0]]) / 125)


ONES = Vector({"w": jnp.ones(3, jnp.bfloat16), "f": jnp.ones(1)})
THOUSAND = {"w": jnp.full(3, 1000, jnp.bfloat16), "f": jnp.full(1, 1000.0)}


class TestPrecision:
    def test_sums_are_carried_between_operators(self):
        assert tree_allclose(sum([ONES] * 1000).tree, THOUSAND, rtol=0)

    def test_and_inside_jit(self):
        total = jax.jit(lambda v: sum([v] * 1000))(ONES)
        assert tree_allclose(total.tree, THOUSAND, rtol=0)

    def test_rounding_is_at_the_boundaries(self):
        third = ONES / 3
        assert tree_allclose((third * 3).tree, ONES.tree, rtol=0)
        assert {x.dtype.name for x in jax.tree.leaves(third)} == {"bfloat16", "float32"}
        rounded = jax.tree.map(lambda x: x, third)
        assert tree_allclose(rounded.tree, third.tree, rtol=0)
        assert (third @ third).dtype == jnp.float32

    def test_carried_and_fresh_vectors_agree(self):
        assert tree_allclose((2 * ONES + ONES).tree, (3 * ONES).tree, rtol=0)


class TestPytree:
    def test_round_trip(self):
        leaves, treedef = jax.tree.flatten(Vector(U))
        assert tree_allclose(jax.tree.unflatten(treedef, leaves).tree, U)
        paths = [
            jax.tree_util.keystr(path)
            for path, _ in jax.tree.leaves_with_path(Vector(U))
        ]
        assert paths == [".tree['b'][0]", ".tree['w']"]

    def test_unflatten_takes_what_is_not_an_array(self):
        treedef = jax.tree.structure(Vector(U))
        strange = jax.tree.unflatten(treedef, [object(), None])
        assert strange.tree["w"] is None
        axes = jax.tree.map(lambda x: 0, Vector(U))
        assert axes.tree["w"] == 0

    def test_grad_scan_and_abstract_evaluation(self):
        grad = jax.grad(lambda v: v @ v)(Vector(U))
        assert isinstance(grad, Vector)
        assert tree_allclose(grad.tree, trees(2, 0))
        total, _ = jax.lax.scan(
            lambda t, c: (t + c * Vector(V), None), Vector(U), jnp.ones(4)
        )
        assert tree_allclose(total.tree, trees(1, 4))
        abstract = jax.eval_shape(lambda v: 2 * v, Vector(U))
        assert abstract.tree["w"].shape == (1, 2)

    def test_optax_takes_it(self):
        optimizer = optax.sgd(0.5)
        updates, _ = optimizer.update(Vector(V), optimizer.init(Vector(U)))
        assert tree_allclose(
            optax.apply_updates(Vector(U), updates).tree, trees(1, -0.5)
        )

    def test_copy_and_pickle(self):
        third = Vector({"w": jnp.ones(3, jnp.bfloat16)}) / 3
        for clone in (copy.deepcopy(third), pickle.loads(pickle.dumps(third))):
            assert tree_allclose(
                (3 * clone).tree, {"w": jnp.ones(3, jnp.bfloat16)}, rtol=0
            )

    def test_repr(self):
        assert repr(Vector({"w": 1.5})) == "Vector({'w': 1.5})"


def test_float0_leaves_pass_through():
    tree = {"w": jnp.float32(2), "n": np.zeros(3, jax.dtypes.float0)}
    v = Vector(tree)
    expected = {"w": jnp.float32(5), "n": np.zeros(3, jax.dtypes.float0)}
    assert tree_allclose((2 * v + v - v / 2).tree, expected)
    assert tree_allclose(v @ v, jnp.float32(4))
    assert tree_allclose(v.norm(), jnp.float32(2))
    half = Vector({"w": jnp.bfloat16(2), "n": np.zeros(3, jax.dtypes.float0)}) / 2
    assert half.tree["w"].dtype == jnp.bfloat16


def test_every_operator_is_one_compiled_call():
    big = Vector({f"layer{i}": jnp.ones(2) for i in range(100)})
    operators = {
        "+": lambda: big + big,
        "-": lambda: big - big,
        "*": lambda: 2.0 * big,
        "/": lambda: big / 2.0,
        "@": lambda: big @ big,
        "norm": lambda: big.norm(),
    }
    for name, operator in operators.items():
        with CompilationCounter() as first:
            operator()
        with CompilationCounter() as second:
            operator()
        assert (first.count, second.count) == (1, 0), name


def test_the_question_that_started_it():
    def f(p, x):
        return p["m"] * x + p["b"]

    params = {"m": jnp.float32(2), "b": jnp.float32(-1)}
    (p1, g1), (p2, g2) = (
        jax.value_and_grad(f)(params, jnp.float32(x)) for x in (0.3, 1.5)
    )
    combined = 2 * p1 * Vector(g1) + 2 * p2 * Vector(g2)
    assert tree_allclose(combined.tree, {"m": jnp.float32(5.76), "b": jnp.float32(3.2)})
