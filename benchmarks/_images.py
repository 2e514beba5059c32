"""Models of images: convolutions in several forms, and a mixer."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from _layers import Draw, Problem, cross_entropy, dense, layer_norm, norm_params


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


def max_pool(x: jax.Array) -> jax.Array:
    return jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (2, 2, 1), (2, 2, 1), "VALID"
    )


def small_conv_net(draw: Draw, n: int) -> Problem:
    def fun(p, x, label):
        for q in p["convs"]:
            x = max_pool(jax.nn.relu(conv(x, q["w"]) + q["b"]))
        return cross_entropy(
            dense(p["out"], jax.nn.relu(dense(p["hidden"], x.reshape(-1)))), label
        )

    shapes = (5, 5, 1, 16), (5, 5, 16, 32)
    convs = [{"w": draw.weight(*shape), "b": jnp.zeros(shape[-1])} for shape in shapes]
    params = {
        "convs": convs,
        "hidden": draw.dense(7 * 7 * 32, 128),
        "out": draw.dense(128, 10),
    }
    return Problem(fun, params, (draw(n, 28, 28, 1), draw.ints(10, n)))


def group_norm(p: Any, x: jax.Array, groups: int = 8) -> jax.Array:
    h, w, c = x.shape
    grouped = x.reshape(h, w, groups, c // groups)
    centred = grouped - jnp.mean(grouped, axis=(0, 1, 3), keepdims=True)
    spread = jnp.mean(centred**2, axis=(0, 1, 3), keepdims=True)
    return (centred * jax.lax.rsqrt(spread + 1e-5)).reshape(h, w, c) * p["scale"] + p[
        "bias"
    ]


def residual_net(
    draw: Draw, n: int, channels: tuple[int, ...] = (16, 32, 64)
) -> Problem:
    def block(p, x, stride):
        y = conv(jax.nn.relu(group_norm(p["norm1"], x)), p["conv1"], stride)
        y = conv(jax.nn.relu(group_norm(p["norm2"], y)), p["conv2"])
        return y + (conv(x, p["skip"], stride) if "skip" in p else x)

    def fun(p, x, label):
        x = conv(x, p["stem"])
        for i, q in enumerate(p["blocks"]):
            x = block(q, x, 2 if "skip" in q and i else 1)
        return cross_entropy(
            dense(p["out"], jnp.mean(jax.nn.relu(x), axis=(0, 1))), label
        )

    blocks, before = [], channels[0]
    for c in channels:
        for _ in range(2):
            q = {"norm1": norm_params(before), "norm2": norm_params(c)}
            q |= {
                "conv1": draw.weight(3, 3, before, c),
                "conv2": draw.weight(3, 3, c, c),
            }
            blocks.append(
                q | ({"skip": draw.weight(1, 1, before, c)} if before != c else {})
            )
            before = c
    params = {"stem": draw.weight(3, 3, 3, channels[0]), "blocks": blocks}
    params["out"] = draw.dense(channels[-1], 10)
    return Problem(fun, params, (draw(n, 32, 32, 3), draw.ints(10, n)))


def depthwise_net(draw: Draw, n: int, c: int = 64, layers: int = 4) -> Problem:
    """Blocks of a depthwise convolution and two 1×1 convolutions."""

    def fun(p, x, label):
        x = conv(x, p["stem"], 4)
        for q in p["blocks"]:
            y = layer_norm(q["norm"], conv(x, q["depthwise"], groups=c))
            x = x + dense(q["down"], jax.nn.gelu(dense(q["up"], y)))
        return cross_entropy(dense(p["out"], jnp.mean(x, axis=(0, 1))), label)

    blocks = [
        {
            "depthwise": draw.weight(7, 7, 1, c),
            "norm": norm_params(c),
            "up": draw.dense(c, 4 * c),
            "down": draw.dense(4 * c, c),
        }
        for _ in range(layers)
    ]
    params = {
        "stem": draw.weight(4, 4, 3, c),
        "blocks": blocks,
        "out": draw.dense(c, 10),
    }
    return Problem(fun, params, (draw(n, 64, 64, 3), draw.ints(10, n)))


def mixer(
    draw: Draw, n: int, patches: int = 64, d: int = 128, layers: int = 4
) -> Problem:
    """Dense layers over the patches of an image and over their channels, in turn."""

    def fun(p, x, label):
        x = dense(p["patch"], x)
        for q in p["layers"]:
            y = jax.nn.gelu(q["rows1"] @ layer_norm(q["norm1"], x))
            x = x + q["rows2"] @ y
            x = x + dense(
                q["down"], jax.nn.gelu(dense(q["up"], layer_norm(q["norm2"], x)))
            )
        return cross_entropy(dense(p["out"], jnp.mean(x, axis=0)), label)

    def layer():
        norms = {"norm1": norm_params(d), "norm2": norm_params(d)}
        rows = {"rows1": draw.weight(2 * patches, patches, fan=patches)}
        rows |= {"rows2": draw.weight(patches, 2 * patches, fan=2 * patches)}
        return norms | rows | {"up": draw.dense(d, 4 * d), "down": draw.dense(4 * d, d)}

    params = {"patch": draw.dense(48, d), "layers": [layer() for _ in range(layers)]}
    params["out"] = draw.dense(d, 10)
    return Problem(fun, params, (draw(n, patches, 48), draw.ints(10, n)))
