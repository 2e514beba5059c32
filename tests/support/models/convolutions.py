"""Convolutions of every form, and pooling."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from ._table import N, model

FLAT = ("NHC", "HIO", "NHC")
IMAGE = ("NHWC", "HWIO", "NHWC")


def _conv(x, w, strides=None, padding="SAME", numbers=IMAGE, **options):
    strides = strides or (1,) * (w.ndim - 2)
    return lax.conv_general_dilated(
        x[None], w, strides, padding, dimension_numbers=numbers, **options
    )[0]


@model("['plain']", "['strided']", "['valid']", "['pointwise']")
def image_convolutions(draw):
    def fun(p, x):
        x = jnp.tanh(_conv(x, p["plain"]) + p["bias"])
        x = jnp.tanh(_conv(x, p["strided"], (2, 2)))
        x = jnp.tanh(_conv(x, p["pointwise"]))
        x = nn.max_pool(x, (2, 2), padding="SAME")
        x = lax.reduce_window(x, 0.0, lax.add, (2, 1, 1), (1, 1, 1), "VALID")
        return jnp.sum(jnp.sin(_conv(x, p["valid"], padding="VALID")))

    params = {
        "plain": draw(3, 3, 2, 3),
        "bias": draw(1, 1, 3),
        "strided": draw(3, 2, 3, 4),
        "pointwise": draw(1, 1, 4, 3),
        "valid": draw(1, 2, 3, 2),
    }
    return fun, params, (draw(N, 6, 5, 2),)


@model("['grouped']", "['depthwise']", "['dilated']", "['transposed']")
def grouped_dilated_and_transposed_convolutions(draw):
    def fun(p, x):
        x = jnp.tanh(_conv(x, p["grouped"], numbers=FLAT, feature_group_count=2))
        x = jnp.tanh(_conv(x, p["depthwise"], numbers=FLAT, feature_group_count=6))
        x = jnp.tanh(_conv(x, p["dilated"], numbers=FLAT, rhs_dilation=(2,)))
        x = lax.conv_transpose(
            x[None], p["transposed"], (2,), "SAME", dimension_numbers=FLAT
        )[0]
        return jnp.sum(jnp.sin(x))

    params = {
        "grouped": draw(3, 2, 6),
        "depthwise": draw(3, 1, 6),
        "dilated": draw(2, 6, 3),
        "transposed": draw(3, 3, 2),
    }
    return fun, params, (draw(N, 7, 4),)


@model("['one channel']", "['channels first']", "['shared']")
def convolutions_in_other_layouts(draw):
    def fun(p, x, y):
        first = lax.conv(x[None], p["channels first"], (1, 2), "VALID")[0]
        again = _conv(_conv(y, p["shared"], numbers=FLAT), p["shared"], numbers=FLAT)
        causal = _conv(y, p["one channel"], padding=[(2, 0)], numbers=FLAT)
        blurred = jnp.convolve(y[:, 0], p["kernel"], mode="full")
        patches = lax.conv_general_dilated_patches(y.T[None], (2,), (1,), "VALID")[0].T
        parts = (first, again, causal, blurred, patches @ p["patches"])
        return sum(jnp.sum(jnp.sin(part)) for part in parts)

    params = {
        "channels first": draw(3, 2, 2, 2),
        "shared": draw(3, 2, 2),
        "one channel": draw(3, 2, 1),
        "kernel": draw(3),
        "patches": draw(4, 3),
    }
    return fun, params, (draw(N, 2, 4, 5), draw(N, 5, 2))


@model("['w']")
def convolutions_in_a_scan(draw):
    def fun(p, x):
        def layer(x, w):
            return jnp.tanh(_conv(x, w, numbers=FLAT)), None

        x, _ = lax.scan(layer, x, p["w"])
        return jnp.sum(jnp.sin(jax.vmap(lambda row: row @ p["v"])(x)))

    return fun, {"w": draw(3, 3, 2, 2), "v": draw(2, 3)}, (draw(N, 5, 2),)


@model()
def convolutions_in_scans(draw):
    """Of layers and of time: kernels are smaller than what they are made from."""

    def conv(x, kernel):
        return _conv(x, kernel, numbers=FLAT)

    def fun(p, x):
        x, _ = lax.scan(lambda x, k: (jnp.tanh(conv(x, k)), None), x, p["layers"])

        def step(h, _):
            h = jnp.tanh(conv(h, p["time"]) + x)
            return lax.scan(
                lambda h, _: (jnp.sin(conv(h, p["time"])), None), h, length=2
            )

        h, _ = lax.scan(step, x, length=3)
        return jnp.sum(jnp.sin(h))

    return fun, {"layers": draw(2, 3, 2, 2), "time": draw(3, 2, 2)}, (draw(N, 9, 2),)
