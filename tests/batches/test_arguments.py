"""What is differentiated and what is mapped: mistakes are refused, hints can be
followed.
"""

import functools
import inspect

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import tree_allclose

import pytree_grads
from pytree_grads import (
    chain_rule_grad,
    chain_rule_value_and_grad,
    fisher_product,
    gauss_newton_product,
    jacobian,
    per_example_grad,
    per_example_value_and_grad,
    value_and_jacobian,
)

N = 5
X = jnp.sin(jnp.arange(15.0)).reshape(N, 3)
WITH_OUTER = (chain_rule_grad, chain_rule_value_and_grad, gauss_newton_product)
WITHOUT = (
    fisher_product,
    jacobian,
    per_example_grad,
    per_example_value_and_grad,
    value_and_jacobian,
)
ALL = {
    **{made.__name__: functools.partial(made, jnp.sum) for made in WITH_OUTER},
    **{made.__name__: made for made in WITHOUT},
}
every_function = pytest.mark.parametrize("name", ALL)


def rows(fun, *args, **options):
    """The rows, which those of `jax.vmap(jax.grad(fun))` have to equal.

    They are returned.
    """
    got = per_example_grad(fun, **options)(*args)
    J = jacobian(fun, **options)(*args)
    assert tree_allclose(J.to_rows(), got)
    return got


def test_all_functions_are_here():
    options = {
        name
        for name, value in vars(pytree_grads).items()
        if inspect.isfunction(value)
        and "in_axes" in inspect.signature(value).parameters
    }
    assert options == set(ALL)


# in_axes


@every_function
def test_in_axes_none_maps_nothing_as_vmap_has_it(name):
    with pytest.raises(ValueError, match="at least one non-None value in in_axes"):
        jax.vmap(lambda p, x: jnp.sum(p * x), in_axes=None)(jnp.ones(3), X)
    with pytest.raises(ValueError, match="no argument is batched"):
        ALL[name](lambda p, x: jnp.sum(p * x), in_axes=None)(jnp.ones(3), X)


def test_in_axes_none_leaves_keyword_arguments_as_vmap_has_them():
    def fun(p, x, scale):
        return jnp.sum(p * x) * scale

    args, scale = (jnp.ones(3), X[0]), jnp.arange(5.0)
    want = jax.vmap(jax.grad(fun), in_axes=None)(*args, scale=scale)
    assert tree_allclose(per_example_grad(fun, in_axes=None)(*args, scale=scale), want)


@every_function
def test_the_default_reads_well_and_can_be_given(name):
    made = getattr(pytree_grads, name)
    assert "in_axes: Any = 'default'" in str(inspect.signature(made))
    fun = lambda p, x: jnp.sum(jnp.sin(p * x))  # noqa: E731
    given = ALL[name](fun, in_axes="default")(jnp.ones(3), X)
    left_out = ALL[name](fun)(jnp.ones(3), X)
    if callable(given):  # a product
        given, left_out = given(jnp.ones(3)), left_out(jnp.ones(3))
    if name == "jacobian":
        given, left_out = given.to_rows(), left_out.to_rows()
    if name == "value_and_jacobian":
        given, left_out = given[0], left_out[0]
    assert tree_allclose(given, left_out)


# flax nnx


class Net(nnx.Module):
    """Layers with running statistics, a dropout with its keys and counts, a flag and a
    number.
    """

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.is_deep, self.width = False, 4

    def __call__(self, x):
        return jnp.sum(jnp.sin(self.dropout(self.norm(self.linear(x)))))


class WithoutCounters(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))

    def __call__(self, x):
        return jnp.sum(jnp.sin(self.norm(self.linear(x))))


class WithAnArray(nnx.Module):
    def __init__(self):
        self.linear = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
        self.offset = jnp.ones(4)

    def __call__(self, x):
        return jnp.sum(jnp.sin(self.linear(x) + self.offset))


class WithData(WithAnArray):
    def __init__(self):
        super().__init__()
        self.offset = nnx.data(3)


def call(model, x):
    return model(x)


