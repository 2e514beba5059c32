"""The error table: for every misuse, the kind and the words of the message."""

import inspect
import re
from collections import OrderedDict, deque

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree_grads import (
    Accumulator,
    Vector,
    chain_rule_grad,
    chain_rule_value_and_grad,
    fisher_product,
    gauss_newton_product,
    jacobian,
    linear_combination,
    per_example_grad,
    per_example_value_and_grad,
    reassemble,
    value_and_jacobian,
)

W = {"w": jnp.ones(2)}
U, V = Vector(W), Vector({"w": jnp.ones(2)})
X = jnp.ones((5, 2))
KEYS = jax.random.split(jax.random.key(0), 5)


def combine(*trees, coefficients=None):
    return lambda: linear_combination(
        [1.0] * len(trees) if coefficients is None else coefficients, trees
    )


def stacked(coefficients, tree):
    return lambda: linear_combination(coefficients, tree)


def f(params, x):
    return jnp.sum(params["w"] * x)


def labelled(params, x, y):
    return (f(params, x) - y) ** 2


def rows(*args, fun=f, **options):
    return lambda: per_example_grad(fun, **options)(*args)


def chain(*args, outer=jnp.sum, fun=f, call=None, **options):
    return lambda: chain_rule_grad(outer, fun, **options)(*args, **(call or {}))


def assembled(outputs, rows, outer=jnp.sum):
    return lambda: reassemble(outer, outputs, rows)


def keyed(params, x, key):
    return f(params, x)


J = jacobian(f)(W, X)
FACTORS = (
    "is a Jacobian, and a Jacobian holds factors, not gradients: pass J.sum(), "
    "J.mean() or "
    "J.to_rows()"
)
layers = {"layers": [{"w": jnp.ones((3, 1))}, {"w": jnp.ones(3)}]}
shorter = {"layers": [{"w": jnp.ones((3, 1))}]}
broadcastable = {"layers": [{"w": jnp.ones((3, 1))}, {"w": jnp.ones((3, 1))}]}
FLOATS = "and only real or complex floating-point leaves can be combined"

