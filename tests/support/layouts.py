"""A small model, every call on it, and how its batch and parameters may lie on a
mesh.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pytree_grads import (
    Accumulator,
    Vector,
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
from pytree_grads._jax.compat import varying_axes

N, T, WORDS, WIDTH, HIDDEN, OUT = 32, 3, 8, 8, 16, 2


def arguments():
    """Parameters and a batch: tokens (N, T), and numbers (N,)."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.standard_normal(shape) / np.sqrt(shape[0])

    params = {
        "embedding": normal(WORDS, WIDTH),
        "layers": normal(2, WIDTH, WIDTH),
        "w": normal(WIDTH, HIDDEN),
        "b": normal(HIDDEN),
        "v": normal(HIDDEN, OUT),
    }
    tokens = rng.integers(0, WORDS, (N, T)).astype(np.int32)
    return params, tokens, rng.standard_normal(N)


def features(params, tokens, target, whole=None):
    """An embedding, a scan over layers, and a hidden layer that tensor parallelism may
    split.

    Over Explicit axes, JAX asks where lines of a table go, and sums over an axis that
    is split: ``whole`` is the answer.
    """
    h = params["embedding"].at[tokens].get(out_sharding=whole)  # (T, width)
    h, _ = jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), h, params["layers"])
    h = jnp.tanh(h @ params["w"] + params["b"][None])  # (T, hidden)
    return jnp.dot(h, params["v"], out_sharding=whole).mean(axis=0) - target  # (out,)


def loss(params, tokens, target, whole=None):
    return jnp.sum(features(params, tokens, target, whole) ** 2)


def log_sum_exp(outputs):
    """An outer loss that couples the examples."""
    return jax.nn.logsumexp(jnp.sum(outputs**2, axis=-1))


# Each call takes a scalar function of one example, one with two outputs, parameters, a
# batch, and the axis that is manual, if any; it returns numbers per row, and sums that
# are like parameters.


def combinations(loss, features, params, batch, axis_name):
    rows = per_example_grad(loss)(params, *batch)
    c = batch[1] / 2
    grads = jax.tree.map(jnp.sin, params)
    vector = 2 * Vector(params) - Vector(grads) / 3
    sums = {
        "pair": linear_combination([0.5, -2.0], [params, grads]),
        "vector": vector.tree,
        "step": (Vector(params) + 0.1 * Vector(grads)).tree,
        "numbers": {"norm": vector.norm(), "inner": vector @ Vector(grads)},
    }
    sums["of rows"] = [
        local_sum(linear_combination(c, rows), axis_name),
        local_sum(linear_combination(jnp.stack([c, 2 * c]), rows), axis_name),
    ]
    return {"rows": rows}, sums


def rows(loss, features, params, batch, axis_name):
    grads = per_example_grad(loss)(params, *batch)
    chunked = per_example_grad(loss, chunk_size=12)(params, *batch)
    outputs, _ = per_example_value_and_grad(loss)(params, *batch)
    total = reassemble(lambda f: jnp.sum(f**2), outputs, grads)
    accumulator = Accumulator.zeros_like(params).add(local_sum(total, axis_name), 3)
    accumulator = accumulator.add(params, 2)
    sums = {
        "reassembled": [local_sum(total, axis_name)],
        "accumulated": accumulator.mean(),
    }
    return {"all": grads, "chunked": chunked}, sums


def products(settings, loss, features, params, batch, axis_name):
    def new(fun=loss):
        return jacobian(fun, axis_name=axis_name, **settings)(params, *batch)

    c = batch[1]
    outputs, J = value_and_jacobian(loss, axis_name=axis_name, **settings)(
        params, *batch
    )
    after = new()
    sums = {"weighted": new().weighted_sum(c), "clipped": after.clip(0.5).sum()}
    numbers = {"outputs": outputs, "norms": J.norms(), "directional": J @ params}
    numbers["norms after"] = after.norms()
    if "recompute" not in settings:
        sums["squares"] = new().square_sum(c)
    if not settings:
        groups = {"embedding": 0.1, "layers": 0.2, "w": 0.3, "b": 0.2, "v": 0.1}
        sums["mean"] = new().scale(c).clip(0.5).mean()
        sums["groups"] = new().clip(groups, nan_safe=True).sum()
        sums["of outputs"] = new(features).clip(0.5).sum()
    if "chunk_size" not in settings:
        numbers["rows"] = new().clip(0.5).to_rows()
    if axis_name is None and not settings:
        numbers["gram"] = new().clip(0.5).gram(new(features))
    if axis_name is None and settings:
        numbers["gram"] = J.gram()
    return numbers, sums


