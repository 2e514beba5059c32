"""What a Jacobian says of itself, what it refuses, and what memory it takes."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tree_allclose
from models import MODELS

from pytree_grads import Vector, jacobian, value_and_jacobian
from pytree_grads._engine.leaf import Leaf
from pytree_grads._jax.compat import all_equations

pytestmark = pytest.mark.any_release

N = 5
KEYS = jax.random.split(jax.random.key(3), 6)


def network(p, x, token):
    """The leaves, in order: a bias, a convolution, a table, a shared function, T = 4
    and T = 1.
    """
    h = jnp.tanh(x @ p["w"] + p["b"][None])
    h = (
        h
        + jax.lax.conv_general_dilated(
            h[None], p["conv"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC")
        )[0]
    )
    return h.sum(0) @ p["v"] @ p["table"][token] + jnp.sum(jnp.sin(p["shared"]))


def problem(wide=31):
    shapes = {
        "w": (wide, wide),
        "b": (wide,),
        "conv": (3, wide, wide),
        "v": (wide, wide),
    }
    shapes |= {"table": (40, wide), "shared": (3, 3)}
    names = sorted(shapes)
    params = {
        name: jax.random.normal(key, shapes[name]) / 5
        for name, key in zip(names, jax.random.split(KEYS[0], 6), strict=True)
    }
    return (
        params,
        jax.random.normal(KEYS[1], (N, 4, wide)),
        jax.random.randint(KEYS[2], (N,), 0, 40),
    )


class TestExplain:
    def lines(self, J):
        return {line.split()[0]: line for line in J.explain().splitlines()}

    def test_a_line_for_each_leaf(self):
        J = jax.eval_shape(jacobian(network), *problem())
        lines = self.lines(J)
        assert set(problem()[0]) <= {re.sub(r"\W", "", name) for name in lines}
        assert re.search(r"31x31 +outer 31x31, T=4 .*inner products", lines["['w']"])
        assert re.search(r"31x31 +outer 31x31 .*squares", lines["['v']"])
        assert re.search(r"40x31 +scatter 1 of 40 lines", lines["['table']"])
        assert "shared by all rows" in lines["['shared']"]
        assert re.search(r"3x31x31 +patches 3 of 31x31 +patches", lines["['conv']"])
        assert re.search(r"31 +dense", lines["['b']"])
        assert all(len(line) < 160 for line in J.explain().splitlines())

    @pytest.mark.parametrize("mode", [{}, {"recompute": True}, {"chunk_size": 2}])
    def test_of_no_rows(self, mode):
        params, x, tokens = problem()
        none, some = (
            jacobian(network, **mode)(params, x[:n], tokens[:n]) for n in (0, N)
        )
        assert none.explain().splitlines()[:-1] == some.explain().splitlines()[:-1]

    def test_many_uses_of_a_weight_are_one_term(self):
        def fun(p, x, tokens):
            for t in range(8):
                x = jnp.tanh(x @ p["w"] + p["table"][tokens[t]])
            return jnp.sum(x)

        params = {"w": jnp.ones((31, 31)), "table": jnp.ones((40, 31))}
        J = jacobian(fun)(params, jnp.ones((N, 31)), jnp.ones((N, 8), "int32"))
        lines = self.lines(J)
        assert re.search(r"31x31 +outer 31x31, T=8 ", lines["['w']"])
        assert re.search(r"40x31 +scatter 8 of 40 lines", lines["['table']"])

    @pytest.mark.parametrize("mode", [{"recompute": True}, {"chunk_size": 2}])
    def test_it_says_that_nothing_is_kept(self, mode):
        J = jacobian(network, **mode)(*problem())
        assert "recomputed for each product" in J.explain()
        assert set(self.lines(J)) >= set(self.lines(jacobian(network)(*problem()))) - {
            repr(J)
        }

    def test_the_numbers_are_of_one_row(self):
        params = {"w": jnp.ones((100, 200))}
        J = jacobian(lambda p, x: jnp.sum(jnp.tanh(x @ p["w"])))(
            params, jnp.ones((3, 100))
        )
        *_, flops_of_norm, flops_of_sum, bytes_kept = self.lines(J)["['w']"].split()
        assert (flops_of_norm, flops_of_sum, bytes_kept) == ("600", "40k", "1.2k")
        assert "80kB if it were" in J.explain()

    def test_a_weight_that_is_used_twice_and_one_with_decay(self):
        """Three inner products of pairs, one of which counts twice.

        With decay: a product of the vectors with the weight that all rows share.
        """

        def twice(p, x):
            return jnp.sum(jnp.tanh(jnp.tanh(x @ p["w"]) @ p["w"].T))

        def decayed(p, x):
            return jnp.sum(jnp.tanh(x @ p["w"])) + jnp.sum(p["w"] ** 2)

        def line(fun):
            return self.lines(
                jacobian(fun)({"w": jnp.ones((64, 48))}, jnp.ones((N, 64)))
            )["['w']"]

        assert re.search(r"inner products +1.12k +12.3k", line(twice))
        assert re.search(r"shared by all rows +inner products +6.69k", line(decayed))

    def test_a_parameter_without_a_path_and_one_without_effect(self):
        J = jacobian(lambda p, x: p[0] * x)(
            (jnp.ones(()), jnp.ones((2, 2))), jnp.ones(N)
        )
        assert re.search(r"\[1\] +2x2 +zero", J.explain())
        assert (
            "(the parameter)"
            in jacobian(jnp.multiply)(jnp.ones(()), jnp.ones(N)).explain()
        )


CHECKED = (
    "attention_as_jax_has_it",
    "complex_parameters",
    "tied_embedding",
    "scan_over_layers",
    "the_same_for_every_example",
    "unused_empty_and_scalar_parameters",
)


def damaged(J, name):
    """J with one number of one leaf's terms changed by much."""
    paths = [
        path[0].key for path, _ in jax.tree.leaves_with_path(J._rows.origin.params)
    ]
    leaves = list(J._rows.sources)
    i = paths.index(name)
    arrays, treedef = jax.tree.flatten(leaves[i])
    floats = [k for k, x in enumerate(arrays) if jnp.issubdtype(x.dtype, jnp.floating)]
    arrays[floats[0]] = arrays[floats[0]] * 2
    leaves[i] = jax.tree.unflatten(treedef, arrays)
    assert isinstance(leaves[i], Leaf)
    return replace(J, _rows=replace(J._rows, sources=tuple(leaves)))