def whole_state(model):
    return nnx.state(model)


def flat_state(model):
    return nnx.to_flat_state(nnx.state(model))


def state_in_a_dict(model):
    return {"net": nnx.state(model), "scale": jnp.ones(())}


@every_function
@pytest.mark.parametrize("form", [lambda x: x, whole_state, state_in_a_dict])
def test_an_nnx_model_with_other_variables_is_refused(name, form):
    words = (
        r"argument model.*norm.*mean.* must be an nnx\.Param, as for nnx\.grad, got an "
    )
    with pytest.raises(
        TypeError, match=words + r"nnx\.BatchStat: write graph, params, rest = nnx"
    ):
        ALL[name](call)(form(WithoutCounters()), X)


@pytest.mark.parametrize("made", [Net, WithoutCounters, WithAnArray, WithData])
@pytest.mark.parametrize("form", [lambda x: x, whole_state, flat_state])
def test_the_hint_for_nnx_can_be_followed(made, form):
    model = made()
    with pytest.raises(TypeError) as caught:
        per_example_grad(call)(form(model), X)
    names = {"model": model, "nnx": nnx}
    hint = str(caught.value).split("write ")[1]
    split, _, rest = hint.partition(", differentiate by params, and call ")
    exec(split, names)
    merge = rest.split(" inside")[0]

    def fun(params, x):
        return eval(merge, names | {"params": params})(x)

    got = rows(fun, names["params"], X)
    assert tree_allclose(got, jax.vmap(jax.grad(fun), (None, 0))(names["params"], X))
    own = nnx.grad(call)(nnx.clone(model), X[1])
    assert tree_allclose(
        jax.tree.leaves(jax.tree.map(lambda x: x[1], got)),
        jax.tree.leaves(own),
        rtol=1e-5,
    )


@pytest.mark.parametrize("form", [lambda x: x, whole_state, flat_state])
def test_a_model_with_batch_norm_is_told_to_leave_training_mode(form):
    words = r"; call model\.eval\(\) first: in training mode each example is normalised"
    for model in (WithoutCounters(), Net()):
        with pytest.raises(TypeError, match=words):
            per_example_grad(call)(form(model), X)
    with pytest.raises(TypeError) as caught:
        per_example_grad(call)(form(Dropped({})), X)
    assert "eval()" not in str(caught.value)