def questions(settings, loss, features, params, batch, axis_name):
    """Rows chosen and added, groups, traces. A device has an even number of rows."""

    def new(fun=loss):
        return jacobian(fun, axis_name=axis_name, **settings)(params, *batch)

    clipped = new().clip(0.5, nan_safe=True)
    total = 2 * clipped + new(lambda params, *example: -2 * loss(params, *example))
    numbers = {
        "chosen": new()[::2].norms(),
        "indices": new()[jnp.arange(0, len(batch[1]), 2)] @ params,
        "added": total.norms(),
        "added, chosen": (new() + clipped)[::2].norms(),
        "groups": new(features).norms(groups="leaves"),
    }
    if axis_name is None:
        numbers["traced"] = new(features).gram(new(features)[::2], trace=True)
    sums = {"chosen": new()[::2].sum(), "added": total.weighted_sum(batch[1])}
    if not settings:
        diagonal = {"w": jnp.cos(params["w"]), "b": -1.0, "v": 0.5}
        diagonal |= {"embedding": jnp.ones((1, 1)), "layers": jnp.full((2, 1, 1), 2.0)}
        metric = new().scale_params(diagonal)
        numbers["metric"], sums["metric"] = metric.norms(), metric.sum()
        sums["whole"] = [
            whole_batch(options, loss, params, batch, axis_name)
            for options in ({}, {"recompute": True})
        ]
        # Plain JAX takes no mean over an axis of `jax.vmap` over Explicit axes, nor
        # inside `jax.shard_map` with its checks.
        is_explicit = jax.sharding.get_abstract_mesh().explicit_axes
        if not is_explicit and not varying_axes(batch[1]):
            sums["named"] = named_axis(features, params, batch, axis_name)
    return numbers, sums


def named_axis(features, params, batch, axis_name):
    """The gradient of a loss of outputs from which the mean of the batch is taken."""

    def centred(params, *example):
        outputs = features(params, *example)
        mean = jax.lax.pmean(outputs, "examples")
        return outputs - (mean if axis_name is None else jax.lax.pmean(mean, axis_name))

    return chain_rule_value_and_grad(
        lambda outputs: jnp.sum(jnp.cosh(outputs)),
        centred,
        axis_name=axis_name,
        batch_axis_name="examples",
    )(params, *batch)[1]


def whole_batch(settings, loss, params, batch, axis_name):
    """The gradients of the sum of two losses of the whole batch, and of one of them."""

    def losses(params, *batch):
        if jax.sharding.get_abstract_mesh().explicit_axes:
            # Over Explicit axes, `jax.vmap` takes no parameters that are sharded as the
            # batch is.
            params = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), params)
        values = jax.vmap(loss, (None, 0, 0))(params, *batch)
        return jnp.stack([jnp.sum(values), jnp.sum(jnp.sin(values))])

    made = jacobian(losses, batched=False, axis_name=axis_name, **settings)
    J = made(params, *batch)
    return {"both": J.sum(), "one": J[1:].sum()}


def sketch(loss, features, params, batch, axis_name):
    J = jacobian(loss)(params, *batch)
    return {"sketch": J.sketch(jax.random.key(3), 1)}, {}


def chain(chunk_size, loss, features, params, batch, axis_name):
    options = {"chunk_size": chunk_size, "axis_name": axis_name}

    def penalized(outputs, params):
        penalty = jnp.sum(params["b"] ** 2) / device_count(axis_name)
        return jnp.sum(outputs**2) + penalty

    value, sums = chain_rule_value_and_grad(
        penalized, features, outer_has_params=True, **options
    )(params, *batch)
    everything = coupled(axis_name)
    coupled_value, coupled_sums = chain_rule_value_and_grad(
        everything, features, **options
    )(params, *batch)
    numbers = {"penalized": value, "coupled": coupled_value}
    return {}, {"penalized": sums, "coupled": coupled_sums, "numbers": numbers}


def curvature(chunk_size, loss, features, params, batch, axis_name):
    options = {"chunk_size": chunk_size, "axis_name": axis_name}
    newton = gauss_newton_product(lambda f: jnp.sum(jnp.cosh(f)), features, **options)
    fisher = fisher_product(loss, **options)
    v = jax.tree.map(jnp.cos, params)
    return {}, {
        "newton": newton(params, *batch)(v),
        "fisher": fisher(params, *batch)(v),
    }