class TestCheck:
    @pytest.mark.parametrize("name", CHECKED)
    def test_it_passes(self, name):
        fun, params, batch = MODELS[name]()
        with jax.numpy_dtype_promotion(
            "standard" if MODELS[name].promotes else "strict"
        ):
            jax.jit(jacobian(fun))(params, *batch).check(2)

    @pytest.mark.parametrize("name", ["w", "b", "table", "v", "conv"])
    def test_it_names_the_leaf_that_is_wrong(self, name):
        J = jax.jit(jacobian(network))(*problem(9))
        with pytest.raises(ValueError, match=re.escape(f"params['{name}']")) as caught:
            damaged(J, name).check(1)
        assert "differs from plain jax.grad" in str(caught.value)

    def test_scaled_clipped_sliced_and_streamed_rows_pass(self):
        args = problem(9)

        def unlike(J):
            return J[2:].scale(jnp.arange(3.0)).clip(1e-3, nan_safe=True)

        for mode in ({}, {"chunk_size": 2}):
            jax.jit(lambda *args, mode=mode: unlike(jacobian(network, **mode)(*args)))(
                *args
            ).check(2)

    def test_a_bias_without_effect_passes(self):
        """Its gradient is only the rounding of the others."""

        def attention(p, x):
            scores = jax.nn.softmax((x @ p["q"]) @ (x @ p["k"] + p["b"][None]).T * 3)
            return jnp.sum(jnp.sin(scores @ x)) * 100

        params = {"q": jnp.ones((9, 5)), "k": jnp.eye(9)[:, :5], "b": jnp.ones(5)}
        J = jax.jit(jacobian(attention))(params, jax.random.normal(KEYS[3], (N, 7, 9)))
        assert 0 < jnp.max(jnp.abs(J.to_rows()["b"])) < 1e-3
        J.check()

    def test_rows_whose_parts_cancel_pass(self):
        """What is left of them is rounding: of norms as documented, and of every
        entry.
        """

        def pairs(p, x):
            h = x @ p["w"]
            return jnp.sum(jnp.sin(h[0::2]) - jnp.sin(h[1::2])) + 1e-3 * jnp.sum(p["v"])

        def centred(p, x):
            h = x @ p["w"]
            h = h - jnp.mean(h, 0, keepdims=True)
            return jnp.sum(jnp.cos(h) @ p["v"][:, None])

        params = {"w": jax.random.normal(KEYS[0], (256, 128)), "v": jnp.arange(128.0)}
        x = jnp.broadcast_to(jax.random.normal(KEYS[1], (4, 1, 256)), (4, 16, 256))
        for fun in (pairs, centred):
            J = jacobian(fun)(params, x)
            J.check()
            with pytest.raises(ValueError, match="differs"):
                damaged(J, "v").check()
        lengths = jnp.linalg.norm(J.to_rows()["w"].reshape(4, -1), axis=1)
        assert jnp.max(lengths) < 1e-2 * jnp.max(J.norms())

    @pytest.mark.parametrize(
        "params", [jnp.float32, jnp.bfloat16], ids=["mixed", "narrow"]
    )
    def test_what_is_computed_in_bfloat16(self, params):
        """The rounding is that of the narrowest numbers, not of the parameters."""

        def deep(p, x):
            for w in p.values():
                x = jax.nn.gelu(x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16))
            return jnp.mean(x.astype(jnp.float32) ** 2)

        keys = jax.random.split(KEYS[4], 4)
        p = {
            f"w{i}": (jax.random.normal(key, (64, 64)) / 8)
            for i, key in enumerate(keys)
        }
        p = jax.tree.map(lambda w: w.astype(params), p)
        J = jax.jit(jacobian(deep))(p, jax.random.normal(KEYS[5], (8, 64)))
        J.check()
        with pytest.raises(
            ValueError, match=re.escape("params['w2']: to_rows differs")
        ):
            damaged(J, "w2").check()

    def test_what_makes_no_floats_or_next_to_nothing(self):
        jacobian(lambda p, x: p)(jnp.ones(()), jnp.arange(N)).check()
        jacobian(lambda p, x: x * p * 1e-21)(jnp.ones(()), jnp.ones(N)).check()
        J = jacobian(lambda p, x: x @ p[:, :0])(jnp.ones((4, 3)), jnp.ones((N, 4)))
        J.check()
        assert J.sketch(KEYS[0], 3).shape == (N, 0, 3)

    def test_without_jit(self):
        with jax.disable_jit():
            jacobian(mlp)([(jnp.eye(3), jnp.ones(3))], jnp.ones((N, 3))).check()

    def test_rows_that_are_not_finite_do_not_hide_others(self):
        params, x, token = problem(9)
        J = jax.jit(jacobian(network))(params, x.at[0, 0, 0].set(jnp.nan), token)
        J.check()
        with pytest.raises(ValueError, match="differs"):
            damaged(J, "w").check()

    def test_outputs_of_several_dtypes(self):
        def f(p, x):
            return {"a": p["w"] @ x, "b": jnp.sum(p["w"]).astype(jnp.bfloat16)}

        jacobian(f)({"w": jnp.ones((2, 3))}, jnp.ones((N, 3))).check()

    def test_it_needs_values(self):
        with pytest.raises(TypeError, match="looks at values: call it outside jit"):
            jax.jit(lambda *args: jacobian(network)(*args).check())(*problem(3))