TABLE = {
    # Trees that do not agree
    "shape": (
        combine(layers, layers, broadcastable),
        ValueError,
        "argument trees[2]['layers'][1]['w'] does not match "
        "trees[0]['layers'][1]['w']: expected "
        "float32[3], got float32[3,1] (trees are never broadcast; reshape one of them)",
    ),
    "length": (
        combine(layers, shorter),
        ValueError,
        "argument trees[1]['layers'] does not match trees[0]['layers']: expected a "
        "list of length "
        "2, got a list of length 1",
    ),
    "dtype": (
        combine(W, {"w": jnp.ones(2, jnp.bfloat16)}),
        ValueError,
        "expected float32[2], got bfloat16[2] (nothing is cast silently; cast one tree "
        "with "
        "optax.tree.cast)",
    ),
    "keys": (
        combine(
            {"a": jnp.ones(2), "b": jnp.ones(2)}, {"a": jnp.ones(2), "c": jnp.ones(2)}
        ),
        ValueError,
        "argument trees[1] does not match trees[0]: missing keys ['b'], unexpected "
        "keys ['c']",
    ),
    "None": (combine(W, {"w": None}), ValueError, "expected float32[2], got None"),
    "node": (
        combine([jnp.ones(1)], (jnp.ones(1),)),
        ValueError,
        "expected a list of length 1, got a tuple of length 1",
    ),
    "order": (
        combine(
            OrderedDict(a=jnp.ones(1), b=jnp.ones(1)),
            OrderedDict(b=jnp.ones(1), a=jnp.ones(1)),
        ),
        ValueError,
        "argument trees[1] does not match trees[0]: the same keys in another order",
    ),
    "custom node": (
        combine({"a": jax.tree_util.Partial(min)}, {"a": jnp.ones(1)}),
        ValueError,
        "argument trees[1]['a'] does not match trees[0]['a']: expected a Partial, got "
        "float32[1]",
    ),
    "static data": (
        combine(
            jax.tree_util.Partial(min, jnp.ones(1)),
            jax.tree_util.Partial(max, jnp.ones(1)),
        ),
        ValueError,
        "two Partial nodes whose static data differ",
    ),
    # Leaves that have no place in a sum
    "integer": (
        combine(W, {"w": jnp.arange(2)}),
        TypeError,
        f"argument trees[1]['w'] is an integer or boolean (int32[2]), {FLOATS}: cast "
        "it with "
        "optax.tree.cast, or leave it out",
    ),
    "bool": (
        combine({"w": jnp.array(True)}),
        TypeError,
        "is an integer or boolean (bool[])",
    ),
    "key": (
        combine({"k": KEYS}),
        TypeError,
        "trees[0]['k'] is an array of PRNG keys (key<fry>[5])",
    ),
    "string": (
        combine(W, {"w": "relu"}),
        TypeError,
        f"argument trees[1]['w'] is not an array (a value of type str), {FLOATS}: "
        "leave it out",
    ),
    "stacked string": (
        stacked([1.0], {"w": "s"}),
        TypeError,
        "argument trees['w'] is not an array",
    ),
    "stacked integer": (
        stacked([1.0], {"w": jnp.ones(1, int)}),
        TypeError,
        "argument trees['w'] is",
    ),
    "a generator of trees": (
        stacked([1.0], (tree for tree in [W])),
        TypeError,
        "argument trees must be a list or a tuple of K trees, or one tree whose leaves "
        "are "
        "stacked, got a value of type generator: give list(trees)",
    ),
    "a deque of trees": (
        stacked([1.0], deque([W])),
        TypeError,
        "got a value of type deque: give",
    ),
    # Coefficients
    "a generator": (
        combine(W, coefficients=(c for c in [1.0])),
        TypeError,
        "argument coefficients must hold numbers, got a value of type generator",
    ),
    "no numbers": (
        combine(W, W, coefficients=[1.0, None]),
        TypeError,
        "argument coefficients must hold numbers, got object[2]",
    ),
    "no trees": (combine(), ValueError, "argument trees is empty"),
    "count": (
        combine(W, W, coefficients=[1, 2, 3]),
        ValueError,
        "argument coefficients holds 3 scalars per combination for 2 trees, got "
        "float32[3]",
    ),
    "a scalar": (
        combine(W, coefficients=2.0),
        ValueError,
        "of shape (K,) or (M, K), got float32[]",
    ),
    "rank 3": (
        combine(W, coefficients=jnp.ones((1, 1, 1))),
        ValueError,
        "of shape (K,) or (M, K), got float32[1,1,1]",
    ),
    "ragged": (
        combine(W, W, coefficients=[[1, 2], [3]]),
        ValueError,
        "must be a sequence of K scal",
    ),
    "arrays in a list": (
        combine(W, W, coefficients=[jnp.ones(2), 1.0]),
        ValueError,
        "argument coefficients[0] must be a scalar, got float32[2]: give a matrix",
    ),
    "words": (
        combine(W, coefficients=["a"]),
        TypeError,
        "argument coefficients must hold numbers",
    ),
    "a dict": (
        combine(W, coefficients={"a": 1}),
        TypeError,
        "argument coefficients must hold num",
    ),
    "keys as coefficients": (
        combine(*[W] * 5, coefficients=KEYS),
        TypeError,
        "argument coefficients must hold numbers, got key<fry>[5]",
    ),
    "complex": (
        combine(W, W, coefficients=[1j, 2]),
        TypeError,
        "argument coefficients is complex, but argument trees[0]['w'] is real "
        "(float32[2])",
    ),
    "complex stacked": (
        stacked([1j, 2], {"w": jnp.ones((2, 3))}),
        TypeError,
        "argument coefficients is complex, but argument trees['w'] is real",
    ),
    "stack length": (
        stacked([1, 2], {"w": jnp.ones(3)}),
        ValueError,
        "argument trees['w'] must be stacked on a leading axis of length 2, one entry "
        "per "
        "coefficient, got float32[3]",
    ),
    "stack scalar": (stacked([1], {"w": jnp.ones(())}), ValueError, "got float32[]"),
    # Vector
    "vector * vector": (
        lambda: U * V,
        TypeError,
        "Vector * Vector is not defined: u @ v is the inner",
    ),
    "vector / vector": (lambda: U / V, TypeError, "Vector / Vector is not defined"),
    "vector + number": (
        lambda: U + 1.0,
        TypeError,
        "jax.tree.map(lambda x: x + 1.0, v.tree)",
    ),
    "number - vector": (lambda: 1.0 - U, TypeError, "nothing is broadcast over a tree"),
    "float zero": (lambda: 0.0 + U, TypeError, "nothing is broadcast over a tree"),
    "array + vector": (
        lambda: jnp.ones(2) + U,
        TypeError,
        "float32[2] + Vector is not defined",
    ),
    "vector @ array": (
        lambda: U @ jnp.ones(2),
        TypeError,
        "Vector @ float32[2] is not defined",
    ),
    "array @ vector": (
        lambda: np.ones(2) @ U,
        TypeError,
        "float64[2] @ Vector is not defined",
    ),
    "vector + tree": (
        lambda: U + W,
        TypeError,
        "for Vector + takes another Vector: wrap a tree as Vector(tree)",
    ),
    "array * vector": (
        lambda: np.ones(2) * U,
        ValueError,
        "a Vector is scaled by a scalar, got float32[2]",
    ),
    "word * vector": (
        lambda: U * "2",
        TypeError,
        "Vector * takes a scalar, got a value of type str",
    ),
    "number / vector": (
        lambda: 1 / U,
        TypeError,
        "a value of type int / Vector is not defined: entry by entry, write "
        "jax.tree.map(lambda x: 1 / x, v.tree)",
    ),
    "array / vector": (
        lambda: np.ones(2) / U,
        TypeError,
        "float64[2] / Vector is not defined",
    ),
    "vector ** number": (
        lambda: U**2,
        TypeError,
        "jax.tree.map(lambda x: x**2, v.tree)",
    ),
    "number ** vector": (
        lambda: 2**U,
        TypeError,
        "jax.tree.map(lambda x: 2**x, v.tree)",
    ),
    "abs(vector)": (
        lambda: abs(U),
        TypeError,
        "jax.tree.map(lambda x: abs(x), v.tree)",
    ),
    "array of a vector": (lambda: np.asarray(U), TypeError, "ravel_pytree(v.tree)[0]"),
    "complex * real": (
        lambda: 1j * U,
        TypeError,
        "the scalar is complex, but argument left.tree['w'] is real (float32[2])",
    ),
    "key * vector": (
        lambda: KEYS[0] * U,
        TypeError,
        "the scalar must hold numbers, got key<fry>[]",
    ),
    "vector shape": (
        lambda: U + Vector({"w": jnp.ones((2, 1))}),
        ValueError,
        "argument right.tree['w'] does not match left.tree['w']: expected float32[2], "
        "got "
        "float32[2,1]",
    ),
    "vector dtype": (
        lambda: U @ Vector({"w": jnp.ones(2, jnp.bfloat16)}),
        ValueError,
        "expected float32[2], got bfloat16[2]",
    ),
    "vector string": (
        lambda: -Vector({"a": "s"}),
        TypeError,
        "argument left.tree['a'] is not an array",
    ),
    "vector integer": (
        lambda: Vector({"a": 3}) / 2,
        TypeError,
        "left.tree['a'] is an integer",
    ),
    # The batch of a call
    "no function": (
        rows(W, X, fun=3),
        TypeError,
        "argument fun must be a function, got a value of ty",
    ),
    "argnums range": (
        rows(W, X, argnums=2),
        ValueError,
        "argument argnums=2 needs a positional argument 2, but 2 came",
    ),
    "argnums type": (
        rows(W, X, argnums=1.0),
        TypeError,
        "argnums must be an int or a tuple of ints",
    ),
    "parameters as argnums": (
        lambda: jacobian(labelled, W)(X, X[:, 0]),
        TypeError,
        "argument argnums must be an int or a tuple of ints, got a dict: call "
        "jacobian(fun)(params, *batch)",
    ),
    "an array as argnums": (
        lambda: chain_rule_grad(jnp.sum, f, W["w"])(X),
        TypeError,
        "got float32[2]: call chain_rule_grad(outer, fun)(params, *batch)",
    ),
    "all by keyword": (
        lambda: jacobian(f)(params=W, x=X),
        ValueError,
        "argument argnums=0 needs a positional argument 0, but the call passed no "
        "positional "
        "arguments (an argument that is differentiated cannot be passed by keyword)",
    ),
    "an option at the call": (
        lambda: jacobian(f)(W, X, recompute=True),
        TypeError,
        "recompute is an option of jacobian: jacobian(fun, recompute=True)(...)",
    ),
    "axes at the call": (
        lambda: per_example_grad(f)(W, X, in_axes=(None, 0)),
        TypeError,
        "in_axes is an option of per_example_grad: per_example_grad(fun, "
        "in_axes=(None, 0))(...)",
    ),
    "a long option at the call": (
        lambda: jacobian(f)(W, X, in_axes=(W, 0)),
        TypeError,
        "jacobian(fun, in_axes=...)(...)",
    ),
    "an option of others at the call": (
        lambda: per_example_grad(f)(W, X, recompute=True),
        TypeError,
        "recompute is not an option of per_example_grad, and fun does not take it",
    ),
    # References, keys, labels
    "a reference for a parameter": (
        lambda: jacobian(f)({"w": jax.new_ref(W["w"])}, X),
        TypeError,
        "argument params['w'] is differentiated and must be a real or complex "
        "floating-point "
        "array, got a reference (jax.new_ref): pass ref[...]",
    ),
    "a reference for a batch": (
        lambda: jacobian(f)(W, jax.new_ref(X)),
        TypeError,
        "over axis 0, but it is a reference (jax.new_ref), not an array: pass ref[...]",
    ),
    "a reference in a tree": (
        lambda: 2 * Vector({"w": jax.new_ref(X)}),
        TypeError,
        "(a reference (jax.new_ref)), and only real or complex floating-point leaves "
        "can be "
        "combined: pass ref[...]",
    ),
    "a key for all": (
        rows(W, X, KEYS[0], fun=keyed),
        ValueError,
        "argument key would be mapped over axis 0, but it is key<fry>[], of rank 0: "
        "if it is a "
        "PRNG key, give one key per example: jax.random.split(key, N); None in "
        "in_axes gives all "
        "examples the same random numbers",
    ),
    "a raw key for all": (
        rows(W, X, {"k": jax.random.PRNGKey(0)}, fun=keyed),
        ValueError,
        "axis 0 of argument key['k'] has size 2: if it is a PRNG key, give one key "
        "per example: "
        "jax.random.split(key['k'], 5); None in in_axes gives all examples the same",
    ),
    "a raw key before the batch": (
        lambda: jacobian(lambda key, p, x: f(p, x), 1)(jax.random.PRNGKey(0), W, X),
        ValueError,
        "if it is a PRNG key, give one key per example: jax.random.split(key, 5)",
    ),
    "a key by keyword": (
        lambda: jacobian(keyed)(W, X, key=KEYS[0]),
        ValueError,
        "jax.random.split(key, N); a key bound beforehand gives all examples the same",
    ),
    "a key among the parameters": (
        rows({**W, "key": KEYS[0]}, X),
        TypeError,
        "a PRNG key that all examples share gives them the same random numbers",
    ),
    "labels of text": (
        rows(W, X, np.array(["a"] * 5), fun=labelled),
        TypeError,
        "argument y would be mapped over axis 0, but it is str32[5], not an array of "
        "numbers: if "
        "these are labels, give each a number, as numpy.unique(labels, "
        "return_inverse=True)[1]",
    ),
    "labels of objects": (
        rows(W, X, np.array([None] * 5), fun=labelled),
        TypeError,
        "argument y would be mapped over axis 0, but it is object[5], not an array of "
        "numbers",
    ),
    "a list of text": (
        rows(W, X, ["a"] * 5, fun=labelled),
        TypeError,
        "argument y[0] would be mapped over axis 0, but it is a value of type str, "
        "not an array: "
        "if these are labels, give each a number",
    ),
    "a list of examples": (
        lambda: jacobian(labelled)(W, list(X), X[:, 0]),
        ValueError,
        "axis 0 of argument x[0] has size 2, but axis 0 of argument y has size 5: if "
        "x is a list "
        "of examples, make it one array with jnp.stack(x); if not, in_axes takes",
    ),
    "a list of arrays of rank 0": (
        lambda: jacobian(labelled)(W, X, {"y": list(X[:, 0])}),
        ValueError,
        "of rank 0: if the list holds a number for each example, make it one array "
        "with "
        "jnp.asarray(y['y'])",
    ),
    # A Jacobian is no tree
    "a vector of J": (lambda: Vector(J), TypeError, f"argument tree {FACTORS}"),
    "a vector of a tree of J": (
        lambda: Vector({"a": J}) + Vector({"a": J}),
        TypeError,
        f"argument left.tree['a'] {FACTORS}",
    ),
    "a vector of J.T": (lambda: Vector(J.T), TypeError, "holds factors, not gradients"),
    "a combination of J": (combine(J, J), TypeError, f"argument trees[0] {FACTORS}"),
    "a combination of trees of J": (
        combine({"a": J}, {"a": J}),
        TypeError,
        f"argument trees[0]['a'] {FACTORS}",
    ),
    "J for a stack": (stacked(jnp.ones(5), J), TypeError, f"argument trees {FACTORS}"),
    "zeros like J": (
        lambda: Accumulator.zeros_like(J),
        TypeError,
        f"argument grads {FACTORS}",
    ),
    "J added": (
        lambda: Accumulator.zeros_like(W).add(J),
        TypeError,
        f"argument grads {FACTORS}",
    ),
    "a recomputed J added": (
        lambda: Accumulator.zeros_like(W).add({"a": jacobian(f, recompute=True)(W, X)}),
        TypeError,
        f"argument grads['a'] {FACTORS}",
    ),
    "J for rows": (assembled(jnp.ones(5), J), TypeError, f"argument rows {FACTORS}"),
    "J for rows of two outputs": (
        assembled((jnp.ones(5), jnp.ones(5)), J),
        TypeError,
        f"argument rows {FACTORS}",
    ),
    "argnums string": (
        rows(W, X, argnums="0"),
        TypeError,
        "argnums must be an int or a tuple of i",
    ),
    "argnums twice": (
        rows(W, X, argnums=(0, -2)),
        ValueError,
        "names the same argument twice",
    ),
    "argnums empty": (rows(W, X, argnums=()), ValueError, "argument argnums is empty"),
    "integer parameter": (
        rows({"w": jnp.ones(2), "step": jnp.int32(3)}, X),
        TypeError,
        "argument params['step'] is differentiated and must be a real or complex "
        "floating-point "
        "array, got int32[]: move it to an argument that is not differentiated, with "
        "None in "
        "in_axes if all examples share it, or close over it in the function; if it is "
        "trained, "
        "make it an array of a float dtype",
    ),
    "number parameter": (
        rows({"w": 3}, X),
        TypeError,
        "argument params['w'] is differentiated and",
    ),
    "function parameter": (
        rows({"w": jnp.ones(2), "act": jnp.tanh}, X),
        TypeError,
        "got a value of type PjitFunction: move it to an argument that is not "
        "differentiated, with "
        "None in in_axes if all examples share it, or close over it in the function",
    ),
    "sizes": (
        rows(W, {"a": X, "b": jnp.ones(4)}),
        ValueError,
        "the batch sizes disagree: axis 0 of argument x['a'] has size 5, but axis 0 of "
        "argument "
        "x['b'] has size 4: in_axes takes the axis of its examples, or None if they "
        "share it",
    ),
    "rank": (
        rows(W, X, in_axes=(None, 2)),
        ValueError,
        "argument x would be mapped over axis 2, but it is float32[5,2], of rank 2",
    ),
    "a scalar batch": (
        rows(W, jnp.ones(())),
        ValueError,
        "over axis 0, but it is float32[], of rank 0",
    ),
    "a function batch": (
        rows(W, jnp.tanh),
        TypeError,
        "not an array: in_axes takes the axis of its examples, or None if they share "
        "it",
    ),
    "a keyword flag": (
        lambda: per_example_grad(lambda p, x, train: p)(jnp.ones(()), X, train=True),
        TypeError,
        "argument train would be mapped over axis 0, but it is a value of type bool, "
        "not an "
        "array: keyword arguments are mapped over axis 0; what all examples share is "
        "bound "
        "beforehand, with functools.partial(fun, train=...) or a lambda",
    ),
    "a keyword scalar": (
        lambda: per_example_grad(lambda p, x, scale: p)(
            jnp.ones(()), X, scale=jnp.ones(())
        ),
        ValueError,
        "it is float32[], of rank 0: keyword arguments are mapped over axis 0; what "
        "all examples "
        "share is bound beforehand, with functools.partial(fun, scale=...) or a lambda",
    ),
    "a keyword of another size": (
        lambda: per_example_grad(lambda p, x, scale: p)(
            jnp.ones(()), X, scale=jnp.ones(3)
        ),
        ValueError,
        "axis 0 of argument scale has size 3: keyword arguments are mapped over axis "
        "0; what all",
    ),
    "nothing batched": (
        rows(W, X, in_axes=(None, None)),
        ValueError,
        "no argument is batched",
    ),
    "in_axes none": (rows(W, X, in_axes=None), ValueError, "no argument is batched"),
    "in_axes string": (
        rows(W, X, in_axes="0"),
        TypeError,
        "must be an int, None, a tuple with an entry for each positional argument, or "
        "'default', "
        "got '0'",
    ),
    "in_axes length": (
        rows(W, X, in_axes=(None, 0, 0)),
        ValueError,
        "argument in_axes has 3 entries for 2 positional arguments",
    ),
    "in_axes prefix": (
        rows(W, (X, X), in_axes=(None, [0, 0])),
        ValueError,
        "in_axes[1] = [0, 0] is not a pytree prefix of argument x, a tuple of length 2",
    ),
    "in_axes dict": (
        rows(W, X, in_axes={"x": 0}),
        TypeError,
        "must be an int, None, a tuple with an entry for each positional argument, or "
        "'default', "
        "got a value of type dict",
    ),
    "in_axes words": (
        rows(W, X, in_axes=(None, "0")),
        TypeError,
        "in_axes[1] must hold ints and Non",
    ),
    "in_axes bool": (
        rows(W, X, in_axes=(None, True)),
        TypeError,
        "in_axes[1] must hold ints and Non",
    ),
    "names without a signature": (
        lambda: per_example_grad(jax.tree_util.Partial(max))(3, X),
        TypeError,
        "argument args[0] is differentiated",
    ),
    "a list of labels": (
        lambda: per_example_grad(lambda p, x, y: f(p, x) - y)(W, X, [0.0] * 5),
        TypeError,
        "argument y[0] would be mapped over axis 0, but it is a value of type float, "
        "not an array: "
        "if the list holds a number for each example, make it one array with "
        "jnp.asarray",
    ),
    # Chunks
    "chunk type": (
        rows(W, X, chunk_size=2.0),
        TypeError,
        "chunk_size must be None or an int (it is s",
    ),
    "chunk bool": (
        rows(W, X, chunk_size=True),
        TypeError,
        "chunk_size must be None or an int",
    ),
    "chunk zero": (
        rows(W, X, chunk_size=0),
        ValueError,
        "chunk_size must be at least 1, got 0",
    ),
    "chain chunk": (
        chain(W, X, chunk_size=-1),
        ValueError,
        "chunk_size must be at least 1, got -1",
    ),
    # What functions return
    "vector value": (
        rows(W, X, fun=lambda p, x: p["w"] * x),
        ValueError,
        "the value of fun at one example must be a scalar, got float32[2]: the rows of "
        "a function "
        "with several outputs are those of jacobian",
    ),
    "integer value": (
        rows(W, X, fun=lambda p, x: 1),
        TypeError,
        "must be a floating-point scalar, got",
    ),
    "tree value": (
        rows(W, X, fun=lambda p, x: p),
        TypeError,
        "got a value of type dict",
    ),
    "complex value": (
        rows(W, X, fun=lambda p, x: jnp.complex64(1)),
        TypeError,
        "must be real, got complex64[]: take its real part, or abs",
    ),
    "no aux": (
        rows(W, X, has_aux=True),
        TypeError,
        "the result of fun must be a pair (value, aux) with has_aux, got float32[]",
    ),
    "chain no aux": (
        chain(W, X, has_aux=True),
        TypeError,
        "the result of fun must be a pair",
    ),
    "outer no aux": (
        chain(W, X, outer_has_aux=True, outer=lambda f: [jnp.sum(f), 1, 2]),
        TypeError,
        "the result of outer must be a pair (value, aux) with has_aux, got a list of "
        "length 3",
    ),
    "outer vector": (
        chain(W, X, outer=lambda f: f),
        ValueError,
        "the value of outer must be a scalar, got float32[5]: outer maps the stacked "
        "outputs to "
        "one scalar, by a sum or a mean for instance",
    ),
    "outer pair": (
        chain(W, X, outer=lambda f: (1.0, f)),
        TypeError,
        "got a value of type tuple: out",
    ),
    "outer complex": (
        chain(W, X, outer=lambda f: jnp.sum(f).astype(jnp.complex64)),
        TypeError,
        "the value of outer must be real, got complex64[]",
    ),
    "outer integer": (
        chain(W, X, outer=jnp.argmax),
        TypeError,
        "must be a floating-point scalar",
    ),
    "outer none": (
        chain(W, X, outer=None),
        TypeError,
        "argument outer must be a function, got None",
    ),
    "outer args": (
        chain(W, X, call={"outer_args": jnp.ones(2)}),
        TypeError,
        "argument outer_args must be a tuple of arguments, got float32[2]",
    ),
    "swapped": (
        lambda: chain_rule_grad(labelled, jnp.mean)(W, X, X[:, 0]),
        TypeError,
        "arguments outer and fun look swapped: outer, labelled(params, x, y), does not "
        "take the "
        "stacked outputs alone, and fun, mean(a, axis, dtype, out, keepdims, where), "
        "does",
    ),
    "swapped products": (
        lambda: gauss_newton_product(labelled, lambda o: jnp.mean(o))(W, X, X[:, 0]),
        TypeError,
        "arguments outer and fun look swapped",
    ),
    "swapped chunks": (
        lambda: chain_rule_grad(labelled, jnp.mean, chunk_size=2)(W, X, X[:, 0]),
        TypeError,
        "arguments outer and fun look swapped",
    ),
    "labels forgotten": (
        chain(W, X, outer=lambda o, y: jnp.mean((o - y) ** 2)),
        TypeError,
        "argument outer, <lambda>(o, y), was called without y: if y are the "
        "parameters: "
        "outer_has_params=True (outer_args are not differentiated); else, what it "
        "takes after the "
        "outputs (and the parameters, with outer_has_params) is given to the call as "
        "outer_args=(y,)",
    ),
    "labels and weights forgotten": (
        lambda: gauss_newton_product(lambda o, y, w, eps=1: jnp.mean(o), f)(W, X),
        TypeError,
        "was called without y, w: if y are the parameters: outer_has_params=True, and "
        "outer_args=(w,) at the call (outer_args are not differentiated); else, what "
        "it takes "
        "after the outputs (and the parameters, with outer_has_params) is given to "
        "the call as "
        "outer_args=(y, w)",
    ),
    "labels forgotten beside parameters": (
        chain(W, X, outer=lambda o, p, y: jnp.mean(o), outer_has_params=True),
        TypeError,
        "was called without y: what it takes after the outputs (and the parameters, "
        "with "
        "outer_has_params) is given to the call as outer_args=(y,)",
    ),
    "parameters of outer forgotten beside labels": (
        chain(W, X, outer=lambda o, p, y: jnp.mean(o), call={"outer_args": (X,)}),
        TypeError,
        "was called without y: if p are the parameters: outer_has_params=True, and "
        "outer_args=(y,) "
        "at the call (outer_args are not differentiated); else, what it takes after "
        "the outputs "
        "(and the parameters, with outer_has_params) is given to the call as "
        "outer_args=(p, y)",
    ),
    "outputs taken apart": (
        chain(W, X, outer=lambda a, b: jnp.mean(a), fun=lambda p, x: (f(p, x), x)),
        TypeError,
        "was called without b: if these are outputs of fun, the outputs come as one "
        "argument, a "
        "tuple of length 2, which outer takes apart; else, if b are the parameters",
    ),
    "aux forgotten": (
        rows(W, X, fun=lambda p, x: (f(p, x), x)),
        TypeError,
        "got a value of type tuple: has_aux=True takes a pair (value, aux)",
    ),
    "outer aux forgotten": (
        chain(W, X, outer=lambda o: (jnp.mean(o), o)),
        TypeError,
        "outer_has_aux=True takes a pair (value, aux), and differentiates the value "
        "alone",
    ),
    "chain function": (
        chain(W, X, fun="f"),
        TypeError,
        "argument fun must be a function",
    ),
    # Reassembly
    "reassemble outer": (
        assembled(jnp.ones(5), X, outer=1),
        TypeError,
        "argument outer must be a fun",
    ),
    "reassemble scalar": (
        assembled(jnp.ones(5), X, outer=lambda f: f),
        ValueError,
        "the value of outer must be a scalar, got float32[5]",
    ),
    "wrong length": (
        assembled(jnp.ones(5), {"w": jnp.ones((4, 2))}),
        ValueError,
        "argument rows['w'] must have the leading axes (5,) of its output, got "
        "float32[4,2]",
    ),
    "rows too small": (
        assembled(jnp.ones((5, 2)), {"w": jnp.ones(5)}),
        ValueError,
        "leading axes (5, 2)",
    ),
    "no outputs": (assembled({}, {}), ValueError, "argument outputs holds no arrays"),
    "scalar output": (
        assembled(jnp.ones(()), W),
        ValueError,
        "argument outputs must have a leading axis of examples, got float32[]",
    ),
    "uneven outputs": (
        assembled((jnp.ones(5), jnp.ones(4)), (X, X)),
        ValueError,
        "argument outputs[1] must hold 5 examples as others do: float32[4]",
    ),
    "complex outputs": (
        assembled(jnp.ones(5, jnp.complex64), X),
        TypeError,
        "argument outputs is complex (complex64[5]), and rows of a complex function "
        "are not "
        "gradients: chain_rule_grad takes complex outputs",
    ),
    "integer outputs": (
        assembled({"n": jnp.arange(5)}, {"n": X}),
        TypeError,
        "argument outputs['n'] must be a floating-point array, got int32[5]",
    ),
    "rows of other outputs": (
        assembled({"a": jnp.ones(5)}, [X]),
        ValueError,
        "argument rows must hold a tree of gradients in the place of each output: "
        "outputs is a "
        "dict, rows is a list of length 1",
    ),
    "rows that differ": (
        assembled((jnp.ones(5), jnp.ones(5)), ({"w": X}, {"w": jnp.ones((5, 3))})),
        ValueError,
        "argument rows[1]['w'] does not match the rows of the first output['w']: "
        "expected "
        "float32[2], got float32[3]",
    ),
    "rows of text": (
        assembled(jnp.ones(5), {"w": np.array(["a"] * 5)}),
        TypeError,
        "argument rows['w'] is not an array of numbers (str32[5])",
    ),
    "rows of objects": (
        lambda: linear_combination([1.0], [{"w": np.array([1.0, None])}]),
        TypeError,
        "argument trees[0]['w'] is not an array of numbers (object[2])",
    ),
    "integer rows": (
        assembled(jnp.ones(5), {"w": jnp.ones((5, 2), int)}),
        TypeError,
        "argument rows['w'] is an integer or boolean (int32[5,2])",
    ),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_error_table(name):
    call, kind, words = TABLE[name]
    with pytest.raises(kind, match=re.escape(words)) as caught:
        call()
    assert caught.type is kind  # not a subclass that JAX raised before us


@pytest.mark.parametrize(
    "name", ["shape", "integer", "count", "rank", "vector value", "wrong length"]
)
def test_errors_are_the_same_under_jit(name):
    call, kind, words = TABLE[name]
    with pytest.raises(kind, match=re.escape(words)):
        jax.jit(call)()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: per_example_value_and_grad(3),
        lambda: chain_rule_value_and_grad(jnp.sum, 3),
    ],
)
def test_a_wrong_function_is_found_when_it_is_given(bad):
    with pytest.raises(TypeError, match="argument fun must be a function"):
        bad()


