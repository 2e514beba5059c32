"""Models to measure: per-example losses as one writes them, each with parameters and a batch.

Nothing here is written for the package: the losses are plain `jax.numpy`, scans and convolutions.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


@dataclass(frozen=True)
class Problem:
    """`fun(params, *shared, *example)` is a scalar; `batch` holds the examples, stacked."""

    fun: Callable[..., jax.Array]
    params: Any
    batch: tuple[jax.Array, ...]
    shared: Any = ()

    @property
    def args(self) -> tuple[Any, ...]:
        return (self.params, *self.shared, *self.batch)

    @property
    def in_axes(self) -> tuple[int | None, ...]:
        return (None,) * (1 + len(self.shared)) + (0,) * len(self.batch)

    @property
    def size(self) -> int:
        return self.batch[0].shape[0]

    @property
    def parameters(self) -> int:
        return sum(x.size for x in jax.tree.leaves(self.params))


class Draw:
    """Random arrays, the same for the same name at every run."""

    def __init__(self, name: str):
        self.rng = np.random.default_rng(zlib.crc32(name.encode()))

    def __call__(self, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.standard_normal(shape, dtype="float32"))

    def weight(self, *shape: int, fan: int | None = None) -> jax.Array:
        """Weights that keep the size of what passes; `fan` inputs, by default all axes but one."""
        return self(*shape) * (fan or max(1, np.prod(shape[:-1]))) ** -0.5

    def ints(self, high: int, *shape: int) -> jax.Array:
        return jnp.asarray(self.rng.integers(high, size=shape), "int32")


def cross_entropy(logits: jax.Array, label: jax.Array) -> jax.Array:
    picked = jnp.take_along_axis(logits, label[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def layer_norm(p: Any, x: jax.Array) -> jax.Array:
    centred = x - jnp.mean(x, axis=-1, keepdims=True)
    spread = jnp.mean(centred**2, axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(spread + 1e-5) * p["scale"] + p["bias"]


def _norm_params(d: int) -> Any:
    return {"scale": jnp.ones(d), "bias": jnp.zeros(d)}


# --------------------------------------------------------------------------------------------------
# Dense layers


def mlp(draw: Draw, widths: tuple[int, ...], n: int) -> Problem:
    def fun(params, x, label):
        *hidden, last = params
        for p in hidden:
            x = jax.nn.relu(x @ p["w"] + p["b"])
        return cross_entropy(x @ last["w"] + last["b"], label)

    params = [
        {"w": draw.weight(a, b), "b": jnp.zeros(b)}
        for a, b in zip(widths, widths[1:], strict=False)
    ]
    return Problem(fun, params, (draw(n, widths[0]), draw.ints(widths[-1], n)))


# --------------------------------------------------------------------------------------------------
# Recurrent networks


def rnn(draw: Draw, steps: int, units: int, n: int) -> Problem:
    def fun(p, xs, label):
        def step(h, x):
            return jnp.tanh(x @ p["in"] + h @ p["rec"] + p["b"]), None

        h, _ = jax.lax.scan(step, jnp.zeros(units), xs)
        return cross_entropy(h @ p["out"], label)

    params = {"in": draw.weight(64, units), "rec": draw.weight(units, units)}
    params |= {"b": jnp.zeros(units), "out": draw.weight(units, 10)}
    return Problem(fun, params, (draw(n, steps, 64), draw.ints(10, n)))


# --------------------------------------------------------------------------------------------------
# Transformers


def _block(p: Any, x: jax.Array, heads: int) -> jax.Array:
    t, d = x.shape
    q, k, v = jnp.split(layer_norm(p["norm1"], x) @ p["qkv"], 3, axis=-1)
    q, k, v = (y.reshape(t, heads, d // heads) for y in (q, k, v))
    scores = jnp.einsum("thk,shk->hts", q, k) * (d // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    mixed = jnp.einsum("hts,shk->thk", jax.nn.softmax(scores, axis=-1), v)
    x = x + mixed.reshape(t, d) @ p["out"]
    hidden = jax.nn.gelu(layer_norm(p["norm2"], x) @ p["up"] + p["up_bias"])
    return x + hidden @ p["down"] + p["down_bias"]


def _block_params(draw: Draw, d: int) -> Any:
    return {
        "norm1": _norm_params(d),
        "norm2": _norm_params(d),
        "qkv": draw.weight(d, 3 * d),
        "out": draw.weight(d, d),
        "up": draw.weight(d, 4 * d),
        "up_bias": jnp.zeros(4 * d),
        "down": draw.weight(4 * d, d),
        "down_bias": jnp.zeros(d),
    }


def transformer(
    draw: Draw,
    t: int,
    n: int,
    layers: int = 4,
    d: int = 256,
    vocabulary: int = 2000,
    *,
    scan: bool = False,
    remat: bool = False,
) -> Problem:
    block = partial(_block, heads=4)
    if remat:
        block = jax.checkpoint(block)

    def fun(p, tokens):
        x = p["embed"][tokens[:-1]] + p["positions"]
        if scan:
            x, _ = jax.lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])
        else:
            for layer in p["layers"]:
                x = block(layer, x)
        return cross_entropy(layer_norm(p["norm"], x) @ p["unembed"], tokens[1:])

    blocks = [_block_params(draw, d) for _ in range(layers)]
    params = {
        "embed": draw(vocabulary, d),
        "positions": 0.1 * draw(t, d),
        "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks) if scan else blocks,
        "norm": _norm_params(d),
        "unembed": draw.weight(d, vocabulary),
    }
    return Problem(fun, params, (draw.ints(vocabulary, n, t + 1),))


# --------------------------------------------------------------------------------------------------
# Convolutions


def conv(x: jax.Array, w: jax.Array, stride: int = 1, groups: int = 1) -> jax.Array:
    """One image (height, width, channels)."""
    return jax.lax.conv_general_dilated(
        x[None],
        w,
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )[0]


def _pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (2, 2, 1), (2, 2, 1), "VALID")


def small_conv_net(draw: Draw, n: int) -> Problem:
    def fun(p, x, label):
        x = _pool(jax.nn.relu(conv(x, p["conv1"]) + p["bias1"]))
        x = _pool(jax.nn.relu(conv(x, p["conv2"]) + p["bias2"]))
        x = jax.nn.relu(x.reshape(-1) @ p["dense"] + p["bias3"])
        return cross_entropy(x @ p["out"], label)

    params = {
        "conv1": draw.weight(5, 5, 1, 16),
        "bias1": jnp.zeros(16),
        "conv2": draw.weight(5, 5, 16, 32),
        "bias2": jnp.zeros(32),
        "dense": draw.weight(7 * 7 * 32, 128),
        "bias3": jnp.zeros(128),
        "out": draw.weight(128, 10),
    }
    return Problem(fun, params, (draw(n, 28, 28, 1), draw.ints(10, n)))


# --------------------------------------------------------------------------------------------------
# Words


def embedding_bag(draw: Draw, vocabulary: int, d: int, words: int, n: int) -> Problem:
    def fun(p, words, label):
        x = jnp.mean(p["embed"][words], axis=0)
        return cross_entropy(jax.nn.relu(x @ p["hidden"]) @ p["out"], label)

    params = {"embed": draw(vocabulary, d), "hidden": draw.weight(d, d), "out": draw.weight(d, 20)}
    return Problem(fun, params, (draw.ints(vocabulary, n, words), draw.ints(20, n)))


@dataclass(frozen=True)
class Model:
    """A family, and one of its members at a certain shape."""

    name: str
    family: str
    build: Callable[[Draw], Problem]
    quick: bool = False  # part of the short run

    def __call__(self) -> Problem:
        return self.build(Draw(self.family))


def _model(name: str, build: Callable[..., Problem], *args: Any, quick: bool = False, **shape: Any):
    return Model(name, build.__name__, lambda draw: build(draw, *args, **shape), quick)


MODELS = [
    _model("MLP 784-1024-1024-10, N=128", mlp, (784, 1024, 1024, 10), 128, quick=True),
    _model("tanh RNN, 32 steps, 256 units, N=64", rnn, 32, 256, 64, quick=True),
    _model("transformer, list, T=64, N=32", transformer, 64, 32),
    _model("transformer, scan, T=64, N=32", transformer, 64, 32, scan=True),
    _model("conv net 28×28, N=128", small_conv_net, 128),
    _model("embedding bag, 20,000 words, N=256", embedding_bag, 20_000, 64, 64, 256, quick=True),
]