class Dropped(nnx.Module):
    def __init__(self, seeds):
        rngs = nnx.Rngs(**seeds) if seeds else nnx.Rngs(0)
        self.linear = nnx.Linear(3, 4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        return jnp.sum(jnp.sin(self.dropout(self.linear(x))))


@pytest.mark.parametrize("seeds", [{}, {"params": 0, "dropout": 1}])
@pytest.mark.parametrize("form", [lambda x: x, whole_state])
def test_the_hint_for_a_generator_of_its_own_can_be_followed(seeds, form):
    model, same = Dropped(seeds), jnp.ones((N, 3))
    with pytest.raises(TypeError, match="or all examples share one mask") as caught:
        per_example_grad(call)(form(model), same)
    hint = str(caught.value).split("give each example a key and call ")[1]
    reseed = hint.split(" on the")[0]
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def fun(params, x, key):
        net = nnx.merge(graph, params, rest, copy=True)
        eval(reseed, {"nnx": nnx, "net": net, "key": key})
        return net(x)

    keys = jax.random.split(jax.random.key(1), N)
    norms = jacobian(fun)(params, same, keys).norms()
    assert len(set(norms.tolist())) > 1


def test_an_nnx_module_of_parameters_alone_means_what_nnx_grad_means():
    def loss(model, x):
        return jnp.sum(jnp.sin(model(x)))

    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    for tree in (model, nnx.state(model), nnx.state(model, nnx.Param)):
        fun = (
            loss
            if tree is model
            else lambda p, x: loss(nnx.merge(nnx.graphdef(model), p), x)
        )
        got = rows(fun, tree, X)
        want = [nnx.grad(loss)(model, x) for x in X]
        want = jax.tree.map(lambda *x: jnp.stack(x), *map(jax.tree.leaves, want))
        assert tree_allclose(jax.tree.leaves(got), want)


def test_variables_of_another_kind_are_differentiated_by_who_asks_for_them():
    class Scale(nnx.Variable):
        pass

    model = WithoutCounters()
    model.linear.scale = Scale(jnp.ones(4))
    graph, params, scale, rest = nnx.split(model, nnx.Param, Scale, ...)

    def fun(params, scale, x):
        merged = nnx.merge(graph, params, scale, rest, copy=True)
        return jnp.sum(merged.linear(x) * merged.linear.scale[...])

    got = rows(fun, params, scale, X, argnums=(0, 1))
    want = jax.vmap(jax.grad(fun, (0, 1)), (None, None, 0))(params, scale, X)
    assert tree_allclose(got, want)
    _, both, _ = nnx.split(model, (nnx.Param, Scale), ...)
    with pytest.raises(
        TypeError, match=r"got an nnx\.Scale.* an argument of its own, with the pos"
    ):
        rows(lambda both, x: 0.0, both, X)


def test_a_parameter_of_integers_is_told_to_be_another_variable():
    model = nnx.Linear(3, 4, rngs=nnx.Rngs(0))
    model.step = nnx.Param(jnp.arange(3))
    with pytest.raises(
        TypeError, match=r"make it an nnx\.Variable of another kind than nnx\.Param"
    ):
        per_example_grad(call)(model, X)
    model.step = nnx.Variable(jnp.arange(3))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    fun = lambda params, x: jnp.sum(nnx.merge(graph, params, rest, copy=True)(x))  # noqa: E731
    assert tree_allclose(
        rows(fun, params, X), jax.vmap(jax.grad(fun), (None, 0))(params, X)
    )


# flax linen


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x):
        count = self.variable("counts", "calls", lambda: jnp.int32(3))
        x = nn.BatchNorm(use_running_average=True)(nn.Dense(4)(x))
        return jnp.sum(jnp.sin(x)) * count.value.astype(x.dtype)


@every_function
def test_linen_variables_with_other_collections_are_refused(name):
    model = nn.Sequential([nn.Dense(2), nn.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), X[0])
    words = (
        r"argument variables\['batch_stats'\] is differentiated, "
        "but flax trains the collection"
    )
    with pytest.raises(TypeError, match=words):
        ALL[name](lambda variables, x: jnp.sum(model.apply(variables, x)))(variables, X)
    words = r"argument p\['net'\]\['batch_stats'\].*params = p\['net'\]\['params'\].*"
    words += r"; give its BatchNorm use_running_average=True: in training mode each"
    with pytest.raises(TypeError, match=words):
        ALL[name](lambda p, x: jnp.sum(model.apply(p["net"], x)))({"net": variables}, X)


@pytest.mark.parametrize("freeze", [dict, nn.FrozenDict])
def test_the_hint_for_linen_can_be_followed(freeze):
    model = Linen()
    variables = freeze(model.init(jax.random.key(0), X[0]))
    with pytest.raises(TypeError) as caught:
        per_example_grad(lambda variables, x: model.apply(variables, x))(variables, X)
    names = {"model": model, "variables": variables}
    split, _, rest = (
        str(caught.value).split("differentiate by ")[1].partition(", and call ")
    )
    exec(split, names)
    apply = rest.split(" inside")[0].replace("...", "x")

    def fun(params, x):
        return eval(apply, names | {"params": params, "x": x})

    want = jax.vmap(jax.grad(fun), (None, 0))(names["params"], X)
    assert tree_allclose(rows(fun, names["params"], X), want)

    def both(params, stats, x):  # what is trained too, as an argument of its own
        return model.apply({**variables, "params": params, "batch_stats": stats}, x)

    args = (variables["params"], variables["batch_stats"])
    want = jax.vmap(jax.grad(both, (0, 1)), (None, None, 0))(*args, X)
    assert tree_allclose(rows(both, *args, X, argnums=(0, 1)), want)


