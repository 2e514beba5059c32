"""Transformers, and what is built like them."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from _layers import (
    Draw,
    Problem,
    cross_entropy,
    dense,
    layer_norm,
    norm_params,
    stacked,
)


def attention(q: jax.Array, k: jax.Array, v: jax.Array, heads: int) -> jax.Array:
    t, d = q.shape
    q, k, v = (x.reshape(t, heads, d // heads) for x in (q, k, v))
    scores = jnp.einsum("thk,shk->hts", q, k) * (d // heads) ** -0.5
    scores = jnp.where(jnp.tril(jnp.ones((t, t), bool)), scores, -1e9)
    return jnp.einsum("hts,shk->thk", jax.nn.softmax(scores, axis=-1), v).reshape(t, d)


def transformer_block(p: Any, x: jax.Array) -> jax.Array:
    q, k, v = jnp.split(layer_norm(p["norm1"], x) @ p["qkv"], 3, axis=-1)
    x = x + attention(q, k, v, heads=4) @ p["out"]
    return x + dense(p["down"], jax.nn.gelu(dense(p["up"], layer_norm(p["norm2"], x))))


def block_params(draw: Draw, d: int) -> Any:
    norms = {"norm1": norm_params(d), "norm2": norm_params(d)}
    mixing = {"qkv": draw.weight(d, 3 * d), "out": draw.weight(d, d)}
    return norms | mixing | {"up": draw.dense(d, 4 * d), "down": draw.dense(4 * d, d)}


def transformer(
    draw: Draw,
    t: int,
    n: int,
    *,
    layers: int = 4,
    d: int = 256,
    vocabulary: int = 2000,
    scan: bool = False,
    remat: bool = False,
    tied: bool = False,
) -> Problem:
    block = jax.checkpoint(transformer_block) if remat else transformer_block

    def fun(p, tokens):
        x = p["embed"][tokens[:-1]] + p["positions"]
        if scan:
            x, _ = jax.lax.scan(
                lambda x, layer: (block(layer, x), None), x, p["layers"]
            )
        else:
            for layer in p["layers"]:
                x = block(layer, x)
        unembed = p["embed"].T * d**-0.5 if tied else p["unembed"]
        return cross_entropy(layer_norm(p["norm"], x) @ unembed, tokens[1:])

    blocks = [block_params(draw, d) for _ in range(layers)]
    params = {
        "embed": draw(vocabulary, d),
        "positions": 0.1 * draw(t, d),
        "layers": stacked(blocks) if scan else blocks,
        "norm": norm_params(d),
    }
    if not tied:
        params["unembed"] = draw.weight(d, vocabulary)
    return Problem(fun, params, (draw.ints(vocabulary, n, t + 1),))


def mixture_of_experts(
    draw: Draw, t: int, n: int, experts: int = 8, d: int = 128
) -> Problem:
    """Every token goes to all experts, weighted by its router."""

    def layer(p, x):
        gates = jax.nn.softmax(x @ p["router"], axis=-1)
        hidden = jax.nn.gelu(jnp.einsum("td,edh->teh", x, p["up"]))
        return x + jnp.einsum("te,teh,ehd->td", gates, hidden, p["down"])

    def fun(p, x, label):
        for q in p["layers"]:
            x = layer(q, layer_norm(q["norm"], x))
        return cross_entropy(dense(p["out"], jnp.mean(x, axis=0)), label)

    layers = [
        {
            "norm": norm_params(d),
            "router": draw.weight(d, experts),
            "up": draw.weight(experts, d, 2 * d, fan=d),
            "down": draw.weight(experts, 2 * d, d, fan=2 * d),
        }
        for _ in range(2)
    ]
    return Problem(
        fun,
        {"layers": layers, "out": draw.dense(d, 10)},
        (draw(n, t, d), draw.ints(10, n)),
    )


def low_rank_adapters(
    draw: Draw, t: int, n: int, d: int = 256, rank: int = 8
) -> Problem:
    """Attention layers whose projections are frozen, with adapters that are learned."""

    def fun(p, frozen, x, label):
        for q, w in zip(p["layers"], frozen, strict=True):
            projected = [
                layer_norm(w["norm1"], x) @ m + (x @ q["down"][i]) @ q["up"][i]
                for i, m in enumerate(jnp.split(w["qkv"], 3, axis=1))
            ]
            x = x + attention(*projected, heads=4) @ w["out"]
            x = x + dense(
                w["down"], jax.nn.gelu(dense(w["up"], layer_norm(w["norm2"], x)))
            )
        return cross_entropy(dense(p["out"], jnp.mean(x, axis=0)), label)

    adapters = [
        {"down": draw.weight(3, d, rank, fan=d), "up": 0.01 * draw(3, rank, d)}
        for _ in range(4)
    ]
    frozen = [block_params(draw, d) for _ in range(4)]
    params = {"layers": adapters, "out": draw.dense(d, 10)}
    return Problem(fun, params, (draw(n, t, d), draw.ints(10, n)), (frozen,))