X = jnp.ones((N, 2))
P = {"w": jnp.ones(2), "b": jnp.ones(())}


def f(p, x):
    return p["w"] @ x + p["b"]


def pair(p, x):
    return {"a": f(p, x), "b": jnp.outer(x, x) * p["b"]}


J, K = jacobian(f)(P, X), jacobian(pair)(P, X)
OTHER = jacobian(lambda p, x: p["w"] @ x)({"w": jnp.ones(2)}, X)
COMPLEX = jacobian(lambda p, x: jnp.real(p["w"]) @ x + p["b"])(
    {**P, "w": jnp.ones(2, complex)}, X
)
STACK = jax.vmap(lambda p: jacobian(f)(p, X))(jax.tree.map(lambda x: x[None], P))

ERRORS = {
    "fun": (lambda: jacobian(3), TypeError, "argument fun must be a function"),
    "chunk_size": (lambda: jacobian(f, chunk_size=0), ValueError, "chunk_size"),
    "chunk_size kind": (lambda: jacobian(f, chunk_size=2.0), TypeError, "chunk_size"),
    "integer parameter": (
        lambda: jacobian(f)({"w": jnp.ones(2, int), "b": 1.0}, X),
        TypeError,
        "argument p['w'] is differentiated and must be a real or complex "
        "floating-point array",
    ),
    "mapped parameter": (
        lambda: jacobian(f, in_axes=({"w": None, "b": 0}, 0))(
            {"w": X[0], "b": X[:, 0]}, X
        ),
        ValueError,
        "argument p['b'] is differentiated and mapped over axis 0",
    ),
    "mapped parameters, all axes": (
        lambda: jacobian(f, in_axes=0)(P, X),
        ValueError,
        "argument p['b'] is differentiated and mapped over axis 0",
    ),
    "batch sizes": (
        lambda: jacobian(lambda p, x, y: p)(jnp.ones(()), X, X[:3]),
        ValueError,
        "the batch sizes disagree",
    ),
    "no batch": (
        lambda: jacobian(lambda p: p)(1.0),
        ValueError,
        "no argument is batched",
    ),
    "integer output": (
        lambda: jacobian(lambda p, x: 3)(P, X),
        TypeError,
        "the output of the function to differentiate must be real and floating-point, "
        "got a value "
        "of type int: return it with has_aux, or cast it",
    ),
    "complex output": (
        lambda: jacobian(lambda p, x: {"z": p["b"].astype(complex)})(P, X),
        TypeError,
        "outputs['z'] of the function to differentiate must be real and floating-point",
    ),
    "no output": (
        lambda: jacobian(lambda p, x: None)(P, X),
        TypeError,
        "returned no arrays",
    ),
    "has_aux": (
        lambda: jacobian(f, has_aux=True)(P, X),
        TypeError,
        "the result of fun must be a pair (value, aux) with has_aux, got float32[]",
    ),
    "text as aux": (
        lambda: jacobian(lambda p, x: (f(p, x), {"name": "a"}), has_aux=True)(P, X),
        TypeError,
        "aux['name'] must be an array or a number, got a value of type str",
    ),
    "recompute": (
        lambda: jacobian(f, recompute=1),
        TypeError,
        "argument recompute must be a bool (it is static), got 1",
    ),
    "index beyond": (
        lambda: J[5],
        IndexError,
        "index 5 is out of range: J has the rows of 5 examples",
    ),
    "indices beyond": (
        lambda: jax.jit(lambda J: J[np.array([0, -6])])(J),
        IndexError,
        "index -6 is out of range",
    ),
    "an index into no rows": (
        lambda: jax.jit(lambda i: J[:0][i].norms())(0),
        IndexError,
        "J has no rows",
    ),
    "mask of another length": (
        lambda: J[jnp.ones(3, bool)],
        ValueError,
        "a mask has one entry for each of 5 examples, got bool[3]",
    ),
    "one bool": (lambda: J[True], ValueError, "got bool[]"),
    "traced mask": (
        lambda: jax.jit(lambda mask: J[mask].norms())(X[:, 0] > 0),
        TypeError,
        "how many rows a traced mask keeps is not known: J[jnp.nonzero(mask, "
        "size=k)[0]]",
    ),
    "indices with two axes": (
        lambda: J[jnp.zeros((2, 2), int)],
        ValueError,
        "an array of indices has one axis, got int32[2,2]",
    ),
    "two indices": (
        lambda: J[1, 2],
        TypeError,
        "got a tuple of length 2: the outputs of an example stay together",
    ),
    "an index that is a float": (
        lambda: J[1.0],
        TypeError,
        "a Jacobian takes an int, a slice, an array (k,) of ints, or a mask (N,)",
    ),
    "a list with a tracer": (
        lambda: jax.jit(lambda i: J[[i, 0]].norms())(1),
        TypeError,
        "got a list of length 2: jnp.asarray(index)",
    ),
    "traced bound": (
        lambda: jax.jit(lambda i: J[i : i + 1].norms())(1),
        TypeError,
        "the bounds of a slice of a Jacobian are static, got a traced one: for k rows "
        "from a traced start, J[start + jnp.arange(k)]",
    ),
    "direction": (
        lambda: J @ {"w": jnp.ones(3), "b": jnp.ones(())},
        ValueError,
        "argument v['w'] does not match the parameters['w']",
    ),
    "direction structure": (lambda: J @ {"w": jnp.ones(2)}, ValueError, "v"),
    "complex direction": (
        lambda: J @ {"w": jnp.ones(2, complex), "b": jnp.ones(())},
        ValueError,
        "argument v['w'] does not match the parameters['w']: expected float32[2], got "
        "complex64[2]",
    ),
    "direction of a kind": (
        lambda: J @ {"w": "one", "b": jnp.ones(())},
        TypeError,
        "argument v['w'] must hold numbers, got a value of type str",
    ),
    "weights": (
        lambda: J.weighted_sum(jnp.ones(N - 1)),
        ValueError,
        "argument c must have one number per row, shape (5,), got float32[4]",
    ),
    "weights of outputs": (
        lambda: K.weighted_sum({"a": jnp.ones(N), "b": jnp.ones((N, 2, 3))}),
        ValueError,
        "argument c['b'] must have one number per row, shape (5, 2, 2), got "
        "float32[5,2,3]",
    ),
    "structure of weights": (
        lambda: K.scale(jnp.ones(N)),
        ValueError,
        "argument s must be a tree like the function's output",
    ),
    "complex weights": (
        lambda: J.T @ jnp.ones(N, complex),
        TypeError,
        "argument c must hold real numbers, got complex64[5]",
    ),
    "boolean weights": (
        lambda: J.scale(jnp.ones(N, bool)),
        TypeError,
        "argument s must hold real numbers, got bool[5]: give mask.astype(jnp.float32)",
    ),
    "text": (lambda: J.square_sum("text"), TypeError, "argument c"),
    "a list of weights": (
        lambda: J.weighted_sum([1.0] * N),
        ValueError,
        "argument c must be an array of shape (5,), got a list of length 5: "
        "jnp.asarray(c)",
    ),
    "a list of weights in a tree": (
        lambda: K.scale({"a": [1.0] * N, "b": jnp.ones((N, 2, 2))}),
        ValueError,
        "argument s['a'] must be an array of shape (5,), got a list of length 5: "
        "jnp.asarray(s['a'])",
    ),
    "one weight": (
        lambda: J.scale(2),
        TypeError,
        "argument s must be an array of shape (5,), got a value of type int: "
        "jnp.full((5,), 2.0)",
    ),
    "one weight in an array": (
        lambda: J.scale(jnp.float32(2)),
        ValueError,
        "shape (5,), got float32[]: jnp.full((5,), number)",
    ),
    "parameters as weights": (
        lambda: J.weighted_sum(P),
        ValueError,
        "argument c must be an array of shape (5,), got a dict",
    ),
    "no weights": (lambda: J.scale(None), ValueError, "of shape (5,), got None"),
    "a reference for weights": (
        lambda: J.scale(jax.new_ref(jnp.ones(N))),
        TypeError,
        "argument s must be an array of shape (5,), got a reference (jax.new_ref): "
        "pass ref[...]",
    ),
    "missing weights": (
        lambda: K.scale({"a": jnp.ones(N)}),
        ValueError,
        "argument s must be a tree like the function's output, but s is not: missing "
        "keys ['b']",
    ),
    "gram": (
        lambda: J.gram(X),
        TypeError,
        "argument other must be a Jacobian, got float32[5,2]",
    ),
    "gram of others": (lambda: J.gram(OTHER), ValueError, "other"),
    "gram of real and complex rows": (
        lambda: jacobian(f)(P, X).gram(COMPLEX),
        ValueError,
        "argument other['w'] does not match the parameters['w']: expected float32[2], "
        "got complex",
    ),
    "c @ J": (
        lambda: jnp.ones(N) @ J,
        TypeError,
        "float32[5] @ J is not defined: J.T @ c is the",
    ),
    "c of the host @ J": (
        lambda: np.ones(N) @ J,
        TypeError,
        "float64[5] @ J is not defined",
    ),
    "v of the host @ J.T": (
        lambda: np.ones(N) @ J.T,
        TypeError,
        "float64[5] @ J.T is not",
    ),
    "a complex number * J": (
        lambda: 2j * J,
        TypeError,
        "the factor must be a real number, got a value of type complex",
    ),
    "True * J": (lambda: True * J, TypeError, "the factor must be a real number"),
    "J * J": (lambda: J * J, TypeError, "J * J is not defined"),
    "array * J": (
        lambda: jnp.ones(N) * J,
        TypeError,
        "float32[5] * J is not defined: rows are scaled by J.scale(s), with a real "
        "number per row, "
        "as in J.scale(array)",
    ),
    "J / array": (lambda: J / jnp.ones(N), TypeError, "as in J.scale(1 / array)"),
    "array * J of a tree": (
        lambda: jnp.ones(N) * K,
        TypeError,
        "as in J.scale(s) for a tree s like J.norms()",
    ),
    "1 / J": (lambda: 1 / J, TypeError, "J.to_rows() are the rows as a tree"),
    "J + rows of other parameters": (
        lambda: J + jacobian(lambda p, x: p @ x)(jnp.ones(2), X),
        ValueError,
        "other",
    ),
    "J + fewer rows": (
        lambda: J + J[1:],
        ValueError,
        "J + other takes Jacobians with the same examples and outputs, got "
        "Jacobian(shape=(5, 3), leaves=2, rows kept) and Jacobian(shape=(4, 3)",
    ),
    "J + rows of several outputs": (
        lambda: J + K,
        ValueError,
        "the same examples and outputs",
    ),
    "J + rows in chunks": (
        lambda: J + jacobian(f, chunk_size=2)(P, X),
        ValueError,
        "made with the same options, got rows that are kept and recompute=False, "
        "chunk_size=2",
    ),
    "a stack + a stack": (
        lambda: STACK + STACK,
        ValueError,
        "this is a stack of Jacobians",
    ),
    "J + 1": (lambda: J + 1, TypeError, "J + other takes another Jacobian"),
    "array + J": (lambda: np.ones(N) + J, TypeError, "float64[5] + J is not defined"),
    "J - a tree": (lambda: J - P, TypeError, "Vector(J.sum()) + Vector(tree)"),
    "1 - J": (lambda: 1 - J, TypeError, "1 - J is not defined"),
    "J ** 2": (lambda: J**2, TypeError, "J ** 2 is not defined: J.square_sum() is"),
    "abs": (
        lambda: abs(J),
        TypeError,
        "abs(J) is not defined: J.norms() are the lengths",
    ),
    "float": (lambda: float(J), TypeError, "float(J) is not defined"),
    "int": (lambda: int(J), TypeError, "int(J) is not defined"),
    "complex": (lambda: complex(J), TypeError, "complex(J) is not defined"),
    "iter": (
        lambda: list(J),
        TypeError,
        "J[i] has the row of one example, as in [J[i] for",
    ),
    "an array": (
        lambda: np.asarray(J),
        TypeError,
        "an array of J is not defined: J holds factors",
    ),
    "an array of JAX": (
        lambda: jnp.asarray(J),
        TypeError,
        "J.to_rows() are the rows as a tree",
    ),
    "2 * J.T": (
        lambda: 2 * J.T,
        TypeError,
        "2 * J.T is not defined: rows are scaled by J.scale",
    ),
    "an array of J.T": (
        lambda: np.asarray(J.T),
        TypeError,
        "an array of J.T is not defined",
    ),
    "J.T.norms": (
        lambda: J.T.norms(),
        AttributeError,
        "products are those of J, as J.norms",
    ),
    "J.T.other": (lambda: J.T.other, AttributeError, "J.T has no attribute 'other'"),
    "c in J": (lambda: 1 in J, TypeError, "not iterable"),
    "J @ J": (
        lambda: J @ J,
        TypeError,
        "J @ other.T, or J.gram(other), are the inner products",
    ),
    "J.T @ params": (
        lambda: J.T @ P,
        ValueError,
        "J.T @ c takes a number per row, and c is a tree like the parameters: J @ c "
        "are its",
    ),
    "J.T @ vector of params": (
        lambda: J.T @ Vector(P),
        ValueError,
        "J @ c are its directional",
    ),
    "J @ weights": (
        lambda: J @ jnp.ones(N),
        ValueError,
        "J @ v takes a tree v like the parameters, and v holds a number per row: J.T "
        "@ v is",
    ),
    "J.T @ J": (lambda: J.T @ J, TypeError, "use J.square_sum() for its diagonal"),
    "negative bound": (
        lambda: J.clip(-1.0),
        ValueError,
        "argument max_norm must not be negative or NaN, got -1.0",
    ),
    "negative array of a bound": (
        lambda: J.clip({"w": 1.0, "b": jnp.float32(-1)}),
        ValueError,
        "argument max_norm['b'] must not be negative or NaN, got -1.0",
    ),
    "truth for a bound": (
        lambda: J.clip(True),
        TypeError,
        "argument max_norm must be a real number, got a value of type bool",
    ),
    "complex bound": (
        lambda: J.clip(jnp.ones((), complex)),
        TypeError,
        "argument max_norm must be a real number, got complex64[]",
    ),
    "NaN bound": (
        lambda: J.clip({"w": 1.0, "b": float("nan")}),
        ValueError,
        "max_norm['b']",
    ),
    "bound of rank 1": (
        lambda: J.clip(jnp.ones(2)),
        ValueError,
        "argument max_norm must be one real number, got float32[2]: for a bound per "
        "row, "
        "J.scale(jnp.minimum(1.0, bounds / J.norms()))",
    ),
    "bound of a kind": (
        lambda: J.clip({"w": 1.0, "b": "one"}),
        TypeError,
        "argument max_norm['b'] must be a real number, got a value of type str",
    ),
    "bounds of another structure": (
        lambda: J.clip({"w": 1.0}),
        ValueError,
        "max_norm does not match: missing keys ['b']",
    ),
    "bounds below a parameter": (
        lambda: jacobian(lambda p, x: f(p["net"], x))({"net": P}, X).clip(
            {"net": [1.0, 2.0]}
        ),
        ValueError,
        "max_norm['net'] does not match: expected a dict, got a list of length 2",
    ),
    "dim": (
        lambda: J.sketch(KEYS[0], 0),
        ValueError,
        "argument dim must be at least 1, got 0",
    ),
    "kind of key": (
        lambda: J.sketch(0, 4),
        TypeError,
        "argument key must be a PRNG key as jax.random.key makes it, got a value of "
        "type int",
    ),
    "keys": (
        lambda: J.sketch(KEYS, 4),
        TypeError,
        "argument key must be a PRNG key as jax.random.key makes it, got key<fry>[6]",
    ),
    "kind of dim": (
        lambda: J.sketch(KEYS[0], 2.5),
        TypeError,
        "argument dim must be an int",
    ),
    "rows to check": (
        lambda: J.check(rows=-1),
        ValueError,
        "argument rows must be at least 1, got -1",
    ),
    "kind of rows to check": (
        lambda: J.check(rows="a"),
        TypeError,
        "argument rows must be an int (it is static), got 'a'",
    ),
    "no parameters": (
        lambda: jacobian(lambda p, x: jnp.sum(x))({}, X),
        ValueError,
        "hold no arrays",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_the_error_table(name):
    call, kind, words = ERRORS[name]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call()
    assert caught.type is kind


def test_the_hint_for_a_bound_per_row_can_be_followed():
    bounds = jnp.linspace(0.5, 4.0, N)
    with pytest.raises(ValueError, match="for a bound per row") as caught:
        J.clip(bounds)
    hint = str(caught.value).split("for a bound per row, ")[1]
    norms = eval(hint, {"J": J, "jnp": jnp, "bounds": bounds}).norms()
    assert tree_allclose(norms, jnp.minimum(bounds, J.norms()))


def test_only_keys_that_differ_are_listed():
    with pytest.raises(ValueError, match=r"missing keys \['b'\]$"):
        J.clip({"w": 1.0})


def sizes(jaxpr):
    """The sizes of all arrays that a jaxpr makes, bodies included."""
    for equation in all_equations(jaxpr):
        yield from (getattr(v.aval, "size", 0) for v in equation.outvars)


def temporary(fun, *args):
    return jax.jit(fun).lower(*args).compile().memory_analysis().temp_size_in_bytes


def mlp(p, x):
    for w, b in p:
        x = jnp.tanh(x @ w + b)
    return jnp.sum(x)


class TestMemory:
    def test_many_look_ups_in_a_narrow_table(self):
        """No pairs of places are there, of which an example has more than its row has
        entries.
        """
        p, tokens = jnp.ones((512, 2)), jnp.arange(16 * 256).reshape(16, 256) % 300

        def clipped(p, tokens):
            return (
                jacobian(lambda p, i: jnp.sum(jnp.tanh(p[i])))(p, tokens)
                .clip(1.0)
                .sum()
            )

        assert temporary(clipped, p, tokens) < 16 * 256**2  # a byte for each pair

    wide, many = 256, 64

    def arguments(self):
        w, b = jnp.ones((self.wide, self.wide)), jnp.ones(self.wide)
        return [(w, b)] * 3, jnp.ones((self.many, self.wide))

    def test_no_rows_are_built_for_norms_clip_gram_and_slopes(self):
        params, x = self.arguments()

        def step(p, x):
            outputs, J = value_and_jacobian(mlp)(p, x)
            clipped = J.clip(1.0)
            return (
                outputs,
                J.norms(),
                clipped.sum(),
                J.gram(),
                J @ p,
                clipped.square_sum(),
            )

        jaxpr = jax.make_jaxpr(step)(params, x).jaxpr
        assert max(sizes(jaxpr)) <= self.wide**2  # a leaf, and nothing near N times it

    def test_a_clipped_sum_takes_little_more_than_a_gradient(self):
        params, x = self.arguments()
        clipped = temporary(lambda p, x: jacobian(mlp)(p, x).clip(1.0).sum(), params, x)
        rows = temporary(
            lambda p, x: jax.vmap(jax.grad(mlp), (None, 0))(p, x), params, x
        )
        assert clipped < 4 * self.many * self.wide * 4 * len(params)
        assert rows + clipped > 0  # rows are an output here, not temporary

    @pytest.mark.parametrize("mode", [{}, {"chunk_size": 32}], ids=["kept", "chunks"])
    def test_a_sum_alone_makes_no_rows_that_are_smaller_than_their_factors(self, mode):
        """Kernels of convolutions, tables of few lines, small weights at many
        positions.
        """
        n, side, wide = 32, 12, 8

        def loss(p, x, tokens):
            x = jax.lax.conv(x[None], p["kernel"], (1, 1), "SAME")[0]
            x = jnp.tanh(x.reshape(wide, -1).T) + p["table"][tokens]
            for _ in range(6):
                x = jnp.tanh(x @ p["w"])
            return jnp.sum(x)

        keys = iter(jax.random.split(KEYS[3], 5))
        shapes = {"kernel": (wide, wide, 7, 7), "table": (4, wide), "w": (wide, wide)}
        params = {
            name: jax.random.normal(next(keys), shape) for name, shape in shapes.items()
        }
        x = jax.random.normal(next(keys), (n, wide, side, side))
        tokens = jax.random.randint(next(keys), (n, side**2), 0, 4)
        c = jnp.linspace(-1, 1, n)

        def alone(p, c):
            return jacobian(loss, **mode)(p, x, tokens).weighted_sum(c)

        def after_norms(p, c):
            J = jacobian(loss, **mode)(p, x, tokens)
            return J.norms(), J.weighted_sum(c)

        def ordinary(p, c):
            return jax.grad(lambda p: c @ jax.vmap(loss, (None, 0, 0))(p, x, tokens))(p)

        def flops(fun):
            return jax.jit(fun).lower(params, c).compile().cost_analysis()["flops"]

        assert temporary(alone, params, c) < 1.1 * temporary(ordinary, params, c)
        assert flops(alone) < 1.1 * flops(ordinary)
        want = jax.jit(ordinary)(params, c)
        assert tree_allclose(jax.jit(alone)(params, c), want)
        assert tree_allclose(jax.jit(after_norms)(params, c)[1], want)
        J = jax.jit(jacobian(loss, **mode))(params, x, tokens)  # outside, it has rows
        assert tree_allclose(J.weighted_sum(c), want)

    def test_sums_in_a_loop_share_the_rows(self):
        """A sum where J was made takes factors, whatever was asked of J before."""

        def loss(kernel, x):
            return jnp.sum(jnp.tanh(jax.lax.conv(x[None], kernel, (1, 1), "SAME")))

        kernel, x = jnp.ones((8, 8, 3, 3)), jnp.ones((5, 8, 9, 9))

        def convolutions(product):
            jaxpr = jax.make_jaxpr(lambda p, x: product(jacobian(loss)(p, x)))(
                kernel, x
            ).jaxpr
            return str(jaxpr).count("conv_general_dilated[")

        def turns(J):
            return jax.lax.scan(lambda v, _: (J.T @ (J @ v), None), kernel, length=9)

        bare = convolutions(lambda J: J._rows.sources)
        assert convolutions(lambda J: J.sum()) == bare + 1
        assert convolutions(turns) == bare
        assert convolutions(lambda J: jax.lax.cond(True, J.sum, J.mean)) == bare
        assert convolutions(lambda J: J.clip(1.0).sum()) == bare
        assert convolutions(lambda J: J.scale(x[:, 0, 0, 0]).sum()) == bare
        assert convolutions(lambda J: (J @ kernel, J.sum())) == bare + 1
        assert convolutions(lambda J: (J.norms(), J.T @ x[:, 0, 0, 0])) == bare + 1
        assert convolutions(lambda J: (J.clip(1.0).sum(), J.sum())) == bare + 1
        assert convolutions(lambda J: J[1:3].sum()) == bare + 1

    def test_chunks_bound_the_memory(self):
        params, x = self.arguments()

        def of(chunk_size):
            return lambda p, x: (
                jacobian(mlp, chunk_size=chunk_size)(p, x).clip(1.0).sum()
            )

        x = jnp.concatenate([x] * 64)
        assert temporary(of(64), params, x) < temporary(of(None), params, x) / 8

    @pytest.mark.parametrize(
        "remat", [jax.checkpoint, lambda f: f], ids=["remat", "plain"]
    )
    @pytest.mark.parametrize("max_norm", [1.0, {"w": 1.0}], ids=["one bound", "bounds"])
    def test_recomputing_keeps_no_factors_of_a_scan(self, remat, max_norm):
        layers, wide, many = 32, 64, 64

        def deep(p, x):
            layer = remat(lambda x, w: (jnp.tanh(x @ w), None))
            return jnp.sum(jax.lax.scan(layer, x, p["w"])[0])

        params, x = {"w": jnp.ones((layers, wide, wide))}, jnp.ones((many, wide))

        def clipped_sum(**mode):
            return lambda p, x: jacobian(deep, **mode)(p, x).clip(max_norm).sum()

        def ordinary(p, x):
            return jax.grad(lambda p: jnp.sum(jax.vmap(deep, (None, 0))(p, x)))(p)

        factors = 2 * layers * many * wide * 4  # inputs and cotangents of each layer
        kept = temporary(clipped_sum(), params, x)
        recomputed = temporary(clipped_sum(recompute=True), params, x)
        assert kept > factors
        if remat is jax.checkpoint:  # without, the ordinary gradient keeps as much
            assert recomputed < kept - factors / 3
        # The pass for norms and the one for the sum are not merged: each has freed what
        # it held.
        assert recomputed < 1.1 * temporary(ordinary, params, x)

    def test_a_large_vocabulary_costs_nothing_per_row(self):
        def bag(p, tokens):
            return jnp.sum(jnp.tanh(p["table"][tokens].sum(0) @ p["w"]))

        params = {"table": jnp.ones((20_000, 16)), "w": jnp.ones((16, 4))}
        tokens = jnp.zeros((self.many, 10), int)
        jaxpr = jax.make_jaxpr(lambda *args: jacobian(bag)(*args).clip(1.0).sum())(
            params, tokens
        )
        assert max(sizes(jaxpr.jaxpr)) <= 20_000 * 16
        assert sum(np.array(list(sizes(jaxpr.jaxpr))) >= 20_000 * 16) <= 6