def test_traced_coefficients_in_nested_lists_are_refused():
    @jax.jit
    def combined(c):
        return linear_combination([[c, 1.0]], [W, W])

    with pytest.raises(ValueError, match="one array of shape"):
        combined(2.0)


@pytest.mark.parametrize("chunk_size", [None, 2])
def test_a_pair_without_has_aux_warns(chunk_size):
    def with_logits(p, x):
        return f(p, x), p["w"] * x

    with pytest.warns(UserWarning, match="each of their numbers: .* give has_aux=True"):
        pair = jacobian(with_logits, chunk_size=chunk_size)(W, X)
    with pytest.raises(
        ValueError, match=r"if its second item is auxiliary data: has_aux=True"
    ):
        pair.weighted_sum(jnp.ones(5))
    for silent in (
        lambda p, x: list(with_logits(p, x)),
        lambda p, x: dict(enumerate(with_logits(p, x))),
        lambda p, x: (f(p, x), f(p, x) ** 2),
        lambda p, x: with_logits(p, x)[1],
    ):
        jacobian(silent, chunk_size=chunk_size)(W, X)
    jacobian(with_logits, has_aux=True, chunk_size=chunk_size)(W, X)


@pytest.mark.parametrize("options", [{}, {"chunk_size": 2}, {"recompute": True}])
@pytest.mark.parametrize("made", [jacobian, value_and_jacobian])
def test_every_pair_that_looks_like_a_loss_and_aux_warns_once(made, options):
    for aux in (
        lambda value, x: {"acc": value},
        lambda value, x: (value,),
        lambda value, x: [value, value],
        lambda value, x: x,
        lambda value, x: value[None],
        lambda value, x: {},
    ):

        def pair(p, x, aux=aux):
            value = f(p, x)
            return value, aux(value, x)

        axes = {"in_axes": (None, 0)}
        with pytest.warns(UserWarning, match="give has_aux=True") as caught:
            found = made(pair, **axes, **options)(W, X)
        assert len(caught) == 1
        assert caught[0].filename == __file__
        (found[1] if made is value_and_jacobian else found).sum()
        made(pair, has_aux=True, **axes, **options)(W, X)