@pytest.mark.parametrize("extra", [jnp.ones(()), {}])
def test_a_tree_with_a_key_named_params_is_no_set_of_linen_variables(extra):
    tree = {"params": {"w": jnp.ones(3)}, "extra": extra}
    got = rows(lambda tree, x: jnp.sum(tree["params"]["w"] * x), tree, X)
    assert tree_allclose(got["params"]["w"], X)


# equinox


class Equinox(eqx.Module):
    linear: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    steps: jax.Array
    key: jax.Array
    depth: int
    is_deep: bool
    kind: str

    def __call__(self, x):
        return jnp.sum(jnp.sin(self.dropout(self.linear(x), key=self.key))) * self.depth


@pytest.mark.parametrize("form", [lambda x: x, lambda x: {"net": x, "kind": "s"}])
def test_the_hint_for_equinox_can_be_followed(form):
    key = jax.random.key(0)
    linear = eqx.nn.Linear(3, 4, key=key)
    model = form(
        Equinox(linear, eqx.nn.Dropout(0.5), jnp.arange(3), key, 2, True, "net")
    )
    apply = (lambda model, x: model["net"](x)) if isinstance(model, dict) else call
    with pytest.raises(TypeError) as caught:
        per_example_grad(apply)(model, X)
    names = {"model": model, "eqx": eqx}
    split, _, rest = (
        str(caught.value).split("write ")[1].partition(", differentiate by params,")
    )
    exec(split, names)
    combine = rest.removeprefix(" and call ").split(" inside")[0]

    def fun(params, x):
        return apply(eval(combine, names | {"params": params}), x)

    want = jax.vmap(jax.grad(fun), (None, 0))(names["params"], X)
    assert tree_allclose(rows(fun, names["params"], X), want)


# Plain trees


@pytest.mark.parametrize(
    "leaf, is_number",
    [
        ("relu", False),
        (jnp.tanh, False),
        (jax.random.key(0), False),
        (3, True),
        (True, True),
        (jnp.arange(3), True),
    ],
)
def test_the_hints_for_plain_trees_can_be_followed(leaf, is_number):
    def fun(params, x):
        return jnp.sum(params["w"] * x)

    with pytest.raises(
        TypeError, match=r"argument params\['extra'\] is differentiated"
    ) as caught:
        per_example_grad(fun)({"w": jnp.ones(3), "extra": leaf}, X)
    said = str(caught.value)
    assert "eqx" not in said
    assert ("make it an array of a float dtype" in said) == is_number
    # "move it to an argument that is not differentiated, with None in in_axes"
    args = {"w": jnp.ones(3)}, leaf, X
    moved = rows(lambda params, _, x: fun(params, x), *args, in_axes=(None, None, 0))
    assert tree_allclose(moved["w"], X)
    if is_number:
        floats = {"w": jnp.ones(3), "extra": jnp.asarray(leaf, float)}
        assert tree_allclose(rows(fun, floats, X)["w"], X)


def test_an_argument_that_is_no_tree_of_arrays_asks_for_argnums():
    def fun(labels, params, x):
        return jnp.sum(params * x)

    with pytest.raises(
        TypeError, match=r"got int32.*: say in argnums which arguments are"
    ):
        per_example_grad(fun)(jnp.arange(N), jnp.ones(3), X)
    assert tree_allclose(rows(fun, jnp.arange(N), jnp.ones(3), X, argnums=1), X)


# Keyword arguments


@pytest.mark.parametrize("value", [True, "relu", 2.0, jnp.float32(2.0), jnp.ones(3)])
def test_the_hint_for_keyword_arguments_can_be_followed(value):
    def loss(p, x, *, option):
        return jnp.sum(p * x)

    with pytest.raises((TypeError, ValueError)) as caught:
        per_example_grad(loss)(jnp.ones(3), X, option=value)
    assert "None in in_axes" not in str(caught.value)
    bound = str(caught.value).split("with ")[-1].split(" or")[0].replace("...", "value")
    fun = eval(bound, {"functools": functools, "fun": loss, "value": value})
    assert tree_allclose(rows(fun, jnp.ones(3), X), X)
