"""Models whose weights are computed from parameters, or whose examples share terms."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from _layers import Draw, Problem

Weight = Callable[[dict[str, jax.Array]], jax.Array]


def _layer(draw: Draw, weight: Weight, d: int, n: int) -> Problem:
    """One layer of d × d, whose weight is a function of parameters."""
    params = {"w": draw(d, d) / d**0.5, "s": draw(d), "a": draw(1)[0]}
    params |= {"u": draw(d, 8) / d**0.5, "v": draw(8, d) / 8**0.5}

    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ weight(p)) ** 2)

    return Problem(fun, params, (draw(n, d),))


def mask(draw: Draw, d: int, n: int) -> Problem:
    kept = np.random.default_rng(0).random((d, d)) < 0.5
    return _layer(draw, lambda p: jnp.where(kept, p["w"], 0), d, n)


def learned_scale(draw: Draw, d: int, n: int) -> Problem:
    return _layer(draw, lambda p: p["a"] * p["w"], d, n)


def weight_norm(draw: Draw, d: int, n: int) -> Problem:
    def weight(p):
        return p["w"] * (p["s"] / jnp.linalg.norm(p["w"], axis=0))[None]

    return _layer(draw, weight, d, n)


def spectral_norm(draw: Draw, d: int, n: int) -> Problem:
    """Divided by its largest singular value, from two steps of power iteration."""

    def weight(p):
        w = jax.lax.stop_gradient(p["w"])
        v = jnp.ones(d) / d**0.5
        for _ in range(2):
            u = w @ v
            u = u / jnp.linalg.norm(u)
            v = u @ w
            v = v / jnp.linalg.norm(v)
        return p["w"] / (u @ p["w"] @ v)

    return _layer(draw, weight, d, n)


def merged_adapters(draw: Draw, d: int, n: int) -> Problem:
    return _layer(draw, lambda p: jax.lax.stop_gradient(p["w"]) + p["u"] @ p["v"], d, n)


def permuted(draw: Draw, d: int, n: int) -> Problem:
    order = np.random.default_rng(0).permutation(d)
    return _layer(draw, lambda p: p["w"][order], d, n)


def softplus(draw: Draw, d: int, n: int) -> Problem:
    return _layer(draw, lambda p: jax.nn.softplus(p["w"]), d, n)


def masked_sequence(draw: Draw, d: int, n: int, positions: int = 16) -> Problem:
    """A masked weight at many positions: its rows do not have a closed form."""
    kept = np.random.default_rng(0).random((d, d)) < 0.5

    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ (p["w"] * kept.astype(p["w"].dtype))) ** 2)

    return Problem(fun, {"w": draw(d, d) / d**0.5}, (draw(n, positions, d),))


def weight_decay(draw: Draw, d: int, n: int) -> Problem:
    def fun(p, x):
        return jnp.sum(jnp.tanh(x @ p["w"]) ** 2) + 1e-3 * jnp.sum(p["w"] ** 2)

    return Problem(fun, {"w": draw(d, d) / d**0.5}, (draw(n, d),))


def learned_step(draw: Draw, d: int, n: int) -> Problem:
    """Rounded to steps of a learned size, within bounds; gradients pass straight."""

    def weight(p):
        step = jnp.exp(p["a"] - 3)
        w = jnp.clip(p["w"] / step, -8, 7)
        return (w + jax.lax.stop_gradient(jnp.round(w) - w)) * step

    return _layer(draw, weight, d, n)


def flow(draw: Draw, d: int, n: int) -> Problem:
    """A linear flow, whose log-determinant all examples share."""

    def fun(p, x):
        lower = jnp.tril(p["lower"], -1) + jnp.eye(d)
        upper = jnp.triu(p["upper"], 1) + jnp.diag(jnp.exp(p["log_scale"]))
        z = jnp.arcsinh(lower @ (upper @ x) + p["shift"])
        return jnp.sum(z**2) / 2 - jnp.sum(p["log_scale"])

    params = {"lower": draw(d, d) / d, "upper": draw(d, d) / d}
    params |= {"log_scale": draw(d) / 10, "shift": draw(d)}
    return Problem(fun, params, (draw(n, d),))


def kalman_filter(draw: Draw, d: int, n: int, steps: int = 32) -> Problem:
    """The log-likelihood of a filter whose covariances all examples share."""

    def fun(p, ys):
        noise = jnp.diag(jnp.exp(p["noise"]))
        move = jnp.eye(d) * 0.9 + p["move"]

        def step(carry, y):
            mean, cov = carry
            mean, cov = move @ mean, move @ cov @ move.T + 0.1 * jnp.eye(d)
            gain = jnp.linalg.solve(cov + noise, cov).T
            error = y - mean
            return (mean + gain @ error, cov - gain @ cov), jnp.sum(error**2)

        _, errors = jax.lax.scan(step, (jnp.zeros(d), jnp.eye(d)), ys)
        return jnp.sum(errors)

    params = {"move": draw(d, d) / (10 * d), "noise": draw(d) / 10}
    return Problem(fun, params, (draw(n, steps, d),))


def vmapped_embedding(draw: Draw, d: int, n: int, length: int = 32) -> Problem:
    def fun(p, tokens):
        x = jax.vmap(lambda i: p["table"][i])(tokens)
        return jnp.sum(jnp.tanh(x @ p["w"]) ** 2)

    params = {"table": draw(20 * d, d), "w": draw(d, d) / d**0.5}
    return Problem(fun, params, (draw.ints(20 * d, n, length),))


def word2vec(draw: Draw, d: int, n: int, negatives: int = 16) -> Problem:
    """A word, its neighbour, and words drawn at random."""

    def fun(p, word, others):
        scores = p["out"][others] @ p["words"][word]
        return jax.nn.softplus(-scores[0]) + jnp.sum(jax.nn.softplus(scores[1:]))

    params = {"words": draw(20 * d, d) / d**0.5, "out": draw(20 * d, d) / d**0.5}
    words = draw.ints(20 * d, n), draw.ints(20 * d, n, 1 + negatives)
    return Problem(fun, params, words)


def hash_grid(draw: Draw, d: int, n: int, levels: int = 8) -> Problem:
    """Features of a point from tables at several resolutions, and a small network."""
    size = 1 << 15

    def fun(p, point):
        features = []
        for level in range(levels):
            corner = jnp.floor(point * 2.0**level).astype(jnp.uint32)
            corners = corner[None] + jnp.asarray(
                [[0, 0], [0, 1], [1, 0], [1, 1]], jnp.uint32
            )
            primes = jnp.asarray([1, 2654435761], jnp.uint32)
            hashed = jnp.bitwise_xor(*(corners * primes[None]).T) % jnp.uint32(size)
            features.append(jnp.sum(p["tables"][level][hashed.astype(jnp.int32)], 0))
        h = jnp.tanh(jnp.concatenate(features) @ p["w"])
        return jnp.sum(h**2)

    params = {"tables": draw(levels, size, 2), "w": draw(2 * levels, d)}
    return Problem(fun, params, (jnp.abs(draw(n, 2)) * 4,))


def chunked_vocabulary(
    draw: Draw, d: int, n: int, positions: int = 16, chunks: int = 8
) -> Problem:
    """A softmax over many words, by chunks of the vocabulary that are recomputed."""
    words = 32 * d

    def fun(p, x, targets):
        table = p["table"].reshape(chunks, words // chunks, d)

        @jax.checkpoint
        def step(total, part):
            scores = x @ part.T
            return jnp.logaddexp(total, jax.nn.logsumexp(scores, axis=-1)), None

        start = jnp.full(positions, -jnp.inf)
        total, _ = jax.lax.scan(step, start, table)
        own = jnp.sum(x * p["table"][targets], axis=-1)
        return jnp.sum(total - own)

    batch = draw(n, positions, d), draw.ints(words, n, positions)
    return Problem(fun, {"table": draw(words, d) / d**0.5}, batch)
