"""Models of sequences: recurrent nets, words, state spaces."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from _layers import Draw, Problem, cross_entropy, dense


def rnn(draw: Draw, steps: int, units: int, n: int) -> Problem:
    def fun(p, xs, label):
        def step(h, x):
            return jnp.tanh(x @ p["in"] + h @ p["rec"] + p["b"]), None

        h, _ = jax.lax.scan(step, jnp.zeros(units), xs)
        return cross_entropy(h @ p["out"], label)

    params = {"in": draw.weight(64, units), "rec": draw.weight(units, units)}
    params |= {"b": jnp.zeros(units), "out": draw.weight(units, 10)}
    return Problem(fun, params, (draw(n, steps, 64), draw.ints(10, n)))


def lstm(draw: Draw, steps: int, units: int, n: int) -> Problem:
    def fun(p, xs, label):
        def step(state, x):
            h, c = state
            i, f, g, o = jnp.split(dense(p["cell"], jnp.concatenate([x, h])), 4)
            c = jax.nn.sigmoid(f + 1) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        (h, _), _ = jax.lax.scan(step, (jnp.zeros(units), jnp.zeros(units)), xs)
        return cross_entropy(dense(p["out"], h), label)

    params = {"cell": draw.dense(64 + units, 4 * units), "out": draw.dense(units, 10)}
    return Problem(fun, params, (draw(n, steps, 64), draw.ints(10, n)))


def gru(draw: Draw, steps: int, units: int, n: int) -> Problem:
    def fun(p, xs, label):
        inputs = dense(p["in"], xs)

        def step(h, x):
            (r, z, g), (r_h, z_h, g_h) = (
                jnp.split(x, 3),
                jnp.split(dense(p["rec"], h), 3),
            )
            r, z = jax.nn.sigmoid(r + r_h), jax.nn.sigmoid(z + z_h)
            return z * h + (1 - z) * jnp.tanh(g + r * g_h), None

        h, _ = jax.lax.scan(step, jnp.zeros(units), inputs)
        return cross_entropy(dense(p["out"], h), label)

    params = {"in": draw.dense(64, 3 * units), "rec": draw.dense(units, 3 * units)}
    params["out"] = draw.dense(units, 10)
    return Problem(fun, params, (draw(n, steps, 64), draw.ints(10, n)))


def state_space(draw: Draw, t: int, n: int, layers: int = 3, d: int = 64) -> Problem:
    """Diagonal linear recurrences, run in parallel over time by `associative_scan`."""

    def layer(p, x):
        decay = jnp.broadcast_to(jax.nn.sigmoid(p["decay"]), x.shape)

        def join(one, two):
            return one[0] * two[0], one[1] * two[0] + two[1]

        _, states = jax.lax.associative_scan(join, (decay, x @ p["in"]))
        return x + jax.nn.gelu(states + x * p["skip"]) @ p["out"]

    def fun(p, xs, label):
        x = dense(p["encode"], xs)
        for q in p["layers"]:
            x = layer(q, x)
        return cross_entropy(dense(p["out"], jnp.mean(x, axis=0)), label)

    layers_of = [
        {
            "decay": 2 + draw(d),
            "in": draw.weight(d, d),
            "skip": draw(d),
            "out": draw.weight(d, d),
        }
        for _ in range(layers)
    ]
    params = {"encode": draw.dense(8, d), "layers": layers_of, "out": draw.dense(d, 10)}
    return Problem(fun, params, (draw(n, t, 8), draw.ints(10, n)))


def embedding_bag(draw: Draw, vocabulary: int, d: int, words: int, n: int) -> Problem:
    def fun(p, words, label):
        x = jnp.mean(p["embed"][words], axis=0)
        return cross_entropy(jax.nn.relu(x @ p["hidden"]) @ p["out"], label)

    params = {
        "embed": draw(vocabulary, d),
        "hidden": draw.weight(d, d),
        "out": draw.weight(d, 20),
    }
    return Problem(fun, params, (draw.ints(vocabulary, n, words), draw.ints(20, n)))


def next_word(draw: Draw, vocabulary: int, d: int, context: int, n: int) -> Problem:
    """The next word: a large vocabulary on either side of a small network."""

    def fun(p, words, label):
        x = p["embed"][words].reshape(-1)
        return cross_entropy(jnp.tanh(dense(p["hidden"], x)) @ p["out"], label)

    params = {"embed": draw(vocabulary, d), "hidden": draw.dense(context * d, d)}
    params["out"] = draw.weight(d, vocabulary)
    return Problem(
        fun, params, (draw.ints(vocabulary, n, context), draw.ints(vocabulary, n))
    )
