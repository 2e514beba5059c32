"""A product costs the same whatever was asked of J before, and is the same program."""

import jax
import jax.numpy as jnp
import pytest
from helpers import tree_allclose
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.extend.core import primitives as p

from pytree_grads import jacobian

pytestmark = pytest.mark.any_release

N = 6


def dense(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.sum(x)


def convolution(kernel, x):
    return jnp.sum(jnp.tanh(jax.lax.conv(x[None], kernel, (1, 1), "SAME")))


def scan_over_layers(params, x):
    return jnp.sum(jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params)[0])


def embedding(params, words):
    return jnp.sum(jnp.tanh(params["table"][words] @ params["w"]))


MODELS = {
    "dense": (dense, [jnp.ones((7, 5)), jnp.ones((5, 4))], jnp.ones((N, 3, 7))),
    "convolution": (convolution, jnp.ones((4, 4, 3, 3)), jnp.ones((N, 4, 9, 9))),
    "scan over layers": (scan_over_layers, jnp.ones((3, 5, 5)), jnp.ones((N, 2, 5))),
    "embedding": (
        embedding,
        {"table": jnp.ones((11, 4)), "w": jnp.ones((4, 3))},
        jnp.arange(N * 5).reshape(N, 5) % 11,
    ),
}
MODES = {
    "kept": {},
    "recomputed": {"recompute": True},
    "chunks": {"chunk_size": 4},
    "chunks recomputed": {"chunk_size": 4, "recompute": True},
}
PRODUCTS = {
    "sum": lambda J, _: J.sum(),
    "norms": lambda J, _: J.norms(),
    "clip": lambda J, _: J.clip(0.5).sum(),
    "gram": lambda J, _: J.gram(),
    "square_sum": lambda J, _: J.square_sum(),
    "J @ v": lambda J, v: J @ v,
}