def coupled(axis_name):
    """The loss that couples all examples.

    Under ``shard_map``, each device's share of it.
    """
    if axis_name is None:
        return log_sum_exp

    def share(outputs):
        everything = jax.lax.all_gather(outputs, axis_name, tiled=True)
        return log_sum_exp(everything) / device_count(axis_name)

    return share


def device_count(axis_name):
    return 1 if axis_name is None else jax.lax.axis_size(axis_name)


def local_sum(tree, axis_name):
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


CALLS = {
    "combinations": combinations,
    "rows": rows,
    "kept": functools.partial(products, {}),
    "recomputed": functools.partial(products, {"recompute": True}),
    "in chunks": functools.partial(products, {"chunk_size": 16}),
    "in uneven chunks": functools.partial(
        products, {"chunk_size": 12, "recompute": True}
    ),
    "questions": functools.partial(questions, {}),
    "questions in chunks": functools.partial(questions, {"chunk_size": 8}),
    "chain rule": functools.partial(chain, None),
    "chain rule in chunks": functools.partial(chain, 8),
    "chain rule in uneven chunks": functools.partial(chain, 12),
    "curvature": functools.partial(curvature, None),
    "curvature in chunks": functools.partial(curvature, 16),
}


@dataclass(frozen=True)
class Layout:
    """Where a batch and parameters are, and under which regime the calls run."""

    devices: tuple[int, ...]
    kind: AxisType = AxisType.Auto
    params: str = (
        "replicated"  # or "sharded" like the batch, or "split" over a second axis
    )
    manual: bool | None = None  # inside shard_map, with or without its checks

    def mesh(self):
        names = ("data", "model")[: len(self.devices)]
        return jax.make_mesh(self.devices, names, axis_types=(self.kind,) * len(names))

    def spec(self, name):
        if self.params == "sharded" and name != "layers":
            return P("data")
        if self.params == "sharded":
            return P(None, "data")
        return {"w": P(None, "model"), "b": P("model"), "v": P("model")}.get(
            name if self.params == "split" else "", P()
        )

    def run(self, call):
        """Numbers per row and sums, each checked to be where its rows and parameters
        are.
        """
        params, *batch = arguments()
        mesh = self.mesh()
        specs = {name: self.spec(name) for name in params}
        whole = P() if self.kind is AxisType.Explicit else None
        fun, outputs = (functools.partial(f, whole=whole) for f in (loss, features))
        axis_name = None if self.manual is None else "data"

        def of(params, *batch):
            return call(fun, outputs, params, batch, axis_name)

        with jax.set_mesh(mesh):
            params = {
                n: jax.device_put(x, NamedSharding(mesh, specs[n]))
                for n, x in params.items()
            }
            batch = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in batch]
            if self.manual is not None:
                of = jax.shard_map(
                    of,
                    in_specs=(P(), P("data"), P("data")),
                    out_specs=(P("data"), P()),
                    axis_names={"data"},
                    check_vma=self.manual,
                )
            numbers, sums = jax.jit(of)(params, *batch)
        self.check_places(numbers, sums, specs)
        return numbers, sums

    def check_places(self, numbers: Any, sums: Any, specs: Any):
        """Over Explicit axes, numbers are laid out as examples, and sums as
        parameters.
        """
        if self.kind is not AxisType.Explicit:
            return
        for leaf in jax.tree.leaves(numbers):
            assert leaf.sharding.spec[0] == "data", leaf.sharding
        for call, tree in sums.items():
            if isinstance(tree, dict) and tree.keys() == specs.keys():
                for name, spec in specs.items():
                    got = tuple(tree[name].sharding.spec)
                    assert got == (*spec, *[None] * (len(got) - len(spec))), (
                        call,
                        name,
                        got,
                    )


def one_device(call):
    params, *batch = arguments()
    return jax.jit(lambda *args: call(loss, features, args[0], args[1:], None))(
        params, *batch
    )


LAYOUTS = {
    f"{kind.name.lower()}, {params}": Layout(devices, kind, params)
    for kind in (AxisType.Auto, AxisType.Explicit)
    for params, devices in (("replicated", (8,)), ("sharded", (8,)), ("split", (4, 2)))
} | {
    "shard_map, checked": Layout((8,), manual=True),
    "shard_map, unchecked": Layout((8,), manual=False),
    "shard_map over one of two axes": Layout((4, 2), params="split", manual=True),
}
