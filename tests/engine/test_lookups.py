"""Tables that a scan reads part by part, and that are looked up as well."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pytree_grads import jacobian
from pytree_grads._engine import plan
from pytree_grads._engine.lookups import lines_by_step, places_of

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from _flops import count

pytestmark = pytest.mark.any_release

N, T, WORDS, WIDTH, PARTS = 4, 5, 96, 16, 4
MODES = [{}, {"recompute": True}, {"chunk_size": 3}]


def draw(seed, *shape):
    numbers = np.random.default_rng(seed).standard_normal(shape) / shape[-1] ** 0.5
    return jnp.asarray(numbers, jnp.result_type(float))


def words(seed, *shape, low=0, high=WORDS):
    numbers = np.random.default_rng(seed).integers(low, high, shape)
    return jnp.asarray(numbers, jnp.int32)


def scores(x, table, *, parts=PARTS, scaled=False, **options):
    """The log of the sum of exponentials, by parts of the vocabulary."""
    parts = table.reshape(parts, -1, table.shape[-1])

    @jax.checkpoint
    def step(total, part):
        h = x * jnp.mean(part) if scaled else x
        return jnp.logaddexp(total, jax.nn.logsumexp(h @ part.T, axis=-1)), None

    start = jnp.full_like(x[:, 0], -jnp.inf)
    return jax.lax.scan(step, start, parts, **options)[0]


def untied(p, tokens, targets):
    x = jnp.tanh(p["in"][tokens])
    return jnp.sum(scores(x, p["out"]) - jnp.sum(x * p["out"][targets], -1))


def tied(p, tokens, targets):
    x = jnp.tanh(p["out"][tokens] @ p["w"])
    return jnp.sum(scores(x, p["out"]) - jnp.sum(x * p["out"][targets], -1))


def tied_without_targets(p, tokens, targets):
    return jnp.sum(scores(jnp.tanh(p["out"][tokens] @ p["w"]), p["out"], reverse=True))


def clipped_index(p, tokens, targets):
    x = jnp.tanh(p["in"][tokens])
    own = jnp.take(p["out"], 3 * targets - WORDS, axis=0, mode="clip")
    return jnp.sum(scores(x, p["out"]) - jnp.sum(x * own, -1))


def filled_index(p, tokens, targets):
    x = jnp.tanh(p["in"][tokens])
    own = p["out"].at[2 * targets].get(mode="fill", fill_value=0)
    return jnp.sum(scores(x, p["out"]) - jnp.sum(x * own, -1))


def one_vector_for_all(p, tokens, targets):
    """Each look-up adds the same line."""
    x = jnp.tanh(p["in"][tokens])
    return jnp.sum(scores(x, p["out"])) + jnp.sum(p["out"][targets])


def weighed(p, tokens, targets):
    """Summands with factors of their own, and a sign."""
    return -2 * untied(p, tokens, targets) + 3 * jnp.sum(p["out"][tokens] ** 2)


def right_differs(p, tokens, targets):
    """The steps do not share a factor, so that the stack is kept."""
    x = jnp.tanh(p["in"][tokens])
    return jnp.sum(scores(x, p["out"], scaled=True)) + jnp.sum(p["out"][targets] ** 2)


def looked_up_behind_a_scan(p, tokens, targets):
    """Indices that a scan makes."""
    x = jnp.tanh(p["in"][tokens])
    best = jax.lax.scan(lambda i, t: ((i + t) % WORDS, i), targets[0], tokens)[1]
    return jnp.sum(scores(x, p["out"]) - jnp.sum(x * p["out"][best], -1))


def two_scans(p, tokens, targets):
    x = jnp.tanh(p["in"][tokens])
    found = scores(x, p["out"]) + scores(2 * x, p["out"], parts=2)
    return jnp.sum(found - jnp.sum(x * p["out"][targets], -1))


def few_words(p, tokens, targets):
    """The small table would be larger than the stack."""
    few, x = p["out"][:8], jnp.tanh(p["in"][tokens])
    return jnp.sum(scores(x, few) - jnp.sum(x * few[targets % 8], -1))


def by_columns(p, tokens, targets):
    """A table with a column for each word."""
    x, table = jnp.tanh(p["in"][tokens]), p["out"].T.reshape(WIDTH, WORDS)
    return jnp.sum(scores(x, table.T) - jnp.sum(x * table[:, targets].T, -1))


FUNCTIONS = [
    untied,
    tied,
    tied_without_targets,
    clipped_index,
    filled_index,
    one_vector_for_all,
    weighed,
    right_differs,
    looked_up_behind_a_scan,
    two_scans,
    few_words,
    by_columns,
]


def problem(high=WORDS):
    params = {
        "in": draw(0, WORDS, WIDTH),
        "out": draw(1, WORDS, WIDTH),
        "w": draw(2, WIDTH, WIDTH),
    }
    return params, words(3, N, T, high=high), words(4, N, T, high=high)


def rows_of(fun, p, *batch):
    rows = jax.vmap(jax.grad(fun), (None, 0, 0))(p, *batch)
    flat = [np.asarray(x).reshape(len(x), -1) for x in jax.tree.leaves(rows)]
    return np.concatenate(flat, axis=1)


ARE_KEPT = {
    right_differs,
    looked_up_behind_a_scan,
    two_scans,
    few_words,
    by_columns,
}


@pytest.mark.parametrize("fun", FUNCTIONS)
def test_norms_take_most_lines_apart(fun, monkeypatch):
    """Otherwise the tests below would compare what is kept in any case."""
    found, apart = [], plan.apart
    monkeypatch.setattr(plan, "apart", lambda x: found.append(apart(x)) or found[-1])
    p, *batch = problem()
    jax.eval_shape(lambda *x: jacobian(fun, recompute=True)(*x).norms(), p, *batch)
    assert any(found) == (fun not in ARE_KEPT)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("fun", FUNCTIONS)
@pytest.mark.parametrize("high", [WORDS, 2], ids=["many words", "two words"])
def test_products_are_those_of_rows(fun, mode, high, x64):
    p, *batch = problem(high)
    rows = rows_of(fun, p, *batch)
    lengths = np.linalg.norm(rows, axis=1)

    @jax.jit
    def products(p, *batch):
        J = jacobian(fun, **mode)(p, *batch)
        bound = float(np.median(lengths))
        return J.norms(), J.gram(), J.clip(bound).sum(), J.sum()

    norms, gram, clipped, total = products(p, *batch)
    np.testing.assert_allclose(norms, lengths, rtol=1e-10)
    np.testing.assert_allclose(gram, rows @ rows.T, rtol=1e-9, atol=1e-9)
    shares = np.minimum(1, np.median(lengths) / lengths)
    for tree, wanted in ((clipped, shares @ rows), (total, rows.sum(0))):
        flat = jnp.concatenate([x.ravel() for x in jax.tree.leaves(tree)])
        np.testing.assert_allclose(flat, wanted, rtol=1e-9, atol=1e-9)


def test_rows_that_are_not_finite_stay_apart():
    p, tokens, targets = problem()
    bad = jnp.asarray([jnp.nan, 1.0, 1.0, jnp.inf])

    def fun(p, tokens, targets, scale):
        return scale * tied(p, tokens, targets)

    norms = jacobian(fun, recompute=True)(p, tokens, targets, bad).norms()
    rows = rows_of(tied, p, tokens, targets)
    lengths = np.linalg.norm(rows, axis=1)
    np.testing.assert_allclose(norms[1:3], lengths[1:3], rtol=1e-5)
    assert not jnp.isfinite(norms[0])
    assert not jnp.isfinite(norms[3])


def test_outputs_and_stacks_and_second_derivatives(x64):
    p, tokens, targets = problem()

    def two(p, tokens, targets):
        return jnp.stack([tied(p, tokens, targets), untied(p, tokens, targets)])

    norms = jax.jit(lambda *args: jacobian(two, recompute=True)(*args).norms())
    found = norms(p, tokens, targets)
    for k, fun in enumerate((tied, untied)):
        lengths = np.linalg.norm(rows_of(fun, p, tokens, targets), axis=1)
        np.testing.assert_allclose(found[:, k], lengths, rtol=1e-10)

    def total(p, **mode):
        return jnp.sum(jacobian(tied, **mode)(p, tokens, targets).norms())

    def plain(p):
        rows = jax.vmap(jax.grad(tied), (None, 0, 0))(p, tokens, targets)
        squares = [jnp.sum(x**2, range(1, x.ndim)) for x in jax.tree.leaves(rows)]
        return jnp.sum(jnp.sqrt(sum(squares)))

    wanted = jax.grad(plain)(p)
    for mode in MODES[:2]:
        found = jax.grad(lambda p, mode=mode: total(p, **mode))(p)
        for x, y in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
            np.testing.assert_allclose(x, y, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("fun", [untied, tied])
def test_norms_keep_neither_scores_nor_rows(fun):
    """Memory that does not grow with the number of words, beside the gradient's."""
    many, n = 4096, 8
    params = {"in": draw(0, many, 32), "out": draw(1, many, 32), "w": draw(2, 32, 32)}
    batch = words(3, n, 16, high=many), words(4, n, 16, high=many)

    def gradient(p, *batch):
        return jax.grad(lambda p: jnp.sum(jax.vmap(fun, (None, 0, 0))(p, *batch)))(p)

    def norms(p, *batch):
        return jacobian(fun, recompute=True)(p, *batch).norms()

    def total(p, *batch):
        return jacobian(fun)(p, *batch).sum()

    def cost(f):
        memory = jax.jit(f).lower(params, *batch).compile().memory_analysis()
        flops = count(jax.make_jaxpr(f)(params, *batch).jaxpr)
        return flops, memory.temp_size_in_bytes

    flops, memory = cost(gradient)
    for own, taken in (cost(norms), cost(total)):
        assert own <= 1.05 * flops
        assert taken <= 1.05 * memory


def test_kept_rows_of_a_table_are_not_built():
    width = 32
    p = {"out": draw(1, WORDS, width), "w": draw(2, width, width)}
    batch = problem()[1:]

    def norms(p, *batch):
        return jacobian(tied)(p, *batch).norms()

    largest = max(
        x.aval.size
        for equation in jax.make_jaxpr(norms)(p, *batch).eqns
        for x in equation.outvars
    )
    assert largest < N * WORDS * width


def test_places():
    indices = [jnp.asarray([7, 2, 7, 9]), jnp.asarray([2, 0], jnp.int8)]
    line, places = places_of(indices)
    np.testing.assert_array_equal(line, [7, 2, -1, 9, -1, 0])
    np.testing.assert_array_equal(places[0], [0, 1, 0, 3])
    np.testing.assert_array_equal(places[1], [1, 5])
    by_step = lines_by_step(line, 2, 5)
    np.testing.assert_array_equal(by_step, [[5, 2, 5, 5, 5, 0], [2, 5, 5, 4, 5, 5]])
