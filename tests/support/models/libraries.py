"""Models written in flax linen, flax nnx, equinox and haiku, without any wrapper."""

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
from flax import nnx

from ._table import N, model

KEY = jax.random.key(0)


def _as_default(tree):
    """Frameworks start in float32; the tests also run in float64."""
    return jax.tree.map(
        lambda x: x.astype(float) if eqx.is_inexact_array(x) else x, tree
    )


class _Linen(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 6)(tokens)
        x = x + nn.MultiHeadDotProductAttention(num_heads=2)(nn.LayerNorm()(x))
        return nn.RNN(nn.SimpleCell(3, param_dtype=jnp.zeros(()).dtype))(x)


ATTENTION = "['params']['MultiHeadDotProductAttention_0']"


@model(
    *(f"{ATTENTION}['{name}']['bias']" for name in ("query", "key", "value")),
    promotes=True,
)
def flax_linen(draw):
    tokens = draw.ints(7, N, 4)
    net = _Linen()
    params = _as_default(jax.jit(net.init)(KEY, tokens[0]))
    return lambda p, tokens: jnp.sum(jnp.sin(net.apply(p, tokens))), params, (tokens,)


class _LinenScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        def body(layer, x, _):
            return jnp.tanh(layer(x)), None

        scanned = nn.scan(
            nn.remat(body),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        return scanned(nn.Dense(4), x, None)[0]


@model("['params']['Dense_0']['bias']", promotes=True)
def flax_linen_scan_and_remat(draw):
    x = draw(N, 3, 4)
    net = _LinenScan()
    params = _as_default(jax.jit(net.init)(KEY, x[0].astype("float32")))
    return lambda p, x: jnp.sum(jnp.sin(net.apply(p, x))), params, (x,)


class _Nnx(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3,), rngs=rngs)
        self.norm = nnx.GroupNorm(4, num_groups=2, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.head = nnx.LinearGeneral((5, 4), 3, axis=(-2, -1), rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.conv(x))
        for block in self.blocks:
            x = jnp.tanh(block(x))
        return self.head(x)


@model("['conv']['kernel'].value", promotes=True)
def flax_nnx(draw):
    graph, params = nnx.split(_Nnx(nnx.Rngs(0)), nnx.Param)
    params = _as_default(params)
    return (
        lambda p, x: jnp.sum(jnp.sin(nnx.merge(graph, p)(x))),
        params,
        (draw(N, 5, 2),),
    )


class _BatchNormed(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 4, (3,), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.hidden = nnx.Linear(4, 6, rngs=rngs)
        self.normed = nnx.BatchNorm(6, rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        x = jnp.tanh(self.norm(self.conv(x))).mean(0)
        return self.head(jnp.tanh(self.normed(self.hidden(x))))


@model("['conv']['kernel'].value", promotes=True)
def flax_nnx_batch_norm(draw):
    """In evaluation mode, where the statistics are constants: see
    docs/howto/batch_norm.md.
    """
    net = _BatchNormed(nnx.Rngs(0))
    net.eval()
    graph, params, statistics = map(_as_default, nnx.split(net, nnx.Param, ...))
    # As after some training: neither zero nor one.
    statistics = jax.tree.map(lambda x: 0.5 + draw(*x.shape) ** 2, statistics)
    x = draw(N, 5, 2)

    def apply(p, statistics, x):
        return jnp.sum(jnp.sin(nnx.merge(graph, p, statistics)(x)))

    return lambda p, x: apply(p, statistics, x), params, (x,)


class _EquinoxBatchNormed(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key)
        self.hidden = eqx.nn.Linear(3, 5, key=keys[0])
        self.norm = eqx.nn.BatchNorm(5, axis_name="batch", mode="batch")
        self.head = eqx.nn.Linear(5, 4, key=keys[1])

    def __call__(self, x, state):
        x, state = self.norm(self.hidden(x), state)
        return self.head(jnp.tanh(x)), state


@model(promotes=True)
def equinox_batch_norm(draw):
    """In inference mode, which looks at no axis of a batch."""
    x = draw(N, 3)
    with jax.enable_x64(False):  # the same random numbers in either precision
        net, state = eqx.nn.make_with_state(_EquinoxBatchNormed)(KEY)
        train = jax.vmap(net, in_axes=(0, None), out_axes=(0, None), axis_name="batch")
        _, state = train(x.astype("float32"), state)
    state = _as_default(state)
    params, static = eqx.partition(eqx.nn.inference_mode(net), eqx.is_inexact_array)

    def fun(p, x):
        outputs, _ = eqx.combine(p, static)(x, state)
        return jnp.sum(jnp.sin(outputs))

    return fun, _as_default(params), (x,)


@model(promotes=True)
def equinox(draw):
    keys = jax.random.split(KEY, 4)
    with jax.enable_x64(False):  # the same random numbers in either precision
        net = (
            eqx.nn.MLP(3, 6, 5, 1, key=keys[0]),
            eqx.nn.LayerNorm(6),
            eqx.nn.MultiheadAttention(2, 6, key=keys[1]),
            eqx.nn.LSTMCell(6, 4, key=keys[2]),
        )
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def fun(p, x):
        mlp, norm, attention, cell = eqx.combine(p, static)
        x = jax.vmap(norm)(jax.vmap(mlp)(x))
        x = attention(x, x, x)
        start = jnp.zeros(4), jnp.zeros(4)
        (h, _), _ = jax.lax.scan(lambda carry, x: (cell(x, carry), None), start, x)
        return jnp.sum(jnp.sin(h))

    return fun, _as_default(params), (draw(N, 4, 3),)


@model(promotes=True)
def haiku(draw):
    def forward(tokens):
        x = hk.Embed(7, 5)(tokens)
        x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
        x, _ = hk.dynamic_unroll(hk.LSTM(4), x, hk.LSTM(4).initial_state(None))
        return hk.nets.MLP([5, 2])(x)

    net = hk.without_apply_rng(hk.transform(forward))
    tokens = draw.ints(7, N, 4)
    params = _as_default(jax.jit(net.init)(KEY, tokens[0]))
    return lambda p, tokens: jnp.sum(jnp.sin(net.apply(p, tokens))), params, (tokens,)