@pytest.mark.parametrize(
    "made",
    [
        jacobian,
        value_and_jacobian,
        per_example_grad,
        per_example_value_and_grad,
        fisher_product,
        chain_rule_grad,
        chain_rule_value_and_grad,
        gauss_newton_product,
    ],
)
def test_options_at_the_call_say_where_they_belong(made):
    options = {"argnums": 1, "has_aux": True, "chunk_size": 2, "in_axes": 0}
    options |= {"recompute": True, "axis_name": "i"}
    options |= {"outer_has_params": True, "outer_has_aux": True}
    known = inspect.signature(made).parameters
    functions = [x for x in ("outer", "fun") if x in known]
    names = {made.__name__: made, "outer": jnp.sum, "fun": f}
    for name, value in options.items():
        with pytest.raises(TypeError) as caught:
            made(*(names[x] for x in functions))(W, X, **{name: value})
        said = str(caught.value)
        if name not in known:
            assert said.startswith(f"{name} is not an option of {made.__name__}")
            continue
        call = said.removeprefix(f"{name} is an option of {made.__name__}: ")
        assert eval(call.removesuffix("(...)"), names) is not None
    takes_it = lambda p, x, has_aux, **rest: f(p, x) * has_aux  # noqa: E731
    given = made(*([jnp.sum] * (len(functions) - 1)), takes_it)
    given(W, X, has_aux=jnp.ones(5), chunk_size=jnp.ones(5))


def test_a_pair_that_outer_cannot_take():
    with pytest.raises(TypeError) as caught:
        chain_rule_grad(jnp.mean, lambda p, x: (f(p, x), x))(W, X)
    hint = "if its second item is auxiliary data, give has_aux=True"
    assert any(hint in note for note in caught.value.__notes__)


def test_other_errors_of_outer_and_fun_are_theirs():
    def fails(*_):
        raise KeyError("mine")

    for call in (chain(W, X, outer=fails), chain(W, X, fun=fails)):
        with pytest.raises(KeyError, match="mine"):
            call()