def cost(jaxpr, outputs):
    """Multiplications and additions of products and convolutions that some outputs
    need.
    """
    total, needed = 0, {x for x in outputs if not isinstance(x, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed.isdisjoint(equation.outvars) and not equation.effects:
            continue
        needed.update(x for x in equation.invars if not isinstance(x, Literal))
        total += cost_of(equation)
    return total


def cost_of(equation):
    params = equation.params
    if equation.primitive is p.dot_general_p:
        (contracted, _), _ = params["dimension_numbers"]
        lengths = [equation.invars[0].aval.shape[i] for i in contracted]
        return (
            2 * equation.outvars[0].aval.size * jnp.prod(jnp.array(lengths, int)).item()
        )
    if equation.primitive is p.conv_general_dilated_p:
        kernel = equation.invars[1].aval
        outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2 * equation.outvars[0].aval.size * kernel.size // outputs
    values = [
        x for v in params.values() for x in (v if isinstance(v, tuple | list) else [v])
    ]
    bodies = [x.jaxpr if isinstance(x, ClosedJaxpr) else x for x in values]
    costs = [cost(x, x.outvars) for x in bodies if isinstance(x, Jaxpr)]
    if equation.primitive is p.cond_p:
        return max(costs)
    return params.get("length", 1) * sum(costs)


def costs_of(model, settings, names):
    """What each of some products costs, asked of one J in an order."""
    fun, params, x = model

    def all_of(params, x):
        J = jacobian(fun, **settings)(params, x)
        return {name: PRODUCTS[name](J, params) for name in names}

    def asked_in_order(params, x):
        made = all_of(params, x)
        return [jax.tree.leaves(made[name]) for name in names]

    jaxpr, avals = jax.make_jaxpr(asked_in_order, return_shape=True)(params, x)
    outputs = iter(jaxpr.jaxpr.outvars)
    return {
        name: cost(jaxpr.jaxpr, [next(outputs) for _ in own])
        for name, own in zip(names, avals, strict=True)
    }


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_no_product_costs_more_or_less_after_another(model, mode):
    """Of one order and its reverse, each product comes before each other in one."""
    alone = {}
    for name in PRODUCTS:
        alone |= costs_of(MODELS[model], MODES[mode], [name])
    assert all(alone.values())
    names = list(PRODUCTS)
    assert costs_of(MODELS[model], MODES[mode], names) == alone
    assert costs_of(MODELS[model], MODES[mode], names[::-1]) == alone


def flops(products):
    kernel, x = MODELS["convolution"][1:]

    def run(kernel, x):
        J = jacobian(convolution)(kernel, x)
        return [product(J) for product in products]

    cost = jax.jit(run).lower(kernel, x).compile().cost_analysis()
    return cost["flops"]


def test_compiled_programs_cost_the_same_in_both_orders():
    one, other = (lambda J: J.sum()), (lambda J: J.norms())
    assert flops([one, other]) == flops([other, one])


def test_norms_that_are_asked_for_twice_are_computed_once():
    """XLA merges equal expressions, loops as well: J has no need to remember norms."""
    norms, clipped = (lambda J: J.norms()), (lambda J: J.clip(0.5).sum())
    once = flops([clipped])
    assert flops([norms, clipped]) == pytest.approx(once, rel=0.01)
    assert flops([clipped, norms, lambda J: J.clip(0.5).norms()]) == pytest.approx(
        once, rel=0.01
    )


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("model", MODELS)
def test_norms_that_come_with_a_clip(model, mode, x64):
    """They are those that the bounds were compared with: J's own, or those of its
    parts.
    """
    fun, params, x = MODELS[model]
    params = jax.tree.map(lambda p: p.astype(float) / 3, params)
    if model != "embedding":
        x = 1 + jnp.sin(jnp.cumsum(x.astype(float), 0)) / 2
    bounds = jax.tree.map(lambda _: 0.3, params)
    weights = jnp.arange(1.0, N + 1)

    @jax.jit
    def of(params, x):
        J = jacobian(fun, **MODES[mode])(params, x).scale(jnp.linspace(0.5, 2, N))
        fresh = jacobian(fun, **MODES[mode])(params, x)
        clipped, norms = fresh.clip(0.5, with_norms=True)
        parts, of_parts = fresh.clip(bounds, with_norms=True)
        got = [
            (clipped.sum(), norms, parts.sum(), of_parts),
            (*fresh.clipped_sum(0.5), *fresh.clipped_sum(bounds)),
            J.clipped_sum(0.5, weights, nan_safe=True),
        ]
        want = [
            (fresh.clip(0.5).sum(), fresh.norms(), fresh.clip(bounds).sum()),
            (J.clip(0.5).weighted_sum(weights), J.norms()),
        ]
        return got, want, fresh.to_rows()

    (one, two, scaled), (want, want_scaled), rows = of(params, x)
    lengths = jax.tree.map(lambda r: jnp.linalg.norm(r.reshape(N, -1), axis=1), rows)
    for got in one, two:
        assert tree_allclose(got, (*want, lengths), rtol=1e-11)
    assert tree_allclose(scaled, want_scaled, rtol=1e-11)


def test_norms_of_bounds_that_bound_no_leaf():
    J = jacobian(lambda p, x: p["a"] @ x)({"a": jnp.ones(3), "b": {}}, jnp.ones((N, 3)))
    clipped, norms = J.clip({"a": 1.0, "b": 2.0}, with_norms=True)
    assert tree_allclose(norms, {"a": J.norms(), "b": jnp.zeros(N)})
    assert tree_allclose(clipped.norms(), jnp.ones(N))


def test_a_sum_and_norms_come_from_one_pass_over_the_chunks():
    fun, params, x = MODELS["dense"]

    def loops(settings, product):
        jaxpr = jax.make_jaxpr(lambda p, x: product(jacobian(fun, **settings)(p, x)))
        return str(jaxpr(params, x)).count("scan[")

    for product, count in (
        (lambda J: J.clip(0.2).sum(), 1),
        (lambda J: J.clip(0.2).norms(), 1),
        (lambda J: J.clipped_sum(0.2), 1),
        (lambda J: J.clip(0.2, with_norms=True)[0].sum(), 2),
    ):
        assert loops({"chunk_size": 2}, product) == count
    assert (
        loops({"chunk_size": 2, "recompute": True}, lambda J: J.clipped_sum(0.2)) == 2
    )
